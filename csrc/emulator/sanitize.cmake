# `cmake -DMMFAST_SANITIZE=ON`: the emulator and every CUDA kernel with AddressSanitizer and UBSan, as an executable of
# its own that reads case files, so that nothing needs to be preloaded into Python. Its stacks are switched by
# swapcontext, the way of processors other than x86-64.
add_executable(emulator_sanitized
    csrc/emulator/sanitized_main.cpp csrc/emulator/machine.cpp csrc/emulator/context.cpp csrc/emulator/adversarial.cpp)
target_include_directories(emulator_sanitized PRIVATE csrc)
target_compile_definitions(emulator_sanitized PRIVATE MMFAST_EMULATOR_UCONTEXT)
target_compile_options(emulator_sanitized PRIVATE
    -O1 -g1 -Wall -Wextra -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all)
target_link_options(emulator_sanitized PRIVATE -fsanitize=address,undefined)
