// The Python module gdbp._C: what was built, and the host-side objects of the families. Operators are not
// bound here; each family registers its own with torch's dispatcher.
#include <pybind11/pybind11.h>

#include "common/instruction_set.h"
#include "grad/gradients.h"
#include "linear/halves.h"
#include "memory/memory.h"
#include "nodes/nodes.h"
#include "step/device_train.h"
#include "step/plan.h"
#include "step/train.h"

namespace py = pybind11;

namespace {

// The version that GDBP_CLONES resolves to on this CPU.
const char* instruction_set() {
  const int level = gdbp::x86_64_level();
  return level == 4 ? "x86-64-v4" : level == 3 ? "x86-64-v3" : "default";
}

// The GDBP_* macros are facts that setup.py passes in.
py::dict build_info() {
  py::dict info;
  info["version"] = GDBP_VERSION;
  info["torch_built"] = GDBP_TORCH_VERSION;
#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cxx_flags"] = GDBP_CXX_FLAGS;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef GDBP_WITH_CUDA
  info["cuda"] = GDBP_CUDA_VERSION;
  info["cuda_archs"] = py::str(GDBP_CUDA_ARCHS).attr("split")();
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  info["instruction_set"] = instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info, "What was built, and the instruction set it runs with on this CPU.");
  // Families with host-side objects bind them here, one line each.
  gdbp::grad::bind(module);
  gdbp::linear::bind(module);
  gdbp::memory::bind(module);
  gdbp::nodes::bind(module);
  gdbp::step::bind(module);
  gdbp::step::bind_train(module);
  gdbp::step::bind_device_train(module);
}
