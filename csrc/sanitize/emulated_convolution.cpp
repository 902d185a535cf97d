// Random transposed convolutions of few output channels, norms and activations for csrc/cuda on the emulator.
#include <algorithm>

#include "sanitize/emulated.h"
#include "sanitize/normalization.h"

using namespace mmfast::sanitize;

namespace {

int any_dtype() { return std::vector<int>{MMFAST_FLOAT32, MMFAST_FLOAT16, MMFAST_BFLOAT16}[size_t(pick(0, 2))]; }

}  // namespace

bool run_emulated_convolution() {
    mmfast_direct_args args{};
    args.dtype = any_dtype(), args.x_channels_last = int32_t(pick(0, 1)), args.y_channels_last = int32_t(pick(0, 1));
    args.batch = pick(1, 3), args.group_out = pick(1, 4), args.groups = pick(0, 1) ? pick(1, 5) : 8 * pick(1, 2);
    const int64_t group_in = pick(0, 2) == 0 ? 8 : pick(1, 5);
    if (pick(0, 1)) args.group_out = 1;
    args.in_channels = args.groups * (args.group_out == 1 && pick(0, 1) ? 1 : group_in);
    draw_window(args);
    args.activation = int32_t(pick(0, 6)), args.negative_slope = 0.2;
    const int64_t x = args.batch * args.in_channels * product_of(args.in_size);
    const int64_t y = args.batch * args.groups * args.group_out * product_of(args.out_size);
    const int64_t weights = product_of(args.kernel) * args.in_channels * args.group_out;
    Buffers buffers(args.dtype), floats(MMFAST_FLOAT32);
    args.x = buffers.input(x), args.weight = buffers.input(weights);
    args.bias = buffers.maybe(args.groups * args.group_out);
    args.y = buffers.output(y);
    if (mmfast_cuda_direct_forward(&args) != MMFAST_OK || !buffers.all_written()) return false;
    args.dy = buffers.input(y), args.dx = buffers.output(x), args.dweight = buffers.output(weights);
    args.scratch = floats.unseen(mmfast_cuda_direct_scratch(&args));
    return mmfast_cuda_direct_backward(&args) == MMFAST_OK && buffers.all_written();
}

bool run_emulated_norm() {
    return run_norm(any_dtype(), mmfast_cuda_normalize_forward, mmfast_cuda_normalize_backward,
                    mmfast_cuda_normalize_scratch) &&
           run_activation(any_dtype(), mmfast_cuda_activation_forward, mmfast_cuda_activation_backward);
}
