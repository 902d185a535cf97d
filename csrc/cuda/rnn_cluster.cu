// A recurrent layer's walk through time where W_hh is too large for one block: a cluster of blocks shares it, in one
// launch for both directions and all sequences. Compute capability 9.0 and up.
//
// The equations, pointers, shapes and layouts: mmfast_rnn_layer in mmfast.h. A cluster of C blocks owns 8 sequences of
// one direction for all of their steps, each block UNITS of their units and those units' rows of W_hh, which stay in
// registers: grid ceil(B / 8) * D * C. H is filled up to UNITS * C by masks. How many clusters a device runs at once
// depends on how its multiprocessors are grouped, and is asked of it. Sums, gates and state as in rnn_resident.cu,
// whose products these are, but that a warp has one tile, of 16 units of one gate, over all of h:
//
//     shared memory  slots, states, cells as in rnn_walk.h, of the block's own units
//                    all     h of all units, of the last step and of this one: what products read
//                    sums    of a step and of the next one: gates of a unit come from G warps
//                    full    a barrier for each half of `all`; its phase ends when all blocks have stored their h
//     a step         wait for the phase | product | sums | barrier | gates, c, h | each warp stores its h, 16 bytes an
//                    access, into all blocks of the cluster | send the last step's y, gates, cell; copy_async ahead
//
// A half of `all` is written again two steps later: a block stores h of step i + 1 when it has that of step i from all
// others, which they stored after their products of step i - 1 had read the half. So no barrier of the cluster is
// needed but the first, which tells that the barriers are there; the last step's h is stored nowhere, so that no block
// leaves before what is stored into it has come.
//
// Model of a step, clocks on an H100 or H200 (not measured), bfloat16, H = 512, 8 sequences; forward, then backward:
//                              RNN (C = 8)    GRU (C = 16)   LSTM (C = 16)
//     matrix units             208 / 208      312 / 312      416 / 416     warps a quarter * 32 products at 6.5
//     operands of B            256 / 64       384 / 96       512 / 128     warps * 8 rows of h (of gates) at 128 bytes
//     a
//                                                                          clock, beside the matrix units
//     sums                     64 / -         48 / -         64 / -        4 bytes, written and read
//     special functions        32 / 0         80 / 0         144 / 16      1, 5, 9 a unit and row at 16 a clock
//     exchange                 220 / 450      240 / 480      240 / 480     7, 7.5 (backward 14, 15) KB in and out at 32
//                                                                          bytes a clock: the least certain term
//     inbox                    - / 128        - / 128        - / 128       16 KB at 128 bytes a clock
//     latency                  500 / 500      500 / 500      500 / 500     200 to another block, 33 of the last
//     product,
//                                                                          100 of the phase and the barrier, 170 of
//                                                                          dependent loads, gates and stores
//     sum                      1070 / 1290    1250 / 1420    1460 / 1540   the larger one of the first two lines
//     microseconds             0.6 / 0.7      0.7 / 0.8      0.8 / 0.85    at 1.8 GHz
// T = 256, B = 64: 8 clusters, 150 / 330, 175 / 375, 205 / 420 microseconds forward / both, where all run at once, and
// as much again where a device holds 7 clusters of 16; RNN's 64 blocks always fit. Beside it products of matrices: 12,
// 37, 49 forward and twice that backward.
#include "cuda/device.h"
#include "cuda/rnn_walk.h"

namespace mmfast {
namespace device {
namespace {

// Whether there are registers for all fragments of a warp: products of float32 split operands, which takes some.
template <typename T, int kFragments>
constexpr bool kHasRegisters = sizeof(T) == 2 || kFragments <= 16;

template <typename T, int G, int UNITS, int CLUSTER>
struct ClusterForward : Forward<Walk<T, UNITS, 2 * G * UNITS, CLUSTER>, G> {
    using W = Walk<T, UNITS, 2 * G * UNITS, CLUSTER>;
    using Base = Forward<W, G>;
    static constexpr bool kClusters = true;
    static constexpr int kGates = G, kThreads = W::kThreads, kBlocksAtOnce = 1;
    static constexpr int kAll = UNITS * CLUSTER, kAllPitch = kAll + W::kEach, kSteps = kAll / W::kDepth;
    // sums of a step: of each gate kRows rows, whose pitch lets the lanes of a tile meet no bank twice
    static constexpr int kSumPitch = UNITS + 4, kSums = G * kRows * kSumPitch;
    static constexpr int kShared = Base::kBytes + aligned_bytes(2 * kRows * kAllPitch, sizeof(T)) +
                                   aligned_bytes(2 * kSums, 4) + 16 + aligned_bytes(W::kStaging, sizeof(T));
    using Weights = Fragments<W, kSteps, kHasRegisters<T, kSteps>>;

    MMFAST_DEVICE void operator()() const {
        const W& walk = this->walk;
        SharedCursor cursor;
        const typename W::Place p = walk.place(cursor);
        const typename Base::Arrays m = this->begin(p, cursor);
        const SharedArray<T> all = shared_array<T>(cursor, 2 * kRows * kAllPitch);
        const SharedArray<float> sums = shared_array<float>(cursor, 2 * kSums);
        const SharedArray<uint64_t> full = shared_barriers(cursor, 2);
        const int gate = warp_index() / (UNITS / 16), unit = warp_index() % (UNITS / 16) * 16;
        Weights a;
        a.staging = shared_array<T>(cursor, W::kStaging);
        a.template read<false>(walk, W::of(p, this->w_hh),
                               [&](int part) { return Part{gate, p.base + unit, part * W::kStaged}; });
        typename Base::State state;
        this->start(p, m, state);
        begin_with_h0(p, all);
        if (thread_index() < 2) barrier_init(full, thread_index(), 1);
        int cut = walk.cuts(p, 0);
        int sent = 0, fetched = walk.walked_row(p, kSlots - 1);
        cluster_barrier();

        MMFAST_NO_UNROLL
        for (int i = 0; i < p.walked; ++i) {
            const int t = walk.step(p, i), now = i % 2 * kRows * kAllPitch, sum = i % 2 * kSums;
            if (i > 0) barrier_wait(full, i % 2, (i - 1) / 2 % 2);
            Tile tile[1];
            product<1, kSteps, sizeof(T) == 2 ? 4 : 2>(tile, walk, a, all, now, kAllPitch, i);
            const int lane = lane_index();
            MMFAST_UNROLL
            for (int r = 0; r < 2; ++r)
                store_vector(sums, sum + (gate * kRows + lane % 4 * 2 + r) * kSumPitch + unit + lane / 4 * 2,
                             Vector<float, 2>{{tile[0].at[r], tile[0].at[2 + r]}});
            copy_wait<kSlots - 2>();
            barrier();
            const bool goes_on = i + 1 < p.walked;
            if (goes_on && thread_index() == 0) barrier_expect(full, (i + 1) % 2, kRows * kAll * int(sizeof(T)));
            MMFAST_UNROLL
            for (int r = 0; r < W::kOwn; ++r) {
                if (!W::owns(p, r)) continue;
                float s[G][2];
                MMFAST_UNROLL
                for (int k = 0; k < G; ++k) {
                    const Vector<float, 2> pair =
                        load_vector<2>(sums, sum + (k * kRows + W::own_row(p, r)) * kSumPitch + p.unit);
                    s[k][0] = pair.at[0], s[k][1] = pair.at[1];
                }
                this->gate(p, m, i, t, r, cut >> r & 1, s, state);
            }
            if (goes_on) push(p, m, all, full, i + 1);
            if (i > 0) this->send(p, m, i - 1, sent);
            this->fetch(p, m, i + kSlots - 1, fetched);
            copy_commit();
            sent = walk.row(p, t), fetched = walk.walked_row(p, i + kSlots);
            cut = walk.cuts(p, i + 1);
        }
        barrier();
        this->end(p, m, sent, state);
    }

    // h of all units before the first step
    MMFAST_DEVICE void begin_with_h0(const typename W::Place& p, SharedArray<T> all) const {
        const int H = this->walk.hidden, batch = this->walk.batch;
        for (int i = thread_index(); i < kRows * kAll; i += kThreads) {
            const int row = i / kAll, unit = i % kAll;
            const bool is_given = this->has_h0 && p.first + row < batch && unit < H;
            const int64_t at = (int64_t(p.direction) * batch + p.first + row) * H + unit;
            all[row * kAllPitch + unit] = is_given ? load(this->h0, at) : T{};
        }
    }
    // The warp's part of what h the i-th step begins with, to all blocks of the cluster.
    MMFAST_DEVICE void push(const typename W::Place& p, const typename Base::Arrays& m, SharedArray<T> all,
                            SharedArray<uint64_t> full, int i) const {
        constexpr int kEach = W::kEach, kVectors = 64 / kEach;  // of two units each lane
        warp_barrier();
        MMFAST_UNROLL
        for (int r = 0; r < W::kOwn; ++r) {
            const int first = (warp_index() * 32 + r * kThreads) * 2;
            if (first >= kRows * UNITS) continue;
            MMFAST_UNROLL
            for (int piece = lane_index(); piece < kVectors * CLUSTER; piece += 32) {
                const int at = first + piece % kVectors * kEach, row = at / UNITS, unit = at % UNITS;
                const Vector<T, kEach> h =
                    load_vector<kEach>(m.states, i % 2 * Base::kPanel + row * Base::kPitchOf + unit);
                // not all blocks to the same one at once
                store_async(all, (i % 2 * kRows + row) * kAllPitch + p.base + unit, h, full, i % 2,
                            (cluster_rank() + piece / kVectors) % CLUSTER);
            }
        }
    }
};

// The same walk back, with the forward's ownership. A block multiplies what W_hh carries on of its own units' gates by
// their rows of W_hh: a part of the gradients of all units' h, which it stores into their owners' inboxes, where they
// are added in the order of the blocks. A warp has kTiles tiles of 16 units.
template <typename T, int G, int UNITS, int CLUSTER>
struct ClusterBackward : Backward<Walk<T, UNITS, 256, CLUSTER>, G> {
    using W = Walk<T, UNITS, 256, CLUSTER>;
    using Base = Backward<W, G>;
    static constexpr bool kClusters = true;
    static constexpr int kGates = G, kThreads = W::kThreads, kBlocksAtOnce = 1;
    static constexpr int kTiles = UNITS * CLUSTER / (kThreads / 2), kSteps = G * UNITS / W::kDepth;
    static constexpr int kPart = UNITS * kRows, kInbox = CLUSTER * kPart;
    static constexpr int kShared =
        Base::kBytes + aligned_bytes(2 * kInbox, 4) + 16 + aligned_bytes(W::kStaging, sizeof(T));
    using Weights = Fragments<W, kTiles * kSteps, kHasRegisters<T, kTiles * kSteps>>;

    MMFAST_DEVICE void operator()() const {
        const W& walk = this->walk;
        SharedCursor cursor;
        const typename W::Place p = walk.place(cursor);
        const typename Base::Arrays m = this->template begin<kSlots>(p, cursor);
        const SharedArray<float> inbox = shared_array<float>(cursor, 2 * kInbox);
        const SharedArray<uint64_t> full = shared_barriers(cursor, 2);
        Weights a;
        a.staging = shared_array<T>(cursor, W::kStaging);
        a.template read<true>(walk, W::of(p, this->w_hh), [&](int part) {
            constexpr int kParts = G * UNITS / W::kStaged;  // of a tile
            const int k = part % kParts * W::kStaged;
            return Part{k / UNITS, (warp_index() * kTiles + part / kParts) * 16, p.base + k % UNITS};
        });
        typename Base::State state;
        this->start(p, state);
        if (thread_index() < 2) barrier_init(full, thread_index(), 1);
        int cut = walk.cuts(p, 0), cut_last = 0;
        int sent = walk.walked_row(p, 0), fetched = walk.walked_row(p, kSlots);
        copy_wait<kSlots - 2>();
        cluster_barrier();

        MMFAST_NO_UNROLL
        for (int i = 0; i < p.walked; ++i) {
            if (i > 0) add(p, state, inbox, full, i - 1, cut_last);
            MMFAST_UNROLL
            for (int r = 0; r < W::kOwn; ++r)
                if (W::owns(p, r)) this->gate(p, m, i, walk.step(p, i), r, cut >> r & 1, state);
            copy_wait<kSlots - 3>();
            barrier();
            if (i + 1 < p.walked || this->has_dh0) push(p, a, m, inbox, full, i);
            this->send(p, m, i, sent);
            this->fetch(p, m, i + kSlots, fetched);
            copy_commit();
            sent = walk.walked_row(p, i + 1), fetched = walk.walked_row(p, i + 1 + kSlots);
            cut_last = cut, cut = walk.cuts(p, i + 1);
        }
        if (p.walked > 0 && this->has_dh0) add(p, state, inbox, full, p.walked - 1, cut_last);
        this->end(p, m, state);
    }

    // The block's part of what the i-th step passes on, to the owners of the units.
    MMFAST_DEVICE void push(const typename W::Place& p, const Weights& a, const typename Base::Arrays& m,
                            SharedArray<float> inbox, SharedArray<uint64_t> full, int i) const {
        if (thread_index() == 0) barrier_expect(full, i % 2, kInbox * int(sizeof(float)));
        Tile sums[kTiles];
        product<kTiles, kSteps,
                kTiles == 1   ? 4
                : kTiles == 2 ? 2
                              : 1>(sums, this->walk, a, m.panels, i % 2 * Base::kPanel, Base::kPitchOut, i);
        const int lane = lane_index();
        MMFAST_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            const int unit = (warp_index() * kTiles + tile) * 16 + lane / 4 * 2;
            const int to = i % 2 * kInbox + p.base * kRows + unit % UNITS * kRows + lane % 4 * 2;
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u)
                store_async(inbox, to + u * kRows, Vector<float, 2>{{sums[tile].at[2 * u], sums[tile].at[2 * u + 1]}},
                            full, i % 2, unit / UNITS);
        }
    }
    // dh += what the i-th step passes on, but where it was cut
    MMFAST_DEVICE void add(const typename W::Place& p, typename Base::State& state, SharedArray<float> inbox,
                           SharedArray<uint64_t> full, int i, int cut) const {
        barrier_wait(full, i % 2, i / 2 % 2);
        MMFAST_UNROLL
        for (int r = 0; r < W::kOwn; ++r) {
            if (!W::owns(p, r)) continue;
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) {
                float sum = 0.0f;
                MMFAST_UNROLL
                for (int block = 0; block < CLUSTER; ++block)
                    sum += inbox[i % 2 * kInbox + block * kPart + (p.unit + u) * kRows + W::own_row(p, r)];
                state.dh[r][u] += cut >> r & 1 ? 0.0f : sum;
            }
        }
    }
};

}  // namespace

// f(type, gates, units of a block, blocks of a cluster) of such a layer, or `otherwise` where W_hh has no place in one
template <typename F>
int with_cluster(int dtype, int mode, int64_t hidden, int otherwise, const F& f) {
    return with_gates(dtype, mode, [&](auto type, auto gates) {
        constexpr bool kWide = sizeof(type) == 4, kPlain = decltype(gates)::value == 1;
        using Units = Constant<kPlain ? 64 : 32>;
        if constexpr (kWide && !kPlain) {
            if (hidden <= 128) return f(type, gates, Units{}, Constant<4>{});
        }
        if constexpr (kWide || !kPlain) {
            if (hidden <= 256) return f(type, gates, Units{}, Constant<kPlain ? 4 : 8>{});
        }
        if constexpr (!kWide) {
            if (hidden <= 512) return f(type, gates, Units{}, Constant<kPlain ? 8 : 16>{});
        }
        return otherwise;
    });
}

int cluster_forward(const mmfast_rnn_forward_args& args) {
    const mmfast_rnn_layer& layer = args.layer;
    return with_cluster(layer.dtype, layer.mode, layer.hidden, MMFAST_INVALID_ARGUMENT,
                        [&](auto type, auto gates, auto units, auto cluster) {
                            using Kernel = ClusterForward<decltype(type), decltype(gates)::value,
                                                          decltype(units)::value, decltype(cluster)::value>;
                            return walk_forward<Kernel>(args);
                        });
}

int cluster_backward(const mmfast_rnn_backward_args& args) {
    const mmfast_rnn_layer& layer = args.layer;
    return with_cluster(layer.dtype, layer.mode, layer.hidden, MMFAST_INVALID_ARGUMENT,
                        [&](auto type, auto gates, auto units, auto cluster) {
                            using Kernel = ClusterBackward<decltype(type), decltype(gates)::value,
                                                           decltype(units)::value, decltype(cluster)::value>;
                            return walk_backward<Kernel>(args);
                        });
}

int cluster_resident(int dtype, int mode, int64_t hidden) {
    return with_cluster(dtype, mode, hidden, 0, [](auto type, auto gates, auto units, auto cluster) {
        using T = decltype(type);
        constexpr int G = decltype(gates)::value, kUnits = decltype(units)::value, kCluster = decltype(cluster)::value;
        return both_resident<ClusterForward<T, G, kUnits, kCluster>, ClusterBackward<T, G, kUnits, kCluster>>();
    });
}

}  // namespace device
}  // namespace mmfast
