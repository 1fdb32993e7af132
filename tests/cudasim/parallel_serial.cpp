// The thread pool of the CPU kernels, for programs without torch: one thread.
#include "common/parallel.h"

namespace gdbp {

void parallel_ranges(int64_t begin, int64_t end, int64_t, RangeBody body, void* context) { body(context, begin, end); }

}  // namespace gdbp
