// The products that transposed convolutions of many channels are made of: tiles of kRows rows times one or two vectors
// of columns, whose sums stay in registers over a chain of terms, for a chain's rounding error grows with its length.
#pragma once
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;
template <typename T>
constexpr int kWidth = kVectors * kLanes<T>;
constexpr int64_t kShortest = 32, kLongest = 128;

// How long the chains of a sum are: `parts` of them, where they are neither too short nor too long then.
inline int64_t chain_of(int64_t terms, int64_t parts) { return most(kShortest, least(kLongest, terms / parts)); }

// How many of `count` make a block, at most so many, of blocks as large as each other, or nearly.
inline int64_t evenly(int64_t count, int64_t at_most) { return parts_of(count, parts_of(count, most(1, at_most))); }

inline int threads_for(const mmfast_conv_transpose_args& a) {
    const int64_t taps = a.kernel[0] * a.kernel[1] * a.kernel[2];
    const int64_t positions = a.in_size[0] * a.in_size[1] * a.in_size[2];
    return a.batch * a.in_channels * a.out_channels * taps * positions < (1 << 18) ? 1 : a.threads;
}

// ---- out = rows of one tensor times packed weights

// rows of the sums over `count` segments of terms: row[r][offset + k] * weights[weight + k][column]
struct Segment {
    int64_t offset, weight, depth;
};

// out[r] = bias + the sums of row r, or += without bias; of columns that kCount vectors hold
template <int kCount, typename T>
void multiply_tile(const T* const* rows, const T* weights, const Segment* segments, int64_t count, const T* bias,
                   T* const* out, int valid, int columns) {
    constexpr int L = kLanes<T>;
    const T* row[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) row[r] = rows[r];
    Vec<T> sum[kRows][kCount] = {};
    for (int64_t s = 0; s < count; ++s) {
        const T* w = weights + segments[s].weight;
        const int64_t end = segments[s].offset + segments[s].depth;
        for (int64_t k = segments[s].offset; k < end; ++k, w += kWidth<T>) {
            Vec<T> weight[kCount];
#pragma GCC unroll 2
            for (int v = 0; v < kCount; ++v) weight[v] = load(w + v * L);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Vec<T> value = splat(row[r][k]);
#pragma GCC unroll 2
                for (int v = 0; v < kCount; ++v) sum[r][v] += value * weight[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        if (r >= valid) break;
        T lanes[kCount * L];
        const bool whole = columns == kCount * L;
        const T* start = bias ? bias : out[r];
        T* to = whole ? out[r] : lanes;
#pragma GCC unroll 2
        for (int v = 0; v < kCount; ++v) store(to + v * L, whole ? load(start + v * L) + sum[r][v] : sum[r][v]);
        for (int c = 0; !whole && c < columns; ++c) out[r][c] = start[c] + lanes[c];
    }
}

// Panels (terms, kWidth) of weights, each `panel` elements, with a bias for each column, and how many columns there
// are.
template <typename T>
struct Weights {
    const T* packed;
    int64_t panel;
    const T* bias;
    int64_t columns;
};

// For rows whose places are pairs of what is added to a segment's offset, and of where `panels` are written. Sums are
// made of chains of at most `chain` terms.
template <typename T>
void multiply_rows(const T* read, T* written, const int64_t* places, int64_t rows, const Segment* segments,
                   int64_t count, int64_t chain, const Weights<T>& weights, Range panels) {
    int64_t done = 0;
    do {
        int64_t stop = done, depth = 0;
        while (stop < count && (depth == 0 || depth + segments[stop].depth <= chain)) depth += segments[stop++].depth;
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            const int64_t column = panel * kWidth<T>;
            const int columns = int(least(kWidth<T>, weights.columns - column));
            for (int64_t row = 0; row < rows; row += kRows) {
                const int valid = int(least(kRows, rows - row));
                const T* sources[kRows];
                T* out[kRows];
                // rows past the end are the last one again, and not stored
                for (int r = 0; r < kRows; ++r) {
                    const int64_t* place = places + 2 * (row + least(r, valid - 1));
                    sources[r] = read + place[0];
                    out[r] = written + place[1] + (panel - panels.begin) * kWidth<T>;
                }
                const auto multiply = columns > kLanes<T> ? multiply_tile<kVectors, T> : multiply_tile<1, T>;
                multiply(sources, weights.packed + panel * weights.panel, segments + done, stop - done,
                         done ? nullptr : weights.bias + column, out, valid, columns);
            }
        }
        done = stop;
    } while (done < count);
}

// ---- sums over positions of the products of both tensors' channels

// `size` sums over blocks, in shares, for threads to have each one of: a share's blocks are added one after the other,
// and then the shares. They depend on shapes alone, and are few where the sums are many.
template <typename T>
class Shares {
  public:
    Shares(int64_t blocks, int64_t size)
        : blocks_(blocks),
          size_(size),
          count_(most(1, least(least(kMost, blocks), kMostSums / most(1, size)))),
          sums_(count_ * size) {}

    bool made() const { return sums_.get(); }
    // The status of body(a share's sums, its blocks) for all: threads have shares each, or share out what a body does.
    template <typename Body>
    int each(int threads, const Body& body) const {
        return parallel_status(threads <= count_ ? threads : 1, count_, [&](int64_t share) {
            return body(sums_.get() + share * size_, Range{blocks_ * share / count_, blocks_ * (share + 1) / count_});
        });
    }
    // `count` sums from one on, over all blocks.
    T* total(int64_t first, int64_t count) const {
        T* to = sums_.get() + first;
        for (int64_t share = 1; share < count_; ++share)
            for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, load(to + i) + load(to + share * size_ + i));
        return to;
    }

  private:
    static constexpr int64_t kMost = 16, kMostSums = 1 << 20;

    int64_t blocks_, size_, count_;
    Scratch<T> sums_;
};

// The places of one input and one output in their panels.
struct Pair {
    int32_t x, dy;
};

// sums[r][column] += sum over pairs of x[pair.x + r] * dy[pair.dy + column], or = where it is the first; of columns
// that kCount vectors hold
template <int kCount, typename T>
void add_products(const T* x, const T* dy, const Pair* pairs, int64_t count, int64_t chain, T* sums, bool first) {
    do {
        Vec<T> sum[kRows][kCount] = {};
        const Pair* stop = pairs + least(count, chain);
        count -= stop - pairs;
        for (; pairs < stop; ++pairs) {
            const T* a = x + pairs->x;
            Vec<T> b[kCount];
#pragma GCC unroll 2
            for (int v = 0; v < kCount; ++v) b[v] = load(dy + pairs->dy + v * kLanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Vec<T> value = splat(a[r]);
#pragma GCC unroll 2
                for (int v = 0; v < kCount; ++v) sum[r][v] += value * b[v];
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kCount; ++v) {
                T* at = sums + r * kWidth<T> + v * kLanes<T>;
                store(at, first ? sum[r][v] : load(at) + sum[r][v]);
            }
        first = false;
    } while (count > 0);
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
