// Layers that work on single elements and have no family of their own: dropout, and an activation that follows
// no layer it could be fused with. Contiguous float32 or float64.
#pragma once
#include <cstdint>

#include "common/activations.h"
#include "common/dtype.h"

namespace gdbp::step {

// out[i] = in[i] / (1 - p), or 0 with probability p; a function of the seed and i alone, so that the backward pass is
// the same call and nothing is kept. out may be in. p from 0 to 1.
void dropout_cpu(Dtype dtype, int64_t n, double p, uint64_t seed, const void* in, void* out);

void activation_forward_cpu(Dtype dtype, Activation activation, int64_t n, const void* in, void* out);
// saved: what saves(activation) says. grad becomes the gradient of the input.
void activation_backward_cpu(Dtype dtype, Activation activation, int64_t n, const void* saved, void* grad);

}  // namespace gdbp::step
