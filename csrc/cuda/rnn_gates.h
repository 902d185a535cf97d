// The equations of one unit of a recurrent layer, forward and backward, as in mmfast.h. Kernels share them, and what
// their entries need. T: what the results are stored in, on which the accuracy of the functions depends.
#pragma once
#include "cuda/device.h"

namespace mmfast {
namespace device {

template <typename T>
MMFAST_DEVICE float sigmoid_of(float x) {
    if constexpr (sizeof(T) == 2) return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x));
    const float e = exp_of(-abs_of(x));
    return divide(x < 0 ? e : 1.0f, 1.0f + e);
}
// tanh_approx's error, 2^-11 of the value, is a quarter of a rounding of Bf16, and all of one of Half
template <typename T>
MMFAST_DEVICE float gate_tanh(float x);
template <>
MMFAST_DEVICE float gate_tanh<float>(float x) {
    return tanh_of(x);
}
template <>
MMFAST_DEVICE float gate_tanh<Half>(float x) {
    return fma_of(2.0f, sigmoid_of<Half>(2.0f * x), -1.0f);
}
template <>
MMFAST_DEVICE float gate_tanh<Bf16>(float x) {
    return tanh_approx(x);
}

// i f g o from their sums; c' in, c out. Returns h.
template <typename T>
MMFAST_DEVICE float lstm(float& i, float& f, float& g, float& o, float& c) {
    i = sigmoid_of<T>(i), f = sigmoid_of<T>(f), g = gate_tanh<T>(g), o = sigmoid_of<T>(o);
    c = f * c + i * g;
    return o * gate_tanh<T>(c);
}
// r z from their sums, n from its input side. Returns h of h'.
template <typename T>
MMFAST_DEVICE float gru(float& r, float& z, float& n, float a_n, float h) {
    r = sigmoid_of<T>(r), z = sigmoid_of<T>(z), n = gate_tanh<T>(n + r * a_n);
    return n + z * (h - n);
}
template <typename T>
MMFAST_DEVICE float rnn(float sum, bool relu) {
    return !relu ? gate_tanh<T>(sum) : sum < 0 ? 0.0f : sum;
}

// Gates in, the gradients of their sums out; dc in and, that of c', out. d: the gradient of h; before: c'.
template <typename T>
MMFAST_DEVICE void lstm_backward(float& i, float& f, float& g, float& o, float& dc, float d, float c, float before) {
    const float tanh_c = gate_tanh<T>(c), dcell = dc + d * o * (1.0f - tanh_c * tanh_c);
    dc = dcell * f;
    const float di = dcell * g * (i * (1.0f - i));
    f = dcell * before * (f * (1.0f - f));
    g = dcell * i * (1.0f - g * g);
    o = d * tanh_c * (o * (1.0f - o));
    i = di;
}
// The same; a_n in, its gradient out. d in and, what of it h' has past the product, out. before: h'.
MMFAST_DEVICE void gru_backward(float& r, float& z, float& n, float& a_n, float& d, float before) {
    const float carried = d * z, to_n = d * (1.0f - z), reset = r;
    z = d * (before - n) * (z * (1.0f - z));
    n = to_n * (1.0f - n * n);
    r = n * a_n * (reset * (1.0f - reset));
    a_n = n * reset;
    d = carried;
}
// relu's as torch's: NaN where h is, 0 where it is 0
MMFAST_DEVICE float rnn_backward(float d, float h, bool relu) { return !relu ? d * (1.0f - h * h) : h <= 0 ? 0.0f : d; }

// A number as a type.
template <auto k>
struct Constant {
    static constexpr auto value = k;
};

// f(type, gates a unit) of a layer, both as constants
template <typename F>
int with_gates(int dtype, int mode, const F& f) {
    const auto typed = [&](auto type) {
        if (mode == MMFAST_LSTM) return f(type, Constant<4>{});
        return mode == MMFAST_GRU ? f(type, Constant<3>{}) : f(type, Constant<1>{});
    };
    switch (dtype) {
        case MMFAST_FLOAT32:
            return typed(float{});
        case MMFAST_FLOAT16:
            return typed(Half{});
        case MMFAST_BFLOAT16:
            return typed(Bf16{});
        default:
            return fail(MMFAST_INVALID_ARGUMENT, "the kernel was given a dtype that it does not take");
    }
}

}  // namespace device
}  // namespace mmfast
