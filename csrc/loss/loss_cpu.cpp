#include <algorithm>
#include <limits>
#include <vector>

#include "common/map_cpu.h"
#include "loss/columns_cpu.h"
#include "loss/loss.h"
#include "loss/loss_math.h"
#include "loss/pieces_cpu.h"
#include "loss/stage_cpu.h"

namespace gdbp::loss {
namespace {

// The class weights in the compute type, and their sum.
template <class T>
struct Weights {
  using C = Compute<T>;
  std::vector<C> each;
  C sum;
  const bool given;

  explicit Weights(const CrossEntropy& a) : each(a.classes, C(1)), sum(C(a.classes)), given(a.weight != nullptr) {
    if (!given) return;
    const T* const weight = static_cast<const T*>(a.weight);
    double total = 0;
    for (int64_t j = 0; j < a.classes; ++j) total += each[j] = widen(weight[j]);
    sum = C(total);
  }
  // Null where all are 1.
  const C* data() const { return given ? each.data() : nullptr; }
};

template <class T>
class Forward {
 public:
  using C = Compute<T>;
  explicit Forward(const CrossEntropyForward& a) : a_(a), in_(a), weights_(a) {}

  // x and t are of type T, or C where they are staged.
  template <class X>
  void operator()(int64_t row, const X* x, const X* t, Exponentials<C>& e) const {
    if (t)
      soft(row, x, t, e);
    else
      labels(row, x, e);
  }

  // Rows side by side.
  void columns(int64_t lo, int64_t hi) const {
    Columns<T> columns(in_);
    while (lo < hi) {
      const int64_t count = columns.load(lo, hi);
      columns.find_softmax();
      if (in_.smooth > 0) columns.find_distances(weights_.data());
      for (int64_t lane = 0; lane < count; ++lane) {
        const Labels<C> labels(in_, lo + lane);
        const C first = labels.counts() ? columns.at(labels.first, lane) : C(0);
        const C second = labels.second >= 0 ? columns.at(labels.second, lane) : C(0);
        const Softmax<C> softmax = labels.counts() ? columns.softmax(lane) : Softmax<C>{0, 0};
        finish(lo + lane, labels, softmax, first, second, in_.smooth > 0 ? columns.distance(lane) : C(0));
      }
      lo += count;
    }
  }

 private:
  // with(m, first, n) is called for each piece, while it is in cache.
  template <class X, class With>
  Softmax<C> softmax_of(const X* x, Exponentials<C>& e, const With& with) const {
    const Largest<C> largest = e.largest(x);
    const C m = largest.m;
    Terms<C> terms;
    for_pieces(in_.classes, [&](int64_t first, int64_t n) {
      e.form(x, largest, first, n, &terms);
      with(m, first, n);
    });
    double others = 0;
    for (const double lane : terms.lanes) others += lane;
    // m - m: NaN where there is no finite largest logit.
    return {m, C(others) + (m - m)};
  }

  template <class X>
  void labels(int64_t row, const X* x, Exponentials<C>& e) const {
    const Labels<C> labels(in_, row);
    if (!labels.counts()) return finish(row, labels, {0, 0}, 0, 0, 0);
    double far = 0;
    const Softmax<C> softmax = softmax_of(x, e, [&](C m, int64_t first, int64_t n) {
      if (labels.uniform > 0) far += distance(x + first, weights_.each.data() + first, m, n);
    });
    const bool two = labels.second >= 0;
    finish(row, labels, softmax, widen(x[labels.first]), two ? C(widen(x[labels.second])) : C(0), C(far));
  }

  // The loss of a row with these logits at its labels, and this distance.
  void finish(int64_t row, const Labels<C>& labels, Softmax<C> softmax, C first, C second, C far) const {
    C value = 0;
    if (labels.counts()) {
      value = labels.a * softmax.nll(first);
      if (labels.second >= 0) value += labels.b * softmax.nll(second);
      if (labels.uniform > 0) value += labels.uniform * (weights_.sum * softmax.log_total() + far);
      if (in_.z != 0) value += in_.z * labels.weight * softmax.log_sum_exp() * softmax.log_sum_exp();
    }
    a_.workspace[row] = value;
    a_.workspace[in_.rows + row] = labels.weight;
    C* const kept = static_cast<C*>(a_.stats) + 2 * row;
    kept[0] = softmax.m;
    kept[1] = softmax.others;
  }

  template <class X>
  void soft(int64_t row, const X* x, const X* t, Exponentials<C>& e) const {
    double far = 0, total = 0, others = 0;
    const Softmax<C> softmax = softmax_of(x, e, [&](C m, int64_t first, int64_t n) {
      const C* const weight = weights_.each.data() + first;
      const SoftTerms<C> piece = soft_terms(x + first, t + first, weight, in_.keep, in_.smooth, m, n);
      far += piece.distance;
      total += piece.total;
      others += piece.others;
    });
    C value = C(total * softmax.log_total() + far);
    if (in_.z != 0) value += in_.z * softmax.log_sum_exp() * softmax.log_sum_exp();
    a_.workspace[row] = value;
    a_.workspace[in_.rows + row] = 1;
    C* const kept = static_cast<C*>(a_.stats) + 4 * row;
    kept[0] = softmax.m;
    kept[1] = softmax.others;
    kept[2] = C(total);
    kept[3] = C(others);
  }

  const CrossEntropyForward& a_;
  const Rows<T> in_;
  const Weights<T> weights_;
};

template <class T>
class Backward {
 public:
  using C = Compute<T>;
  explicit Backward(const CrossEntropyBackward& a) : a_(a), in_(a), weights_(a) {}

  template <class X>
  void operator()(int64_t row, const X* x, const X* t, X* grad, X* grad_t, Exponentials<C>& e) const {
    if (!t) {
      labels(row, x, grad, e);
      return;
    }
    const C scale = upstream(row);
    const C* const kept = static_cast<const C*>(a_.stats) + 4 * row;
    const Softmax<C> softmax{kept[0], kept[1]};
    const SoftGradient<C> of(softmax, kept[2], kept[3], in_.z, scale);
    for_pieces(in_.classes, [&](int64_t first, int64_t n) {
      const C* const weight = weights_.each.data() + first;
      // Before the logits, whose place the gradient may take.
      if (grad_t)
        target_gradient(x + first, grad_t + first, weight, softmax.m, softmax.log_total(), scale * in_.keep, n);
      if (grad)
        soft_gradient(x + first, t + first, e.get(x, softmax.m, first, n), grad + first, weight, in_.keep, in_.smooth,
                      of, n);
    });
  }

  // Rows side by side.
  void columns(int64_t lo, int64_t hi, T* grad) const {
    Columns<T> columns(in_);
    C ones[2 * Columns<T>::kLanes];
    while (lo < hi) {
      const int64_t count = columns.load(lo, hi);
      typename Columns<T>::Gradients lanes;
      for (int64_t lane = 0; lane < count; ++lane) {
        const Labels<C> labels(in_, lo + lane);
        if (!labels.counts()) continue;
        const LabelGradient<C> of = gradient(lo + lane, labels);
        lanes.m[lane] = of.softmax.m;
        lanes.factor[lane] = of.factor();
        lanes.uniform[lane] = labels.uniform;
        lanes.scale[lane] = of.scale;
        lanes.counts[lane] = 1;
        // Formed before the rows are written: the gradient may take the logits' place.
        ones[2 * lane] = at_label(of, labels.a, labels.b, labels.first, columns, lane);
        if (labels.second >= 0) ones[2 * lane + 1] = at_label(of, labels.b, labels.a, labels.second, columns, lane);
      }
      columns.write(lanes, weights_.data(), grad);
      for (int64_t lane = 0; lane < count; ++lane) {
        const Labels<C> labels(in_, lo + lane);
        if (labels.counts()) columns.write_one(grad, labels.first, lane, ones[2 * lane]);
        if (labels.second >= 0) columns.write_one(grad, labels.second, lane, ones[2 * lane + 1]);
      }
      lo += count;
    }
  }

 private:
  LabelGradient<C> gradient(int64_t row, const Labels<C>& labels) const {
    const C* const kept = static_cast<const C*>(a_.stats) + 2 * row;
    return LabelGradient<C>({kept[0], kept[1]}, labels, weights_.sum, in_.z, upstream(row));
  }

  C at_label(const LabelGradient<C>& of, C own, C other, int64_t label, const Columns<T>& columns, int64_t lane) const {
    const C g = of.at_label(own, other, in_.weight_of(label), columns.at(label, lane));
    return in_.softcap != 0 ? g * cap_slope(columns.stored(label, lane), in_.softcap) : g;
  }

  C upstream(int64_t row) const {
    const T* const grad_output = static_cast<const T*>(a_.grad_output);
    const double upstream = widen(grad_output[a_.reduction == Reduction::none ? row : 0]);
    if (a_.reduction != Reduction::mean) return C(upstream);
    return C(*a_.divisor != 0 ? upstream / *a_.divisor : 0);
  }

  template <class X>
  void labels(int64_t row, const X* x, X* grad, Exponentials<C>& e) const {
    const Labels<C> labels(in_, row);
    if (!labels.counts()) {
      std::fill(grad, grad + in_.classes, X{});
      return;
    }
    const LabelGradient<C> of = gradient(row, labels);
    // Formed before the row is written: the gradient may take the logits' place.
    const C first = of.at_label(labels.a, labels.b, in_.weight_of(labels.first), widen(x[labels.first]));
    const bool two = labels.second >= 0;
    const C second =
        two ? of.at_label(labels.b, labels.a, in_.weight_of(labels.second), widen(x[labels.second])) : C(0);
    const C factor = of.factor();
    for_pieces(in_.classes, [&](int64_t first, int64_t n) {
      const C* const weight = weights_.given ? weights_.each.data() + first : nullptr;
      label_gradient(e.get(x, of.softmax.m, first, n), grad + first, weight, factor, labels.uniform, of.scale, n);
    });
    grad[labels.first] = narrow<X>(first);
    if (two) grad[labels.second] = narrow<X>(second);
  }

  const CrossEntropyBackward& a_;
  const Rows<T> in_;
  const Weights<T> weights_;
};

// In a fixed tree: one after the other, rows of equal losses round to the same side each time.
double sum_of(const double* x, int64_t n) {
  if (n > 16) return sum_of(x, n / 2) + sum_of(x + n / 2, n - n / 2);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

int64_t grain(const CrossEntropy& a) { return std::max<int64_t>(1, cpu::kGrain / 8 / std::max<int64_t>(1, a.classes)); }

template <class T>
bool find_bad_label(const CrossEntropyForward& a) {
  const Rows<T> in(a);
  a.bad[0] = -1;
  a.bad[1] = 0;
  if (!in.target) return false;
  for (int64_t row = 0; row < in.rows; ++row) {
    const int64_t label = in.bad_label(row);
    if (label == in.ignore_index) continue;
    a.bad[0] = row;
    a.bad[1] = label;
    return true;
  }
  return false;
}

// The weights of all rows, and of them the divisor of the mean, before the first row is read: the gradient needs it.
template <class T>
void weigh_rows(const CrossEntropyForward& a) {
  const Rows<T> in(a);
  double* const weights = a.workspace + in.rows;
  for (int64_t row = 0; row < in.rows; ++row)
    weights[row] = in.target ? double(Labels<Compute<T>>(in, row).weight) : 1.0;
  *a.divisor = a.normalizer ? *a.normalizer : sum_of(weights, in.rows);
}

// Rows that lie across memory, a block that stays in cache: loss first, then the gradient.
template <class T>
void columns_with_gradient(const Forward<T>& forward, const Backward<T>& backward, int64_t classes, int64_t lo,
                           int64_t hi, T* grad) {
  constexpr int64_t kLanes = Columns<T>::kLanes;
  const int64_t block = std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, classes * kLanes)) * kLanes;
  for (; lo < hi; lo += block) {
    forward.columns(lo, std::min(hi, lo + block));
    backward.columns(lo, std::min(hi, lo + block), grad);
  }
}

template <class T>
void cross_entropy_forward(const CrossEntropyForward& a) {
  using C = Compute<T>;
  if (find_bad_label<T>(a)) return;
  const int64_t rows = a.rows();
  const Forward<T> forward(a);
  T* const grad = static_cast<T*>(a.grad_logits);
  const T one = narrow<T>(C(1));
  const CrossEntropyBackward behind{a, a.stats, a.divisor, &one, grad, nullptr};
  const Backward<T> backward(behind);
  if (grad) weigh_rows<T>(a);
  const T* const x = static_cast<const T*>(a.logits);
  const T* const t = static_cast<const T*>(a.probabilities);
  parallel_for(0, rows, grain(a), [&](int64_t lo, int64_t hi) {
    if (Columns<T>::suit(a))
      return grad ? columns_with_gradient(forward, backward, a.classes, lo, hi, grad) : forward.columns(lo, hi);
    Exponentials<C> e(a.classes, grad != nullptr);
    const auto visit = [&]<class X>(int64_t row, const X* x, const X* t, X* g, X*) {
      e.keep_in(g);
      forward(row, x, t, e);
      if (g) backward(row, x, t, g, static_cast<X*>(nullptr), e);
    };
    if (!Stage<T>::needed(a)) {
      for (int64_t row = lo; row < hi; ++row) {
        const int64_t at = row * a.classes;
        visit(row, x + at, t ? t + at : nullptr, grad ? grad + at : nullptr, static_cast<T*>(nullptr));
      }
      return;
    }
    Stage<T> stage(a, grad);
    stage.for_rows(lo, hi, visit);
  });

  const double* const losses = a.workspace;
  T* const output = static_cast<T*>(a.output);
  *a.divisor = a.normalizer ? *a.normalizer : sum_of(losses + rows, rows);
  if (a.reduction == Reduction::none) {
    for (int64_t row = 0; row < rows; ++row) output[row] = narrow<T>(C(losses[row]));
    return;
  }
  double loss = sum_of(losses, rows);
  if (a.reduction == Reduction::mean) loss = a.empty_is_zero && *a.divisor == 0 ? 0 : loss / *a.divisor;
  output[0] = narrow<T>(C(loss));
}

template <class T>
void cross_entropy_backward(const CrossEntropyBackward& a) {
  using C = Compute<T>;
  const Backward<T> backward(a);
  const T* const x = static_cast<const T*>(a.logits);
  const T* const t = static_cast<const T*>(a.probabilities);
  T* const grad = static_cast<T*>(a.grad_logits);
  T* const grad_t = static_cast<T*>(a.grad_probabilities);
  parallel_for(0, a.rows(), grain(a), [&](int64_t lo, int64_t hi) {
    if (Columns<T>::suit(a)) return backward.columns(lo, hi, grad);
    Exponentials<C> e(a.classes, false);
    if (!Stage<T>::needed(a)) {
      for (int64_t row = lo; row < hi; ++row) {
        const int64_t at = row * a.classes;
        backward(row, x + at, t ? t + at : nullptr, grad ? grad + at : nullptr, grad_t ? grad_t + at : nullptr, e);
      }
      return;
    }
    Stage<T> stage(a, grad, grad_t);
    stage.for_rows(lo, hi, [&](int64_t row, const C* x, const C* t, C* g, C* g_t) { backward(row, x, t, g, g_t, e); });
  });
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
