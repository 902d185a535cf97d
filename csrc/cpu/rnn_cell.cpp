// One step of a Cell: mmfast_rnn_cell_args in mmfast.h. Where the caller leaves the products to it, they are made here
// without packing a weight, as dot products along k, a vector of units after the other, so that each weight is read
// from memory once; a library's calls take longer for few rows.
#include "cpu/rnn_gates.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// A tile of dot products: rows of the weights, and at most so many of the batch.
template <typename C>
constexpr int kUnits = kLanes<C> < 4 ? kLanes<C> : 4;
constexpr int kRows = 3;

// Rows of length k: a weight's, one after the other, and the batch's.
template <typename C>
struct Side {
    const C *w, *rows;
    int64_t k;
};

// out[r * apart + i] = the sum over the sides' k of w[unit + i][k] * rows[r][k]; of units past the `valid` ones the
// last again
template <int R, typename C>
void multiply_sides(C* out, int64_t apart, const Side<C>* sides, int count, int64_t unit, int64_t valid) {
    constexpr int L = kLanes<C>;
    Vec<C> sum[kUnits<C>][R] = {};
    for (const Side<C>* side = sides; side < sides + count; ++side) {
        const int64_t k = side->k;
        const C *w[kUnits<C>], *rows[R];
        w[0] = side->w + unit * k, rows[0] = side->rows;
        for (int i = 1; i < kUnits<C>; ++i) w[i] = w[i - 1] + (i < valid ? k : 0);
        for (int r = 1; r < R; ++r) rows[r] = rows[r - 1] + k;
        const auto add = [&](int64_t j, auto read) {
            Vec<C> right[R];
#pragma GCC unroll 3
            for (int r = 0; r < R; ++r) right[r] = read(rows[r] + j);
#pragma GCC unroll 4
            for (int i = 0; i < kUnits<C>; ++i) {
                const Vec<C> left = read(w[i] + j);
#pragma GCC unroll 3
                for (int r = 0; r < R; ++r) sum[i][r] += left * right[r];
            }
        };
        const int rest = int(k % L);
        for (int64_t j = 0; j + L <= k; j += L) add(j, [](const C* p) { return load(p); });
        if (rest) add(k - rest, [rest](const C* p) { return load_partial(p, rest); });
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
        Vec<C> of_units[kUnits<C>];
        for (int i = 0; i < kUnits<C>; ++i) of_units[i] = sum[i][r];
        if constexpr (kUnits<C> == 4)
            sum_lanes_of_four<C>(out + r * apart, of_units);
        else
            for (int i = 0; i < kUnits<C>; ++i) out[r * apart + i] = sum_lanes<C>(of_units[i]);
    }
}

template <typename T, typename C>
class Cell {
    using V = Vec<C>;

  public:
    explicit Cell(const mmfast_rnn_cell_args& args) : args_(args), memory_(args.dtype) {}

    int run() const {
        if (!args_.gx && args_.batch && sizeof(T) != sizeof(C)) return MMFAST_INVALID_ARGUMENT;
        with_mode(args_.mode, [&](auto mode) {
            constexpr int kMode = decltype(mode)::value;
            const int64_t H = args_.hidden, batch = args_.batch, rows = gates_of(kMode) * H;
            if (args_.gx) {
                for (int64_t b = 0; b < batch; ++b)
                    for (int64_t unit = 0; unit < H; unit += kLanes<C>)
                        step<kMode>(at(args_.gx, b * rows) + unit, at(args_.gh, b * rows + unit), H, b, unit);
            } else if constexpr (sizeof(T) == sizeof(C)) {
                for (int64_t unit = 0; unit < H; unit += kLanes<C>) {
                    int64_t b = 0;
                    for (; b + kRows <= batch; b += kRows) multiply_and_step<kMode, kRows>(b, unit);
                    if (batch - b == 2) multiply_and_step<kMode, 2>(b, unit);
                    if (batch - b == 1) multiply_and_step<kMode, 1>(b, unit);
                }
            }
        });
        return MMFAST_OK;
    }

  private:
    static const T* at(const void* p, int64_t offset) { return p ? static_cast<const T*>(p) + offset : nullptr; }

    V or_zero(const T* p, int64_t offset, int valid) const { return p ? memory_.load_from(p + offset, valid) : V{}; }

    // The step of some rows' units, with the products of both sides in one sum but for GRU's n.
    template <int kMode, int R>
    void multiply_and_step(int64_t b, int64_t unit) const {
        constexpr int G = gates_of(kMode), L = kLanes<C>;
        const int64_t H = args_.hidden;
        const Side<C> sides[2] = {{at(args_.w_ih, 0), at(args_.x, b * args_.input), args_.input},
                                  {at(args_.w_hh, 0), at(args_.h0, b * H), args_.h0 ? H : 0}};
        C gx[R][G * L] = {}, gh[R][G * L] = {};
        for (int g = 0; g < G; ++g) {
            const bool both = kMode != MMFAST_GRU || g < G - 1;
            for (int lane = 0; lane < L && unit + lane < H; lane += kUnits<C>) {
                const int64_t first = g * H + unit + lane, valid = H - unit - lane;
                multiply_sides<R>(gx[0] + g * L + lane, G * L, sides, both ? 2 : 1, first, valid);
                if (!both) multiply_sides<R>(gh[0] + g * L + lane, G * L, sides + 1, 1, first, valid);
            }
        }
        for (int r = 0; r < R; ++r) step<kMode>(gx[r], gh[r], L, b + r, unit);
    }

    // gx, gh: of this unit, gates `apart`
    template <int kMode>
    void step(const T* gx, const T* gh, int64_t apart, int64_t b, int64_t unit) const {
        constexpr int G = gates_of(kMode);
        const int64_t H = args_.hidden, place = b * H + unit;
        const int valid = H - unit < kLanes<C> ? int(H - unit) : kLanes<C>;
        V x[G], a[G], kept[G], h = {}, c = {};
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            const int64_t row = g * H + unit;
            x[g] = memory_.load_from(gx + g * apart, valid) + or_zero(at(args_.b_ih, 0), row, valid);
            a[g] = or_zero(gh, g * apart, valid) + or_zero(at(args_.b_hh, 0), row, valid);
        }
        if (kMode == MMFAST_GRU) h = or_zero(at(args_.h0, 0), place, valid);
        if (kMode == MMFAST_LSTM) c = or_zero(at(args_.c0, 0), place, valid);
        h = gates_of_step<kMode>(x, a, kept, h, c);
        memory_.store_to(static_cast<T*>(args_.h) + place, h, valid);
        if (kMode == MMFAST_LSTM) memory_.store_to(static_cast<T*>(args_.c) + place, c, valid);
    }

    const mmfast_rnn_cell_args& args_;
    Memory<T, C> memory_;
};

}  // namespace

int rnn_cell(const mmfast_rnn_cell_args& args) {
    if (args.mode < MMFAST_RNN_TANH || args.mode > MMFAST_LSTM) return MMFAST_INVALID_ARGUMENT;
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return Cell<float, float>(args).run();
        case MMFAST_FLOAT64:
            return Cell<double, double>(args).run();
        case MMFAST_FLOAT16:
        case MMFAST_BFLOAT16:
            return Cell<Narrow, float>(args).run();
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
