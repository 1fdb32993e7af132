// Whole blocks of 8-bit states, to numbers and back.
#pragma once
#include <algorithm>
#include <array>
#include <limits>

#include "common/instruction_set.h"
#include "optim/blockwise8.h"

#if defined(GDBP_HAS_CLONES)
#include <immintrin.h>
#endif

namespace gdbp::optim {

template <class T>
GDBP_CLONES void decode_block(const int8_t* from, float scale, T* to) {
  for (int64_t i = 0; i < kQuantBlock; ++i) to[i] = decode8(from[i], T(scale));
}

// How blocks are rounded: with a seed, which is not 0, at random, by the position of their first element; else to
// nearest.
struct Rounding {
  uint64_t seed;
  int64_t position;
};

// k: which of its tensor's states it is.
template <bool at_random, class T>
GDBP_CLONES void encode_block(const T* from, int8_t* to, float* scale, const Rounding rounding, int k) {
  // Magnitudes are compared as integers, in whose order what is not a number comes after all numbers.
  using Bits = typename math::Format<T>::Bits;
  Bits most = 0;
  for (int64_t i = 0; i < kQuantBlock; ++i) most = std::max(most, bit_cast<Bits>(math::abs(from[i])));
  const T largest = bit_cast<T>(most);
  // A number that is not finite makes its block so, as it must stay visible.
  if (!(largest <= T(std::numeric_limits<float>::max()))) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(to, kQuantBlock, int8_t(127));
    return;
  }
  // As stored: decoding and encoding must agree on it.
  *scale = scale8(float(largest));
  const T inverse = T(inverse_scale8(*scale));
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    if constexpr (at_random) {
      const uint32_t random = random_bits(rounding.seed, uint64_t(rounding.position + i));
      to[i] = encode8(from[i], inverse, bits_of_state(random, k));
    } else {
      to[i] = encode8(from[i], inverse);
    }
  }
}

#if defined(GDBP_HAS_CLONES)
// With AVX-512, where a table of 32 numbers is one instruction: 127 cbrt(x) is such a number for the exponent times a
// parabola of the significand, right to 7e-4 of it, a twelfth of a code at most. Half the multiplications of
// rough_root.
constexpr std::array<float, 32> kRootsOfPowers = [] {
  std::array<float, 32> roots{};
  double root = 127;  // of 2^0, down to 2^-31, under the exponent's last five bits
  for (int k = 0; k < 32; ++k, root *= 0.79370052598409974) roots[(127 - k) % 32] = float(root);
  return roots;
}();

#define GDBP_WIDE __attribute__((target("arch=x86-64-v4")))
constexpr int kAndOr = 0xea;  // a & b | c, of three vectors

// mix() and random_bits() of 16 positions beside one another, of which the first has index `index`.
GDBP_WIDE inline __m512i mix_wide(__m512i x) {
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(int32_t(0x85ebca6bu)));
  x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 13)), _mm512_set1_epi32(int32_t(0xc2b2ae35u)));
  return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}
GDBP_WIDE inline __m512i random_bits_wide(uint64_t seed, uint64_t index) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = mix_wide(_mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(uint32_t(index) + uint32_t(seed)))));
  return mix_wide(
      _mm512_xor_si512(first, _mm512_set1_epi32(int32_t(uint32_t(seed >> 32) ^ uint32_t(index >> 32) * 0x9e3779b9u))));
}

// As encode8 with random bits: where from the nearest code to a root it goes to.
GDBP_WIDE inline __m512 moved_wide(__m512 root, __m512 x, __m512 inverse, __m512i random) {
  const __m512i sign = _mm512_set1_epi32(int32_t(0x80000000)), one = _mm512_set1_epi32(0x3f800000);
  const __m512 cube = _mm512_abs_ps(_mm512_mul_ps(x, _mm512_mul_ps(inverse, _mm512_set1_ps(127.0f * 127.0f * 127.0f))));
  const __m512 code = _mm512_roundscale_ps(root, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 way = _mm512_fnmadd_ps(_mm512_mul_ps(code, code), code, cube);
  const __m512i side = _mm512_ternarylogic_epi32(_mm512_castps_si512(way), sign, one, kAndOr);
  const __m512 next = _mm512_add_ps(code, _mm512_castsi512_ps(side));
  // In 2^24 parts, as the random number.
  const __m512 whole =
      _mm512_fmadd_ps(_mm512_mul_ps(code, _mm512_set1_ps(3 * 0x1p-24f)), next, _mm512_set1_ps(0x1p-24f));
  const __m512 of_whole = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(random, 8)), whole);
  const __mmask16 goes = _mm512_cmp_ps_mask(of_whole, _mm512_abs_ps(way), _CMP_LT_OQ);
  const __m512 moved = _mm512_mask_mov_ps(code, goes, next);
  return _mm512_min_ps(_mm512_max_ps(moved, _mm512_set1_ps(1)), _mm512_set1_ps(127));
}

// The blocks of several states, one beside the other: while the largest number of one is being found, and its inverse,
// the others keep the processor busy. False, and nothing written, if a number is not finite.
template <bool at_random, int count>
GDBP_WIDE bool encode_wide(const float* const* from, int8_t* const* to, float* const* scale, const Rounding& rounding) {
  constexpr int kLanes = 16;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), mantissa = _mm512_set1_epi32(0x007fffff);
  const __m512i one = _mm512_set1_epi32(0x3f800000), sign = _mm512_set1_epi32(int32_t(0x80000000));
  const __m512 low = _mm512_loadu_ps(kRootsOfPowers.data()), high = _mm512_loadu_ps(kRootsOfPowers.data() + kLanes);
  const __m512 least = _mm512_set1_ps(4.882e-7f);  // code 1, for all that is not 0
  float largest[count];
  for (int k = 0; k < count; ++k) {
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < kQuantBlock; i += kLanes)
      most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(from[k] + i)));
    largest[k] = bit_cast<float>(_mm512_reduce_max_epu32(most));
  }
  for (int k = 0; k < count; ++k)
    if (!(largest[k] <= std::numeric_limits<float>::max())) return false;
  __m512 inverse[count];
  for (int k = 0; k < count; ++k) {
    *scale[k] = scale8(largest[k]);
    inverse[k] = _mm512_set1_ps(inverse_scale8(*scale[k]));
  }
  for (int i = 0; i < kQuantBlock; i += kLanes) {
    __m512i random = _mm512_setzero_si512();
    if constexpr (at_random) random = random_bits_wide(rounding.seed, uint64_t(rounding.position + i));
    for (int k = 0; k < count; ++k) {
      const __m512 x = _mm512_loadu_ps(from[k] + i);
      // The larger magnitude of the two, with the first one's sign.
      const __m512i share = _mm512_castps_si512(_mm512_range_ps(_mm512_mul_ps(x, inverse[k]), least, 3));
      const __m512 power = _mm512_permutex2var_ps(low, _mm512_srli_epi32(share, 23), high);
      const __m512 s = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(share, mantissa, one, kAndOr));
      const __m512 line = _mm512_fmadd_ps(_mm512_set1_ps(-0.06031974f), s, _mm512_set1_ps(0.43944205f));
      __m512 root = _mm512_mul_ps(power, _mm512_fmadd_ps(line, s, _mm512_set1_ps(0.62151402f)));
      if constexpr (at_random)
        root = moved_wide(root, x, inverse[k], _mm512_rolv_epi32(random, _mm512_set1_epi32(8 * k)));
      const __m512i code = _mm512_ternarylogic_epi32(share, sign, _mm512_castps_si512(root), kAndOr);
      const __mmask16 any = _mm512_test_epi32_mask(_mm512_castps_si512(x), magnitude);
      const __m512i rounded = _mm512_maskz_cvtps_epi32(any, _mm512_castsi512_ps(code));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to[k] + i), _mm512_cvtepi32_epi8(rounded));
    }
  }
  return true;
}

inline const bool kWide = x86_64_level() == 4;
#endif

// One block of each of `count` states.
template <bool at_random, int count, class T>
void encode_blocks(const T* const* from, int8_t* const* to, float* const* scale, const Rounding& rounding) {
#if defined(GDBP_HAS_CLONES)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (kWide && encode_wide<at_random, count>(from, to, scale, rounding)) return;
  }
#endif
  for (int k = 0; k < count; ++k) encode_block<at_random>(from[k], to[k], scale[k], rounding, k);
}

}  // namespace gdbp::optim
