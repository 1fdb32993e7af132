#include <algorithm>
#include <cstring>
#include <memory>

#include "common/narrow_gemm_cpu.h"
#include "common/parallel.h"
#include "common/rows_cpu.h"
#include "linear/linear.h"

namespace gdbp::linear {
namespace {

// Outputs, and inputs, of a part of the weight that is transposed at a time: with 512 inputs 128 KB, which stay in a
// second-level cache while all rows are multiplied with them.
constexpr int64_t kPanel = 64, kDepth = 512;

template <class Stored>
void multiply(const Wide& a, int64_t first, int64_t last) {
  using T = Compute<Stored>;
  const auto* const x = static_cast<const T*>(a.input);
  const auto* const weight = static_cast<const Stored*>(a.weight);
  auto* const y = static_cast<T*>(a.output);
  const int64_t most = kPanel * std::min(kDepth, a.inputs);
  const std::unique_ptr<T[]> packed(new T[most]), wide(cpu::kDirect<Stored> ? nullptr : new T[most]);
  T bias[kPanel];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t begin = panel * kPanel, outputs = std::min(kPanel, a.outputs - begin);
    if (a.bias) std::memcpy(bias, static_cast<const T*>(a.bias) + begin, size_t(outputs) * sizeof(T));
    for (int64_t from = 0; from < a.inputs; from += kDepth) {
      const int64_t depth = std::min(kDepth, a.inputs - from);
      const Stored* const part = weight + begin * a.inputs + from;
      if constexpr (cpu::kDirect<Stored>) {
        cpu::pack_transposed(part, outputs, depth, a.inputs, packed.get());
      } else {
        cpu::widen_rows<Stored>({part, a.inputs}, {wide.get(), depth}, outputs, depth);
        cpu::pack_transposed(wide.get(), outputs, depth, depth, packed.get());
      }
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
    dispatch(a.dtype, [&](auto type) { multiply<typename decltype(type)::type>(a, first, last); });
  });
  return 0;
}

}  // namespace gdbp::linear
