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
//   thread_index() block_index() block_count() lane_index() warp_index()      where a thread is, along one axis
//   Global<T>, load, store, load_vector<N>, store_vector, is_aligned<N>        device memory; vectors of N elements are
//                                                                              one access and must be aligned to it
//   SharedCursor, shared_array<T>(cursor, n), SharedArray<T>::operator[]       the block's shared memory: arrays are
//   cut
//                                                                              from it in order; launch gives its bytes
//   barrier(), warp_barrier(mask)                                              execution and memory order
//   shuffle, shuffle_xor, shuffle_down, ballot, warp_sum                       among the lanes of mask (default: all
//   32) atomic_add, atomic_max                                                     integers only: results stay
//   deterministic exp_of log1p_of abs_of tanh_of fma_of divide                               accurate exp2_approx
//   tanh_approx reciprocal_approx                                  one instruction, with its documented error Half,
//   Bf16, to_float, from_float<T>, Compute<T>                            16-bit storage, float32 arithmetic Buffers
//   host: pointers into Global views
#pragma once
#include <stdint.h>

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

template <typename T>
MMFAST_DEVICE Value<T> load(Global<T> x, int64_t i) {
    return x.p[i];
}
template <typename T>
MMFAST_DEVICE void store(Global<T> x, int64_t i, T value) {
    x.p[i] = value;
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
MMFAST_DEVICE Vector<Value<T>, N> load_vector(Global<T> x, int64_t i) {
    Vector<Value<T>, N> v;
    if constexpr (sizeof(v) == 16) {
        const uint4 words = *reinterpret_cast<const uint4*>(x.p + i);
        memcpy(&v, &words, sizeof v);
    } else {
        v = *reinterpret_cast<const Vector<Value<T>, N>*>(x.p + i);
    }
    return v;
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

MMFAST_DEVICE void barrier() { __syncthreads(); }
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
    // written and read by the launches of one entry; what it holds before and after means nothing
    template <typename T>
    Global<T> scratch(void* p, int64_t) {
        return {static_cast<T*>(p)};
    }
    int finish(int status) { return status; }
};

constexpr size_t kMaxArguments = CUDART_VERSION >= 12010 ? 32764 : 4096;

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run(const __grid_constant__ Kernel kernel) {
    kernel();
}

inline int status_of(cudaError_t error) {
    return error == cudaSuccess ? int(MMFAST_OK) : fail(MMFAST_CUDA_ERROR, cudaGetErrorString(error));
}

// Runs `blocks` blocks of Kernel::kThreads threads on the stream; returns a status, at once.
template <typename Kernel>
int launch(const Kernel& kernel, int64_t blocks, int shared_bytes, void* stream) {
    static_assert(Kernel::kThreads % 32 == 0, "blocks are whole warps");
    static_assert(sizeof(Kernel) <= kMaxArguments, "kernel arguments are at most 32764 bytes, before CUDA 12.1 4 KB");
    if (blocks == 0) return MMFAST_OK;
    if (blocks > 0x7fffffff) return fail(MMFAST_INVALID_ARGUMENT, "the tensors are too large for one launch");
    if (shared_bytes > 48 * 1024) {
        const int status =
            status_of(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
        if (status != MMFAST_OK) return status;
    }
    run<Kernel>
        <<<unsigned(blocks), Kernel::kThreads, size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(kernel);
    return status_of(cudaGetLastError());
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
