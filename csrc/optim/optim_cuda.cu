// The multi-tensor step on CUDA: a batch of tensors in one launch, described in the kernel's own
// arguments, so that nothing is copied to the device beforehand.
#include <cstring>
#include <new>

#include "common/map_cuda.cuh"
#include "common/random.h"
#include "optim/optim.h"

namespace gdbp::optim {
namespace {

using cuda::kThreads;

// Elements that a thread handles at a time, and bytes of the parameter that a block handles in all.
constexpr int kWidth = 4;
constexpr int64_t kChunkBytes = 16384;
GDBP_HD constexpr int64_t chunk_elements(Dtype dtype) { return kChunkBytes / size_of(dtype); }

// Kernel arguments had 4 KB before CUDA 12.1; compute capability 7.0, which has 32 KB, is the least that
// CUDA 13 knows.
#if CUDART_VERSION >= 13000
constexpr size_t kArgumentBytes = 32000;
#else
constexpr size_t kArgumentBytes = 4000;
#endif

template <class Rule, class T>
struct Tensor {
  void* param;
  const void* grad;
  void* state[Rule::states > 0 ? Rule::states : 1];
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before it
  void* copy;
  void* average;
  uint64_t seed;
  T average_weight;
  Surroundings<T> around;
  Rule rule;  // with the constants of this tensor's step worked out
  Dtype param_dtype, grad_dtype, state_dtype, copy_dtype, average_dtype;
  bool vectors;
};

template <class Rule, class T>
struct Batch {
  using Entry = Tensor<Rule, T>;
  static constexpr int capacity = int((kArgumentBytes - 32) / sizeof(Entry));
  const Control* control;
  int count = 0;
  // Rules have no default state, so the places are bytes until a tensor is put there.
  alignas(Entry) unsigned char bytes[capacity * sizeof(Entry)];

  explicit Batch(const Control* control) : control(control) {}
  GDBP_HD const Entry& operator[](int i) const { return reinterpret_cast<const Entry*>(bytes)[i]; }
};

// The types of arrays are known at run time only. All threads of a block take the same branch.
template <class T>
__device__ __forceinline__ void read(const void* base, Dtype dtype, int64_t at, int count, bool vectors,
                                     T (&to)[kWidth]) {
  switch (dtype) {
    case Dtype::float64: return cuda::load(static_cast<const double*>(base) + at, count, vectors, to);
    case Dtype::float32: return cuda::load(static_cast<const float*>(base) + at, count, vectors, to);
    case Dtype::bfloat16: return cuda::load(static_cast<const BFloat16*>(base) + at, count, vectors, to);
    default: return cuda::load(static_cast<const Float16*>(base) + at, count, vectors, to);
  }
}
template <class T>
__device__ __forceinline__ void write(void* base, Dtype dtype, int64_t at, int count, bool vectors,
                                      const T (&from)[kWidth]) {
  switch (dtype) {
    case Dtype::float64: return cuda::store(static_cast<double*>(base) + at, count, vectors, from);
    case Dtype::float32: return cuda::store(static_cast<float*>(base) + at, count, vectors, from);
    case Dtype::bfloat16: return cuda::store(static_cast<BFloat16*>(base) + at, count, vectors, from);
    default: return cuda::store(static_cast<Float16*>(base) + at, count, vectors, from);
  }
}

// One block per chunk; which tensor the chunk belongs to is a binary search over first_chunk.
template <class Rule, class T>
__global__ void __launch_bounds__(kThreads) step_kernel(GDBP_GRID_CONSTANT(Batch<Rule, T>) batch) {
  if (batch.control && batch.control->skip != 0) return;
  const int64_t chunk = blockIdx.x;
  int low = 0;
  for (int high = batch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (batch[middle].first_chunk <= chunk ? low : high) = middle;
  }
  const Tensor<Rule, T>& t = batch[low];
  Surroundings<T> around = t.around;
  if (batch.control) around.scale *= T(batch.control->coefficient);
  const Rule rule = t.rule;
  const int64_t elements = chunk_elements(t.param_dtype);
  const int64_t first = (chunk - t.first_chunk) * elements;
  const int64_t end = first + elements < t.numel ? first + elements : t.numel;
  for (int64_t at = first + int64_t(threadIdx.x) * kWidth; at < end; at += kThreads * kWidth) {
    const int count = int(end - at < kWidth ? end - at : kWidth);
    T p[kWidth], g[kWidth], s[Rule::states + 1][kWidth];
    read(t.param, t.param_dtype, at, count, t.vectors, p);
    read(t.grad, t.grad_dtype, at, count, t.vectors, g);
#pragma unroll
    for (int i = 0; i < Rule::states; ++i) read(t.state[i], t.state_dtype, at, count, t.vectors, s[i]);
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
    if (t.seed != 0 && t.param_dtype == Dtype::bfloat16) {
      for (int k = 0; k < count; ++k)
        static_cast<BFloat16*>(t.param)[at + k] = narrow_stochastic(float(p[k]), random_bits(t.seed, at + k));
    } else {
      write(t.param, t.param_dtype, at, count, t.vectors, p);
    }
#pragma unroll
    for (int i = 0; i < Rule::states; ++i) write(t.state[i], t.state_dtype, at, count, t.vectors, s[i]);
    if (t.copy) write(t.copy, t.copy_dtype, at, count, t.vectors, p);
    if (t.average) {
      T average[kWidth];
      read(t.average, t.average_dtype, at, count, t.vectors, average);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) average[k] = lerp(average[k], p[k], t.average_weight);
      write(t.average, t.average_dtype, at, count, t.vectors, average);
    }
  }
}

bool aligned(const void* pointer, Dtype dtype) {
  const int64_t bytes = kWidth * size_of(dtype);
  return cuda::aligned(pointer, bytes < 16 ? bytes : 16);
}

// Collects the tensors that are computed in T, and launches whenever the arguments are full.
template <class Rule, class T>
class Step {
 public:
  Step(const Slot& slot, const Control* control, void* stream)
      : hyper_(slot.hyper),
        clock_(slot.clock),
        around_(*hyper_),
        rule_(*hyper_, clock_),
        batch_(control),
        stream_(stream) {}

  int add(const Slot& slot) {
    if (slot.numel == 0) return 0;
    // Tensors of a group are mostly at the same step; its constants cost two powers.
    if (slot.hyper != hyper_ || slot.clock.step != clock_.step || slot.clock.product != clock_.product) {
      hyper_ = slot.hyper;
      clock_ = slot.clock;
      around_ = Surroundings<T>(*hyper_);
      rule_ = Rule(*hyper_, clock_);
    }
    bool vectors = aligned(slot.param, slot.param_dtype) && aligned(slot.grad, slot.grad_dtype);
    for (int i = 0; i < Rule::states; ++i) vectors = vectors && aligned(slot.state[i], slot.state_dtype);
    vectors = vectors && aligned(slot.copy, slot.copy_dtype) && aligned(slot.average, slot.average_dtype);
    using Entry = Tensor<Rule, T>;
    auto* const tensor = new (batch_.bytes + batch_.count * sizeof(Entry)) Entry{slot.param,
                                                                                 slot.grad,
                                                                                 {},
                                                                                 slot.numel,
                                                                                 chunks_,
                                                                                 slot.copy,
                                                                                 slot.average,
                                                                                 slot.seed,
                                                                                 T(slot.average_weight),
                                                                                 around_,
                                                                                 rule_,
                                                                                 slot.param_dtype,
                                                                                 slot.grad_dtype,
                                                                                 slot.state_dtype,
                                                                                 slot.copy_dtype,
                                                                                 slot.average_dtype,
                                                                                 vectors};
    std::memcpy(tensor->state, slot.state, Rule::states * sizeof(void*));
    chunks_ += cuda::ceil_div(slot.numel, chunk_elements(slot.param_dtype));
    return ++batch_.count == Batch<Rule, T>::capacity ? launch() : 0;
  }

  int launch() {
    if (batch_.count == 0) return 0;
    const auto kernel = step_kernel<Rule, T>;
    const int error = GDBP_LAUNCH(kernel, unsigned(chunks_), kThreads, 0, stream_, batch_);
    batch_.count = 0;
    chunks_ = 0;
    return error;
  }

 private:
  const Hyper* hyper_;
  Clock clock_;
  Surroundings<T> around_;
  Rule rule_;
  Batch<Rule, T> batch_;
  void* stream_;
  int64_t chunks_ = 0;
};

template <template <class> class Rule>
int step(const Slot* slots, int64_t count, const Control* control, void* stream) {
  Step<Rule<float>, float> single(slots[0], control, stream);
  Step<Rule<double>, double> twice(slots[0], control, stream);
  for (int64_t i = 0; i < count; ++i) {
    const int error = slots[i].param_dtype == Dtype::float64 ? twice.add(slots[i]) : single.add(slots[i]);
    if (error != 0) return error;
  }
  const int error = single.launch();
  return error != 0 ? error : twice.launch();
}

#define GDBP_ROW(name, Rule) &step<Rule>,
constexpr int (*kSteps[])(const Slot*, int64_t, const Control*, void*) = {GDBP_OPTIM_RULES(GDBP_ROW)};
#undef GDBP_ROW

}  // namespace

int step_cuda(int rule, const Slot* slots, int64_t count, const Control* control, void* stream) {
  return count == 0 ? 0 : kSteps[rule](slots, count, control, stream);
}

}  // namespace gdbp::optim
