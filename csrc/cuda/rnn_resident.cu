// A recurrent layer's walk through time, one or both directions, in one launch: W_hh never leaves the chip.
//
// The equations, pointers, shapes and layouts: mmfast_rnn_layer in mmfast.h. A block owns 8 sequences of one direction
// for all of their steps, so that no block waits for another: grid ceil(B / 8) * D. It has a warp for each 16 units of
// BLOCK, to which H is filled up by masks. A step's product W_hh h is one of 16-row tiles on the matrix units (Tile in
// device.h): A is W_hh, which stays in registers, B is h of the 8 sequences, which all warps read from shared memory.
// Rows 2 g and 2 g + 1 of a warp's tile are rows g and g + 8 of the fragment, and there is a tile for each gate: a
// thread so owns all gates of two neighbouring units of two sequences, and keeps their c, and h in float32.
//
//     shared memory  slots   kSlots steps' inputs; a step's gates take the place of its gx
//                    states  h of the last step and of this one; cells: the same of c or a_n
//     a step         product | send the last step's y, gates, cell, 16 bytes a thread and access | copy_async of the
//                    inputs of kSlots - 1 steps ahead into the slot that they leave | gates, c, h | barrier
//
// float32 multiplies in TF32, or where the layer does not want that in three products of operands split into two TF32
// numbers each, which are added in float32. State, sums and gates are float32.
//
// Model of a step, clocks on an H100 or H200 (not measured), bfloat16, 8 warps, two each quarter of the multiprocessor:
//                      H = 128: RNN     GRU     LSTM
//     matrix units          104         312     416     16, 48, 64 products of a quarter at 6.5; at least one chain of
//                                                       dependent ones: 2 x 33 (RNN, in 4 chains), 8 x 33, 8 x 33
//     operands of B         80          80      80      4 load_matrices a warp, then 33 of latency
//     special functions     16          96      160     (1, 5, 9) x 1024 values at 16 a clock and quarter
//     shared memory         48          140     190     32 lanes of accesses a clock: gx, gates, h, c, sending
//     latency               150         150     150     matrix units drain, h is stored, the barrier
//     sum                   400         780     1000    less what overlaps: the shared memory's and half of the rest
//     microseconds          0.15-0.2    0.3-0.4 0.4-0.5
// T = 128, B = 64: 8 blocks, 20-26, 40-52, 50-65 microseconds, 3 to begin with (W_hh is read in pairs of elements), and
// the input side's product of matrices, 3 to 5.
#include "cuda/device.h"
#include "cuda/rnn_gates.h"

namespace mmfast {
namespace device {
namespace {

constexpr int kRows = 8;   // sequences of a block: columns of a product
constexpr int kSlots = 4;  // steps whose inputs are in shared memory or on their way

constexpr int aligned_bytes(int n, int each) { return (n * each + 15) / 16 * 16; }

// A panel: kRows rows of kBlocks * BLOCK units, and 16 bytes, so that the rows of a matrix are in different banks.
template <typename T, int BLOCK, int kBlocks>
constexpr int kPitch = kBlocks * BLOCK + kVector<T>;

// What both passes know, and what they do with memory.
template <typename T, int BLOCK>
struct Walk {
    static constexpr int kThreads = 2 * BLOCK, kEach = kVector<T>, kDepth = 2 * kEach;
    // W_hh comes into registers through shared memory, by 16 rows and kStaged columns a warp
    static constexpr int kStaged = 64, kStagedPitch = kStaged + kEach, kStaging = BLOCK * kStagedPitch;
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
        int unit, row;                  // two units of two sequences
        int to_unit, to_row, to_block;  // what it copies
        int walked;                     // steps
        SharedArray<int> lengths;       // of the block's sequences
    };

    MMFAST_DEVICE Place place(SharedCursor& cursor) const {
        Place p;
        p.lengths = shared_array<int>(cursor, kRows);
        const int groups = (batch + kRows - 1) / kRows, block = int(block_index());
        p.direction = block >= groups, p.first = (block - p.direction * groups) * kRows;
        const int lane = lane_index(), thread = thread_index();
        p.unit = warp_index() * 16 + lane / 4 * 2, p.row = lane % 4 * 2;
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
        if (p.to_unit >= hidden) return;
        const int64_t from = (int64_t(first_row + p.to_row) * directions + p.direction) * width + p.to_unit;
        const int to = at + p.to_row * pitch + p.to_unit;
        MMFAST_UNROLL
        for (int n = 0; n < kBlocks; n += kAtOnce) {
            const int block = n + p.to_block;
            if (kBlocks % kAtOnce != 0 && block >= kBlocks) continue;
            if (whole) {
                copy_async(panel, to + block * BLOCK, x, from + block * hidden);
            } else {
                for (int j = 0; j < kEach && p.to_unit + j < hidden; ++j)
                    panel[to + block * BLOCK + j] = load(x, from + block * hidden + j);
            }
        }
    }
    // The same to x; zeros if not `active`.
    template <int kBlocks>
    MMFAST_DEVICE void send(const Place& p, Global<T> x, int first_row, int width, SharedArray<T> panel, int at,
                            int pitch, bool active) const {
        if (p.to_unit >= hidden) return;
        const int64_t to = (int64_t(first_row + p.to_row) * directions + p.direction) * width + p.to_unit;
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
            if (p.to_unit + j < hidden) store(x, to + j, v.at[j]);
    }
    static MMFAST_DEVICE Global<const T> of(const Place& p, const Global<const T> (&each)[2]) {
        return p.direction ? each[1] : each[0];
    }
    static MMFAST_DEVICE Vector<T, 2> pair_of(const float (&x)[2]) {
        return {{from_float<T>(x[0]), from_float<T>(x[1])}};
    }
    MMFAST_DEVICE int64_t state_at(const Place& p, int r, int u) const {
        return (int64_t(p.direction) * batch + p.first + p.row + r) * hidden + p.unit + u;
    }
    MMFAST_DEVICE float state(const Place& p, Global<const T> x, int r, int u) const {
        const bool inside = p.first + p.row + r < batch && p.unit + u < hidden;
        return inside ? to_float(load(x, state_at(p, r, u))) : 0.0f;
    }
    MMFAST_DEVICE int cuts(const Place& p, int i) const {
        const int t = step(p, i);
        return is_cut(p, t, p.row, p.lengths[p.row]) | is_cut(p, t, p.row + 1, p.lengths[p.row + 1]) << 1;
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

// A warp's kCount fragments of A, in the order of tiles and of k. The last ones stay in shared memory where all would
// need more registers than there are.
template <typename T, int BLOCK, int kCount, bool kAll>
struct Fragments {
    using W = Walk<T, BLOCK>;
    static constexpr int kParts = W::kStaged / W::kDepth;  // fragments that are staged at once
    static constexpr int kHeld = kAll ? kCount : kCount - kParts;
    Words held[kHeld];
    SharedArray<T> staging;
    int from;

    // Of each gate W_hh[m, k], or with `across` W_hh[k, m].
    template <bool across>
    MMFAST_DEVICE void read(const W& walk, Global<const T> w) {
        constexpr int kPitch = W::kStagedPitch, kEach = W::kEach, kRow = (across ? 16 : W::kStaged) / kEach;
        const int lane = lane_index(), unit = warp_index() * 16, own = unit * kPitch;
        from = own + (lane % 8 * 2 + lane / 8 % 2) * kPitch + lane / 16 * kEach;
        MMFAST_UNROLL
        for (int part = 0; part < kCount / kParts; ++part) {
            const int gate = part * W::kStaged / BLOCK, k = part * W::kStaged % BLOCK;
            warp_barrier();
            MMFAST_UNROLL
            for (int piece = lane; piece < 16 * W::kStaged / kEach; piece += 32) {
                const int row = piece / kRow, column = piece % kRow * kEach;
                if constexpr (across) {
                    const Vector<T, kEach> v = walk.weights(w, gate, k + row, unit + column);
                    MMFAST_UNROLL
                    for (int j = 0; j < kEach; ++j) staging[own + (column + j) * kPitch + row] = v.at[j];
                } else {
                    store_vector(staging, own + row * kPitch + column, walk.weights(w, gate, unit + row, k + column));
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
template <int kTiles, int kSteps, int kChains, typename T, int BLOCK, bool kAll>
MMFAST_DEVICE void product(Tile (&d)[kTiles], const Walk<T, BLOCK>& walk,
                           const Fragments<T, BLOCK, kTiles * kSteps, kAll>& a, SharedArray<T> panel, int at, int pitch,
                           int turn) {
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

template <typename T, int G, int BLOCK>
struct ResidentForward {
    using W = Walk<T, BLOCK>;
    static constexpr int kThreads = W::kThreads, kBlocksAtOnce = 1, kFragments = BLOCK / W::kDepth;
    static constexpr int kSlot = kRows * kPitch<T, BLOCK, G>, kPanel = kRows * kPitch<T, BLOCK, 1>;
    static constexpr int kShared = aligned_bytes(kRows, 4) + aligned_bytes(kSlots * kSlot, sizeof(T)) +
                                   (1 + (G > 1)) * aligned_bytes(2 * kPanel, sizeof(T)) + aligned_bytes(G * BLOCK, 4) +
                                   aligned_bytes(W::kStaging, sizeof(T));
    W walk;
    Global<const T> gx, w_hh[2], b_hh[2], h0, c0;
    Global<T> y, hn, cn, gates, cell;
    bool has_bias, has_h0, has_c0, has_gates, has_cell, relu;

    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const typename W::Place p = walk.place(cursor);
        const SharedArray<T> slots = shared_array<T>(cursor, kSlots * kSlot);
        const SharedArray<T> states = shared_array<T>(cursor, 2 * kPanel);
        const SharedArray<T> cells = G > 1 ? shared_array<T>(cursor, 2 * kPanel) : states;
        const SharedArray<float> biases = shared_array<float>(cursor, G * BLOCK);
        const int H = walk.hidden, pitch = kPitch<T, BLOCK, 1>;

        // units and sequences that fill up a block have gates, too, which nobody uses
        MMFAST_NO_UNROLL
        for (int i = thread_index() * W::kEach; i < kSlots * kSlot; i += kThreads * W::kEach)
            store_vector(slots, i, Vector<T, W::kEach>{});
        barrier();
        MMFAST_NO_UNROLL
        for (int i = 0; i < kSlots - 1; ++i) {
            fetch(p, slots, i, walk.walked_row(p, i));
            copy_commit();
        }
        for (int i = thread_index(); i < G * BLOCK; i += kThreads) {
            const int gate = i / BLOCK, unit = i % BLOCK;
            biases[i] = has_bias && unit < H ? to_float(load(W::of(p, b_hh), gate * H + unit)) : 0.0f;
        }
        Fragments<T, BLOCK, G * kFragments, true> a;
        a.staging = shared_array<T>(cursor, W::kStaging);
        a.template read<false>(walk, W::of(p, w_hh));
        float h[2][2], c[2][2];  // of sequence, of unit; h in full is GRU's alone
        MMFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
            h[r][0] = has_h0 ? walk.state(p, h0, r, 0) : 0.0f, h[r][1] = has_h0 ? walk.state(p, h0, r, 1) : 0.0f;
            c[r][0] = has_c0 ? walk.state(p, c0, r, 0) : 0.0f, c[r][1] = has_c0 ? walk.state(p, c0, r, 1) : 0.0f;
            store_vector(states, (p.row + r) * pitch + p.unit, W::pair_of(h[r]));
        }
        int cut = walk.resets && p.walked ? walk.cuts(p, 0) : 0;  // bit r: of sequence r
        int sent = 0, fetched = walk.walked_row(p, kSlots - 1);
        copy_wait<kSlots - 2>();
        barrier();

        MMFAST_NO_UNROLL
        for (int i = 0; i < p.walked; ++i) {
            const int now = i % 2 * kPanel, next = kPanel - now, slot = i % kSlots * kSlot, t = walk.step(p, i);
            Tile sums[G];
            product<G, kFragments, G == 1 ? 4 : 1>(sums, walk, a, states, now, pitch, i);
            if (i > 0) send(p, i - 1, sent, slots, states, cells);
            fetch(p, slots, i + kSlots - 1, fetched);
            copy_commit();
            // what the next turn needs is on its way while this one computes
            sent = walk.row(p, t), fetched = walk.walked_row(p, i + kSlots);
            const int cut_next = walk.resets && i + 1 < p.walked ? walk.cuts(p, i + 1) : 0;
            MMFAST_UNROLL
            for (int r = 0; r < 2; ++r) {
                const bool active = t < p.lengths[p.row + r], is_cut = cut >> r & 1;
                const int at = slot + (p.row + r) * kPitch<T, BLOCK, G> + p.unit;
                float x[G][2], s[G][2], kept[2], cell_of[2];
                MMFAST_UNROLL
                for (int k = 0; k < G; ++k) {
                    const Vector<T, 2> in = load_vector<2>(slots, at + k * BLOCK);
                    const Vector<float, 2> bias = load_vector<2>(biases, k * BLOCK + p.unit);
                    MMFAST_UNROLL
                    for (int u = 0; u < 2; ++u) {
                        x[k][u] = to_float(in.at[u]);
                        s[k][u] = (is_cut ? 0.0f : sums[k].at[2 * u + r]) + bias.at[u];
                    }
                }
                MMFAST_UNROLL
                for (int u = 0; u < 2; ++u) {
                    float found;
                    if constexpr (G == 4) {
                        MMFAST_UNROLL
                        for (int k = 0; k < G; ++k) x[k][u] += s[k][u];
                        cell_of[u] = is_cut ? 0.0f : c[r][u];
                        found = lstm<T>(x[0][u], x[1][u], x[2][u], x[3][u], cell_of[u]);
                        if (active) c[r][u] = cell_of[u];
                    } else if constexpr (G == 3) {
                        x[0][u] += s[0][u], x[1][u] += s[1][u], cell_of[u] = s[2][u];
                        found = gru<T>(x[0][u], x[1][u], x[2][u], s[2][u], is_cut ? 0.0f : h[r][u]);
                    } else {
                        found = rnn<T>(x[0][u] + s[0][u], relu);
                    }
                    if (G == 3 && active) h[r][u] = found;
                    // units that fill up the block stay out of the product
                    kept[u] = p.unit + u < H ? found : 0.0f;
                }
                const int mine = (p.row + r) * pitch + p.unit;
                store_vector(states, next + mine, active ? W::pair_of(kept) : load_vector<2>(states, now + mine));
                if constexpr (G > 1) {
                    if (has_cell) store_vector(cells, now + (p.row + r) * pitch + p.unit, W::pair_of(cell_of));
                    if (has_gates) {
                        MMFAST_UNROLL
                        for (int k = 0; k < G; ++k) store_vector(slots, at + k * BLOCK, W::pair_of(x[k]));
                    }
                }
            }
            cut = cut_next;
            copy_wait<kSlots - 2>();
            barrier();
        }
        if (p.walked > 0) send(p, p.walked - 1, sent, slots, states, cells);
        if (!walk.packed) {
            MMFAST_NO_UNROLL
            for (int t = p.walked; t < walk.steps; ++t) send(p, -1, walk.row(p, t), slots, states, cells);
        }
        MMFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                if (p.first + p.row + r >= walk.batch || p.unit + u >= H) continue;
                const int64_t at = walk.state_at(p, r, u);
                store(hn, at, T(states[p.walked % 2 * kPanel + (p.row + r) * pitch + p.unit + u]));
                if constexpr (G == 4) store(cn, at, from_float<T>(c[r][u]));
            }
        }
    }

    MMFAST_DEVICE void fetch(const typename W::Place& p, SharedArray<T> slots, int i, int row) const {
        if (i >= p.walked || walk.step(p, i) >= p.lengths[p.to_row]) return;
        walk.template fetch<G>(p, slots, i % kSlots * kSlot, kPitch<T, BLOCK, G>, gx, row, G * walk.hidden);
    }
    // y, gates and cell of the i-th step, of which `row` is the first row; i = -1: zeros
    MMFAST_DEVICE void send(const typename W::Place& p, int i, int row, SharedArray<T> slots, SharedArray<T> states,
                            SharedArray<T> cells) const {
        const bool active = i >= 0 && walk.step(p, i) < p.lengths[p.to_row];
        if (walk.packed ? !active : p.first + p.to_row >= walk.batch) return;
        const int odd = i % 2 * kPanel, pitch = kPitch<T, BLOCK, 1>, H = walk.hidden;
        walk.template send<1>(p, y, row, H, states, kPanel - odd, pitch, active);
        if constexpr (G > 1) {
            if (has_cell) walk.template send<1>(p, cell, row, H, cells, odd, pitch, active);
            if (has_gates)
                walk.template send<G>(p, gates, row, G * H, slots, i % kSlots * kSlot, kPitch<T, BLOCK, G>, active);
        }
    }
};

// The same walk back. A is W_hh with rows and columns exchanged, B what W_hh carries on of a step's gates, all gates of
// a unit after those of the units before; a warp owns the gradients of 16 units of h, which its threads keep with those
// of c. A step's inputs - gates, cell, y, dy - are in a slot, its results in one of two panels.
//
// Model of a step, clocks, as above: RNN 400, GRU 850, LSTM 1050; the products are as many, no chain of them is longer
// than an eighth of them, and six numbers a unit are read and five written in place of five and six.
template <typename T, int G, int BLOCK>
struct ResidentBackward {
    using W = Walk<T, BLOCK>;
    static constexpr int kThreads = W::kThreads, kBlocksAtOnce = 1, kFragments = G * BLOCK / W::kDepth;
    static constexpr bool kAll = BLOCK < 256 && (sizeof(T) == 2 || G < 4);
    // blocks of units in a slot, and in a panel: r z n's and, last, the input side's of n
    static constexpr int kCell = G > 1 ? G : -1, kY = kCell + 1, kDy = kY + 1, kIn = kDy + 1, kOut = G == 3 ? 4 : G;
    static constexpr int kSlot = kRows * kPitch<T, BLOCK, kIn>, kPanel = kRows * kPitch<T, BLOCK, kOut>;
    static constexpr int kShared = aligned_bytes(kRows, 4) + aligned_bytes(kSlots * kSlot, sizeof(T)) +
                                   aligned_bytes(2 * kPanel, sizeof(T)) + aligned_bytes(W::kStaging, sizeof(T));
    W walk;
    Global<const T> w_hh[2], y, gates, cell, dy, dhn, dcn, h0, c0;
    Global<T> dgates, dm, previous, dh0, dc0;
    bool has_dy, has_dhn, has_dcn, has_h0, has_c0, has_previous, has_dh0, has_dc0, relu;

    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const typename W::Place p = walk.place(cursor);
        const SharedArray<T> slots = shared_array<T>(cursor, kSlots * kSlot);
        const SharedArray<T> panels = shared_array<T>(cursor, 2 * kPanel);
        const int pitch = kPitch<T, BLOCK, kIn>, out_pitch = kPitch<T, BLOCK, kOut>;

        MMFAST_NO_UNROLL
        for (int i = thread_index() * W::kEach; i < kSlots * kSlot; i += kThreads * W::kEach)
            store_vector(slots, i, Vector<T, W::kEach>{});
        barrier();
        MMFAST_NO_UNROLL
        for (int i = 0; i < kSlots - 1; ++i) {
            fetch(p, slots, i, walk.walked_row(p, i));
            copy_commit();
        }
        Fragments<T, BLOCK, kFragments, kAll> a;
        a.staging = shared_array<T>(cursor, W::kStaging);
        a.template read<true>(walk, W::of(p, w_hh));
        float dh[2][2], dc[2][2];  // of sequence, of unit
        MMFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                dh[r][u] = has_dhn ? walk.state(p, dhn, r, u) : 0.0f;
                dc[r][u] = G == 4 && has_dcn ? walk.state(p, dcn, r, u) : 0.0f;
            }
        }
        int cut = walk.resets && p.walked ? walk.cuts(p, 0) : 0, cut_last = 0;
        int sent = 0, fetched = walk.walked_row(p, kSlots - 1);
        copy_wait<kSlots - 3>();
        barrier();

        MMFAST_NO_UNROLL
        for (int i = 0; i < p.walked; ++i) {
            const int t = walk.step(p, i), t_before = i + 1 < p.walked ? walk.step(p, i + 1) : 0x7fffffff;
            const int slot = i % kSlots * kSlot, slot_before = (i + 1) % kSlots * kSlot, panel = i % 2 * kPanel;
            if (i > 0) {
                add(p, dh, walk, a, panels, kPanel - panel, cut_last, i);
                send(p, i - 1, sent, slots, panels);
            }
            fetch(p, slots, i + kSlots - 1, fetched);
            copy_commit();
            sent = walk.row(p, t), fetched = walk.walked_row(p, i + kSlots);
            const int cut_next = walk.resets && i + 1 < p.walked ? walk.cuts(p, i + 1) : 0;
            MMFAST_UNROLL
            for (int r = 0; r < 2; ++r) {
                const int length = p.lengths[p.row + r];
                const bool active = t < length, is_cut = cut >> r & 1;
                const int in_row = (p.row + r) * pitch + p.unit, at = slot + in_row;
                float g[kOut][2];
                if (active) {
                    float before[2], of_cell[2], in[2];
                    if constexpr (G > 1) {
                        MMFAST_UNROLL
                        for (int k = 0; k < G; ++k) read(g[k], slots, at + k * BLOCK);
                        read(of_cell, slots, at + kCell * BLOCK);
                        if (t_before < length) {
                            read(before, slots, slot_before + in_row + (G == 4 ? kCell : kY) * BLOCK);
                        } else {
                            const bool has = G == 4 ? has_c0 : has_h0;
                            before[0] = has ? walk.state(p, G == 4 ? c0 : h0, r, 0) : 0.0f;
                            before[1] = has ? walk.state(p, G == 4 ? c0 : h0, r, 1) : 0.0f;
                        }
                    } else {
                        read(before, slots, at + kY * BLOCK);
                    }
                    if (has_dy) {
                        read(in, slots, at + kDy * BLOCK);
                        dh[r][0] += in[0], dh[r][1] += in[1];
                    }
                    MMFAST_UNROLL
                    for (int u = 0; u < 2; ++u) {
                        if constexpr (G == 4) {
                            lstm_backward<T>(g[0][u], g[1][u], g[2][u], g[3][u], dc[r][u], dh[r][u], of_cell[u],
                                             is_cut ? 0.0f : before[u]);
                            if (is_cut) dc[r][u] = 0.0f;
                            dh[r][u] = 0.0f;
                        } else if constexpr (G == 3) {
                            gru_backward(g[0][u], g[1][u], g[2][u], of_cell[u], dh[r][u], is_cut ? 0.0f : before[u]);
                            g[3][u] = g[2][u], g[2][u] = of_cell[u];
                            if (is_cut) dh[r][u] = 0.0f;
                        } else {
                            g[0][u] = rnn_backward(dh[r][u], before[u], relu);
                            dh[r][u] = 0.0f;
                        }
                        // of units that fill up the block nothing comes
                        MMFAST_UNROLL
                        for (int k = 0; k < kOut; ++k) g[k][u] = p.unit + u < walk.hidden ? g[k][u] : 0.0f;
                    }
                } else {
                    MMFAST_UNROLL
                    for (int k = 0; k < kOut; ++k) g[k][0] = g[k][1] = 0.0f;
                }
                MMFAST_UNROLL
                for (int k = 0; k < kOut; ++k)
                    store_vector(panels, panel + (p.row + r) * out_pitch + k * BLOCK + p.unit, W::pair_of(g[k]));
            }
            cut_last = cut, cut = cut_next;
            copy_wait<kSlots - 3>();
            barrier();
        }
        if (p.walked > 0) {
            add(p, dh, walk, a, panels, (p.walked - 1) % 2 * kPanel, cut_last, p.walked);
            send(p, p.walked - 1, sent, slots, panels);
        }
        if (!walk.packed) {
            MMFAST_NO_UNROLL
            for (int t = p.walked; t < walk.steps; ++t) send(p, -1, walk.row(p, t), slots, panels);
        }
        MMFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                if (p.first + p.row + r >= walk.batch || p.unit + u >= walk.hidden) continue;
                const int64_t at = walk.state_at(p, r, u);
                if (has_dh0) store(dh0, at, from_float<T>(dh[r][u]));
                if (G == 4 && has_dc0) store(dc0, at, from_float<T>(dc[r][u]));
            }
        }
    }

    static MMFAST_DEVICE void read(float (&to)[2], SharedArray<T> from, int at) {
        const Vector<T, 2> v = load_vector<2>(from, at);
        to[0] = to_float(v.at[0]), to[1] = to_float(v.at[1]);
    }
    // dh += what W_hh carries on of a step's gates, but where it was cut
    static MMFAST_DEVICE void add(const typename W::Place&, float (&dh)[2][2], const W& walk,
                                  const Fragments<T, BLOCK, kFragments, kAll>& a, SharedArray<T> panels, int panel,
                                  int cut, int turn) {
        Tile sum[1];
        product<1, kFragments, 4>(sum, walk, a, panels, panel, kPitch<T, BLOCK, kOut>, turn);
        MMFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) dh[r][u] += cut >> r & 1 ? 0.0f : sum[0].at[2 * u + r];
        }
    }
    MMFAST_DEVICE void fetch(const typename W::Place& p, SharedArray<T> slots, int i, int row) const {
        if (i >= p.walked || walk.step(p, i) >= p.lengths[p.to_row]) return;
        const int at = i % kSlots * kSlot, pitch = kPitch<T, BLOCK, kIn>, H = walk.hidden;
        if constexpr (G > 1) {
            walk.template fetch<G>(p, slots, at, pitch, gates, row, G * H);
            walk.template fetch<1>(p, slots, at + kCell * BLOCK, pitch, cell, row, H);
        }
        if (G != 4 || has_previous) walk.template fetch<1>(p, slots, at + kY * BLOCK, pitch, y, row, H);
        if (has_dy) walk.template fetch<1>(p, slots, at + kDy * BLOCK, pitch, dy, row, H);
    }
    // dgates, dm and previous of the i-th step, of which `row` is the first row; i = -1: zeros
    MMFAST_DEVICE void send(const typename W::Place& p, int i, int row, SharedArray<T> slots,
                            SharedArray<T> panels) const {
        const int length = p.lengths[p.to_row], t = i >= 0 ? walk.step(p, i) : length, H = walk.hidden;
        const bool active = t < length;
        if (walk.packed ? !active : p.first + p.to_row >= walk.batch) return;
        const int at = i % 2 * kPanel, pitch = kPitch<T, BLOCK, kOut>;
        if constexpr (G == 3) {
            walk.template send<2>(p, dgates, row, G * H, panels, at, pitch, active);
            walk.template send<1>(p, dgates + 2 * H, row, G * H, panels, at + 3 * BLOCK, pitch, active);
            walk.template send<1>(p, dm, row, H, panels, at + 2 * BLOCK, pitch, active);
        } else {
            walk.template send<G>(p, dgates, row, G * H, panels, at, pitch, active);
        }
        if (!has_previous || p.to_unit >= H || p.to_block > 0) return;
        Vector<T, W::kEach> v{};
        if (active && !(walk.resets && walk.is_cut(p, t, p.to_row, length))) {
            if (i + 1 < p.walked && walk.step(p, i + 1) < length) {
                v = load_vector<W::kEach>(
                    slots, (i + 1) % kSlots * kSlot + p.to_row * kPitch<T, BLOCK, kIn> + kY * BLOCK + p.to_unit);
            } else if (has_h0) {
                const int64_t from = (int64_t(p.direction) * walk.batch + p.first + p.to_row) * H + p.to_unit;
                MMFAST_UNROLL
                for (int j = 0; j < W::kEach; ++j)
                    if (p.to_unit + j < H) v.at[j] = load(h0, from + j);
            }
        }
        walk.put(p, previous, (int64_t(row + p.to_row) * walk.directions + p.direction) * H + p.to_unit, v);
    }
};

template <typename T, int BLOCK>
Walk<T, BLOCK> walk_of(const mmfast_rnn_layer& from, Buffers& buffers, bool aligned, bool rising) {
    Walk<T, BLOCK> walk{};
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

Grid grid_of(const mmfast_rnn_layer& from, int shared) {
    return {(from.batch + kRows - 1) / kRows * from.directions, shared};
}

template <typename T, int G, int BLOCK>
int resident_forward(const mmfast_rnn_forward_args& args) {
    const mmfast_rnn_layer& from = args.layer;
    const int64_t N = from.rows, H = from.hidden, D = from.directions, B = from.batch;
    Buffers buffers;
    using Kernel = ResidentForward<T, G, BLOCK>;
    Kernel kernel{};
    const bool aligned = are_aligned(args.gx, args.gates, args.cell, args.y, from.w_hh[0], from.w_hh[1]);
    kernel.walk = walk_of<T, BLOCK>(from, buffers, aligned, true);
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
    return buffers.finish(launch(kernel, grid_of(from, Kernel::kShared), from.stream));
}

template <typename T, int G, int BLOCK>
int resident_backward(const mmfast_rnn_backward_args& args) {
    const mmfast_rnn_layer& from = args.layer;
    const int64_t N = from.rows, H = from.hidden, D = from.directions, B = from.batch, S = D * B * H;
    Buffers buffers;
    using Kernel = ResidentBackward<T, G, BLOCK>;
    Kernel kernel{};
    const bool aligned = are_aligned(args.y, args.gates, args.cell, args.dy, args.dgates, args.dm, args.previous,
                                     from.w_hh[0], from.w_hh[1]);
    kernel.walk = walk_of<T, BLOCK>(from, buffers, aligned, false);
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
    return buffers.finish(launch(kernel, grid_of(from, Kernel::kShared), from.stream));
}

// f(type, gates, block of units) of such a layer, or `otherwise` where W_hh has no place on a block's chip
template <typename F>
int with_block(int dtype, int mode, int64_t hidden, int otherwise, const F& f) {
    return with_gates(dtype, mode, [&](auto type, auto gates) {
        constexpr bool kWide = sizeof(type) == 4, kPlain = decltype(gates)::value == 1;
        if (hidden <= 64) return f(type, gates, Constant<64>{});
        if constexpr (!kWide || kPlain) {
            if (hidden <= 128) return f(type, gates, Constant<128>{});
        }
        if constexpr (!kWide && kPlain) {
            if (hidden <= 256) return f(type, gates, Constant<256>{});
        }
        return otherwise;
    });
}

int fitting(const mmfast_rnn_layer& layer) {
    if (!mmfast_cuda_rnn_resident(layer.dtype, layer.mode, layer.hidden))
        return fail(MMFAST_INVALID_ARGUMENT, "the layer's weights do not fit into a block of this device");
    if (layer.rows > 0x7fffffff || layer.steps > 0x7fffffff || layer.batch > 0x7fffffff - kRows)
        return fail(MMFAST_INVALID_ARGUMENT, "the sequences are too many or too long for the kernel");
    return MMFAST_OK;
}

}  // namespace
}  // namespace device
}  // namespace mmfast

int mmfast_cuda_rnn_forward(const mmfast_rnn_forward_args* args) {
    using namespace mmfast::device;
    const mmfast_rnn_layer& layer = args->layer;
    if (const int status = fitting(layer)) return status;
    return with_block(
        layer.dtype, layer.mode, layer.hidden, MMFAST_INVALID_ARGUMENT, [&](auto type, auto gates, auto block) {
            return resident_forward<decltype(type), decltype(gates)::value, decltype(block)::value>(*args);
        });
}

int mmfast_cuda_rnn_backward(const mmfast_rnn_backward_args* args) {
    using namespace mmfast::device;
    const mmfast_rnn_layer& layer = args->layer;
    if (const int status = fitting(layer)) return status;
    return with_block(
        layer.dtype, layer.mode, layer.hidden, MMFAST_INVALID_ARGUMENT, [&](auto type, auto gates, auto block) {
            return resident_backward<decltype(type), decltype(gates)::value, decltype(block)::value>(*args);
        });
}

int mmfast_cuda_rnn_resident(int32_t dtype, int32_t mode, int64_t hidden) {
    using namespace mmfast::device;
    return with_block(dtype, mode, hidden, 0, [&](auto type, auto gates, auto block) {
        using Forward = ResidentForward<decltype(type), decltype(gates)::value, decltype(block)::value>;
        using Backward = ResidentBackward<decltype(type), decltype(gates)::value, decltype(block)::value>;
        const int forward = resident<Forward>({1, Forward::kShared});
        const int backward = resident<Backward>({1, Backward::kShared});
        return forward < backward ? forward : backward;
    });
}
