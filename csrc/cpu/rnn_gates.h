// What recurrent layers and Cells share: stored elements, scratch, and the gates of a step.
#pragma once
#include <stdlib.h>

#include "cpu/half.h"
#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

// A stored element of 16 bits: which kind, the walker knows; one instance of the code serves both.
struct Narrow {
    uint16_t bits;
};

// Reads and writes stored elements T as vectors of C.
template <typename T, typename C>
struct Memory {
    explicit Memory(int) {}
    Vec<C> load_from(const T* p, int valid) const { return load_float(p, valid); }
    void store_to(T* p, Vec<C> v, int valid) const { store_float(p, v, valid); }
};
template <>
struct Memory<Narrow, float> {
    bool half;
    explicit Memory(int dtype) : half(dtype == MMFAST_FLOAT16) {}
    __attribute__((noinline)) Vec<float> load_from(const Narrow* p, int valid) const {
        return half ? load_float(reinterpret_cast<const Half*>(p), valid)
                    : load_float(reinterpret_cast<const Bf16*>(p), valid);
    }
    __attribute__((noinline)) void store_to(Narrow* p, Vec<float> v, int valid) const {
        half ? store_float(reinterpret_cast<Half*>(p), v, valid) : store_float(reinterpret_cast<Bf16*>(p), v, valid);
    }
};

// One allocation, handed out in pieces of whole cache lines.
class Scratch {
  public:
    explicit Scratch(int64_t bytes) : base_(static_cast<char*>(aligned_alloc(64, size_t(bytes + 64) / 64 * 64))) {}
    ~Scratch() { free(base_); }
    Scratch(const Scratch&) = delete;
    bool failed() const { return !base_; }
    template <typename C>
    C* take(int64_t elements) {
        char* p = base_ + used_;
        used_ += bytes<C>(elements);
        return reinterpret_cast<C*>(p);
    }
    template <typename C>
    static int64_t bytes(int64_t elements) {
        return (elements * int64_t(sizeof(C)) + 63) / 64 * 64;
    }

  private:
    char* base_;
    int64_t used_ = 0;
};

constexpr int gates_of(int mode) { return mode == MMFAST_LSTM ? 4 : mode == MMFAST_GRU ? 3 : 1; }

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// f(Constant) of the mode
template <typename F>
inline void with_mode(int mode, const F& f) {
    switch (mode) {
        case MMFAST_RNN_TANH:
            return f(Constant<MMFAST_RNN_TANH>());
        case MMFAST_RNN_RELU:
            return f(Constant<MMFAST_RNN_RELU>());
        case MMFAST_GRU:
            return f(Constant<MMFAST_GRU>());
        default:
            return f(Constant<MMFAST_LSTM>());
    }
}

// h~ from both sides of the gates and the state before; the activated gates, and for LSTM c in the place of c'.
template <int kMode, typename V>
inline V gates_of_step(const V* x, const V* a, V* kept, V h, V& c) {
    if constexpr (kMode == MMFAST_LSTM) {
        const V i = kept[0] = sigmoid_of(x[0] + a[0]), f = kept[1] = sigmoid_of(x[1] + a[1]);
        const V g = kept[2] = tanh_of(x[2] + a[2]), o = kept[3] = sigmoid_of(x[3] + a[3]);
        c = f * c + i * g;
        return o * tanh_of(c);
    } else if constexpr (kMode == MMFAST_GRU) {
        const V r = kept[0] = sigmoid_of(x[0] + a[0]), z = kept[1] = sigmoid_of(x[1] + a[1]);
        const V n = kept[2] = tanh_of(x[2] + r * a[2]);
        return n + z * (h - n);
    } else {
        const V sum = x[0] + a[0];
        return kMode == MMFAST_RNN_TANH ? tanh_of(sum) : sum < 0 ? V{} : sum;
    }
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
