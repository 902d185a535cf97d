// Transposed convolution around products of matrices in which x is taken as it lies in memory: forward and gradients.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. In each dimension an output position o has
// u = o + before = stride * q + r, and tap k * dilation = stride * shift + r reaches it from input position q - shift.
// With a column for each position of x, and a row for each pair of an output channel and a tap:
//     forward  columns = weight^T x     each row is added, shifted, to the plane of its channel and its phase r
//     dx       dx = weight columns      each row is a shifted plane of dy
//     dweight  sum of x columns^T       where dy is channels last, what one position's taps reach are runs of it
// Few output channels make few rows, so that columns cost little beside the products: the forward reads x once and the
// gradients read or write it once each. Samples are cut into bands whose planes stay in the second-level cache, and
// columns are made for some dozen positions at a time. Bound by multiplications: a tile of kRows rows times kVectors
// vectors keeps its sums in registers over a chain of terms, for a chain's rounding error grows with its length.
//
// A gradient beyond the edge of dy is a zero, which makes NaN of a weight or an x that is not finite where the formula
// has no term: dx declines such weights, dweight such results.
// Work is cut by shapes alone, and sums are added in a fixed order: results do not depend on the number of threads.
#include "cpu/activation.h"
#include "cpu/conv_geometry.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_conv_transpose_args;

// elements of columns, and positions of x that a tile of dweight sums, at a time: they stay in the first-level cache
#if defined(__AVX512F__)
constexpr int64_t kColumns = 12 << 10, kPositions = 128;
#else
constexpr int64_t kColumns = 6 << 10, kPositions = 64;
#endif
constexpr int64_t kChain = 32;   // terms summed in one go
constexpr int64_t kDepth = 512;  // terms of dx whose columns are made at a time
constexpr int64_t kParts = 8;    // sums of dweight, added in the end
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;
template <typename T>
constexpr int kWidth = kVectors * kLanes<T>;

// ---- the tile: out[r][v] = sum over k of left(r, k) * right[k][v], or +=

// numbers packed (terms, rows)
template <typename T>
struct Packed {
    const T* data;
    template <int kTileRows>
    T at(int r, int64_t k) const {
        return data[k * kTileRows + r];
    }
};

// rows of their own
template <typename T>
struct Rows {
    const T* data[kRows];
    template <int kTileRows>
    T at(int r, int64_t k) const {
        return data[r][k];
    }
};

// not inlined, and counted by k alone: else pointers to each row are kept, more than there are registers
template <typename T, int kTileRows, int kTileVectors, typename Left>
__attribute__((noinline)) void multiply_tile(const Left& left, const T* right, int64_t pitch, int64_t depth, T* out,
                                             int64_t out_pitch, int rows, int columns, bool add) {
    constexpr int L = kLanes<T>;
    const int64_t chain = parts_of(depth, parts_of(depth, kChain));
    for (int64_t k = 0; k < depth;) {
        Vec<T> sum[kTileRows][kTileVectors] = {};
        for (const int64_t stop = least(depth, k + chain); k < stop; ++k) {
            asm("" : "+r"(k));
            Vec<T> v[kTileVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kTileVectors; ++j) v[j] = load(right + k * pitch + j * L);
#pragma GCC unroll 8
            for (int r = 0; r < kTileRows; ++r) {
                const Vec<T> value = splat(left.template at<kTileRows>(r, k));
#pragma GCC unroll 4
                for (int j = 0; j < kTileVectors; ++j) sum[r][j] += value * v[j];
            }
        }
        const bool whole = rows == kTileRows && columns == kTileVectors * L;
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
            if (!whole && r >= rows) break;
#pragma GCC unroll 4
            for (int j = 0; j < kTileVectors; ++j) {
                T* at = out + r * out_pitch + j * L;
                const int lanes = whole ? L : int(least(L, columns - j * L));
                store_float(at, add ? sum[r][j] + load_float(at, lanes) : sum[r][j], lanes);
            }
        }
        add = true;
    }
}

template <typename T, int kTileRows, typename Left>
void multiply_vectors(const Left& left, const T* right, int64_t pitch, int64_t depth, T* out, int64_t out_pitch,
                      int rows, int columns, bool add) {
    const int vectors = int(parts_of(columns, kLanes<T>));
    if (vectors == 3) multiply_tile<T, kTileRows, 3>(left, right, pitch, depth, out, out_pitch, rows, columns, add);
    if (vectors == 2) multiply_tile<T, kTileRows, 2>(left, right, pitch, depth, out, out_pitch, rows, columns, add);
    if (vectors == 1) multiply_tile<T, kTileRows, 1>(left, right, pitch, depth, out, out_pitch, rows, columns, add);
}

// rows: those of the tile that there are; columns: at most kWidth
template <typename T, typename Left>
void multiply(const Left& left, const T* right, int64_t pitch, int64_t depth, T* out, int64_t out_pitch, int rows,
              int64_t columns, bool add) {
    const int n = int(columns);
    if (rows > kRows / 2)
        multiply_vectors<T, kRows>(left, right, pitch, depth, out, out_pitch, rows, n, add);
    else if (rows > kRows / 4)
        multiply_vectors<T, kRows / 2>(left, right, pitch, depth, out, out_pitch, rows, n, add);
    else
        multiply_vectors<T, kRows / 4>(left, right, pitch, depth, out, out_pitch, rows, n, add);
}

// The rows of the tile that takes `left` rows or as many of them as it can.
inline int64_t tile_of(int64_t left) { return left > kRows / 2 ? kRows : left > kRows / 4 ? kRows / 2 : kRows / 4; }

// A weight as tiles want it, (blocks of rows, terms, a tile's rows): packed[k][r] = w[r * row_step + k * term_step].
template <typename T>
void pack(const T* w, int64_t rows, int64_t row_step, int64_t terms, int64_t term_step, T* packed) {
    for (int64_t first = 0; first < rows; first += kRows) {
        const int64_t tile = tile_of(rows - first);
        for (int64_t k = 0; k < terms; ++k)
            for (int64_t r = first; r < first + tile; ++r)
                *packed++ = r < rows ? w[r * row_step + k * term_step] : T(0);
    }
}
inline int64_t packed_rows(int64_t rows) { return parts_of(rows, kRows) * kRows; }

// A run of positions of x that follow each other in a plane, too.
struct Segment {
    int64_t from, at, length;  // the first of the positions, and its place in the plane
};

// The segments of `count` positions from position `first` on, of `longest` at most; returns their number.
int64_t list_segments(const Problem& problem, const Plane& plane, int64_t first, int64_t count, int64_t longest,
                      Segment* segments) {
    const Axis* axis = problem.axis;
    int64_t found = 0;
    for (int64_t p = first; p < first + count; ++found) {
        const int64_t i2 = p % axis[2].in, i1 = p / axis[2].in % axis[1].in, i0 = p / axis[2].in / axis[1].in;
        segments[found] = {p - first, plane.flat(i0, i1, i2),
                           least(longest, least(axis[2].in - i2, first + count - p))};
        p += segments[found].length;
    }
    return found;
}

// offsets[channel * taps + tap]: from the place of a position in a plane to where it goes, or comes from, by a tap
void list_offsets(const Problem& problem, const Plane& plane, int64_t channels, int64_t* offsets) {
    for (int64_t k = 0; k < channels * problem.taps; ++k) {
        int64_t tap[3];
        problem.tap(k % problem.taps, tap);
        offsets[k] = (k / problem.taps * problem.phases + problem.phase_of(tap)) * plane.length;
        for (int d = 0; d < 3; ++d) offsets[k] += problem.axis[d].shift(tap[d]) * plane.pitch[d];
    }
}

int threads_for(const Args& args, const Problem& problem) {
    const int64_t products = args.batch * args.in_channels * args.out_channels * problem.taps * problem.positions;
    return products < (1 << 18) ? 1 : args.threads;
}

// ---- forward

// to += from, or = where it is the first
template <typename T>
void add_row(T* to, const T* from, int64_t n, bool first) {
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, first ? load(from + i) : load(to + i) + load(from + i));
    if (i == n) return;
    const int rest = int(n - i);
    const Vec<T> v = load_float(from + i, rest);
    store_float(to + i, first ? v : load_float(to + i, rest) + v, rest);
}

// (tiles, channels, kWidth): `count` positions of x from the first on
template <typename T>
void take_x(const Image<const T>& x, int64_t n, int64_t first, int64_t count, T* taken) {
    const int64_t tile = x.channels * kWidth<T>;
    if (count % kWidth<T>) clear(taken + count / kWidth<T> * tile, tile);
    for (int64_t p = 0; x.last && p < count; p += kWidth<T>)
        transpose_to(taken + p / kWidth<T> * tile, kWidth<T>, x.at(n, 0, first + p), x.channels,
                     least(count - p, kWidth<T>), x.channels);
    for (int64_t c = 0; !x.last && c < x.channels; ++c) {
        const T* from = x.at(n, c, first);
        for (int64_t p = 0; p < count; p += kWidth<T>, taken += tile)
            copy_row(taken, from + p, least(count - p, kWidth<T>));
        taken += kWidth<T> - parts_of(count, kWidth<T>) * tile;
    }
}

// y's rows of the band, from the planes of its channels' phases. buffer: a row of each channel.
template <typename T, typename Activation>
int finish(const Args& args, const Problem& problem, const Plane& plane, Range band, const T* planes, int64_t n,
           const Image<T>& y, const Activation& activation, T* buffer) {
    const Axis* axis = problem.axis;
    const int64_t stride = axis[2].stride;
    const auto q_of = [&](int d, int64_t r) {
        const Range q{axis[d].first(r), axis[d].end(r)};
        return d == problem.band ? Range{most(q.begin, band.begin), least(q.end, band.end)} : q;
    };
    const Range q = problem.band == 2 ? band : Range{axis[2].q_first, axis[2].q_end};
    // of the outputs: the first, and one past the last
    const int64_t begin = most(0, q.begin * stride - axis[2].before);
    const int64_t end = most(begin, least(axis[2].out, q.end * stride - axis[2].before));
    // where the outputs that take turns begin, from the planes of the last axis' phases on
    Scratch<int64_t> turns(stride);
    if (!turns.get()) return MMFAST_OUT_OF_MEMORY;
    for (int64_t c = 0; c < stride; ++c) {
        const int64_t u = begin + axis[2].before - q.begin * stride + c;
        turns.get()[c] = u % stride * plane.length + u / stride;
    }
    for (int64_t outer = 0; outer < problem.phases; outer += stride) {
        int64_t r[3];
        problem.phase(outer, r);
        const Range q0 = q_of(0, r[0]), q1 = q_of(1, r[1]);
        for (int64_t a = q0.begin; a < q0.end; ++a)
            for (int64_t b = q1.begin; b < q1.end; ++b) {
                const int64_t o0 = a * axis[0].stride + r[0] - axis[0].before;
                const int64_t o1 = b * axis[1].stride + r[1] - axis[1].before;
                const int64_t position = (o0 * axis[1].out + o1) * axis[2].out + begin;
                for (int64_t o = 0; o < args.out_channels; ++o) {
                    const T* from = planes + (o * problem.phases + outer) * plane.length + plane.flat(a, b, q.begin);
                    const T bias = args.bias ? static_cast<const T*>(args.bias)[o] : T(0);
                    interleave(y.last ? buffer + o * axis[2].out : y.at(n, o, position), stride, end - begin,
                               [&](int64_t c, int64_t i, int lanes) {
                                   return activation.value(load_float(from + turns.get()[c] + i, lanes) + bias);
                               });
                }
                if (!y.last) continue;
                interleave(
                    y.at(n, 0, position), args.out_channels, args.out_channels * (end - begin),
                    [&](int64_t o, int64_t i, int lanes) { return load_float(buffer + o * axis[2].out + i, lanes); });
            }
    }
    return MMFAST_OK;
}

// The planes of one sample's outputs in a band. taken, columns: as many tiles as `tiles` says, columns kRows of them.
template <typename T>
void fill_planes(const Args& args, const Problem& problem, const Plane& plane, Range band, const Image<const T>& x,
                 int64_t n, const T* packed, int64_t tiles, T* planes, T* taken, T* columns, Segment* segments,
                 const int64_t* offsets) {
    const Axis& along = problem.axis[problem.band];
    const int64_t inner = problem.positions / along.in, rows = args.out_channels * problem.taps;
    // of taps that do not overlap each fills a plane
    bool apart = problem.taps == problem.phases;
    for (const Axis& axis : problem.axis) apart = apart && axis.reach == 0 && axis.q_end <= axis.in;
    if (!apart) clear(planes, args.out_channels * problem.phases * plane.length);
    const int64_t end = least(along.in, band.end) * inner, pitch = tiles * kWidth<T>;
    for (int64_t p = most(0, band.begin - along.reach) * inner; p < end; p += pitch) {
        const int64_t count = least(end - p, pitch);
        take_x(x, n, p, count, taken);
        const int64_t found = list_segments(problem, plane, p, count, count, segments);
        for (int64_t row = 0; row < rows; row += kRows) {
            const int valid = int(least(kRows, rows - row));
            const Packed<T> left{packed + row * x.channels};
            const Range next{x.channels * row / rows, least(x.channels, x.channels * (row + kRows) / rows)};
            for (int64_t t = 0; t < count; t += kWidth<T>) {
                for (int64_t c = next.begin; !x.last && c < next.end; ++c)
                    prefetch_row<0>(x.at(n, c, p + pitch + t), kWidth<T>);
                multiply(left, taken + t * x.channels, kWidth<T>, x.channels, columns + t, pitch, valid,
                         least(kWidth<T>, count - t), false);
            }
            for (int r = 0; r < valid; ++r)
                for (int64_t s = 0; s < found; ++s)
                    add_row(planes + offsets[row + r] + segments[s].at, columns + r * pitch + segments[s].from,
                            segments[s].length, apart);
        }
    }
}

template <typename T>
int forward_of(const Args& args) {
    const Problem problem(args);
    constexpr int kWide = int(kWidth<T>);
    const int64_t rows = args.out_channels * problem.taps, channels = args.in_channels;
    Scratch<T> packed(packed_rows(rows) * channels);
    if (!packed.get()) return MMFAST_OUT_OF_MEMORY;
    pack(static_cast<const T*>(args.weight), rows, 1, channels, rows, packed.get());

    const Axis *axis = problem.axis, &along = axis[problem.band];
    const int64_t slab = args.out_channels * problem.phases * plane_of_y(problem, {0, 1}, 1).pitch[problem.band];
    const int64_t size = band_size(along.q_end - along.q_first, slab, 2 * along.reach);
    const int64_t bands = parts_of(along.q_end - along.q_first, size);
    const int64_t positions = least(along.in, size + along.reach) * (problem.positions / along.in);
    const int64_t tiles = least(parts_of(positions, kWide), most(1, kColumns / channels / kWide));
    const Image<const T> x{static_cast<const T*>(args.x), channels, problem.positions, bool(args.x_channels_last)};
    const Image<T> y{static_cast<T*>(args.y), args.out_channels, problem.out_positions, bool(args.y_channels_last)};
    return with_activation<T>(args.activation, args.negative_slope, [&](const auto& activation) {
        return parallel_status(threads_for(args, problem), args.batch * bands, [&](int64_t unit) -> int {
            const int64_t n = unit / bands, q = along.q_first + unit % bands * size;
            const Range band{q, least(q + size, along.q_end)};
            const Plane plane = plane_of_y(problem, band, kLanes<T>);
            const int64_t planes = args.out_channels * problem.phases * plane.length;
            const int64_t row = y.last ? args.out_channels * axis[2].out : 0;
            Scratch<T> scratch(planes + tiles * kWide * (channels + kRows) + row);
            Scratch<Segment> segments(tiles * kWide / axis[2].in + 2);
            Scratch<int64_t> offsets(rows);
            if (!scratch.get() || !segments.get() || !offsets.get()) return MMFAST_OUT_OF_MEMORY;
            T* taken = scratch.get() + planes;
            T* columns = taken + tiles * kWide * channels;
            list_offsets(problem, plane, args.out_channels, offsets.get());
            fill_planes(args, problem, plane, band, x, n, packed.get(), tiles, scratch.get(), taken, columns,
                        segments.get(), offsets.get());
            return finish(args, problem, plane, band, scratch.get(), n, y, activation, columns + tiles * kWide * kRows);
        });
    });
}

// The planes (output channel, phase) of one sample of dy, zero outside it. row: of dy channels last.
template <typename T>
void fill_phases(const Problem& problem, const Plane& plane, const Image<const T>& dy, int64_t n, T* planes, T* row) {
    const Axis* axis = problem.axis;
    const int64_t inner = axis[2].stride;
    const int64_t skipped = axis[2].before - inner * plane.low[2];  // o + skipped is the place in the row of the phases
    const int64_t begin = most(0, -skipped), end = least(axis[2].out, inner * plane.count[2] - skipped);
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
                    const bool outside = o0 < 0 || o0 >= axis[0].out || o1 < 0 || o1 >= axis[1].out;
                    const T* from = outside ? row : dy.at(n, o, (o0 * axis[1].out + o1) * axis[2].out);
                    if (dy.last && !outside) {
                        for (int64_t i = begin; i < end; ++i) row[i] = from[i * dy.channels];
                        from = row;
                    }
                    deinterleave(phases.get(), from, outside ? 0 : axis[2].out, skipped, inner, plane.count[2]);
                }
            const int64_t used = plane.count[0] * plane.pitch[0];
            for (int64_t r = 0; r < inner; ++r) clear(first + r * plane.length + used, plane.length - used);
        }
}

// ---- dx

// columns (terms, kWidth) of positions whose segments, of a vector at most, are given: from the planes
template <typename T>
void take_planes(const T* planes, const int64_t* offsets, int64_t terms, const Segment* segments, int64_t found,
                 T* columns) {
    for (int64_t k = 0; k < terms; ++k, columns += kWidth<T>)
        for (int64_t s = 0; s < found; ++s)
            // what is written beyond the end the next segment or term overwrites
            store(columns + segments[s].from, load(planes + offsets[k] + segments[s].at));
}

template <typename T>
int dx_of(const Args& args) {
    const Problem problem(args);
    constexpr int kWide = int(kWidth<T>);
    const int64_t terms = args.out_channels * problem.taps, channels = args.in_channels;
    const T* weight = static_cast<const T*>(args.weight);
    if (!all_finite(weight, channels * terms)) return MMFAST_DECLINED;
    Scratch<T> packed(packed_rows(channels) * terms);
    if (!packed.get()) return MMFAST_OUT_OF_MEMORY;
    pack(weight, channels, terms, terms, 1, packed.get());

    const Axis *axis = problem.axis, &along = axis[problem.band];
    const int64_t inner = problem.positions / along.in;
    const int64_t slab = args.out_channels * problem.phases * plane_of_dy(problem, {0, 1}, 1).pitch[problem.band];
    const int64_t size = band_size(along.in, slab, along.reach), bands = parts_of(along.in, size);
    const int64_t deep = least(terms, kDepth);
    const int64_t tiles = least(parts_of(size * inner, kWide), most(1, kColumns / deep / kWide));
    const Image<const T> dy{static_cast<const T*>(args.y), args.out_channels, problem.out_positions,
                            bool(args.y_channels_last)};
    return parallel_status(threads_for(args, problem), args.batch * bands, [&](int64_t unit) -> int {
        const int64_t n = unit / bands, i = unit % bands * size;
        const Range band{i, least(i + size, along.in)};
        const Plane plane = plane_of_dy(problem, band, kLanes<T>);
        const int64_t planes = args.out_channels * problem.phases * plane.length + kLanes<T>;
        Scratch<T> scratch(planes + most(tiles * kWide * deep + kLanes<T>, axis[2].out));
        Scratch<Segment> segments(kWide);
        Scratch<int64_t> offsets(terms);
        if (!scratch.get() || !segments.get() || !offsets.get()) return MMFAST_OUT_OF_MEMORY;
        T* columns = scratch.get() + planes;
        list_offsets(problem, plane, args.out_channels, offsets.get());
        fill_phases(problem, plane, dy, n, scratch.get(), columns);
        T* dx = static_cast<T*>(args.dx) + n * channels * problem.positions;
        for (int64_t p = band.begin * inner; p < band.end * inner; p += tiles * kWide) {
            const int64_t count = least(tiles * kWide, band.end * inner - p);
            for (int64_t k = 0; k < terms; k += deep) {
                const int64_t depth = least(deep, terms - k);
                for (int64_t t = 0; t < count; t += kWide) {
                    const int64_t columns_there = least(kWide, count - t);
                    const int64_t n_segments =
                        list_segments(problem, plane, p + t, columns_there, kLanes<T>, segments.get());
                    take_planes(scratch.get(), offsets.get() + k, depth, segments.get(), n_segments,
                                columns + t * depth);
                }
                for (int64_t c = 0; c < channels; c += kRows)
                    for (int64_t t = 0; t < count; t += kWide) {
                        const int64_t tile = tile_of(channels - c), rows = least(kRows, channels - c);
                        T* to = dx + c * problem.positions + p + t;
                        for (int64_t r = 0; r < rows; ++r) prefetch_row<1>(to + r * problem.positions, kWide);
                        multiply(Packed<T>{packed.get() + c * terms + k * tile}, columns + t * depth, kWide, depth, to,
                                 problem.positions, int(rows), least(kWide, count - t), k > 0);
                    }
            }
        }
        return MMFAST_OK;
    });
}

// ---- dweight

// dy channels last, for each place that the inputs of a band reach: rows of u, zero outside dy.
struct Reach {
    int64_t first[3], count[3], pitch[3];  // of u along the axes; in elements

    Reach(const Problem& problem, Range band, int64_t channels) {
        for (int d = 0; d < 3; ++d) {
            const Axis& x = problem.axis[d];
            const Range inputs = d == problem.band ? band : Range{0, x.in};
            first[d] = inputs.begin * x.stride;
            count[d] = (inputs.size() - 1) * x.stride + (x.kernel - 1) * x.dilation + 1;
        }
        pitch[2] = channels;
        pitch[1] = count[2] * pitch[2];
        pitch[0] = count[1] * pitch[1];
    }
    int64_t elements() const { return count[0] * pitch[0]; }
};

template <typename T>
void fill_reach(const Problem& problem, const Reach& reach, const Image<const T>& dy, int64_t n, T* to) {
    const Axis* axis = problem.axis;
    const int64_t skipped = axis[2].before - reach.first[2];  // o + skipped is the place in the row
    const int64_t begin = most(0, -skipped);
    const int64_t size = most(0, least(axis[2].out, reach.count[2] - skipped) - begin);
    Scratch<const T*> rows(dy.channels);
    for (int64_t a = 0; a < reach.count[0]; ++a)
        for (int64_t b = 0; b < reach.count[1]; ++b, to += reach.pitch[1]) {
            const int64_t o0 = reach.first[0] + a - axis[0].before, o1 = reach.first[1] + b - axis[1].before;
            if (o0 < 0 || o0 >= axis[0].out || o1 < 0 || o1 >= axis[1].out || !size) {
                clear(to, reach.pitch[1]);
                continue;
            }
            const int64_t lead = (begin + skipped) * dy.channels, filled = lead + size * dy.channels;
            clear(to, lead);
            clear(to + filled, reach.pitch[1] - filled);
            const int64_t position = (o0 * axis[1].out + o1) * axis[2].out + begin;
            for (int64_t o = 0; o < dy.channels; ++o) rows.get()[o] = dy.at(n, o, position);
            if (dy.last)
                memcpy(to + lead, rows.get()[0], size_t(size * dy.channels) * sizeof(T));
            else
                interleave(to + lead, dy.channels, dy.channels * size,
                           [&](int64_t o, int64_t i, int lanes) { return load_float(rows.get()[o] + i, lanes); });
        }
}

// What a position's taps reach, as runs that follow each other in memory.
struct Runs {
    int64_t count, length;

    Runs(const Problem& problem, int64_t channels) {
        const bool whole = problem.axis[2].dilation == 1;
        count = whole ? problem.taps / problem.axis[2].kernel : problem.taps;
        length = whole ? problem.axis[2].kernel * channels : channels;
    }
    // where each starts, from what the first tap reaches on
    void list(const Problem& problem, const Reach& reach, int64_t* starts) const {
        for (int64_t k = 0; k < count; ++k) {
            int64_t tap[3];
            problem.tap(k * (problem.taps / count), tap);
            starts[k] = 0;
            for (int d = 0; d < 3; ++d) starts[k] += tap[d] * problem.axis[d].dilation * reach.pitch[d];
        }
    }
};

// columns (positions, pitch): for each of `count` positions from `first` on what its taps reach, (taps, channels)
template <typename T>
void take_reach(const Problem& problem, const Reach& reach, int64_t origin, const Runs& runs, const int64_t* starts,
                const T* from, int64_t first, int64_t count, int64_t pitch, T* columns) {
    const Axis* axis = problem.axis;
    for (int64_t p = first; p < first + count;) {
        const int64_t i[3] = {p / axis[2].in / axis[1].in, p / axis[2].in % axis[1].in, p % axis[2].in};
        const T* at = from - origin;
        for (int d = 0; d < 3; ++d) at += i[d] * axis[d].stride * reach.pitch[d];
        const int64_t end = least(first + count, p + axis[2].in - i[2]);
        for (; p < end; ++p, at += axis[2].stride * reach.pitch[2], columns += pitch)
            for (int64_t k = 0; k < runs.count; ++k)
                // what is written beyond the end the next run overwrites
                for (int64_t j = 0; j < runs.length; j += kLanes<T>)
                    store(columns + k * runs.length + j, load(at + starts[k] + j));
    }
}

template <typename T>
int dweight_of(const Args& args) {
    const Problem problem(args);
    constexpr int kWide = int(kWidth<T>), L = kLanes<T>;
    const int64_t wide = args.out_channels * problem.taps, channels = args.in_channels;
    const int64_t pitch = parts_of(wide, L) * L;
    const Runs runs(problem, args.out_channels);
    const Axis& along = problem.axis[problem.band];
    const int64_t inner = problem.positions / along.in;
    const int64_t slab = Reach(problem, {0, 1}, args.out_channels).pitch[problem.band] * along.stride;
    const int64_t size = band_size(along.in, slab, along.reach), bands = parts_of(along.in, size);
    const int64_t units = args.batch * bands, parts = least(units, kParts);
    const Image<const T> dy{static_cast<const T*>(args.y), args.out_channels, problem.out_positions,
                            bool(args.y_channels_last)};
    Scratch<T> sums(parts * channels * pitch);
    if (!sums.get()) return MMFAST_OUT_OF_MEMORY;
    const int status = parallel_status(threads_for(args, problem), parts, [&](int64_t part) {
        T* sum = sums.get() + part * channels * pitch;
        clear(sum, channels * pitch);
        // rounded up, for vectors of columns that lie in two cache lines take twice as long to load
        const int64_t most_reach = (Reach(problem, {0, size}, args.out_channels).elements() / L + 2) * L;
        Scratch<T> scratch(most_reach + kPositions * pitch + L);
        Scratch<int64_t> starts(runs.count);
        if (!scratch.get() || !starts.get()) return MMFAST_OUT_OF_MEMORY;
        // what is beyond a run is read, and ends in columns that are dropped
        clear(scratch.get(), most_reach + kPositions * pitch + L);
        T* columns = scratch.get() + most_reach;
        for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit) {
            const int64_t n = unit / bands, i = unit % bands * size;
            const Range band{i, least(i + size, along.in)};
            const Reach reach(problem, band, args.out_channels);
            fill_reach(problem, reach, dy, n, scratch.get());
            runs.list(problem, reach, starts.get());
            const int64_t origin = reach.first[problem.band] * reach.pitch[problem.band];
            const T* x = static_cast<const T*>(args.x) + n * channels * problem.positions;
            for (int64_t p = band.begin * inner; p < band.end * inner; p += kPositions) {
                const int64_t count = least(kPositions, band.end * inner - p);
                take_reach(problem, reach, origin, runs, starts.get(), scratch.get(), p, count, pitch, columns);
                for (int64_t c = 0; c < channels; c += kRows) {
                    Rows<T> rows;
                    const int valid = int(least(kRows, channels - c));
                    // rows past the end are the last one again, and not stored
                    for (int r = 0; r < kRows; ++r)
                        rows.data[r] = x + (c + least(r, valid - 1)) * problem.positions + p;
                    for (int r = 0; r < valid; ++r) prefetch_row<0>(rows.data[r] + kPositions, kPositions);
                    for (int64_t column = 0; column < pitch; column += kWide)
                        multiply(rows, columns + column, pitch, count, sum + c * pitch + column, pitch, valid,
                                 least(kWide, pitch - column), true);
                }
            }
        }
        return MMFAST_OK;
    });
    if (status) return status;
    T* dweight = static_cast<T*>(args.dweight);
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < wide; ++k) {
            // columns are (taps, channels)
            const T* from = sums.get() + c * pitch + k % problem.taps * args.out_channels + k / problem.taps;
            T total = 0;
            for (int64_t part = 0; part < parts; ++part) total += from[part * channels * pitch];
            dweight[c * wide + k] = total;
        }
    return all_finite(dweight, channels * wide) ? MMFAST_OK : MMFAST_DECLINED;
}

template <typename T>
int backward_of(const Args& args) {
    const int status = args.dx ? dx_of<T>(args) : MMFAST_OK;
    return status || !args.dweight ? status : dweight_of<T>(args);
}

}  // namespace

int phases_forward(const Args& args) {
    return with_type(args, [&](auto type) { return forward_of<decltype(type)>(args); });
}

int phases_backward(const Args& args) {
    return with_type(args, [&](auto type) { return backward_of<decltype(type)>(args); });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
