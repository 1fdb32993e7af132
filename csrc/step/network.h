// The layers of a network in a row, the loss at their end, and the memory that they share: forward and backward in
// one call.
#pragma once
#include <memory>
#include <vector>

#include "step/layers.h"
#include "step/objective.h"

namespace gdbp::step {

class Network {
 public:
  Network(std::vector<std::unique_ptr<Layer>> layers, std::unique_ptr<Objective> objective);

  Updates updates;

  bool is_planned_for(Dtype dtype, int64_t rows, int64_t cols) const;
  // Lays the buffers of all passes out. output_dims: 2, or 1 where a last Flatten joins rows and columns.
  void plan(Dtype dtype, int64_t rows, int64_t cols, int output_dims);
  // Raises an error where a parameter is not what the plan is for.
  void check() const;

  const Output& output() const { return output_; }
  const Objective& objective() const { return *objective_; }
  const Arena& arena() const { return arena_; }

  // input: (rows, cols) as planned. Leaves the loss in *value; updates what can be updated at once. Nothing has been
  // changed where it raises an error.
  void run(const void* input, const Target& target, uint64_t seed, void* value);
  // What the step does to the layers besides: running statistics.
  void finish();

 private:
  Slabs slabs(size_t layer, const void* input) const;

  std::vector<std::unique_ptr<Layer>> layers_;
  std::unique_ptr<Objective> objective_;
  Arena arena_;
  Output output_{};
  int64_t rows_ = -1, cols_ = -1;
  size_t first_trained_ = 0;  // no gradient is formed below it
  std::vector<Arena::Id> outputs_, gradients_;
  uint64_t seed_ = 0;
};

}  // namespace gdbp::step
