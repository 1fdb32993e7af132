// The update rules of optim_math.h, one element at a time, against the formulas of torch.optim's for-loop
// (Lion: of its paper) in long double.
#include "check.h"
#include "optim/optim_math.h"

using real = long double;
using gdbp::optim::Clock;
using gdbp::optim::Hyper;
using gdbp::optim::kMaxStates;
namespace optim = gdbp::optim;

struct Update {
  real p, s[kMaxStates];
};

template <class T>
Hyper random_hyper() {
  Hyper hyper = {.lr = double(T(0.01)),
                 .weight_decay = 0,
                 .decoupled = 0,
                 .maximize = 0,
                 .l1 = 0,
                 .l1_prox = 0,
                 .clip_value = INFINITY,
                 .grad_scale = 1,
                 .rule = {}};
  // As T holds them: what is measured is the rule's own rounding.
  for (double& value : hyper.rule) value = double(T(check::uniform(0.5, 0.9)));
  return hyper;
}

// The clock after `step` ticks, kept as training keeps it: in double, one factor a step.
template <class Rule>
Clock clock_at(const Hyper& hyper, double step) {
  Clock clock = {step, 1};
  if constexpr (requires { Rule::momentum(hyper, 1.0); })
    for (double i = 1; i <= step; ++i) clock.product *= Rule::momentum(hyper, i);
  return clock;
}

// One update from random parameters, gradients and states, in ulp of the largest of parameter, update and lr
// (states: of state, gradient and 1). A NaN gradient must show in the parameter and in every state.
template <class T, template <class> class Rule, class Reference>
void test_rule(const char* name, double bound, Reference reference) {
  check::Worst worst;
  for (int i = 0; i < 20000; ++i) {
    const double step = 1 + i % 50;
    const T g = T(check::uniform(-2, 2) * std::exp2(check::uniform(-20, 4)));
    T p = T(check::uniform(-1, 1)), s[kMaxStates];
    // As in a real run, an average of squares exceeds the square of the average.
    s[0] = T(check::uniform(0.5, 1)), s[1] = T(check::uniform(0, 0.5)), s[2] = T(check::uniform(0, 0.5)), s[3] = 0;
    const Hyper hyper = random_hyper<T>();
    const Rule<T> rule(hyper, clock_at<Rule<T>>(hyper, step));
    Update wanted = {p, {s[0], s[1], s[2], s[3]}};
    const real before = p;
    reference(wanted, real(g), hyper, step);
    rule(p, g, s);
    worst.see(check::error_against(p, wanted.p, {before, wanted.p - before, hyper.lr}), double(g));
    for (int k = 0; k < Rule<T>::states; ++k)
      worst.see(check::error_against(s[k], wanted.s[k], {real(g), 1}), double(g));
    rule(p, T(NAN), s);
    bool shows = std::isnan(p);
    for (int k = 0; k < Rule<T>::states; ++k) shows = shows && std::isnan(s[k]);
    worst.see(shows ? 0 : INFINITY, NAN);
  }
  check::report(name, check::type_name<T>, worst, bound);
}

template <class T>
void test_sgd() {
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
}

template <class T>
void test_rmsprop() {
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
  test_rule<T, optim::RmsPropPlain>("rmsprop", 4,
                                    [=](Update& u, real g, const Hyper& h, double) { rmsprop(u, g, h, false, false); });
  test_rule<T, optim::RmsPropMomentum>(
      "rmsprop_momentum", 4, [=](Update& u, real g, const Hyper& h, double) { rmsprop(u, g, h, false, true); });
  test_rule<T, optim::RmsPropCentered>(
      "rmsprop_centered", 4, [=](Update& u, real g, const Hyper& h, double) { rmsprop(u, g, h, true, false); });
  test_rule<T, optim::RmsPropCenteredMomentum>(
      "rmsprop_centered_momentum", 4, [=](Update& u, real g, const Hyper& h, double) { rmsprop(u, g, h, true, true); });
}

template <class T>
void test_adagrad_and_adadelta() {
  test_rule<T, optim::Adagrad>("adagrad", 4, [](Update& u, real g, const Hyper& h, double step) {
    u.s[0] += g * g;
    u.p -= h.lr / (1 + (step - 1) * real(h.rule[0])) * g / (std::sqrt(u.s[0]) + h.rule[1]);
  });
  test_rule<T, optim::Adadelta>("adadelta", 4, [](Update& u, real g, const Hyper& h, double) {
    const real rho = h.rule[0], eps = h.rule[1];
    u.s[0] = rho * u.s[0] + (1 - rho) * g * g;
    const real delta = std::sqrt(u.s[1] + eps) / std::sqrt(u.s[0] + eps) * g;
    u.s[1] = rho * u.s[1] + (1 - rho) * delta * delta;
    u.p -= h.lr * delta;
  });
}

void average(Update& u, real g, const Hyper& h) {
  u.s[0] += (1 - real(h.rule[0])) * (g - u.s[0]);
  u.s[1] = h.rule[1] * u.s[1] + (1 - real(h.rule[1])) * g * g;
}
// What an average that began at 0 falls short by.
real correction(double beta, double step) { return 1 - std::pow(real(beta), real(step)); }

template <class T>
void test_adam() {
  const auto adam = [](Update& u, real g, const Hyper& h, double step, bool amsgrad) {
    average(u, g, h);
    if (amsgrad) u.s[2] = std::max(u.s[2], u.s[1]);
    const real root = std::sqrt((amsgrad ? u.s[2] : u.s[1]) / correction(h.rule[1], step));
    u.p -= h.lr / correction(h.rule[0], step) * u.s[0] / (root + h.rule[2]);
  };
  test_rule<T, optim::AdamPlain>("adam", 4,
                                 [=](Update& u, real g, const Hyper& h, double step) { adam(u, g, h, step, false); });
  test_rule<T, optim::AdamAmsgrad>("adam_amsgrad", 4,
                                   [=](Update& u, real g, const Hyper& h, double step) { adam(u, g, h, step, true); });
  test_rule<T, optim::Adamax>("adamax", 4, [](Update& u, real g, const Hyper& h, double step) {
    u.s[0] += (1 - real(h.rule[0])) * (g - u.s[0]);
    u.s[1] = std::max(h.rule[1] * u.s[1], std::fabs(g) + h.rule[2]);
    u.p -= h.lr / correction(h.rule[0], step) * u.s[0] / u.s[1];
  });
  test_rule<T, optim::NAdam>("nadam", 4, [](Update& u, real g, const Hyper& h, double step) {
    const auto momentum = [&](real at) { return h.rule[0] * (1 - 0.5L * std::pow(0.96L, at * real(h.rule[3]))); };
    real product = 1;
    for (int i = 1; i <= step; ++i) product *= momentum(i);
    average(u, g, h);
    const real denominator = std::sqrt(u.s[1] / correction(h.rule[1], step)) + h.rule[2];
    u.p -= h.lr * (1 - momentum(step)) / (1 - product) * g / denominator;
    u.p -= h.lr * momentum(step + 1) / (1 - product * momentum(step + 1)) * u.s[0] / denominator;
  });
}

// RAdam's length of the approximated average, and its factor once that is above 5.
struct Rectification {
  real length, factor;
  Rectification(double beta2, double step) {
    const real limit = 2 / (1 - real(beta2)) - 1;
    length = limit - 2 * step * std::pow(real(beta2), real(step)) / correction(beta2, step);
    factor = std::sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length));
  }
};

template <class T>
void test_radam() {
  // The length is a small difference of numbers near 2 / (1 - beta2), at most 20 here.
  test_rule<T, optim::RAdam>("radam", 8, [](Update& u, real g, const Hyper& h, double step) {
    average(u, g, h);
    const real mean = u.s[0] / correction(h.rule[0], step);
    const Rectification r(h.rule[1], step);
    const real root = std::sqrt(correction(h.rule[1], step)) / (std::sqrt(u.s[1]) + h.rule[2]);
    u.p -= h.lr * mean * (r.length > 5 ? r.factor * root : 1);
  });
  // Around the step at which the rectification comes on, the sixth or seventh. The constants are worked out
  // in double, as torch's are: rounding beta2^step by half an ulp of double moves 1 - beta2^step by
  // 2^-54 / (step (1 - beta2)) of itself, and the length by 2 / (1 - beta2) times as much.
  for (const double beta2 : {0.9, 0.99, 0.999, 0.9999}) {
    check::Worst worst;
    Hyper hyper = random_hyper<T>();
    hyper.rule[1] = beta2;
    bool before = false, after = false;
    for (int step = 1; step <= 12; ++step) {
      const optim::RAdam<T> rule(hyper, Clock{double(step), 1});
      const Rectification r(beta2, step);
      const bool on = r.length > 5;
      (on ? after : before) = true;
      const real size = hyper.lr / correction(hyper.rule[0], step);
      worst.see((rule.rectified != 0) == on ? 0 : INFINITY, step);
      worst.see(check::ulp_error(rule.step_size, on ? size * r.factor * std::sqrt(correction(beta2, step)) : size),
                step);
    }
    worst.see(before && after ? 0 : INFINITY, beta2);
    const double of_double = std::exp2(std::numeric_limits<T>::digits - 53) / (8 * (1 - beta2) * (1 - beta2));
    char name[40];
    std::snprintf(name, sizeof(name), "radam comes on, beta2 %g", beta2);
    check::report(name, check::type_name<T>, worst, 2 + of_double);
  }
}

template <class T>
void test_lion() {
  test_rule<T, optim::Lion>("lion", 2, [](Update& u, real g, const Hyper& h, double) {
    const real mixture = h.rule[0] * u.s[0] + (1 - real(h.rule[0])) * g;
    u.p -= h.lr * real((mixture > 0) - (mixture < 0));
    u.s[0] = h.rule[1] * u.s[0] + (1 - real(h.rule[1])) * g;
  });
  // The sign of 0 is 0, also where momentum and gradient cancel; infinity has a sign, and NaN stays NaN.
  const T lr = T(0.01), infinity = T(INFINITY), nan = T(NAN);
  const struct {
    T momentum, gradient, parameter;
  } cases[] = {{0, 0, 1},
               {-T(0), -T(0), 1},
               {1, -3, 1},
               {1, 1, 1 - lr},
               {-1, -1, 1 + lr},
               {0, infinity, 1 - lr},
               {0, -infinity, 1 + lr},
               {0, nan, nan},
               {nan, 0, nan},
               {infinity, -infinity, nan}};
  check::Worst worst;
  for (const auto& c : cases) {
    Hyper hyper = random_hyper<T>();
    hyper.rule[0] = 0.75;
    T p = 1, s[kMaxStates] = {c.momentum};
    optim::Lion<T>(hyper, Clock{1, 1})(p, c.gradient, s);
    worst.see(check::ulp_error(p, c.parameter), double(c.gradient));
  }
  check::report("lion at 0, infinity, NaN", check::type_name<T>, worst, 0);
}

template <class T>
void test() {
  test_sgd<T>();
  test_rmsprop<T>();
  test_adagrad_and_adadelta<T>();
  test_adam<T>();
  test_radam<T>();
  test_lion<T>();
}

int main() {
  test<float>();
  test<double>();
  return check::finish();
}
