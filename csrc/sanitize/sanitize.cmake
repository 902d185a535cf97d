# `cmake -DMMFAST_SANITIZE=ON`: two executables.
# The emulator and every CUDA kernel with AddressSanitizer and UBSan, as an executable of
# its own that reads case files, so that nothing needs to be preloaded into Python. Its stacks are switched by
# swapcontext, the way of processors other than x86-64.
file(GLOB MMFAST_SANITIZED_EMULATOR csrc/emulator/*.cpp)
list(FILTER MMFAST_SANITIZED_EMULATOR EXCLUDE REGEX "/selftest\\.cpp$")
add_executable(emulator_sanitized
    csrc/sanitize/emulated.cpp csrc/sanitize/emulated_rnn.cpp csrc/sanitize/emulated_convolution.cpp
    ${MMFAST_SANITIZED_EMULATOR})
target_include_directories(emulator_sanitized PRIVATE csrc)
target_compile_definitions(emulator_sanitized PRIVATE MMFAST_EMULATOR_UCONTEXT MMFAST_ISA=baseline)
# -O0: checked, the templates take ten times as long to optimise as to run
target_compile_options(emulator_sanitized PRIVATE
    -O0 -g1 -Wall -Wextra -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all)
target_link_options(emulator_sanitized PRIVATE -fsanitize=address,undefined)

# The CPU kernels, for each instruction set that this processor may have; random calls instead of case files.
set(MMFAST_SANITIZED_baseline "")
set(MMFAST_SANITIZED_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND MMFAST_SANITIZED_ISAS avx2 avx512)
    set(MMFAST_SANITIZED_avx2 -mavx2 -mfma -mf16c)
    set(MMFAST_SANITIZED_avx512 ${MMFAST_SANITIZED_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
endif()
file(GLOB MMFAST_SANITIZED_CPU csrc/cpu/*.cpp)
list(FILTER MMFAST_SANITIZED_CPU EXCLUDE REGEX "/entry\\.cpp$")
find_package(OpenMP COMPONENTS CXX)
foreach(isa IN LISTS MMFAST_SANITIZED_ISAS)
    add_executable(cpu_sanitized_${isa}
        csrc/sanitize/cpu.cpp csrc/sanitize/cpu_rnn.cpp csrc/sanitize/cpu_convolution.cpp ${MMFAST_SANITIZED_CPU})
    target_include_directories(cpu_sanitized_${isa} PRIVATE csrc)
    target_compile_definitions(cpu_sanitized_${isa} PRIVATE MMFAST_ISA=${isa})
    target_compile_options(cpu_sanitized_${isa} PRIVATE
        ${MMFAST_SANITIZED_${isa}} -O1 -g1 -Wall -Wextra -Wno-psabi -fno-omit-frame-pointer
        -fsanitize=address,undefined -fno-sanitize-recover=all)
    target_link_options(cpu_sanitized_${isa} PRIVATE -fsanitize=address,undefined)
    if(OpenMP_CXX_FOUND)
        target_link_libraries(cpu_sanitized_${isa} PRIVATE OpenMP::OpenMP_CXX)
    endif()
endforeach()
