#include "emulator/machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/context.h"
#include "mmfast.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace mmfast {

namespace {
thread_local std::string g_last_error;
}

int fail(int status, const char* message) {
    g_last_error = message;
    return status;
}

namespace emulator {

Position g_position;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr int kMaxThreads = 1024;
constexpr int kColours = 32;

std::string place(Site site) {
    const char* slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// Stacks with an unreadable page below each, so that one that overflows faults instead of writing into its neighbour.
class Stacks {
  public:
    void* at(int i) {
        if (!base_) map();
        return base_ + size_t(i) * stride_ + page_;
    }

  private:
    void map() {
        page_ = size_t(sysconf(_SC_PAGESIZE));
        stride_ = kStackBytes + page_;
        void* p = mmap(nullptr, stride_ * kMaxThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        base_ = static_cast<char*>(p);
        for (int i = 0; i < kMaxThreads; ++i) mprotect(base_ + size_t(i) * stride_, page_, PROT_NONE);
    }
    char* base_ = nullptr;
    size_t page_ = 0, stride_ = 0;
};

enum class State { kReady, kAtBarrier, kAtCollective, kExited };

struct Fiber {
    Context context;
    int thread;
    State state;
    Site site;  // where it waits
};

// Lanes of one warp that wait for the others of their mask.
struct Rendezvous {
    uint32_t mask = 0, arrived = 0;
    Combine combine = nullptr;
    Site site{};
    void* slots[32];
};
constexpr int kMaxRendezvous = 8;

struct Warp {
    Rendezvous rendezvous[kMaxRendezvous];
    uint32_t epoch;
};

// What happened to two bytes of shared memory last. Stamps are epochs, of which each block has its own.
struct Shadow {
    uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
    uint32_t reader_warps;  // that read in read_epoch
    int16_t writer, reader;
    bool several_readers, atomic, written;
    int write_line, read_line;
};
constexpr int kShadowBytes = 2;

class Machine {
  public:
    int run(const char* name, const void* kernel, void (*body)(const void*), const Shape& shape);
    [[noreturn]] void stop(const std::string& message);
    void barrier(Site site);
    void collective(Combine combine, void* slot, uint32_t mask, Site site, bool orders_memory = false);
    void* cut_shared(uint32_t& used, int n, int size);
    void check_shared(const void* p, int size, Access access, Site site);
    void check_write(Writer& last, const char* what, int64_t index, Site site);
    std::string where() const;

    uint64_t seed = 0;

  private:
    static void enter();
    bool run_block(int64_t block);
    void wait(State state, Site site);
    void go_on(bool leaving);
    void resume(Fiber& fiber);
    Fiber* next();
    uint64_t random();
    std::string deadlock() const;
    [[noreturn]] void race(const char* verb, const void* p, Site site, const char* other, int thread, int line);

    std::mutex mutex_;
    Stacks stacks_;
    Context host_;
    Fiber fibers_[kMaxThreads];
    Warp warps_[kMaxThreads / 32];
    std::vector<Fiber*> ready_;  // a queue from head_ on
    size_t head_ = 0;
    Fiber* current_ = nullptr;
    const char* name_ = "";
    const void* kernel_ = nullptr;
    void (*body_)(const void*) = nullptr;
    Shape shape_{};
    int arrived_ = 0, exited_ = 0;
    Site barrier_site_{};
    uint32_t epoch_ = 1, launch_ = 0;
    std::vector<unsigned char> arena_;
    unsigned char* shared_ = nullptr;
    std::vector<Shadow> shadow_;
    uint64_t state_ = 0;
    bool failed_ = false;
};

Machine g_machine;

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t Machine::random() { return mix(state_++); }

std::string Machine::where() const {
    return std::string(name_) + ", block " + std::to_string(g_position.block) + ", thread " +
           std::to_string(g_position.thread);
}

int Machine::run(const char* name, const void* kernel, void (*body)(const void*), const Shape& shape) {
    std::lock_guard<std::mutex> lock(mutex_);
    name_ = name;
    kernel_ = kernel;
    body_ = body;
    shape_ = shape;
    state_ = mix(seed);
    ++launch_;
    arena_.resize(size_t(shape.shared_bytes) + 128);
    shared_ = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(arena_.data()) + 127) & ~uintptr_t(127));
    shadow_.resize(size_t(shape.shared_bytes) / kShadowBytes + 1);
    for (int64_t block = 0; block < shape.blocks; ++block)
        if (!run_block(block)) return MMFAST_CUDA_ERROR;
    return MMFAST_OK;
}

bool Machine::run_block(int64_t block) {
    g_position = {0, block, shape_.blocks};
    memset(shared_, 0xff, size_t(shape_.shared_bytes));  // NaN in every floating-point type
    memset(static_cast<void*>(shadow_.data()), 0, shadow_.size() * sizeof(Shadow));
    arrived_ = exited_ = 0;
    ++epoch_;
    failed_ = false;
    ready_.clear();
    head_ = 0;
    for (int w = 0; w < shape_.threads / 32; ++w) {
        for (Rendezvous& r : warps_[w].rendezvous) r.arrived = 0;
        warps_[w].epoch = 1;
    }
    for (int t = 0; t < shape_.threads; ++t) {
        fibers_[t].thread = t;
#if defined(__SANITIZE_ADDRESS__)
        // a launch that ended with a report left frames behind
        __asan_unpoison_memory_region(stacks_.at(t), kStackBytes);
#endif
        fibers_[t].context.prepare(stacks_.at(t), kStackBytes, size_t(t % kColours), &Machine::enter);
        resume(fibers_[t]);
    }
    current_ = next();
    g_position.thread = current_->thread;
    host_.switch_to(current_->context);
    return !failed_;
}

void Machine::enter() {
    Context::entered();
    g_machine.body_(g_machine.kernel_);
    g_machine.current_->state = State::kExited;
    ++g_machine.exited_;
    g_machine.go_on(true);
}

void Machine::resume(Fiber& fiber) {
    if (head_ == ready_.size()) ready_.clear(), head_ = 0;
    ready_.push_back(&fiber);
    fiber.state = State::kReady;
}

Fiber* Machine::next() {
    if (head_ == ready_.size()) return nullptr;
    if (seed != 0) std::swap(ready_[head_], ready_[head_ + random() % (ready_.size() - head_)]);
    return ready_[head_++];
}

void Machine::wait(State state, Site site) {
    current_->state = state;
    current_->site = site;
    go_on(false);
}

// The running fiber stops; another goes on, or the launch ends.
void Machine::go_on(bool leaving) {
    Fiber* from = current_;
    Fiber* to = next();
    if (!to) {
        if (exited_ < shape_.threads) stop(deadlock());
        from->context.switch_to(host_, true);
    }
    if (to == from) return;
    current_ = to;
    g_position.thread = to->thread;
    from->context.switch_to(to->context, leaving);
}

void Machine::stop(const std::string& message) {
    g_last_error = message;
    failed_ = true;
    current_->context.switch_to(host_, true);
    __builtin_unreachable();
}

std::string Machine::deadlock() const {
    std::string message = std::string(name_) + ", block " + std::to_string(g_position.block) + ": deadlock:";
    // one clause for each place where threads wait
    std::vector<Site> told;
    for (int t = 0; t < shape_.threads; ++t) {
        const Fiber& fiber = fibers_[t];
        if (fiber.state == State::kExited) continue;
        bool known = false;
        for (const Site& site : told) known = known || !(site != fiber.site);
        if (known) continue;
        told.push_back(fiber.site);
        int count = 0;
        for (int u = 0; u < shape_.threads; ++u)
            count += fibers_[u].state != State::kExited && !(fibers_[u].site != fiber.site);
        message += " " + std::to_string(count) + (count == 1 ? " thread waits at a " : " threads wait at a ") +
                   (fiber.state == State::kAtBarrier ? "barrier" : "warp collective") + " (" + place(fiber.site) +
                   "; the first is " + std::to_string(t) + ");";
    }
    return message + " " + std::to_string(exited_) + " have left the kernel";
}

void Machine::barrier(Site site) {
    if (arrived_ == 0) {
        barrier_site_ = site;
    } else if (barrier_site_ != site) {
        stop(where() + ": divergent barrier: it reached the one at " + place(site) + " while " +
             std::to_string(arrived_) + " other threads of its block wait at " + place(barrier_site_));
    }
    if (++arrived_ < shape_.threads) return wait(State::kAtBarrier, site);
    arrived_ = 0;
    ++epoch_;
    for (int t = 0; t < shape_.threads; ++t) resume(fibers_[t]);
    go_on(false);
}

void Machine::collective(Combine combine, void* slot, uint32_t mask, Site site, bool orders_memory) {
    Warp& warp = warps_[current_->thread / 32];
    const uint32_t self = 1u << (current_->thread % 32);
    if (!(mask & self)) {
        char text[16];
        snprintf(text, sizeof text, "%08x", mask);
        stop(where() + ": its lane is not in the mask " + text + " of the collective at " + place(site));
    }
    Rendezvous* mine = nullptr;
    Rendezvous* idle = nullptr;
    for (Rendezvous& r : warp.rendezvous) {
        if (r.arrived == 0) {
            if (!idle) idle = &r;
        } else if (r.mask == mask) {
            mine = &r;
        } else if (r.mask & mask) {
            char text[48];
            snprintf(text, sizeof text, "%08x and %08x", mask, r.mask);
            stop(where() + ": collectives of overlapping masks " + text + " at " + place(site) + " and " +
                 place(r.site));
        }
    }
    if (!mine) {
        if (!idle) stop(where() + ": too many collectives at once in one warp at " + place(site));
        mine = idle;
        mine->mask = mask;
        mine->combine = combine;
        mine->site = site;
    } else if (mine->site != site || mine->combine != combine) {
        stop(where() + ": divergent collective: it reached the one at " + place(site) +
             " while other lanes of its warp wait at " + place(mine->site));
    }
    mine->arrived |= self;
    mine->slots[current_->thread % 32] = slot;
    if (mine->arrived != mask) return wait(State::kAtCollective, site);
    if (combine) combine(mine->slots, mask);
    mine->arrived = 0;
    // a partial mask orders nothing for the other lanes
    if (orders_memory && mask == 0xffffffffu) ++warp.epoch;
    Fiber* first = fibers_ + current_->thread / 32 * 32;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) resume(first[lane]);
    go_on(false);
}

void* Machine::cut_shared(uint32_t& used, int n, int size) {
    const uint32_t start = (used + 15u) & ~15u;
    used = start + uint32_t(n) * uint32_t(size);
    if (used > uint32_t(shape_.shared_bytes))
        stop(where() + ": its arrays need " + std::to_string(used) + " bytes of shared memory, the launch gave " +
             std::to_string(shape_.shared_bytes));
    return shared_ + start;
}

void Machine::race(const char* verb, const void* p, Site site, const char* other, int thread, int line) {
    const ptrdiff_t byte = static_cast<const unsigned char*>(p) - shared_;
    stop(where() + ": race: it " + verb + " byte " + std::to_string(byte) + " of shared memory at " + place(site) +
         ", which thread " + std::to_string(thread) + " " + other + " at line " + std::to_string(line) +
         ", with no barrier between");
}

void Machine::check_shared(const void* p, int size, Access access, Site site) {
    const int16_t self = int16_t(current_->thread);
    const int warp = self / 32;
    const uint32_t warp_epoch = warps_[warp].epoch;
    const size_t offset = size_t(static_cast<const unsigned char*>(p) - shared_);
    for (size_t i = offset / kShadowBytes; i < (offset + size_t(size) + kShadowBytes - 1) / kShadowBytes; ++i) {
        Shadow& s = shadow_[i];
        const bool ordered_by_warp = s.writer / 32 == warp && s.write_warp_epoch != warp_epoch;
        const bool foreign_write = s.write_epoch == epoch_ && s.writer != self && !ordered_by_warp;
        if (foreign_write && !(s.atomic && access == Access::kAtomic))
            race(access == Access::kRead ? "reads" : "writes", p, site, "wrote", s.writer, s.write_line);
        if (access == Access::kRead) {
            if (!s.written)
                stop(where() + ": it reads byte " + std::to_string(offset) + " of shared memory at " + place(site) +
                     ", which no thread has written");
            const bool same_epoch = s.read_epoch == epoch_;
            const bool same_warp_epoch = same_epoch && s.reader / 32 == warp && s.read_warp_epoch == warp_epoch;
            if (!same_epoch) s.reader_warps = 0;
            s.several_readers = same_warp_epoch && (s.several_readers || s.reader != self);
            s.reader_warps |= 1u << warp;
            s.read_epoch = epoch_, s.read_warp_epoch = warp_epoch, s.reader = self, s.read_line = site.line;
            continue;
        }
        if (s.read_epoch == epoch_) {
            const bool by_other_warp = (s.reader_warps & ~(1u << warp)) != 0;
            const bool by_other_lane =
                s.reader / 32 == warp && s.read_warp_epoch == warp_epoch && (s.reader != self || s.several_readers);
            if (by_other_warp || by_other_lane) race("writes", p, site, "or another reads", s.reader, s.read_line);
        }
        s.write_epoch = epoch_, s.write_warp_epoch = warp_epoch, s.writer = self, s.write_line = site.line;
        s.atomic = access == Access::kAtomic, s.written = true;
    }
}

void Machine::check_write(Writer& last, const char* what, int64_t index, Site site) {
    const bool other = last.block != g_position.block || (last.thread != g_position.thread && last.epoch == epoch_);
    if (last.launch == launch_ && other)
        stop(where() + ": race: it writes (" + place(site) + ") element " + std::to_string(index) + " of " + what +
             ", which thread " + std::to_string(last.thread) + " of block " + std::to_string(last.block) +
             " wrote in the same launch at line " + std::to_string(last.line));
    last = {launch_, epoch_, g_position.block, g_position.thread, site.line};
}

std::string formatted(const char* format, va_list arguments) {
    char text[512];
    vsnprintf(text, sizeof text, format, arguments);
    return text;
}

}  // namespace

int run(const char* name, const void* kernel, void (*body)(const void*), const Shape& shape) {
    return g_machine.run(name, kernel, body, shape);
}
void set_order(uint64_t seed) { g_machine.seed = seed; }
uint64_t order() { return g_machine.seed; }

void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const std::string text = formatted(format, arguments);
    va_end(arguments);
    g_machine.stop(g_machine.where() + ": " + text);
}

int fail_with(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    g_last_error = formatted(format, arguments);
    va_end(arguments);
    return MMFAST_CUDA_ERROR;
}

void barrier(Site site) { g_machine.barrier(site); }
void collective(Combine combine, void* slot, uint32_t mask, Site site) {
    g_machine.collective(combine, slot, mask, site);
}
void warp_barrier(uint32_t mask, Site site) { g_machine.collective(nullptr, nullptr, mask, site, true); }
void* cut_shared(uint32_t& used, int n, int size) { return g_machine.cut_shared(used, n, size); }
void check_shared(const void* p, int size, Access access, Site site) { g_machine.check_shared(p, size, access, site); }
void check_write(Writer& last, const char* what, int64_t index, Site site) {
    g_machine.check_write(last, what, index, site);
}

float perturbed(float value, float argument, float error) {
    uint32_t bits;
    memcpy(&bits, &argument, sizeof bits);
    const double unit = double(mix(bits) >> 11) * 0x1p-53;  // [0, 1)
    return float(double(value) * (1 + double(error) * (2 * unit - 1)));
}

}  // namespace emulator
}  // namespace mmfast

const char* mmfast_last_error(void) { return mmfast::g_last_error.c_str(); }
