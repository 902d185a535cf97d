#include "emulator/context.h"

#if defined(MMFAST_EMULATOR_ASSEMBLY)
// void mmfast_emulator_switch(void** save, void* next): pushes what a callee must keep (rbx, rbp, r12 to r15), stores
// the stack pointer, takes the other one and pops. Floating-point control words are the process's and stay.
extern "C" void mmfast_emulator_switch(void** save, void* next);
asm(R"(
.text
.hidden mmfast_emulator_switch
.globl mmfast_emulator_switch
.type mmfast_emulator_switch, @function
mmfast_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mmfast_emulator_switch, . - mmfast_emulator_switch
)");
#endif

namespace mmfast {
namespace emulator {

namespace {
#if defined(__SANITIZE_ADDRESS__)
// of the stack that was left, for the one that is entered for the first time
[[maybe_unused]] void* g_bottom = nullptr;
[[maybe_unused]] size_t g_size = 0;
Context* g_left = nullptr;
#endif
}  // namespace

void Context::prepare(void* stack, size_t size, size_t colour, void (*entry)()) {
    bottom_ = stack;
    size_ = size;
#if defined(MMFAST_EMULATOR_ASSEMBLY)
    const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + size - 64 * colour) & ~uintptr_t(15);
    // a called function finds its stack pointer 8 below a multiple of 16, a return address there
    uintptr_t* slot = reinterpret_cast<uintptr_t*>(top - 8);
    *slot = 0;
    *--slot = reinterpret_cast<uintptr_t>(entry);
    for (int kept = 0; kept < 6; ++kept) *--slot = 0;
    stack_pointer_ = slot;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size - 64 * colour;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
}

void Context::switch_to(Context& to, bool leaving) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    g_left = this;
    __sanitizer_start_switch_fiber(leaving ? nullptr : &fake, to.bottom_, to.size_);
#else
    (void)leaving;
#endif
#if defined(MMFAST_EMULATOR_ASSEMBLY)
    mmfast_emulator_switch(&stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake, &bottom, &size);
#endif
}

void Context::entered() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    // the first fiber is entered from the thread's own stack, which only now is known
    if (g_left && !g_left->bottom_) {
        g_left->bottom_ = const_cast<void*>(bottom);
        g_left->size_ = size;
    }
#endif
}

}  // namespace emulator
}  // namespace mmfast
