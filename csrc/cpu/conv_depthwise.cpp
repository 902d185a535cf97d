// Depthwise transposed convolution, forward and both gradients.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. Reads x and writes y once: bound by memory,
// or by the caches.
//
// Along the last dimension a position u = o + before of the output is u = stride * q + r, and tap k * dilation =
// stride * shift + r reaches, from input position i, the position q = i + shift of phase r. So each phase is a row of
// its own in which every tap is one contiguous addition; phases are interleaved once, at the end. A channel of one
// sample is one unit of parallel work, its taps added in order: results do not depend on the number of threads.
#include <stdlib.h>

#include "cpu/activation.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_conv_transpose_args;

struct Sizes {
    int64_t taps, positions, in_rows, out_rows, out_positions, phase_length, before;

    Sizes(const Args& a) {
        taps = a.kernel[0] * a.kernel[1] * a.kernel[2];
        in_rows = a.in_size[0] * a.in_size[1];
        positions = in_rows * a.in_size[2];
        out_rows = a.out_size[0] * a.out_size[1];
        out_positions = out_rows * a.out_size[2];
        before = a.before[2];
        // the phases of u = 0 ... out_size + before - 1, and of all that a tap reaches, so that no tap needs clipping
        const int64_t reach = a.in_size[2] + (a.kernel[2] - 1) * a.dilation[2] / a.stride[2];
        const int64_t seen = (a.out_size[2] + before + a.stride[2] - 1) / a.stride[2];
        phase_length = reach > seen ? reach : seen;
    }
};

int threads_for(const Args& args, const Sizes& sizes) {
    return args.batch * args.in_channels * sizes.taps * sizes.positions < 32768 ? 1 : args.threads;
}

// The index along dimension d in the input that tap k brings to o, or -1.
inline int64_t source_of(const Args& args, int d, int64_t o, int64_t k) {
    const int64_t reached = o + args.before[d] - k * args.dilation[d];
    if (reached < 0 || reached % args.stride[d]) return -1;
    const int64_t i = reached / args.stride[d];
    return i < args.in_size[d] ? i : -1;
}

template <typename T>
inline void copy_row(T* to, const T* from, int64_t n) {
    memcpy(to, from, size_t(n) * sizeof(T));
}

// row[stride * q + r] = phases[r][q]
template <typename T>
inline void interleave(T* row, const T* phases, int64_t stride, int64_t length) {
    if (stride == 2) {
        for (int64_t q = 0; q < length; ++q) {
            row[2 * q] = phases[q];
            row[2 * q + 1] = phases[length + q];
        }
        return;
    }
    for (int64_t r = 0; r < stride; ++r)
        for (int64_t q = 0; q < length; ++q) row[stride * q + r] = phases[r * length + q];
}

template <typename T>
inline void deinterleave(T* phases, const T* row, int64_t stride, int64_t length) {
    if (stride == 2) {
        for (int64_t q = 0; q < length; ++q) {
            phases[q] = row[2 * q];
            phases[length + q] = row[2 * q + 1];
        }
        return;
    }
    for (int64_t r = 0; r < stride; ++r)
        for (int64_t q = 0; q < length; ++q) phases[r * length + q] = row[stride * q + r];
}

// sum += weight * row
template <typename T>
inline void add_scaled_row(T* sum, const T* row, T weight, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(sum + i, load(sum + i) + load(row + i) * weight);
    if (i == n) return;
    const int rest = int(n - i);
    store_float(sum + i, load_float(sum + i, rest) + load_float(row + i, rest) * weight, rest);
}

template <typename T>
inline T dot_of_rows(const T* a, const T* b, int64_t n) {
    Vec<T> sum = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) sum += load(a + i) * load(b + i);
    if (i < n) sum += load_float(a + i, int(n - i)) * load_float(b + i, int(n - i));
    return sum_lanes<T>(sum);
}

// Where tap k of the last dimension begins in the phases of a row.
inline int64_t phase_of(const Args& args, const Sizes& sizes, int64_t k) {
    const int64_t reached = k * args.dilation[2];
    return reached % args.stride[2] * sizes.phase_length + reached / args.stride[2];
}

// phases += every tap of the last dimension, for one row of x and one tap of the others
template <typename T>
inline void add_taps(const Args& args, const Sizes& sizes, T* phases, const T* x, const T* weight) {
    for (int64_t k = 0; k < args.kernel[2]; ++k)
        add_scaled_row(phases + phase_of(args, sizes, k), x, weight[k], args.in_size[2]);
}

// One row of the image, act(bias + row), where positions are `step` apart.
template <typename T, typename Activation>
inline void finish_row(T* row, int64_t n, T bias, const Activation& activation, T* image, int64_t step) {
    T* target = step == 1 ? image : row;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int width = n - i < kLanes<T> ? int(n - i) : kLanes<T>;
        store_float(target + i, activation.value(load_float(row + i, width) + bias), width);
    }
    if (step != 1)
        for (int64_t i = 0; i < n; ++i) image[i * step] = row[i];
}

template <typename T>
T* image_at(const Args& args, const Sizes& sizes, int64_t n, int64_t c) {
    T* image = static_cast<T*>(args.y);
    return args.y_channels_last ? image + n * sizes.out_positions * args.in_channels + c
                                : image + (n * args.in_channels + c) * sizes.out_positions;
}

template <typename T>
int forward_of(const Args& args) {
    const Sizes sizes(args);
    const int64_t padded = args.stride[2] * sizes.phase_length;
    const int64_t step = args.y_channels_last ? args.in_channels : 1;
    int status = MMFAST_OK;
    const int bad = with_activation<T>(args.activation, args.negative_slope, [&](const auto& activation) {
        parallel_for(threads_for(args, sizes), args.batch * args.in_channels, [&](int64_t unit) {
            T* phases = static_cast<T*>(malloc(size_t(2 * padded) * sizeof(T)));
            if (!phases) {
                __atomic_store_n(&status, MMFAST_OUT_OF_MEMORY, __ATOMIC_RELAXED);
                return;
            }
            T* row = phases + padded;
            const int64_t c = unit % args.in_channels;
            const T* weight = static_cast<const T*>(args.weight) + c * sizes.taps;
            const T* x = static_cast<const T*>(args.x) + unit * sizes.positions;
            T* image = image_at<T>(args, sizes, unit / args.in_channels, c);
            const T bias = args.bias ? static_cast<const T*>(args.bias)[c] : T(0);
            for (int64_t out_row = 0; out_row < sizes.out_rows; ++out_row) {
                memset(phases, 0, size_t(padded) * sizeof(T));
                for (int64_t kd = 0; kd < args.kernel[0]; ++kd) {
                    const int64_t d = source_of(args, 0, out_row / args.out_size[1], kd);
                    for (int64_t kh = 0; d >= 0 && kh < args.kernel[1]; ++kh) {
                        const int64_t h = source_of(args, 1, out_row % args.out_size[1], kh);
                        if (h < 0) continue;
                        const int64_t tap = (kd * args.kernel[1] + kh) * args.kernel[2];
                        const int64_t position = (d * args.in_size[1] + h) * args.in_size[2];
                        add_taps(args, sizes, phases, x + position, weight + tap);
                    }
                }
                if (args.stride[2] == 1)
                    copy_row(row, phases, padded);
                else
                    interleave(row, phases, args.stride[2], sizes.phase_length);
                T* target = image + out_row * args.out_size[2] * step;
                finish_row(row + sizes.before, args.out_size[2], bias, activation, target, step);
            }
            free(phases);
        });
        return MMFAST_OK;
    });
    return bad ? bad : status;
}

// phases (out_rows, stride, phase_length) of one channel of one sample, zero where the image does not reach
template <typename T>
void split_phases(const Args& args, const Sizes& sizes, const T* image, int64_t step, T* row, T* phases) {
    const int64_t padded = args.stride[2] * sizes.phase_length;
    memset(row, 0, size_t(padded) * sizeof(T));
    for (int64_t r = 0; r < sizes.out_rows; ++r) {
        const T* source = image + r * args.out_size[2] * step;
        if (step == 1)
            copy_row(row + sizes.before, source, args.out_size[2]);
        else
            for (int64_t i = 0; i < args.out_size[2]; ++i) row[sizes.before + i] = source[i * step];
        deinterleave(phases + r * padded, row, args.stride[2], sizes.phase_length);
    }
}

// One row of x and the taps of the last dimension that go from it to the row of dy in phases.
template <typename T>
inline void add_gradients(const Args& args, const Sizes& sizes, const T* phases, const T* x, const T* weight, T* dx,
                          T* dweight) {
    for (int64_t k = 0; k < args.kernel[2]; ++k) {
        const T* window = phases + phase_of(args, sizes, k);
        if (dx) add_scaled_row(dx, window, weight[k], args.in_size[2]);
        if (dweight) dweight[k] += dot_of_rows(x, window, args.in_size[2]);
    }
}

template <typename T>
int backward_of(const Args& args) {
    const Sizes sizes(args);
    const int64_t padded = args.stride[2] * sizes.phase_length;
    const int64_t step = args.y_channels_last ? args.in_channels : 1;
    int status = MMFAST_OK;
    parallel_for(threads_for(args, sizes), args.batch * args.in_channels, [&](int64_t unit) {
        T* phases = static_cast<T*>(malloc(size_t((sizes.out_rows + 1) * padded) * sizeof(T)));
        if (!phases) {
            __atomic_store_n(&status, MMFAST_OUT_OF_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        const int64_t c = unit % args.in_channels;
        const T* image = image_at<T>(args, sizes, unit / args.in_channels, c);
        split_phases(args, sizes, image, step, phases + sizes.out_rows * padded, phases);
        const T* x = static_cast<const T*>(args.x) + unit * sizes.positions;
        const T* weight = static_cast<const T*>(args.weight) + c * sizes.taps;
        T* dx = args.dx ? static_cast<T*>(args.dx) + unit * sizes.positions : nullptr;
        T* dweight = args.dweight ? static_cast<T*>(args.dweight) + unit * sizes.taps : nullptr;
        if (dx) memset(dx, 0, size_t(sizes.positions) * sizeof(T));
        if (dweight) memset(dweight, 0, size_t(sizes.taps) * sizeof(T));
        for (int64_t in_row = 0; in_row < sizes.in_rows; ++in_row) {
            const int64_t begin = in_row * args.in_size[2];
            for (int64_t kd = 0; kd < args.kernel[0]; ++kd) {
                const int64_t d = in_row / args.in_size[1] * args.stride[0] + kd * args.dilation[0] - args.before[0];
                for (int64_t kh = 0; d >= 0 && d < args.out_size[0] && kh < args.kernel[1]; ++kh) {
                    const int64_t h =
                        in_row % args.in_size[1] * args.stride[1] + kh * args.dilation[1] - args.before[1];
                    if (h < 0 || h >= args.out_size[1]) continue;
                    const int64_t tap = (kd * args.kernel[1] + kh) * args.kernel[2];
                    add_gradients(args, sizes, phases + (d * args.out_size[1] + h) * padded, x + begin, weight + tap,
                                  dx ? dx + begin : nullptr, dweight ? dweight + tap : nullptr);
                }
            }
        }
        free(phases);
    });
    return status;
}

// run(a value of args.dtype), where this op has kernels for it
template <typename Run>
int with_type(const Args& args, const Run& run) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return run(float{});
        case MMFAST_FLOAT64:
            return run(double{});
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace

int depthwise_forward(const Args& args) {
    return with_type(args, [&](auto type) { return forward_of<decltype(type)>(args); });
}

int depthwise_backward(const Args& args) {
    return with_type(args, [&](auto type) { return backward_of<decltype(type)>(args); });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
