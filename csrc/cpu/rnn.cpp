// A recurrent layer over whole sequences: the walk through time, forward and backward.
//
// Pointers, shapes, layouts and the equations: mmfast_rnn_layer in mmfast.h. Per row and step the recurrence costs
// 2 G H^2 flops forward and as many backward, and reads and writes a few rows of G H elements, so it is bound by the
// vector units wherever W_hh stays in a cache. W_hh is packed once a call: a panel holds, for one block of units and
// all k, the lanes that one tile of the product needs, one after the other. A tile is some rows of the batch times one
// block of units with all its gates, so that gate math follows in the same tile while its sums are in registers; the
// backward of a gate follows the product of the step after it in the same way. Given x in the place of gx, a tile makes
// that product, too, from a panel of W_ih.
//
// Threads own rows of the batch for the whole sequence and never wait for each other; where there are fewer rows than
// threads they share the units of a block of rows and wait once a step. Each result is computed by one chain of
// operations whoever owns it: the same bits for any number of threads.
#include "cpu/parallel.h"
#include "cpu/rnn_walk.h"

namespace mmfast {
namespace MMFAST_ISA {

int product(const mmfast_product_args& args);

namespace {

// Steps of a row whose gates' gradients are summed in one chain, for the biases: PyTorch sums the input side's over all
// rows in short ones.
constexpr int64_t kSteps = 16;

// ---- forward

template <typename T, typename C, bool kPlain>
class Forward {
    using V = Vec<C>;
    // of four gates, or GRU's three and one more
    static constexpr int kBiases = 4;

  public:
    Forward(const mmfast_rnn_forward_args& args, int direction)
        : d_(args.layer, direction),
          input_(args.input),
          panels_(d_.P, d_.H, d_.G, d_.layer.batch),
          inputs_(args.x ? input_ : 0, d_.H, d_.G, d_.layer.batch),
          projection_(d_.H, d_.projects() ? d_.P : 0, 1, d_.layer.batch) {
        x_ = static_cast<const T*>(args.x), w_ih_ = static_cast<const T*>(args.w_ih[direction]);
        gx_ = d_.moved(static_cast<const T*>(args.gx), d_.gates_at);
        gates_ = d_.G > 1 ? d_.template moved<T>(args.gates, d_.gates_at) : nullptr;
        cell_ = d_.template moved<T>(args.cell, d_.units_at);
        y_ = static_cast<T*>(args.y) + d_.y_at;
        hn_ = static_cast<T*>(args.hn) + d_.h_at;
        cn_ = lstm() ? static_cast<T*>(args.cn) + d_.c_at : nullptr;
        b_ih_ = static_cast<const T*>(args.b_ih[direction]);
        h_stride_ = state_stride<C>(d_.P);
        c_stride_ = state_stride<C>(d_.H);
    }

    int64_t scratch_bytes() const {
        return Scratch::bytes<C>(panels_.size()) + Scratch::bytes<C>(inputs_.size()) +
               Scratch::bytes<C>(projection_.size()) + 3 * Scratch::bytes<C>(d_.layer.batch * h_stride_) +
               2 * Scratch::bytes<C>(d_.layer.batch * c_stride_) + Scratch::bytes<C>(kBiases * c_stride_);
    }
    void take(Scratch& scratch) {
        bias_ = scratch.template take<C>(kBiases * c_stride_);
        add_biases();
        panels_.data = scratch.template take<C>(panels_.size());
        inputs_.data = scratch.template take<C>(inputs_.size());
        projection_.data = scratch.template take<C>(projection_.size());
        for (C*& state : h_) state = scratch.template take<C>(d_.layer.batch * h_stride_);
        C* whole = scratch.template take<C>(d_.layer.batch * h_stride_);
        whole_ = d_.drop ? whole : nullptr;
        c_ = scratch.template take<C>(d_.layer.batch * c_stride_);
        u_ = scratch.template take<C>(d_.layer.batch * c_stride_);
    }
    int64_t blocks() const { return panels_.blocks(); }
    int64_t packs() const { return 2 * panels_.blocks() + projection_.blocks(); }
    void pack_block(int64_t block) const {
        const int64_t own = panels_.blocks();
        if (block < own) return pack_transposed(d_.memory, panels_, d_.w_hh, block);
        if (block < 2 * own) return pack_transposed(d_.memory, inputs_, w_ih_, block - own);
        pack_transposed(d_.memory, projection_, d_.w_hr, block - 2 * own);
    }

    void walk(const Share& share, Barrier& barrier) const {
        begin(share);
        barrier.wait(share.parts);
        const int64_t steps = d_.layer.steps;
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t t = d_.reverse ? steps - 1 - s : s;
            const int64_t count = d_.rows.count(t), end = count < share.row_end ? count : share.row_end;
            const Piece<C> piece = {h_[s & 1], h_stride_, d_.P};
            const int pieces = s > 0 || d_.h0 ? 1 : 0;
            const int64_t ahead = d_.rows.distance(t, d_.reverse ? t - 1 : t + 1);
            const Beside<C> input = {&inputs_,
                                     {reinterpret_cast<const C*>(x_) + d_.rows.row(t, 0) * input_, input_, input_}};
            with_mode(d_.layer.mode, [&](auto mode) {
                each_tile(
                    panels_, share, share.row, end, &piece, pieces,
                    [&](int64_t b, int64_t unit, int valid, const V* sums) {
                        step<decltype(mode)::value>(s, t, b, unit, valid, sums, ahead);
                    },
                    x_ ? &input : nullptr);
            });
            if (d_.projects()) project(share, barrier, s, t, end);
            barrier.wait(share.parts);
        }
    }

    void finish() const {}

  private:
    bool lstm() const { return d_.layer.mode == MMFAST_LSTM; }

    // b_ih + b_hh of each gate; of GRU's n b_hh, and behind it b_ih
    void add_biases() const {
        const bool gru = d_.layer.mode == MMFAST_GRU;
        for (int g = 0; g < d_.G + gru; ++g)
            for (int64_t unit = 0; unit < d_.H; unit += kLanes<C>) {
                const int valid = d_.H - unit < kLanes<C> ? int(d_.H - unit) : kLanes<C>;
                const int64_t from = (g < d_.G ? g : 2) * d_.H + unit;
                V sum = {};
                if (g < d_.G) sum += d_.or_zero(d_.b_hh, from, valid);
                if (!gru || g != 2) sum += d_.or_zero(b_ih_, from, valid);
                store(bias_ + g * c_stride_ + unit, sum);
            }
    }

    void begin(const Share& share) const {
        each_vector<C>(share, d_.P, [&](int64_t b, int64_t unit, int valid) {
            const V h = d_.or_zero(d_.h0, b * d_.P + unit, valid);
            if (d_.rows.empty(b)) d_.memory.store_to(hn_ + b * d_.P + unit, h, valid);
            for (C* state : h_) enter(state, first(b) ? V{} : h, b, unit, valid);
        });
        if (!lstm()) return;
        each_vector<C>(share, d_.H, [&](int64_t b, int64_t unit, int valid) {
            const V c = d_.or_zero(d_.c0, b * d_.H + unit, valid);
            if (d_.rows.empty(b)) d_.memory.store_to(cn_ + b * d_.H + unit, c, valid);
            store(c_ + b * c_stride_ + unit, first(b) ? V{} : c);
        });
    }

    // whether row 0 keeps the initial state out; in reverse nothing does
    bool first(int64_t b) const { return !d_.reverse && d_.rows.cut(0, b, false); }

    // h is what the next step of b finds
    void enter(C* state, V h, int64_t b, int64_t unit, int valid) const {
        const int64_t at = b * h_stride_ + unit;
        if (!kPlain && whole_) store(whole_ + at, h);
        store(state + at, d_.dropped(h, b, unit, valid));
    }

    bool last(int64_t t, int64_t b) const {
        return d_.reverse ? t == 0 : t + 1 == d_.layer.steps || !d_.rows.active(t + 1, b);
    }
    bool cut_after(int64_t t, int64_t b) const {
        return !kPlain && d_.layer.reset && !last(t, b) && d_.rows.cut(d_.reverse ? t - 1 : t + 1, b, d_.reverse);
    }
    V before(int64_t s, int64_t b, int64_t unit) const {
        return load((!kPlain && whole_ ? whole_ : h_[s & 1]) + b * h_stride_ + unit);
    }

    template <int kMode>
    void step(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, const V* sums, int64_t ahead) const {
        constexpr int G = gates_of(kMode);
        const int64_t row = d_.rows.row(t, b), H = d_.H;
        if (!d_.rows.active(t, b)) {
            if (!d_.projects()) d_.memory.store_to(y_ + row * d_.y_stride + unit, V{}, valid);
            return;
        }
        const int64_t at = row * d_.gates_stride + unit;
        V x[G], a[G], kept[G], h;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            a[g] = sums[g] + load(bias_ + g * c_stride_ + unit);
            if (!gx_) {
                x[g] = sums[kBeside + g];
                if (gates_) fetch_to_write(gates_ + at + g * H + ahead * d_.gates_stride);
                continue;
            }
            x[g] = d_.memory.load_from(gx_ + at + g * H, valid);
            fetch(gx_ + at + g * H + ahead * d_.gates_stride);
        }
        if (kMode == MMFAST_GRU) x[G - 1] += load(bias_ + G * c_stride_ + unit);
        T* cell = cell_ ? cell_ + row * d_.units_stride + unit : nullptr;
        if (cell) fetch_to_write(cell + ahead * d_.units_stride);
        if (!d_.projects()) fetch_to_write(y_ + (row + ahead) * d_.y_stride + unit);
        if constexpr (kMode == MMFAST_LSTM) {
            C* state = c_ + b * c_stride_ + unit;
            V c = load(state);
            h = gates_of_step<kMode>(x, a, kept, V{}, c);
            store(state, cut_after(t, b) ? V{} : c);
            if (cell) d_.memory.store_to(cell, c, valid);
            if (last(t, b)) d_.memory.store_to(cn_ + b * H + unit, c, valid);
        } else {
            V none;
            h = gates_of_step<kMode>(x, a, kept, kMode == MMFAST_GRU ? before(s, b, unit) : V{}, none);
            if (cell) d_.memory.store_to(cell, kMode == MMFAST_GRU ? a[G - 1] : h, valid);
        }
        if (G > 1 && gates_) {
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) d_.memory.store_to(gates_ + at + g * H, kept[g], valid);
        }
        if (kMode == MMFAST_LSTM && d_.projects()) return store(u_ + b * c_stride_ + unit, h);
        output(s, t, b, unit, valid, h);
    }

    void project(const Share& share, Barrier& barrier, int64_t s, int64_t t, int64_t end) const {
        barrier.wait(share.parts);
        const Piece<C> piece = {u_, c_stride_, d_.H};
        each_tile(projection_, share, share.row, end, &piece, 1,
                  [&](int64_t b, int64_t unit, int valid, const V* sums) {
                      if (d_.rows.active(t, b)) return output(s, t, b, unit, valid, *sums);
                      d_.memory.store_to(y_ + d_.rows.row(t, b) * d_.y_stride + unit, V{}, valid);
                  });
    }

    // h: before zoneout
    void output(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V h) const {
        const int64_t row = d_.rows.row(t, b);
        if (d_.zones()) {
            const V k = d_.stay(row, unit, valid), old = before(s, b, unit);
            h = d_.zone ? (k > 0 ? old : h) : k * old + (1 - k) * h;
        }
        d_.memory.store_to(y_ + row * d_.y_stride + unit, h, valid);
        enter(h_[(s + 1) & 1], cut_after(t, b) ? V{} : h, b, unit, valid);
        if (last(t, b)) d_.memory.store_to(hn_ + b * d_.P + unit, h, valid);
    }

    Direction<T, C, kPlain> d_;
    int64_t input_, h_stride_, c_stride_;
    // gx_: null with x_
    const T *gx_, *b_ih_, *x_, *w_ih_;
    T *gates_, *cell_, *y_, *hn_, *cn_;
    Panels<C> panels_, inputs_, projection_;
    C* bias_;
    // h_: what W_hh is multiplied by, of this step and the next; whole_: with a dropout mask, h' without it
    C *h_[2], *whole_, *c_, *u_;
};

// ---- backward

template <typename T, typename C, bool kPlain>
class Backward {
    // float32 and float64: the product reads dgates where they are written. 16 bits: a copy in float32 in scratch
    static constexpr bool kCopies = sizeof(T) != sizeof(C);
    using V = Vec<C>;

  public:
    Backward(const mmfast_rnn_backward_args& args, int direction)
        : d_(args.layer, direction),
          panels_(d_.G * d_.H, d_.P, 1, d_.layer.batch),
          projection_(d_.P, d_.projects() ? d_.H : 0, 1, d_.layer.batch) {
        const bool gru = d_.layer.mode == MMFAST_GRU;
        gates_ = d_.G > 1 ? static_cast<const T*>(args.gates) + d_.gates_at : nullptr;
        cell_ = d_.G > 1 || d_.zones() ? static_cast<const T*>(args.cell) + d_.units_at : nullptr;
        y_ = static_cast<const T*>(args.y) + d_.y_at;
        dy_ = d_.moved(static_cast<const T*>(args.dy), d_.y_at);
        dhn_ = d_.moved(static_cast<const T*>(args.dhn), d_.h_at);
        dcn_ = d_.moved(static_cast<const T*>(args.dcn), d_.c_at);
        dgates_ = static_cast<T*>(args.dgates) + d_.gates_at;
        dm_ = gru ? static_cast<T*>(args.dm) + d_.units_at : nullptr;
        dh_ = d_.projects() ? static_cast<T*>(args.dh) + d_.y_at : nullptr;
        full_ = d_.projects() ? static_cast<T*>(args.u) + d_.units_at : nullptr;
        previous_ = d_.template moved<T>(args.previous, d_.y_at);
        dh0_ = d_.template moved<T>(args.dh0, d_.h_at);
        dc0_ = d_.template moved<T>(args.dc0, d_.c_at);
        db_ih_ = static_cast<T*>(args.db_ih[direction]), db_hh_ = static_cast<T*>(args.db_hh[direction]);
        carries_ = gru || d_.zones();
        h_stride_ = state_stride<C>(d_.P);
        c_stride_ = state_stride<C>(d_.H);
        copy_stride_ = state_stride<C>(d_.G * d_.H);
    }

    int64_t scratch_bytes() const {
        return Scratch::bytes<C>(panels_.size()) + Scratch::bytes<C>(projection_.size()) +
               2 * Scratch::bytes<C>(d_.layer.batch * h_stride_) + Scratch::bytes<C>(d_.layer.batch * c_stride_) +
               Scratch::bytes<C>(sums() * c_stride_) +
               (kCopies ? 2 * Scratch::bytes<C>(d_.layer.batch * copy_stride_) : 0);
    }
    void take(Scratch& scratch) {
        panels_.data = scratch.template take<C>(panels_.size());
        projection_.data = scratch.template take<C>(projection_.size());
        carry_h_ = scratch.template take<C>(d_.layer.batch * h_stride_);
        inner_ = scratch.template take<C>(d_.layer.batch * h_stride_);
        carry_c_ = scratch.template take<C>(d_.layer.batch * c_stride_);
        sums_ = scratch.template take<C>(sums() * c_stride_);
        if (!kCopies) return;
        for (C*& copy : copy_) copy = scratch.template take<C>(d_.layer.batch * copy_stride_);
    }
    int64_t blocks() const { return panels_.blocks(); }
    int64_t packs() const { return panels_.blocks() + projection_.blocks(); }
    void pack_block(int64_t block) const {
        if (block < panels_.blocks()) return pack(d_.memory, panels_, d_.w_hh, block);
        pack(d_.memory, projection_, d_.w_hr, block - panels_.blocks());
    }

    void walk(const Share& share, Barrier& barrier) const {
        begin(share);
        barrier.wait(share.parts);
        const int64_t steps = d_.layer.steps;
        int64_t before = 0;  // rows of the step walked before this one
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t t = d_.reverse ? s : steps - 1 - s, count = d_.rows.count(t);
            // rows that the step before had pass a gradient on; rows that it had not begin here, or end
            arrive(share, s, t, before < count || dh0_ || dc0_ ? before : count, true);
            arrive(share, s, t, count, false, before);
            if (d_.projects()) project(share, barrier, s, t, count);
            before = count;
            barrier.wait(share.parts);
        }
        if (dh0_ || dc0_) arrive(share, steps, -1, before, true);
        if (dc0_) finish_c(share);
    }

    // The biases' gradients, each row's sum over the steps added in a tree over the batch, for however many threads.
    void finish() const {
        if (!db_ih_ && !db_hh_) return;
        const int64_t batch = d_.layer.batch, row = 2 * biases() * c_stride_;
        for (int64_t unit = 0; unit < d_.H; unit += kLanes<C>) {
            const int valid = d_.H - unit < kLanes<C> ? int(d_.H - unit) : kLanes<C>;
            for (int64_t b = 0; b < batch; ++b) close_chain(b, unit);
            for (int g = 0; g < biases(); ++g) {
                C* sums = sums_ + (biases() + g) * c_stride_ + unit;
                for (int64_t apart = 1; apart < batch; apart *= 2)
                    for (int64_t b = 0; b + apart < batch; b += 2 * apart)
                        store(sums + b * row, load(sums + b * row) + load(sums + (b + apart) * row));
                const V sum = batch ? load(sums) : V{};
                if (db_ih_ && g < d_.G) d_.memory.store_to(db_ih_ + g * d_.H + unit, sum, valid);
                // of GRU's n it is the sum of dm, which comes after that of dgates
                if (db_hh_) d_.memory.store_to(db_hh_ + (g < d_.G ? g : 2) * d_.H + unit, sum, valid);
            }
        }
    }

  private:
    // Sums for a row of the batch, of dgates and GRU's dm: those of some steps, and behind them those of the steps
    // before.
    int biases() const { return d_.G + (dm_ != nullptr); }
    int64_t sums() const { return db_ih_ || db_hh_ ? 2 * d_.layer.batch * biases() : 0; }

    void close_chain(int64_t b, int64_t unit) const {
        for (int g = 0; g < biases(); ++g) {
            C *sum = sums_ + (2 * b * biases() + g) * c_stride_ + unit, *before = sum + biases() * c_stride_;
            store(before, load(before) + load(sum));
            store(sum, V{});
        }
    }

    void begin(const Share& share) const {
        each_vector<C>(share, d_.H, [&](int64_t b, int64_t unit, int valid) {
            store(carry_c_ + b * c_stride_ + unit, d_.or_zero(dcn_, b * d_.H + unit, valid));
            for (int i = 0; sums() && i < 2 * biases(); ++i)
                store(sums_ + (2 * b * biases() + i) * c_stride_ + unit, V{});
        });
        each_vector<C>(share, d_.P, [&](int64_t b, int64_t unit, int valid) {
            const int64_t at = b * d_.P + unit;
            if (dh0_ && d_.rows.empty(b)) d_.memory.store_to(dh0_ + at, d_.or_zero(dhn_, at, valid), valid);
        });
    }

    void finish_c(const Share& share) const {
        each_vector<C>(share, d_.H, [&](int64_t b, int64_t unit, int valid) {
            d_.memory.store_to(dc0_ + b * d_.H + unit, load(carry_c_ + b * c_stride_ + unit), valid);
        });
    }

    bool has(int64_t t, int64_t b) const { return t >= 0 && b < d_.rows.count(t) && d_.rows.active(t, b); }

    // The gradients of h for rows [begin, end) of the batch at step t, the s-th that is walked, and what follows from
    // them; t = -1: only the initial state's gradient.
    void arrive(const Share& share, int64_t s, int64_t t, int64_t end, bool product, int64_t begin = 0) const {
        begin = begin > share.row ? begin : share.row;
        end = end < share.row_end ? end : share.row_end;
        const int64_t from = d_.reverse ? s - 1 : d_.layer.steps - s;  // the step walked before
        Piece<C> pieces[2] = {};
        const int count = product && s > 0 ? pieces_of(s, from, pieces) : 0;
        const int64_t ahead = t < 0 ? 0 : d_.rows.distance(t, d_.reverse ? t + 1 : t - 1);
        with_mode(d_.layer.mode, [&](auto mode) {
            each_tile(panels_, share, begin, end, pieces, count,
                      [&](int64_t b, int64_t unit, int valid, const V* sums) {
                          const bool carried = s > 0 && product && d_.rows.active(from, b);
                          V dh = carried ? passed_on(from, b, unit, valid, *sums) : *sums;
                          if (has(t, b)) {
                              if (!carried) dh = d_.or_zero(dhn_, b * d_.P + unit, valid);
                              return total<decltype(mode)::value>(s, t, b, unit, valid, dh, ahead);
                          }
                          if (carried && dh0_) d_.memory.store_to(dh0_ + b * d_.P + unit, dh, valid);
                          if (t >= 0 && b < d_.rows.count(t)) clear<decltype(mode)::value>(s, t, b, unit, valid);
                      });
        });
    }

    // the gradient of h', from that of the step it entered
    V passed_on(int64_t from, int64_t b, int64_t unit, int valid, V sum) const {
        if (d_.rows.cut(from, b, d_.reverse)) return V{};
        sum = d_.dropped(sum, b, unit, valid);
        return carries_ ? sum + load(carry_h_ + b * h_stride_ + unit) : sum;
    }

    int pieces_of(int64_t s, int64_t from, Piece<C>* pieces) const {
        if (kCopies) {
            pieces[0] = {copy_[(s - 1) & 1], copy_stride_, d_.G * d_.H};
            return 1;
        }
        const int64_t row = d_.rows.row(from, 0);
        const C* dgates = reinterpret_cast<const C*>(dgates_ + row * d_.gates_stride);
        pieces[0] = {dgates, d_.gates_stride, (dm_ ? 2 : d_.G) * d_.H};
        if (!dm_) return 1;
        pieces[1] = {reinterpret_cast<const C*>(dm_ + row * d_.units_stride), d_.units_stride, d_.H};
        return 2;
    }

    // The state before this row: that of the row one step before, or the initial one; `all` and `initial` have `units`
    // columns a direction.
    V previous(const T* all, const T* initial, int64_t units, int64_t t, int64_t b, int64_t unit, int valid) const {
        if (d_.rows.cut(t, b, d_.reverse)) return V{};
        const int64_t before = d_.reverse ? t + 1 : t - 1;
        if (before < 0 || before >= d_.layer.steps || !d_.rows.active(before, b))
            return d_.or_zero(initial, b * units + unit, valid);
        return d_.memory.load_from(all + d_.rows.row(before, b) * d_.layer.directions * units + unit, valid);
    }

    template <int kMode>
    void clear(int64_t s, int64_t t, int64_t b, int64_t unit, int valid) const {
        const int64_t row = d_.rows.row(t, b), at = row * d_.y_stride + unit;
        if (previous_) d_.memory.store_to(previous_ + at, V{}, valid);
        if (d_.projects()) {
            store(inner_ + b * h_stride_ + unit, V{});
            return d_.memory.store_to(dh_ + at, V{}, valid);
        }
        const V zero[4] = {};
        write<kMode>(s, row, b, unit, valid, zero, zero[0]);
    }

    // dh: the gradient of h but for dy
    template <int kMode>
    void total(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V dh, int64_t ahead) const {
        const int64_t row = d_.rows.row(t, b), at = row * d_.y_stride + unit;
        if (dy_) {
            dh += d_.memory.load_from(dy_ + at, valid);
            fetch(dy_ + at + ahead * d_.y_stride);
        }
        V h = {}, kept = {};
        if (kMode == MMFAST_GRU || previous_) h = previous(y_, d_.h0, d_.P, t, b, unit, valid);
        if (previous_) d_.memory.store_to(previous_ + at, d_.dropped(h, b, unit, valid), valid);
        if (d_.zones()) {
            kept = d_.stay(row, unit, valid) * dh;
            dh -= kept;
            if (kMode != MMFAST_GRU) store(carry_h_ + b * h_stride_ + unit, kept);
        }
        if (kMode != MMFAST_LSTM || !d_.projects()) return gate<kMode>(s, t, b, unit, valid, dh, h, kept, ahead);
        store(inner_ + b * h_stride_ + unit, dh);
        d_.memory.store_to(dh_ + at, dh, valid);
    }

    void project(const Share& share, Barrier& barrier, int64_t s, int64_t t, int64_t end) const {
        barrier.wait(share.parts);
        const Piece<C> piece = {inner_, h_stride_, d_.P};
        end = end < share.row_end ? end : share.row_end;
        each_tile(projection_, share, share.row, end, &piece, 1,
                  [&](int64_t b, int64_t unit, int valid, const V* sums) {
                      const V zero[4] = {};
                      if (has(t, b)) return gate<MMFAST_LSTM>(s, t, b, unit, valid, *sums, V{}, V{}, 0);
                      const int64_t row = d_.rows.row(t, b);
                      d_.memory.store_to(full_ + row * d_.units_stride + unit, V{}, valid);
                      write<MMFAST_LSTM>(s, row, b, unit, valid, zero, zero[0]);
                  });
    }

    template <int kMode>
    void write(int64_t s, int64_t row, int64_t b, int64_t unit, int valid, const V* d, V dm) const {
        constexpr int G = gates_of(kMode);
        const int64_t H = d_.H;
        T* dgates = dgates_ + row * d_.gates_stride + unit;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) d_.memory.store_to(dgates + g * H, d[g], valid);
        if (kMode == MMFAST_GRU) d_.memory.store_to(dm_ + row * d_.units_stride + unit, dm, valid);
        if (db_ih_ || db_hh_) {
            // here, for in a step whoever writes a unit's gates is alone with its sums
            if (s % kSteps == kSteps - 1) close_chain(b, unit);
            C* sum = sums_ + 2 * b * (G + (kMode == MMFAST_GRU)) * c_stride_ + unit;
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) store(sum + g * c_stride_, load(sum + g * c_stride_) + d[g]);
            if (kMode == MMFAST_GRU) store(sum + G * c_stride_, load(sum + G * c_stride_) + dm);
        }
        if (!kCopies) return;
        C* copy = copy_[s & 1] + b * copy_stride_ + unit;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) store_float(copy + g * H, kMode == MMFAST_GRU && g == 2 ? dm : d[g], valid);
    }

    // dh: the gradient of h before zoneout, of an LSTM with a projection that of u; GRU: h', and what of dh stays
    template <int kMode>
    void gate(int64_t s, int64_t t, int64_t b, int64_t unit, int valid, V dh, V h, V kept, int64_t ahead) const {
        constexpr int G = gates_of(kMode);
        const int64_t row = d_.rows.row(t, b), at = row * d_.units_stride + unit;
        V a[4] = {}, d[4] = {}, dm = {};
#pragma GCC unroll 4
        for (int g = 0; g < G && G > 1; ++g) {
            const T* gate = gates_ + row * d_.gates_stride + g * d_.H + unit;
            a[g] = d_.memory.load_from(gate, valid);
            fetch(gate + ahead * d_.gates_stride);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) fetch_to_write(dgates_ + (row + ahead) * d_.gates_stride + g * d_.H + unit);
        // of the state before, which is read a step later once more or for the first time
        if (G > 1) fetch(cell_ + at + (kMode == MMFAST_LSTM ? 2 : 1) * ahead * d_.units_stride);
        if (kMode != MMFAST_LSTM) fetch(y_ + at + (kMode == MMFAST_GRU ? 2 : 1) * ahead * d_.units_stride);
        if constexpr (kMode == MMFAST_LSTM) {
            C* carry = carry_c_ + b * c_stride_ + unit;
            const V i = a[0], f = a[1], g = a[2], o = a[3];
            const V tanh_c = tanh_of(d_.memory.load_from(cell_ + at, valid));
            const V dc = load(carry) + dh * o * (1 - tanh_c * tanh_c);
            d[0] = dc * g * (i * (1 - i));
            d[1] = dc * previous(cell_, d_.c0, d_.H, t, b, unit, valid) * (f * (1 - f));
            d[2] = dc * i * (1 - g * g);
            d[3] = dh * tanh_c * (o * (1 - o));
            store(carry, d_.rows.cut(t, b, d_.reverse) ? V{} : dc * f);
            if (!kPlain && full_) d_.memory.store_to(full_ + at, o * tanh_c, valid);
        } else if constexpr (kMode == MMFAST_GRU) {
            const V r = a[0], z = a[1], n = a[2], m = d_.memory.load_from(cell_ + at, valid);
            fetch_to_write(dm_ + at + ahead * d_.units_stride);
            const V dn = dh * (1 - z) * (1 - n * n);
            d[0] = dn * m * (r * (1 - r));
            d[1] = dh * (h - n) * (z * (1 - z));
            d[2] = dn;
            dm = dn * r;
            store(carry_h_ + b * h_stride_ + unit, dh * z + kept);
        } else {
            const V y = d_.memory.load_from((cell_ ? cell_ : y_) + at, valid);
            d[0] = kMode == MMFAST_RNN_TANH ? dh * (1 - y * y) : y > 0 ? dh : V{};
        }
        write<kMode>(s, row, b, unit, valid, d, dm);
    }

    Direction<T, C, kPlain> d_;
    bool carries_;
    int64_t h_stride_, c_stride_, copy_stride_;
    const T *gates_, *cell_, *y_, *dy_, *dhn_, *dcn_;
    T *dgates_, *dm_, *dh_, *full_, *previous_, *dh0_, *dc0_, *db_ih_, *db_hh_;
    Panels<C> panels_, projection_;
    // carry_h_: what of the gradient of h reaches h' past W_hh; inner_: with a projection, that of W_hr u
    C *carry_h_, *inner_, *carry_c_, *sums_, *copy_[2];
};

// ---- the products over all rows

// dx, dW_ih and dW_hh where they are asked for, by product.cpp; of each direction, of GRU's n by dm.
template <typename T>
class Products {
  public:
    explicit Products(const mmfast_rnn_backward_args& args)
        : args_(args),
          rows_(args.layer.offsets ? args.layer.offsets[args.layer.steps] : args.layer.steps * args.layer.batch),
          hidden_(args.layer.hidden),
          gates_(gates_of(args.layer.mode) * hidden_),
          output_(args.layer.proj ? args.layer.proj : hidden_) {}

    int run() {
        const int directions = args_.layer.directions;
        const int64_t inputs = args_.input, stride = directions * gates_;
        for (int d = 0; d < directions; ++d) {
            const T* dgates = static_cast<const T*>(args_.dgates) + d * gates_;
            const T *x = static_cast<const T*>(args_.x), *w_ih = static_cast<const T*>(args_.w_ih[d]);
            if (args_.dx) multiply({dgates, stride, 1}, {w_ih, inputs, 1}, args_.dx, rows_, inputs, gates_, d > 0);
            if (args_.dw_ih[d])
                multiply({dgates, 1, stride}, {x, inputs, 1}, args_.dw_ih[d], gates_, inputs, rows_, false);
            T* dw_hh = static_cast<T*>(args_.dw_hh[d]);
            if (!dw_hh) continue;
            const bool gru = args_.layer.mode == MMFAST_GRU;
            recurrent(d, {dgates, 1, stride}, dw_hh, gru ? 2 * hidden_ : gates_);
            if (!gru) continue;
            const T* dm = static_cast<const T*>(args_.dm) + d * hidden_;
            recurrent(d, {dm, 1, directions * hidden_}, dw_hh + 2 * hidden_ * output_, hidden_);
        }
        return status_;
    }

  private:
    struct Matrix {
        const T* at;
        int64_t row, column;  // strides
    };

    void multiply(const Matrix& a, const Matrix& b, void* out, int64_t rows, int64_t columns, int64_t depth, bool add) {
        const mmfast_product_args args = {args_.layer.dtype,
                                          rows,
                                          columns,
                                          depth,
                                          a.at,
                                          a.row,
                                          a.column,
                                          b.at,
                                          b.row,
                                          b.column,
                                          nullptr,
                                          out,
                                          columns,
                                          add,
                                          args_.layer.threads};
        if (const int status = product(args)) status_ = status;
    }

    // out = d times the state before each row, d (count, N)
    void recurrent(int direction, Matrix d, T* out, int64_t count) {
        const int64_t stride = args_.layer.directions * output_, batch = args_.layer.batch, later = rows_ - batch;
        if (args_.previous) {
            const T* previous = static_cast<const T*>(args_.previous) + direction * output_;
            return multiply(d, {previous, stride, 1}, out, count, output_, rows_, false);
        }
        // padded: the state before is the output `batch` rows before, or after in the reverse direction
        const T* y = static_cast<const T*>(args_.y) + direction * output_ + (direction ? batch * stride : 0);
        const Matrix first = {d.at + (direction ? later * d.column : 0), d.row, d.column};
        d.at += direction ? 0 : batch * d.column;
        multiply(d, {y, stride, 1}, out, count, output_, later, false);
        if (!args_.layer.h0) return;
        const T* h0 = static_cast<const T*>(args_.layer.h0) + direction * batch * output_;
        multiply(first, {h0, output_, 1}, out, count, output_, batch, true);
    }

    const mmfast_rnn_backward_args& args_;
    int64_t rows_, hidden_, gates_, output_;
    int status_ = MMFAST_OK;
};

// ---- both

// too little work to wake a second thread for: about 20 us on one
int threads_for(const mmfast_rnn_layer& layer, int gates) {
    const double rows = layer.offsets ? double(layer.offsets[layer.steps]) : double(layer.steps) * double(layer.batch);
    const double flops = 2.0 * rows * layer.directions * gates * double(layer.hidden) * double(layer.hidden);
    return flops < 1e6 ? 1 : layer.threads;
}

template <typename Walker, typename Args>
int run(const Args& args, int gates) {
    const int directions = args.layer.directions;
    Walker walkers[2] = {Walker(args, 0), Walker(args, directions - 1)};
    int64_t bytes = 0;
    for (int d = 0; d < directions; ++d) bytes += walkers[d].scratch_bytes();
    Scratch scratch(bytes);
    if (scratch.failed()) return MMFAST_OUT_OF_MEMORY;
    for (int d = 0; d < directions; ++d) walkers[d].take(scratch);
    const int64_t blocks = walkers[0].blocks(), packs = walkers[0].packs();
    Barrier packed, stepped[2];
    parallel_team(threads_for(args.layer, gates), [&](int index, int count) {
        for (int64_t i = index; i < directions * packs; i += count) walkers[i / packs].pack_block(i % packs);
        packed.wait(count);
        // each direction has half the threads, the first the odd one; a lone thread walks both
        const bool split = directions == 2 && count > 1;
        const int half = count - count / 2;
        for (int d = 0; d < directions; ++d) {
            const int first = split && d == 1 ? half : 0, size = !split ? count : d == 0 ? half : count - half;
            if (index < first || index >= first + size) continue;
            const Share share = share_of(args.layer.batch, blocks, index - first, size);
            if (share.row < share.row_end) walkers[d].walk(share, stepped[d]);
        }
    });
    for (int d = 0; d < directions; ++d) walkers[d].finish();
    return MMFAST_OK;
}

bool is_plain(const mmfast_rnn_layer& l) {
    return !l.lengths && !l.reset && !l.zoneout_mask && !l.dropout_mask && !l.proj && l.zoneout == 0;
}

template <template <typename, typename, bool> class Walker, typename T, typename Args>
int run_plain(const Args& args) {
    const int gates = gates_of(args.layer.mode);
    return is_plain(args.layer) ? run<Walker<T, T, true>>(args, gates) : run<Walker<T, T, false>>(args, gates);
}

template <template <typename, typename, bool> class Walker, typename Args>
int run_dtype(const Args& args) {
    const int mode = args.layer.mode;
    if (mode < MMFAST_RNN_TANH || mode > MMFAST_LSTM) return MMFAST_INVALID_ARGUMENT;
    switch (args.layer.dtype) {
        case MMFAST_FLOAT32:
            return run_plain<Walker, float>(args);
        case MMFAST_FLOAT64:
            return run_plain<Walker, double>(args);
        case MMFAST_FLOAT16:
        case MMFAST_BFLOAT16:
            return run<Walker<Narrow, float, false>>(args, gates_of(mode));
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace

int rnn_forward(const mmfast_rnn_forward_args& args) { return run_dtype<Forward>(args); }

int rnn_backward(const mmfast_rnn_backward_args& args) {
    if (const int status = run_dtype<Backward>(args)) return status;
    if (args.layer.dtype == MMFAST_FLOAT32) return Products<float>(args).run();
    return args.layer.dtype == MMFAST_FLOAT64 ? Products<double>(args).run() : MMFAST_OK;
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
