// Transposed convolution by phases, forward and the gradient with respect to x.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. In each dimension an output position o has
// u = o + before = stride * q + r, and tap k * dilation = stride * shift + r reaches it from input position q - shift.
// So the outputs of one phase r are a sum over channels and the phase's taps of a weight times a shifted x, and both
// products are one loop over channels that were laid out for it, padded with zeros, in one flat plane each:
//     forward  y[cout][q]  = sum over (cin, tap of the phase) of w * x[cin][q - shift]
//     dx       dx[cin][i]  = sum over (cout, tap) of w * dy_r[cout][i + shift]     dy_r: dy split into its phases
// Planes are flat: rows follow each other with a gap of zeros, a shifted row is an offset, and what is computed for the
// gaps is dropped. Samples are cut into bands so that their planes stay in the second-level cache: every number is read
// from memory once a pass, and the tile keeps its sums in registers over a chain of terms. Bound by multiplications.
//
// A gap times a weight that is not finite would be NaN where the formula has no term: such weights are declined.
// Work is cut by shapes alone, and sums are added in a fixed order: results do not depend on the number of threads.
#include "cpu/activation.h"
#include "cpu/half.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_conv_transpose_args;

constexpr int64_t kBandElements = 1 << 16;  // of a band's planes: half of a second-level cache of 512 KB in float32
constexpr int64_t kChannels = 32;           // of x that a tile reads for all phases, whole chains of terms
constexpr int64_t kChain = 32;              // terms summed in one go: a chain's rounding error grows with its length
#if defined(__AVX512F__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif
constexpr int kMaxRows = kManyRegisters ? 8 : 6;
// how many vectors a tile of so many rows is wide
constexpr int width_of(int rows) {
    if (kManyRegisters) return rows == 8 ? 3 : rows == 4 ? 5 : rows == 3 ? 7 : 8;
    return rows >= 4 ? 2 : rows == 3 ? 3 : rows == 2 ? 4 : 8;
}

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

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

struct Range {
    int64_t begin, end;
    int64_t size() const { return end > begin ? end - begin : 0; }
};

struct Problem {
    Axis axis[3];
    int64_t taps = 1, positions = 1, out_positions = 1, phases = 1;
    int band = 2;  // the axis that is cut into bands: the outermost that is not trivial

    explicit Problem(const Args& a) {
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

// The plane of one channel: `count` positions an axis from position `low` on, rows and slabs `pitch` apart.
struct Plane {
    int64_t low[3], count[3], pitch[3], length;

    void lay_out(const int64_t* highest, int lanes) {
        pitch[2] = 1;
        pitch[1] = count[2];
        pitch[0] = count[1] * count[2];
        // the last position that is read, and what a vector reads beyond it
        length = (highest[0] - low[0]) * pitch[0] + (highest[1] - low[1]) * pitch[1] + highest[2] - low[2] + 1 + lanes;
        length = (most(length, count[0] * pitch[0]) + lanes - 1) / lanes * lanes;
        // planes a multiple of 4 KiB apart would share their places in the first-level cache
        if (length % 512 == 0) length += lanes;
    }
    int64_t flat(int64_t a, int64_t b, int64_t c) const {
        return (a - low[0]) * pitch[0] + (b - low[1]) * pitch[1] + c - low[2];
    }
};

// x's plane for the outputs with q in `band` along the band's axis: gaps serve the row before and the row after.
Plane plane_of_x(const Problem& problem, Range band, int lanes) {
    Plane plane;
    int64_t highest[3];
    for (int d = 0; d < 3; ++d) {
        const Axis& x = problem.axis[d];
        if (d == problem.band) {
            plane.low[d] = band.begin - x.reach;
            plane.count[d] = band.size() + x.reach;
            highest[d] = band.end - 1;
            continue;
        }
        const int64_t lead = most(0, x.reach - x.q_first), trail = most(0, x.q_end - x.in);
        plane.low[d] = -lead;
        plane.count[d] = x.in + most(lead, trail);
        highest[d] = x.in - 1 + trail;
    }
    plane.lay_out(highest, lanes);
    return plane;
}

// The plane of one phase of dy for the inputs in `band`.
Plane plane_of_dy(const Problem& problem, Range band, int lanes) {
    Plane plane;
    int64_t highest[3];
    for (int d = 0; d < 3; ++d) {
        const Axis& x = problem.axis[d];
        const Range inputs = d == problem.band ? band : Range{0, x.in};
        plane.low[d] = inputs.begin;
        plane.count[d] = inputs.size() + x.reach;
        highest[d] = inputs.end - 1 + x.reach;
    }
    plane.lay_out(highest, lanes);
    return plane;
}

// How many positions of the band's axis one band has, where a position takes `elements` and reach is shared.
int64_t band_size(int64_t positions, int64_t elements, int64_t reach) {
    const int64_t size = most(1, kBandElements / most(elements, 1) - reach);
    const int64_t bands = (positions + size - 1) / size;
    return (positions + bands - 1) / bands;
}

// ---- the tile: sums[r][f] = sum over terms k of weights[k][r] * source[offsets[k] + f]

template <typename T, int kRows, int kVectors>
void sum_tile(const T* source, const int64_t* offsets, int64_t terms, const T* weights, T* sums, int64_t pitch,
              bool add) {
    int64_t done = 0;
    do {
        const int64_t stop = least(terms, done + kChain);
        Vec<T> sum[kRows][kVectors] = {};
        for (int64_t k = done; k < stop; ++k) {
            const T* p = source + offsets[k];
            Vec<T> v[kVectors];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) v[j] = load(p + j * kLanes<T>);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec<T> w = splat(weights[k * kRows + r]);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) sum[r][j] += w * v[j];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                T* at = sums + r * pitch + j * kLanes<T>;
                store(at, add ? load(at) + sum[r][j] : sum[r][j]);
            }
        done = stop;
        add = true;
    } while (done < terms);
}

template <typename T, int kRows, int kVectors>
void sum_vectors(const T* source, const int64_t* offsets, int64_t terms, const T* weights, T* sums, int64_t pitch,
                 int64_t vectors, bool add) {
    constexpr int kStep = kVectors * kLanes<T>;
    for (; vectors >= kVectors; vectors -= kVectors, source += kStep, sums += kStep)
        sum_tile<T, kRows, kVectors>(source, offsets, terms, weights, sums, pitch, add);
    // 8, 7, 5, 4, 3 vectors, then half of them and so on
    if constexpr (kVectors > 1)
        if (vectors)
            sum_vectors<T, kRows, (kVectors + 1) / 2>(source, offsets, terms, weights, sums, pitch, vectors, add);
}

template <typename T>
void sum_rows(int rows, const T* source, const int64_t* offsets, int64_t terms, const T* weights, T* sums,
              int64_t pitch, int64_t vectors, bool add) {
#define MMFAST_ROWS(n) \
    case n:            \
        return sum_vectors<T, n, width_of(n)>(source, offsets, terms, weights, sums, pitch, vectors, add)
    switch (rows) {
        MMFAST_ROWS(1);
        MMFAST_ROWS(2);
        MMFAST_ROWS(3);
        MMFAST_ROWS(4);
        MMFAST_ROWS(kMaxRows);
    }
#undef MMFAST_ROWS
}

// Channels in blocks of a tile's rows; the last block has just as many rows as it needs, or a tile's.
struct Blocks {
    int64_t channels;
    int rows(int64_t c) const {
        const int64_t left = channels - c;
        return left > 4 ? kMaxRows : int(least(left, kMaxRows));
    }
    int64_t count() const {
        int64_t n = 0;
        for (int64_t c = 0; c < channels; c += rows(c)) ++n;
        return n;
    }
    int64_t padded() const {
        int64_t n = 0;
        for (int64_t c = 0; c < channels; c += rows(c)) n += rows(c);
        return n;
    }
};

// ---- rows

template <typename T>
struct Halves {
    Bits<T> even, odd, low, high;
    Halves() {
        for (int i = 0; i < kLanes<T>; ++i) {
            even[i] = 2 * i;
            odd[i] = 2 * i + 1;
            low[i] = i / 2 + i % 2 * kLanes<T>;
            high[i] = low[i] + kLanes<T> / 2;
        }
    }
};

// row[stride * i + r] = phases[r][i] for i < length; stride 2 writes whole vectors beyond the end
template <typename T>
void interleave(T* row, const T* const* phases, int64_t stride, int64_t length) {
    if (stride == 2) {
        static const Halves<T> halves;
        for (int64_t i = 0; i < length; i += kLanes<T>) {
            const Vec<T> a = load(phases[0] + i), b = load(phases[1] + i);
            store(row + 2 * i, Vec<T>(__builtin_shuffle(a, b, halves.low)));
            store(row + 2 * i + kLanes<T>, Vec<T>(__builtin_shuffle(a, b, halves.high)));
        }
        return;
    }
    if (stride == 1) memcpy(row, phases[0], size_t(length) * sizeof(T));
    for (int64_t r = 0; stride > 1 && r < stride; ++r)
        for (int64_t i = 0; i < length; ++i) row[stride * i + r] = phases[r][i];
}

// phases[r][i] = row[stride * i + r] for i < length; stride 2 reads whole vectors beyond the end
template <typename T>
void deinterleave(T* const* phases, const T* row, int64_t stride, int64_t length) {
    if (stride == 2) {
        static const Halves<T> halves;
        for (int64_t i = 0; i < length; i += kLanes<T>) {
            const Vec<T> a = load(row + 2 * i), b = load(row + 2 * i + kLanes<T>);
            const int n = int(least(length - i, kLanes<T>));
            store_float(phases[0] + i, Vec<T>(__builtin_shuffle(a, b, halves.even)), n);
            store_float(phases[1] + i, Vec<T>(__builtin_shuffle(a, b, halves.odd)), n);
        }
        return;
    }
    for (int64_t r = 0; r < stride; ++r)
        for (int64_t i = 0; i < length; ++i) phases[r][i] = row[stride * i + r];
}

template <typename T>
void clear(T* p, int64_t n) {
    memset(p, 0, size_t(n) * sizeof(T));
}

// act(bias + row) to n positions of the image, `step` apart; row is overwritten where they are not next to each other
template <typename T, typename Activation>
void finish_row(T* row, int64_t n, T bias, const Activation& activation, T* image, int64_t step) {
    T* target = step == 1 ? image : row;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int width = int(least(n - i, kLanes<T>));
        store_float(target + i, activation.value(load_float(row + i, width) + bias), width);
    }
    if (step != 1)
        for (int64_t i = 0; i < n; ++i) image[i * step] = row[i];
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

// to[c * pitch + i] = from[i * step + c * channel_step], in blocks whose lines stay in the first-level cache
template <typename T>
void gather_row(T* to, int64_t pitch, const T* from, int64_t channels, int64_t n, int64_t step, int64_t channel_step) {
    if (step == 1) {
        for (int64_t c = 0; c < channels; ++c) memcpy(to + c * pitch, from + c * channel_step, size_t(n) * sizeof(T));
        return;
    }
    for (int64_t c = 0; c < channels; c += 16)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = c; j < least(channels, c + 16); ++j) to[j * pitch + i] = from[i * step + j * channel_step];
}

// The planes of one sample's channels, zero outside x.
template <typename T>
void fill_planes(const Problem& problem, const Plane& plane, const Image<const T>& x, int64_t n, T* planes) {
    const Axis* axis = problem.axis;
    const int64_t channel_step = x.last ? 1 : x.positions;
    const int64_t begin = most(0, plane.low[2]), end = least(axis[2].in, plane.low[2] + plane.count[2]);
    const int64_t lead = begin - plane.low[2], inner = most(0, end - begin);
    for (int64_t a = 0; a < plane.count[0]; ++a)
        for (int64_t b = 0; b < plane.count[1]; ++b) {
            const int64_t i0 = plane.low[0] + a, i1 = plane.low[1] + b;
            const int64_t row = a * plane.pitch[0] + b * plane.pitch[1];
            const bool inside = i0 >= 0 && i0 < axis[0].in && i1 >= 0 && i1 < axis[1].in && inner;
            for (int64_t c = 0; c < x.channels; ++c) {
                T* p = planes + c * plane.length + row;
                clear(p, inside ? lead : plane.count[2]);
                if (inside) clear(p + lead + inner, plane.count[2] - lead - inner);
            }
            if (inside)
                gather_row(planes + row + lead, plane.length, x.at(n, 0, (i0 * axis[1].in + i1) * axis[2].in + begin),
                           x.channels, inner, x.step(), channel_step);
        }
    const int64_t used = plane.count[0] * plane.pitch[0];
    for (int64_t c = 0; c < x.channels; ++c) clear(planes + c * plane.length + used, plane.length - used);
}

template <typename T>
bool all_finite(const T* w, int64_t n) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < n; i += kLanes<T>) sum += load_float(w + i, int(least(n - i, kLanes<T>))) * T(0);
    return sum_lanes<T>(sum) == 0;
}

int threads_for(const Args& args, const Problem& problem) {
    const int64_t products = args.batch * args.in_channels * args.out_channels * problem.taps * problem.positions;
    return products < (1 << 18) ? 1 : args.threads;
}

// ---- forward

// The taps of one phase, and where its outputs of a band lie.
struct Phase {
    int64_t at[3];      // r of each axis
    Range q[3];         // of the band's outputs
    int64_t start;      // of the first of them, in x's plane, by a tap without shift
    int64_t flat;       // from the first of them to one past the last
    int64_t terms = 0;  // channels times taps
    int64_t* offsets;   // (terms,) what a term adds to a position
};

void describe(const Problem& problem, const Plane& plane, Range band, int64_t channels, int64_t p, Phase& phase) {
    problem.phase(p, phase.at);
    int64_t last[3];
    for (int d = 0; d < 3; ++d) {
        const Axis& x = problem.axis[d];
        phase.q[d] = {x.first(phase.at[d]), x.end(phase.at[d])};
        if (d == problem.band) phase.q[d] = {most(phase.q[d].begin, band.begin), least(phase.q[d].end, band.end)};
        last[d] = phase.q[d].size() - 1;
    }
    const bool empty = last[0] < 0 || last[1] < 0 || last[2] < 0;
    phase.start = plane.flat(phase.q[0].begin, phase.q[1].begin, phase.q[2].begin);
    phase.flat = empty ? 0 : last[0] * plane.pitch[0] + last[1] * plane.pitch[1] + last[2] + 1;
    int64_t taps = 0;
    for (int64_t k = 0; k < problem.taps; ++k) {
        int64_t tap[3];
        problem.tap(k, tap);
        if (problem.phase_of(tap) != p) continue;
        int64_t offset = 0;
        for (int d = 0; d < 3; ++d) offset -= problem.axis[d].shift(tap[d]) * plane.pitch[d];
        phase.offsets[taps++] = offset;
    }
    for (int64_t i = taps; i < channels * taps; ++i) phase.offsets[i] = phase.offsets[i - taps] + plane.length;
    phase.terms = channels * taps;
}

// (phases, blocks of output channels, terms, rows): weights in the order in which the forward's tiles read them
template <typename T>
void pack_forward(const Args& args, const Problem& problem, const Blocks& blocks, T* packed) {
    const T* w = static_cast<const T*>(args.weight);
    const int64_t wide = args.out_channels * problem.taps;
    for (int64_t p = 0; p < problem.phases; ++p)
        for (int64_t o = 0; o < args.out_channels; o += blocks.rows(o)) {
            const int64_t rows = blocks.rows(o), real = least(rows, args.out_channels - o);
            int64_t taps = 0;
            for (int64_t k = 0; k < problem.taps; ++k) {
                int64_t tap[3];
                problem.tap(k, tap);
                taps += problem.phase_of(tap) == p;
            }
            int64_t t = 0;
            for (int64_t k = 0; k < problem.taps; ++k) {
                int64_t tap[3];
                problem.tap(k, tap);
                if (problem.phase_of(tap) != p) continue;
                for (int64_t c = 0; c < args.in_channels; ++c) {
                    T* to = packed + (c * taps + t) * rows;
                    for (int64_t r = 0; r < rows; ++r)
                        to[r] = r < real ? w[c * wide + (o + r) * problem.taps + k] : T(0);
                }
                ++t;
            }
            packed += args.in_channels * taps * rows;
        }
}

// The rows of the image of one channel in a band, from its phases' sums.
template <typename T, typename Activation>
void finish_channel(const Args& args, const Problem& problem, const Plane& plane, const Phase* phases, Range band,
                    const T* sums, int64_t phase_pitch, T bias, const Activation& activation, T* image, int64_t step,
                    T* row) {
    const Axis& inner = problem.axis[2];
    const Range all{inner.q_first, inner.q_end};
    const Range q = problem.band == 2 ? band : all;
    const int64_t begin = most(0, q.begin * inner.stride - inner.before);
    const int64_t end = least(inner.out, q.end * inner.stride - inner.before);
    Scratch<const T*> rows(inner.stride);
    for (int64_t outer = 0; outer < problem.phases; outer += inner.stride) {
        const Phase& first = phases[outer];
        for (int64_t a = 0; a < first.q[0].size(); ++a)
            for (int64_t b = 0; b < first.q[1].size(); ++b) {
                for (int64_t r = 0; r < inner.stride; ++r) {
                    const Phase& phase = phases[outer + r];
                    // perhaps one before the first of the phase: a number that no output takes
                    rows.get()[r] = sums + (outer + r) * phase_pitch + a * plane.pitch[0] + b * plane.pitch[1] +
                                    q.begin - phase.q[2].begin;
                }
                interleave(row, rows.get(), inner.stride, q.size());
                const int64_t o0 =
                    (first.q[0].begin + a) * problem.axis[0].stride + first.at[0] - problem.axis[0].before;
                const int64_t o1 =
                    (first.q[1].begin + b) * problem.axis[1].stride + first.at[1] - problem.axis[1].before;
                finish_row(row + begin + inner.before - q.begin * inner.stride, end - begin, bias, activation,
                           image + ((o0 * args.out_size[1] + o1) * inner.out + begin) * step, step);
            }
    }
}

template <typename T>
int forward_of(const Args& args) {
    const Problem problem(args);
    constexpr int kWidth = kLanes<T>;
    const Blocks blocks{args.out_channels};
    const T* weight = static_cast<const T*>(args.weight);
    const int64_t weights = args.in_channels * problem.taps;
    if (!all_finite(weight, weights * args.out_channels)) return MMFAST_DECLINED;
    Scratch<T> packed(weights * blocks.padded());
    if (!packed.get()) return MMFAST_OUT_OF_MEMORY;
    pack_forward(args, problem, blocks, packed.get());

    const Axis& along = problem.axis[problem.band];
    const int64_t slab = args.in_channels * plane_of_x(problem, {0, 1}, 1).pitch[problem.band];
    const int64_t size = band_size(along.q_end - along.q_first, slab, along.reach);
    const int64_t bands = (along.q_end - along.q_first + size - 1) / size;
    const Image<const T> x{static_cast<const T*>(args.x), args.in_channels, problem.positions,
                           bool(args.x_channels_last)};
    const Image<T> y{static_cast<T*>(args.y), args.out_channels, problem.out_positions, bool(args.y_channels_last)};
    int status = MMFAST_OK;
    const int bad = with_activation<T>(args.activation, args.negative_slope, [&](const auto& activation) {
        parallel_for(threads_for(args, problem), args.batch * bands, [&](int64_t unit) {
            const int64_t n = unit / bands, q = along.q_first + unit % bands * size;
            const Range band{q, least(q + size, along.q_end)};
            const Plane plane = plane_of_x(problem, band, kWidth);
            // what a phase's sums take, with room for one before the first
            const int64_t pitch = (plane.length + 2 * kWidth) / kWidth * kWidth + kWidth;
            const int64_t row_length =
                (problem.axis[2].q_end - problem.axis[2].q_first + kWidth) * problem.axis[2].stride;
            Scratch<T> planes(args.in_channels * plane.length + problem.phases * kMaxRows * pitch + row_length +
                              2 * kWidth);
            Scratch<Phase> phases(problem.phases);
            Scratch<int64_t> offsets(args.in_channels * problem.taps);
            if (!planes.get() || !phases.get() || !offsets.get()) {
                __atomic_store_n(&status, MMFAST_OUT_OF_MEMORY, __ATOMIC_RELAXED);
                return;
            }
            T* sums = planes.get() + args.in_channels * plane.length + kWidth;
            T* row = sums + problem.phases * kMaxRows * pitch;
            fill_planes(problem, plane, x, n, planes.get());
            int64_t* next = offsets.get();
            for (int64_t p = 0; p < problem.phases; ++p) {
                phases.get()[p].offsets = next;
                describe(problem, plane, band, args.in_channels, p, phases.get()[p]);
                next += phases.get()[p].terms;
            }
            int64_t longest = 0;  // vectors of a phase
            for (int64_t p = 0; p < problem.phases; ++p)
                longest = most(longest, parts_of(phases.get()[p].flat, kWidth));
            int64_t done = 0;  // channels, with those that fill up a block
            for (int64_t o = 0; o < args.out_channels; o += blocks.rows(o)) {
                const int rows = blocks.rows(o);
                // all phases of a tile read the same numbers: those of some channels stay in the first-level cache
                const int64_t step = kManyRegisters ? longest : width_of(rows);
                const int64_t channels = kManyRegisters ? args.in_channels : kChannels;
                for (int64_t f = 0; f < longest; f += step)
                    for (int64_t c = 0; c == 0 || c < args.in_channels; c += channels) {
                        const T* block = packed.get();
                        for (int64_t p = 0; p < problem.phases; block += blocks.padded() * phases.get()[p++].terms) {
                            const Phase& phase = phases.get()[p];
                            const int64_t vectors = least(step, parts_of(phase.flat, kWidth) - f);
                            const int64_t taps = phase.terms / args.in_channels, first = c * taps;
                            if (vectors > 0)
                                sum_rows(rows, planes.get() + phase.start + f * kWidth, phase.offsets + first,
                                         least(channels, args.in_channels - c) * taps,
                                         block + done * phase.terms + first * rows, sums + p * pitch + f * kWidth,
                                         problem.phases * pitch, vectors, c > 0);
                        }
                    }
                for (int64_t r = 0; r < rows && o + r < args.out_channels; ++r) {
                    const T bias = args.bias ? static_cast<const T*>(args.bias)[o + r] : T(0);
                    finish_channel(args, problem, plane, phases.get(), band, sums + r * problem.phases * pitch, pitch,
                                   bias, activation, y.at(n, o + r, 0), y.step(), row);
                }
                done += rows;
            }
        });
        return MMFAST_OK;
    });
    return bad ? bad : status;
}

// ---- backward

// (blocks of input channels, output channels times taps, rows): weights in the order in which dx's tiles read them
template <typename T>
void pack_backward(const Args& args, const Problem& problem, const Blocks& blocks, T* packed) {
    const T* w = static_cast<const T*>(args.weight);
    const int64_t terms = args.out_channels * problem.taps;
    for (int64_t c = 0; c < args.in_channels; c += blocks.rows(c))
        for (int64_t k = 0; k < terms; ++k)
            for (int64_t r = c; r < c + blocks.rows(c); ++r) *packed++ = r < args.in_channels ? w[r * terms + k] : T(0);
}

// The planes (output channel, phase) of one sample of dy, zero outside it. row: stride * count[2] and two vectors.
template <typename T>
void fill_phases(const Problem& problem, const Plane& plane, const Image<const T>& dy, int64_t n, T* planes, T* row) {
    const Axis* axis = problem.axis;
    const int64_t inner = axis[2].stride, wide = inner * plane.count[2];
    const int64_t skipped = axis[2].before - inner * plane.low[2];  // o + skipped is the place in the row
    const int64_t begin = most(0, -skipped), end = least(axis[2].out, wide - skipped);
    Scratch<T*> phases(inner);
    for (int64_t o = 0; o < dy.channels; ++o)
        for (int64_t outer = 0; outer < problem.phases; outer += inner) {
            int64_t at[3];
            problem.phase(outer, at);
            T* first = planes + (o * problem.phases + outer) * plane.length;
            for (int64_t a = 0; a < plane.count[0]; ++a)
                for (int64_t b = 0; b < plane.count[1]; ++b) {
                    const int64_t o0 = (plane.low[0] + a) * axis[0].stride + at[0] - axis[0].before;
                    const int64_t o1 = (plane.low[1] + b) * axis[1].stride + at[1] - axis[1].before;
                    for (int64_t r = 0; r < inner; ++r)
                        phases.get()[r] = first + r * plane.length + a * plane.pitch[0] + b * plane.pitch[1];
                    if (o0 < 0 || o0 >= axis[0].out || o1 < 0 || o1 >= axis[1].out || end <= begin) {
                        for (int64_t r = 0; r < inner; ++r) clear(phases.get()[r], plane.count[2]);
                        continue;
                    }
                    clear(row, begin + skipped);
                    clear(row + end + skipped, wide - end - skipped);
                    const T* from = dy.at(n, o, (o0 * axis[1].out + o1) * axis[2].out + begin);
                    gather_row(row + begin + skipped, 0, from, 1, end - begin, dy.step(), 0);
                    deinterleave(phases.get(), row, inner, plane.count[2]);
                }
            const int64_t used = plane.count[0] * plane.pitch[0];
            for (int64_t r = 0; r < inner; ++r) clear(first + r * plane.length + used, plane.length - used);
        }
}

template <typename T>
void write_dx(const Args& args, const Problem& problem, const Plane& plane, Range band, const T* planes,
              const int64_t* offsets, const T* packed, T* sums, int64_t pitch, T* dx) {
    const Axis* axis = problem.axis;
    const Blocks blocks{args.in_channels};
    const int64_t terms = args.out_channels * problem.taps;
    Range range[3];
    for (int d = 0; d < 3; ++d) range[d] = d == problem.band ? band : Range{0, axis[d].in};
    const int64_t flat = plane.flat(range[0].end - 1, range[1].end - 1, range[2].end - 1) + 1;
    for (int64_t c = 0; c < args.in_channels; c += blocks.rows(c)) {
        const int rows = blocks.rows(c);
        sum_rows(rows, planes, offsets, terms, packed, sums, pitch, parts_of(flat, kLanes<T>), false);
        packed += terms * rows;
        for (int64_t r = 0; r < rows && c + r < args.in_channels; ++r)
            for (int64_t a = range[0].begin; a < range[0].end; ++a)
                for (int64_t b = range[1].begin; b < range[1].end; ++b)
                    memcpy(dx + (c + r) * problem.positions + (a * axis[1].in + b) * axis[2].in + range[2].begin,
                           sums + r * pitch + plane.flat(a, b, range[2].begin), size_t(range[2].size()) * sizeof(T));
    }
}

template <typename T>
int backward_of(const Args& args) {
    const Problem problem(args);
    constexpr int kWidth = kLanes<T>;
    const Blocks blocks{args.in_channels};
    const int64_t terms = args.out_channels * problem.taps;
    if (!all_finite(static_cast<const T*>(args.weight), args.in_channels * terms)) return MMFAST_DECLINED;
    Scratch<T> packed(blocks.padded() * terms);
    if (!packed.get()) return MMFAST_OUT_OF_MEMORY;
    pack_backward(args, problem, blocks, packed.get());

    const Axis& along = problem.axis[problem.band];
    const int64_t slab = args.out_channels * problem.phases * plane_of_dy(problem, {0, 1}, 1).pitch[problem.band];
    const int64_t size = band_size(along.in, slab, along.reach);
    const int64_t bands = (along.in + size - 1) / size;
    const Image<const T> dy{static_cast<const T*>(args.y), args.out_channels, problem.out_positions,
                            bool(args.y_channels_last)};
    int status = MMFAST_OK;
    parallel_for(threads_for(args, problem), args.batch * bands, [&](int64_t unit) {
        const int64_t n = unit / bands, i = unit % bands * size;
        const Range band{i, least(i + size, along.in)};
        const Plane plane = plane_of_dy(problem, band, kWidth);
        const int64_t planes = args.out_channels * problem.phases * plane.length, pitch = plane.length + kWidth;
        Scratch<T> scratch(planes + kMaxRows * pitch + problem.axis[2].stride * (plane.count[2] + kWidth) + 2 * kWidth);
        Scratch<int64_t> offsets(terms);
        if (!scratch.get() || !offsets.get()) {
            __atomic_store_n(&status, MMFAST_OUT_OF_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        T* sums = scratch.get() + planes;
        for (int64_t k = 0; k < problem.taps; ++k) {
            int64_t tap[3];
            problem.tap(k, tap);
            int64_t offset = problem.phase_of(tap) * plane.length;
            for (int d = 0; d < 3; ++d) offset += problem.axis[d].shift(tap[d]) * plane.pitch[d];
            offsets.get()[k] = offset;
        }
        for (int64_t k = problem.taps; k < terms; ++k)
            offsets.get()[k] = offsets.get()[k - problem.taps] + problem.phases * plane.length;
        fill_phases(problem, plane, dy, n, scratch.get(), sums + kMaxRows * pitch);
        write_dx(args, problem, plane, band, scratch.get(), offsets.get(), packed.get(), sums, pitch,
                 static_cast<T*>(args.dx) + n * args.in_channels * problem.positions);
    });
    return status;
}

}  // namespace

int phases_forward(const Args& args) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return forward_of<float>(args);
        case MMFAST_FLOAT64:
            return forward_of<double>(args);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

int phases_backward(const Args& args) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return backward_of<float>(args);
        case MMFAST_FLOAT64:
            return backward_of<double>(args);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
