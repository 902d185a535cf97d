// Normalisation and activation after a convolution: out = act((y - mean_c) * invstd_c * weight_c + bias_c), and back.
//
// Pointers, shapes and dtypes: mmfast_normalize_args in mmfast.h. Backward, with z the argument of act, xhat = (y -
// mean) * invstd and dz = dout * act'(z):
//     dbias = sum dz      dweight = sum dz * xhat
//     dy = weight * invstd * (dz - [dbias + xhat * dweight] / n)      [...] only where mean and var were measured
//
// A block has a tile: 2048 accesses of 16 bytes (of one element, where rows are no multiples of 16 bytes), 8 a thread.
// Channels last, up to 32 neighbouring threads have neighbouring channels, the others further rows; channels first,
// whole warps have positions of one channel. Sums over a channel go in two stages, in the same order each time: within
// a tile by thread, by a butterfly of the warp and then by warp in float32, over the tiles in float64 by one block a
// channel. The moments of a tile are taken twice over the tile held in registers: mean, then squared deviations (Chan,
// Golub, LeVeque, "Algorithms for Computing the Sample Variance", 1983), and merged.
//
// Bound by memory; n elements of b bytes, flops beside the activation's; the second reads hit the L2 cache where y
// fits:
//     forward, measured    Moments 1 read, Normalize 1 read + 1 write: 3 n b bytes,  7 n flops
//     forward, given       Normalize:                                  2 n b bytes,  3 n flops
//     backward             Sums 2 reads, InputGradient 2 reads + 1 write: 5 n b bytes, 16 n flops
//     activation alone     forward 2 n b bytes, backward 3 n b bytes
// DCGAN's generator at batch 128 in bfloat16 normalises 31.5 MB: at 4.8 TB/s forward 20 us, backward 33 us.
#include "cuda/activation.h"
#include "cuda/device.h"

namespace mmfast {
namespace device {
namespace {

using Args = mmfast_normalize_args;

constexpr int kThreads = 256, kWarps = kThreads / 32, kSlots = 8;

// How the tensors are cut into tiles.
struct Tiles {
    int64_t rows, batch, size;  // rows: batch * size elements of each channel of a set
    int channels, sets;
    int columns;  // channels last: accesses side by side, at most 32; channels first: channels of a block, at most 8
    int64_t tile_rows, parts;
    int channel_tiles;

    int64_t blocks() const { return parts * channel_tiles * sets; }
    // rows of a part: of all but the last as many as a tile has
    MMFAST_DEVICE float rows_of(int64_t part) const {
        const int64_t left = rows - part * tile_rows;
        return float(left < tile_rows ? left : tile_rows);
    }
};

// This thread's part of the block's tile: accesses of V elements, all of a channel or, channels last, of V channels.
template <int V, bool kLast>
struct Tile {
    static constexpr int kChannels = kLast ? V : 1;  // of a thread, from `channel` on
    const Tiles& tiles;
    int64_t part, first_row, sample, position;  // channels first: of the tile's first element
    int set, channel, lane, step;               // slot k has row first_row + (k * step + lane) [* V]
    bool inside;

    MMFAST_DEVICE Tile(const Tiles& tiles) : tiles(tiles) {
        const int64_t rest = block_index() / tiles.parts;
        part = block_index() - rest * tiles.parts;
        set = int(rest / tiles.channel_tiles);
        const int column = int(rest - int64_t(set) * tiles.channel_tiles) * tiles.columns;
        step = kThreads / tiles.columns;
        first_row = part * tiles.tile_rows;
        if constexpr (kLast) {
            lane = thread_index() / tiles.columns;
            channel = (column + thread_index() - lane * tiles.columns) * V;
        } else {
            channel = column + thread_index() / step;
            lane = thread_index() % step;
            sample = first_row / tiles.size;
            position = first_row - sample * tiles.size;
        }
        inside = channel < tiles.channels;
    }
    MMFAST_DEVICE int64_t row(int k) const { return first_row + (k * step + lane) * (kLast ? 1 : V); }
    MMFAST_DEVICE bool has(int k) const { return inside && row(k) < tiles.rows; }
    MMFAST_DEVICE int64_t offset(int k) const {
        if constexpr (kLast) return (set * tiles.rows + row(k)) * tiles.channels + channel;
        const int64_t along = position + (k * step + lane) * V;
        int64_t samples;
        if (tiles.size < 1 << 30)
            samples = uint32_t(along) / uint32_t(tiles.size);
        else  // of which a tile reaches two at most
            samples = along >= tiles.size;
        const int64_t plane = (set * tiles.batch + sample + samples) * tiles.channels + channel;
        return plane * tiles.size + along - samples * tiles.size;
    }
    // where this thread's channels are among (sets, channels)
    MMFAST_DEVICE int64_t at_channel() const { return int64_t(set) * tiles.channels + channel; }
    // whether this thread is the first of those that have its channels
    MMFAST_DEVICE bool leads() const { return inside && lane == 0; }
    MMFAST_DEVICE int64_t at_part(int j) const { return (at_channel() + j) * tiles.parts + part; }

    // The sums over the tile of each channel, in all of its threads. `sums` has kWarps * 32 * kChannels elements, and
    // may be used again after the next barrier.
    MMFAST_DEVICE void sum(float (&x)[kChannels], SharedArray<float> sums) const {
        // of a warp's lanes those with the same channels are `columns` apart
        const int apart = kLast ? tiles.columns : 1;
        MMFAST_UNROLL
        for (int bits = 16; bits > 0; bits /= 2) {
            if (bits < apart) continue;
            MMFAST_UNROLL
            for (int j = 0; j < kChannels; ++j) x[j] += shuffle_xor(x[j], bits);
        }
        const int column = lane_index() & (apart - 1);
        if (lane_index() < apart) {
            MMFAST_UNROLL
            for (int j = 0; j < kChannels; ++j) sums[(warp_index() * apart + column) * kChannels + j] = x[j];
        }
        barrier();
        const int warps = kLast ? kWarps : step / 32;
        const int first = kLast ? 0 : warp_index() / warps * warps;
        MMFAST_UNROLL
        for (int j = 0; j < kChannels; ++j) x[j] = 0;
        for (int w = 0; w < warps; ++w) {
            MMFAST_UNROLL
            for (int j = 0; j < kChannels; ++j) x[j] += sums[((first + w) * apart + column) * kChannels + j];
        }
    }
};
template <int V, bool kLast>
constexpr int kSumsBytes = kWarps * 32 * (kLast ? V : 1) * int(sizeof(float));

template <typename T, int V, bool kLast>
struct Moments {
    static constexpr int kThreads = device::kThreads;
    Tiles tiles;
    Global<const T> y;
    Global<float> means, squares;  // (sets, channels, parts)

    MMFAST_DEVICE void operator()() const {
        using Part = Tile<V, kLast>;
        SharedCursor cursor;
        const SharedArray<float> first = shared_array<float>(cursor, kSumsBytes<V, kLast> / 4);
        const SharedArray<float> second = shared_array<float>(cursor, kSumsBytes<V, kLast> / 4);
        const Part tile(tiles);
        Vector<T, V> kept[kSlots];
        MMFAST_UNROLL
        for (int k = 0; k < kSlots; ++k)
            if (tile.has(k)) kept[k] = load_vector<V>(y, tile.offset(k));
        float mean[Part::kChannels] = {}, square[Part::kChannels] = {};
        MMFAST_UNROLL
        for (int k = 0; k < kSlots; ++k)
            if (tile.has(k)) each<V>([&](int j) { mean[kLast ? j : 0] += to_float(kept[k].at[j]); });
        tile.sum(mean, first);
        const float share = divide(1.0f, tiles.rows_of(tile.part));
        each<Part::kChannels>([&](int j) { mean[j] *= share; });
        MMFAST_UNROLL
        for (int k = 0; k < kSlots; ++k)
            if (tile.has(k))
                each<V>([&](int j) {
                    const float off = to_float(kept[k].at[j]) - mean[kLast ? j : 0];
                    square[kLast ? j : 0] += off * off;
                });
        tile.sum(square, second);
        if (!tile.leads()) return;
        each<Part::kChannels>([&](int j) {
            store(means, tile.at_part(j), mean[j]);
            store(squares, tile.at_part(j), square[j]);
        });
    }
};

constexpr int kMergeThreads = 128;

// the sum over the block, in every thread; `sums` has 32 elements and one more
MMFAST_DEVICE double sum_of_block(double x, SharedArray<double> sums) {
    const double sum = block_sum<kMergeThreads>(x, sums);
    barrier();
    if (thread_index() == 0) sums[32] = sum;
    barrier();
    return sums[32];
}

// mean and var of each channel of each set from its tiles' moments, a block each
struct Merge {
    static constexpr int kThreads = kMergeThreads;
    Tiles tiles;
    Global<const float> means, squares;
    Global<float> mean, var;

    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<double> sums = shared_array<double>(cursor, 33), more = shared_array<double>(cursor, 33);
        const int64_t start = block_index() * tiles.parts;
        double sum = 0;
        for (int64_t i = thread_index(); i < tiles.parts; i += kThreads)
            sum += double(tiles.rows_of(i)) * double(load(means, start + i));
        const double whole = sum_of_block(sum, sums) / double(tiles.rows);
        sum = 0;
        for (int64_t i = thread_index(); i < tiles.parts; i += kThreads) {
            const double off = double(load(means, start + i)) - whole;
            sum += double(load(squares, start + i)) + double(tiles.rows_of(i)) * off * off;
        }
        const double all = sum_of_block(sum, more);
        if (thread_index() != 0) return;
        store(mean, block_index(), float(whole));
        store(var, block_index(), float(all / double(tiles.rows)));
    }
};

// dbias and dweight of each channel of each set from its tiles' sums, a block each
struct AddUp {
    static constexpr int kThreads = kMergeThreads;
    int64_t parts;
    Global<const float> dbias_parts, dweight_parts;
    Global<float> dbias, dweight;

    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<double> sums = shared_array<double>(cursor, 33), more = shared_array<double>(cursor, 33);
        const int64_t start = block_index() * parts;
        double bias = 0, weight = 0;
        for (int64_t i = thread_index(); i < parts; i += kThreads) {
            bias += double(load(dbias_parts, start + i));
            weight += double(load(dweight_parts, start + i));
        }
        bias = sum_of_block(bias, sums);
        weight = sum_of_block(weight, more);
        if (thread_index() != 0) return;
        store(dbias, block_index(), float(bias));
        store(dweight, block_index(), float(weight));
    }
};

// What the norm does to a thread's channels.
template <int N>
struct Affine {
    float mean[N], invstd[N], weight[N], bias[N];
};
struct Parameters {
    Global<const float> mean, var, weight, bias;
    bool has_weight, has_bias;
    float eps;

    template <int N>
    MMFAST_DEVICE Affine<N> at(int64_t at_channel, int channel) const {
        Affine<N> a;
        read(a.mean, mean, at_channel);
        read(a.invstd, var, at_channel);
        each<N>([&](int j) {
            a.invstd[j] = divide(1.0f, sqrt_of(a.invstd[j] + eps));
            a.weight[j] = 1, a.bias[j] = 0;
        });
        if (has_weight) read(a.weight, weight, channel);
        if (has_bias) read(a.bias, bias, channel);
        return a;
    }
};

template <typename T, int V, bool kLast>
struct Normalize {
    static constexpr int kThreads = device::kThreads;
    Tiles tiles;
    Parameters parameters;
    Activation activation;
    Global<const T> y;
    Global<T> out;

    MMFAST_DEVICE void operator()() const {
        const Tile<V, kLast> tile(tiles);
        if (!tile.inside) return;
        const auto a = parameters.at<Tile<V, kLast>::kChannels>(tile.at_channel(), tile.channel);
        MMFAST_NO_UNROLL
        for (int k = 0; k < kSlots; ++k) {
            if (!tile.has(k)) return;
            float u[V];
            read(u, y, tile.offset(k));
            each<V>([&](int j) {
                const int c = kLast ? j : 0;
                u[j] = (u[j] - a.mean[c]) * (a.invstd[c] * a.weight[c]) + a.bias[c];
            });
            activate(activation, u);
            write(out, tile.offset(k), u);
        }
    }
};

// dz of one access, and xhat in the place of y
template <int V, bool kLast, int N>
MMFAST_DEVICE void through_activation(const Affine<N>& a, const Activation& activation, float (&y)[V], float (&d)[V]) {
    float u[V];
    each<V>([&](int j) {
        const int c = kLast ? j : 0;
        y[j] = (y[j] - a.mean[c]) * a.invstd[c];
        u[j] = y[j] * a.weight[c] + a.bias[c];
    });
    activate_backward(activation, u, d);
}

template <typename T, int V, bool kLast>
struct Sums {
    static constexpr int kThreads = device::kThreads;
    Tiles tiles;
    Parameters parameters;
    Activation activation;
    Global<const T> y, dout;
    Global<float> dbias_parts, dweight_parts;  // (sets, channels, parts)

    MMFAST_DEVICE void operator()() const {
        using Part = Tile<V, kLast>;
        SharedCursor cursor;
        const SharedArray<float> first = shared_array<float>(cursor, kSumsBytes<V, kLast> / 4);
        const SharedArray<float> second = shared_array<float>(cursor, kSumsBytes<V, kLast> / 4);
        const Part tile(tiles);
        float dbias[Part::kChannels] = {}, dweight[Part::kChannels] = {};
        if (tile.inside) {
            const auto a = parameters.at<Part::kChannels>(tile.at_channel(), tile.channel);
            MMFAST_NO_UNROLL
            for (int k = 0; k < kSlots && tile.has(k); ++k) {
                float xhat[V], d[V];
                read(xhat, y, tile.offset(k));
                read(d, dout, tile.offset(k));
                through_activation<V, kLast>(a, activation, xhat, d);
                each<V>([&](int j) {
                    dbias[kLast ? j : 0] += d[j];
                    dweight[kLast ? j : 0] += d[j] * xhat[j];
                });
            }
        }
        tile.sum(dbias, first);
        tile.sum(dweight, second);
        if (!tile.leads()) return;
        each<Part::kChannels>([&](int j) {
            store(dbias_parts, tile.at_part(j), dbias[j]);
            store(dweight_parts, tile.at_part(j), dweight[j]);
        });
    }
};

template <typename T, int V, bool kLast>
struct InputGradient {
    static constexpr int kThreads = device::kThreads;
    Tiles tiles;
    Parameters parameters;
    Activation activation;
    Global<const T> y, dout;
    Global<const float> dbias, dweight;
    Global<T> dy;
    float share;  // 1 / rows, or 0 where the moments were given

    MMFAST_DEVICE void operator()() const {
        using Part = Tile<V, kLast>;
        const Part tile(tiles);
        if (!tile.inside) return;
        const auto a = parameters.at<Part::kChannels>(tile.at_channel(), tile.channel);
        float along[Part::kChannels] = {}, across[Part::kChannels] = {};
        if (share > 0) {
            read(along, dbias, tile.at_channel());
            read(across, dweight, tile.at_channel());
        }
        MMFAST_NO_UNROLL
        for (int k = 0; k < kSlots; ++k) {
            if (!tile.has(k)) return;
            float xhat[V], d[V];
            read(xhat, y, tile.offset(k));
            read(d, dout, tile.offset(k));
            through_activation<V, kLast>(a, activation, xhat, d);
            each<V>([&](int j) {
                const int c = kLast ? j : 0;
                if (share > 0) d[j] -= (along[c] + xhat[j] * across[c]) * share;
                d[j] *= a.weight[c] * a.invstd[c];
            });
            write(dy, tile.offset(k), d);
        }
    }
};

// Elements one after the other: out = act(y), or dout * act' by what the forward kept.
template <typename T, bool kBackward>
struct Activate {
    static constexpr int kThreads = device::kThreads, kEach = kVector<T>;
    Activation activation;
    int64_t count;
    Global<const T> y, dout;
    Global<T> out;

    template <int N>
    MMFAST_DEVICE void at(int64_t i) const {
        float u[N];
        read(u, y, i);
        if constexpr (kBackward) {
            float d[N];
            read(d, dout, i);
            activate_backward_from(activation, u, d);
            write(out, i, d);
        } else {
            activate(activation, u);
            write(out, i, u);
        }
    }
    MMFAST_DEVICE void operator()() const {
        const int64_t first = (block_index() * kThreads + thread_index()) * kEach;
        if (first + kEach <= count) return at<kEach>(first);
        MMFAST_NO_UNROLL
        for (int64_t i = first; i < count; ++i) at<1>(i);
    }
};

int power_of_2(int64_t atleast, int most) {
    int n = 1;
    while (n < atleast && n < most) n *= 2;
    return n;
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiles tiles_of(const Args& args, int each) {
    Tiles tiles{};
    tiles.batch = args.batch, tiles.size = args.size;
    tiles.rows = args.batch * args.size;
    tiles.channels = int(args.channels), tiles.sets = int(args.sets);
    int wide = 1;  // channels of a column
    if (args.channels_last) {
        wide = each;
        tiles.columns = power_of_2(args.channels / each, 32);
        tiles.tile_rows = kThreads / tiles.columns * kSlots;
    } else {
        const int threads = power_of_2(ceil_divide(ceil_divide(tiles.rows, each), kSlots), kThreads);
        tiles.columns = kThreads / (threads < 32 ? 32 : threads);
        tiles.tile_rows = int64_t(kThreads) / tiles.columns * each * kSlots;
    }
    tiles.parts = ceil_divide(tiles.rows, tiles.tile_rows);
    tiles.channel_tiles = int(ceil_divide(args.channels, int64_t(tiles.columns) * wide));
    return tiles;
}

// Elements of an access: as many as 16 bytes hold where no access would cross a row.
int each_of(const Args& args) {
    const int whole = args.dtype == MMFAST_FLOAT32 ? 4 : 8;
    return (args.channels_last ? args.channels : args.size) % whole == 0 ? whole : 1;
}

template <typename T>
struct Call {
    const Args& args;
    Buffers buffers;
    Tiles tiles;
    int64_t count, channels;  // elements of y; of mean
    Global<const T> y;
    Parameters parameters{};
    Activation activation;

    Call(const Args& args)
        : args(args),
          tiles(tiles_of(args, each_of(args))),
          count(args.sets * args.batch * args.channels * args.size),
          channels(args.sets * args.channels),
          y(buffers.input<T>(args.y, count)),
          activation{args.activation, float(args.negative_slope)} {
        parameters.eps = float(args.eps);
        parameters.has_weight = args.weight, parameters.has_bias = args.bias;
        if (args.weight) parameters.weight = buffers.input<float>(args.weight, args.channels);
        if (args.bias) parameters.bias = buffers.input<float>(args.bias, args.channels);
    }
    void given() {
        parameters.mean = buffers.input<float>(args.mean, channels);
        parameters.var = buffers.input<float>(args.var, channels);
    }
    // the first or the second half of the scratch
    Global<float> parts(int which) {
        const int64_t n = channels * tiles.parts;
        return buffers.scratch<float>(static_cast<float*>(args.scratch) + which * n, n);
    }

    template <int V, bool kLast>
    int forward() {
        if (!args.measure) given();
        if (args.measure) {
            const Global<float> means = parts(0), squares = parts(1);
            const Global<float> mean = buffers.output<float>(args.mean, channels);
            const Global<float> var = buffers.output<float>(args.var, channels);
            const Moments<T, V, kLast> kernel{tiles, y, means, squares};
            if (const int bad = launch(kernel, tiles.blocks(), 2 * kSumsBytes<V, kLast>, args.stream)) return bad;
            const Merge merge{tiles, as_const(means), as_const(squares), mean, var};
            if (const int bad = launch(merge, channels, 2 * 34 * 8, args.stream)) return bad;
            parameters.mean = as_const(mean), parameters.var = as_const(var);
        }
        if (!args.out) return MMFAST_OK;
        const Normalize<T, V, kLast> kernel{tiles, parameters, activation, y, buffers.output<T>(args.out, count)};
        return launch(kernel, tiles.blocks(), 0, args.stream);
    }

    template <int V, bool kLast>
    int backward() {
        given();
        const Global<const T> dout = buffers.input<T>(args.dout, count);
        const Global<float> dbias_parts = parts(0), dweight_parts = parts(1);
        const Global<float> dbias = buffers.output<float>(args.dbias, channels);
        const Global<float> dweight = buffers.output<float>(args.dweight, channels);
        const Sums<T, V, kLast> sums{tiles, parameters, activation, y, dout, dbias_parts, dweight_parts};
        if (const int bad = launch(sums, tiles.blocks(), 2 * kSumsBytes<V, kLast>, args.stream)) return bad;
        const AddUp add{tiles.parts, as_const(dbias_parts), as_const(dweight_parts), dbias, dweight};
        if (const int bad = launch(add, channels, 2 * 34 * 8, args.stream)) return bad;
        const InputGradient<T, V, kLast> kernel{tiles,
                                                parameters,
                                                activation,
                                                y,
                                                dout,
                                                as_const(dbias),
                                                as_const(dweight),
                                                buffers.output<T>(args.dy, count),
                                                args.measure ? 1.0f / float(tiles.rows) : 0.0f};
        return launch(kernel, tiles.blocks(), 0, args.stream);
    }

    template <int V, bool kLast>
    int run(bool is_forward) {
        return is_forward ? forward<V, kLast>() : backward<V, kLast>();
    }
};

int normalize(const Args& args, bool is_forward) {
    if (args.channels > 0x7fffffff || args.sets > 0x7fffffff)
        return fail(MMFAST_INVALID_ARGUMENT, "the tensors have too many channels or samples");
    if (!are_aligned(args.y, args.weight, args.bias, args.mean, args.var, args.out, args.dout, args.dy, args.dweight,
                     args.dbias))
        return fail(MMFAST_INVALID_ARGUMENT, "a tensor does not begin at a multiple of 16 bytes");
    return with_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        Call<T> call(args);
        int status;
        if (each_of(args) == 1)
            status =
                args.channels_last ? call.template run<1, true>(is_forward) : call.template run<1, false>(is_forward);
        else if (args.channels_last)
            status = call.template run<kVector<T>, true>(is_forward);
        else
            status = call.template run<kVector<T>, false>(is_forward);
        return call.buffers.finish(status);
    });
}

template <bool kBackward>
int activation(const mmfast_activation_args& args) {
    if (!are_aligned(args.y, args.dout, args.out))
        return fail(MMFAST_INVALID_ARGUMENT, "a tensor does not begin at a multiple of 16 bytes");
    return with_type(args.dtype, [&](auto type) {
        using T = decltype(type);
        Buffers buffers;
        Activate<T, kBackward> kernel{};
        kernel.activation = {args.activation, float(args.negative_slope)};
        kernel.count = args.count;
        kernel.y = buffers.input<T>(args.y, args.count);
        if (kBackward) kernel.dout = buffers.input<T>(args.dout, args.count);
        kernel.out = buffers.output<T>(args.out, args.count);
        return buffers.finish(launch(kernel, ceil_divide(args.count, kThreads * kVector<T>), 0, args.stream));
    });
}

}  // namespace
}  // namespace device
}  // namespace mmfast

int64_t mmfast_cuda_normalize_scratch(const mmfast_normalize_args* args) {
    using namespace mmfast::device;
    return 2 * args->sets * args->channels * tiles_of(*args, each_of(*args)).parts;
}

int mmfast_cuda_normalize_forward(const mmfast_normalize_args* args) { return mmfast::device::normalize(*args, true); }

int mmfast_cuda_normalize_backward(const mmfast_normalize_args* args) {
    return mmfast::device::normalize(*args, false);
}

int mmfast_cuda_activation_forward(const mmfast_activation_args* args) {
    return mmfast::device::activation<false>(*args);
}

int mmfast_cuda_activation_backward(const mmfast_activation_args* args) {
    return mmfast::device::activation<true>(*args);
}
