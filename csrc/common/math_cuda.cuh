// Elementary functions where their result ends in an element of T: as exact as that can tell.
#pragma once
#include "common/math.h"

namespace gdbp::cuda {

template <class T>
__device__ __forceinline__ Compute<T> exp_fast(Compute<T> x) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    // The rounding of the argument shows in the 20th bit, of a result that is worth something next to 1.
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
  }
#endif
  return math::exp(x);
}

}  // namespace gdbp::cuda
