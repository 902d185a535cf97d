// The adversarial loss: value_k = weight_k * reduce_i w_i * phi_k(u_i), u_i = sign_k * (x_i - other_i) + shift_k;
// total = sum_k value_k.
//
// Pointers, shapes and dtypes: mmfast_adversarial_args in mmfast.h. The list travels by value in the kernel's
// arguments, kMaxTerms terms a launch, so a list costs one launch a pass (and one small launch that adds up the
// forward's sums). Each tensor is cut into chunks of MMFAST_ADVERSARIAL_CHUNK elements, one block a chunk. A chunk's
// elements are added by thread in float32 (float64 for float64 logits), threads by a tree, chunks by lane and then by a
// tree in float64, terms in order: the same bits each time, and no sync. Forward reads each element once, backward
// reads it once and writes its gradient: both are bound by memory. Backward: d = dtotal * weight_k [/ n_k] * sign_k *
// w_i * phi_k'(u), less the peer's part, rounded once.
#include "cuda/device.h"

namespace mmfast {
namespace device {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = MMFAST_ADVERSARIAL_CHUNK;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kMaxTerms = 16;  // the arguments are at most 4 KB
#else
constexpr int kMaxTerms = 64;
#endif

// log(1 + exp(u)) = max(u, 0) + log1p(exp(-|u|)): nothing cancels and nothing overflows
template <typename C>
MMFAST_DEVICE C softplus_of(C u) {
    return (u < 0 ? C(0) : u) + log1p_of(exp_of(-abs_of(u)));
}

template <typename C>
MMFAST_DEVICE C sigmoid_of(C u) {
    const C e = exp_of(-abs_of(u));
    return divide(u < 0 ? e : C(1), C(1) + e);
}

template <int kPhi, typename C>
MMFAST_DEVICE C phi_of(C u, C tilt) {
    if constexpr (kPhi == MMFAST_SOFTPLUS) return softplus_of(u);
    if constexpr (kPhi == MMFAST_TILTED) return softplus_of(u) + u * tilt;
    if constexpr (kPhi == MMFAST_SQUARE || kPhi == MMFAST_LEAKY_SQUARE) return u * u;
    if constexpr (kPhi == MMFAST_RELU) return u < 0 ? C(0) : u;
    if constexpr (kPhi == MMFAST_RELU_SQUARE) return u < 0 ? C(0) : u * u;
    if constexpr (kPhi == MMFAST_ABS) return abs_of(u);
    if constexpr (kPhi == MMFAST_SIGMOID) return sigmoid_of(u);
    return u;
}

// torch's subgradients: 0 where the argument of relu or abs is 0
template <int kPhi, typename C>
MMFAST_DEVICE C slope_of(C u, C tilt) {
    if constexpr (kPhi == MMFAST_SOFTPLUS) return sigmoid_of(u);
    if constexpr (kPhi == MMFAST_TILTED) return sigmoid_of(u) + tilt;
    if constexpr (kPhi == MMFAST_SQUARE || kPhi == MMFAST_LEAKY_SQUARE) return u + u;
    if constexpr (kPhi == MMFAST_RELU) return u <= 0 ? C(0) : C(1);
    if constexpr (kPhi == MMFAST_RELU_SQUARE) return u <= 0 ? C(0) : u + u;
    if constexpr (kPhi == MMFAST_ABS) return u > 0 ? C(1) : u < 0 ? C(-1) : C(0);
    if constexpr (kPhi == MMFAST_SIGMOID) {
        const C e = exp_of(-abs_of(u));
        return divide(e, (C(1) + e) * (C(1) + e));
    }
    return C(1);
}

template <typename T>
struct Term {
    Global<const T> x, other;
    Global<const Compute<T>> centre, weights, peer_slope;
    Global<T> dx, dother;  // backward only
    int64_t size, per_weight;
    double per_weight_inverse;  // a 64-bit division is a call, around which registers would spill
    Compute<T> sign, shift, tilt;
    Compute<T> factor;  // backward only: weight * sign [/ size]
    int phi;
    int first_chunk;
    bool has_other, has_centre, has_weights, has_peer, wants_dx, wants_dother;

    // the factor of element i
    MMFAST_DEVICE Compute<T> weight(int64_t i) const {
        if (!has_weights) return Compute<T>(1);
        int64_t k = int64_t(double(i) * per_weight_inverse);
        if (k * per_weight > i) --k;
        if ((k + 1) * per_weight <= i) ++k;
        return load(weights, k);
    }

    template <int kPhi>
    MMFAST_DEVICE Compute<T> argument(Compute<T> difference) const {
        if constexpr (kPhi == MMFAST_LEAKY_SQUARE)
            difference = difference > 0 ? difference : difference * Compute<T>(MMFAST_ADVERSARIAL_LEAK);
        return difference * sign + shift;
    }

    template <int kPhi>
    MMFAST_DEVICE Compute<T> value(Compute<T> difference) const {
        return phi_of<kPhi>(argument<kPhi>(difference), tilt);
    }

    // the derivative of phi by u (of LEAKY_SQUARE by x)
    template <int kPhi>
    MMFAST_DEVICE Compute<T> slope(Compute<T> difference) const {
        Compute<T> s = slope_of<kPhi>(argument<kPhi>(difference), tilt);
        if constexpr (kPhi == MMFAST_LEAKY_SQUARE) s = difference > 0 ? s : s * Compute<T>(MMFAST_ADVERSARIAL_LEAK);
        return s;
    }
};

template <typename T>
struct Table {
    Term<T> terms[kMaxTerms];
    int count;

    // The term whose chunk this block has: the last that begins at or before it, so empty terms have none.
    MMFAST_DEVICE const Term<T>& find(int64_t block) const {
        int k = 0;
        MMFAST_UNROLL
        for (int step = kMaxTerms / 2; step > 0; step /= 2)
            if (k + step < count && terms[k + step].first_chunk <= block) k += step;
        return terms[k];
    }
};

constexpr int kPerThread = kChunk / kThreads;

// One chunk of one tensor, this thread's elements of it: offset is the chunk's first element.
template <typename T>
struct Chunk {
    using C = Compute<T>;
    // sixteen elements at a time, whose code is repeated so often; float64 is rare and need not be fast
    static constexpr int kWidth = kVector<T>, kVectors = sizeof(T) == 4 ? 4 : 2;
    static constexpr int kBatches = kPerThread / (kWidth * kVectors);

    const Term<T>& term;
    int64_t offset;
    int size;
    C centre;

    MMFAST_DEVICE Chunk(const Term<T>& term, int64_t block) : term(term) {
        offset = (block - term.first_chunk) * kChunk;
        const int64_t left = term.size - offset;
        size = left < kChunk ? int(left) : kChunk;
        centre = term.has_centre ? load(term.centre, 0) : C(0);
    }

    // whether it is read in vectors: full, aligned, and without weights, which are rare
    MMFAST_DEVICE bool is_whole() const {
        return size == kChunk && !term.has_weights && is_aligned<kWidth>(term.x + offset) &&
               (!term.has_other || is_aligned<kWidth>(term.other + offset));
    }

    MMFAST_DEVICE C difference(T x, T other) const {
        if (term.has_other) return to_float(x) - to_float(other);
        return term.has_centre ? to_float(x) - centre : to_float(x);
    }
    MMFAST_DEVICE C difference_at(int i) const {
        const T x = load(term.x, offset + i);
        return difference(x, term.has_other ? load(term.other, offset + i) : x);
    }

    // Some vectors of this thread in a whole chunk, all loaded before any of them is used.
    struct Vectors {
        Vector<T, kWidth> x[kVectors], other[kVectors];
    };
    MMFAST_DEVICE static int start(int batch, int j) {
        return ((batch * kVectors + j) * kThreads + thread_index()) * kWidth;
    }
    MMFAST_DEVICE void load_batch(Vectors& v, int batch) const {
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) v.x[j] = load_vector<kWidth>(term.x + offset, start(batch, j));
        if (!term.has_other) return;
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) v.other[j] = load_vector<kWidth>(term.other + offset, start(batch, j));
    }
};

// This thread's part of the chunk's sum, of w * phi or of its derivative.
template <int kPhi, bool kSlope, typename T>
MMFAST_DEVICE Compute<T> thread_sum(const Chunk<T>& chunk) {
    using C = Compute<T>;
    const auto part = [](const Term<T>& term, C difference) {
        return kSlope ? term.template slope<kPhi>(difference) : term.template value<kPhi>(difference);
    };
    C sum = 0;
    if (chunk.is_whole()) {
        MMFAST_NO_UNROLL
        for (int batch = 0; batch < Chunk<T>::kBatches; ++batch) {
            typename Chunk<T>::Vectors v;
            chunk.load_batch(v, batch);
            MMFAST_UNROLL
            for (int j = 0; j < Chunk<T>::kVectors; ++j) MMFAST_UNROLL
            for (int i = 0; i < Chunk<T>::kWidth; ++i)
                sum += part(chunk.term, chunk.difference(v.x[j].at[i], v.other[j].at[i]));
        }
        return sum;
    }
    MMFAST_NO_UNROLL
    for (int i = thread_index(); i < chunk.size; i += kThreads)
        sum += chunk.term.weight(chunk.offset + i) * part(chunk.term, chunk.difference_at(i));
    return sum;
}

template <int k>
struct Phi {
    static constexpr int value = k;
};

// f(phi) with phi as a constant
template <typename F>
MMFAST_DEVICE void with_phi(int phi, const F& f) {
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

template <typename T>
struct Forward {
    static constexpr int kThreads = device::kThreads;
    Table<T> table;
    Global<double> sums, slope_sums;  // one a chunk
    bool has_slopes;

    MMFAST_DEVICE void operator()() const {
        using C = Compute<T>;
        SharedCursor cursor;
        const SharedArray<C> warp_sums = shared_array<C>(cursor, 32);
        const Term<T>& term = table.find(block_index());
        const Chunk<T> chunk(term, block_index());
        C part = 0;
        with_phi(term.phi, [&](auto phi) { part = thread_sum<decltype(phi)::value, false>(chunk); });
        const C sum = block_sum<kThreads>(part, warp_sums);
        if (thread_index() == 0) store(sums, block_index(), double(sum));
        if (!has_slopes) return;
        // a second look at the chunk, which the cache still has
        barrier();
        with_phi(term.phi, [&](auto phi) { part = thread_sum<decltype(phi)::value, true>(chunk); });
        const C slope = block_sum<kThreads>(part, warp_sums);
        if (thread_index() == 0) store(slope_sums, block_index(), double(slope));
    }
};

// One block adds up the chunks' sums: a warp a term, then thread 0 the terms in order.
template <typename T>
struct Finish {
    static constexpr int kThreads = device::kThreads;
    Global<const double> sums, slope_sums;
    Global<Compute<T>> values, slopes;  // of these terms
    Global<T> total;
    Global<double> running_total;  // of the launches before, and of this one
    int32_t first_chunk[kMaxTerms + 1];
    double scale[kMaxTerms];        // weight [/ size]
    double slope_scale[kMaxTerms];  // weight * sign [/ size]
    int count;
    bool first, has_values, has_slopes;

    MMFAST_DEVICE double sum_of(Global<const double> of, int k) const {
        double sum = 0;
        for (int i = first_chunk[k] + lane_index(); i < first_chunk[k + 1]; i += 32) sum += load(of, i);
        return warp_sum(sum);
    }

    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<double> shared_values = shared_array<double>(cursor, kMaxTerms);
        for (int k = warp_index(); k < count; k += kThreads / 32) {
            const double value = scale[k] * sum_of(sums, k);
            const double slope = has_slopes ? slope_scale[k] * sum_of(slope_sums, k) : 0;
            if (lane_index() != 0) continue;
            shared_values[k] = value;
            if (has_values) store(values, k, Compute<T>(value));
            if (has_slopes) store(slopes, k, Compute<T>(slope));
        }
        barrier();
        if (thread_index() != 0) return;
        double sum = first ? 0 : load(running_total, 0);
        for (int k = 0; k < count; ++k) sum += shared_values[k];
        store(running_total, 0, sum);
        store(total, 0, from_float<T>(Compute<T>(sum)));
    }
};

// dx = slope * factor + offset, dother = -dx, where they are wanted
template <int kPhi, typename T>
MMFAST_DEVICE void thread_gradient(const Chunk<T>& chunk, Compute<T> factor, Compute<T> offset) {
    using C = Compute<T>;
    constexpr int kWidth = Chunk<T>::kWidth;
    const Term<T>& term = chunk.term;
    const auto gradient = [&](C difference, C weight) {
        return weight * term.template slope<kPhi>(difference) * factor + offset;
    };
    const bool aligned = (!term.wants_dx || is_aligned<kWidth>(term.dx + chunk.offset)) &&
                         (!term.wants_dother || is_aligned<kWidth>(term.dother + chunk.offset));
    if (chunk.is_whole() && aligned) {
        MMFAST_NO_UNROLL
        for (int batch = 0; batch < Chunk<T>::kBatches; ++batch) {
            typename Chunk<T>::Vectors v;
            chunk.load_batch(v, batch);
            MMFAST_UNROLL
            for (int j = 0; j < Chunk<T>::kVectors; ++j) {
                const int start = chunk.start(batch, j);
                Vector<T, kWidth> dx, dother;
                MMFAST_UNROLL
                for (int i = 0; i < kWidth; ++i) {
                    const C d = gradient(chunk.difference(v.x[j].at[i], v.other[j].at[i]), C(1));
                    dx.at[i] = from_float<T>(d);
                    dother.at[i] = from_float<T>(-d);
                }
                if (term.wants_dx) store_vector(term.dx + chunk.offset, start, dx);
                if (term.wants_dother) store_vector(term.dother + chunk.offset, start, dother);
            }
        }
        return;
    }
    MMFAST_NO_UNROLL
    for (int i = thread_index(); i < chunk.size; i += kThreads) {
        const C d = gradient(chunk.difference_at(i), term.weight(chunk.offset + i));
        if (term.wants_dx) store(term.dx, chunk.offset + i, from_float<T>(d));
        if (term.wants_dother) store(term.dother, chunk.offset + i, from_float<T>(-d));
    }
}

template <typename T>
struct Backward {
    static constexpr int kThreads = device::kThreads;
    Table<T> table;
    Global<const T> dtotal;

    MMFAST_DEVICE void operator()() const {
        using C = Compute<T>;
        const Term<T>& term = table.find(block_index());
        if (!term.wants_dx && !term.wants_dother) return;
        const Chunk<T> chunk(term, block_index());
        const C scale = to_float(load(dtotal, 0));
        const C offset = term.has_peer ? -scale * load(term.peer_slope, 0) / C(term.size) : C(0);
        with_phi(term.phi,
                 [&](auto phi) { thread_gradient<decltype(phi)::value>(chunk, C(scale * term.factor), offset); });
    }
};

int64_t chunks_of(const mmfast_adversarial_term& term) { return (term.size + kChunk - 1) / kChunk; }

double scale_of(const mmfast_adversarial_args& args, const mmfast_adversarial_term& term) {
    return args.mean ? term.weight / double(term.size) : term.weight;
}

template <typename T>
Term<T> term_of(const mmfast_adversarial_args& args, const mmfast_adversarial_term& from, Buffers& buffers) {
    using C = Compute<T>;
    Term<T> term{};
    term.x = buffers.input<T>(from.logits, from.size);
    term.has_other = from.other != nullptr;
    if (from.other) term.other = buffers.input<T>(from.other, from.size);
    term.has_centre = from.centre != nullptr;
    if (from.centre) term.centre = buffers.input<C>(from.centre, 1);
    term.has_weights = from.weights != nullptr;
    if (from.weights) term.weights = buffers.input<C>(from.weights, from.size / from.per_weight);
    term.has_peer = from.peer_slope != nullptr;
    if (from.peer_slope) term.peer_slope = buffers.input<C>(from.peer_slope, 1);
    term.wants_dx = from.dlogits != nullptr;
    if (from.dlogits) term.dx = buffers.output<T>(from.dlogits, from.size);
    term.wants_dother = from.dother != nullptr;
    if (from.dother) term.dother = buffers.output<T>(from.dother, from.size);
    term.size = from.size;
    term.per_weight = from.per_weight;
    term.per_weight_inverse = from.per_weight ? 1.0 / double(from.per_weight) : 0;
    term.sign = C(from.sign);
    term.shift = C(from.shift);
    term.tilt = C(from.tilt);
    term.factor = C(scale_of(args, from) * from.sign);
    term.phi = from.phi;
    return term;
}

// Fills the table with the terms from `begin` on, as many as it takes; returns the number of their chunks.
template <typename T>
int64_t fill(Table<T>& table, Buffers& buffers, const mmfast_adversarial_args& args, int64_t begin) {
    int64_t chunks = 0;
    table.count = 0;
    for (int64_t k = begin; k < args.count && k < begin + kMaxTerms; ++k) {
        Term<T>& term = table.terms[table.count++];
        term = term_of<T>(args, args.terms[k], buffers);
        term.first_chunk = int(chunks);
        chunks += chunks_of(args.terms[k]);
    }
    return chunks;
}

// The second launch of a group of terms, whose sums begin at `sums`.
template <typename T>
Finish<T> finish_of(const Table<T>& table, const mmfast_adversarial_args& args, int64_t begin, int64_t chunks) {
    Finish<T> finish{};
    finish.count = table.count;
    finish.first = begin == 0;
    for (int k = 0; k < table.count; ++k) {
        const mmfast_adversarial_term& term = args.terms[begin + k];
        finish.first_chunk[k] = table.terms[k].first_chunk;
        finish.scale[k] = scale_of(args, term);
        finish.slope_scale[k] = scale_of(args, term) * term.sign;
    }
    finish.first_chunk[table.count] = int(chunks);
    return finish;
}

template <typename T>
int forward(const mmfast_adversarial_args& args) {
    using C = Compute<T>;
    Buffers buffers;
    int64_t all_chunks = 0;
    for (int64_t k = 0; k < args.count; ++k) all_chunks += chunks_of(args.terms[k]);
    double* const scratch = static_cast<double*>(args.scratch);
    const Global<double> running_total = buffers.scratch<double>(scratch, 1);
    const Global<double> all_sums = buffers.scratch<double>(scratch + 1, all_chunks);
    const Global<double> all_slope_sums = buffers.scratch<double>(scratch + 1 + all_chunks, all_chunks);
    Global<C> values{}, slopes{};
    if (args.values) values = buffers.output<C>(args.values, args.count);
    if (args.slopes) slopes = buffers.output<C>(args.slopes, args.count);
    const Global<T> total = buffers.output<T>(args.total, 1);
    int64_t done = 0;
    int status = MMFAST_OK;
    for (int64_t begin = 0; begin < args.count && status == MMFAST_OK; begin += kMaxTerms) {
        Forward<T> kernel{};
        const int64_t chunks = fill(kernel.table, buffers, args, begin);
        kernel.sums = all_sums + done;
        kernel.slope_sums = all_slope_sums + done;
        kernel.has_slopes = args.slopes != nullptr;
        status = launch(kernel, chunks, 32 * int(sizeof(C)), args.stream);
        if (status != MMFAST_OK) break;
        Finish<T> finish = finish_of(kernel.table, args, begin, chunks);
        finish.sums = as_const(kernel.sums);
        finish.slope_sums = as_const(kernel.slope_sums);
        finish.has_values = args.values != nullptr;
        if (args.values) finish.values = values + begin;
        finish.has_slopes = args.slopes != nullptr;
        if (args.slopes) finish.slopes = slopes + begin;
        finish.total = total;
        finish.running_total = running_total;
        status = launch(finish, 1, kMaxTerms * int(sizeof(double)), args.stream);
        done += chunks;
    }
    return buffers.finish(status);
}

template <typename T>
int backward(const mmfast_adversarial_args& args) {
    Buffers buffers;
    const Global<const T> dtotal = buffers.input<T>(args.dtotal, 1);
    int status = MMFAST_OK;
    for (int64_t begin = 0; begin < args.count && status == MMFAST_OK; begin += kMaxTerms) {
        Backward<T> kernel{};
        kernel.dtotal = dtotal;
        const int64_t chunks = fill(kernel.table, buffers, args, begin);
        status = launch(kernel, chunks, 0, args.stream);
    }
    return buffers.finish(status);
}

int unknown_dtype() { return fail(MMFAST_INVALID_ARGUMENT, "the kernel was given a dtype that it does not take"); }

}  // namespace
}  // namespace device
}  // namespace mmfast

int mmfast_cuda_adversarial_forward(const mmfast_adversarial_args* args) {
    using namespace mmfast::device;
    switch (args->dtype) {
        case MMFAST_FLOAT32:
            return forward<float>(*args);
        case MMFAST_FLOAT64:
            return forward<double>(*args);
        case MMFAST_FLOAT16:
            return forward<Half>(*args);
        case MMFAST_BFLOAT16:
            return forward<Bf16>(*args);
        default:
            return unknown_dtype();
    }
}

int mmfast_cuda_adversarial_backward(const mmfast_adversarial_args* args) {
    using namespace mmfast::device;
    switch (args->dtype) {
        case MMFAST_FLOAT32:
            return backward<float>(*args);
        case MMFAST_FLOAT64:
            return backward<double>(*args);
        case MMFAST_FLOAT16:
            return backward<Half>(*args);
        case MMFAST_BFLOAT16:
            return backward<Bf16>(*args);
        default:
            return unknown_dtype();
    }
}
