// Losses of whole rows: the arithmetic of one row. C is the compute type: float, or double for float64.
//
// With coefficients a_j (for a label y: a_y = its weight, the others 0) and p = softmax(x), cross-entropy is
//   loss = sum_j a_j (log_total - (x_j - m)),  dloss/dx_j = p_j sum_k a_k - a_j
// where m is the largest logit and total = sum_k exp(x_k - m) = 1 + others. Forming `others` directly, and not
// as total - 1, keeps all digits where the row is confident: log_total = log1p(others), 1 - p_max = others / total.
#pragma once
#include "common/math.h"
#include "common/softmax.h"
#include "loss/loss.h"

namespace gdbp::loss {

using gdbp::Softmax;

// softcap * tanh(x / softcap) and its derivative 1 - tanh^2, of which the difference would leave nothing for
// large x.
template <class C>
GDBP_HD C cap(C x, C softcap) {
  return softcap * math::tanh(x / softcap);
}
template <class C>
GDBP_HD C cap_slope(C x, C softcap) {
  const C e = math::exp(C(-2) * math::abs(x / softcap));
  return C(4) * e / ((C(1) + e) * (C(1) + e));
}

// What the rows share, typed.
template <class T>
struct Rows {
  using C = Compute<T>;
  int64_t rows, classes, inner;
  const T* logits;
  const T* probabilities;
  const int64_t* target;
  const int64_t* second;
  const double* share;
  const T* weight;
  int64_t ignore_index;
  C keep, smooth;  // 1 - label_smoothing, label_smoothing / classes
  C z, softcap;

  explicit Rows(const CrossEntropy& args)
      : rows(args.rows()),
        classes(args.classes),
        inner(args.inner),
        logits(static_cast<const T*>(args.logits)),
        probabilities(static_cast<const T*>(args.probabilities)),
        target(args.target),
        second(args.second),
        share(args.share),
        weight(static_cast<const T*>(args.weight)),
        ignore_index(args.ignore_index),
        keep(C(1 - args.label_smoothing)),
        smooth(args.label_smoothing > 0 ? C(args.label_smoothing / double(args.classes)) : C(0)),
        z(C(args.z_loss)),
        softcap(C(args.softcap)) {}

  GDBP_HD C weight_of(int64_t label) const { return weight != nullptr ? C(widen(weight[label])) : C(1); }
  GDBP_HD bool is_bad(int64_t label) const { return label != ignore_index && (label < 0 || label >= classes); }
  // The label of this row that is out of range; else ignore_index.
  GDBP_HD int64_t bad_label(int64_t row) const {
    if (target == nullptr) return ignore_index;
    if (is_bad(target[row])) return target[row];
    return second != nullptr && is_bad(second[row]) ? second[row] : ignore_index;
  }
  // Where the row's first logit lies; the next one is `inner` elements further on.
  GDBP_HD int64_t start(int64_t row) const {
    return inner == 1 ? row * classes : row / inner * inner * classes + row % inner;
  }
};

// The labels of a row, none of them out of range, and what their terms are multiplied by.
template <class C>
struct Labels {
  int64_t first = -1, second = -1;  // -1: there is none
  C a = 0, b = 0;                   // their coefficients, without the uniform share
  C uniform = 0;                    // what every class has besides, times its weight
  C weight = 0;                     // of the row in the mean

  Labels() = default;

  template <class T>
  GDBP_HD Labels(const Rows<T>& in, int64_t row) {
    if (in.second == nullptr) {
      add(in, in.target[row], C(1));
    } else {
      const C share = C(in.share[row]);
      add(in, in.target[row], share);
      add(in, in.second[row], C(1) - share);
    }
  }
  GDBP_HD bool counts() const { return first >= 0; }

 private:
  template <class T>
  GDBP_HD void add(const Rows<T>& in, int64_t label, C share) {
    if (label == in.ignore_index) return;
    const C w = in.weight_of(label);
    const C coefficient = in.keep * share * w;
    if (first < 0 || first == label) {
      first = label;
      a += coefficient;
    } else {
      second = label;
      b = coefficient;
    }
    uniform += share * in.smooth;
    weight += share * w;
  }
};

// The gradient of one row of labels, of which all_weights is the sum of the class weights.
template <class C>
struct LabelGradient {
  Softmax<C> softmax;
  Labels<C> labels;
  C all_weights;
  C spread;  // the uniform coefficients together
  C pull;    // the derivative of z_loss in log_sum_exp
  C scale;   // what comes from upstream

  GDBP_HD LabelGradient(Softmax<C> softmax, Labels<C> labels, C all_weights, C z, C scale)
      : softmax(softmax),
        labels(labels),
        all_weights(all_weights),
        spread(labels.uniform * all_weights),
        pull(z != C(0) ? C(2) * z * labels.weight * softmax.log_sum_exp() : C(0)),
        scale(scale) {}
  // of exp(x - m)
  GDBP_HD C factor() const { return (labels.a + labels.b + spread + pull) * softmax.inverse(); }
  // For a label: its coefficient, that of the other label, its class weight, and its logit.
  GDBP_HD C at_label(C own, C other, C w, C x) const {
    const C a = own + labels.uniform * w;
    // The difference first: of a single class nothing may be left, also where products and sums are contracted.
    const C others = other + labels.uniform * (all_weights - w) + pull;
    return scale * (others * softmax.p(x) - a * softmax.rest(x));
  }
};

// The gradient of one row of probabilities, of which a_j are the coefficients.
template <class C>
struct SoftGradient {
  C m, inverse, rest;  // of the softmax; rest: 1 - p of the largest logit
  C total, others;     // sum of a_j; sum over all but the largest logit
  C pull, scale;
  bool lonely;  // whether the largest logit is the only one of its size: only then its p may be near 1

  GDBP_HD SoftGradient(Softmax<C> softmax, C total, C others, C z, C scale)
      : m(softmax.m),
        inverse(softmax.inverse()),
        rest(softmax.others * softmax.inverse()),
        total(total),
        others(others),
        pull(z != C(0) ? C(2) * z * softmax.log_sum_exp() : C(0)),
        scale(scale),
        lonely(softmax.others < C(1)) {}
  // e: exp(x - m)
  GDBP_HD C operator()(C x, C e, C a) const {
    const C p = e * inverse;
    const C far = p * total - a;
    const C near = p * others - a * rest;
    return scale * ((lonely && x == m ? near : far) + pull * p);
  }
};

// a (log_total - (x - m)), where nothing of an impossible class is nothing: 0 * infinity is 0.
template <class C>
GDBP_HD C soft_loss(C a, C x, C m, C log_total) {
  const C nll = log_total - (x - m);
  return a == C(0) ? C(0) * (x != x ? x : C(0)) : a * nll;
}

}  // namespace gdbp::loss
