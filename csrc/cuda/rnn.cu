// One step of a recurrent layer, its products made by the caller: the gates and the state, forward and backward.
//
// The equations, pointers, shapes and layouts: mmfast_rnn_step in mmfast.h. The caller walks time, a product of
// matrices and a launch of these a step; a Cell is a walk of one step. Grid: 128 threads a block, a thread for each 16
// bytes of units of a row (8 units of a 16-bit type, 4 of float32), all their gates; nothing passes between threads.
// Where rows are no multiples of 16 bytes, units are read one by one. State, and all arithmetic, in float32.
//
// Model of a step, microseconds on an H100 or H200 (not measured), B = 64, H = 128, bfloat16; forward, then backward:
//                      RNN           GRU           LSTM
//     kilobytes        82 / 164      295 / 492     377 / 541     10 / 20, 36 / 60, 46 / 66 bytes a unit
//     at 3 TB/s        0.03 / 0.06   0.10 / 0.16   0.13 / 0.18   less where the L2 cache has them
//     latency          1.0           1.0           1.0           two dependent reads, ten special functions, stores
//     product          2.0           2.0           2.0           8 to 67 MFLOP: latency of a small GEMM
//     starts           2 x 1.5       2 x 1.5       2 x 1.5       in a graph; in eager two calls of 5 on the host
//     sum              6             6             6             bound by latency: hence the aim of resident kernels
#include "cuda/device.h"
#include "cuda/rnn_gates.h"

namespace mmfast {
namespace device {
namespace {

constexpr int kStepThreads = 128;

// What both passes know of the step.
template <typename T>
struct Step {
    static constexpr int kUnits = kVector<T>;
    using Units = float[kUnits];
    Global<const int64_t> lengths;
    Global<const uint8_t> cut;
    bool ragged;  // lengths are given
    bool whole;   // every row begins at a multiple of 16 bytes
    int hidden, directions;
    int64_t rows, cuts, at, cut_at;

    // this thread's row and its first unit
    struct Place {
        int64_t row;
        int unit, count;
    };
    MMFAST_DEVICE Place place() const {
        const int per_row = (hidden + kUnits - 1) / kUnits;
        const int64_t item = block_index() * kStepThreads + thread_index(), row = item / per_row;
        const int unit = int(item - row * per_row) * kUnits;
        return {row, unit, hidden - unit < kUnits ? hidden - unit : kUnits};
    }
    MMFAST_DEVICE bool reaches(int64_t row, int64_t step) const { return !ragged || step < load(lengths, row); }
    MMFAST_DEVICE bool is_cut(int64_t row) const { return row < cuts && reaches(row, cut_at) && load(cut, row) != 0; }

    // this thread's units from x[i] on
    template <typename U>
    MMFAST_DEVICE void read(Units& to, Global<const U> x, int64_t i, int count) const {
        constexpr int kEach = kVector<U>;
        if (whole) {
            MMFAST_UNROLL
            for (int v = 0; v < kUnits; v += kEach) {
                const Vector<U, kEach> part = load_vector<kEach>(x, i + v);
                MMFAST_UNROLL
                for (int j = 0; j < kEach; ++j) to[v + j] = to_float(part.at[j]);
            }
            return;
        }
        MMFAST_UNROLL
        for (int j = 0; j < kUnits; ++j) to[j] = j < count ? to_float(load(x, i + j)) : 0.0f;
    }
    template <typename U>
    MMFAST_DEVICE void write(Global<U> x, int64_t i, const Units& from, int count) const {
        constexpr int kEach = kVector<U>;
        if (whole) {
            MMFAST_UNROLL
            for (int v = 0; v < kUnits; v += kEach) {
                Vector<U, kEach> part;
                MMFAST_UNROLL
                for (int j = 0; j < kEach; ++j) part.at[j] = from_float<U>(from[v + j]);
                store_vector(x, i + v, part);
            }
            return;
        }
        MMFAST_UNROLL
        for (int j = 0; j < kUnits; ++j)
            if (j < count) store(x, i + j, from_float<U>(from[j]));
    }
};

template <int N>
MMFAST_DEVICE void clear(float (&x)[N], bool where) {
    MMFAST_UNROLL
    for (int j = 0; j < N; ++j) x[j] = where ? 0.0f : x[j];
}

template <typename T, int G>
struct StepForward {
    static constexpr int kThreads = kStepThreads;
    using S = Step<T>;
    S step;
    Global<const T> gx, product, bias, h_before;
    Global<const float> exact_before, c_before;
    Global<T> h, y, gates, cell;
    Global<float> exact, c;
    bool has_bias, has_exact, has_gates, has_cell, relu;

    MMFAST_DEVICE void operator()() const {
        const auto [row, unit, count] = step.place();
        if (row >= step.rows) return;
        const int H = step.hidden, D = step.directions;
        const int64_t at_state = row * H + unit, at_gates = row * D * G * H + unit;
        const bool active = step.reaches(row, step.at), cut = step.is_cut(row);
        typename S::Units x[G], a[G], state, kept;
        MMFAST_UNROLL
        for (int k = 0; k < G; ++k) {
            step.read(x[k], gx, at_gates + k * H, count);
            step.read(a[k], product, row * G * H + k * H + unit, count);
            clear(a[k], cut);
        }
        if (has_bias) {
            MMFAST_UNROLL
            for (int k = 0; k < G; ++k) {
                step.read(kept, bias, k * H + unit, count);
                MMFAST_UNROLL
                for (int j = 0; j < S::kUnits; ++j) a[k][j] += kept[j];
            }
        }
        if constexpr (G == 4) {
            step.read(state, c_before, at_state, count);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) {
                MMFAST_UNROLL
                for (int k = 0; k < 4; ++k) x[k][j] += a[k][j];
                kept[j] = cut ? 0.0f : state[j];
                a[0][j] = lstm<T>(x[0][j], x[1][j], x[2][j], x[3][j], kept[j]);
                if (active) state[j] = kept[j];
            }
            step.write(c, at_state, state, count);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) state[j] = a[0][j];
        } else if constexpr (G == 3) {
            if (has_exact)
                step.read(state, exact_before, at_state, count);
            else
                step.read(state, h_before, at_state, count);
            clear(state, cut && active);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) {
                x[0][j] += a[0][j], x[1][j] += a[1][j], kept[j] = a[2][j];
                const float h = gru<T>(x[0][j], x[1][j], x[2][j], kept[j], state[j]);
                if (active) state[j] = h;
            }
            if (has_exact) step.write(exact, at_state, state, count);
        } else {
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) state[j] = rnn<T>(x[0][j] + a[0][j], relu);
        }
        if (!active) step.read(state, h_before, at_state, count);
        step.write(h, at_state, state, count);
        const int64_t at_y = row * D * H + unit;
        clear(state, !active);
        step.write(y, at_y, state, count);
        if constexpr (G > 1) {
            if (has_cell) {
                clear(kept, !active);
                step.write(cell, at_y, kept, count);
            }
            if (!has_gates) return;
            MMFAST_UNROLL
            for (int k = 0; k < G; ++k) {
                clear(x[k], !active);
                step.write(gates, at_gates + k * H, x[k], count);
            }
        }
    }
};

template <typename T, int G>
struct StepBackward {
    static constexpr int kThreads = kStepThreads;
    using S = Step<T>;
    S step;
    Global<const T> y, gates, cell, dy, product, y_before, cell_before, h0, c0;
    Global<const float> dh_before, dc_before;
    Global<float> dh, dc;
    Global<T> dgates, dm, previous, delta;
    int64_t all, products, befores, before_at;
    bool has_dy, has_h0, has_c0, has_previous, has_delta, relu;

    // the state that this step began with
    MMFAST_DEVICE void before(typename S::Units& to, Global<const T> of, Global<const T> initial, bool has_initial,
                              const typename S::Place& p, bool cut) const {
        clear(to, true);
        if (cut) return;
        if (p.row < befores && step.reaches(p.row, before_at))
            step.read(to, of, p.row * step.directions * step.hidden + p.unit, p.count);
        else if (has_initial)
            step.read(to, initial, p.row * step.hidden + p.unit, p.count);
    }

    MMFAST_DEVICE void operator()() const {
        const typename S::Place p = step.place();
        if (p.row >= all) return;
        const int H = step.hidden, count = p.count;
        const int64_t at_state = p.row * H + p.unit, at_y = p.row * step.directions * H + p.unit;
        const int64_t at_gates = p.row * step.directions * G * H + p.unit;
        typename S::Units d, g[G], other;
        step.read(d, dh_before, at_state, count);
        if (p.row < products) {
            step.read(other, product, at_state, count);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) d[j] += other[j];
        }
        const bool inside = p.row < step.rows;
        if (!inside || !step.reaches(p.row, step.at)) {
            step.write(dh, at_state, d, count);
            if constexpr (G == 4) {
                step.read(d, dc_before, at_state, count);
                step.write(dc, at_state, d, count);
            }
            if (inside) skip(p);
            return;
        }
        const bool cut = step.is_cut(p.row);
        if (has_dy) {
            step.read(other, dy, at_y, count);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) d[j] += other[j];
        }
        if constexpr (G > 1) {
            MMFAST_UNROLL
            for (int k = 0; k < G; ++k) step.read(g[k], gates, at_gates + k * H, count);
        }
        if constexpr (G == 4) {
            typename S::Units c, carried;
            step.read(c, cell, at_y, count);
            step.read(carried, dc_before, at_state, count);
            before(other, cell_before, c0, has_c0, p, cut);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) {
                lstm_backward<T>(g[0][j], g[1][j], g[2][j], g[3][j], carried[j], d[j], c[j], other[j]);
                if (cut) carried[j] = 0.0f;
            }
            step.write(dc, at_state, carried, count);
            clear(d, true);
        } else if constexpr (G == 3) {
            typename S::Units m;
            step.read(m, cell, at_y, count);
            before(other, y_before, h0, has_h0, p, cut);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) {
                gru_backward(g[0][j], g[1][j], g[2][j], m[j], d[j], other[j]);
                if (cut) d[j] = 0.0f;
            }
            step.write(dm, at_y, m, count);
            clear(m, cut);
            if (has_delta) step.write(delta, p.row * G * H + 2 * H + p.unit, m, count);
        } else {
            step.read(other, y, at_y, count);
            MMFAST_UNROLL
            for (int j = 0; j < S::kUnits; ++j) g[0][j] = rnn_backward(d[j], other[j], relu);
            clear(d, true);
        }
        step.write(dh, at_state, d, count);
        MMFAST_UNROLL
        for (int k = 0; k < G; ++k) step.write(dgates, at_gates + k * H, g[k], count);
        if (has_previous) {
            before(other, y_before, h0, has_h0, p, cut);
            step.write(previous, at_y, other, count);
        }
        if (!has_delta) return;
        MMFAST_UNROLL
        for (int k = 0; k < (G == 3 ? 2 : G); ++k) {
            clear(g[k], cut);
            step.write(delta, p.row * G * H + k * H + p.unit, g[k], count);
        }
    }

    // a row past its length: nothing comes from it
    MMFAST_DEVICE void skip(const typename S::Place& p) const {
        const int H = step.hidden;
        const int64_t at_y = p.row * step.directions * H + p.unit;
        typename S::Units zero;
        clear(zero, true);
        MMFAST_UNROLL
        for (int k = 0; k < G; ++k) {
            step.write(dgates, p.row * step.directions * G * H + k * H + p.unit, zero, p.count);
            if (has_delta) step.write(delta, p.row * G * H + k * H + p.unit, zero, p.count);
        }
        if constexpr (G == 3) step.write(dm, at_y, zero, p.count);
        if (has_previous) step.write(previous, at_y, zero, p.count);
    }
};

template <typename T>
Step<T> step_of(const mmfast_rnn_step& from, Buffers& buffers, bool aligned) {
    Step<T> step{};
    step.ragged = from.lengths != nullptr;
    if (from.lengths) step.lengths = buffers.input<int64_t>(from.lengths, from.rows);
    if (from.cut) step.cut = buffers.input<uint8_t>(from.cut, from.cuts);
    step.cuts = from.cut ? from.cuts : 0;
    step.whole = aligned && from.hidden * int64_t(sizeof(T)) % 16 == 0;
    step.hidden = int(from.hidden);
    step.directions = from.directions;
    step.rows = from.rows;
    step.at = from.step;
    step.cut_at = from.cut_step;
    return step;
}

template <typename T>
int64_t blocks_of(int64_t rows, int64_t hidden) {
    const int64_t per_row = (hidden + kVector<T> - 1) / kVector<T>;
    return (rows * per_row + kStepThreads - 1) / kStepThreads;
}

// A sequence tensor's rows, as far as one direction's columns of them go.
struct Rows {
    int64_t rows, width, stride;
    template <typename T>
    Global<const T> input(Buffers& buffers, const void* p) const {
        return buffers.input<T>(p, rows ? (rows - 1) * stride + width : 0);
    }
    template <typename T>
    Global<T> output(Buffers& buffers, void* p) const {
        return buffers.output_rows<T>(p, rows, width, stride);
    }
};

template <typename T, int G>
int step_forward(const mmfast_rnn_step_forward_args& args) {
    const mmfast_rnn_step& from = args.step;
    const int64_t R = from.rows, H = from.hidden, D = from.directions;
    const Rows units = {R, H, D * H}, gates = {R, G * H, D * G * H};
    Buffers buffers;
    StepForward<T, G> kernel{};
    const bool aligned =
        are_aligned(args.gx, args.product, args.bias, args.h, args.exact, args.c, args.y, args.gates, args.cell);
    kernel.step = step_of<T>(from, buffers, aligned);
    kernel.relu = from.mode == MMFAST_RNN_RELU;
    kernel.gx = gates.input<T>(buffers, args.gx);
    kernel.product = buffers.input<T>(args.product, R * G * H);
    kernel.has_bias = args.bias != nullptr;
    if (args.bias) kernel.bias = buffers.input<T>(args.bias, G * H);
    kernel.h_before = buffers.input<T>(args.h, R * H);
    kernel.h = buffers.output<T>(args.h, R * H);
    kernel.has_exact = args.exact != nullptr;
    if (args.exact) {
        kernel.exact_before = buffers.input<float>(args.exact, R * H);
        kernel.exact = buffers.output<float>(args.exact, R * H);
    }
    if (G == 4) {
        kernel.c_before = buffers.input<float>(args.c, R * H);
        kernel.c = buffers.output<float>(args.c, R * H);
    }
    kernel.y = units.output<T>(buffers, args.y);
    kernel.has_gates = args.gates != nullptr;
    if (args.gates) kernel.gates = gates.output<T>(buffers, args.gates);
    kernel.has_cell = args.cell != nullptr;
    if (args.cell) kernel.cell = units.output<T>(buffers, args.cell);
    return buffers.finish(launch(kernel, blocks_of<T>(R, H), 0, from.stream));
}

template <typename T, int G>
int step_backward(const mmfast_rnn_step_backward_args& args) {
    const mmfast_rnn_step& from = args.step;
    const int64_t R = from.rows, H = from.hidden, D = from.directions;
    const Rows units = {R, H, D * H}, gates = {R, G * H, D * G * H}, before = {args.befores, H, D * H};
    Buffers buffers;
    StepBackward<T, G> kernel{};
    const bool aligned =
        are_aligned(args.y, args.gates, args.cell, args.dy, args.product, args.y_before, args.cell_before, args.h0,
                    args.c0, args.dh, args.dc, args.dgates, args.dm, args.previous, args.delta);
    kernel.step = step_of<T>(from, buffers, aligned);
    kernel.relu = from.mode == MMFAST_RNN_RELU;
    kernel.all = args.all, kernel.products = args.products;
    kernel.befores = args.befores, kernel.before_at = args.before_step;
    kernel.y = units.input<T>(buffers, args.y);
    if (G > 1) {
        kernel.gates = gates.input<T>(buffers, args.gates);
        kernel.cell = units.input<T>(buffers, args.cell);
    }
    kernel.has_dy = args.dy != nullptr;
    if (args.dy) kernel.dy = units.input<T>(buffers, args.dy);
    kernel.product = buffers.input<T>(args.product, args.products * H);
    kernel.y_before = before.input<T>(buffers, args.y_before);
    if (G == 4) kernel.cell_before = before.input<T>(buffers, args.cell_before);
    kernel.has_h0 = args.h0 != nullptr;
    if (args.h0) kernel.h0 = buffers.input<T>(args.h0, R * H);
    kernel.has_c0 = args.c0 != nullptr;
    if (args.c0) kernel.c0 = buffers.input<T>(args.c0, R * H);
    kernel.dh_before = buffers.input<float>(args.dh, args.all * H);
    kernel.dh = buffers.output<float>(args.dh, args.all * H);
    if (G == 4) {
        kernel.dc_before = buffers.input<float>(args.dc, args.all * H);
        kernel.dc = buffers.output<float>(args.dc, args.all * H);
    }
    kernel.dgates = gates.output<T>(buffers, args.dgates);
    if (G == 3) kernel.dm = units.output<T>(buffers, args.dm);
    kernel.has_previous = args.previous != nullptr;
    if (args.previous) kernel.previous = units.output<T>(buffers, args.previous);
    kernel.has_delta = args.delta != nullptr;
    if (args.delta) kernel.delta = buffers.output<T>(args.delta, R * G * H);
    return buffers.finish(launch(kernel, blocks_of<T>(args.all, H), 0, from.stream));
}

template <typename F>
int of_step(const mmfast_rnn_step& step, const F& f) {
    if (step.hidden > 0x7fffffff / 4) return fail(MMFAST_INVALID_ARGUMENT, "the hidden size is too large");
    return with_gates(step.dtype, step.mode, f);
}

}  // namespace
}  // namespace device
}  // namespace mmfast

int mmfast_cuda_rnn_step_forward(const mmfast_rnn_step_forward_args* args) {
    using namespace mmfast::device;
    return of_step(args->step,
                   [&](auto type, auto gates) { return step_forward<decltype(type), decltype(gates)::value>(*args); });
}

int mmfast_cuda_rnn_step_backward(const mmfast_rnn_step_backward_args* args) {
    using namespace mmfast::device;
    return of_step(args->step,
                   [&](auto type, auto gates) { return step_backward<decltype(type), decltype(gates)::value>(*args); });
}
