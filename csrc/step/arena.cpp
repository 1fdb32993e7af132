#include "step/arena.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <numeric>

namespace gdbp::step {
namespace {

// A line of the cache, and a vector of any instruction set.
constexpr int64_t kAlignment = 64;

}  // namespace

void Arena::Free::operator()(char* p) const { std::free(p); }

void Arena::clear() {
  buffers_.clear();
  size_ = 0;
}

Arena::Id Arena::request(int64_t bytes, int first, int last) {
  const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  buffers_.push_back({rounded, first, last, 0});
  return Id(buffers_.size()) - 1;
}

void Arena::extend(Id id, int last) { buffers_[id].last = std::max(buffers_[id].last, last); }

// The largest first, each into the lowest gap between those that are alive at the same time.
void Arena::lay_out() {
  std::vector<Id> order(buffers_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](Id a, Id b) { return buffers_[a].bytes > buffers_[b].bytes; });
  std::vector<Id> placed;  // by offset
  for (const Id id : order) {
    Buffer& buffer = buffers_[id];
    int64_t offset = 0;
    for (const Id other : placed) {
      const Buffer& known = buffers_[other];
      if (known.last < buffer.first || buffer.last < known.first) continue;
      if (offset + buffer.bytes <= known.offset) break;
      offset = std::max(offset, known.offset + known.bytes);
    }
    buffer.offset = offset;
    size_ = std::max(size_, offset + buffer.bytes);
    const auto after = [&](Id a, Id b) { return buffers_[a].offset < buffers_[b].offset; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), id, after), id);
  }
  if (size_ <= capacity_) return;
  capacity_ = 0;
  memory_.reset();
  memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size_t(size_))));
  if (!memory_) throw std::bad_alloc();
  capacity_ = size_;
}

int64_t Arena::size_unshared() const {
  return std::accumulate(buffers_.begin(), buffers_.end(), int64_t(0),
                         [](int64_t sum, const Buffer& b) { return sum + b.bytes; });
}

}  // namespace gdbp::step
