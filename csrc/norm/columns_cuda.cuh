// What the kernels of batch normalisation share. A thread keeps to a few neighbouring columns, one access of 16 bytes,
// and walks down the rows: threadIdx.x counts threads side by side, threadIdx.y those below one another.
#pragma once
#include "common/activations_cuda.cuh"
#include "common/reduce_cuda.cuh"
#include "norm/norm.h"

namespace gdbp::norm {
namespace {

// Rows of a thread that are on their way at once; of 16 bits, whose rows have more elements, and of 64 fewer, for they
// and what belongs to their channels lie in registers.
template <class T>
constexpr int kUnroll = sizeof(T) == 4 ? 4 : 2;

// So many rows of a thread, from `row` on and `stride` apart, as far as they come before `end`.
template <class T>
struct Rows {
  static constexpr int width = cuda::kWidth<T>;
  using Values = Compute<T>[kUnroll<T>][width];
  int64_t step;     // elements from one to the next
  int valid = 0;    // how many there are
  int count;        // columns of each
  bool in_vectors;  // whether there are any, each of one access

  __device__ __forceinline__ Rows(int64_t row, int64_t stride, int64_t end, int64_t row_step, int count, bool vectors)
      : step(stride * row_step), count(count) {
#pragma unroll
    for (int r = 0; r < kUnroll<T>; ++r) valid += row + r * stride < end;
    in_vectors = vectors && count == width && valid > 0;
  }
  __device__ __forceinline__ bool has(int r) const { return r < valid; }

  // What is not there gets numbers without a meaning: in vectors those of the first row, for a branch between two
  // loads would have one wait for the other.
  __device__ __forceinline__ void load(const T* from, Values& to) const {
    if (in_vectors) {
#pragma unroll
      for (int r = 0; r < kUnroll<T>; ++r) cuda::load(from + (has(r) ? r * step : 0), width, true, to[r]);
    } else {
#pragma unroll
      for (int r = 0; r < kUnroll<T>; ++r) cuda::load(from + r * step, has(r) ? count : 0, false, to[r]);
    }
  }
  __device__ __forceinline__ void store(T* to, const Values& from) const {
    if (in_vectors) {
#pragma unroll
      for (int r = 0; r < kUnroll<T>; ++r) {
        if (has(r)) cuda::store(to + r * step, width, true, from[r]);
      }
    } else {
#pragma unroll
      for (int r = 0; r < kUnroll<T>; ++r) cuda::store(to + r * step, has(r) ? count : 0, false, from[r]);
    }
  }
};

// An activation. Kernels are compiled for None, for Relu, and (Op is void) for one that blocks learn of as they run: to
// compile them for each would take as long as all else together.
template <class T, class Operation>
struct Activated {
  using Op = Operation;
  using Values = typename Rows<T>::Values;
  Activation activation;

  // Of x, normalised by what each column has for it.
  template <class Normalizer>
  __device__ __forceinline__ void forward(const Normalizer (&normalize)[Rows<T>::width], Values& x) const {
    for_values([&](auto op, int r, int k) { x[r][k] = op.forward(normalize[k](x[r][k])); });
  }
  // g, the gradient of that, becomes the gradient of what the activation saw.
  template <class Normalizer>
  __device__ __forceinline__ void backward(const Normalizer (&normalize)[Rows<T>::width], const Values& x,
                                           Values& g) const {
    for_values(
        [&](auto op, int r, int k) { g[r][k] = backward_from_pre<decltype(op)>(g[r][k], normalize[k](x[r][k])); });
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_values(const F& f) const {
    const auto all = [&](auto op) {
#pragma unroll
      for (int r = 0; r < kUnroll<T>; ++r)
#pragma unroll
        for (int k = 0; k < Rows<T>::width; ++k) f(op, r, k);
    };
    if constexpr (std::is_void_v<Op>) {
      cuda::for_activation<T>(activation, all);
    } else {
      all(Op{});
    }
  }
};
template <class T, class F>
int dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::none: return f(Activated<T, None>{activation});
    case Activation::relu: return f(Activated<T, Relu>{activation});
    default: return f(Activated<T, void>{activation});
  }
}

// What belongs to the channels; C: the compute type.
template <class C>
struct Channels {
  int64_t count;
  double* stats;  // mean and variance
  double eps;
  const C *weight, *bias;  // or null
  // Of the backward pass:
  bool of_batch = true;
  C *grad_weight = nullptr, *grad_bias = nullptr;  // or null

  __device__ __forceinline__ double mean(int64_t channel) const { return stats[channel]; }
  __device__ __forceinline__ double variance(int64_t channel) const { return stats[count + channel]; }
  __device__ __forceinline__ void keep(int64_t channel, double mean, double variance) const {
    stats[channel] = mean;
    stats[count + channel] = variance;
  }
  __device__ __forceinline__ double weight_of(int64_t channel) const {
    return weight != nullptr ? double(weight[channel]) : 1;
  }
  __device__ __forceinline__ Normalize<C> normalize(int64_t channel, double mean, double variance) const {
    return Normalize<C>::of(mean, variance, eps, weight_of(channel), bias != nullptr ? double(bias[channel]) : 0);
  }
  // sums: of g and of g * (x - center).
  __device__ __forceinline__ Gradients<C> gradients(int64_t channel, double elements, const double (&sums)[2]) const {
    return Gradients<C>::of(mean(channel), variance(channel), eps, weight_of(channel), elements, sums[0], sums[1],
                            of_batch);
  }
  __device__ __forceinline__ void keep(int64_t channel, const Gradients<C>& gradients) const {
    if (grad_weight != nullptr) grad_weight[channel] = gradients.weight;
    if (grad_bias != nullptr) grad_bias[channel] = gradients.bias;
  }
};

// What the elements of a channel need on the way back.
template <class C>
struct Backpropagate : Normalize<C> {
  C slope, offset;

  // g: the gradient of what the activation saw.
  __device__ __forceinline__ C gradient(C g, C x) const {
    return input_gradient(g, x, this->center, this->scale, slope, offset);
  }
};

// A thread's columns of what the block has for each of its columns, or for all of them.
template <class Value, int width>
__device__ __forceinline__ void take(const Value* of_columns, bool by_column, Value (&own)[width]) {
#pragma unroll
  for (int k = 0; k < width; ++k) own[k] = of_columns[by_column ? int(threadIdx.x) * width + k : 0];
}

// f(column) for each of the block's channels, in one thread: their arithmetic is in float64, of which many GPUs have
// next to none. What f leaves in shared memory all threads may read afterwards.
template <class F>
__device__ __forceinline__ void for_columns(int channels, const F& f) {
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  if (thread < channels) f(thread);
  __syncthreads();
}

// f(column, sums) likewise: of n numbers of every thread and column their sums over the threads below one another, or,
// where there is one channel and not one for each column, over all; in a fixed tree. At most `across` threads lie side
// by side where a column is a channel.
template <int threads, int across, int n, int width, class V, class F>
__device__ __forceinline__ void for_sums(const V (&own)[n][width], int channels, bool by_column, const F& f) {
  constexpr int warps = threads / cuda::kWarp;
  __shared__ double of_warps[n][warps][across * width];
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x), lane = thread % cuda::kWarp;
  const int side_by_side = by_column ? int(blockDim.x) : 1;
  double values[n][width];
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int k = 0; k < width; ++k) values[i][k] = double(own[i][k]);
    if (by_column) continue;
#pragma unroll
    for (int k = 1; k < width; ++k) values[i][0] += values[i][k];
  }
#pragma unroll 1
  for (int distance = cuda::kWarp / 2; distance >= side_by_side; distance /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int k = 0; k < width; ++k) values[i][k] += __shfl_xor_sync(cuda::kAllLanes, values[i][k], distance);
  }
  if (lane < side_by_side) {
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int k = 0; k < width; ++k) of_warps[i][thread / cuda::kWarp][lane * width + k] = values[i][k];
  }
  __syncthreads();
  for_columns(channels, [&](int column) {
    double sums[n] = {};
#pragma unroll
    for (int i = 0; i < n; ++i)
      for (int warp = 0; warp < warps; ++warp) sums[i] += of_warps[i][warp][column];
    f(column, sums);
  });
}

}  // namespace
}  // namespace gdbp::norm
