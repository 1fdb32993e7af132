// Launchers of the linear family: everything around the matrix product. Plain pointers to contiguous
// memory, the same signatures on CPU and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/activations.h"
#include "common/dtype.h"

namespace gdbp::linear {

struct Forward {
  Dtype dtype;
  Activation activation;
  int64_t rows, cols;
  void* pre;         // (rows, cols): in, the product; out, product + bias (written unless it is output)
  const void* bias;  // (cols) or null
  void* output;      // (rows, cols): activation(product + bias); may be `pre` itself
};

struct Backward {
  Dtype dtype;
  Activation activation;
  int64_t rows, cols;
  const void* grad_output;  // (rows, cols)
  const void* saved;        // (rows, cols): what saves(activation) says; null for Saved::nothing
  void* grad_pre;           // (rows, cols); for Activation::none null where only grad_bias is wanted
  void* grad_bias;          // (cols) or null
  void* workspace;          // workspace_bytes(...), or null where grad_bias is null
};

// Bias gradients are summed in two stages over tiles of rows that do not depend on the number of
// threads or blocks, so they are bitwise reproducible.
constexpr int64_t kRowTile = 64;
inline int64_t workspace_bytes(Dtype dtype, int64_t rows, int64_t cols) {
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile;
  return tiles * cols * (dtype == Dtype::float64 ? 8 : 4);
}

// A product with many outputs, as a language model's last layer has them: output = input weight^T + bias. On the CPU,
// in float32 or float64; for weights of a half type in float32.
struct Wide {
  Dtype dtype;  // the weight's
  int64_t rows, inputs, outputs;
  const void* input;   // (rows, inputs)
  const void* weight;  // (outputs, inputs)
  const void* bias;    // (outputs) or null
  void* output;        // (rows, outputs)
};
int wide_cpu(const Wide& args, void* stream);

// Half types to float32 and back, the bias added in between: for products in float32. On the CPU.
struct Widen {
  Dtype dtype;
  int64_t rows, cols, stride;
  const void* halves;  // (rows, cols), `stride` elements from row to row
  float* floats;       // (rows, cols)
};
struct Narrow {
  Dtype dtype;
  int64_t rows, cols;
  const float* sums;  // (rows, cols)
  const void* bias;   // (cols) or null
  void* halves;       // (rows, cols), `stride` elements from row to row
  int64_t stride;
};
int widen_cpu(const Widen& args, void* stream);
int narrow_cpu(const Narrow& args, void* stream);

int forward_cpu(const Forward& args, void* stream);
int forward_cuda(const Forward& args, void* stream);
int backward_cpu(const Backward& args, void* stream);
int backward_cuda(const Backward& args, void* stream);

}  // namespace gdbp::linear
