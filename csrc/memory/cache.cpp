#include "memory/cache.h"

#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <new>

#include "memory/page_map.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define GDBP_POISON(p, bytes) ASAN_POISON_MEMORY_REGION(p, bytes)
#define GDBP_UNPOISON(p, bytes) ASAN_UNPOISON_MEMORY_REGION(p, bytes)
#else
#define GDBP_POISON(p, bytes) ((void)(p), (void)(bytes))
#define GDBP_UNPOISON(p, bytes) ((void)(p), (void)(bytes))
#endif

namespace gdbp::memory {

namespace {

constinit PageMap pages;  // index of the class + 1
static_assert(kClasses < UINT8_MAX);

constexpr size_t kHugePage = size_t(2) << 20;

// A block of at least a huge page begins on one, and so never shares one with its neighbours.
void* map_pages(size_t bytes, bool huge_pages) {
  if (!huge_pages || bytes < kHugePage) return map_zeros(bytes);
  auto* const span = static_cast<char*>(map_zeros(bytes + kHugePage));
  if (!span) return nullptr;
  const size_t before = -reinterpret_cast<uintptr_t>(span) % kHugePage;
  if (before) munmap(span, before);
  munmap(span + before + bytes, kHugePage - before);
  madvise(span + before, bytes, MADV_HUGEPAGE);  // where the kernel has none, small pages serve as well
  return span + before;
}

}  // namespace

Cache& Cache::instance() {
  static Cache& cache = *new Cache;
  return cache;
}

Cache::Cache() {
  // A child must not find a lock held by a thread that it does not have.
  const auto lock = [] {
    for (std::mutex& m : instance().locks_) m.lock();
  };
  const auto unlock = [] {
    for (std::mutex& m : instance().locks_) m.unlock();
  };
  pthread_atfork(lock, unlock, unlock);
}

void Cache::enable(int64_t max_bytes, bool huge_pages) noexcept {
  max_bytes_ = max_bytes;
  huge_pages_ = huge_pages;
  enabled_ = true;
  trim(std::min(max_bytes, room_beside(0)));
}

void Cache::disable() noexcept {
  enabled_ = false;
  empty();
}

void Cache::empty() noexcept {
  for (int index = 0; index < kClasses; ++index)
    while (void* const block = take(index, End::kNewest)) unmap(index, block);
  most_in_use_ = in_use_.current();
}

void Cache::give_way() noexcept {
  if (!cached_.load(std::memory_order_relaxed)) return;
  retries_.fetch_add(1, std::memory_order_relaxed);
  empty();
}

void* Cache::allocate(size_t bytes) noexcept {
  if (bytes < kSmallest || bytes > kLargest || !enabled_.load(std::memory_order_relaxed)) return nullptr;
  const int wanted = size_class(bytes);
  int index = wanted;
  void* block = take(index, End::kNewest);
  if (!block) {
    // Rather than cold memory in the place of warm one, a block of up to twice the size.
    const bool full = cached_.load(std::memory_order_relaxed) > room_beside(class_bytes(wanted));
    const int last = std::min(wanted + (full ? kSteps : 1), kClasses - 1);
    while (!block && index < last) block = take(++index, End::kNewest);
  }
  (block ? hits_ : misses_).fetch_add(1, std::memory_order_relaxed);
  if (!block && !(block = map(index = wanted))) return nullptr;
  in_use_.add(class_bytes(index));
  Amount::raise(most_in_use_, in_use_.current());
  // What was not asked for stays out of bounds.
  GDBP_UNPOISON(block, bytes);
  GDBP_POISON(static_cast<char*>(block) + bytes, class_bytes(index) - bytes);
  return block;
}

bool Cache::release(void* block) noexcept {
  const int index = int(pages.get(block)) - 1;
  if (index < 0) return false;
  const int64_t bytes = int64_t(class_bytes(index)), most = max_bytes_.load(std::memory_order_relaxed);
  in_use_.subtract(bytes);
  // A block beyond the limit would drive out all others, and then itself.
  if (bytes > most || !keep(index, block)) return unmap(index, block), true;
  trim(most);
  return true;
}

void* Cache::take(int index, End end) noexcept {
  Pool& pool = pools_[index];
  const std::lock_guard<std::mutex> guard(lock_of(index));
  if (pool.blocks.empty()) return nullptr;
  void* block;
  if (end == End::kNewest) {
    block = pool.blocks.back().block;
    pool.blocks.pop_back();
  } else {
    block = pool.blocks.front().block;
    pool.blocks.pop_front();
  }
  pool.note_oldest();
  cached_.fetch_sub(int64_t(class_bytes(index)), std::memory_order_relaxed);
  return block;
}

bool Cache::keep(int index, void* block) noexcept {
  Pool& pool = pools_[index];
  GDBP_POISON(block, class_bytes(index));
  const std::lock_guard<std::mutex> guard(lock_of(index));
  // Asked under the lock, so that nothing comes in behind disable().
  if (!enabled_.load(std::memory_order_relaxed)) return false;
  try {
    pool.blocks.push_back({block, clock_.fetch_add(1, std::memory_order_relaxed)});
  } catch (const std::bad_alloc&) {
    return false;
  }
  pool.note_oldest();
  cached_.fetch_add(int64_t(class_bytes(index)), std::memory_order_relaxed);
  return true;
}

// Gives back what was not needed for longest, until no more than `bytes` are kept.
void Cache::trim(int64_t bytes) noexcept {
  const auto time = [](const Pool& pool) { return pool.oldest.load(std::memory_order_relaxed); };
  while (cached_.load(std::memory_order_relaxed) > bytes) {
    const Pool* const pool = std::min_element(std::begin(pools_), std::end(pools_),
                                              [&](const Pool& a, const Pool& b) { return time(a) < time(b); });
    if (time(*pool) == UINT64_MAX) return;
    const int index = int(pool - pools_);
    if (void* const block = take(index, End::kOldest)) unmap(index, block);
  }
}

// How much use allows to keep beside so many more bytes in use.
int64_t Cache::room_beside(size_t bytes) const noexcept {
  if (max_bytes_.load(std::memory_order_relaxed) != kByUse) return INT64_MAX;
  const int64_t use = in_use_.current() + int64_t(bytes), most = std::max(use, most_in_use_.load());
  return most + most / 4 - use;
}

void* Cache::map(int index) noexcept {
  const size_t bytes = class_bytes(index);
  trim(room_beside(bytes));
  void* block = map_pages(bytes, huge_pages_);
  if (!block) {
    give_way();
    block = map_pages(bytes, huge_pages_);
  }
  if (!block) return nullptr;
  if (!pages.set(block, uint8_t(index + 1))) return munmap(block, bytes), nullptr;
  held_.add(bytes);
  return block;
}

void Cache::unmap(int index, void* block) noexcept {
  const size_t bytes = class_bytes(index);
  // First, for the moment it is unmapped another thread may get the same address.
  pages.set(block, 0);
  held_.subtract(bytes);
  GDBP_UNPOISON(block, bytes);
  munmap(block, bytes);
}

Stats Cache::stats() const noexcept {
  return {in_use_.read(), held_.read(), cached_.load(), hits_.load(), misses_.load(), retries_.load()};
}

void Cache::reset_peaks() noexcept {
  in_use_.reset_peak();
  held_.reset_peak();
}

}  // namespace gdbp::memory
