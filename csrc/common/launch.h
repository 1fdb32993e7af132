// How a CUDA kernel is launched, and the three words of a kernel that g++ cannot read. They exist so that
// tests/cudasim can run the same sources on a CPU.
#pragma once

#ifdef GDBP_CUDASIM
#include "cudasim.h"
// The cudaError of the launch, as an int.
#define GDBP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cudasim::launch(kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
// Lets a kernel have so much dynamic shared memory, of which 48 KB need no asking.
#define GDBP_ALLOW_SHARED(kernel, bytes) 0
// `name`: this block's dynamic shared memory, as a pointer to `type`.
#define GDBP_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cudasim::dynamic_shared())
// A kernel parameter of several kilobytes: read in place, where a plain one would be copied to every
// thread's stack as soon as it is indexed.
#define GDBP_GRID_CONSTANT(...) const __VA_ARGS__&
#else
#include <cuda_runtime.h>
#define GDBP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), int(cudaGetLastError()))
#define GDBP_ALLOW_SHARED(kernel, bytes) \
  int(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
#define GDBP_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define GDBP_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#endif
