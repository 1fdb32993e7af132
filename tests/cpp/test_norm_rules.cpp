// The arithmetic of batch normalisation (norm_math.h), one channel at a time, against long double.
#include <vector>

#include "check.h"
#include "norm/norm_math.h"

using real = long double;
using namespace gdbp::norm;
using check::uniform;

struct Exact {
  real mean = 0, variance = 0;

  template <class T>
  explicit Exact(const std::vector<T>& x) {
    for (T value : x) mean += real(value) / real(x.size());
    for (T value : x) variance += (value - mean) * (value - mean) / real(x.size());
  }
};

template <class T>
Moments moments_of(const T* x, int64_t count) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = double(x[i]) - double(x[0]);
    sum += d;
    squares += d * d;
  }
  return Moments::about(x[0], double(count), sum, squares);
}

// Numbers around `center`, in tiles of 64 that are merged one after another.
template <class T>
std::vector<T> draw(double center, int64_t count) {
  std::vector<T> x;
  for (int64_t i = 0; i < count; ++i) x.push_back(T(center + uniform(-1, 1)));
  return x;
}

template <class T>
Moments tiled(const std::vector<T>& x) {
  Moments all;
  for (size_t i = 0; i < x.size(); i += 64) {
    all = merge(all, moments_of(x.data() + i, int64_t(std::min<size_t>(64, x.size() - i))));
  }
  return all;
}

// Statistics in double of float numbers are right to double's last digits, wherever the mean is.
void test_moments() {
  check::Worst mean, variance;
  for (double center : {0.0, 1.0, -1e3, 1e6}) {
    for (int64_t count : {1, 2, 63, 64, 65, 5000}) {
      const std::vector<float> x = draw<float>(center, count);
      const Exact exact(x);
      const Moments found = tiled(x);
      // Differences of means, of order 1 at most, have the digits of the means.
      const real largest = std::max<real>(std::fabs(exact.mean), 1);
      mean.see(check::error_against(found.mean, exact.mean, {largest}), center);
      variance.see(check::error_against(found.squares / found.count, exact.variance, {largest}), center);
    }
  }
  check::report("mean in tiles", "double", mean, 2);
  check::report("variance in tiles", "double", variance, 2);
}

void test_merging_with_nothing() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  check::Worst error;
  for (const Moments& all : {merge({3, 2, 1}, {0, nan, nan}), merge({0, nan, nan}, {3, 2, 1})}) {
    error.see(check::error_against(all.mean + all.squares + all.count, real(6), {real(0)}), 0);
  }
  check::report("merging with nothing", "double", error, 0);
}

// An element and its gradient through the coefficients of its channel.
template <class C>
void test_channel() {
  check::Worst value, gradient;
  const double eps = 1e-5, weight = 1.5, bias = -0.5;
  for (double center : {0.0, 1.0, -1e3, 1e4}) {
    const std::vector<C> x = draw<C>(center, 200), g = draw<C>(0, 200);
    const Exact exact(x);
    const real inverse = 1 / std::sqrt(exact.variance + real(eps));
    real sum_g = 0, sum_g_x = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      sum_g += g[i];
      sum_g_x += g[i] * (x[i] - exact.mean) * inverse;
    }
    const Moments moments = tiled(x);
    const double mean = moments.mean, variance = moments.squares / moments.count;
    const auto normalize = Normalize<C>::of(mean, variance, eps, weight, bias);
    double sum = 0, sum_x = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      sum += double(g[i]);
      sum_x += double(g[i]) * double(x[i] - normalize.center);
    }
    const auto grads = Gradients<C>::of(mean, variance, eps, weight, double(x.size()), sum, sum_x, true);
    for (size_t i = 0; i < x.size(); ++i) {
      const real deviation = (x[i] - exact.mean) * inverse;
      value.see(check::error_against(normalize(x[i]), real(weight) * deviation + real(bias), {real(1)}), center);
      const real wanted = real(weight) * inverse * (g[i] - (sum_g + deviation * sum_g_x) / real(x.size()));
      const C found = input_gradient(g[i], x[i], normalize.center, normalize.scale, grads.slope, grads.offset);
      gradient.see(check::error_against(found, wanted, {real(1)}), center);
    }
  }
  // In double the mean itself is rounded: by 1e4 times as much as numbers of order 1.
  const double bound = sizeof(C) == 4 ? 4 : 4e4;
  check::report("normalised value", check::type_name<C>, value, bound);
  check::report("gradient of the input", check::type_name<C>, gradient, bound);
}

int main() {
  test_moments();
  test_merging_with_nothing();
  test_channel<float>();
  test_channel<double>();
  return check::finish();
}
