// Dropout (Srivastava et al., 2014), inverted: what is kept is divided by its share, so that expectations stay. Which
// elements those are is a function of a seed and their positions, so that the backward pass is the same call, and
// nothing is kept for it.
#pragma once
#include "common/random.h"

namespace gdbp::dropout {

// T: the compute type.
template <class T>
struct Mask {
  uint64_t seed;
  uint64_t threshold;  // of 2^32 equally likely numbers as many as p says are below it
  T scale;

  GDBP_HD T operator()(T x, int64_t i) const {
    return uint64_t(random_bits(seed, uint64_t(i))) < threshold ? T(0) : x * scale;
  }
};

// p: the probability of an element to be dropped, from 0 to 1.
template <class T>
Mask<T> mask(double p, uint64_t seed = 0) {
  return {seed, uint64_t(p * 0x1p32 + 0.5), p < 1 ? T(1 / (1 - p)) : T(0)};
}

}  // namespace gdbp::dropout
