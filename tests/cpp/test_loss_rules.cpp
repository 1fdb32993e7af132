// The arithmetic of the losses (pointwise_math.h, bce_math.h, loss_math.h), one element or one row at a time, against
// the same mathematics in long double.
#include <string>

#include "bce/bce_math.h"
#include "check.h"
#include "loss/loss_math.h"
#include "pointwise/pointwise_math.h"

using real = long double;
namespace bce = gdbp::bce;
namespace loss = gdbp::loss;
namespace pointwise = gdbp::pointwise;
using check::error_against;
using check::uniform;

// Losses of single elements, value and derivative in the difference d, at all magnitudes, for parameters from
// 0.01 to 100, and within and beyond them.
template <class T, class Op, class Forward, class Derivative>
void test_pointwise(const char* name, double bound, double back_bound, Forward forward, Derivative derivative) {
  check::Worst value, slope;
  const auto see = [&](T d, T parameter) {
    value.see(error_against(Op::forward(d, parameter), forward(real(d), real(parameter)), {}), double(d));
    slope.see(error_against(Op::backward(d, parameter), derivative(real(d), real(parameter)), {}), double(d));
  };
  for (int i = 0; i < 40000; ++i) {
    const T parameter = T(std::exp2(uniform(-7, 7)));
    const T near = T(uniform(-2, 2)) * parameter;
    const T wide = T(std::copysign(std::exp2(uniform(-60, 60)), uniform(-1, 1)));
    for (const T d : {near, wide, parameter, -parameter, T(0)}) see(d, parameter);
  }
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  const double wrong = std::numeric_limits<double>::infinity();
  if (!std::isnan(Op::forward(nan, T(1))) || !std::isnan(Op::backward(nan, T(1)))) value.see(wrong, double(nan));
  for (const T d : {infinity, -infinity}) {
    if (Op::forward(d, T(1)) != infinity) value.see(wrong, double(d));
    if (Op::backward(d, T(1)) != T(derivative(real(d), 1))) slope.see(wrong, double(d));
  }
  check::report(name, check::type_name<T>, value, bound);
  check::report((std::string(name) + " backward").c_str(), check::type_name<T>, slope, back_bound);
}

template <class T>
void test_pointwise_losses() {
  const auto sign = [](real d) { return real(d > 0) - real(d < 0); };
  const auto huber = [](real d, real delta) {
    const real a = std::fabs(d);
    return a <= delta ? d * d / 2 : delta * (a - delta / 2);
  };
  const auto huber_slope = [=](real d, real delta) { return std::fabs(d) <= delta ? d : delta * sign(d); };
  // One rounding costs half an ulp; the second of a product that came out just above a power of two, one more.
  test_pointwise<T, pointwise::SquaredError>(
      "mse_loss", 0.5, 0, [](real d, real) { return d * d; }, [](real d, real) { return 2 * d; });
  test_pointwise<T, pointwise::AbsoluteError>(
      "l1_loss", 0, 0, [](real d, real) { return std::fabs(d); }, [=](real d, real) { return sign(d); });
  test_pointwise<T, pointwise::Huber>("huber_loss", 1.5, 0, huber, huber_slope);
  test_pointwise<T, pointwise::SmoothL1>(
      "smooth_l1_loss", 2.5, 0.5, [=](real d, real beta) { return huber(d, beta) / beta; },
      [=](real d, real beta) { return huber_slope(d, beta) / beta; });
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
    const bce::Logit<T> at(x);
    value.see(check::ulp_error(bce::loss(at, t, q), q * t * minus + (1 - real(t)) * plus), double(x));
    const real positive = q * t * rest, negative = (1 - real(t)) * p;
    slope.see(error_against(bce::input_slope(at, t, q), negative - positive, {positive, negative}), double(x));
    target_slope.see(error_against(bce::target_slope(at, q), q * minus - plus, {q * minus, plus}), double(x));
  }
  check::report("bce", check::type_name<T>, value, 5);
  check::report("bce backward", check::type_name<T>, slope, 5);
  check::report("bce backward, target", check::type_name<T>, target_slope, 5);
}

template <class T>
void test() {
  test_pointwise_losses<T>();
  test_row<T>();
  test_cap<T>();
  test_bce<T>();
}

int main() {
  test<float>();
  test<double>();
  return check::finish();
}
