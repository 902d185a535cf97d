// One parallel loop. The number of threads is the caller's (torch.get_num_threads()), and results never depend on it.
#pragma once
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

}  // namespace MMFAST_ISA
}  // namespace mmfast
