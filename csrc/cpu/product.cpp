// The product of two matrices, for processors whose libraries use half of their vectors, or where it spares calls.
//
// out = a b + bias, or += a b. Pointers, shapes and strides: mmfast_product_args in mmfast.h. 2 M N K flops; bound by
// the vector units: a tile of kRows rows times up to kMaxVectors vectors of columns keeps its sums in registers and
// reads, for each k, one row of a panel of b (in the second cache) and kRows numbers of a (in the first). b is packed
// a block of at most kDepth rows at a time, so that a panel's rows follow each other; a is read where it is along k,
// and copied strip by strip where it is dense along its rows, for rows a power of two apart share a set of the cache.
// Source: Goto and van de Geijn, doi:10.1145/1356052.1356053.
//
// Threads own rows of out. Each number is one sequence of operations whoever owns it: the same bits for any number of
// threads. Sums over k are made of chains of at most kLongest, for a chain's rounding error grows with its length.
#include <stdlib.h>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// kPanels: of kDepth rows, that a block has; kLines: of 64 bytes, that a row of the strips of a takes
#if defined(__AVX512F__)
constexpr int kRows = 8, kMaxVectors = 3, kPanels = 6, kLines = 2;
#else
constexpr int kRows = 6, kMaxVectors = 2, kPanels = 32, kLines = 3;
#endif
constexpr int64_t kDepth = 512;
constexpr int64_t kShortest = 16, kLongest = 128;
// Rows of a that stay in a cache, for which a block has few panels: each row of b is fetched kAhead rows ahead.
constexpr int64_t kFewRows = 128, kFewPanels = 10, kAhead = 4;
constexpr int64_t kLargeResult = 1 << 18;  // whose next rows are fetched ahead: no stream of stores does that

template <typename C>
constexpr int kPanelWidth = kMaxVectors * kLanes<C>;
template <typename C>
constexpr int kStrips = kLines * 64 / (kRows * int(sizeof(C)));

template <typename T>
T smaller(T a, T b) {
    return a < b ? a : b;
}

// out[r][v] = sum over k of a[r][k * step] * panel[k][v], in chains
template <typename C, int kVectors>
void multiply_tile(Vec<C> (*out)[kMaxVectors], const C* const* a, int64_t step, const C* panel, int64_t depth,
                   int64_t chain) {
    const C* row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = a[r];
    int64_t at = 0;
    for (int64_t left = depth; left > 0; left -= chain) {
        Vec<C> sum[kRows][kVectors] = {};
        for (int64_t k = smaller(left, chain); k > 0; --k, at += step, panel += kVectors * kLanes<C>) {
            Vec<C> w[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kLanes<C>);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const Vec<C> value = splat(row[r][at]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sum[r][v] += value * w[v];
            }
        }
        const bool first = left == depth;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) out[r][v] = first ? sum[r][v] : out[r][v] + sum[r][v];
    }
}

template <typename C>
class Product {
    using V = Vec<C>;

  public:
    explicit Product(const mmfast_product_args& args)
        : m_(args.rows),
          n_(args.columns),
          k_(args.depth),
          add_(args.add != 0),
          a_(static_cast<const C*>(args.a)),
          b_(static_cast<const C*>(args.b)),
          bias_(static_cast<const C*>(args.bias)),
          out_(static_cast<C*>(args.out)),
          a_row_(args.a_row),
          a_k_(args.a_column),
          b_k_(args.b_row),
          b_column_(args.b_column),
          out_row_(args.out_row),
          chain_(k_ / 4 < kShortest ? kShortest : smaller(k_ / 4, kLongest)) {}

    int run(int threads) const {
        const int64_t tiles = (m_ + kRows - 1) / kRows;
        const double flops = 2.0 * double(m_) * double(n_) * double(k_);
        const int parts = flops < 1e6 ? 1 : int(smaller(tiles, int64_t(threads)));
        return parallel_status(parts, parts, [&](int64_t part) {
            return rows(tiles * part / parts * kRows, smaller(m_, tiles * (part + 1) / parts * kRows));
        });
    }

  private:
    int rows(int64_t begin, int64_t end) const {
        const int64_t depth = smaller(k_, kDepth);
        // the less deep a block is, the more columns it has, and the fewer times a is read
        const int64_t deep = kPanels * kDepth / (depth ? depth : 1);
        const int64_t most = (end - begin > kFewRows ? deep : smaller(deep, kFewPanels)) * kPanelWidth<C>;
        const int64_t columns = smaller(n_ + kPanelWidth<C>, most);
        C* panels = static_cast<C*>(
            aligned_alloc(64, size_t((columns + kStrips<C> * kRows) * depth * int64_t(sizeof(C)) + 63) / 64 * 64));
        if (!panels) return MMFAST_OUT_OF_MEMORY;
        C* strips = panels + columns * depth;
        for (int64_t column = 0; column < n_; column += most)
            for (int64_t k = 0; k == 0 || k < k_; k += kDepth)
                block(begin, end, column, smaller(n_, column + most), k, smaller(k_ - k, kDepth), panels, strips);
        free(panels);
        return MMFAST_OK;
    }

    void block(int64_t begin, int64_t end, int64_t column, int64_t last, int64_t k, int64_t depth, C* panels,
               C* strips) const {
        pack(panels, column, last, k, depth);
        const bool copies = a_row_ == 1 && a_k_ != 1;
        for (int64_t i = begin; i < end; i += kRows) {
            const int valid = int(smaller(end - i, int64_t(kRows)));
            const int64_t strip = (i - begin) / kRows % kStrips<C>;
            if (copies && strip == 0) {
                const int64_t right = i + kStrips<C> * kRows;
                const bool goes_on = right < end;
                copy_strips(strips, i, end, k, depth,
                            a_ + (goes_on ? right : begin) + (goes_on ? k : k + depth) * a_k_);
            }
            const C* row[kRows];
            // rows past the end are the last one again, and not stored
            for (int r = 0; r < kRows; ++r)
                row[r] =
                    copies ? strips + strip * depth * kRows + r : a_ + (i + smaller(r, valid - 1)) * a_row_ + k * a_k_;
            each_panel(column, last, [&](int64_t j, int64_t columns) {
                tile(row, copies ? kRows : a_k_, panels + (j - column) * depth, depth, i, valid, j, int(columns),
                     k == 0);
            });
        }
    }

    // body(first column, columns) of each panel: as wide as each other, or nearly, for a tile of one vector has too few
    // sums to hide how long an addition takes.
    template <typename Body>
    static void each_panel(int64_t column, int64_t last, const Body& body) {
        const uint32_t vectors = uint32_t(vectors_of(last - column)),
                       panels = (vectors + kMaxVectors - 1) / kMaxVectors;
        for (uint32_t panel = 0, begin = 0, end = 0; panel < panels; ++panel, begin = end) {
            end = vectors * (panel + 1) / panels;
            body(column + begin * kLanes<C>, smaller(last - column, int64_t(end) * kLanes<C>) - begin * kLanes<C>);
        }
    }

    // strips[strip][d][r] = a[i + strip * kRows + r][k + d], zeros past the end; next: what is copied after these
    void copy_strips(C* strips, int64_t i, int64_t end, int64_t k, int64_t depth, const C* next) const {
        const int valid = int(smaller(end - i, int64_t(kStrips<C> * kRows)));
        for (int64_t d = 0; d < depth; ++d) {
            const C* from = a_ + i + (k + d) * a_k_;
#pragma GCC unroll 3
            for (int line = 0; line < kLines; ++line)
                __builtin_prefetch(next + d * a_k_ + line * (64 / int(sizeof(C))), 0, 2);
            for (int r = 0; r < kStrips<C> * kRows; r += kRows) {
                C* strip = strips + (r * depth + d * kRows);
                if (r + kRows <= valid)
                    memcpy(strip, from + r, sizeof(C) * kRows);
                else
                    for (int j = 0; j < kRows; ++j) strip[j] = r + j < valid ? from[r + j] : C(0);
            }
        }
    }

    static int vectors_of(int64_t columns) { return int((columns + kLanes<C> - 1) / kLanes<C>); }

    // panel[k][column] = b[k][column], zeros past the last column
    void pack(C* panels, int64_t column, int64_t last, int64_t k, int64_t depth) const {
        constexpr int L = kLanes<C>;
        if (b_column_ != 1) {
            each_panel(column, last, [&](int64_t j, int64_t columns) {
                C* panel = panels + (j - column) * depth;
                const int vectors = vectors_of(columns);
                for (int v = 0; v < vectors; ++v)
                    pack_transposed(panel + v * L, vectors * L, b_ + k * b_k_ + (j + v * L) * b_column_,
                                    int(smaller(columns - v * L, int64_t(L))), depth);
            });
            return;
        }
        // row by row of the whole block, which memory gives in less time than panel by panel
        for (int64_t d = 0; d < depth; ++d) {
            const C* row = b_ + (k + d) * b_k_;
            for (int64_t j = column; j < last && d + kAhead < depth; j += L)
                __builtin_prefetch(row + kAhead * b_k_ + j, 0, 2);
            each_panel(column, last, [&](int64_t j, int64_t columns) {
                const int vectors = vectors_of(columns);
                C* to = panels + (j - column) * depth + d * vectors * L;
                for (int v = 0; v < vectors; ++v, j += L)
                    store(to + v * L, last - j < L ? load_partial(row + j, int(last - j)) : load(row + j));
            });
        }
    }

    // panel[d * stride + lane] = from[d * b_k + lane * b_column]; what the next vector reads is fetched ahead
    void pack_transposed(C* panel, int64_t stride, const C* from, int valid, int64_t depth) const {
        constexpr int L = kLanes<C>;
        for (int64_t d = 0; d < depth; d += L) {
            const int count = int(smaller(depth - d, int64_t(L)));
            V square[L] = {}, turned[L];
            for (int lane = 0; lane < valid; ++lane) {
                const C* p = from + lane * b_column_ + d * b_k_;
                __builtin_prefetch(p + L * b_column_, 0, 2);
                if (b_k_ == 1) {
                    square[lane] = count == L ? load(p) : load_partial(p, count);
                } else {
                    for (int i = 0; i < count; ++i) square[lane][i] = p[i * b_k_];
                }
            }
            transpose<C>(square, turned);
            for (int i = 0; i < count; ++i) store(panel + (d + i) * stride, turned[i]);
        }
    }

    void tile(const C* const* row, int64_t step, const C* panel, int64_t depth, int64_t i, int valid, int64_t column,
              int columns, bool first) const {
        constexpr int L = kLanes<C>;
        V sums[kRows][kMaxVectors];
        const int vectors = vectors_of(columns);
        const int64_t next = m_ * n_ < kLargeResult ? 0 : smaller(m_ - i - kRows, int64_t(kRows));
        for (int r = 0; r < next; ++r)
            for (int v = 0; v < vectors; ++v)
                __builtin_prefetch(out_ + (i + kRows + r) * out_row_ + column + v * L, 1, 2);
        if (depth == 0)
            memset(sums, 0, sizeof sums);
        else if (vectors == kMaxVectors)
            multiply_tile<C, kMaxVectors>(sums, row, step, panel, depth, chain_);
        else if (vectors == 2)
            multiply_tile<C, 2>(sums, row, step, panel, depth, chain_);
        else
            multiply_tile<C, 1>(sums, row, step, panel, depth, chain_);
        for (int v = 0; v < vectors; ++v) {
            const int lanes = smaller(columns - v * L, L);
            const int64_t at = column + v * L;
            const V bias = bias_ && first ? load_partial(bias_ + at, lanes) : V{};
            for (int r = 0; r < valid; ++r) {
                C* out = out_ + (i + r) * out_row_ + at;
                V value = sums[r][v] + bias;
                if (add_ || !first) value += lanes == L ? load(out) : load_partial(out, lanes);
                lanes == L ? store(out, value) : store_partial(out, value, lanes);
            }
        }
    }

    int64_t m_, n_, k_;
    bool add_;
    const C *a_, *b_, *bias_;
    C* out_;
    int64_t a_row_, a_k_, b_k_, b_column_, out_row_, chain_;
};

}  // namespace

int product(const mmfast_product_args& args) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return Product<float>(args).run(args.threads);
        case MMFAST_FLOAT64:
            return Product<double>(args).run(args.threads);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
