// What the convolutions' kernels share: their memory, the transposition that fills and empties it, the choice by dtype.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include "cpu/simd.h"
#include "mmfast.h"

namespace mmfast {
namespace MMFAST_ISA {

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// run(a value of args.dtype), where the convolutions have kernels for it
template <typename Run>
int with_type(const mmfast_conv_transpose_args& args, const Run& run) {
    switch (args.dtype) {
        case MMFAST_FLOAT32:
            return run(float{});
        case MMFAST_FLOAT64:
            return run(double{});
        default:
            return MMFAST_INVALID_ARGUMENT;
    }
}

// Aligned to a cache line, freed with the object; null where there was no memory.
template <typename T>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(aligned_alloc(64, (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64))) {}
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

struct Range {
    int64_t begin, end;
    int64_t size() const { return end > begin ? end - begin : 0; }
};

// to[j * to_step + i] = from[i * from_step + j] for i < rows, j < columns; along the longer of both innermost, for
// memory is fetched ahead of few rows only
template <typename T>
void transpose_to(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t rows, int64_t columns) {
    constexpr int L = kLanes<T>;
    const int64_t whole_rows = rows / L * L, whole_columns = columns / L * L;
    const auto turn = [&](int64_t i, int64_t j) {
        Vec<T> square[L], turned[L];
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) square[k] = load(from + (i + k) * from_step + j);
        transpose<T>(square, turned);
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) store(to + (j + k) * to_step + i, turned[k]);
    };
    if (rows < columns)
        for (int64_t i = 0; i < whole_rows; i += L)
            for (int64_t j = 0; j < whole_columns; j += L) turn(i, j);
    else
        for (int64_t j = 0; j < whole_columns; j += L)
            for (int64_t i = 0; i < whole_rows; i += L) turn(i, j);
    for (int64_t i = whole_rows; i < rows; ++i)
        for (int64_t j = 0; j < whole_columns; ++j) to[j * to_step + i] = from[i * from_step + j];
    for (int64_t j = whole_columns; j < columns; ++j)
        for (int64_t i = 0; i < rows; ++i) to[j * to_step + i] = from[i * from_step + j];
}

}  // namespace MMFAST_ISA
}  // namespace mmfast
