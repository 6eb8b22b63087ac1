// Shortcuts from Python to operators: functional.cpp tells what they save.
#pragma once

#include <pybind11/pybind11.h>

namespace cnnops {

/// Adds the fast entries of functional.cpp to the Python module.
void add_functional(pybind11::module_& module);

}  // namespace cnnops
