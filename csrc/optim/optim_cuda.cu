// The multi-tensor step on CUDA: a batch of tensors in one launch, described in the kernel's own
// arguments, so that nothing is copied to the device beforehand.
#include <cstring>
#include <new>

#include "common/map_cuda.cuh"
#include "common/random.h"
#include "common/reduce_cuda.cuh"
#include "optim/blockwise8_cuda.cuh"
#include "optim/optim.h"

namespace gdbp::optim {
namespace {

using cuda::kThreads;

// Elements that a thread handles at a time, and bytes of the parameter that a block handles in all.
constexpr int kWidth = 4;
constexpr int64_t kChunkBytes = 16384;
GDBP_HD constexpr int64_t chunk_elements(Dtype dtype) { return kChunkBytes / size_of(dtype); }
// Where gradients are to be summed first, the threads of a block share out the parts of few elements: those of a warp.
constexpr int kSumElements = cuda::kWarp * kWidth, kSumWarps = kThreads / cuda::kWarp;

// Kernel arguments had 4 KB before CUDA 12.1; compute capability 7.0, which has 32 KB, is the least that
// CUDA 13 knows.
#if CUDART_VERSION >= 13000
constexpr size_t kArgumentBytes = 32000;
#else
constexpr size_t kArgumentBytes = 4000;
#endif

// What is written besides, and states of 8 bits, for the few tensors that have it; the others save the room.
template <int states, class T, bool extra>
struct Extra {};
template <int states, class T>
struct Extra<states, T, true> {
  float* scale[states > 0 ? states : 1];
  void* copy;
  void* average;
  uint64_t seed;
  T average_weight;
  Dtype copy_dtype, average_dtype;
};

template <int states, class T, bool extra>
struct Tensor : Extra<states, T, extra> {
  void* param;
  const void* grad;
  void* state[states > 0 ? states : 1];
  int64_t numel;
  static constexpr bool has_extra = extra;
  uint32_t first_chunk;  // chunks of the tensors before it
  uint8_t constants;
  Dtype param_dtype, grad_dtype, state_dtype;
};

// What tensors of one group at the same step have in common.
template <class Rule, class T>
struct Constants {
  Surroundings<T> around;
  Rule rule;
};

template <class Rule, class T, bool extra>
struct Batch {
  using Entry = Tensor<Rule::states, T, extra>;
  using Common = Constants<Rule, T>;
  static constexpr int most_constants = kArgumentBytes > 8000 ? 32 : 8;
  static constexpr int capacity = int((kArgumentBytes - 48 - most_constants * sizeof(Common)) / sizeof(Entry));
  const Control* control;
  int64_t part_stride = 0;
  int parts = 0;
  int count = 0;
  int constants_count = 0;
  Entry entries[capacity];
  // Rules have no default state, so the places are bytes until constants are put there.
  alignas(Common) unsigned char constants_bytes[most_constants * sizeof(Common)];

  explicit Batch(const Control* control) : control(control) {}
  GDBP_HD const Common& constants(int i) const { return reinterpret_cast<const Common*>(constants_bytes)[i]; }
};

// The types of arrays are known at run time only. All threads of a block take the same branch. of_param: whether it is
// the parameter, which is of float64 where T is double, and nowhere else.
template <bool of_param, class T, class F>
__device__ __forceinline__ void for_dtype(Dtype dtype, const F& f) {
  if constexpr (!of_param) {
    cuda::for_dtype(dtype, f);
  } else if constexpr (sizeof(T) == 8) {
    f(Type<double>{});
  } else {
    cuda::for_narrow_dtype(dtype, f);
  }
}
template <bool of_param = false, class T>
__device__ __forceinline__ void read(const void* base, Dtype dtype, int64_t at, int count, bool vectors,
                                     T (&to)[kWidth]) {
  for_dtype<of_param, T>(dtype, [&](auto type) {
    cuda::load(static_cast<const typename decltype(type)::type*>(base) + at, count, vectors, to);
  });
}
template <bool of_param = false, class T>
__device__ __forceinline__ void write(void* base, Dtype dtype, int64_t at, int count, bool vectors,
                                      const T (&from)[kWidth]) {
  for_dtype<of_param, T>(dtype, [&](auto type) {
    cuda::store(static_cast<typename decltype(type)::type*>(base) + at, count, vectors, from);
  });
}

static_assert(kWidth == kWordCodes);

template <class T>
__device__ __forceinline__ void read8(const int8_t* codes, const float* scale, int64_t at, int count, bool vectors,
                                      T (&to)[kWidth]) {
  uint32_t word = 0;
  if (vectors && count == kWidth) {
    word = *reinterpret_cast<const uint32_t*>(codes + at);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) word |= k < count ? uint32_t(uint8_t(codes[at + k])) << (8 * k) : 0;
  }
  decode_word(word, count > 0 ? scale[uint64_t(at) / kQuantBlock] : 0, to);
}

template <class T>
__device__ __forceinline__ void write8(int8_t* codes, float* scale, int64_t at, int count, bool vectors, uint64_t seed,
                                       int state, const T (&from)[kWidth]) {
  const float stored = warp_scale8(from, count);
  if (at % kQuantBlock == 0 && count > 0) scale[uint64_t(at) / kQuantBlock] = stored;
  const uint32_t word = encode_word(from, stored, at, seed, state);
  if (vectors && count == kWidth) {
    *reinterpret_cast<uint32_t*>(codes + at) = word;
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (k < count) codes[at + k] = int8_t(word >> (8 * k));
  }
}

template <class Entry, class T>
__device__ __forceinline__ void read_state(const Entry& t, int i, int64_t at, int count, bool vectors,
                                           T (&to)[kWidth]) {
  if constexpr (Entry::has_extra) {
    if (t.state_dtype == Dtype::blockwise8)
      return read8(static_cast<const int8_t*>(t.state[i]), t.scale[i], at, count, vectors, to);
  }
  read(t.state[i], t.state_dtype, at, count, vectors, to);
}
template <class Entry, class T>
__device__ __forceinline__ void write_state(const Entry& t, int i, int64_t at, int count, bool vectors,
                                            const T (&from)[kWidth]) {
  if constexpr (Entry::has_extra) {
    if (t.state_dtype == Dtype::blockwise8)
      return write8(static_cast<int8_t*>(t.state[i]), t.scale[i], at, count, vectors, state_seed8(t.seed), i, from);
  }
  write(t.state[i], t.state_dtype, at, count, vectors, from);
}

// Whether the loop goes on: where blocks are quantised, for all lanes of a warp as long as one has elements.
template <bool extra>
GDBP_HD bool in_reach(int64_t at, int64_t end) {
  return (extra ? at - at % kQuantBlock : at) < end;
}

// The new parameters, and what goes beyond them.
template <class Entry, class T>
__device__ __forceinline__ void write_extra(const Entry& t, int64_t at, int count, bool vectors, const T (&p)[kWidth]) {
  if (t.seed != 0 && t.param_dtype == Dtype::bfloat16) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (k < count)
        static_cast<BFloat16*>(t.param)[at + k] = narrow_stochastic(float(p[k]), random_bits(t.seed, at + k));
    }
  } else {
    write<true>(t.param, t.param_dtype, at, count, vectors, p);
  }
  if (t.copy) write(t.copy, t.copy_dtype, at, count, vectors, p);
  if (!t.average) return;
  T average[kWidth];
  read(t.average, t.average_dtype, at, count, vectors, average);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) average[k] = lerp(average[k], p[k], t.average_weight);
  write(t.average, t.average_dtype, at, count, vectors, average);
}

// Whether elements can be read and written kWidth at a time.
GDBP_HD bool aligned(const void* pointer, Dtype dtype) {
  const int64_t bytes = kWidth * size_of(dtype);
  return cuda::aligned(pointer, bytes < 16 ? bytes : 16);
}

// The tensor that the block's chunk belongs to.
template <class Arguments>
__device__ __forceinline__ const typename Arguments::Entry& find_entry(const Arguments& batch) {
  const int64_t chunk = blockIdx.x;
  int low = 0;
  for (int high = batch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (batch.entries[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return batch.entries[low];
}

// The elements of a thread, from their gradients on.
template <class Rule, class Entry, class T>
__device__ __forceinline__ void update(const Entry& t, int64_t at, int count, bool vectors,
                                       const Surroundings<T>& around, const Rule& rule, const T (&g)[kWidth]) {
  T p[kWidth], s[Rule::states + 1][kWidth];
  read<true>(t.param, t.param_dtype, at, count, vectors, p);
#pragma unroll
  for (int i = 0; i < Rule::states; ++i) read_state(t, i, at, count, vectors, s[i]);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    T of_element[Rule::states + 1];
#pragma unroll
    for (int i = 0; i < Rule::states; ++i) of_element[i] = s[i][k];
    const T gradient = around.gradient(g[k], p[k]);
    p[k] *= around.keep;
    rule(p[k], gradient, of_element);
    p[k] = around.shrink(p[k]);
#pragma unroll
    for (int i = 0; i < Rule::states; ++i) s[i][k] = of_element[i];
  }
#pragma unroll
  for (int i = 0; i < Rule::states; ++i) write_state(t, i, at, count, vectors, s[i]);
  if constexpr (Entry::has_extra) {
    write_extra(t, at, count, vectors, p);
  } else {
    write<true>(t.param, t.param_dtype, at, count, vectors, p);
  }
}

// The same where gradients come in parts: each warp adds up every kSumWarps-th, the first one adds up the warps'. The
// order is the same for any GPU.
template <class Rule>
__global__ void __launch_bounds__(kThreads) sum_and_step_kernel(GDBP_GRID_CONSTANT(Batch<Rule, float, false>) batch) {
  if (batch.control && batch.control->skip != 0) return;
  __shared__ float sums[kSumWarps][kSumElements];
  const auto& t = find_entry(batch);
  const int warp = int(threadIdx.x) / cuda::kWarp, lane = int(threadIdx.x) % cuda::kWarp;
  const int64_t at = (int64_t(blockIdx.x) - t.first_chunk) * kSumElements + lane * kWidth;
  const int count = int(t.numel - at < kWidth ? (t.numel > at ? t.numel - at : 0) : kWidth);
  bool vectors = aligned(t.grad, Dtype::float32) && batch.part_stride % kWidth == 0;
  float g[kWidth] = {};
#pragma unroll 8
  for (int part = warp; part < batch.parts; part += kSumWarps) {
    float of_part[kWidth];
    cuda::load(static_cast<const float*>(t.grad) + part * batch.part_stride + at, count, vectors, of_part);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) g[k] += of_part[k];
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sums[warp][lane * kWidth + k] = g[k];
  __syncthreads();
  if (warp != 0 || count == 0) return;
  for (int w = 1; w < kSumWarps; ++w) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) g[k] += sums[w][lane * kWidth + k];
  }
  Surroundings<float> around = batch.constants(t.constants).around;
  if (batch.control) around.scale *= float(batch.control->coefficient);
  vectors = aligned(t.param, t.param_dtype);
#pragma unroll
  for (int i = 0; i < Rule::states; ++i) vectors = vectors && aligned(t.state[i], t.state_dtype);
  update(t, at, count, vectors, around, batch.constants(t.constants).rule, g);
}

// One block per chunk; which tensor the chunk belongs to is a binary search over first_chunk.
template <class Rule, class T, bool extra>
__global__ void __launch_bounds__(kThreads) step_kernel(GDBP_GRID_CONSTANT(Batch<Rule, T, extra>) batch) {
  if (batch.control && batch.control->skip != 0) return;
  const int64_t chunk = blockIdx.x;
  const auto& t = find_entry(batch);
  const Constants<Rule, T>& constants = batch.constants(t.constants);
  Surroundings<T> around = constants.around;
  if (batch.control) around.scale *= T(batch.control->coefficient);
  const Rule rule = constants.rule;
  bool vectors = aligned(t.param, t.param_dtype) && aligned(t.grad, t.grad_dtype);
#pragma unroll
  for (int i = 0; i < Rule::states; ++i) vectors = vectors && aligned(t.state[i], t.state_dtype);
  if constexpr (extra) vectors = vectors && aligned(t.copy, t.copy_dtype) && aligned(t.average, t.average_dtype);
  const int64_t elements = chunk_elements(t.param_dtype);
  const int64_t first = (chunk - t.first_chunk) * elements;
  const int64_t end = first + elements < t.numel ? first + elements : t.numel;
  for (int64_t at = first + int64_t(threadIdx.x) * kWidth; in_reach<extra>(at, end); at += kThreads * kWidth) {
    const int count = int(end - at < kWidth ? (end > at ? end - at : 0) : kWidth);
    T g[kWidth];
    read(t.grad, t.grad_dtype, at, count, vectors, g);
    update(t, at, count, vectors, around, rule, g);
  }
}

// Collects the tensors that are computed in T, and launches whenever the arguments are full. summed: whether their
// gradients come in parts.
template <class Rule, class T, bool extra, bool summed = false>
class Step {
 public:
  Step(const Control* control, void* stream) : batch_(control), stream_(stream) {}

  int add(const Slot& slot) {
    if (slot.numel == 0) return 0;
    // Tensors of a group are mostly at the same step; its constants cost two powers.
    if (!hyper_ || slot.hyper != hyper_ || slot.clock.step != clock_.step || slot.clock.product != clock_.product) {
      if (batch_.constants_count == Arguments::most_constants) {
        if (const int error = launch()) return error;
      }
      hyper_ = slot.hyper;
      clock_ = slot.clock;
      using Common = Constants<Rule, T>;
      new (batch_.constants_bytes + batch_.constants_count++ * sizeof(Common))
          Common{Surroundings<T>(*hyper_), Rule(*hyper_, clock_)};
    }
    auto& tensor = batch_.entries[batch_.count++];
    tensor.param = slot.param;
    tensor.grad = slot.grad;
    std::memcpy(tensor.state, slot.state, Rule::states * sizeof(void*));
    tensor.numel = slot.numel;
    tensor.first_chunk = uint32_t(chunks_);
    tensor.constants = uint8_t(batch_.constants_count - 1);
    tensor.param_dtype = slot.param_dtype;
    tensor.grad_dtype = slot.grad_dtype;
    tensor.state_dtype = slot.state_dtype;
    if constexpr (extra) {
      std::memcpy(tensor.scale, slot.scale, Rule::states * sizeof(float*));
      tensor.copy = slot.copy;
      tensor.average = slot.average;
      tensor.seed = slot.seed;
      tensor.average_weight = T(slot.average_weight);
      tensor.copy_dtype = slot.copy_dtype;
      tensor.average_dtype = slot.average_dtype;
    }
    batch_.parts = slot.parts;
    batch_.part_stride = slot.part_stride;
    chunks_ += cuda::ceil_div(slot.numel, summed ? kSumElements : chunk_elements(slot.param_dtype));
    return batch_.count == Arguments::capacity ? launch() : 0;
  }

  int launch() {
    if (batch_.count == 0) return 0;
    int error = 0;
    if constexpr (summed) {
      error = GDBP_LAUNCH(sum_and_step_kernel<Rule>, unsigned(chunks_), kThreads, 0, stream_, batch_);
    } else {
      const auto kernel = step_kernel<Rule, T, extra>;
      error = GDBP_LAUNCH(kernel, unsigned(chunks_), kThreads, 0, stream_, batch_);
    }
    batch_.count = batch_.constants_count = 0;
    chunks_ = 0;
    hyper_ = nullptr;
    return error;
  }

 private:
  using Arguments = Batch<Rule, T, extra>;
  const Hyper* hyper_ = nullptr;  // of the constants put in last
  Clock clock_{};
  Arguments batch_;
  void* stream_;
  int64_t chunks_ = 0;
};

template <template <class> class Rule, class T>
int step_in(const Slot* slots, int64_t count, const Control* control, void* stream) {
  // One kernel for all of float64, which is there to be right.
  Step<Rule<T>, T, sizeof(T) == 8> plain(control, stream);
  Step<Rule<T>, T, true> extra(control, stream);
  for (int64_t i = 0; i < count; ++i) {
    const Slot& slot = slots[i];
    if ((slot.param_dtype == Dtype::float64) != (sizeof(T) == 8)) continue;
    const int error = slot.has_extra() ? extra.add(slot) : plain.add(slot);
    if (error != 0) return error;
  }
  const int error = plain.launch();
  return error != 0 ? error : extra.launch();
}

template <class Rule>
int sum_and_step(const Slot* slots, int64_t count, const Control* control, void* stream) {
  Step<Rule, float, false, true> summed(control, stream);
  for (int64_t i = 0; i < count; ++i)
    if (const int error = summed.add(slots[i])) return error;
  return summed.launch();
}

template <template <class> class Rule>
int step(const Slot* slots, int64_t count, const Control* control, void* stream) {
  if (slots[0].parts > 0) return sum_and_step<Rule<float>>(slots, count, control, stream);
  const int error = step_in<Rule, float>(slots, count, control, stream);
  return error != 0 ? error : step_in<Rule, double>(slots, count, control, stream);
}

#define GDBP_ROW(name, Rule) &step<Rule>,
constexpr int (*kSteps[])(const Slot*, int64_t, const Control*, void*) = {GDBP_OPTIM_RULES(GDBP_ROW)};
#undef GDBP_ROW

}  // namespace

int step_cuda(int rule, const Slot* slots, int64_t count, const Control* control, void* stream) {
  return count == 0 ? 0 : kSteps[rule](slots, count, control, stream);
}

}  // namespace gdbp::optim
