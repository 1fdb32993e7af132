// Launchers of the normalisation family. Plain pointers to contiguous memory, the same signatures on CPU and
// CUDA; each returns 0, or the cudaError of the launch. C: the compute type, float or, for float64, double.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "norm/norm_math.h"

namespace gdbp::norm {

// (batch, channels, length); length is 1 for (batch, channels).
struct Shape {
  Dtype dtype;
  int64_t batch, channels, length;
};

struct Forward {
  Shape shape;
  Activation activation;
  double eps;
  bool of_batch;       // whether to compute the statistics or to take them as they are
  const void* input;   // (batch, channels, length)
  const void* weight;  // (channels) of C, or null for 1
  const void* bias;    // (channels) of C, or null for 0
  double* stats;       // (2, channels): mean and variance
  void* output;        // as input
  void* workspace;     // workspace_bytes(shape)
};

struct Backward {
  Shape shape;
  Activation activation;
  double eps;
  bool of_batch;  // whether the statistics are functions of the input
  const void* grad_output;
  const void* input;
  const void* weight;  // as in Forward
  const void* bias;
  const double* stats;
  void* grad_input;   // as input, or null
  void* grad_weight;  // (channels) of C, or null
  void* grad_bias;    // (channels) of C, or null
  void* workspace;    // workspace_bytes(shape)
};

// running = (1 - momentum) * running + momentum * batch, the variance without bias, and one more batch.
struct Update {
  Dtype dtype;  // of the running statistics and of the offset
  int64_t channels;
  double elements;  // of a channel; where 0 the statistics stay
  double momentum;
  bool cumulative;      // the momentum is 1 / (number of batches), which makes a mean over all of them
  const double* stats;  // (2, channels)
  const void* offset;   // (channels) or null: what the mean lacks
  void* running_mean;   // (channels)
  void* running_var;    // (channels)
  int64_t* batches;     // their number so far, or null; not null for `cumulative`
};

// The input as planes of rows and columns: one plane whose columns are the channels, or a plane of (batch, length)
// for each channel. Sums go over tiles of fixed size, then over the tiles in order, so they are bitwise
// reproducible.
constexpr int64_t kRowTile = 64, kColumnTile = 256;

struct Planes {
  int64_t count, rows, cols, row_step, plane_step;
  bool by_column;               // whether a column is a channel, else a plane is
  int64_t row_tile = kRowTile;  // on CUDA those of matrices are longer

  explicit Planes(const Shape& s)
      : count(s.length == 1 ? 1 : s.channels),
        rows(s.batch),
        cols(s.length == 1 ? s.channels : s.length),
        row_step(s.channels * s.length),
        plane_step(s.length),
        by_column(s.length == 1) {}

  GDBP_HD int64_t row_tiles() const { return (rows + row_tile - 1) / row_tile; }
  GDBP_HD int64_t column_tiles() const { return (cols + kColumnTile - 1) / kColumnTile; }
  // Tiles of one channel.
  GDBP_HD int64_t tiles() const { return row_tiles() * (by_column ? 1 : column_tiles()); }
  // Elements of one channel, and of those the ones in its tile `index`.
  GDBP_HD double elements() const { return double(rows) * double(by_column ? 1 : cols); }
  GDBP_HD double elements(int64_t index) const {
    const int64_t column_tile = by_column ? 0 : index % column_tiles();
    const int64_t rows_left = rows - (by_column ? index : index / column_tiles()) * row_tile;
    const int64_t columns_left = by_column ? 1 : cols - column_tile * kColumnTile;
    return double(rows_left < row_tile ? rows_left : row_tile) *
           double(columns_left < kColumnTile ? columns_left : kColumnTile);
  }
};

// Two sums for each tile and channel, and five coefficients for each channel.
inline int64_t workspace_bytes(const Shape& shape) {
  return (2 * Planes(shape).tiles() + 5) * shape.channels * int64_t(sizeof(double));
}

int forward_cpu(const Forward& args, void* stream);
int forward_cuda(const Forward& args, void* stream);
int backward_cpu(const Backward& args, void* stream);
int backward_cuda(const Backward& args, void* stream);
int update_cpu(const Update& args, void* stream);
int update_cuda(const Update& args, void* stream);

}  // namespace gdbp::norm
