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
  // Equal parts, one behind the other, each with a norm and a coefficient of its own. Where there is no element they
  // are counted and passed over by scale_units, and 0 for unit_norms.
  int64_t units = 1;
};

// The units of all sources, numbered through.
inline int64_t count_units(const Source* sources, int64_t count) {
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) units += sources[i].units;
  return units;
}

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

// l1 sum |x| + l2 / 2 sum x^2 of all elements, whose derivative l1 sign(x) + l2 x is what the optimizers call l1
// and weight_decay.
struct Penalty {
  double l1, l2;
};

// Sums are in double over fixed chunks of each tensor, or unit, then over the chunks in order: bitwise the same
// for any number of threads or blocks.
int norm_cpu(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* stream);
int health_cpu(const Source* sources, int64_t count, Health* health, void* stream);
// Multiplies every element by *coefficient, which lies where the gradients do; 1 writes nothing.
int scale_cpu(const Source* sources, int64_t count, const double* coefficient, void* stream);
// Into [-limit, limit]; NaN stays.
int clamp_cpu(const Source* sources, int64_t count, double limit, void* stream);
// Of every unit its norm, and every unit multiplied by a coefficient of its own.
int unit_norms_cpu(const Source* sources, int64_t count, double order, double* norms, void* stream);
int scale_units_cpu(const Source* sources, int64_t count, const double* coefficients, void* stream);
// The value, and times *upstream its derivative: written to what outputs[i] points to, as sources[i].
int penalty_cpu(const Source* sources, int64_t count, const Penalty& penalty, double* value, void* stream);
int penalty_slope_cpu(const Source* sources, int64_t count, const Penalty& penalty, const double* upstream,
                      void* const* outputs, void* stream);

constexpr int64_t kCudaChunk = 16384;
inline int64_t cuda_chunks(const Source& source) {
  if (source.numel == 0) return 0;
  return (source.numel / source.units + kCudaChunk - 1) / kCudaChunk * source.units;
}
inline int64_t cuda_chunks(const Source* sources, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += cuda_chunks(sources[i]);
  return chunks;
}
// workspace: on the device; a double (of unit_norms and penalty too), or a Health, for each chunk.
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
int unit_norms_cuda(const Source* sources, int64_t count, double order, double* norms, void* workspace, void* stream);
int scale_units_cuda(const Source* sources, int64_t count, const double* coefficients, void* stream);
int penalty_cuda(const Source* sources, int64_t count, const Penalty& penalty, double* value, void* workspace,
                 void* stream);
int penalty_slope_cuda(const Source* sources, int64_t count, const Penalty& penalty, const double* upstream,
                       void* const* outputs, void* stream);

}  // namespace gdbp::grad
