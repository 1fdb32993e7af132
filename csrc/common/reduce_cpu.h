// Sums on the CPU that do not depend on the number of threads: float within short runs, double from
// there on, over tiles of a fixed size, and the tiles in order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/macros.h"
#include "common/parallel.h"

namespace gdbp::cpu {

// Long chains lose digits, most where all numbers are equal and round to the same side, so a run is short; long enough
// to keep the vector units busy. Half as many doubles, of which a vector holds half as many: the chains are as long.
template <class T>
constexpr int64_t kRun = 512 / sizeof(T);

// sum of f(i) for i in [begin, end); what f writes on the way must not overlap what it reads, but element on element
template <class T, class F>
GDBP_CLONES double sum(const F f, int64_t begin, int64_t end) {
  double total = 0;
  for (int64_t lo = begin; lo < end; lo += kRun<T>) {
    const int64_t hi = std::min(end, lo + kRun<T>);
    T run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t i = lo; i < hi; ++i) run += f(i);
    total += double(run);
  }
  return total;
}

// The same over [0, n) in tiles, each tile's sum left in `partial` before they are added in order.
template <class T, class F>
double tiled_sum(int64_t n, int64_t tile, double* partial, const F& f) {
  const int64_t tiles = (n + tile - 1) / tile;
  parallel_for(0, tiles, 2, [&](int64_t lo, int64_t hi) {
    for (int64_t t = lo; t < hi; ++t) partial[t] = sum<T>(f, t * tile, std::min(n, (t + 1) * tile));
  });
  double total = 0;
  for (int64_t t = 0; t < tiles; ++t) total += partial[t];
  return total;
}

}  // namespace gdbp::cpu
