// Random recurrent layers, and steps of them, for csrc/cuda on the emulator: every mode and dtype, one or two
// directions, lengths, packed, resets, and what a caller may leave out.
#include "sanitize/buffers.h"
#include "sanitize/emulated.h"

using namespace mmfast::sanitize;

namespace {

struct Layer {
    mmfast_rnn_step step{};
    int64_t gates;
    std::vector<int64_t> lengths;
    std::vector<uint8_t> cut;

    Layer() {
        step.dtype = int32_t(std::vector<int>{MMFAST_FLOAT32, MMFAST_FLOAT16, MMFAST_BFLOAT16}[size_t(pick(0, 2))]);
        step.mode = int32_t(pick(0, 3)), step.directions = int32_t(pick(1, 2));
        gates = step.mode == MMFAST_LSTM ? 4 : step.mode == MMFAST_GRU ? 3 : 1;
        step.rows = pick(g_short < 0 ? 0 : 1, 9), step.hidden = pick(0, 2) ? pick(1, 70) : 8 * pick(1, 9),
        step.step = pick(0, 3);
        for (int64_t b = 0; b < step.rows; ++b) lengths.push_back(pick(-1, 5));
        if (pick_ragged(1)) step.lengths = lengths.data();
        step.cuts = pick(0, step.rows), step.cut_step = step.step + pick(0, 1);
        for (int64_t b = 0; b < step.cuts; ++b) cut.push_back(uint8_t(pick(0, 1)));
        if (pick_ragged(1)) step.cut = cut.data();
    }
};

void* moved(void* p, int64_t elements, int dtype) {
    return p ? static_cast<char*>(p) + elements * (dtype == MMFAST_FLOAT32 ? 4 : 2) : nullptr;
}
const void* moved(const void* p, int64_t elements, int dtype) { return moved(const_cast<void*>(p), elements, dtype); }

bool run_forward() {
    const Layer layer;
    const int64_t R = layer.step.rows, H = layer.step.hidden, D = layer.step.directions, G = layer.gates;
    const int dtype = layer.step.dtype;
    Buffers buffers(dtype), floats(MMFAST_FLOAT32);
    void* gx = buffers.made(R * D * G * H, true);
    void* gates = G == 1 || !pick(0, 2) ? nullptr : pick(0, 1) ? gx : buffers.output(R * D * G * H);
    void* cell = G > 1 && pick(0, 1) ? buffers.output(R * D * H) : nullptr;
    void* y = buffers.output(R * D * H);
    for (int64_t d = 0; d < D; ++d) {
        mmfast_rnn_step_forward_args args{};
        args.step = layer.step;
        args.gx = moved(gx, d * G * H, dtype);
        args.product = buffers.input(R * G * H);
        args.bias = buffers.maybe(G * H);
        args.h = buffers.made(R * H, true);
        if (G == 3 && dtype != MMFAST_FLOAT32) args.exact = floats.made(R * H, true);
        if (G == 4) args.c = floats.made(R * H, true);
        args.y = moved(y, d * H, dtype);
        args.gates = moved(gates, d * G * H, dtype), args.cell = moved(cell, d * H, dtype);
        if (mmfast_cuda_rnn_step_forward(&args) != MMFAST_OK) return false;
    }
    return buffers.all_written();
}

bool run_backward() {
    const Layer layer;
    const int64_t R = layer.step.rows, H = layer.step.hidden, D = layer.step.directions, G = layer.gates;
    const int dtype = layer.step.dtype;
    Buffers buffers(dtype), floats(MMFAST_FLOAT32);
    const void* y = G == 1 ? buffers.input(R * D * H) : buffers.unseen(R * D * H);
    const void* dy = buffers.maybe(R * D * H);
    const void* gates = G > 1 ? buffers.input(R * D * G * H) : nullptr;
    const void* cell = G > 1 ? buffers.input(R * D * H) : nullptr;
    const int64_t befores = g_short < 0 ? pick(0, R) : R * pick(0, 1);
    const void* y_before = buffers.input(befores * D * H);
    const void* cell_before = G == 4 ? buffers.input(befores * D * H) : buffers.unseen(befores * D * H);
    void* dgates = buffers.output(R * D * G * H);
    void* dm = G == 3 ? buffers.output(R * D * H) : nullptr;
    void* previous = g_short >= 0 || pick(0, 1) ? buffers.output(R * D * H) : nullptr;
    for (int64_t d = 0; d < D; ++d) {
        mmfast_rnn_step_backward_args args{};
        args.step = layer.step;
        args.all = R + pick(0, 3), args.products = g_short < 0 ? pick(0, args.all) : args.all;
        args.product = buffers.input(args.products * H);
        args.y = moved(y, d * H, dtype), args.dy = moved(dy, d * H, dtype);
        args.gates = moved(gates, d * G * H, dtype), args.cell = moved(cell, d * H, dtype);
        args.befores = befores, args.before_step = layer.step.step - 1;
        args.y_before = moved(y_before, d * H, dtype), args.cell_before = moved(cell_before, d * H, dtype);
        if (befores < R) args.h0 = buffers.maybe(R * H);
        args.c0 = G == 4 && befores < R ? buffers.maybe(R * H) : nullptr;
        args.dh = floats.made(args.all * H, true);
        if (G == 4) args.dc = floats.made(args.all * H, true);
        args.dgates = moved(dgates, d * G * H, dtype), args.dm = moved(dm, d * H, dtype);
        args.previous = moved(previous, d * H, dtype);
        if (pick(0, 1)) args.delta = buffers.output(R * G * H);
        if (mmfast_cuda_rnn_step_backward(&args) != MMFAST_OK) return false;
    }
    return buffers.all_written();
}

}  // namespace

bool run_emulated_rnn_step() { return run_forward() && run_backward(); }

// Whole sequences: csrc/cuda/rnn_resident.cu, and where W_hh is too large for one block rnn_cluster.cu.
static bool run_walk(bool cluster) {
    mmfast_rnn_layer layer{};
    layer.dtype = int32_t(std::vector<int>{MMFAST_FLOAT32, MMFAST_FLOAT16, MMFAST_BFLOAT16}[size_t(pick(0, 2))]);
    layer.mode = int32_t(pick(0, 3)), layer.directions = int32_t(pick(1, 2)), layer.tf32 = int32_t(pick(0, 1));
    layer.steps = pick(1, cluster ? 2 : 6), layer.batch = pick(1, 10);
    if (cluster)
        layer.hidden = pick(129, 150);
    else
        layer.hidden = pick(0, 1) ? 8 * pick(1, 8) : pick(1, 64);
    const int64_t D = layer.directions, T = layer.steps, B = layer.batch, H = layer.hidden;
    const int64_t G = layer.mode == MMFAST_LSTM ? 4 : layer.mode == MMFAST_GRU ? 3 : 1, S = D * B * H;

    Rows drawn(layer);
    // the device wants the lengths of packed rows, too
    if (drawn.packed) layer.lengths = drawn.lengths.data();
    const int64_t rows = drawn.count;
    layer.rows = rows;
    std::vector<uint8_t> reset(static_cast<size_t>(rows));
    for (uint8_t& flag : reset) flag = pick(0, 3) == 0;
    if (pick_ragged(1)) layer.reset = reset.data();

    Buffers buffers(layer.dtype);
    const bool bias = pick(0, 1);
    for (int64_t d = 0; d < D; ++d) {
        layer.w_hh[d] = buffers.input(G * H * H);
        layer.b_hh[d] = bias ? buffers.input(G * H) : nullptr;
    }
    layer.h0 = buffers.maybe(S);
    if (G == 4) layer.c0 = buffers.maybe(S);
    mmfast_rnn_forward_args forward{};
    forward.layer = layer;
    void* gx = buffers.made(rows * D * G * H, true);
    forward.gx = gx;
    if (G > 1) forward.gates = pick(0, 1) ? gx : buffers.output(rows * D * G * H);
    if (G > 1) forward.cell = buffers.output(rows * D * H);
    forward.y = buffers.output(rows * D * H), forward.hn = buffers.output(S);
    if (G == 4) forward.cn = buffers.output(S);
    if (mmfast_cuda_rnn_forward(&forward) != MMFAST_OK || !buffers.all_written()) return false;

    mmfast_rnn_backward_args backward{};
    backward.layer = layer;
    backward.y = forward.y, backward.gates = forward.gates, backward.cell = forward.cell;
    backward.dy = buffers.maybe(rows * D * H), backward.dhn = buffers.maybe(S);
    if (G == 4) backward.dcn = buffers.maybe(S);
    backward.dgates = buffers.output(rows * D * G * H);
    if (G == 3) backward.dm = buffers.output(rows * D * H);
    if (pick(0, 1)) backward.previous = buffers.output(rows * D * H);
    if (layer.h0) backward.dh0 = buffers.output(S);
    if (layer.c0) backward.dc0 = buffers.output(S);
    return mmfast_cuda_rnn_backward(&backward) == MMFAST_OK && buffers.all_written();
}

bool run_emulated_rnn_walk() { return run_walk(false); }

bool run_emulated_rnn_cluster() { return run_walk(true); }
