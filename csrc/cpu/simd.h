// Vectors of one register's width in the compiler's own vector types, so that one source serves every instruction set
// (and every architecture): the width follows MMFAST_ISA, set by CMakeLists.txt for each object library.
//
// Everything here lives in a namespace named after the instruction set. Kernel files must not instantiate templates of
// the standard library: the linker keeps one copy of each, perhaps the AVX-512 one, and the baseline would then fault.
#pragma once
#include <stdint.h>
#include <string.h>

#ifndef MMFAST_ISA
#define MMFAST_ISA baseline
#endif

#if defined(__AVX512F__)
#define MMFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MMFAST_VECTOR_BYTES 32
#else
#define MMFAST_VECTOR_BYTES 16
#endif

namespace mmfast {
namespace MMFAST_ISA {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
    typedef int32_t bits __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
    typedef int64_t bits __attribute__((vector_size(MMFAST_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using Bits = typename VectorOf<T>::bits;
template <typename T>
constexpr int kLanes = MMFAST_VECTOR_BYTES / int(sizeof(T));

template <typename T>
inline Vec<T> splat(T value) {
    return Vec<T>{} + value;
}

template <typename T>
inline Vec<T> load(const T* p) {
    Vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
    memcpy(p, &v, sizeof v);
}

// The first n lanes, the rest filled with `rest`. Reads nothing past p[n - 1].
template <typename T>
inline Vec<T> load_partial(const T* p, int n, T rest = T(0)) {
    Vec<T> v = splat<T>(rest);
    memcpy(&v, p, size_t(n) * sizeof(T));
    return v;
}

template <typename T>
inline void store_partial(T* p, Vec<T> v, int n) {
    memcpy(p, &v, size_t(n) * sizeof(T));
}

inline Bits<float> as_bits(Vec<float> v) { return (Bits<float>)v; }
inline Bits<double> as_bits(Vec<double> v) { return (Bits<double>)v; }
inline Vec<float> as_float(Bits<float> b) { return (Vec<float>)b; }
inline Vec<double> as_float(Bits<double> b) { return (Vec<double>)b; }

// max and min that return the second operand where the first is NaN, as the machine instructions do
template <typename V>
inline V max_of(V a, V b) {
    return a > b ? a : b;
}
template <typename V>
inline V min_of(V a, V b) {
    return a < b ? a : b;
}
inline Vec<float> abs_of(Vec<float> v) { return as_float(as_bits(v) & 0x7fffffff); }
inline Vec<double> abs_of(Vec<double> v) { return as_float(as_bits(v) & 0x7fffffffffffffffLL); }

template <typename T>
inline T sum_lanes(Vec<T> v) {
    // a fixed tree, so the result does not depend on how the compiler orders it
    T lane[kLanes<T>];
    memcpy(lane, &v, sizeof v);
    for (int width = kLanes<T> / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    return lane[0];
}

// ---- exp, log1p, sigmoid, tanh, softplus
// ----------------------------------------------------------------------------- exp(x) = 2^k * exp(r) with k = round(x
// / ln 2) and |r| <= ln 2 / 2, by a polynomial; 2^k is applied in two halves so that subnormal results and the largest
// finite ones are right. Inputs are clamped, so the ends saturate to 0 and inf; NaN passes through. Coefficients:
// Taylor's, whose remainder at |r| = 0.3466 is below the rounding error.

inline Vec<float> exp_of(Vec<float> x) {
    using V = Vec<float>;
    using B = Bits<float>;
    V clamped = x > 89.0f ? splat(89.0f) : x;
    clamped = clamped < -104.0f ? splat(-104.0f) : clamped;
    const V shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V shifted = clamped * 1.44269504088896341f + shifter;
    B k = as_bits(shifted) - as_bits(shifter);
    V kf = shifted - shifter;
    V r = clamped - kf * 0.693145751953125f;
    r = r - kf * 1.42860682030941723e-6f;
    V p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    V e = (p * r) * r + r;
    e = e + 1.0f;
    B half = k >> 1;
    e = e * as_float((half + 127) << 23);
    e = e * as_float((k - half + 127) << 23);
    return x != x ? x : e;
}

inline Vec<double> exp_of(Vec<double> x) {
    using V = Vec<double>;
    using B = Bits<double>;
    V clamped = x > 710.0 ? splat(710.0) : x;
    clamped = clamped < -746.0 ? splat(-746.0) : clamped;
    const V shifter = splat(6755399441055744.0);  // 1.5 * 2^52
    V shifted = clamped * 1.4426950408889634074 + shifter;
    B k = as_bits(shifted) - as_bits(shifter);
    V kf = shifted - shifter;
    V r = clamped - kf * 6.93147180369123816490e-01;
    r = r - kf * 1.90821492927058770002e-10;
    V p = splat(1.0 / 6227020800.0);
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    V e = (p * r) * r + r;
    e = e + 1.0;
    B half = k >> 1;
    e = e * as_float((half + 1023) << 52);
    e = e * as_float((k - half + 1023) << 52);
    return x != x ? x : e;
}

// log(1 + u) for 0 <= u <= 1: 2 atanh(s), s = u / (2 + u) <= 1/3, by atanh's series.
inline Vec<float> log1p_unit(Vec<float> u) {
    Vec<float> s = u / (u + 2.0f);
    Vec<float> q = s * s;
    Vec<float> p = splat(1.0f / 15);
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    Vec<float> d = s + s;
    return d + d * (q * p);
}

inline Vec<double> log1p_unit(Vec<double> u) {
    Vec<double> s = u / (u + 2.0);
    Vec<double> q = s * s;
    Vec<double> p = splat(1.0 / 35);
    for (int odd = 33; odd >= 3; odd -= 2) p = p * q + 1.0 / odd;
    Vec<double> d = s + s;
    return d + d * (q * p);
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)): nothing cancels and nothing overflows.
template <typename V>
inline V softplus_of(V x) {
    V tail = log1p_unit(exp_of(-abs_of(x)));
    V top = x < 0 ? V{} : x;
    return top + tail;
}

template <typename V>
inline V sigmoid_of(V x) {
    // exp only of what is not positive: small results keep their relative accuracy, none overflows
    V e = exp_of(-abs_of(x));
    V numerator = x < 0 ? e : V{} + 1;
    return numerator / (e + 1);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
