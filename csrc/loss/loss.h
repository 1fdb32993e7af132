// Launchers of the loss family: losses of whole rows. Plain pointers to contiguous memory, the same signatures on CPU
// and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/reduction.h"

namespace gdbp::loss {

constexpr int64_t kRowTile = 256;

// Class-index cross-entropy over (rows, classes). A row whose target is ignore_index gives loss 0 and
// gradient 0, whatever its logits hold.
struct CrossEntropy {
  Dtype dtype;
  Reduction reduction;
  int64_t rows, classes;
  const void* logits;     // (rows, classes)
  const int64_t* target;  // (rows)
  const void* weight;     // (classes), dtype of the logits, or null
  int64_t ignore_index;
  double label_smoothing;
};

// Row statistics are kept in the compute type (float, or double for float64), two per row: the largest
// logit m, and the sum over the classes other than the target of exp(logit - m). Keeping the target's
// own term apart is what makes the loss and the gradient exact for confident rows.
struct CrossEntropyForward : CrossEntropy {
  void* stats;         // (rows, 2) of the compute type
  void* output;        // (rows) for none, else one element, of dtype
  void* total_weight;  // one double: the divisor of the mean
  int64_t* bad_row;    // one element: the first row with a label out of range, else -1
  void* workspace;     // 2 * rows doubles: loss and weight of each row
};

struct CrossEntropyBackward : CrossEntropy {
  const void* stats;
  const void* total_weight;
  const void* grad_output;  // (rows) for none, else one element, of dtype
  void* grad_logits;        // (rows, classes); may be the logits themselves
};

int cross_entropy_forward_cpu(const CrossEntropyForward& args, void* stream);
int cross_entropy_forward_cuda(const CrossEntropyForward& args, void* stream);
int cross_entropy_backward_cpu(const CrossEntropyBackward& args, void* stream);
int cross_entropy_backward_cuda(const CrossEntropyBackward& args, void* stream);

}  // namespace gdbp::loss
