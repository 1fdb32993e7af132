// The CUDA kernels of the loss family against the CPU's, and where the two promise different things
// (labels out of range) against the promise.
#include "loss/loss.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::loss;

constexpr Reduction kReductions[] = {Reduction::none, Reduction::mean, Reduction::sum};
constexpr int64_t kIgnore = -100;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

Dtype compute(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

// The ulps that another order of summation of n numbers costs: their root, by the laws of chance, on top of a
// few for what is done with the sum. Of a sum rounded to 16 bits the last one may flip.
double sum_ulps(Dtype dtype, int64_t n) { return size_of(dtype) == 2 ? 1 : 8 + std::sqrt(double(n)); }

struct Problem {
  Dtype dtype;
  Reduction reduction;
  int64_t rows, classes;
  Array logits, weight;
  bool weighted;
  double smoothing;
  std::vector<int64_t> target;
  int64_t offset;

  Problem(Dtype dtype, Reduction reduction, int64_t rows, int64_t classes, bool weighted, double smoothing,
          int64_t offset, std::mt19937& generator)
      : dtype(dtype),
        reduction(reduction),
        rows(rows),
        classes(classes),
        logits(dtype, rows * classes, offset, generator, -9, 9),
        weight(dtype, classes, offset, generator, 0.5, 2),
        weighted(weighted),
        smoothing(smoothing),
        target(rows),
        offset(offset) {
    for (int64_t row = 0; row < rows; ++row) {
      target[row] = row % 5 == 3 ? kIgnore : int64_t(generator() % uint64_t(classes));
    }
    context = std::string(kDtypeNames[int(dtype)]) + " " + kReductionNames[int(reduction)] + " (" +
              std::to_string(rows) + ", " + std::to_string(classes) + ") at offset " + std::to_string(offset) +
              (weighted ? ", weights" : "") + (smoothing > 0 ? ", smoothing" : "");
  }
  int64_t losses() const { return reduction == Reduction::none ? rows : 1; }
  CrossEntropy description() const {
    return {dtype,   reduction, rows, classes, logits.data(), target.data(), weighted ? weight.data() : nullptr,
            kIgnore, smoothing};
  }
};

struct Result {
  Array stats, output, grad;
  double total_weight = -1;
  int64_t bad_row = -2;

  explicit Result(const Problem& p)
      : stats(compute(p.dtype), 2 * p.rows), output(p.dtype, p.losses()), grad(p.logits) {}
};

// Forward, then backward, with the gradient over a copy of the logits or in memory of its own.
Result solve(bool cuda, const Problem& p, const Array& grad_output, bool in_place) {
  Result result(p);
  std::vector<double> workspace(2 * p.rows);
  const CrossEntropyForward forward{p.description(),      result.stats.data(), result.output.data(),
                                    &result.total_weight, &result.bad_row,     workspace.data()};
  expect((cuda ? cross_entropy_forward_cuda : cross_entropy_forward_cpu)(forward, nullptr) == 0, "forward");
  CrossEntropyBackward backward{p.description(), result.stats.data(), &result.total_weight, grad_output.data(),
                                result.grad.data()};
  if (in_place) backward.logits = result.grad.data();
  expect((cuda ? cross_entropy_backward_cuda : cross_entropy_backward_cpu)(backward, nullptr) == 0, "backward");
  return result;
}

void expect_same(const Problem& p, const Array& grad_output, bool in_place) {
  const Result cpu = solve(false, p, grad_output, in_place), cuda = solve(true, p, grad_output, in_place);
  expect(cuda.bad_row == cpu.bad_row, "bad_row");
  expect(std::abs(cuda.total_weight - cpu.total_weight) <= 1e-12 * cpu.total_weight, "total_weight");
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.target[row] == kIgnore) continue;
    const Array got(cuda.stats), expected(cpu.stats);
    expect(got.get(2 * row) == expected.get(2 * row), "the largest logit");
    const double others = expected.get(2 * row + 1);
    const double tolerance = sum_ulps(compute(p.dtype), p.classes) * epsilon(compute(p.dtype));
    expect(std::abs(got.get(2 * row + 1) - others) <= tolerance * others, "the sum of the others");
  }
  // The mean divides two sums over the rows; they are in double, so their rounding shows in float64 alone.
  const double row_ulps = p.dtype == Dtype::float64 ? 2 * std::sqrt(double(p.rows)) : 0;
  expect_close(cuda.output, cpu.output, sum_ulps(p.dtype, p.classes) + row_ulps, 0, "output");
  // A smoothed gradient is a difference: its digits count from its parts.
  const double parts = p.smoothing > 0 ? 1.0 / double(p.classes) : 0;
  const double scale = p.reduction == Reduction::mean ? parts / std::max(1.0, cpu.total_weight) : parts;
  expect_close(cuda.grad, cpu.grad, sum_ulps(p.dtype, p.classes) + row_ulps, scale, "grad_logits");
}

// Rows of a warp and of a block; tiles of rows one more, one less; every class beside a vector's end.
void cross_entropy() {
  constexpr struct {
    int64_t rows, classes;
  } shapes[] = {{1, 1},    {3, 2},    {5, 7},    {9, 8},    {10, 33}, {3, 129},
                {2, 1024}, {3, 1025}, {2, 2056}, {257, 10}, {600, 3}};
  std::mt19937 generator(3);
  for (auto shape : shapes) {
    for (Dtype dtype : kDtypes) {
      for (Reduction reduction : kReductions) {
        for (int variant = 0; variant < 4; ++variant) {
          // Half of the combinations, each pair of properties among them.
          if ((variant + variant / 2 + int(dtype) + int(reduction)) % 2 != 0) continue;
          const bool weighted = variant & 1, smoothed = variant & 2;
          const Problem p(dtype, reduction, shape.rows, shape.classes, weighted, smoothed ? 0.1 : 0,
                          (shape.rows + variant) % 2, generator);
          const Array grad_output(dtype, p.losses(), 0, generator, -2, 2);
          expect_same(p, grad_output, variant % 3 == 0);
        }
      }
    }
  }
}

void no_rows() {
  std::mt19937 generator(4);
  for (Reduction reduction : kReductions) {
    const Problem p(Dtype::float32, reduction, 0, 5, false, 0, 0, generator);
    const Array grad_output(Dtype::float32, p.losses(), 0, generator, 1, 2);
    expect_same(p, grad_output, false);
    expect(solve(true, p, grad_output, false).bad_row == -1, "bad_row without rows");
  }
}

void all_ignored() {
  std::mt19937 generator(5);
  for (Reduction reduction : kReductions) {
    Problem p(Dtype::bfloat16, reduction, 7, 5, true, 0.1, 0, generator);
    p.target.assign(7, kIgnore);
    for (int64_t i = 0; i < 35; ++i) p.logits.set(i, NAN);
    const Result result = solve(true, p, Array(Dtype::bfloat16, p.losses(), 0, generator, 1, 2), false);
    for (int64_t i = 0; i < p.losses(); ++i) {
      const double loss = result.output.get(i);
      expect(reduction == Reduction::mean ? loss != loss : loss == 0, "the loss of ignored rows");
    }
    for (int64_t i = 0; i < 35; ++i) expect(result.grad.get(i) == 0, "the gradient of ignored rows is 0");
    expect(result.bad_row == -1 && result.total_weight == 0, "bad_row, total_weight");
  }
}

// Labels far out of range: no access there (the address sanitizer watches), NaN in these rows alone, and
// the first one named.
void bad_labels() {
  std::mt19937 generator(6);
  for (int64_t classes : {int64_t(6), int64_t(1030)}) {
    const int64_t rows = classes == 6 ? 300 : 30;
    Problem p(Dtype::float32, Reduction::none, rows, classes, true, 0.1, 0, generator);
    p.target.assign(rows, 1);
    p.target[rows - 1] = -1;
    p.target[rows - 20] = classes;
    p.target[rows - 25] = int64_t(1) << 40;
    const Array ones(Dtype::float32, rows, 0, generator, 1, 1);
    const Result result = solve(true, p, ones, false);
    expect(result.bad_row == rows - 25, "bad_row is " + std::to_string(result.bad_row));
    for (int64_t row = 0; row < rows; ++row) {
      const bool bad = p.target[row] != 1;
      const double loss = result.output.get(row), gradient = result.grad.get(row * classes + 3);
      expect(bad == (loss != loss) && bad == (gradient != gradient), "row " + std::to_string(row));
    }
  }
}

// Infinite logits, and rows so sure that 1 - p would be 0.
void extremes() {
  std::mt19937 generator(7);
  for (double smoothing : {0.0, 0.1}) {
    Problem p(Dtype::float32, Reduction::none, 5, 4, false, smoothing, 0, generator);
    p.target = {0, 0, 1, 2, 0};
    const double rows[5][4] = {{1, -kInfinity, 2, 3},
                               {-kInfinity, 1, 2, 3},
                               {-kInfinity, -kInfinity, -kInfinity, -kInfinity},
                               {1, NAN, 2, 3},
                               {30, 0, 0, 0}};
    for (int64_t i = 0; i < 20; ++i) p.logits.set(i, rows[i / 4][i % 4]);
    const Array ones(Dtype::float32, 5, 0, generator, 1, 1);
    const Result result = solve(true, p, ones, true);
    const auto loss = [&](int64_t row) { return result.output.get(row); };
    const auto grad = [&](int64_t row, int64_t j) { return result.grad.get(row * 4 + j); };
    expect(smoothing > 0 ? loss(0) == kInfinity : std::abs(loss(0) - 2.4076059644443806) < 1e-6,
           "-inf beside the target");
    expect(loss(1) == kInfinity, "-inf at the target");
    expect(loss(2) != loss(2) && loss(3) != loss(3), "a row of -inf, a row with a NaN");
    if (smoothing > 0) continue;
    expect(grad(0, 1) == 0, "the gradient of a logit of -inf");
    const double others = 3 * std::exp(-30.0);
    expect(std::abs(loss(4) / others - 1) < 1e-5 && std::abs(grad(4, 0) / -others - 1) < 1e-5, "a sure row");
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"cross_entropy", cross_entropy},
                               {"no_rows", no_rows},
                               {"all_ignored", all_ignored},
                               {"bad_labels", bad_labels},
                               {"extremes", extremes}};
  return run_cases(argc, argv, cases);
}
