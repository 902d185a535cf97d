// What the sanitized executables share: random numbers, and buffers that are heap blocks of exactly their size, so that
// a read or write past one is seen. Outputs start as NaN.
#pragma once

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

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

// The number of buffers made so far, and of the one that is made an element too short; -1: of none.
inline int64_t g_made = 0, g_short = -1;

// 0 where every buffer is to be used to its end, which rows past a length, cut off or not given are not.
inline int64_t pick_ragged(int64_t most) { return g_short < 0 ? pick(0, most) : 0; }

// Buffers of one dtype, freed together.
class Buffers {
  public:
    explicit Buffers(int dtype) : dtype_(dtype) {}

    void* made(int64_t elements, bool random) {
        const size_t each = dtype_ == MMFAST_FLOAT64 ? 8 : dtype_ == MMFAST_FLOAT32 ? 4 : 2;
        if (elements > 0 && g_made++ == g_short) --elements;
        blocks_.emplace_back(new char[size_t(elements) * each], elements, !random);
        for (int64_t i = 0; i < elements; ++i)
            set(blocks_.back().data.get(), i,
                random ? std::normal_distribution<double>(0, 0.3)(g_random) : double(NAN));
        return blocks_.back().data.get();
    }
    const void* input(int64_t elements) { return made(elements, true); }
    void* output(int64_t elements) { return made(elements, false); }
    const void* maybe(int64_t elements) { return pick(0, 1) ? input(elements) : nullptr; }
    // One that a short one would not be seen of: this call does not look at it, or, scratch of the emulated kernels, at
    // memory of the emulator's own in its place.
    void* unseen(int64_t elements) {
        const int64_t counted = g_made;
        g_made = INT32_MIN;
        void* made = this->made(elements, true);
        g_made = counted;
        return made;
    }

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

// The rows of a recurrent layer, of `steps` and `batch` already: all, cut off at lengths, or packed.
struct Rows {
    std::vector<int64_t> lengths, offsets;
    int64_t count;
    bool cut = false, packed = false;

    explicit Rows(mmfast_rnn_layer& layer)
        : lengths(size_t(layer.batch), layer.steps),
          offsets(size_t(layer.steps + 1)),
          count(layer.steps * layer.batch) {
        const int64_t kind = pick_ragged(2);
        cut = kind == 1, packed = kind == 2;
        if (cut) {
            for (int64_t& length : lengths) length = pick(-1, layer.steps + 1);
            layer.lengths = lengths.data();
        } else if (packed) {
            for (int64_t t = 0, size = layer.batch; t < layer.steps; ++t, size = pick(1, size)) {
                offsets[size_t(t + 1)] = offsets[size_t(t)] + size;
                for (int64_t b = 0; b < size; ++b) lengths[size_t(b)] = t + 1;
            }
            layer.offsets = offsets.data();
            count = offsets.back();
        }
    }
    Rows(const Rows&) = delete;
};

// Whether each buffer of run(), drawn from `seed`, is seen to be an element too short when it is; each in a process of
// its own, which AddressSanitizer ends.
inline bool all_short_buffers_are_seen(const char* name, bool (*run)(), unsigned seed) {
    constexpr int kNoSuchBuffer = 3, kSeen = 1;
    for (int64_t k = 0;; ++k) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
            g_random.seed(seed), g_made = 0, g_short = k;
            const bool passed = run();
            _exit(g_made <= k ? kNoSuchBuffer : passed ? 0 : 2);
        }
        int status = 0;
        waitpid(child, &status, 0);
        const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        if (code == kNoSuchBuffer) {
            printf("seen: %s, %d buffers\n", name, int(k));
            return k > 0;
        }
        if (code == kSeen) continue;
        printf("%s, seed %u: buffer %d was an element too short, and nobody saw it (%d)\n", name, seed, int(k), code);
        return false;
    }
}

}  // namespace sanitize
}  // namespace mmfast
