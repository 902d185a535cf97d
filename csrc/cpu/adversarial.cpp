// The adversarial loss: value_k = weight_k * reduce_i w_i * phi_k(u_i), u_i = sign_k * (x_i - other_i) + shift_k;
// total = sum_k value_k.
//
// Pointers, shapes and dtypes: mmfast_adversarial_args in mmfast.h. Forward reads each element once; backward reads it
// once and writes its gradient, so both are bound by memory for large tensors and by the call for small ones. Each
// tensor is cut into chunks of kChunk elements, whatever the number of threads. A chunk is summed in four vectors of
// the compute type (float for 16-bit and float32 logits), chunks are added in double, in order: the same bits for any
// number of threads. Backward: d = dtotal * weight_k [/ n_k] * sign_k * w_i * phi_k'(u), less the peer's part.
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

template <int kPhi, typename V, typename C>
inline V phi_of(V u, C tilt) {
    if constexpr (kPhi == MMFAST_SOFTPLUS) return softplus_of(u);
    if constexpr (kPhi == MMFAST_TILTED) return softplus_of(u) + u * tilt;
    if constexpr (kPhi == MMFAST_SQUARE || kPhi == MMFAST_LEAKY_SQUARE) return u * u;
    if constexpr (kPhi == MMFAST_RELU) return u < 0 ? V{} : u;
    if constexpr (kPhi == MMFAST_RELU_SQUARE) return u < 0 ? V{} : u * u;
    if constexpr (kPhi == MMFAST_ABS) return abs_of(u);
    if constexpr (kPhi == MMFAST_SIGMOID) return sigmoid_of(u);
    return u;
}

// phi'(u); torch's subgradients: 0 where the argument of relu or abs is 0
template <int kPhi, typename V, typename C>
inline V slope_of(V u, C tilt) {
    const V one = V{} + 1;
    if constexpr (kPhi == MMFAST_SOFTPLUS) return sigmoid_of(u);
    if constexpr (kPhi == MMFAST_TILTED) return sigmoid_of(u) + tilt;
    if constexpr (kPhi == MMFAST_SQUARE || kPhi == MMFAST_LEAKY_SQUARE) return u + u;
    if constexpr (kPhi == MMFAST_RELU) return u <= 0 ? V{} : one;
    if constexpr (kPhi == MMFAST_RELU_SQUARE) return u <= 0 ? V{} : u + u;
    if constexpr (kPhi == MMFAST_ABS) return u > 0 ? one : u < 0 ? -one : V{};
    if constexpr (kPhi == MMFAST_SIGMOID) {
        const V e = exp_of(-abs_of(u));
        return e / ((e + 1) * (e + 1));
    }
    return one;
}

// Part of one term: `size` of its elements from `begin` on.
template <typename T, typename C>
struct Chunk {
    using V = Vec<C>;
    static constexpr int kWidth = kLanes<C>;

    const T *x, *other;
    const C* weights;
    int64_t begin, size, per_weight;
    C sign, shift, tilt;

    Chunk(const mmfast_adversarial_term& term, int64_t begin, int64_t size)
        : x(static_cast<const T*>(term.logits) + begin),
          other(term.other ? static_cast<const T*>(term.other) + begin : nullptr),
          weights(static_cast<const C*>(term.weights)),
          begin(begin),
          size(size),
          per_weight(term.per_weight),
          sign(C(term.sign)),
          shift(C(term.shift)),
          tilt(C(term.tilt)),
          centre_(term.centre ? *static_cast<const C*>(term.centre) : C(0)),
          subtracts_(term.other || term.centre) {}

    // x - other from element i of the chunk on
    V difference(int64_t i, int n) const {
        const V v = load_float(x + i, n);
        if (!subtracts_) return v;
        return v - (other ? load_float(other + i, n) : splat(centre_));
    }

    template <int kPhi>
    V argument(V difference) const {
        if constexpr (kPhi == MMFAST_LEAKY_SQUARE)
            difference = difference > 0 ? difference : difference * C(MMFAST_ADVERSARIAL_LEAK);
        return difference * sign + shift;
    }

    template <int kPhi>
    V value(int64_t i, int n) const {
        return weighted(phi_of<kPhi>(argument<kPhi>(difference(i, n)), tilt), i, n);
    }

    // the derivative of w * phi by u (of LEAKY_SQUARE by x)
    template <int kPhi>
    V slope(int64_t i, int n) const {
        if constexpr (kPhi == MMFAST_IDENTITY) return weighted(splat(C(1)), i, n);
        const V d = difference(i, n);
        V s = slope_of<kPhi>(argument<kPhi>(d), tilt);
        if constexpr (kPhi == MMFAST_LEAKY_SQUARE) s = d > 0 ? s : s * C(MMFAST_ADVERSARIAL_LEAK);
        return weighted(s, i, n);
    }

  private:
    V weighted(V v, int64_t i, int n) const {
        if (!weights) return v;
        return v * weights_at(i, n);
    }

    // rare, so not part of every loop
    __attribute__((noinline)) V weights_at(int64_t i, int n) const {
        if (per_weight == 1) return load_float(weights + begin + i, n);
        const int64_t first = (begin + i) / per_weight;
        if ((begin + i + n - 1) / per_weight == first) return splat(weights[first]);
        C lane[kWidth] = {};
        for (int j = 0; j < n; ++j) lane[j] = weights[(begin + i + j) / per_weight];
        return load(lane);
    }

    C centre_;
    bool subtracts_;
};

// f(i, n) gives a vector of which n elements count; their sum over 0 <= i < size.
template <typename C, typename F>
inline C sum_of(int64_t size, const F& f) {
    constexpr int kWidth = kLanes<C>;
    Vec<C> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= size; i += 4 * kWidth)
        for (int j = 0; j < 4; ++j) sum[j] += f(i + j * kWidth, kWidth);
    for (; i + kWidth <= size; i += kWidth) sum[0] += f(i, kWidth);
    C rest = 0;
    if (i < size) {
        C lane[kWidth];
        store(lane, f(i, int(size - i)));
        for (int j = 0; j < int(size - i); ++j) rest += lane[j];
    }
    return sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// The sums of a chunk's w * phi, and of their derivatives where those are wanted.
template <int kPhi, typename T, typename C>
void sums_of(const Chunk<T, C>& chunk, double* value, double* slope) {
    *value = double(sum_of<C>(chunk.size, [&](int64_t i, int n) { return chunk.template value<kPhi>(i, n); }));
    if (slope)
        *slope = double(sum_of<C>(chunk.size, [&](int64_t i, int n) { return chunk.template slope<kPhi>(i, n); }));
}

// dx = slope * factor + offset, dother = -dx; either may be null
template <int kPhi, typename T, typename C>
void gradient_of(const Chunk<T, C>& chunk, T* dx, T* dother, C factor, C offset) {
    constexpr int kWidth = kLanes<C>;
    for (int64_t i = 0; i < chunk.size; i += kWidth) {
        const int n = chunk.size - i < kWidth ? int(chunk.size - i) : kWidth;
        const Vec<C> d = chunk.template slope<kPhi>(i, n) * factor + offset;
        if (dx) store_float(dx + i, d, n);
        if (dother) store_float(dother + i, -d, n);
    }
}

template <int k>
struct Phi {
    static constexpr int value = k;
};

// f(phi) with phi as a constant
template <typename F>
void with_phi(int phi, const F& f) {
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return f(Phi<MMFAST_SOFTPLUS>{});
        case MMFAST_SQUARE:
            return f(Phi<MMFAST_SQUARE>{});
        case MMFAST_RELU:
            return f(Phi<MMFAST_RELU>{});
        case MMFAST_ABS:
            return f(Phi<MMFAST_ABS>{});
        case MMFAST_SIGMOID:
            return f(Phi<MMFAST_SIGMOID>{});
        case MMFAST_RELU_SQUARE:
            return f(Phi<MMFAST_RELU_SQUARE>{});
        case MMFAST_TILTED:
            return f(Phi<MMFAST_TILTED>{});
        case MMFAST_LEAKY_SQUARE:
            return f(Phi<MMFAST_LEAKY_SQUARE>{});
        default:
            return f(Phi<MMFAST_IDENTITY>{});
    }
}

// The chunks of all terms are numbered through; this is where a number's term begins.
struct Place {
    const mmfast_adversarial_term* term;
    int64_t offset, size;
};

int64_t chunks_of(const mmfast_adversarial_term& term) { return (term.size + kChunk - 1) / kChunk; }

int64_t count_chunks(const mmfast_adversarial_args& args) {
    int64_t chunks = 0;
    for (int64_t k = 0; k < args.count; ++k) chunks += chunks_of(args.terms[k]);
    return chunks;
}

Place find_chunk(const mmfast_adversarial_args& args, int64_t index) {
    const mmfast_adversarial_term* term = args.terms;
    for (; index >= chunks_of(*term); ++term) index -= chunks_of(*term);
    const int64_t offset = index * kChunk;
    const int64_t left = term->size - offset;
    return {term, offset, left < kChunk ? left : kChunk};
}

// too little work to wake a second thread for: about 10 us on one
int threads_for(const mmfast_adversarial_args& args, int64_t chunks) { return chunks < 8 ? 1 : args.threads; }

template <typename T, typename C>
int forward(const mmfast_adversarial_args& args) {
    const int64_t chunks = count_chunks(args);
    const int64_t room = chunks > 0 ? chunks : 1;
    double* sums = static_cast<double*>(malloc(size_t(args.slopes ? 2 * room : room) * sizeof(double)));
    if (!sums) return MMFAST_OUT_OF_MEMORY;
    double* slope_sums = args.slopes ? sums + room : nullptr;
    parallel_for(threads_for(args, chunks), chunks, [&](int64_t i) {
        const Place place = find_chunk(args, i);
        const Chunk<T, C> chunk(*place.term, place.offset, place.size);
        with_phi(place.term->phi, [&](auto phi) {
            sums_of<decltype(phi)::value>(chunk, sums + i, slope_sums ? slope_sums + i : nullptr);
        });
    });
    C* values = static_cast<C*>(args.values);
    C* slopes = static_cast<C*>(args.slopes);
    double total = 0;
    int64_t next = 0;
    for (int64_t k = 0; k < args.count; ++k) {
        const mmfast_adversarial_term& term = args.terms[k];
        double sum = 0, slope = 0;
        for (int64_t i = chunks_of(term); i > 0; --i, ++next) {
            sum += sums[next];
            if (slopes) slope += slope_sums[next];
        }
        const double count = args.mean ? double(term.size) : 1;
        const double value = term.weight * (sum / count);
        if (values) values[k] = C(value);
        if (slopes) slopes[k] = C(term.weight * term.sign * (slope / count));
        total += value;
    }
    free(sums);
    store_float(static_cast<T*>(args.total), splat(C(total)), 1);
    return MMFAST_OK;
}

template <typename T, typename C>
int backward(const mmfast_adversarial_args& args) {
    const int64_t chunks = count_chunks(args);
    const double dtotal = double(load_float(static_cast<const T*>(args.dtotal), 1)[0]);
    parallel_for(threads_for(args, chunks), chunks, [&](int64_t i) {
        const Place place = find_chunk(args, i);
        const mmfast_adversarial_term& term = *place.term;
        const Chunk<T, C> chunk(term, place.offset, place.size);
        const double scale = args.mean ? term.weight / double(term.size) : term.weight;
        const double peer = term.peer_slope ? double(*static_cast<const C*>(term.peer_slope)) : 0;
        T* dx = term.dlogits ? static_cast<T*>(term.dlogits) + place.offset : nullptr;
        T* dother = term.dother ? static_cast<T*>(term.dother) + place.offset : nullptr;
        if (!dx && !dother) return;
        with_phi(term.phi, [&](auto phi) {
            gradient_of<decltype(phi)::value>(chunk, dx, dother, C(dtotal * scale * term.sign),
                                              C(-dtotal * peer / double(term.size)));
        });
    });
    return MMFAST_OK;
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
