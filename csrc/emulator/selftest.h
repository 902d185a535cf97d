// Small kernels that prove the emulator: each is right, or carries one planted bug that must be reported.
#pragma once

namespace mmfast {
namespace emulator {

struct Selftest {
    const char* name;
    const char* bug;  // the planted one; "" for the right kernel
    int (*run)();     // a status
};

// All of them; the last has a null name.
extern const Selftest kSelftests[];

}  // namespace emulator
}  // namespace mmfast
