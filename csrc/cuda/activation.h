// The activations an epilogue can end with, on N values at a time: which one is asked once, and not for each value.
//
// Each operation below costs 1 to 30 flops a value. Comparisons are written so that NaN takes torch's way: through, but
// for leaky relu's gradient, which is multiplied. A slope is 0, or negative_slope, where the argument is 0.
#pragma once
#include "cuda/device.h"

namespace mmfast {
namespace device {

struct Activation {
    int which;  // enum mmfast_activation
    float negative_slope;
};

MMFAST_DEVICE float logistic(float u) {
    const float e = exp_of(-abs_of(u));
    return divide(u < 0 ? e : 1.0f, 1.0f + e);
}
// 4 sigmoid(2u) sigmoid(-2u), in which nothing cancels
MMFAST_DEVICE float tanh_slope(float u) {
    const float e = exp_of(-2.0f * abs_of(u));
    return divide(4.0f * e, (1.0f + e) * (1.0f + e));
}
MMFAST_DEVICE float silu_slope(float u) {
    const float s = logistic(u);
    return s * (1.0f + u * (1.0f - s));
}
// the standard normal distribution function
MMFAST_DEVICE float normal_below(float u) { return 0.5f * (1.0f + erf_of(u * 0.70710678f)); }
MMFAST_DEVICE float gelu_slope(float u) { return normal_below(u) + u * exp_of(-0.5f * u * u) * 0.39894228f; }

template <int N, typename F>
MMFAST_DEVICE void each(const F& f) {
    MMFAST_UNROLL
    for (int j = 0; j < N; ++j) f(j);
}

// u = act(u)
template <int N>
MMFAST_DEVICE void activate(const Activation& by, float (&u)[N]) {
    switch (by.which) {
        case MMFAST_ACT_RELU:
            return each<N>([&](int j) { u[j] = u[j] < 0 ? 0.0f : u[j]; });
        case MMFAST_ACT_LEAKY_RELU:
            return each<N>([&](int j) { u[j] = u[j] < 0 ? u[j] * by.negative_slope : u[j]; });
        case MMFAST_ACT_TANH:
            return each<N>([&](int j) { u[j] = tanh_of(u[j]); });
        case MMFAST_ACT_SIGMOID:
            return each<N>([&](int j) { u[j] = logistic(u[j]); });
        case MMFAST_ACT_SILU:
            return each<N>([&](int j) { u[j] *= logistic(u[j]); });
        case MMFAST_ACT_GELU:
            return each<N>([&](int j) { u[j] *= normal_below(u[j]); });
        default:
            return;
    }
}

// d = d * act'(u). relu's 0 is one whatever d is.
template <int N>
MMFAST_DEVICE void activate_backward(const Activation& by, const float (&u)[N], float (&d)[N]) {
    switch (by.which) {
        case MMFAST_ACT_RELU:
            return each<N>([&](int j) { d[j] = u[j] <= 0 ? 0.0f : d[j]; });
        case MMFAST_ACT_LEAKY_RELU:
            return each<N>([&](int j) { d[j] *= u[j] > 0 ? 1.0f : by.negative_slope; });
        case MMFAST_ACT_TANH:
            return each<N>([&](int j) { d[j] *= tanh_slope(u[j]); });
        case MMFAST_ACT_SIGMOID:
            return each<N>([&](int j) {
                const float s = logistic(u[j]);
                d[j] *= s * (1.0f - s);
            });
        case MMFAST_ACT_SILU:
            return each<N>([&](int j) { d[j] *= silu_slope(u[j]); });
        case MMFAST_ACT_GELU:
            return each<N>([&](int j) { d[j] *= gelu_slope(u[j]); });
        default:
            return;
    }
}

// The same by v = act(u), of silu and gelu, whose value does not tell it, by u.
template <int N>
MMFAST_DEVICE void activate_backward_from(const Activation& by, const float (&v)[N], float (&d)[N]) {
    if (by.which == MMFAST_ACT_TANH) return each<N>([&](int j) { d[j] *= 1.0f - v[j] * v[j]; });
    if (by.which == MMFAST_ACT_SIGMOID) return each<N>([&](int j) { d[j] *= v[j] * (1.0f - v[j]); });
    activate_backward(by, v, d);
}

// N elements of x from i on, as float32; N is 1 or fills 16 bytes
template <int N, typename T>
MMFAST_DEVICE void read(float (&to)[N], Global<const T> x, int64_t i) {
    constexpr int kEach = N < kVector<T> ? N : kVector<T>;
    MMFAST_UNROLL
    for (int v = 0; v < N; v += kEach) {
        const Vector<T, kEach> part = load_vector<kEach>(x, i + v);
        MMFAST_UNROLL
        for (int j = 0; j < kEach; ++j) to[v + j] = to_float(part.at[j]);
    }
}
template <int N, typename T>
MMFAST_DEVICE void write(Global<T> x, int64_t i, const float (&from)[N]) {
    constexpr int kEach = N < kVector<T> ? N : kVector<T>;
    MMFAST_UNROLL
    for (int v = 0; v < N; v += kEach) {
        Vector<T, kEach> part;
        MMFAST_UNROLL
        for (int j = 0; j < kEach; ++j) part.at[j] = from_float<T>(from[v + j]);
        store_vector(x, i + v, part);
    }
}

// f(a value of this dtype): float32 or 16 bits
template <typename F>
int with_type(int dtype, const F& f) {
    switch (dtype) {
        case MMFAST_FLOAT32:
            return f(float{});
        case MMFAST_FLOAT16:
            return f(Half{});
        case MMFAST_BFLOAT16:
            return f(Bf16{});
        default:
            return fail(MMFAST_INVALID_ARGUMENT, "the kernel was given a dtype that it does not take");
    }
}

}  // namespace device
}  // namespace mmfast
