// What losses share: how the losses of the elements, or of the rows, become the result.
#pragma once
#include <cstdint>

namespace gdbp {

enum class Reduction : int { none, mean, sum };
constexpr const char* kReductionNames[] = {"none", "mean", "sum"};

// Sums are taken over tiles of elements (or of rows) that do not depend on the number of threads or
// blocks, then over the tiles in order, so they are bitwise reproducible.
inline int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

}  // namespace gdbp
