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
//     special functions     64          320     576     (1, 5, 9) x 1024 values at 16 a clock
//     shared memory         48          140     190     32 lanes of accesses a clock: gx, gates, h, c, sending
//     latency               150         150     150     matrix units drain, h is stored, the barrier
//     sum                   450         1000    1400    less what overlaps: the shared memory's and half of the rest
//     microseconds          0.2-0.25    0.4-0.55 0.6-0.75
// T = 128, B = 64: 8 blocks, 26-32, 52-70, 75-95 microseconds, 3 to begin with (W_hh is read in pairs of elements), and
// the input side's product of matrices, 3 to 5. Packed, T = 512, B = 16, lengths T to T / 2: 2 blocks side by side,
// each as long as its longest sequence, 100-130, 205-280, 305-385, as without lengths. A sigmoid takes two special
// functions, exp2 and a reciprocal: with 4 sequences a block, on twice the multiprocessors, that line would be half.
#include "cuda/device.h"
#include "cuda/rnn_walk.h"

namespace mmfast {
namespace device {
namespace {

template <typename T, int G, int BLOCK>
struct ResidentForward : Forward<Walk<T, BLOCK>, G> {
    using W = Walk<T, BLOCK>;
    using Base = Forward<W, G>;
    static constexpr int kGates = G, kThreads = W::kThreads, kBlocksAtOnce = 1, kSteps = BLOCK / W::kDepth;
    static constexpr bool kAll = sizeof(T) == 2 || G < 4;
    static constexpr int kShared = Base::kBytes + aligned_bytes(W::kStaging, sizeof(T));

    MMFAST_DEVICE void operator()() const {
        const W& walk = this->walk;
        SharedCursor cursor;
        const typename W::Place p = walk.place(cursor);
        const typename Base::Arrays m = this->begin(p, cursor);
        Fragments<W, G * kSteps, kAll> a;
        a.staging = shared_array<T>(cursor, W::kStaging);
        a.template read<false>(walk, W::of(p, this->w_hh), [](int part) {
            return Part{part * W::kStaged / BLOCK, warp_index() * 16, part * W::kStaged % BLOCK};
        });
        typename Base::State state;
        this->start(p, m, state);
        int cut = walk.cuts(p, 0);
        int sent = 0, fetched = walk.walked_row(p, kSlots - 1);
        copy_wait<kSlots - 2>();
        barrier();

        MMFAST_NO_UNROLL
        for (int i = 0; i < p.walked; ++i) {
            const int t = walk.step(p, i);
            Tile sums[G];
            product<G, kSteps, G == 1 ? 4 : 1>(sums, walk, a, m.states, i % 2 * Base::kPanel, Base::kPitchOf, i);
            if (i > 0) this->send(p, m, i - 1, sent);
            this->fetch(p, m, i + kSlots - 1, fetched);
            copy_commit();
            // what the next turn needs is on its way while this one computes
            sent = walk.row(p, t), fetched = walk.walked_row(p, i + kSlots);
            const int cut_next = walk.cuts(p, i + 1);
            MMFAST_UNROLL
            for (int r = 0; r < 2; ++r) {
                float s[G][2];
                MMFAST_UNROLL
                for (int k = 0; k < G; ++k) s[k][0] = sums[k].at[r], s[k][1] = sums[k].at[2 + r];
                this->gate(p, m, i, t, r, cut >> r & 1, s, state);
            }
            cut = cut_next;
            copy_wait<kSlots - 2>();
            barrier();
        }
        this->end(p, m, sent, state);
    }
};

// The same walk back. A is W_hh with rows and columns exchanged, B what W_hh carries on of a step's gates; a warp owns
// the gradients of 16 units of h, which its threads keep with those of c.
//
// Model of a step, clocks, as above: RNN 450, GRU 850, LSTM 1050; the products are as many, no chain of them is longer
// than an eighth of them, and six numbers a unit are read and five written in place of five and six.
template <typename T, int G, int BLOCK>
struct ResidentBackward : Backward<Walk<T, BLOCK>, G> {
    using W = Walk<T, BLOCK>;
    using Base = Backward<W, G>;
    static constexpr int kGates = G, kThreads = W::kThreads, kBlocksAtOnce = 1, kSteps = G * BLOCK / W::kDepth;
    static constexpr bool kAll = BLOCK < 256 && (sizeof(T) == 2 || G < 4);
    static constexpr int kShared = Base::kBytes + aligned_bytes(W::kStaging, sizeof(T));
    using Weights = Fragments<W, kSteps, kAll>;

    MMFAST_DEVICE void operator()() const {
        const W& walk = this->walk;
        SharedCursor cursor;
        const typename W::Place p = walk.place(cursor);
        const typename Base::Arrays m = this->template begin<kSlots - 1>(p, cursor);
        Weights a;
        a.staging = shared_array<T>(cursor, W::kStaging);
        a.template read<true>(walk, W::of(p, this->w_hh), [](int part) {
            return Part{part * W::kStaged / BLOCK, warp_index() * 16, part * W::kStaged % BLOCK};
        });
        typename Base::State state;
        this->start(p, state);
        int cut = walk.cuts(p, 0), cut_last = 0;
        int fetched = walk.walked_row(p, kSlots - 1);
        copy_wait<kSlots - 3>();
        barrier();

        MMFAST_NO_UNROLL
        for (int i = 0; i < p.walked; ++i) {
            const int t = walk.step(p, i);
            if (i > 0) {
                add(state, a, m, i, cut_last);
                this->send(p, m, i - 1, walk.walked_row(p, i - 1));
            }
            this->fetch(p, m, i + kSlots - 1, fetched);
            copy_commit();
            fetched = walk.walked_row(p, i + kSlots);
            const int cut_next = walk.cuts(p, i + 1);
            MMFAST_UNROLL
            for (int r = 0; r < 2; ++r) this->gate(p, m, i, t, r, cut >> r & 1, state);
            cut_last = cut, cut = cut_next;
            copy_wait<kSlots - 3>();
            barrier();
        }
        if (p.walked > 0) {
            add(state, a, m, p.walked, cut_last);
            this->send(p, m, p.walked - 1, walk.walked_row(p, p.walked - 1));
        }
        this->end(p, m, state);
    }

    // dh += what W_hh carries on of the gates of the step before the i-th, but where it was cut
    MMFAST_DEVICE void add(typename Base::State& state, const Weights& a, const typename Base::Arrays& m, int i,
                           int cut) const {
        Tile sum[1];
        product<1, kSteps, sizeof(T) == 4 && G == 4 ? 2 : 4>(sum, this->walk, a, m.panels,
                                                             Base::kPanel - i % 2 * Base::kPanel, Base::kPitchOut, i);
        MMFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
            MMFAST_UNROLL
            for (int u = 0; u < 2; ++u) state.dh[r][u] += cut >> r & 1 ? 0.0f : sum[0].at[2 * u + r];
        }
    }
};

// f(type, gates, block of units) of such a layer, or otherwise() where W_hh has no place on a block's chip
template <typename F, typename Otherwise>
int with_block(int dtype, int mode, int64_t hidden, const F& f, const Otherwise& otherwise) {
    return with_gates(dtype, mode, [&](auto type, auto gates) {
        constexpr bool kWide = sizeof(type) == 4, kPlain = decltype(gates)::value == 1;
        if (hidden <= 64) return f(type, gates, Constant<64>{});
        if constexpr (!kWide || kPlain) {
            if (hidden <= 128) return f(type, gates, Constant<128>{});
        }
        if constexpr (!kWide && kPlain) {
            if (hidden <= 256) return f(type, gates, Constant<256>{});
        }
        return otherwise();
    });
}

int fitting(const mmfast_rnn_layer& layer) {
    if (!mmfast_cuda_rnn_resident(layer.dtype, layer.mode, layer.hidden))
        return fail(MMFAST_INVALID_ARGUMENT, "the layer's weights do not fit into blocks of this device");
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
        layer.dtype, layer.mode, layer.hidden,
        [&](auto type, auto gates, auto block) {
            using Kernel = ResidentForward<decltype(type), decltype(gates)::value, decltype(block)::value>;
            return walk_forward<Kernel>(*args);
        },
        [&] { return cluster_forward(*args); });
}

int mmfast_cuda_rnn_backward(const mmfast_rnn_backward_args* args) {
    using namespace mmfast::device;
    const mmfast_rnn_layer& layer = args->layer;
    if (const int status = fitting(layer)) return status;
    return with_block(
        layer.dtype, layer.mode, layer.hidden,
        [&](auto type, auto gates, auto block) {
            using Kernel = ResidentBackward<decltype(type), decltype(gates)::value, decltype(block)::value>;
            return walk_backward<Kernel>(*args);
        },
        [&] { return cluster_backward(*args); });
}

int mmfast_cuda_rnn_resident(int32_t dtype, int32_t mode, int64_t hidden) {
    using namespace mmfast::device;
    return with_block(
        dtype, mode, hidden,
        [](auto type, auto gates, auto block) {
            using T = decltype(type);
            constexpr int G = decltype(gates)::value, kBlock = decltype(block)::value;
            return both_resident<ResidentForward<T, G, kBlock>, ResidentBackward<T, G, kBlock>>();
        },
        [&] { return cluster_resident(dtype, mode, hidden); });
}
