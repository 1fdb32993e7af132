// What the bindings share: the only header that knows both torch and the launchers. Checks fail with one
// sentence (operator, argument, what it got, what it wants) before anything is changed.
#pragma once
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/activations.h"
#include "common/dtype.h"
#include "common/reduction.h"

// A CUDA launcher, or null in a build without CUDA.
#ifdef GDBP_WITH_CUDA
#define GDBP_CUDA_LAUNCHER(name) &name
#else
#define GDBP_CUDA_LAUNCHER(name) nullptr
#endif

namespace gdbp {

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline Dtype dtype_of(const at::Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Dtype::float64;
    case at::kFloat: return Dtype::float32;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", argument, " has dtype ", tensor.scalar_type(),
                       "; expected float64, float32, bfloat16 or float16; convert it with .to()");
  }
}

inline void check_same(const at::Tensor& a, const char* a_name, const at::Tensor& b, const char* b_name,
                       const char* op) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), op, ": ", b_name, " has dtype ", b.scalar_type(), " and ", a_name,
              " has ", a.scalar_type(), "; expected the same; convert one of them with .to()");
  TORCH_CHECK(a.device() == b.device(), op, ": ", b_name, " is on ", b.device(), " and ", a_name, " on ", a.device(),
              "; expected the same device; move one of them with .to()");
}

// The compute type of a stored type, as torch names it.
inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A large tensor that nobody has touched yet, on huge pages where the system grants them on request: it takes longer
// to hand out 512 small pages, 2 us each, than to compute what goes into them. Smaller tensors are seldom fresh.
constexpr int64_t kLargeBytes = int64_t(1) << 22;
inline at::Tensor on_huge_pages(at::Tensor fresh) {
#ifdef __linux__
  constexpr size_t kPage = size_t(1) << 12;
  if (fresh.is_cpu() && int64_t(fresh.nbytes()) >= kLargeBytes && fresh.has_storage()) {
    const auto start = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
    const uintptr_t first = (start + kPage - 1) / kPage * kPage;
    // A wish: without it all is as before.
    madvise(reinterpret_cast<void*>(first), (start + fresh.nbytes() - first) / kPage * kPage, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

// For autograd, which would compute with other numbers than it kept, or refuses.
inline void mark_changed(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

// ---- what the layers share ----

inline Activation parse_activation(c10::string_view name, const char* op) {
  for (Activation activation : kActivations)
    if (name == kActivationNames[int(activation)]) return activation;
  std::string names;
  for (const char* known : kActivationNames) names += (names.empty() ? "" : ", ") + std::string(known);
  TORCH_CHECK_VALUE(false, op, ": activation is '", name, "'; expected one of ", names,
                    "; pass activation=None for none");
}

// ---- what the losses share ----

inline Reduction parse_reduction(c10::string_view name) {
  for (Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum})
    if (name == kReductionNames[int(reduction)]) return reduction;
  TORCH_CHECK_VALUE(false, "reduction is '", name, "'; expected one of none, mean, sum");
}

// What a loss returns: `sizes` where nothing is reduced, else a number.
inline at::Tensor empty_loss(const at::Tensor& like, Reduction reduction, at::IntArrayRef sizes) {
  return on_huge_pages(at::empty(reduction == Reduction::none ? sizes : at::IntArrayRef(), like.options()));
}

inline void check_grad_output(const at::Tensor& grad, const at::Tensor& input, Reduction reduction, int64_t elements,
                              const char* op) {
  check_same(input, "input", grad, "grad_output", op);
  const int64_t expected = reduction == Reduction::none ? elements : 1;
  TORCH_CHECK(grad.numel() == expected, op, ": grad_output has shape ", grad.sizes(), "; expected ", expected,
              " element(s) for this reduction");
}

// `gradient` of `input`, written beside the loss for an upstream gradient of 1, may become that for another.
inline void check_from_one(const at::Tensor& gradient, const char* name, const at::Tensor& input, Reduction reduction,
                           const char* op) {
  TORCH_CHECK_VALUE(reduction != Reduction::none, op, ": reduction is 'none'; expected mean or sum");
  TORCH_CHECK(gradient.sizes() == input.sizes() && gradient.strides() == input.strides() &&
                  gradient.scalar_type() == input.scalar_type() && gradient.device() == input.device(),
              op, ": ", name, " is not what the loss's operator _with_gradient returned for this input");
}

// Runs a launcher where `where` lives, on that device's current stream.
template <class Launch>
void run_on(const at::Device& where, const char* op, Launch* cpu, std::type_identity_t<Launch*> cuda,
            const auto&... args) {
  if (where.is_cpu()) {
    cpu(args..., nullptr);
    return;
  }
  TORCH_CHECK(cuda != nullptr, op, ": the tensors are on ", where,
              " but gdbp was built without CUDA; rebuild it with GDBP_CUDA=1 where nvcc is installed");
  const c10::DeviceGuard guard(where);
  void* const stream = at::accelerator::getCurrentStream(where.index()).native_handle();
  const int error = cuda(args..., stream);
  TORCH_CHECK(error == 0, op, ": the kernel could not be launched (cudaError ", error, ")");
}

}  // namespace gdbp
