#include "common/half_tables_cpu.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <mutex>

#include "common/rows_cpu.h"

namespace gdbp::cpu {
namespace {

// One for each activation, made by make(activation, table).
template <class Entry, class Make>
const Entry* table_of(Activation activation, const Make& make) {
  static std::once_flag made[std::size(kActivations)];
  static std::unique_ptr<Entry[]> tables[std::size(kActivations)];
  const auto at = size_t(activation);
  std::call_once(made[at], [&] {
    tables[at] = std::make_unique<Entry[]>(kHalves);
    make(tables[at].get());
  });
  return tables[at].get();
}

template <class T>
void make_outputs(Activation activation, T* table) {
  for (int64_t at = 0; at < kHalves; at += kBlock) {
    float values[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) values[i] = widen(T{uint16_t(at + i)});
    const Rows<float> row{values, kBlock};
    activate<float>(activation, row, row, 1, kBlock);
    narrow_rows<T>(row, {table + at, kBlock}, 1, kBlock);
  }
}

template <class T>
void make_slopes(Activation activation, float* table) {
  // Small gradients are made 0, a slope is not to be.
  constexpr float kLarge = 0x1p64f;
  float grads[kBlock], values[kBlock];
  std::fill_n(grads, kBlock, kLarge);
  for (int64_t at = 0; at < kHalves; at += kBlock) {
    for (int64_t i = 0; i < kBlock; ++i) values[i] = widen(T{uint16_t(at + i)});
    activate_backward<float>(activation, {grads, kBlock}, {values, kBlock}, {table + at, kBlock}, 1, kBlock);
    for (int64_t i = 0; i < kBlock; ++i) table[at + i] /= kLarge;
  }
}

}  // namespace

template <class T>
const T* outputs(Activation activation) {
  if (activation == Activation::none || activation == Activation::relu || activation == Activation::leaky_relu)
    return nullptr;
  return table_of<T>(activation, [=](T* table) { make_outputs<T>(activation, table); });
}

template <class T>
const float* slopes(Activation activation) {
  if (saves(activation) != Saved::pre) return nullptr;
  return table_of<float>(activation, [=](float* table) { make_slopes<T>(activation, table); });
}

template const BFloat16* outputs<BFloat16>(Activation);
template const Float16* outputs<Float16>(Activation);
template const float* slopes<BFloat16>(Activation);
template const float* slopes<Float16>(Activation);

}  // namespace gdbp::cpu
