#include "step/objective.h"

#include <pybind11/stl.h>

#include "bce/bce.h"
#include "common/binding.h"
#include "common/python.h"
#include "loss/loss.h"
#include "pointwise/pointwise.h"

namespace gdbp::step {
namespace {

namespace py = pybind11;

// What the backward launchers take from upstream.
const void* one(Dtype dtype) {
  static const float single = 1;
  static const double twice = 1;
  return dtype == Dtype::float64 ? static_cast<const void*>(&twice) : &single;
}

at::ScalarType torch_type(Dtype dtype) { return dtype == Dtype::float64 ? at::kDouble : at::kFloat; }

void check_like_output(const Output& output, const Target& target) {
  TORCH_CHECK_VALUE(target.sizes == output.sizes, "TrainStep: target has shape ", at::IntArrayRef(target.sizes),
                    " and the model's output ", at::IntArrayRef(output.sizes),
                    "; expected the same; reshape one of them");
  TORCH_CHECK_TYPE(target.type == torch_type(output.dtype), "TrainStep: target has dtype ", target.type,
                   " and the model's output ", torch_type(output.dtype),
                   "; expected the same; convert the target with .to()");
}

// mse_loss, l1_loss, huber_loss, smooth_l1_loss.
class Pointwise final : public Objective {
 public:
  Pointwise(pointwise::Kind kind, double parameter, Reduction reduction)
      : kind_(kind), parameter_(parameter), reduction_(reduction) {}

  void check(const Output& output, const Target& target) const override { check_like_output(output, target); }
  void plan(const Output& output, Arena& arena, int time) override {
    sums_ = arena.request(tiles(output.numel(), pointwise::kTile) * int64_t(sizeof(double)), time, time);
  }
  void run(const Output& shape, const void* output, const Target& target, const Arena& arena, void* value,
           void* grad) override {
    const pointwise::Loss loss{kind_, parameter_, reduction_, shape.dtype, shape.numel(), output, target.data};
    pointwise::forward_cpu({loss, value, arena.at(sums_)}, nullptr);
    if (grad) pointwise::backward_cpu({loss, one(shape.dtype), grad, nullptr}, nullptr);
  }

 private:
  const pointwise::Kind kind_;
  const double parameter_;
  const Reduction reduction_;
  Arena::Id sums_ = Arena::kNone;
};

class BinaryCrossEntropy final : public Objective {
 public:
  BinaryCrossEntropy(at::Tensor weight, at::Tensor pos_weight, Reduction reduction)
      : weight_(std::move(weight)), pos_weight_(std::move(pos_weight)), reduction_(reduction) {}

  void check(const Output& output, const Target& target) const override {
    check_like_output(output, target);
    check_factors(weight_, "weight", output);
    check_factors(pos_weight_, "pos_weight", output);
  }
  void plan(const Output& output, Arena& arena, int time) override {
    sums_ = arena.request(tiles(output.numel(), bce::kTile) * int64_t(sizeof(double)), time, time);
  }
  void run(const Output& shape, const void* output, const Target& target, const Arena& arena, void* value,
           void* grad) override {
    const bce::Loss loss{reduction_,  shape.dtype,      shape.numel(),       output,
                         target.data, factors(weight_), factors(pos_weight_)};
    bce::forward_cpu({loss, value, arena.at(sums_)}, nullptr);
    if (grad) bce::backward_cpu({loss, one(shape.dtype), grad, nullptr}, nullptr);
  }

 private:
  static bce::Factors factors(const at::Tensor& t) {
    return t.defined() ? bce::Factors{t.const_data_ptr(), t.numel()} : bce::Factors{nullptr, 1};
  }
  // Those of the last dimensions, which repeat.
  static void check_factors(const at::Tensor& t, const char* name, const Output& output) {
    if (!t.defined()) return;
    at::IntArrayRef sizes = t.sizes();
    while (!sizes.empty() && sizes.front() == 1) sizes = sizes.slice(1);
    const at::IntArrayRef all = output.sizes;
    const bool repeats = sizes.size() <= all.size() && sizes == all.slice(all.size() - sizes.size());
    TORCH_CHECK_VALUE(repeats && t.is_contiguous() && t.scalar_type() == torch_type(output.dtype), "TrainStep: ", name,
                      " of the loss has shape ", t.sizes(), " and dtype ", t.scalar_type(), "; expected the last ",
                      "dimensions of the output's shape ", all, ", contiguous, of its dtype");
  }

  const at::Tensor weight_, pos_weight_;
  const Reduction reduction_;
  Arena::Id sums_ = Arena::kNone;
};

struct CrossEntropyOptions {
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing, z_loss, softcap;
  bool empty_is_zero;
};

// Rows with fewer classes than a vector has lanes are computed side by side instead, a lane each: classes first.
constexpr int64_t kFewClasses = 16, kManyRows = 8;

template <class T>
void transpose(const T* from, int64_t rows, int64_t cols, T* to) {
  for (int64_t col = 0; col < cols; ++col)
    for (int64_t row = 0; row < rows; ++row) to[col * rows + row] = from[row * cols + col];
}
void transpose(Dtype dtype, const void* from, int64_t rows, int64_t cols, void* to) {
  if (dtype == Dtype::float64) return transpose(static_cast<const double*>(from), rows, cols, static_cast<double*>(to));
  transpose(static_cast<const float*>(from), rows, cols, static_cast<float*>(to));
}

class CrossEntropy final : public Objective {
 public:
  CrossEntropy(at::Tensor weight, CrossEntropyOptions options) : weight_(std::move(weight)), options_(options) {}

  void check(const Output& output, const Target& target) const override {
    TORCH_CHECK_VALUE(output.sizes.size() == 2, "TrainStep: the model's output has shape ",
                      at::IntArrayRef(output.sizes), "; cross-entropy expects (rows, classes) here");
    if (at::isFloatingType(target.type)) {
      TORCH_CHECK_VALUE(options_.ignore_index < 0, "TrainStep: target holds probabilities and ignore_index is ",
                        options_.ignore_index, "; expected labels; set ignore_index to a negative number");
      TORCH_CHECK_VALUE(target.sizes != at::DimVector({output.rows}), "TrainStep: target has shape ",
                        at::IntArrayRef(target.sizes), " and dtype ", target.type,
                        "; expected int64 labels, or probabilities of shape ", at::IntArrayRef(output.sizes),
                        "; convert labels with .long()");
      check_like_output(output, target);
    } else {
      TORCH_CHECK_TYPE(target.type == at::kLong, "TrainStep: target has dtype ", target.type,
                       "; expected int64 labels, or probabilities; convert it with .long()");
      TORCH_CHECK_VALUE(
          target.sizes == at::DimVector({output.rows}), "TrainStep: target has shape ", at::IntArrayRef(target.sizes),
          "; expected (", output.rows,
          ",), a label for each row; reshape it, or convert one-hot labels with .to() to the input's dtype");
    }
    if (weight_.defined())
      TORCH_CHECK_VALUE(weight_.is_contiguous() && weight_.numel() == output.cols &&
                            weight_.scalar_type() == torch_type(output.dtype),
                        "TrainStep: weight of the loss has shape ", weight_.sizes(), " and dtype ",
                        weight_.scalar_type(), "; expected (", output.cols, ",), contiguous, of the output's dtype");
  }
  void check_labels(const int64_t* labels, const int64_t* index, int64_t count, int64_t classes) const override {
    const auto is_bad = [&](int64_t label) {
      return int64_t(uint64_t(label) >= uint64_t(classes)) & int64_t(label != options_.ignore_index);
    };
    // Which one it was is asked only where there is one.
    int64_t bad = 0;
    for (int64_t i = 0; i < count; ++i) bad |= is_bad(labels[index ? index[i] : i]);
    for (int64_t i = 0; bad && i < count; ++i) {
      const int64_t row = index ? index[i] : i;
      check_label(!is_bad(labels[row]), labels[row], row, classes);
    }
  }
  void plan(const Output& output, Arena& arena, int time) override {
    const int64_t stats = std::max(loss::stats_per_row(false), loss::stats_per_row(true));
    stats_ = arena.request(output.rows * stats * size_of(output.dtype), time, time);
    rows_ = arena.request(2 * output.rows * int64_t(sizeof(double)), time, time);
    const bool suits = output.cols < kFewClasses && output.rows >= kManyRows;
    classes_first_ = suits ? arena.request(output.numel() * size_of(output.dtype), time, time) : Arena::kNone;
  }
  void run(const Output& shape, const void* output, const Target& target, const Arena& arena, void* value,
           void* grad) override {
    const bool labels = target.type == at::kLong;
    void* const turned = labels ? arena.at(classes_first_) : nullptr;
    if (turned) transpose(shape.dtype, output, shape.rows, shape.cols, turned);
    const loss::CrossEntropy loss{shape.dtype,
                                  options_.reduction,
                                  turned ? 1 : shape.rows,
                                  shape.cols,
                                  turned ? shape.rows : 1,
                                  turned ? turned : output,
                                  labels ? static_cast<const int64_t*>(target.data) : nullptr,
                                  nullptr,
                                  nullptr,
                                  labels ? nullptr : target.data,
                                  weight_.defined() ? weight_.const_data_ptr() : nullptr,
                                  options_.ignore_index,
                                  options_.label_smoothing,
                                  options_.z_loss,
                                  options_.softcap};
    double divisor = 0;
    int64_t bad[2] = {-1, 0};
    loss::cross_entropy_forward_cpu({loss, arena.at(stats_), value, &divisor, nullptr, options_.empty_is_zero, bad,
                                     static_cast<double*>(arena.at(rows_))},
                                    nullptr);
    check_label(bad[0] < 0, bad[1], bad[0], shape.cols);
    if (!grad) return;
    loss::cross_entropy_backward_cpu(
        {loss, arena.at(stats_), &divisor, one(shape.dtype), turned ? turned : grad, nullptr}, nullptr);
    if (turned) transpose(shape.dtype, turned, shape.cols, shape.rows, grad);
  }

 private:
  void check_label(bool fits, int64_t label, int64_t row, int64_t classes) const {
    TORCH_CHECK_INDEX(fits, "Target ", label, " is out of bounds: cross_entropy got it for row ", row,
                      "; expected a class from 0 to ", classes - 1, ", or ignore_index = ", options_.ignore_index);
  }

  const at::Tensor weight_;
  const CrossEntropyOptions options_;
  Arena::Id stats_ = Arena::kNone, rows_ = Arena::kNone, classes_first_ = Arena::kNone;
};

pointwise::Kind parse_kind(const std::string& name) {
  for (pointwise::Kind kind : pointwise::kKinds)
    if (name == pointwise::kKindNames[int(kind)]) return kind;
  TORCH_CHECK_VALUE(false, "TrainStep: loss is '", name, "'; expected a name that gdbp/step/_loss.py gives");
}

}  // namespace

std::unique_ptr<Objective> make_objective(const py::tuple& d) {
  const auto name = d[0].cast<std::string>();
  const Reduction reduction = parse_reduction(d[1].cast<std::string>());
  if (name == "cross_entropy")
    return std::make_unique<CrossEntropy>(
        unwrap(d[2]), CrossEntropyOptions{d[3].cast<int64_t>(), reduction, d[4].cast<double>(), d[5].cast<double>(),
                                          d[6].cast<double>(), d[7].cast<bool>()});
  if (name == "bce_with_logits") return std::make_unique<BinaryCrossEntropy>(unwrap(d[2]), unwrap(d[3]), reduction);
  return std::make_unique<Pointwise>(parse_kind(name), d[2].cast<double>(), reduction);
}

}  // namespace gdbp::step
