#include "emulator/machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
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
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxCluster = 16;
constexpr int kColours = 32;

std::string place(Site site) {
    const char* slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// Stacks with an unreadable page below each, so that one that overflows faults instead of writing into its neighbour.
// They are mapped a block's worth at a time.
class Stacks {
  public:
    void* at(int i) {
        char*& slab = slabs_[i / kMaxThreads];
        if (!slab) slab = map();
        return slab + size_t(i % kMaxThreads) * stride() + page();
    }

  private:
    static size_t page() {
        static const size_t size = size_t(sysconf(_SC_PAGESIZE));
        return size;
    }
    static size_t stride() { return kStackBytes + page(); }
    static char* map() {
        void* p = mmap(nullptr, stride() * kMaxThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        for (int i = 0; i < kMaxThreads; ++i) mprotect(static_cast<char*>(p) + size_t(i) * stride(), page(), PROT_NONE);
        return static_cast<char*>(p);
    }
    char* slabs_[kMaxCluster] = {};
};

enum class State { kReady, kAtBarrier, kAtCollective, kAtClusterBarrier, kAtMbarrier, kExited };
constexpr const char* kPlaces[] = {"", "barrier", "warp collective", "cluster barrier", "barrier in shared memory", ""};

struct Copy {
    unsigned char* to;
    const void* from;
    int bytes, group;
    Site site;
};

struct Fiber {
    Context context;
    int thread, rank;
    State state;
    Site site;  // where it waits
    const void* waits_for = nullptr;
    std::vector<Copy> copies;
    int group = 0;       // that its next copies belong to
    uint32_t token = 0;  // of the newest phase that it has waited for
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
    uint32_t token;         // of the phase with which an asynchronous store ended, by writer kAsynchronous
    int16_t writer, reader;
    bool several_readers, atomic, written, in_flight;
    int write_line, read_line;
};
constexpr int kShadowBytes = 2;
constexpr int16_t kAsynchronous = -1;

struct Store {
    unsigned char* to;
    std::vector<unsigned char> bytes;
    Site site;
};

// A barrier in shared memory.
struct Mbarrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;   // expected and not yet stored
    uint32_t phase = 0;  // that goes on
    uint32_t token = 0;  // of the last one that ended
    uint32_t since = 0;  // cluster barriers passed when it was initialised
    std::vector<Store> stores;
};

// A running block.
struct Block {
    int64_t index;
    int arrived, exited;
    Site barrier_site;
    uint32_t epoch;
    std::vector<unsigned char> arena;
    unsigned char* shared;
    std::vector<Shadow> shadow;
    std::map<const void*, Mbarrier> mbarriers;
    Warp warps[kMaxThreads / 32];
};

class Machine {
  public:
    uint32_t launches() const { return launch_; }
    int run(const char* name, const void* kernel, void (*body)(const void*), const Shape& shape);
    [[noreturn]] void stop(const std::string& message);
    void barrier(Site site);
    void collective(Combine combine, void* slot, uint32_t mask, Site site, bool orders_memory = false);
    void* cut_shared(uint32_t& used, int n, int size);
    void check_shared(const void* p, int size, Access access, Site site);
    void check_write(Writer& last, const char* what, int64_t index, Site site);
    void cluster_barrier(Site site);
    void copy_async(void* to, const void* from, int bytes, Site site);
    void copy_commit() { ++current_->group; }
    void copy_wait(int groups);
    void mbarrier_init(void* barrier, int arrivals, Site site);
    void mbarrier_expect(void* barrier, int bytes, Site site);
    void mbarrier_wait(void* barrier, int parity, Site site);
    void store_async(void* to, const void* from, int bytes, void* barrier, int rank, Site site);
    std::string where() const;

    uint64_t seed = 0;

  private:
    static void enter();
    bool run_cluster(int64_t first);
    Block& block() { return blocks_[current_->rank]; }
    Fiber& fiber(int rank, int thread) { return fibers_[size_t(rank * shape_.threads + thread)]; }
    Shadow& shadow(Block& block, const void* p, int offset) {
        return block.shadow[size_t(static_cast<const unsigned char*>(p) - block.shared + offset) / kShadowBytes];
    }
    Mbarrier& mbarrier(Block& block, const void* p, Site site);
    void go_to(Fiber& fiber);
    void end_phase(Block& block, const void* p, Mbarrier& barrier);
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
    std::vector<Fiber> fibers_;
    std::vector<Block> blocks_ = std::vector<Block>(kMaxCluster);
    std::vector<Fiber*> ready_;  // a queue from head_ on
    size_t head_ = 0;
    Fiber* current_ = nullptr;
    const char* name_ = "";
    const void* kernel_ = nullptr;
    void (*body_)(const void*) = nullptr;
    Shape shape_{};
    int exited_ = 0, cluster_arrived_ = 0;
    uint32_t launch_ = 0, token_ = 0, cluster_epoch_ = 0;
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
    if (shape.threads > kMaxThreads || shape.cluster > kMaxCluster || shape.blocks % shape.cluster != 0)
        return fail_with("%s: a launch of %lld blocks of %d threads in clusters of %d", name,
                         static_cast<long long>(shape.blocks), shape.threads, shape.cluster);
    if (fibers_.size() < size_t(shape.threads * shape.cluster)) fibers_.resize(size_t(shape.threads * shape.cluster));
    for (int64_t first = 0; first < shape.blocks; first += shape.cluster)
        if (!run_cluster(first)) return MMFAST_CUDA_ERROR;
    return MMFAST_OK;
}

bool Machine::run_cluster(int64_t first) {
    exited_ = cluster_arrived_ = 0;
    failed_ = false;
    ready_.clear();
    head_ = 0;
    for (int rank = 0; rank < shape_.cluster; ++rank) {
        Block& block = blocks_[size_t(rank)];
        block.index = first + rank;
        block.arrived = block.exited = 0;
        block.epoch = 1;
        block.mbarriers.clear();
        block.arena.resize(size_t(shape_.shared_bytes) + 128);
        block.shared =
            reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.arena.data()) + 127) & ~uintptr_t(127));
        memset(block.shared, 0xff, size_t(shape_.shared_bytes));  // NaN in every floating-point type
        block.shadow.assign(size_t(shape_.shared_bytes) / kShadowBytes + 1, Shadow{});
        for (int w = 0; w < shape_.threads / 32; ++w) {
            for (Rendezvous& r : block.warps[w].rendezvous) r.arrived = 0;
            block.warps[w].epoch = 1;
        }
        for (int t = 0; t < shape_.threads; ++t) {
            Fiber& fiber = this->fiber(rank, t);
            void* const stack = stacks_.at(rank * shape_.threads + t);
            fiber.thread = t;
            fiber.rank = rank;
            fiber.copies.clear();
            fiber.group = 0;
            fiber.token = 0;
#if defined(__SANITIZE_ADDRESS__)
            // a launch that ended with a report left frames behind
            __asan_unpoison_memory_region(stack, kStackBytes);
#endif
            fiber.context.prepare(stack, kStackBytes, size_t(t % kColours), &Machine::enter);
            resume(fiber);
        }
    }
    go_to(*next());
    host_.switch_to(current_->context);
    return !failed_;
}

void Machine::go_to(Fiber& fiber) {
    current_ = &fiber;
    g_position = {fiber.thread,  blocks_[size_t(fiber.rank)].index, shape_.blocks, shape_.threads, fiber.rank,
                  shape_.cluster};
}

void Machine::enter() {
    Context::entered();
    g_machine.body_(g_machine.kernel_);
    g_machine.current_->state = State::kExited;
    ++g_machine.exited_;
    ++g_machine.block().exited;
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
        if (exited_ < shape_.threads * shape_.cluster) stop(deadlock());
        from->context.switch_to(host_, true);
    }
    if (to == from) return;
    go_to(*to);
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
    const int all = shape_.threads * shape_.cluster;
    for (int i = 0; i < all; ++i) {
        const Fiber& fiber = fibers_[size_t(i)];
        if (fiber.state == State::kExited) continue;
        bool known = false;
        for (const Site& site : told) known = known || !(site != fiber.site);
        if (known) continue;
        told.push_back(fiber.site);
        int count = 0;
        for (int k = 0; k < all; ++k)
            count += fibers_[size_t(k)].state != State::kExited && !(fibers_[size_t(k)].site != fiber.site);
        message += " " + std::to_string(count) + (count == 1 ? " thread waits at a " : " threads wait at a ") +
                   kPlaces[int(fiber.state)] + " (" + place(fiber.site) + "; the first is " +
                   std::to_string(fiber.thread) + ");";
    }
    return message + " " + std::to_string(exited_) + " have left the kernel";
}

void Machine::barrier(Site site) {
    Block& block = this->block();
    if (block.arrived == 0) {
        block.barrier_site = site;
    } else if (block.barrier_site != site) {
        stop(where() + ": divergent barrier: it reached the one at " + place(site) + " while " +
             std::to_string(block.arrived) + " other threads of its block wait at " + place(block.barrier_site));
    }
    if (++block.arrived < shape_.threads) return wait(State::kAtBarrier, site);
    block.arrived = 0;
    ++block.epoch;
    const int rank = current_->rank;
    for (int t = 0; t < shape_.threads; ++t) resume(fiber(rank, t));
    go_on(false);
}

void Machine::cluster_barrier(Site site) {
    if (++cluster_arrived_ < shape_.threads * shape_.cluster) return wait(State::kAtClusterBarrier, site);
    cluster_arrived_ = 0;
    ++cluster_epoch_;
    for (int rank = 0; rank < shape_.cluster; ++rank) {
        ++blocks_[size_t(rank)].epoch;
        for (int t = 0; t < shape_.threads; ++t) resume(fiber(rank, t));
    }
    go_on(false);
}

void Machine::copy_async(void* to, const void* from, int bytes, Site site) {
    check_shared(to, bytes, Access::kWrite, site);
    unsigned char* const target = static_cast<unsigned char*>(to);
    for (int i = 0; i < bytes; i += kShadowBytes) shadow(block(), target, i).in_flight = true;
    if (seed % 2) memcpy(to, from, size_t(bytes));
    current_->copies.push_back({target, from, bytes, current_->group, site});
}

void Machine::copy_wait(int groups) {
    std::vector<Copy>& copies = current_->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < current_->group - groups; ++done) {
        const Copy& copy = copies[done];
        if (seed % 2 == 0) memcpy(copy.to, copy.from, size_t(copy.bytes));
        for (int i = 0; i < copy.bytes; i += kShadowBytes) shadow(block(), copy.to, i).in_flight = false;
        check_shared(copy.to, copy.bytes, Access::kWrite, copy.site);
    }
    copies.erase(copies.begin(), copies.begin() + ptrdiff_t(done));
}

Mbarrier& Machine::mbarrier(Block& block, const void* p, Site site) {
    const auto found = block.mbarriers.find(p);
    if (found == block.mbarriers.end())
        stop(where() + ": it uses a barrier in shared memory that was not initialised, at " + place(site));
    return found->second;
}

void Machine::mbarrier_init(void* p, int arrivals, Site site) {
    check_shared(p, 8, Access::kWrite, site);
    Mbarrier& barrier = block().mbarriers[p];
    barrier = {};
    barrier.arrivals = barrier.pending = arrivals;
    barrier.since = cluster_epoch_;
}

void Machine::end_phase(Block& block, const void* p, Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.token = ++token_;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    for (const Store& store : barrier.stores) {
        if (seed % 2 == 0) memcpy(store.to, store.bytes.data(), store.bytes.size());
        for (size_t i = 0; i < store.bytes.size(); i += kShadowBytes) {
            Shadow& s = shadow(block, store.to, int(i));
            s.writer = kAsynchronous, s.write_epoch = block.epoch, s.write_line = store.site.line;
            s.token = barrier.token, s.atomic = false, s.written = true;
        }
    }
    barrier.stores.clear();
    const int rank = int(&block - blocks_.data());
    for (int t = 0; t < shape_.threads; ++t) {
        Fiber& waiting = fiber(rank, t);
        if (waiting.state == State::kAtMbarrier && waiting.waits_for == p) resume(waiting);
    }
}

void Machine::mbarrier_expect(void* p, int bytes, Site site) {
    Mbarrier& barrier = mbarrier(block(), p, site);
    if (barrier.pending == 0)
        stop(where() + ": it arrives at " + place(site) + " at a barrier in shared memory at which all have arrived");
    --barrier.pending;
    barrier.bytes += bytes;
    end_phase(block(), p, barrier);
}

void Machine::mbarrier_wait(void* p, int parity, Site site) {
    Mbarrier& barrier = mbarrier(block(), p, site);
    current_->waits_for = p;
    while (int(barrier.phase & 1) == parity) wait(State::kAtMbarrier, site);
    if (barrier.token > current_->token) current_->token = barrier.token;
}

void Machine::store_async(void* to, const void* from, int bytes, void* p, int rank, Site site) {
    if (rank < 0 || rank >= shape_.cluster)
        stop(where() + ": it stores into block " + std::to_string(rank) + " of a cluster of " +
             std::to_string(shape_.cluster) + " at " + place(site));
    Block& target = blocks_[size_t(rank)];
    if (target.exited == shape_.threads)
        stop(where() + ": it stores into block " + std::to_string(rank) +
             " of its cluster, which has left the kernel, at " + place(site));
    unsigned char* const there = target.shared + (static_cast<unsigned char*>(to) - block().shared);
    void* const barrier_there = target.shared + (static_cast<unsigned char*>(p) - block().shared);
    Mbarrier& barrier = mbarrier(target, barrier_there, site);
    if (&target != &block() && barrier.since == cluster_epoch_)
        stop(where() + ": it uses a barrier of block " + std::to_string(rank) + " of its cluster at " + place(site) +
             " with no cluster barrier since it was initialised");
    const unsigned char* const data = static_cast<const unsigned char*>(from);
    barrier.stores.push_back({there, {data, data + bytes}, site});
    if (seed % 2) memcpy(there, from, size_t(bytes));
    barrier.bytes -= bytes;
    end_phase(target, barrier_there, barrier);
}

void Machine::collective(Combine combine, void* slot, uint32_t mask, Site site, bool orders_memory) {
    Warp& warp = block().warps[current_->thread / 32];
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
    Fiber* first = &fiber(current_->rank, current_->thread / 32 * 32);
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
    return block().shared + start;
}

void Machine::race(const char* verb, const void* p, Site site, const char* other, int thread, int line) {
    const ptrdiff_t byte = static_cast<const unsigned char*>(p) - block().shared;
    stop(where() + ": race: it " + verb + " byte " + std::to_string(byte) + " of shared memory at " + place(site) +
         ", which thread " + std::to_string(thread) + " " + other + " at line " + std::to_string(line) +
         ", with no barrier between");
}

void Machine::check_shared(const void* p, int size, Access access, Site site) {
    const int16_t self = int16_t(current_->thread);
    const int warp = self / 32;
    Block& block = this->block();
    const uint32_t epoch = block.epoch;
    const uint32_t warp_epoch = block.warps[warp].epoch;
    const size_t offset = size_t(static_cast<const unsigned char*>(p) - block.shared);
    for (size_t i = offset / kShadowBytes; i < (offset + size_t(size) + kShadowBytes - 1) / kShadowBytes; ++i) {
        Shadow& s = block.shadow[i];
        if (s.in_flight)
            stop(where() + ": it uses byte " + std::to_string(offset) + " of shared memory at " + place(site) +
                 ", into which thread " + std::to_string(s.writer) + " copies since line " +
                 std::to_string(s.write_line) + " without having waited");
        const bool asynchronous = s.writer == kAsynchronous;
        if (asynchronous && s.write_epoch == epoch && current_->token < s.token)
            stop(where() + ": race: it uses byte " + std::to_string(offset) + " of shared memory at " + place(site) +
                 ", which was stored asynchronously at line " + std::to_string(s.write_line) +
                 ", with no wait for its barrier");
        const bool ordered_by_warp = s.writer / 32 == warp && s.write_warp_epoch != warp_epoch;
        const bool foreign_write = s.write_epoch == epoch && s.writer != self && !ordered_by_warp && !asynchronous;
        if (foreign_write && !(s.atomic && access == Access::kAtomic))
            race(access == Access::kRead ? "reads" : "writes", p, site, "wrote", s.writer, s.write_line);
        if (access == Access::kRead) {
            if (!s.written)
                stop(where() + ": it reads byte " + std::to_string(offset) + " of shared memory at " + place(site) +
                     ", which no thread has written");
            const bool same_epoch = s.read_epoch == epoch;
            const bool same_warp_epoch = same_epoch && s.reader / 32 == warp && s.read_warp_epoch == warp_epoch;
            if (!same_epoch) s.reader_warps = 0;
            s.several_readers = same_warp_epoch && (s.several_readers || s.reader != self);
            s.reader_warps |= 1u << warp;
            s.read_epoch = epoch, s.read_warp_epoch = warp_epoch, s.reader = self, s.read_line = site.line;
            continue;
        }
        if (s.read_epoch == epoch) {
            const bool by_other_warp = (s.reader_warps & ~(1u << warp)) != 0;
            const bool by_other_lane =
                s.reader / 32 == warp && s.read_warp_epoch == warp_epoch && (s.reader != self || s.several_readers);
            if (by_other_warp || by_other_lane) race("writes", p, site, "or another reads", s.reader, s.read_line);
        }
        s.write_epoch = epoch, s.write_warp_epoch = warp_epoch, s.writer = self, s.write_line = site.line;
        s.atomic = access == Access::kAtomic, s.written = true;
    }
}

void Machine::check_write(Writer& last, const char* what, int64_t index, Site site) {
    const bool other =
        last.block != g_position.block || (last.thread != g_position.thread && last.epoch == block().epoch);
    if (last.launch == launch_ && other)
        stop(where() + ": race: it writes (" + place(site) + ") element " + std::to_string(index) + " of " + what +
             ", which thread " + std::to_string(last.thread) + " of block " + std::to_string(last.block) +
             " wrote in the same launch at line " + std::to_string(last.line));
    last = {launch_, block().epoch, g_position.block, g_position.thread, site.line};
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

uint32_t launches() { return g_machine.launches(); }

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
void cluster_barrier(Site site) { g_machine.cluster_barrier(site); }
void copy_async(void* to, const void* from, int bytes, Site site) { g_machine.copy_async(to, from, bytes, site); }
void copy_commit() { g_machine.copy_commit(); }
void copy_wait(int groups) { g_machine.copy_wait(groups); }
void mbarrier_init(void* barrier, int arrivals, Site site) { g_machine.mbarrier_init(barrier, arrivals, site); }
void mbarrier_expect(void* barrier, int bytes, Site site) { g_machine.mbarrier_expect(barrier, bytes, site); }
void mbarrier_wait(void* barrier, int parity, Site site) { g_machine.mbarrier_wait(barrier, parity, site); }
void store_async(void* to, const void* from, int bytes, void* barrier, int rank, Site site) {
    g_machine.store_async(to, from, bytes, barrier, rank, site);
}
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
