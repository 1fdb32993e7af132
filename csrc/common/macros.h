// Compiler vocabulary: the few words that differ between g++, nvcc and the CUDA simulator.
#pragma once

// A function that exists on the host and on the device. It must be inlined: a call would leave the
// instruction set that the surrounding loop was compiled for.
#if defined(__CUDACC__)
#define GDBP_HD __host__ __device__ __forceinline__
#else
#define GDBP_HD inline __attribute__((always_inline))
#endif

#define GDBP_RESTRICT __restrict__

// Marks a CPU loop that is compiled once per instruction set; the loader picks the best at run time.
// -march=native would crash on another machine; three copies of a small loop cost a few kilobytes.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GDBP_HAS_CLONES
#define GDBP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GDBP_CLONES
#endif
