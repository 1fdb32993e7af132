#include <algorithm>
#include <limits>

#include "common/map_cpu.h"
#include "loss/loss.h"
#include "loss/loss_math.h"

namespace gdbp::loss {
namespace {

template <class C, class F>
GDBP_HD C sum_range(const F& f, int64_t begin, int64_t end) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = begin; j < end; ++j) sum += f(j);
  return sum;
}

template <class T>
Compute<T> weight_sum(const CrossEntropy& a) {
  const T* const weight = static_cast<const T*>(a.weight);
  if (!weight) return Compute<T>(a.classes);
  double sum = 0;
  for (int64_t j = 0; j < a.classes; ++j) sum += widen(weight[j]);
  return Compute<T>(sum);
}

template <class T>
GDBP_CLONES void forward_rows(const CrossEntropyForward a, Compute<T> all_weights, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const T* const weight = static_cast<const T*>(a.weight);
  double* const losses = static_cast<double*>(a.workspace);
  double* const weights = losses + a.rows;
  const C smoothing = C(a.label_smoothing);
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(a.logits) + row * a.classes;
    const int64_t y = a.target[row];
    C* const kept = static_cast<C*>(a.stats) + 2 * row;
    losses[row] = weights[row] = kept[0] = kept[1] = 0;
    if (y == a.ignore_index || y < 0 || y >= a.classes) continue;
    C m = -std::numeric_limits<C>::infinity();
#pragma omp simd reduction(max : m)
    for (int64_t j = 0; j < a.classes; ++j) m = widen(x[j]) > m ? widen(x[j]) : m;
    const auto term = [=](int64_t j) __attribute__((always_inline)) { return math::exp(widen(x[j]) - m); };
    const C others = sum_range<C>(term, 0, y) + sum_range<C>(term, y + 1, a.classes);
    const Row<C> stats(m, widen(x[y]), others);
    const C own_weight = weight ? widen(weight[y]) : C(1);
    C loss = (C(1) - smoothing) * own_weight * stats.nll();
    if (smoothing > 0) {
      const auto shifted = [=](int64_t j) __attribute__((always_inline)) {
        return (weight ? widen(weight[j]) : C(1)) * (widen(x[j]) - m);
      };
      const C uniform = all_weights * stats.log_total() - sum_range<C>(shifted, 0, a.classes);
      loss += smoothing / C(a.classes) * uniform;
    }
    losses[row] = loss;
    weights[row] = own_weight;
    kept[0] = m;
    kept[1] = others;
  }
}

template <class T>
GDBP_CLONES void backward_rows(const CrossEntropyBackward a, Compute<T> all_weights, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const T* const weight = static_cast<const T*>(a.weight);
  const T* const grad_output = static_cast<const T*>(a.grad_output);
  const C* const stats = static_cast<const C*>(a.stats);
  const C smoothing = C(a.label_smoothing);
  const C uniform = smoothing / C(a.classes);
  const double total_weight = *static_cast<const double*>(a.total_weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(a.logits) + row * a.classes;
    T* const grad = static_cast<T*>(a.grad_logits) + row * a.classes;
    const int64_t y = a.target[row];
    if (y == a.ignore_index || y < 0 || y >= a.classes) {
      std::fill(grad, grad + a.classes, T{});
      continue;
    }
    const C m = stats[2 * row];
    const Row<C> stat(m, widen(x[y]), stats[2 * row + 1]);
    const double upstream = widen(grad_output[a.reduction == Reduction::none ? row : 0]);
    const C scale = C(a.reduction == Reduction::mean ? (total_weight != 0 ? upstream / total_weight : 0) : upstream);
    const C own = (C(1) - smoothing) * (weight ? widen(weight[y]) : C(1));
    const C inverse = C(1) / stat.total();
    const C spread = uniform * all_weights;
    const C factor = (own + spread) * inverse;
    // Read before the row is written: the gradient may take the logits' place.
    const C target_grad = spread * (stat.own * inverse) - own * (stat.others * inverse);
#pragma GCC ivdep
    for (int64_t j = 0; j < a.classes; ++j) {
      const C g = math::exp(widen(x[j]) - m) * factor - (weight ? uniform * widen(weight[j]) : uniform);
      grad[j] = narrow<T>(scale * g);
    }
    grad[y] = narrow<T>(scale * (target_grad - (weight ? uniform * widen(weight[y]) : uniform)));
  }
}

template <class T>
void cross_entropy_forward(const CrossEntropyForward& a) {
  *a.bad_row = -1;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t y = a.target[row];
    if (y != a.ignore_index && (y < 0 || y >= a.classes)) {
      *a.bad_row = row;
      return;
    }
  }
  const Compute<T> all_weights = weight_sum<T>(a);
  const int64_t grain = std::max<int64_t>(1, cpu::kGrain / 8 / std::max<int64_t>(1, a.classes));
  parallel_for(0, a.rows, grain, [&](int64_t lo, int64_t hi) { forward_rows<T>(a, all_weights, lo, hi); });

  const double* const losses = static_cast<const double*>(a.workspace);
  T* const output = static_cast<T*>(a.output);
  double loss = 0, weight = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    if (a.reduction == Reduction::none) output[row] = narrow<T>(Compute<T>(losses[row]));
    loss += losses[row];
    weight += losses[a.rows + row];
  }
  *static_cast<double*>(a.total_weight) = weight;
  if (a.reduction == Reduction::sum) output[0] = narrow<T>(Compute<T>(loss));
  if (a.reduction == Reduction::mean) output[0] = narrow<T>(Compute<T>(loss / weight));
}

template <class T>
void cross_entropy_backward(const CrossEntropyBackward& a) {
  const Compute<T> all_weights = weight_sum<T>(a);
  const int64_t grain = std::max<int64_t>(1, cpu::kGrain / 8 / std::max<int64_t>(1, a.classes));
  parallel_for(0, a.rows, grain, [&](int64_t lo, int64_t hi) { backward_rows<T>(a, all_weights, lo, hi); });
}

}  // namespace

#define GDBP_LOSS_LAUNCHER(name, Args)                                             \
  int name##_cpu(const Args& a, void*) {                                           \
    dispatch(a.dtype, [&](auto type) { name<typename decltype(type)::type>(a); }); \
    return 0;                                                                      \
  }
GDBP_LOSS_LAUNCHER(cross_entropy_forward, CrossEntropyForward)
GDBP_LOSS_LAUNCHER(cross_entropy_backward, CrossEntropyBackward)

}  // namespace gdbp::loss
