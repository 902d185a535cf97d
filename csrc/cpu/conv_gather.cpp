// Transposed convolution as products of matrices, forward and both gradients, groups 1.
//
// Pointers, shapes and the formula: mmfast_conv_transpose_args in mmfast.h. Tap k joins output o and input i where
// i * stride + k * dilation - before = o, in each dimension.
//
// Forward and dx: a row of the product is a position of one sample, read and written channels last. Positions that the
// same taps reach make one product, whose terms are those taps' channels, so that neither a zero put in by the stride
// nor one beyond an edge is multiplied: of a 4 x 4 image under k4 s2 p1 the latter are 23 %. The weight is packed once.
// dweight: for each tap a product over the positions that it joins, x and dy packed in panels, places in a list.
// Contiguous tensors are turned a block of positions at a time, which stays in the caches.
//
// Bound by multiplications: a tile of kRows rows times one or two vectors of columns keeps its sums in registers over a
// chain of terms, at most kLongest, for a chain's rounding error grows with its length. Work is cut by shapes alone,
// and sums are added in a fixed order: results do not depend on the number of threads.
#include "cpu/conv_tile.h"
#include "cpu/parallel.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

using Args = mmfast_conv_transpose_args;

constexpr int64_t kTargets = 2048;    // positions of a block that is written, some MB of all channels
constexpr int64_t kInputs = 512;      // positions of a block whose products dweight sums
constexpr int64_t kCached = 1 << 16;  // elements of rows and their sums that stay in the second-level cache
constexpr int64_t kStrips = 8;        // strips of x that meet a tap's panel of dy while it is in the first-level cache

// The positions of one tensor.
struct Grid {
    int64_t size[3], pitch[3], positions;

    explicit Grid(const int64_t* sizes)
        : size{sizes[0], sizes[1], sizes[2]}, pitch{sizes[1] * sizes[2], sizes[2], 1}, positions(sizes[0] * pitch[0]) {}
    // the outermost axis that is not trivial, in which a range of positions is dense
    int outermost() const { return size[0] > 1 ? 0 : size[1] > 1 ? 1 : 2; }
};

// How samples and positions are cut into blocks: several whole samples, or a part of one along the outermost axis.
struct Blocks {
    int axis;
    int64_t batch, size, samples, bands, band;

    Blocks(const Grid& grid, int64_t batch, int64_t positions)
        : axis(grid.outermost()), batch(batch), size(grid.size[axis]) {
        samples = evenly(batch, positions / grid.positions);
        band = samples > 1 ? size : evenly(size, positions / grid.pitch[axis]);
        bands = parts_of(size, band);
    }
    int64_t count() const { return parts_of(batch, samples) * bands; }
    Range samples_of(int64_t block) const {
        const int64_t n = block / bands * samples;
        return {n, least(batch, n + samples)};
    }
    Range band_of(int64_t block) const {
        const int64_t begin = block % bands * band;
        return {begin, least(size, begin + band)};
    }
};

// Positions of a tensor in memory, channels next to each other.
template <typename T>
struct Frame {
    T* data;
    int64_t first, pitch, sample;  // the first position that it holds; elements from one position, sample to the next
};

// ---- forward and dx

// Target positions of one axis that the same taps reach, `step` apart, and so their sources.
struct Group {
    int64_t first, count;
};

template <typename T>
class Gather {
  public:
    Gather(const Args& args, bool forward)
        : args_(args),
          forward_(forward),
          to_(forward ? args.out_size : args.in_size),
          from_(forward ? args.in_size : args.out_size),
          to_channels_(forward ? args.out_channels : args.in_channels),
          from_channels_(forward ? args.in_channels : args.out_channels),
          to_last_(forward ? args.y_channels_last : args.x_channels_last),
          from_last_(forward ? args.x_channels_last : args.y_channels_last),
          from_data_(static_cast<const T*>(forward ? args.x : args.y)),
          to_data_(static_cast<T*>(forward ? args.y : args.dx)),
          taps_(args.kernel[0] * args.kernel[1] * args.kernel[2]),
          panels_(parts_of(to_channels_, kWidth<T>)),
          panel_(taps_ * from_channels_ * kWidth<T>),
          chain_(
              chain_of(from_channels_ * taps_ / (forward ? args.stride[0] * args.stride[1] * args.stride[2] : 1), 2)),
          row_block_(most(8, least(32, kCached / (to_channels_ + chain_) / kRows)) * kRows),
          blocks_(to_, args.batch, kTargets),
          packed_(panels_ * panel_),
          bias_(panels_ * kWidth<T>) {}

    int run() {
        if (!packed_.get() || !bias_.get()) return MMFAST_OUT_OF_MEMORY;
        const int threads = threads_for(args_);
        parallel_for(threads, panels_, [&](int64_t panel) { pack(panel); });
        // where there are too few blocks, threads share out columns
        const int64_t parts = blocks_.count() < threads ? least(panels_, threads) : 1;
        return parallel_status(threads, blocks_.count() * parts, [&](int64_t unit) {
            const int64_t part = unit % parts;
            return compute(unit / parts, {panels_ * part / parts, panels_ * (part + 1) / parts});
        });
    }

  private:
    int64_t step(int d) const { return forward_ ? args_.stride[d] : 1; }
    int64_t from_step(int d) const { return forward_ ? 1 : args_.stride[d]; }

    // The source that tap k joins with a target along axis d, or -1.
    int64_t source(int d, int64_t at, int64_t k) const {
        int64_t found = forward_ ? at + args_.before[d] - k * args_.dilation[d]
                                 : at * args_.stride[d] + k * args_.dilation[d] - args_.before[d];
        if (forward_) {
            if (found % args_.stride[d]) return -1;
            found /= args_.stride[d];
        }
        return found >= 0 && found < from_.size[d] ? found : -1;
    }

    bool same_taps(int d, int64_t a, int64_t b) const {
        for (int64_t k = 0; k < args_.kernel[d]; ++k)
            if ((source(d, a, k) < 0) != (source(d, b, k) < 0)) return false;
        return true;
    }

    // The groups of the positions in range; returns their number.
    int64_t group(int d, Range range, Group* groups) const {
        int64_t count = 0;
        for (int64_t phase = range.begin; phase < least(range.end, range.begin + step(d)); ++phase)
            for (int64_t at = phase; at < range.end;) {
                Group& next = groups[count++];
                next = {at, 0};
                for (; at < range.end && same_taps(d, next.first, at); at += step(d)) ++next.count;
            }
        return count;
    }

    // (taps, source channels, width) of one panel of target channels
    void pack(int64_t panel) {
        const int64_t first = panel * kWidth<T>, columns = least(kWidth<T>, to_channels_ - first);
        const int64_t wide = args_.out_channels * taps_;
        const int64_t to_step = forward_ ? taps_ : wide, from_step = forward_ ? wide : taps_;
        T* packed = packed_.get() + panel * panel_;
        if (columns < kWidth<T>) memset(packed, 0, size_t(panel_) * sizeof(T));
        const T* weight = static_cast<const T*>(args_.weight) + first * to_step;
        for (int64_t c = 0; c < from_channels_; ++c)
            transpose_to(packed + c * kWidth<T>, from_channels_ * kWidth<T>, weight + c * from_step, to_step, columns,
                         taps_);
        const T* bias = forward_ ? static_cast<const T*>(args_.bias) : nullptr;
        for (int64_t c = 0; c < kWidth<T>; ++c) bias_.get()[first + c] = bias && c < columns ? bias[first + c] : T(0);
    }

    // The sources of a band's targets along its axis.
    Range sources(Range band) const {
        const int d = blocks_.axis;
        Range found{from_.size[d], 0};
        for (int64_t at = band.begin; at < band.end; ++at)
            for (int64_t k = 0; k < args_.kernel[d]; ++k) {
                const int64_t i = source(d, at, k);
                if (i < 0) continue;
                found = {least(found.begin, i), most(found.end, i + 1)};
            }
        return found.begin < found.end ? found : Range{0, 0};
    }

    int compute(int64_t block, Range panels) {
        const Range samples = blocks_.samples_of(block), band = blocks_.band_of(block);
        const int d = blocks_.axis;
        // the target's outermost axis may be the source's second
        const bool dense = from_.outermost() >= d;
        const Range needed = dense ? sources(band) : Range{0, from_.size[d]};
        const int64_t from_pitch = dense ? from_.pitch[d] : from_.positions / from_.size[d];
        const Range from{needed.begin * from_pitch, needed.end * from_pitch};
        const Range to{band.begin * to_.pitch[d], band.end * to_.pitch[d]};
        const int64_t width = panels.size() * kWidth<T>, first = panels.begin * kWidth<T>;
        Scratch<T> source(from_last_ ? 0 : samples.size() * from.size() * from_channels_);
        Scratch<T> target(to_last_ ? 0 : samples.size() * to.size() * width);
        if (!source.get() || !target.get()) return MMFAST_OUT_OF_MEMORY;
        Frame<const T> read{from_data_ + samples.begin * from_.positions * from_channels_, 0, from_channels_,
                            from_.positions * from_channels_};
        if (!from_last_) {
            const Frame<const T> turned{source.get(), from.begin, from_channels_, from.size() * from_channels_};
            for (int64_t n = 0; n < samples.size(); ++n)
                transpose_to(source.get() + n * turned.sample, from_channels_, read.data + n * read.sample + from.begin,
                             from_.positions, from_channels_, from.size());
            read = turned;
        }
        T* image = to_data_ + samples.begin * to_.positions * to_channels_;
        Frame<T> written{image + first, 0, to_channels_, to_.positions * to_channels_};
        if (!to_last_) written = {target.get(), to.begin, width, to.size() * width};
        const int status = multiply(read, written, samples.size(), band, panels);
        if (status || to_last_) return status;
        const int64_t columns = least(width, to_channels_ - first);
        for (int64_t n = 0; n < samples.size(); ++n)
            transpose_to(image + (n * to_channels_ + first) * to_.positions + to.begin, to_.positions,
                         written.data + n * written.sample, width, to.size(), columns);
        return MMFAST_OK;
    }

    int multiply(const Frame<const T>& read, const Frame<T>& written, int64_t samples, Range band, Range panels) {
        Range range[3];
        for (int d = 0; d < 3; ++d) range[d] = d == blocks_.axis ? band : Range{0, to_.size[d]};
        Scratch<Group> groups(range[0].size() + range[1].size() + range[2].size());
        Scratch<Segment> segments(taps_ * parts_of(from_channels_, chain_));
        const int64_t most_rows = samples * range[0].size() * range[1].size() * range[2].size();
        Scratch<int64_t> places(2 * most_rows);
        if (!groups.get() || !segments.get() || !places.get()) return MMFAST_OUT_OF_MEMORY;
        Group* of[3];
        int64_t counts[3];
        const int64_t columns = to_last_ ? to_channels_ : parts_of(to_channels_, kLanes<T>) * kLanes<T>;
        const Weights<T> weights{packed_.get(), panel_, bias_.get(), columns};
        Group* next = groups.get();
        for (int d = 0; d < 3; ++d) {
            of[d] = next;
            counts[d] = group(d, range[d], next);
            next += range[d].size();
        }
        for (int64_t a = 0; a < counts[0]; ++a)
            for (int64_t b = 0; b < counts[1]; ++b)
                for (int64_t c = 0; c < counts[2]; ++c) {
                    const Group at[3] = {of[0][a], of[1][b], of[2][c]};
                    const int64_t count = list_segments(at, read, segments.get());
                    const int64_t rows = list_rows(at, read, written, samples, places.get());
                    for (int64_t row = 0; row < rows; row += row_block_)
                        multiply_rows(read.data, written.data, places.get() + 2 * row, least(row_block_, rows - row),
                                      segments.get(), count, chain_, weights, panels);
                }
        return MMFAST_OK;
    }

    int64_t list_segments(const Group* at, const Frame<const T>& read, Segment* segments) const {
        int64_t count = 0;
        for (int64_t tap = 0; tap < taps_; ++tap) {
            const int64_t k[3] = {tap / args_.kernel[2] / args_.kernel[1], tap / args_.kernel[2] % args_.kernel[1],
                                  tap % args_.kernel[2]};
            int64_t position = 0;
            bool joins = true;
            for (int d = 0; d < 3; ++d) {
                const int64_t i = source(d, at[d].first, k[d]);
                joins = joins && i >= 0;
                position += i * from_.pitch[d];
            }
            for (int64_t c = 0; joins && c < from_channels_; c += chain_)
                segments[count++] = {(position - read.first) * read.pitch + c, (tap * from_channels_ + c) * kWidth<T>,
                                     least(chain_, from_channels_ - c)};
        }
        return count;
    }

    // Pairs of what is added to a segment's offset, and the place in the target; returns their number.
    int64_t list_rows(const Group* at, const Frame<const T>& read, const Frame<T>& written, int64_t samples,
                      int64_t* places) const {
        int64_t from[3], to[3], start = -written.first;
        for (int d = 0; d < 3; ++d) {
            from[d] = from_step(d) * from_.pitch[d] * read.pitch;
            to[d] = step(d) * to_.pitch[d] * written.pitch;
            start += at[d].first * to_.pitch[d];
        }
        const int64_t* begin = places;
        for (int64_t n = 0; n < samples; ++n)
            for (int64_t a = 0; a < at[0].count; ++a)
                for (int64_t b = 0; b < at[1].count; ++b)
                    for (int64_t c = 0; c < at[2].count; ++c) {
                        *places++ = n * read.sample + a * from[0] + b * from[1] + c * from[2];
                        *places++ = n * written.sample + start * written.pitch + a * to[0] + b * to[1] + c * to[2];
                    }
        return (places - begin) / 2;
    }

    const Args& args_;
    bool forward_;
    Grid to_, from_;
    int64_t to_channels_, from_channels_;
    bool to_last_, from_last_;
    const T* from_data_;
    T* to_data_;
    int64_t taps_, panels_, panel_, chain_, row_block_;
    Blocks blocks_;
    Scratch<T> packed_, bias_;
};

// ---- dweight

template <typename T>
class Outer {
  public:
    explicit Outer(const Args& args)
        : args_(args),
          in_(args.in_size),
          out_(args.out_size),
          taps_(args.kernel[0] * args.kernel[1] * args.kernel[2]),
          strips_(parts_of(args.in_channels, kRows)),
          panels_(parts_of(args.out_channels, kWidth<T>)),
          chain_(chain_of(args.batch * in_.positions, 4)),
          blocks_(in_, args.batch, kInputs),
          most_inputs_(blocks_.samples * blocks_.band * in_.pitch[blocks_.axis]),
          shares_(blocks_.count(), blocks_.count() > 1 ? panels_ * strips_ * taps_ * kTile : 0) {}

    int run() {
        if (!shares_.made()) return MMFAST_OUT_OF_MEMORY;
        const int threads = threads_for(args_);
        const int status =
            shares_.each(threads, [&](T* sums, Range blocks) { return add_share(sums, blocks, threads); });
        if (status || blocks_.count() == 1) return status;
        parallel_for(threads, panels_ * strips_, [&](int64_t unit) {
            write(unit / strips_, unit % strips_, shares_.total(unit * taps_ * kTile, taps_ * kTile));
        });
        return status;
    }

  private:
    static constexpr int64_t kTile = kRows * kWidth<T>;

    // What a block's products are made of.
    struct Block {
        Range samples, outputs;
        Scratch<T> strips;    // (strips, positions, samples, rows) of x
        Scratch<Pair> pairs;  // of each tap
        Scratch<int64_t> counts;
    };

    int add_share(T* sums, Range blocks, int threads) {
        Block block{{0, 0},
                    {0, 0},
                    Scratch<T>(strips_ * most_inputs_ * kRows),
                    Scratch<Pair>(taps_ * most_inputs_),
                    Scratch<int64_t>(taps_)};
        if (!block.strips.get() || !block.pairs.get() || !block.counts.get()) return MMFAST_OUT_OF_MEMORY;
        for (int64_t i = blocks.begin; i < blocks.end; ++i) {
            const Range samples = blocks_.samples_of(i), band = blocks_.band_of(i);
            const bool same = i > blocks.begin && blocks_.bands == 1 && samples.size() == block.samples.size();
            block.samples = samples;
            if (!same) list_pairs(block, band);
            if (const int status = pack_x(block, band)) return status;
            const int status = parallel_status(
                threads, panels_, [&](int64_t panel) { return add_panel(block, panel, sums, i == blocks.begin); });
            if (status) return status;
        }
        return MMFAST_OK;
    }

    // What each tap joins, and the outputs of it along the band's axis.
    void list_pairs(Block& block, Range band) const {
        const int64_t samples = block.samples.size();
        Range outputs{out_.size[blocks_.axis], 0};
        for (int pass = 0; pass < 2; ++pass)  // the places depend on where the outputs begin
            for (int64_t tap = 0; tap < taps_; ++tap) {
                const int64_t k[3] = {tap / args_.kernel[2] / args_.kernel[1], tap / args_.kernel[2] % args_.kernel[1],
                                      tap % args_.kernel[2]};
                Pair* pairs = block.pairs.get() + tap * most_inputs_;
                int64_t i[3], o[3], count = 0;
                Range range[3];
                for (int d = 0; d < 3; ++d) range[d] = d == blocks_.axis ? band : Range{0, in_.size[d]};
                const auto joins = [&](int d) {
                    o[d] = i[d] * args_.stride[d] + k[d] * args_.dilation[d] - args_.before[d];
                    return o[d] >= 0 && o[d] < out_.size[d];
                };
                for (i[0] = range[0].begin; i[0] < range[0].end; ++i[0])
                    for (i[1] = range[1].begin; joins(0) && i[1] < range[1].end; ++i[1])
                        for (i[2] = range[2].begin; joins(1) && i[2] < range[2].end; ++i[2]) {
                            if (!joins(2)) continue;
                            if (pass == 0) {
                                const int64_t at = o[blocks_.axis];
                                outputs = {least(outputs.begin, at), most(outputs.end, at + 1)};
                                continue;
                            }
                            int64_t x = -band.begin * in_.pitch[blocks_.axis], dy = -first_output(outputs);
                            for (int d = 0; d < 3; ++d) x += i[d] * in_.pitch[d], dy += o[d] * out_.pitch[d];
                            for (int64_t n = 0; n < samples; ++n)
                                pairs[count++] = {int32_t((x * samples + n) * kRows),
                                                  int32_t((dy * samples + n) * kWidth<T>)};
                        }
                block.counts.get()[tap] = count;
            }
        block.outputs = outputs;
    }

    // Whether a range along the band's axis is a range of outputs.
    bool dense() const { return out_.outermost() >= blocks_.axis; }
    int64_t first_output(Range outputs) const { return dense() ? outputs.begin * out_.pitch[blocks_.axis] : 0; }
    int64_t outputs_of(Range outputs) const {
        return dense() ? most(0, outputs.size()) * out_.pitch[blocks_.axis] : out_.positions;
    }

    int pack_x(const Block& block, Range band) const {
        const Range samples = block.samples;
        const int64_t first = band.begin * in_.pitch[blocks_.axis], count = band.size() * in_.pitch[blocks_.axis];
        const int64_t channels = args_.in_channels;
        const T* x = static_cast<const T*>(args_.x) + samples.begin * in_.positions * channels;
        Scratch<T> turned(args_.x_channels_last ? 0 : count * channels);
        if (!turned.get()) return MMFAST_OUT_OF_MEMORY;
        for (int64_t n = 0; n < samples.size(); ++n, x += in_.positions * channels) {
            if (!args_.x_channels_last) transpose_to(turned.get(), channels, x + first, in_.positions, channels, count);
            const T* image = args_.x_channels_last ? x + first * channels : turned.get();
            for (int64_t strip = 0; strip < strips_; ++strip) {
                T* to = block.strips.get() + (strip * most_inputs_ + n) * kRows;
                const T* from = image + strip * kRows;
                const int64_t valid = least(kRows, channels - strip * kRows);
                for (int64_t i = 0; i < count; ++i, to += samples.size() * kRows, from += channels) {
                    if (valid == kRows)
                        memcpy(to, from, sizeof(T) * kRows);
                    else
                        for (int r = 0; r < kRows; ++r) to[r] = r < valid ? from[r] : T(0);
                }
            }
        }
        return MMFAST_OK;
    }

    int add_panel(const Block& block, int64_t panel, T* share, bool is_first) {
        const Range samples = block.samples;
        const int64_t begin = first_output(block.outputs), count = outputs_of(block.outputs);
        const bool whole = blocks_.count() == 1;
        Scratch<T> packed(count * samples.size() * kWidth<T>), own(whole ? kStrips * taps_ * kTile : 0);
        if (!packed.get() || !own.get()) return MMFAST_OUT_OF_MEMORY;
        pack_dy(panel, samples, begin, count, packed.get());
        const bool half = args_.out_channels - panel * kWidth<T> <= kLanes<T>;
        const auto add = half ? add_products<1, T> : add_products<kVectors, T>;
        for (int64_t first = 0; first < strips_; first += kStrips) {
            const int64_t last = least(strips_, first + kStrips);
            T* sums = whole ? own.get() : share + (panel * strips_ + first) * taps_ * kTile;
            for (int64_t tap = 0; tap < taps_; ++tap)
                for (int64_t strip = first; strip < last; ++strip)
                    add(block.strips.get() + strip * most_inputs_ * kRows, packed.get(),
                        block.pairs.get() + tap * most_inputs_, block.counts.get()[tap], chain_,
                        sums + ((strip - first) * taps_ + tap) * kTile, is_first);
            for (int64_t strip = first; whole && strip < last; ++strip)
                write(panel, strip, sums + (strip - first) * taps_ * kTile);
        }
        return MMFAST_OK;
    }

    // (positions, samples, width)
    void pack_dy(int64_t panel, Range samples, int64_t begin, int64_t count, T* packed) const {
        const int64_t channels = args_.out_channels, first = panel * kWidth<T>;
        const int64_t columns = least(kWidth<T>, channels - first), step = samples.size() * kWidth<T>;
        if (columns < kWidth<T>) memset(packed, 0, size_t(count * step) * sizeof(T));
        for (int64_t n = 0; n < samples.size(); ++n, packed += kWidth<T>) {
            const T* image = static_cast<const T*>(args_.y) + (samples.begin + n) * out_.positions * channels;
            if (!args_.y_channels_last) {
                transpose_to(packed, step, image + first * out_.positions + begin, out_.positions, columns, count);
                continue;
            }
            for (int64_t i = 0; i < count; ++i)
                memcpy(packed + i * step, image + (begin + i) * channels + first, size_t(columns) * sizeof(T));
        }
    }

    void write(int64_t panel, int64_t strip, const T* sums) {
        const int64_t first = panel * kWidth<T>, columns = least(kWidth<T>, args_.out_channels - first);
        const int64_t channel = strip * kRows;
        T* dweight = static_cast<T*>(args_.dweight) + (channel * args_.out_channels + first) * taps_;
        for (int64_t r = 0; r < least(kRows, args_.in_channels - channel); ++r)
            transpose_to(dweight + r * args_.out_channels * taps_, taps_, sums + r * kWidth<T>, kTile, taps_, columns);
    }

    const Args& args_;
    Grid in_, out_;
    int64_t taps_, strips_, panels_, chain_;
    Blocks blocks_;
    int64_t most_inputs_;
    Shares<T> shares_;
};

template <typename T>
int backward_of(const Args& args) {
    const int status = args.dx ? Gather<T>(args, false).run() : MMFAST_OK;
    return status || !args.dweight ? status : Outer<T>(args).run();
}

}  // namespace

int gather_forward(const Args& args) {
    return with_type(args, [&](auto type) { return Gather<decltype(type)>(args, true).run(); });
}

int gather_backward(const Args& args) {
    return with_type(args, [&](auto type) { return backward_of<decltype(type)>(args); });
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
