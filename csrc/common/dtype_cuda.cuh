// Elements in registers: a thread moves `n` neighbouring elements at a time, in 16-byte accesses where
// `vectors` says that the address allows it and one by one where it does not. Which elements a thread
// holds is the same in both cases, so results do not depend on alignment.
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "common/launch.h"

#ifdef __CUDA_ARCH__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gdbp::cuda {

// Elements of T in one 16-byte access.
template <class T>
constexpr int kWidth = 16 / int(sizeof(T));

// One access of the hardware: 16 bytes, or 8 where n elements of T are no more.
template <class T, int n>
using Access = std::conditional_t<n * sizeof(T) % 16 == 0, uint4, uint2>;

GDBP_HD bool aligned(const void* pointer, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % uintptr_t(bytes) == 0;
}

// Whether n neighbouring elements can be read and written at once.
template <int n, class T>
GDBP_HD bool aligned_for(const T* pointer) {
  return aligned(pointer, n * sizeof(T) < 16 ? n * sizeof(T) : 16);
}

// dispatch() of dtype.h on the device, outside of loops: a branch between loads would have each wait for the last.
template <class F>
__device__ __forceinline__ void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float64: return f(Type<double>{});
    case Dtype::float32: return f(Type<float>{});
    case Dtype::bfloat16: return f(Type<BFloat16>{});
    default: return f(Type<Float16>{});
  }
}
// The same where it is not float64.
template <class F>
__device__ __forceinline__ void for_narrow_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(Type<float>{});
    case Dtype::bfloat16: return f(Type<BFloat16>{});
    default: return f(Type<Float16>{});
  }
}

// The bit manipulations of dtype.h in one instruction, where there is one.
template <class To>
__device__ __forceinline__ To narrow_fast(Compute<To> x) {
  return narrow<To>(x);
}
template <class From>
__device__ __forceinline__ Compute<From> widen_fast(From x) {
  return widen(x);
}
#ifdef __CUDA_ARCH__
template <>
__device__ __forceinline__ BFloat16 narrow_fast<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Float16 narrow_fast<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ float widen_fast<Float16>(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
#endif

template <class T, int n>
struct alignas(sizeof(Access<T, n>)) Packed {
  static_assert(n * sizeof(T) % sizeof(uint2) == 0);
  T at[n];
};

// Reads the first `count` of n elements; the others become 0.
template <int n, class T, class C>
__device__ __forceinline__ void load(const T* from, int count, bool vectors, C (&to)[n]) {
  if (vectors && count == n) {
    const Packed<T, n> packed = *reinterpret_cast<const Packed<T, n>*>(from);
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = C(widen_fast(packed.at[k]));
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = k < count ? C(widen_fast(from[k])) : C(0);
  }
}

// f(at, n elements) for those from `at` on and in steps, as long as `ahead` of them are there to be read before the
// first is waited for; where the next are. Vectors must be allowed.
template <int ahead, int n, class T, class F>
__device__ __forceinline__ int64_t for_vectors(const T* from, int64_t at, int64_t step, int64_t end, const F& f) {
  for (; at + (ahead - 1) * step + n <= end; at += ahead * step) {
    Packed<T, n> packed[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) packed[i] = *reinterpret_cast<const Packed<T, n>*>(from + at + i * step);
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      Compute<T> x[n];
#pragma unroll
      for (int k = 0; k < n; ++k) x[k] = widen_fast(packed[i].at[k]);
      f(at + i * step, x);
    }
  }
  return at;
}

// Writes the first `count` of n elements.
template <int n, class T, class C>
__device__ __forceinline__ void store(T* to, int count, bool vectors, const C (&from)[n]) {
  if (vectors && count == n) {
    Packed<T, n> packed;
#pragma unroll
    for (int k = 0; k < n; ++k) packed.at[k] = narrow_fast<T>(Compute<T>(from[k]));
    // A plain assignment would be merged with the other branch, and come out as n stores.
    using A = Access<T, n>;
#pragma unroll
    for (int k = 0; k < int(sizeof(packed) / sizeof(A)); ++k) {
      __stwb(reinterpret_cast<A*>(to) + k, reinterpret_cast<const A*>(&packed)[k]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (k < count) to[k] = narrow_fast<T>(Compute<T>(from[k]));
    }
  }
}

}  // namespace gdbp::cuda
