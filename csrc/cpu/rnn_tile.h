// The recurrent product: some rows times one panel of packed weights, its sums left in registers for what follows.
#pragma once
#include "cpu/rnn_gates.h"

namespace mmfast {
namespace MMFAST_ISA {

// Vectors a tile is wide at most, rows it is high at most, so that sums and operands fit the registers, and vectors of
// a block of one gate.
constexpr int kMaxVectors = 4;
#if defined(__AVX512F__)
constexpr int kMaxRows[kMaxVectors] = {8, 8, 8, 6};
constexpr int kBlockVectors = 4;
#else
constexpr int kMaxRows[kMaxVectors] = {8, 6, 4, 3};
constexpr int kBlockVectors = 2;
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

// out[r][v] = sum over the pieces' columns k of a[r][k] * panel[k][v]
template <typename C, int kRows, int kVectors>
void multiply_tile(Vec<C>* out, const Piece<C>* pieces, int count, const C* panel) {
    bool first = true;
    for (const Piece<C>* piece = pieces; piece < pieces + count; ++piece) {
        const C* a = piece->a;
        const int64_t stride = piece->stride;
        for (int64_t left = piece->k; left > 0; left -= kChain, first = false) {
            Vec<C> sum[kRows][kVectors] = {};
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
                    Vec<C>& total = out[r * kVectors + v];
                    total = first ? sum[r][v] : total + sum[r][v];
                }
        }
    }
}

template <typename C>
using TileProduct = void (*)(Vec<C>*, const Piece<C>*, int, const C*);

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
// with one gate, up to kBlockVectors of units.
template <typename C>
struct Panels {
    C* data;
    int64_t k, units;
    int gates;

    int64_t vectors() const { return (units + kLanes<C> - 1) / kLanes<C>; }
    int64_t blocks() const { return gates > 1 ? vectors() : (vectors() + kBlockVectors - 1) / kBlockVectors; }
    int64_t size() const { return k * gates * vectors() * kLanes<C>; }
    int64_t first_unit(int64_t block) const { return block * (gates > 1 ? 1 : kBlockVectors) * kLanes<C>; }
    int width(int64_t block) const {
        if (gates > 1) return gates;
        const int64_t left = vectors() - block * kBlockVectors;
        return left < kBlockVectors ? int(left) : kBlockVectors;
    }
    C* panel(int64_t block) const { return data + first_unit(block) * gates * k; }
};

// panel[k][v][lane] = W[gate * units + unit][k], W (gates * units, k): the product is a W^T
template <typename T, typename C>
void pack_transposed(const Memory<T, C>& memory, const Panels<C>& panels, const T* w, int64_t block) {
    constexpr int L = kLanes<C>;
    const int width = panels.width(block);
    C* panel = panels.panel(block);
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
            for (int i = 0; i < count; ++i) store(panel + ((k + i) * width + v) * L, turned[i]);
        }
    }
}

// panel[k][v][lane] = W[k][unit], W (k, units): the product is a W
template <typename T, typename C>
void pack(const Memory<T, C>& memory, const Panels<C>& panels, const T* w, int64_t block) {
    const int width = panels.width(block);
    C* out = panels.panel(block);
    for (int64_t k = 0; k < panels.k; ++k) {
        for (int v = 0; v < width; ++v, out += kLanes<C>) {
            const int64_t unit = panels.first_unit(block) + v * kLanes<C>;
            const int64_t left = panels.units - unit;
            store(out, memory.load_from(w + k * panels.units + unit, left < kLanes<C> ? int(left) : kLanes<C>));
        }
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
