// Launchers of the units family: statistics of a layer's outputs, in one read. Plain pointers to contiguous memory,
// the same signatures on CPU and CUDA; each returns 0, or the cudaError of the launch.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "units/units_math.h"

namespace gdbp::units {

struct Count {
  Dtype dtype;
  int64_t rows, units;
  const void* output;  // (rows, units)
  double low, high;    // what counts as flat
  double* result;      // (3, units): flat outputs, their sum, and the sum of their squares
  Tally* workspace;    // (tiles(rows), units)
};

// Sums go over tiles of rows, then over the tiles in order, so they are bitwise reproducible.
constexpr int64_t kRowTile = 256;
inline int64_t tiles(int64_t rows) { return (rows + kRowTile - 1) / kRowTile; }

int count_cpu(const Count& args, void* stream);
int count_cuda(const Count& args, void* stream);

}  // namespace gdbp::units
