// What becomes of the gradients of a step: each is used by the update while it is in cache and then forgotten, or
// kept until the norm of all is known, or left in .grad.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "common/gemm.h"
#include "common/parallel.h"
#include "grad/grad.h"
#include "step/arena.h"
#include "step/plan.h"

namespace gdbp::step {

class Updates {
 public:
  // Each parameter of the network; -1 stands for none everywhere.
  int add(const at::Tensor& parameter);
  // Whether a parameter is updated in this step: it requires a gradient, and the optimizer has it.
  const std::vector<char>& trained() const { return trained_; }

  struct Options {
    bool keep;  // whether the gradients go to .grad
    bool wait;  // whether no update may start before the last gradient is there
    bool flat;  // whether all gradients lie in one piece, to be reduced over ranks before their norm is asked for
    bool operator==(const Options&) const = default;
  };
  // Finds the parameters among the optimizer's, and takes in what this step does to them.
  enum class Outcome {
    same,    // all that a plan of memory depends on is as it was
    replan,  // it is not
    stale,   // the optimizer needs another StepPlan; nothing was taken in
  };
  Outcome collect(StepPlan& plan, const std::vector<Group>& groups, const pybind11::dict& state,
                  const Options& options);

  // For a step that does not come to be: gradients that collect() made go again, as nothing was written to them.
  void retract();
  // The step has come to be.
  void settle() { made_.clear(); }

  // Requests the place of a parameter's gradient, which is formed at `time`; inner: the length of the sums in it, or
  // below 0 where it comes by take().
  void plan(int parameter, int64_t inner, Arena& arena, int time, int end);

  // ---- during the backward pass ----

  void begin(const Arena& arena);
  // Where the gradient goes; null where none is wanted, or where it comes by take().
  void* place(int parameter) const;
  // The gradient is in its place.
  void done(int parameter) { use(parameter, place(parameter)); }
  // The gradient is there, and stays there until the updates that wait are done.
  void take(int parameter, void* gradient);
  bool wait() const { return options_.wait; }
  // compute(begin, end, out) leaves the rows [begin, end) of the gradient in `out`.
  template <class Compute>
  void matrix(int parameter, const Compute& compute) {
    if (parameter < 0 || !trained_[parameter]) return;
    const Place& p = places_[parameter];
    const int64_t rows = parameters_[parameter].size(0);
    const int64_t row_bytes = parameters_[parameter].size(1) * parameters_[parameter].element_size();
    char* const base = static_cast<char*>(place(parameter));
    parallel_for(0, p.tiles, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t tile = lo; tile < hi; ++tile) {
        const int64_t begin = gemm_tile_start(rows, p.tiles, tile), end = gemm_tile_start(rows, p.tiles, tile + 1);
        char* const out = base + (p.scratch ? thread_number() * p.scratch : begin * row_bytes);
        compute(begin, end, out);
        if (p.by_tile) update(parameter, begin, end, out);
      }
    });
    if (!p.by_tile) done(parameter);
  }

  // ---- where the updates wait ----

  // The gradients in one piece; undefined where nobody asked for it.
  const at::Tensor& flat() const { return flat_; }
  // The norm of all gradients, and what it decides.
  grad::Norm norm(const grad::Limit& limit);
  void update_all(const grad::Norm& norm);

 private:
  struct Place {
    Arena::Id buffer = Arena::kNone;
    void* fixed = nullptr;  // outside the arena
    int64_t tiles = 1;
    int64_t scratch = 0;   // bytes for each thread, where there is no place as large as the gradient
    bool by_tile = false;  // whether each tile is updated as it comes
  };
  static int64_t thread_number();
  void use(int parameter, void* gradient);
  void update(int parameter, int64_t begin, int64_t end, const void* grad) const;
  void find(const StepPlan& plan);
  void lay_flat();
  void add_square(int parameter);

  std::vector<at::Tensor> parameters_;
  std::vector<char> trained_, divisible_;
  std::vector<size_t> made_;  // whose .grad is new in this step
  std::vector<Place> places_;
  std::vector<int> entries_;   // in the StepPlan; -1: the optimizer does not have it
  std::vector<char> in_plan_;  // by entry: whether it is trained
  StepPlan* plan_ = nullptr;
  uint64_t found_in_ = 0;
  Options options_{};
  at::Tensor flat_;
  int threads_ = 0;
  const Arena* arena_ = nullptr;
  double squares_ = 0;  // of the norms so far
};

}  // namespace gdbp::step
