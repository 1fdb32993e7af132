// The caching allocator without torch: sizes, reuse, limits, and eight threads at once. Compiled and run by
// tests/test_memory_core.py, also under AddressSanitizer and ThreadSanitizer.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "memory/cache.cpp"

namespace {

using gdbp::memory::Cache;
using gdbp::memory::class_bytes;
using gdbp::memory::kClasses;
using gdbp::memory::kLargest;
using gdbp::memory::kSmallest;
using gdbp::memory::size_class;

constexpr size_t kMiB = size_t(1) << 20;

int failures = 0;
#define EXPECT(condition)                                         \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                 \
    }                                                             \
  } while (0)

Cache& cache() { return Cache::instance(); }

// Off and on again: nothing cached, no limit.
void restart(int64_t max_bytes = Cache::kByUse) {
  cache().disable();
  cache().enable(max_bytes, true);
}

bool all_bytes(const void* block, size_t bytes, unsigned char value) {
  const auto* const at = static_cast<const unsigned char*>(block);
  for (size_t i = 0; i < bytes; i += 509)
    if (at[i] != value) return false;
  return at[bytes - 1] == value;
}

void test_size_classes() {
  for (int c = 0; c < kClasses; ++c) {
    EXPECT(size_class(class_bytes(c)) == c);
    EXPECT(class_bytes(c) % 4096 == 0);
    if (c + 1 == kClasses) break;
    const size_t least = class_bytes(c) + 1;
    EXPECT(size_class(least) == c + 1);
    EXPECT(class_bytes(c + 1) - least < least / 8);
    if (c + 2 < kClasses) EXPECT(class_bytes(c + 2) - least < least / 4);
  }
}

void test_what_is_left_to_malloc() {
  restart();
  for (const size_t bytes : {size_t(0), size_t(1), size_t(64), kSmallest - 1, kLargest + 1, SIZE_MAX})
    EXPECT(cache().allocate(bytes) == nullptr);
  cache().disable();
  EXPECT(cache().allocate(kMiB) == nullptr);
  int on_the_stack;
  EXPECT(!cache().release(&on_the_stack));
  EXPECT(!cache().release(nullptr));
  void* page = aligned_alloc(4096, 4096);  // on a page boundary as ours, and yet not ours
  EXPECT(!cache().release(page));
  std::free(page);
  EXPECT(!cache().release(reinterpret_cast<void*>(~uintptr_t(4095))));
}

void test_reuse() {
  restart();
  for (const size_t bytes : {kSmallest, kSmallest + 1, kMiB - 1, 2 * kMiB, 2 * kMiB + 1, 5 * kMiB}) {
    const auto before = cache().stats();
    void* first = cache().allocate(bytes);
    EXPECT(first && reinterpret_cast<uintptr_t>(first) % 64 == 0);
    EXPECT(bytes < 2 * kMiB || reinterpret_cast<uintptr_t>(first) % (2 * kMiB) == 0);
    std::memset(first, 7, bytes);
    EXPECT(cache().release(first));
    void* second = cache().allocate(bytes);
    EXPECT(second == first && all_bytes(second, bytes, 7));
    EXPECT(cache().release(second));
    const auto after = cache().stats();
    EXPECT(after.hits == before.hits + 1 && after.misses == before.misses + 1);
    cache().empty();
  }
}

void test_the_next_class_lends_a_block() {
  restart(int64_t(64 * kMiB));
  void* larger = cache().allocate(9 * kMiB);
  void* other = cache().allocate(10 * kMiB);
  cache().release(larger);
  cache().release(other);
  EXPECT(cache().allocate(8 * kMiB) == larger);
  void* fresh = cache().allocate(8 * kMiB);  // 10 MiB are too many
  EXPECT(fresh != other);
  EXPECT(cache().stats().allocated.current == int64_t(17 * kMiB));
  cache().release(larger);
  EXPECT(cache().allocate(9 * kMiB) == larger);  // it kept its class
  cache().release(larger);
  cache().release(fresh);
}

void test_a_full_cache_lends_up_to_twice_the_size() {
  restart();
  void* large = cache().allocate(16 * kMiB);
  cache().release(large);
  void* fresh = cache().allocate(8 * kMiB - 1);  // 16 MiB are its double
  EXPECT(fresh == large);
  cache().release(fresh);
  fresh = cache().allocate(7 * kMiB);  // and are more than this one's, so they make room
  EXPECT(fresh != large && cache().stats().reserved.current == int64_t(7 * kMiB));
  cache().release(fresh);
}

void test_counts() {
  restart();
  cache().reset_peaks();
  const auto before = cache().stats();
  void* a = cache().allocate(kMiB);
  void* b = cache().allocate(2 * kMiB);
  cache().release(a);
  auto now = cache().stats();
  EXPECT(now.allocated.current == int64_t(2 * kMiB) && now.allocated.peak == int64_t(3 * kMiB));
  EXPECT(now.allocated.allocated - before.allocated.allocated == int64_t(3 * kMiB));
  EXPECT(now.allocated.freed - before.allocated.freed == int64_t(kMiB));
  EXPECT(now.reserved.current == int64_t(3 * kMiB) && now.cached == int64_t(kMiB));
  cache().reset_peaks();
  EXPECT(cache().stats().allocated.peak == int64_t(2 * kMiB));
  cache().empty();
  now = cache().stats();
  EXPECT(now.reserved.current == int64_t(2 * kMiB) && now.cached == 0);
  EXPECT(!cache().release(a));  // the address may be anybody's now
  cache().release(b);
  cache().empty();
  EXPECT(cache().stats().reserved.current == 0);
}

void test_limit_gives_up_the_least_recently_used() {
  restart(3 * kMiB);
  std::vector<void*> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(cache().allocate(kMiB));
  for (void* block : blocks) cache().release(block);
  EXPECT(cache().stats().cached == int64_t(3 * kMiB));
  EXPECT(cache().allocate(kMiB) == blocks[3]);
  EXPECT(cache().allocate(kMiB) == blocks[2]);
  EXPECT(cache().allocate(kMiB) == blocks[1]);
  const auto misses = cache().stats().misses;
  void* fresh = cache().allocate(kMiB);  // the first was given up
  EXPECT(cache().stats().misses == misses + 1);
  for (void* block : {fresh, blocks[1], blocks[2], blocks[3]}) cache().release(block);
  void* large = cache().allocate(64 * kMiB);
  cache().release(large);
  EXPECT(cache().stats().cached == int64_t(3 * kMiB));  // what never fits drives out nobody
  cache().enable(int64_t(kMiB), true);
  EXPECT(cache().stats().cached == int64_t(kMiB));
  cache().enable(0, true);
  EXPECT(cache().stats().cached == 0);
  cache().release(cache().allocate(kMiB));
  EXPECT(cache().stats().reserved.current == 0);
}

void test_all_that_is_held_stays_within_five_quarters_of_use() {
  restart();
  cache().reset_peaks();
  std::mt19937 random(0);
  int64_t most = 0;
  for (int round = 0; round < 300; ++round) {
    // Each round its own sizes: what the last one left fits badly.
    std::vector<void*> blocks;
    for (int i = 0; i < 8; ++i) blocks.push_back(cache().allocate(kSmallest + random() % (4 * kMiB)));
    most = std::max(most, cache().stats().allocated.peak);
    EXPECT(cache().stats().reserved.peak <= most + most / 4);
    for (void* block : blocks) cache().release(block);
  }
  cache().empty();
  EXPECT(cache().stats().reserved.current == 0);
}

void test_off_while_blocks_are_in_use() {
  restart();
  void* a = cache().allocate(kMiB);
  void* b = cache().allocate(kMiB);
  std::memset(a, 1, kMiB);
  cache().release(b);
  cache().disable();
  EXPECT(cache().stats().cached == 0 && all_bytes(a, kMiB, 1));
  EXPECT(cache().release(a));
  EXPECT(cache().stats().reserved.current == 0);
}

void test_without_memory() {
  restart(int64_t(64 * kMiB));
  cache().release(cache().allocate(4 * kMiB));
  const auto before = cache().stats();
  // More address space than a user's process has, asked for piece by piece and never touched.
  std::vector<void*> blocks;
  while (void* block = cache().allocate(kLargest)) blocks.push_back(block);
  const auto now = cache().stats();
  EXPECT(now.retries == before.retries + 1 && now.cached == 0);
  void* small = cache().allocate(kMiB);
  for (void* block : blocks) cache().release(block);
  if (small) cache().release(small);
  restart();
  EXPECT(cache().stats().reserved.current == 0);
}

void test_poison() {
#ifdef __SANITIZE_ADDRESS__
  restart();
  auto* block = static_cast<char*>(cache().allocate(kMiB + 8));
  EXPECT(!__asan_region_is_poisoned(block, kMiB + 8));
  EXPECT(__asan_address_is_poisoned(block + kMiB + 8));
  cache().release(block);
  EXPECT(__asan_address_is_poisoned(block) && __asan_address_is_poisoned(block + kMiB));
  block = static_cast<char*>(cache().allocate(kMiB + 64));
  EXPECT(!__asan_region_is_poisoned(block, kMiB + 64));
  cache().release(block);
  // Given back, the addresses are whoever's maps them next.
  cache().empty();
  void* const again = mmap(block, kMiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT(!__asan_region_is_poisoned(again, kMiB));
  munmap(again, kMiB);
#endif
}

// Blocks wander between threads through a shared table, are checked and freed by whoever takes them out, while
// the cache is emptied, limited and switched off and on.
void test_threads() {
  restart();
  struct Slot {
    std::mutex lock;
    unsigned char* block = nullptr;
    size_t bytes = 0;
    unsigned char value = 0;
  };
  std::vector<Slot> slots(32);
  std::atomic<int> wrong{0};
  const auto work = [&](int seed) {
    std::mt19937 random(seed);
    for (int i = 0; i < 3000; ++i) {
      const size_t bytes = kSmallest + random() % (256 << 10);
      const auto value = static_cast<unsigned char>(random());
      auto* block = static_cast<unsigned char*>(cache().allocate(bytes));
      size_t held = bytes;
      unsigned char expected = value;
      if (block) block[0] = block[bytes / 2] = block[bytes - 1] = value;
      {
        Slot& slot = slots[random() % slots.size()];
        const std::lock_guard<std::mutex> guard(slot.lock);
        std::swap(slot.block, block);
        std::swap(slot.bytes, held);
        std::swap(slot.value, expected);
      }
      if (block) {
        wrong += block[0] != expected || block[held / 2] != expected || block[held - 1] != expected;
        wrong += !cache().release(block);
      }
      if (i % 500 == seed) cache().empty();
      if (i % 700 == seed) cache().enable(int64_t(random() % (8 * kMiB)), seed % 2);
      if (i % 900 == seed) cache().disable();
      if (i % 300 == seed) cache().enable(Cache::kByUse, true);
      if (i % 100 == seed) cache().stats(), cache().reset_peaks();
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) threads.emplace_back(work, t);
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0);
  for (Slot& slot : slots)
    if (slot.block) cache().release(slot.block);
  cache().empty();
  const auto now = cache().stats();
  EXPECT(now.allocated.current == 0 && now.reserved.current == 0 && now.cached == 0);
}

// Children come while threads hold the locks, and must be able to take them.
void test_fork() {
  restart();
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      while (!stop) cache().release(cache().allocate(kMiB));
    });
  auto* kept = static_cast<unsigned char*>(cache().allocate(kMiB));
  std::memset(kept, 3, kMiB);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);  // a lock that stays shut ends the child, and the test
      bool good = all_bytes(kept, kMiB, 3) && cache().release(kept);
      for (int c = 0; c < 32; ++c) {
        void* const block = cache().allocate(class_bytes(c));
        good = good && block && cache().release(block);
      }
      cache().empty();
      _exit(good ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT(all_bytes(kept, kMiB, 3));
  cache().release(kept);
  cache().disable();
}

}  // namespace

int main() {
  test_size_classes();
  test_what_is_left_to_malloc();
  test_reuse();
  test_the_next_class_lends_a_block();
  test_a_full_cache_lends_up_to_twice_the_size();
  test_counts();
  test_limit_gives_up_the_least_recently_used();
  test_all_that_is_held_stays_within_five_quarters_of_use();
  test_off_while_blocks_are_in_use();
  test_without_memory();
  test_poison();
  test_threads();
  test_fork();
  std::printf(failures == 0 ? "all good\n" : "%d FAILED\n", failures);
  return failures != 0;
}
