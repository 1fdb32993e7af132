#include <algorithm>
#include <cstring>
#include <vector>

#include "common/map_cpu.h"
#include "optim/optim.h"

namespace gdbp::optim {
namespace {

// All parameters are one line of elements, cut into chunks that threads share. A cut inside a tensor is
// moved back to a multiple of kAlign from the tensor's start, so that which elements a vector holds does
// not depend on threads or on the other tensors.
constexpr int64_t kChunk = 8192;
constexpr int64_t kAlign = 64;
// Elements that pass through stack buffers at a time, where a stored type is not the compute type.
constexpr int64_t kStage = 1024;

template <class Rule, class T>
GDBP_CLONES void update(const Rule rule, const Surroundings<T> around, T* p, const T* g, T* const* state,
                        int64_t n) {
  T* pointers[Rule::states + 1] = {};
  for (int k = 0; k < Rule::states; ++k) pointers[k] = state[k];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T s[Rule::states + 1];
    for (int k = 0; k < Rule::states; ++k) s[k] = pointers[k][i];
    const T gradient = around.gradient(g[i], p[i]);
    T parameter = p[i] * around.keep;
    rule(parameter, gradient, s);
    p[i] = around.shrink(parameter);
    for (int k = 0; k < Rule::states; ++k) pointers[k][i] = s[k];
  }
}

template <class T, class Stored>
GDBP_CLONES void read(const Stored* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(widen(from[i]));
}

template <class T, class Stored>
GDBP_CLONES void write(const T* from, Stored* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<Stored>(Compute<Stored>(from[i]));
}

template <class T>
constexpr Dtype kComputeDtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

const void* at(const void* base, Dtype dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}
void* at(void* base, Dtype dtype, int64_t index) { return static_cast<char*>(base) + index * size_of(dtype); }

// An array seen as T: its own memory where that is its type, else a buffer that is filled and drained.
template <class T>
T* stage_in(const void* base, Dtype dtype, int64_t begin, int64_t n, T* buffer) {
  const void* from = at(base, dtype, begin);
  if (dtype == kComputeDtype<T>) return const_cast<T*>(static_cast<const T*>(from));
  dispatch(dtype, [&](auto type) {
    read(static_cast<const typename decltype(type)::type*>(from), buffer, n);
  });
  return buffer;
}

template <class T>
void stage_out(void* base, Dtype dtype, int64_t begin, int64_t n, const T* buffer) {
  if (dtype == kComputeDtype<T>) return;
  dispatch(dtype, [&](auto type) {
    write(buffer, static_cast<typename decltype(type)::type*>(at(base, dtype, begin)), n);
  });
}

template <class Rule, class T>
void update_piece(const Rule& rule, const Surroundings<T>& around, const Slot& slot, int64_t begin, int64_t end) {
  const bool direct = slot.param_dtype == kComputeDtype<T> && slot.grad_dtype == kComputeDtype<T> &&
                      (Rule::states == 0 || slot.state_dtype == kComputeDtype<T>);
  alignas(64) T buffer[2 + Rule::states][kStage];
  const int64_t stride = direct ? end - begin : kStage;
  for (int64_t lo = begin; lo < end; lo += stride) {
    const int64_t n = std::min(stride, end - lo);
    T* const p = stage_in(slot.param, slot.param_dtype, lo, n, buffer[0]);
    const T* const g = stage_in(slot.grad, slot.grad_dtype, lo, n, buffer[1]);
    T* state[Rule::states + 1] = {};
    for (int k = 0; k < Rule::states; ++k)
      state[k] = stage_in(slot.state[k], slot.state_dtype, lo, n, buffer[2 + k]);
    update<Rule, T>(rule, around, p, g, state, n);
    stage_out(slot.param, slot.param_dtype, lo, n, p);
    for (int k = 0; k < Rule::states; ++k) stage_out(slot.state[k], slot.state_dtype, lo, n, state[k]);
  }
}

// The rule with its constants worked out (powers of the betas, roots), kept from one tensor to the next
// as long as these are at the same step: for small tensors the constants cost more than the update.
template <class Rule, class T>
class Prepared {
 public:
  explicit Prepared(const Hyper& hyper) : hyper_(hyper), around_(hyper), rule_(hyper, 1), step_(1) {}
  void operator()(const Slot& slot, int64_t begin, int64_t end) {
    if (slot.step != step_) rule_ = Rule(hyper_, step_ = slot.step);
    update_piece<Rule, T>(rule_, around_, slot, begin, end);
  }

 private:
  const Hyper& hyper_;
  Surroundings<T> around_;
  Rule rule_;
  double step_;
};

// Elements [lo, hi) of the line; start[i] is where slot i begins on it.
template <template <class> class Rule>
void update_range(const Hyper& hyper, const Slot* slots, const int64_t* start, int64_t count, int64_t lo, int64_t hi) {
  Prepared<Rule<float>, float> single(hyper);
  Prepared<Rule<double>, double> twice(hyper);
  for (int64_t i = std::upper_bound(start, start + count + 1, lo) - start - 1; i < count && start[i] < hi; ++i) {
    const auto cut = [&](int64_t position) {
      const int64_t inside = position - start[i];
      return inside <= 0 ? 0 : inside >= slots[i].numel ? slots[i].numel : inside / kAlign * kAlign;
    };
    const int64_t begin = cut(lo), end = cut(hi);
    if (begin == end) continue;
    if (slots[i].param_dtype == Dtype::float64) {
      twice(slots[i], begin, end);
    } else {
      single(slots[i], begin, end);
    }
  }
}

struct Row {
  const char* name;
  int states;
  void (*update)(const Hyper&, const Slot*, const int64_t*, int64_t, int64_t, int64_t);
};
#define GDBP_ROW(name, Rule) {name, Rule<float>::states, &update_range<Rule>},
constexpr Row kRows[] = {GDBP_OPTIM_RULES(GDBP_ROW)};
#undef GDBP_ROW

}  // namespace

int find_rule(const char* name) {
  for (size_t i = 0; i < std::size(kRows); ++i)
    if (std::strcmp(kRows[i].name, name) == 0) return int(i);
  return -1;
}

int rule_states(int rule) { return kRows[rule].states; }

int step_cpu(int rule, const Hyper& hyper, const Slot* slots, int64_t count, void*) {
  // Kept between calls: a step in the steady state allocates nothing.
  static thread_local std::vector<int64_t> starts;
  starts.resize(count + 1);
  starts[0] = 0;
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + slots[i].numel;
  const int64_t total = starts[count];
  const int64_t* const start = starts.data();

  parallel_for(0, (total + kChunk - 1) / kChunk, 4, [&](int64_t first, int64_t last) {
    kRows[rule].update(hyper, slots, start, count, first * kChunk, std::min(total, last * kChunk));
  });
  return 0;
}

}  // namespace gdbp::optim
