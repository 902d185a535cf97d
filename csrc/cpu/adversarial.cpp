// The adversarial loss: value_k = weight_k * reduce_i phi_k(u_i), u_i = sign_k * x_i + shift_k; total = sum_k value_k.
//
// Pointers, shapes and dtypes: mmfast_adversarial_args in mmfast.h. Forward reads each logit once; backward reads it
// once and writes its gradient, so both are bound by memory for large tensors and by the call for small ones. Each
// tensor is cut into chunks of kChunk elements, whatever the number of threads. A chunk is summed in four vectors of
// the compute type (float for 16-bit and float32 logits), chunks are added in double, in order: the same bits for any
// number of threads. Backward: d = dtotal * weight_k [/ n_k] * sign_k * phi_k'(u).
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

template <typename V>
inline V phi_of(int phi, V u) {
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return softplus_of(u);
        case MMFAST_SQUARE:
            return u * u;
        case MMFAST_RELU:
            return u < 0 ? V{} : u;
        default:
            return u;
    }
}

// torch's subgradient: 0 where relu's argument is 0
template <typename V>
inline V slope_of(int phi, V u) {
    const V one = V{} + 1;
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return sigmoid_of(u);
        case MMFAST_SQUARE:
            return u + u;
        case MMFAST_RELU:
            return u <= 0 ? V{} : one;
        default:
            return one;
    }
}

template <int kPhi, typename T, typename C>
C chunk_sum(const T* x, int64_t n, C sign, C shift) {
    constexpr int kWidth = kLanes<C>;
    Vec<C> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
        for (int j = 0; j < 4; ++j) sum[j] += phi_of(kPhi, load_float(x + i + j * kWidth, kWidth) * sign + shift);
    for (; i + kWidth <= n; i += kWidth) sum[0] += phi_of(kPhi, load_float(x + i, kWidth) * sign + shift);
    C rest = 0;
    if (i < n) {
        C lane[kWidth];
        store(lane, phi_of(kPhi, load_float(x + i, int(n - i)) * sign + shift));
        for (int j = 0; j < int(n - i); ++j) rest += lane[j];
    }
    return sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <int kPhi, typename T, typename C>
void chunk_gradient(const T* x, T* dx, int64_t n, C sign, C shift, C factor) {
    constexpr int kWidth = kLanes<C>;
    for (int64_t i = 0; i < n; i += kWidth) {
        const int width = n - i < kWidth ? int(n - i) : kWidth;
        store_float(dx + i, slope_of(kPhi, load_float(x + i, width) * sign + shift) * factor, width);
    }
}

template <typename T, typename C>
C chunk_sum_of(int phi, const T* x, int64_t n, C sign, C shift) {
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return chunk_sum<MMFAST_SOFTPLUS>(x, n, sign, shift);
        case MMFAST_SQUARE:
            return chunk_sum<MMFAST_SQUARE>(x, n, sign, shift);
        case MMFAST_RELU:
            return chunk_sum<MMFAST_RELU>(x, n, sign, shift);
        default:
            return chunk_sum<MMFAST_IDENTITY>(x, n, sign, shift);
    }
}

template <typename T, typename C>
void chunk_gradient_of(int phi, const T* x, T* dx, int64_t n, C sign, C shift, C factor) {
    switch (phi) {
        case MMFAST_SOFTPLUS:
            return chunk_gradient<MMFAST_SOFTPLUS>(x, dx, n, sign, shift, factor);
        case MMFAST_SQUARE:
            return chunk_gradient<MMFAST_SQUARE>(x, dx, n, sign, shift, factor);
        case MMFAST_RELU:
            return chunk_gradient<MMFAST_RELU>(x, dx, n, sign, shift, factor);
        default:
            return chunk_gradient<MMFAST_IDENTITY>(x, dx, n, sign, shift, factor);
    }
}

// The chunks of all terms are numbered through; this is where a number's term begins.
struct Chunk {
    const mmfast_adversarial_term* term;
    int64_t offset, size;
};

int64_t chunks_of(const mmfast_adversarial_term& term) { return (term.size + kChunk - 1) / kChunk; }

int64_t count_chunks(const mmfast_adversarial_args& args) {
    int64_t chunks = 0;
    for (int64_t k = 0; k < args.count; ++k) chunks += chunks_of(args.terms[k]);
    return chunks;
}

Chunk find_chunk(const mmfast_adversarial_args& args, int64_t index) {
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
    double* sums = static_cast<double*>(malloc(size_t(chunks > 0 ? chunks : 1) * sizeof(double)));
    if (!sums) return MMFAST_OUT_OF_MEMORY;
    parallel_for(threads_for(args, chunks), chunks, [&](int64_t i) {
        const Chunk chunk = find_chunk(args, i);
        const mmfast_adversarial_term& term = *chunk.term;
        const T* x = static_cast<const T*>(term.logits) + chunk.offset;
        sums[i] = double(chunk_sum_of(term.phi, x, chunk.size, C(term.sign), C(term.shift)));
    });
    C* values = static_cast<C*>(args.values);
    double total = 0;
    const double* next = sums;
    for (int64_t k = 0; k < args.count; ++k) {
        const mmfast_adversarial_term& term = args.terms[k];
        double sum = 0;
        for (int64_t i = chunks_of(term); i > 0; --i) sum += *next++;
        const double value = term.weight * (args.mean ? sum / double(term.size) : sum);
        values[k] = C(value);
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
        const Chunk chunk = find_chunk(args, i);
        const mmfast_adversarial_term& term = *chunk.term;
        const double scale = args.mean ? term.weight / double(term.size) : term.weight;
        const T* x = static_cast<const T*>(term.logits) + chunk.offset;
        T* dx = static_cast<T*>(term.dlogits) + chunk.offset;
        chunk_gradient_of(term.phi, x, dx, chunk.size, C(term.sign), C(term.shift), C(dtotal * scale * term.sign));
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
