// One parallel loop. The number of threads is the caller's (torch.get_num_threads()), and results never depend on it.
#pragma once
#include <sched.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/simd.h"

namespace mmfast {

// True in a process forked after a parallel region (a DataLoader worker): libgomp's threads do not survive a fork and a
// new region would wait for them for ever, so such a process runs every loop on its own thread. Defined in entry.cpp.
bool forked();

namespace MMFAST_ISA {

// body(i) for 0 <= i < count, in any order, on up to `threads` threads.
template <typename Body>
inline void parallel_for(int threads, int64_t count, const Body& body) {
#ifdef _OPENMP
    if (threads > count) threads = int(count);
    if (threads > 1 && !forked() && !omp_in_parallel()) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#else
    (void)threads;
#endif
    for (int64_t i = 0; i < count; ++i) body(i);
}

// As parallel_for; the status of a body that failed, or 0.
template <typename Body>
inline int parallel_status(int threads, int64_t count, const Body& body) {
    int status = 0;
    parallel_for(threads, count, [&](int64_t i) {
        if (const int found = body(i)) __atomic_store_n(&status, found, __ATOMIC_RELAXED);
    });
    return status;
}

// body(i, count) for 0 <= i < count, all at the same time, on `count` threads: as many as asked for, or 1.
template <typename Body>
inline void parallel_team(int threads, const Body& body) {
#ifdef _OPENMP
    if (threads > 1 && !forked() && !omp_in_parallel()) {
        bool whole = false;
#pragma omp parallel num_threads(threads)
        {
            if (omp_get_num_threads() == threads) {
                body(omp_get_thread_num(), threads);
                if (omp_get_thread_num() == 0) whole = true;
            }
        }
        if (whole) return;
    }
#else
    (void)threads;
#endif
    body(0, 1);
}

// Where the threads of a team wait for each other, once a step. They spin, for a step is microseconds long; after some
// thousand turns they yield, for the thread that is late may be waiting for this core.
class Barrier {
  public:
    void wait(int count) {
        if (count == 1) return;
        const int generation = __atomic_load_n(&generation_, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == count) {
            __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turn = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation; ++turn)
            turn < 4000 ? pause() : yield();
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    static void yield() { sched_yield(); }

    alignas(64) int arrived_ = 0;
    alignas(64) int generation_ = 0;
};

}  // namespace MMFAST_ISA
}  // namespace mmfast
