// The caching allocator as torch's, and its Python functions.
#pragma once
#include <pybind11/pybind11.h>

namespace gdbp::memory {

void bind(pybind11::module_& module);

}  // namespace gdbp::memory
