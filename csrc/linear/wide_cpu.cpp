#include <algorithm>
#include <cstring>
#include <memory>

#include "common/narrow_gemm_cpu.h"
#include "common/parallel.h"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

// Outputs, and inputs, of a part of the weight that is transposed at a time: with 512 inputs 128 KB, which stay in a
// second-level cache while all rows are multiplied with them.
constexpr int64_t kPanel = 64, kDepth = 512;

template <class T>
void multiply(const Wide& a, int64_t first, int64_t last) {
  const auto *const x = static_cast<const T*>(a.input), *const weight = static_cast<const T*>(a.weight);
  auto* const y = static_cast<T*>(a.output);
  const std::unique_ptr<T[]> packed(new T[kPanel * std::min(kDepth, a.inputs)]);
  T bias[kPanel];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t begin = panel * kPanel, outputs = std::min(kPanel, a.outputs - begin);
    if (a.bias) std::memcpy(bias, static_cast<const T*>(a.bias) + begin, size_t(outputs) * sizeof(T));
    for (int64_t from = 0; from < a.inputs; from += kDepth) {
      const int64_t depth = std::min(kDepth, a.inputs - from);
      cpu::pack_transposed(weight + begin * a.inputs + from, outputs, depth, a.inputs, packed.get());
      cpu::narrow_gemm<T>({a.rows,
                           outputs,
                           depth,
                           x + from,
                           a.inputs,
                           1,
                           {packed.get(), cpu::padded<T>(outputs)},
                           y + begin,
                           a.outputs,
                           a.bias && from == 0 ? bias : nullptr,
                           from > 0});
    }
  }
}

}  // namespace

int wide_cpu(const Wide& a, void*) {
  const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
  parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    if (a.dtype == Dtype::float64) {
      multiply<double>(a, first, last);
    } else {
      multiply<float>(a, first, last);
    }
  });
  return 0;
}

}  // namespace gdbp::linear
