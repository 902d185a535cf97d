// What both walks through time know of a layer: its rows and steps, who works on which, one direction's pointers.
#pragma once
#include "cpu/rnn_tile.h"

namespace mmfast {
namespace MMFAST_ISA {

// kPlain, here and below: no lengths, resets, masks, zoneout or projection. Such a layer, which most are, is spared the
// questions about them in every vector.
template <bool kPlain>
struct Rows {
    const mmfast_rnn_layer& layer;

    explicit Rows(const mmfast_rnn_layer& l) : layer(l) {}
    int64_t count(int64_t t) const { return layer.offsets ? layer.offsets[t + 1] - layer.offsets[t] : layer.batch; }
    int64_t row(int64_t t, int64_t b) const { return (layer.offsets ? layer.offsets[t] : t * layer.batch) + b; }
    // rows from a sequence's step t to its step `to`; 0 past the ends
    int64_t distance(int64_t t, int64_t to) const { return to < 0 || to >= layer.steps ? 0 : row(to, 0) - row(t, 0); }
    // whether sequence b has a step t, 0 <= t < T
    bool active(int64_t t, int64_t b) const { return !kPlain && layer.lengths ? t < layer.lengths[b] : b < count(t); }
    bool empty(int64_t b) const { return layer.steps == 0 || !active(0, b); }
    // whether zeros enter this row in the place of the state before it, by the walk in this direction
    bool cut(int64_t t, int64_t b, bool reverse) const {
        if (kPlain || !layer.reset) return false;
        t += reverse;
        return t < layer.steps && active(t, b) && layer.reset[row(t, b)];
    }
};

// What one thread works on: rows [row, row_end) of the batch, blocks [part, part + 1) * all blocks / parts.
struct Share {
    int64_t row, row_end;
    int part, parts;

    int64_t begin(int64_t blocks) const { return blocks * part / parts; }
    int64_t end(int64_t blocks) const { return blocks * (part + 1) / parts; }
};

// The share of thread `index` of `count` that work on one direction.
inline Share share_of(int64_t batch, int64_t blocks, int index, int count) {
    if (batch >= count) return {batch * index / count, batch * (index + 1) / count, 0, 1};
    const int parts = int(blocks < count ? blocks : count);
    if (index >= parts) return {0, 0, 0, parts};
    return {0, batch, index, parts};
}

// A product beside a tile's own, of the same units and gates.
template <typename C>
struct Beside {
    const Panels<C>* panels;
    Piece<C> piece;
};
// Where its sums are, behind those of the tile's own.
constexpr int kBeside = kHighestTile * kMaxVectors;

// body(row, unit, valid lanes, sums) for rows [begin, end) and each vector of units in the share; `sums` points to one
// vector a gate. Without pieces the sums are zero.
template <typename C, typename Body>
void each_tile(const Panels<C>& panels, const Share& share, int64_t begin, int64_t end, const Piece<C>* pieces,
               int count, const Body& body, const Beside<C>* beside = nullptr) {
    if (begin >= end) return;
    for (int64_t block = share.begin(panels.blocks()); block < share.end(panels.blocks()); ++block) {
        const int width = panels.width(block), tile_width = panels.tile_width(block), gates = panels.gates;
        const int64_t rows = end - begin, highest = kMaxRows[tile_width - 1];
        const int64_t tiles = (rows + highest - 1) / highest;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = begin + rows * tile / tiles, height = begin + rows * (tile + 1) / tiles - first;
            Vec<C> sums[2 * kBeside];
            if (count) {
                Piece<C> here[2] = {};
                for (int i = 0; i < count; ++i) {
                    here[i] = pieces[i];
                    here[i].a += first * pieces[i].stride;
                }
                for (int v = 0; v < width; v += tile_width)
                    tile_product<C>(int(height), tile_width)(sums + v, width, here, count, panels.panel(block, v));
            } else {
                memset(sums, 0, size_t(height * width) * sizeof sums[0]);
            }
            if (beside) {
                Piece<C> here = beside->piece;
                here.a += first * here.stride;
                for (int v = 0; v < width; v += tile_width)
                    tile_product<C>(int(height), tile_width)(sums + kBeside + v, width, &here, 1,
                                                             beside->panels->panel(block, v));
            }
            for (int64_t r = 0; r < height; ++r)
                for (int v = 0; v < width; v += gates) {
                    const int64_t unit = panels.first_unit(block) + v / gates * kLanes<C>;
                    const int64_t left = panels.units - unit;
                    body(first + r, unit, left < kLanes<C> ? int(left) : kLanes<C>, sums + r * width + v);
                }
        }
    }
}

// body(row, unit, valid lanes) for the share's rows and each vector of `units` units in it
template <typename C, typename Body>
void each_vector(const Share& share, int64_t units, const Body& body) {
    const int64_t vectors = (units + kLanes<C> - 1) / kLanes<C>;
    for (int64_t b = share.row; b < share.row_end; ++b)
        for (int64_t v = share.begin(vectors); v < share.end(vectors); ++v) {
            const int64_t unit = v * kLanes<C>;
            body(b, unit, units - unit < kLanes<C> ? int(units - unit) : kLanes<C>);
        }
}

// A row of state in scratch: whole vectors, and one more, so that rows do not meet in one set of the cache.
template <typename C>
int64_t state_stride(int64_t hidden) {
    return ((hidden + kLanes<C> - 1) / kLanes<C> + 1) * kLanes<C>;
}

// brings what the next step reads into the cache while this one computes; a row apart is too far for the hardware
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void fetch_to_write(void* p) { __builtin_prefetch(p, 1, 2); }

// What both walkers know of one direction of a layer.
template <typename T, typename C, bool kPlain>
struct Direction {
    using V = Vec<C>;

    Direction(const mmfast_rnn_layer& l, int direction)
        : layer(l),
          rows(l),
          memory(l.dtype),
          reverse(direction == 1),
          G(gates_of(l.mode)),
          H(l.hidden),
          P(l.proj ? l.proj : l.hidden),
          gates_stride(l.directions * G * H),
          units_stride(l.directions * H),
          y_stride(l.directions * P),
          gates_at(direction * G * H),
          units_at(direction * H),
          y_at(direction * P),
          h_at(direction * l.batch * P),
          c_at(direction * l.batch * H) {
        w_hh = static_cast<const T*>(l.w_hh[direction]);
        w_hr = l.proj ? static_cast<const T*>(l.w_hr[direction]) : nullptr;
        b_hh = static_cast<const T*>(l.b_hh[direction]);
        h0 = moved(static_cast<const T*>(l.h0), h_at);
        c0 = moved(static_cast<const T*>(l.c0), c_at);
        drop = moved(static_cast<const T*>(l.dropout_mask), h_at);
        zone = moved(l.zoneout_mask, y_at);
    }

    template <typename U>
    static U* moved(U* p, int64_t by) {
        return p ? p + by : nullptr;
    }
    template <typename U>
    static U* moved(void* p, int64_t by) {
        return moved(static_cast<U*>(p), by);
    }

    bool zones() const { return !kPlain && (zone || layer.zoneout > 0); }
    bool projects() const { return !kPlain && w_hr; }
    // the share of h' in h
    V stay(int64_t row, int64_t unit, int valid) const {
        if (!zone) return splat(C(layer.zoneout));
        C k[kLanes<C>] = {};
        for (int i = 0; i < valid; ++i) k[i] = zone[row * y_stride + unit + i] ? C(1) : C(0);
        return load(k);
    }
    V or_zero(const T* p, int64_t offset, int valid) const { return p ? memory.load_from(p + offset, valid) : V{}; }
    V dropped(V h, int64_t b, int64_t unit, int valid) const {
        return !kPlain && drop ? h * memory.load_from(drop + b * P + unit, valid) : h;
    }

    const mmfast_rnn_layer& layer;
    Rows<kPlain> rows;
    Memory<T, C> memory;
    bool reverse;
    int G;
    int64_t H, P, gates_stride, units_stride, y_stride, gates_at, units_at, y_at, h_at, c_at;
    const T *w_hh, *w_hr, *b_hh, *h0, *c0, *drop;
    const uint8_t* zone;
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
