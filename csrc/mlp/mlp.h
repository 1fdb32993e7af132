// Launchers of the mlp family: a whole dense network of narrow layers. On CUDA in one kernel, whose weights stay in
// shared memory and whose activations stay there, too, or in registers; on the CPU a block of rows after the other,
// each through all layers while it is in the cache.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

#include "common/activations.h"
#include "common/dtype.h"

namespace gdbp::mlp {

constexpr int kMaxLayers = 16, kMaxWidth = 128;
// Not the number of multiprocessors: which rows are added up together is then the same on every GPU.
constexpr int kMaxBlocks = 128;

struct Layer {
  const void* weight;  // (outputs, inputs)
  const void* bias;    // (outputs), or null
  int inputs, outputs;
  Activation activation;  // of the output; on CUDA of the last layer none
  // Where their gradients begin among those of all parameters; below 0 where nobody wants them.
  int64_t weight_at, bias_at;
};

// What all products are formed of, and summed in float. Activations and gradients are kept in as many bits, those of
// tf32 in float32.
enum class Factors : int { bfloat16, float16, tf32, float32 };
constexpr const char* kFactorNames[] = {"bfloat16", "float16", "tf32", "float32"};

GDBP_HD constexpr Dtype kept_in(Factors factors) {
  return factors == Factors::bfloat16 ? Dtype::bfloat16 : factors == Factors::float16 ? Dtype::float16 : Dtype::float32;
}

// Of a name; raises torch's ValueError for others.
Factors parse_factors(std::string_view name);

struct Network {
  int count;
  Dtype parameters;  // of weights and biases; on CUDA not float64
  Factors factors;
  Layer layers[kMaxLayers];

  GDBP_HD int inputs() const { return layers[0].inputs; }
  GDBP_HD int outputs() const { return layers[count - 1].outputs; }
};

// upstream: none; the gradient of the output comes from elsewhere.
enum class Objective : int { cross_entropy, mse, upstream };

// What becomes of the gradients, found out on the device.
struct Decision {
  double coefficient;  // multiplies them: 1 over the number of rows or elements for a mean, 1 for a sum
  double skip;         // 1 where a label is out of range, else 0
};

// What a block, and then the last of them, finds out about its rows.
struct Finding {
  double loss, count;
  int64_t bad_row;  // the first of a label out of range; else INT64_MAX
};

struct Train {
  Network network;
  int64_t rows;
  Dtype input_dtype, target_dtype;  // not float64, but for the values of mse
  const void* input;                // (rows, inputs)
  const void* target;  // labels, int64 (rows); or (rows, outputs) of target_dtype: values, or the output's gradient
  Objective objective;
  int64_t ignore_index;
  bool mean;
  int64_t gradients;  // of all parameters, their number
  float* partials;    // (blocks_for(rows), gradients): the gradients of each block's rows, of the loss's sum
  // What follows is only written where there is an objective.
  Finding* findings;   // (kMaxBlocks)
  unsigned* finished;  // 0 at first, and again afterwards
  float* loss;
  Decision* decision;
  int64_t* bad;                    // row and label of the first that is out of range, else -1 and 0; or null
  void* input_gradient = nullptr;  // (rows, inputs) of input_dtype; null where nobody wants it
  int most_blocks = kMaxBlocks;
};

struct Infer {
  Network network;
  int64_t rows;
  Dtype input_dtype;            // not float64
  const void* input;            // (rows, inputs)
  void* output;                 // (rows, outputs), of kept_in(factors)
  int most_blocks = INT32_MAX;  // as many as there are multiprocessors are enough
};

// Shared memory of a block on the current device, in bytes, and 0 without CUDA.
int shared_bytes();
int shared_bytes_cuda();

int train_cuda(const Train& args, void* stream);
int infer_cuda(const Infer& args, void* stream);

// ---- on the CPU: float32 and float64, as the parameters are; any layer may have an activation ----

// What is dropped of an output, behind the activation: a share of p, by a mask of that seed.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;
};
using Dropouts = std::array<Dropout, kMaxLayers>;

// What the forward pass leaves for the backward one. Behind each there is room for cpu::kVectorBytes.
struct Kept {
  void* outputs[kMaxLayers];  // of each layer, (rows, outputs)
  void* saved[kMaxLayers];    // what the derivative is computed of, where keeps_apart says so
};
// Whether that is no output: the pre-activation, or what the output was before a part of it was dropped. A sign can be
// read from what is left.
inline bool keeps_apart(const Layer& layer, const Dropout& dropout = {}) {
  const bool of_sign = layer.activation == Activation::relu || layer.activation == Activation::leaky_relu;
  return saves(layer.activation) == Saved::pre ||
         (saves(layer.activation) == Saved::output && dropout.p > 0 && !of_sign);
}

struct Forward {
  Network network;
  int64_t rows;
  const void* input;  // (rows, inputs)
  Kept kept;          // but for the last output null where there will be no backward pass
  void* workspace;    // (forward_bytes(network, rows))
  Dropouts dropouts{};
};

struct Backward {
  Network network;
  int64_t rows;
  const void* input;
  Kept kept;
  const void* grad_output;  // (rows, outputs)
  void* grad_input;         // (rows, inputs), or null
  int64_t gradients;        // of all parameters, their number
  void* partials;           // (groups_for(network, rows), gradients): the first becomes the sum over all rows
  void* workspace;          // (backward_bytes(network, rows))
  Dropouts dropouts{};
};

// Into how many groups rows are cut, whose gradients are summed apart: a function of sizes, not of threads.
int64_t groups_for(const Network& network, int64_t rows);
int64_t forward_bytes(const Network& network, int64_t rows);
int64_t backward_bytes(const Network& network, int64_t rows);

int forward_cpu(const Forward& args, void* stream);
int backward_cpu(const Backward& args, void* stream);

}  // namespace gdbp::mlp
