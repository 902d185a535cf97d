// The transposed convolution with few output channels a group, 1 to 4: RGB layers, depthwise and small groups, for
// which matrix units have no use; and its two gradients.
//
//     y[n, g O + c, o] = act(bias + sum over ci, k, i with i * stride + k * dilation = o + before of
//                            x[n, g I + ci, i] * weight[k, g I + ci, c]),   I = Cin / groups, O = Cout / groups
//
// Pointers, shapes and layouts: mmfast_direct_args in mmfast.h. Along each dimension u = o + before has the phase r = u
// mod stride, whose taps are first + j * period, j = 0, 1, ..., period = stride / gcd(stride, dilation); they read i =
// source - j * step, step = dilation / gcd: no tap is tried in vain. Grid: samples, and a thread for each access of 16
// bytes along one of three axes (or for each element, where no axis is a multiple of that):
//     positions    of y or dx, that are contiguous: several sums along a row, x or dy read by element from the cache
//     channels     depthwise, channels last: a sum for each of neighbouring channels
//     inputs       x channels last, I a multiple: y's thread adds up vectors of x; dx's thread has a vector of it
// Weight's gradient: a warp has one tap of one input channel (or a vector of them) and kRows input positions of all
// samples; its sums are added up in float64 by a second launch, in the same order each time.
//
// Floor, with N |x| input positions: bytes are those of x, y and weight once; flops forward and of each gradient 2 N
// |x| Cin O taps (k4 s2 p1: a quarter of the products at each of four times the positions). 64>3 k4 s2 p1 @32, batch
// 128: 0.8 GFLOP, 20 MB in bfloat16: 4.2 us at 4.8 TB/s, but 13 us at 60 TFLOP/s of float32 arithmetic, by which it is
// bound. Depthwise 512 channels k4 s2 at 64, batch 8: 1.6 MB, 2 MFLOP: bound by memory and by the launch, as are small
// groups.
//
// 64-bit offsets to the sample, 32-bit ones within: samples are below 2^31 elements.
#include "cuda/activation.h"
#include "cuda/device.h"

namespace mmfast {
namespace device {
namespace {

using Args = mmfast_direct_args;

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = 4096;

enum Axis { kPositions, kChannels, kInputs };

struct Dimension {
    int in, out, kernel, stride, dilation, before;
    int period, gcd, inverse, step;

    // The first tap of output position o, at least `kernel` where it has none, and the input position that it reads.
    struct Taps {
        int first, source;
    };
    MMFAST_DEVICE Taps taps_of(int o) const {
        const int u = o + before, phase = u % stride;
        const int first = phase % gcd == 0 ? phase / gcd * inverse % period : kernel;
        return {first, (u - first * dilation) / stride};
    }
    // where tap k brings input position i to
    MMFAST_DEVICE int target(int i, int k) const { return i * stride + k * dilation - before; }
};
MMFAST_DEVICE bool is_within(int i, int size) { return uint32_t(i) < uint32_t(size); }

// How a tensor is laid out: elements from one position, channel and sample to the next.
struct Layout {
    int position, channel;
    int64_t sample;
};

// What all kernels know.
struct Geometry {
    Dimension d, h, w;
    Layout x, y;
    int in_channels, group_in, groups;

    MMFAST_DEVICE int input(int i_d, int i_h, int i_w) const { return (i_d * h.in + i_h) * w.in + i_w; }
    MMFAST_DEVICE int output(int o_d, int o_h, int o_w) const { return (o_d * h.out + o_h) * w.out + o_w; }
    MMFAST_DEVICE int tap(int k_d, int k_h, int k_w) const { return (k_d * h.kernel + k_h) * w.kernel + k_w; }
};

// Of one sample: what a thread has, of so many rows of so many positions in tiles, and of tiles of channels.
struct Items {
    int rows, row_tiles, channel_tiles, blocks;  // blocks a sample
    bool channels_first_fastest;                 // neighbouring threads have neighbouring channels

    struct Item {
        int64_t sample;
        int row, at, channel_tile;  // at: of the row's tiles
        bool inside;
    };
    MMFAST_DEVICE Item find() const {
        const int sample = int(block_index()) / blocks;
        const int i = (int(block_index()) - sample * blocks) * kThreads + thread_index();
        const int positions = rows * row_tiles;
        const int tile = channels_first_fastest ? i % channel_tiles : i / positions;
        const int position = channels_first_fastest ? i / channel_tiles : i % positions;
        const int row = position / row_tiles;
        return {sample, row, position - row * row_tiles, tile, row < rows && tile < channel_tiles};
    }
};

template <typename T, int kOut, int V, int kAxis>
struct Forward {
    static constexpr int kThreads = device::kThreads, kBlocksAtOnce = 2;
    static constexpr int kAlong = kAxis == kPositions ? V : 1, kWide = kAxis == kChannels ? V : kOut;
    Geometry geometry;
    Items items;
    Activation activation;
    Global<const T> x, weight, bias;
    Global<T> y;
    bool has_bias;

    // sum += one tap's products, the products of all inputs of the group first added to each other
    MMFAST_DEVICE void add_tap(float (&sum)[kWide], Global<const T> from, int group, int tap, int position) const {
        const int channel = group * geometry.group_in;
        const int i = position * geometry.x.position + channel * geometry.x.channel;
        const int w = (tap * geometry.in_channels + channel) * kOut;
        float a[V], b[V * kOut], products[kWide] = {};
        if constexpr (kAxis == kChannels) {
            read(a, from, i);
            read(b, weight, w);
            each<V>([&](int j) { sum[j] += a[j] * b[j]; });
        } else if constexpr (kAxis == kInputs) {
            MMFAST_NO_UNROLL
            for (int ci = 0; ci < geometry.group_in; ci += V) {
                read(a, from, i + ci);
                read(b, weight, w + ci * kOut);
                each<V>([&](int j) { each<kOut>([&](int c) { products[c] += a[j] * b[j * kOut + c]; }); });
            }
            each<kOut>([&](int c) { sum[c] += products[c]; });
        } else {
            for (int ci = 0; ci < geometry.group_in; ++ci) {
                const float value = to_float(load(from, i + ci * geometry.x.channel));
                each<kOut>([&](int c) { products[c] += value * to_float(load(weight, w + ci * kOut + c)); });
            }
            each<kOut>([&](int c) { sum[c] += products[c]; });
        }
    }

    MMFAST_DEVICE void operator()() const {
        const Geometry& g = geometry;
        const Items::Item item = items.find();
        if (!item.inside) return;
        const int o_d = item.row / g.h.out, o_h = item.row - o_d * g.h.out, o_w = item.at * kAlong;
        const int group = item.channel_tile * (kAxis == kChannels ? V : 1);
        const Global<const T> from = x + item.sample * g.x.sample;
        float sums[kAlong][kWide] = {};
        const Dimension::Taps along_d = g.d.taps_of(o_d), along_h = g.h.taps_of(o_h);
        MMFAST_UNROLL
        for (int v = 0; v < kAlong; ++v) {
            const Dimension::Taps along_w = g.w.taps_of(o_w + v);
            MMFAST_NO_UNROLL
            for (int k_d = along_d.first, i_d = along_d.source; k_d < g.d.kernel; k_d += g.d.period, i_d -= g.d.step) {
                if (!is_within(i_d, g.d.in)) continue;
                MMFAST_NO_UNROLL
                for (int k_h = along_h.first, i_h = along_h.source; k_h < g.h.kernel;
                     k_h += g.h.period, i_h -= g.h.step) {
                    if (!is_within(i_h, g.h.in)) continue;
                    MMFAST_NO_UNROLL
                    for (int k_w = along_w.first, i_w = along_w.source; k_w < g.w.kernel;
                         k_w += g.w.period, i_w -= g.w.step)
                        if (is_within(i_w, g.w.in))
                            add_tap(sums[v], from, group, g.tap(k_d, k_h, k_w), g.input(i_d, i_h, i_w));
                }
            }
        }
        const Global<T> to = y + item.sample * g.y.sample;
        const int at = g.output(o_d, o_h, o_w) * g.y.position, channel = group * kOut;
        if constexpr (kAxis == kChannels) {
            if (has_bias) {
                float b[V];
                read(b, bias, channel);
                each<V>([&](int j) { sums[0][j] += b[j]; });
            }
            activate(activation, sums[0]);
            write(to, at + channel * g.y.channel, sums[0]);
        } else {
            MMFAST_UNROLL
            for (int c = 0; c < kOut; ++c) {
                const float b = has_bias ? to_float(load(bias, channel + c)) : 0.0f;
                float row[kAlong];
                each<kAlong>([&](int v) { row[v] = sums[v][c] + b; });
                activate(activation, row);
                write(to, at + (channel + c) * g.y.channel, row);
            }
        }
    }
};

template <typename T, int kOut, int V, int kAxis>
struct Input {
    static constexpr int kThreads = device::kThreads, kBlocksAtOnce = 2;
    static constexpr int kAlong = kAxis == kPositions ? V : 1;
    Geometry geometry;
    Items items;
    Global<const T> dy, weight;
    Global<T> dx;

    MMFAST_DEVICE void operator()() const {
        const Geometry& g = geometry;
        const Items::Item item = items.find();
        if (!item.inside) return;
        const int i_d = item.row / g.h.in, i_h = item.row - i_d * g.h.in, i_w = item.at * kAlong;
        const int channel = item.channel_tile * (kAxis == kPositions ? 1 : V);
        const int group = channel / g.group_in;
        const Global<const T> from = dy + (item.sample * g.y.sample + int64_t(group) * kOut * g.y.channel);
        float sums[V] = {};
        MMFAST_NO_UNROLL
        for (int k_d = 0; k_d < g.d.kernel; ++k_d) {
            const int o_d = g.d.target(i_d, k_d);
            if (!is_within(o_d, g.d.out)) continue;
            MMFAST_NO_UNROLL
            for (int k_h = 0; k_h < g.h.kernel; ++k_h) {
                const int o_h = g.h.target(i_h, k_h);
                if (!is_within(o_h, g.h.out)) continue;
                MMFAST_NO_UNROLL
                for (int k_w = 0; k_w < g.w.kernel; ++k_w) {
                    float b[(kAxis == kPositions ? 1 : V) * kOut];
                    const int w = (g.tap(k_d, k_h, k_w) * g.in_channels + channel) * kOut;
                    if constexpr (kAxis == kPositions)
                        each<kOut>([&](int c) { b[c] = to_float(load(weight, w + c)); });
                    else
                        read(b, weight, w);
                    MMFAST_UNROLL
                    for (int v = 0; v < kAlong; ++v) {
                        const int o_w = g.w.target(i_w + v, k_w);
                        if (!is_within(o_w, g.w.out)) continue;
                        const int at = g.output(o_d, o_h, o_w) * g.y.position;
                        if constexpr (kAxis == kChannels) {
                            float d[V];
                            read(d, from, at);
                            each<V>([&](int j) { sums[j] += d[j] * b[j]; });
                        } else {
                            MMFAST_UNROLL
                            for (int c = 0; c < kOut; ++c) {
                                const float d = to_float(load(from, at + c * g.y.channel));
                                if constexpr (kAxis == kPositions)
                                    sums[v] += d * b[c];
                                else
                                    each<V>([&](int j) { sums[j] += d * b[j * kOut + c]; });
                            }
                        }
                    }
                }
            }
        }
        const int at = g.input(i_d, i_h, i_w) * g.x.position + channel * g.x.channel;
        write(dx + item.sample * g.x.sample, at, sums);
    }
};

template <typename T, int kOut, int V, int kAxis>
struct Weight {
    static constexpr int kThreads = device::kThreads, kBlocksAtOnce = 2;
    Geometry geometry;
    int taps, channel_tiles;
    int64_t rows, parts;  // rows: batch * input positions
    Global<const T> x, dy;
    Global<float> sums;  // (parts, taps, Cin, kOut)

    MMFAST_DEVICE void operator()() const {
        const Geometry& g = geometry;
        const int64_t item = block_index() * kWarps + warp_index();
        const int64_t part = item / (int64_t(taps) * channel_tiles);
        if (part >= parts) return;
        const int rest = int(item - part * taps * channel_tiles);
        const int channel = rest / taps * V, tap = rest % taps;
        const int group = channel / g.group_in;
        const int k_w = tap % g.w.kernel, k_h = tap / g.w.kernel % g.h.kernel, k_d = tap / g.w.kernel / g.h.kernel;
        const int positions = g.d.in * g.h.in * g.w.in;
        const int64_t first_row = part * kRows, first_sample = first_row / positions;
        const int first = int(first_row - first_sample * positions);
        const int64_t left = rows - first_row;
        const int count = left < kRows ? int(left) : kRows;
        float sum[V * kOut] = {};
        MMFAST_NO_UNROLL
        for (int r = lane_index(); r < count; r += 32) {
            const uint32_t row = uint32_t(first) + uint32_t(r);
            const int samples = int(row / uint32_t(positions)), i = int(row - uint32_t(samples) * uint32_t(positions));
            const int i_w = i % g.w.in, i_h = i / g.w.in % g.h.in, i_d = i / g.w.in / g.h.in;
            const int o_d = g.d.target(i_d, k_d), o_h = g.h.target(i_h, k_h), o_w = g.w.target(i_w, k_w);
            if (!is_within(o_d, g.d.out) || !is_within(o_h, g.h.out) || !is_within(o_w, g.w.out)) continue;
            const int64_t sample = first_sample + samples;
            float a[V];
            read(a, x + sample * g.x.sample, i * g.x.position + channel * g.x.channel);
            const Global<const T> d = dy + sample * g.y.sample;
            const int at = g.output(o_d, o_h, o_w) * g.y.position + group * kOut * g.y.channel;
            if constexpr (kAxis == kChannels) {
                float b[V];
                read(b, d, at);
                each<V>([&](int j) { sum[j] += a[j] * b[j]; });
            } else {
                MMFAST_UNROLL
                for (int c = 0; c < kOut; ++c) {
                    const float b = to_float(load(d, at + c * g.y.channel));
                    each<V>([&](int j) { sum[j * kOut + c] += a[j] * b; });
                }
            }
        }
        each<V * kOut>([&](int j) { sum[j] = warp_sum(sum[j]); });
        if (lane_index() != 0) return;
        const int64_t at = ((part * taps + tap) * g.in_channels + channel) * kOut;
        each<V * kOut>([&](int j) { store(sums, at + j, sum[j]); });
    }
};

// The parts' sums, a thread an element.
template <typename T>
struct AddUp {
    static constexpr int kThreads = device::kThreads;
    int64_t count, parts;
    Global<const float> sums;
    Global<T> dweight;

    MMFAST_DEVICE void operator()() const {
        const int64_t i = block_index() * kThreads + thread_index();
        if (i >= count) return;
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += double(load(sums, part * count + i));
        store(dweight, i, from_float<T>(float(sum)));
    }
};

int gcd_of(int a, int b) { return b == 0 ? a : gcd_of(b, a % b); }

Dimension dimension(const Args& args, int i) {
    Dimension d{};
    d.in = int(args.in_size[i]), d.out = int(args.out_size[i]), d.kernel = int(args.kernel[i]);
    d.stride = int(args.stride[i]), d.dilation = int(args.dilation[i]), d.before = int(args.before[i]);
    d.gcd = gcd_of(d.stride, d.dilation);
    d.period = d.stride / d.gcd, d.step = d.dilation / d.gcd;
    while (d.inverse < d.period && d.inverse * int64_t(d.step) % d.period != 1 % d.period) ++d.inverse;
    return d;
}

int64_t product(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

Layout layout_of(int64_t channels, int64_t positions, bool last) {
    return {last ? int(channels) : 1, last ? 1 : int(positions), channels * positions};
}

template <typename T, int kOut>
struct Call {
    const Args& args;
    Buffers buffers;
    Geometry geometry;
    int64_t out_channels, in_positions, out_positions, taps;
    Global<const T> weight;

    Call(const Args& args)
        : args(args),
          geometry{dimension(args, 0),
                   dimension(args, 1),
                   dimension(args, 2),
                   {},
                   {},
                   int(args.in_channels),
                   int(args.in_channels / args.groups),
                   int(args.groups)},
          out_channels(args.groups * kOut),
          in_positions(product(args.in_size)),
          out_positions(product(args.out_size)),
          taps(product(args.kernel)) {
        geometry.x = layout_of(args.in_channels, in_positions, args.x_channels_last);
        geometry.y = layout_of(out_channels, out_positions, args.y_channels_last);
        if (args.weight) weight = buffers.input<T>(args.weight, taps * args.in_channels * kOut);
    }

    bool by_inputs() const { return args.x_channels_last && geometry.group_in % kVector<T> == 0; }
    bool by_channels() const {
        return kOut == 1 && geometry.group_in == 1 && args.groups % kVector<T> == 0 && args.x_channels_last &&
               args.y_channels_last;
    }

    static Items items(int64_t rows, int64_t row, int64_t channels, int along, int wide, bool last) {
        Items items{int(rows), int(row / along), int(channels / wide), 0, last};
        items.blocks = int((int64_t(items.rows) * items.row_tiles * items.channel_tiles + kThreads - 1) / kThreads);
        return items;
    }

    template <int V, int kAxis>
    int forward() {
        Forward<T, kOut, V, kAxis> kernel{};
        kernel.geometry = geometry;
        kernel.items = items(args.out_size[0] * args.out_size[1], args.out_size[2], args.groups,
                             kAxis == kPositions ? V : 1, kAxis == kChannels ? V : 1, args.y_channels_last);
        kernel.activation = {args.activation, float(args.negative_slope)};
        kernel.x = buffers.input<T>(args.x, args.batch * geometry.x.sample);
        kernel.weight = weight;
        kernel.has_bias = args.bias != nullptr;
        if (args.bias) kernel.bias = buffers.input<T>(args.bias, out_channels);
        kernel.y = buffers.output<T>(args.y, args.batch * geometry.y.sample);
        return launch(kernel, args.batch * kernel.items.blocks, 0, args.stream);
    }
    int forward() {
        constexpr int V = kVector<T>;
        if constexpr (kOut == 1) {
            if (by_channels()) return forward<V, kChannels>();
        }
        if (by_inputs()) return forward<V, kInputs>();
        const bool whole = !args.y_channels_last && args.out_size[2] % V == 0;
        return whole ? forward<V, kPositions>() : forward<1, kPositions>();
    }

    template <int V, int kAxis>
    int input() {
        Input<T, kOut, V, kAxis> kernel{};
        kernel.geometry = geometry;
        kernel.items = items(args.in_size[0] * args.in_size[1], args.in_size[2], args.in_channels,
                             kAxis == kPositions ? V : 1, kAxis == kPositions ? 1 : V, args.x_channels_last);
        kernel.dy = buffers.input<T>(args.dy, args.batch * geometry.y.sample);
        kernel.weight = weight;
        kernel.dx = buffers.output<T>(args.dx, args.batch * geometry.x.sample);
        return launch(kernel, args.batch * kernel.items.blocks, 0, args.stream);
    }
    int input() {
        constexpr int V = kVector<T>;
        if constexpr (kOut == 1) {
            if (by_channels()) return input<V, kChannels>();
        }
        if (by_inputs()) return input<V, kInputs>();
        const bool whole = !args.x_channels_last && args.in_size[2] % V == 0;
        return whole ? input<V, kPositions>() : input<1, kPositions>();
    }

    template <int V, int kAxis>
    int weights() {
        const int64_t count = taps * args.in_channels * kOut;
        Weight<T, kOut, V, kAxis> kernel{};
        kernel.geometry = geometry;
        kernel.taps = int(taps), kernel.channel_tiles = int(args.in_channels / V);
        kernel.rows = args.batch * in_positions;
        kernel.parts = (kernel.rows + kRows - 1) / kRows;
        kernel.x = buffers.input<T>(args.x, args.batch * geometry.x.sample);
        kernel.dy = buffers.input<T>(args.dy, args.batch * geometry.y.sample);
        kernel.sums = buffers.scratch<float>(args.scratch, kernel.parts * count);
        const int64_t warps = kernel.parts * taps * kernel.channel_tiles;
        if (const int bad = launch(kernel, (warps + kWarps - 1) / kWarps, 0, args.stream)) return bad;
        const AddUp<T> add{count, kernel.parts, as_const(kernel.sums), buffers.output<T>(args.dweight, count)};
        return launch(add, (count + kThreads - 1) / kThreads, 0, args.stream);
    }
    int weights() {
        constexpr int V = kVector<T>;
        if constexpr (kOut == 1) {
            if (by_channels()) return weights<V, kChannels>();
        }
        return by_inputs() ? weights<V, kInputs>() : weights<1, kPositions>();
    }
};

// f(a Call of the type and of the output channels a group), where the kernels take these sizes
template <typename F>
int with_call(const Args& args, const F& f) {
    constexpr int64_t kMost = 0x7fffffff, kLong = 1 << 30;
    for (int i = 0; i < 3; ++i)
        if (args.out_size[i] + args.before[i] + args.kernel[i] * args.dilation[i] > kLong ||
            args.in_size[i] * args.stride[i] + args.kernel[i] * args.dilation[i] > kLong)
            return fail(MMFAST_INVALID_ARGUMENT, "a dimension is too long");
    if (args.in_channels * product(args.in_size) > kMost - kThreads ||
        args.groups * args.group_out * product(args.out_size) > kMost - kThreads ||
        args.in_channels * args.group_out * product(args.kernel) > kMost)
        return fail(MMFAST_INVALID_ARGUMENT, "a sample or the weight has 2^31 elements or more");
    if (!are_aligned(args.x, args.weight, args.bias, args.y, args.dy, args.dx, args.dweight))
        return fail(MMFAST_INVALID_ARGUMENT, "a tensor does not begin at a multiple of 16 bytes");
    return with_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        switch (args.group_out) {
            case 1: {
                Call<T, 1> call(args);
                return call.buffers.finish(f(call));
            }
            case 2: {
                Call<T, 2> call(args);
                return call.buffers.finish(f(call));
            }
            case 3: {
                Call<T, 3> call(args);
                return call.buffers.finish(f(call));
            }
            case 4: {
                Call<T, 4> call(args);
                return call.buffers.finish(f(call));
            }
            default:
                return fail(MMFAST_INVALID_ARGUMENT, "a group has more than 4 output channels");
        }
    });
}

}  // namespace
}  // namespace device
}  // namespace mmfast

int64_t mmfast_cuda_direct_scratch(const mmfast_direct_args* args) {
    using namespace mmfast::device;
    const int64_t rows = args->batch * product(args->in_size);
    return (rows + kRows - 1) / kRows * product(args->kernel) * args->in_channels * args->group_out;
}

int mmfast_cuda_direct_forward(const mmfast_direct_args* args) {
    return mmfast::device::with_call(*args, [](auto& call) { return call.forward(); });
}

int mmfast_cuda_direct_backward(const mmfast_direct_args* args) {
    return mmfast::device::with_call(*args, [&](auto& call) {
        if (args->dx)
            if (const int bad = call.input()) return bad;
        return args->dweight ? call.weights() : int(MMFAST_OK);
    });
}
