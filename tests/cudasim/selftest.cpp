// Does the simulator compute what CUDA computes, and does it notice what CUDA would not forgive? One case
// per run, named by the first argument: those that must fail end the process.
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/reduce_cuda.cuh"
#include "testing.h"

namespace {

using namespace gdbp;
using cudasim::Schedule;

__global__ void block_sums(const double* values, double* sums) {
  const int at = int(blockIdx.x * blockDim.x + threadIdx.x);
  const double first = cuda::block_reduce<128>(values[at], cuda::Sum{}, 0.0);
  const double second = cuda::block_reduce<128>(2 * values[at], cuda::Sum{}, 0.0);
  sums[at] = first + second;
}

void reductions() {
  std::vector<double> values(384), sums(384, -1);
  for (size_t i = 0; i < values.size(); ++i) values[i] = double(i);
  expect(GDBP_LAUNCH(block_sums, 3, 128, 0, nullptr, values.data(), sums.data()) == 0, "launch");
  for (size_t i = 0; i < sums.size(); ++i) {
    const double first = double(i / 128 * 128);
    expect(sums[i] == 3 * (128 * first + 127 * 64), "every thread has the sum of its block");
  }
}

__global__ void exchanges(int* down, int* flipped, unsigned* odd, int* halves) {
  const int lane = int(threadIdx.x) % warpSize;
  down[threadIdx.x] = __shfl_down_sync(~0u, int(threadIdx.x), 5);
  flipped[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 3);
  odd[threadIdx.x] = __ballot_sync(~0u, lane & 1);
  if (lane < 16) {
    halves[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, lane, 8);
  } else {
    halves[threadIdx.x] = __shfl_xor_sync(0xffff0000u, -lane, 8);
  }
}

void shuffles() {
  std::vector<int> down(64), flipped(64), halves(64);
  std::vector<unsigned> odd(64);
  GDBP_LAUNCH(exchanges, 1, 64, 0, nullptr, down.data(), flipped.data(), odd.data(), halves.data());
  for (int t = 0; t < 64; ++t) {
    const int lane = t % 32;
    expect(down[t] == (lane + 5 < 32 ? t + 5 : t), "shfl_down");
    expect(flipped[t] == (t ^ 3), "shfl_xor");
    expect(odd[t] == 0xaaaaaaaau, "ballot");
    expect(halves[t] == (lane < 16 ? lane ^ 8 : -(lane ^ 8)), "two halves of a warp, each for itself");
  }
}

__global__ void where(int* order) {
  const dim3 g = gridDim, b = blockDim;
  const unsigned block = (blockIdx.z * g.y + blockIdx.y) * g.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * b.y + threadIdx.y) * b.x + threadIdx.x;
  atomicAdd(order + block * b.x * b.y * b.z + thread, int(block + thread));
}

void indices() {
  std::vector<int> order(24 * 60, 0);
  GDBP_LAUNCH(where, dim3(2, 3, 4), dim3(3, 4, 5), 0, nullptr, order.data());
  for (int i = 0; i < 24 * 60; ++i) expect(order[i] == i / 60 + i % 60, "each thread once");
  int least = 7;
  expect(atomicMin(&least, 3) == 7 && atomicMin(&least, 5) == 3 && least == 3, "atomicMin");
  expect(GDBP_LAUNCH(where, 1, 2000, 0, nullptr, order.data()) != 0, "a block of 2000 threads is refused");
  expect(GDBP_LAUNCH(where, 0, 32, 0, nullptr, order.data()) != 0, "a grid of no blocks is refused");
  expect(GDBP_LAUNCH(where, dim3(1, 65536), 32, 0, nullptr, order.data()) != 0, "65536 blocks in y are refused");
}

__global__ void reverse_in_shared_memory(int* values, int n) {
  GDBP_DYNAMIC_SHARED(int, copy);
  copy[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = copy[n - 1 - int(threadIdx.x)];
}

void dynamic_shared() {
  std::vector<int> values(96);
  for (int i = 0; i < 96; ++i) values[i] = i;
  GDBP_LAUNCH(reverse_in_shared_memory, 1, 96, 96 * sizeof(int), nullptr, values.data(), 96);
  for (int i = 0; i < 96; ++i) expect(values[i] == 95 - i, "reversed");
}

__global__ void leave_and_find(float* found) {
  __shared__ float left[64];
  if (threadIdx.x < 32) found[blockIdx.x * 32 + threadIdx.x] = left[threadIdx.x];
  left[threadIdx.x] = 1;
}

void shared_garbage() {
  std::vector<float> found(64, 0);
  GDBP_LAUNCH(leave_and_find, 2, 64, 0, nullptr, found.data());
  for (float x : found) expect(x != x, "shared memory starts as NaN in every block");
}

// ---- planted mistakes ----

// Both neighbours are read, so some thread is early under every order but a lucky draw.
__global__ void no_barrier(int* out) {
  __shared__ int values[64];
  const int t = int(threadIdx.x);
  values[t] = t;
  out[t] = values[(t + 1) % 64] + values[(t + 63) % 64];
}

void missing_barrier() {
  std::vector<int> out(64);
  GDBP_LAUNCH(no_barrier, 1, 64, 0, nullptr, out.data());
  for (int t = 0; t < 64; ++t) expect(out[t] == (t + 1) % 64 + (t + 63) % 64, "a neighbour has not written yet");
}

// The second round overwrites what a slower warp has yet to read in the first.
__global__ void one_barrier_a_round(int* out) {
  __shared__ int values[2];
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = round;
    __syncthreads();
    out[threadIdx.x] += values[0] + values[1];
  }
}

void overtaken() {
  std::vector<int> out(64, 0);
  GDBP_LAUNCH(one_barrier_a_round, 1, 64, 0, nullptr, out.data());
  for (int x : out) expect(x == 2, "a faster warp has written already");
}

__global__ void beyond(int* out) { out[threadIdx.x + 1] = 0; }

void global_out_of_bounds() {
  std::vector<int> out(32);
  GDBP_LAUNCH(beyond, 1, 32, 0, nullptr, out.data());
}

// The array's address goes through a barrier, so the check of a stack must outlive a change of fibers.
__global__ void beyond_local(int* out, int n) {
  int values[4] = {};
  int* volatile where = values;
  __syncthreads();
  out[threadIdx.x] = where[n];
}

void local_out_of_bounds() {
  std::vector<int> out(32);
  GDBP_LAUNCH(beyond_local, 1, 32, 0, nullptr, out.data(), 4);
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
void divergent_barrier() { GDBP_LAUNCH(half_a_barrier, 1, 64, 0, nullptr); }

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void two_places() { GDBP_LAUNCH(two_barriers, 1, 64, 0, nullptr); }

__global__ void lane_missing(int* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
void missing_lane() {
  std::vector<int> out(32);
  GDBP_LAUNCH(lane_missing, 1, 32, 0, nullptr, out.data());
}

__global__ void outside_mask() { __syncwarp(0x0000ffffu); }
void wrong_mask() { GDBP_LAUNCH(outside_mask, 1, 32, 0, nullptr); }

__global__ void half_a_warp() { __syncwarp(); }
void short_warp() { GDBP_LAUNCH(half_a_warp, 1, 16, 0, nullptr); }

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"reductions", reductions},
                               {"shuffles", shuffles},
                               {"indices", indices},
                               {"dynamic_shared", dynamic_shared},
                               {"shared_garbage", shared_garbage},
                               {"missing_barrier", missing_barrier},
                               {"overtaken", overtaken},
                               {"global_out_of_bounds", global_out_of_bounds},
                               {"local_out_of_bounds", local_out_of_bounds},
                               {"divergent_barrier", divergent_barrier},
                               {"two_places", two_places},
                               {"missing_lane", missing_lane},
                               {"wrong_mask", wrong_mask},
                               {"short_warp", short_warp}};
  return run_cases(argc, argv, cases);
}
