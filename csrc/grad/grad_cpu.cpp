#include <vector>

#include "common/line_cpu.h"
#include "common/macros.h"
#include "grad/grad.h"
#include "grad/grad_math.h"

namespace gdbp::grad {
namespace {

// Independent running sums, so that an addition need not wait for the one before; and four places that are read
// at a time, which the hardware fetches ahead better than one: 20 instead of 27 ms for 268 MB on one core of a Xeon.
constexpr int kStreams = 4;
constexpr int kLanes = 16;

template <class T>
GDBP_CLONES double sum_of_squares(const T* x, int64_t n) {
  double lanes[kStreams][kLanes] = {};
  const int64_t quarter = n / (kStreams * kLanes) * kLanes;
  for (int64_t i = 0; i < quarter; i += kLanes)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < kLanes; ++j) lanes[s][j] += square(x[s * quarter + i + j]);
  for (int64_t i = kStreams * quarter; i < n; ++i) lanes[0][i % kLanes] += square(x[i]);
  double total = 0;
  for (int j = 0; j < kLanes; ++j) total += (lanes[0][j] + lanes[1][j]) + (lanes[2][j] + lanes[3][j]);
  return total;
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
