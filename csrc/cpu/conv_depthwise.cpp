// Depthwise transposed convolution, forward and both gradients.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. Reads x and writes y once: bound by memory,
// or by the caches.
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

template <typename T>
int forward_of(const Args& args) {
    const Problem problem(args);
    constexpr int L = kLanes<T>;
    const Axis *axis = problem.axis, &inner = axis[2];
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

template <typename T>
int backward_of(const Args& args) {
    const Problem problem(args);
    const Axis *axis = problem.axis, &inner = axis[2];
    if (args.dx && !all_finite(static_cast<const T*>(args.weight), args.in_channels * problem.taps))
        return MMFAST_DECLINED;
    const int64_t out_rows = axis[0].out * axis[1].out;
    const int64_t length = inner.in + inner.reach, whole = inner.stride * length;
    const Plan plan(problem, false);
    Scratch<int64_t> places(inner.kernel);
    if (!plan.made() || !places.get()) return MMFAST_OUT_OF_MEMORY;
    for (int64_t k = 0; k < inner.kernel; ++k) places.get()[k] = inner.phase(k) * length + inner.shift(k);
    const Image<T> y = image_of<T>(args, problem);
    const int64_t size = out_rows * whole;
    const int status = each_group<T>(args, problem, size, [&](Range units, const Memory<T>& memory) {
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
