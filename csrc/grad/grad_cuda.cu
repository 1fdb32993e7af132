// One pass over many gradients: one launch a batch of tensors, a block a chunk; sums of chunks are added by
// another launch, in order.
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
  const void* data;
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before it, in this launch
  Dtype dtype;
  int index;  // among all tensors
};

struct Batch {
  Entry entries[kCapacity];
  int count;
};

// Calls f(values, at, count) for kWidth neighbours at a time.
template <class T, class F>
__device__ __forceinline__ void for_each(const T* x, int64_t begin, int64_t end, F f) {
  const bool vectors = reinterpret_cast<uintptr_t>(x) % (kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) == 0;
  for (int64_t at = begin + int64_t(threadIdx.x) * kWidth; at < end; at += kThreads * kWidth) {
    Compute<T> values[kWidth];
    const int count = int(end - at < kWidth ? end - at : kWidth);
    cuda::load(x + at, count, vectors, values);
    f(values, at, count);
  }
}

// What a block does with its chunk [begin, end) of x.
template <class Terms>
struct NormOfChunk {
  Terms terms;
  double* partial;
  template <class T>
  __device__ void operator()(const T* x, int64_t begin, int64_t end, int64_t chunk) const {
    double sum = 0;
    for_each(x, begin, end, [&](const auto& values, int64_t, int) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum = terms(sum, terms.term(double(values[k])));
    });
    sum = cuda::block_reduce<kThreads>(sum, terms, 0.0);
    if (threadIdx.x == 0) partial[chunk] = sum;
  }
};

__device__ __forceinline__ Health reduce(Health health) {
  const cuda::Sum sum;
  health.norm = cuda::block_reduce<kThreads>(health.norm, sum, 0.0);
  health.largest = cuda::block_reduce<kThreads>(health.largest, cuda::Max{}, 0.0);
  health.mean = cuda::block_reduce<kThreads>(health.mean, sum, 0.0);
  health.nans = cuda::block_reduce<kThreads>(health.nans, sum, 0.0);
  health.infinities = cuda::block_reduce<kThreads>(health.infinities, sum, 0.0);
  health.zeros = cuda::block_reduce<kThreads>(health.zeros, sum, 0.0);
  return health;
}

struct HealthOfChunk {
  Health* partial;
  template <class T>
  __device__ void operator()(const T* x, int64_t begin, int64_t end, int64_t chunk) const {
    Health sums = {};
    for_each(x, begin, end, [&](const auto& values, int64_t, int count) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (k < count) add(sums, double(values[k]));
      }
    });
    sums = reduce(sums);
    if (threadIdx.x == 0) partial[chunk] = sums;
  }
};

// Multiplies by *coefficient, or where that is null clamps to the limit.
struct Rewrite {
  const double* coefficient;
  double limit;
  template <class T>
  __device__ void operator()(const T* x, int64_t begin, int64_t end, int64_t) const {
    using C = Compute<T>;
    const double factor = coefficient != nullptr ? *coefficient : 0;
    if (factor == 1) return;
    const bool scales = coefficient != nullptr;
    const bool whole = reinterpret_cast<uintptr_t>(x) % (kWidth * sizeof(T) < 16 ? kWidth * sizeof(T) : 16) == 0;
    for_each(x, begin, end, [&](auto& values, int64_t at, int count) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = scales ? values[k] * C(factor) : clamp(values[k], C(limit));
      cuda::store(const_cast<T*>(x) + at, count, whole, values);
    });
  }
};

// Which tensor the block's chunk belongs to is a binary search over first_chunk.
template <class F>
__global__ void __launch_bounds__(kThreads) chunk_kernel(GDBP_GRID_CONSTANT(Batch) batch, F f) {
  const int64_t chunk = blockIdx.x;
  int low = 0;
  for (int high = batch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  const Entry& entry = batch.entries[low];
  const int64_t begin = (chunk - entry.first_chunk) * kCudaChunk;
  const int64_t end = begin + kCudaChunk < entry.numel ? begin + kCudaChunk : entry.numel;
  switch (entry.dtype) {
    case Dtype::float64: f(static_cast<const double*>(entry.data), begin, end, chunk); break;
    case Dtype::float32: f(static_cast<const float*>(entry.data), begin, end, chunk); break;
    case Dtype::bfloat16: f(static_cast<const BFloat16*>(entry.data), begin, end, chunk); break;
    default: f(static_cast<const Float16*>(entry.data), begin, end, chunk); break;
  }
}

// One block: each thread adds every kThreads-th chunk in order, then the threads in a fixed tree.
template <class Terms>
__global__ void __launch_bounds__(kThreads)
    decide_kernel(Terms terms, const double* partial, int64_t chunks, Limit limit, Norm* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum = terms(sum, partial[i]);
  sum = cuda::block_reduce<kThreads>(sum, terms, 0.0);
  if (threadIdx.x == 0) *norm = decide(sum, limit);
}

// The same for the chunks of one tensor a block.
__global__ void __launch_bounds__(kThreads)
    health_kernel(GDBP_GRID_CONSTANT(Batch) batch, const Health* partial, Health* health) {
  const Entry& entry = batch.entries[blockIdx.x];
  const int64_t chunks = (entry.numel + kCudaChunk - 1) / kCudaChunk;
  Health sums = {};
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) add(sums, partial[entry.first_chunk + i]);
  sums = reduce(sums);
  if (threadIdx.x == 0) health[entry.index] = finish(sums, entry.numel);
}

// Calls launch(batch, chunks, done) for every batch; done: the chunks of those before it.
template <class F>
int for_batches(const Source* sources, int64_t count, const F& launch) {
  int64_t done = 0, chunks = 0;
  Batch batch;
  batch.count = 0;
  for (int64_t i = 0; i <= count; ++i) {
    if (batch.count > 0 && (i == count || batch.count == kCapacity)) {
      if (const int error = launch(batch, chunks, done)) return error;
      done += chunks;
      batch.count = 0;
      chunks = 0;
    }
    if (i == count || sources[i].numel == 0) continue;
    batch.entries[batch.count++] = {sources[i].data, sources[i].numel, chunks, sources[i].dtype, int(i)};
    chunks += cuda::ceil_div(sources[i].numel, kCudaChunk);
  }
  return 0;
}

int rewrite(const Source* sources, int64_t count, const Rewrite& how, void* stream) {
  return for_batches(sources, count, [&](const Batch& batch, int64_t chunks, int64_t) {
    return GDBP_LAUNCH(chunk_kernel<Rewrite>, unsigned(chunks), kThreads, 0, stream, batch, how);
  });
}

// The health of nothing.
__global__ void __launch_bounds__(kThreads) clear_kernel(int64_t count, Health* health) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) health[i] = {};
}

}  // namespace

int norm_cuda(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* workspace, void* stream) {
  double* const partial = static_cast<double*>(workspace);
  return dispatch_order(limit.order, [&](auto terms) {
    using Terms = decltype(terms);
    int64_t total = 0;
    const int error = for_batches(sources, count, [&](const Batch& batch, int64_t chunks, int64_t done) {
      total = done + chunks;
      const NormOfChunk<Terms> body{terms, partial + done};
      return GDBP_LAUNCH(chunk_kernel<NormOfChunk<Terms>>, unsigned(chunks), kThreads, 0, stream, batch, body);
    });
    if (error != 0) return error;
    return GDBP_LAUNCH(decide_kernel<Terms>, 1, kThreads, 0, stream, terms, partial, total, limit, norm);
  });
}

int health_cuda(const Source* sources, int64_t count, Health* health, void* workspace, void* stream) {
  if (count == 0) return 0;
  Health* const partial = static_cast<Health*>(workspace);
  const int error =
      GDBP_LAUNCH(clear_kernel, unsigned(cuda::ceil_div(count, kThreads)), kThreads, 0, stream, count, health);
  if (error != 0) return error;
  return for_batches(sources, count, [&](const Batch& batch, int64_t chunks, int64_t done) {
    const HealthOfChunk body{partial + done};
    const int failed = GDBP_LAUNCH(chunk_kernel<HealthOfChunk>, unsigned(chunks), kThreads, 0, stream, batch, body);
    if (failed != 0) return failed;
    return GDBP_LAUNCH(health_kernel, unsigned(batch.count), kThreads, 0, stream, batch, partial + done, health);
  });
}

int scale_cuda(const Source* sources, int64_t count, const double* coefficient, void* stream) {
  return rewrite(sources, count, {coefficient, 0}, stream);
}

int clamp_cuda(const Source* sources, int64_t count, double limit, void* stream) {
  return rewrite(sources, count, {nullptr, limit}, stream);
}

}  // namespace gdbp::grad
