// Depthwise transposed convolution, forward and both gradients.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. Reads x and writes y once: bound by memory,
// or by the caches.
//
// In one dimension, the audio models' case, rows are read where they are: Line, backward_line. Else:
//
// Along the last dimension a tap reaches phase r of the output (conv_geometry.h), so each phase is a row of its own, a
// sum of shifted rows of x, and phases are interleaved once, at the end. Rows are copied between zeros, so that no tap
// needs clipping; a zero times what is not finite is NaN where the formula has no term, and so such weights, and such
// gradients of the weight, are declined. Some channels of one sample are one unit of parallel work, and sums are added
// in a fixed order: results do not depend on the number of threads.
#include "cpu/activation.h"
#include "cpu/conv_geometry.h"
#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_conv_transpose_args;

constexpr int64_t kChannels = 16;     // of one sample, or of two: a cache line of y channels last
constexpr int64_t kParts = 8;         // for each thread
constexpr int64_t kCached = 4 << 10;  // elements of some channels' rows, in the first-level cache
constexpr int64_t kFewProducts = 16;  // that are made one by one
constexpr int kTaps = 4;              // whose sums are in registers at the same time

int threads_for(const Args& args, const Problem& problem) {
    return args.batch * args.in_channels * problem.taps * problem.positions < 32768 ? 1 : args.threads;
}

// What a tap reads from the rows of a channel on, and the tap.
struct Term {
    int64_t offset, tap;
};

// What some channels share.
template <typename T>
struct Memory {
    T* rows;        // of each channel, zero before the first ones
    T* line;        // a row of y
    T* weights;     // one for each tap
    Term* terms;    // likewise
    T** phases;     // one for each phase of the last dimension
    int64_t* ends;  // likewise
};

// body(units, memory) for some channels at a time, each with `size` elements of rows. They first fill their rows and
// then read them: what is read across the bounds of what was written has to be in the cache, and gets there only after
// all that was written before, such as results on their way to memory.
template <typename T, typename Body>
int each_group(const Args& args, const Problem& problem, int64_t size, const Body& body) {
    const int threads = threads_for(args, problem);
    const int64_t units = args.batch * args.in_channels;
    const int64_t part_size = parts_of(parts_of(units, kChannels), kParts * most(1, threads)) * kChannels;
    const int64_t together = most(1, least(kChannels, kCached / size));
    return parallel_status(threads, parts_of(units, part_size), [&](int64_t part) {
        Scratch<T> elements(together * size + problem.axis[2].out + problem.taps);
        Scratch<Term> terms(problem.taps);
        Scratch<T*> phases(args.stride[2]);
        Scratch<int64_t> ends(args.stride[2]);
        if (!elements.get() || !terms.get() || !phases.get() || !ends.get()) return MMFAST_OUT_OF_MEMORY;
        clear(elements.get(), together * size);
        T *line = elements.get() + together * size, *weights = line + problem.axis[2].out;
        const Memory<T> memory{elements.get(), line, weights, terms.get(), phases.get(), ends.get()};
        const int64_t end = least(units, (part + 1) * part_size);
        for (int64_t first = part * part_size; first < end; first += together)
            body(Range{first, least(end, first + together)}, memory);
        return MMFAST_OK;
    });
}

template <typename T>
Image<T> image_of(const Args& args, const Problem& problem) {
    return {static_cast<T*>(args.y), args.in_channels, problem.out_positions, bool(args.y_channels_last)};
}

// A row of x that taps bring to a row of y, or of y to x, and the first of these taps.
struct Source {
    int64_t row, tap;
};

// What the rows of one side get from the other's, and the taps of the last dimension, by phase: the same for all units.
class Plan {
  public:
    Plan(const Problem& problem, bool forward)
        : rows_(forward ? problem.axis[0].out * problem.axis[1].out : problem.axis[0].in * problem.axis[1].in),
          sources_(rows_ * problem.axis[0].kernel * problem.axis[1].kernel),
          ends_(rows_),
          taps_(problem.axis[2].kernel),
          phase_ends_(problem.axis[2].stride) {
        if (!made()) return;
        const Axis &outer = problem.axis[0], &middle = problem.axis[1], &inner = problem.axis[2];
        const int64_t size = forward ? middle.out : middle.in, other = forward ? middle.in : middle.out;
        int64_t found = 0;
        for (int64_t row = 0; row < rows_; ++row) {
            for (int64_t k0 = 0; k0 < outer.kernel; ++k0)
                for (int64_t k1 = 0; k1 < middle.kernel; ++k1) {
                    const int64_t a = joined(outer, row / size, k0, forward),
                                  b = joined(middle, row % size, k1, forward);
                    if (a < 0 || b < 0) continue;
                    sources_.get()[found++] = {a * other + b, (k0 * middle.kernel + k1) * inner.kernel};
                }
            ends_.get()[row] = found;
        }
        found = 0;
        for (int64_t r = 0; r < inner.stride; ++r) {
            for (int64_t k = 0; k < inner.kernel; ++k)
                if (inner.phase(k) == r) taps_.get()[found++] = {inner.shift(k), k};
            phase_ends_.get()[r] = found;
        }
    }
    bool made() const { return sources_.get() && ends_.get() && taps_.get() && phase_ends_.get(); }
    // body(source) for the sources of a row
    template <typename Body>
    void each(int64_t row, const Body& body) const {
        for (int64_t i = row ? ends_.get()[row - 1] : 0; i < ends_.get()[row]; ++i) body(sources_.get()[i]);
    }
    // body(shift and number of the tap) for the taps of a phase of the last dimension
    template <typename Body>
    void each_tap(int64_t phase, const Body& body) const {
        for (int64_t i = phase ? phase_ends_.get()[phase - 1] : 0; i < phase_ends_.get()[phase]; ++i)
            body(taps_.get()[i]);
    }

  private:
    // The index along an axis that tap k joins with `at`, or -1.
    static int64_t joined(const Axis& axis, int64_t at, int64_t k, bool forward) {
        if (!forward) {
            const int64_t o = at * axis.stride + k * axis.dilation - axis.before;
            return o < axis.out ? o : -1;
        }
        const int64_t reached = at + axis.before - k * axis.dilation;
        if (reached < 0 || reached % axis.stride) return -1;
        return reached / axis.stride < axis.in ? reached / axis.stride : -1;
    }

    int64_t rows_;
    Scratch<Source> sources_;
    Scratch<int64_t> ends_;
    Scratch<Source> taps_;
    Scratch<int64_t> phase_ends_;
};

// Whether x is read where it is: one dimension, neighbouring taps.
bool is_line(const Args& args, const Problem& problem) {
    const Axis& axis = problem.axis[2];
    // of an axis of one position in and out, the tap may reach none
    const bool reached = problem.axis[0].before == 0 && problem.axis[1].before == 0;
    return problem.taps == axis.kernel && problem.positions == axis.in && problem.out_positions == axis.out &&
           axis.dilation == 1 && reached && !args.y_channels_last;
}

// A channel's y in one dimension, by vectors of outputs: output q * stride + r - before is the sum over t of
// x[q - t] w[t * stride + r]. kLanes positions q are `stride` vectors of outputs; in the j-th of them lane l has
// position spread[j][l] of these, phase[j][l], and the taps of that phase.
template <typename T>
class Line {
    using V = Vec<T>;
    using B = Bits<T>;
    static constexpr int L = kLanes<T>;

  public:
    explicit Line(const Axis& axis)
        : axis_(axis),
          whole_(axis.kernel / axis.stride),
          rest_(int(axis.kernel % axis.stride)),
          spread_(axis.stride),
          phase_(axis.stride),
          taps_((whole_ + 1) * axis.stride) {
        for (int64_t j = 0; made() && j < axis.stride; ++j)
            for (int l = 0; l < L; ++l) {
                spread_.get()[j][l] = (j * L + l) / axis.stride;
                phase_.get()[j][l] = (j * L + l) % axis.stride;
            }
    }
    bool made() const { return spread_.get() && phase_.get() && taps_.get(); }

    template <typename Activation>
    void run(const T* x, const T* w, T bias, T* y, const Activation& activation) const {
        const int64_t s = axis_.stride;
        // of positions from begin up to end, every tap has its x, and every output is one
        const int64_t begin = most(axis_.reach, parts_of(axis_.before, s));
        const int64_t end = least(axis_.in, (axis_.out + axis_.before) / s);
        const bool none = begin + L > end;
        // few phases' taps are read where they are, and those of few products
        const bool by_phase = s > 1 && s <= 4;
        if (!by_phase || !is_few(none ? axis_.q_end - axis_.q_first : most(begin - axis_.q_first, axis_.q_end - end)))
            for (int64_t k = 0; k < axis_.kernel; k += s)
                for (int64_t j = 0; j < s; ++j) taps_.get()[k + j] = taps_of_phases(w, k, phase_.get()[j]);
        if (none) return at_an_end(x, w, bias, y, axis_.q_first, axis_.q_end, activation);
        at_an_end(x, w, bias, y, axis_.q_first, begin, activation);
        if (s == 2)
            inside_by_phase<2>(x, w, bias, y, begin, end, activation);
        else if (s == 3)
            inside_by_phase<3>(x, w, bias, y, begin, end, activation);
        else if (s == 4)
            inside_by_phase<4>(x, w, bias, y, begin, end, activation);
        else if (axis_.kernel == 2 * s)
            inside<2>(x, bias, y, begin, end, activation);
        else
            inside<0>(x, bias, y, begin, end, activation);
        at_an_end(x, w, bias, y, end, axis_.q_end, activation);
    }

  private:
    bool is_few(int64_t positions) const { return positions * axis_.kernel <= kFewProducts; }

    V taps_of_phases(const T* w, int64_t k, B phase) const {
        if (axis_.stride <= L) return V(__builtin_shuffle(load_partial(w + k, int(least(axis_.kernel - k, L))), phase));
        V taps = {};
        for (int l = 0; l < L; ++l)
            if (k + phase[l] < axis_.kernel) taps[l] = w[k + phase[l]];
        return taps;
    }

    // of positions that all have every tap's x and every output
    template <int kWhole, typename Activation>
    void inside(const T* x, T bias, T* y, int64_t first, int64_t last, const Activation& activation) const {
        const int64_t s = axis_.stride, whole = kWhole ? kWhole : whole_;
        const B *const spread = spread_.get(), *const phase = phase_.get();
        const V* const taps = taps_.get();
        y -= axis_.before;
        for (int64_t q = first; q < last; q += L) {
            // the last ones overlap the ones before
            const int64_t at = least(q, last - L);
            V v[kWhole ? kWhole : 1];
            for (int t = 0; t < kWhole; ++t) v[t] = load(x + at - t);
            for (int64_t j = 0; j < s; ++j) {
                V sum = splat(bias);
#pragma GCC unroll 2
                for (int64_t t = 0; t < whole; ++t)
                    sum += V(__builtin_shuffle(kWhole ? v[t] : load(x + at - t), spread[j])) * taps[t * s + j];
                if (!kWhole && rest_) {
                    const V of_rest = V(__builtin_shuffle(load(x + at - whole), spread[j])) * taps[whole * s + j];
                    sum += kept(of_rest, phase[j] < rest_);
                }
                store(y + at * s + j * L, activation.value(sum));
            }
        }
    }

    // the same of few phases, each a vector of its own until it is stored
    template <int kStride, typename Activation>
    void inside_by_phase(const T* x, const T* w, T bias, T* y, int64_t first, int64_t last,
                         const Activation& activation) const {
        const int64_t kernel = axis_.kernel;
        y -= axis_.before;
        for (int64_t q = first; q < last; q += L) {
            const int64_t at = least(q, last - L);
            V sum[kStride];
#pragma GCC unroll 4
            for (int r = 0; r < kStride; ++r) sum[r] = splat(bias);
            const T* from = x + at;
            int64_t k = 0;
            for (; k + kStride <= kernel; k += kStride, --from) {
                const V v = load(from);
#pragma GCC unroll 4
                for (int r = 0; r < kStride; ++r) sum[r] += v * w[k + r];
            }
#pragma GCC unroll 4
            for (int r = 0; r < kStride; ++r)
                if (k + r < kernel) sum[r] += load(from) * w[k + r];
#pragma GCC unroll 4
            for (int r = 0; r < kStride; ++r) sum[r] = activation.value(sum[r]);
            store_interleaved<T, kStride>(y + at * kStride, sum);
        }
    }

    // of positions that may lack some
    template <typename Activation>
    void at_an_end(const T* x, const T* w, T bias, T* y, int64_t first, int64_t last,
                   const Activation& activation) const {
        const int64_t s = axis_.stride, sets = whole_ + (rest_ > 0), out = least(axis_.out, last * s - axis_.before);
        if (is_few(last - first)) {
            for (int64_t q = first; q < last; ++q)
                for (int64_t r = 0; r < s; ++r) {
                    const int64_t o = q * s + r - axis_.before;
                    T sum = bias;
                    for (int64_t k = r, i = q; k < axis_.kernel; k += s, --i)
                        if (i >= 0 && i < axis_.in) sum += x[i] * w[k];
                    if (o >= 0 && o < axis_.out) y[o] = activation.value(splat(sum))[0];
                }
            return;
        }
        for (int64_t at = first; at < last; at += L)
            for (int64_t j = 0; j < s; ++j) {
                const int64_t o = at * s - axis_.before + j * L, before = most(0, -o), end = least(L, out - o);
                if (before >= end) continue;
                V sum = splat(bias);
                for (int64_t t = 0; t < sets; ++t) {
                    const int64_t low = most(0, t - at), count = least(L, axis_.in - at + t) - low;
                    if (count <= 0) continue;
                    const B from = spread_.get()[j] - int(low);
                    const V v = V(__builtin_shuffle(load_partial(x + at - t + low, int(count)), from));
                    B present = (from >= 0) & (from < int(count));
                    if (t == whole_) present &= phase_.get()[j] < rest_;
                    sum += kept(v * taps_.get()[t * s + j], present);
                }
                B lane;
                for (int l = 0; l < L; ++l) lane[l] = l;
                const V moved = V(__builtin_shuffle(activation.value(sum), lane + int(before)));
                store_float(y + o + before, moved, int(end - before));
            }
    }

    // 0 where there is no product: not a product with 0, for the other factor may be infinite
    static V kept(V product, B where) { return V(B(product) & where); }

    const Axis& axis_;
    int64_t whole_;  // sets of `stride` taps
    int rest_;       // taps of the set that is not whole
    Scratch<B> spread_, phase_;
    Scratch<V> taps_;
};

// body(first, last unit of a part) for a part a thread, by its status
template <typename Body>
int each_share(const Args& args, const Problem& problem, const Body& body) {
    const int64_t units = args.batch * args.in_channels;
    const int threads = threads_for(args, problem);
    return parallel_status(threads, threads,
                           [&](int64_t part) { return body(units * part / threads, units * (part + 1) / threads); });
}

template <typename T>
int forward_lines(const Args& args, const Problem& problem) {
    const Axis& axis = problem.axis[2];
    return with_activation<T>(args.activation, args.negative_slope, [&](const auto& activation) {
        return each_share(args, problem, [&](int64_t unit, int64_t end) -> int {
            const Line<T> line(axis);
            if (!line.made()) return MMFAST_OUT_OF_MEMORY;
            for (; unit < end; ++unit) {
                const int64_t c = unit % args.in_channels;
                const T bias = args.bias ? static_cast<const T*>(args.bias)[c] : T(0);
                line.run(static_cast<const T*>(args.x) + unit * axis.in,
                         static_cast<const T*>(args.weight) + c * axis.kernel, bias,
                         static_cast<T*>(args.y) + unit * axis.out, activation);
            }
            return MMFAST_OK;
        });
    });
}

template <typename T>
int forward_of(const Args& args) {
    const Problem problem(args);
    constexpr int L = kLanes<T>;
    const Axis *axis = problem.axis, &inner = axis[2];
    if (is_line(args, problem)) return forward_lines<T>(args, problem);
    if (!all_finite(static_cast<const T*>(args.weight), args.in_channels * problem.taps)) return MMFAST_DECLINED;
    const Plan plan(problem, true);
    if (!plan.made()) return MMFAST_OUT_OF_MEMORY;
    const int64_t in_rows = axis[0].in * axis[1].in;
    const int64_t width = inner.reach + most(inner.in, inner.q_end) + L;
    const Image<T> y = image_of<T>(args, problem);
    return with_activation<T>(args.activation, args.negative_slope, [&](const auto& activation) {
        const int64_t size = in_rows * width;
        return each_group<T>(args, problem, size, [&](Range units, const Memory<T>& memory) {
            const T* x = static_cast<const T*>(args.x) + units.begin * problem.positions;
            for (int64_t r = 0; r < units.size() * in_rows; ++r)
                copy_row(memory.rows + r * width + inner.reach, x + r * inner.in, inner.in);
            for (int64_t out_row = 0; out_row < axis[0].out * axis[1].out; ++out_row) {
                int64_t count = 0;
                for (int64_t turn = 0; turn < inner.stride; ++turn) {
                    const int64_t u = inner.before + turn;
                    plan.each(out_row, [&](const Source& source) {
                        const int64_t start = source.row * width + inner.reach + u / inner.stride;
                        plan.each_tap(u % inner.stride, [&](const Source& tap) {
                            memory.terms[count++] = {start - tap.row, source.tap + tap.tap};
                        });
                    });
                    memory.ends[turn] = count;
                }
                for (int64_t unit = units.begin; unit < units.end; ++unit) {
                    if (out_row == 0)
                        prefetch_row<0>(x + (unit - units.begin + units.size()) * problem.positions,
                                        least(problem.positions, kCached / 4));
                    const int64_t c = unit % args.in_channels;
                    const T *rows = memory.rows + (unit - units.begin) * size, *weights = memory.weights;
                    for (int64_t t = 0; t < count; ++t)
                        memory.weights[t] = static_cast<const T*>(args.weight)[c * problem.taps + memory.terms[t].tap];
                    const T bias = args.bias ? static_cast<const T*>(args.bias)[c] : T(0);
                    const Term* terms = memory.terms;
                    const int64_t* ends = memory.ends;
                    T* target = y.at(unit / args.in_channels, c, out_row * inner.out);
                    interleave(y.last ? memory.line : target, inner.stride, inner.out,
                               [=](int64_t turn, int64_t i, int) {
                                   Vec<T> sum = splat(bias);
                                   for (int64_t t = turn ? ends[turn - 1] : 0; t < ends[turn]; ++t)
                                       sum += load(rows + terms[t].offset + i) * weights[t];
                                   return activation.value(sum);
                               });
                    for (int64_t i = 0; y.last && i < inner.out; ++i) target[i * y.step()] = memory.line[i];
                }
            }
        });
    });
}

// dx += sum of weights times windows, or = where it is the first, and dweight += each window times x, for kCount taps
template <typename T, int kCount>
void add_taps(const T* const* windows, const T* x, const T* weight, int64_t n, T* dx, bool first, T* dweight) {
    Vec<T> sum[kCount] = {};
    for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int lanes = int(least(n - i, kLanes<T>));
        const Vec<T> v = load_float(x + i, lanes);
        Vec<T> total = first || !dx ? Vec<T>{} : load_float(dx + i, lanes);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) {
            const Vec<T> window = load_float(windows[k] + i, lanes);
            total += window * weight[k];
            sum[k] += window * v;
        }
        if (dx) store_float(dx + i, total, lanes);
    }
    if (!dweight) return;
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) dweight[k] += sum_lanes<T>(sum[k]);
}

// dx and this sample's share of dweight, of one channel whose gradient's phases are given. places: where a tap's window
// of a row's phases begins.
template <typename T>
void gradients_of(const Args& args, const Problem& problem, const Plan& plan, const int64_t* places, const T* phases,
                  int64_t unit) {
    const Axis *axis = problem.axis, &inner = axis[2];
    const int64_t whole = inner.stride * (inner.in + inner.reach);
    const T* x = static_cast<const T*>(args.x) + unit * problem.positions;
    const T* weight = static_cast<const T*>(args.weight) + unit % args.in_channels * problem.taps;
    T* dx = args.dx ? static_cast<T*>(args.dx) + unit * problem.positions : nullptr;
    T* dweight = args.dweight ? static_cast<T*>(args.dweight) + unit * problem.taps : nullptr;
    if (dweight) clear(dweight, problem.taps);
    for (int64_t in_row = 0; in_row < axis[0].in * axis[1].in; ++in_row) {
        const int64_t begin = in_row * inner.in;
        bool first = true;
        plan.each(in_row, [&](const Source& source) {
            for (int64_t k2 = 0; k2 < inner.kernel; k2 += kTaps, first = false) {
                const T* windows[kTaps];
                const int64_t count = least(inner.kernel - k2, kTaps);
                for (int64_t k = 0; k < count; ++k) windows[k] = phases + source.row * whole + places[k2 + k];
                const auto add = count == 4   ? add_taps<T, 4>
                                 : count == 3 ? add_taps<T, 3>
                                 : count == 2 ? add_taps<T, 2>
                                              : add_taps<T, 1>;
                add(windows, x + begin, weight + source.tap + k2, inner.in, dx ? dx + begin : nullptr, first,
                    dweight ? dweight + source.tap + k2 : nullptr);
            }
        });
        if (first && dx) clear(dx + begin, inner.in);
    }
}

// dx and this sample's share of dweight of one channel in one dimension, of at most two sets of kStride taps: dx[q] is
// the sum of dy[q * kStride + k - before] w[k], dweight[k] that of the products with x[q] instead.
template <typename T, int kStride>
void backward_line(const Axis& axis, const T* x, const T* w, const T* dy, T* dx, T* dweight) {
    constexpr int L = kLanes<T>, kTerms = 2 * kStride, kCount = (L + 1) * kStride;
    Vec<T> sum[kTerms] = {};
    T taps[kTerms] = {}, edge[kCount];
    for (int k = 0; k < axis.kernel; ++k) taps[k] = w[k];
    for (int64_t q = 0; q < axis.in; q += L) {
        const int lanes = int(least(axis.in - q, L));
        const int64_t first = q * kStride - axis.before;
        const T* from = dy + first;
        if (first < 0 || first + kCount > axis.out) {
            for (int i = 0; i < kCount; ++i) edge[i] = first + i >= 0 && first + i < axis.out ? from[i] : T(0);
            from = edge;
        }
        const Vec<T> v = load_float(x + q, lanes);
        Vec<T> total = {};
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t) {
            Vec<T> phases[kStride];
            load_deinterleaved<T, kStride>(from + t * kStride, phases);
#pragma GCC unroll 4
            for (int r = 0; r < kStride; ++r) {
                if (t * kStride + r >= axis.kernel) break;
                total += phases[r] * taps[t * kStride + r];
                sum[t * kStride + r] += phases[r] * v;
            }
        }
        if (dx) store_float(dx + q, total, lanes);
    }
    for (int k = 0; dweight && k < axis.kernel; ++k) dweight[k] = sum_lanes<T>(sum[k]);
}

template <typename T>
int backward_lines(const Args& args, const Problem& problem) {
    const Axis& axis = problem.axis[2];
    const auto line = axis.stride == 2   ? backward_line<T, 2>
                      : axis.stride == 3 ? backward_line<T, 3>
                                         : backward_line<T, 4>;
    return each_share(args, problem, [&](int64_t unit, int64_t end) {
        for (; unit < end; ++unit)
            line(axis, static_cast<const T*>(args.x) + unit * axis.in,
                 static_cast<const T*>(args.weight) + unit % args.in_channels * axis.kernel,
                 static_cast<const T*>(args.y) + unit * axis.out,
                 args.dx ? static_cast<T*>(args.dx) + unit * axis.in : nullptr,
                 args.dweight ? static_cast<T*>(args.dweight) + unit * axis.kernel : nullptr);
        return MMFAST_OK;
    });
}

template <typename T>
int backward_rows(const Args& args, const Problem& problem) {
    const Axis *axis = problem.axis, &inner = axis[2];
    const int64_t out_rows = axis[0].out * axis[1].out;
    const int64_t length = inner.in + inner.reach, whole = inner.stride * length;
    const Plan plan(problem, false);
    Scratch<int64_t> places(inner.kernel);
    if (!plan.made() || !places.get()) return MMFAST_OUT_OF_MEMORY;
    for (int64_t k = 0; k < inner.kernel; ++k) places.get()[k] = inner.phase(k) * length + inner.shift(k);
    const Image<T> y = image_of<T>(args, problem);
    const int64_t size = out_rows * whole;
    return each_group<T>(args, problem, size, [&](Range units, const Memory<T>& memory) {
        for (int64_t unit = units.begin; unit < units.end; ++unit)
            for (int64_t r = 0; r < out_rows; ++r) {
                const T* dy = y.at(unit / args.in_channels, unit % args.in_channels, r * inner.out);
                T* phases = memory.rows + (unit - units.begin) * size + r * whole;
                for (int64_t i = 0; y.last && i < inner.out; ++i) memory.line[i] = dy[i * y.step()];
                for (int64_t p = 0; p < inner.stride; ++p) memory.phases[p] = phases + p * length;
                deinterleave(memory.phases, y.last ? memory.line : dy, inner.out, inner.before, inner.stride, length);
            }
        for (int64_t unit = units.begin; unit < units.end; ++unit) {
            const int64_t next = unit + units.size();
            if (!y.last) prefetch_row<0>(y.at(0, next, 0), least(problem.out_positions, kCached / 4));
            gradients_of(args, problem, plan, places.get(), memory.rows + (unit - units.begin) * size, unit);
        }
    });
}

template <typename T>
int backward_of(const Args& args) {
    const Problem problem(args);
    const Axis& inner = problem.axis[2];
    if (args.dx && !all_finite(static_cast<const T*>(args.weight), args.in_channels * problem.taps))
        return MMFAST_DECLINED;
    // of shorter rows there is more at their ends than between them
    const bool lines = is_line(args, problem) && inner.stride > 1 && inner.stride <= 4 &&
                       inner.kernel <= 2 * inner.stride && inner.in >= 2 * kLanes<T>;
    const int status = lines ? backward_lines<T>(args, problem) : backward_rows<T>(args, problem);
    if (status || !args.dweight) return status;
    const int64_t shares = args.batch * args.in_channels * problem.taps;
    return all_finite(static_cast<const T*>(args.dweight), shares) ? MMFAST_OK : MMFAST_DECLINED;
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
