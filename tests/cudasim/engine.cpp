// The scheduler of cudasim.h: fibers, barriers, and the sentences for what went wrong.
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "cudasim.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace cudasim {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kPageBytes = 4096;
constexpr int kGarbage = 0xff;  // as a floating point number of any width: NaN

// A fiber enters its stack by setcontext once; from there on it comes and goes by _setjmp and _longjmp, which unlike
// swapcontext make no system calls, and those took most of the time. libasan's own _longjmp forgets what it knows of
// a stack at every jump; libc's keeps the checks of local arrays alive. Its type hides that it does not return, as the
// compiler would tell libasan to forget. Nor is libasan told at every jump which stack it is on: it asks only when it
// forgets one, and for stack frames of its own, which the compiler was told not to use.
using Jump = void (*)(jmp_buf, int);
const Jump jump = reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));

struct Stack {
  char* base;
  Stack() {
    void* const memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("cudasim: no memory for the stack of a thread");
    base = static_cast<char*>(memory);
    mprotect(base, kPageBytes, PROT_NONE);  // running over the end is a fault, not silence
  }
  ~Stack() { munmap(base, kStackBytes); }
  Stack(const Stack&) = delete;
};

enum class State { runnable, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  Stack stack;
  jmp_buf context;
  bool entered = false;
  State state = State::done;
  Place place;
  unsigned mask = 0;
  int source = 0;
  bool vote = false;
  unsigned votes = 0;
  Word sent, received;
};

struct Engine {
  Schedule schedule = Schedule::forward;
  std::mt19937 generator;
  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<unsigned> warp_order, lane_order;
  unsigned threads = 0, current = 0;
  unsigned first = 0, turn = 0;  // the warp that runs, by its first thread, and whose turn it is in lane_order
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::vector<unsigned char> shared;
  std::string failure;
};
Engine engine;

void run_as(unsigned thread) {
  engine.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

// Goes on to the warp's next lane that can run, or back to the scheduler, until this fiber's turn comes again.
void leave(State state) {
  Fiber& self = *engine.pool[engine.current];
  self.state = state;
  if (_setjmp(self.context) != 0) return;
  while (engine.failure.empty() && ++engine.turn < engine.lane_order.size()) {
    const unsigned thread = engine.first + engine.lane_order[engine.turn];
    Fiber& next = *engine.pool[thread];
    if (next.state != State::runnable) continue;
    if (!next.entered) {
      --engine.turn;  // the scheduler lets it in
      break;
    }
    run_as(thread);
    jump(next.context, 1);
  }
  jump(engine.scheduler, 1);
}

// One thread of every block that is run.
void fiber_main() {
  for (;;) {
    (*engine.body)();
    leave(State::done);
  }
}

void enter(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.base;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber.entered = true;
  setcontext(&context);
}

std::string name(unsigned thread) { return "thread " + std::to_string(thread); }
std::string text(Place place) { return std::string(place.file_name()) + ":" + std::to_string(place.line()); }
std::string block_name() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string situation(unsigned thread) {
  const Fiber& fiber = *engine.pool[thread];
  switch (fiber.state) {
    case State::at_block_barrier: return name(thread) + " waits for its block at " + text(fiber.place);
    case State::at_warp_barrier: return name(thread) + " waits for its warp at " + text(fiber.place);
    case State::done: return name(thread) + " has returned";
    default: return name(thread) + " is running";
  }
}

[[noreturn]] void fail(const std::string& what, unsigned a, unsigned b) {
  throw Error("cudasim: " + what + " in " + block_name() + ": " + situation(a) + ", " + situation(b) + ".");
}

bool same_place(Place a, Place b) {
  if (a.line() != b.line() || a.column() != b.column()) return false;
  return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
}

bool same_meeting(const Fiber& a, const Fiber& b) {
  return b.state == State::at_warp_barrier && a.mask == b.mask && same_place(a.place, b.place);
}

// Lets the lanes that `first` waits for go on, if all of them are there.
void release_lanes(unsigned first) {
  const unsigned warp = first / warpSize * warpSize;
  const Fiber& head = *engine.pool[first];
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (!(head.mask >> lane & 1)) continue;
    if (warp + lane >= engine.threads || !same_meeting(head, *engine.pool[warp + lane])) return;
    votes |= unsigned(engine.pool[warp + lane]->vote) << lane;
  }
  const unsigned mask = head.mask;
  for (int lane = 0; lane < warpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = *engine.pool[warp + lane];
    const bool defined = fiber.source >= 0 && fiber.source < warpSize && (mask >> fiber.source & 1);
    if (defined) {
      fiber.received = engine.pool[warp + fiber.source]->sent;
    } else {
      std::memset(&fiber.received, kGarbage, sizeof(Word));
    }
    fiber.votes = votes;
    fiber.state = State::runnable;
  }
}

bool release_block() {
  for (unsigned t = 0; t < engine.threads; ++t) {
    if (engine.pool[t]->state != State::at_block_barrier) return false;
  }
  for (unsigned t = 1; t < engine.threads; ++t) {
    if (!same_place(engine.pool[0]->place, engine.pool[t]->place)) fail("divergent barrier", 0, t);
  }
  for (unsigned t = 0; t < engine.threads; ++t) engine.pool[t]->state = State::runnable;
  return true;
}

// Nobody can go on: the first thread that waits, and one that does not wait with it.
[[noreturn]] void report_deadlock() {
  const auto waits = [](unsigned t) { return engine.pool[t]->state != State::done; };
  unsigned first = 0;
  while (!waits(first)) ++first;
  const Fiber& head = *engine.pool[first];
  const bool in_warp = head.state == State::at_warp_barrier;
  const unsigned begin = in_warp ? first / warpSize * warpSize : 0;
  const unsigned end = in_warp ? std::min(engine.threads, begin + warpSize) : engine.threads;
  for (unsigned t = begin; t < end; ++t) {
    const bool wanted = !in_warp || (head.mask >> (t - begin) & 1);
    const bool there = in_warp ? same_meeting(head, *engine.pool[t]) : engine.pool[t]->state == head.state;
    if (wanted && !there) fail(in_warp ? "a warp that cannot meet" : "divergent barrier", first, t);
  }
  throw Error("cudasim: in " + block_name() + ", " + situation(first) +
              " with a mask that names lanes beyond the block.");
}

// Lets a fiber run, and those that it hands over to, until one comes back.
void resume(unsigned thread) {
  Fiber& fiber = *engine.pool[thread];
  run_as(thread);
  if (_setjmp(engine.scheduler) == 0) {
    if (fiber.entered) jump(fiber.context, 1);
    enter(fiber);
  }
  if (!engine.failure.empty()) throw Error(std::exchange(engine.failure, ""));
}

// Shared memory at the start of a block: whatever the last one left, here garbage.
void spoil_shared_memory() {
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void*) {
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& segment = module->dlpi_phdr[i];
          if (segment.p_type == PT_TLS && module->dlpi_tls_data != nullptr) {
            std::memset(module->dlpi_tls_data, kGarbage, segment.p_memsz);
          }
        }
        return 1;  // the first module is the program
      },
      nullptr);
  std::fill(engine.shared.begin(), engine.shared.end(), static_cast<unsigned char>(kGarbage));
}

void start(Fiber& fiber) {
  // A thread that was abandoned after an error enters anew, and the sanitizer's marks are still on its stack.
  if (fiber.state != State::done) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack.base + kPageBytes, kStackBytes - kPageBytes);
#endif
    fiber.entered = false;
  }
  fiber.state = State::runnable;
}

// Puts 0, 1, ... into `order` as the schedule wants them.
void arrange(std::vector<unsigned>& order, unsigned size) {
  order.resize(size);
  std::iota(order.begin(), order.end(), 0u);
  if (engine.schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (engine.schedule == Schedule::random) std::shuffle(order.begin(), order.end(), engine.generator);
}

// Every runnable lane of a warp goes on to its next wait; whether there was one.
bool advance(unsigned warp) {
  const unsigned first = warp * warpSize, size = std::min<unsigned>(warpSize, engine.threads - first);
  bool any = false;
  arrange(engine.lane_order, size);
  engine.first = first;
  for (engine.turn = 0; engine.turn < size; ++engine.turn) {
    const unsigned thread = first + engine.lane_order[engine.turn];
    if (engine.pool[thread]->state != State::runnable) continue;
    resume(thread);
    any = true;
  }
  for (unsigned t = first; t < first + size; ++t) {
    if (engine.pool[t]->state == State::at_warp_barrier) release_lanes(t);
  }
  return any;
}

void run_block() {
  spoil_shared_memory();
  for (unsigned t = 0; t < engine.threads; ++t) start(*engine.pool[t]);
  for (;;) {
    bool any = false;
    arrange(engine.warp_order, (engine.threads + warpSize - 1) / warpSize);
    for (unsigned warp : engine.warp_order) {
      // A warp goes as far as it can before the next one starts; at random, it stops on the way.
      while (advance(warp)) {
        any = true;
        if (engine.schedule == Schedule::random && engine.generator() % 4 == 0) break;
      }
    }
    if (any) continue;
    const auto end = engine.pool.begin() + engine.threads;
    if (std::all_of(engine.pool.begin(), end, [](const auto& fiber) { return fiber->state == State::done; })) return;
    if (!release_block()) report_deadlock();
  }
}

void check_lane(unsigned mask, Place place) {
  if (mask >> lane() & 1) return;
  engine.failure = "cudasim: " + name(engine.current) + " of " + block_name() +
                   " is not in the mask that it passes at " + text(place) + ".";
  leave(State::at_warp_barrier);
}

}  // namespace

void set_schedule(Schedule schedule, unsigned seed) {
  engine.schedule = schedule;
  engine.generator.seed(seed);
}

void* dynamic_shared() { return engine.shared.data(); }

int lane() { return int(engine.current % warpSize); }

void block_barrier(Place place) {
  engine.pool[engine.current]->place = place;
  leave(State::at_block_barrier);
}

Word warp_exchange(unsigned mask, const Word& word, int source, Place place) {
  check_lane(mask, place);
  Fiber& self = *engine.pool[engine.current];
  self.place = place;
  self.mask = mask;
  self.source = source;
  self.sent = word;
  leave(State::at_warp_barrier);
  return self.received;
}

unsigned warp_ballot(unsigned mask, bool vote, Place place) {
  Fiber& self = *engine.pool[engine.current];
  self.vote = vote;
  warp_exchange(mask, {}, lane(), place);
  self.vote = false;
  return self.votes;
}

int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ || shared_bytes > kMaxSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  engine.threads = unsigned(threads);
  engine.body = &thread;
  engine.shared = std::vector<unsigned char>(shared_bytes);
  while (engine.pool.size() < threads) engine.pool.push_back(std::make_unique<Fiber>());
  blockDim = block;
  gridDim = grid;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
    }
  }
  return cudaSuccess;
}

}  // namespace cudasim
