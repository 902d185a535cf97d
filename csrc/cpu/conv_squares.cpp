// Transposed convolution in one or two dimensions of two taps a phase, by fewer products of matrices, and its
// gradients.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. Where kernel = 2 stride, the output of an
// axis for which o + before = stride q + r is x[q] w[r] + x[q - 1] w[r + stride]. Two of them a stride apart, and so
// two neighbours of dx, are
//     d0 g1 + d1 g0 = a + b          a = -g1 (d1 - d0)      b = (g0 + g1) d1      c = g0 (d2 - d1)
//     d1 g1 + d2 g0 = b + c
// three products instead of four, and of both axes, in squares of four targets, nine instead of sixteen; in one
// dimension the second axis has one place, and a square is a pair. The source lies channels last between zeros, beside
// it its differences along each axis and along both: a product takes its rows, the middles of squares, from one of
// them. Of dweight, from two neighbours of x and what they meet in dy,
//     x0 d0 + x1 d1 = a + b          a = x0 (d0 - d1)       b = (x0 + x1) d1      c = x1 (d2 - d1)
//     x0 d1 + x1 d2 = b + c
// A target is made of no other sources than the formula says, but of infinities differences make NaN: a result that is
// not finite is declined.
//
// Bound by multiplications, as conv_gather.cpp. Source: Winograd, "Arithmetic Complexity of Computations", 1980; Lavin
// and Gray, arXiv:1509.09308. Work is cut by shapes alone, and sums are added in a fixed order: results do not depend
// on the number of threads.
#include "cpu/conv_tile.h"
#include "cpu/half.h"
#include "cpu/parallel.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_conv_transpose_args;

// squares of each phase in a block: sources stay near the second-level cache, but a large weight is read less often,
// and of few terms a square, larger tiles are filled better by more squares
constexpr int64_t kFewSquares = 64, kManySquares = 128, kLargeWeight = 1 << 20, kFewTerms = kRows > 6 ? 256 : 0;
constexpr int64_t kLeastChain = 16, kMostChain = 64;  // differences err more than what they are of
enum Part { kBefore, kBoth, kAfter };                 // a, b, c

// One axis of what is computed, the targets, and of what that is made of, the sources, at places between zeros; or an
// axis of one place, and so not of pairs.
struct Axis {
    bool forward, paired;
    int64_t stride, before, sources, targets;
    int64_t step, reach;  // from one target of a pair to the other, from one source that it sees to the next
    int64_t pairs;        // of one phase

    Axis(const Args& a, int d, bool is_forward)
        : forward(is_forward),
          paired(a.kernel[d] > 1),
          stride(a.stride[d]),
          before(a.before[d]),
          sources(forward ? a.in_size[d] : a.out_size[d]),
          targets(forward ? a.out_size[d] : a.in_size[d]),
          step(forward ? stride : 1),
          reach(forward ? 1 : stride),
          pairs(parts_of(parts_of(targets, step), 2)) {}

    // Of the targets j + step * 2 * pair and the next one, the place of the source in the middle; of dx, whose sources
    // have phases, of the first phase.
    int64_t middle(int64_t j, int64_t pair) const {
        if (!paired) return 0;
        return forward ? (j + before) / stride + 2 * pair : (2 * pair + 1) * stride;
    }
    // The places that some pairs see.
    Range places(Range some) const {
        if (!paired) return {0, 1};
        if (!forward) return {2 * some.begin * stride, (2 * some.end + 1) * stride};
        return {before / stride + 2 * some.begin - 1, (stride - 1 + before) / stride + 2 * some.end};
    }
    Range targets_of(Range some) const { return {2 * step * some.begin, least(targets, 2 * step * some.end)}; }
    int64_t shift() const { return forward ? 0 : before; }  // from a source to its place
};

// A tensor (N, channels, height, width) that is read.
template <typename T>
struct Image {
    const T* data;
    bool last;
    int64_t channels, size[2];

    // (samples, places, channels), zero where there is none of its positions, whose places are `shift` further
    void lay_out(Range samples, const Range* places, const int64_t* shift, T* to) const {
        const int64_t area = size[0] * size[1], pitch = places[1].size() * channels;
        memset(to, 0, size_t(samples.size() * places[0].size() * pitch) * sizeof(T));
        const int64_t above = shift[0] - places[0].begin, left = shift[1] - places[1].begin;
        const Range rows{most(0, -above), least(size[0], places[0].size() - above)};
        const Range columns{most(0, -left), least(size[1], places[1].size() - left)};
        if (!columns.size()) return;
        // rows between which nothing lies are copied together
        const bool dense = columns.size() == size[1] && columns.size() == places[1].size();
        const int64_t together = dense ? most(1, rows.size()) : 1, count = together * columns.size();
        for (int64_t n = samples.begin; n < samples.end; ++n, to += places[0].size() * pitch)
            for (int64_t row = rows.begin; row < rows.end; row += together) {
                T* there = to + (row + above) * pitch + (columns.begin + left) * channels;
                const int64_t first = row * size[1] + columns.begin;
                if (last)
                    memcpy(there, data + (n * area + first) * channels, size_t(count * channels) * sizeof(T));
                else
                    transpose_to(there, channels, data + n * channels * area + first, area, channels, count);
            }
    }
};

// A layer's two axes, and what is made of both.
struct Axes {
    const Args& args;
    Axis axis[2];
    int64_t phases;
    int inner;  // parts of the second axis

    Axes(const Args& a, bool forward)
        : args(a),
          axis{Axis(a, 1, forward), Axis(a, 2, forward)},
          phases(a.stride[1] * a.stride[2]),
          inner(axis[1].paired ? 3 : 1) {}

    int parts() const { return 3 * inner; }
    Part outer_of(int part) const { return Part(part / inner); }
    Part inner_of(int part) const { return inner > 1 ? Part(part % inner) : kBoth; }
    // the source, and its differences along the second, the first and both axes
    int arrays() const { return axis[1].paired ? 4 : 2; }
    int array_of(Part outer, Part inner) const {
        return (outer != kBoth) * (axis[1].paired ? 2 : 1) + (inner != kBoth);
    }
    int64_t tap(int64_t phase, int outer, int inner) const {
        return (phase / args.stride[2] + outer * args.stride[1]) * args.kernel[2] + phase % args.stride[2] +
               inner * args.stride[2];
    }
    // The sum of the parts that a target of a square, or a tap, is made of, `step` apart.
    template <typename T>
    Vec<T> sum(const T* parts, int64_t step, int outer, int second) const {
        const T* at = parts + (inner * outer + second) * step;
        if (inner == 1) return load(at) + load(at + step);
        return (load(at) + load(at + step)) + (load(at + 3 * step) + load(at + 4 * step));
    }
};

// ---- forward and dx

template <typename T>
class Squares {
  public:
    Squares(const Args& args, bool forward)
        : args_(args),
          axes_(args, forward),
          forward_(forward),
          phases_(axes_.phases),
          parts_(axes_.parts()),
          to_channels_(forward ? args.out_channels : args.in_channels),
          from_channels_(forward ? args.in_channels : args.out_channels),
          to_last_(forward ? args.y_channels_last : args.x_channels_last),
          from_{static_cast<const T*>(forward ? args.x : args.y),
                bool(forward ? args.x_channels_last : args.y_channels_last),
                from_channels_,
                {axis_[0].sources, axis_[1].sources}},
          to_(static_cast<T*>(forward ? args.y : args.dx)),
          panels_(parts_of(to_channels_, kWidth<T>)),
          size_(from_channels_ * kWidth<T>),
          depth_(forward ? 1 : phases_),
          chain_(most(kLeastChain, least(kMostChain * (axis_[1].paired ? 1 : 2), depth_ * from_channels_ / 2))),
          squares_(depth_ * from_channels_ <= kFewTerms ||
                           phases_ * parts_ * to_channels_ * from_channels_ >= kLargeWeight
                       ? kManySquares
                       : kFewSquares),
          samples_(evenly(args.batch, squares_ / (axis_[0].pairs * axis_[1].pairs))),
          rows_(evenly(axis_[0].pairs, squares_ / axis_[1].pairs)),
          bands_(parts_of(axis_[0].pairs, rows_)),
          packed_(phases_ * parts_ * panels_ * size_),
          bias_(panels_ * kWidth<T>),
          zeros_(panels_ * kWidth<T>) {}

    int run() {
        if (!packed_.get() || !bias_.get() || !zeros_.get()) return MMFAST_OUT_OF_MEMORY;
        const int threads = threads_for(args_);
        if (const int status = parallel_status(threads, panels_, [&](int64_t panel) { return pack(panel); }))
            return status;
        // where there are too few blocks, threads share out columns
        const int64_t blocks = parts_of(args_.batch, samples_) * bands_;
        const int64_t parts = blocks < threads ? least(panels_, threads) : 1;
        return parallel_status(threads, blocks * parts, [&](int64_t unit) {
            const int64_t block = unit / parts, part = unit % parts;
            const int64_t n = block / bands_ * samples_, row = block % bands_ * rows_;
            return compute({n, least(args_.batch, n + samples_)}, {row, least(axis_[0].pairs, row + rows_)},
                           {panels_ * part / parts, panels_ * (part + 1) / parts});
        });
    }

  private:
    // (terms, width); the terms of dx are those of all phases
    T* packed(int64_t phase, int64_t part, int64_t panel) const {
        const int64_t at =
            forward_ ? (phase * parts_ + part) * panels_ + panel : (part * panels_ + panel) * phases_ + phase;
        return packed_.get() + at * size_;
    }

    int pack(int64_t panel) {
        const int64_t first = panel * kWidth<T>, columns = least(kWidth<T>, to_channels_ - first);
        const int64_t taps = args_.kernel[1] * args_.kernel[2], wide = args_.out_channels * taps;
        const int64_t to_step = forward_ ? taps : wide, from_step = forward_ ? wide : taps;
        Scratch<T> turned(taps * size_);
        if (!turned.get()) return MMFAST_OUT_OF_MEMORY;
        if (columns < kWidth<T>) memset(turned.get(), 0, size_t(taps * size_) * sizeof(T));
        const T* weight = static_cast<const T*>(args_.weight) + first * to_step;
        for (int64_t c = 0; c < from_channels_; ++c)
            transpose_to(turned.get() + c * kWidth<T>, size_, weight + c * from_step, to_step, columns, taps);
        for (int64_t phase = 0; phase < phases_; ++phase)
            for (int part = 0; part < parts_; ++part)
                combine_taps(phase, axes_.outer_of(part), axes_.inner_of(part), turned.get(),
                             packed(phase, part, panel));
        const T* bias = forward_ ? static_cast<const T*>(args_.bias) : nullptr;
        for (int64_t c = 0; c < kWidth<T>; ++c) {
            bias_.get()[first + c] = bias && c < columns ? bias[first + c] : T(0);
            zeros_.get()[first + c] = T(0);
        }
        return MMFAST_OK;
    }

    // What a part multiplies differences with: of the taps r and r + stride the one that it has, or both.
    void combine_taps(int64_t phase, Part outer, Part inner, const T* turned, T* to) const {
        const auto has = [&](const Axis& axis, Part part, int second) {
            if (!axis.paired) return second == 0;
            return part == kBoth || (part == kBefore) == (second == (forward_ ? 1 : 0));
        };
        const T sign = (outer == kBefore) != (inner == kBefore) ? T(-1) : T(1);
        bool first = true;
        for (int i = 0; i < 4; ++i) {
            if (!has(axis_[0], outer, i / 2) || !has(axis_[1], inner, i % 2)) continue;
            const T* from = turned + axes_.tap(phase, i / 2, i % 2) * size_;
            for (int64_t k = 0; k < size_; k += kLanes<T>)
                store(to + k, first ? load(from + k) * sign : load(to + k) + load(from + k) * sign);
            first = false;
        }
    }

    // body(middle of the sources, first target, squares so far, its places along the axes) for squares whose targets
    // are j apart from a multiple of the steps; sources: their places, targets: those of a block, or all.
    template <typename Body>
    void each_square(int64_t samples, Range rows, const int64_t* j, const Range* places, const Range* targets,
                     const Body& body) const {
        const int64_t width = places[1].size(), area = places[0].size() * width;
        const int64_t to_width = targets[1].size(), to_area = targets[0].size() * to_width;
        int64_t count = 0;
        for (int64_t n = 0; n < samples; ++n)
            for (int64_t a = rows.begin; a < rows.end; ++a)
                for (int64_t b = 0; b < axis_[1].pairs; ++b) {
                    const int64_t at[2] = {j[0] + axis_[0].step * 2 * a, j[1] + axis_[1].step * 2 * b};
                    if (at[0] >= axis_[0].targets || at[1] >= axis_[1].targets) continue;
                    body(n * area + (axis_[0].middle(j[0], a) - places[0].begin) * width + axis_[1].middle(j[1], b) -
                             places[1].begin,
                         n * to_area + (at[0] - targets[0].begin) * to_width + at[1] - targets[1].begin, count++, at);
                }
    }

    int compute(Range samples, Range rows, Range panels) {
        const Range places[2] = {axis_[0].places(rows), axis_[1].places({0, axis_[1].pairs})};
        const Range band[2] = {axis_[0].targets_of(rows), {0, axis_[1].targets}};
        const int64_t width = panels.size() * kWidth<T>, first = panels.begin * kWidth<T>;
        const int64_t pitch = places[1].size() * from_channels_;
        const int64_t array = samples.size() * places[0].size() * pitch;
        const int64_t area = band[0].size() * band[1].size(),
                      most_squares = samples.size() * rows.size() * axis_[1].pairs;
        Scratch<T> arrays(axes_.arrays() * array), products(parts_ * most_squares * width);
        Scratch<T> turned(to_last_ ? 0 : samples.size() * area * width);
        Scratch<int64_t> listed(2 * most_squares);
        Scratch<Segment> segments(depth_ * parts_of(from_channels_, chain_));
        if (!arrays.get() || !products.get() || !turned.get() || !listed.get() || !segments.get())
            return MMFAST_OUT_OF_MEMORY;
        const int64_t shift[2] = {axis_[0].shift(), axis_[1].shift()};
        from_.lay_out(samples, places, shift, arrays.get());
        const int64_t down = axis_[0].reach * pitch, right = axis_[1].reach * from_channels_;
        if (axis_[1].paired) differ(arrays.get(), right, array, arrays.get() + array);
        for (int i = axes_.arrays() / 2; i < axes_.arrays(); ++i)
            differ(arrays.get() + (i - axes_.arrays() / 2) * array, down, array, arrays.get() + i * array);
        const int64_t count = list_segments(pitch, segments.get());

        // where it can, a square is written to the tensor itself
        const Range whole[2] = {{0, axis_[0].targets}, {0, axis_[1].targets}};
        const Range* targets = to_last_ ? whole : band;
        T* image = to_ + samples.begin * axis_[0].targets * axis_[1].targets * to_channels_;
        T* out = to_last_ ? image + first : turned.get();
        const int64_t out_pitch = to_last_ ? to_channels_ : width;
        const int64_t columns = parts_of(to_channels_, kLanes<T>) * kLanes<T>;
        Vec<T> zeros = {};
        for (int64_t i = 0; i < (forward_ ? phases_ : 1); ++i) {
            const int64_t j[2] = {i / args_.stride[2], i % args_.stride[2]};
            const int64_t phase = forward_ ? (j[0] + axis_[0].before) % args_.stride[1] * args_.stride[2] +
                                                 (j[1] + axis_[1].before) % args_.stride[2]
                                           : 0;
            int64_t squares = 0;
            each_square(samples.size(), rows, j, places, targets, [&](int64_t middle, int64_t, int64_t square, auto) {
                listed.get()[2 * square] = middle * from_channels_;
                listed.get()[2 * square + 1] = square * width;
                ++squares;
            });
            for (int part = 0; part < parts_; ++part) {
                const Part outer = axes_.outer_of(part), inner = axes_.inner_of(part);
                const T* sources = arrays.get() + axes_.array_of(outer, inner) * array - (outer == kBefore) * down -
                                   (inner == kBefore) * right;
                const Weights<T> weights{packed(phase, part, 0), depth_ * size_, zeros_.get(), columns};
                multiply_rows(sources, products.get() + part * most_squares * width, listed.get(), squares,
                              segments.get(), count, chain_, weights, panels);
            }
            each_square(samples.size(), rows, j, places, targets,
                        [&](int64_t, int64_t target, int64_t square, const int64_t* at) {
                            add_parts(products.get() + square * width, most_squares * width, at, bias_.get() + first,
                                      least(width, to_channels_ - first), out + target * out_pitch,
                                      axis_[0].step * targets[1].size() * out_pitch, axis_[1].step * out_pitch, &zeros);
                        });
        }
        if (sum_lanes<T>(zeros) != 0) return MMFAST_DECLINED;
        const int64_t positions = axis_[0].targets * axis_[1].targets;
        for (int64_t n = 0; !to_last_ && n < samples.size(); ++n)
            transpose_to(image + (n * to_channels_ + first) * positions + band[0].begin * axis_[1].targets, positions,
                         turned.get() + n * area * width, width, area, least(width, to_channels_ - first));
        return MMFAST_OK;
    }

    // to[i] = from[i + step] - from[i], but for the last ones, which no square sees
    static void differ(const T* from, int64_t step, int64_t size, T* to) {
        for (int64_t i = 0; i < size - step; i += kLanes<T>) {
            const int lanes = int(least(size - step - i, kLanes<T>));
            store_float(to + i, load_float(from + step + i, lanes) - load_float(from + i, lanes), lanes);
        }
    }

    int64_t list_segments(int64_t pitch, Segment* segments) const {
        int64_t count = 0;
        for (int64_t i = 0; i < depth_; ++i)
            for (int64_t c = 0; c < from_channels_; c += chain_)
                segments[count++] = {i / args_.stride[2] * pitch + i % args_.stride[2] * from_channels_ + c,
                                     i * size_ + c * kWidth<T>, least(chain_, from_channels_ - c)};
        return count;
    }

    // The targets of a square, from its products, `array` apart; zeros: += 0 times each.
    void add_parts(const T* products, int64_t array, const int64_t* at, const T* bias, int64_t columns, T* out,
                   int64_t down, int64_t right, Vec<T>* zeros) const {
        for (int i = 0; i < 4; ++i) {
            const int outer = i / 2, inner = i % 2;
            if (at[0] + outer * axis_[0].step >= axis_[0].targets || at[1] + inner * axis_[1].step >= axis_[1].targets)
                continue;
            T* to = out + outer * down + inner * right;
            for (int64_t c = 0; c < columns; c += kLanes<T>) {
                const Vec<T> sum = load(bias + c) + axes_.sum(products + c, array, outer, inner);
                *zeros += sum * T(0);
                store_float(to + c, sum, int(least(columns - c, kLanes<T>)));
            }
        }
    }

    const Args& args_;
    Axes axes_;
    const Axis* axis_ = axes_.axis;
    bool forward_;
    int64_t phases_, parts_, to_channels_, from_channels_;
    bool to_last_;
    Image<T> from_;
    T* to_;
    int64_t panels_, size_, depth_, chain_, squares_, samples_, rows_, bands_;
    Scratch<T> packed_, bias_, zeros_;
};

// ---- dweight

template <typename T>
class Taps {
  public:
    explicit Taps(const Args& args)
        : args_(args),
          axes_(args, false),
          phases_(axes_.phases),
          parts_(axes_.parts()),
          in_pair_(axis_[1].paired ? 2 : 1),
          strips_(parts_of(args.in_channels, kRows)),
          panels_(parts_of(args.out_channels, kWidth<T>)),
          chain_(chain_of(args.batch * axis_[0].pairs * axis_[1].pairs, 4)),
          samples_(evenly(args.batch, most_squares() / (axis_[0].pairs * axis_[1].pairs))),
          rows_(evenly(axis_[0].pairs, most_squares() / axis_[1].pairs)),
          bands_(parts_of(axis_[0].pairs, rows_)),
          squares_(samples_ * rows_ * axis_[1].pairs),
          part_of_x_(squares_ * kRows + kLanes<T>),
          part_of_dy_(squares_ * kWidth<T>),
          shares_(parts_of(args.batch, samples_) * bands_, panels_ * strips_ * phases_ * parts_ * kTile),
          pairs_(squares_) {}

    int run() {
        if (!shares_.made() || !pairs_.get()) return MMFAST_OUT_OF_MEMORY;
        for (int64_t i = 0; i < squares_; ++i) pairs_.get()[i] = {int32_t(i * kRows), int32_t(i * kWidth<T>)};
        const int threads = threads_for(args_);
        const int status =
            shares_.each(threads, [&](T* sums, Range blocks) { return add_share(sums, blocks, threads); });
        if (status) return status;
        return parallel_status(threads, panels_ * strips_,
                               [&](int64_t unit) { return write(unit / strips_, unit % strips_); });
    }

  private:
    static constexpr int64_t kTile = kRows * kWidth<T>;

    int64_t most_squares() const { return kManySquares * (axis_[1].paired ? 1 : 2); }

    // from a share's first sum to those (phases, parts, rows, width)
    int64_t tiles(int64_t panel, int64_t strip) const { return (panel * strips_ + strip) * phases_ * parts_ * kTile; }

    int add_share(T* sums, Range blocks, int threads) const {
        const Range all{0, axis_[1].pairs};
        const int64_t in_area = 2 * rows_ * in_pair_ * all.end * args_.in_channels;
        const int64_t out_area = axis_[0].places({0, rows_}).size() * axis_[1].places(all).size() * args_.out_channels;
        // vectors reach beyond the last place's channels
        Scratch<T> x(samples_ * in_area + kRows + kLanes<T>), dy(samples_ * out_area + kWidth<T>);
        Scratch<T> strips_of_x(strips_ * parts_ * part_of_x_);
        if (!strips_of_x.get() || !x.get() || !dy.get()) return MMFAST_OUT_OF_MEMORY;
        memset(x.get() + samples_ * in_area, 0, sizeof(T) * (kRows + kLanes<T>));
        memset(dy.get() + samples_ * out_area, 0, sizeof(T) * kWidth<T>);
        const Image<T> of_x{static_cast<const T*>(args_.x),
                            bool(args_.x_channels_last),
                            args_.in_channels,
                            {args_.in_size[1], args_.in_size[2]}};
        const Image<T> of_dy{static_cast<const T*>(args_.y),
                             bool(args_.y_channels_last),
                             args_.out_channels,
                             {args_.out_size[1], args_.out_size[2]}};
        const int64_t in_shift[2] = {0, 0}, out_shift[2] = {axis_[0].shift(), axis_[1].shift()};
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            const int64_t n = block / bands_ * samples_, row = block % bands_ * rows_;
            const Range samples{n, least(args_.batch, n + samples_)}, rows{row, least(axis_[0].pairs, row + rows_)};
            const Range in[2] = {{2 * rows.begin, 2 * rows.end}, {0, in_pair_ * all.end}};
            const Range out[2] = {axis_[0].places(rows), axis_[1].places(all)};
            of_x.lay_out(samples, in, in_shift, x.get());
            of_dy.lay_out(samples, out, out_shift, dy.get());
            parallel_for(threads, strips_, [&](int64_t strip) {
                pack_x(samples.size(), rows.size(), x.get() + strip * kRows,
                       strips_of_x.get() + strip * parts_ * part_of_x_);
            });
            const int status = parallel_status(threads, panels_ * phases_, [&](int64_t unit) {
                return add_block(sums, unit / phases_, unit % phases_, samples.size(), rows, out, dy.get(),
                                 strips_of_x.get(), block == blocks.begin);
            });
            if (status) return status;
        }
        return MMFAST_OK;
    }

    // (parts, squares, rows), whose last vector reaches into the next square's
    void pack_x(int64_t samples, int64_t rows, const T* x, T* to) const {
        const int64_t right = args_.in_channels, down = in_pair_ * axis_[1].pairs * right;
        for (int64_t row = 0; row < samples * rows; ++row)
            for (int64_t pair = 0; pair < axis_[1].pairs; ++pair, to += kRows)
                for (int r = 0; r < kRows; r += kLanes<T>) {
                    const T* at = x + row * 2 * down + pair * in_pair_ * right + r;
                    if (!axis_[1].paired) {
                        const Vec<T> x0 = load(at), x1 = load(at + down);
                        store(to + kBefore * part_of_x_ + r, x0);
                        store(to + kBoth * part_of_x_ + r, x0 + x1);
                        store(to + kAfter * part_of_x_ + r, x1);
                        continue;
                    }
                    const Vec<T> x0[2] = {load(at), load(at + right)},
                                 x1[2] = {load(at + down), load(at + down + right)};
                    const Vec<T> outer[3][2] = {{x0[0], x0[1]}, {x0[0] + x1[0], x0[1] + x1[1]}, {x1[0], x1[1]}};
                    for (int i = 0; i < 3; ++i) {
                        store(to + (3 * i + kBefore) * part_of_x_ + r, outer[i][0]);
                        store(to + (3 * i + kBoth) * part_of_x_ + r, outer[i][0] + outer[i][1]);
                        store(to + (3 * i + kAfter) * part_of_x_ + r, outer[i][1]);
                    }
                }
    }

    // (parts, squares, width) of what a phase's squares meet
    void pack_dy(int64_t phase, int vectors, int64_t samples, Range rows, const Range* places, const T* dy,
                 T* packed) const {
        const int64_t channels = args_.out_channels, pitch = places[1].size() * channels;
        const int64_t down = args_.stride[1] * pitch, right = args_.stride[2] * channels;
        dy += phase / args_.stride[2] * pitch + phase % args_.stride[2] * channels;
        for (int64_t n = 0; n < samples; ++n, dy += places[0].size() * pitch)
            for (int64_t a = 0; a < rows.size(); ++a)
                for (int64_t b = 0; b < axis_[1].pairs; ++b, packed += kWidth<T>)
                    for (int v = 0; v < vectors; ++v) {
                        const T* at = dy + 2 * a * down + 2 * b * right + v * kLanes<T>;
                        T* to = packed + v * kLanes<T>;
                        Vec<T> outer[3][3];
                        for (int j = 0; j < axes_.inner; ++j, at += right) {
                            outer[kBoth][j] = load(at + down);
                            outer[kBefore][j] = load(at) - outer[kBoth][j];
                            outer[kAfter][j] = load(at + 2 * down) - outer[kBoth][j];
                        }
                        for (int i = 0; i < 3; ++i, to += axes_.inner * part_of_dy_) {
                            if (!axis_[1].paired) {
                                store(to, outer[i][0]);
                                continue;
                            }
                            store(to + kBefore * part_of_dy_, outer[i][0] - outer[i][1]);
                            store(to + kBoth * part_of_dy_, outer[i][1]);
                            store(to + kAfter * part_of_dy_, outer[i][2] - outer[i][1]);
                        }
                    }
    }

    int add_block(T* sums, int64_t panel, int64_t phase, int64_t samples, Range rows, const Range* places, const T* dy,
                  const T* strips_of_x, bool first) const {
        Scratch<T> packed(parts_ * part_of_dy_);
        if (!packed.get()) return MMFAST_OUT_OF_MEMORY;
        const bool half = args_.out_channels - panel * kWidth<T> <= kLanes<T>;
        pack_dy(phase, half ? 1 : kVectors, samples, rows, places, dy + panel * kWidth<T>, packed.get());
        const auto add = half ? add_products<1, T> : add_products<kVectors, T>;
        const int64_t count = samples * rows.size() * axis_[1].pairs;
        for (int part = 0; part < parts_; ++part)
            for (int64_t strip = 0; strip < strips_; ++strip)
                add(strips_of_x + (strip * parts_ + part) * part_of_x_, packed.get() + part * part_of_dy_, pairs_.get(),
                    count, chain_, sums + tiles(panel, strip) + (phase * parts_ + part) * kTile, first);
        return MMFAST_OK;
    }

    int write(int64_t panel, int64_t strip) const {
        const int64_t taps = args_.kernel[1] * args_.kernel[2], channel = strip * kRows, first = panel * kWidth<T>;
        const int64_t rows = least(kRows, args_.in_channels - channel);
        const int64_t columns = least(kWidth<T>, args_.out_channels - first);
        Scratch<T> tile(taps * kTile);
        if (!tile.get()) return MMFAST_OUT_OF_MEMORY;
        const T* total = shares_.total(tiles(panel, strip), phases_ * parts_ * kTile);
        Vec<T> zeros = {};
        for (int64_t phase = 0; phase < phases_; ++phase)
            for (int i = 0; i < 4; ++i) {
                const int outer = i / 2, inner = i % 2;
                if (inner && !axis_[1].paired) continue;
                const T* terms = total + phase * parts_ * kTile;
                T* sums = tile.get() + axes_.tap(phase, outer, inner) * kTile;
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t c = 0; c < columns; c += kLanes<T>) {
                        const int64_t at = r * kWidth<T> + c;
                        store(sums + at, axes_.sum(terms + at, kTile, outer, inner));
                        zeros += load_float(sums + at, int(least(columns - c, kLanes<T>))) * T(0);
                    }
            }
        if (sum_lanes<T>(zeros) != 0) return MMFAST_DECLINED;
        T* dweight = static_cast<T*>(args_.dweight) + (channel * args_.out_channels + first) * taps;
        for (int64_t r = 0; r < rows; ++r)
            transpose_to(dweight + r * args_.out_channels * taps, taps, tile.get() + r * kWidth<T>, kTile, taps,
                         columns);
        return MMFAST_OK;
    }

    const Args& args_;
    Axes axes_;
    const Axis* axis_ = axes_.axis;
    int64_t phases_, parts_, in_pair_, strips_, panels_, chain_, samples_, rows_, bands_, squares_, part_of_x_,
        part_of_dy_;
    Shares<T> shares_;
    Scratch<Pair> pairs_;
};

// body(args) where the last two axes have two taps a phase, or the last one, which is the first one then.
template <typename Body>
int with_axes(const Args& args, const Body& body) {
    Args found = args;
    const auto is_trivial = [&](int d) {
        return found.in_size[d] == 1 && found.out_size[d] == 1 && found.kernel[d] == 1 && found.stride[d] == 1 &&
               !found.before[d];
    };
    const auto is_paired = [&](int d) { return found.kernel[d] == 2 * found.stride[d] && found.dilation[d] == 1; };
    const bool swaps = is_trivial(1);
    int64_t* const all[] = {found.in_size, found.out_size, found.kernel, found.stride, found.dilation, found.before};
    for (int64_t* sizes : all) {
        const int64_t first = sizes[1];
        if (swaps) sizes[1] = sizes[2], sizes[2] = first;
    }
    if (!is_trivial(0) || !is_paired(1) || !(is_paired(2) || is_trivial(2))) return MMFAST_DECLINED;
    const int64_t least_size =
        least(least(found.in_size[1], found.in_size[2]), least(found.out_size[1], found.out_size[2]));
    if (least(found.batch, least_size) < 1) return MMFAST_DECLINED;
    return body(found);
}

template <typename T>
int backward_of(const Args& args) {
    const int status = args.dx ? Squares<T>(args, false).run() : MMFAST_OK;
    return status || !args.dweight ? status : Taps<T>(args).run();
}

}  // namespace

int squares_forward(const Args& args) {
    return with_axes(args, [](const Args& found) {
        return with_type(found, [&](auto type) { return Squares<decltype(type)>(found, true).run(); });
    });
}

int squares_backward(const Args& args) {
    return with_axes(args, [](const Args& found) {
        return with_type(found, [&](auto type) { return backward_of<decltype(type)>(found); });
    });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
