// The loss of a tile's rows and its gradient, and what the blocks find out together.
#pragma once
#include <climits>

#include "common/mma_cuda.cuh"
#include "common/reduce_cuda.cuh"
#include "common/softmax.h"
#include "loss/label_cuda.cuh"
#include "mlp/mlp.h"
#include "mlp/mlp_math.h"

namespace gdbp::mlp {
namespace {

using cuda::kAllLanes;
using cuda::kWarp;

// What a lane has found in its rows.
struct Found {
  float loss = 0;
  double total = 0, count = 0;
  int64_t bad_row = INT64_MAX;
};

// Two lanes for each of the warp's rows, each with every second logit: the logits are replaced by the gradient of the
// loss's sum.
template <class T>
__device__ void cross_entropy(const Train& a, T* logits, int stride, int64_t first, Found& found) {
  const int half = cuda::lane_id() % 2, classes = a.network.outputs();
  const int64_t row = first + cuda::lane_id() / 2;
  T* const x = logits + cuda::lane_id() / 2 * stride;
  const int64_t label = row < a.rows ? static_cast<const int64_t*>(a.target)[row] : a.ignore_index;
  const bool counts = row < a.rows && label != a.ignore_index;
  const bool is_bad = counts && (label < 0 || label >= classes);
  float m = -math::Format<float>::infinity;
  int largest = INT_MAX;
  for (int j = half; j < classes; j += 2) {
    const float value = cuda::widen_fast(x[j]);
    if (!(value <= m)) m = value, largest = j;
  }
  const float other_m = __shfl_xor_sync(kAllLanes, m, 1);
  const int other_largest = __shfl_xor_sync(kAllLanes, largest, 1);
  // The first of several equal ones, for both lanes.
  if (other_m > m || (other_m == m && other_largest < largest)) m = other_m, largest = other_largest;
  float others = m - m;  // NaN where this lane knows of no finite largest logit
  for (int j = half; j < classes; j += 2)
    if (j != largest) others += math::exp(cuda::widen_fast(x[j]) - m);
  const float others_beside = __shfl_xor_sync(kAllLanes, others, 1);
  const Softmax<float> softmax{m, half == 0 ? others + others_beside : others_beside + others};
  if (counts && !is_bad && half == 0) {
    found.loss = softmax.nll(cuda::widen_fast(x[label]));
    found.count += 1;
  }
  if (is_bad && row < found.bad_row) found.bad_row = row;
  __syncwarp();
  for (int j = half; j < padded(classes); j += 2) {
    float gradient = 0;
    if (counts && j < classes) {
      const float value = cuda::widen_fast(x[j]);
      gradient = j == label ? -softmax.rest(value) : softmax.p(value);
    }
    x[j] = cuda::narrow_fast<T>(gradient);
  }
}

template <class T, class Y>
__device__ void mean_square(const Train& a, const Y* target, T* output, int stride, int64_t first, Found& found) {
  const int half = cuda::lane_id() % 2, width = a.network.outputs();
  const int64_t row = first + cuda::lane_id() / 2;
  T* const x = output + cuda::lane_id() / 2 * stride;
  for (int j = half; j < padded(width); j += 2) {
    float gradient = 0;
    if (row < a.rows && j < width) {
      const float difference = cuda::widen_fast(x[j]) - float(cuda::widen_fast(target[row * width + j]));
      found.loss += difference * difference;
      found.count += 1;
      gradient = 2 * difference;
    }
    x[j] = cuda::narrow_fast<T>(gradient);
  }
}

__device__ __forceinline__ Finding reduce(Finding f) {
  return {cuda::warp_reduce(f.loss, cuda::Sum{}), cuda::warp_reduce(f.count, cuda::Sum{}),
          cuda::warp_reduce(f.bad_row, cuda::Min{})};
}

// The block's finding to its place; the last block to come sums over blocks, in order.
__device__ void conclude(const Train& a, const Found& found) {
  __shared__ Finding of_warps[kMaxWarps];
  __shared__ bool is_last;
  const int warp = int(threadIdx.x) / kWarp, lane = cuda::lane_id(), warps = int(blockDim.x) / kWarp;
  const Finding finding = reduce({found.total, found.count, found.bad_row});
  if (lane == 0) of_warps[warp] = finding;
  __syncthreads();
  if (threadIdx.x == 0) {
    Finding sum = of_warps[0];
    for (int w = 1; w < warps; ++w) {
      sum.loss += of_warps[w].loss;
      sum.count += of_warps[w].count;
      sum.bad_row = cuda::Min{}(sum.bad_row, of_warps[w].bad_row);
    }
    a.findings[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(a.finished, 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (!is_last || warp != 0) return;
  __threadfence();
  Finding sum{0, 0, INT64_MAX};
  for (int b = lane; b < int(gridDim.x); b += kWarp) {
    const Finding& of_block = a.findings[b];
    sum.loss += of_block.loss;
    sum.count += of_block.count;
    sum.bad_row = cuda::Min{}(sum.bad_row, of_block.bad_row);
  }
  sum = reduce(sum);
  if (lane != 0) return;
  const bool is_bad = sum.bad_row != INT64_MAX;
  const double value = a.mean ? sum.loss / sum.count : sum.loss;
  *a.loss = is_bad ? math::not_a_number<float> : float(value);
  // The gradient of a mean over nothing is 0, as in torch.
  *a.decision = {!a.mean ? 1.0 : sum.count == 0 ? 0.0 : 1 / sum.count, is_bad ? 1.0 : 0.0};
  loss::tell_label(a.bad, is_bad ? sum.bad_row : -1, is_bad ? static_cast<const int64_t*>(a.target)[sum.bad_row] : 0);
  *a.finished = 0;
}

}  // namespace
}  // namespace gdbp::mlp
