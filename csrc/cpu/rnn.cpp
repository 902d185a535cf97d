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

// ---- packed weights

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

// A stored element of 16 bits: which kind, the walker knows; one instance of the code serves both.
struct Narrow {
    uint16_t bits;
};

// Reads and writes stored elements T as vectors of C.
template <typename T, typename C>
struct Memory {
    explicit Memory(int) {}
    Vec<C> load_from(const T* p, int valid) const { return load_float(p, valid); }
    void store_to(T* p, Vec<C> v, int valid) const { store_float(p, v, valid); }
};
template <>
struct Memory<Narrow, float> {
    bool half;
    explicit Memory(int dtype) : half(dtype == MMFAST_FLOAT16) {}
    __attribute__((noinline)) Vec<float> load_from(const Narrow* p, int valid) const {
        return half ? load_float(reinterpret_cast<const Half*>(p), valid)
                    : load_float(reinterpret_cast<const Bf16*>(p), valid);
    }
    __attribute__((noinline)) void store_to(Narrow* p, Vec<float> v, int valid) const {
        half ? store_float(reinterpret_cast<Half*>(p), v, valid) : store_float(reinterpret_cast<Bf16*>(p), v, valid);
    }
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
    // whether zeros enter this row in the place of the state before it, by the walk in this direction
    bool cut(int64_t t, int64_t b, bool reverse) const {
        if (!layer.reset) return false;
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

constexpr int gates_of(int mode) { return mode == MMFAST_LSTM ? 4 : mode == MMFAST_GRU ? 3 : 1; }

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// f(Constant) of the mode
template <typename F>
inline void with_mode(int mode, const F& f) {
    switch (mode) {
        case MMFAST_RNN_TANH:
            return f(Constant<MMFAST_RNN_TANH>());
        case MMFAST_RNN_RELU:
            return f(Constant<MMFAST_RNN_RELU>());
        case MMFAST_GRU:
            return f(Constant<MMFAST_GRU>());
        default:
            return f(Constant<MMFAST_LSTM>());
    }
}

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
inline void fetch_to_write(void* p) { __builtin_prefetch(p, 1, 2); }

// What both walkers know of one direction of a layer.
template <typename T, typename C>
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

    bool zones() const { return zone || layer.zoneout > 0; }
    // the share of h' in h
    V stay(int64_t row, int64_t unit, int valid) const {
        if (!zone) return splat(C(layer.zoneout));
        C k[kLanes<C>] = {};
        for (int i = 0; i < valid; ++i) k[i] = zone[row * y_stride + unit + i] ? C(1) : C(0);
        return load(k);
    }
    V or_zero(const T* p, int64_t offset, int valid) const { return p ? memory.load_from(p + offset, valid) : V{}; }
    V dropped(V h, int64_t b, int64_t unit, int valid) const {
        return drop ? h * memory.load_from(drop + b * P + unit, valid) : h;
    }

    const mmfast_rnn_layer& layer;
    Rows rows;
    Memory<T, C> memory;
    bool reverse;
    int G;
    int64_t H, P, gates_stride, units_stride, y_stride, gates_at, units_at, y_at, h_at, c_at;
    const T *w_hh, *w_hr, *b_hh, *h0, *c0, *drop;
    const uint8_t* zone;
};

// ---- forward

// h~ from both sides of the gates and the state before; the activated gates, and for LSTM c in the place of c'.
template <int kMode, typename V>
inline V gates_of_step(const V* x, const V* a, V* kept, V h, V& c) {
    if constexpr (kMode == MMFAST_LSTM) {
        const V i = kept[0] = sigmoid_of(x[0] + a[0]), f = kept[1] = sigmoid_of(x[1] + a[1]);
        const V g = kept[2] = tanh_of(x[2] + a[2]), o = kept[3] = sigmoid_of(x[3] + a[3]);
        c = f * c + i * g;
        return o * tanh_of(c);
    } else if constexpr (kMode == MMFAST_GRU) {
        const V r = kept[0] = sigmoid_of(x[0] + a[0]), z = kept[1] = sigmoid_of(x[1] + a[1]);
        const V n = kept[2] = tanh_of(x[2] + r * a[2]);
        return n + z * (h - n);
    } else {
        const V sum = x[0] + a[0];
        return kMode == MMFAST_RNN_TANH ? tanh_of(sum) : sum < 0 ? V{} : sum;
    }
}

template <typename T, typename C>
class Forward {
    using V = Vec<C>;

  public:
    Forward(const mmfast_rnn_forward_args& args, int direction) : d_(args.layer, direction) {
        gx_ = static_cast<const T*>(args.gx) + d_.gates_at;
        gates_ = d_.G > 1 ? d_.template moved<T>(args.gates, d_.gates_at) : nullptr;
        cell_ = d_.template moved<T>(args.cell, d_.units_at);
        y_ = static_cast<T*>(args.y) + d_.y_at;
        hn_ = static_cast<T*>(args.hn) + d_.h_at;
        cn_ = lstm() ? static_cast<T*>(args.cn) + d_.c_at : nullptr;
        panels_ = {nullptr, d_.P, d_.H, d_.G};
        projection_ = {nullptr, d_.H, d_.w_hr ? d_.P : 0, 1};
        h_stride_ = state_stride<C>(d_.P);
        c_stride_ = state_stride<C>(d_.H);
    }

    int64_t scratch_bytes() const {
        return Scratch::bytes<C>(panels_.size()) + Scratch::bytes<C>(projection_.size()) +
               3 * Scratch::bytes<C>(d_.layer.batch * h_stride_) + 2 * Scratch::bytes<C>(d_.layer.batch * c_stride_);
    }
    void take(Scratch& scratch) {
        panels_.data = scratch.template take<C>(panels_.size());
        projection_.data = scratch.template take<C>(projection_.size());
        for (C*& state : h_) state = scratch.template take<C>(d_.layer.batch * h_stride_);
        C* whole = scratch.template take<C>(d_.layer.batch * h_stride_);
        whole_ = d_.drop ? whole : nullptr;
        c_ = scratch.template take<C>(d_.layer.batch * c_stride_);
        u_ = scratch.template take<C>(d_.layer.batch * c_stride_);
    }
    int64_t blocks() const { return panels_.blocks(); }
    int64_t packs() const { return panels_.blocks() + projection_.blocks(); }
    void pack_block(int64_t block) const {
        if (block < panels_.blocks()) return pack_transposed(d_.memory, panels_, d_.w_hh, block);
        pack_transposed(d_.memory, projection_, d_.w_hr, block - panels_.blocks());
    }

    void walk(const Share& share, Barrier& barrier) const {
        begin(share);
        barrier.wait(share.parts);
        const int64_t steps = d_.layer.steps;
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t t = d_.reverse ? steps - 1 - s : s;
            const int64_t count = d_.rows.count(t), end = count < share.row_end ? count : share.row_end;
            const Piece<C> piece = {h_[s & 1], h_stride_, d_.P};
            const int pieces = s > 0 || d_.h0 ? 1 : 0;
            const int64_t ahead = d_.rows.distance(t, d_.reverse ? t - 1 : t + 1);
            with_mode(d_.layer.mode, [&](auto mode) {
                each_tile(panels_, share, share.row, end, &piece, pieces,
                          [&](int64_t b, int64_t unit, int valid, const V* sums) {
                              step<decltype(mode)::value>(s, t, b, unit, valid, sums, ahead);
                          });
            });
            if (d_.w_hr) project(share, barrier, s, t, end);
            barrier.wait(share.parts);
        }
    }

  private:
    bool lstm() const { return d_.layer.mode == MMFAST_LSTM; }

    void begin(const Share& share) const {
        each_vector<C>(share, d_.P, [&](int64_t b, int64_t unit, int valid) {
            const V h = d_.or_zero(d_.h0, b * d_.P + unit, valid);
            if (d_.rows.empty(b)) d_.memory.store_to(hn_ + b * d_.P + unit, h, valid);
            for (C* state : h_) enter(state, first(b) ? V{} : h, b, unit, valid);
        });
        if (!lstm()) return;
        each_vector<C>(share, d_.H, [&](int64_t b, int64_t unit, int valid) {
            const V c = d_.or_zero(d_.c0, b * d_.H + unit, valid);
            if (d_.rows.empty(b)) d_.memory.store_to(cn_ + b * d_.H + unit, c, valid);
            store(c_ + b * c_stride_ + unit, first(b) ? V{} : c);
        });
    }

    // whether row 0 keeps the initial state out; in reverse nothing does
    bool first(int64_t b) const { return !d_.reverse && d_.rows.cut(0, b, false); }

    // h is what the next step of b finds
    void enter(C* state, V h, int64_t b, int64_t unit, int valid) const {
        const int64_t at = b * h_stride_ + unit;
        if (whole_) store(whole_ + at, h);
        store(state + at, d_.dropped(h, b, unit, valid));
    }

    bool last(int64_t t, int64_t b) const {
        return d_.reverse ? t == 0 : t + 1 == d_.layer.steps || !d_.rows.active(t + 1, b);
    }
    bool cut_after(int64_t t, int64_t b) const {
        return d_.layer.reset && !last(t, b) && d_.rows.cut(d_.reverse ? t - 1 : t + 1, b, d_.reverse);
    }
    V before(int64_t s, int64_t b, int64_t unit) const {
        return load((whole_ ? whole_ : h_[s & 1]) + b * h_stride_ + unit);
    }

    template <int kMode>
    void step(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, const V* sums, int64_t ahead) const {
        constexpr int G = gates_of(kMode);
        const int64_t row = d_.rows.row(t, b), H = d_.H;
        if (!d_.rows.active(t, b)) {
            if (!d_.w_hr) d_.memory.store_to(y_ + row * d_.y_stride + unit, V{}, valid);
            return;
        }
        const T* gx = gx_ + row * d_.gates_stride + unit;
        V x[G], a[G], kept[G], h;
        for (int g = 0; g < G; ++g) {
            x[g] = d_.memory.load_from(gx + g * H, valid);
            a[g] = d_.b_hh ? sums[g] + d_.memory.load_from(d_.b_hh + g * H + unit, valid) : sums[g];
            fetch(gx + g * H + ahead * d_.gates_stride);
        }
        T* cell = cell_ ? cell_ + row * d_.units_stride + unit : nullptr;
        if (cell) fetch_to_write(cell + ahead * d_.units_stride);
        if (!d_.w_hr) fetch_to_write(y_ + (row + ahead) * d_.y_stride + unit);
        if constexpr (kMode == MMFAST_LSTM) {
            C* state = c_ + b * c_stride_ + unit;
            V c = load(state);
            h = gates_of_step<kMode>(x, a, kept, V{}, c);
            store(state, cut_after(t, b) ? V{} : c);
            if (cell) d_.memory.store_to(cell, c, valid);
            if (last(t, b)) d_.memory.store_to(cn_ + b * H + unit, c, valid);
        } else {
            V none;
            h = gates_of_step<kMode>(x, a, kept, kMode == MMFAST_GRU ? before(s, b, unit) : V{}, none);
            if (cell) d_.memory.store_to(cell, kMode == MMFAST_GRU ? a[G - 1] : h, valid);
        }
        if (G > 1 && gates_) {
            T* gates = gates_ + row * d_.gates_stride + unit;
            for (int g = 0; g < G; ++g) d_.memory.store_to(gates + g * H, kept[g], valid);
        }
        if (kMode == MMFAST_LSTM && d_.w_hr) return store(u_ + b * c_stride_ + unit, h);
        output(s, t, b, unit, valid, h);
    }

    void project(const Share& share, Barrier& barrier, int64_t s, int64_t t, int64_t end) const {
        barrier.wait(share.parts);
        const Piece<C> piece = {u_, c_stride_, d_.H};
        each_tile(projection_, share, share.row, end, &piece, 1,
                  [&](int64_t b, int64_t unit, int valid, const V* sums) {
                      if (d_.rows.active(t, b)) return output(s, t, b, unit, valid, *sums);
                      d_.memory.store_to(y_ + d_.rows.row(t, b) * d_.y_stride + unit, V{}, valid);
                  });
    }

    // h: before zoneout
    void output(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V h) const {
        const int64_t row = d_.rows.row(t, b);
        if (d_.zones()) {
            const V k = d_.stay(row, unit, valid), old = before(s, b, unit);
            h = d_.zone ? (k > 0 ? old : h) : k * old + (1 - k) * h;
        }
        d_.memory.store_to(y_ + row * d_.y_stride + unit, h, valid);
        enter(h_[(s + 1) & 1], cut_after(t, b) ? V{} : h, b, unit, valid);
        if (last(t, b)) d_.memory.store_to(hn_ + b * d_.P + unit, h, valid);
    }

    Direction<T, C> d_;
    int64_t h_stride_, c_stride_;
    const T* gx_;
    T *gates_, *cell_, *y_, *hn_, *cn_;
    Panels<C> panels_, projection_;
    // h_: what W_hh is multiplied by, of this step and the next; whole_: with a dropout mask, h' without it
    C *h_[2], *whole_, *c_, *u_;
};

// ---- backward

template <typename T, typename C>
class Backward {
    // float32 and float64: the product reads dgates where they are written. 16 bits: a copy in float32 in scratch
    static constexpr bool kCopies = sizeof(T) != sizeof(C);
    using V = Vec<C>;

  public:
    Backward(const mmfast_rnn_backward_args& args, int direction) : d_(args.layer, direction) {
        const bool gru = d_.layer.mode == MMFAST_GRU;
        gates_ = d_.G > 1 ? static_cast<const T*>(args.gates) + d_.gates_at : nullptr;
        cell_ = d_.G > 1 || d_.zones() ? static_cast<const T*>(args.cell) + d_.units_at : nullptr;
        y_ = static_cast<const T*>(args.y) + d_.y_at;
        dy_ = d_.moved(static_cast<const T*>(args.dy), d_.y_at);
        dhn_ = d_.moved(static_cast<const T*>(args.dhn), d_.h_at);
        dcn_ = d_.moved(static_cast<const T*>(args.dcn), d_.c_at);
        dgates_ = static_cast<T*>(args.dgates) + d_.gates_at;
        dm_ = gru ? static_cast<T*>(args.dm) + d_.units_at : nullptr;
        dh_ = d_.w_hr ? static_cast<T*>(args.dh) + d_.y_at : nullptr;
        full_ = d_.w_hr ? static_cast<T*>(args.u) + d_.units_at : nullptr;
        previous_ = d_.template moved<T>(args.previous, d_.y_at);
        dh0_ = d_.template moved<T>(args.dh0, d_.h_at);
        dc0_ = d_.template moved<T>(args.dc0, d_.c_at);
        carries_ = gru || d_.zones();
        panels_ = {nullptr, d_.G * d_.H, d_.P, 1};
        projection_ = {nullptr, d_.P, d_.w_hr ? d_.H : 0, 1};
        h_stride_ = state_stride<C>(d_.P);
        c_stride_ = state_stride<C>(d_.H);
        copy_stride_ = state_stride<C>(d_.G * d_.H);
    }

    int64_t scratch_bytes() const {
        return Scratch::bytes<C>(panels_.size()) + Scratch::bytes<C>(projection_.size()) +
               2 * Scratch::bytes<C>(d_.layer.batch * h_stride_) + Scratch::bytes<C>(d_.layer.batch * c_stride_) +
               (kCopies ? 2 * Scratch::bytes<C>(d_.layer.batch * copy_stride_) : 0);
    }
    void take(Scratch& scratch) {
        panels_.data = scratch.template take<C>(panels_.size());
        projection_.data = scratch.template take<C>(projection_.size());
        carry_h_ = scratch.template take<C>(d_.layer.batch * h_stride_);
        inner_ = scratch.template take<C>(d_.layer.batch * h_stride_);
        carry_c_ = scratch.template take<C>(d_.layer.batch * c_stride_);
        if (!kCopies) return;
        for (C*& copy : copy_) copy = scratch.template take<C>(d_.layer.batch * copy_stride_);
    }
    int64_t blocks() const { return panels_.blocks(); }
    int64_t packs() const { return panels_.blocks() + projection_.blocks(); }
    void pack_block(int64_t block) const {
        if (block < panels_.blocks()) return pack(d_.memory, panels_, d_.w_hh, block);
        pack(d_.memory, projection_, d_.w_hr, block - panels_.blocks());
    }

    void walk(const Share& share, Barrier& barrier) const {
        begin(share);
        barrier.wait(share.parts);
        const int64_t steps = d_.layer.steps;
        int64_t before = 0;  // rows of the step walked before this one
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t t = d_.reverse ? s : steps - 1 - s, count = d_.rows.count(t);
            // rows that the step before had pass a gradient on; rows that it had not begin here, or end
            arrive(share, s, t, before < count || dh0_ || dc0_ ? before : count, true);
            arrive(share, s, t, count, false, before);
            if (d_.w_hr) project(share, barrier, s, t, count);
            before = count;
            barrier.wait(share.parts);
        }
        if (dh0_ || dc0_) arrive(share, steps, -1, before, true);
        if (dc0_) finish_c(share);
    }

  private:
    void begin(const Share& share) const {
        each_vector<C>(share, d_.H, [&](int64_t b, int64_t unit, int valid) {
            store(carry_c_ + b * c_stride_ + unit, d_.or_zero(dcn_, b * d_.H + unit, valid));
        });
        each_vector<C>(share, d_.P, [&](int64_t b, int64_t unit, int valid) {
            const int64_t at = b * d_.P + unit;
            if (dh0_ && d_.rows.empty(b)) d_.memory.store_to(dh0_ + at, d_.or_zero(dhn_, at, valid), valid);
        });
    }

    void finish_c(const Share& share) const {
        each_vector<C>(share, d_.H, [&](int64_t b, int64_t unit, int valid) {
            d_.memory.store_to(dc0_ + b * d_.H + unit, load(carry_c_ + b * c_stride_ + unit), valid);
        });
    }

    bool has(int64_t t, int64_t b) const { return t >= 0 && b < d_.rows.count(t) && d_.rows.active(t, b); }

    // The gradients of h for rows [begin, end) of the batch at step t, the s-th that is walked, and what follows from
    // them; t = -1: only the initial state's gradient.
    void arrive(const Share& share, int64_t s, int64_t t, int64_t end, bool product, int64_t begin = 0) const {
        begin = begin > share.row ? begin : share.row;
        end = end < share.row_end ? end : share.row_end;
        const int64_t from = d_.reverse ? s - 1 : d_.layer.steps - s;  // the step walked before
        Piece<C> pieces[2] = {};
        const int count = product && s > 0 ? pieces_of(s, from, pieces) : 0;
        const int64_t ahead = t < 0 ? 0 : d_.rows.distance(t, d_.reverse ? t + 1 : t - 1);
        with_mode(d_.layer.mode, [&](auto mode) {
            each_tile(panels_, share, begin, end, pieces, count,
                      [&](int64_t b, int64_t unit, int valid, const V* sums) {
                          const bool carried = s > 0 && product && d_.rows.active(from, b);
                          V dh = carried ? passed_on(from, b, unit, valid, *sums) : *sums;
                          if (has(t, b)) {
                              if (!carried) dh = d_.or_zero(dhn_, b * d_.P + unit, valid);
                              return total<decltype(mode)::value>(s, t, b, unit, valid, dh, ahead);
                          }
                          if (carried && dh0_) d_.memory.store_to(dh0_ + b * d_.P + unit, dh, valid);
                          if (t >= 0 && b < d_.rows.count(t)) clear<decltype(mode)::value>(s, t, b, unit, valid);
                      });
        });
    }

    // the gradient of h', from that of the step it entered
    V passed_on(int64_t from, int64_t b, int64_t unit, int valid, V sum) const {
        if (d_.rows.cut(from, b, d_.reverse)) return V{};
        sum = d_.dropped(sum, b, unit, valid);
        return carries_ ? sum + load(carry_h_ + b * h_stride_ + unit) : sum;
    }

    int pieces_of(int64_t s, int64_t from, Piece<C>* pieces) const {
        if (kCopies) {
            pieces[0] = {copy_[(s - 1) & 1], copy_stride_, d_.G * d_.H};
            return 1;
        }
        const int64_t row = d_.rows.row(from, 0);
        const C* dgates = reinterpret_cast<const C*>(dgates_ + row * d_.gates_stride);
        pieces[0] = {dgates, d_.gates_stride, (dm_ ? 2 : d_.G) * d_.H};
        if (!dm_) return 1;
        pieces[1] = {reinterpret_cast<const C*>(dm_ + row * d_.units_stride), d_.units_stride, d_.H};
        return 2;
    }

    // The state before this row: that of the row one step before, or the initial one; `all` and `initial` have `units`
    // columns a direction.
    V previous(const T* all, const T* initial, int64_t units, int64_t t, int64_t b, int64_t unit, int valid) const {
        if (d_.rows.cut(t, b, d_.reverse)) return V{};
        const int64_t before = d_.reverse ? t + 1 : t - 1;
        if (before < 0 || before >= d_.layer.steps || !d_.rows.active(before, b))
            return d_.or_zero(initial, b * units + unit, valid);
        return d_.memory.load_from(all + d_.rows.row(before, b) * d_.layer.directions * units + unit, valid);
    }

    template <int kMode>
    void clear(int64_t s, int64_t t, int64_t b, int64_t unit, int valid) const {
        const int64_t row = d_.rows.row(t, b), at = row * d_.y_stride + unit;
        if (previous_) d_.memory.store_to(previous_ + at, V{}, valid);
        if (d_.w_hr) {
            store(inner_ + b * h_stride_ + unit, V{});
            return d_.memory.store_to(dh_ + at, V{}, valid);
        }
        const V zero[4] = {};
        write<kMode>(s, row, b, unit, valid, zero, zero[0]);
    }

    // dh: the gradient of h but for dy
    template <int kMode>
    void total(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V dh, int64_t ahead) const {
        const int64_t row = d_.rows.row(t, b), at = row * d_.y_stride + unit;
        if (dy_) {
            dh += d_.memory.load_from(dy_ + at, valid);
            fetch(dy_ + at + ahead * d_.y_stride);
        }
        V h = {}, kept = {};
        if (kMode == MMFAST_GRU || previous_) h = previous(y_, d_.h0, d_.P, t, b, unit, valid);
        if (previous_) d_.memory.store_to(previous_ + at, d_.dropped(h, b, unit, valid), valid);
        if (d_.zones()) {
            kept = d_.stay(row, unit, valid) * dh;
            dh -= kept;
            if (kMode != MMFAST_GRU) store(carry_h_ + b * h_stride_ + unit, kept);
        }
        if (kMode != MMFAST_LSTM || !d_.w_hr) return gate<kMode>(s, t, b, unit, valid, dh, h, kept, ahead);
        store(inner_ + b * h_stride_ + unit, dh);
        d_.memory.store_to(dh_ + at, dh, valid);
    }

    void project(const Share& share, Barrier& barrier, int64_t s, int64_t t, int64_t end) const {
        barrier.wait(share.parts);
        const Piece<C> piece = {inner_, h_stride_, d_.P};
        end = end < share.row_end ? end : share.row_end;
        each_tile(projection_, share, share.row, end, &piece, 1,
                  [&](int64_t b, int64_t unit, int valid, const V* sums) {
                      const V zero[4] = {};
                      if (has(t, b)) return gate<MMFAST_LSTM>(s, t, b, unit, valid, *sums, V{}, V{}, 0);
                      const int64_t row = d_.rows.row(t, b);
                      d_.memory.store_to(full_ + row * d_.units_stride + unit, V{}, valid);
                      write<MMFAST_LSTM>(s, row, b, unit, valid, zero, zero[0]);
                  });
    }

    template <int kMode>
    void write(int64_t s, int64_t row, int64_t b, int64_t unit, int valid, const V* d, V dm) const {
        constexpr int G = gates_of(kMode);
        const int64_t H = d_.H;
        T* dgates = dgates_ + row * d_.gates_stride + unit;
        for (int g = 0; g < G; ++g) d_.memory.store_to(dgates + g * H, d[g], valid);
        if (kMode == MMFAST_GRU) d_.memory.store_to(dm_ + row * d_.units_stride + unit, dm, valid);
        if (!kCopies) return;
        C* copy = copy_[s & 1] + b * copy_stride_ + unit;
        for (int g = 0; g < G; ++g) store_float(copy + g * H, kMode == MMFAST_GRU && g == 2 ? dm : d[g], valid);
    }

    // dh: the gradient of h before zoneout, of an LSTM with a projection that of u; GRU: h', and what of dh stays
    template <int kMode>
    void gate(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V dh, V h, V kept, int64_t ahead) const {
        constexpr int G = gates_of(kMode);
        const int64_t row = d_.rows.row(t, b), at = row * d_.units_stride + unit;
        V a[4] = {}, d[4] = {}, dm = {};
        for (int g = 0; g < G && G > 1; ++g) {
            const T* gate = gates_ + row * d_.gates_stride + g * d_.H + unit;
            a[g] = d_.memory.load_from(gate, valid);
            fetch(gate + ahead * d_.gates_stride);
        }
        for (int g = 0; g < G; ++g) fetch_to_write(dgates_ + (row + ahead) * d_.gates_stride + g * d_.H + unit);
        // of the state before, which is read a step later once more or for the first time
        if (G > 1) fetch(cell_ + at + (kMode == MMFAST_LSTM ? 2 : 1) * ahead * d_.units_stride);
        if (kMode != MMFAST_LSTM) fetch(y_ + at + (kMode == MMFAST_GRU ? 2 : 1) * ahead * d_.units_stride);
        if constexpr (kMode == MMFAST_LSTM) {
            C* carry = carry_c_ + b * c_stride_ + unit;
            const V i = a[0], f = a[1], g = a[2], o = a[3];
            const V tanh_c = tanh_of(d_.memory.load_from(cell_ + at, valid));
            const V dc = load(carry) + dh * o * (1 - tanh_c * tanh_c);
            d[0] = dc * g * (i * (1 - i));
            d[1] = dc * previous(cell_, d_.c0, d_.H, t, b, unit, valid) * (f * (1 - f));
            d[2] = dc * i * (1 - g * g);
            d[3] = dh * tanh_c * (o * (1 - o));
            store(carry, d_.rows.cut(t, b, d_.reverse) ? V{} : dc * f);
            if (full_) d_.memory.store_to(full_ + at, o * tanh_c, valid);
        } else if constexpr (kMode == MMFAST_GRU) {
            const V r = a[0], z = a[1], n = a[2], m = d_.memory.load_from(cell_ + at, valid);
            fetch_to_write(dm_ + at + ahead * d_.units_stride);
            const V dn = dh * (1 - z) * (1 - n * n);
            d[0] = dn * m * (r * (1 - r));
            d[1] = dh * (h - n) * (z * (1 - z));
            d[2] = dn;
            dm = dn * r;
            store(carry_h_ + b * h_stride_ + unit, dh * z + kept);
        } else {
            const V y = d_.memory.load_from((cell_ ? cell_ : y_) + at, valid);
            d[0] = kMode == MMFAST_RNN_TANH ? dh * (1 - y * y) : y > 0 ? dh : V{};
        }
        write<kMode>(s, row, b, unit, valid, d, dm);
    }

    Direction<T, C> d_;
    bool carries_;
    int64_t h_stride_, c_stride_, copy_stride_;
    const T *gates_, *cell_, *y_, *dy_, *dhn_, *dcn_;
    T *dgates_, *dm_, *dh_, *full_, *previous_, *dh0_, *dc0_;
    Panels<C> panels_, projection_;
    // carry_h_: what of the gradient of h reaches h' past W_hh; inner_: with a projection, that of W_hr u
    C *carry_h_, *inner_, *carry_c_, *copy_[2];
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
    const int64_t blocks = walkers[0].blocks(), packs = walkers[0].packs();
    Barrier packed, stepped[2];
    parallel_team(threads_for(args.layer, gates), [&](int index, int count) {
        for (int64_t i = index; i < directions * packs; i += count) walkers[i / packs].pack_block(i % packs);
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

template <template <typename, typename> class Walker, typename Args>
int run_dtype(const Args& args) {
    const int mode = args.layer.mode;
    if (mode < MMFAST_RNN_TANH || mode > MMFAST_LSTM) return MMFAST_INVALID_ARGUMENT;
    switch (args.layer.dtype) {
        case MMFAST_FLOAT32:
            return run<Walker<float, float>>(args, gates_of(mode));
        case MMFAST_FLOAT64:
            return run<Walker<double, double>>(args, gates_of(mode));
        case MMFAST_FLOAT16:
        case MMFAST_BFLOAT16:
            return run<Walker<Narrow, float>>(args, gates_of(mode));
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

// ---- cells

// out[row] = bias[row] + sum over k of w[row][k] * x[k], four rows at a time
template <typename C>
void multiply_vector(C* out, const C* w, const C* x, const C* bias, int64_t rows, int64_t k) {
    constexpr int L = kLanes<C>;
    const int rest = int(k % L);
    for (int64_t row = 0; row < rows; row += 4) {
        const C* at[4];
        for (int i = 0; i < 4; ++i) at[i] = w + (row + i < rows ? row + i : row) * k;
        Vec<C> sum[4] = {};
        for (int64_t j = 0; j + L <= k; j += L) {
            const Vec<C> right = load(x + j);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[i] += load(at[i] + j) * right;
        }
        if (rest) {
            const Vec<C> right = load_partial(x + k - rest, rest);
            for (int i = 0; i < 4; ++i) sum[i] += load_partial(at[i] + k - rest, rest) * right;
        }
        for (int i = 0; i < 4 && row + i < rows; ++i) out[row + i] = sum_lanes<C>(sum[i]) + (bias ? bias[row + i] : 0);
    }
}

template <typename T, typename C>
class Cell {
    using V = Vec<C>;

  public:
    explicit Cell(const mmfast_rnn_cell_args& args) : args_(args), memory_(args.dtype) {}

    int run() const {
        const int64_t H = args_.hidden, rows = gates_of(args_.mode) * H;
        Scratch scratch(args_.gx ? 0 : 2 * Scratch::bytes<C>(rows));
        if (scratch.failed()) return MMFAST_OUT_OF_MEMORY;
        C* sides[2] = {};
        if (!args_.gx)
            for (C*& side : sides) side = scratch.template take<C>(rows);
        for (int64_t b = 0; b < args_.batch; ++b) {
            const T *gx = static_cast<const T*>(args_.gx) + b * rows, *gh = static_cast<const T*>(args_.gh) + b * rows;
            if (!args_.gx) {
                if constexpr (sizeof(T) != sizeof(C)) return MMFAST_INVALID_ARGUMENT;
                multiply(sides[0], args_.w_ih, at(args_.x, b * args_.input), args_.b_ih, rows, args_.input);
                multiply(sides[1], args_.w_hh, at(args_.h0, b * H), args_.b_hh, rows, H);
                gx = reinterpret_cast<const T*>(sides[0]), gh = reinterpret_cast<const T*>(sides[1]);
            }
            with_mode(args_.mode, [&](auto mode) {
                for (int64_t unit = 0; unit < H; unit += kLanes<C>) step<decltype(mode)::value>(gx, gh, b, unit);
            });
        }
        return MMFAST_OK;
    }

  private:
    static const T* at(const void* p, int64_t offset) { return p ? static_cast<const T*>(p) + offset : nullptr; }

    static void multiply(C* out, const void* w, const T* x, const void* bias, int64_t rows, int64_t k) {
        const auto numbers = [](const void* p) { return static_cast<const C*>(p); };
        multiply_vector(out, numbers(w), numbers(x), numbers(bias), rows, x ? k : 0);
    }

    template <int kMode>
    void step(const T* gx, const T* gh, int64_t b, int64_t unit) const {
        constexpr int G = gates_of(kMode);
        const int64_t H = args_.hidden, place = b * H + unit;
        const int valid = H - unit < kLanes<C> ? int(H - unit) : kLanes<C>;
        V x[G], a[G], kept[G], h = {}, c = {};
        for (int g = 0; g < G; ++g) {
            x[g] = memory_.load_from(gx + g * H + unit, valid);
            a[g] = memory_.load_from(gh + g * H + unit, valid);
        }
        if (kMode == MMFAST_GRU && args_.h0) h = memory_.load_from(at(args_.h0, place), valid);
        if (kMode == MMFAST_LSTM && args_.c0) c = memory_.load_from(at(args_.c0, place), valid);
        h = gates_of_step<kMode>(x, a, kept, h, c);
        memory_.store_to(static_cast<T*>(args_.h) + place, h, valid);
        if (kMode == MMFAST_LSTM) memory_.store_to(static_cast<T*>(args_.c) + place, c, valid);
    }

    const mmfast_rnn_cell_args& args_;
    Memory<T, C> memory_;
};

}  // namespace

int rnn_cell(const mmfast_rnn_cell_args& args) {
    if (args.mode < MMFAST_RNN_TANH || args.mode > MMFAST_LSTM) return MMFAST_INVALID_ARGUMENT;
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return Cell<float, float>(args).run();
        case MMFAST_FLOAT64:
            return Cell<double, double>(args).run();
        case MMFAST_FLOAT16:
        case MMFAST_BFLOAT16:
            return Cell<Narrow, float>(args).run();
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}
int rnn_forward(const mmfast_rnn_forward_args& args) { return run_dtype<Forward>(args); }
int rnn_backward(const mmfast_rnn_backward_args& args) { return run_dtype<Backward>(args); }

}  // namespace MMFAST_ISA
}  // namespace mmfast
