// Random bits that are a function of a seed and a position: the same for any number of threads and any
// order of work, and nothing to store.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace gdbp {

// The finaliser of MurmurHash3 (Appleby): every input bit changes every output bit with probability 1/2.
GDBP_HD uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// A seed from parts that may be small and close together: SplitMix64 (Steele et al., 2014) over each in turn.
GDBP_HD uint64_t combine_seed(uint64_t seed, uint64_t part) {
  uint64_t z = (seed ^ part) + 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// 32 bits for position `index` of the stream `seed`, a number from combine_seed: both its halves must look
// random, else streams would hold the same bits at other positions.
GDBP_HD uint32_t random_bits(uint64_t seed, uint64_t index) {
  return mix(mix(uint32_t(index) + uint32_t(seed)) ^ uint32_t(seed >> 32) ^ uint32_t(index >> 32) * 0x9e3779b9u);
}

// Rounds up with a probability that is the remainder's share of the gap, so that the expectation is x: small
// updates of a bfloat16 number are kept on average, where rounding to nearest loses all of them.
GDBP_HD BFloat16 narrow_stochastic(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + (random & 0xffffu)) >> 16;
  return (bits & 0x7f800000u) == 0x7f800000u ? narrow<BFloat16>(x) : BFloat16{uint16_t(rounded)};
}

}  // namespace gdbp
