// One step of a Cell: mmfast_rnn_cell_args in mmfast.h. For a row or two its products are made here, bound by reading
// the weights once; a call of a library's product takes longer.
#include "cpu/rnn_gates.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

// out[row] = sum over k of w[row][k] * x[k], four rows at a time
template <typename C>
void multiply_vector(C* out, const C* w, const C* x, int64_t rows, int64_t k) {
    constexpr int L = kLanes<C>;
    const int rest = int(k % L);
    for (int64_t row = 0; row < rows; row += 4) {
        const C* at[4];
        for (int i = 0; i < 4; ++i) at[i] = w + (row + i < rows ? row + i : row) * k;
        Vec<C> sum[4] = {};
        for (int64_t j = 0; j + L <= k; j += L) {
            const Vec<C> right = load(x + j);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[i] += load(at[i] + j) * right;
        }
        if (rest) {
            const Vec<C> right = load_partial(x + k - rest, rest);
            for (int i = 0; i < 4; ++i) sum[i] += load_partial(at[i] + k - rest, rest) * right;
        }
        for (int i = 0; i < 4 && row + i < rows; ++i) out[row + i] = sum_lanes<C>(sum[i]);
    }
}

template <typename T, typename C>
class Cell {
    using V = Vec<C>;

  public:
    explicit Cell(const mmfast_rnn_cell_args& args) : args_(args), memory_(args.dtype) {}

    int run() const {
        const int64_t H = args_.hidden, rows = gates_of(args_.mode) * H;
        Scratch scratch(args_.gx ? 0 : 2 * Scratch::bytes<C>(rows));
        if (scratch.failed()) return MMFAST_OUT_OF_MEMORY;
        C* sides[2] = {};
        if (!args_.gx)
            for (C*& side : sides) side = scratch.template take<C>(rows);
        for (int64_t b = 0; b < args_.batch; ++b) {
            const T *gx = at(args_.gx, b * rows), *gh = at(args_.gh, b * rows);
            if (!args_.gx) {
                if constexpr (sizeof(T) != sizeof(C)) return MMFAST_INVALID_ARGUMENT;
                multiply(sides[0], args_.w_ih, at(args_.x, b * args_.input), rows, args_.input);
                multiply(sides[1], args_.w_hh, at(args_.h0, b * H), rows, H);
                gx = reinterpret_cast<const T*>(sides[0]), gh = reinterpret_cast<const T*>(sides[1]);
            }
            with_mode(args_.mode, [&](auto mode) {
                for (int64_t unit = 0; unit < H; unit += kLanes<C>) step<decltype(mode)::value>(gx, gh, b, unit);
            });
        }
        return MMFAST_OK;
    }

  private:
    static const T* at(const void* p, int64_t offset) { return p ? static_cast<const T*>(p) + offset : nullptr; }

    static void multiply(C* out, const void* w, const void* x, int64_t rows, int64_t k) {
        multiply_vector(out, static_cast<const C*>(w), static_cast<const C*>(x), rows, x ? k : 0);
    }

    V or_zero(const T* p, int64_t offset, int valid) const { return p ? memory_.load_from(p + offset, valid) : V{}; }

    template <int kMode>
    void step(const T* gx, const T* gh, int64_t b, int64_t unit) const {
        constexpr int G = gates_of(kMode);
        const int64_t H = args_.hidden, place = b * H + unit;
        const int valid = H - unit < kLanes<C> ? int(H - unit) : kLanes<C>;
        V x[G], a[G], kept[G], h = {}, c = {};
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            const int64_t row = g * H + unit;
            x[g] = memory_.load_from(gx + row, valid) + or_zero(at(args_.b_ih, 0), row, valid);
            a[g] = or_zero(gh, row, valid) + or_zero(at(args_.b_hh, 0), row, valid);
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
