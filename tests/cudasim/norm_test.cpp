// The CUDA kernels of the normalisation family against the CPU's.
#include "norm/norm.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::norm;

// A vector of each type more or less, a tile of rows or of columns more or less, a group of channels more or less.
constexpr struct {
  int64_t batch, channels, length;
} kShapes[] = {{0, 5, 1},   {5, 0, 1},    {2, 1, 1},    {3, 8, 1},     {63, 4, 1},   {64, 16, 1},   {65, 7, 1},
               {5, 64, 1},  {131, 1, 1},  {7, 33, 1},   {3, 300, 1},   {1, 1, 2},    {2, 3, 4},     {1, 2, 255},
               {2, 1, 256}, {1, 2, 260},  {65, 2, 3},   {4, 3, 8},     {3, 0, 4},    {130, 1, 16},  {0, 3, 4},
               {2, 3, 0},   {300, 19, 1}, {513, 20, 1}, {1100, 70, 1}, {8200, 3, 1}, {4200, 29, 1}, {1, 1, 33000}};

// Sums within a thread's rows are float on the device, double on the host.
constexpr double kUlps = 16;

template <class F>
void for_all(F f) {
  for (Dtype dtype : kDtypes) {
    for (Activation activation : {Activation::none, Activation::relu, Activation::gelu, Activation::tanh}) {
      for (auto s : kShapes) {
        // Of many elements enough for each path to be taken.
        if (s.batch * s.length > 1000 && (activation != Activation::relu || dtype == Dtype::float16)) continue;
        for (int64_t offset : {0, 1}) {
          for (bool of_batch : {true, false}) {
            // Of columns, which take large blocks, half of the combinations, each pair of properties among them.
            if (s.length == 1 && (int(dtype) + int(activation) + offset + of_batch) % 2 != 0) continue;
            context = std::string(kDtypeNames[int(dtype)]) + " " + kActivationNames[int(activation)] + " (" +
                      std::to_string(s.batch) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.length) +
                      ") at offset " + std::to_string(offset) + (of_batch ? " of the batch" : " fixed");
            f(Shape{dtype, s.batch, s.channels, s.length}, activation, offset, of_batch);
          }
        }
      }
    }
  }
}

Dtype compute(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }
std::vector<double> workspace(const Shape& shape) {
  return std::vector<double>(workspace_bytes(shape) / sizeof(double), std::nan(""));
}

// Mean and variance of every channel, where they are given.
void fill(Array& stats, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    stats.set(c, 0.1 * double(c % 7) + 1e-9);
    stats.set(channels + c, 0.5 + 0.25 * double(c % 5));
  }
}

void forward() {
  std::mt19937 generator(1);
  for_all([&](const Shape& s, Activation activation, int64_t offset, bool of_batch) {
    const int64_t size = s.batch * s.channels * s.length;
    // Far from 0, but for doubles, whose mean cannot be kept with more digits than their own.
    const double far = s.dtype == Dtype::float64 ? 0 : 100;
    const Array input(s.dtype, size, offset, generator, far - 1, far + 3);
    const Array weight(compute(s.dtype), s.channels, 0, generator, 0.5, 2);
    const Array bias(compute(s.dtype), s.channels, 0, generator, -1, 1);
    const bool affine = s.channels % 2 == 1;
    Array output[2] = {Array(s.dtype, size, offset), Array(s.dtype, size, offset)};
    Array stats[2] = {Array(Dtype::float64, 2 * s.channels), Array(Dtype::float64, 2 * s.channels)};
    for (int device : {0, 1}) {
      fill(stats[device], s.channels);
      std::vector<double> memory = workspace(s);
      const Forward args{s,
                         activation,
                         1e-3,
                         of_batch,
                         input.data(),
                         affine ? weight.data() : nullptr,
                         affine ? bias.data() : nullptr,
                         static_cast<double*>(stats[device].data()),
                         output[device].data(),
                         memory.data()};
      expect((device ? forward_cuda : forward_cpu)(args, nullptr) == 0, "the launch fails");
    }
    const double ulps = s.dtype == Dtype::float64 ? kUlps : kUlps * 0x1p29;  // of a double: float's
    expect_close(stats[1], stats[0], of_batch ? ulps : 0, 1, "stats");
    expect_close(output[1], output[0], size_of(s.dtype) == 2 ? 1 : kUlps, 4, "output");
  });
}

void backward() {
  std::mt19937 generator(2);
  for_all([&](const Shape& s, Activation activation, int64_t offset, bool of_batch) {
    const int64_t size = s.batch * s.channels * s.length;
    const Array input(s.dtype, size, offset, generator, -2, 2), grad(s.dtype, size, offset, generator, -1, 1);
    const Array weight(compute(s.dtype), s.channels, 0, generator, 0.5, 2);
    const Array bias(compute(s.dtype), s.channels, 0, generator, -1, 1);
    const bool affine = s.channels % 2 == 1, sums = s.batch != 7;
    const bool elements = s.batch != 3 && s.batch != 8200;
    Array stats(Dtype::float64, 2 * s.channels);
    fill(stats, s.channels);
    Array grad_input[2] = {Array(s.dtype, size, offset), Array(s.dtype, size, offset)};
    Array grad_weight[2] = {Array(compute(s.dtype), s.channels), Array(compute(s.dtype), s.channels)};
    Array grad_bias[2] = {Array(compute(s.dtype), s.channels), Array(compute(s.dtype), s.channels)};
    for (int device : {0, 1}) {
      std::vector<double> memory = workspace(s);
      const Backward args{s,
                          activation,
                          1e-3,
                          of_batch,
                          grad.data(),
                          input.data(),
                          affine ? weight.data() : nullptr,
                          affine ? bias.data() : nullptr,
                          static_cast<const double*>(stats.data()),
                          elements ? grad_input[device].data() : nullptr,
                          sums ? grad_weight[device].data() : nullptr,
                          sums ? grad_bias[device].data() : nullptr,
                          memory.data()};
      expect((device ? backward_cuda : backward_cpu)(args, nullptr) == 0, "the launch fails");
    }
    // Sums of numbers of order 1 whose roundings add up like the root of their number.
    const double root = std::sqrt(double(s.batch * s.length) + 1);
    expect_close(grad_input[1], grad_input[0], size_of(s.dtype) == 2 ? 1 : kUlps, 4, "grad_input");
    expect_close(grad_weight[1], grad_weight[0], kUlps, root, "grad_weight");
    expect_close(grad_bias[1], grad_bias[0], kUlps, root, "grad_bias");
  });
}

void update() {
  std::mt19937 generator(3);
  for (Dtype dtype : kDtypes) {
    for (int64_t channels : {0, 1, 255, 257, 600}) {
      for (bool cumulative : {true, false}) {
        for (double elements : {0.0, 20.0}) {
          context = std::string(kDtypeNames[int(dtype)]) + " " + std::to_string(channels) + " channels";
          const Array mean(dtype, channels, 1, generator, -1, 1), variance(dtype, channels, 1, generator, 0, 2);
          const Array stats(Dtype::float64, 2 * channels, 0, generator, 0, 2);
          const Array offset(dtype, channels, 1, generator, -1, 1);
          Array means[2] = {mean, mean}, variances[2] = {variance, variance};
          int64_t batches[2] = {3, 3};
          for (int device : {0, 1}) {
            const Update args{dtype,
                              channels,
                              elements,
                              0.1,
                              cumulative,
                              static_cast<const double*>(stats.data()),
                              channels % 2 ? offset.data() : nullptr,
                              means[device].data(),
                              variances[device].data(),
                              cumulative || channels > 1 ? &batches[device] : nullptr};
            expect((device ? update_cuda : update_cpu)(args, nullptr) == 0, "the launch fails");
          }
          expect(batches[0] == batches[1], "the batches are counted otherwise");
          expect_close(means[1], means[0], 0, 0, "running_mean");
          expect_close(variances[1], variances[0], 0, 0, "running_var");
          if (elements == 0) expect_close(means[1], mean, 0, 0, "running_mean without elements");
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"forward", forward}, {"backward", backward}, {"update", update}};
  return run_cases(argc, argv, cases);
}
