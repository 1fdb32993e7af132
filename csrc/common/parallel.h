// The thread pool, seen from code that knows no torch. parallel.cpp is torch's pool; tests/cpp and
// tests/cudasim bring their own.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

namespace gdbp {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// Calls body on sub-ranges that cover [begin, end), each at least `grain` long where more than one.
// How many there are depends on the number of threads: results must not.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  using Body = std::remove_reference_t<F>;
  // One grain or less: the pool costs more than the work.
  if (end - begin <= grain) {
    if (begin < end) f(begin, end);
    return;
  }
  parallel_ranges(
      begin, end, grain, [](void* context, int64_t lo, int64_t hi) { (*static_cast<Body*>(context))(lo, hi); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace gdbp
