// Launchers of the dropout family. Plain pointers to contiguous memory, the same signatures on CPU and CUDA; each
// returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace gdbp::dropout {

struct Args {
  Dtype dtype;
  int64_t numel;
  double p;
  const uint64_t* seed;  // one number, read where the arrays are: a CUDA graph is replayed with another
  uint64_t layer;        // layers of one seed draw different masks
  const void* in;
  void* out;  // may be in
};

int dropout_cpu(const Args& args, void* stream);
int dropout_cuda(const Args& args, void* stream);

}  // namespace gdbp::dropout
