// The C entry points of the CPU kernels: each hands its call to the variant compiled for the instruction set in use,
// which CPUID decides when the library is loaded. Compiled for the baseline.
#include <pthread.h>
#include <string.h>

#include "mmfast.h"

#ifdef MMFAST_HAS_avx512
#define MMFAST_FOR_AVX512(X) X(avx512)
#else
#define MMFAST_FOR_AVX512(X)
#endif
#ifdef MMFAST_HAS_avx2
#define MMFAST_FOR_AVX2(X) X(avx2)
#else
#define MMFAST_FOR_AVX2(X)
#endif
// every instruction set compiled in, the lowest first
#define MMFAST_FOR_EACH_ISA(X) X(baseline) MMFAST_FOR_AVX2(X) MMFAST_FOR_AVX512(X)

// every kernel: name, arguments
#define MMFAST_FOR_EACH_KERNEL(X)                    \
    X(adversarial_forward, mmfast_adversarial_args)  \
    X(adversarial_backward, mmfast_adversarial_args) \
    X(rnn_forward, mmfast_rnn_forward_args)          \
    X(rnn_backward, mmfast_rnn_backward_args)        \
    X(rnn_cell, mmfast_rnn_cell_args)                \
    X(product, mmfast_product_args)                  \
    X(normalize_forward, mmfast_normalize_args)      \
    X(normalize_backward, mmfast_normalize_args)     \
    X(activation_forward, mmfast_activation_args)    \
    X(activation_backward, mmfast_activation_args)   \
    X(phases_forward, mmfast_conv_transpose_args)    \
    X(phases_backward, mmfast_conv_transpose_args)   \
    X(gather_forward, mmfast_conv_transpose_args)    \
    X(gather_backward, mmfast_conv_transpose_args)   \
    X(squares_forward, mmfast_conv_transpose_args)   \
    X(squares_backward, mmfast_conv_transpose_args)  \
    X(depthwise_forward, mmfast_conv_transpose_args) \
    X(depthwise_backward, mmfast_conv_transpose_args)

namespace mmfast {

#define MMFAST_DECLARE_KERNEL(name, args) int name(const args&);
#define MMFAST_DECLARE_ISA(isa)                   \
    namespace isa {                               \
    MMFAST_FOR_EACH_KERNEL(MMFAST_DECLARE_KERNEL) \
    }
MMFAST_FOR_EACH_ISA(MMFAST_DECLARE_ISA)

namespace {

struct Isa {
    const char* name;
#define MMFAST_MEMBER(name, args) int (*name)(const args&);
    MMFAST_FOR_EACH_KERNEL(MMFAST_MEMBER)
};

const Isa kIsas[] = {
#define MMFAST_ADDRESS_baseline(name, args) baseline::name,
#define MMFAST_ADDRESS_avx2(name, args) avx2::name,
#define MMFAST_ADDRESS_avx512(name, args) avx512::name,
#define MMFAST_ROW(isa) {#isa, MMFAST_FOR_EACH_KERNEL(MMFAST_ADDRESS_##isa)},
    MMFAST_FOR_EACH_ISA(MMFAST_ROW)};

bool supported(const char* name) {
#if defined(__x86_64__)
    if (!strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!strcmp(name, "avx512"))
        return supported("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !strcmp(name, "baseline");
}

const Isa* best_isa() {
    const Isa* best = kIsas;
    for (const Isa& isa : kIsas)
        if (supported(isa.name)) best = &isa;
    return best;
}

const Isa* g_isa = best_isa();
bool g_forked = false;
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

}  // namespace

bool forked() { return g_forked; }

thread_local const char* g_last_error = "";

int fail(int status, const char* message) {
    g_last_error = message;
    return status;
}

namespace {
int checked(int status) {
    switch (status) {
        case MMFAST_OK:
        case MMFAST_DECLINED:
            return status;
        case MMFAST_OUT_OF_MEMORY:
            return fail(status, "the kernel could not allocate its scratch memory");
        default:
            return fail(status, "the kernel was given an argument it does not take");
    }
}
}  // namespace

}  // namespace mmfast

const char* mmfast_last_error(void) { return mmfast::g_last_error; }

const char* mmfast_supported_isas(void) {
    static char names[64];
    names[0] = 0;
    for (const mmfast::Isa& isa : mmfast::kIsas) {
        if (!mmfast::supported(isa.name)) continue;
        if (names[0]) strcat(names, " ");
        strcat(names, isa.name);
    }
    return names;
}

const char* mmfast_isa(void) { return mmfast::g_isa->name; }

int mmfast_is_intel(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel") != 0;
#else
    return 0;
#endif
}

int mmfast_set_isa(const char* name) {
    for (const mmfast::Isa& isa : mmfast::kIsas) {
        if (strcmp(isa.name, name) || !mmfast::supported(name)) continue;
        mmfast::g_isa = &isa;
        return MMFAST_OK;
    }
    return mmfast::fail(MMFAST_INVALID_ARGUMENT, "this instruction set is not compiled in, or not of this processor");
}

#define MMFAST_ENTRY(name, args) \
    int mmfast_cpu_##name(const args* a) { return mmfast::checked(mmfast::g_isa->name(*a)); }
MMFAST_FOR_EACH_KERNEL(MMFAST_ENTRY)
