// The arithmetic of the layers and losses (linear_math.h, loss_math.h), one element or one row at a time,
// against the same mathematics in long double.
#include <algorithm>
#include <string>

#include "bce/bce_math.h"
#include "check.h"
#include "linear/linear_math.h"
#include "loss/loss_math.h"

using real = long double;
namespace linear = gdbp::linear;
namespace loss = gdbp::loss;
namespace bce = gdbp::bce;
using check::error_against;
using check::uniform;

// Activations: forward and derivative at z; the derivative is formed from what the backward pass is given.
template <class T, class Op, class Forward, class Derivative>
void test_activation(const char* name, double bound, double back_bound, Forward forward, Derivative derivative) {
  check::Worst ahead, back;
  for (int i = 0; i <= 40000; ++i) {
    const T z = T(-20 + i * 0.001), g = T(uniform(-2, 2));
    const T y = Op::forward(z);
    // Where the normal distribution is subnormal its error is absolute, and z multiplies it.
    const real floor = std::fabs(real(z)) * std::numeric_limits<T>::min();
    ahead.see(error_against(y, forward(real(z)), {Op::saves == linear::Saved::pre ? floor : 0}), double(z));
    const T saved = Op::saves == linear::Saved::pre ? z : y;
    real largest = floor;  // of the terms of the derivative
    const real wanted = derivative(real(saved), largest);
    back.see(error_against(Op::backward(g, saved), g * wanted, {g * largest}), double(z));
  }
  check::report(name, check::type_name<T>, ahead, bound);
  check::report((std::string(name) + " backward").c_str(), check::type_name<T>, back, back_bound);
}

template <class T>
void test_activations() {
  test_activation<T, linear::None>("none", 0, 0, [](real z) { return z; }, [](real, real&) { return real(1); });
  test_activation<T, linear::Relu>(
      "relu", 0, 0, [](real z) { return z > 0 ? z : 0; }, [](real y, real&) { return real(y > 0); });
  const auto cdf = [](real z) { return std::erfc(-z * std::sqrt(0.5L)) / 2; };
  test_activation<T, linear::Gelu>(
      "gelu", 6, 6, [=](real z) { return z * cdf(z); },
      [=](real z, real& largest) {
        const real slope = z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0L));
        largest = std::max({largest, cdf(z), std::fabs(slope)});
        return cdf(z) + slope;
      });
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
}

// Cross-entropy of rows whose target leads or trails the others by a gap of 0 to 80.
template <class T>
void test_row() {
  check::Worst nll, gradient;
  for (int i = 0; i <= 20 * 80 * 2; ++i) {
    const bool leads = i % 2 == 0;
    const T gap = T(i / 2) / 20;
    const int others = 1 + i % 7;
    // One other class is `gap` away, the rest follow it in steps of 1/8.
    const T target = leads ? T(0) : -gap, maximum = T(0);
    real sum = 0;
    // Without the largest one's own term, be that the target's or the first of the others.
    T others_t = leads ? T(0) : gdbp::math::exp(target - maximum);
    for (int k = 0; k < others; ++k) {
      const T logit = (leads ? -gap : T(0)) - T(k) / 8;
      sum += std::exp(real(logit));
      if (leads || k > 0) others_t += gdbp::math::exp(logit - maximum);
    }
    const loss::Softmax<T> row{maximum, others_t};
    const real own = std::exp(real(target));
    const real exact = own > sum ? std::log1p(sum / own) : std::log(own + sum) - target;
    nll.see(check::ulp_error(row.nll(target), exact), double(leads ? gap : -gap));
    gradient.see(check::ulp_error(row.rest(target), sum / (own + sum)), double(leads ? gap : -gap));
  }
  check::report("cross-entropy loss", check::type_name<T>, nll, 5);
  check::report("cross-entropy gradient", check::type_name<T>, gradient, 5);
}

// Capped logits and their derivative, which 1 - tanh^2 would lose.
template <class T>
void test_cap() {
  check::Worst value, slope;
  for (int i = -4000; i <= 4000; ++i) {
    const T x = T(i) / 100, softcap = T(3);
    const real u = real(x) / softcap, c = std::cosh(u);
    value.see(check::ulp_error(loss::cap(x, softcap), softcap * std::tanh(u)), double(x));
    // The rounding of x / softcap counts as often as it is large.
    slope.see(check::ulp_error(loss::cap_slope(x, softcap), 1 / (c * c)) / (1 + 2 * double(std::fabs(u))), double(x));
  }
  check::report("softcap", check::type_name<T>, value, 4);
  check::report("softcap backward", check::type_name<T>, slope, 4);
}

// Binary cross-entropy, confident elements of either kind among them.
template <class T>
void test_bce() {
  check::Worst value, slope, target_slope;
  for (int i = -8000; i <= 8000; ++i) {
    const T x = T(i) / 100, t = T(i & 3) / 3, q = T(1) + T(i & 7) / 4;
    const real e = std::exp(-std::fabs(real(x))), tail = std::log1p(e);
    const real minus = std::max(-real(x), real(0)) + tail, plus = std::max(real(x), real(0)) + tail;
    const real p = x >= 0 ? 1 / (1 + e) : e / (1 + e), rest = x >= 0 ? e / (1 + e) : 1 / (1 + e);
    value.see(check::ulp_error(bce::loss(x, t, q), q * t * minus + (1 - real(t)) * plus), double(x));
    const real positive = q * t * rest, negative = (1 - real(t)) * p;
    slope.see(error_against(bce::input_slope(x, t, q), negative - positive, {positive, negative}), double(x));
    target_slope.see(error_against(bce::target_slope(x, t, q), q * minus - plus, {q * minus, plus}), double(x));
  }
  check::report("bce", check::type_name<T>, value, 5);
  check::report("bce backward", check::type_name<T>, slope, 5);
  check::report("bce backward, target", check::type_name<T>, target_slope, 5);
}

template <class T>
void test() {
  test_activations<T>();
  test_row<T>();
  test_cap<T>();
  test_bce<T>();
}

int main() {
  test<float>();
  test<double>();
  return check::finish();
}
