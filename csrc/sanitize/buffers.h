// What the sanitized executables share: random numbers, and buffers that are heap blocks of exactly their size, so that
// a read or write past one is seen. Outputs start as NaN.
#pragma once

#include <math.h>
#include <string.h>

#include <memory>
#include <random>
#include <vector>

#include "cpu/half.h"
#include "mmfast.h"

namespace mmfast {
namespace sanitize {

using namespace MMFAST_ISA;

inline std::mt19937 g_random(1);

inline int64_t pick(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(g_random);
}

// Buffers of one dtype, freed together.
class Buffers {
  public:
    explicit Buffers(int dtype) : dtype_(dtype) {}

    void* made(int64_t elements, bool random) {
        const size_t each = dtype_ == MMFAST_FLOAT64 ? 8 : dtype_ == MMFAST_FLOAT32 ? 4 : 2;
        blocks_.emplace_back(new char[size_t(elements) * each], elements, !random);
        for (int64_t i = 0; i < elements; ++i)
            set(blocks_.back().data.get(), i,
                random ? std::normal_distribution<double>(0, 0.3)(g_random) : double(NAN));
        return blocks_.back().data.get();
    }
    const void* input(int64_t elements) { return made(elements, true); }
    void* output(int64_t elements) { return made(elements, false); }
    const void* maybe(int64_t elements) { return pick(0, 1) ? input(elements) : nullptr; }

    // what the caller of a layer with lengths zeroes itself
    void zero(void* p, int64_t elements) const {
        for (int64_t i = 0; i < elements; ++i) set(static_cast<char*>(p), i, 0);
    }
    bool all_written() const {
        for (const Block& block : blocks_)
            for (int64_t i = 0; block.output && i < block.size; ++i)
                if (!isfinite(get(block.data.get(), i))) return false;
        return true;
    }

  private:
    struct Block {
        Block(char* p, int64_t n, bool out) : data(p), size(n), output(out) {}
        std::unique_ptr<char[]> data;
        int64_t size;
        bool output;
    };

    void set(char* p, int64_t i, double value) const {
        if (dtype_ == MMFAST_FLOAT64) memcpy(p + 8 * i, &value, 8);
        const float narrow = float(value);
        if (dtype_ == MMFAST_FLOAT32) memcpy(p + 4 * i, &narrow, 4);
        Half half;
        Bf16 brain;
        from_float(narrow, &half);
        from_float(narrow, &brain);
        if (dtype_ == MMFAST_FLOAT16) memcpy(p + 2 * i, &half, 2);
        if (dtype_ == MMFAST_BFLOAT16) memcpy(p + 2 * i, &brain, 2);
    }
    double get(const char* p, int64_t i) const {
        double wide;
        float narrow;
        Half half;
        Bf16 brain;
        switch (dtype_) {
            case MMFAST_FLOAT64:
                memcpy(&wide, p + 8 * i, 8);
                return wide;
            case MMFAST_FLOAT32:
                memcpy(&narrow, p + 4 * i, 4);
                return narrow;
            case MMFAST_FLOAT16:
                memcpy(&half, p + 2 * i, 2);
                return to_float(half);
            default:
                memcpy(&brain, p + 2 * i, 2);
                return to_float(brain);
        }
    }

    int dtype_;
    std::vector<Block> blocks_;
};

}  // namespace sanitize
}  // namespace mmfast
