#include <vector>

#include "common/line_cpu.h"
#include "common/macros.h"
#include "grad/grad.h"
#include "grad/grad_math.h"

namespace gdbp::grad {
namespace {

// Independent running sums, so that an addition need not wait for the one before.
constexpr int64_t kLanes = 32;

template <class T>
GDBP_CLONES double sum_of_squares(const T* x, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += square(x[i + j]);
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += square(x[i + j]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

}  // namespace

int norm_cpu(const Source* sources, int64_t count, const Limit& limit, Norm* norm, void*) {
  // Kept between calls: a step in the steady state allocates nothing.
  static thread_local cpu::Line line;
  static thread_local std::vector<double> partial;
  static thread_local std::vector<int64_t> first_chunk;
  line.clear();
  int64_t chunks = 0;
  first_chunk.clear();
  for (int64_t i = 0; i < count; ++i) {
    line.append(sources[i].numel);
    first_chunk.push_back(chunks);
    chunks += (sources[i].numel + cpu::kChunk - 1) / cpu::kChunk;
  }
  partial.resize(chunks);
  double* const sums = partial.data();
  const int64_t* const firsts = first_chunk.data();
  line.for_shares([=](const auto& share) {
    share([=](int64_t i, int64_t begin, int64_t end) {
      dispatch(sources[i].dtype, [=](auto type) {
        const auto* const x = static_cast<const typename decltype(type)::type*>(sources[i].data);
        for (int64_t at = begin; at < end; at += cpu::kChunk)
          sums[firsts[i] + at / cpu::kChunk] = sum_of_squares(x + at, std::min(cpu::kChunk, end - at));
      });
    });
  });
  double total = 0;
  for (const double sum : partial) total += sum;
  *norm = decide(total, limit);
  return 0;
}

}  // namespace gdbp::grad
