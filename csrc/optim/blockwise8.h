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

// Cube root of a number in [0, 1] to 1e-4, which is enough to find the nearest of 127 codes: a guess from the
// exponent, and one step of Halley's method.
GDBP_HD float rough_cbrt(float x) {
  const float guess = bit_cast<float>(int32_t(float(bit_cast<int32_t>(x)) * (1.0f / 3) + 709921077.0f));
  const float cube = guess * guess * guess;
  return guess * (cube + 2 * x) / (2 * cube + x);
}

// The nearest code; but never 0 for a number that is not, lest a second moment vanish under its mean.
template <class T>
GDBP_HD int8_t encode8(T x, T inverse_scale) {
  const float share = float(math::abs(x) * inverse_scale);
  const float root = 127 * rough_cbrt(share) + 0.5f;
  const int32_t code = int32_t(root < 1 ? 1.0f : root > 127 ? 127.0f : root);
  const int32_t magnitude = share > 0 ? code : 0;
  return int8_t(x < 0 ? -magnitude : magnitude);
}

}  // namespace gdbp::optim
