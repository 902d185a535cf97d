// Normalisation and activation after a convolution: out = act((y - mean_c) * invstd_c * weight_c + bias_c), and back.
//
// Pointers, shapes and dtypes: mmfast_normalize_args in mmfast.h. Measuring forward reads y twice (the second time
// mostly from cache) and writes out; backward reads dout and y twice and writes dy: bound by memory. Channels of short
// rows are read once.
//
// Moments are the corrected two-pass algorithm over chunks that fit the first caches (Chan, Golub, LeVeque, "Algorithms
// for Computing the Sample Variance", 1983), chunks merged in double, in order. Chunks depend on shapes alone, so
// results do not depend on the number of threads. Backward, with z the argument of act, xhat = (y - mean) * invstd and
// dz = dout * act'(z):
//     dbias = sum dz      dweight = sum dz * xhat
//     dy = weight * invstd * (dz - [dbias + xhat * dweight] / n)      [...] only where mean and var were measured
#include <math.h>
#include <stdlib.h>

#include "cpu/activation.h"
#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_normalize_args;

constexpr int64_t kChunkElements = 8192;
constexpr int kGroup = 4;  // vectors a loop holds in registers
// rows summed before they are added to a chunk's sum: short chains of additions lose less
constexpr int64_t kRowBlock = 16;

template <typename C>
inline Vec<C> keep_first(Vec<C> v, int n) {
    C lane[kLanes<C>];
    store(lane, v);
    for (int i = n; i < kLanes<C>; ++i) lane[i] = 0;
    return load(lane);
}

// Count, mean and sum of squared deviations of a set of numbers.
struct Moments {
    double count = 0, mean = 0, squares = 0;

    void add(double n, double chunk_mean, double chunk_squares) {
        const double total = count + n;
        const double delta = chunk_mean - mean;
        mean += delta * (n / total);
        squares += chunk_squares + delta * delta * (count * n / total);
        count = total;
    }
    // residual = sum of (x - about): what the rounding of `about` left
    void add_about(double n, double about, double residual, double square_sum) {
        const double correction = residual / n;
        add(n, about + correction, square_sum - residual * correction);
    }
};

// What one channel's elements go through.
template <typename C, typename V>
struct Affine {
    V mean, invstd, scale, bias;

    V normalized(V y) const { return (y - mean) * invstd; }
    V argument(V y) const { return (y - mean) * scale + bias; }
};

template <typename C>
struct Tables {  // (sets, channels) each
    C* invstd;
    C* scale;
    C* dbias;
    C* dscale;
};

template <typename C>
C at(const void* p, int64_t i, C otherwise) {
    return p ? static_cast<const C*>(p)[i] : otherwise;
}

template <typename C>
C invstd_of(const Args& args, int64_t set_channel) {
    return C(1 / sqrt(double(static_cast<const C*>(args.var)[set_channel]) + args.eps));
}

template <typename C>
Affine<C, Vec<C>> affine_of(const Args& args, int64_t set, int64_t channel) {
    const int64_t i = set * args.channels + channel;
    const C invstd = invstd_of<C>(args, i);
    return {splat(static_cast<const C*>(args.mean)[i]), splat(invstd), splat(invstd * at<C>(args.weight, channel, 1)),
            splat(at<C>(args.bias, channel, 0))};
}

void write_moments(const Args& args, int64_t i, const Moments& m) {
    const double var = m.squares / m.count;
    if (args.dtype == MMFAST_FLOAT64) {
        static_cast<double*>(args.mean)[i] = m.mean;
        static_cast<double*>(args.var)[i] = var;
    } else {
        static_cast<float*>(args.mean)[i] = float(m.mean);
        static_cast<float*>(args.var)[i] = float(var);
    }
}

int threads_for(const Args& args) {
    return args.sets * args.batch * args.channels * args.size < 32768 ? 1 : args.threads;
}

// ---- channels first: a channel's elements are `batch` rows of `size`, `channels * size` apart

// body(vector, lanes in use, offset, j) over rows x size elements; j counts to kGroup, for sums of kGroup terms
template <typename C, typename T, typename Body>
inline void each_vector(const T* y, int64_t rows, int64_t stride, int64_t size, const Body& body) {
    constexpr int kWidth = kLanes<C>;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = r * stride;
        int64_t i = 0;
        // unrolled, that the sums be registers
        for (; i + kGroup * kWidth <= size; i += kGroup * kWidth)
#pragma GCC unroll 4
            for (int j = 0; j < kGroup; ++j)
                body(load_float(y + row + i + j * kWidth, kWidth), kWidth, row + i + j * kWidth, j);
        for (int j = 0; i < size; i += kWidth, ++j) {
            const int width = size - i < kWidth ? int(size - i) : kWidth;
            body(load_float(y + row + i, width), width, row + i, j);
        }
    }
}

template <typename C>
inline double sum_group(const Vec<C>* sum) {
    return double(sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// chunk(offset, rows, size): a channel in pieces of about kChunkElements
template <typename Body>
void each_chunk(const Args& args, const Body& chunk) {
    const int64_t stride = args.channels * args.size;
    const int64_t rows = args.size >= kChunkElements ? 1 : kChunkElements / args.size;
    for (int64_t r = 0; r < args.batch; r += rows)
        for (int64_t i = 0; i < args.size; i += kChunkElements)
            chunk(r * stride + i, rows < args.batch - r ? rows : args.batch - r,
                  kChunkElements < args.size - i ? kChunkElements : args.size - i);
}

template <typename T, typename C>
void add_chunk(Moments& moments, const T* y, int64_t rows, int64_t stride, int64_t size) {
    const double n = double(rows * size);
    Vec<C> sum[kGroup] = {};
    each_vector<C>(y, rows, stride, size, [&](Vec<C> v, int, int64_t, int j) { sum[j] += v; });
    const C about = C(sum_group<C>(sum) / n);
    Vec<C> residual[kGroup] = {}, squares[kGroup] = {};
    each_vector<C>(y, rows, stride, size, [&](Vec<C> v, int width, int64_t, int j) {
        Vec<C> d = v - about;
        if (width < kLanes<C>) d = keep_first<C>(d, width);
        residual[j] += d;
        squares[j] += d * d;
    });
    moments.add_about(n, double(about), sum_group<C>(residual), sum_group<C>(squares));
}

template <typename Body>
void each_channel(const Args& args, const Body& body) {
    parallel_for(threads_for(args), args.sets * args.channels, [&](int64_t i) {
        const int64_t set = i / args.channels, channel = i % args.channels;
        body(set, channel, (set * args.batch * args.channels + channel) * args.size);
    });
}

// Whether a channel is read once, into memory of its own: its rows are as far apart as all channels' together, often a
// power of two, where most share a set of each cache, and what is read again comes from memory again.
template <typename C>
bool is_gathered(const Args& args) {
    return args.batch > 1 && args.size <= 8 * kLanes<C> && args.batch * args.size <= kChunkElements;
}

// body(offset, place, lanes in use) over a channel; place: among its elements. The channel after is fetched from
// `ahead`.
template <typename C, typename Body, typename... T>
inline void each_of_channel(const Args& args, const Body& body, const T*... ahead) {
    for (int64_t r = 0; r < args.batch; ++r)
        for (int64_t i = 0; i < args.size; i += kLanes<C>) {
            const int64_t o = r * args.channels * args.size + i;
            (__builtin_prefetch(ahead + o + args.size), ...);
            body(o, r * args.size + i, args.size - i < kLanes<C> ? int(args.size - i) : kLanes<C>);
        }
}

template <typename T, typename C, typename Activation>
int forward_channels_first(const Args& args, const Activation& activation) {
    const int64_t stride = args.channels * args.size;
    each_channel(args, [&](int64_t set, int64_t channel, int64_t offset) {
        const T* y = static_cast<const T*>(args.y) + offset;
        T* out = static_cast<T*>(args.out) + (args.out ? offset : 0);
        alignas(64) C gathered[kChunkElements];
        const bool is_read = args.measure && is_gathered<C>(args);
        if (args.measure) {
            Moments moments;
            if (is_read) {
                each_of_channel<C>(
                    args,
                    [&](int64_t o, int64_t place, int width) {
                        store_float(gathered + place, load_float(y + o, width), width);
                    },
                    y);
                add_chunk<C, C>(moments, gathered, 1, 0, args.batch * args.size);
            } else {
                each_chunk(args, [&](int64_t start, int64_t rows, int64_t size) {
                    add_chunk<T, C>(moments, y + start, rows, stride, size);
                });
            }
            write_moments(args, set * args.channels + channel, moments);
        }
        if (!args.out) return;
        const auto affine = affine_of<C>(args, set, channel);
        const auto result = [&](Vec<C> v) { return activation.value(affine.argument(v)); };
        if (is_read)
            each_of_channel<C>(args, [&](int64_t o, int64_t place, int width) {
                store_float(out + o, result(load_float(gathered + place, width)), width);
            });
        else
            each_vector<C>(y, args.batch, stride, args.size,
                           [&](Vec<C> v, int width, int64_t o, int) { store_float(out + o, result(v), width); });
    });
    return MMFAST_OK;
}

template <typename T, typename C, typename Activation>
int backward_channels_first(const Args& args, const Activation& activation) {
    const int64_t stride = args.channels * args.size;
    const double count = double(args.batch * args.size);
    each_channel(args, [&](int64_t set, int64_t channel, int64_t offset) {
        const T* y = static_cast<const T*>(args.y) + offset;
        const T* dout = static_cast<const T*>(args.dout) + offset;
        T* dy = static_cast<T*>(args.dy) + offset;
        const auto affine = affine_of<C>(args, set, channel);
        const auto dargument = [&](Vec<C> v, int width, int64_t o) {
            return activation.gradient(load_float(dout + o, width), affine.argument(v));
        };
        alignas(64) C dz[kChunkElements], xhat[kChunkElements];
        double dbias = 0, dweight = 0;
        if (is_gathered<C>(args)) {
            each_of_channel<C>(
                args,
                [&](int64_t o, int64_t place, int width) {
                    const Vec<C> v = load_float(y + o, width);
                    store_float(dz + place, dargument(v, width, o), width);
                    store_float(xhat + place, affine.normalized(v), width);
                },
                y, dout);
            Vec<C> dz_sum[kGroup] = {}, product_sum[kGroup] = {};
            each_vector<C>(dz, 1, 0, args.batch * args.size, [&](Vec<C> v, int width, int64_t o, int j) {
                dz_sum[j] += v;
                product_sum[j] += v * load_float(xhat + o, width);
            });
            dbias = sum_group<C>(dz_sum);
            dweight = sum_group<C>(product_sum);
        } else {
            each_chunk(args, [&](int64_t start, int64_t rows, int64_t size) {
                Vec<C> dz_sum[kGroup] = {}, product_sum[kGroup] = {};
                each_vector<C>(y + start, rows, stride, size, [&](Vec<C> v, int width, int64_t o, int j) {
                    Vec<C> dz = dargument(v, width, start + o);
                    Vec<C> product = dz * affine.normalized(v);
                    if (width < kLanes<C>) {
                        // dead lanes hold a zero gradient times a slope and xhat that may not be finite
                        dz = keep_first<C>(dz, width);
                        product = keep_first<C>(product, width);
                    }
                    dz_sum[j] += dz;
                    product_sum[j] += product;
                });
                dbias += sum_group<C>(dz_sum);
                dweight += sum_group<C>(product_sum);
            });
        }
        const int64_t i = set * args.channels + channel;
        static_cast<C*>(args.dbias)[i] = C(dbias);
        static_cast<C*>(args.dweight)[i] = C(dweight);
        const Vec<C> bias_part = splat(C(dbias / count)), weight_part = splat(C(dweight / count));
        const auto store_dy = [&](Vec<C> dz, Vec<C> xhat, int width, int64_t o) {
            // not by a factor of 0: xhat may be infinite
            if (args.measure) dz = dz - bias_part - xhat * weight_part;
            store_float(dy + o, affine.scale * dz, width);
        };
        if (is_gathered<C>(args))
            each_of_channel<C>(args, [&](int64_t o, int64_t place, int width) {
                store_dy(load_float(dz + place, width), load_float(xhat + place, width), width, o);
            });
        else
            each_vector<C>(y, args.batch, stride, args.size, [&](Vec<C> v, int width, int64_t o, int) {
                store_dy(dargument(v, width, o), affine.normalized(v), width, o);
            });
    });
    return MMFAST_OK;
}

// ---- channels last: a set is batch * size rows of `channels`

template <typename C>
inline int lanes_left(int64_t channels, int64_t c) {
    return channels - c < kLanes<C> ? int(channels - c) : kLanes<C>;
}

// Vectors of channels. Where channels are no multiple of a vector the last one overlaps the one before, for a store of
// some lanes takes many times as long: a row is loaded before it is stored, which may be in place.
template <typename C, int kVectors>
struct Group {
    static constexpr int count = kVectors;
    int64_t first, last;
    int lanes;  // of the only vector

    int64_t at(int j) const { return j + 1 < kVectors ? first + j * kLanes<C> : last; }
};

// body(group) over the channels, kGroup vectors at a time, but for a last one that would be alone and have to overlap
template <typename C, typename Body>
inline void each_channel_group(int64_t channels, const Body& body) {
    constexpr int L = kLanes<C>;
    int64_t c = 0;
    const auto next = [&](auto group) {
        const int64_t end = c + decltype(group)::count * L;
        body(decltype(group){c, (channels < end && L < channels ? channels : end) - L, lanes_left<C>(channels, c)});
        c = end;
    };
    const int64_t vectors = (channels + L - 1) / L, pair = channels % L && vectors % kGroup == 1 ? 2 : 0;
    while (c / L + kGroup + pair <= vectors) next(Group<C, kGroup>{});
    const int64_t left = vectors - c / L;
    if (left == 3 || left == 5) next(Group<C, 3>{});
    if (left == 2 || left == 5) next(Group<C, 2>{});
    if (left == 1) next(Group<C, 1>{});
}

// add(r, sums) over the rows, adding to kSums sums in blocks of kRowBlock rows
template <int kSums, typename V, typename Body>
inline void sum_rows(int64_t rows, V* total, const Body& add) {
    for (int64_t r = 0; r < rows;) {
        const int64_t end = r + kRowBlock < rows ? r + kRowBlock : rows;
        V sum[kSums] = {};
        for (; r < end; ++r) add(r, sum);
#pragma GCC unroll 8
        for (int j = 0; j < kSums; ++j) total[j] += sum[j];
    }
}

struct RowChunks {
    int64_t rows_per_set, rows, per_set;
    RowChunks(const Args& args) : rows_per_set(args.batch * args.size) {
        rows = kChunkElements / args.channels;
        if (rows < 16) rows = 16;
        per_set = (rows_per_set + rows - 1) / rows;
    }
    // the set, the first row in it and the number of rows of chunk i
    int64_t set(int64_t i) const { return i / per_set; }
    int64_t first(int64_t i) const { return i % per_set * rows; }
    int64_t count(int64_t i) const {
        const int64_t left = rows_per_set - first(i);
        return left < rows ? left : rows;
    }
};

template <typename C>
Affine<C, Vec<C>> affine_at(const Args& args, const C* scale, const C* invstd, int64_t set, int64_t c) {
    const int lanes = lanes_left<C>(args.channels, c);
    const int64_t i = set * args.channels + c;
    return {load_float(static_cast<const C*>(args.mean) + i, lanes), load_float(invstd + i, lanes),
            load_float(scale + i, lanes),
            args.bias ? load_float(static_cast<const C*>(args.bias) + c, lanes) : Vec<C>{}};
}

// a group's vectors of a row
template <typename C, typename T, int kVectors>
inline void load_row(const T* p, const Group<C, kVectors>& group, Vec<C>* v) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) v[j] = load_float(p + group.at(j), kVectors == 1 ? group.lanes : kLanes<C>);
}
template <typename C, typename T, int kVectors>
inline void store_row(T* p, const Group<C, kVectors>& group, const Vec<C>* v) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_float(p + group.at(j), v[j], kVectors == 1 ? group.lanes : kLanes<C>);
}

// about, residual, squares: (channels,) each
template <typename T, typename C>
void chunk_moments(const T* y, int64_t rows, int64_t channels, C* about, C* residual, C* squares) {
    each_channel_group<C>(channels, [&](auto group) {
        constexpr int kVectors = decltype(group)::count;
        Vec<C> v[kVectors], mean[kVectors] = {}, rest[2 * kVectors] = {};
        sum_rows<kVectors>(rows, mean, [&](int64_t r, Vec<C>* sum) {
            load_row(y + r * channels, group, v);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sum[j] += v[j];
        });
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) mean[j] = mean[j] / C(rows);
        sum_rows<2 * kVectors>(rows, rest, [&](int64_t r, Vec<C>* sum) {
            load_row(y + r * channels, group, v);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                const Vec<C> d = v[j] - mean[j];
                sum[j] += d;
                sum[kVectors + j] += d * d;
            }
        });
        store_row(about, group, mean);
        store_row(residual, group, rest);
        store_row(squares, group, rest + kVectors);
    });
}

template <typename T, typename C>
int measure_channels_last(const Args& args, const RowChunks& chunks) {
    const int64_t count = args.sets * chunks.per_set;
    C* parts = static_cast<C*>(malloc(size_t(count * args.channels * 3) * sizeof(C)));
    if (!parts) return MMFAST_OUT_OF_MEMORY;
    parallel_for(threads_for(args), count, [&](int64_t i) {
        const T* y =
            static_cast<const T*>(args.y) + (chunks.set(i) * chunks.rows_per_set + chunks.first(i)) * args.channels;
        C* part = parts + i * args.channels * 3;
        chunk_moments<T, C>(y, chunks.count(i), args.channels, part, part + args.channels, part + 2 * args.channels);
    });
    parallel_for(threads_for(args), args.sets * args.channels, [&](int64_t i) {
        const int64_t set = i / args.channels;
        Moments moments;
        for (int64_t k = set * chunks.per_set; k < (set + 1) * chunks.per_set; ++k) {
            const C* part = parts + k * args.channels * 3 + i % args.channels;
            moments.add_about(double(chunks.count(k)), double(part[0]), double(part[args.channels]),
                              double(part[2 * args.channels]));
        }
        write_moments(args, i, moments);
    });
    free(parts);
    return MMFAST_OK;
}

template <typename C>
void fill_scales(const Args& args, C* invstd, C* scale) {
    for (int64_t i = 0; i < args.sets * args.channels; ++i) {
        invstd[i] = invstd_of<C>(args, i);
        scale[i] = invstd[i] * at<C>(args.weight, i % args.channels, 1);
    }
}

template <typename T, typename C, typename Activation>
int forward_channels_last(const Args& args, const Activation& activation) {
    const RowChunks chunks(args);
    if (args.measure)
        if (int status = measure_channels_last<T, C>(args, chunks)) return status;
    if (!args.out) return MMFAST_OK;
    const int64_t sets_channels = args.sets * args.channels;
    C* invstd = static_cast<C*>(malloc(size_t(2 * sets_channels) * sizeof(C)));
    if (!invstd) return MMFAST_OUT_OF_MEMORY;
    C* scale = invstd + sets_channels;
    fill_scales(args, invstd, scale);
    parallel_for(threads_for(args), args.sets * chunks.per_set, [&](int64_t i) {
        const int64_t start = (chunks.set(i) * chunks.rows_per_set + chunks.first(i)) * args.channels;
        const T* y = static_cast<const T*>(args.y) + start;
        T* out = static_cast<T*>(args.out) + start;
        each_channel_group<C>(args.channels, [&](auto group) {
            constexpr int kVectors = decltype(group)::count;
            Affine<C, Vec<C>> affine[kVectors];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j)
                affine[j] = affine_at<C>(args, scale, invstd, chunks.set(i), group.at(j));
            for (int64_t r = 0; r < chunks.count(i); ++r) {
                Vec<C> v[kVectors];
                load_row(y + r * args.channels, group, v);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) v[j] = activation.value(affine[j].argument(v[j]));
                store_row(out + r * args.channels, group, v);
            }
        });
    });
    free(invstd);
    return MMFAST_OK;
}

template <typename T, typename C, typename Activation>
int backward_channels_last(const Args& args, const Activation& activation) {
    const RowChunks chunks(args);
    const int64_t channels = args.channels, sets_channels = args.sets * channels;
    const int64_t count = args.sets * chunks.per_set;
    C* invstd = static_cast<C*>(malloc(size_t(4 * sets_channels + 2 * count * channels) * sizeof(C)));
    if (!invstd) return MMFAST_OUT_OF_MEMORY;
    C* scale = invstd + sets_channels;
    C* bias_part = scale + sets_channels;
    C* weight_part = bias_part + sets_channels;
    C* sums = weight_part + sets_channels;
    fill_scales(args, invstd, scale);

    parallel_for(threads_for(args), count, [&](int64_t i) {
        const int64_t start = (chunks.set(i) * chunks.rows_per_set + chunks.first(i)) * channels;
        const T* y = static_cast<const T*>(args.y) + start;
        const T* dout = static_cast<const T*>(args.dout) + start;
        C* sum = sums + i * 2 * channels;
        each_channel_group<C>(channels, [&](auto group) {
            constexpr int kVectors = decltype(group)::count;
            Affine<C, Vec<C>> affine[kVectors];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j)
                affine[j] = affine_at<C>(args, scale, invstd, chunks.set(i), group.at(j));
            Vec<C> v[kVectors], d[kVectors], total[2 * kVectors] = {};
            sum_rows<2 * kVectors>(chunks.count(i), total, [&](int64_t r, Vec<C>* part) {
                load_row(y + r * channels, group, v);
                load_row(dout + r * channels, group, d);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) {
                    const Vec<C> dz = activation.gradient(d[j], affine[j].argument(v[j]));
                    part[j] += dz;
                    part[kVectors + j] += dz * affine[j].normalized(v[j]);
                }
            });
            store_row(sum, group, total);
            store_row(sum + channels, group, total + kVectors);
        });
    });

    const double n = double(chunks.rows_per_set);
    for (int64_t i = 0; i < sets_channels; ++i) {
        const int64_t set = i / channels;
        double dbias = 0, dweight = 0;
        for (int64_t k = set * chunks.per_set; k < (set + 1) * chunks.per_set; ++k) {
            dbias += double(sums[k * 2 * channels + i % channels]);
            dweight += double(sums[(k * 2 + 1) * channels + i % channels]);
        }
        static_cast<C*>(args.dbias)[i] = C(dbias);
        static_cast<C*>(args.dweight)[i] = C(dweight);
        bias_part[i] = C(dbias / n);
        weight_part[i] = C(dweight / n);
    }

    parallel_for(threads_for(args), count, [&](int64_t i) {
        const int64_t start = (chunks.set(i) * chunks.rows_per_set + chunks.first(i)) * channels;
        const T* y = static_cast<const T*>(args.y) + start;
        const T* dout = static_cast<const T*>(args.dout) + start;
        T* dy = static_cast<T*>(args.dy) + start;
        each_channel_group<C>(channels, [&](auto group) {
            constexpr int kVectors = decltype(group)::count;
            Affine<C, Vec<C>> affine[kVectors];
            Vec<C> bias_mean[kVectors], weight_mean[kVectors], v[kVectors], d[kVectors];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j)
                affine[j] = affine_at<C>(args, scale, invstd, chunks.set(i), group.at(j));
            load_row(bias_part + chunks.set(i) * channels, group, bias_mean);
            load_row(weight_part + chunks.set(i) * channels, group, weight_mean);
            for (int64_t r = 0; r < chunks.count(i); ++r) {
                load_row(y + r * channels, group, v);
                load_row(dout + r * channels, group, d);
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) {
                    Vec<C> dz = activation.gradient(d[j], affine[j].argument(v[j]));
                    if (args.measure) dz = dz - bias_mean[j] - affine[j].normalized(v[j]) * weight_mean[j];
                    d[j] = affine[j].scale * dz;
                }
                store_row(dy + r * channels, group, d);
            }
        });
    });
    free(invstd);
    return MMFAST_OK;
}

template <typename T, typename C>
int forward(const Args& args) {
    return with_activation<C>(args.activation, args.negative_slope, [&](const auto& activation) {
        return args.channels_last ? forward_channels_last<T, C>(args, activation)
                                  : forward_channels_first<T, C>(args, activation);
    });
}

template <typename T, typename C>
int backward(const Args& args) {
    return with_activation<C>(args.activation, args.negative_slope, [&](const auto& activation) {
        return args.channels_last ? backward_channels_last<T, C>(args, activation)
                                  : backward_channels_first<T, C>(args, activation);
    });
}

// ---- activation alone

constexpr int64_t kActivationChunk = 16384;

// body(the activation, first element, elements up to a vector's)
template <typename C, typename Body>
int each_element(const mmfast_activation_args& args, const Body& body) {
    const int64_t chunks = (args.count + kActivationChunk - 1) / kActivationChunk;
    return with_activation<C>(args.activation, args.negative_slope, [&](const auto& activation) {
        parallel_for(chunks < 3 ? 1 : args.threads, chunks, [&](int64_t chunk) {
            const int64_t next = (chunk + 1) * kActivationChunk;
            const int64_t end = next < args.count ? next : args.count;
            for (int64_t i = chunk * kActivationChunk; i < end; i += kLanes<C>)
                body(activation, i, end - i < kLanes<C> ? int(end - i) : kLanes<C>);
        });
        return MMFAST_OK;
    });
}

template <typename T, typename C>
int activation_forward_of(const mmfast_activation_args& args) {
    const T* y = static_cast<const T*>(args.y);
    T* out = static_cast<T*>(args.out);
    return each_element<C>(args, [&](const auto& activation, int64_t i, int n) {
        store_float(out + i, activation.value(load_float(y + i, n)), n);
    });
}

template <typename T, typename C>
int activation_backward_of(const mmfast_activation_args& args) {
    const T* y = static_cast<const T*>(args.y);
    const T* dout = static_cast<const T*>(args.dout);
    T* out = static_cast<T*>(args.out);
    return each_element<C>(args, [&](const auto& activation, int64_t i, int n) {
        store_float(out + i, activation.gradient_from(load_float(dout + i, n), load_float(y + i, n)), n);
    });
}

}  // namespace

#define MMFAST_BY_DTYPE(function)                  \
    switch (args.dtype) {                          \
        case MMFAST_FLOAT32:                       \
            return function<float, float>(args);   \
        case MMFAST_FLOAT64:                       \
            return function<double, double>(args); \
        case MMFAST_FLOAT16:                       \
            return function<Half, float>(args);    \
        case MMFAST_BFLOAT16:                      \
            return function<Bf16, float>(args);    \
        default:                                   \
            return MMFAST_INVALID_ARGUMENT;        \
    }

int normalize_forward(const mmfast_normalize_args& args) { MMFAST_BY_DTYPE(forward) }
int normalize_backward(const mmfast_normalize_args& args) { MMFAST_BY_DTYPE(backward) }
int activation_forward(const mmfast_activation_args& args) { MMFAST_BY_DTYPE(activation_forward_of) }
int activation_backward(const mmfast_activation_args& args) { MMFAST_BY_DTYPE(activation_backward_of) }

}  // namespace MMFAST_ISA
}  // namespace mmfast
