// Switching between stacks: a hand-written switch on x86-64 (20 ns), swapcontext elsewhere or with
// MMFAST_EMULATOR_UCONTEXT (ten times slower). AddressSanitizer is told of every switch.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && !defined(MMFAST_EMULATOR_UCONTEXT)
#define MMFAST_EMULATOR_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace mmfast {
namespace emulator {

// What a stopped stack needs to go on.
class Context {
  public:
    // Prepares to run entry(), which must never return, on the stack of `size` bytes from `stack`. `colour` moves its
    // start by a few cache lines, so that the stacks of many fibers do not fall into the same sets of the cache.
    void prepare(void* stack, size_t size, size_t colour, void (*entry)());

    // Stops here (into *this) and goes on with `to`. leaving: this stack is never gone back to.
    void switch_to(Context& to, bool leaving = false);

    // The first thing entry() does.
    static void entered();

  private:
#if defined(MMFAST_EMULATOR_ASSEMBLY)
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
    void* bottom_ = nullptr;
    size_t size_ = 0;
};

}  // namespace emulator
}  // namespace mmfast
