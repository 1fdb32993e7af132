// The kernels of whole networks against the same in double, rounded where they round: weights, inputs, activations,
// gradients of pre-activations, and for tf32 the factors of products. A flipped rounding is passed on by the layers, so
// the bound is a few units of what is rounded to, at the size of the largest value.
#include <algorithm>

#include "mlp/mlp.h"
#include "mlp/mlp_math.h"
#include "testing.h"

namespace {

using namespace gdbp;
using namespace gdbp::mlp;

using Rows = std::vector<std::vector<double>>;

struct Setup {
  std::vector<int> widths;
  int64_t rows;
  Activation activation = Activation::relu;
  Objective objective = Objective::cross_entropy;
  Dtype parameters = Dtype::float32;
  Factors factors = Factors::bfloat16;
  Dtype input = Dtype::float32;
  bool mean = true, bias = true;
  int frozen = -1;  // a layer
  int most_blocks = kMaxBlocks;
  bool rounds_pre = false;  // whatever the activation
};

struct Model {
  Network network{};
  std::vector<Array> weights, biases;
  int64_t gradients = 0;

  Model(const Setup& s, std::mt19937& generator) {
    network.count = int(s.widths.size()) - 1;
    network.parameters = s.parameters;
    network.factors = s.factors;
    weights.reserve(network.count);
    biases.reserve(network.count);
    const auto place = [&](int64_t size) {
      const int64_t at = gradients;
      gradients += (size + 3) / 4 * 4;
      return at;
    };
    for (int l = 0; l < network.count; ++l) {
      const int in = s.widths[l], out = s.widths[l + 1];
      const double bound = 2 / std::sqrt(double(in));
      weights.emplace_back(s.parameters, int64_t(in) * out, 0, generator, -bound, bound);
      biases.emplace_back(s.parameters, out, 0, generator, -0.5, 0.5);
      const bool last = l + 1 == network.count, trained = l != s.frozen;
      network.layers[l] = {weights.back().data(),
                           s.bias ? biases.back().data() : nullptr,
                           in,
                           out,
                           last ? Activation::none : s.activation,
                           trained ? place(int64_t(in) * out) : -1,
                           trained && s.bias ? place(out) : -1};
    }
  }
};

double rounded(double x, Dtype to) {
  return dispatch(to, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return double(widen(narrow<T>(Compute<T>(x))));
  });
}

// As a factor of a product.
double factor(double x, const Setup& s) {
  const double kept = rounded(x, kept_in(s.factors));
  if (s.factors != Factors::tf32) return kept;
  const auto bits = bit_cast<uint32_t>(float(kept)) + 0x1000u;
  return double(bit_cast<float>(bits & 0xffffe000u));
}

// Of which results are some units off. A factor of float32 is two of tf32, and the product of the smaller ones is lost.
double unit_of(const Setup& s) {
  switch (s.factors) {
    case Factors::tf32: return 0x1p-10;
    case Factors::float32: return 0x1p-21;
    default: return epsilon(kept_in(s.factors));
  }
}

// What the kernel is to find, in double.
struct Expected {
  double loss = 0, count = 0;
  std::vector<double> gradients;
  Rows outputs, input_gradients;

  Expected(const Setup& s, const Model& m, const Array& input, const Array& target, const std::vector<int64_t>& labels,
           int64_t ignored)
      : gradients(m.gradients) {
    const int layers = m.network.count;
    const auto weight = [&](int l, int n, int k) { return factor(m.weights[l].get(int64_t(n) * s.widths[l] + k), s); };
    for (int64_t row = 0; row < s.rows; ++row) {
      Rows x(layers + 1), pre(layers);
      for (int k = 0; k < s.widths[0]; ++k)
        x[0].push_back(rounded(input.get(row * s.widths[0] + k), kept_in(s.factors)));
      for (int l = 0; l < layers; ++l) {
        const Activation activation = m.network.layers[l].activation;
        for (int n = 0; n < s.widths[l + 1]; ++n) {
          double z = s.bias ? m.biases[l].get(n) : 0;
          for (int k = 0; k < s.widths[l]; ++k) z += weight(l, n, k) * factor(x[l][k], s);
          if (s.rounds_pre || saves(activation) == Saved::pre) z = rounded(z, kept_in(s.factors));
          pre[l].push_back(z);
          x[l + 1].push_back(rounded(dispatch(activation, [&](auto op) { return op.forward(z); }), kept_in(s.factors)));
        }
      }
      const std::vector<double>& output = x[layers];
      outputs.push_back(output);
      const int classes = int(output.size());
      std::vector<double> dz(classes);
      if (s.objective == Objective::upstream) {
        for (int j = 0; j < classes; ++j) dz[j] = target.get(row * classes + j);
      } else if (s.objective == Objective::mse) {
        for (int j = 0; j < classes; ++j) {
          const double difference = output[j] - target.get(row * classes + j);
          loss += difference * difference;
          dz[j] = 2 * difference;
        }
        count += classes;
      } else if (labels[row] != ignored) {
        const double m = *std::max_element(output.begin(), output.end());
        double total = 0;
        for (double v : output) total += std::exp(v - m);
        for (int j = 0; j < classes; ++j) dz[j] = std::exp(output[j] - m) / total - (j == labels[row]);
        loss += std::log(total) - (output[labels[row]] - m);
        count += 1;
      }
      for (int l = layers - 1; l >= 0; --l) {
        for (double& v : dz) v = rounded(v, kept_in(s.factors));
        const Layer& layer = m.network.layers[l];
        std::vector<double> dx(s.widths[l]);
        for (int n = 0; n < s.widths[l + 1]; ++n) {
          if (layer.bias_at >= 0) gradients[layer.bias_at + n] += dz[n];
          for (int k = 0; k < s.widths[l]; ++k) {
            if (layer.weight_at >= 0)
              gradients[layer.weight_at + int64_t(n) * s.widths[l] + k] += factor(dz[n], s) * factor(x[l][k], s);
            dx[k] += weight(l, n, k) * factor(dz[n], s);
          }
        }
        if (l == 0) input_gradients.push_back(dx);
        if (l == 0) break;
        for (int k = 0; k < s.widths[l]; ++k)
          dx[k] = dispatch(m.network.layers[l - 1].activation, [&](auto op) {
            return op.backward(dx[k], decltype(op)::saves == Saved::pre ? pre[l - 1][k] : x[l][k]);
          });
        dz = dx;
      }
    }
  }
};

void expect_near(double got, double expected, double bound, const std::string& what) {
  if (std::abs(got - expected) <= bound) return;
  char text[160];
  std::snprintf(text, sizeof(text), "%s is %.9g, expected %.9g within %.3g", what.c_str(), got, expected, bound);
  fail(text);
}

std::string describe(const Setup& s) {
  std::string text;
  for (int width : s.widths) text += std::to_string(width) + "-";
  return text + " rows " + std::to_string(s.rows) + " " + kActivationNames[int(s.activation)] + " " +
         kFactorNames[int(s.factors)];
}

void check(const Setup& s) {
  context = describe(s);
  std::mt19937 generator(7);
  const Model m(s, generator);
  expect(fits(m.network, true, shared_bytes_cuda()), "the network does not fit");
  const Array input(s.input, s.rows * s.widths[0], 0, generator, -1, 1);
  const int classes = s.widths.back();
  const bool labelled = s.objective == Objective::cross_entropy, upstream = s.objective == Objective::upstream;
  const Dtype values = upstream ? kept_in(s.factors) : Dtype::float32;
  const Array target(values, labelled ? 0 : s.rows * classes, 0, generator, -1, 1);
  constexpr int64_t ignored = -100;
  std::vector<int64_t> labels(s.rows);
  for (int64_t row = 0; row < s.rows; ++row) labels[row] = row % 7 == 3 ? ignored : int64_t(generator() % classes);
  const Expected expected(s, m, input, target, labels, ignored);

  const int64_t blocks = std::min<int64_t>(blocks_for(m.network, s.rows, shared_bytes_cuda()), s.most_blocks);
  std::vector<float> partials(blocks * m.gradients, NAN);
  std::vector<Finding> findings(kMaxBlocks);
  unsigned finished = 0;
  float loss = NAN;
  Decision decision{};
  int64_t bad[2] = {5, 5};
  Array input_gradient(s.input, upstream ? s.rows * s.widths[0] : 0);
  const Train args{m.network,
                   s.rows,
                   s.input,
                   values,
                   input.data(),
                   labelled ? static_cast<const void*>(labels.data()) : target.data(),
                   s.objective,
                   ignored,
                   s.mean,
                   m.gradients,
                   partials.data(),
                   upstream ? nullptr : findings.data(),
                   upstream ? nullptr : &finished,
                   upstream ? nullptr : &loss,
                   upstream ? nullptr : &decision,
                   upstream ? nullptr : bad,
                   upstream ? input_gradient.data() : nullptr,
                   s.most_blocks};
  expect(train_cuda(args, nullptr) == 0, "the launch fails");
  const double unit = 4 * unit_of(s);
  if (upstream) {
    for (int64_t i = 0; i < s.rows * s.widths[0]; ++i)
      expect_near(input_gradient.get(i), expected.input_gradients[i / s.widths[0]][i % s.widths[0]],
                  4 * unit + 4 * epsilon(s.input), "input " + std::to_string(i));
  } else {
    expect(finished == 0 && bad[0] == -1 && decision.skip == 0, "what the last block leaves");
    expect_near(decision.coefficient, s.mean ? 1 / expected.count : 1, 1e-12, "coefficient");
    const double value = s.mean ? expected.loss / expected.count : expected.loss;
    expect_near(loss, value, unit * std::max(1.0, std::abs(value)), "loss");
  }
  for (int l = 0; l < m.network.count; ++l) {
    const Layer& layer = m.network.layers[l];
    for (const bool is_bias : {false, true}) {
      const int64_t at = is_bias ? layer.bias_at : layer.weight_at;
      if (at < 0) continue;
      const int64_t size = is_bias ? layer.outputs : int64_t(layer.outputs) * layer.inputs;
      double largest = 0;
      for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(expected.gradients[at + i]));
      for (int64_t i = 0; i < size; ++i) {
        float sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += partials[b * m.gradients + at + i];
        expect_near(sum, expected.gradients[at + i], unit * std::max(largest, 0.1),
                    (is_bias ? "bias " : "weight ") + std::to_string(l) + "[" + std::to_string(i) + "]");
      }
    }
  }
}

void cross_entropy() {
  check({.widths = {3, 5, 2}, .rows = 1});
  check({.widths = {3, 1}, .rows = 40});
  check({.widths = {33, 20, 17, 10}, .rows = 150, .factors = Factors::float16, .input = Dtype::float16});
  check({.widths = {7, 24, 3}, .rows = 300, .mean = false, .most_blocks = 1});
  check({.widths = {16, 16, 16, 16}, .rows = 129, .bias = false, .most_blocks = 2});
  for (Factors factors : {Factors::tf32, Factors::float32}) {
    check({.widths = {3, 5, 2}, .rows = 1, .factors = factors});
    check({.widths = {33, 20, 17, 10}, .rows = 150, .factors = factors});
    check({.widths = {16, 49, 3}, .rows = 70, .factors = factors, .input = Dtype::float16, .most_blocks = 1});
  }
}

void mean_square() {
  check({.widths = {5, 9, 1}, .rows = 77, .objective = Objective::mse});
  check({.widths = {5, 9, 4}, .rows = 30, .objective = Objective::mse, .factors = Factors::float16, .mean = false});
  check({.widths = {5, 9, 4}, .rows = 30, .objective = Objective::mse, .factors = Factors::float32});
}

// The gradient of the output comes from elsewhere, and that of the input goes on.
void upstream() {
  for (Factors factors : {Factors::bfloat16, Factors::float16, Factors::tf32, Factors::float32}) {
    check({.widths = {3, 5, 2}, .rows = 1, .objective = Objective::upstream, .factors = factors});
    check({.widths = {33, 20, 17, 10}, .rows = 150, .objective = Objective::upstream, .factors = factors});
  }
  check({.widths = {18, 7}, .rows = 300, .objective = Objective::upstream, .input = Dtype::bfloat16, .frozen = 0});
  check({.widths = {19, 40, 6},
         .rows = 290,
         .activation = Activation::gelu,
         .objective = Objective::upstream,
         .parameters = Dtype::float16,
         .factors = Factors::float16,
         .input = Dtype::float16,
         .bias = false,
         .most_blocks = 1});
}

void activations() {
  for (Activation activation : kActivations)
    for (Factors factors : {Factors::float16, Factors::float32})
      check({.widths = {6, 18, 4}, .rows = 20, .activation = activation, .factors = factors});
}

// Sums of some layers do not fit into shared memory, and tiles of the last one are half as high.
void wide() {
  check({.widths = {128, 128, 128, 128, 16},
         .rows = 66,
         .activation = Activation::silu,
         .parameters = Dtype::bfloat16,
         .most_blocks = 1});
  check({.widths = {128, 100, 128}, .rows = 66, .factors = Factors::float32, .most_blocks = 1});
}

void frozen() {
  for (int layer : {0, 1}) check({.widths = {5, 12, 3}, .rows = 20, .frozen = layer});
}

// One layer, trained on these labels; bias: that of the last class, if it is not 0.
struct Labelled {
  std::mt19937 generator{9};
  Model model;
  std::vector<float> partials;
  float loss = 0;
  Decision decision{};
  int64_t bad[2] = {};

  Labelled(const Setup& s, const std::vector<int64_t>& labels, double bias = 0) : model(s, generator) {
    if (bias != 0) model.biases[0].set(s.widths[1] - 1, bias);
    const Array input(s.input, s.rows * s.widths[0], 0, generator, -1, 1);
    partials.resize(2 * model.gradients);
    std::vector<Finding> findings(kMaxBlocks);
    unsigned finished = 0;
    const Train args{model.network,
                     s.rows,
                     Dtype::float32,
                     Dtype::float32,
                     input.data(),
                     labels.data(),
                     Objective::cross_entropy,
                     -100,
                     s.mean,
                     model.gradients,
                     partials.data(),
                     findings.data(),
                     &finished,
                     &loss,
                     &decision,
                     bad};
    expect(train_cuda(args, nullptr) == 0, "the launch fails");
  }
};

void bad_labels() {
  context = "bad_labels";
  std::vector<int64_t> labels(200, 1);
  labels[150] = -1;
  labels[140] = 3;
  const Labelled got({.widths = {4, 3}, .rows = 200}, labels);
  expect(got.bad[0] == 140 && got.bad[1] == 3 && got.decision.skip == 1 && got.loss != got.loss,
         "the label was not noticed");
}

// The mean over nothing is not a number, and its gradient is 0.
void all_ignored() {
  context = "all_ignored";
  for (const bool mean : {true, false}) {
    const Labelled got({.widths = {4, 3}, .rows = 20, .mean = mean}, std::vector<int64_t>(20, -100));
    expect(got.bad[0] == -1 && got.decision.skip == 0, "an ignored label is no bad one");
    expect(mean ? got.loss != got.loss : got.loss == 0, "the loss of nothing");
    for (const float gradient : got.partials)
      expect(float(got.decision.coefficient) * gradient == 0, "the gradient of nothing is not 0");
  }
}

// One logit that is no number leaves none of the row's gradients, wherever it is.
void nan_logits() {
  for (const int classes : {1, 2, 3, 4}) {
    context = "nan_logits, " + std::to_string(classes) + " classes";
    for (int64_t label = 0; label < classes; ++label) {
      const Labelled got({.widths = {4, classes}, .rows = 1}, {label}, NAN);
      expect(got.loss != got.loss, "the loss is a number");
      for (int j = 0; j < classes; ++j) {
        const float gradient = got.partials[got.model.network.layers[0].bias_at + j];
        expect(gradient != gradient, "gradient " + std::to_string(j) + " is a number");
      }
    }
  }
}

// The output, from arrays that begin so many elements behind a 16-byte boundary.
Array infer(const Setup& s, int64_t offset) {
  context = describe(s) + " from " + kDtypeNames[int(s.input)];
  std::mt19937 generator(3);
  const Model m(s, generator);
  expect(fits(m.network, false, shared_bytes_cuda()), "the network does not fit");
  const Array input(s.input, s.rows * s.widths[0], offset, generator, -1, 1);
  Array got(kept_in(s.factors), s.rows * s.widths.back(), offset);
  const Infer args{m.network, s.rows, s.input, input.data(), got.data(), s.most_blocks};
  expect(infer_cuda(args, nullptr) == 0, "the launch fails");
  if (offset > 0) return got;
  const Expected expected(s, m, input, Array(Dtype::float32, 0), std::vector<int64_t>(s.rows), -100);
  double largest = 1;
  for (const auto& row : expected.outputs)
    for (double y : row) largest = std::max(largest, std::abs(y));
  const double bound = 8 * largest * unit_of(s);
  for (int64_t i = 0; i < got.size(); ++i)
    expect_near(got.get(i), expected.outputs[i / s.widths.back()][i % s.widths.back()], bound,
                "output " + std::to_string(i));
  return got;
}
void check_inference(Setup s) {
  s.rounds_pre = true;
  const Array got = infer(s, 0), misaligned = infer(s, 1);
  for (int64_t i = 0; i < got.size(); ++i) expect(got.get(i) == misaligned.get(i), "the address changes the output");
}

constexpr Dtype kNarrow[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
constexpr Factors kFactors[] = {Factors::bfloat16, Factors::float16, Factors::tf32, Factors::float32};

void inference() {
  const int widths[] = {1, 2, 7, 8, 10, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128};
  const int64_t rows[] = {1, 15, 16, 31, 32, 33};
  constexpr int count = std::size(widths);
  for (int i = 0; i < 2 * count; ++i)
    check_inference({.widths = {widths[i % count], widths[i * 5 % count], widths[(i + i / count * 3) % count]},
                     .rows = rows[i % 6],
                     .activation = kActivations[i % 3],
                     .parameters = kNarrow[i % 3],
                     .factors = kFactors[(i + i / count) % 4],
                     .input = kNarrow[i / 4 % 3],
                     .bias = i % 5 != 0});
}

void inference_types() {
  for (Factors factors : kFactors) {
    for (Dtype input : kNarrow)
      for (int width : {10, 40})
        check_inference({.widths = {width, width}, .rows = 37, .factors = factors, .input = input});
    for (Activation activation : kActivations) {
      const int width = (int(activation) + int(factors)) % 2 == 0 ? 18 : 64;
      check_inference({.widths = {6, width, width, 4}, .rows = 20, .activation = activation, .factors = factors});
    }
  }
}

// Several tiles for each warp, and none; one layer and as many as there may be.
void inference_sizes() {
  for (Factors factors : kFactors) {
    check_inference({.widths = {3, 4}, .rows = 0, .factors = factors});
    for (int64_t rows : {300, 1100})
      check_inference({.widths = {3, 5, 4}, .rows = rows, .factors = factors, .most_blocks = 1});
    check_inference({.widths = {8, 65, 8}, .rows = 300, .factors = factors, .most_blocks = 1});
    Setup deep{.widths = std::vector<int>(kMaxLayers + 1, 24), .rows = 40, .factors = factors};
    check_inference(deep);
    context = "wide";
    std::mt19937 generator(3);
    deep.widths = std::vector<int>(kMaxLayers + 1, kMaxWidth);
    expect(!fits(Model(deep, generator).network, false, shared_bytes_cuda()), "a network fits that is too large");
  }
}

}  // namespace

int main(int argc, char** argv) {
  static const Case cases[] = {{"cross_entropy", cross_entropy},
                               {"mean_square", mean_square},
                               {"upstream", upstream},
                               {"activations", activations},
                               {"wide", wide},
                               {"frozen", frozen},
                               {"bad_labels", bad_labels},
                               {"all_ignored", all_ignored},
                               {"nan_logits", nan_logits},
                               {"inference", inference},
                               {"inference_types", inference_types},
                               {"inference_sizes", inference_sizes}};
  return run_cases(argc, argv, cases);
}
