// Launchers of the bce family: binary cross-entropy with logits. Plain pointers to contiguous memory, the same
// signatures on CPU and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"

namespace gdbp::bce {

constexpr int64_t kTile = 16384;

// Factors that repeat: element i has data[i % period]. Null: 1.
struct Factors {
  const void* data;
  int64_t period;
};

struct Loss {
  Reduction reduction;
  Dtype dtype;  // of everything
  int64_t numel;
  const void* input;
  const void* target;
  Factors weight, pos_weight;
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

}  // namespace gdbp::bce
