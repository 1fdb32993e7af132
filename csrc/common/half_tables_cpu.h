// What an activation makes of every 16-bit number, looked up: to compute it takes some sixty operations, for float32's
// digits of which 16 bits keep a third, and the numbers of a layer lie in a few kilobytes of the table.
#pragma once
#include <cstdint>

#include "common/activations.h"
#include "common/dtype.h"

namespace gdbp::cpu {

constexpr int64_t kHalves = int64_t(1) << 16;

// For T BFloat16 or Float16, at T::bits; the same as is computed, bit for bit. Made when first asked for, which takes
// as long as that many elements do. Null for what is as fast to compute.
template <class T>
const T* outputs(Activation activation);
// The derivative, for those that keep their pre-activation, which is what it is looked up at.
template <class T>
const float* slopes(Activation activation);

}  // namespace gdbp::cpu
