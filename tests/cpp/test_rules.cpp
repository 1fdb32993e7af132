// The arithmetic of the families (optim_math.h, linear_math.h, loss_math.h), one element or one row at a
// time, against the same mathematics in long double.
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "linear/linear_math.h"
#include "loss/loss_math.h"
#include "optim/optim_math.h"

using real = long double;
namespace linear = gdbp::linear;
namespace loss = gdbp::loss;
namespace optim = gdbp::optim;

std::mt19937_64 generator(0);
double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

// An error in units of the last place of the largest term of a sum, where terms may cancel.
template <class T>
double error_against(T actual, real reference, std::initializer_list<real> terms) {
  real scale = std::fabs(reference);
  for (real term : terms) scale = std::max(scale, std::fabs(term));
  return double(std::fabs(actual - reference) / check::ulp<T>(scale));
}

// Optimizers, in ulp of the largest of parameter, update and lr (states: of state, gradient and 1): one
// update from random parameters, gradients and states, hyper-parameters as T holds them.
struct Update {
  real p, s[optim::kMaxStates];
};

template <class T, template <class> class Rule, class Reference>
void test_rule(const char* name, double bound, Reference reference) {
  check::Worst worst;
  for (int i = 0; i < 20000; ++i) {
    const double step = 1 + i % 50;
    const T g = T(uniform(-2, 2) * std::exp2(uniform(-20, 4)));
    T p = T(uniform(-1, 1)), s[optim::kMaxStates];
    // As in a real run, an average of squares exceeds the square of the average.
    s[0] = T(uniform(0.5, 1)), s[1] = T(uniform(0, 0.5)), s[2] = T(uniform(0, 0.5)), s[3] = 0;
    optim::Hyper hyper = {.lr = 0.01,
                          .weight_decay = 0,
                          .decoupled = 0,
                          .maximize = 0,
                          .l1 = 0,
                          .l1_prox = 0,
                          .clip_value = INFINITY,
                          .grad_scale = 1,
                          .rule = {}};
    for (double& value : hyper.rule) value = double(T(uniform(0.5, 0.9)));
    hyper.lr = double(T(hyper.lr));
    const Rule<T> rule(hyper, step);
    Update wanted = {p, {s[0], s[1], s[2], s[3]}};
    const real before = p;
    reference(wanted, real(g), hyper, step);
    rule(p, g, s);
    worst.see(error_against(p, wanted.p, {before, wanted.p - before, hyper.lr}), double(g));
    for (int k = 0; k < Rule<T>::states; ++k)
      worst.see(error_against(s[k], wanted.s[k], {real(g), 1}), double(g));
  }
  check::report(name, check::type_name<T>, worst, bound);
}

template <class T>
void test_optimizers() {
  using optim::Hyper;
  test_rule<T, optim::Sgd>("sgd", 1, [](Update& u, real g, const Hyper& h, double) { u.p -= h.lr * g; });
  const auto momentum = [](Update& u, real g, const Hyper& h, double step) {
    u.s[0] = step > 1 ? h.rule[0] * u.s[0] + (1 - real(h.rule[1])) * g : g;
  };
  test_rule<T, optim::SgdMomentum>("sgd_momentum", 3, [=](Update& u, real g, const Hyper& h, double step) {
    momentum(u, g, h, step);
    u.p -= h.lr * u.s[0];
  });
  test_rule<T, optim::SgdNesterov>("sgd_nesterov", 3, [=](Update& u, real g, const Hyper& h, double step) {
    momentum(u, g, h, step);
    u.p -= h.lr * (g + h.rule[0] * u.s[0]);
  });
  const auto rmsprop = [](Update& u, real g, const Hyper& h, bool centered, bool with_momentum) {
    const real alpha = h.rule[0];
    u.s[0] = alpha * u.s[0] + (1 - alpha) * g * g;
    real variance = u.s[0];
    if (centered) {
      real& mean = u.s[1 + with_momentum];
      mean = mean + (1 - alpha) * (g - mean);
      variance = std::max(real(0), variance - mean * mean);
    }
    const real update = g / (std::sqrt(variance) + h.rule[1]);
    real& buffer = u.s[1];
    if (with_momentum) buffer = h.rule[2] * buffer + update;
    u.p -= h.lr * (with_momentum ? buffer : update);
  };
  test_rule<T, optim::RmsPropPlain>(
      "rmsprop", 4, [=](Update& u, real g, const Hyper& h, double) { rmsprop(u, g, h, false, false); });
  test_rule<T, optim::RmsPropMomentum>("rmsprop_momentum", 4, [=](Update& u, real g, const Hyper& h, double) {
    rmsprop(u, g, h, false, true);
  });
  test_rule<T, optim::RmsPropCentered>("rmsprop_centered", 4, [=](Update& u, real g, const Hyper& h, double) {
    rmsprop(u, g, h, true, false);
  });
  test_rule<T, optim::RmsPropCenteredMomentum>(
      "rmsprop_centered_momentum", 4,
      [=](Update& u, real g, const Hyper& h, double) { rmsprop(u, g, h, true, true); });
  const auto adam = [](Update& u, real g, const Hyper& h, double step, bool amsgrad) {
    const real beta1 = h.rule[0], beta2 = h.rule[1];
    u.s[0] = beta1 * u.s[0] + (1 - beta1) * g;
    u.s[1] = beta2 * u.s[1] + (1 - beta2) * g * g;
    if (amsgrad) u.s[2] = std::max(u.s[2], u.s[1]);
    const real root = std::sqrt((amsgrad ? u.s[2] : u.s[1]) / (1 - std::pow(beta2, real(step))));
    u.p -= h.lr / (1 - std::pow(beta1, real(step))) * u.s[0] / (root + h.rule[2]);
  };
  test_rule<T, optim::AdamPlain>(
      "adam", 4, [=](Update& u, real g, const Hyper& h, double step) { adam(u, g, h, step, false); });
  test_rule<T, optim::AdamAmsgrad>(
      "adam_amsgrad", 4, [=](Update& u, real g, const Hyper& h, double step) { adam(u, g, h, step, true); });
}

// Activations: forward and derivative at z; the derivative is formed from what the backward pass is given.
template <class T, class Op, class Forward, class Derivative>
void test_activation(const char* name, double bound, Forward forward, Derivative derivative) {
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
  check::report((std::string(name) + " backward").c_str(), check::type_name<T>, back, bound);
}

template <class T>
void test_activations() {
  test_activation<T, linear::None>("none", 0, [](real z) { return z; }, [](real, real&) { return real(1); });
  test_activation<T, linear::Relu>(
      "relu", 0, [](real z) { return z > 0 ? z : 0; }, [](real y, real&) { return real(y > 0); });
  const auto cdf = [](real z) { return std::erfc(-z * std::sqrt(0.5L)) / 2; };
  test_activation<T, linear::Gelu>(
      "gelu", 6, [=](real z) { return z * cdf(z); },
      [=](real z, real& largest) {
        const real slope = z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0L));
        largest = std::max({largest, cdf(z), std::fabs(slope)});
        return cdf(z) + slope;
      });
  test_activation<T, linear::Sigmoid>(
      "sigmoid", 2, [](real z) { return 1 / (1 + std::exp(-z)); }, [](real y, real&) { return y * (1 - y); });
  // 1 - y^2 in T loses what y^2 rounds by: an ulp of 1, however small the difference.
  test_activation<T, linear::Tanh>(
      "tanh", 2, [](real z) { return std::tanh(z); },
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
    T sum_t = 0;
    for (int k = 0; k < others; ++k) {
      const T logit = (leads ? -gap : T(0)) - T(k) / 8;
      sum += std::exp(real(logit));
      sum_t += gdbp::math::exp(logit - maximum);
    }
    const loss::Row<T> row(maximum, target, sum_t);
    const real own = std::exp(real(target));
    const real exact = own > sum ? std::log1p(sum / own) : std::log(own + sum) - target;
    nll.see(check::ulp_error(row.nll(), exact), double(leads ? gap : -gap));
    gradient.see(check::ulp_error(row.others / row.total(), sum / (own + sum)), double(leads ? gap : -gap));
  }
  check::report("cross-entropy loss", check::type_name<T>, nll, 5);
  check::report("cross-entropy gradient", check::type_name<T>, gradient, 5);
}

template <class T>
void test() {
  test_optimizers<T>();
  test_activations<T>();
  test_row<T>();
}

int main() {
  test<float>();
  test<double>();
  return check::finish();
}
