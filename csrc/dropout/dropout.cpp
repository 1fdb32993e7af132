#include "dropout/dropout.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>

#include "common/binding.h"

namespace gdbp::dropout {
namespace {

using at::Tensor;

// The mask of one layer: its own derivative, too.
Tensor dropout(const Tensor& input, double p, const Tensor& seed, int64_t layer) {
  const char* const op = "dropout";
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Dtype dtype = dtype_of(input, op, "input");
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, op, ": p is ", p, "; expected a probability from 0 to 1");
  TORCH_CHECK(seed.scalar_type() == at::kLong && seed.numel() == 1 && seed.device() == input.device(), op,
              ": seed has dtype ", seed.scalar_type(), " and shape ", seed.sizes(), " on ", seed.device(),
              "; expected one int64 number on ", input.device());
  const Tensor x = input.contiguous(), out = at::empty_like(x);
  const Args args{dtype,
                  x.numel(),
                  p,
                  reinterpret_cast<const uint64_t*>(seed.const_data_ptr<int64_t>()),
                  uint64_t(layer),
                  x.const_data_ptr(),
                  out.mutable_data_ptr()};
  run_on(x.device(), op, dropout_cpu, GDBP_CUDA_LAUNCHER(dropout_cuda), args);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gdbp, m) {
  m.def("dropout(Tensor input, float p, Tensor seed, int layer) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(gdbp, CPU, m) { m.impl("dropout", &dropout); }
TORCH_LIBRARY_IMPL(gdbp, CUDA, m) { m.impl("dropout", &dropout); }

}  // namespace gdbp::dropout
