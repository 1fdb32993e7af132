// The CUDA kernels of the bce family against the CPU's.
#include "bce/bce.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::bce;

constexpr Reduction kReductions[] = {Reduction::none, Reduction::mean, Reduction::sum};

struct Problem {
  Reduction reduction;
  Array input, target, weight, pos_weight;
  bool weighted, pos_weighted;

  Problem(Dtype dtype, Reduction reduction, int64_t numel, int64_t period, int64_t offset, int variant,
          std::mt19937& generator)
      : reduction(reduction),
        input(dtype, numel, offset, generator, -9, 9),
        target(dtype, numel, offset, generator, 0, 1),
        weight(dtype, variant % 3 == 0 ? 1 : period, 0, generator, 0.5, 2),
        pos_weight(dtype, variant % 3 == 1 ? numel : period, 0, generator, 0.5, 2),
        weighted(variant & 1),
        pos_weighted(variant & 2) {
    context = std::string(kDtypeNames[int(dtype)]) + " " + kReductionNames[int(reduction)] + " " +
              std::to_string(numel) + " at offset " + std::to_string(offset) + ", variant " + std::to_string(variant);
  }
  int64_t losses() const { return reduction == Reduction::none ? input.size() : 1; }
  Loss description() const {
    return {reduction,
            input.dtype(),
            input.size(),
            input.data(),
            target.data(),
            {weighted ? weight.data() : nullptr, weight.size()},
            {pos_weighted ? pos_weight.data() : nullptr, pos_weight.size()}};
  }
};

// Calls f(problem, generator) around the width of a vector, of a block, and of a tile.
template <class F>
void for_problems(const F& f) {
  std::mt19937 generator(11);
  for (int64_t numel : {1, 3, 5, 1023, 1025, 16385, 33000}) {
    for (Dtype dtype : kDtypes) {
      for (Reduction reduction : kReductions) {
        for (int variant = 0; variant < 4; ++variant) {
          if ((variant + int(dtype) + int(reduction)) % 2 != 0 && numel > 5) continue;
          f(Problem(dtype, reduction, numel, numel > 5 && numel % 5 == 0 ? 5 : 1, variant % 2, variant, generator),
            generator);
        }
      }
    }
  }
}

double ulps(Dtype dtype) { return size_of(dtype) == 2 ? 1 : 8; }

void forward() {
  for_problems([](const Problem& p, std::mt19937&) {
    Array cpu(p.input.dtype(), p.losses()), cuda(cpu), dx(p.input.dtype(), p.input.size()), cuda_dx(dx);
    std::vector<double> workspace(tiles(p.input.size(), kTile));
    const bool with_gradient = p.reduction != Reduction::none && p.input.size() != 3;
    expect(
        forward_cpu({p.description(), cpu.data(), workspace.data(), with_gradient ? dx.data() : nullptr}, nullptr) == 0,
        "the CPU fails");
    expect(forward_cuda({p.description(), cuda.data(), workspace.data(), with_gradient ? cuda_dx.data() : nullptr},
                        nullptr) == 0,
           "the launch fails");
    const double scale = p.reduction == Reduction::mean ? 1 / double(p.input.size()) : 1;
    expect_close(cuda_dx, dx, ulps(p.input.dtype()), scale, "gradient");
    const double terms = p.reduction == Reduction::none ? 0 : std::sqrt(double(p.input.size()));
    expect_close(cuda, cpu, ulps(p.input.dtype()) + (size_of(p.input.dtype()) == 2 ? 0 : terms), 0, "loss");
  });
}

void backward() {
  for_problems([](const Problem& p, std::mt19937& generator) {
    const Dtype dtype = p.input.dtype();
    const Array upstream(dtype, p.losses(), 0, generator, -2, 2);
    Array dx(dtype, p.input.size()), dt(dx), cuda_dx(dx), cuda_dt(dx);
    expect(backward_cpu({p.description(), upstream.data(), dx.data(), dt.data()}, nullptr) == 0, "the CPU fails");
    expect(backward_cuda({p.description(), upstream.data(), cuda_dx.data(), cuda_dt.data()}, nullptr) == 0,
           "the launch fails");
    const double scale = p.reduction == Reduction::mean ? 1 / double(p.input.size()) : 1;
    expect_close(cuda_dx, dx, ulps(dtype), scale, "grad_input");
    expect_close(cuda_dt, dt, ulps(dtype), scale, "grad_target");
    if (p.reduction == Reduction::none) return;
    // What is there stays where the upstream gradient is 1, and only there.
    Array ahead(dtype, p.input.size()), one(dtype, 1);
    for (int64_t i = 0; i < ahead.size(); ++i) ahead.set(i, 0.25);
    one.set(0, 1);
    expect(backward_cuda({p.description(), one.data(), ahead.data(), nullptr, true}, nullptr) == 0, "from one");
    for (int64_t i = 0; i < ahead.size(); ++i) expect(ahead.get(i) == 0.25, "the gradient for 1 is written again");
    expect(backward_cuda({p.description(), upstream.data(), ahead.data(), nullptr, true}, nullptr) == 0, "from one");
    expect_close(ahead, cuda_dx, 0, 0, "grad_input from one");
  });
}

void nothing() {
  const Loss none{Reduction::none, Dtype::float32, 0, nullptr, nullptr, {nullptr, 1}, {nullptr, 1}};
  Array output(Dtype::float32, 1);
  expect(forward_cuda({none, output.data(), nullptr}, nullptr) == 0, "none");
  Loss sum = none;
  sum.reduction = Reduction::sum;
  expect(forward_cuda({sum, output.data(), nullptr}, nullptr) == 0 && output.get(0) == 0, "the sum of nothing");
  expect(backward_cuda({sum, output.data(), nullptr, nullptr}, nullptr) == 0, "backward");
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"forward", forward}, {"backward", backward}, {"nothing", nothing}};
  return run_cases(argc, argv, cases);
}
