// Vectors of one register's width in the compiler's own vector types, so that one source serves every instruction set
// (and every architecture): the width follows MMFAST_ISA, set by CMakeLists.txt for each object library.
//
// Everything here lives in a namespace named after the instruction set. Kernel files must not instantiate templates of
// the standard library: the linker keeps one copy of each, perhaps the AVX-512 one, and the baseline would then fault.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
    // not +, which would turn -0 into 0 and so cost an instruction
    return value - Vec<T>{};
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

#if defined(__AVX512F__)
// masked instructions: a memcpy of a length known only at run time is a call, ten times as long
inline Vec<float> load_partial(const float* p, int n, float rest = 0) {
    return (Vec<float>)_mm512_mask_loadu_ps((__m512)splat(rest), __mmask16((1u << n) - 1), p);
}
inline Vec<double> load_partial(const double* p, int n, double rest = 0) {
    return (Vec<double>)_mm512_mask_loadu_pd((__m512d)splat(rest), __mmask8((1u << n) - 1), p);
}
inline void store_partial(float* p, Vec<float> v, int n) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
inline void store_partial(double* p, Vec<double> v, int n) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#elif defined(__AVX2__)
inline Bits<float> first_lanes(int n, float) { return Bits<float>{0, 1, 2, 3, 4, 5, 6, 7} < n; }
inline Bits<double> first_lanes(int n, double) { return Bits<double>{0, 1, 2, 3} < int64_t(n); }
inline Vec<float> load_partial(const float* p, int n, float rest = 0) {
    const Bits<float> mask = first_lanes(n, rest);
    return mask ? (Vec<float>)_mm256_maskload_ps(p, (__m256i)mask) : splat(rest);
}
inline Vec<double> load_partial(const double* p, int n, double rest = 0) {
    const Bits<double> mask = first_lanes(n, rest);
    return mask ? (Vec<double>)_mm256_maskload_pd(p, (__m256i)mask) : splat(rest);
}
inline void store_partial(float* p, Vec<float> v, int n) {
    _mm256_maskstore_ps(p, (__m256i)first_lanes(n, 0.0f), (__m256)v);
}
inline void store_partial(double* p, Vec<double> v, int n) {
    _mm256_maskstore_pd(p, (__m256i)first_lanes(n, 0.0), (__m256d)v);
}
#endif

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
// a where v is negative, else b; of v = -0 either
template <typename V>
inline V by_sign(V v, V a, V b) {
    return v < 0 ? a : b;
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// one instruction each, where the compiler takes two
inline Vec<float> max_of(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec<double> max_of(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline Vec<float> by_sign(Vec<float> v, Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)v);
}
inline Vec<double> by_sign(Vec<double> v, Vec<double> a, Vec<double> b) {
    return (Vec<double>)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)v);
}
#endif
inline Vec<float> abs_of(Vec<float> v) { return as_float(as_bits(v) & 0x7fffffff); }
inline Vec<double> abs_of(Vec<double> v) { return as_float(as_bits(v) & 0x7fffffffffffffffLL); }

template <typename T, int kCount>
struct LanesOf {
    typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};

// Both halves added, and so on: a fixed tree, so that the result does not depend on how the compiler orders it.
template <typename T, int kCount>
inline T sum_halves(const typename LanesOf<T, kCount>::type& v) {
    if constexpr (kCount == 2) return v[0] + v[1];
    if constexpr (kCount > 2) {
        typename LanesOf<T, kCount / 2>::type low, high;
        memcpy(&low, &v, sizeof low);
        memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum_halves<T, kCount / 2>(low + high);
    }
}

template <typename T>
inline T sum_lanes(Vec<T> v) {
    return sum_halves<T, kLanes<T>>(v);
}

// out[i] = the sum of v[i]'s lanes, i < 4
template <typename T>
inline void sum_lanes_of_four(T* out, const Vec<T>* v) {
    for (int i = 0; i < 4; ++i) out[i] = sum_lanes<T>(v[i]);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// by a third of the instructions
template <>
inline void sum_lanes_of_four<float>(float* out, const Vec<float>* v) {
    const __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), high = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256 both = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
#endif

#if defined(__AVX512F__)
template <>
inline void sum_lanes_of_four<float>(float* out, const Vec<float>* v) {
    const auto add_pairs = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512d low = _mm512_castps_pd(add_pairs((__m512)v[0], (__m512)v[1]));
    const __m512d high = _mm512_castps_pd(add_pairs((__m512)v[2], (__m512)v[3]));
    const __m512 fours =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    const __m256 twos = _mm256_add_ps(_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps(fours, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(twos), _mm256_extractf128_ps(twos, 1)));
}
#endif

// out[i][j] = in[j][i]
template <typename T>
inline void transpose(const Vec<T>* in, Vec<T>* out) {
    constexpr int L = kLanes<T>;
    T lanes[L][L], turned[L][L];
    memcpy(lanes, in, sizeof lanes);
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) turned[i][j] = lanes[j][i];
    memcpy(out, turned, sizeof turned);
}

#if defined(__AVX512F__)
// the same tree
template <>
inline float sum_lanes<float>(Vec<float> v) {
    const __m512 whole = (__m512)v;
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// pairs of elements, of pairs, of fours and of eights change places
template <>
inline void transpose<float>(const Vec<float>* in, Vec<float>* out) {
    __m512 a[16], b[16];
    const auto pairs = [](__m512 x, __m512 y, bool high) {
        const __m512d left = _mm512_castps_pd(x), right = _mm512_castps_pd(y);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(left, right) : _mm512_unpacklo_pd(left, right));
    };
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)in[i], (__m512)in[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)in[i], (__m512)in[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        b[i] = pairs(a[i], a[i + 2], false), b[i + 1] = pairs(a[i], a[i + 2], true);
        b[i + 2] = pairs(a[i + 1], a[i + 3], false), b[i + 3] = pairs(a[i + 1], a[i + 3], true);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        out[i] = (Vec<float>)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
        out[i + 8] = (Vec<float>)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    }
}
#elif defined(__AVX2__)
// pairs of elements, of pairs and of fours change places
template <>
inline void transpose<float>(const Vec<float>* in, Vec<float>* out) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)in[i], (__m256)in[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)in[i], (__m256)in[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44), b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44), b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        out[i] = (Vec<float>)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        out[i + 4] = (Vec<float>)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#endif

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

// x = k ln 2 + r with |r| <= ln 2 / 2, for -1060 <= x <= 0, and what exp needs of it: `minus_one` = exp(r) - 1, whose
// relative accuracy holds near 0. Coefficients: minimax for the relative error of exp(r) - 1, 1.3e-8 and 1.8e-17.
template <typename T>
struct Exponent {
    Vec<T> minus_one, power;  // exp(r) - 1, k
    Bits<T> whole;            // k in the low bits, under those of the shifter
};

inline Exponent<float> exponent_of(Vec<float> x) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const Vec<float> shifted = x * 1.44269504088896341f + shifter, k = shifted - shifter;
    Vec<float> r = x - k * 0.693145751953125f;
    r = r - k * 1.42860682030941723e-6f;
    Vec<float> q = splat(1.38825168059e-3f);
    q = q * r + 8.36651548526e-3f;
    q = q * r + 4.16671997689e-2f;
    q = q * r + 1.66665436577e-1f;
    q = q * r + 4.99999981547e-1f;
    return {(r * r) * q + r, k, as_bits(shifted)};
}

inline Exponent<double> exponent_of(Vec<double> x) {
    const double shifter = 6755399441055744.0;  // 1.5 * 2^52
    const Vec<double> shifted = x * 1.4426950408889634074 + shifter, k = shifted - shifter;
    Vec<double> r = x - k * 6.93147180369123816490e-01;
    r = r - k * 1.90821492927058770002e-10;
    Vec<double> q = splat(2.5053775125185351991e-8);
    q = q * r + 2.7626027055292505834e-7;
    q = q * r + 2.7557407513647788689e-6;
    q = q * r + 2.4801505299484149955e-5;
    q = q * r + 1.9841269719065305512e-4;
    q = q * r + 1.3888888931545012484e-3;
    q = q * r + 8.3333333333895170271e-3;
    q = q * r + 4.1666666666576809671e-2;
    q = q * r + 1.6666666666666589338e-1;
    q = q * r + 5.0000000000000051755e-1;
    return {(r * r) * q + r, k, as_bits(shifted)};
}

// v * 2^k for 0.5 < v < 2 and -150 <= k <= 0 (-1080 for double), subnormal results rounded once
inline Vec<float> scale_of(Vec<float> v, const Exponent<float>& part) {
#if defined(__AVX512F__)
    // maskz: gcc warns of the plain form's own undefined operand
    return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)part.power);
#else
    // by a power that is normal, then by a constant one
    return v * as_float((part.whole << 23) + ((127 + 64) << 23)) * 0x1p-64f;
#endif
}
inline Vec<double> scale_of(Vec<double> v, const Exponent<double>& part) {
#if defined(__AVX512F__)
    return (Vec<double>)_mm512_maskz_scalef_pd(0xff, (__m512d)v, (__m512d)part.power);
#else
    return v * as_float((part.whole << 52) + ((1023LL + 512) << 52)) * 0x1p-512;
#endif
}

// 2^k for -100 <= k <= 0
inline Vec<float> power_of(const Exponent<float>& part) {
#if defined(__AVX512F__)
    return scale_of(splat(1.0f), part);
#else
    return as_float((part.whole << 23) + (127 << 23));
#endif
}
inline Vec<double> power_of(const Exponent<double>& part) {
#if defined(__AVX512F__)
    return scale_of(splat(1.0), part);
#else
    return as_float((part.whole << 52) + (1023LL << 52));
#endif
}

inline Vec<float> negative_of(Vec<float> v) { return as_float(as_bits(v) | int32_t(0x80000000)); }
inline Vec<double> negative_of(Vec<double> v) { return as_float(as_bits(v) | int64_t(0x8000000000000000ULL)); }
inline Vec<float> with_sign(Vec<float> v, Vec<float> sign) {
    return as_float(as_bits(v) | (as_bits(sign) & int32_t(0x80000000)));
}
inline Vec<double> with_sign(Vec<double> v, Vec<double> sign) {
    return as_float(as_bits(v) | (as_bits(sign) & int64_t(0x8000000000000000ULL)));
}

template <typename T>
constexpr T kSmallestExponent = sizeof(T) == 4 ? T(-104) : T(-746);

// exp(x) for x <= 0, at most 2 ulp off, subnormal results included; NaN stays NaN.
#if defined(__AVX512F__)
template <typename V>
inline V exp_negative(V x) {
    using T = decltype(x[0] + 0);
    const Exponent<T> part = exponent_of(max_of(splat(kSmallestExponent<T>), x));
    return scale_of(part.minus_one + T(1), part);
}
#else
// 2^(k + 64) of exponent_of's k is a normal number, and the same of double with 512; then down, rounded once
inline Vec<float> exp_negative(Vec<float> x) {
    const Exponent<float> part = exponent_of(max_of(splat(kSmallestExponent<float>), x));
    // what the low bits of a float of this size hold, the shift makes an exponent
    const Vec<float> raised = as_float(as_bits(part.power + (12582912.0f + 127 + 64)) << 23);
    return (part.minus_one * raised + raised) * 0x1p-64f;
}
inline Vec<double> exp_negative(Vec<double> x) {
    const Exponent<double> part = exponent_of(max_of(splat(kSmallestExponent<double>), x));
    const Vec<double> raised = as_float(as_bits(part.power + (6755399441055744.0 + 1023 + 512)) << 52);
    return (part.minus_one * raised + raised) * 0x1p-512;
}
#endif

// log(1 + x) for 0 <= x < 2^(the dtype's largest exponent): 1 + x = 2^k * (1 + f), 0 <= f < 1; NaN stays NaN.
inline Vec<float> log1p_of(Vec<float> x) {
    const Bits<float> exponent = as_bits(x + 1.0f) & 0x7f800000;
    const Vec<float> power = as_float(exponent), inverse = as_float(0x7f000000 - exponent);
    const Vec<float> k = __builtin_convertvector((exponent >> 23) - 127, Vec<float>);
    // exact, or nearly so: of k = 0 it is x itself
    const Vec<float> f = (x + (1.0f - power)) * inverse;
    return k * 0.693147180559945309f + log1p_unit(f);
}
inline Vec<double> log1p_of(Vec<double> x) {
    const Bits<double> exponent = as_bits(x + 1.0) & 0x7ff0000000000000LL;
    const Vec<double> power = as_float(exponent), inverse = as_float(0x7fe0000000000000LL - exponent);
    const Vec<double> k = __builtin_convertvector((exponent >> 52) - 1023, Vec<double>);
    const Vec<double> f = (x + (1.0 - power)) * inverse;
    return k * 0.693147180559945309417 + log1p_unit(f);
}

// 1 / (1 + exp(-x)), at most 2 ulp off over the full range, subnormal results included; NaN stays NaN.
template <typename T>
inline Vec<T> sigmoid_lanes(Vec<T> x) {
    // exp only of what is not positive: small results keep their relative accuracy, none overflows
    Vec<T> e = exp_negative(negative_of(x));
    Vec<T> numerator = by_sign(x, e, splat(T(1)));
    return numerator / (e + T(1));
}
inline Vec<float> sigmoid_of(Vec<float> x) { return sigmoid_lanes<float>(x); }
inline Vec<double> sigmoid_of(Vec<double> x) { return sigmoid_lanes<double>(x); }

// tanh(x) = -m / (m + 2), m = exp(-2|x|) - 1 <= 0, at most 2 ulp off over the full range: where 2|x| < ln 2 / 2, m is
// the polynomial alone, and beyond 2^k * (exp(r) - 1) + (2^k - 1) cancels nothing; NaN stays NaN.
template <typename T>
inline Vec<T> tanh_lanes(Vec<T> x) {
    // from here on tanh is 1 to the last bit, and 2^k is still far from subnormal
    Vec<T> a = max_of(splat(T(-60)), negative_of(x + x));
    Exponent<T> part = exponent_of(a);
    Vec<T> scale = power_of(part);
    // the sums with 1 are exact, so that each operand is rounded once
    Vec<T> m = part.minus_one * scale + (scale - T(1));
    Vec<T> sum = part.minus_one * scale + (scale + T(1));
    return with_sign(abs_of(m / sum), x);
}
inline Vec<float> tanh_of(Vec<float> x) { return tanh_lanes<float>(x); }
inline Vec<double> tanh_of(Vec<double> x) { return tanh_lanes<double>(x); }

}  // namespace MMFAST_ISA
}  // namespace mmfast
