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

// Cube root of a number from 1e-9 to 1, to 6e-4, which is enough to find the nearest of 127 codes, and without a
// division: a guess at 1 / cbrt(x) from the exponent, and one step of third order.
GDBP_HD float rough_cbrt(float x) {
  const float guess = bit_cast<float>(int32_t(1419967116.0f - float(bit_cast<int32_t>(x)) * (1.0f / 3)));
  const float rest = 1 - x * guess * guess * guess;
  const float inverse = guess + guess * rest * (1.0f / 3 + rest * (2.0f / 9));
  return x * inverse * inverse;
}

// The nearest code; but never 0 for a number that is not, lest a second moment vanish under its mean.
template <class T>
GDBP_HD int8_t encode8(T x, T inverse_scale) {
  const float share = float(math::abs(x) * inverse_scale);
  // Added, not compared: 1e-9 is less than a twentieth of the least code. At most 127.6, as share is at most 1.
  const float root = 127 * rough_cbrt(share + 1e-9f) + 0.5f;
  const float magnitude = root < 1 ? 1.0f : root;
  return int8_t(int32_t(math::copysign(share > 0 ? magnitude : 0.0f, float(x))));
}

}  // namespace gdbp::optim
