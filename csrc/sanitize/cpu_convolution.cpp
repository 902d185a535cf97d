// Random transposed convolutions, norms and activations for the CPU kernels.
#include <algorithm>

#include "sanitize/cpu.h"
#include "sanitize/normalization.h"

using namespace mmfast::sanitize;

namespace mmfast {
namespace MMFAST_ISA {
namespace {

mmfast_conv_transpose_args any_layer() {
    mmfast_conv_transpose_args args{};
    args.dtype = int32_t(pick(0, 1)), args.y_channels_last = int32_t(pick(0, 1)), args.threads = int32_t(pick(1, 3));
    args.batch = pick(1, 3), args.in_channels = pick(1, 20);
    draw_window(args);
    args.activation = int32_t(pick(0, 6)), args.negative_slope = 0.2;
    return args;
}

template <typename Kernel>
bool forward_and_backward(mmfast_conv_transpose_args args, int64_t weights, const Kernel& forward,
                          const Kernel& backward, int64_t dweights, bool any_layout) {
    const int64_t x = args.batch * args.in_channels * product_of(args.in_size);
    const int64_t y = args.batch * args.out_channels * product_of(args.out_size);
    Buffers buffers(args.dtype);
    args.x = buffers.input(x), args.weight = buffers.input(weights), args.bias = buffers.maybe(args.out_channels);
    args.y = buffers.output(y);
    if (forward(args) != MMFAST_OK || !buffers.all_written()) return false;
    args.y = buffers.made(y, true);
    if (!any_layout) args.x_channels_last = 0;
    args.dx = buffers.output(x);
    args.dweight = buffers.output(dweights);
    return backward(args) == MMFAST_OK && buffers.all_written();
}

}  // namespace

bool run_phases() {
    mmfast_conv_transpose_args args = any_layer();
    args.out_channels = pick(1, 20), args.x_channels_last = int32_t(pick(0, 1));
    const int64_t weights = args.in_channels * args.out_channels * product_of(args.kernel);
    return forward_and_backward(args, weights, phases_forward, phases_backward, weights, false);
}

bool run_gather() {
    mmfast_conv_transpose_args args = any_layer();
    args.out_channels = pick(1, 40), args.x_channels_last = int32_t(pick(0, 1));
    const int64_t weights = args.in_channels * args.out_channels * product_of(args.kernel);
    return forward_and_backward(args, weights, gather_forward, gather_backward, weights, true);
}

bool run_squares() {
    mmfast_conv_transpose_args args = any_layer();
    args.out_channels = pick(1, 40), args.x_channels_last = int32_t(pick(0, 1));
    const int lead = int(pick(1, 2));
    for (int i = 0; i < lead; ++i)
        args.in_size[i] = args.out_size[i] = args.kernel[i] = args.stride[i] = args.dilation[i] = 1, args.before[i] = 0;
    for (int i = lead; i < 3; ++i) {
        args.kernel[i] = 2 * args.stride[i], args.dilation[i] = 1;
        const int64_t full = (args.in_size[i] + 1) * args.stride[i];
        // the output ends before the last tap's, there, or beyond it
        args.before[i] = pick_ragged(full - 1), args.out_size[i] = pick(1, full - args.before[i] + 2);
    }
    const int64_t weights = args.in_channels * args.out_channels * product_of(args.kernel);
    return forward_and_backward(args, weights, squares_forward, squares_backward, weights, true);
}

bool run_depthwise() {
    mmfast_conv_transpose_args args = any_layer();
    args.out_channels = args.in_channels;
    if (pick(0, 2) == 0 && g_short < 0) {
        // one dimension, of strides up to more than a vector
        const int64_t s = args.stride[2] = pick(1, 20), k = args.kernel[2] = pick(1, 45);
        const int64_t full = ((args.in_size[2] = pick(1, 40)) - 1) * s + k;
        for (int i = 0; i < 2; ++i) args.in_size[i] = args.out_size[i] = args.kernel[i] = args.stride[i] = 1;
        for (int64_t& dilation : args.dilation) dilation = 1;
        args.before[0] = args.before[1] = 0, args.before[2] = pick(0, full - 1);
        args.out_size[2] = pick(1, full - args.before[2] + 20);
    }
    const int64_t weights = args.in_channels * product_of(args.kernel);
    return forward_and_backward(args, weights, depthwise_forward, depthwise_backward, args.batch * weights, false);
}

bool run_normalization() {
    return run_norm(
               int(pick(0, 3)), [](const mmfast_normalize_args* args) { return normalize_forward(*args); },
               [](const mmfast_normalize_args* args) { return normalize_backward(*args); },
               [](const mmfast_normalize_args*) { return int64_t(0); }) &&
           run_activation(
               int(pick(0, 3)), [](const mmfast_activation_args* args) { return activation_forward(*args); },
               [](const mmfast_activation_args* args) { return activation_backward(*args); });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
