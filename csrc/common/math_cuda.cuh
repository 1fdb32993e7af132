// Elementary functions where what they are for ends in an element of T: as exact as that can tell.
#pragma once
#include "common/launch.h"
#include "common/math.h"

namespace gdbp::cuda {

// exp(x) in three instructions: the rounding of the argument shows in the 20th bit, of a result that is worth something
// next to 1. Below 2^-126 it is 0.
__device__ __forceinline__ float exp_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return math::exp(x);
#endif
}

// 1 / x to an ulp in one instruction, where a division has ten.
__device__ __forceinline__ float inverse_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

template <class T>
__device__ __forceinline__ Compute<T> exp_fast(Compute<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp_approx(x);
  } else {
    return math::exp(x);
  }
}

}  // namespace gdbp::cuda
