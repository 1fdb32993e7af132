// Optimizer states in 8 bits: blocks of numbers that share one scale, the largest magnitude of the block.
// A code c from -127 to 127 stands for scale * (c / 127)^3: cubes put most codes near 0, where the numbers of
// a block are, and reach from the scale down to 5e-7 of it.
#pragma once
#include "common/dtype.h"
#include "common/math.h"

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
GDBP_HD float rough_root(float x) {
  const float g = bit_cast<float>(int32_t(1421400000.0f - float(bit_cast<int32_t>(x)) * (1.0f / 3)));
  const float square = x * g * g, t = square * g;
  return square * (220.281045f + t * (-121.336627f + t * 26.0606343f));
}

// The nearest code; but never 0 for a number that is not, lest a second moment vanish under its mean.
template <class T>
GDBP_HD int8_t encode8(T x, T inverse_scale) {
  const float share = float(math::abs(x) * inverse_scale);
  const float root = rough_root(share) + 0.5f, least = x != 0 ? 1.0f : 0.0f;
  return int8_t(int32_t(math::copysign(root > least ? root : least, float(x))));
}

}  // namespace gdbp::optim
