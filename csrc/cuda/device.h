// The few device primitives that kernels are written in: the only CUDA syntax and intrinsics of the project.
//
// A kernel is a struct of its arguments, passed by value, with a call operator:
//
//     struct Scale {
//         static constexpr int kThreads = 128;
//         Global<const float> x;
//         Global<float> y;
//         float factor;
//         MMFAST_DEVICE void operator()() const { ... load(x, i) ... store(y, i, v) ... }
//     };
//     return launch(Scale{...}, blocks, shared_bytes, stream);
//
// Compiled by nvcc these primitives are CUDA's; by an ordinary C++ compiler they are the emulator's
// (emulator/device.h), which runs a kernel on a CPU and checks what it does. Both offer, in namespace mmfast::device:
//
//   thread_index() block_threads() block_index() block_count()             where a thread is, along one axis
//   lane_index() warp_index()
//   Global<T>, load, store, load_vector<N>, store_vector, is_aligned<N>    device memory; vectors of N elements are one
//                                                                          access and must be aligned to it
//   SharedCursor, shared_array<T>(cursor, n), SharedArray<T>::operator[]   the block's shared memory: arrays are cut
//                                                                          from it in order; launch gives its bytes
//   load_vector<N>, store_vector of a SharedArray                          aligned as in device memory
//   barrier(), warp_barrier(mask), device_fence()                          execution and memory order
//   shuffle, shuffle_xor, shuffle_down, ballot, warp_sum                   among the lanes of mask (default: all 32)
//   atomic_add, atomic_max                                                 integers only: results stay deterministic
//   exp_of log1p_of abs_of tanh_of erf_of sqrt_of fma_of divide            accurate
//   exp2_approx tanh_approx reciprocal_approx                              one instruction, with its documented error
//   Half, Bf16, to_float, from_float<T>, Compute<T>                        16-bit storage, float32 arithmetic
//   Words, as_words, Tile, multiply<T>, to_tf32, load_matrices             matrix products of a warp, see Tile
//   copy_async, copy_commit, copy_wait<N>                                  16 bytes into shared memory, in groups
//   cluster_rank() cluster_barrier() shared_barriers                       blocks of a cluster, and stores into each
//   barrier_init barrier_expect barrier_wait store_async                   other's shared memory: compute capability 9
//   Buffers                                                                host: pointers into Global views
//   Grid, launch, resident                                                 host: a launch, and whether the device takes
//   it
//   upload, is_capturing                                                   host: a copy to the device in the stream's
//                                                                          order, and whether it would be captured
#pragma once
#include <stdint.h>

#include <vector>  // of host code, which lays out what a launch is given

#include "mmfast.h"

namespace mmfast {

// Keeps the message for mmfast_last_error() and returns the status. The message is not copied.
int fail(int status, const char* message);

namespace device {

struct Half {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

// What a stored type computes in.
template <typename T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// N elements that are loaded and stored as one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

// The number of elements in the widest access, 16 bytes.
template <typename T>
constexpr int kVector = 16 / int(sizeof(T));

constexpr uint32_t kAllLanes = 0xffffffffu;

// Four 32-bit registers: 16 bytes of any type.
using Words = Vector<uint32_t, 4>;

// A warp's part of a product D = A B + D on the matrix units, in the fragment layouts of the PTX manual for mma.sync.
// Bf16 and Half multiply 16 x 16 by 16 x 8 (m16n8k16), float rounded to TF32 16 x 8 by 8 x 8 (m16n8k8). With
// lane = 4 g + t (g = 0 .. 7, t = 0 .. 3), a register holds, as two 16-bit numbers (the lower half first) or one float:
//     a  Words     rows g, g + 8, g, g + 8 of A, at k = 2 t and 2 t + 1 (float: t), the last two 8 (float: 4) further
//     b0, b1       column g of B, at k as in a[0] and in a[2]
//     Tile         row g at columns 2 t and 2 t + 1 of D, then row g + 8 at the same columns
using Tile = Vector<float, 4>;

// A launch. threads: of a block, at most Kernel::kThreads, which 0 stands for. cluster: blocks that share a cluster.
struct Grid {
    int64_t blocks;
    int shared_bytes = 0;
    int threads = 0;
    int cluster = 1;
};

}  // namespace device
}  // namespace mmfast

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <string.h>

#define MMFAST_DEVICE __device__ __forceinline__
#define MMFAST_HOST_DEVICE __host__ __device__ __forceinline__
#define MMFAST_UNROLL _Pragma("unroll")
#define MMFAST_NO_UNROLL _Pragma("unroll 1")

namespace mmfast {
namespace device {

MMFAST_DEVICE int thread_index() { return int(threadIdx.x); }
MMFAST_DEVICE int block_threads() { return int(blockDim.x); }
MMFAST_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
MMFAST_DEVICE int64_t block_count() { return int64_t(gridDim.x); }
MMFAST_DEVICE int lane_index() { return int(threadIdx.x) & 31; }
MMFAST_DEVICE int warp_index() { return int(threadIdx.x) >> 5; }

template <typename T>
struct Global {
    T* p;
    MMFAST_HOST_DEVICE Global operator+(int64_t i) const { return {p + i}; }
    MMFAST_DEVICE T* data() const { return p; }
};

template <typename T>
MMFAST_HOST_DEVICE Global<const T> as_const(Global<T> x) {
    return {x.p};
}

template <typename T>
struct ValueOf {
    using type = T;
};
template <typename T>
struct ValueOf<const T> {
    using type = T;
};
template <typename T>
using Value = typename ValueOf<T>::type;

// p, which the compiler is told to be in device memory: of a pointer that was itself loaded it does not know
template <typename T>
MMFAST_DEVICE T* in_global(T* p) {
    __builtin_assume(__isGlobal(p));
    return p;
}
template <typename T>
MMFAST_DEVICE Value<T> load(Global<T> x, int64_t i) {
    return in_global(x.p)[i];
}
template <typename T>
MMFAST_DEVICE void store(Global<T> x, int64_t i, T value) {
    in_global(x.p)[i] = value;
}
// The four 32-bit words of a 16-byte vector.
template <typename V>
MMFAST_DEVICE uint4 words_of(const V& v) {
    uint4 words;
    if constexpr (sizeof(v.at[0]) == 2) {
        words.x = v.at[0].bits | uint32_t(v.at[1].bits) << 16;
        words.y = v.at[2].bits | uint32_t(v.at[3].bits) << 16;
        words.z = v.at[4].bits | uint32_t(v.at[5].bits) << 16;
        words.w = v.at[6].bits | uint32_t(v.at[7].bits) << 16;
    } else {
        memcpy(&words, &v, sizeof words);
    }
    return words;
}
template <int N, typename T>
MMFAST_DEVICE Vector<Value<T>, N> vector_at(T* p) {
    Vector<Value<T>, N> v;
    if constexpr (sizeof(v) == 16) {
        const uint4 words = *reinterpret_cast<const uint4*>(p);
        memcpy(&v, &words, sizeof v);
    } else {
        v = *reinterpret_cast<const Vector<Value<T>, N>*>(p);
    }
    return v;
}
template <int N, typename T>
MMFAST_DEVICE Vector<Value<T>, N> load_vector(Global<T> x, int64_t i) {
    return vector_at<N>(in_global(x.p) + i);
}
template <int N, typename T>
MMFAST_DEVICE void store_vector(Global<T> x, int64_t i, Vector<T, N> v) {
    if constexpr (sizeof(v) == 16) {
        // an assignment of 16 bytes is compiled into four of 4 bytes for compute capability 8 and 9
        const uint4 words = words_of(v);
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(x.p + i)), "r"(words.x),
                     "r"(words.y), "r"(words.z), "r"(words.w)
                     : "memory");
    } else {
        *reinterpret_cast<Vector<T, N>*>(x.p + i) = v;
    }
}
template <int N, typename T>
MMFAST_DEVICE bool is_aligned(Global<T> x) {
    return reinterpret_cast<uintptr_t>(x.p) % (sizeof(T) * N) == 0;
}

template <typename T>
struct SharedArray {
    T* p;
    MMFAST_DEVICE T& operator[](int i) const { return p[i]; }
};
struct SharedCursor {
    uint32_t used = 0;
};
template <typename T>
MMFAST_DEVICE SharedArray<T> shared_array(SharedCursor& cursor, int n) {
    extern __shared__ __align__(128) unsigned char mmfast_shared[];
    const uint32_t start = (cursor.used + 15u) & ~15u;
    cursor.used = start + uint32_t(n * int(sizeof(T)));
    return {reinterpret_cast<T*>(mmfast_shared + start)};
}

template <int N, typename T>
MMFAST_DEVICE Vector<T, N> load_vector(SharedArray<T> x, int i) {
    return vector_at<N>(x.p + i);
}
template <int N, typename T>
MMFAST_DEVICE void store_vector(SharedArray<T> x, int i, const Vector<T, N>& v) {
    if constexpr (sizeof(v) == 16)
        *reinterpret_cast<uint4*>(x.p + i) = words_of(v);
    else
        *reinterpret_cast<Vector<T, N>*>(x.p + i) = v;
}

template <typename T>
MMFAST_DEVICE Words as_words(const Vector<T, kVector<T>>& v) {
    const uint4 words = words_of(v);
    return {{words.x, words.y, words.z, words.w}};
}

template <typename T>
MMFAST_DEVICE void multiply(Tile& d, const Words& a, uint32_t b0, uint32_t b1);
template <>
MMFAST_DEVICE void multiply<Half>(Tile& d, const Words& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b0), "r"(b1));
}
template <>
MMFAST_DEVICE void multiply<Bf16>(Tile& d, const Words& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b0), "r"(b1));
}
template <>
MMFAST_DEVICE void multiply<float>(Tile& d, const Words& a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d.at[0]), "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b0), "r"(b1));
}
MMFAST_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
MMFAST_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
// x rounded to TF32, to nearest and ties away from zero
MMFAST_DEVICE float to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return float_of(bits);
}
MMFAST_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// Four matrices of 8 rows of 16 bytes: lane 8 m + r gives where row r of matrix m begins; at[m] is this lane's word of
// matrix m, word t of row g for lane 4 g + t.
template <typename T>
MMFAST_DEVICE Words load_matrices(SharedArray<T> x, int i) {
    Words w;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "r"(shared_address(x.p + i)));
    return w;
}

// 16 bytes from x[i] on to `to[at]` on, both aligned to 16 bytes
template <typename T, typename U>
MMFAST_DEVICE void copy_async(SharedArray<T> to, int at, Global<U> x, int64_t i) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to.p + at)),
                 "l"(__cvta_generic_to_global(x.p + i))
                 : "memory");
}
MMFAST_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroups of this thread's newest groups are unfinished.
template <int kGroups>
MMFAST_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MMFAST_HAS_CLUSTERS 1
#endif

// the block's place in its cluster
MMFAST_DEVICE int cluster_rank() {
    uint32_t rank = 0;
#ifdef MMFAST_HAS_CLUSTERS
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return int(rank);
}
// All threads of the cluster meet; what they wrote, barriers that they initialised too, all of them see.
MMFAST_DEVICE void cluster_barrier() {
#ifdef MMFAST_HAS_CLUSTERS
    asm volatile(
        "fence.mbarrier_init.release.cluster;\n"
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
#endif
}
// Barriers in shared memory, which count arrivals and bytes. Phases end when as many threads have arrived as
// barrier_init says and the bytes that they expect are there; phases alternate in parity, the first one's is 0.
MMFAST_DEVICE SharedArray<uint64_t> shared_barriers(SharedCursor& cursor, int n) {
    return shared_array<uint64_t>(cursor, n);
}
MMFAST_DEVICE void barrier_init(SharedArray<uint64_t> x, int i, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(x.p + i)), "r"(arrivals) : "memory");
}
// Arrives, and has the phase wait for so many bytes more.
MMFAST_DEVICE void barrier_expect(SharedArray<uint64_t> x, int i, int bytes) {
#ifdef MMFAST_HAS_CLUSTERS
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(x.p + i)), "r"(bytes)
                 : "memory");
#endif
}
// Waits for the end of the phase of this parity; then the thread sees what store_async stored in it.
MMFAST_DEVICE void barrier_wait(SharedArray<uint64_t> x, int i, int parity) {
#ifdef MMFAST_HAS_CLUSTERS
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(x.p + i)),
        "r"(parity)
        : "memory");
#endif
}
// Stores v, of 8 or 16 bytes, to element `at` of the same array in the cluster's block `rank`, and counts its bytes at
// barrier i of that block.
template <int N, typename T>
MMFAST_DEVICE void store_async(SharedArray<T> to, int at, const Vector<T, N>& v, SharedArray<uint64_t> x, int i,
                               int rank) {
    static_assert(sizeof(v) == 8 || sizeof(v) == 16, "a store is of 8 or 16 bytes");
#ifdef MMFAST_HAS_CLUSTERS
    uint32_t target, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(target) : "r"(shared_address(to.p + at)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(x.p + i)), "r"(rank));
    if constexpr (sizeof(v) == 16) {
        const uint4 words = words_of(v);
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
            "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(barrier)
            : "memory");
    } else {
        uint2 words;
        memcpy(&words, &v, sizeof words);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(target),
                     "r"(words.x), "r"(words.y), "r"(barrier)
                     : "memory");
    }
#endif
}

MMFAST_DEVICE void barrier() { __syncthreads(); }
// What this thread wrote before, other blocks see before what it writes after; likewise what it reads.
MMFAST_DEVICE void device_fence() { __threadfence(); }
MMFAST_DEVICE void warp_barrier(uint32_t mask = kAllLanes) { __syncwarp(mask); }

template <typename T>
MMFAST_DEVICE T shuffle(T value, int lane, uint32_t mask = kAllLanes) {
    return __shfl_sync(mask, value, lane);
}
template <typename T>
MMFAST_DEVICE T shuffle_xor(T value, int bits, uint32_t mask = kAllLanes) {
    return __shfl_xor_sync(mask, value, bits);
}
template <typename T>
MMFAST_DEVICE T shuffle_down(T value, int lanes, uint32_t mask = kAllLanes) {
    return __shfl_down_sync(mask, value, lanes);
}
MMFAST_DEVICE uint32_t ballot(bool vote, uint32_t mask = kAllLanes) { return __ballot_sync(mask, vote); }

// The sum over all 32 lanes, in every lane, added in the order of a butterfly.
template <typename T>
MMFAST_DEVICE T warp_sum(T value) {
    MMFAST_UNROLL
    for (int bits = 16; bits > 0; bits /= 2) value += shuffle_xor(value, bits);
    return value;
}

MMFAST_DEVICE uint32_t atomic_add(Global<uint32_t> x, int64_t i, uint32_t value) { return atomicAdd(x.p + i, value); }
MMFAST_DEVICE uint32_t atomic_max(Global<uint32_t> x, int64_t i, uint32_t value) { return atomicMax(x.p + i, value); }
MMFAST_DEVICE uint32_t atomic_add(SharedArray<uint32_t> x, int i, uint32_t value) { return atomicAdd(x.p + i, value); }
MMFAST_DEVICE uint32_t atomic_max(SharedArray<uint32_t> x, int i, uint32_t value) { return atomicMax(x.p + i, value); }

MMFAST_DEVICE float exp_of(float x) { return expf(x); }
MMFAST_DEVICE double exp_of(double x) { return exp(x); }
MMFAST_DEVICE float log1p_of(float x) { return log1pf(x); }
MMFAST_DEVICE double log1p_of(double x) { return log1p(x); }
MMFAST_DEVICE float abs_of(float x) { return fabsf(x); }
MMFAST_DEVICE double abs_of(double x) { return fabs(x); }
MMFAST_DEVICE float tanh_of(float x) { return tanhf(x); }
MMFAST_DEVICE double tanh_of(double x) { return tanh(x); }
MMFAST_DEVICE float erf_of(float x) { return erff(x); }
MMFAST_DEVICE float sqrt_of(float x) { return sqrtf(x); }
MMFAST_DEVICE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }

MMFAST_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MMFAST_DEVICE float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MMFAST_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MMFAST_DEVICE float to_float(float x) { return x; }
MMFAST_DEVICE double to_float(double x) { return x; }
MMFAST_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
MMFAST_DEVICE float to_float(Bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }

template <typename T>
MMFAST_DEVICE T from_float(Compute<T> x) {
    return x;
}
template <>
MMFAST_DEVICE Half from_float<Half>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}
template <>
MMFAST_DEVICE Bf16 from_float<Bf16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// A host entry's way from pointers to Global views; finish() is the entry's status.
class Buffers {
  public:
    template <typename T>
    Global<const T> input(const void* p, int64_t) {
        return {static_cast<const T*>(p)};
    }
    template <typename T>
    Global<T> output(void* p, int64_t) {
        return {static_cast<T*>(p)};
    }
    // rows of `width` elements, one begun every `stride`; what lies between them is nobody's
    template <typename T>
    Global<T> output_rows(void* p, int64_t, int64_t, int64_t) {
        return {static_cast<T*>(p)};
    }
    // written and read by the launches of one entry; what it holds before and after means nothing
    template <typename T>
    Global<T> scratch(void* p, int64_t) {
        return {static_cast<T*>(p)};
    }
    int finish(int status) { return status; }
};

constexpr size_t kMaxArguments = CUDART_VERSION >= 12010 ? 32764 : 4096;

// Whether a kernel says that it needs clusters (kClusters = true); nothing of it is compiled where there are none.
template <typename Kernel, typename = void>
constexpr bool kNeedsClusters = false;
template <typename Kernel>
constexpr bool kNeedsClusters<Kernel, decltype(void(Kernel::kClusters))> = Kernel::kClusters;

// Blocks that a kernel wants on a multiprocessor at once (kBlocksAtOnce); 0 leaves it to the compiler, which for more
// of them may spill registers.
template <typename Kernel, typename = void>
constexpr int kWanted = 0;
template <typename Kernel>
constexpr int kWanted<Kernel, decltype(void(Kernel::kBlocksAtOnce))> = Kernel::kBlocksAtOnce;

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kWanted<Kernel>) run(const __grid_constant__ Kernel kernel) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if constexpr (kNeedsClusters<Kernel>)
        __trap();
    else
#endif
        kernel();
}

inline int status_of(cudaError_t error) {
    return error == cudaSuccess ? int(MMFAST_OK) : fail(MMFAST_CUDA_ERROR, cudaGetErrorString(error));
}

// Lets the kernel have the shared memory and the cluster that the grid asks for.
template <typename Kernel>
cudaError_t prepare(const Grid& grid) {
    cudaError_t error = cudaSuccess;
    if (grid.shared_bytes > 48 * 1024)
        error = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    // more than 8 blocks of a cluster are not portable
    if (error == cudaSuccess && grid.cluster > 8)
        error = cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error;
}

struct Configuration {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster{};
    template <typename Kernel>
    void set(const Kernel*, const Grid& grid, void* stream) {
        config.gridDim = dim3(unsigned(grid.blocks));
        config.blockDim = dim3(unsigned(grid.threads ? grid.threads : Kernel::kThreads));
        config.dynamicSmemBytes = size_t(grid.shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        if (grid.cluster == 1) return;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(grid.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
};

// How many blocks (with clusters: how many clusters) of such a launch the current device runs at once; 0 where it
// lacks the shared memory or the clusters. No error is left behind.
template <typename Kernel>
int resident(const Grid& grid) {
    int device = 0, bytes = 0, clusters = 0, processors = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (grid.shared_bytes > bytes || (kNeedsClusters<Kernel> && !clusters)) return 0;
    cudaError_t error = prepare<Kernel>(grid);
    const int threads = grid.threads ? grid.threads : Kernel::kThreads;
    if (error == cudaSuccess && kNeedsClusters<Kernel>) {
        Configuration configuration;
        configuration.set(static_cast<const Kernel*>(nullptr), grid, nullptr);
        error = cudaOccupancyMaxActiveClusters(&count, run<Kernel>, &configuration.config);
    } else if (error == cudaSuccess) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, run<Kernel>, threads, size_t(grid.shared_bytes));
        count *= processors;
    }
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess ? count : 0;
}

// Runs the grid's blocks on the stream; returns a status, at once.
template <typename Kernel>
int launch(const Kernel& kernel, const Grid& grid, void* stream) {
    static_assert(Kernel::kThreads % 32 == 0, "blocks are whole warps");
    static_assert(sizeof(Kernel) <= kMaxArguments, "kernel arguments are at most 32764 bytes, before CUDA 12.1 4 KB");
    if (grid.blocks == 0) return MMFAST_OK;
    if (grid.blocks > 0x7fffffff) return fail(MMFAST_INVALID_ARGUMENT, "the tensors are too large for one launch");
    if (const int status = status_of(prepare<Kernel>(grid))) return status;
    Configuration configuration;
    configuration.set(&kernel, grid, stream);
    return status_of(cudaLaunchKernelEx(&configuration.config, run<Kernel>, kernel));
}
template <typename Kernel>
int launch(const Kernel& kernel, int64_t blocks, int shared_bytes, void* stream) {
    return launch(kernel, Grid{blocks, shared_bytes}, stream);
}

// Copies n elements to the device in the stream's order; `from` may go at once.
template <typename T>
int upload(Global<T> to, const T* from, int64_t n, void* stream) {
    return status_of(
        cudaMemcpyAsync(to.p, from, size_t(n) * sizeof(T), cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)));
}
inline bool is_capturing(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
           status != cudaStreamCaptureStatusNone;
}

}  // namespace device
}  // namespace mmfast

#else
#include "emulator/device.h"
#endif

namespace mmfast {
namespace device {

// a / b for a finite, normal b whose reciprocal is normal: to the last bit but for rare ties, and without the slow path
// of the division operator, which costs registers and a call.
MMFAST_DEVICE float divide(float a, float b) {
    const float reciprocal = reciprocal_approx(b);
    const float quotient = a * reciprocal;
    return fma_of(fma_of(-b, quotient, a), reciprocal, quotient);
}
MMFAST_DEVICE double divide(double a, double b) { return a / b; }

// Whether every one of these addresses, null or not, is a multiple of 16 bytes.
template <typename... Pointers>
bool are_aligned(Pointers... addresses) {
    return ((reinterpret_cast<uintptr_t>(addresses) % 16 == 0) && ...);
}

// The sum over all threads of the block, in thread 0 (other threads get a part of it): a butterfly in each warp, then
// one over the warps. `sums` has 32 elements and may be used again after the next barrier.
template <int kThreads, typename T>
MMFAST_DEVICE T block_sum(T value, SharedArray<T> sums) {
    constexpr int kWarps = kThreads / 32;
    value = warp_sum(value);
    if (lane_index() == 0) sums[warp_index()] = value;
    barrier();
    if (warp_index() != 0) return value;
    return warp_sum(lane_index() < kWarps ? T(sums[lane_index()]) : T(0));
}

}  // namespace device
}  // namespace mmfast
