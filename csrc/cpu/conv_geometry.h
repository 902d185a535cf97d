// What a transposed convolution's kernels know of its geometry, and rows whose elements take turns.
//
// In each dimension an output position o has u = o + before = stride * q + r, and tap k * dilation = stride * shift + r
// reaches it from input position q - shift.
#pragma once
#include "cpu/half.h"
#include "cpu/layout.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

// One dimension.
struct Axis {
    int64_t in, out, kernel, stride, dilation, before;
    int64_t reach;           // the largest shift of a tap
    int64_t q_first, q_end;  // of all output positions

    int64_t shift(int64_t k) const { return k * dilation / stride; }
    int64_t phase(int64_t k) const { return k * dilation % stride; }
    // the first q of phase r that is an output position, and one past the last
    int64_t first(int64_t r) const { return before > r ? (before - r + stride - 1) / stride : 0; }
    int64_t end(int64_t r) const {
        const int64_t last = out - 1 + before - r;
        return last < 0 ? 0 : last / stride + 1;
    }
};

struct Problem {
    Axis axis[3];
    int64_t taps = 1, positions = 1, out_positions = 1, phases = 1;
    int band = 2;  // the axis that is cut into bands: the outermost that is not trivial

    explicit Problem(const mmfast_conv_transpose_args& a) {
        for (int d = 0; d < 3; ++d) {
            Axis& x = axis[d];
            x = {a.in_size[d], a.out_size[d], a.kernel[d], a.stride[d], a.dilation[d], a.before[d], 0, 0, 0};
            x.reach = x.shift(x.kernel - 1);
            x.q_first = x.before / x.stride;
            x.q_end = (x.out - 1 + x.before) / x.stride + 1;
            taps *= x.kernel;
            positions *= x.in;
            out_positions *= x.out;
            phases *= x.stride;
        }
        for (int d = 2; d >= 0; --d)
            if (axis[d].in > 1 || axis[d].out > 1 || axis[d].kernel > 1) band = d;
    }
    // the numbers along the three axes of a flat index
    void tap(int64_t k, int64_t* at) const {
        at[2] = k % axis[2].kernel;
        at[1] = k / axis[2].kernel % axis[1].kernel;
        at[0] = k / axis[2].kernel / axis[1].kernel;
    }
    void phase(int64_t p, int64_t* at) const {
        at[2] = p % axis[2].stride;
        at[1] = p / axis[2].stride % axis[1].stride;
        at[0] = p / axis[2].stride / axis[1].stride;
    }
    int64_t phase_of(const int64_t* tap) const {
        int64_t p = 0;
        for (int d = 0; d < 3; ++d) p = p * axis[d].stride + axis[d].phase(tap[d]);
        return p;
    }
};

// A plane of `count` positions an axis from position `low` on, rows and slabs `pitch` apart.
struct Plane {
    int64_t low[3], count[3], pitch[3], length;

    Plane(const int64_t* from, const int64_t* counts, int lanes) {
        for (int d = 0; d < 3; ++d) low[d] = from[d], count[d] = counts[d];
        pitch[2] = 1;
        pitch[1] = count[2];
        pitch[0] = count[1] * count[2];
        length = (count[0] * pitch[0] + lanes - 1) / lanes * lanes;
        // planes a multiple of 4 KiB apart would share their places in the first-level cache
        if (length % 512 == 0) length += lanes;
    }
    int64_t flat(int64_t a, int64_t b, int64_t c) const {
        return (a - low[0]) * pitch[0] + (b - low[1]) * pitch[1] + c - low[2];
    }
};

// The plane of a phase of y for the outputs with q in `band` along the band's axis, and of all that their inputs reach.
inline Plane plane_of_y(const Problem& problem, Range band, int lanes) {
    int64_t low[3], count[3];
    for (int d = 0; d < 3; ++d) {
        const Axis& x = problem.axis[d];
        low[d] = d == problem.band ? band.begin - x.reach : 0;
        count[d] = d == problem.band ? band.size() + 2 * x.reach : most(x.in + x.reach, x.q_end);
    }
    return Plane(low, count, lanes);
}

// The plane of a phase of dy for the inputs in `band`.
inline Plane plane_of_dy(const Problem& problem, Range band, int lanes) {
    int64_t low[3], count[3];
    for (int d = 0; d < 3; ++d) {
        const Range inputs = d == problem.band ? band : Range{0, problem.axis[d].in};
        low[d] = inputs.begin;
        count[d] = inputs.size() + problem.axis[d].reach;
    }
    return Plane(low, count, lanes);
}

template <typename T>
bool all_finite(const T* w, int64_t n) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < n; i += kLanes<T>) sum += load_float(w + i, int(least(n - i, kLanes<T>))) * T(0);
    return sum_lanes<T>(sum) == 0;
}

constexpr int64_t kBandElements = 1 << 16;  // of a band's planes: half of a second-level cache of 512 KB in float32

// How many positions of the band's axis one band has, where a position takes `elements` and reach is shared.
inline int64_t band_size(int64_t positions, int64_t elements, int64_t reach) {
    const int64_t size = most(1, kBandElements / most(elements, 1) - reach);
    const int64_t bands = (positions + size - 1) / size;
    return (positions + bands - 1) / bands;
}

// A tensor (batch, channels, positions), contiguous or channels last.
template <typename T>
struct Image {
    T* data;
    int64_t channels, positions;
    bool last;

    T* at(int64_t n, int64_t c, int64_t position) const {
        return last ? data + (n * positions + position) * channels + c
                    : data + (n * channels + c) * positions + position;
    }
    int64_t step() const { return last ? channels : 1; }
};

// ---- rows

template <typename T>
void clear(T* p, int64_t n) {
    memset(p, 0, size_t(n > 0 ? n : 0) * sizeof(T));
}

// For rows that lie too far from each other, or are met too long after each other, for a processor to foresee. kWrite:
// 1 or 0.
template <int kWrite, typename T>
void prefetch_row(const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int(sizeof(T))) __builtin_prefetch(from + i, kWrite, 2);
}

// by vectors, for rows are short: a memcpy of a length known only at run time is a call
template <typename T>
void copy_row(T* to, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int lanes = int(least(n - i, kLanes<T>));
        store_float(to + i, load_float(from + i, lanes), lanes);
    }
}

// to[kCount * i + c] = v[c][i]; unrolled, that the vectors be registers, and where lanes come from known beforehand
template <typename T, int kCount>
inline void store_interleaved(T* to, const Vec<T> (&v)[kCount]) {
    constexpr int L = kLanes<T>;
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
        Vec<T> mixed = v[0];
#pragma GCC unroll 4
        for (int c = 1; c < kCount; ++c) {
            Bits<T> from;
#pragma GCC unroll 16
            for (int k = 0; k < L; ++k) {
                const int lane = (j * L + k) / kCount, row = (j * L + k) % kCount;
                from[k] = row == c ? L + lane : c == 1 ? lane : k;
            }
            mixed = __builtin_shuffle(mixed, v[c], from);
        }
        store(to + j * L, mixed);
    }
}

// to[kCount * i + c] = source(c, i, lanes)[0] for i < n but for the last ones; returns how many of them
template <typename T, int kCount, typename Source>
int64_t interleave_vectors(T* to, int64_t n, const Source& source) {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        Vec<T> v[kCount];
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) v[c] = source(c, i, L);
        store_interleaved<T, kCount>(to + kCount * i, v);
    }
    return i;
}

// to[count * i + c] = element i of row c, for count * i + c < size; source(c, i, n): n elements of row c from i on
template <typename T, typename Source>
void interleave(T* to, int64_t count, int64_t size, const Source& source) {
    const int64_t n = size / count;
    int64_t done = 0;
    if (count == 2) done = interleave_vectors<T, 2>(to, n, source);
    if (count == 3) done = interleave_vectors<T, 3>(to, n, source);
    if (count == 4) done = interleave_vectors<T, 4>(to, n, source);
    for (int64_t c = 0; c < count; ++c) {
        const int64_t end = c < size % count ? n + 1 : n;
        for (int64_t i = done; i < end; i += kLanes<T>) {
            const int lanes = int(least(end - i, kLanes<T>));
            const Vec<T> v = source(c, i, lanes);
            if (count == 1)
                store_float(to + i, v, lanes);
            else
                for (int j = 0; j < lanes; ++j) to[count * (i + j) + c] = v[j];
        }
    }
}

// phases[r][i] = from[kCount * i + r]
template <typename T, int kCount>
inline void load_deinterleaved(const T* from, Vec<T> (&phases)[kCount]) {
    constexpr int L = kLanes<T>;
    Vec<T> v[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) v[j] = load(from + j * L);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        phases[r] = v[0];
#pragma GCC unroll 8
        for (int j = 1; j < kCount; ++j) {
            Bits<T> lane;
#pragma GCC unroll 16
            for (int k = 0; k < L; ++k) {
                const int at = kCount * k + r;
                lane[k] = at / L == j ? L + at % L : j == 1 ? at % L : k;
            }
            phases[r] = __builtin_shuffle(phases[r], v[j], lane);
        }
    }
}

// phases[r][i] = from[kCount * i + r] for done <= i, as long as whole vectors are before n; returns how far
template <typename T, int kCount>
int64_t deinterleave_vectors(T* const* phases, const T* from, int64_t done, int64_t n) {
    for (; done + kLanes<T> <= n; done += kLanes<T>) {
        Vec<T> v[kCount];
        load_deinterleaved<T, kCount>(from + kCount * done, v);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) store(phases[r] + done, v[r]);
    }
    return done;
}

// phases[r][i] = row[stride * i + r - before] for i < n; zero is what the row, of `size`, does not have
template <typename T>
void deinterleave(T* const* phases, const T* row, int64_t size, int64_t before, int64_t stride, int64_t n) {
    const T* from = row - before;
    const auto take = [&](int64_t begin, int64_t end) {
        for (int64_t r = 0; r < stride; ++r)
            for (int64_t i = begin; i < end; ++i) {
                const int64_t at = stride * i + r;
                phases[r][i] = at >= before && at < size + before ? from[at] : T(0);
            }
    };
    int64_t done = least(n, before > 0 ? parts_of(before, stride) : 0);
    take(0, done);
    // up to where the row has every phase
    const int64_t whole = least(n, (size + before) / stride);
    if (stride == 2)
        done = deinterleave_vectors<T, 2>(phases, from, done, whole);
    else if (stride == 3)
        done = deinterleave_vectors<T, 3>(phases, from, done, whole);
    else if (stride == 4)
        done = deinterleave_vectors<T, 4>(phases, from, done, whole);
    else if (stride == 8)
        done = deinterleave_vectors<T, 8>(phases, from, done, whole);
    else
        for (; done < whole; ++done)
            for (int64_t r = 0; r < stride; ++r) phases[r][done] = from[stride * done + r];
    take(done, n);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
