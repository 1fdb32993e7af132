// The multi-tensor step on CUDA against the CPU's: the same functors in the same order, so the same bits.
#include "optim/optim.h"
#include "optim/blockwise8.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::optim;

constexpr const char* kRules[] = {
#define ROW(name, Rule) name,
    GDBP_OPTIM_RULES(ROW)
#undef ROW
};
constexpr int kRuleCount = int(std::size(kRules));
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Types {
  Dtype param, grad, state;
};
constexpr Types kTypes[] = {
    {Dtype::float64, Dtype::float64, Dtype::float64},   {Dtype::float64, Dtype::float32, Dtype::bfloat16},
    {Dtype::float32, Dtype::float32, Dtype::float32},   {Dtype::float32, Dtype::bfloat16, Dtype::float64},
    {Dtype::bfloat16, Dtype::bfloat16, Dtype::float32}, {Dtype::float16, Dtype::float32, Dtype::float16}};

// lr, weight_decay, decoupled, maximize, l1, l1_prox, clip_value, grad_scale, then the rule's own.
constexpr Hyper kHypers[] = {{0.01, 0, 0, 0, 0, 0, kInfinity, 1, {0.9, 0.95, 1e-8, 0.004, 0, 0, 0, 0}},
                             {0.1, 0.02, 1, 1, 0.3, 1, 0.5, 0.25, {0.4, 0.999, 1e-3, 0.1, 0, 0, 0, 0}},
                             {0.02, 0.1, 0, 0, 0.05, 0, 1, 2, {0.99, 1e-4, 0.9, 0.5, 0, 0, 0, 0}}};

Clock clock_at(int rule, const Hyper& hyper, double step) {
  Clock clock = {step, 1};
  for (double i = 1; i <= step; ++i) clock.product *= scheduled_momentum(rule, hyper, i);
  return clock;
}

// A parameter with its gradient and states, twice: for the CPU and for CUDA, or for two calls of one.
struct Parameter {
  Array grad;
  std::vector<Array> arrays[2];  // param, states
  Types types;
  const Hyper* hyper;
  Clock clock;
  uint64_t seed = 0;
  bool besides = false;  // whether a copy and a moving average are written, the last two arrays

  Parameter(int rule, Types types, int64_t numel, int64_t offset, const Hyper& hyper, double step,
            std::mt19937& generator)
      : grad(types.grad, numel, offset, generator, -2, 2),
        types(types),
        hyper(&hyper),
        clock(clock_at(rule, hyper, step)) {
    arrays[0].emplace_back(types.param, numel, offset, generator, -1, 1);
    // Positive, so that they may be second moments; large enough for a centered variance.
    for (int i = 0; i < rule_states(rule); ++i) arrays[0].emplace_back(types.state, numel, offset, generator, 0.5, 1);
    arrays[1] = arrays[0];
  }

  void write_besides(Dtype copy, Dtype average, uint64_t seed_, std::mt19937& generator) {
    besides = true;
    seed = seed_;
    // Off the boundary by another number of elements than the parameter.
    arrays[0].emplace_back(copy, grad.size(), 3);
    arrays[0].emplace_back(average, grad.size(), 2, generator, -1, 1);
    arrays[1] = arrays[0];
  }

  Slot slot(int copy) {
    std::vector<Array>& a = arrays[copy];
    Slot slot{a[0].data(), grad.data(), {}, grad.size(), clock, hyper, types.param, types.grad, types.state};
    const size_t states = a.size() - 1 - 2 * besides;
    for (size_t i = 0; i < states; ++i) slot.state[i] = a[i + 1].data();
    slot.seed = seed;
    if (!besides) return slot;
    slot.copy = a[states + 1].data();
    slot.copy_dtype = a[states + 1].dtype();
    slot.average = a[states + 2].data();
    slot.average_dtype = a[states + 2].dtype();
    slot.average_weight = 0.125 + 0.5 * double(states % 2);
    return slot;
  }
};
using Parameters = std::vector<Parameter>;
using Launcher = int (*)(int, const Slot*, int64_t, const Control*, void*);

void step(Launcher launcher, int rule, Parameters& parameters, int copy, const Control* control) {
  std::vector<Slot> slots;
  for (Parameter& parameter : parameters) slots.push_back(parameter.slot(copy));
  expect(launcher(rule, slots.data(), int64_t(slots.size()), control, nullptr) == 0, "the launch fails");
}

void expect_same(const Parameters& parameters) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& [wanted, got] = parameters[i].arrays;
    for (size_t k = 0; k < wanted.size(); ++k) {
      const std::string what = "tensor " + std::to_string(i) + (k == 0 ? " param" : " state " + std::to_string(k - 1));
      expect_close(got[k], wanted[k], 0, 0, what.c_str());
    }
  }
}

void compare(int rule, Parameters& parameters, const Control* control) {
  step(step_cpu, rule, parameters, 0, control);
  step(step_cuda, rule, parameters, 1, control);
  expect_same(parameters);
}

// A vector more or less, a block's sweep more or less, a chunk of every type more or less, and nothing; all
// groups of hyper-parameters and several clocks in one call.
void rules() {
  constexpr int64_t sizes[] = {1, 3, 4, 0, 5, 1023, 1025, 2049, 4097, 8200};
  const Control quarter = {0.25, 0}, third = {1 / 3.0, 0};
  const Control* const controls[] = {nullptr, &quarter, &third};
  std::mt19937 generator(3);
  for (int rule = 0; rule < kRuleCount; ++rule) {
    for (size_t c = 0; c < std::size(controls); ++c) {
      context = std::string(kRules[rule]) + ", control " + std::to_string(c);
      Parameters parameters;
      for (size_t i = 0; i < std::size(sizes) * std::size(kTypes); ++i) {
        // Every size and every type, the long ones once a rule; the steps are before and after the one at
        // which RAdam's rectification comes on.
        const int64_t numel = sizes[i % std::size(sizes)];
        if (numel > 10 && i % 3 != c) continue;
        parameters.emplace_back(rule, kTypes[i / std::size(sizes)], numel, int64_t(i % 2), kHypers[(i / 2 + c) % 3],
                                double(1 + i % 8), generator);
      }
      compare(rule, parameters, controls[c]);
    }
  }
}

// What is written besides the parameter and its states, and bfloat16 rounded at random: every element has bits
// of its own, whoever computes it.
void besides() {
  constexpr Dtype halves[] = {Dtype::bfloat16, Dtype::float16};
  std::mt19937 generator(6);
  for (const char* name : {"sgd", "sgd_momentum", "adam"}) {
    const int rule = find_rule(name);
    context = name + std::string(" with a copy, an average and a seed");
    Parameters parameters;
    for (const Types& types : kTypes) {
      for (const int64_t numel : {0, 1, 5, 1025, 8200}) {
        parameters.emplace_back(rule, types, numel, numel % 2, kHypers[0], 2, generator);
        parameters.back().write_besides(halves[numel % 2], numel % 5 ? Dtype::float32 : types.param, 77 + numel,
                                        generator);
      }
    }
    compare(rule, parameters, nullptr);
    context = name + std::string(", rounded at random");
    Parameters twins;
    for (const uint64_t seed : {0, 1, 2}) {
      std::mt19937 again(7);
      twins.emplace_back(rule, kTypes[4], 4097, 0, kHypers[0], 2, again);
      twins.back().seed = seed;
    }
    step(step_cuda, rule, twins, 1, nullptr);
    // Differently for every seed, and by one unit at most.
    for (const size_t i : {1, 2}) {
      const Array &got = twins[i].arrays[1][0], &other = twins[i - 1].arrays[1][0];
      int different = 0;
      for (int64_t k = 0; k < got.size(); ++k) different += got.get(k) != other.get(k);
      expect(different > 500, std::to_string(different) + " elements differ with the seed");
      expect_close(got, other, 1, 0, "param");
    }
  }
}

// States of 8 bits, with a block that is all zeros and one that is not finite: codes and scales of three steps, rounded
// to nearest and at random.
void quantised() {
  std::mt19937 generator(8);
  for (const char* name : {"sgd_momentum", "adam", "rmsprop_centered_momentum"}) {
    const int rule = find_rule(name), states = rule_states(rule);
    for (const Types& types : kTypes) {
      for (const int64_t numel : {1, 127, 128, 129, 1025, 8200, 8201}) {
        const uint64_t seed = numel % 4 == 1 ? 77 : 0;
        context = name + std::string(" of 8 bits, ") + std::to_string(numel) + (seed ? ", at random" : "");
        const size_t blocks = size_t((numel + kQuantBlock - 1) / kQuantBlock);
        Array grad(types.grad, numel, 1, generator, -1, 1);
        for (int64_t i = 2 * kQuantBlock; i < std::min(numel, 3 * kQuantBlock); ++i) grad.set(i, 0);
        if (numel > 4 * kQuantBlock) grad.set(4 * kQuantBlock, kNan);
        std::vector<Array> params(2, Array(types.param, numel, 1, generator, -1, 1));
        std::vector<int8_t> codes[2];
        std::vector<float> scales[2];
        for (const int side : {0, 1}) {
          codes[side].resize(states * numel);
          scales[side].resize(states * blocks);
        }
        for (double step = 1; step <= 3; ++step) {
          for (const int side : {0, 1}) {
            const Clock clock = clock_at(rule, kHypers[0], step);
            Slot slot{params[side].data(), grad.data(),      {}, numel, clock, kHypers, types.param,
                      types.grad,          Dtype::blockwise8};
            for (int i = 0; i < states; ++i) {
              slot.state[i] = codes[side].data() + i * numel;
              slot.scale[i] = scales[side].data() + i * blocks;
            }
            slot.seed = seed;
            expect((side ? step_cuda : step_cpu)(rule, &slot, 1, nullptr, nullptr) == 0, "the launch fails");
          }
          expect_close(params[1], params[0], 0, 0, "param");
          // Between two codes the guesses at a root tell, which are not made alike.
          size_t others = 0;
          for (size_t i = 0; i < codes[0].size(); ++i) {
            expect(std::abs(codes[0][i] - codes[1][i]) <= (seed ? 0 : 1), "code " + std::to_string(i) + " differs");
            others += codes[0][i] != codes[1][i];
          }
          expect(others <= 1 + codes[0].size() / 500, std::to_string(others) + " codes differ");
          codes[1] = codes[0];
        }
        for (size_t i = 0; i < scales[0].size(); ++i) {
          const float a = scales[0][i], b = scales[1][i];
          expect(a == b || (a != a && b != b), "scale " + std::to_string(i) + " differs");
          expect((a != a) == (numel > 4 * kQuantBlock && i % blocks == 4),
                 "scale " + std::to_string(i) + " and what is not finite");
        }
      }
    }
  }
}

// Tensors of all types, a few elements each.
Parameters few(int rule, const Hyper& hyper, std::mt19937& generator) {
  Parameters parameters;
  for (size_t i = 0; i < std::size(kTypes); ++i)
    parameters.emplace_back(rule, kTypes[i], 5, int64_t(i % 2), hyper, double(1 + i % 3), generator);
  return parameters;
}

// A coefficient is a factor of every gradient, in front of the clip; `skip` changes nothing at all, on either
// device, whatever the coefficient.
void control() {
  std::mt19937 generator(5);
  const Control quarter = {0.25, 0}, skip = {kNan, 1};
  for (int rule = 0; rule < kRuleCount; ++rule) {
    for (const Hyper& hyper : kHypers) {
      Hyper scaled = hyper;
      scaled.grad_scale *= quarter.coefficient;
      for (const Launcher launcher : {step_cpu, step_cuda}) {
        context = std::string(kRules[rule]) + (launcher == step_cpu ? " on the CPU" : " on CUDA");
        Parameters parameters = few(rule, hyper, generator);
        step(launcher, rule, parameters, 1, &skip);
        expect_same(parameters);
        step(launcher, rule, parameters, 1, &quarter);
        for (Parameter& parameter : parameters) parameter.hyper = &scaled;
        step(launcher, rule, parameters, 0, nullptr);
        expect_same(parameters);
      }
    }
  }
}

// NAdam's momentum follows its schedule; nobody else has one.
void schedules() {
  const Hyper& hyper = kHypers[1];
  for (int rule = 0; rule < kRuleCount; ++rule) {
    context = kRules[rule];
    for (int step = 1; step <= 30; ++step) {
      const double got = scheduled_momentum(rule, hyper, step);
      const long double power = std::pow(0.96L, step * (long double)hyper.rule[3]);
      const double wanted = context == "nadam" ? double(hyper.rule[0] * (1 - 0.5L * power)) : 1;
      // The power, the difference and the product round, and so does 0.96.
      expect(std::abs(got - wanted) <= 4 * 0x1p-53 * wanted, "the momentum of step " + std::to_string(step));
    }
  }
}

// More tensors than the arguments of one launch hold, of both compute types; for NAdam also more groups and
// clocks in turn than they hold.
void many() {
  std::mt19937 generator(4);
  for (const char* name : {"sgd", "adam_amsgrad", "nadam"}) {
    const int rule = find_rule(name);
    const bool alternates = name == std::string("nadam");
    context = name + std::string(", 1500 tensors");
    Parameters parameters;
    for (int i = 0; i < 1500; ++i) {
      parameters.emplace_back(rule, kTypes[i % 3], i % 7, i % 2, kHypers[alternates ? i / 4 % 3 : i / 800], 1 + i / 500,
                              generator);
      // At the same step, but after another schedule.
      parameters.back().clock.product *= alternates && i % 2 ? 0.9 : 1;
    }
    compare(rule, parameters, nullptr);
  }
}

// Gradients that come in parts, of numbers whose sums are exact: the same as of the sums.
void parts() {
  constexpr int64_t sizes[] = {1, 127, 128, 0, 130, 1000}, gap = 4;
  const Control third = {1 / 3.0, 0}, skips = {1, 1};
  std::mt19937 generator(8);
  for (int rule = 0; rule < kRuleCount; ++rule) {
    for (const int count : {1, 8, 13}) {
      context = std::string(kRules[rule]) + ", " + std::to_string(count) + " parts";
      Parameters parameters;
      for (size_t i = 0; i < std::size(sizes); ++i)
        parameters.emplace_back(rule, Types{i % 2 ? Dtype::bfloat16 : Dtype::float32, Dtype::float32, Dtype::float32},
                                sizes[i], 0, kHypers[count % 3], 2, generator);
      int64_t stride = 0;
      for (const int64_t size : sizes) stride += (size + gap - 1) / gap * gap;
      std::vector<float> all(stride * count, NAN);
      std::vector<Slot> slots;
      int64_t at = 0;
      for (Parameter& parameter : parameters) {
        for (int64_t k = 0; k < parameter.grad.size(); ++k) {
          double sum = 0;
          for (int part = 0; part < count; ++part) {
            const float value = (float(generator() % 512) - 256) / 256;
            all[part * stride + at + k] = value;
            sum += value;
          }
          parameter.grad.set(k, sum);
        }
        slots.push_back(parameter.slot(1));
        slots.back().grad = all.data() + at;
        slots.back().parts = count;
        slots.back().part_stride = stride;
        at += (parameter.grad.size() + gap - 1) / gap * gap;
      }
      expect(step_cuda(rule, slots.data(), int64_t(slots.size()), &skips, nullptr) == 0, "the launch fails");
      expect_same(parameters);
      expect(step_cuda(rule, slots.data(), int64_t(slots.size()), &third, nullptr) == 0, "the launch fails");
      step(step_cpu, rule, parameters, 0, &third);
      expect_same(parameters);
    }
  }
}

void nothing() {
  for (int rule = 0; rule < kRuleCount; ++rule) {
    expect(step_cuda(rule, nullptr, 0, nullptr, nullptr) == 0, "a step without parameters");
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"rules", rules},         {"control", control},     {"besides", besides},
                               {"quantised", quantised}, {"schedules", schedules}, {"many", many},
                               {"parts", parts},         {"nothing", nothing}};
  return run_cases(argc, argv, cases);
}
