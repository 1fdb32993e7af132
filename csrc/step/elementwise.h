// An activation that follows no layer it could be fused with. Contiguous float32 or float64.
#pragma once
#include <cstdint>

#include "common/activations.h"
#include "common/dtype.h"

namespace gdbp::step {

void activation_forward_cpu(Dtype dtype, Activation activation, int64_t n, const void* in, void* out);
// saved: what saves(activation) says. grad becomes the gradient of the input.
void activation_backward_cpu(Dtype dtype, Activation activation, int64_t n, const void* saved, void* grad);

}  // namespace gdbp::step
