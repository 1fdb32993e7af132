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

enum class Kind { labels, mixture, probabilities };
constexpr const char* kKindNames[] = {"labels", "mixture", "probabilities"};

struct Problem {
  Dtype dtype;
  Reduction reduction;
  Kind kind;
  int64_t outer, classes, inner;
  Array logits, probabilities, weight;
  bool weighted;
  double smoothing, z_loss, softcap;
  std::vector<int64_t> target, second;
  std::vector<double> share;

  Problem(Dtype dtype, Reduction reduction, Kind kind, int64_t outer, int64_t classes, int64_t inner, bool weighted,
          double smoothing, double z_loss, double softcap, int64_t offset, std::mt19937& generator)
      : dtype(dtype),
        reduction(reduction),
        kind(kind),
        outer(outer),
        classes(classes),
        inner(inner),
        logits(dtype, outer * classes * inner, offset, generator, -9, 9),
        probabilities(dtype, outer * classes * inner, offset, generator, 0, 2.0 / double(classes)),
        weight(dtype, classes, offset, generator, 0.5, 2),
        weighted(weighted),
        smoothing(smoothing),
        z_loss(z_loss),
        softcap(softcap),
        target(outer * inner),
        second(outer * inner),
        share(outer * inner) {
    for (int64_t row = 0; row < rows(); ++row) {
      target[row] = row % 5 == 3 ? kIgnore : int64_t(generator() % uint64_t(std::max<int64_t>(classes, 1)));
      second[row] = row % 7 == 3 ? kIgnore : int64_t(generator() % uint64_t(std::max<int64_t>(classes, 1)));
      share[row] = double(row % 11) / 10;
    }
    context = std::string(kDtypeNames[int(dtype)]) + " " + kReductionNames[int(reduction)] + " " +
              kKindNames[int(kind)] + " (" + std::to_string(outer) + ", " + std::to_string(classes) + ", " +
              std::to_string(inner) + ") at offset " + std::to_string(offset) + (weighted ? ", weights" : "") +
              (smoothing > 0 ? ", smoothing" : "") + (z_loss > 0 ? ", z_loss" : "") + (softcap > 0 ? ", softcap" : "");
  }
  int64_t rows() const { return outer * inner; }
  int64_t losses() const { return reduction == Reduction::none ? rows() : 1; }
  bool ignored(int64_t row) const {
    if (kind == Kind::probabilities) return false;
    return target[row] == kIgnore && (kind == Kind::labels || second[row] == kIgnore);
  }
  CrossEntropy description() const {
    const bool soft = kind == Kind::probabilities, mixed = kind == Kind::mixture;
    return {dtype,
            reduction,
            outer,
            classes,
            inner,
            logits.data(),
            soft ? nullptr : target.data(),
            mixed ? second.data() : nullptr,
            mixed ? share.data() : nullptr,
            !soft          ? nullptr
            : classes == 0 ? this
                           : probabilities.data(),  // empty ones lie nowhere, but are no null
            weighted ? weight.data() : nullptr,
            kIgnore,
            smoothing,
            z_loss,
            softcap};
  }
};

struct Result {
  Array stats, output, grad, grad_probabilities;
  double divisor = -1;
  int64_t bad[2] = {-2, -2};

  explicit Result(const Problem& p)
      : stats(compute(p.dtype), stats_per_row(p.kind == Kind::probabilities) * p.rows()),
        output(p.dtype, p.losses()),
        grad(p.logits),
        grad_probabilities(p.dtype, p.logits.size()) {}
};

// Forward, then backward, with the gradient over a copy of the logits or in memory of its own.
Result solve(bool cuda, const Problem& p, const Array& grad_output, bool in_place, const double* normalizer = nullptr,
             bool empty_is_zero = false) {
  Result result(p);
  std::vector<double> workspace(2 * p.rows());
  const CrossEntropyForward forward{p.description(), result.stats.data(), result.output.data(), &result.divisor,
                                    normalizer,      empty_is_zero,       result.bad,           workspace.data()};
  expect((cuda ? cross_entropy_forward_cuda : cross_entropy_forward_cpu)(forward, nullptr) == 0, "forward");
  const bool soft = p.kind == Kind::probabilities;
  CrossEntropyBackward backward{p.description(),    result.stats.data(),
                                &result.divisor,    grad_output.data(),
                                result.grad.data(), soft ? result.grad_probabilities.data() : nullptr};
  if (in_place) backward.logits = result.grad.data();
  expect((cuda ? cross_entropy_backward_cuda : cross_entropy_backward_cpu)(backward, nullptr) == 0, "backward");
  return result;
}

void expect_same(const Problem& p, const Array& grad_output, bool in_place, const double* normalizer = nullptr) {
  const Result cpu = solve(false, p, grad_output, in_place, normalizer);
  const Result cuda = solve(true, p, grad_output, in_place, normalizer);
  expect(cuda.bad[0] == cpu.bad[0] && cuda.bad[1] == cpu.bad[1], "bad");
  expect(std::abs(cuda.divisor - cpu.divisor) <= 1e-12 * cpu.divisor, "divisor");
  const bool soft = p.kind == Kind::probabilities;
  const int64_t kept = stats_per_row(soft);
  const double ulps = sum_ulps(p.dtype, p.classes) + (p.softcap > 0 ? 8 : 0);
  for (int64_t row = 0; row < p.rows(); ++row) {
    if (p.ignored(row)) continue;
    expect(cuda.stats.get(kept * row) == cpu.stats.get(kept * row), "the largest logit");
    const double tolerance = (sum_ulps(compute(p.dtype), p.classes) + 8) * epsilon(compute(p.dtype));
    for (int64_t k = 1; k < kept; ++k) {
      const double wanted = cpu.stats.get(kept * row + k);
      expect(std::abs(cuda.stats.get(kept * row + k) - wanted) <= tolerance * std::abs(wanted),
             "a sum over the others");
    }
  }
  // The mean divides two sums over the rows; they are in double, so their rounding shows in float64 alone.
  const double row_ulps = p.dtype == Dtype::float64 ? 2 * std::sqrt(double(p.rows())) : 0;
  expect_close(cuda.output, cpu.output, ulps + row_ulps, 0, "output");
  // Where a gradient is a difference its digits count from its parts.
  const bool difference = p.smoothing > 0 || p.kind != Kind::labels || p.z_loss > 0;
  const double parts = difference ? (p.kind == Kind::labels && p.z_loss == 0 ? 1.0 / double(p.classes) : 1) : 0;
  const double scale = p.reduction == Reduction::mean ? parts / std::max(1.0, std::abs(cpu.divisor)) : parts;
  expect_close(cuda.grad, cpu.grad, ulps + row_ulps, scale, "grad_logits");
  if (soft) expect_close(cuda.grad_probabilities, cpu.grad_probabilities, ulps + row_ulps, 0, "grad_probabilities");
}

// The gradient from the forward pass, which stays where the upstream gradient is 1, and else is written anew.
void expect_same_at_once(const Problem& p, const Array& grad_output, const double* normalizer) {
  Result result(p);
  std::vector<double> workspace(2 * p.rows());
  CrossEntropyForward forward{p.description(), result.stats.data(), result.output.data(), &result.divisor, normalizer,
                              false,           result.bad,          workspace.data()};
  forward.grad_logits = result.grad.data();
  expect(cross_entropy_forward_cuda(forward, nullptr) == 0, "forward");
  Array one = grad_output;
  one.set(0, 1);
  const Result wanted = solve(false, p, one, false, normalizer);
  const bool difference = p.smoothing > 0 || p.kind != Kind::labels || p.z_loss > 0;
  const double scale = difference ? 1 / (p.reduction == Reduction::mean ? std::max(1.0, wanted.divisor) : 1) : 0;
  const double ulps = sum_ulps(p.dtype, p.classes) + (p.softcap > 0 ? 8 : 0) + std::sqrt(double(p.rows()));
  expect_close(result.output, wanted.output, ulps, 0, "output at once");
  expect_close(result.grad, wanted.grad, ulps, scale, "grad_logits at once");

  CrossEntropyBackward backward{
      p.description(), result.stats.data(), &result.divisor, grad_output.data(), result.grad.data(), nullptr, true};
  expect(cross_entropy_backward_cuda(backward, nullptr) == 0, "backward");
  const Result other = solve(true, p, grad_output, false, normalizer);
  expect_close(result.grad, other.grad, 0, 0, "grad_logits written anew");
  backward.grad_output = one.data();
  expect(cross_entropy_backward_cuda(backward, nullptr) == 0, "backward");
  expect_close(result.grad, other.grad, 0, 0, "grad_logits that stay");
}

// Few rows; rows of a warp, of a small and a large block, and across memory; tiles of rows one more, one less; every
// class beside a vector's end. Of the options half of the combinations, each pair of properties among them.
void all_of(Kind kind, unsigned seed) {
  constexpr struct {
    int64_t outer, classes, inner;
  } shapes[] = {{1, 1, 1},    {3, 2, 1},    {5, 7, 1},    {9, 8, 1},    {10, 33, 1}, {3, 129, 1},
                {2, 1025, 1}, {257, 10, 1}, {1, 3, 4097}, {2, 5, 3},    {1, 3, 257}, {3, 17, 20},
                {2, 40, 150}, {3, 600, 1},  {1, 4200, 1}, {1, 66000, 1}};
  std::mt19937 generator(seed);
  for (auto shape : shapes) {
    for (Dtype dtype : kDtypes) {
      for (Reduction reduction : kReductions) {
        const bool is_large = shape.outer * shape.classes * shape.inner > 10000;
        if (is_large && reduction != Reduction::mean) continue;
        for (int variant = 0; variant < (is_large ? 2 : 4); ++variant) {
          if ((variant + variant / 2 + int(dtype) + int(reduction)) % 2 != 0) continue;
          const bool weighted = variant & 1, smoothed = variant & 2;
          const double z_loss = (variant + int(dtype)) % 3 == 0 ? 0.01 : 0;
          const double softcap = (variant + int(reduction)) % 3 == 0 ? 5 : 0;
          const Problem p(dtype, reduction, kind, shape.outer, shape.classes, shape.inner, weighted, smoothed ? 0.1 : 0,
                          z_loss, softcap, (shape.outer + variant) % 2, generator);
          const Array grad_output(dtype, p.losses(), 0, generator, -2, 2);
          const double normalizer = 7;
          expect_same(p, grad_output, variant % 3 == 0, variant == 2 ? &normalizer : nullptr);
          if (reduction != Reduction::none) expect_same_at_once(p, grad_output, variant == 2 ? &normalizer : nullptr);
        }
      }
    }
  }
}
void cross_entropy() { all_of(Kind::labels, 3); }
void mixtures() { all_of(Kind::mixture, 8); }
void probabilities() { all_of(Kind::probabilities, 9); }

// Plain labels over (rows, classes).
Problem labels(Dtype dtype, Reduction reduction, int64_t rows, int64_t classes, bool weighted, double smoothing,
               std::mt19937& generator) {
  return Problem(dtype, reduction, Kind::labels, rows, classes, 1, weighted, smoothing, 0, 0, 0, generator);
}

void no_rows() {
  std::mt19937 generator(4);
  for (Reduction reduction : kReductions) {
    const Problem p = labels(Dtype::float32, reduction, 0, 5, false, 0, generator);
    const Array grad_output(Dtype::float32, p.losses(), 0, generator, 1, 2);
    expect_same(p, grad_output, false);
    expect(solve(true, p, grad_output, false).bad[0] == -1, "bad without rows");
  }
}

void all_ignored() {
  std::mt19937 generator(5);
  for (Reduction reduction : kReductions) {
    Problem p = labels(Dtype::bfloat16, reduction, 7, 5, true, 0.1, generator);
    p.target.assign(7, kIgnore);
    for (int64_t i = 0; i < 35; ++i) p.logits.set(i, NAN);
    const Array grad_output(Dtype::bfloat16, p.losses(), 0, generator, 1, 2);
    const Result zero = solve(true, p, grad_output, false, nullptr, true);
    for (int64_t i = 0; i < p.losses(); ++i) expect(zero.output.get(i) == 0, "the mean of nothing, as zero");
    const Result result = solve(true, p, grad_output, false);
    for (int64_t i = 0; i < p.losses(); ++i) {
      const double loss = result.output.get(i);
      expect(reduction == Reduction::mean ? loss != loss : loss == 0, "the loss of ignored rows");
    }
    for (int64_t i = 0; i < 35; ++i) expect(result.grad.get(i) == 0, "the gradient of ignored rows is 0");
    expect(result.bad[0] == -1 && result.divisor == 0, "bad, divisor");
  }
}

// Labels far out of range: no access there (the address sanitizer watches), NaN in these rows alone, and
// the first one named.
void bad_labels() {
  std::mt19937 generator(6);
  for (int64_t classes : {int64_t(6), int64_t(1030)}) {
    const int64_t rows = classes == 6 ? 300 : 30;
    Problem p = labels(Dtype::float32, Reduction::none, rows, classes, true, 0.1, generator);
    p.target.assign(rows, 1);
    p.target[rows - 1] = -1;
    p.target[rows - 20] = classes;
    p.target[rows - 25] = int64_t(1) << 40;
    const Array ones(Dtype::float32, rows, 0, generator, 1, 1);
    const Result result = solve(true, p, ones, false);
    expect(result.bad[0] == rows - 25 && result.bad[1] == int64_t(1) << 40, "bad is " + std::to_string(result.bad[0]));
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
    Problem p = labels(Dtype::float32, Reduction::none, 5, 4, false, smoothing, generator);
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

// Upstream gradient and class weight together are beyond float32, the gradient is not.
void huge_upstream() {
  std::mt19937 generator(10);
  for (int64_t classes : {int64_t(2), int64_t(40), int64_t(1030)}) {
    Problem p = labels(Dtype::float32, Reduction::sum, 1, classes, true, 0, generator);
    p.target = {0};
    for (int64_t j = 0; j < classes; ++j) {
      p.logits.set(j, j == 0 ? 0 : -30);
      p.weight.set(j, 8);
    }
    Array upstream(Dtype::float32, 1, 0, generator, 1, 1);
    upstream.set(0, 1e38);
    const Result result = solve(true, p, upstream, false);
    const double share = std::exp(-30.0), others = double(classes - 1) * share;
    for (int64_t j = 0; j < classes; ++j) {
      const double wanted = 8 * double(upstream.get(0)) * (j == 0 ? -others : share) / (1 + others);
      expect(std::abs(result.grad.get(j) / wanted - 1) < 1e-5, "gradient of class " + std::to_string(j));
    }
  }
}

void infinite_upstream() {
  std::mt19937 generator(11);
  for (int64_t classes : {int64_t(5), int64_t(40), int64_t(1029)}) {
    for (bool softcap : {false, true}) {
      Problem p = labels(Dtype::float32, Reduction::mean, 3, classes, false, 0, generator);
      p.softcap = softcap ? 5 : 0;
      Array upstream(Dtype::float32, 1, 0, generator, 1, 1);
      upstream.set(0, INFINITY);
      const Result result = solve(true, p, upstream, false);
      for (int64_t row = 0; row < 3; ++row) {
        for (int64_t j = 0; j < classes; ++j) {
          const double wanted = j == p.target[row] ? -INFINITY : INFINITY;
          expect(result.grad.get(row * classes + j) == wanted, "gradient of class " + std::to_string(j));
        }
      }
    }
  }
}

void no_classes() {
  std::mt19937 generator(12);
  for (Reduction reduction : kReductions) {
    const Problem p(Dtype::float32, reduction, Kind::probabilities, 3, 0, 1, false, 0, 0, 0, 0, generator);
    const Array upstream(Dtype::float32, p.losses(), 0, generator, 1, 2);
    const Result cuda = solve(true, p, upstream, false), cpu = solve(false, p, upstream, false);
    for (int64_t i = 0; i < p.losses(); ++i)
      expect(std::isnan(cuda.output.get(i)) && std::isnan(cpu.output.get(i)), "the loss of no classes");
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"cross_entropy", cross_entropy}, {"mixtures", mixtures},
                               {"probabilities", probabilities}, {"no_rows", no_rows},
                               {"all_ignored", all_ignored},     {"bad_labels", bad_labels},
                               {"extremes", extremes},           {"huge_upstream", huge_upstream},
                               {"no_classes", no_classes},       {"infinite_upstream", infinite_upstream}};
  return run_cases(argc, argv, cases);
}
