// The norm of many gradients: one launch a batch of tensors for the sums of chunks, one for their total.
#include "common/map_cuda.cuh"
#include "common/reduce_cuda.cuh"
#include "grad/grad.h"
#include "grad/grad_math.h"

namespace gdbp::grad {
namespace {

using cuda::kThreads;

constexpr int kWidth = 4;
#if CUDART_VERSION >= 13000
constexpr int kCapacity = 900;
#else
constexpr int kCapacity = 110;
#endif

struct Entry {
  Source source;
  int64_t first_chunk;  // chunks of the tensors before it, in this launch
};

struct Batch {
  Entry entries[kCapacity];
  int count;
};

template <class T>
__device__ __forceinline__ double sum_of_squares(const T* x, int64_t begin, int64_t end) {
  const bool vectors = reinterpret_cast<uintptr_t>(x) % (kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) == 0;
  double sum = 0;
  for (int64_t at = begin + int64_t(threadIdx.x) * kWidth; at < end; at += kThreads * kWidth) {
    Compute<T> values[kWidth];
    cuda::load(x + at, int(end - at < kWidth ? end - at : kWidth), vectors, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += square(values[k]);
  }
  return sum;
}

// One block per chunk; which tensor the chunk belongs to is a binary search over first_chunk.
__global__ void __launch_bounds__(kThreads) chunk_kernel(GDBP_GRID_CONSTANT(Batch) batch, double* partial) {
  const int64_t chunk = blockIdx.x;
  int low = 0;
  for (int high = batch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  const Source& source = batch.entries[low].source;
  const int64_t begin = (chunk - batch.entries[low].first_chunk) * kCudaChunk;
  const int64_t end = begin + kCudaChunk < source.numel ? begin + kCudaChunk : source.numel;
  double sum = 0;
  switch (source.dtype) {
    case Dtype::float64: sum = sum_of_squares(static_cast<const double*>(source.data), begin, end); break;
    case Dtype::float32: sum = sum_of_squares(static_cast<const float*>(source.data), begin, end); break;
    case Dtype::bfloat16: sum = sum_of_squares(static_cast<const BFloat16*>(source.data), begin, end); break;
    default: sum = sum_of_squares(static_cast<const Float16*>(source.data), begin, end); break;
  }
  sum = cuda::block_reduce<kThreads>(sum, cuda::Sum{}, 0.0);
  if (threadIdx.x == 0) partial[chunk] = sum;
}

// One block: each thread adds every kThreads-th chunk in order, then the threads in a fixed tree.
__global__ void __launch_bounds__(kThreads)
    decide_kernel(const double* partial, int64_t chunks, Limit limit, Norm* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += partial[i];
  sum = cuda::block_reduce<kThreads>(sum, cuda::Sum{}, 0.0);
  if (threadIdx.x == 0) *norm = decide(sum, limit);
}

}  // namespace

int norm_cuda(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* workspace, void* stream) {
  double* const partial = static_cast<double*>(workspace);
  int64_t done = 0, chunks = 0;
  Batch batch;
  batch.count = 0;
  const auto launch = [&] {
    if (batch.count == 0) return 0;
    const int error = GDBP_LAUNCH(chunk_kernel, unsigned(chunks), kThreads, 0, stream, batch, partial + done);
    done += chunks;
    batch.count = 0;
    chunks = 0;
    return error;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (sources[i].numel == 0) continue;
    batch.entries[batch.count++] = {sources[i], chunks};
    chunks += cuda::ceil_div(sources[i].numel, kCudaChunk);
    if (batch.count == kCapacity) {
      if (const int error = launch()) return error;
    }
  }
  if (const int error = launch()) return error;
  return GDBP_LAUNCH(decide_kernel, 1, kThreads, 0, stream, partial, done, limit, norm);
}

}  // namespace gdbp::grad
