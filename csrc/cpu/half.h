// float16 and bfloat16 in memory, float32 in registers.
#pragma once
#include <stdint.h>
#include <string.h>

#include "cpu/simd.h"

namespace mmfast {
namespace MMFAST_ISA {

struct Half {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(Bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
inline float to_float(Half x) {
    // the exponent is rebased by a multiplication, which also normalises subnormals
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    float f;
    memcpy(&f, &magnitude, sizeof f);
    f *= 5.192296858534828e+33f;  // 2^112
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((x.bits & 0x7c00) == 0x7c00) u = magnitude | 0x7f800000u;  // inf and NaN
    u |= sign;
    memcpy(&f, &u, sizeof f);
    return f;
}

// round to nearest, ties to even; NaN stays NaN
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
        out->bits = uint16_t((u >> 16) | 0x40);
        return;
    }
    out->bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, Half* out) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    uint16_t sign = uint16_t((u >> 16) & 0x8000);
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) {
        out->bits = uint16_t(sign | 0x7e00);
        return;
    }
    if (u >= 0x477ff000u) {  // 65520 and above round to infinity
        out->bits = uint16_t(sign | 0x7c00);
        return;
    }
    if (u < 0x38800000u) {  // subnormal: the addition of 0.5 does the shift and the rounding
        float f;
        memcpy(&f, &u, sizeof f);
        f += 0.5f;
        memcpy(&u, &f, sizeof u);
        out->bits = uint16_t(sign | (u - 0x3f000000u));
        return;
    }
    u += 0xc8000fffu + ((u >> 13) & 1);
    out->bits = uint16_t(sign | (u >> 13));
}

// A vector of float32 from n <= kLanes<float> stored elements, and back.
inline Vec<float> load_float(const float* p, int n) { return n == kLanes<float> ? load(p) : load_partial(p, n); }
inline void store_float(float* p, Vec<float> v, int n) {
    if (n == kLanes<float>)
        store(p, v);
    else
        store_partial(p, v, n);
}
inline Vec<double> load_float(const double* p, int n) { return n == kLanes<double> ? load(p) : load_partial(p, n); }
inline void store_float(double* p, Vec<double> v, int n) {
    if (n == kLanes<double>)
        store(p, v);
    else
        store_partial(p, v, n);
}
template <typename H>
inline Vec<float> load_float(const H* p, int n) {
    float lane[kLanes<float>] = {};
    for (int i = 0; i < n; ++i) lane[i] = to_float(p[i]);
    return load(lane);
}
template <typename H>
inline void store_float(H* p, Vec<float> v, int n) {
    float lane[kLanes<float>];
    store(lane, v);
    for (int i = 0; i < n; ++i) from_float(lane[i], &p[i]);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
