// The sizes that blocks come in: eight between one power of two and the next, so that a block is at most an eighth
// larger than what it was asked for, and at most a quarter where the next class lends one. Once all that may be kept
// is kept, any of the next eight does.
#pragma once
#include <bit>
#include <cstddef>

namespace gdbp::memory {

// Below this malloc is left alone: the classes would be less than a page apart, and the blocks are few pages each.
inline constexpr size_t kSmallest = size_t(32) << 10;
// Far beyond any machine's memory: whatever asks for more is a mistake for malloc to refuse.
inline constexpr size_t kLargest = size_t(1) << 40;
inline constexpr int kSteps = 8;

// From kSmallest to kLargest, which is all that these take.
constexpr int size_class(size_t bytes) {
  const int shift = std::bit_width(bytes - 1) - 4;
  constexpr int first = std::bit_width(kSmallest - 1) - 4;
  return (shift - first) * kSteps + int((bytes - 1) >> shift) - (2 * kSteps - 1);
}

constexpr size_t class_bytes(int index) {
  constexpr int first = std::bit_width(kSmallest - 1) - 4;
  const int position = index + kSteps - 1;  // the first class is the last step of its power of two
  return size_t(position % kSteps + kSteps + 1) << (first + position / kSteps);
}

inline constexpr int kClasses = size_class(kLargest) + 1;

static_assert(size_class(kSmallest) == 0 && class_bytes(0) == kSmallest);
static_assert(size_class(kSmallest + 1) == 1 && class_bytes(kClasses - 1) == kLargest);

}  // namespace gdbp::memory
