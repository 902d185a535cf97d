// The adversarial loss: value_k = weight_k * reduce_i w_i * phi_k(u_i), u_i = sign_k * (x_i - other_i) + shift_k;
// total = sum_k value_k.
//
// Pointers, shapes and dtypes: mmfast_adversarial_args in mmfast.h. The terms are a table of columns, one a field, in
// which a field that is the same for all is held once. A table of at most kNarrow bytes, which is 60 to 120 terms,
// travels by value in the kernel's arguments, a longer one is copied to scratch. So a list of any length costs one
// launch backward and two forward: the second adds up the first one's sums. While a stream is captured, when nothing is
// to be copied from the host, up to kWide bytes go by value, 450 to 1,000 terms, to kernels of their own, and a longer
// list goes in groups. Where terms have the mean of others' logits as their centre, the first launch adds up those and
// the second all else, its last block to finish the sums. Each tensor is cut into chunks of MMFAST_ADVERSARIAL_CHUNK
// elements, one block a chunk. A chunk's elements are added by thread in float32 (float64 for float64 logits), threads
// by a tree, chunks by lane and then by a tree in float64, terms in order: the same bits each time, and no sync.
// Forward reads each element once, backward reads it once and writes its gradient: both are bound by memory. Backward:
// d = dtotal * weight_k [/ n_k] * sign_k * w_i * phi_k'(u), less the peer's part, rounded once.

#include "cuda/device.h"

namespace mmfast {
namespace device {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = MMFAST_ADVERSARIAL_CHUNK;
// bytes of a table among a kernel's arguments, which are at most 4 KB before CUDA 12.1 and then 32,764 bytes
constexpr int kNarrow = 3584;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kWide = kNarrow;
#else
constexpr int kWide = 32256;
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
    int first_chunk;
    Global<const T> x, other;
    Global<const Compute<T>> centre, weights, peer_slope;
    Global<T> dx, dother;  // backward only
    int64_t size, per_weight;
    // inverses: a 64-bit division is a call, around which registers would spill
    double per_weight_inverse;
    Compute<T> sign, shift, tilt;
    Compute<T> factor;  // backward only: weight * sign [/ size]
    double scale;       // forward only: weight [/ size]
    // forward only, of the term whose logits' mean is the centre, where that is not known yet
    double peer_inverse;                // of its size
    int peer_first_chunk, peer_chunks;  // of all terms' chunks
    uint8_t phi;
    bool has_other, has_centre, is_measured, has_weights, has_peer, wants_dx, wants_dother;

    static constexpr int kFields = 27;
    // f(field) for each field, in order
    template <typename F>
    MMFAST_HOST_DEVICE static void each_field(F& f) {
        f(&Term::first_chunk), f(&Term::x), f(&Term::other), f(&Term::centre), f(&Term::weights);
        f(&Term::peer_slope), f(&Term::dx), f(&Term::dother), f(&Term::size), f(&Term::per_weight);
        f(&Term::per_weight_inverse), f(&Term::sign), f(&Term::shift), f(&Term::tilt), f(&Term::factor);
        f(&Term::scale), f(&Term::peer_inverse), f(&Term::peer_first_chunk), f(&Term::peer_chunks), f(&Term::phi);
        f(&Term::has_other), f(&Term::has_centre), f(&Term::is_measured), f(&Term::has_weights);
        f(&Term::has_peer), f(&Term::wants_dx), f(&Term::wants_dother);
    }

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

// Where a field of all terms begins in a table's bytes, and how far it is from one term to the next.
struct Column {
    int at, stride;
    template <typename V>
    MMFAST_HOST_DEVICE V read(const unsigned char* bytes, int k) const {
        return *reinterpret_cast<const V*>(bytes + at + k * stride);
    }
};
template <typename T>
struct Columns {
    Column columns[Term<T>::kFields];
};

template <typename T>
struct Reader {
    const Columns<T>& columns;
    const unsigned char* bytes;
    int k;
    Term<T> term{};
    int i = 0;
    template <typename V>
    MMFAST_HOST_DEVICE void operator()(V Term<T>::* field) {
        term.*field = columns.columns[i++].template read<V>(bytes, k);
    }
};

// The bytes of an address on the device, and as many of a view in the emulator, where that is more.
constexpr int kAddress = 8, kView = int(sizeof(Global<char>));

template <typename T, int kBytes>
struct Table {
    Columns<T> columns;
    int count, step;              // step: half the least power of two that is at least count
    Global<const double> longer;  // instead of bytes, in device memory
    bool is_long;
    alignas(8) unsigned char bytes[kBytes * kView / kAddress];

    // f(bytes): a pointer that may be to either would have to read both through a cache
    template <typename F>
    MMFAST_DEVICE auto with_bytes(const F& f) const {
        if (kBytes == kNarrow && is_long) return f(reinterpret_cast<const unsigned char*>(longer.data()));
        return f(bytes);
    }
    MMFAST_DEVICE Term<T> at(int k) const {
        return with_bytes([&](const unsigned char* from) {
            Reader<T> reader{columns, from, k};
            Term<T>::each_field(reader);
            return reader.term;
        });
    }
    MMFAST_DEVICE int first_chunk(int k) const {
        return with_bytes([&](const unsigned char* from) { return columns.columns[0].template read<int>(from, k); });
    }

    // The term whose chunk this block has: the last that begins at or before it, so empty terms have none.
    MMFAST_DEVICE Term<T> find(int64_t block) const {
        int k = 0;
        MMFAST_NO_UNROLL
        for (int i = step; i > 0; i /= 2)
            if (i < count - k && first_chunk(k + i) <= block) k += i;
        return at(k);
    }
};

constexpr int kPerThread = kChunk / kThreads;

// One chunk of one tensor, this thread's elements of it: offset is the chunk's first element.
template <typename T>
struct Chunk {
    using C = Compute<T>;
    // sixteen elements at a time, whose code is repeated so often; float64 is rare and need not be fast
    static constexpr int kWidth = kVector<T>, kVectors = sizeof(T) == 8 ? 1 : 16 / kWidth;
    static constexpr int kElements = kWidth * kVectors, kBatches = kPerThread / kElements;

    const Term<T>& term;
    int64_t offset;
    int size;
    C centre;

    MMFAST_DEVICE Chunk(const Term<T>& term, int64_t block) : term(term) {
        offset = (block - term.first_chunk) * kChunk;
        const int64_t left = term.size - offset;
        size = left < kChunk ? int(left) : kChunk;
        centre = term.has_centre && !term.is_measured ? load(term.centre, 0) : C(0);
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

    MMFAST_DEVICE static int start(int batch, int j) {
        return ((batch * kVectors + j) * kThreads + thread_index()) * kWidth;
    }
    // Some of this thread's elements in a whole chunk, all loaded before any of them is used.
    MMFAST_DEVICE void load_batch(C* differences, int batch) const {
        Vector<T, kWidth> x[kVectors], other[kVectors];
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) x[j] = load_vector<kWidth>(term.x + offset, start(batch, j));
        if (term.has_other) {
            MMFAST_UNROLL
            for (int j = 0; j < kVectors; ++j) other[j] = load_vector<kWidth>(term.other + offset, start(batch, j));
        }
        MMFAST_UNROLL
        for (int j = 0; j < kVectors; ++j) MMFAST_UNROLL
        for (int i = 0; i < kWidth; ++i) differences[j * kWidth + i] = difference(x[j].at[i], other[j].at[i]);
    }
};

template <int k>
struct Phi {
    static constexpr int value = k;
};

// f(phi) with phi as a constant: inside of loops over loads, whose code is then not repeated for each
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

// This thread's part of the sum of w * phi over the chunk, or of w * phi'.
template <bool kSlope, typename T>
MMFAST_DEVICE Compute<T> thread_sum(const Chunk<T>& chunk) {
    using C = Compute<T>;
    const Term<T>& term = chunk.term;
    C sum = 0;
    const auto evaluate = [&](auto phi, C difference) {
        constexpr int k = decltype(phi)::value;
        return kSlope ? term.template slope<k>(difference) : term.template value<k>(difference);
    };
    if (chunk.is_whole()) {
        MMFAST_NO_UNROLL
        for (int batch = 0; batch < Chunk<T>::kBatches; ++batch) {
            C differences[Chunk<T>::kElements];
            chunk.load_batch(differences, batch);
            with_phi(term.phi, [&](auto phi) {
                MMFAST_UNROLL
                for (int i = 0; i < Chunk<T>::kElements; ++i) sum += evaluate(phi, differences[i]);
            });
        }
        return sum;
    }
    MMFAST_NO_UNROLL
    for (int i = thread_index(); i < chunk.size; i += kThreads) {
        const C difference = chunk.difference_at(i), weight = term.weight(chunk.offset + i);
        with_phi(term.phi, [&](auto phi) { sum += weight * evaluate(phi, difference); });
    }
    return sum;
}

// This thread's part of the sum of the logits.
template <typename T>
MMFAST_DEVICE Compute<T> logit_sum(const Chunk<T>& chunk) {
    Compute<T> sum = 0;
    if (chunk.is_whole()) {
        MMFAST_NO_UNROLL
        for (int batch = 0; batch < Chunk<T>::kBatches; ++batch) {
            Compute<T> x[Chunk<T>::kElements];
            chunk.load_batch(x, batch);
            MMFAST_UNROLL
            for (int i = 0; i < Chunk<T>::kElements; ++i) sum += x[i];
        }
        return sum;
    }
    MMFAST_NO_UNROLL
    for (int i = thread_index(); i < chunk.size; i += kThreads) sum += chunk.difference_at(i);
    return sum;
}

// The sum of these chunks' sums, by lane and then by a tree, in every lane.
MMFAST_DEVICE double sum_of(Global<double> sums, int first, int after) {
    double sum = 0;
    for (int i = first + lane_index(); i < after; i += 32) sum += load(sums, i);
    return warp_sum(sum);
}

// From the chunks' sums of a table's terms to the outputs, by one block.
template <typename T>
struct Totals {
    Global<double> sums, slope_sums, mean_sums;  // one a chunk
    Global<Compute<T>> values, slopes, means;    // of these terms
    Global<double> term_values;
    Global<T> total;
    Global<double> running_total;  // of the launches before, and of this one
    int chunks;
    bool first, has_values, has_slopes, has_means;

    // a warp a term, then thread 0 the terms in order
    template <int kBytes>
    MMFAST_DEVICE void add_up(const Table<T, kBytes>& table) const {
        for (int k = warp_index(); k < table.count; k += kThreads / 32) {
            const Term<T> term = table.at(k);
            const int begin = term.first_chunk, end = k + 1 < table.count ? table.first_chunk(k + 1) : chunks;
            const double value = term.scale * sum_of(sums, begin, end);
            const double slope = has_slopes ? term.scale * double(term.sign) * sum_of(slope_sums, begin, end) : 0;
            const double mean = has_means ? sum_of(mean_sums, begin, end) * (1.0 / double(term.size)) : 0;
            if (lane_index() != 0) continue;
            store(term_values, k, value);
            if (has_values) store(values, k, Compute<T>(value));
            if (has_slopes) store(slopes, k, Compute<T>(slope));
            if (has_means) store(means, k, Compute<T>(mean));
        }
        barrier();
        if (thread_index() != 0) return;
        double sum = first ? 0 : load(running_total, 0);
        for (int k = 0; k < table.count; ++k) sum += load(term_values, k);
        store(running_total, 0, sum);
        store(total, 0, from_float<T>(Compute<T>(sum)));
    }
};

// The sums of the logits themselves, whose means are to be centres; block 0 sets the counter of blocks to 0.
template <typename T, int kBytes>
struct Measure {
    static constexpr int kThreads = device::kThreads;
    Table<T, kBytes> table;
    Global<double> mean_sums;
    Global<uint32_t> counter;

    MMFAST_DEVICE void operator()() const {
        using C = Compute<T>;
        SharedCursor cursor;
        const SharedArray<C> warp_sums = shared_array<C>(cursor, 32);
        const Term<T> term = table.find(block_index());
        const Chunk<T> chunk(term, block_index());
        const C sum = block_sum<kThreads>(logit_sum(chunk), warp_sums);
        if (thread_index() != 0) return;
        store(mean_sums, block_index(), double(sum));
        if (block_index() == 0) store(counter, 0, 0u);
    }
};

template <typename T, int kBytes>
struct Forward {
    static constexpr int kThreads = device::kThreads;
    static constexpr int kBlocksAtOnce = 8;  // left to choose, the compiler takes fewer registers and spills
    Table<T, kBytes> table;
    Totals<T> totals;
    Global<double> all_mean_sums;
    Global<uint32_t> counter;
    bool finishes;  // the last block to come here adds up what all have stored

    MMFAST_DEVICE void operator()() const {
        using C = Compute<T>;
        SharedCursor cursor;
        const SharedArray<C> warp_sums = shared_array<C>(cursor, 32);
        const SharedArray<uint32_t> ticket = shared_array<uint32_t>(cursor, 1);
        const Term<T> term = table.find(block_index());
        Chunk<T> chunk(term, block_index());
        if (term.is_measured) {
            const int first = term.peer_first_chunk;
            chunk.centre = C(sum_of(all_mean_sums, first, first + term.peer_chunks) * term.peer_inverse);
        }
        const C sum = block_sum<kThreads>(thread_sum<false>(chunk), warp_sums);
        if (thread_index() == 0) store(totals.sums, block_index(), double(sum));
        if (totals.has_slopes) {
            // a second look at the chunk, which the cache still has
            barrier();
            const C slope = block_sum<kThreads>(thread_sum<true>(chunk), warp_sums);
            if (thread_index() == 0) store(totals.slope_sums, block_index(), double(slope));
        }
        if (!finishes) return;
        if (thread_index() == 0) {
            device_fence();
            ticket[0] = atomic_add(counter, 0, 1);
        }
        barrier();
        if (ticket[0] + 1 != uint32_t(totals.chunks)) return;
        device_fence();
        totals.add_up(table);
        // for the next group of terms
        if (thread_index() == 0) store(counter, 0, 0u);
    }
};

template <typename T, int kBytes>
struct Finish {
    static constexpr int kThreads = device::kThreads;
    Table<T, kBytes> table;
    Totals<T> totals;

    MMFAST_DEVICE void operator()() const { totals.add_up(table); }
};

// dx = w * slope * factor + offset, dother = -dx, where they are wanted
template <typename T>
MMFAST_DEVICE void thread_gradient(const Chunk<T>& chunk, Compute<T> factor, Compute<T> offset) {
    using C = Compute<T>;
    constexpr int kWidth = Chunk<T>::kWidth, kElements = Chunk<T>::kElements;
    const Term<T>& term = chunk.term;
    const bool aligned = (!term.wants_dx || is_aligned<kWidth>(term.dx + chunk.offset)) &&
                         (!term.wants_dother || is_aligned<kWidth>(term.dother + chunk.offset));
    if (chunk.is_whole() && aligned) {
        MMFAST_NO_UNROLL
        for (int batch = 0; batch < Chunk<T>::kBatches; ++batch) {
            C d[kElements];
            chunk.load_batch(d, batch);
            with_phi(term.phi, [&](auto phi) {
                MMFAST_UNROLL
                for (int i = 0; i < kElements; ++i)
                    d[i] = term.template slope<decltype(phi)::value>(d[i]) * factor + offset;
            });
            MMFAST_UNROLL
            for (int j = 0; j < Chunk<T>::kVectors; ++j) {
                Vector<T, kWidth> dx, dother;
                MMFAST_UNROLL
                for (int i = 0; i < kWidth; ++i) {
                    dx.at[i] = from_float<T>(d[j * kWidth + i]);
                    dother.at[i] = from_float<T>(-d[j * kWidth + i]);
                }
                if (term.wants_dx) store_vector(term.dx + chunk.offset, chunk.start(batch, j), dx);
                if (term.wants_dother) store_vector(term.dother + chunk.offset, chunk.start(batch, j), dother);
            }
        }
        return;
    }
    MMFAST_NO_UNROLL
    for (int i = thread_index(); i < chunk.size; i += kThreads) {
        const C difference = chunk.difference_at(i), weight = term.weight(chunk.offset + i);
        C d = 0;
        with_phi(term.phi, [&](auto phi) {
            d = weight * term.template slope<decltype(phi)::value>(difference) * factor + offset;
        });
        if (term.wants_dx) store(term.dx, chunk.offset + i, from_float<T>(d));
        if (term.wants_dother) store(term.dother, chunk.offset + i, from_float<T>(-d));
    }
}

template <typename T, int kBytes>
struct Backward {
    static constexpr int kThreads = device::kThreads;
    Table<T, kBytes> table;
    Global<const T> dtotal;

    MMFAST_DEVICE void operator()() const {
        using C = Compute<T>;
        const Term<T> term = table.find(block_index());
        if (!term.wants_dx && !term.wants_dother) return;
        const Chunk<T> chunk(term, block_index());
        const C scale = to_float(load(dtotal, 0));
        const C offset = term.has_peer ? -scale * load(term.peer_slope, 0) / C(term.size) : C(0);
        thread_gradient(chunk, C(scale * term.factor), offset);
    }
};

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

double scale_of(const mmfast_adversarial_args& args, const mmfast_adversarial_term& term) {
    return args.mean ? term.weight / double(term.size) : term.weight;
}

// The term whose mean is this one's centre, -1 where the centre is given or there is none.
template <typename C>
int64_t peer_of(const mmfast_adversarial_args& args, const mmfast_adversarial_term& term) {
    if (!args.means || !term.centre) return -1;
    const int64_t peer = static_cast<const C*>(term.centre) - static_cast<const C*>(args.means);
    return peer >= 0 && peer < args.count ? peer : -1;
}

template <typename T>
Term<T> term_of(const mmfast_adversarial_args& args, const mmfast_adversarial_term& from, bool is_forward,
                Buffers& buffers) {
    using C = Compute<T>;
    Term<T> term{};
    term.x = buffers.input<T>(from.logits, from.size);
    term.has_other = from.other != nullptr;
    if (from.other) term.other = buffers.input<T>(from.other, from.size);
    term.has_centre = from.centre != nullptr;
    const int64_t peer = peer_of<C>(args, from);
    term.is_measured = peer >= 0;
    if (term.is_measured) {
        for (int64_t k = 0; k < peer; ++k) term.peer_first_chunk += int(chunks_of(args.terms[k].size));
        term.peer_chunks = int(chunks_of(args.terms[peer].size));
        term.peer_inverse = 1.0 / double(args.terms[peer].size);
    } else if (from.centre) {
        term.centre = buffers.input<C>(from.centre, 1);
    }
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
    const double scale = scale_of(args, from);
    if (is_forward)
        term.scale = scale;
    else
        term.factor = C(scale * from.sign);
    term.phi = uint8_t(from.phi);
    return term;
}

template <typename V>
constexpr int kWidthOf = int(sizeof(V));
template <typename V>
constexpr int kWidthOf<Global<V>> = kAddress;

// Writes terms into columns.
template <typename T>
struct Packer {
    const Term<T>* terms;
    int count;
    unsigned char* bytes;
    Columns<T>& columns;
    int i = 0, used = 0, size = 0;  // size: of the table on the device

    template <typename V>
    MMFAST_HOST_DEVICE static bool same(const V& a, const V& b) {
        const auto p = reinterpret_cast<const unsigned char*>(&a), q = reinterpret_cast<const unsigned char*>(&b);
        for (size_t j = 0; j < sizeof(V); ++j)
            if (p[j] != q[j]) return false;
        return true;
    }
    template <typename V>
    MMFAST_HOST_DEVICE void operator()(V Term<T>::* field) {
        int n = 1;
        for (int k = 1; k < count && n == 1; ++k)
            if (!same(terms[k].*field, terms[0].*field)) n = count;
        columns.columns[i++] = {used, n == 1 ? 0 : int(sizeof(V))};
        for (int k = 0; k < n; ++k) reinterpret_cast<V*>(bytes + used)[k] = terms[k].*field;
        // the next column is aligned whatever its type
        used += (n * int(sizeof(V)) + 7) / 8 * 8;
        size += (n * kWidthOf<V> + 7) / 8 * 8;
    }
};

// Some of a call's terms, as a kernel is given them.
template <typename T>
struct Group {
    int64_t begin, chunks = 0;
    int count, size;
    Columns<T> columns;
    std::vector<double> bytes;

    Group(const std::vector<Term<T>>& all, int64_t begin, int64_t count) : begin(begin), count(int(count)) {
        std::vector<Term<T>> terms(all.begin() + begin, all.begin() + begin + count);
        for (Term<T>& term : terms) {
            term.first_chunk = int(chunks);
            chunks += chunks_of(term.size);
        }
        bytes.resize(size_t(count) * MMFAST_ADVERSARIAL_TERM);
        Packer<T> packer{terms.data(), this->count, reinterpret_cast<unsigned char*>(bytes.data()), columns};
        Term<T>::each_field(packer);
        bytes.resize(size_t(packer.used) / sizeof(double));
        size = packer.size;
    }

    template <int kBytes>
    Table<T, kBytes> table(Global<const double> longer, bool is_long) const {
        Table<T, kBytes> table{};
        table.columns = columns;
        table.count = count;
        for (table.step = 1; table.step < count; table.step *= 2) continue;
        table.step /= 2;
        table.longer = longer;
        table.is_long = is_long;
        const auto from = reinterpret_cast<const unsigned char*>(bytes.data());
        for (size_t i = 0; !is_long && i < bytes.size() * sizeof(double); ++i) table.bytes[i] = from[i];
        return table;
    }
};

// The scratch's parts: terms' values and table, and sums, one a chunk.
template <typename T>
struct Scratch {
    Global<double> running_total, term_values, sums, slope_sums, mean_sums;
    Global<uint32_t> counter;
    Global<double> table;
    static_assert(sizeof(Term<T>) + 8 * Term<T>::kFields <= MMFAST_ADVERSARIAL_TERM * sizeof(double),
                  "a term fits into its part of scratch, each field aligned");

    Scratch(const mmfast_adversarial_args& args, int64_t table_size, bool is_forward, Buffers& buffers) {
        double* next = static_cast<double*>(args.scratch);
        const auto take = [&](int64_t n) {
            double* const from = next;
            next += n;
            return from;
        };
        if (table_size) table = buffers.scratch<double>(take(table_size), table_size);
        if (!is_forward) return;
        int64_t chunks = 0;
        for (int64_t k = 0; k < args.count; ++k) chunks += chunks_of(args.terms[k].size);
        running_total = buffers.scratch<double>(take(1), 1);
        counter = buffers.scratch<uint32_t>(take(1), 1);
        term_values = buffers.scratch<double>(take(args.count), args.count);
        sums = buffers.scratch<double>(take(chunks), chunks);
        slope_sums = buffers.scratch<double>(take(chunks), chunks);
        mean_sums = buffers.scratch<double>(take(chunks), chunks);
    }
};

template <typename T>
struct Outputs {
    Global<Compute<T>> values{}, slopes{}, means{};
    Global<T> total;

    Outputs(const mmfast_adversarial_args& args, Buffers& buffers) {
        using C = Compute<T>;
        if (args.values) values = buffers.output<C>(args.values, args.count);
        if (args.slopes) slopes = buffers.output<C>(args.slopes, args.count);
        if (args.means) means = buffers.output<C>(args.means, args.count);
        total = buffers.output<T>(args.total, 1);
    }
};

template <typename T>
Totals<T> totals_of(const mmfast_adversarial_args& args, const Group<T>& group, const Scratch<T>& scratch,
                    const Outputs<T>& outputs, int64_t done) {
    Totals<T> totals{};
    totals.sums = scratch.sums + done;
    totals.slope_sums = scratch.slope_sums + done;
    totals.mean_sums = scratch.mean_sums + done;
    totals.term_values = scratch.term_values + group.begin;
    totals.total = outputs.total;
    totals.running_total = scratch.running_total;
    totals.chunks = int(group.chunks);
    totals.first = group.begin == 0;
    totals.has_values = args.values != nullptr;
    if (args.values) totals.values = outputs.values + group.begin;
    totals.has_slopes = args.slopes != nullptr;
    if (args.slopes) totals.slopes = outputs.slopes + group.begin;
    totals.has_means = args.means != nullptr;
    if (args.means) totals.means = outputs.means + group.begin;
    return totals;
}

template <typename T>
std::vector<Term<T>> terms_of(const mmfast_adversarial_args& args, bool is_forward, Buffers& buffers) {
    std::vector<Term<T>> terms;
    for (int64_t k = 0; k < args.count; ++k) terms.push_back(term_of<T>(args, args.terms[k], is_forward, buffers));
    return terms;
}

// All groups of a call, and the table of the one that is too long for a kernel's arguments.
template <typename T>
struct Groups {
    std::vector<Group<T>> groups;
    bool is_long, is_wide;  // the table is in scratch; it goes by value to the kernels of longer ones
    Scratch<T> scratch;
    int status = MMFAST_OK;

    Groups(const mmfast_adversarial_args& args, bool is_forward, Buffers& buffers)
        : groups(cut(terms_of<T>(args, is_forward, buffers), is_capturing(args.stream))),
          is_long(!is_narrow() && !is_capturing(args.stream)),
          is_wide(!is_narrow() && !is_long),
          scratch(args, is_long ? int64_t(groups[0].bytes.size()) : 0, is_forward, buffers) {
        if (is_long)
            status = upload(scratch.table, groups[0].bytes.data(), int64_t(groups[0].bytes.size()), args.stream);
    }
    template <int kBytes>
    Table<T, kBytes> table(const Group<T>& group) const {
        return group.template table<kBytes>(is_long ? as_const(scratch.table) : Global<const double>{}, is_long);
    }

  private:
    bool is_narrow() const { return groups.empty() || (groups.size() == 1 && groups[0].size <= kNarrow); }
    // All terms; or in as few groups of equal length as go by value.
    static std::vector<Group<T>> cut(const std::vector<Term<T>>& terms, bool by_value) {
        const int64_t all = int64_t(terms.size());
        std::vector<Group<T>> groups;
        for (int64_t parts = 1, fitting = -1; fitting < int64_t(groups.size()); ++parts) {
            const int64_t step = (all + parts - 1) / parts;
            groups.clear(), fitting = 0;
            for (int64_t begin = 0; begin < all; begin += step) {
                groups.emplace_back(terms, begin, step < all - begin ? step : all - begin);
                fitting += !by_value || groups.back().size <= kWide;
            }
        }
        return groups;
    }
};

template <int kBytes, typename T>
int forward(const mmfast_adversarial_args& args, const Groups<T>& all, const Outputs<T>& outputs) {
    const int shared_bytes = 32 * int(sizeof(Compute<T>)) + 16;
    const auto launch_each = [&](const auto& launch_group) {
        int64_t done = 0;
        int status = MMFAST_OK;
        for (const Group<T>& group : all.groups) {
            if (status == MMFAST_OK) status = launch_group(group, done);
            done += group.chunks;
        }
        return status;
    };
    const auto measure = [&](const Group<T>& group, int64_t done) {
        Measure<T, kBytes> kernel{};
        kernel.table = all.template table<kBytes>(group);
        kernel.mean_sums = all.scratch.mean_sums + done;
        kernel.counter = all.scratch.counter;
        return launch(kernel, group.chunks, shared_bytes, args.stream);
    };
    const auto evaluate = [&](const Group<T>& group, int64_t done) {
        Forward<T, kBytes> kernel{};
        kernel.table = all.template table<kBytes>(group);
        kernel.totals = totals_of(args, group, all.scratch, outputs, done);
        kernel.all_mean_sums = all.scratch.mean_sums;
        kernel.counter = all.scratch.counter;
        // the launch before has set the counter; without chunks there is no block to come last
        kernel.finishes = args.means && group.chunks > 0;
        const int status = launch(kernel, group.chunks, shared_bytes, args.stream);
        if (status != MMFAST_OK || kernel.finishes) return status;
        const Finish<T, kBytes> finish{kernel.table, kernel.totals};
        return launch(finish, 1, 0, args.stream);
    };
    const int status = args.means ? launch_each(measure) : int(MMFAST_OK);
    return status == MMFAST_OK ? launch_each(evaluate) : status;
}

template <typename T>
int forward(const mmfast_adversarial_args& args) {
    Buffers buffers;
    const Groups<T> all(args, true, buffers);
    const Outputs<T> outputs(args, buffers);
    if (all.status != MMFAST_OK) return buffers.finish(all.status);
    return buffers.finish(all.is_wide ? forward<kWide>(args, all, outputs) : forward<kNarrow>(args, all, outputs));
}

template <int kBytes, typename T>
int backward(const mmfast_adversarial_args& args, const Groups<T>& all, Global<const T> dtotal) {
    int status = MMFAST_OK;
    for (const Group<T>& group : all.groups) {
        const Backward<T, kBytes> kernel{all.template table<kBytes>(group), dtotal};
        if (status == MMFAST_OK) status = launch(kernel, group.chunks, 0, args.stream);
    }
    return status;
}

template <typename T>
int backward(const mmfast_adversarial_args& args) {
    Buffers buffers;
    const Groups<T> all(args, false, buffers);
    const Global<const T> dtotal = buffers.input<T>(args.dtotal, 1);
    if (all.status != MMFAST_OK) return buffers.finish(all.status);
    return buffers.finish(all.is_wide ? backward<kWide>(args, all, dtotal) : backward<kNarrow>(args, all, dtotal));
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
