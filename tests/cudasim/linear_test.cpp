// The CUDA kernels of the linear family against the CPU's.
#include "linear/linear.h"
#include "common/activations_cuda.cuh"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::linear;

// A vector of each type more or less, a block of columns more or less, a tile of rows more or less.
constexpr struct {
  int64_t rows, cols;
} kShapes[] = {{0, 5},  {5, 0}, {1, 1},  {1, 3},   {3, 8},    {63, 4},  {64, 16},
               {65, 7}, {2, 9}, {5, 64}, {131, 1}, {130, 10}, {7, 257}, {3, 1032}};

std::string describe(Dtype dtype, Activation activation, int64_t rows, int64_t cols, int64_t offset) {
  return std::string(kDtypeNames[int(dtype)]) + " " + kActivationNames[int(activation)] + " (" + std::to_string(rows) +
         ", " + std::to_string(cols) + ") at offset " + std::to_string(offset);
}

template <class F>
void for_all(F f) {
  for (Dtype dtype : kDtypes) {
    for (Activation activation : kActivations) {
      for (auto shape : kShapes) {
        for (int64_t offset : {0, 1}) {
          context = describe(dtype, activation, shape.rows, shape.cols, offset);
          f(dtype, activation, shape.rows, shape.cols, offset);
        }
      }
    }
  }
}

// Those with a form of their own for 16 bits may round to the other side of where two of them meet
// (activations_cuda.cuh); the others are equal.
double forward_ulps(Dtype dtype, Activation activation) {
  return size_of(dtype) == 2 && dispatch(activation, [](auto op) {
           return !std::is_same_v<cuda::ActivationIn<Float16, decltype(op)>, decltype(op)>;
         });
}
// The derivative of what the output was saved of is the same.
double backward_ulps(Dtype dtype, Activation activation) {
  return saves(activation) == Saved::pre ? forward_ulps(dtype, activation) : 0;
}

void forward() {
  std::mt19937 generator(1);
  for_all([&](Dtype dtype, Activation activation, int64_t rows, int64_t cols, int64_t offset) {
    const Array product(dtype, rows * cols, offset, generator, -6, 6);
    const Array bias(dtype, cols, offset, generator, -1, 1);
    const bool in_place = (rows + cols + offset) % 2 == 0, with_bias = rows % 3 != 0;
    Array pre[2] = {product, product}, output[2] = {Array(dtype, rows * cols), Array(dtype, rows * cols)};
    for (int device : {0, 1}) {
      void* const out = in_place ? pre[device].data() : output[device].data();
      const Forward args{dtype, activation, rows, cols, pre[device].data(), with_bias ? bias.data() : nullptr, out};
      expect((device ? forward_cuda : forward_cpu)(args, nullptr) == 0, "the launch fails");
    }
    expect_close(pre[1], pre[0], in_place ? forward_ulps(dtype, activation) : 0, 0, in_place ? "output" : "pre");
    if (!in_place) expect_close(output[1], output[0], forward_ulps(dtype, activation), 0, "output");
  });
}

void backward() {
  std::mt19937 generator(2);
  for_all([&](Dtype dtype, Activation activation, int64_t rows, int64_t cols, int64_t offset) {
    const Array grad_output(dtype, rows * cols, offset, generator, -1, 1);
    const Array saved(dtype, rows * cols, offset, generator, -1, 1);
    const bool sums_alone = activation == Activation::none && rows % 2 == 1, with_bias = sums_alone || rows != 7;
    // The sums in another memory than the outputs: doubles first, so that they are aligned.
    std::vector<double> workspace(workspace_bytes(dtype, rows, cols) / sizeof(double) + 1);
    Array grad_pre[2] = {Array(dtype, rows * cols, offset), Array(dtype, rows * cols, offset)};
    Array grad_bias[2] = {Array(dtype, cols, offset), Array(dtype, cols, offset)};
    for (int device : {0, 1}) {
      const Backward args{dtype,
                          activation,
                          rows,
                          cols,
                          grad_output.data(),
                          saves(activation) == Saved::nothing ? nullptr : saved.data(),
                          sums_alone ? nullptr : grad_pre[device].data(),
                          with_bias ? grad_bias[device].data() : nullptr,
                          with_bias ? workspace.data() : nullptr};
      expect((device ? backward_cuda : backward_cpu)(args, nullptr) == 0, "the launch fails");
    }
    // Where the two terms of a derivative cancel, digits count from them.
    const double ulps = backward_ulps(dtype, activation);
    expect_close(grad_pre[1], grad_pre[0], ulps, ulps * 0.01, "grad_pre");
    // Another order of the same sum of `rows` numbers of order 1: roundings add up like their root.
    const double root = std::sqrt(double(rows));
    expect_close(grad_bias[1], grad_bias[0], 2 + (size_of(dtype) == 2 ? 0 : root), root, "grad_bias");
  });
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"forward", forward}, {"backward", backward}};
  return run_cases(argc, argv, cases);
}
