// The norm of many gradients on CUDA against the CPU's, and both against a sum in long double.
#include "grad/grad.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::grad;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Limit kNoLimit = {kInfinity, 1, 0};
// Runs of at most 256 sums, which stray as a random walk does, then trees of these, then a root.
constexpr double kUlps = 4;

void expect_number(double got, long double wanted, double ulps, const std::string& what) {
  if (std::isnan(wanted) ? std::isnan(got) : got == wanted) return;
  if (std::abs(got - wanted) <= ulps * 0x1p-52L * std::abs(wanted)) return;
  char text[160];
  std::snprintf(text, sizeof(text), " is %.17g, expected %.17g", got, double(wanted));
  fail(what + text);
}

void expect_norm(const Norm& got, long double total, long double coefficient, double skip, const char* where) {
  expect_number(got.total, total, kUlps, std::string("total") + where);
  expect_number(got.coefficient, coefficient, kUlps, std::string("coefficient") + where);
  expect_number(got.skip, skip, 0, std::string("skip") + where);
}

// What a double holds of it.
long double ranged(long double x) { return x > std::numeric_limits<double>::max() ? kInfinity : x; }

// The same of both devices as of a sum in long double; what CUDA says.
Norm check(const std::vector<Array>& gradients, const Limit& limit) {
  std::vector<Source> sources;
  long double sum = 0;
  for (const Array& x : gradients) {
    sources.push_back({x.data(), x.size(), x.dtype()});
    // Each square is a double, as in torch: it may be infinite, or 0.
    for (int64_t i = 0; i < x.size(); ++i) sum += x.get(i) * x.get(i);
  }
  const long double total = ranged(std::sqrt(ranged(sum)) * limit.scale);
  const long double ratio = limit.max_norm / (total + 1e-6L);
  const long double coefficient = limit.scale * (ratio > 1 ? 1 : ratio);
  const double skip = limit.skip_nonfinite != 0 && !std::isfinite(total);

  const int64_t count = int64_t(sources.size());
  Norm cpu = {-1, -1, -1}, cuda = cpu;
  std::vector<char> workspace(norm_workspace_bytes(sources.data(), count));
  expect(norm_cpu(sources.data(), count, limit, &cpu, nullptr) == 0, "the CPU fails");
  expect(norm_cuda(sources.data(), count, limit, &cuda, workspace.data(), nullptr) == 0, "the launch fails");
  expect_norm(cpu, total, coefficient, skip, " on the CPU");
  expect_norm(cuda, total, coefficient, skip, " on CUDA");
  expect_norm(cuda, cpu.total, cpu.coefficient, cpu.skip, " on CUDA, of the CPU's");
  return cuda;
}

// A vector more or less, a block's sweep more or less, a chunk more or less. Where the elements lie makes no
// difference to a single bit.
void sizes() {
  std::mt19937 generator(1);
  for (Dtype dtype : kDtypes) {
    for (int64_t numel : {0, 1, 3, 4, 5, 1023, 1025, 16383, 16384, 16385, 40000}) {
      context = std::string(kDtypeNames[int(dtype)]) + " of " + std::to_string(numel);
      const Array aligned(dtype, numel, 0, generator, -2, 2);
      const Norm norm = check({aligned}, kNoLimit);
      for (int64_t offset : {1, 2, 3}) {
        Array misaligned(dtype, numel, offset);
        for (int64_t i = 0; i < numel; ++i) misaligned.set(i, aligned.get(i));
        expect_number(check({misaligned}, kNoLimit).total, norm.total, 0, "misaligned total");
      }
    }
  }
}

// Long, short and empty gradients of all types in turn: more than the arguments of one launch hold (650 that
// are not empty), exactly as many, and more than those of two. One number a schedule: a block takes its time.
void many() {
  const std::string schedule = schedule_name;
  const int filled = schedule == "forward" ? 651 : schedule == "reverse" ? 650 : 1301;
  context = std::to_string(filled) + " gradients";
  std::mt19937 generator(2);
  std::vector<Array> gradients;
  for (int i = 0; i < filled; ++i) {
    const int64_t numel = i % 300 == 7 ? 20000 : 1 + i % 5;
    gradients.emplace_back(kDtypes[i % 4], numel, i % 3, generator, -2, 2);
    if (i % 10 == 3) gradients.emplace_back(kDtypes[i % 4], 0);
  }
  check(gradients, {1, 1, 1});
}

// Numbers whose squares neither float nor a half type holds, and those whose squares double does not.
void extremes() {
  std::mt19937 generator(3);
  // Up to a factor of two below the value.
  const auto near = [&](Dtype dtype, int64_t numel, double value) {
    return std::vector<Array>{Array(dtype, numel, 0, generator, value / 2, value)};
  };
  const struct {
    Dtype dtype;
    double value;
  } cases[] = {{Dtype::float64, 1e150},  {Dtype::float64, 1e-150},    {Dtype::float64, 1e200},
               {Dtype::float32, 3e38},   {Dtype::float32, 0x1p-149},  {Dtype::bfloat16, 3e38},
               {Dtype::bfloat16, 1e-38}, {Dtype::bfloat16, 0x1p-133}, {Dtype::float16, 65504},
               {Dtype::float16, 0x1p-24}};
  for (const auto& c : cases) {
    for (int64_t numel : {1, 5, 3000}) {
      context = std::string(kDtypeNames[int(c.dtype)]) + " " + std::to_string(c.value);
      for (double skip : {0, 1}) check(near(c.dtype, numel, c.value), {1, 1, skip});
    }
  }
  context = "a square that vanishes";
  expect_number(check(near(Dtype::float64, 5, 1e-200), {kInfinity, 1, 1}).total, 0, 0, "total");
  context = "overflow";
  const Norm norm = check(near(Dtype::float64, 5, 1e200), {1, 1, 1});
  expect_norm(norm, kInfinity, 0, 1, "");
  context = "a huge one among tiny ones";
  std::vector<Array> gradients = near(Dtype::float64, 20000, 1e-9);
  gradients[0].set(17000, 1e9);
  gradients.push_back(near(Dtype::float32, 9, 1e-9)[0]);
  check(gradients, {1, 1, 1});
}

// One element in the first, a middle or the last place of the first, a middle or the last tensor.
void nonfinite() {
  std::mt19937 generator(5);
  for (Dtype dtype : kDtypes) {
    for (double value : {kNan, kInfinity, -kInfinity}) {
      for (size_t place : {0, 1, 2}) {
        std::vector<Array> gradients;
        for (int64_t numel : {7, 16390, 3}) gradients.emplace_back(dtype, numel, 1, generator, -2, 2);
        gradients[place].set(int64_t(place) * (gradients[place].size() - 1) / 2, value);
        context = std::string(kDtypeNames[int(dtype)]) + " with " + std::to_string(value);
        for (double skip : {0, 1}) {
          const Norm norm = check(gradients, {1, 1, skip});
          expect_norm(norm, std::abs(value), std::isnan(value) ? kNan : 0, skip, "");
        }
      }
    }
  }
}

// max_norm below, above and at the norm, 0 and none; scale, as of a loss that was scaled by 2^16.
void limits() {
  std::mt19937 generator(4);
  // The distribution's bounds are one and the same: 2500 ones.
  const std::vector<Array> gradients{Array(Dtype::float32, 2500, 0, generator, 1, 1)};
  for (double max_norm : {0.0, 0.5, 5.0, 49.0, 50.0, 51.0, 1e300, kInfinity}) {
    for (double scale : {1.0, 0x1p-16, 3.0, 0.1}) {
      for (double skip : {0, 1}) {
        context = "max_norm " + std::to_string(max_norm) + ", scale " + std::to_string(scale);

        const Norm norm = check(gradients, {max_norm, scale, skip});
        const double total = 50 * scale;
        expect_norm(norm, total, scale * std::fmin(1, max_norm / (total + 1e-6)), 0, "");
        check({}, {max_norm, scale, skip});
      }
    }
  }
  context = "a finite sum that the scale makes infinite";
  expect(check({Array(Dtype::float64, 1, 0, generator, 1e150, 1e150)}, {1, 1e200, 1}).skip == 1, "skip");
}

std::vector<Source> sources_of(const std::vector<Array>& gradients) {
  std::vector<Source> sources;
  for (const Array& x : gradients) sources.push_back({x.data(), x.size(), x.dtype()});
  return sources;
}

// Of all sizes and types at odd addresses, more than one launch takes, with NaN, infinities and zeros in them.
void health() {
  std::mt19937 generator(6);
  std::vector<Array> gradients;
  for (int i = 0; i < 905; ++i) {
    const int64_t numel = i % 300 == 7 ? 16385 : i % 6;
    gradients.emplace_back(kDtypes[i % 4], numel, i % 3, generator, -2, 2);
    const double values[] = {0, kNan, kInfinity, -kInfinity};
    if (numel > 2 && i % 5 == 0) gradients.back().set(numel - 2, values[i % 4]);
  }
  const std::vector<Source> sources = sources_of(gradients);
  const int64_t count = int64_t(sources.size());
  std::vector<Health> cpu(count), cuda(count);
  std::vector<char> workspace(health_workspace_bytes(sources.data(), count));
  expect(health_cpu(sources.data(), count, cpu.data(), nullptr) == 0, "the CPU fails");
  expect(health_cuda(sources.data(), count, cuda.data(), workspace.data(), nullptr) == 0, "the launch fails");
  for (int64_t i = 0; i < count; ++i) {
    context = "gradient " + std::to_string(i);
    expect_number(cuda[i].norm, cpu[i].norm, kUlps, "norm");
    expect_number(cuda[i].largest, cpu[i].largest, 0, "largest");
    if (std::abs(cuda[i].mean - cpu[i].mean) > 1e-14) expect_number(cuda[i].mean, cpu[i].mean, 0, "mean");
    expect_number(cuda[i].nans, cpu[i].nans, 0, "nans");
    expect_number(cuda[i].infinities, cpu[i].infinities, 0, "infinities");
    expect_number(cuda[i].zeros, cpu[i].zeros, 0, "zeros");
  }
  expect(health_cuda(sources.data(), 0, cuda.data(), nullptr, nullptr) == 0, "nothing");
}

// Norms of other orders, NaN among the elements and not.
void orders() {
  std::mt19937 generator(7);
  for (double order : {1.0, 3.0, 0.5, kInfinity}) {
    for (double special : {0.0, kNan, kInfinity}) {
      std::vector<Array> gradients;
      for (int i = 0; i < 9; ++i) gradients.emplace_back(kDtypes[i % 4], i == 4 ? 16386 : i, i % 3, generator, -2, 2);
      gradients[4].set(16384, special);
      const std::vector<Source> sources = sources_of(gradients);
      const Limit limit{3, 1, 0, order};
      Norm cpu = {}, cuda = {};
      std::vector<char> workspace(norm_workspace_bytes(sources.data(), 9));
      norm_cpu(sources.data(), 9, limit, &cpu, nullptr);
      norm_cuda(sources.data(), 9, limit, &cuda, workspace.data(), nullptr);
      context = "order " + std::to_string(order) + " with " + std::to_string(special);
      expect_number(cuda.total, cpu.total, 16, "total");
      expect_number(cuda.coefficient, cpu.coefficient, 16, "coefficient");
    }
  }
}

// Scaled and clamped: element for element as on the CPU, and by 1 not touched.
void rewrites() {
  std::mt19937 generator(8);
  for (Dtype dtype : kDtypes) {
    for (double factor : {1.0, 0.37, 0.0, kNan}) {
      std::vector<Array> cpu;
      for (int64_t numel : {0, 1, 3, 4, 5, 1023, 16385}) cpu.emplace_back(dtype, numel, numel % 3, generator, -2, 2);
      cpu[4].set(2, kNan);
      cpu[4].set(3, -kInfinity);
      std::vector<Array> cuda = cpu;
      const std::vector<Source> on_cpu = sources_of(cpu), on_cuda = sources_of(cuda);
      const int64_t count = int64_t(cpu.size());
      context = std::string(kDtypeNames[int(dtype)]) + " by " + std::to_string(factor);
      const auto same = [&](const char* what) {
        for (int64_t i = 0; i < count; ++i) expect_close(cuda[i], cpu[i], 0, 0, what);
      };
      clamp_cpu(on_cpu.data(), count, 1.25, nullptr);
      expect(clamp_cuda(on_cuda.data(), count, 1.25, nullptr) == 0, "clamp");
      same("clamped");
      scale_cpu(on_cpu.data(), count, &factor, nullptr);
      expect(scale_cuda(on_cuda.data(), count, &factor, nullptr) == 0, "scale");
      same("scaled");
    }
  }
}

// Tensors of many units, a unit of many chunks, some of them empty; in one schedule more than one launch takes.
std::vector<Array> unit_arrays(std::mt19937& generator, std::vector<int64_t>& units) {
  std::vector<Array> arrays;
  const int count = std::string(schedule_name) == "forward" ? 870 : 40;
  for (int i = 0; i < count; ++i) {
    const bool large = i == 7 || i == count - 5;
    units.push_back(large ? 3 : i % 4);
    const int64_t numel = units.back() * (large ? 16387 : 1 + i % 6);
    arrays.emplace_back(kDtypes[i % 4], numel, i % 3, generator, -2, 2);
  }
  return arrays;
}

std::vector<Source> sources_of(const std::vector<Array>& arrays, const std::vector<int64_t>& units) {
  std::vector<Source> sources = sources_of(arrays);
  for (size_t i = 0; i < sources.size(); ++i) sources[i].units = units[i];
  return sources;
}

// The norm of every unit: that of a tensor which holds nothing else. Every unit scaled by its own coefficient.
void units() {
  std::mt19937 generator(9);
  std::vector<int64_t> units;
  std::vector<Array> cpu = unit_arrays(generator, units);
  cpu[9].set(0, kNan);
  std::vector<Array> cuda = cpu;
  const std::vector<Source> on_cpu = sources_of(cpu, units), on_cuda = sources_of(cuda, units);
  const int64_t count = int64_t(on_cpu.size()), all = count_units(on_cpu.data(), count);
  std::vector<char> workspace(norm_workspace_bytes(on_cpu.data(), count));
  for (double order : count > 100 ? std::vector<double>{2} : std::vector<double>{2, kInfinity}) {
    std::vector<double> want(all, -1), got(all, -1);
    expect(unit_norms_cpu(on_cpu.data(), count, order, want.data(), nullptr) == 0, "the CPU fails");
    expect(unit_norms_cuda(on_cuda.data(), count, order, got.data(), workspace.data(), nullptr) == 0,
           "the launch fails");
    int64_t unit = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t u = 0; u < units[i]; ++u, ++unit) {
        context = "unit " + std::to_string(u) + " of tensor " + std::to_string(i);
        long double sum = 0;
        const int64_t numel = cpu[i].size() / units[i];
        for (int64_t j = u * numel; j < (u + 1) * numel; ++j) {
          const long double x = std::abs(cpu[i].get(j));
          sum = order == 2 ? sum + x * x : x > sum || x != x ? x : sum;
        }
        const long double wanted = order == 2 ? std::sqrt(sum) : sum;
        expect_number(want[unit], wanted, kUlps, "norm on the CPU");
        expect_number(got[unit], wanted, kUlps, "norm on CUDA");
      }
    }
  }
  std::vector<double> coefficients(all);
  for (int64_t i = 0; i < all; ++i) coefficients[i] = i % 3 == 0 ? 1 : i % 7 == 0 ? kNan : 0.01 * double(i % 100);
  // What is passed over keeps its numbers.
  std::vector<Source> some_cpu = on_cpu, some_cuda = on_cuda;
  const auto passed_over = [=](int64_t i) { return i == 2 || i == count - 9 || i == count - 1; };
  for (int64_t i = 0; i < count; ++i)
    if (passed_over(i)) some_cpu[i].numel = some_cuda[i].numel = 0;
  context = "scaled";
  expect(scale_units_cpu(some_cpu.data(), count, coefficients.data(), nullptr) == 0, "the CPU fails");
  expect(scale_units_cuda(some_cuda.data(), count, coefficients.data(), nullptr) == 0, "the launch fails");
  std::vector<int64_t> again;
  generator.seed(9);
  std::vector<Array> wanted = unit_arrays(generator, again);
  wanted[9].set(0, kNan);
  int64_t unit = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t numel = units[i] > 0 ? wanted[i].size() / units[i] : 0;
    for (int64_t u = 0; u < units[i]; ++u, ++unit) {
      if (passed_over(i)) continue;
      for (int64_t j = u * numel; j < (u + 1) * numel; ++j) wanted[i].set(j, wanted[i].get(j) * coefficients[unit]);
    }
    context = "tensor " + std::to_string(i) + " scaled";
    expect_close(cpu[i], wanted[i], 1, 0, "on the CPU");
    expect_close(cuda[i], cpu[i], 0, 0, "on CUDA");
  }
}

// The value against a sum in long double, the derivative element for element.
void penalties() {
  std::mt19937 generator(10);
  std::vector<int64_t> unused;
  const std::vector<Array> arrays = unit_arrays(generator, unused);
  const std::vector<Source> sources = sources_of(arrays);
  const int64_t count = int64_t(sources.size());
  std::vector<char> workspace(norm_workspace_bytes(sources.data(), count));
  std::vector<Penalty> all{{0.1, 0.2}, {0.3, 0}, {0, 0.7}};
  if (count > 100) all.resize(1);
  for (const Penalty& penalty : all) {
    context = "l1 " + std::to_string(penalty.l1) + ", l2 " + std::to_string(penalty.l2);
    long double wanted = 0;
    for (const Array& x : arrays)
      for (int64_t i = 0; i < x.size(); ++i)
        wanted += penalty.l1 * std::abs((long double)x.get(i)) + penalty.l2 / 2 * (long double)x.get(i) * x.get(i);
    double cpu = -1, cuda = -1;
    expect(penalty_cpu(sources.data(), count, penalty, &cpu, nullptr) == 0, "the CPU fails");
    expect(penalty_cuda(sources.data(), count, penalty, &cuda, workspace.data(), nullptr) == 0, "the launch fails");
    expect_number(cpu, wanted, 64, "value on the CPU");
    expect_number(cuda, wanted, 64, "value on CUDA");
    std::vector<Array> slopes_cpu, slopes_cuda;
    std::vector<void*> to_cpu, to_cuda;
    for (const Array& x : arrays) {
      slopes_cpu.emplace_back(x.dtype(), x.size(), 1);
      slopes_cuda.emplace_back(x.dtype(), x.size(), 2);
    }
    for (Array& x : slopes_cpu) to_cpu.push_back(x.data());
    for (Array& x : slopes_cuda) to_cuda.push_back(x.data());
    const double upstream = -1.25;
    penalty_slope_cpu(sources.data(), count, penalty, &upstream, to_cpu.data(), nullptr);
    expect(penalty_slope_cuda(sources.data(), count, penalty, &upstream, to_cuda.data(), nullptr) == 0, "slope");
    for (int64_t i = 0; i < count; ++i) {
      Array exact(arrays[i].dtype(), arrays[i].size());
      for (int64_t j = 0; j < exact.size(); ++j) {
        const double x = arrays[i].get(j);
        exact.set(j, upstream * ((x > 0) - (x < 0)) * penalty.l1 + upstream * penalty.l2 * x);
      }
      expect_close(slopes_cpu[i], exact, 2, 0, "slope on the CPU");
      expect_close(slopes_cuda[i], slopes_cpu[i], 1, 0, "slope on CUDA");
    }
  }
  double nothing = -1;
  expect(penalty_cuda(sources.data(), 0, {1, 1}, &nothing, nullptr, nullptr) == 0 && nothing == 0, "nothing");
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"sizes", sizes},         {"many", many},         {"extremes", extremes},
                               {"nonfinite", nonfinite}, {"limits", limits},     {"health", health},
                               {"orders", orders},       {"rewrites", rewrites}, {"units", units},
                               {"penalties", penalties}};
  return run_cases(argc, argv, cases);
}
