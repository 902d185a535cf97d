// The adversarial loss: value_k = weight_k * reduce_i phi_k(u_i), u_i = sign_k * x_i + shift_k; total = sum_k value_k.
//
// Pointers, shapes and dtypes: mmfast_adversarial_args in mmfast.h. The list travels by value in the kernel's arguments,
// kMaxTerms terms a launch, so a list costs one launch a pass (and one small launch that adds up the forward's sums).
// Each tensor is cut into chunks of MMFAST_ADVERSARIAL_CHUNK elements, one block a chunk. A chunk's elements are added
// by thread in float32 (float64 for float64 logits), threads by a tree, chunks by lane and then by a tree in float64,
// terms in order: the same bits each time, and no sync.
// Forward reads each logit once, backward reads it once and writes its gradient: both are bound by memory.
// Backward: d = dtotal * weight_k [/ n_k] * sign_k * phi_k'(u), rounded once.
#include "cuda/device.h"

namespace mmfast {
namespace device {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = MMFAST_ADVERSARIAL_CHUNK;
constexpr int kMaxTerms = 64;

// log(1 + exp(u)) = max(u, 0) + log1p(exp(-|u|)): nothing cancels and nothing overflows
template <int kPhi, typename C>
MMFAST_DEVICE C phi_of(C u) {
    if constexpr (kPhi == MMFAST_SOFTPLUS) return (u < 0 ? C(0) : u) + log1p_of(exp_of(-abs_of(u)));
    if constexpr (kPhi == MMFAST_SQUARE) return u * u;
    if constexpr (kPhi == MMFAST_RELU) return u < 0 ? C(0) : u;
    return u;
}

// torch's subgradient: 0 where relu's argument is 0
template <int kPhi, typename C>
MMFAST_DEVICE C slope_of(C u) {
    if constexpr (kPhi == MMFAST_SOFTPLUS) {
        const C e = exp_of(-abs_of(u));
        return divide(u < 0 ? e : C(1), C(1) + e);
    }
    if constexpr (kPhi == MMFAST_SQUARE) return u + u;
    if constexpr (kPhi == MMFAST_RELU) return u <= 0 ? C(0) : C(1);
    return C(1);
}

template <typename T>
struct Term {
    Global<const T> x;
    Global<T> dx;        // backward only
    int64_t size;
    Compute<T> sign, shift;
    Compute<T> factor;   // backward only: weight * sign [/ size]
    int phi;
    int first_chunk;
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

// One chunk of one tensor: where it starts and how many elements it has.
template <typename T>
struct Chunk {
    int64_t offset;
    int size;
    MMFAST_DEVICE Chunk(const Term<T>& term, int64_t block) {
        offset = (block - term.first_chunk) * kChunk;
        const int64_t left = term.size - offset;
        size = left < kChunk ? int(left) : kChunk;
    }
};

constexpr int kPerThread = kChunk / kThreads;

// This thread's part of the chunk's sum. A full, aligned chunk is loaded whole before any of it is used.
template <int kPhi, typename T>
MMFAST_DEVICE Compute<T> thread_sum(const Term<T>& term, int64_t block) {
    using C = Compute<T>;
    constexpr int kWidth = kVector<T>, kVectors = kPerThread / kWidth;
    const Chunk<T> chunk(term, block);
    const Global<const T> x = term.x + chunk.offset;
    C sum = 0;
    if (chunk.size == kChunk && is_aligned<kWidth>(x)) {
        Vector<T, kWidth> v[kVectors];
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) v[j] = load_vector<kWidth>(x, (j * kThreads + thread_index()) * kWidth);
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j)
            MMFAST_UNROLL
            for (int i = 0; i < kWidth; ++i) sum += phi_of<kPhi>(to_float(v[j].at[i]) * term.sign + term.shift);
        return sum;
    }
    for (int i = thread_index(); i < chunk.size; i += kThreads)
        sum += phi_of<kPhi>(to_float(load(x, i)) * term.sign + term.shift);
    return sum;
}

template <typename T>
struct Forward {
    static constexpr int kThreads = device::kThreads;
    Table<T> table;
    Global<double> sums;  // one a chunk

    MMFAST_DEVICE void operator()() const {
        using C = Compute<T>;
        SharedCursor cursor;
        const SharedArray<C> warp_sums = shared_array<C>(cursor, 32);
        const Term<T>& term = table.find(block_index());
        const C sum = block_sum<kThreads>(part(term), warp_sums);
        if (thread_index() == 0) store(sums, block_index(), double(sum));
    }

    MMFAST_DEVICE static Compute<T> part(const Term<T>& term) {
        switch (term.phi) {
            case MMFAST_SOFTPLUS:
                return thread_sum<MMFAST_SOFTPLUS>(term, block_index());
            case MMFAST_SQUARE:
                return thread_sum<MMFAST_SQUARE>(term, block_index());
            case MMFAST_RELU:
                return thread_sum<MMFAST_RELU>(term, block_index());
            default:
                return thread_sum<MMFAST_IDENTITY>(term, block_index());
        }
    }
};

// One block adds up the chunks' sums: a warp a term, then thread 0 the terms in order.
template <typename T>
struct Finish {
    static constexpr int kThreads = device::kThreads;
    Global<const double> sums;
    Global<Compute<T>> values;     // of these terms
    Global<T> total;
    Global<double> running_total;  // of the launches before, and of this one
    int32_t first_chunk[kMaxTerms + 1];
    double scale[kMaxTerms];       // weight [/ size]
    int count;
    bool first;

    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<double> shared_values = shared_array<double>(cursor, kMaxTerms);
        for (int k = warp_index(); k < count; k += kThreads / 32) {
            double sum = 0;
            for (int i = first_chunk[k] + lane_index(); i < first_chunk[k + 1]; i += 32) sum += load(sums, i);
            sum = scale[k] * warp_sum(sum);
            if (lane_index() != 0) continue;
            shared_values[k] = sum;
            store(values, k, Compute<T>(sum));
        }
        barrier();
        if (thread_index() != 0) return;
        double sum = first ? 0 : load(running_total, 0);
        for (int k = 0; k < count; ++k) sum += shared_values[k];
        store(running_total, 0, sum);
        store(total, 0, from_float<T>(Compute<T>(sum)));
    }
};

template <int kPhi, typename T>
MMFAST_DEVICE void thread_gradient(const Term<T>& term, int64_t block, Compute<T> factor) {
    using C = Compute<T>;
    constexpr int kWidth = kVector<T>, kVectors = kPerThread / kWidth;
    const Chunk<T> chunk(term, block);
    const Global<const T> x = term.x + chunk.offset;
    const Global<T> dx = term.dx + chunk.offset;
    if (chunk.size == kChunk && is_aligned<kWidth>(x) && is_aligned<kWidth>(dx)) {
        Vector<T, kWidth> v[kVectors];
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) v[j] = load_vector<kWidth>(x, (j * kThreads + thread_index()) * kWidth);
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) {
            MMFAST_UNROLL
            for (int i = 0; i < kWidth; ++i) {
                const C u = to_float(v[j].at[i]) * term.sign + term.shift;
                v[j].at[i] = from_float<T>(slope_of<kPhi>(u) * factor);
            }
            store_vector(dx, (j * kThreads + thread_index()) * kWidth, v[j]);
        }
        return;
    }
    for (int i = thread_index(); i < chunk.size; i += kThreads) {
        const C u = to_float(load(x, i)) * term.sign + term.shift;
        store(dx, i, from_float<T>(slope_of<kPhi>(u) * factor));
    }
}

template <typename T>
struct Backward {
    static constexpr int kThreads = device::kThreads;
    Table<T> table;
    Global<const T> dtotal;

    MMFAST_DEVICE void operator()() const {
        const Term<T>& term = table.find(block_index());
        const Compute<T> factor = to_float(load(dtotal, 0)) * term.factor;
        switch (term.phi) {
            case MMFAST_SOFTPLUS:
                return thread_gradient<MMFAST_SOFTPLUS>(term, block_index(), factor);
            case MMFAST_SQUARE:
                return thread_gradient<MMFAST_SQUARE>(term, block_index(), factor);
            case MMFAST_RELU:
                return thread_gradient<MMFAST_RELU>(term, block_index(), factor);
            default:
                return thread_gradient<MMFAST_IDENTITY>(term, block_index(), factor);
        }
    }
};

int64_t chunks_of(const mmfast_adversarial_term& term) { return (term.size + kChunk - 1) / kChunk; }

double scale_of(const mmfast_adversarial_args& args, const mmfast_adversarial_term& term) {
    return args.mean ? term.weight / double(term.size) : term.weight;
}

// Fills the table with the terms from `begin` on, at most kMaxTerms; returns the number of their chunks.
template <typename T>
int64_t fill(Table<T>& table, Buffers& buffers, const mmfast_adversarial_args& args, int64_t begin, bool backward) {
    int64_t chunks = 0;
    table.count = 0;
    for (int64_t k = begin; k < args.count && k < begin + kMaxTerms; ++k) {
        const mmfast_adversarial_term& from = args.terms[k];
        Term<T>& term = table.terms[table.count++];
        term.x = buffers.input<T>(from.logits, from.size);
        if (backward) term.dx = buffers.output<T>(from.dlogits, from.size);
        term.size = from.size;
        term.sign = Compute<T>(from.sign);
        term.shift = Compute<T>(from.shift);
        term.factor = Compute<T>(scale_of(args, from) * from.sign);
        term.phi = from.phi;
        term.first_chunk = int(chunks);
        chunks += chunks_of(from);
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
        finish.first_chunk[k] = table.terms[k].first_chunk;
        finish.scale[k] = scale_of(args, args.terms[begin + k]);
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
    const Global<double> running_total = buffers.scratch<double>(args.scratch, 1);
    const Global<double> all_sums = buffers.scratch<double>(static_cast<double*>(args.scratch) + 1, all_chunks);
    const Global<C> values = buffers.output<C>(args.values, args.count);
    const Global<T> total = buffers.output<T>(args.total, 1);
    int64_t done = 0;
    int status = MMFAST_OK;
    for (int64_t begin = 0; begin < args.count && status == MMFAST_OK; begin += kMaxTerms) {
        Forward<T> kernel{};
        const int64_t chunks = fill(kernel.table, buffers, args, begin, false);
        kernel.sums = all_sums + done;
        status = launch(kernel, chunks, 32 * int(sizeof(C)), args.stream);
        if (status != MMFAST_OK) break;
        Finish<T> finish = finish_of(kernel.table, args, begin, chunks);
        finish.sums = as_const(all_sums + done);
        finish.values = values + begin;
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
        const int64_t chunks = fill(kernel.table, buffers, args, begin, true);
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
