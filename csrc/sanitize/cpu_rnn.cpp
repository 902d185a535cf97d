// Random recurrent layers, Cells and products for the CPU kernels: every mode, dtype, layout and extra.
#include <vector>

#include "mmfast.h"
#include "sanitize/buffers.h"
#include "sanitize/cpu.h"

using namespace mmfast::sanitize;

namespace mmfast {
namespace MMFAST_ISA {

bool run_layer() {
    mmfast_rnn_layer layer{};
    layer.dtype = int(pick(0, 3)), layer.mode = int(pick(0, 3)), layer.directions = int(pick(1, 2));
    layer.steps = pick(g_short < 0 ? 1 : 2, 6), layer.batch = pick(1, 9), layer.hidden = pick(1, 70),
    layer.threads = int(pick(1, 4));
    const bool lstm = layer.mode == MMFAST_LSTM, gru = layer.mode == MMFAST_GRU;
    if (lstm && pick(0, 1)) layer.proj = pick(1, 40);
    const int64_t D = layer.directions, T = layer.steps, B = layer.batch, H = layer.hidden;
    const int64_t P = layer.proj ? layer.proj : H, G = lstm ? 4 : gru ? 3 : 1;

    const Rows drawn(layer);
    const int64_t rows = drawn.count;
    std::vector<uint8_t> reset(static_cast<size_t>(rows)), zones(static_cast<size_t>(rows * D * P));
    for (uint8_t& flag : reset) flag = pick(0, 3) == 0;
    for (uint8_t& flag : zones) flag = uint8_t(pick(0, 1));
    if (pick_ragged(1)) layer.reset = reset.data();
    const int64_t zoneout = pick(0, 2);
    if (zoneout == 1) layer.zoneout_mask = zones.data();
    if (zoneout == 2) layer.zoneout = 0.25;

    Buffers buffers(layer.dtype);
    layer.dropout_mask = buffers.maybe(D * B * P);
    const bool bias = pick(0, 1);
    for (int64_t d = 0; d < D; ++d) {
        layer.w_hh[d] = buffers.input(G * H * P);
        layer.b_hh[d] = bias ? buffers.input(G * H) : nullptr;
        layer.w_hr[d] = layer.proj ? buffers.input(P * H) : nullptr;
    }
    layer.h0 = buffers.maybe(D * B * P);
    layer.c0 = lstm ? buffers.maybe(D * B * H) : nullptr;

    mmfast_rnn_forward_args forward{};
    forward.layer = layer;
    const bool narrow = layer.dtype == MMFAST_FLOAT16 || layer.dtype == MMFAST_BFLOAT16;
    if (narrow || pick(0, 1)) {
        forward.gx = buffers.input(rows * D * G * H);
    } else {
        forward.input = pick(1, 40), forward.x = buffers.input(rows * forward.input);
        for (int64_t d = 0; d < D; ++d) forward.w_ih[d] = buffers.input(G * H * forward.input);
    }
    const bool cells = G > 1 || zoneout;
    forward.gates = G > 1 ? buffers.output(rows * D * G * H) : nullptr;
    forward.cell = cells ? buffers.output(rows * D * H) : nullptr;
    if (drawn.cut) {
        if (forward.gates) buffers.zero(forward.gates, rows * D * G * H);
        if (forward.cell) buffers.zero(forward.cell, rows * D * H);
    }
    for (int64_t d = 0; d < D; ++d) forward.b_ih[d] = buffers.maybe(G * H);
    forward.y = buffers.output(rows * D * P);
    forward.hn = buffers.output(D * B * P);
    forward.cn = lstm ? buffers.output(D * B * H) : nullptr;
    if (rnn_forward(forward) != MMFAST_OK || !buffers.all_written()) return false;

    mmfast_rnn_backward_args backward{};
    backward.layer = layer;
    backward.y = forward.y, backward.gates = forward.gates, backward.cell = forward.cell;
    backward.dy = buffers.maybe(rows * D * P);
    backward.dhn = buffers.maybe(D * B * P);
    backward.dcn = lstm ? buffers.maybe(D * B * H) : nullptr;
    backward.dgates = buffers.output(rows * D * G * H);
    backward.dm = gru ? buffers.output(rows * D * H) : nullptr;
    if (layer.proj) backward.dh = buffers.output(rows * D * P), backward.u = buffers.output(rows * D * H);
    if (pick(0, 1)) backward.previous = buffers.output(rows * D * P);
    if (layer.h0) backward.dh0 = buffers.output(D * B * P);
    if (layer.c0) backward.dc0 = buffers.output(D * B * H);
    for (int64_t d = 0; d < D; ++d) {
        if (pick(0, 1)) backward.db_ih[d] = buffers.output(G * H);
        if (pick(0, 1)) backward.db_hh[d] = buffers.output(G * H);
    }
    if (!narrow && (forward.x || pick(0, 1))) {
        backward.input = forward.x ? forward.input : pick(1, 40);
        backward.x = forward.x ? forward.x : buffers.input(rows * backward.input);
        if (pick(0, 1)) backward.dx = buffers.output(rows * backward.input);
        for (int64_t d = 0; d < D; ++d) {
            backward.w_ih[d] = forward.x ? forward.w_ih[d] : buffers.input(G * H * backward.input);
            if (pick(0, 1)) backward.dw_ih[d] = buffers.output(G * H * backward.input);
            if (pick(0, 1)) backward.dw_hh[d] = buffers.output(G * H * P);
        }
    }
    return rnn_backward(backward) == MMFAST_OK && buffers.all_written();
}

bool run_cell() {
    mmfast_rnn_cell_args args{};
    args.dtype = int(pick(0, 3)), args.mode = int(pick(0, 3));
    args.batch = pick(g_short < 0 ? 0 : 1, 4), args.input = pick(1, 40), args.hidden = pick(1, 40);
    const int64_t rows = (args.mode == MMFAST_LSTM ? 4 : args.mode == MMFAST_GRU ? 3 : 1) * args.hidden;
    const int64_t state = args.batch * args.hidden;
    Buffers buffers(args.dtype);
    if (args.dtype == MMFAST_FLOAT16 || args.dtype == MMFAST_BFLOAT16 || pick(0, 1)) {
        args.gx = buffers.input(args.batch * rows), args.gh = buffers.maybe(args.batch * rows);
    } else {
        args.x = buffers.input(args.batch * args.input), args.w_ih = buffers.input(rows * args.input);
        args.w_hh = buffers.input(rows * args.hidden);
    }
    args.b_ih = buffers.maybe(rows), args.b_hh = buffers.maybe(rows);
    // without h0, W_hh is not looked at; with the product given, GRU's h0 alone is
    const bool looked_at = !args.gx || args.mode == MMFAST_GRU;
    args.h0 = g_short < 0 ? buffers.maybe(state) : looked_at ? buffers.input(state) : nullptr;
    args.c0 = args.mode == MMFAST_LSTM ? buffers.maybe(state) : nullptr;
    args.h = buffers.output(state), args.c = args.mode == MMFAST_LSTM ? buffers.output(state) : args.h;
    return rnn_cell(args) == MMFAST_OK && buffers.all_written();
}

bool run_product() {
    mmfast_product_args args{};
    args.dtype = int(pick(0, 1)), args.threads = int(pick(1, 3));
    const int64_t m = args.rows = pick(1, 40), n = args.columns = pick(1, 330), k = args.depth = pick(1, 40);
    Buffers buffers(args.dtype);
    args.a = buffers.input(m * k), args.b = buffers.input(k * n), args.bias = buffers.maybe(n);
    args.out = buffers.output(m * n), args.out_row = n;
    const bool a_transposed = pick(0, 1), b_transposed = pick(0, 1);
    args.a_row = a_transposed ? 1 : k, args.a_column = a_transposed ? m : 1;
    args.b_row = b_transposed ? 1 : n, args.b_column = b_transposed ? k : 1;
    return product(args) == MMFAST_OK && buffers.all_written();
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
