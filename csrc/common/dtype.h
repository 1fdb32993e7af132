// Element types: what is stored (float64, float32, bfloat16, float16) and what is computed with
// (double for float64, float for all others). Conversions are branch-free, so that loops vectorise.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace gdbp {

// blockwise8 is for optimizer states alone, see optim/blockwise8.h.
enum class Dtype : uint8_t { float64, float32, bfloat16, float16, blockwise8 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GDBP_HD constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::blockwise8 ? 1 : 2;
}

// The type that arithmetic on a stored T is done in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class To, class From>
GDBP_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &value, sizeof(To));
  return out;
}

GDBP_HD double widen(double x) { return x; }
GDBP_HD float widen(float x) { return x; }
GDBP_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Multiplying by 2^112 re-biases the exponent and normalises subnormals in one exact step.
GDBP_HD float widen(Float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t nonfinite = magnitude | 0x7f800000u;
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? nonfinite : finite));
}

template <class T>
GDBP_HD T narrow(Compute<T> x);

template <>
GDBP_HD double narrow<double>(double x) {
  return x;
}
template <>
GDBP_HD float narrow<float>(float x) {
  return x;
}

// Round to nearest even by adding half a unit (less one when the kept part is even). A NaN would carry into infinity,
// so it becomes a quiet one whose lower half is empty.
template <>
GDBP_HD BFloat16 narrow<BFloat16>(float x) {
  const uint32_t stored = bit_cast<uint32_t>(x);
  const uint32_t bits = x != x ? (stored & 0xffff0000u) | 0x400000u : stored;
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Three ranges, all computed, one selected: subnormal results (adding 0.5 lines the result's last bit up
// with the float's last bit, and the addition rounds to nearest even), normal results (the same integer
// rounding as above, re-biased), and overflow, infinity, NaN.
template <>
GDBP_HD Float16 narrow<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t nonfinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {uint16_t(sign | (magnitude >= 0x477ff000u ? nonfinite : finite))};
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the stored type that `dtype` names.
template <class F>
auto dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float64: return f(Type<double>{});
    case Dtype::float32: return f(Type<float>{});
    case Dtype::bfloat16: return f(Type<BFloat16>{});
    default: return f(Type<Float16>{});
  }
}

}  // namespace gdbp
