// Launchers of the pointwise family: losses that are a function of one element's error. Plain pointers to
// contiguous memory, the same signatures on CPU and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"
#include "pointwise/pointwise_math.h"

namespace gdbp::pointwise {

constexpr int64_t kTile = 16384;

struct Loss {
  Kind kind;
  double parameter;  // delta, beta, or unused
  Reduction reduction;
  Dtype dtype;
  int64_t numel;
  const void* input;
  const void* target;
};

struct Forward : Loss {
  void* output;     // (numel) for none, else one element
  void* workspace;  // tiles(numel, kTile) doubles, or null for none
  // mean and sum: (numel) for the gradient of the input where that of the loss is 1, in the same pass; or null.
  void* grad_input = nullptr;
};

struct Backward : Loss {
  const void* grad_output;  // (numel) for none, else one element
  void* grad_input;         // (numel) or null
  void* grad_target;        // (numel) or null
  // mean and sum: where grad_output is 1, grad_input stays, as the forward pass has written it.
  bool unless_one = false;
};

int forward_cpu(const Forward& args, void* stream);
int forward_cuda(const Forward& args, void* stream);
int backward_cpu(const Backward& args, void* stream);
int backward_cuda(const Backward& args, void* stream);

}  // namespace gdbp::pointwise
