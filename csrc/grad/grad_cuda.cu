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
constexpr int kCapacity = 650;
#else
constexpr int kCapacity = 80;
#endif

struct Entry {
  const void* data;
  void* output;     // of what is not written in place; else null
  int64_t numel;    // of all units together
  int64_t unit;     // elements of each
  int first_chunk;  // chunks of the tensors before it, in this launch
  int first_unit;   // units likewise
  Dtype dtype;
  int index;  // among all tensors
};

struct Batch {
  Entry entries[kCapacity];
  int count;
};

// What a block finds out about its chunk of a tensor.
struct Chunk {
  int64_t begin, end;  // of a unit, elements
  int number;          // among the chunks of this launch
  int unit;            // among its units
  void* output;        // of the tensor
};

// The last entry that begins at `at` or before, by what `first` says.
template <class First>
__device__ __forceinline__ const Entry& find(const Batch& batch, int at, First first) {
  int low = 0;
  for (int high = batch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (first(batch.entries[middle]) <= at ? low : high) = middle;
  }
  return batch.entries[low];
}
__device__ __forceinline__ int chunks_of_unit(const Entry& entry) {
  return int((entry.unit + kCudaChunk - 1) / kCudaChunk);
}

// Calls f(values, at, count) for kWidth neighbours at a time. A unit's chunk may begin anywhere.
template <class T, class F>
__device__ __forceinline__ void for_each(const T* x, int64_t begin, int64_t end, F f) {
  constexpr int step = kThreads * kWidth;
  const bool vectors = cuda::aligned_for<kWidth>(x + begin);
  int64_t at = begin + int64_t(threadIdx.x) * kWidth;
  if (vectors)
    at = cuda::for_vectors<4, kWidth>(x, at, step, end, [&](int64_t at, auto& values) { f(values, at, kWidth); });
  for (; at < end; at += step) {
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
  __device__ void operator()(const T* x, const Chunk& chunk) const {
    double sum = 0;
    for_each(x, chunk.begin, chunk.end, [&](const auto& values, int64_t, int) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum = terms(sum, terms.term(double(values[k])));
    });
    sum = cuda::block_reduce<kThreads>(sum, terms, 0.0);
    if (threadIdx.x == 0) partial[chunk.number] = sum;
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
  __device__ void operator()(const T* x, const Chunk& chunk) const {
    Health sums = {};
    for_each(x, chunk.begin, chunk.end, [&](const auto& values, int64_t, int count) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (k < count) add(sums, double(values[k]));
      }
    });
    sums = reduce(sums);
    if (threadIdx.x == 0) partial[chunk.number] = sums;
  }
};

// Every element of the chunk replaced by f of it, or that written to `to`.
template <class T, class F>
__device__ __forceinline__ void rewrite_chunk(const T* x, T* to, const Chunk& chunk, const F& f) {
  const bool vectors = cuda::aligned_for<kWidth>(to + chunk.begin);
  for_each(x, chunk.begin, chunk.end, [&](auto& values, int64_t at, int count) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = f(values[k]);
    cuda::store(to + at, count, vectors, values);
  });
}

// Multiplies by the unit's coefficient, or by the one of all.
struct Scale {
  const double* coefficients;
  bool each;
  __device__ bool idle() const { return !each && *coefficients == 1; }
  template <class T>
  __device__ void operator()(const T* x, const Chunk& chunk) const {
    const double factor = coefficients[each ? chunk.unit : 0];
    if (factor == 1) return;
    rewrite_chunk(x, const_cast<T*>(x), chunk, [=](auto value) { return value * Compute<T>(factor); });
  }
};

struct Clamp {
  double limit;
  template <class T>
  __device__ void operator()(const T* x, const Chunk& chunk) const {
    rewrite_chunk(x, const_cast<T*>(x), chunk, [=, *this](auto value) { return clamp(value, Compute<T>(limit)); });
  }
};

struct PenaltySlope {
  Penalty penalty;
  const double* upstream;
  template <class T>
  __device__ void operator()(const T* x, const Chunk& chunk) const {
    using C = Compute<T>;
    const C l1 = C(penalty.l1), l2 = C(penalty.l2), factor = C(*upstream);
    rewrite_chunk(x, static_cast<T*>(chunk.output), chunk,
                  [=](C value) { return factor * penalty_slope(value, l1, l2); });
  }
};

// Which tensor the block's chunk belongs to is a binary search over first_chunk.
template <class F>
__global__ void __launch_bounds__(kThreads) chunk_kernel(GDBP_GRID_CONSTANT(Batch) batch, F f) {
  if (cuda::is_idle(f, 0)) return;
  const int number = int(blockIdx.x);
  const Entry& entry = find(batch, number, [](const Entry& e) { return e.first_chunk; });
  const int local = number - entry.first_chunk, per_unit = chunks_of_unit(entry), unit = local / per_unit;
  const int64_t first = unit * entry.unit, begin = first + (local - unit * per_unit) * kCudaChunk;
  const int64_t end = begin + kCudaChunk < first + entry.unit ? begin + kCudaChunk : first + entry.unit;
  const Chunk chunk{begin, end, number, entry.first_unit + unit, entry.output};
  cuda::for_dtype(entry.dtype,
                  [&](auto type) { f(static_cast<const typename decltype(type)::type*>(entry.data), chunk); });
}

// What becomes of the sum of all terms.
struct Decide {
  Limit limit;
  Norm* norm;
  __device__ void operator()(double total) const { *norm = decide(total, limit); }
};
struct Store {
  double* value;
  __device__ void operator()(double total) const { *value = total; }
};

// One block: each thread adds every kTotalThreads-th chunk in order, then the threads in a fixed tree.
constexpr int kTotalThreads = 1024;
template <class Terms, class Finish>
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(Terms terms, const double* partial, int64_t chunks, Finish finish) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < chunks; i += kTotalThreads) sum = terms(sum, partial[i]);
  sum = cuda::block_reduce<kTotalThreads>(sum, terms, 0.0);
  if (threadIdx.x == 0) finish(sum);
}

// The same for the chunks of one unit a block.
template <class Terms>
__global__ void __launch_bounds__(kThreads)
    unit_kernel(GDBP_GRID_CONSTANT(Batch) batch, Terms terms, const double* partial, double order, double* norms) {
  const int number = int(blockIdx.x);
  const Entry& entry = find(batch, number, [](const Entry& e) { return e.first_unit; });
  const int chunks = chunks_of_unit(entry), unit = number - entry.first_unit;
  const double* const own = partial + entry.first_chunk + int64_t(unit) * chunks;
  double sum = 0;
  for (int i = int(threadIdx.x); i < chunks; i += kThreads) sum = terms(sum, own[i]);
  sum = cuda::block_reduce<kThreads>(sum, terms, 0.0);
  if (threadIdx.x == 0) norms[number] = root(sum, order);
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

// How much there is in a batch, and in those before it.
struct Extent {
  int64_t chunks = 0, units = 0, chunks_before = 0, units_before = 0;
};

// Calls launch(batch, extent) for every batch; outputs may be null.
template <class F>
int for_batches(const Source* sources, int64_t count, void* const* outputs, const F& launch) {
  Extent extent;
  Batch batch;
  batch.count = 0;
  for (int64_t i = 0; i <= count; ++i) {
    if (batch.count > 0 && (i == count || batch.count == kCapacity)) {
      if (const int error = launch(batch, extent)) return error;
      extent = {0, 0, extent.chunks_before + extent.chunks, extent.units_before + extent.units};
      batch.count = 0;
    }
    if (i == count) continue;
    const Source& s = sources[i];
    if (s.numel == 0) {
      extent.units += s.units;
      continue;
    }
    batch.entries[batch.count++] = {s.data,
                                    outputs != nullptr ? outputs[i] : nullptr,
                                    s.numel,
                                    s.numel / s.units,
                                    int(extent.chunks),
                                    int(extent.units),
                                    s.dtype,
                                    int(i)};
    extent.chunks += cuda_chunks(s);
    extent.units += s.units;
  }
  return 0;
}

// Runs what make(extent) returns over every chunk.
template <class Make>
int for_chunks(const Source* sources, int64_t count, void* const* outputs, void* stream, const Make& make) {
  return for_batches(sources, count, outputs, [&](const Batch& batch, const Extent& extent) {
    const auto body = make(extent);
    return GDBP_LAUNCH(chunk_kernel<std::decay_t<decltype(body)>>, unsigned(extent.chunks), kThreads, 0, stream, batch,
                       body);
  });
}

// The terms of all sources added up, and handed to finish.
template <class Terms, class Finish>
int sum_terms(const Source* sources, int64_t count, const Terms& terms, const Finish& finish, void* workspace,
              void* stream) {
  double* const partial = static_cast<double*>(workspace);
  const int error = for_chunks(sources, count, nullptr, stream, [&](const Extent& extent) {
    return NormOfChunk<Terms>{terms, partial + extent.chunks_before};
  });
  if (error != 0) return error;
  return GDBP_LAUNCH((total_kernel<Terms, Finish>), 1, kTotalThreads, 0, stream, terms, partial,
                     cuda_chunks(sources, count), finish);
}

// The health of nothing.
__global__ void __launch_bounds__(kThreads) clear_kernel(int64_t count, Health* health) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) health[i] = {};
}

}  // namespace

int norm_cuda(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void* workspace, void* stream) {
  return dispatch_order(limit.order, [&](auto terms) {
    return sum_terms(sources, count, terms, Decide{limit, norm}, workspace, stream);
  });
}

int unit_norms_cuda(const Source* sources, int64_t count, double order, double* norms, void* workspace, void* stream) {
  double* const partial = static_cast<double*>(workspace);
  return dispatch_order(order, [&](auto terms) {
    using Terms = decltype(terms);
    return for_batches(sources, count, nullptr, [&](const Batch& batch, const Extent& extent) {
      const NormOfChunk<Terms> body{terms, partial};
      const int failed =
          GDBP_LAUNCH(chunk_kernel<NormOfChunk<Terms>>, unsigned(extent.chunks), kThreads, 0, stream, batch, body);
      if (failed != 0) return failed;
      return GDBP_LAUNCH(unit_kernel<Terms>, unsigned(extent.units), kThreads, 0, stream, batch, terms, partial, order,
                         norms + extent.units_before);
    });
  });
}

int health_cuda(const Source* sources, int64_t count, Health* health, void* workspace, void* stream) {
  if (count == 0) return 0;
  Health* const partial = static_cast<Health*>(workspace);
  const int error =
      GDBP_LAUNCH(clear_kernel, unsigned(cuda::ceil_div(count, kThreads)), kThreads, 0, stream, count, health);
  if (error != 0) return error;
  return for_batches(sources, count, nullptr, [&](const Batch& batch, const Extent& extent) {
    const HealthOfChunk body{partial};
    const int failed =
        GDBP_LAUNCH(chunk_kernel<HealthOfChunk>, unsigned(extent.chunks), kThreads, 0, stream, batch, body);
    if (failed != 0) return failed;
    return GDBP_LAUNCH(health_kernel, unsigned(batch.count), kThreads, 0, stream, batch, partial, health);
  });
}

int scale_cuda(const Source* sources, int64_t count, const double* coefficient, void* stream) {
  return for_chunks(sources, count, nullptr, stream, [&](const Extent&) { return Scale{coefficient, false}; });
}

int scale_units_cuda(const Source* sources, int64_t count, const double* coefficients, void* stream) {
  return for_chunks(sources, count, nullptr, stream,
                    [&](const Extent& extent) { return Scale{coefficients + extent.units_before, true}; });
}

int clamp_cuda(const Source* sources, int64_t count, double limit, void* stream) {
  return for_chunks(sources, count, nullptr, stream, [&](const Extent&) { return Clamp{limit}; });
}

int penalty_cuda(const Source* sources, int64_t count, const Penalty& penalty, double* value, void* workspace,
                 void* stream) {
  return sum_terms(sources, count, Penalties(penalty), Store{value}, workspace, stream);
}

int penalty_slope_cuda(const Source* sources, int64_t count, const Penalty& penalty, const double* upstream,
                       void* const* outputs, void* stream) {
  return for_chunks(sources, count, outputs, stream, [&](const Extent&) { return PenaltySlope{penalty, upstream}; });
}

}  // namespace gdbp::grad
