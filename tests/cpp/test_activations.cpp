// The activations of activations.h, forward and backward, against the same mathematics in long double.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "common/activations.h"

using real = long double;
namespace linear = gdbp;
using check::error_against;
using check::uniform;

const real kPi = std::acos(-1.0L);
// From here on, to the left, every activation that is a product is 0.
const real kFar = 1000;

// A dense sweep over where the activations bend, and either sign of all magnitudes.
template <class T>
std::vector<T> inputs() {
  std::vector<T> z = {T(0), T(-0.0)};
  for (int i = 0; i <= 42000; ++i) z.push_back(T(-21 + i * 0.001));
  for (int i = 0; i < 4000; ++i) z.push_back(T(std::copysign(std::exp2(uniform(-120, 120)), uniform(-1, 1))));
  return z;
}

// The derivative is formed from what the backward pass is given. It tells its terms to `largest`: where they
// cancel, what each rounds by is lost, however small the sum. So errors are counted in ulp of the largest.
template <class T, class Op, class Forward, class Derivative>
void test_activation(const char* name, double bound, double back_bound, Forward forward, Derivative derivative) {
  constexpr bool saves_pre = Op::saves == linear::Saved::pre;
  check::Worst ahead, back;
  for (const T z : inputs<T>()) {
    const T g = T(uniform(-2, 2));
    const T y = Op::forward(z);
    // Where a factor of z is subnormal its error is absolute, and z multiplies it.
    const real floor = saves_pre && std::fabs(z) < kFar ? std::fabs(real(z)) * std::numeric_limits<T>::min() : 0;
    ahead.see(error_against(y, forward(real(z)), {floor}), double(z));
    const T saved = saves_pre ? z : y;
    real largest = floor;
    const real wanted = derivative(real(saved), largest);
    const T result = Op::backward(g, saved);
    // Those that keep the pre-activation write 0 for a subnormal gradient, whose error is then all of it.
    constexpr T smallest = std::numeric_limits<T>::min();
    const bool vanished = saves_pre && result == 0 && std::fabs(g * wanted) < 1.001L * smallest;
    if (!vanished) back.see(error_against(result, g * wanted, {g * largest}), double(z));
    if (saves_pre && result != 0 && std::fabs(result) < smallest)
      back.see(std::numeric_limits<double>::infinity(), double(z));
  }
  // NaN survives in both directions.
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const T result : {Op::forward(nan), Op::backward(nan, T(0.5))})
    if (!std::isnan(result)) ahead.see(std::numeric_limits<double>::infinity(), double(nan));
  check::report(name, check::type_name<T>, ahead, bound);
  check::report((std::string(name) + " backward").c_str(), check::type_name<T>, back, back_bound);
}

template <class T>
void test_piecewise() {
  test_activation<T, linear::None>("none", 0, 0, [](real z) { return z; }, [](real, real&) { return real(1); });
  test_activation<T, linear::Relu>(
      "relu", 0, 0, [](real z) { return z > 0 ? z : 0; }, [](real y, real&) { return real(y > 0); });
  // 0.01 in T is off by up to half an ulp, and so is the product.
  test_activation<T, linear::LeakyRelu>(
      "leaky_relu", 1.5, 1.5, [](real z) { return z > 0 ? z : z / 100; },
      [](real y, real&) { return y > 0 ? 1 : 0.01L; });
  test_activation<T, linear::Elu>(
      "elu", 2, 2, [](real z) { return z > 0 ? z : std::expm1(z); },
      [](real z, real&) { return z > 0 ? 1 : std::exp(z); });
}

template <class T>
void test_sigmoidal() {
  // g y (1 - y) rounds three times, each by up to an ulp of a result just below a power of two.
  test_activation<T, linear::Sigmoid>(
      "sigmoid", 2, 3, [](real z) { return 1 / (1 + std::exp(-z)); }, [](real y, real&) { return y * (1 - y); });
  // 1 - y^2 in T loses what y^2 rounds by: an ulp of 1, however small the difference.
  test_activation<T, linear::Tanh>(
      "tanh", 2, 2, [](real z) { return std::tanh(z); },
      [](real y, real& largest) {
        largest = 1;
        return 1 - y * y;
      });
  // Above 20 it is z, as in torch, and its derivative 1.
  test_activation<T, linear::Softplus>(
      "softplus", 2, 2, [](real z) { return z > 20 ? z : std::max(z, 0.0L) + std::log1p(std::exp(-std::fabs(z))); },
      [](real y, real&) { return y > 20 + std::log1p(std::exp(-20.0L)) ? 1 : -std::expm1(-y); });
}

// s + z s (1 - s) slope, the derivative of z s(v) with s the logistic function of v and slope dv/dz. Its terms
// are equal and opposite at the minimum of z s(v) (z = -0.75 for gelu_tanh, -1.28 for silu). Around it their
// roundings, some ulp of each term, are all that is left, so no bound in ulp of the sum could hold.
template <class T>
real derivative_of_gated(real z, real e, real slope, real& largest) {
  const real s = 1 / (1 + e), rest = 1 / (1 + 1 / e);
  // s or its complement is subnormal where the other factors are largest.
  largest = std::max({largest, s, std::fabs(z * s * rest * slope)});
  if (std::fabs(z) < kFar) largest = std::max(largest, std::fabs(z) * slope * std::numeric_limits<T>::min());
  return s + z * s * rest * slope;
}

// gelu_tanh is z s(2u), 2u = c z (1 + k z^2). exp(-2u) magnifies what 2u rounds by, in long double as in T, so
// each constant, sum and product has a second part.
const real kC = 0x1.9884533d43651p+0, kCRest = -9.969308809110920314576552604662932e-17L;  // 2 sqrt(2 / pi)
const real kK = 44715 / 1000000.0L, kKRest = std::fma(-kK, 1000000.0L, 44715.0L) / 1000000;

real gelu_tanh_exponential(real z) {
  const real square = z * z, square_rest = std::fma(z, z, -square);
  const real cubic = kK * square;
  const real cubic_rest = std::fma(kK, square, -cubic) + kK * square_rest + kKRest * square;
  const real sum = 1 + cubic;
  const real sum_rest = (std::min(cubic, 1.0L) - (sum - std::max(cubic, 1.0L))) + cubic_rest;
  const real product = z * sum, product_rest = std::fma(z, sum, -product) + z * sum_rest;
  const real u2 = kC * product, rest = std::fma(kC, product, -u2) + kC * product_rest + kCRest * product;
  return std::exp(-u2) * (std::fabs(u2) < 11000 ? 1 - rest : 1);
}

template <class T>
void test_gated() {
  const auto cdf = [](real z) { return std::erfc(-z * std::sqrt(0.5L)) / 2; };
  test_activation<T, linear::Gelu>(
      "gelu", 6, 6, [=](real z) { return z * cdf(z); },
      [=](real z, real& largest) {
        const real slope = z * std::exp(-z * z / 2) / std::sqrt(2 * kPi);
        largest = std::max({largest, cdf(z), std::fabs(slope)});
        return cdf(z) + slope;
      });
  test_activation<T, linear::GeluTanh>(
      "gelu_tanh", 4, 7, [](real z) { return z / (1 + gelu_tanh_exponential(z)); },
      [](real z, real& largest) {
        return derivative_of_gated<T>(z, gelu_tanh_exponential(z), kC * (1 + 3 * kK * z * z), largest);
      });
  test_activation<T, linear::Silu>(
      "silu", 4, 6, [](real z) { return z / (1 + std::exp(-z)); },
      [](real z, real& largest) { return derivative_of_gated<T>(z, std::exp(-z), 1, largest); });
}

template <class T>
void test() {
  test_piecewise<T>();
  test_sigmoidal<T>();
  test_gated<T>();
}

int main() {
  test<float>();
  test<double>();
  return check::finish();
}
