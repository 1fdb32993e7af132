// A word of codes (blockwise8.h): those of a thread's elements. A quantised block is what a warp holds, so that its
// lanes find the scale among themselves. Numbers become integers, and these numbers, by the bits of a sum with a power
// of two: a GPU converts a quarter as many, and there were more conversions than anything else.
#pragma once
#include "common/reduce_cuda.cuh"
#include "optim/blockwise8.h"

namespace gdbp::optim {
namespace {

constexpr int kWordCodes = 4;
static_assert(kQuantBlock == cuda::kWarp * kWordCodes);

// decode8 of each.
template <class T>
__device__ __forceinline__ void decode_word(uint32_t codes, float scale, T (&to)[kWordCodes]) {
  const T unit = T(scale) * T(1.0 / (127.0 * 127.0 * 127.0));
#pragma unroll
  for (int k = 0; k < kWordCodes; ++k) {
#ifdef __CUDA_ARCH__
    const uint32_t sum = __byte_perm(codes ^ 0x80808080u, 0x4b000000u, 0x7440u + k);
#else
    const uint32_t sum = ((codes ^ 0x80808080u) >> (8 * k) & 0xffu) | 0x4b000000u;
#endif
    const T c = T(bit_cast<float>(sum) - (0x1p23f + 128));
    to[k] = unit * (c * c * c);
  }
}

// The scale of the warp's block, as it is stored: NaN where there is one among its numbers, or an infinity.
template <class T>
__device__ __forceinline__ float warp_scale8(const T (&x)[kWordCodes], int count) {
  constexpr uint32_t infinity = 0x7f800000;
  // As integers, in whose order what is not a number comes after all numbers.
  uint32_t most = 0;
#pragma unroll
  for (int k = 0; k < kWordCodes; ++k) {
    const uint32_t bits = bit_cast<uint32_t>(float(math::abs(x[k])));
    most = k < count && bits > most ? bits : most;
  }
#ifdef __CUDA_ARCH__
  most = __reduce_max_sync(cuda::kAllLanes, most);
#else
  most = cuda::warp_reduce(most, cuda::Max{});
#endif
  return most >= infinity ? bit_cast<float>(0x7fc00000u) : scale8(bit_cast<float>(most));
}

// The code nearest to x, or at random with these bits, in 8 bits of two's complement.
template <class T>
__device__ __forceinline__ uint32_t code_of(T x, T inverse_scale) {
  const float share = float(math::abs(x) * inverse_scale), least = x != 0 ? 1.0f : 0.0f;
  const auto third = uint32_t(uint64_t(bit_cast<uint32_t>(share)) * 0x55555555u >> 32);
  const float root = ::fmaxf(rough_root(share, bit_cast<float>(1421400000u - third)), least);
  // Beyond 2^23 a float's last bit is 1.
  return bit_cast<uint32_t>(math::copysign(root, float(x)) + 0x1.8p23f) & 0xffu;
}
template <class T>
__device__ __forceinline__ uint32_t code_of(T x, T inverse_scale, uint32_t random) {
  return uint8_t(encode8(x, inverse_scale, random));
}

// Of the elements from `at` on, state `state` of their tensor; `seed`: 0 to round to nearest. Where the scale is NaN so
// are they all.
template <class T>
__device__ __forceinline__ uint32_t encode_word(const T (&x)[kWordCodes], float scale, int64_t at, uint64_t seed,
                                                int state) {
  if (scale != scale) return 0x7f7f7f7fu;
  const T inverse = T(inverse_scale8(scale));
  uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kWordCodes; ++k) {
    const uint32_t code =
        seed != 0 ? code_of(x[k], inverse, bits_of_state(random_bits(seed, at + k), state)) : code_of(x[k], inverse);
    word |= code << (8 * k);
  }
  return word;
}

}  // namespace
}  // namespace gdbp::optim
