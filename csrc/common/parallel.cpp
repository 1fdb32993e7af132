#include "common/parallel.h"

#include <ATen/Parallel.h>

namespace gdbp {

// at::parallel_for and no OpenMP of our own: a second pool would oversubscribe the cores, and torch's
// honours set_num_threads and survives a fork. Without -fopenmp it silently runs on one thread.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  at::parallel_for(begin, end, grain, [=](int64_t lo, int64_t hi) { body(context, lo, hi); });
}

}  // namespace gdbp
