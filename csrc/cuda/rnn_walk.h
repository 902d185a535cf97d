// What the kernels of rnn_resident.cu and rnn_cluster.cu share: a recurrent layer's walk through time, forward and
// back, of blocks that own 8 sequences of one direction and some or all units, for all steps.
//
// The equations, pointers, shapes and layouts: mmfast_rnn_layer in mmfast.h. A kernel is a Forward or a Backward below,
// which know all but how W_hh is multiplied: the products of a warp are here too (Fragments, product).
#pragma once
#include "cuda/device.h"
#include "cuda/rnn_gates.h"

namespace mmfast {
namespace device {

constexpr int kRows = 8;   // sequences of a block: columns of a product
constexpr int kSlots = 4;  // steps whose inputs are in shared memory or on their way

constexpr int aligned_bytes(int n, int each) { return (n * each + 15) / 16 * 16; }

// A panel: kRows rows of kBlocks * BLOCK units, and 16 bytes, so that the rows of a matrix are in different banks.
template <typename T, int BLOCK, int kBlocks>
constexpr int kPitch = kBlocks * BLOCK + kVector<T>;

// What both passes know, and what they do with memory. BLOCK: units of a block; CLUSTER: blocks that share a layer's
// units, each BLOCK of them in the order of its rank.
template <typename T, int BLOCK, int THREADS = 2 * BLOCK, int CLUSTER = 1>
struct Walk {
    using Type = T;
    static constexpr int kThreads = THREADS, kUnits = BLOCK, kCluster = CLUSTER;
    static constexpr int kEach = kVector<T>, kDepth = 2 * kEach;
    // A thread has two neighbouring units of kOwn sequences kApart from each other: in a cluster pairs of units, one
    // sequence after the other, are dealt to threads, of which the last ones may get none.
    static constexpr int kPairs = BLOCK / 2, kApart = CLUSTER == 1 ? 1 : THREADS / kPairs;
    static constexpr int kOwn = CLUSTER == 1 ? 2 : kApart < kRows ? kRows / kApart : 1;
    // W_hh comes into registers through shared memory, by 16 rows and kStaged columns a warp
    static constexpr int kStaged = CLUSTER == 1 ? 64 : 32, kStagedPitch = kStaged + kEach;
    static constexpr int kStaging = THREADS / 2 * kStagedPitch;
    static constexpr int kAtOnce = kThreads * kEach / (kRows * BLOCK);  // blocks of units that the threads copy at once

    Global<const int64_t> offsets, lengths;
    Global<const uint8_t> reset;
    bool packed, ragged, resets;
    bool whole;    // every row begins at a multiple of 16 bytes
    bool precise;  // of float: products are not rounded to TF32
    bool rising;   // whether the forward direction is walked from the first step on
    int hidden, directions, steps, batch;

    // what a thread has to do with
    struct Place {
        int direction, first;           // the block's first sequence
        int base;                       // the block's first unit; others are counted from it
        int unit, row;                  // two units, and the first of kOwn sequences
        int to_unit, to_row, to_block;  // what it copies
        int walked;                     // steps
        SharedArray<int> lengths;       // of the block's sequences
    };

    MMFAST_DEVICE Place place(SharedCursor& cursor) const {
        Place p;
        p.lengths = shared_array<int>(cursor, kRows);
        const int groups = (batch + kRows - 1) / kRows, block = int(block_index()) / CLUSTER;
        p.direction = block >= groups, p.first = (block - p.direction * groups) * kRows;
        p.base = CLUSTER == 1 ? 0 : cluster_rank() * BLOCK;
        const int lane = lane_index(), thread = thread_index();
        if constexpr (CLUSTER == 1)
            p.unit = warp_index() * 16 + lane / 4 * 2, p.row = lane % 4 * 2;
        else
            p.unit = thread % kPairs * 2, p.row = thread / kPairs;
        p.to_unit = thread % (BLOCK / kEach) * kEach;
        p.to_row = kAtOnce == 1 ? thread / (BLOCK / kEach) : thread / (BLOCK / kEach) % kRows;
        p.to_block = kAtOnce == 1 ? 0 : thread / (BLOCK / kEach * kRows);
        if (thread < kRows) {
            int64_t length = p.first + thread >= batch ? 0 : ragged ? load(lengths, p.first + thread) : steps;
            p.lengths[thread] = int(length < 0 ? 0 : length > steps ? steps : length);
        }
        barrier();
        p.walked = 0;
        for (int r = 0; r < kRows; ++r) {
            const int length = p.lengths[r];
            p.walked = length > p.walked ? length : p.walked;
        }
        return p;
    }

    // the step that is walked i-th
    MMFAST_DEVICE int step(const Place& p, int i) const { return (p.direction == 0) == rising ? i : p.walked - 1 - i; }
    // the row of the block's first sequence at a step
    MMFAST_DEVICE int row(const Place& p, int t) const {
        return (packed ? int(load(offsets, t)) : t * batch) + p.first;
    }
    // the row that is walked i-th, if there is one
    MMFAST_DEVICE int walked_row(const Place& p, int i) const {
        return i >= 0 && i < p.walked ? row(p, step(p, i)) : 0;
    }
    // whether at step t no state passes into a sequence, of `length`, at `row` of the block
    MMFAST_DEVICE bool is_cut(const Place& p, int t, int row_in_block, int length) const {
        const int at = t + p.direction;
        return at < length && load(reset, row(p, at) + row_in_block) != 0;
    }

    // This thread's part of kBlocks blocks of units, of a row of the panel that begins at `at`, from x.
    template <int kBlocks>
    MMFAST_DEVICE void fetch(const Place& p, SharedArray<T> panel, int at, int pitch, Global<const T> x, int first_row,
                             int width) const {
        if (p.base + p.to_unit >= hidden) return;
        const int64_t from = (int64_t(first_row + p.to_row) * directions + p.direction) * width + p.base + p.to_unit;
        const int to = at + p.to_row * pitch + p.to_unit;
        MMFAST_UNROLL
        for (int n = 0; n < kBlocks; n += kAtOnce) {
            const int block = n + p.to_block;
            if (kBlocks % kAtOnce != 0 && block >= kBlocks) continue;
            if (whole) {
                copy_async(panel, to + block * BLOCK, x, from + block * hidden);
            } else {
                for (int j = 0; j < kEach && p.base + p.to_unit + j < hidden; ++j)
                    panel[to + block * BLOCK + j] = load(x, from + block * hidden + j);
            }
        }
    }
    // The same to x; zeros if not `active`.
    template <int kBlocks>
    MMFAST_DEVICE void send(const Place& p, Global<T> x, int first_row, int width, SharedArray<T> panel, int at,
                            int pitch, bool active) const {
        if (p.base + p.to_unit >= hidden) return;
        const int64_t to = (int64_t(first_row + p.to_row) * directions + p.direction) * width + p.base + p.to_unit;
        const int from = at + p.to_row * pitch + p.to_unit;
        MMFAST_UNROLL
        for (int n = 0; n < kBlocks; n += kAtOnce) {
            const int block = n + p.to_block;
            if (kBlocks % kAtOnce != 0 && block >= kBlocks) continue;
            Vector<T, kEach> v{};
            if (active) v = load_vector<kEach>(panel, from + block * BLOCK);
            put(p, x, to + block * hidden, v);
        }
    }
    // a thread's vector, as far as there are units
    MMFAST_DEVICE void put(const Place& p, Global<T> x, int64_t to, const Vector<T, kEach>& v) const {
        if (whole) {
            store_vector(x, to, v);
            return;
        }
        MMFAST_UNROLL
        for (int j = 0; j < kEach; ++j)
            if (p.base + p.to_unit + j < hidden) store(x, to + j, v.at[j]);
    }
    static MMFAST_DEVICE Global<const T> of(const Place& p, const Global<const T> (&each)[2]) {
        return p.direction ? each[1] : each[0];
    }
    static MMFAST_DEVICE Vector<T, 2> pair_of(const float (&x)[2]) {
        return {{from_float<T>(x[0]), from_float<T>(x[1])}};
    }
    // The r-th of a thread's sequences. In clusters a thread may lack it: then kRows or more.
    static MMFAST_DEVICE int own_row(const Place& p, int r) { return p.row + r * kApart; }
    static MMFAST_DEVICE bool owns(const Place& p, int r) { return CLUSTER == 1 || own_row(p, r) < kRows; }
    // where u of the thread's two units of a sequence is in h0 and its like, and whether there is such a unit
    MMFAST_DEVICE int64_t state_at(const Place& p, int r, int u) const {
        return (int64_t(p.direction) * batch + p.first + own_row(p, r)) * hidden + p.base + p.unit + u;
    }
    MMFAST_DEVICE bool has_state(const Place& p, int r, int u) const {
        return owns(p, r) && p.first + own_row(p, r) < batch && p.base + p.unit + u < hidden;
    }
    MMFAST_DEVICE float state(const Place& p, Global<const T> x, int r, int u) const {
        return has_state(p, r, u) ? to_float(load(x, state_at(p, r, u))) : 0.0f;
    }
    // of the step that is walked i-th, if there is one, which of the thread's sequences are cut: bit r of the r-th
    MMFAST_DEVICE int cuts(const Place& p, int i) const {
        if (!resets || i >= p.walked) return 0;
        const int t = step(p, i);
        int found = 0;
        MMFAST_UNROLL
        for (int r = 0; r < kOwn; ++r)
            if (owns(p, r)) found |= is_cut(p, t, own_row(p, r), p.lengths[own_row(p, r)]) << r;
        return found;
    }
    // kEach elements of a row of a gate's W_hh, 0 outside of it
    MMFAST_DEVICE Vector<T, kEach> weights(Global<const T> w, int gate, int row, int column) const {
        Vector<T, kEach> v{};
        const int at = (gate * hidden + row) * hidden + column;
        if (row >= hidden || column >= hidden) return v;
        if (whole) return load_vector<kEach>(w, at);
        MMFAST_UNROLL
        for (int j = 0; j < kEach; ++j)
            if (column + j < hidden) v.at[j] = load(w, at + j);
        return v;
    }
    MMFAST_DEVICE Words rounded(Words words) const {
        if constexpr (sizeof(T) == 4) {
            MMFAST_UNROLL
            for (int j = 0; j < 4 && !precise; ++j) words.at[j] = bits_of(to_tf32(float_of(words.at[j])));
        }
        return words;
    }
};

// A part of W_hh that is staged at once: a gate's, rows or columns from `unit` on, the other axis from k on.
struct Part {
    int gate, unit, k;
};

// A warp's kCount fragments of A, in the order of tiles and of k. The last ones stay in shared memory where all would
// need more registers than there are.
template <typename W, int kCount, bool kAll>
struct Fragments {
    using T = typename W::Type;
    static constexpr int kParts = W::kStaged / W::kDepth;  // fragments that are staged at once
    static constexpr int kHeld = kAll ? kCount : kCount - kParts;
    Words held[kHeld];
    SharedArray<T> staging;
    int from;

    // Of each gate W_hh[m, k], or with `across` W_hh[k, m]. which(i): the i-th part, m = unit .. unit + 15.
    template <bool across, typename Which>
    MMFAST_DEVICE void read(const W& walk, Global<const T> w, const Which& which) {
        constexpr int kPitch = W::kStagedPitch, kEach = W::kEach, kRow = (across ? 16 : W::kStaged) / kEach;
        const int lane = lane_index(), own = warp_index() * 16 * kPitch;
        from = own + (lane % 8 * 2 + lane / 8 % 2) * kPitch + lane / 16 * kEach;
        MMFAST_UNROLL
        for (int part = 0; part < kCount / kParts; ++part) {
            const Part at = which(part);
            warp_barrier();
            MMFAST_UNROLL
            for (int piece = lane; piece < 16 * W::kStaged / kEach; piece += 32) {
                const int row = piece / kRow, column = piece % kRow * kEach;
                if constexpr (across) {
                    const Vector<T, kEach> v = walk.weights(w, at.gate, at.k + row, at.unit + column);
                    MMFAST_UNROLL
                    for (int j = 0; j < kEach; ++j) staging[own + (column + j) * kPitch + row] = v.at[j];
                } else {
                    store_vector(staging, own + row * kPitch + column,
                                 walk.weights(w, at.gate, at.unit + row, at.k + column));
                }
            }
            warp_barrier();
            MMFAST_UNROLL
            for (int i = 0; i < kParts && part * kParts < kHeld; ++i)
                held[part * kParts + i] = walk.rounded(load_matrices(staging, from + i * W::kDepth));
        }
    }
    MMFAST_DEVICE Words at(const W& walk, int i) const {
        return i < kHeld ? held[i] : walk.rounded(load_matrices(staging, from + (i - kHeld) * W::kDepth));
    }
};

// d += a b in float32 with an error of float32's size: operands in two TF32 parts, sums outside of the matrix units.
// zero: a 0 that the compiler does not know, other in each turn of the loop around; the parts of a would else be made
// before the loop, and take more registers than there are.
MMFAST_DEVICE void multiply_precisely(Tile& d, const Words& a, uint32_t b0, uint32_t b1, uint32_t zero) {
    Words high, low;
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
        high.at[i] = (a.at[i] ^ zero) & 0xffffe000;
        low.at[i] = bits_of(to_tf32(float_of(a.at[i]) - float_of(high.at[i])));
    }
    const float b[2] = {to_tf32(float_of(b0)), to_tf32(float_of(b1))};
    const uint32_t rest[2] = {bits_of(to_tf32(float_of(b0) - b[0])), bits_of(to_tf32(float_of(b1) - b[1]))};
    Tile sum{};
    multiply<float>(sum, low, bits_of(b[0]), bits_of(b[1]));
    multiply<float>(sum, high, rest[0], rest[1]);
    multiply<float>(sum, high, bits_of(b[0]), bits_of(b[1]));
    MMFAST_UNROLL
    for (int i = 0; i < 4; ++i) d.at[i] += sum.at[i];
}

// d[m] = the m-th of kTiles tiles of A, kSteps fragments each, times the panel's rows. Sums are made in kChains parts.
// turn: of the loop around, not negative.
template <int kTiles, int kSteps, int kChains, typename W, bool kAll>
MMFAST_DEVICE void product(Tile (&d)[kTiles], const W& walk, const Fragments<W, kTiles * kSteps, kAll>& a,
                           SharedArray<typename W::Type> panel, int at, int pitch, int turn) {
    using T = typename W::Type;
    Tile part[kTiles * kChains];
    MMFAST_UNROLL
    for (int i = 0; i < kTiles * kChains; ++i) part[i] = Tile{};
    const int lane = lane_index(), from = at + lane % 8 * pitch + lane / 8 * kVector<T>;
    const auto steps = [&](auto is_precise) {
        MMFAST_UNROLL
        for (int s = 0; s < kSteps; s += 2) {
            Words b = load_matrices(panel, from + s * 2 * kVector<T>);
            if constexpr (!decltype(is_precise)::value) b = walk.rounded(b);
            MMFAST_UNROLL
            for (int which = 0; which < 2; ++which) {
                MMFAST_UNROLL
                for (int m = 0; m < kTiles; ++m) {
                    Tile& sum = part[m * kChains + (s + which) % kChains];
                    const Words of_a = a.at(walk, m * kSteps + s + which);
                    if constexpr (decltype(is_precise)::value)
                        multiply_precisely(sum, of_a, b.at[2 * which], b.at[2 * which + 1],
                                           uint32_t(turn) & 0x80000000);
                    else
                        multiply<T>(sum, of_a, b.at[2 * which], b.at[2 * which + 1]);
                }
            }
        }
    };
    if constexpr (sizeof(T) == 4) {
        if (walk.precise)
            steps(Constant<true>{});
        else
            steps(Constant<false>{});
    } else {
        steps(Constant<false>{});
    }
    MMFAST_UNROLL
    for (int m = 0; m < kTiles; ++m) {
        d[m] = part[m * kChains];
        MMFAST_UNROLL
        for (int chain = 1; chain < kChains; ++chain) {
            MMFAST_UNROLL
            for (int i = 0; i < 4; ++i) d[m].at[i] += part[m * kChains + chain].at[i];
        }
    }
}

// The walk forward, but for the product. Slots: kSlots steps' inputs, a step's gates in place of its gx. States: h of
// the last step and of this one; cells: the same of c or a_n.
template <typename W, int G>
struct Forward {
    using T = typename W::Type;
    using Place = typename W::Place;
    static constexpr int kBlock = W::kUnits, kPitchIn = kPitch<T, kBlock, G>, kPitchOf = kPitch<T, kBlock, 1>;
    static constexpr int kSlot = kRows * kPitchIn, kPanel = kRows * kPitchOf;
    static constexpr int kBytes = aligned_bytes(kRows, 4) + aligned_bytes(kSlots * kSlot, sizeof(T)) +
                                  (1 + (G > 1)) * aligned_bytes(2 * kPanel, sizeof(T)) + aligned_bytes(G * kBlock, 4);
    W walk;
    Global<const T> gx, w_hh[2], b_hh[2], h0, c0;
    Global<T> y, hn, cn, gates, cell;
    bool has_bias, has_h0, has_c0, has_gates, has_cell, relu;

    struct Arrays {
        SharedArray<T> slots, states, cells;
        SharedArray<float> biases;
    };
    // of each of a thread's sequences and units; h in full is GRU's alone
    struct State {
        float h[W::kOwn][2], c[W::kOwn][2];
    };

    // Has the first steps' inputs on their way, and the biases ready after the next barrier.
    MMFAST_DEVICE Arrays begin(const Place& p, SharedCursor& cursor) const {
        Arrays m;
        m.slots = shared_array<T>(cursor, kSlots * kSlot);
        m.states = shared_array<T>(cursor, 2 * kPanel);
        m.cells = G > 1 ? shared_array<T>(cursor, 2 * kPanel) : m.states;
        m.biases = shared_array<float>(cursor, G * kBlock);
        // units and sequences that fill up a block have gates, too, which nobody uses
        MMFAST_NO_UNROLL
        for (int i = thread_index() * W::kEach; i < kSlots * kSlot; i += W::kThreads * W::kEach)
            store_vector(m.slots, i, Vector<T, W::kEach>{});
        barrier();
        MMFAST_NO_UNROLL
        for (int i = 0; i < kSlots - 1; ++i) {
            fetch(p, m, i, walk.walked_row(p, i));
            copy_commit();
        }
        for (int i = thread_index(); i < G * kBlock; i += W::kThreads) {
            const int gate = i / kBlock, unit = p.base + i % kBlock;
            m.biases[i] =
                has_bias && unit < walk.hidden ? to_float(load(W::of(p, b_hh), gate * walk.hidden + unit)) : 0.0f;
        }
        return m;
    }
    MMFAST_DEVICE void start(const Place& p, const Arrays& m, State& s) const {
        MMFAST_UNROLL
        for (int r = 0; r < W::kOwn; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                s.h[r][u] = has_h0 ? walk.state(p, h0, r, u) : 0.0f;
                s.c[r][u] = has_c0 ? walk.state(p, c0, r, u) : 0.0f;
            }
            if (W::owns(p, r)) store_vector(m.states, W::own_row(p, r) * kPitchOf + p.unit, W::pair_of(s.h[r]));
        }
    }

    // Gates, c and h of the i-th step, t, of the thread's r-th sequence. s: W_hh h.
    MMFAST_DEVICE void gate(const Place& p, const Arrays& m, int i, int t, int r, bool is_cut, float (&s)[G][2],
                            State& state) const {
        const int row = W::own_row(p, r), now = i % 2 * kPanel, next = kPanel - now, mine = row * kPitchOf + p.unit;
        const bool active = t < p.lengths[row];
        const int at = i % kSlots * kSlot + row * kPitchIn + p.unit;
        float x[G][2], kept[2], cell_of[2];
        MMFAST_UNROLL
        for (int k = 0; k < G; ++k) {
            const Vector<T, 2> in = load_vector<2>(m.slots, at + k * kBlock);
            const Vector<float, 2> bias = load_vector<2>(m.biases, k * kBlock + p.unit);
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                x[k][u] = to_float(in.at[u]);
                s[k][u] = (is_cut ? 0.0f : s[k][u]) + bias.at[u];
            }
        }
        MMFAST_UNROLL
        for (int u = 0; u < 2; ++u) {
            float found;
            if constexpr (G == 4) {
                MMFAST_UNROLL
                for (int k = 0; k < G; ++k) x[k][u] += s[k][u];
                cell_of[u] = is_cut ? 0.0f : state.c[r][u];
                found = lstm<T>(x[0][u], x[1][u], x[2][u], x[3][u], cell_of[u]);
                if (active) state.c[r][u] = cell_of[u];
            } else if constexpr (G == 3) {
                x[0][u] += s[0][u], x[1][u] += s[1][u], cell_of[u] = s[2][u];
                found = gru<T>(x[0][u], x[1][u], x[2][u], s[2][u], is_cut ? 0.0f : state.h[r][u]);
            } else {
                found = rnn<T>(x[0][u] + s[0][u], relu);
            }
            if (G == 3 && active) state.h[r][u] = found;
            // units that fill up the block stay out of the product
            kept[u] = p.base + p.unit + u < walk.hidden ? found : 0.0f;
        }
        store_vector(m.states, next + mine, active ? W::pair_of(kept) : load_vector<2>(m.states, now + mine));
        if constexpr (G > 1) {
            if (has_cell) store_vector(m.cells, now + mine, W::pair_of(cell_of));
            if (has_gates) {
                MMFAST_UNROLL
                for (int k = 0; k < G; ++k) store_vector(m.slots, at + k * kBlock, W::pair_of(x[k]));
            }
        }
    }

    // What the last step, whose row is `sent`, and those after it leave; after a barrier.
    MMFAST_DEVICE void end(const Place& p, const Arrays& m, int sent, const State& s) const {
        if (p.walked > 0) send(p, m, p.walked - 1, sent);
        if (!walk.packed) {
            MMFAST_NO_UNROLL
            for (int t = p.walked; t < walk.steps; ++t) send(p, m, -1, walk.row(p, t));
        }
        MMFAST_UNROLL
        for (int r = 0; r < W::kOwn; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                if (!walk.has_state(p, r, u)) continue;
                const int64_t at = walk.state_at(p, r, u);
                store(hn, at, T(m.states[p.walked % 2 * kPanel + W::own_row(p, r) * kPitchOf + p.unit + u]));
                if constexpr (G == 4) store(cn, at, from_float<T>(s.c[r][u]));
            }
        }
    }

    MMFAST_DEVICE void fetch(const Place& p, const Arrays& m, int i, int row) const {
        if (i >= p.walked || walk.step(p, i) >= p.lengths[p.to_row]) return;
        walk.template fetch<G>(p, m.slots, i % kSlots * kSlot, kPitchIn, gx, row, G * walk.hidden);
    }
    // y, gates and cell of the i-th step, of which `row` is the first row; i = -1: zeros
    MMFAST_DEVICE void send(const Place& p, const Arrays& m, int i, int row) const {
        const bool active = i >= 0 && walk.step(p, i) < p.lengths[p.to_row];
        if (walk.packed ? !active : p.first + p.to_row >= walk.batch) return;
        const int odd = i % 2 * kPanel, H = walk.hidden;
        walk.template send<1>(p, y, row, H, m.states, kPanel - odd, kPitchOf, active);
        if constexpr (G > 1) {
            if (has_cell) walk.template send<1>(p, cell, row, H, m.cells, odd, kPitchOf, active);
            if (has_gates) walk.template send<G>(p, gates, row, G * H, m.slots, i % kSlots * kSlot, kPitchIn, active);
        }
    }
};

// The walk back, but for the product. A step's inputs - gates, cell, y, dy - are in a slot, its results in one of two
// panels: what W_hh carries on, all gates of a unit after those of the units before, of a GRU's n the gradient of a_n,
// and last that of its input side.
template <typename W, int G>
struct Backward {
    using T = typename W::Type;
    using Place = typename W::Place;
    // blocks of units in a slot, and in a panel
    static constexpr int kCell = G > 1 ? G : -1, kY = kCell + 1, kDy = kY + 1, kIn = kDy + 1, kOut = G == 3 ? 4 : G;
    static constexpr int kBlock = W::kUnits, kPitchIn = kPitch<T, kBlock, kIn>, kPitchOut = kPitch<T, kBlock, kOut>;
    static constexpr int kSlot = kRows * kPitchIn, kPanel = kRows * kPitchOut;
    static constexpr int kBytes =
        aligned_bytes(kRows, 4) + aligned_bytes(kSlots * kSlot, sizeof(T)) + aligned_bytes(2 * kPanel, sizeof(T));
    W walk;
    Global<const T> w_hh[2], y, gates, cell, dy, dhn, dcn, h0, c0;
    Global<T> dgates, dm, previous, dh0, dc0;
    bool has_dy, has_dhn, has_dcn, has_h0, has_c0, has_previous, has_dh0, has_dc0, relu;

    struct Arrays {
        SharedArray<T> slots, panels;
    };
    // the gradients of each of a thread's sequences and units
    struct State {
        float dh[W::kOwn][2], dc[W::kOwn][2];
    };

    // Has the inputs of the first kAhead steps on their way.
    template <int kAhead>
    MMFAST_DEVICE Arrays begin(const Place& p, SharedCursor& cursor) const {
        Arrays m;
        m.slots = shared_array<T>(cursor, kSlots * kSlot);
        m.panels = shared_array<T>(cursor, 2 * kPanel);
        MMFAST_NO_UNROLL
        for (int i = thread_index() * W::kEach; i < kSlots * kSlot; i += W::kThreads * W::kEach)
            store_vector(m.slots, i, Vector<T, W::kEach>{});
        barrier();
        MMFAST_NO_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            fetch(p, m, i, walk.walked_row(p, i));
            copy_commit();
        }
        return m;
    }
    MMFAST_DEVICE void start(const Place& p, State& s) const {
        MMFAST_UNROLL
        for (int r = 0; r < W::kOwn; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                s.dh[r][u] = has_dhn ? walk.state(p, dhn, r, u) : 0.0f;
                s.dc[r][u] = G == 4 && has_dcn ? walk.state(p, dcn, r, u) : 0.0f;
            }
        }
    }

    // The gradients of the gates of the i-th step, t, of the thread's r-th sequence.
    MMFAST_DEVICE void gate(const Place& p, const Arrays& m, int i, int t, int r, bool is_cut, State& s) const {
        const int t_before = i + 1 < p.walked ? walk.step(p, i + 1) : 0x7fffffff, length = p.lengths[W::own_row(p, r)];
        const int in_row = W::own_row(p, r) * kPitchIn + p.unit, at = i % kSlots * kSlot + in_row;
        float (&dh)[2] = s.dh[r];
        float g[kOut][2];
        if (t < length) {
            float before[2], of_cell[2], in[2];
            if constexpr (G > 1) {
                MMFAST_UNROLL
                for (int k = 0; k < G; ++k) read(g[k], m.slots, at + k * kBlock);
                read(of_cell, m.slots, at + kCell * kBlock);
                if (t_before < length) {
                    read(before, m.slots, (i + 1) % kSlots * kSlot + in_row + (G == 4 ? kCell : kY) * kBlock);
                } else {
                    const bool has = G == 4 ? has_c0 : has_h0;
                    before[0] = has ? walk.state(p, G == 4 ? c0 : h0, r, 0) : 0.0f;
                    before[1] = has ? walk.state(p, G == 4 ? c0 : h0, r, 1) : 0.0f;
                }
            } else {
                read(before, m.slots, at + kY * kBlock);
            }
            if (has_dy) {
                read(in, m.slots, at + kDy * kBlock);
                dh[0] += in[0], dh[1] += in[1];
            }
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                if constexpr (G == 4) {
                    lstm_backward<T>(g[0][u], g[1][u], g[2][u], g[3][u], s.dc[r][u], dh[u], of_cell[u],
                                     is_cut ? 0.0f : before[u]);
                    if (is_cut) s.dc[r][u] = 0.0f;
                    dh[u] = 0.0f;
                } else if constexpr (G == 3) {
                    gru_backward(g[0][u], g[1][u], g[2][u], of_cell[u], dh[u], is_cut ? 0.0f : before[u]);
                    g[3][u] = g[2][u], g[2][u] = of_cell[u];
                    if (is_cut) dh[u] = 0.0f;
                } else {
                    g[0][u] = rnn_backward(dh[u], before[u], relu);
                    dh[u] = 0.0f;
                }
                // of units that fill up the block nothing comes
                MMFAST_UNROLL
                for (int k = 0; k < kOut; ++k) g[k][u] = p.base + p.unit + u < walk.hidden ? g[k][u] : 0.0f;
            }
        } else {
            MMFAST_UNROLL
            for (int k = 0; k < kOut; ++k) g[k][0] = g[k][1] = 0.0f;
        }
        MMFAST_UNROLL
        for (int k = 0; k < kOut; ++k)
            store_vector(m.panels, i % 2 * kPanel + W::own_row(p, r) * kPitchOut + k * kBlock + p.unit,
                         W::pair_of(g[k]));
    }

    // What the steps after the last one leave, and the gradients of the initial states.
    MMFAST_DEVICE void end(const Place& p, const Arrays& m, const State& s) const {
        if (!walk.packed) {
            MMFAST_NO_UNROLL
            for (int t = p.walked; t < walk.steps; ++t) send(p, m, -1, walk.row(p, t));
        }
        MMFAST_UNROLL
        for (int r = 0; r < W::kOwn; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                if (!walk.has_state(p, r, u)) continue;
                const int64_t at = walk.state_at(p, r, u);
                if (has_dh0) store(dh0, at, from_float<T>(s.dh[r][u]));
                if (G == 4 && has_dc0) store(dc0, at, from_float<T>(s.dc[r][u]));
            }
        }
    }

    static MMFAST_DEVICE void read(float (&to)[2], SharedArray<T> from, int at) {
        const Vector<T, 2> v = load_vector<2>(from, at);
        to[0] = to_float(v.at[0]), to[1] = to_float(v.at[1]);
    }
    MMFAST_DEVICE void fetch(const Place& p, const Arrays& m, int i, int row) const {
        if (i >= p.walked || walk.step(p, i) >= p.lengths[p.to_row]) return;
        const int at = i % kSlots * kSlot, H = walk.hidden;
        if constexpr (G > 1) {
            walk.template fetch<G>(p, m.slots, at, kPitchIn, gates, row, G * H);
            walk.template fetch<1>(p, m.slots, at + kCell * kBlock, kPitchIn, cell, row, H);
        }
        if (G != 4 || has_previous) walk.template fetch<1>(p, m.slots, at + kY * kBlock, kPitchIn, y, row, H);
        if (has_dy) walk.template fetch<1>(p, m.slots, at + kDy * kBlock, kPitchIn, dy, row, H);
    }
    // dgates, dm and previous of the i-th step, of which `row` is the first row; i = -1: zeros
    MMFAST_DEVICE void send(const Place& p, const Arrays& m, int i, int row) const {
        const int length = p.lengths[p.to_row], t = i >= 0 ? walk.step(p, i) : length, H = walk.hidden;
        const bool active = t < length;
        if (walk.packed ? !active : p.first + p.to_row >= walk.batch) return;
        const int at = i % 2 * kPanel;
        if constexpr (G == 3) {
            walk.template send<2>(p, dgates, row, G * H, m.panels, at, kPitchOut, active);
            walk.template send<1>(p, dgates + 2 * H, row, G * H, m.panels, at + 3 * kBlock, kPitchOut, active);
            walk.template send<1>(p, dm, row, H, m.panels, at + 2 * kBlock, kPitchOut, active);
        } else {
            walk.template send<G>(p, dgates, row, G * H, m.panels, at, kPitchOut, active);
        }
        if (!has_previous || p.base + p.to_unit >= H || p.to_block > 0) return;
        Vector<T, W::kEach> v{};
        if (active && !(walk.resets && walk.is_cut(p, t, p.to_row, length))) {
            if (i + 1 < p.walked && walk.step(p, i + 1) < length) {
                v = load_vector<W::kEach>(m.slots,
                                          (i + 1) % kSlots * kSlot + p.to_row * kPitchIn + kY * kBlock + p.to_unit);
            } else if (has_h0) {
                const int64_t from = (int64_t(p.direction) * walk.batch + p.first + p.to_row) * H + p.base + p.to_unit;
                MMFAST_UNROLL
                for (int j = 0; j < W::kEach; ++j)
                    if (p.base + p.to_unit + j < H) v.at[j] = load(h0, from + j);
            }
        }
        walk.put(p, previous, (int64_t(row + p.to_row) * walk.directions + p.direction) * H + p.base + p.to_unit, v);
    }
};

template <typename W>
W walk_of(const mmfast_rnn_layer& from, Buffers& buffers, bool aligned, bool rising) {
    using T = typename W::Type;
    W walk{};
    walk.packed = from.offsets != nullptr, walk.ragged = from.lengths != nullptr, walk.resets = from.reset != nullptr;
    if (from.offsets) walk.offsets = buffers.input<int64_t>(from.offsets, from.steps + 1);
    if (from.lengths) walk.lengths = buffers.input<int64_t>(from.lengths, from.batch);
    if (from.reset) walk.reset = buffers.input<uint8_t>(from.reset, from.rows);
    walk.whole = aligned && from.hidden * int64_t(sizeof(T)) % 16 == 0;
    walk.precise = !from.tf32;
    walk.rising = rising;
    walk.hidden = int(from.hidden), walk.directions = from.directions;
    walk.steps = int(from.steps), walk.batch = int(from.batch);
    return walk;
}

// Kernel's grid: blocks or clusters that own kRows sequences each.
template <typename Kernel>
Grid grid_of(const mmfast_rnn_layer& from) {
    constexpr int kCluster = decltype(Kernel::walk)::kCluster;
    return {(from.batch + kRows - 1) / kRows * from.directions * kCluster, Kernel::kShared, 0, kCluster};
}

// How many of the blocks or clusters of both kernels the device runs at once.
template <typename A, typename B>
int both_resident() {
    constexpr int kCluster = decltype(A::walk)::kCluster;
    const int forward = resident<A>({kCluster, A::kShared, 0, kCluster});
    const int backward = resident<B>({kCluster, B::kShared, 0, kCluster});
    return forward < backward ? forward : backward;
}

// Launches a kernel that is a Forward, over all of the layer's sequences.
template <typename Kernel>
int walk_forward(const mmfast_rnn_forward_args& args) {
    using W = decltype(Kernel::walk);
    using T = typename W::Type;
    constexpr int G = Kernel::kGates;
    const mmfast_rnn_layer& from = args.layer;
    const int64_t N = from.rows, H = from.hidden, D = from.directions, B = from.batch;
    Buffers buffers;
    Kernel kernel{};
    const bool aligned = are_aligned(args.gx, args.gates, args.cell, args.y, from.w_hh[0], from.w_hh[1]);
    kernel.walk = walk_of<W>(from, buffers, aligned, true);
    kernel.relu = from.mode == MMFAST_RNN_RELU;
    kernel.gx = buffers.input<T>(args.gx, N * D * G * H);
    for (int d = 0; d < D; ++d) kernel.w_hh[d] = buffers.input<T>(from.w_hh[d], G * H * H);
    kernel.has_bias = from.b_hh[0] != nullptr;
    for (int d = 0; d < D && kernel.has_bias; ++d) kernel.b_hh[d] = buffers.input<T>(from.b_hh[d], G * H);
    kernel.has_h0 = from.h0 != nullptr, kernel.has_c0 = from.c0 != nullptr;
    if (from.h0) kernel.h0 = buffers.input<T>(from.h0, D * B * H);
    if (from.c0) kernel.c0 = buffers.input<T>(from.c0, D * B * H);
    kernel.y = buffers.output<T>(args.y, N * D * H);
    kernel.hn = buffers.output<T>(args.hn, D * B * H);
    if (G == 4) kernel.cn = buffers.output<T>(args.cn, D * B * H);
    kernel.has_gates = G > 1 && args.gates, kernel.has_cell = G > 1 && args.cell;
    if (kernel.has_gates) kernel.gates = buffers.output<T>(args.gates, N * D * G * H);
    if (kernel.has_cell) kernel.cell = buffers.output<T>(args.cell, N * D * H);
    return buffers.finish(launch(kernel, grid_of<Kernel>(from), from.stream));
}

// Launches a kernel that is a Backward, over all of the layer's sequences.
template <typename Kernel>
int walk_backward(const mmfast_rnn_backward_args& args) {
    using W = decltype(Kernel::walk);
    using T = typename W::Type;
    constexpr int G = Kernel::kGates;
    const mmfast_rnn_layer& from = args.layer;
    const int64_t N = from.rows, H = from.hidden, D = from.directions, B = from.batch, S = D * B * H;
    Buffers buffers;
    Kernel kernel{};
    const bool aligned = are_aligned(args.y, args.gates, args.cell, args.dy, args.dgates, args.dm, args.previous,
                                     from.w_hh[0], from.w_hh[1]);
    kernel.walk = walk_of<W>(from, buffers, aligned, false);
    kernel.relu = from.mode == MMFAST_RNN_RELU;
    for (int d = 0; d < D; ++d) kernel.w_hh[d] = buffers.input<T>(from.w_hh[d], G * H * H);
    kernel.y = buffers.input<T>(args.y, N * D * H);
    if (G > 1) {
        kernel.gates = buffers.input<T>(args.gates, N * D * G * H);
        kernel.cell = buffers.input<T>(args.cell, N * D * H);
    }
    const auto given = [&](Global<const T>& to, bool& has, const void* p, int64_t n) {
        has = p != nullptr;
        if (p) to = buffers.input<T>(p, n);
    };
    given(kernel.dy, kernel.has_dy, args.dy, N * D * H);
    given(kernel.dhn, kernel.has_dhn, args.dhn, S);
    given(kernel.dcn, kernel.has_dcn, args.dcn, S);
    given(kernel.h0, kernel.has_h0, from.h0, S);
    given(kernel.c0, kernel.has_c0, from.c0, S);
    const auto wanted = [&](Global<T>& to, bool& has, void* p, int64_t n) {
        has = p != nullptr;
        if (p) to = buffers.output<T>(p, n);
    };
    kernel.dgates = buffers.output<T>(args.dgates, N * D * G * H);
    if (G == 3) kernel.dm = buffers.output<T>(args.dm, N * D * H);
    wanted(kernel.previous, kernel.has_previous, args.previous, N * D * H);
    wanted(kernel.dh0, kernel.has_dh0, args.dh0, S);
    wanted(kernel.dc0, kernel.has_dc0, args.dc0, S);
    return buffers.finish(launch(kernel, grid_of<Kernel>(from), from.stream));
}

// rnn_cluster.cu's: the entries of the same names in mmfast.h for layers whose W_hh has no place in one block.
int cluster_forward(const mmfast_rnn_forward_args& args);
int cluster_backward(const mmfast_rnn_backward_args& args);
int cluster_resident(int dtype, int mode, int64_t hidden);

}  // namespace device
}  // namespace mmfast
