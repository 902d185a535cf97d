// A recurrent layer over whole sequences: the walk through time, forward and backward.
//
// Pointers, shapes, layouts and the equations: mmfast_rnn_layer in mmfast.h. Per row and step the recurrence costs
// 2 G H^2 flops forward and as many backward, and reads and writes a few rows of G H elements, so it is bound by the
// vector units wherever W_hh stays in a cache. W_hh is packed once a call: a panel holds, for one block of units and
// all k, the lanes that one tile of the product needs, one after the other. A tile is some rows of the batch times one
// block of units with all its gates, so that gate math follows in the same tile while its sums are in registers; the
// backward of a gate follows the product of the step after it in the same way.
//
// Threads own rows of the batch for the whole sequence and never wait for each other; where there are fewer rows than
// threads they share the units of a block of rows and wait once a step. Each result is computed by one chain of
// operations whoever owns it: the same bits for any number of threads.
#include <stdlib.h>

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// ---- the product: rows times one panel

// Vectors a tile is wide at most, and rows it is high at most, so that sums and operands fit the registers.
constexpr int kMaxVectors = 4;
#if defined(__AVX512F__)
constexpr int kMaxRows[kMaxVectors] = {12, 12, 8, 6};
#else
constexpr int kMaxRows[kMaxVectors] = {8, 5, 4, 2};
#endif
constexpr int kHighestTile = 12;

// Some columns k of the left operand: row r is a[r * stride .. + k].
template <typename C>
struct Piece {
    const C* a;
    int64_t stride, k;
};

// out[r][v] = sum over the pieces' columns k of a[r][k] * panel[k][v]
template <typename C, int kRows, int kVectors>
void multiply_tile(Vec<C>* out, const Piece<C>* pieces, int count, const C* panel) {
    Vec<C> sum[kRows][kVectors] = {};
    for (const Piece<C>* piece = pieces; piece < pieces + count; ++piece) {
        const C* a = piece->a;
        const int64_t stride = piece->stride;
        for (int64_t k = piece->k; k > 0; --k, ++a, panel += kVectors * kLanes<C>) {
            Vec<C> w[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) w[v] = load(panel + v * kLanes<C>);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const Vec<C> left = splat(a[r * stride]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sum[r][v] += left * w[v];
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) out[r * kVectors + v] = sum[r][v];
}

template <typename C>
using TileProduct = void (*)(Vec<C>*, const Piece<C>*, int, const C*);

template <typename C, int kVectors>
TileProduct<C> tile_product(int rows) {
#define MMFAST_TILE(n) \
    case n:            \
        return multiply_tile<C, (n <= kMaxRows[kVectors - 1] ? n : 1), kVectors>;
    switch (rows) {
        MMFAST_TILE(2)
        MMFAST_TILE(3)
        MMFAST_TILE(4)
        MMFAST_TILE(5)
        MMFAST_TILE(6)
        MMFAST_TILE(7)
        MMFAST_TILE(8)
        MMFAST_TILE(9)
        MMFAST_TILE(10)
        MMFAST_TILE(11)
        MMFAST_TILE(12)
        default:
            return multiply_tile<C, 1, kVectors>;
    }
#undef MMFAST_TILE
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

// ---- packed weights

// The right operand: `units` columns for each of `gates` gates. A block is one vector of units with all its gates, or,
// with one gate, up to four vectors of units.
template <typename C>
struct Panels {
    C* data;
    int64_t k, units;
    int gates;

    int64_t vectors() const { return (units + kLanes<C> - 1) / kLanes<C>; }
    int64_t blocks() const { return gates > 1 ? vectors() : (vectors() + kMaxVectors - 1) / kMaxVectors; }
    int64_t size() const { return k * gates * vectors() * kLanes<C>; }
    int64_t first_unit(int64_t block) const { return block * (gates > 1 ? 1 : kMaxVectors) * kLanes<C>; }
    int width(int64_t block) const {
        if (gates > 1) return gates;
        const int64_t left = vectors() - block * kMaxVectors;
        return left < kMaxVectors ? int(left) : kMaxVectors;
    }
    C* panel(int64_t block) const { return data + first_unit(block) * gates * k; }
};

// panel[k][v][lane] = W[gate * units + unit][k], W (gates * units, k): the product is a W^T
template <typename T, typename C>
void pack_transposed(const Panels<C>& panels, const T* w, int64_t block) {
    constexpr int kTile = 16;
    const int width = panels.width(block);
    C* panel = panels.panel(block);
    for (int64_t k0 = 0; k0 < panels.k; k0 += kTile) {
        const int64_t k1 = k0 + kTile < panels.k ? k0 + kTile : panels.k;
        for (int v = 0; v < width; ++v) {
            const int64_t unit = panels.first_unit(block) + (panels.gates > 1 ? 0 : v * kLanes<C>);
            const int64_t valid = panels.units - unit < kLanes<C> ? panels.units - unit : kLanes<C>;
            const T* row = w + ((panels.gates > 1 ? v : 0) * panels.units + unit) * panels.k;
            for (int64_t k = k0; k < k1; ++k) {
                C* out = panel + (k * width + v) * kLanes<C>;
                for (int64_t lane = 0; lane < valid; ++lane) out[lane] = C(to_float(row[lane * panels.k + k]));
                for (int64_t lane = valid; lane < kLanes<C>; ++lane) out[lane] = 0;
            }
        }
    }
}

// panel[k][v][lane] = W[k][unit], W (k, units): the product is a W
template <typename T, typename C>
void pack(const Panels<C>& panels, const T* w, int64_t block) {
    const int width = panels.width(block);
    C* out = panels.panel(block);
    for (int64_t k = 0; k < panels.k; ++k) {
        for (int v = 0; v < width; ++v, out += kLanes<C>) {
            const int64_t unit = panels.first_unit(block) + v * kLanes<C>;
            const int64_t left = panels.units - unit;
            store(out, load_float(w + k * panels.units + unit, left < kLanes<C> ? int(left) : kLanes<C>));
        }
    }
}

// ---- rows, steps, threads

struct Rows {
    const mmfast_rnn_layer& layer;

    explicit Rows(const mmfast_rnn_layer& l) : layer(l) {}
    int64_t count(int64_t t) const { return layer.offsets ? layer.offsets[t + 1] - layer.offsets[t] : layer.batch; }
    int64_t row(int64_t t, int64_t b) const { return (layer.offsets ? layer.offsets[t] : t * layer.batch) + b; }
    // rows from a sequence's step t to its step `to`; 0 past the ends
    int64_t distance(int64_t t, int64_t to) const { return to < 0 || to >= layer.steps ? 0 : row(to, 0) - row(t, 0); }
    // whether sequence b has a step t, 0 <= t < T
    bool active(int64_t t, int64_t b) const { return layer.lengths ? t < layer.lengths[b] : b < count(t); }
    bool empty(int64_t b) const { return layer.steps == 0 || !active(0, b); }
};

// What one thread works on: rows [row, row_end) of the batch, blocks [part, part + 1) * all blocks / parts.
struct Share {
    int64_t row, row_end;
    int part, parts;

    int64_t begin(int64_t blocks) const { return blocks * part / parts; }
    int64_t end(int64_t blocks) const { return blocks * (part + 1) / parts; }
};

// The share of thread `index` of `count` that work on one direction.
Share share_of(int64_t batch, int64_t blocks, int index, int count) {
    if (batch >= count) return {batch * index / count, batch * (index + 1) / count, 0, 1};
    const int parts = int(blocks < count ? blocks : count);
    if (index >= parts) return {0, 0, 0, parts};
    return {0, batch, index, parts};
}

// body(row, unit, valid lanes, sums) for rows [begin, end) and each vector of units in the share; `sums` points to one
// vector a gate. Without pieces the sums are zero.
template <typename C, typename Body>
void each_tile(const Panels<C>& panels, const Share& share, int64_t begin, int64_t end, const Piece<C>* pieces,
               int count, const Body& body) {
    if (begin >= end) return;
    for (int64_t block = share.begin(panels.blocks()); block < share.end(panels.blocks()); ++block) {
        const int width = panels.width(block), gates = panels.gates;
        const int64_t rows = end - begin, highest = kMaxRows[width - 1];
        const int64_t tiles = (rows + highest - 1) / highest;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = begin + rows * tile / tiles, height = begin + rows * (tile + 1) / tiles - first;
            Vec<C> sums[kHighestTile * kMaxVectors];
            if (count) {
                Piece<C> here[2] = {};
                for (int i = 0; i < count; ++i) {
                    here[i] = pieces[i];
                    here[i].a += first * pieces[i].stride;
                }
                tile_product<C>(int(height), width)(sums, here, count, panels.panel(block));
            } else {
                memset(sums, 0, size_t(height * width) * sizeof sums[0]);
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

constexpr int gates_of(int mode) { return mode == MMFAST_LSTM ? 4 : mode == MMFAST_GRU ? 3 : 1; }

// A row of state in scratch: whole vectors, and one more, so that rows do not meet in one set of the cache.
template <typename C>
int64_t state_stride(int64_t hidden) {
    return ((hidden + kLanes<C> - 1) / kLanes<C> + 1) * kLanes<C>;
}

// One allocation, handed out in pieces of whole cache lines.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : base_(static_cast<char*>(aligned_alloc(64, size_t(bytes + 64) / 64 * 64))) {}
    ~Scratch() { free(base_); }
    Scratch(const Scratch&) = delete;
    bool failed() const { return !base_; }
    template <typename C>
    C* take(int64_t elements) {
        char* p = base_ + used_;
        used_ += bytes<C>(elements);
        return reinterpret_cast<C*>(p);
    }
    template <typename C>
    static int64_t bytes(int64_t elements) {
        return (elements * int64_t(sizeof(C)) + 63) / 64 * 64;
    }

  private:
    char* base_;
    int64_t used_ = 0;
};

// brings what the next step reads into the cache while this one computes; a row apart is too far for the hardware
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <typename C, typename T>
inline Vec<C> load_or_zero(const T* p, int64_t offset, int valid) {
    return p ? load_float(p + offset, valid) : Vec<C>{};
}

// ---- forward

template <typename T, typename C, int kMode>
class Forward {
    static constexpr int G = gates_of(kMode);
    using V = Vec<C>;

  public:
    Forward(const mmfast_rnn_forward_args& args, int direction)
        : layer_(args.layer), rows_(args.layer), reverse_(direction == 1), H_(layer_.hidden) {
        const int64_t D = layer_.directions, state = direction * layer_.batch * H_;
        gates_stride_ = D * G * H_;
        units_stride_ = D * H_;
        gx_ = static_cast<const T*>(args.gx) + direction * G * H_;
        gates_ = args.gates ? static_cast<T*>(args.gates) + direction * G * H_ : nullptr;
        cell_ = args.cell ? static_cast<T*>(args.cell) + direction * H_ : nullptr;
        y_ = static_cast<T*>(args.y) + direction * H_;
        hn_ = static_cast<T*>(args.hn) + state;
        cn_ = kMode == MMFAST_LSTM ? static_cast<T*>(args.cn) + state : nullptr;
        h0_ = layer_.h0 ? static_cast<const T*>(layer_.h0) + state : nullptr;
        c0_ = layer_.c0 ? static_cast<const T*>(layer_.c0) + state : nullptr;
        w_ = static_cast<const T*>(layer_.w_hh[direction]);
        b_hh_ = static_cast<const T*>(layer_.b_hh[direction]);
        panels_ = {nullptr, H_, H_, G};
        stride_ = state_stride<C>(H_);
    }

    int64_t scratch_bytes() const {
        return Scratch::bytes<C>(panels_.size()) + 3 * Scratch::bytes<C>(layer_.batch * stride_);
    }
    void take(Scratch& scratch) {
        panels_.data = scratch.template take<C>(panels_.size());
        h_[0] = scratch.template take<C>(layer_.batch * stride_);
        h_[1] = scratch.template take<C>(layer_.batch * stride_);
        c_ = scratch.template take<C>(layer_.batch * stride_);
    }
    int64_t blocks() const { return panels_.blocks(); }
    void pack_block(int64_t block) const { pack_transposed(panels_, w_, block); }

    void walk(const Share& share, Barrier& barrier) const {
        begin(share);
        barrier.wait(share.parts);
        for (int64_t s = 0; s < layer_.steps; ++s) {
            const int64_t t = reverse_ ? layer_.steps - 1 - s : s;
            const int64_t count = rows_.count(t), end = count < share.row_end ? count : share.row_end;
            const Piece<C> piece = {h_[s & 1], stride_, H_};
            C* next = h_[(s + 1) & 1];
            const int64_t ahead = rows_.distance(t, reverse_ ? t - 1 : t + 1);
            each_tile(panels_, share, share.row, end, &piece, s > 0 || h0_ ? 1 : 0,
                      [&](int64_t b, int64_t unit, int valid, const V* sums) {
                          step(t, b, unit, valid, sums, piece.a, next, ahead);
                      });
            barrier.wait(share.parts);
        }
    }

  private:
    template <typename Body>
    void each_vector(const Share& share, const Body& body) const {
        each_tile(panels_, share, share.row, share.row_end, static_cast<const Piece<C>*>(nullptr), 0,
                  [&](int64_t b, int64_t unit, int valid, const V*) { body(b, unit, valid); });
    }

    void begin(const Share& share) const {
        each_vector(share, [&](int64_t b, int64_t unit, int valid) {
            const V h = load_or_zero<C>(h0_, b * H_ + unit, valid), c = load_or_zero<C>(c0_, b * H_ + unit, valid);
            const int64_t at = b * stride_ + unit;
            store(h_[0] + at, h);
            store(h_[1] + at, h);
            store(c_ + at, c);
            if (rows_.empty(b)) finish(b, unit, valid, h, c);
        });
    }

    void finish(int64_t b, int64_t unit, int valid, V h, V c) const {
        store_float(hn_ + b * H_ + unit, h, valid);
        if (kMode == MMFAST_LSTM) store_float(cn_ + b * H_ + unit, c, valid);
    }

    bool last(int64_t t, int64_t b) const {
        return reverse_ ? t == 0 : t + 1 == layer_.steps || !rows_.active(t + 1, b);
    }

    void step(int64_t t, int64_t b, int64_t unit, int valid, const V* sums, const C* state, C* next,
              int64_t ahead) const {
        const int64_t row = rows_.row(t, b), at = b * stride_ + unit;
        T* y = y_ + row * units_stride_ + unit;
        if (!rows_.active(t, b)) return store_float(y, V{}, valid);
        const T* gx = gx_ + row * gates_stride_ + unit;
        V x[4] = {}, a[4] = {}, kept[4], h, c = {};
        for (int g = 0; g < G; ++g) {
            x[g] = load_float(gx + g * H_, valid);
            a[g] = b_hh_ ? sums[g] + load_float(b_hh_ + g * H_ + unit, valid) : sums[g];
            fetch(gx + g * H_ + ahead * gates_stride_);
        }
        if (kMode == MMFAST_LSTM) {
            const V i = kept[0] = sigmoid_of(x[0] + a[0]), f = kept[1] = sigmoid_of(x[1] + a[1]);
            const V g = kept[2] = tanh_of(x[2] + a[2]), o = kept[3] = sigmoid_of(x[3] + a[3]);
            c = f * load(c_ + at) + i * g;
            store(c_ + at, c);
            h = o * tanh_of(c);
            if (cell_) store_float(cell_ + row * units_stride_ + unit, c, valid);
        } else if (kMode == MMFAST_GRU) {
            const V r = kept[0] = sigmoid_of(x[0] + a[0]), z = kept[1] = sigmoid_of(x[1] + a[1]);
            const V n = kept[2] = tanh_of(x[2] + r * a[2]);
            h = n + z * (load(state + at) - n);
            if (cell_) store_float(cell_ + row * units_stride_ + unit, a[2], valid);
        } else {
            const V sum = x[0] + a[0];
            h = kMode == MMFAST_RNN_TANH ? tanh_of(sum) : sum < 0 ? V{} : sum;
        }
        if (G > 1 && gates_) {
            T* gates = gates_ + row * gates_stride_ + unit;
            for (int g = 0; g < G; ++g) store_float(gates + g * H_, kept[g], valid);
        }
        store_float(y, h, valid);
        store(next + at, h);
        if (last(t, b)) finish(b, unit, valid, h, c);
    }

    const mmfast_rnn_layer& layer_;
    Rows rows_;
    bool reverse_;
    int64_t H_, gates_stride_, units_stride_, stride_;
    const T *gx_, *h0_, *c0_, *w_, *b_hh_;
    T *gates_, *cell_, *y_, *hn_, *cn_;
    Panels<C> panels_;
    C *h_[2], *c_;
};

// ---- backward

template <typename T, typename C, int kMode>
class Backward {
    static constexpr int G = gates_of(kMode);
    // float32 and float64: the product reads dgates where they are written. 16 bits: a copy in float32 in scratch
    static constexpr bool kCopies = sizeof(T) != sizeof(C);
    using V = Vec<C>;

  public:
    Backward(const mmfast_rnn_backward_args& args, int direction)
        : layer_(args.layer), rows_(args.layer), reverse_(direction == 1), H_(layer_.hidden) {
        const int64_t D = layer_.directions, state = direction * layer_.batch * H_, units = direction * H_;
        gates_stride_ = D * G * H_;
        units_stride_ = D * H_;
        gates_ = G > 1 ? static_cast<const T*>(args.gates) + direction * G * H_ : nullptr;
        cell_ = G > 1 ? static_cast<const T*>(args.cell) + units : nullptr;
        y_ = static_cast<const T*>(args.y) + units;
        dy_ = args.dy ? static_cast<const T*>(args.dy) + units : nullptr;
        dhn_ = args.dhn ? static_cast<const T*>(args.dhn) + state : nullptr;
        dcn_ = args.dcn ? static_cast<const T*>(args.dcn) + state : nullptr;
        h0_ = layer_.h0 ? static_cast<const T*>(layer_.h0) + state : nullptr;
        c0_ = layer_.c0 ? static_cast<const T*>(layer_.c0) + state : nullptr;
        dgates_ = static_cast<T*>(args.dgates) + direction * G * H_;
        dm_ = kMode == MMFAST_GRU ? static_cast<T*>(args.dm) + units : nullptr;
        previous_ = args.previous ? static_cast<T*>(args.previous) + units : nullptr;
        dh0_ = args.dh0 ? static_cast<T*>(args.dh0) + state : nullptr;
        dc0_ = args.dc0 ? static_cast<T*>(args.dc0) + state : nullptr;
        w_ = static_cast<const T*>(layer_.w_hh[direction]);
        panels_ = {nullptr, G * H_, H_, 1};
        stride_ = state_stride<C>(H_);
        copy_stride_ = state_stride<C>(G * H_);
    }

    int64_t scratch_bytes() const {
        return Scratch::bytes<C>(panels_.size()) + Scratch::bytes<C>(layer_.batch * stride_) +
               (kCopies ? 2 * Scratch::bytes<C>(layer_.batch * copy_stride_) : 0);
    }
    void take(Scratch& scratch) {
        panels_.data = scratch.template take<C>(panels_.size());
        carry_ = scratch.template take<C>(layer_.batch * stride_);
        if (!kCopies) return;
        copy_[0] = scratch.template take<C>(layer_.batch * copy_stride_);
        copy_[1] = scratch.template take<C>(layer_.batch * copy_stride_);
    }
    int64_t blocks() const { return panels_.blocks(); }
    void pack_block(int64_t block) const { pack(panels_, w_, block); }

    void walk(const Share& share, Barrier& barrier) const {
        begin(share);
        int64_t before = 0;  // rows of the step walked before this one
        for (int64_t s = 0; s < layer_.steps; ++s) {
            const int64_t t = reverse_ ? s : layer_.steps - 1 - s, count = rows_.count(t);
            // rows that the step before had pass a gradient on; rows that it had not begin here, or end
            step(share, s, t, before < count || dh0_ || dc0_ ? before : count, true);
            step(share, s, t, count, false, before);
            before = count;
            barrier.wait(share.parts);
        }
        if (dh0_ || dc0_) step(share, layer_.steps, -1, before, true);
    }

  private:
    void begin(const Share& share) const {
        each_tile(panels_, share, share.row, share.row_end, static_cast<const Piece<C>*>(nullptr), 0,
                  [&](int64_t b, int64_t unit, int valid, const V*) {
                      const int64_t at = b * H_ + unit;
                      const V dc = load_or_zero<C>(dcn_, at, valid);
                      store(carry_ + b * stride_ + unit, dc);
                      if (rows_.empty(b)) finish(b, unit, valid, load_or_zero<C>(dhn_, at, valid));
                  });
    }

    void finish(int64_t b, int64_t unit, int valid, V dh) const {
        if (dh0_) store_float(dh0_ + b * H_ + unit, dh, valid);
        if (dc0_) store_float(dc0_ + b * H_ + unit, load(carry_ + b * stride_ + unit), valid);
    }

    // Rows [begin, end) of the batch at step t, the s-th that is walked; t = -1: only the initial state's gradient.
    void step(const Share& share, int64_t s, int64_t t, int64_t end, bool product, int64_t begin = 0) const {
        begin = begin > share.row ? begin : share.row;
        end = end < share.row_end ? end : share.row_end;
        const int64_t from = reverse_ ? s - 1 : layer_.steps - s;  // the step walked before
        Piece<C> pieces[2] = {};
        const int count = product && s > 0 ? pieces_of(s, from, pieces) : 0;
        const int64_t ahead = t < 0 ? 0 : rows_.distance(t, reverse_ ? t + 1 : t - 1);
        each_tile(panels_, share, begin, end, pieces, count, [&](int64_t b, int64_t unit, int valid, const V* sums) {
            const bool carried = s > 0 && product && rows_.active(from, b);
            V dh = *sums;
            if (kMode == MMFAST_GRU && carried) dh += load(carry_ + b * stride_ + unit);
            if (t >= 0 && b < rows_.count(t) && rows_.active(t, b)) {
                if (!carried) dh = load_or_zero<C>(dhn_, b * H_ + unit, valid);
                return gate(s, t, b, unit, valid, dh, ahead);
            }
            if (carried) finish(b, unit, valid, dh);
            if (t >= 0 && b < rows_.count(t)) clear(s, t, b, unit, valid);
        });
    }

    int pieces_of(int64_t s, int64_t from, Piece<C>* pieces) const {
        if (kCopies) {
            pieces[0] = {copy_[(s - 1) & 1], copy_stride_, G * H_};
            return 1;
        }
        const int64_t row = rows_.row(from, 0);
        const C* dgates = reinterpret_cast<const C*>(dgates_ + row * gates_stride_);
        pieces[0] = {dgates, gates_stride_, (kMode == MMFAST_GRU ? 2 : G) * H_};
        if (kMode != MMFAST_GRU) return 1;
        pieces[1] = {reinterpret_cast<const C*>(dm_ + row * units_stride_), units_stride_, H_};
        return 2;
    }

    // h' of this row: the output one step before, or the initial state
    V previous(const T* all, const T* initial, int64_t t, int64_t b, int64_t unit, int valid) const {
        const int64_t before = reverse_ ? t + 1 : t - 1;
        if (before >= 0 && before < layer_.steps && rows_.active(before, b))
            return load_float(all + rows_.row(before, b) * units_stride_ + unit, valid);
        return load_or_zero<C>(initial, b * H_ + unit, valid);
    }

    void clear(int64_t s, int64_t t, int64_t b, int64_t unit, int valid) const {
        const V zero[4] = {};
        const int64_t row = rows_.row(t, b);
        write(s, row, b, unit, valid, zero, zero[0]);
        if (previous_) store_float(previous_ + row * units_stride_ + unit, zero[0], valid);
    }

    void write(int64_t s, int64_t row, int64_t b, int64_t unit, int valid, const V* d, V dm) const {
        T* dgates = dgates_ + row * gates_stride_ + unit;
        for (int g = 0; g < G; ++g) store_float(dgates + g * H_, d[g], valid);
        if (kMode == MMFAST_GRU) store_float(dm_ + row * units_stride_ + unit, dm, valid);
        if (!kCopies) return;
        C* copy = copy_[s & 1] + b * copy_stride_ + unit;
        for (int g = 0; g < G; ++g) store_float(copy + g * H_, kMode == MMFAST_GRU && g == 2 ? dm : d[g], valid);
    }

    void gate(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V dh, int64_t ahead) const {
        const int64_t row = rows_.row(t, b), at = row * units_stride_ + unit;
        C* carry = carry_ + b * stride_ + unit;
        if (dy_) dh += load_float(dy_ + at, valid);
        V a[4] = {}, d[4] = {}, dm = {};
        for (int g = 0; g < G && G > 1; ++g) {
            const T* gate = gates_ + row * gates_stride_ + g * H_ + unit;
            a[g] = load_float(gate, valid);
            fetch(gate + ahead * gates_stride_);
        }
        if (kMode == MMFAST_LSTM) {
            const V i = a[0], f = a[1], g = a[2], o = a[3];
            const V c = load_float(cell_ + at, valid), tanh_c = tanh_of(c);
            const V dc = load(carry) + dh * o * (1 - tanh_c * tanh_c);
            d[0] = dc * g * (i * (1 - i));
            d[1] = dc * previous(cell_, c0_, t, b, unit, valid) * (f * (1 - f));
            d[2] = dc * i * (1 - g * g);
            d[3] = dh * tanh_c * (o * (1 - o));
            store(carry, dc * f);
            if (previous_) store_float(previous_ + at, previous(y_, h0_, t, b, unit, valid), valid);
        } else if (kMode == MMFAST_GRU) {
            const V r = a[0], z = a[1], n = a[2], m = load_float(cell_ + at, valid);
            const V h = previous(y_, h0_, t, b, unit, valid);
            const V dn = dh * (1 - z) * (1 - n * n);
            d[0] = dn * m * (r * (1 - r));
            d[1] = dh * (h - n) * (z * (1 - z));
            d[2] = dn;
            dm = dn * r;
            store(carry, dh * z);
            if (previous_) store_float(previous_ + at, h, valid);
        } else {
            const V y = load_float(y_ + at, valid);
            d[0] = kMode == MMFAST_RNN_TANH ? dh * (1 - y * y) : y > 0 ? dh : V{};
            if (previous_) store_float(previous_ + at, previous(y_, h0_, t, b, unit, valid), valid);
        }
        write(s, row, b, unit, valid, d, dm);
    }

    const mmfast_rnn_layer& layer_;
    Rows rows_;
    bool reverse_;
    int64_t H_, gates_stride_, units_stride_, stride_, copy_stride_;
    const T *gates_, *cell_, *y_, *dy_, *dhn_, *dcn_, *h0_, *c0_, *w_;
    T *dgates_, *dm_, *previous_, *dh0_, *dc0_;
    Panels<C> panels_;
    C *carry_, *copy_[2];
};

// ---- both

// too little work to wake a second thread for: about 20 us on one
int threads_for(const mmfast_rnn_layer& layer, int gates) {
    const double rows = layer.offsets ? double(layer.offsets[layer.steps]) : double(layer.steps) * double(layer.batch);
    const double flops = 2.0 * rows * layer.directions * gates * double(layer.hidden) * double(layer.hidden);
    return flops < 1e6 ? 1 : layer.threads;
}

template <typename Walker, typename Args>
int run(const Args& args, int gates) {
    const int directions = args.layer.directions;
    Walker walkers[2] = {Walker(args, 0), Walker(args, directions - 1)};
    int64_t bytes = 0;
    for (int d = 0; d < directions; ++d) bytes += walkers[d].scratch_bytes();
    Scratch scratch(bytes);
    if (scratch.failed()) return MMFAST_OUT_OF_MEMORY;
    for (int d = 0; d < directions; ++d) walkers[d].take(scratch);
    const int64_t blocks = walkers[0].blocks();
    Barrier packed, stepped[2];
    parallel_team(threads_for(args.layer, gates), [&](int index, int count) {
        for (int64_t i = index; i < directions * blocks; i += count) walkers[i / blocks].pack_block(i % blocks);
        packed.wait(count);
        // each direction has half the threads, the first the odd one; a lone thread walks both
        const bool split = directions == 2 && count > 1;
        const int half = count - count / 2;
        for (int d = 0; d < directions; ++d) {
            const int first = split && d == 1 ? half : 0, size = !split ? count : d == 0 ? half : count - half;
            if (index < first || index >= first + size) continue;
            const Share share = share_of(args.layer.batch, blocks, index - first, size);
            if (share.row < share.row_end) walkers[d].walk(share, stepped[d]);
        }
    });
    return MMFAST_OK;
}

template <template <typename, typename, int> class Walker, typename T, typename C, typename Args>
int run_mode(const Args& args) {
    const int mode = args.layer.mode;
    switch (mode) {
        case MMFAST_RNN_TANH:
            return run<Walker<T, C, MMFAST_RNN_TANH>>(args, 1);
        case MMFAST_RNN_RELU:
            return run<Walker<T, C, MMFAST_RNN_RELU>>(args, 1);
        case MMFAST_GRU:
            return run<Walker<T, C, MMFAST_GRU>>(args, 3);
        case MMFAST_LSTM:
            return run<Walker<T, C, MMFAST_LSTM>>(args, 4);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

template <template <typename, typename, int> class Walker, typename Args>
int run_dtype(const Args& args) {
    switch (args.layer.dtype) {
        case MMFAST_FLOAT32:
            return run_mode<Walker, float, float>(args);
        case MMFAST_FLOAT64:
            return run_mode<Walker, double, double>(args);
        case MMFAST_FLOAT16:
            return run_mode<Walker, Half, float>(args);
        case MMFAST_BFLOAT16:
            return run_mode<Walker, Bf16, float>(args);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace

int rnn_forward(const mmfast_rnn_forward_args& args) { return run_dtype<Forward>(args); }
int rnn_backward(const mmfast_rnn_backward_args& args) { return run_dtype<Backward>(args); }

}  // namespace MMFAST_ISA
}  // namespace mmfast
