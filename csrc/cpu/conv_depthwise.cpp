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

constexpr int64_t kChannels = 16;  // of one sample, or of two, that share their memory
constexpr int kTaps = 4;           // whose sums are in registers at the same time

int threads_for(const Args& args, const Problem& problem) {
    return args.batch * args.in_channels * problem.taps * problem.positions < 32768 ? 1 : args.threads;
}

template <typename T>
struct Term {
    int64_t offset;
    T weight;
};

// What the channels of a part share.
template <typename T>
struct Memory {
    T* zeros;        // as many as were asked for, before the first channel
    Term<T>* terms;  // one for each tap
    T** rows;        // one for each phase of the last dimension
};

// body(unit, memory) for each channel of each sample
template <typename T, typename Body>
int each_unit(const Args& args, const Problem& problem, int64_t zeros, const Body& body) {
    const int64_t units = args.batch * args.in_channels;
    int status = MMFAST_OK;
    parallel_for(threads_for(args, problem), parts_of(units, kChannels), [&](int64_t part) {
        Scratch<T> elements(zeros);
        Scratch<Term<T>> terms(problem.taps);
        Scratch<T*> rows(args.stride[2]);
        if (!elements.get() || !terms.get() || !rows.get()) {
            __atomic_store_n(&status, MMFAST_OUT_OF_MEMORY, __ATOMIC_RELAXED);
            return;
        }
        clear(elements.get(), zeros);
        for (int64_t unit = part * kChannels; unit < least(units, (part + 1) * kChannels); ++unit)
            body(unit, Memory<T>{elements.get(), terms.get(), rows.get()});
    });
    return status;
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

// row[q] = sum over terms of weight * x[offset + q]; whole vectors
template <typename T>
void sum_terms(const T* x, const Term<T>* terms, int64_t count, T* row, int64_t n) {
    constexpr int L = kLanes<T>;
    for (int64_t q = 0; q < n; q += 2 * L) {
        Vec<T> low = {}, high = {};
        for (int64_t t = 0; t < count; ++t) {
            const T* from = x + terms[t].offset + q;
            low += load(from) * terms[t].weight;
            high += load(from + L) * terms[t].weight;
        }
        store(row + q, low);
        store(row + q + L, high);
    }
}

template <typename T>
int forward_of(const Args& args) {
    const Problem problem(args);
    constexpr int L = kLanes<T>;
    const Axis *axis = problem.axis, &inner = axis[2];
    if (!all_finite(static_cast<const T*>(args.weight), args.in_channels * problem.taps)) return MMFAST_DECLINED;
    const Plan plan(problem, true);
    if (!plan.made()) return MMFAST_OUT_OF_MEMORY;
    const int64_t in_rows = axis[0].in * axis[1].in, length = inner.q_end - inner.q_first;
    const int64_t width = inner.reach + most(inner.in, inner.q_end) + 2 * L, row_length = length + 2 * L;
    const Image<T> y = image_of<T>(args, problem);
    int status = MMFAST_OK;
    const int bad = with_activation<T>(args.activation, args.negative_slope, [&](const auto& activation) {
        const int64_t elements = in_rows * width + inner.stride * row_length + inner.out;
        status = each_unit<T>(args, problem, elements, [&](int64_t unit, const Memory<T>& memory) {
            T* padded = memory.zeros;
            T* phases = padded + in_rows * width;
            T* line = phases + inner.stride * row_length;
            const int64_t c = unit % args.in_channels;
            const T* weight = static_cast<const T*>(args.weight) + c * problem.taps;
            const T* x = static_cast<const T*>(args.x) + unit * problem.positions;
            for (int64_t r = 0; r < in_rows; ++r)
                copy_row(padded + r * width + inner.reach, x + r * inner.in, inner.in);
            const T bias = args.bias ? static_cast<const T*>(args.bias)[c] : T(0);
            const auto value = [&](Vec<T> v) { return activation.value(v + bias); };
            for (int64_t out_row = 0; out_row < axis[0].out * axis[1].out; ++out_row) {
                for (int64_t r = 0; r < inner.stride; ++r) {
                    int64_t count = 0;
                    plan.each(out_row, [&](const Source& source) {
                        const int64_t start = source.row * width + inner.reach + inner.q_first;
                        plan.each_tap(r, [&](const Source& tap) {
                            memory.terms[count++] = {start - tap.row, weight[source.tap + tap.tap]};
                        });
                    });
                    sum_terms(padded, memory.terms, count, phases + r * row_length, length);
                    memory.rows[r] = phases + r * row_length;
                }
                T* target = y.at(unit / args.in_channels, c, out_row * inner.out);
                const int64_t begin = inner.before - inner.q_first * inner.stride;
                interleave_from(y.last ? line : target, memory.rows, inner.stride, begin, inner.out, value);
                for (int64_t i = 0; y.last && i < inner.out; ++i) target[i * y.step()] = line[i];
            }
        });
        return MMFAST_OK;
    });
    return bad ? bad : status;
}

// dx += sum of weights times windows, or = where it is the first, and dweight += each window times x, for kCount taps
template <typename T, int kCount>
void add_taps(const T* const* windows, const T* x, const T* weight, int64_t n, T* dx, bool first, T* dweight) {
    Vec<T> sum[kCount] = {};
    for (int64_t i = 0; i < n; i += kLanes<T>) {
        const int lanes = int(least(n - i, kLanes<T>));
        const Vec<T> v = load_float(x + i, lanes);
        Vec<T> total = first || !dx ? Vec<T>{} : load_float(dx + i, lanes);
        for (int k = 0; k < kCount; ++k) {
            const Vec<T> window = load_float(windows[k] + i, lanes);
            total += window * weight[k];
            sum[k] += window * v;
        }
        if (dx) store_float(dx + i, total, lanes);
    }
    for (int k = 0; dweight && k < kCount; ++k) dweight[k] += sum_lanes<T>(sum[k]);
}

template <typename T>
int backward_of(const Args& args) {
    const Problem problem(args);
    constexpr int L = kLanes<T>;
    const Axis *axis = problem.axis, &inner = axis[2];
    const T* weights = static_cast<const T*>(args.weight);
    if (args.dx && !all_finite(weights, args.in_channels * problem.taps)) return MMFAST_DECLINED;
    const int64_t out_rows = axis[0].out * axis[1].out, in_rows = axis[0].in * axis[1].in;
    const int64_t length = inner.in + inner.reach, whole = inner.stride * length,
                  seen = least(inner.out, whole - inner.before);
    const Plan plan(problem, false);
    Scratch<int64_t> places(inner.kernel);  // where a tap's window of a row's phases begins
    if (!plan.made() || !places.get()) return MMFAST_OUT_OF_MEMORY;
    for (int64_t k = 0; k < inner.kernel; ++k) places.get()[k] = inner.phase(k) * length + inner.shift(k);
    const Image<T> y = image_of<T>(args, problem);
    const int64_t elements = out_rows * whole + whole + 2 * L;
    const int status = each_unit<T>(args, problem, elements, [&](int64_t unit, const Memory<T>& memory) {
        T* phases = memory.zeros;
        T* row = phases + out_rows * whole;
        const int64_t c = unit % args.in_channels;
        for (int64_t r = 0; r < out_rows; ++r) {
            const T* dy = y.at(unit / args.in_channels, c, r * inner.out);
            if (y.last)
                for (int64_t i = 0; i < seen; ++i) row[inner.before + i] = dy[i * y.step()];
            else
                copy_row(row + inner.before, dy, seen);
            for (int64_t p = 0; p < inner.stride; ++p) memory.rows[p] = phases + r * whole + p * length;
            deinterleave(memory.rows, row, inner.stride, length);
        }
        const T* x = static_cast<const T*>(args.x) + unit * problem.positions;
        const T* weight = weights + c * problem.taps;
        T* dx = args.dx ? static_cast<T*>(args.dx) + unit * problem.positions : nullptr;
        T* dweight = args.dweight ? static_cast<T*>(args.dweight) + unit * problem.taps : nullptr;
        if (dweight) clear(dweight, problem.taps);
        for (int64_t in_row = 0; in_row < in_rows; ++in_row) {
            const int64_t begin = in_row * inner.in;
            bool first = true;
            plan.each(in_row, [&](const Source& source) {
                for (int64_t k2 = 0; k2 < inner.kernel; k2 += kTaps, first = false) {
                    const T* windows[kTaps];
                    const int64_t count = least(inner.kernel - k2, kTaps);
                    for (int64_t k = 0; k < count; ++k) windows[k] = phases + source.row * whole + places.get()[k2 + k];
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
