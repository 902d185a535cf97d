// cuda/device.h on a CPU: the same names, every access and every meeting of threads checked (emulator/machine.h).
// Only cuda/device.h includes this file.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <string>
#include <vector>

#include "emulator/machine.h"

#define MMFAST_DEVICE inline
#define MMFAST_HOST_DEVICE inline
#define MMFAST_UNROLL
#define MMFAST_NO_UNROLL

namespace mmfast {
namespace device {

using emulator::Access;
using emulator::Site;

inline int thread_index() { return emulator::g_position.thread; }
inline int block_threads() { return emulator::g_position.threads; }
inline int64_t block_index() { return emulator::g_position.block; }
inline int64_t block_count() { return emulator::g_position.blocks; }
inline int lane_index() { return emulator::g_position.thread & 31; }
inline int warp_index() { return emulator::g_position.thread >> 5; }

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

// What a view is a view of. writers: one an element for outputs and scratch, none for inputs.
struct Buffer {
    std::string name;
    std::vector<emulator::Writer> writers;
};

template <typename T>
struct Global {
    T* p;
    int64_t offset, size;  // of the view in the buffer; elements from p on
    Buffer* buffer;
    Global operator+(int64_t i) const { return {p + i, offset + i, size - i, buffer}; }
    T* data() const { return p; }
};

template <typename T>
Global<const T> as_const(Global<T> x) {
    return {x.p, x.offset, x.size, x.buffer};
}

template <typename T>
void check_bounds(const Global<T>& x, int64_t i, int n, const char* verb, Site site) {
    if (i >= -x.offset && i + n <= x.size) return;
    emulator::report("it %s element %lld of %s, which has %lld elements, at line %d", verb,
                     static_cast<long long>(x.offset + (i < 0 ? i : i + n - 1)), x.buffer->name.c_str(),
                     static_cast<long long>(x.offset + x.size), site.line);
}
inline void check_alignment(const void* p, size_t bytes, Site site) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
        emulator::report("misaligned vector: it accesses %zu bytes at %p at line %d", bytes, p, site.line);
}
template <typename T>
void note_write(const Global<T>& x, int64_t i, int n, Site site) {
    for (int64_t j = i; j < i + n; ++j)
        emulator::check_write(x.buffer->writers[size_t(x.offset + j)], x.buffer->name.c_str(), x.offset + j, site);
}

template <typename T>
Value<T> load(Global<T> x, int64_t i, Site site = Site::here()) {
    check_bounds(x, i, 1, "reads", site);
    return x.p[i];
}
template <typename T>
void store(Global<T> x, int64_t i, T value, Site site = Site::here()) {
    check_bounds(x, i, 1, "writes", site);
    note_write(x, i, 1, site);
    x.p[i] = value;
}
template <int N, typename T>
Vector<Value<T>, N> load_vector(Global<T> x, int64_t i, Site site = Site::here()) {
    check_bounds(x, i, N, "reads", site);
    check_alignment(x.p + i, sizeof(Vector<Value<T>, N>), site);
    Vector<Value<T>, N> v;
    memcpy(&v, x.p + i, sizeof v);
    return v;
}
template <int N, typename T>
void store_vector(Global<T> x, int64_t i, Vector<T, N> v, Site site = Site::here()) {
    check_bounds(x, i, N, "writes", site);
    check_alignment(x.p + i, sizeof v, site);
    note_write(x, i, N, site);
    memcpy(x.p + i, &v, sizeof v);
}
template <int N, typename T>
bool is_aligned(Global<T> x) {
    return reinterpret_cast<uintptr_t>(x.p) % (sizeof(T) * N) == 0;
}

// An index that knows where it was written, so that operator[] can report its line.
struct SharedIndex {
    int i;
    Site site;
    SharedIndex(int index, Site at = Site::here()) : i(index), site(at) {}
};

// One element of shared memory: reading and assigning it are checked.
template <typename T>
class SharedElement {
  public:
    SharedElement(T* p, Site site) : p_(p), site_(site) {}
    operator T() const {
        emulator::check_shared(p_, int(sizeof(T)), Access::kRead, site_);
        return *p_;
    }
    const SharedElement& operator=(T value) const {
        emulator::check_shared(p_, int(sizeof(T)), Access::kWrite, site_);
        *p_ = value;
        return *this;
    }
    const SharedElement& operator=(const SharedElement& other) const { return *this = T(other); }
    const SharedElement& operator+=(T value) const { return *this = T(*this) + value; }
    T* atomic() const {
        emulator::check_shared(p_, int(sizeof(T)), Access::kAtomic, site_);
        return p_;
    }

  private:
    T* p_;
    Site site_;
};

template <typename T>
struct SharedArray {
    T* p;
    int size;
    SharedElement<T> operator[](SharedIndex index) const {
        if (index.i < 0 || index.i >= size)
            emulator::report("it uses element %d of a shared array of %d at line %d", index.i, size, index.site.line);
        return {p + index.i, index.site};
    }
};
struct SharedCursor {
    uint32_t used = 0;
};
template <typename T>
SharedArray<T> shared_array(SharedCursor& cursor, int n) {
    return {static_cast<T*>(emulator::cut_shared(cursor.used, n, int(sizeof(T)))), n};
}

template <typename T>
void check_shared(const SharedArray<T>& x, int i, int n, Access access, Site site) {
    if (i < 0 || i + n > x.size)
        emulator::report("it uses element %d of a shared array of %d at line %d", i < 0 ? i : i + n - 1, x.size,
                         site.line);
    check_alignment(x.p + i, sizeof(T) * size_t(n), site);
    if (access != Access::kAtomic) emulator::check_shared(x.p + i, int(sizeof(T)) * n, access, site);
}
template <int N, typename T>
Vector<T, N> load_vector(SharedArray<T> x, int i, Site site = Site::here()) {
    check_shared(x, i, N, Access::kRead, site);
    Vector<T, N> v;
    memcpy(&v, x.p + i, sizeof v);
    return v;
}
template <int N, typename T>
void store_vector(SharedArray<T> x, int i, const Vector<T, N>& v, Site site = Site::here()) {
    check_shared(x, i, N, Access::kWrite, site);
    memcpy(x.p + i, &v, sizeof v);
}

template <typename T>
Words as_words(const Vector<T, kVector<T>>& v) {
    Words words;
    memcpy(&words, &v, sizeof words);
    return words;
}

inline void barrier(Site site = Site::here()) { emulator::barrier(site); }
// blocks run one after the other
inline void device_fence() {}
inline void warp_barrier(uint32_t mask = kAllLanes, Site site = Site::here()) { emulator::warp_barrier(mask, site); }

template <typename T>
struct Shuffle {
    T value, result;
    int lane;      // it reads
    bool outside;  // of the mask
    static void combine(void* const* slots, uint32_t mask) {
        for (int lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Shuffle& mine = *static_cast<Shuffle*>(slots[lane]);
            mine.outside = !(mask >> mine.lane & 1);
            if (!mine.outside) mine.result = static_cast<const Shuffle*>(slots[mine.lane])->value;
        }
    }
};
template <typename T>
T shuffle(T value, int lane, uint32_t mask = kAllLanes, Site site = Site::here()) {
    Shuffle<T> slot{value, value, lane & 31, false};
    emulator::collective(&Shuffle<T>::combine, &slot, mask, site);
    if (slot.outside)
        emulator::report("it reads lane %d, which is not in the mask %08x of the shuffle at line %d", slot.lane, mask,
                         site.line);
    return slot.result;
}
template <typename T>
T shuffle_xor(T value, int bits, uint32_t mask = kAllLanes, Site site = Site::here()) {
    return shuffle(value, lane_index() ^ bits, mask, site);
}
template <typename T>
T shuffle_down(T value, int lanes, uint32_t mask = kAllLanes, Site site = Site::here()) {
    const int lane = lane_index() + lanes;
    return shuffle(value, lane < 32 ? lane : lane_index(), mask, site);
}

struct Ballot {
    bool vote;
    uint32_t result;
    static void combine(void* const* slots, uint32_t mask) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) votes |= uint32_t(static_cast<const Ballot*>(slots[lane])->vote) << lane;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) static_cast<Ballot*>(slots[lane])->result = votes;
    }
};
inline uint32_t ballot(bool vote, uint32_t mask = kAllLanes, Site site = Site::here()) {
    Ballot slot{vote, 0};
    emulator::collective(&Ballot::combine, &slot, mask, site);
    return slot.result;
}

// The butterfly of the device in one meeting of the lanes: the same additions in the same order.
template <typename T>
struct WarpSum {
    T value;
    static void combine(void* const* slots, uint32_t) {
        T sums[32], next[32];
        for (int lane = 0; lane < 32; ++lane) sums[lane] = static_cast<const WarpSum*>(slots[lane])->value;
        for (int bits = 16; bits > 0; bits /= 2) {
            for (int lane = 0; lane < 32; ++lane) next[lane] = sums[lane] + sums[lane ^ bits];
            memcpy(sums, next, sizeof sums);
        }
        for (int lane = 0; lane < 32; ++lane) static_cast<WarpSum*>(slots[lane])->value = sums[lane];
    }
};
template <typename T>
T warp_sum(T value, Site site = Site::here()) {
    WarpSum<T> slot{value};
    emulator::collective(&WarpSum<T>::combine, &slot, kAllLanes, site);
    return slot.value;
}

template <typename Update>
uint32_t atomic_update(Global<uint32_t> x, int64_t i, Site site, Update update) {
    check_bounds(x, i, 1, "updates", site);
    // a launch of its own: atomics do not race with each other
    x.buffer->writers[size_t(x.offset + i)] = {0xffffffffu, 0, 0, 0, site.line};
    const uint32_t before = x.p[i];
    x.p[i] = update(before);
    return before;
}
template <typename Update>
uint32_t atomic_update(const SharedElement<uint32_t>& element, Update update) {
    uint32_t* p = element.atomic();
    const uint32_t before = *p;
    *p = update(before);
    return before;
}
inline uint32_t atomic_add(Global<uint32_t> x, int64_t i, uint32_t value, Site site = Site::here()) {
    return atomic_update(x, i, site, [&](uint32_t before) { return before + value; });
}
inline uint32_t atomic_max(Global<uint32_t> x, int64_t i, uint32_t value, Site site = Site::here()) {
    return atomic_update(x, i, site, [&](uint32_t before) { return before > value ? before : value; });
}
inline uint32_t atomic_add(SharedArray<uint32_t> x, SharedIndex i, uint32_t value) {
    return atomic_update(x[i], [&](uint32_t before) { return before + value; });
}
inline uint32_t atomic_max(SharedArray<uint32_t> x, SharedIndex i, uint32_t value) {
    return atomic_update(x[i], [&](uint32_t before) { return before > value ? before : value; });
}

inline float exp_of(float x) { return expf(x); }
inline double exp_of(double x) { return exp(x); }
inline float log1p_of(float x) { return log1pf(x); }
inline double log1p_of(double x) { return log1p(x); }
inline float abs_of(float x) { return fabsf(x); }
inline double abs_of(double x) { return fabs(x); }
inline float tanh_of(float x) { return tanhf(x); }
inline double tanh_of(double x) { return tanh(x); }
inline float erf_of(float x) { return erff(x); }
inline float sqrt_of(float x) { return sqrtf(x); }
inline float fma_of(float a, float b, float c) { return fmaf(a, b, c); }

// Largest relative errors, none below what the PTX ISA manual states for ex2.approx.ftz.f32, tanh.approx.f32 and
// rcp.approx.ftz.f32.
constexpr float kExp2Error = 0x1p-22f, kTanhError = 0x1p-11f, kReciprocalError = 0x1p-23f;
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(emulator::perturbed(exp2f(flushed(x)), x, kExp2Error)); }
inline float tanh_approx(float x) { return emulator::perturbed(tanhf(x), x, kTanhError); }
inline float reciprocal_approx(float x) { return flushed(emulator::perturbed(1.0f / flushed(x), x, kReciprocalError)); }

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// ties away from zero
inline float to_tf32(float x) {
    const uint32_t bits = bits_of(x);
    return (bits & 0x7f800000) == 0x7f800000 ? x : float_of((bits + 0x1000) & ~0x1fffu);
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
    if (size >= 0x7c00) return size > 0x7c00 ? NAN : float_of(sign | 0x7f800000);
    // the bits as a float32 number of a smaller exponent, subnormal ones too
    return float_of(sign | bits_of(float_of(size << 13) * 0x1p112f));
}

// rounds to nearest, ties to even; NaN stays NaN
template <typename T>
inline T from_float(Compute<T> x) {
    return x;
}
template <>
inline Bf16 from_float<Bf16>(float x) {
    if (x != x) return {0x7fff};
    const uint32_t bits = bits_of(x);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
    const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
    if (x != x) return {uint16_t(sign | 0x7fff)};
    const float size = fabsf(x);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    // the spacing of float16 numbers here is 2^spacing, 2^-24 at least; nearbyint rounds ties to even
    const int exponent = int(bits_of(size) >> 23) - 127;
    const int spacing = exponent < -14 ? -24 : exponent - 10;
    const int steps = int(nearbyintf(ldexpf(size, -spacing)));
    // steps is 1024 to 2048 for normal numbers; what overflows into the exponent field is right there
    return {uint16_t(sign | (steps + ((spacing + 24) << 10)))};
}

// The matrix units: products are exact, their sum with d is formed exactly and then cut off to float32; of a TF32
// operand the low bits are not read.
template <typename T>
struct Operand {
    static constexpr int k = 16, each = 2;
    static float element(uint32_t word, int half) { return to_float(T{uint16_t(word >> 16 * half)}); }
};
template <>
struct Operand<float> {
    static constexpr int k = 8, each = 1;
    static float element(uint32_t word, int) { return float_of(word & ~0x1fffu); }
};
inline float cut_off(double x) {
    const float rounded = float(x);
    return fabs(double(rounded)) > fabs(x) ? nextafterf(rounded, 0) : rounded;
}
template <typename T>
struct Product {
    Tile* d;
    const Words* a;
    uint32_t b[2];
    static void combine(void* const* slots, uint32_t) {
        using O = Operand<T>;
        float a[16][O::k], b[O::k][8];
        for (int lane = 0; lane < 32; ++lane) {
            const Product& mine = *static_cast<const Product*>(slots[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int half = 0; half < O::each; ++half)
                for (int r = 0; r < 2; ++r) {
                    const int k = t * O::each + half + r * O::k / 2;
                    a[g][k] = O::element(mine.a->at[2 * r], half);
                    a[g + 8][k] = O::element(mine.a->at[2 * r + 1], half);
                    b[k][g] = O::element(mine.b[r], half);
                }
        }
        for (int lane = 0; lane < 32; ++lane) {
            Tile& d = *static_cast<const Product*>(slots[lane])->d;
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                double sum = double(d.at[i]);
                for (int k = 0; k < O::k; ++k) sum += double(a[row][k]) * double(b[k][column]);
                d.at[i] = cut_off(sum);
            }
        }
    }
};
template <typename T>
void multiply(Tile& d, const Words& a, uint32_t b0, uint32_t b1, Site site = Site::here()) {
    Product<T> slot{&d, &a, {b0, b1}};
    emulator::collective(&Product<T>::combine, &slot, kAllLanes, site);
}

struct Matrices {
    const uint32_t* row;
    Words result;
    static void combine(void* const* slots, uint32_t) {
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m)
                static_cast<Matrices*>(slots[lane])->result.at[m] =
                    static_cast<const Matrices*>(slots[8 * m + lane / 4])->row[lane % 4];
    }
};
template <typename T>
Words load_matrices(SharedArray<T> x, int i, Site site = Site::here()) {
    check_shared(x, i, kVector<T>, Access::kRead, site);
    Matrices slot{reinterpret_cast<const uint32_t*>(x.p + i), {}};
    emulator::collective(&Matrices::combine, &slot, kAllLanes, site);
    return slot.result;
}

template <typename T, typename U>
void copy_async(SharedArray<T> to, int at, Global<U> x, int64_t i, Site site = Site::here()) {
    check_bounds(x, i, kVector<T>, "reads", site);
    check_alignment(x.p + i, 16, site);
    check_shared(to, at, kVector<T>, Access::kAtomic, site);
    emulator::copy_async(to.p + at, x.p + i, 16, site);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int kGroups>
void copy_wait() {
    emulator::copy_wait(kGroups);
}

inline int cluster_rank() { return emulator::g_position.rank; }
inline void cluster_barrier(Site site = Site::here()) { emulator::cluster_barrier(site); }
inline SharedArray<uint64_t> shared_barriers(SharedCursor& cursor, int n) { return shared_array<uint64_t>(cursor, n); }
inline void barrier_init(SharedArray<uint64_t> x, int i, int arrivals, Site site = Site::here()) {
    check_shared(x, i, 1, Access::kAtomic, site);
    emulator::mbarrier_init(x.p + i, arrivals, site);
}
inline void barrier_expect(SharedArray<uint64_t> x, int i, int bytes, Site site = Site::here()) {
    check_shared(x, i, 1, Access::kAtomic, site);
    emulator::mbarrier_expect(x.p + i, bytes, site);
}
inline void barrier_wait(SharedArray<uint64_t> x, int i, int parity, Site site = Site::here()) {
    check_shared(x, i, 1, Access::kAtomic, site);
    emulator::mbarrier_wait(x.p + i, parity, site);
}
template <int N, typename T>
void store_async(SharedArray<T> to, int at, const Vector<T, N>& v, SharedArray<uint64_t> x, int i, int rank,
                 Site site = Site::here()) {
    check_shared(to, at, N, Access::kAtomic, site);
    check_shared(x, i, 1, Access::kAtomic, site);
    emulator::store_async(to.p + at, &v, int(sizeof v), x.p + i, rank, site);
}

// A host entry's way from pointers to Global views. Outputs and scratch are memory of the emulator's own, NaN at first,
// with guard words around; finish() looks at them and copies outputs to where the caller wants them.
class Buffers {
  public:
    Buffers() = default;
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    ~Buffers() {
        for (Stage& stage : stages_) free(stage.memory);
    }

    template <typename T>
    Global<const T> input(const void* p, int64_t n) {
        return {static_cast<const T*>(p), 0, n, named("input", ++inputs_, 0)};
    }
    template <typename T>
    Global<T> output(void* p, int64_t n) {
        return output_rows<T>(p, 1, n, n);
    }
    template <typename T>
    Global<T> output_rows(void* p, int64_t rows, int64_t width, int64_t stride) {
        const int64_t n = rows ? (rows - 1) * stride + width : 0;
        const Global<T> view = stage<T>(p, n, named("output", ++outputs_, n), true);
        stages_.back().width = size_t(width), stages_.back().stride = size_t(stride);
        return view;
    }
    template <typename T>
    Global<T> scratch(void* p, int64_t n) {
        return stage<T>(p, n, named("scratch", ++scratches_, n), false);
    }

    int finish(int status) {
        for (Stage& stage : stages_) {
            if (status != MMFAST_OK) return status;
            status = stage.is_output ? finish(stage) : guarded(stage);
        }
        return status;
    }

  private:
    static constexpr size_t kGuard = 256;
    static constexpr unsigned char kGuardByte = 0xa5;

    struct Stage {
        unsigned char* memory;
        unsigned char* begin;  // aligned as the caller's pointer is
        size_t bytes, element;
        void* target;
        Buffer* buffer;
        bool is_output;
        size_t width = 0, stride = 0;  // of an output: elements of a row, and from one row to the next
    };

    Buffer* named(const char* kind, int number, int64_t writers) {
        buffers_.push_back({std::string(kind) + " " + std::to_string(number), {}});
        buffers_.back().writers.resize(size_t(writers));
        return &buffers_.back();
    }

    template <typename T>
    Global<T> stage(void* p, int64_t n, Buffer* buffer, bool is_output) {
        const size_t bytes = size_t(n) * sizeof(T);
        Stage stage{nullptr, nullptr, bytes, sizeof(T), p, buffer, is_output, 0, 0};
        stage.memory = static_cast<unsigned char*>(aligned_alloc(kGuard, (bytes / kGuard + 5) * kGuard));
        stage.begin = stage.memory + 2 * kGuard + reinterpret_cast<uintptr_t>(p) % kGuard;
        memset(stage.begin - kGuard, kGuardByte, kGuard);
        memset(stage.begin, 0xff, bytes);
        memset(stage.begin + bytes, kGuardByte, kGuard);
        stages_.push_back(stage);
        return {reinterpret_cast<T*>(stage.begin), 0, n, buffer};
    }

    static int guarded(const Stage& stage) {
        for (size_t i = 0; i < kGuard; ++i) {
            if (stage.begin[-1 - ptrdiff_t(i)] != kGuardByte)
                return emulator::fail_with("%s was written %zu bytes before its begin", stage.buffer->name.c_str(),
                                           i + 1);
            if (stage.begin[stage.bytes + i] != kGuardByte)
                return emulator::fail_with("%s was written %zu bytes past its end", stage.buffer->name.c_str(), i + 1);
        }
        return MMFAST_OK;
    }

    static int finish(const Stage& stage) {
        const size_t n = stage.buffer->writers.size();
        for (size_t i = 0; i < n; ++i) {
            const bool written = stage.buffer->writers[i].launch != 0, wanted = i % stage.stride < stage.width;
            if (written != wanted)
                return emulator::fail_with("element %zu of %s was %s", i, stage.buffer->name.c_str(),
                                           wanted ? "not written" : "written, between its rows");
        }
        for (size_t i = 0; i < n; i += stage.stride)
            memcpy(static_cast<unsigned char*>(stage.target) + i * stage.element, stage.begin + i * stage.element,
                   stage.width * stage.element);
        return guarded(stage);
    }

    std::deque<Buffer> buffers_;  // whose elements stay where they are
    std::vector<Stage> stages_;
    int inputs_ = 0, outputs_ = 0, scratches_ = 0;
};

// "Forward<float>" of this function's own name, which the compiler writes out.
template <typename Kernel>
const char* kernel_name() {
    static const std::string name = [](std::string all) {
        const size_t begin = all.find("Kernel = ") + 9;
        all = all.substr(begin, all.find_first_of(";]", begin) - begin);
        const size_t space = all.rfind("::", all.find('<'));
        return space == std::string::npos ? all : all.substr(space + 2);
    }(__PRETTY_FUNCTION__);
    return name.c_str();
}

template <typename Kernel>
int launch(const Kernel& kernel, const Grid& grid, void*) {
    static_assert(Kernel::kThreads % 32 == 0, "blocks are whole warps");
    return emulator::run(
        kernel_name<Kernel>(), &kernel, [](const void* k) { (*static_cast<const Kernel*>(k))(); },
        {grid.threads ? grid.threads : Kernel::kThreads, grid.blocks, grid.shared_bytes, grid.cluster});
}
template <typename Kernel>
int launch(const Kernel& kernel, int64_t blocks, int shared_bytes, void* stream) {
    return launch(kernel, Grid{blocks, shared_bytes}, stream);
}

template <typename T>
int upload(Global<T> to, const T* from, int64_t n, void*) {
    check_bounds(to, 0, int(n), "writes", Site::here());
    memcpy(static_cast<void*>(to.p), from, size_t(n) * sizeof(T));
    return MMFAST_OK;
}
// a stream whose address is 1 is one that is being captured
inline bool is_capturing(void* stream) { return reinterpret_cast<uintptr_t>(stream) == 1; }

// As an H100: 227 KB of shared memory, clusters of 16 blocks; one block a multiprocessor, 7 clusters of the largest.
template <typename Kernel>
int resident(const Grid& grid) {
    return grid.shared_bytes > 227 * 1024 ? 0 : 132 / grid.cluster - (grid.cluster == 16);
}

}  // namespace device
}  // namespace mmfast
