// Launchers of the loss family: losses of whole rows. Plain pointers, the same signatures on CPU and CUDA; each
// returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"

namespace gdbp::loss {

constexpr int64_t kRowTile = 4096;

// Cross-entropy over the classes of contiguous (outer, classes, inner) logits; row r is (r / inner, :, r % inner).
// A row whose labels are all ignore_index gives loss 0 and gradient 0, whatever its logits hold.
struct CrossEntropy {
  Dtype dtype;
  Reduction reduction;
  int64_t outer, classes, inner;
  const void* logits;
  // Labels (rows), or for mixtures two of them with the first one's share (rows); or probabilities, which are
  // laid out as the logits. The others are null.
  const int64_t* target;
  const int64_t* second;
  const double* share;
  const void* probabilities;
  const void* weight;  // (classes), dtype of the logits, or null
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;   // times the square of the logarithm of the sum of exp, added to the loss of a row
  double softcap;  // logits become softcap * tanh(logits / softcap); 0 for none

  int64_t rows() const { return outer * inner; }
};

// Row statistics are kept in the compute type (float, or double for float64): the largest logit m, and the sum
// over the other classes of exp(logit - m); for probabilities also the sum of the target's coefficients, and that
// over the other classes. Keeping the largest one's terms apart is what makes loss and gradient exact for
// confident rows.
inline int64_t stats_per_row(bool probabilities) { return probabilities ? 4 : 2; }

struct CrossEntropyForward : CrossEntropy {
  void* stats;               // (rows, stats_per_row) of the compute type
  void* output;              // (rows) for none, else one element, of dtype
  double* divisor;           // one: of the mean
  const double* normalizer;  // one: the divisor to take, or null for the sum of the rows' weights
  bool empty_is_zero;        // whether the mean of nothing is 0, and not NaN
  int64_t* bad;              // two: the first row with a label out of range, else -1, and that label; CUDA: or null
  double* workspace;         // 2 * rows: loss and weight of each row
  // Mean and sum: where the gradient of the logits goes, as it is where that of the loss is 1, in the same pass; or
  // null.
  void* grad_logits = nullptr;
};

struct CrossEntropyBackward : CrossEntropy {
  const void* stats;
  const double* divisor;
  const void* grad_output;   // (rows) for none, else one element, of dtype
  void* grad_logits;         // as the logits, and may be the logits themselves; or null
  void* grad_probabilities;  // as the logits; or null
  // Labels, mean and sum: grad_logits is what the forward pass wrote, and stays where grad_output is 1.
  bool unless_one = false;
};

int cross_entropy_forward_cpu(const CrossEntropyForward& args, void* stream);
int cross_entropy_forward_cuda(const CrossEntropyForward& args, void* stream);
int cross_entropy_backward_cpu(const CrossEntropyBackward& args, void* stream);
int cross_entropy_backward_cuda(const CrossEntropyBackward& args, void* stream);

}  // namespace gdbp::loss
