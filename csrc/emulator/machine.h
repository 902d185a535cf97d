// The machine that kernels run on: every thread of a block is a fiber with a stack of its own, all of them on one
// thread of the host, switched only where a kernel waits. What a kernel does wrong is reported in a sentence with the
// kernel, block, thread and lines, and ends the launch.
//
// Checked: barriers and warp collectives reached by all who must and at one place; nobody waiting for ever; shared
// memory through a shadow (who wrote and read each element last, since which barrier), so races are seen whatever the
// order; reads of shared memory nobody wrote; bounds and alignment of every access; outputs written, by one thread
// each, within their bounds. Threads run in the natural order or, with a seed, in another; results must not differ.
//
// What is asynchronous completes as late as the program allows or, with an odd seed, at once: a copy when its thread
// waits for its group, a store into another block when the phase of its barrier ends. All blocks of a cluster run
// together; other blocks one after the other.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mmfast {
namespace emulator {

// A place in a kernel's source.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator!=(const Site& other) const { return line != other.line || file != other.file; }
};

struct Shape {
    int threads;
    int64_t blocks;
    int shared_bytes;
    int cluster = 1;  // blocks of a cluster
};

// Where the running thread is. rank: of its block in the cluster.
struct Position {
    int thread;
    int64_t block, blocks;
    int threads, rank, cluster;
};
extern Position g_position;

// Runs body(kernel) on every thread of every block; a status. One launch at a time in a process.
int run(const char* name, const void* kernel, void (*body)(const void* kernel), const Shape& shape);

// The order in which waiting threads go on: 0 is first come, first served; any other seed another random order.
void set_order(uint64_t seed);
uint64_t order();
// how many launches there were in this process
uint32_t launches();

// Ends the running launch with a message: where the running thread is, then the printf-like text.
[[noreturn]] __attribute__((format(printf, 1, 2))) void report(const char* format, ...);

void barrier(Site site);

// Waits for all lanes in `mask`, then combine(slots, mask) is called once, slots[lane] being what each lane gave.
using Combine = void (*)(void* const* slots, uint32_t mask);
void collective(Combine combine, void* slot, uint32_t mask, Site site);
// After this the lanes of a whole warp see each other's writes to shared memory.
void warp_barrier(uint32_t mask, Site site);

// n * size bytes of the block's shared memory from `used` on, which is moved behind them.
void* cut_shared(uint32_t& used, int n, int size);
enum class Access { kRead, kWrite, kAtomic };
void check_shared(const void* p, int size, Access access, Site site);

// All threads of all blocks of the cluster meet.
void cluster_barrier(Site site);

// Copies into shared memory that go on while the thread does: nobody may touch their target before the thread has
// waited until at most `groups` of its newest committed groups are unfinished.
void copy_async(void* to, const void* from, int bytes, Site site);
void copy_commit();
void copy_wait(int groups);

// A barrier in shared memory that counts arrivals and bytes. Its phases alternate in parity, the first is 0; a phase
// ends when `arrivals` threads have arrived and as many bytes were stored as they expect.
void mbarrier_init(void* barrier, int arrivals, Site site);
void mbarrier_expect(void* barrier, int bytes, Site site);
void mbarrier_wait(void* barrier, int parity, Site site);
// Stores into shared memory of the cluster's block `rank`, at the same place as `to` in this block's, and counts the
// bytes at the barrier of that block that is in the same place as `barrier`.
void store_async(void* to, const void* from, int bytes, void* barrier, int rank, Site site);

// Who wrote an element of an output last.
struct Writer {
    uint32_t launch;  // 0: nobody
    uint32_t epoch;   // barriers passed by the writer's block
    int64_t block;
    int thread;
    int line;
};
void check_write(Writer& last, const char* what, int64_t index, Site site);

// value * (1 + e), |e| <= error: what an approximate instruction may give. The same for the same value.
float perturbed(float value, float argument, float error);

// Keeps a message for mmfast_last_error() and returns MMFAST_CUDA_ERROR.
__attribute__((format(printf, 1, 2))) int fail_with(const char* format, ...);

}  // namespace emulator
}  // namespace mmfast
