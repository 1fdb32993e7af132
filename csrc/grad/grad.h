// Launchers of the grad family: one read of many gradients. Plain pointers, the same signatures on CPU
// and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace gdbp::grad {

// One gradient: numel elements in any dense order.
struct Source {
  const void* data;
  int64_t numel;
  Dtype dtype;
};

// What the norm of all gradients decides.
struct Limit {
  double max_norm;        // infinity for no clipping
  double scale;           // the gradients are to be multiplied by this first (1: they are what they seem)
  double skip_nonfinite;  // 0 or 1: whether a norm that is not finite stops the step
};

// Written where the gradients live.
struct Norm {
  double total;        // 2-norm of all gradients, after Limit::scale
  double coefficient;  // what every gradient is to be multiplied by: scale, and max_norm / (total + 1e-6)
                       // where that is below 1
  double skip;         // 1: leave parameters and states as they are
};

// Sums are in double over fixed chunks of each tensor, then over the chunks in order: bitwise the same for
// any number of threads or blocks.
int norm_cpu(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* stream);
// workspace: a double for each chunk, on the device.
constexpr int64_t kCudaChunk = 16384;
inline int64_t norm_workspace_bytes(const Source* sources, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += (sources[i].numel + kCudaChunk - 1) / kCudaChunk;
  return chunks * int64_t(sizeof(double));
}
int norm_cuda(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* workspace, void* stream);

}  // namespace gdbp::grad
