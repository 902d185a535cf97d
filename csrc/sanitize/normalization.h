// Random calls of the norm and of the activation, for the kernels of either device.
#pragma once
#include "sanitize/buffers.h"

namespace mmfast {
namespace sanitize {

inline bool is_wide(int dtype) { return dtype == MMFAST_FLOAT64; }

// scratch: how many floats a call of args needs beside its tensors
template <typename Scratch>
bool run_norm(int dtype, int (*forward)(const mmfast_normalize_args*), int (*backward)(const mmfast_normalize_args*),
              const Scratch& scratch) {
    mmfast_normalize_args args{};
    args.dtype = dtype, args.channels_last = int32_t(pick(0, 1)), args.threads = int32_t(pick(1, 3));
    args.sets = pick(1, 3), args.batch = pick(1, 3), args.channels = pick(0, 1) ? 8 * pick(1, 5) : pick(1, 40);
    args.size = pick(0, 1) ? 8 * pick(1, 8) : pick(1, 70);
    args.activation = int32_t(pick(0, 6)), args.negative_slope = 0.2, args.measure = int32_t(pick(0, 1));
    // of a random variance, which may be less than 0
    args.eps = 4;
    const int64_t count = args.sets * args.batch * args.channels * args.size, moments = args.sets * args.channels;
    Buffers buffers(dtype), wide(is_wide(dtype) ? MMFAST_FLOAT64 : MMFAST_FLOAT32), floats(MMFAST_FLOAT32);
    args.y = buffers.input(count);
    args.weight = wide.maybe(args.channels), args.bias = wide.maybe(args.channels);
    args.mean = wide.made(moments, !args.measure), args.var = wide.made(moments, !args.measure);
    args.out = buffers.output(count);
    if (const int64_t n = scratch(&args)) args.scratch = floats.unseen(n);
    if (forward(&args) != MMFAST_OK || !buffers.all_written() || !wide.all_written()) return false;
    args.dout = buffers.input(count), args.dy = buffers.output(count);
    args.dweight = wide.output(moments), args.dbias = wide.output(moments);
    return backward(&args) == MMFAST_OK && buffers.all_written() && wide.all_written();
}

inline bool run_activation(int dtype, int (*forward)(const mmfast_activation_args*),
                           int (*backward)(const mmfast_activation_args*)) {
    mmfast_activation_args args{};
    args.dtype = dtype, args.activation = int32_t(pick(1, 6)), args.negative_slope = 0.2, args.count = pick(1, 3000);
    args.threads = int32_t(pick(1, 3));
    Buffers buffers(dtype);
    args.y = buffers.input(args.count), args.out = buffers.output(args.count);
    if (forward(&args) != MMFAST_OK || !buffers.all_written()) return false;
    args.dout = buffers.input(args.count), args.out = buffers.output(args.count);
    return backward(&args) == MMFAST_OK && buffers.all_written();
}

// The sizes of a random layer in args: three dimensions, of which the first ones may be 1.
template <typename Args>
void draw_window(Args& args) {
    for (int i = 0; i < 3; ++i) {
        const bool used = i == 2 || pick(0, 1);
        args.in_size[i] = used ? pick(1, i == 2 ? 20 : 6) : 1;
        args.kernel[i] = used ? pick(1, 5) : 1, args.stride[i] = used ? pick(1, 4) : 1;
        args.dilation[i] = used ? pick(1, 3) : 1;
        const int64_t full = (args.in_size[i] - 1) * args.stride[i] + args.dilation[i] * (args.kernel[i] - 1) + 1;
        // where every buffer is to be used, nothing is cut off
        args.before[i] = used ? pick_ragged(full - 1) : 0;
        args.out_size[i] = full - args.before[i];
        if (used) args.out_size[i] = std::max<int64_t>(1, args.out_size[i] - pick_ragged(3)) + pick_ragged(2);
    }
}
inline int64_t product_of(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

}  // namespace sanitize
}  // namespace mmfast
