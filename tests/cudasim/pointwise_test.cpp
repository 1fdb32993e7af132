// The CUDA kernels of the pointwise losses against the CPU's.
#include "pointwise/pointwise.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::pointwise;

constexpr double kParameter = 0.75;  // differences lie on both sides of it

template <class F>
void for_all(F f) {
  // A vector of each type more or less, a tile more or less.
  for (int64_t numel :
       {int64_t(0), int64_t(1), int64_t(3), int64_t(4), int64_t(9), kTile - 1, kTile, kTile + 1, 3 * kTile + 5}) {
    for (Kind kind : kKinds) {
      for (Dtype dtype : kDtypes) {
        for (Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
          // The long ones at one address each, in turns.
          for (int64_t offset : {0, 1}) {
            if (numel > 9 && (int(kind) + int(dtype) + int(reduction)) % 2 != offset) continue;
            context = std::string(kDtypeNames[int(dtype)]) + " " + kKindNames[int(kind)] + " " +
                      kReductionNames[int(reduction)] + " of " + std::to_string(numel) + " at offset " +
                      std::to_string(offset);
            f(Loss{kind, kParameter, reduction, dtype, numel, nullptr, nullptr}, offset);
          }
        }
      }
    }
  }
}

void forward() {
  std::mt19937 generator(1);
  for_all([&](Loss loss, int64_t offset) {
    const bool each = loss.reduction == Reduction::none;
    const Array input(loss.dtype, loss.numel, offset, generator, -2, 2);
    const Array target(loss.dtype, loss.numel, 0, generator, -2, 2);
    loss.input = input.data(), loss.target = target.data();
    std::vector<double> workspace(tiles(loss.numel, kTile));
    const int64_t size = each ? loss.numel : 1;
    Array output[2] = {Array(loss.dtype, size, offset), Array(loss.dtype, size, offset)};
    Array gradient[2] = {Array(loss.dtype, loss.numel, offset), Array(loss.dtype, loss.numel, offset)};
    const bool with_gradient = !each && loss.numel != 9;
    for (int device : {0, 1}) {
      const Forward args{loss, output[device].data(), each ? nullptr : workspace.data(),
                         with_gradient ? gradient[device].data() : nullptr};
      expect((device ? forward_cuda : forward_cpu)(args, nullptr) == 0, "the launch fails");
    }
    expect_close(gradient[1], gradient[0], 0, 0, "gradient");
    // Another order of the same sum; rounded to 16 bits, its last one may flip.
    const double sum_ulps = size_of(loss.dtype) == 2 ? 1 : 8 + std::sqrt(double(loss.numel));
    expect_close(output[1], output[0], each ? 0 : sum_ulps, 0, "output");
  });
}

void backward() {
  std::mt19937 generator(2);
  for_all([&](Loss loss, int64_t offset) {
    const int64_t grads = loss.reduction == Reduction::none ? loss.numel : 1;
    const Array grad_output(loss.dtype, grads, offset, generator, -2, 2);
    const Array input(loss.dtype, loss.numel, offset, generator, -2, 2);
    const Array target(loss.dtype, loss.numel, offset, generator, -2, 2);
    loss.input = input.data(), loss.target = target.data();
    const bool to_input = loss.numel != 9, to_target = loss.numel != 4;
    Array grad_input[2] = {Array(loss.dtype, loss.numel, offset), Array(loss.dtype, loss.numel, offset)};
    Array grad_target[2] = {grad_input[0], grad_input[1]};
    for (int device : {0, 1}) {
      const Backward args{loss, grad_output.data(), to_input ? grad_input[device].data() : nullptr,
                          to_target ? grad_target[device].data() : nullptr};
      expect((device ? backward_cuda : backward_cpu)(args, nullptr) == 0, "the launch fails");
    }
    // The mean's factor is a quotient on one side and a product with a reciprocal on the other.
    const double ulps = loss.reduction == Reduction::mean ? 2 : 0;
    expect_close(grad_input[1], grad_input[0], ulps, 0, "grad_input");
    expect_close(grad_target[1], grad_target[0], ulps, 0, "grad_target");
    if (grads == 1 && loss.reduction != Reduction::none) {
      // What is there stays where the upstream gradient is 1, and only there.
      Array ahead(loss.dtype, loss.numel, offset), one(loss.dtype, 1);
      for (int64_t i = 0; i < loss.numel; ++i) ahead.set(i, 0.25);
      one.set(0, 1);
      expect(backward_cuda({loss, one.data(), ahead.data(), nullptr, true}, nullptr) == 0, "the launch fails");
      for (int64_t i = 0; i < loss.numel; ++i) expect(ahead.get(i) == 0.25, "the gradient for 1 is written again");
      expect(backward_cuda({loss, grad_output.data(), ahead.data(), nullptr, true}, nullptr) == 0, "the launch fails");
      if (to_input) expect_close(ahead, grad_input[1], 0, 0, "grad_input from one");
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"forward", forward}, {"backward", backward}};
  return run_cases(argc, argv, cases);
}
