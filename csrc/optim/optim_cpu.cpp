#include <algorithm>
#include <cstring>
#include <limits>

#include "common/line_cpu.h"
#include "common/random.h"
#include "optim/blockwise8_cpu.h"
#include "optim/optim.h"

namespace gdbp::optim {
namespace {

// Elements that pass through stack buffers at a time, where a stored type is not the compute type: few, so that while
// one lot waits for its divisions, another is converted; and never more than a block of 8-bit states.
constexpr int64_t kStage = kQuantBlock;

// Whether there are loops of their own for plain surroundings: float64 is rare, and they take time to compile.
template <class T>
constexpr bool kPlainToo = sizeof(T) == sizeof(float);

template <bool plain, class Rule, class T>
GDBP_CLONES void update(const Rule rule, const Surroundings<T> around, T* p, const T* g, T* const* state, int64_t n) {
  T* pointers[Rule::states + 1] = {};
  for (int k = 0; k < Rule::states; ++k) pointers[k] = state[k];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T s[Rule::states + 1];
    for (int k = 0; k < Rule::states; ++k) s[k] = pointers[k][i];
    const T gradient = around.template gradient<plain>(g[i], p[i]);
    T parameter = p[i] * around.keep;
    rule(parameter, gradient, s);
    p[i] = around.template shrink<plain>(parameter);
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
GDBP_CLONES void write_stochastic(const T* from, BFloat16* to, int64_t n, uint64_t seed, int64_t position) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_stochastic(float(from[i]), random_bits(seed, uint64_t(position + i)));
}

template <class T>
GDBP_CLONES void move_average(T* average, const T* p, T weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) average[i] = lerp(average[i], p[i], weight);
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
  dispatch(dtype, [&](auto type) { read(static_cast<const typename decltype(type)::type*>(from), buffer, n); });
  return buffer;
}

template <class T>
void stage_out(void* base, Dtype dtype, int64_t begin, int64_t n, const T* buffer) {
  void* to = at(base, dtype, begin);
  if (to != buffer)
    dispatch(dtype, [&](auto type) { write(buffer, static_cast<typename decltype(type)::type*>(to), n); });
}

// A slot's states, as a rule takes them. The last block of 8-bit states may be shorter.
template <int states, class T>
void stage_in_states(const Slot& slot, int64_t begin, int64_t n, T (*buffers)[kStage], T** to) {
  for (int k = 0; k < states; ++k) {
    if (slot.state_dtype == Dtype::blockwise8) {
      const int8_t* const codes = static_cast<const int8_t*>(slot.state[k]) + begin;
      int8_t padded[kQuantBlock] = {};
      if (n < kQuantBlock) std::copy_n(codes, n, padded);
      to[k] = buffers[k];
      decode_block(n < kQuantBlock ? padded : codes, slot.scale[k][begin / kQuantBlock], to[k]);
    } else {
      to[k] = stage_in(slot.state[k], slot.state_dtype, begin, n, buffers[k]);
    }
  }
}

template <int states, class T>
void stage_out_states(const Slot& slot, int64_t begin, int64_t n, T* const* from) {
  if (slot.state_dtype != Dtype::blockwise8) {
    for (int k = 0; k < states; ++k) stage_out(slot.state[k], slot.state_dtype, begin, n, from[k]);
    return;
  }
  int8_t padded[states + 1][kQuantBlock];
  int8_t* codes[states + 1];
  float* scales[states + 1];
  for (int k = 0; k < states; ++k) {
    codes[k] = n < kQuantBlock ? padded[k] : static_cast<int8_t*>(slot.state[k]) + begin;
    scales[k] = slot.scale[k] + begin / kQuantBlock;
    std::fill(from[k] + n, from[k] + kQuantBlock, T(0));
  }
  const Rounding rounding{state_seed8(slot.seed), begin};
  if constexpr (states > 0) {
    if (rounding.seed != 0) {
      encode_blocks<true, states>(from, codes, scales, rounding);
    } else {
      encode_blocks<false, states>(from, codes, scales, rounding);
    }
  }
  if (n < kQuantBlock)
    for (int k = 0; k < states; ++k) std::copy_n(codes[k], n, static_cast<int8_t*>(slot.state[k]) + begin);
}

// The same in whole vectors only. In what is left over behind them g++ would not join multiplications and additions as
// it does in them, and an element's update would depend on where it lies.
template <bool plain, class Rule, class T>
void update_all_alike(const Rule& rule, const Surroundings<T>& around, T* p, T* g, T* const* state, int64_t n) {
  constexpr int64_t kWhole = 64 / sizeof(T);
  const int64_t whole = n / kWhole * kWhole, rest = n - whole;
  if (whole > 0) update<plain, Rule, T>(rule, around, p, g, state, whole);
  if (rest == 0) return;
  alignas(64) T padded[2 + Rule::states][kWhole] = {};
  T* states[Rule::states + 1] = {};
  std::copy_n(p + whole, rest, padded[0]);
  std::copy_n(g + whole, rest, padded[1]);
  for (int k = 0; k < Rule::states; ++k) std::copy_n(state[k] + whole, rest, states[k] = padded[2 + k]);
  update<plain, Rule, T>(rule, around, padded[0], padded[1], states, kWhole);
  std::copy_n(padded[0], rest, p + whole);
  for (int k = 0; k < Rule::states; ++k) std::copy_n(padded[2 + k], rest, state[k] + whole);
}

template <class Rule, class T>
void update_piece(const Rule& rule, const Surroundings<T>& around, const Slot& slot, int64_t begin, int64_t end) {
  const bool direct = slot.param_dtype == kComputeDtype<T> && slot.grad_dtype == kComputeDtype<T> &&
                      (Rule::states == 0 || slot.state_dtype == kComputeDtype<T>) && !slot.copy && !slot.average;
  alignas(64) T buffer[2 + Rule::states][kStage];
  const int64_t stride = direct ? end - begin : kStage;
  for (int64_t lo = begin; lo < end; lo += stride) {
    const int64_t n = std::min(stride, end - lo);
    T* const p = stage_in(slot.param, slot.param_dtype, lo, n, buffer[0]);
    T* const g = stage_in(slot.grad, slot.grad_dtype, lo, n, buffer[1]);
    T* state[Rule::states + 1] = {};
    stage_in_states<Rule::states>(slot, lo, n, buffer + 2, state);
    if (kPlainToo<T> && around.plain()) {
      update_all_alike<kPlainToo<T>, Rule, T>(rule, around, p, g, state, n);
    } else {
      update_all_alike<false, Rule, T>(rule, around, p, g, state, n);
    }
    if (slot.seed && slot.param_dtype == Dtype::bfloat16) {
      write_stochastic(p, static_cast<BFloat16*>(slot.param) + lo, n, slot.seed, lo);
    } else {
      stage_out(slot.param, slot.param_dtype, lo, n, p);
    }
    stage_out_states<Rule::states>(slot, lo, n, state);
    if (slot.copy) stage_out(slot.copy, slot.copy_dtype, lo, n, p);
    if (slot.average) {
      // The gradient's buffer is free by now, the gradient's own memory is not.
      T* const average = stage_in(slot.average, slot.average_dtype, lo, n, buffer[1]);
      move_average(average, p, T(slot.average_weight), n);
      stage_out(slot.average, slot.average_dtype, lo, n, average);
    }
  }
}

// The rule with its constants worked out (powers of the betas, roots), kept from one tensor to the next
// as long as these are in the same group at the same step: for small tensors the constants cost more than
// the update.
template <class Rule, class T>
class Prepared {
 public:
  explicit Prepared(const Slot& slot, double coefficient)
      : coefficient_(coefficient),
        hyper_(slot.hyper),
        clock_(slot.clock),
        around_(*hyper_, coefficient),
        rule_(*hyper_, clock_) {}

  void operator()(const Slot& slot, int64_t begin, int64_t end) {
    if (slot.hyper != hyper_ || slot.clock.step != clock_.step || slot.clock.product != clock_.product)
      *this = Prepared(slot, coefficient_);
    update_piece<Rule, T>(rule_, around_, slot, begin, end);
  }

 private:
  double coefficient_;
  const Hyper* hyper_;
  Clock clock_;
  Surroundings<T> around_;
  Rule rule_;
};

// Small tensors are over before the hardware has learned where they go on: the first lines of one to come are asked
// for here.
template <int states>
void prefetch(const Slot& slot) {
  constexpr int64_t kMost = 256, kLine = 64;
  const auto ask = [&](const void* array, Dtype dtype) {
    const int64_t bytes = std::min(kMost, slot.numel * size_of(dtype));
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(array) + i);
  };
  ask(slot.param, slot.param_dtype);
  ask(slot.grad, slot.grad_dtype);
  for (int k = 0; k < states; ++k) ask(slot.state[k], slot.state_dtype);
}
constexpr int64_t kSlotsAhead = 2;

template <template <class> class Rule>
void update_all(const Slot* slots, int64_t count, const cpu::Line& line, double coefficient) {
  line.for_shares([=](const auto& share) {
    Prepared<Rule<float>, float> single(slots[0], coefficient);
    Prepared<Rule<double>, double> twice(slots[0], coefficient);
    share([&](int64_t i, int64_t begin, int64_t end) {
      if (i + kSlotsAhead < count) prefetch<Rule<float>::states>(slots[i + kSlotsAhead]);
      if (slots[i].param_dtype == Dtype::float64) {
        twice(slots[i], begin, end);
      } else {
        single(slots[i], begin, end);
      }
    });
  });
}

template <class Rule>
double momentum_at(const Hyper& hyper, double step) {
  if constexpr (requires { Rule::momentum(hyper, step); }) {
    return Rule::momentum(hyper, step);
  } else {
    return 1;
  }
}

struct Row {
  const char* name;
  int states;
  void (*update)(const Slot*, int64_t, const cpu::Line&, double);
  double (*momentum)(const Hyper&, double);
};
#define GDBP_ROW(name, Rule) {name, Rule<float>::states, &update_all<Rule>, &momentum_at<Rule<float>>},
constexpr Row kRows[] = {GDBP_OPTIM_RULES(GDBP_ROW)};
#undef GDBP_ROW

}  // namespace

int find_rule(const char* name) {
  for (size_t i = 0; i < std::size(kRows); ++i)
    if (std::strcmp(kRows[i].name, name) == 0) return int(i);
  return -1;
}

int rule_states(int rule) { return kRows[rule].states; }

double scheduled_momentum(int rule, const Hyper& hyper, double step) { return kRows[rule].momentum(hyper, step); }

int step_cpu(int rule, const Slot* slots, int64_t count, const Control* control, void*) {
  if (count == 0 || (control && control->skip != 0)) return 0;
  // Kept between calls: a step in the steady state allocates nothing.
  static thread_local cpu::Line line;
  line.clear();
  for (int64_t i = 0; i < count; ++i) line.append(slots[i].numel);
  kRows[rule].update(slots, count, line, control ? control->coefficient : 1);
  return 0;
}

}  // namespace gdbp::optim
