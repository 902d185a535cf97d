// The activations an epilogue can end with: their value, and a gradient through them, on vectors.
#pragma once
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

// tanh within 1 ulp where it is near 1, for its slope 1 - tanh^2 is taken from it: with e = exp(-2|x|) it is
// 1 - 2e / (1 + e) there, and (1 - e) / (1 + e) below, where nothing cancels as tanh_of takes 1 - e.
template <typename V>
inline V steep_tanh(V x) {
    using T = decltype(x[0] + 0);
    const Exponent<T> part = exponent_of(max_of(splat(T(-60)), negative_of(x + x)));
    const V scale = power_of(part);
    const Bits<T> near = abs_of(x) < T(0.55);
    const V e = part.minus_one * scale + scale, rest = part.minus_one * scale + (scale - T(1));
    const V ratio = (near ? rest : e + e) / (part.minus_one * scale + (scale + T(1)));
    return with_sign(abs_of(near ? ratio : T(1) - ratio), x);
}

// The standard normal distribution function at z, 0 rather than tiny far below 0; NaN stays NaN. With a = |z| /
// sqrt(2): below 0.9 erf's Taylor series, beyond erfc(a) = exp(-a^2) * p(1 / (1 + a / 2)), p Chebyshev's fit over its
// range, 2.5e-8 of its value off, for double 1e-15.
inline Vec<float> erfc_factor(Vec<float> t) {
    const float fit[] = {1.4445211e-06f, 7.4929906e-06f, -3.6021526e-05f, -2.2845975e-04f, 6.2826063e-04f,
                         1.0793111e-02f, 5.6967830e-02f, 1.8962319e-01f,  1.9877481e-01f};
    const Vec<float> s = (t * 2.0f - 0.85632184f) * 1.9120879f;
    Vec<float> p = splat(fit[0]);
    for (int i = 1; i < 9; ++i) p = p * s + fit[i];
    return p;
}
inline Vec<double> erfc_factor(Vec<double> t) {
    const double fit[] = {-1.2975314822754117e-11, 1.0184178283228949e-11, 1.407150760391951e-10,
                          -2.6552529322266234e-10, -7.081164875342788e-10, 3.2196338702574894e-09,
                          2.4131490453766337e-10,  -2.791899549806825e-08, 4.120220838232631e-08,
                          2.0958824084822452e-07,  -6.7278275571289e-07,   -1.634743292189413e-06,
                          9.054195578434812e-06,   1.861503172081083e-05,  -0.00012707886640263898,
                          -0.0004311985557259328,  0.001630171895374576,   0.017132619616576198,
                          0.07192583722412307,     0.20110643568353107,    0.1652692771277047};
    const Vec<double> s = (t * 2.0 - 0.7586206896551724) * 1.6111111111111112;
    Vec<double> p = splat(fit[0]);
    for (int i = 1; i < 21; ++i) p = p * s + fit[i];
    return p;
}
template <typename C>
inline Vec<C> normal_below(Vec<C> z) {
    const Vec<C> a = abs_of(z) * C(0.7071067811865476);
    const Vec<C> q = a * a;
    // sum of (-q)^n / (n! (2n + 1)) from the last term on, by the ratio of 1 / n!
    Vec<C> series = {};
    for (int n = sizeof(C) == 4 ? 9 : 17; n > 0; --n)
        series = (splat(C(1) / C(2 * n + 1)) - series) * q * (C(1) / C(n));
    series = splat(C(1)) - series;
    const Vec<C> near = a * series * C(1.1283791670955126);
    const Vec<C> tail = exp_of(-q) * erfc_factor(splat(C(1)) / (a * C(0.5) + C(1)));
    const Vec<C> erf = a < C(0.9) ? near : C(1) - tail;
    const Vec<C> below = a < C(0.9) ? (C(1) - near) : tail;
    return (z < 0 ? below : erf + C(1)) * C(0.5);
}

// None, relu, leaky relu: the slope is 1, 0 or negative_slope where z <= 0, and 1 elsewhere. Comparisons are written so
// that NaN takes torch's way: through, but for leaky relu's gradient, which is multiplied. Zero is by selection, for
// 0 * inf is none.
template <typename C>
struct Piecewise {
    C negative_slope;

    Vec<C> value(Vec<C> z) const {
        const Vec<C> below = negative_slope == 0 ? Vec<C>{} : z * negative_slope;
        return z <= 0 ? below : z;
    }
    // d times the slope at z
    Vec<C> gradient(Vec<C> d, Vec<C> z) const {
        if (negative_slope == 0) return z <= 0 ? Vec<C>{} : d;
        return z > 0 ? d : d * negative_slope;
    }
    // d times the slope where the value is a; negative_slope >= 0 keeps the sign
    Vec<C> gradient_from(Vec<C> d, Vec<C> a) const { return gradient(d, a); }
};

// Tanh, sigmoid, silu, gelu: told apart at run time, for their own cost hides the branch.
template <typename C>
struct Curved {
    int activation;

    Vec<C> value(Vec<C> z) const {
        if (activation == MMFAST_ACT_TANH) return steep_tanh(z);
        if (activation == MMFAST_ACT_GELU) return z * normal_below<C>(z);
        const Vec<C> s = sigmoid_of(z);
        return activation == MMFAST_ACT_SILU ? z * s : s;
    }
    Vec<C> gradient(Vec<C> d, Vec<C> z) const { return d * slope(z); }
    // for silu and gelu, whose value does not tell their slope, a is the argument
    Vec<C> gradient_from(Vec<C> d, Vec<C> a) const { return d * slope_from(a); }

  private:
    Vec<C> slope(Vec<C> z) const {
        // 4 sigmoid(2z) sigmoid(-2z), in which nothing cancels
        if (activation == MMFAST_ACT_TANH) return sigmoid_of(z + z) * sigmoid_of(-(z + z)) * C(4);
        if (activation == MMFAST_ACT_GELU)
            return normal_below<C>(z) + z * exp_of(z * z * C(-0.5)) * C(0.3989422804014327);
        const Vec<C> s = sigmoid_of(z);
        return activation == MMFAST_ACT_SILU ? s * (z * (C(1) - s) + C(1)) : slope_from(s);
    }
    Vec<C> slope_from(Vec<C> a) const {
        if (activation == MMFAST_ACT_TANH) return C(1) - a * a;
        return activation == MMFAST_ACT_SIGMOID ? a * (C(1) - a) : slope(a);
    }
};

// body(the activation), one of the two above
template <typename C, typename Body>
inline int with_activation(int activation, double negative_slope, const Body& body) {
    switch (activation) {
        case MMFAST_ACT_NONE:
            return body(Piecewise<C>{C(1)});
        case MMFAST_ACT_RELU:
            return body(Piecewise<C>{C(0)});
        case MMFAST_ACT_LEAKY_RELU:
            return body(Piecewise<C>{C(negative_slope)});
        case MMFAST_ACT_TANH:
        case MMFAST_ACT_SIGMOID:
        case MMFAST_ACT_SILU:
        case MMFAST_ACT_GELU:
            return body(Curved<C>{activation});
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
