// Each kernel is a template on its bug: kBug == kNone is right, any other must be reported, or give a wrong result
// where a bug breaks no rule of the machine. Written as kernels are: with nothing but cuda/device.h.
#include "emulator/selftest.h"

#include <math.h>

#include <vector>

#include "cuda/device.h"

namespace mmfast {
namespace device {
namespace {

enum Bug {
    kNone,
    kMissingBarrier,
    kMissingSecondBarrier,
    kOffByOne,
    kOffByOneInside,
    kWrongLane,
    kLaneOutsideMask,
    kRace,
    kDivergentBarrier,
    kEarlyExit,
    kDivergentCollective,
    kMissingLane,
    kOverlappingMasks,
    kMisalignedVector,
    kUnwrittenShared,
    kUnwrittenOutput,
    kTwoWriters,
    kPastTheEnd,
    kBeforeTheBegin,
    kTooMuchShared,
    kPlainWithAtomic,
    kSharedOffByOne,
    kSwappedFragment,
    kSwappedOperand,
    kWrongMatrixRow,
    kMissingWait,
    kWaitForTooFew,
    kReusedTooEarly,
    kWrongRank,
    kRankOutside,
    kMissingExpect,
    kMissingClusterBarrier,
    kMissingLastClusterBarrier,
    kWrongParity,
};

constexpr int kN = 128;  // threads, and elements of x and y

struct Data {
    std::vector<float> x = std::vector<float>(kN * 2), y = std::vector<float>(kN * 2, NAN);
    Data() {
        for (int i = 0; i < kN * 2; ++i) x[size_t(i)] = sinf(float(i) + 0.5f);
    }
    template <typename Expected>
    int check(int n, const Expected& expected) const {
        for (int i = 0; i < n; ++i)
            if (y[size_t(i)] != expected(i))
                return emulator::fail_with("wrong result: y[%d] is %g, not %g", i, double(y[size_t(i)]),
                                           double(expected(i)));
        return MMFAST_OK;
    }
};

template <typename Kernel>
struct Call {
    Data data;
    Buffers buffers;
    Kernel kernel{};
    Call(int inputs, int outputs) {
        kernel.x = buffers.input<float>(data.x.data(), inputs);
        kernel.y = buffers.output<float>(data.y.data(), outputs);
    }
    int launch(int blocks, int shared_bytes) {
        return buffers.finish(device::launch(kernel, blocks, shared_bytes, nullptr));
    }
};

// ---- y = x reversed within the block, through shared memory, and reversed and reversed again through the same array
template <int kBug>
struct Reverse {
    static constexpr int kThreads = kN;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        const int i = thread_index();
        if (kBug == kEarlyExit && i == 100) return;
        SharedCursor cursor;
        const SharedArray<float> block = shared_array<float>(cursor, kBug == kTooMuchShared ? kN + 1 : kN);
        const int64_t begin = block_index() * kN;
        const float value = load(x, begin + (kBug == kOffByOne ? i + 1 : i));
        if (kBug != kUnwrittenShared || i != 7) block[kBug == kSharedOffByOne ? i + 1 : i] = value;
        if (kBug == kRace) block[i / 2] = value;
        if (kBug == kDivergentBarrier && i >= 64)
            barrier();
        else if (kBug != kMissingBarrier)
            barrier();
        const int from = kBug == kOffByOneInside ? (kN - i) % kN : kN - 1 - i;
        float reversed = block[from];
        for (int again = 0; again < 2; ++again) {
            if (kBug != kMissingSecondBarrier) barrier();
            block[i] = reversed;
            barrier();
            reversed = block[kN - 1 - i];
        }
        if (kBug == kUnwrittenOutput && i == 3) return;
        store(y, begin + (kBug == kTwoWriters && i == 9 ? 8 : i), reversed);
        if (kBug == kPastTheEnd && i == 0) y.data()[2 * kN] = reversed;
        if (kBug == kBeforeTheBegin && i == 0) y.data()[-1] = reversed;
    }
};

template <int kBug>
int reverse() {
    Call<Reverse<kBug>> call(2 * kN, 2 * kN);
    const int status = call.launch(2, kN * int(sizeof(float)));
    if (status != MMFAST_OK) return status;
    return call.data.check(2 * kN, [&](int i) { return call.data.x[size_t(i / kN * kN + kN - 1 - i % kN)]; });
}

// ---- y = x rotated by two, one after the other in place
template <int kBug>
struct Rotate {
    static constexpr int kThreads = kN;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<float> block = shared_array<float>(cursor, kN);
        const int i = thread_index();
        block[i] = load(x, i);
        barrier();
        const float next = block[(i + 1) % kN];
        if (kBug != kMissingBarrier) barrier();
        block[i] = next;
        barrier();
        store(y, i, float(block[(i + 1) % kN]));
    }
};

template <int kBug>
int rotate() {
    Call<Rotate<kBug>> call(kN, kN);
    const int status = call.launch(1, kN * int(sizeof(float)));
    return status != MMFAST_OK ? status : call.data.check(kN, [&](int i) { return call.data.x[size_t((i + 2) % kN)]; });
}

// ---- y[block] = the sum of x by the device's tree: shuffles in a warp, shared memory between warps
template <int kBug>
struct Sum {
    static constexpr int kThreads = kN;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<float> sums = shared_array<float>(cursor, 32);
        float sum = load(x, thread_index());
        for (int bits = 16; bits > 0; bits /= 2) {
            if (kBug == kWrongLane && bits == 4) {
                sum += shuffle_xor(sum, 5);
            } else if (kBug == kLaneOutsideMask && bits == 16) {
                const uint32_t half = lane_index() < 16 ? 0x0000ffffu : 0xffff0000u;
                sum += shuffle_xor(sum, bits, half);
            } else if (kBug == kOverlappingMasks && bits == 8 && lane_index() < 16) {
                sum += shuffle_xor(sum, bits, 0x0000ffffu);
            } else if (kBug == kDivergentCollective && bits == 2 && lane_index() % 2 == 0) {
                sum += shuffle_xor(sum, bits);
            } else if (kBug == kMissingLane && bits == 1 && lane_index() == 31) {
                return;
            } else {
                sum += shuffle_xor(sum, bits);
            }
        }
        if (lane_index() == 0) sums[warp_index()] = sum;
        barrier();
        if (thread_index() == 0) {
            float total = 0;
            for (int w = 0; w < kN / 32; ++w) total += sums[w];
            store(y, 0, total);
        }
    }
};

float tree_sum(const float* x) {
    float total = 0;
    for (int w = 0; w < kN / 32; ++w) {
        float lanes[32], next[32];
        for (int i = 0; i < 32; ++i) lanes[i] = x[w * 32 + i];
        for (int bits = 16; bits > 0; bits /= 2) {
            for (int i = 0; i < 32; ++i) next[i] = lanes[i] + lanes[i ^ bits];
            memcpy(lanes, next, sizeof lanes);
        }
        total += lanes[0];
    }
    return total;
}

template <int kBug>
int sum() {
    Call<Sum<kBug>> call(kN, 1);
    const int status = call.launch(1, 32 * int(sizeof(float)));
    return status != MMFAST_OK ? status : call.data.check(1, [&](int) { return tree_sum(call.data.x.data()); });
}

// ---- y = 2 x, four elements an access
template <int kBug>
struct Twice {
    static constexpr int kThreads = 32;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        const int i = 4 * thread_index();
        Vector<float, 4> v = load_vector<4>(x, kBug == kMisalignedVector ? i + 1 : i);
        for (float& value : v.at) value *= 2;
        store_vector(y, i, v);
    }
};

template <int kBug>
int twice() {
    Call<Twice<kBug>> call(2 * kN, kN);
    const int status = call.launch(1, 0);
    return status != MMFAST_OK ? status : call.data.check(kN, [&](int i) { return 2 * call.data.x[size_t(i)]; });
}

// ---- y[lane] = the sum of x over a warp's lanes up to it, one shared row a warp, ordered by warp barriers alone
template <int kBug>
struct Scan {
    static constexpr int kThreads = kN;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<float> all = shared_array<float>(cursor, kN);
        const int i = thread_index();
        all[i] = load(x, i);
        for (int step = 1; step < 32; step *= 2) {
            warp_barrier();
            const float before = lane_index() >= step ? float(all[i - step]) : 0;
            if (kBug != kMissingBarrier) warp_barrier();
            all[i] += before;
        }
        store(y, i, float(all[i]));
    }
};

template <int kBug>
int scan() {
    Call<Scan<kBug>> call(kN, kN);
    const int status = call.launch(1, kN * int(sizeof(float)));
    if (status != MMFAST_OK) return status;
    std::vector<float> expected(call.data.x.begin(), call.data.x.begin() + kN);
    for (int step = 1; step < 32; step *= 2)
        for (int i = kN - 1; i >= 0; --i)
            if (i % 32 >= step) expected[size_t(i)] += expected[size_t(i - step)];
    return call.data.check(kN, [&](int i) { return expected[size_t(i)]; });
}

// ---- y[0] = how many x are positive, y[1] = the last of their indices, by ballot and by integer atomics
template <int kBug>
struct Count {
    static constexpr int kThreads = kN;
    Global<const float> x;
    Global<float> y;
    Global<uint32_t> last;
    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<uint32_t> count = shared_array<uint32_t>(cursor, 1);
        if (thread_index() == 0) count[0] = 0;
        if (thread_index() == 0) store(last, 0, uint32_t(0));
        barrier();
        const bool positive = load(x, thread_index()) > 0;
        uint32_t votes = ballot(positive);
        int bits = 0;
        for (; votes; votes &= votes - 1) ++bits;
        if (kBug == kPlainWithAtomic && thread_index() == 64)
            count[0] = count[0] + uint32_t(bits);
        else if (lane_index() == 0)
            atomic_add(count, 0, uint32_t(bits));
        if (positive) atomic_max(last, 0, uint32_t(thread_index()));
        barrier();
        if (thread_index() == 0) store(y, 0, float(uint32_t(count[0])));
        if (thread_index() == 1) store(y, 1, float(load(last, 0)));
    }
};

template <int kBug>
int count() {
    Call<Count<kBug>> call(kN, 2);
    uint32_t scratch;
    call.kernel.last = call.buffers.template scratch<uint32_t>(&scratch, 1);
    const int status = call.launch(1, int(sizeof(uint32_t)));
    if (status != MMFAST_OK) return status;
    int positive = 0, last = 0;
    for (int i = 0; i < kN; ++i)
        if (call.data.x[size_t(i)] > 0) ++positive, last = i;
    return call.data.check(2, [&](int i) { return float(i == 0 ? positive : last); });
}

// ---- y = A B, 16 x 8, A and B from x by way of shared memory, both with k contiguous; A as T, K of them
template <typename T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;

template <typename T, int kBug>
struct Multiply {
    static constexpr int kThreads = 32;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        constexpr int K = kDepth<T>;
        SharedCursor cursor;
        const SharedArray<T> a = shared_array<T>(cursor, 16 * K), b = shared_array<T>(cursor, 16 * K);
        const int lane = lane_index();
        for (int i = lane; i < 16 * K; i += 32) a[i] = narrow(load(x, i % 256));
        for (int i = lane; i < 16 * K; i += 32) b[i] = narrow(load(x, (i * 7 + 5) % 256));
        warp_barrier();
        // matrices of 8 rows of 16 bytes: rows 0 .. 7, rows 8 .. 15, then those 16 bytes further
        const int row = (kBug == kWrongMatrixRow && lane == 9 ? 0 : lane % 8) + lane / 8 % 2 * 8;
        const int at = row * K + lane / 16 * (K / 2);
        Words left = load_matrices(a, at);
        const Words right = load_matrices(b, at);
        if (kBug == kSwappedFragment) left = {{left.at[0], left.at[2], left.at[1], left.at[3]}};
        Tile d{};
        for (int again = 0; again < 2; ++again) {
            if (kBug == kSwappedOperand)
                multiply<T>(d, left, right.at[2], right.at[0]);
            else
                multiply<T>(d, left, right.at[0], right.at[2]);
        }
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) store(y, (g + i / 2 * 8) * 8 + 2 * t + i % 2, d.at[i]);
    }
    MMFAST_DEVICE static T narrow(float value) {
        if constexpr (sizeof(T) == 4)
            return to_tf32(value);
        else
            return from_float<T>(value);
    }
};

template <typename T, int kBug>
int multiply_of() {
    constexpr int K = kDepth<T>;
    Call<Multiply<T, kBug>> call(256, 128);
    const int status = call.launch(1, 32 * K * int(sizeof(T)));
    const auto at = [&](int i) { return double(to_float(Multiply<T, kBug>::narrow(call.data.x[size_t(i % 256)]))); };
    return status != MMFAST_OK ? status : call.data.check(128, [&](int i) {
        float sum = 0;
        for (int again = 0; again < 2; ++again) {
            double exact = double(sum);
            for (int k = 0; k < K; ++k) exact += at(i / 8 * K + k) * at((i % 8 * K + k) * 7 + 5);
            sum = cut_off(exact);
        }
        return sum;
    });
}
template <int kBug>
int multiply_float16() {
    return multiply_of<Half, kBug>();
}
template <int kBug>
int multiply_bfloat16() {
    return multiply_of<Bf16, kBug>();
}
template <int kBug>
int multiply_tf32() {
    return multiply_of<float, kBug>();
}

// ---- y = x with each 32 numbers reversed, copied asynchronously two pieces ahead into three buffers
template <int kBug>
struct Copy {
    static constexpr int kThreads = 32;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<float> buffers = shared_array<float>(cursor, 3 * 32);
        const int lane = lane_index();
        fetch(buffers, 0);
        fetch(buffers, 1);
        for (int piece = 0; piece < 8; ++piece) {
            fetch(buffers, kBug == kReusedTooEarly ? piece + 3 : piece + 2);
            if (kBug == kWaitForTooFew)
                copy_wait<3>();
            else if (kBug != kMissingWait)
                copy_wait<2>();
            if (kBug != kMissingBarrier) barrier();
            const float value = buffers[piece % 3 * 32 + 31 - lane];
            barrier();
            store(y, piece * 32 + lane, value);
        }
    }
    MMFAST_DEVICE void fetch(SharedArray<float> buffers, int piece) const {
        if (piece < 8 && lane_index() < 8)
            copy_async(buffers, piece % 3 * 32 + 4 * lane_index(), x, piece * 32 + 4 * lane_index());
        copy_commit();
    }
};

template <int kBug>
int copy() {
    Call<Copy<kBug>> call(256, 256);
    const int status = call.launch(1, 3 * 32 * int(sizeof(float)));
    return status != MMFAST_OK
               ? status
               : call.data.check(256, [&](int i) { return call.data.x[size_t(i / 32 * 32 + 31 - i % 32)]; });
}

// ---- three times: every block's values become the sum of all blocks' values times 1, 2, 3, 4, in a cluster of four
template <int kBug>
struct Exchange {
    static constexpr int kThreads = 32;
    static constexpr int kBlocks = 4;
    static constexpr bool kClusters = true;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        SharedCursor cursor;
        const SharedArray<float> inbox = shared_array<float>(cursor, 2 * kBlocks * 32);
        const SharedArray<float> own = shared_array<float>(cursor, 32);
        const SharedArray<uint64_t> full = shared_barriers(cursor, 2);
        const int lane = lane_index(), rank = cluster_rank();
        if (lane < 2) barrier_init(full, lane, 1);
        if (kBug != kMissingClusterBarrier) cluster_barrier();
        float value = load(x, block_index() * 32 + lane);
        for (int round = 0; round < 3; ++round) {
            const int buffer = round % 2;
            own[lane] = value;
            if (lane == 0 && kBug != kMissingExpect) barrier_expect(full, buffer, kBlocks * 32 * int(sizeof(float)));
            barrier();
            if (lane < 8)
                for (int i = 0; i < kBlocks; ++i) {
                    const int to = kBug == kWrongRank && rank == 2 && i == 1 ? 3 : kBug == kRankOutside ? i + 1 : i;
                    store_async(inbox, (buffer * kBlocks + rank) * 32 + 4 * lane, load_vector<4>(own, 4 * lane), full,
                                buffer, to);
                }
            const int parity = kBug == kWrongParity ? 1 - round / 2 : round / 2;
            if (kBug != kMissingWait) barrier_wait(full, buffer, parity);
            value = 0;
            for (int i = 0; i < kBlocks; ++i) value += float(i + 1) * inbox[(buffer * kBlocks + i) * 32 + lane];
            barrier();
        }
        store(y, block_index() * 32 + lane, value);
        if (kBug == kMissingLastClusterBarrier && rank > 0) return;
        if (kBug == kMissingLastClusterBarrier) store_async(inbox, 0, Vector<float, 4>{}, full, 0, 3);
        cluster_barrier();
    }
};

template <int kBug>
int exchange() {
    Call<Exchange<kBug>> call(256, 256);
    const Grid grid{8, (9 * 32 + 4) * int(sizeof(float)) + 128, 0, 4};
    const int status = call.buffers.finish(launch(call.kernel, grid, nullptr));
    return status != MMFAST_OK ? status : call.data.check(256, [&](int i) {
        float values[4], sum = 0;
        for (int k = 0; k < 4; ++k) values[k] = call.data.x[size_t(i / 128 * 128 + k * 32 + i % 32)];
        for (int round = 0; round < 3; ++round) {
            sum = 0;
            for (int k = 0; k < 4; ++k) sum += float(k + 1) * values[k];
            for (float& value : values) value = sum;
        }
        return sum;
    });
}

// ---- y = the approximations of x, which must be off, and by no more than is documented
struct Approximate {
    static constexpr int kThreads = kN;
    Global<const float> x;
    Global<float> y;
    MMFAST_DEVICE void operator()() const {
        const float value = load(x, thread_index());
        const float approximations[3] = {exp2_approx(value), tanh_approx(value), reciprocal_approx(value)};
        store(y, thread_index(), approximations[block_index() % 3]);
    }
};

int approximate() {
    constexpr float kErrors[] = {kExp2Error, kTanhError, kReciprocalError};
    for (int which = 0; which < 3; ++which) {
        Data data;
        int different = 0;
        for (int i = 0; i < kN; ++i) {
            const float x = data.x[size_t(i)];
            const float y = which == 0 ? exp2_approx(x) : which == 1 ? tanh_approx(x) : reciprocal_approx(x);
            const double exact = which == 0 ? exp2(double(x)) : which == 1 ? tanh(double(x)) : 1 / double(x);
            const double error = fabs(y / exact - 1);
            different += error > double(kErrors[which]) / 4;
            // and one rounding
            if (error > double(kErrors[which]) + 0x1p-23)
                return emulator::fail_with("approximation %d of %g is off by %g", which, double(x), error);
        }
        if (different < kN / 4) return emulator::fail_with("approximation %d was hardly perturbed", which);
    }
    Call<Approximate> call(kN, kN);
    return call.launch(1, 0);
}

// ---- every float16 and bfloat16 number survives the way to float32 and back; ties go to even
template <typename T>
int round_trip() {
    for (int bits = 0; bits < 0x10000; ++bits) {
        const T stored{uint16_t(bits)};
        const float value = to_float(stored);
        const T back = from_float<T>(value);
        if (value != value ? !(to_float(back) != to_float(back)) : back.bits != stored.bits)
            return emulator::fail_with("%04x came back as %04x", bits, back.bits);
        const T next{uint16_t(bits + 1)};
        const float middle = 0.5f * value + 0.5f * to_float(next);
        if ((bits & 0x7fff) == 0x7fff || !isfinite(middle)) continue;
        const int even = bits & 1 ? bits + 1 : bits;
        if (from_float<T>(middle).bits != even)
            return emulator::fail_with("the middle after %04x was rounded to %04x", bits, from_float<T>(middle).bits);
    }
    return MMFAST_OK;
}

}  // namespace
}  // namespace device

namespace emulator {

#define MMFAST_KERNEL(name, bug, kBug) {#name, bug, &device::name<device::kBug>}
const Selftest kSelftests[] = {
    MMFAST_KERNEL(reverse, "", kNone),
    MMFAST_KERNEL(reverse, "missing barrier", kMissingBarrier),
    MMFAST_KERNEL(reverse, "missing barrier before reuse", kMissingSecondBarrier),
    MMFAST_KERNEL(reverse, "off by one", kOffByOne),
    MMFAST_KERNEL(reverse, "off by one inside", kOffByOneInside),
    MMFAST_KERNEL(reverse, "off by one in shared memory", kSharedOffByOne),
    MMFAST_KERNEL(reverse, "race", kRace),
    MMFAST_KERNEL(reverse, "divergent barrier", kDivergentBarrier),
    MMFAST_KERNEL(reverse, "early exit", kEarlyExit),
    MMFAST_KERNEL(reverse, "unwritten shared memory", kUnwrittenShared),
    MMFAST_KERNEL(reverse, "unwritten output", kUnwrittenOutput),
    MMFAST_KERNEL(reverse, "two writers", kTwoWriters),
    MMFAST_KERNEL(reverse, "past the end", kPastTheEnd),
    MMFAST_KERNEL(reverse, "before the begin", kBeforeTheBegin),
    MMFAST_KERNEL(reverse, "too much shared memory", kTooMuchShared),
    MMFAST_KERNEL(rotate, "", kNone),
    MMFAST_KERNEL(rotate, "missing barrier before reuse", kMissingBarrier),
    MMFAST_KERNEL(sum, "", kNone),
    MMFAST_KERNEL(sum, "wrong lane", kWrongLane),
    MMFAST_KERNEL(sum, "lane outside the mask", kLaneOutsideMask),
    MMFAST_KERNEL(sum, "overlapping masks", kOverlappingMasks),
    MMFAST_KERNEL(sum, "divergent collective", kDivergentCollective),
    MMFAST_KERNEL(sum, "missing lane", kMissingLane),
    MMFAST_KERNEL(twice, "", kNone),
    MMFAST_KERNEL(twice, "misaligned vector", kMisalignedVector),
    MMFAST_KERNEL(scan, "", kNone),
    MMFAST_KERNEL(scan, "missing warp barrier", kMissingBarrier),
    MMFAST_KERNEL(count, "", kNone),
    MMFAST_KERNEL(count, "plain access beside atomics", kPlainWithAtomic),
    MMFAST_KERNEL(multiply_float16, "", kNone),
    MMFAST_KERNEL(multiply_float16, "swapped fragment", kSwappedFragment),
    MMFAST_KERNEL(multiply_float16, "swapped operand", kSwappedOperand),
    MMFAST_KERNEL(multiply_float16, "wrong matrix row", kWrongMatrixRow),
    MMFAST_KERNEL(multiply_bfloat16, "", kNone),
    MMFAST_KERNEL(multiply_bfloat16, "swapped fragment", kSwappedFragment),
    MMFAST_KERNEL(multiply_tf32, "", kNone),
    MMFAST_KERNEL(multiply_tf32, "swapped fragment", kSwappedFragment),
    MMFAST_KERNEL(multiply_tf32, "swapped operand", kSwappedOperand),
    MMFAST_KERNEL(copy, "", kNone),
    MMFAST_KERNEL(copy, "missing wait", kMissingWait),
    MMFAST_KERNEL(copy, "waits for too few", kWaitForTooFew),
    MMFAST_KERNEL(copy, "missing barrier after the wait", kMissingBarrier),
    MMFAST_KERNEL(copy, "buffer reused too early", kReusedTooEarly),
    MMFAST_KERNEL(exchange, "", kNone),
    MMFAST_KERNEL(exchange, "wrong cluster rank", kWrongRank),
    MMFAST_KERNEL(exchange, "rank outside the cluster", kRankOutside),
    MMFAST_KERNEL(exchange, "missing wait", kMissingWait),
    MMFAST_KERNEL(exchange, "missing expect", kMissingExpect),
    MMFAST_KERNEL(exchange, "wrong parity", kWrongParity),
    MMFAST_KERNEL(exchange, "missing cluster barrier", kMissingClusterBarrier),
    MMFAST_KERNEL(exchange, "a block that left", kMissingLastClusterBarrier),
    {"approximations", "", &device::approximate},
    {"float16", "", &device::round_trip<device::Half>},
    {"bfloat16", "", &device::round_trip<device::Bf16>},
    {nullptr, nullptr, nullptr},
};
#undef MMFAST_KERNEL

}  // namespace emulator
}  // namespace mmfast
