// Optimizer states in 8 bits: blocks of numbers that share one scale, the largest magnitude of the block.
// A code c from -127 to 127 stands for scale * (c / 127)^3: cubes put most codes near 0, where the numbers of
// a block are, and reach from the scale down to 5e-7 of it.
#pragma once
#include "common/dtype.h"
#include "common/math.h"
#include "common/random.h"

namespace gdbp::optim {

constexpr int64_t kQuantBlock = 128;

template <class T>
GDBP_HD T decode8(int8_t code, T scale) {
  const T c = T(code);
  return scale * T(1.0 / (127.0 * 127.0 * 127.0)) * (c * c * c);
}

constexpr float kLeastScale = 0x1p-105f;  // of which code 1 is not subnormal

// The scale of a block: its largest magnitude, where that is enough.
GDBP_HD float scale8(float largest) { return largest > 0 ? math::at_least(largest, kLeastScale) : 0.0f; }

// Finite, also for a block of zeros.
GDBP_HD float inverse_scale8(float scale) { return 1 / math::at_least(scale, math::Format<float>::smallest_normal); }

// 127 cbrt(x) for x from 0 to 1, to 1e-4 of it, which is enough to find the nearest code: x g^2 P(x g^3), with a guess
// g at 1 / cbrt(x) from the exponent, which is right to 6 %, and P the best parabola for t^(-2/3) over the t that
// occur.
GDBP_HD float rough_root(float x, float guess) {
  const float square = x * guess * guess, t = square * guess;
  return square * (220.281045f + t * (-121.336627f + t * 26.0606343f));
}
GDBP_HD float rough_root(float x) {
  // In floating point, for vectors have no division of integers.
  return rough_root(x, bit_cast<float>(int32_t(1421400000.0f - float(bit_cast<int32_t>(x)) * (1.0f / 3))));
}

// The seed of the random bits by which a slot's states are rounded, from that of its parameter; 0 for none.
GDBP_HD uint64_t state_seed8(uint64_t seed) { return seed != 0 ? combine_seed(seed, 8) | 1 : 0; }

// The bits for an element of state k of up to four: the same 32, of which each state's begin with others.
GDBP_HD uint32_t bits_of_state(uint32_t random, int k) {
  return k == 0 ? random : random << (8 * k) | random >> (32 - 8 * k);
}

// The nearest code; but never 0 for a number that is not, lest a second moment vanish under its mean.
template <class T>
GDBP_HD int8_t encode8(T x, T inverse_scale) {
  const float share = float(math::abs(x) * inverse_scale);
  const float root = rough_root(share) + 0.5f, least = x != 0 ? 1.0f : 0.0f;
  return int8_t(int32_t(math::copysign(root > least ? root : least, float(x))));
}

// One of the two codes around x, at random, so that the expectation is x (of what is larger than code 1): from the
// nearest one, or one beside it where rough_root is off, to the next on x's side with a probability that is its share
// of the way there. So a decay of a thousandth is not lost, which never reaches another code by itself.
template <class T>
GDBP_HD int8_t encode8(T x, T inverse_scale, uint32_t random) {
  const float share = float(math::abs(x) * inverse_scale), cube = share * (127.0f * 127.0f * 127.0f);
  const float code = float(int32_t(rough_root(share) + 0.5f)), way = cube - code * code * code;
  const float next = code + (way < 0 ? -1.0f : 1.0f);
  const float whole = 3 * code * next + 1;  // between the two cubes
  const float moved = float(random >> 8) * whole < 0x1p24f * math::abs(way) ? next : code;
  const float least = x != 0 ? 1.0f : 0.0f, magnitude = moved > least ? moved : least;
  return int8_t(int32_t(math::copysign(magnitude < 127 ? magnitude : 127.0f, float(x))));
}

}  // namespace gdbp::optim
