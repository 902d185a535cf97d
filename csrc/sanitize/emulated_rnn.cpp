// Steps of random recurrent layers for csrc/cuda/rnn.cu on the emulator: every mode and dtype, one or two directions,
// lengths, resets, and what a caller may leave out.
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
        step.rows = pick(0, 9), step.hidden = pick(0, 2) ? pick(1, 70) : 8 * pick(1, 9), step.step = pick(0, 3);
        for (int64_t b = 0; b < step.rows; ++b) lengths.push_back(pick(-1, 5));
        if (pick(0, 1)) step.lengths = lengths.data();
        step.cuts = pick(0, step.rows), step.cut_step = step.step + pick(0, 1);
        for (int64_t b = 0; b < step.cuts; ++b) cut.push_back(uint8_t(pick(0, 1)));
        if (pick(0, 1)) step.cut = cut.data();
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
    const void *y = buffers.input(R * D * H), *dy = buffers.maybe(R * D * H);
    const void* gates = G > 1 ? buffers.input(R * D * G * H) : nullptr;
    const void* cell = G > 1 ? buffers.input(R * D * H) : nullptr;
    const int64_t befores = pick(0, R);
    const void *y_before = buffers.input(befores * D * H), *cell_before = buffers.input(befores * D * H);
    void* dgates = buffers.output(R * D * G * H);
    void* dm = G == 3 ? buffers.output(R * D * H) : nullptr;
    void* previous = pick(0, 1) ? buffers.output(R * D * H) : nullptr;
    for (int64_t d = 0; d < D; ++d) {
        mmfast_rnn_step_backward_args args{};
        args.step = layer.step;
        args.all = R + pick(0, 3), args.products = pick(0, args.all);
        args.product = buffers.input(args.products * H);
        args.y = moved(y, d * H, dtype), args.dy = moved(dy, d * H, dtype);
        args.gates = moved(gates, d * G * H, dtype), args.cell = moved(cell, d * H, dtype);
        args.befores = befores, args.before_step = layer.step.step - 1;
        args.y_before = moved(y_before, d * H, dtype), args.cell_before = moved(cell_before, d * H, dtype);
        args.h0 = buffers.maybe(R * H);
        args.c0 = G == 4 ? buffers.maybe(R * H) : nullptr;
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

bool run_rnn_steps(unsigned seed, int count) {
    g_random.seed(seed);
    for (int i = 0; i < count; ++i)
        if (!run_forward() || !run_backward()) return false;
    return true;
}
