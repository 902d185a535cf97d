// The adversarial loss: value_k = weight_k * reduce_i w_i * phi_k(u_i), u_i = sign_k * (x_i - other_i) + shift_k;
// total = sum_k value_k.
//
// Pointers, shapes and dtypes: mmfast_adversarial_args in mmfast.h. Forward reads each element once (twice where it
// measures the centres); backward reads it once and writes its gradient, so both are bound by memory for large tensors
// and by the call for small ones. A forward that is asked for gradients, too, reads each element once in all, and of
// terms with peers, whose gradients need the slopes of all logits, reads and writes each gradient once more. Each
// tensor is cut into chunks of kChunk elements, whatever the number of threads. A block of a chunk is summed in four
// vectors of the compute type (float for 16-bit and float32 logits), blocks and chunks are added in double, in order:
// the same bits for any number of threads. Backward: d = dtotal * weight_k [/ n_k] * sign_k * w_i * phi_k'(u), less the
// peer's part.
//
// Blocks of a chunk that are not what the loops over phi read - 16-bit logits, x - other, weights - pass through a
// buffer in the first-level cache, so that there is one loop for each phi and compute type.
#include <math.h>
#include <stdlib.h>

#include "cpu/half.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int kBlock = 1024;

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

using Term = mmfast_adversarial_term;

// Lane by lane, the running sum of phi over a block. softplus(u) is max(u, 0) + log(1 + e), e = exp(-|u|): of all e the
// product of 1 + e is kept, less 1, so that it is as accurate as each small e, and its logarithm taken once.
template <typename C>
struct Chain {
    Vec<C> sum{}, product{};
};
// factors of at most 2 do not overflow
static_assert(kBlock / (4 * kLanes<float>)+3 < 127, "a block has too many elements for one product");

// What maps a difference x - other to phi and its slope.
template <int kPhi, typename C>
struct Function {
    using V = Vec<C>;
    static constexpr bool kSoftplus = kPhi == MMFAST_SOFTPLUS || kPhi == MMFAST_TILTED;
    C sign, shift, tilt;

    explicit Function(const Term& term) : sign(C(term.sign)), shift(C(term.shift)), tilt(C(term.tilt)) {}

    V argument(V d) const {
        if constexpr (kPhi == MMFAST_LEAKY_SQUARE) d = d > 0 ? d : d * C(MMFAST_ADVERSARIAL_LEAK);
        return d * sign + shift;
    }

    V value(V d) const {
        const V u = argument(d);
        if constexpr (kPhi == MMFAST_SOFTPLUS) return softplus_of(u);
        if constexpr (kPhi == MMFAST_TILTED) return softplus_of(u) + u * tilt;
        if constexpr (kPhi == MMFAST_SQUARE || kPhi == MMFAST_LEAKY_SQUARE) return u * u;
        if constexpr (kPhi == MMFAST_RELU) return u < 0 ? V{} : u;
        if constexpr (kPhi == MMFAST_RELU_SQUARE) return u < 0 ? V{} : u * u;
        if constexpr (kPhi == MMFAST_ABS) return abs_of(u);
        if constexpr (kPhi == MMFAST_SIGMOID) return sigmoid_of(u);
        return u;
    }

    // the derivative of phi by u (of LEAKY_SQUARE by d); torch's subgradients: 0 where the argument of relu or abs is 0
    V slope(V d) const {
        const V one = V{} + 1;
        const V u = argument(d);
        if constexpr (kPhi == MMFAST_SOFTPLUS) return sigmoid_of(u);
        if constexpr (kPhi == MMFAST_TILTED) return sigmoid_of(u) + tilt;
        if constexpr (kPhi == MMFAST_SQUARE) return u + u;
        if constexpr (kPhi == MMFAST_LEAKY_SQUARE) return d > 0 ? u + u : (u + u) * C(MMFAST_ADVERSARIAL_LEAK);
        if constexpr (kPhi == MMFAST_RELU) return u <= 0 ? V{} : one;
        if constexpr (kPhi == MMFAST_RELU_SQUARE) return u <= 0 ? V{} : u + u;
        if constexpr (kPhi == MMFAST_ABS) return u > 0 ? one : u < 0 ? -one : V{};
        if constexpr (kPhi == MMFAST_SIGMOID) {
            const V e = exp_of(-abs_of(u));
            return e / ((e + 1) * (e + 1));
        }
        return one;
    }

    // adds phi to the chain; returns its slope
    V add(Chain<C>& chain, V d) const {
        if constexpr (kSoftplus) {
            const V u = argument(d), one = V{} + 1;
            const V e = exp_negative(negative_of(u));
            const V top = max_of(V{}, u);
            const V slope = by_sign(u, e, one) / (e + 1);
            chain.product = chain.product * e + (chain.product + e);
            if constexpr (kPhi == MMFAST_TILTED) {
                chain.sum += top + u * tilt;
                return slope + tilt;
            }
            chain.sum += top;
            return slope;
        }
        chain.sum += value(d);
        return slope(d);
    }

    V total(const Chain<C>& chain) const {
        if constexpr (kSoftplus) return chain.sum + log1p_of(chain.product);
        return chain.sum;
    }
};

// The sum of phi over 0 <= i < size, and where kSlopes out_i = its slope * factor.
template <int kPhi, typename C, bool kSlopes>
double sum_of(const Term& term, const C* d, int size, [[maybe_unused]] C factor, [[maybe_unused]] C* out) {
    constexpr int kWidth = kLanes<C>;
    const Function<kPhi, C> function(term);
    Chain<C> first, second, third, fourth;
    // inlined: the compiler calls it, and then each chain is kept in memory
    const auto add = [&](Chain<C>& chain, int i) __attribute__((always_inline)) {
        [[maybe_unused]] const Vec<C> slope = function.add(chain, load(d + i));
        if constexpr (kSlopes) store(out + i, slope * factor);
    };
    int i = 0;
    for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
        add(first, i);
        add(second, i + kWidth);
        add(third, i + 2 * kWidth);
        add(fourth, i + 3 * kWidth);
    }
    for (; i + kWidth <= size; i += kWidth) add(first, i);
    C rest = 0;
    if (i < size) {
        const Vec<C> last = load_partial(d + i, size - i);
        if constexpr (kSlopes) store_partial(out + i, function.slope(last) * factor, size - i);
        C lane[kWidth];
        store(lane, function.value(last));
        for (int j = 0; j < size - i; ++j) rest += lane[j];
    }
    const Vec<C> sum =
        (function.total(first) + function.total(second)) + (function.total(third) + function.total(fourth));
    return double(sum_lanes<C>(sum) + rest);
}

// out_i = f(d_i) over 0 <= i < size
template <typename C, typename F>
inline void map_each(const C* d, C* out, int size, const F& f) {
    constexpr int kWidth = kLanes<C>;
    int i = 0;
    for (; i + kWidth <= size; i += kWidth) store(out + i, f(load(d + i)));
    if (i < size) store_partial(out + i, f(load_partial(d + i, size - i)), size - i);
}

template <int kPhi, typename C>
void values_of(const Term& term, const C* d, int size, C* out) {
    const Function<kPhi, C> function(term);
    map_each(d, out, size, [&](Vec<C> v) { return function.value(v); });
}

template <int kPhi, typename C>
void slopes_of(const Term& term, const C* d, int size, C factor, C offset, C* out) {
    const Function<kPhi, C> function(term);
    map_each(d, out, size, [&](Vec<C> v) { return function.slope(v) * factor + offset; });
}

// The loops over one phi: the only ones that are compiled for each.
template <typename C>
struct Loops {
    // both give the sum of phi; of the second out = slope * factor
    double (*sum)(const Term& term, const C* d, int size, C, C*);
    double (*sum_and_slopes)(const Term& term, const C* d, int size, C factor, C* out);
    void (*values)(const Term& term, const C* d, int size, C* out);
    // slope * factor + offset
    void (*slopes)(const Term& term, const C* d, int size, C factor, C offset, C* out);
};

template <int kPhi, typename C>
constexpr Loops<C> kLoopsOf = {sum_of<kPhi, C, false>, sum_of<kPhi, C, true>, values_of<kPhi, C>, slopes_of<kPhi, C>};

// by enum mmfast_phi
template <typename C>
const Loops<C>& loops_of(int phi) {
    static constexpr Loops<C> table[] = {
        kLoopsOf<MMFAST_SOFTPLUS, C>,    kLoopsOf<MMFAST_SQUARE, C>, kLoopsOf<MMFAST_RELU, C>,
        kLoopsOf<MMFAST_IDENTITY, C>,    kLoopsOf<MMFAST_ABS, C>,    kLoopsOf<MMFAST_SIGMOID, C>,
        kLoopsOf<MMFAST_RELU_SQUARE, C>, kLoopsOf<MMFAST_TILTED, C>, kLoopsOf<MMFAST_LEAKY_SQUARE, C>,
    };
    return table[phi];
}

// x - other of the elements from `begin` on: in `room` (kBlock,), or the logits themselves where that is the same
template <typename T, typename C>
const C* differences(const Term& term, int64_t begin, int size, C* room) {
    const T* x = static_cast<const T*>(term.logits) + begin;
    if constexpr (kSame<T, C>)
        if (!term.other && !term.centre) return x;
    constexpr int kWidth = kLanes<C>;
    const T* other = term.other ? static_cast<const T*>(term.other) + begin : nullptr;
    const Vec<C> centre = splat(term.centre ? *static_cast<const C*>(term.centre) : C(0));
    int i = 0;
    if (other)
        for (; i + kWidth <= size; i += kWidth)
            store(room + i, load_float(x + i, kWidth) - load_float(other + i, kWidth));
    else
        for (; i + kWidth <= size; i += kWidth) store(room + i, load_float(x + i, kWidth) - centre);
    if (i < size) {
        const int n = size - i;
        store_partial(room + i, load_float(x + i, n) - (other ? load_float(other + i, n) : centre), n);
    }
    return room;
}

// y_i *= w_i of the elements from `begin` on
template <typename C>
void weigh(const Term& term, int64_t begin, int size, C* y) {
    const C* weights = static_cast<const C*>(term.weights);
    for (int i = 0; i < size;) {
        const int64_t part = (begin + i) / term.per_weight;
        const int64_t left = (part + 1) * term.per_weight - begin;
        const int end = left < size ? int(left) : size;
        for (; i < end; ++i) y[i] *= weights[part];
    }
}

// to = from, or its negative
template <typename T, typename C>
void convert(const C* from, T* to, int size, bool negative) {
    constexpr int kWidth = kLanes<C>;
    const Vec<C> sign = splat(negative ? C(-1) : C(1));
    for (int i = 0; i < size; i += kWidth) {
        const int n = size - i < kWidth ? size - i : kWidth;
        const Vec<C> v = n == kWidth ? load(from + i) : load_partial(from + i, n);
        store_float(to + i, v * sign, n);
    }
}

// The gradients by the elements from `begin` on, made in `made` and brought from there: dx, and dother = -dx; either
// may be null.
template <typename T, typename C>
struct Gradients {
    T *dx, *dother;
    C* made;

    Gradients(const Term& term, int64_t begin, C* room)
        : dx(term.dlogits ? static_cast<T*>(term.dlogits) + begin : nullptr),
          dother(term.dother ? static_cast<T*>(term.dother) + begin : nullptr),
          made(room) {
        if constexpr (kSame<T, C>)
            if (dx) made = dx;
    }

    void bring(int size) const {
        if constexpr (!kSame<T, C>)
            if (dx) convert(made, dx, size, false);
        if (dother) convert(made, dother, size, true);
    }
};

// dx = w * slope * factor + offset of a block's differences d
template <typename T, typename C>
void differentiate_block(const Term& term, int64_t begin, const C* d, int size, C factor, C offset, C* room) {
    const Gradients<T, C> gradients(term, begin, room);
    C* out = gradients.made;
    const Loops<C>& loops = loops_of<C>(term.phi);
    if (term.weights) {
        // the offset has no weight
        loops.slopes(term, d, size, factor, C(0), out);
        weigh(term, begin, size, out);
        if (offset != 0) map_each(out, out, size, [&](Vec<C> v) { return v + offset; });
    } else {
        loops.slopes(term, d, size, factor, offset, out);
    }
    gradients.bring(size);
}

template <typename T, typename C>
void differentiate_chunk(const Term& term, int64_t begin, int64_t size, C factor, C offset) {
    C room[kBlock], y[kBlock];
    for (int64_t i = 0; i < size; i += kBlock) {
        const int n = size - i < kBlock ? int(size - i) : kBlock;
        differentiate_block<T, C>(term, begin + i, differences<T, C>(term, begin + i, n, room), n, factor, offset, y);
    }
}

template <typename C>
double sum_of_numbers(const C* y, int size) {
    Term plain{};
    plain.sign = 1;
    return sum_of<MMFAST_IDENTITY, C, false>(plain, y, size, C(0), nullptr);
}

// Whether a forward with slopes leaves slope * factor in the gradient's place, of which only the peer's part is
// missing.
template <typename T, typename C>
bool keeps_slopes(const Term& term) {
    return kSame<T, C> && term.dlogits && !term.weights;
}

// The sums of w * phi over a chunk, and where `slope` is not null of its slope, times the factor where that is kept;
// else the term's gradients that are wanted, w * slope * factor. Blocks are added in double: a lane's chain over a
// whole chunk would be less accurate than PyTorch's cascade.
template <typename T, typename C>
void sum_chunk(const Term& term, int64_t begin, int64_t size, C factor, double* value, double* slope) {
    const Loops<C>& loops = loops_of<C>(term.phi);
    const bool wanted = !slope && (term.dlogits || term.dother);
    C room[kBlock], y[kBlock];
    *value = 0;
    if (slope) *slope = 0;
    for (int64_t i = 0; i < size; i += kBlock) {
        const int n = size - i < kBlock ? int(size - i) : kBlock;
        const C* d = differences<T, C>(term, begin + i, n, room);
        if (term.weights) {
            loops.values(term, d, n, y);
            weigh(term, begin + i, n, y);
            *value += sum_of_numbers(y, n);
            if (slope) {
                loops.slopes(term, d, n, C(1), C(0), y);
                weigh(term, begin + i, n, y);
                *slope += sum_of_numbers(y, n);
            }
            if (wanted) differentiate_block<T, C>(term, begin + i, d, n, factor, C(0), y);
        } else if (slope) {
            C* out = keeps_slopes<T, C>(term) ? static_cast<C*>(term.dlogits) + begin + i : y;
            *value += loops.sum_and_slopes(term, d, n, out == y ? C(1) : factor, out);
            *slope += sum_of_numbers(out, n);
        } else if (wanted) {
            const Gradients<T, C> gradients(term, begin + i, y);
            *value += loops.sum_and_slopes(term, d, n, factor, gradients.made);
            gradients.bring(n);
        } else {
            *value += loops.sum(term, d, n, C(0), nullptr);
        }
    }
}

// The chunks of all terms are numbered through; this is where a number's term begins.
struct Place {
    const Term* term;
    int64_t offset, size;
};

int64_t chunks_of(const Term& term) { return (term.size + kChunk - 1) / kChunk; }

int64_t count_chunks(const mmfast_adversarial_args& args) {
    int64_t chunks = 0;
    for (int64_t k = 0; k < args.count; ++k) chunks += chunks_of(args.terms[k]);
    return chunks;
}

Place find_chunk(const mmfast_adversarial_args& args, int64_t index) {
    const Term* term = args.terms;
    for (; index >= chunks_of(*term); ++term) index -= chunks_of(*term);
    const int64_t offset = index * kChunk;
    const int64_t left = term->size - offset;
    return {term, offset, left < kChunk ? left : kChunk};
}

// too little work to wake a second thread for: about 10 us on one
int threads_for(const mmfast_adversarial_args& args, int64_t chunks) { return chunks < 8 ? 1 : args.threads; }

// The sums of each chunk; few of them need no allocation.
class ChunkSums {
  public:
    ChunkSums(int64_t chunks, bool has_slopes) : chunks_(chunks), has_slopes_(has_slopes) {
        const int64_t count = has_slopes ? 2 * chunks : chunks;
        sums_ = count <= kFew ? few_ : static_cast<double*>(malloc(size_t(count) * sizeof(double)));
    }
    ChunkSums(const ChunkSums&) = delete;
    ChunkSums& operator=(const ChunkSums&) = delete;
    ~ChunkSums() {
        if (sums_ != few_) free(sums_);
    }
    bool allocated() const { return sums_ != nullptr; }
    double* values() const { return sums_; }
    double* slopes() const { return has_slopes_ ? sums_ + chunks_ : nullptr; }

  private:
    static constexpr int64_t kFew = 256;
    int64_t chunks_;
    bool has_slopes_;
    double few_[kFew];
    double* sums_;
};

// means[k]: the mean of the logits of term k
template <typename T, typename C>
void measure(const mmfast_adversarial_args& args, int64_t chunks, double* sums) {
    parallel_for(threads_for(args, chunks), chunks, [&](int64_t i) {
        const Place place = find_chunk(args, i);
        Term plain{};
        plain.logits = place.term->logits;
        plain.phi = MMFAST_IDENTITY;
        plain.sign = 1;
        sum_chunk<T, C>(plain, place.offset, place.size, C(0), sums + i, nullptr);
    });
    for (int64_t k = 0; k < args.count; ++k) {
        double sum = 0;
        for (int64_t i = chunks_of(args.terms[k]); i > 0; --i) sum += *sums++;
        static_cast<C*>(args.means)[k] = C(sum / double(args.terms[k].size));
    }
}

// the factor of the slope in the gradient by the logits, of the total's gradient 1
double factor_of(const mmfast_adversarial_args& args, const Term& term) {
    const double scale = args.mean ? term.weight / double(term.size) : term.weight;
    return scale * term.sign;
}

// kept: whether this ends a forward, which may have kept slopes
template <typename T, typename C>
int backward(const mmfast_adversarial_args& args, bool kept = false) {
    const int64_t chunks = count_chunks(args);
    const double dtotal = args.dtotal ? double(load_float(static_cast<const T*>(args.dtotal), 1)[0]) : 1;
    parallel_for(threads_for(args, chunks), chunks, [&](int64_t i) {
        const Place place = find_chunk(args, i);
        const Term& term = *place.term;
        if (!term.dlogits && !term.dother) return;
        const double peer = term.peer_slope ? double(*static_cast<const C*>(term.peer_slope)) : 0;
        const C offset = C(-dtotal * peer / double(term.size));
        if (kept && keeps_slopes<T, C>(term)) {
            C* dx = static_cast<C*>(term.dlogits) + place.offset;
            map_each(dx, dx, int(place.size), [&](Vec<C> v) { return v + offset; });
        } else {
            differentiate_chunk<T, C>(term, place.offset, place.size, C(dtotal * factor_of(args, term)), offset);
        }
    });
    return MMFAST_OK;
}

template <typename T, typename C>
int forward(const mmfast_adversarial_args& args) {
    const int64_t chunks = count_chunks(args);
    const ChunkSums sums(chunks, args.slopes != nullptr);
    if (!sums.allocated()) return MMFAST_OUT_OF_MEMORY;
    if (args.means) measure<T, C>(args, chunks, sums.values());
    parallel_for(threads_for(args, chunks), chunks, [&](int64_t i) {
        const Place place = find_chunk(args, i);
        double* slope = sums.slopes() ? sums.slopes() + i : nullptr;
        sum_chunk<T, C>(*place.term, place.offset, place.size, C(factor_of(args, *place.term)), sums.values() + i,
                        slope);
    });
    C* values = static_cast<C*>(args.values);
    C* slopes = static_cast<C*>(args.slopes);
    double total = 0;
    int64_t next = 0;
    for (int64_t k = 0; k < args.count; ++k) {
        const Term& term = args.terms[k];
        double sum = 0, slope = 0;
        for (int64_t i = chunks_of(term); i > 0; --i, ++next) {
            sum += sums.values()[next];
            if (slopes) slope += sums.slopes()[next];
        }
        const double count = args.mean ? double(term.size) : 1;
        const double value = term.weight * (sum / count);
        if (values) values[k] = C(value);
        if (slopes) slopes[k] = C(keeps_slopes<T, C>(term) ? slope : term.weight * term.sign * (slope / count));
        total += value;
    }
    store_float(static_cast<T*>(args.total), splat(C(total)), 1);
    // gradients that need the slopes of all logits first
    return slopes ? backward<T, C>(args, true) : MMFAST_OK;
}

}  // namespace

int adversarial_forward(const mmfast_adversarial_args& args) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return forward<float, float>(args);
        case MMFAST_FLOAT64:
            return forward<double, double>(args);
        case MMFAST_FLOAT16:
            return forward<Half, float>(args);
        case MMFAST_BFLOAT16:
            return forward<Bf16, float>(args);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

int adversarial_backward(const mmfast_adversarial_args& args) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return backward<float, float>(args);
        case MMFAST_FLOAT64:
            return backward<double, double>(args);
        case MMFAST_FLOAT16:
            return backward<Half, float>(args);
        case MMFAST_BFLOAT16:
            return backward<Bf16, float>(args);
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
