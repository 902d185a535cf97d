// The activations an epilogue can end with: their value and slope, on vectors.
#pragma once
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

// tanh within 1 ulp where it is near 1, for its slope 1 - tanh^2 is taken from it: 1 - 2 / (exp(2|x|) + 1).
template <typename V>
inline V steep_tanh(V x) {
    const V size = abs_of(x);
    const V far = with_sign(V{} + 1 - sigmoid_of(-(size + size)) * 2, x);
    return size < 0.55f ? tanh_of(x) : far;
}

// None, relu, leaky relu: the slope is 1, 0 or negative_slope where z <= 0, and 1 elsewhere. Comparisons are written so
// that NaN takes torch's way: through, with slope 1.
template <typename C>
struct Piecewise {
    C negative_slope;

    Vec<C> value(Vec<C> z) const {
        // zero by selection, for 0 * inf is none
        const Vec<C> below = negative_slope == 0 ? Vec<C>{} : z * negative_slope;
        return z <= 0 ? below : z;
    }
    // the slope at z
    Vec<C> slope(Vec<C> z) const { return z <= 0 ? splat(negative_slope) : splat(C(1)); }
    // the slope where the value is a; negative_slope >= 0 keeps the sign
    Vec<C> slope_from(Vec<C> a) const { return slope(a); }
};

// Tanh, sigmoid, silu: told apart at run time, for their own cost hides the branch.
template <typename C>
struct Curved {
    int activation;

    Vec<C> value(Vec<C> z) const {
        if (activation == MMFAST_ACT_TANH) return steep_tanh(z);
        const Vec<C> s = sigmoid_of(z);
        return activation == MMFAST_ACT_SILU ? z * s : s;
    }
    Vec<C> slope(Vec<C> z) const {
        // 4 sigmoid(2z) sigmoid(-2z), in which nothing cancels
        if (activation == MMFAST_ACT_TANH) return sigmoid_of(z + z) * sigmoid_of(-(z + z)) * C(4);
        const Vec<C> s = sigmoid_of(z);
        return activation == MMFAST_ACT_SILU ? s * (z * (C(1) - s) + C(1)) : slope_from(s);
    }
    // for silu, whose value does not tell its slope, a is the argument
    Vec<C> slope_from(Vec<C> a) const {
        if (activation == MMFAST_ACT_TANH) return C(1) - a * a;
        return activation == MMFAST_ACT_SILU ? slope(a) : a * (C(1) - a);
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
            return body(Curved<C>{activation});
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
