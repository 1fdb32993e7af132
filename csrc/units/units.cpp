#include "units/units.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "common/binding.h"

namespace gdbp::units {
namespace {

using at::Tensor;

// Of each unit of (rows, units): how many outputs are up to `low` or from `high` on, their sum, and that of their
// squares; (3, units) in double.
Tensor count(const Tensor& output, double low, double high) {
  const char* const op = "unit_stats";
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Dtype dtype = dtype_of(output, op, "output");
  TORCH_CHECK(output.dim() == 2, op, ": output has shape ", output.sizes(), "; expected (rows, units)");
  // Of CUDA's grids the second dimension is the short one.
  TORCH_CHECK(output.size(1) <= 65535 * 32, op, ": output has ", output.size(1), " units; expected at most 2097120");
  const Tensor y = output.contiguous();
  const Tensor result = at::empty({3, y.size(1)}, y.options().dtype(at::kDouble));
  const int64_t bytes = tiles(y.size(0)) * y.size(1) * int64_t(sizeof(Tally));
  const Tensor workspace = at::empty({bytes}, y.options().dtype(at::kByte));
  const Count args{dtype,
                   y.size(0),
                   y.size(1),
                   y.const_data_ptr(),
                   low,
                   high,
                   result.mutable_data_ptr<double>(),
                   static_cast<Tally*>(workspace.mutable_data_ptr())};
  run_on(y.device(), op, count_cpu, GDBP_CUDA_LAUNCHER(count_cuda), args);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def("unit_stats(Tensor output, float low, float high) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdbp, CPU, m) { m.impl("unit_stats", &count); }
TORCH_LIBRARY_IMPL(gdbp, CUDA, m) { m.impl("unit_stats", &count); }

}  // namespace gdbp::units
