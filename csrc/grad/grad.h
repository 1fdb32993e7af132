// Launchers of the grad family: one read of many gradients, or one pass over them. Plain pointers, the same
// signatures on CPU and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace gdbp::grad {

// One gradient: numel elements in any dense order. scale and clamp write it.
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
  double order = 2;       // of the norm: a number above 0, or infinity
};

// Written where the gradients live.
struct Norm {
  double total;        // norm of all gradients, after Limit::scale
  double coefficient;  // what every gradient is to be multiplied by: scale, and max_norm / (total + 1e-6)
                       // where that is below 1
  double skip;         // 1: leave parameters and states as they are
};

// What one read says of a gradient.
struct Health {
  double norm;     // 2-norm
  double largest;  // absolute value, among the elements that are not NaN
  double mean;
  double nans, infinities, zeros;  // how many
};

// Sums are in double over fixed chunks of each tensor, then over the chunks in order: bitwise the same for
// any number of threads or blocks.
int norm_cpu(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* stream);
int health_cpu(const Source* sources, int64_t count, Health* health, void* stream);
// Multiplies every element by *coefficient, which lies where the gradients do; 1 writes nothing.
int scale_cpu(const Source* sources, int64_t count, const double* coefficient, void* stream);
// Into [-limit, limit]; NaN stays.
int clamp_cpu(const Source* sources, int64_t count, double limit, void* stream);

constexpr int64_t kCudaChunk = 16384;
inline int64_t cuda_chunks(const Source* sources, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += (sources[i].numel + kCudaChunk - 1) / kCudaChunk;
  return chunks;
}
// workspace: on the device; a double, or a Health, for each chunk.
inline int64_t norm_workspace_bytes(const Source* sources, int64_t count) {
  return cuda_chunks(sources, count) * int64_t(sizeof(double));
}
inline int64_t health_workspace_bytes(const Source* sources, int64_t count) {
  return cuda_chunks(sources, count) * int64_t(sizeof(Health));
}
int norm_cuda(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* workspace, void* stream);
int health_cuda(const Source* sources, int64_t count, Health* health, void* workspace, void* stream);
int scale_cuda(const Source* sources, int64_t count, const double* coefficient, void* stream);
int clamp_cuda(const Source* sources, int64_t count, double limit, void* stream);

}  // namespace gdbp::grad
