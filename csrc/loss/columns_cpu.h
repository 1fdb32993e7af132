// Rows of labels that lie across memory, as those of images do, and rows that are shorter than a vector: neighbours are
// computed side by side, a lane each.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "common/macros.h"
#include "loss/loss_math.h"

namespace gdbp::loss {

template <class T>
class Columns {
 public:
  using C = Compute<T>;
  static constexpr int64_t kLanes = 64;
  // Of rows in one piece: as many classes as they may have, and as many rows as there should be. 64 rows of 10 classes
  // take a fifth of the time that they take one by one.
  static constexpr int64_t kFewClasses = 16, kEnoughRows = 8;
  static bool suit(const CrossEntropy& a) {
    if (a.probabilities != nullptr) return false;
    return a.inner > 1 || (a.classes <= kFewClasses && a.rows() >= kEnoughRows);
  }

  // What the lanes need for their gradient: LabelGradient's numbers side by side, and 1 where the row counts.
  struct Gradients {
    C m[kLanes] = {}, factor[kLanes] = {}, uniform[kLanes] = {}, scale[kLanes] = {}, counts[kLanes] = {};
  };

  explicit Columns(const Rows<T>& in)
      : in_(in), across_(in.inner > 1), stride_(across_ ? 1 : in.classes), x_(in.classes * kLanes) {}

  // Takes in the rows from `row` on, none beyond `end`; returns how many.
  int64_t load(int64_t row, int64_t end) {
    count_ = std::min(kLanes, end - row);
    if (across_) count_ = std::min(count_, in_.inner - row % in_.inner);
    start_ = in_.start(row);
    read();
    if (in_.softcap != 0) cap_all();
    return count_;
  }
  C at(int64_t label, int64_t lane) const { return x_[label * kLanes + lane]; }
  C stored(int64_t label, int64_t lane) const { return widen(in_.logits[place(label, lane)]); }

  GDBP_CLONES void find_softmax() {
    std::fill_n(m_, kLanes, -std::numeric_limits<C>::infinity());
    std::fill_n(others_, kLanes, C(0));
    std::fill_n(largest_, kLanes, C(0));
    const C* const x = x_.data();
    for (int64_t j = 0; j < in_.classes; ++j)
      for (int64_t l = 0; l < kLanes; ++l) m_[l] = x[j * kLanes + l] > m_[l] ? x[j * kLanes + l] : m_[l];
    for (int64_t j = 0; j < in_.classes; ++j) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const C v = x[j * kLanes + l], e = math::exp_of_nonpositive(v - m_[l]);
        others_[l] += v == m_[l] ? C(0) : e;
        largest_[l] += v == m_[l] ? C(1) : C(0);
      }
    }
  }
  Softmax<C> softmax(int64_t lane) const {
    // m - m: NaN where there is no finite largest logit.
    return {m_[lane], others_[lane] + (largest_[lane] - C(1)) + (m_[lane] - m_[lane])};
  }

  // sum of w_j (m - x_j) for every lane
  GDBP_CLONES void find_distances(const C* weight) {
    std::fill_n(distance_, kLanes, C(0));
    const C* const x = x_.data();
    for (int64_t j = 0; j < in_.classes; ++j) {
      const C w = weight ? weight[j] : C(1);
      for (int64_t l = 0; l < kLanes; ++l) distance_[l] += w * (m_[l] - x[j * kLanes + l]);
    }
  }
  C distance(int64_t lane) const { return distance_[lane]; }

  // Rows that do not count get 0, whatever their logits hold.
  GDBP_CLONES void write(const Gradients& of, const C* weight, T* grad) {
    C line[kLanes];
    for (int64_t j = 0; j < in_.classes; ++j) {
      const C w = weight ? weight[j] : C(1);
      const C* const x = x_.data() + j * kLanes;
      for (int64_t l = 0; l < kLanes; ++l) {
        const C g = of.scale[l] * (math::exp_of_nonpositive(x[l] - of.m[l]) * of.factor[l] - of.uniform[l] * w);
        line[l] = of.counts[l] == C(0) ? C(0) : g;
      }
      if (in_.softcap != 0) slope(j, line);
      T* const to = grad + place(j, 0);
      if (!across_) {
        for (int64_t l = 0; l < count_; ++l) to[l * stride_] = narrow<T>(line[l]);
      } else if (count_ == kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) to[l] = narrow<T>(line[l]);
      } else {
        for (int64_t l = 0; l < count_; ++l) to[l] = narrow<T>(line[l]);
      }
    }
  }
  void write_one(T* grad, int64_t label, int64_t lane, C value) const { grad[place(label, lane)] = narrow<T>(value); }

 private:
  // Where a logit, or its gradient, lies.
  int64_t place(int64_t label, int64_t lane) const { return start_ + label * in_.inner + lane * stride_; }

  GDBP_CLONES void read() {
    for (int64_t j = 0; j < in_.classes; ++j) {
      const T* const from = in_.logits + place(j, 0);
      C* const to = x_.data() + j * kLanes;
      if (!across_) {
        for (int64_t l = 0; l < count_; ++l) to[l] = widen(from[l * stride_]);
      } else if (count_ == kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) to[l] = widen(from[l]);
      } else {
        for (int64_t l = 0; l < count_; ++l) to[l] = widen(from[l]);
      }
    }
  }
  GDBP_CLONES void cap_all() {
    for (int64_t i = 0; i < int64_t(x_.size()); ++i) x_[i] = cap(x_[i], in_.softcap);
  }
  // The logits once more as they are, for those in x_ are capped; before the gradient takes their place.
  GDBP_CLONES void slope(int64_t j, C* line) const {
    const T* const from = in_.logits + place(j, 0);
    for (int64_t l = 0; l < count_; ++l)
      line[l] = line[l] == C(0) ? C(0) : line[l] * cap_slope(C(widen(from[l * stride_])), in_.softcap);
  }

  const Rows<T> in_;
  const bool across_;     // neighbours are neighbours in memory
  const int64_t stride_;  // from one row to the next
  std::vector<C> x_;      // (classes, kLanes)
  C m_[kLanes], others_[kLanes], largest_[kLanes], distance_[kLanes];
  int64_t count_ = 0, start_ = 0;
};

}  // namespace gdbp::loss
