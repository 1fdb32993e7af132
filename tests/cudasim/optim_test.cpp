// The multi-tensor step on CUDA against the CPU's: the same functors in the same order, so the same bits.
#include <memory>

#include "optim/optim.h"
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

struct Types {
  Dtype param, grad, state;
};
constexpr Types kTypes[] = {
    {Dtype::float64, Dtype::float64, Dtype::float64},   {Dtype::float64, Dtype::float32, Dtype::bfloat16},
    {Dtype::float32, Dtype::float32, Dtype::float32},   {Dtype::float32, Dtype::bfloat16, Dtype::float64},
    {Dtype::bfloat16, Dtype::bfloat16, Dtype::float32}, {Dtype::float16, Dtype::float32, Dtype::float16}};

// A parameter with its gradient and states, twice: for the CPU and for CUDA.
struct Parameter {
  Array grad;
  std::vector<Array> arrays[2];  // param, states
  double step;

  Parameter(Types types, int states, int64_t numel, int64_t offset, double step, std::mt19937& generator)
      : grad(types.grad, numel, offset, generator, -2, 2), step(step) {
    arrays[0].emplace_back(types.param, numel, offset, generator, -1, 1);
    // Positive, so that they may be second moments; large enough for a centered variance.
    for (int i = 0; i < states; ++i) arrays[0].emplace_back(types.state, numel, offset, generator, 0.5, 1);
    arrays[1] = arrays[0];
  }

  Slot slot(int device, Dtype state_dtype) {
    std::vector<Array>& a = arrays[device];
    Slot slot{a[0].data(), grad.data(), {}, grad.size(), step, a[0].dtype(), grad.dtype(), state_dtype};
    for (size_t i = 1; i < a.size(); ++i) slot.state[i - 1] = a[i].data();
    return slot;
  }
};

void compare(int rule, const Hyper& hyper, const std::vector<Types>& types,
             std::vector<Parameter>& parameters) {
  for (int device : {0, 1}) {
    std::vector<Slot> slots;
    for (size_t i = 0; i < parameters.size(); ++i)
      slots.push_back(parameters[i].slot(device, types[i].state));
    expect((device ? step_cuda : step_cpu)(rule, hyper, slots.data(), int64_t(slots.size()), nullptr) == 0,
           "the launch fails");
  }
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& [cpu, cuda] = parameters[i].arrays;
    for (size_t k = 0; k < cpu.size(); ++k) {
      const std::string what =
          "tensor " + std::to_string(i) + (k == 0 ? " param" : " state " + std::to_string(k - 1));
      expect_close(cuda[k], cpu[k], 0, 0, what.c_str());
    }
  }
}

// lr, weight_decay, decoupled, maximize, l1, l1_prox, clip_value, grad_scale, then the rule's own.
constexpr Hyper kHypers[] = {{0.01, 0, 0, 0, 0, 0, kInfinity, 1, {0.9, 0.95, 1e-8, 0, 0, 0, 0, 0}},
                             {0.1, 0.02, 1, 1, 0.3, 1, 0.5, 0.25, {0.4, 0.999, 1e-3, 0, 0, 0, 0, 0}},
                             {0.02, 0.1, 0, 0, 0.05, 0, 1, 2, {0.99, 1e-4, 0.9, 0, 0, 0, 0, 0}}};

// A vector more or less, a block's sweep more or less, a chunk of every type more or less, and nothing.
void rules() {
  constexpr int64_t sizes[] = {1, 3, 4, 0, 5, 1023, 1025, 2049, 4097, 8200};
  std::mt19937 generator(3);
  for (int rule = 0; rule < kRuleCount; ++rule) {
    for (size_t h = 0; h < std::size(kHypers); ++h) {
      context = std::string(kRules[rule]) + ", hyper-parameters " + std::to_string(h);
      std::vector<Types> types;
      std::vector<Parameter> parameters;
      for (size_t i = 0; i < std::size(sizes) * std::size(kTypes); ++i) {
        // Every size and every type, the long ones once a rule.
        const int64_t numel = sizes[i % std::size(sizes)];
        if (numel > 10 && i % 3 != h) continue;
        types.push_back(kTypes[i / std::size(sizes)]);
        parameters.emplace_back(types.back(), rule_states(rule), numel, int64_t(i % 2), double(1 + i % 4),
                                generator);
      }
      compare(rule, kHypers[h], types, parameters);
    }
  }
}

// More tensors than the arguments of one launch hold, of both compute types in turn.
void many() {
  std::mt19937 generator(4);
  for (const char* name : {"sgd", "adam_amsgrad"}) {
    const int rule = find_rule(name);
    context = name + std::string(", 1500 tensors");
    std::vector<Types> types;
    std::vector<Parameter> parameters;
    for (int i = 0; i < 1500; ++i) {
      types.push_back(kTypes[i % 3]);
      parameters.emplace_back(types.back(), rule_states(rule), i % 7, i % 2, 1 + i / 500, generator);
    }
    compare(rule, kHypers[1], types, parameters);
  }
}

void nothing() {
  for (int rule = 0; rule < kRuleCount; ++rule) {
    expect(step_cuda(rule, kHypers[0], nullptr, 0, nullptr) == 0, "a step without parameters");
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"rules", rules}, {"many", many}, {"nothing", nothing}};
  return run_cases(argc, argv, cases);
}
