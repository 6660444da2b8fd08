// csrc/forest/ for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace m2::forest {

void bind(pybind11::module_& module);

}  // namespace m2::forest
