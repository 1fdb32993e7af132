// Element-wise loops on the CPU. The functor says what happens to element i; the loop is written once,
// compiled per instruction set, and cut for threads where no result depends on the cut.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/macros.h"
#include "common/parallel.h"

namespace gdbp::cpu {

// Elements per indivisible piece. Cuts fall on multiples of it, so that an element is always computed by
// the vector body or always by the scalar tail, whatever the number of threads.
constexpr int64_t kPiece = 4096;
// Below this many elements of cheap arithmetic, waking a thread costs more than it saves.
constexpr int64_t kGrain = 8 * kPiece;

// The arrays that f touches overlap only element on element, which is what ivdep promises.
template <class F>
GDBP_CLONES void loop(const F f, int64_t begin, int64_t end) {
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) f(i);
}

// f(begin, end) for whole pieces of [0, n).
template <class F>
void for_pieces(int64_t n, const F& f) {
  parallel_for(0, (n + kPiece - 1) / kPiece, kGrain / kPiece,
               [&](int64_t lo, int64_t hi) { f(lo * kPiece, std::min(n, hi * kPiece)); });
}

template <class F>
void map(int64_t n, const F& f) {
  for_pieces(n, [&](int64_t begin, int64_t end) { loop(f, begin, end); });
}

}  // namespace gdbp::cpu
