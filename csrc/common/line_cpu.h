// Many tensors as one line of elements, so that one parallel region serves them all, balanced by elements,
// and a thousand small tensors cost no more than one large one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"

namespace gdbp::cpu {

// Elements per chunk. A tensor is cut at multiples of it, counted from its own start: what is computed
// together depends neither on the number of threads nor on the other tensors.
constexpr int64_t kChunk = 8192;
// Chunks that are worth waking a thread for.
constexpr int64_t kChunkGrain = 4;

class Line {
 public:
  void clear() { starts_.assign(1, 0); }
  void append(int64_t numel) { starts_.push_back(starts_.back() + numel); }

  // Calls f(range) once for each thread's share; range(visit) then calls visit(tensor, begin, end) for the
  // whole chunks of it, in order. A chunk belongs to the share that its first element lies in.
  template <class F>
  void for_shares(const F& f, int64_t grain = kChunkGrain) const {
    const int64_t total = starts_.back();
    parallel_for(0, (total + kChunk - 1) / kChunk, grain, [&](int64_t first, int64_t last) {
      const int64_t lo = first * kChunk, hi = std::min(total, last * kChunk);
      f([&](const auto& visit) {
        int64_t i = std::upper_bound(starts_.begin(), starts_.end(), lo) - starts_.begin() - 1;
        for (; i + 1 < int64_t(starts_.size()) && starts_[i] < hi; ++i) {
          const int64_t numel = starts_[i + 1] - starts_[i];
          const int64_t begin = round_up(std::max<int64_t>(0, lo - starts_[i]));
          const int64_t end = std::min(numel, round_up(hi - starts_[i]));
          if (begin < end) visit(i, begin, end);
        }
      });
    });
  }

 private:
  static int64_t round_up(int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; }
  std::vector<int64_t> starts_ = {0};
};

}  // namespace gdbp::cpu
