// The recurrent product: some rows times one panel of packed weights, its sums left in registers for what follows.
#pragma once
#include "cpu/rnn_gates.h"

namespace mmfast {
namespace MMFAST_ISA {

// Vectors a tile is wide at most, and rows it is high at most, so that sums and operands fit the registers.
constexpr int kMaxVectors = 4;
#if defined(__AVX512F__)
constexpr int kMaxRows[kMaxVectors] = {8, 8, 8, 6};
constexpr int kPairs = 0, kUnrolled = 1;
#else
constexpr int kMaxRows[kMaxVectors] = {8, 6, 4, 2};
// Rows from which on four vectors are two tiles, each of more rows; columns k that a turn of the product's loop takes.
constexpr int kPairs = 3, kUnrolled = 4;
#endif
constexpr int kHighestTile = 8;

// Some columns k of the left operand: row r is a[r * stride .. + k].
template <typename C>
struct Piece {
    const C* a;
    int64_t stride, k;
};

// Columns that are summed in one chain. Longer sums are made of such parts, as libraries' are: a chain's rounding error
// grows with its length.
constexpr int64_t kChain = 128;

// out[r * width + v] = sum over the pieces' columns k of a[r][k] * panel[k][v]
template <typename C, int kRows, int kVectors>
void multiply_tile(Vec<C>* out, int width, const Piece<C>* pieces, int count, const C* panel) {
    bool first = true;
    for (const Piece<C>* piece = pieces; piece < pieces + count; ++piece) {
        const C* a = piece->a;
        const int64_t stride = piece->stride;
        for (int64_t left = piece->k; left > 0; left -= kChain, first = false) {
            Vec<C> sum[kRows][kVectors] = {};
#pragma GCC unroll kUnrolled
            for (int64_t k = left < kChain ? left : kChain; k > 0; --k, ++a, panel += kVectors * kLanes<C>) {
                Vec<C> w[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kLanes<C>);
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const Vec<C> value = splat(a[r * stride]);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) sum[r][v] += value * w[v];
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    Vec<C>& total = out[r * width + v];
                    total = first ? sum[r][v] : total + sum[r][v];
                }
        }
    }
}

template <typename C>
using TileProduct = void (*)(Vec<C>*, int, const Piece<C>*, int, const C*);

template <typename C, int kVectors>
TileProduct<C> tile_product(int rows) {
#define MMFAST_TILE(n) multiply_tile<C, (n <= kMaxRows[kVectors - 1] ? n : 1), kVectors>
    static constexpr TileProduct<C> kTiles[kHighestTile] = {MMFAST_TILE(1), MMFAST_TILE(2), MMFAST_TILE(3),
                                                            MMFAST_TILE(4), MMFAST_TILE(5), MMFAST_TILE(6),
                                                            MMFAST_TILE(7), MMFAST_TILE(8)};
#undef MMFAST_TILE
    return kTiles[rows - 1];
}

template <typename C>
TileProduct<C> tile_product(int rows, int vectors) {
    switch (vectors) {
        case 1:
            return tile_product<C, 1>(rows);
        case 2:
            return tile_product<C, 2>(rows);
        case 3:
            return tile_product<C, 3>(rows);
        default:
            return tile_product<C, 4>(rows);
    }
}

// The right operand: `units` columns for each of `gates` gates. A block is one vector of units with all its gates, or,
// with one gate, up to kMaxVectors of units. Its columns lie in panels as wide as a tile: all of them, or two and two.
template <typename C>
struct Panels {
    C* data;
    int64_t k, units;
    int gates;
    bool pairs;

    Panels(int64_t depth, int64_t columns, int gates_of_unit, int64_t rows)
        : data(nullptr), k(depth), units(columns), gates(gates_of_unit), pairs(kPairs && rows >= kPairs) {}
    int64_t vectors() const { return (units + kLanes<C> - 1) / kLanes<C>; }
    int64_t blocks() const { return gates > 1 ? vectors() : (vectors() + kMaxVectors - 1) / kMaxVectors; }
    int64_t size() const { return k * gates * vectors() * kLanes<C>; }
    int64_t first_unit(int64_t block) const { return block * (gates > 1 ? 1 : kMaxVectors) * kLanes<C>; }
    int width(int64_t block) const {
        if (gates > 1) return gates;
        const int64_t left = vectors() - block * kMaxVectors;
        return left < kMaxVectors ? int(left) : kMaxVectors;
    }
    int tile_width(int64_t block) const { return pairs && width(block) == 4 ? 2 : width(block); }
    // the panel of the block's columns from v on
    C* panel(int64_t block, int v) const { return data + (first_unit(block) * gates + v * kLanes<C>)*k; }
    C* at(int64_t block, int64_t row, int v) const {
        const int tile = tile_width(block);
        return panel(block, v / tile * tile) + (row * tile + v % tile) * kLanes<C>;
    }
};

// panel[k][v][lane] = W[gate * units + unit][k], W (gates * units, k): the product is a W^T
template <typename T, typename C>
void pack_transposed(const Memory<T, C>& memory, const Panels<C>& panels, const T* w, int64_t block) {
    constexpr int L = kLanes<C>;
    const int width = panels.width(block);
    for (int v = 0; v < width; ++v) {
        const int64_t unit = panels.first_unit(block) + (panels.gates > 1 ? 0 : v * L);
        const int64_t valid = panels.units - unit < L ? panels.units - unit : L;
        const T* row = w + ((panels.gates > 1 ? v : 0) * panels.units + unit) * panels.k;
        for (int64_t k = 0; k < panels.k; k += L) {
            const int count = panels.k - k < L ? int(panels.k - k) : L;
            Vec<C> square[L] = {}, turned[L];
            for (int64_t lane = 0; lane < valid; ++lane)
                square[lane] = memory.load_from(row + lane * panels.k + k, count);
            transpose<C>(square, turned);
            for (int i = 0; i < count; ++i) store(panels.at(block, k + i, v), turned[i]);
        }
    }
}

// panel[k][v][lane] = W[k][unit], W (k, units): the product is a W
template <typename T, typename C>
void pack(const Memory<T, C>& memory, const Panels<C>& panels, const T* w, int64_t block) {
    const int width = panels.width(block);
    for (int64_t k = 0; k < panels.k; ++k) {
        for (int v = 0; v < width; ++v) {
            const int64_t unit = panels.first_unit(block) + v * kLanes<C>;
            const int64_t left = panels.units - unit;
            store(panels.at(block, k, v),
                  memory.load_from(w + k * panels.units + unit, left < kLanes<C> ? int(left) : kLanes<C>));
        }
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
