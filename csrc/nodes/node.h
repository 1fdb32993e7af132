// The backward pass of an operator as torch's engine calls it, in C++: what gdbp/ops has in Python for every use, for
// the usual one alone, where a call of a Python function takes longer than a small layer.
#pragma once
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/python.h"

namespace gdbp::nodes {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = torch::autograd::variable_list;

class Node : public torch::autograd::Node {
 public:
  // That of the Function in Python.
  std::string name() const override { return name_; }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (torch::autograd::SavedVariable& saved : saved_) saved.reset_data();
  }
  // Called before apply(), unless the graph is kept for another backward pass.
  void will_release_variables() override { is_last_ = true; }
  // Compiled autograd traces apply() with tensors of its own in the place of those that were saved.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(saved_, true);
    for (const std::string& option : options()) args.collect(option);
  }
  Gradients apply_with_saved(const Gradients& inputs, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(saved_);
    is_last_ = false;
    Gradients gradients = apply(Gradients(inputs));
    saved.after(saved_);
    return gradients;
  }

  void save(const Tensor& tensor, bool is_output = false) { saved_.emplace_back(tensor, is_output); }
  void save(const OptionalTensor& tensor) { saved_.emplace_back(tensor.value_or(Tensor()), false); }

 protected:
  // All that apply() depends on besides tensors.
  virtual std::vector<std::string> options() const = 0;
  // A number without a digit lost.
  static std::string exact(double x) { return std::to_string(gdbp::bit_cast<uint64_t>(x)); }
  static OptionalTensor optional(const Tensor& tensor) {
    return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
  }
  explicit Node(const char* name) : name_(name) { saved_.reserve(9); }
  // What was saved, in order; undefined for what there was not, and where wanted(place) says no: what is not read may
  // have been written to since.
  template <class Wanted>
  std::vector<Tensor> unpack(const Wanted& wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    runs_last_ = std::exchange(is_last_, false);
    std::vector<Tensor> tensors(saved_.size());
    for (size_t i = 0; i < saved_.size(); ++i)
      if (wanted(i)) tensors[i] = saved_[i].unpack(getptr());
    return tensors;
  }
  std::vector<Tensor> unpack() {
    return unpack([](size_t) { return true; });
  }
  // Whether gradients computed from this one will be differentiated: backward, by a graph, or forward, by the tangent
  // that it has.
  static bool is_differentiated(const Tensor& gradient) {
    return at::GradMode::is_enabled() || gradient.key_set().has(c10::DispatchKey::FuncTorchGradWrapper) ||
           gradient._fw_grad(0).defined();
  }
  // Whether nobody will read this one of the unpacked any more, so that it may be written over: it was made for this
  // node alone, which runs for the last time.
  bool is_free(size_t at, const Tensor& unpacked) const {
    // Held by saved_ and by the caller.
    return runs_last_ && !saved_[at].has_hooks() && unpacked.use_count() <= 2 && unpacked.storage().use_count() == 1;
  }
  // Whether this stands for many gradients.
  static bool is_batched(const Tensor& gradient) {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet batched({DispatchKey::Batched, DispatchKey::FuncTorchBatched});
    return gradient.key_set().has_any(batched);
  }
  // Whether this is a gradient, and does not stand for many of them or for one that lies elsewhere.
  static bool is_plain(const Tensor& gradient) {
    return !is_batched(gradient) && !gradient.key_set().has(c10::DispatchKey::Python);
  }
  // What was saved, for the caller of the backward pass to keep: a copy, unless this is the last pass, as a caller may
  // write to it.
  Tensor handed_over(const Tensor& unpacked) const { return runs_last_ ? unpacked : unpacked.clone(); }
  // Whether this is known to be the number 1, for which a loss may have written its gradient ahead: on CUDA only the
  // device knows.
  static bool is_one(const Tensor& gradient) {
    return gradient.is_cpu() && is_plain(gradient) && gradient.item<double>() == 1;
  }
  // Gradients that will be differentiated again, from plain torch: what `function` of gdbp.reference returns.
  template <class... Arguments>
  static Gradients from_reference(const char* function, const Arguments&... arguments) {
    return from_python("gdbp.reference", function, arguments...);
  }
  template <class... Arguments>
  static Gradients from_python(const char* module, const char* function, const Arguments&... arguments) {
    namespace py = pybind11;
    const py::gil_scoped_acquire gil;
    const py::tuple found = py::module_::import(module).attr(function)(as_python(arguments)...);
    Gradients gradients;
    for (const py::handle& gradient : found) gradients.push_back(unwrap(gradient));
    return gradients;
  }

 private:
  static pybind11::object as_python(const Tensor& tensor) { return tensor.defined() ? wrap(tensor) : pybind11::none(); }
  static pybind11::object as_python(const std::vector<Tensor>& tensors) {
    pybind11::list list;
    for (const Tensor& tensor : tensors) list.append(as_python(tensor));
    return list;
  }
  template <class T>
  static pybind11::object as_python(const T& value) {
    return pybind11::cast(value);
  }

  const char* const name_;
  std::vector<torch::autograd::SavedVariable> saved_;
  bool is_last_ = false;    // of the pass to come
  bool runs_last_ = false;  // of this one
  std::mutex mutex_;        // one graph may be gone through by several threads
};

// torch's graph counts the references to its nodes itself from 2.13 on.
template <class N, class... Arguments>
auto make_node(Arguments&&... arguments) {
  using Pointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    // Found where it is used: later releases have no such function.
    return std::shared_ptr<N>(new N(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<N>(std::forward<Arguments>(arguments)...);
  }
}

// Hangs the node behind an output, as a function of these inputs, which it saves in this order before anything else.
template <class Pointer, class... Inputs>
void connect(const Pointer& node, const Tensor& output, const Inputs&... inputs) {
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  (node->save(inputs), ...);
  torch::autograd::set_history(output, node);
}

// Whether a loss computes its gradient along with its value, for an upstream gradient of 1, which it nearly always is;
// and for no other gradient than this one. On CUDA its memory is written again where it is not, and must then be the
// node's alone.
inline bool takes_gradient_at_once(const Tensor& input, const Tensor& target, const std::string& reduction) {
  return reduction != "none" && input.requires_grad() && !target.requires_grad() &&
         (input.is_cpu() || !at::SavedTensorDefaultHooks::get_hooks());
}

// Below autograd, for which the node stands.
template <class Signature, class... Arguments>
auto call(const c10::TypedOperatorHandle<Signature>& op, Arguments&&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(std::forward<Arguments>(arguments)...);
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace gdbp::nodes
