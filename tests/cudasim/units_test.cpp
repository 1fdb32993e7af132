// The CUDA kernels of the units family against the CPU's.
#include "units/units.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::units;

// A tile of rows more or less, a warp of columns more or less, a block of the CPU's columns more or less.
constexpr struct {
  int64_t rows, units;
} kShapes[] = {{0, 3}, {3, 0}, {1, 1}, {7, 31}, {255, 2}, {256, 32}, {257, 33}, {600, 5}, {9, 257}, {8, 64}};

void count() {
  std::mt19937 generator(1);
  for (Dtype dtype : kDtypes) {
    for (auto [rows, units] : kShapes) {
      for (int64_t offset : {0, 1}) {
        context = std::string(kDtypeNames[int(dtype)]) + " (" + std::to_string(rows) + ", " + std::to_string(units) +
                  ") at offset " + std::to_string(offset);
        Array output(dtype, rows * units, offset, generator, -1, 1);
        if (rows > 6) output.set(units > 1 ? 1 : 0, std::nan(""));
        Array results[2] = {Array(Dtype::float64, 3 * units), Array(Dtype::float64, 3 * units)};
        for (int device : {0, 1}) {
          Array workspace(Dtype::float64, 3 * tiles(rows) * units);
          const Count args{dtype,
                           rows,
                           units,
                           output.data(),
                           -0.5,
                           0.25,
                           static_cast<double*>(results[device].data()),
                           static_cast<Tally*>(workspace.data())};
          expect((device ? count_cuda : count_cpu)(args, nullptr) == 0, "the launch fails");
        }
        expect_close(results[1], results[0], 64, double(rows), "result");
        if (units == 0) continue;
        double flat = 0;
        for (int64_t i = 0; i < rows; ++i) flat += output.get(i * units) <= -0.5 || output.get(i * units) >= 0.25;
        expect(results[1].get(0) == flat, "the first unit's flat outputs are not those counted one by one");
      }
    }
  }
}

// More columns than a grid has blocks for; in one schedule, for it takes seconds.
void wide() {
  if (std::string(schedule_name) != "random") return;
  constexpr int64_t rows = 2, units = 65535 * 32 + 33;
  Array output(Dtype::bfloat16, rows * units);
  for (int64_t i = 0; i < rows * units; ++i) output.set(i, double(i % 251) / 256);
  Array results[2] = {Array(Dtype::float64, 3 * units), Array(Dtype::float64, 3 * units)};
  Array workspace(Dtype::float64, 3 * units);
  for (int device : {0, 1}) {
    auto* const result = static_cast<double*>(results[device].data());
    const Count args{
        Dtype::bfloat16, rows, units, output.data(), -0.5, 0.25, result, static_cast<Tally*>(workspace.data())};
    expect((device ? count_cuda : count_cpu)(args, nullptr) == 0, "the launch fails");
  }
  expect_close(results[1], results[0], 64, double(rows), "result");
}

constexpr Case kCases[] = {{"count", count}, {"wide", wide}};

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, kCases); }
