// The Python module cnnops._C: importing it registers the operators; its own functions report what was built, which
// algorithms there are, which of them a convolution would run, and the settings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "checks.h"
#include "run.h"
#include "tables.h"

namespace cnnops {
namespace {

namespace py = pybind11;
using Sizes = std::vector<int64_t>;

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef CNNOPS_CUDA
  info["cuda"] = CNNOPS_CUDA;                      // the compiler's version
  info["cuda_architectures"] = CNNOPS_CUDA_ARCHS;  // as in TORCH_CUDA_ARCH_LIST
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

/// The instruction sets of this build that the processor runs, widest first.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto& set : cpu::instruction_sets()) {
    if (set.supported()) names.push_back(set.name);
  }
  return names;
}

/// Calls body(table) with the algorithms of a device ("cpu" or "cuda") and dtype ("float32" or "float64").
template <class Body>
auto with_table(const std::string& device, const std::string& dtype, const Body& body) {
  TORCH_CHECK_VALUE(dtype == "float32" || dtype == "float64", "no kernels for dtype ", dtype,
                    "; float32 and float64 work");
  TORCH_CHECK_VALUE(device == "cpu" || device == "cuda", "no kernels for device ", device, "; cpu and cuda work");
#ifdef CNNOPS_CUDA
  if (device == "cuda") {
    return dtype == "float32" ? body(cuda::kernels<float>().conv2d) : body(cuda::kernels<double>().conv2d);
  }
#else
  if (device == "cuda") refuse_cuda();
#endif
  return dtype == "float32" ? body(cpu_kernels<float>().conv2d) : body(cpu_kernels<double>().conv2d);
}

/// Rows (name, summary), fastest first.
std::vector<std::pair<std::string, std::string>> algorithms(const std::string& device, const std::string& dtype) {
  return with_table(device, dtype, [](const auto& table) {
    std::vector<std::pair<std::string, std::string>> rows;
    for (const auto& row : table) rows.emplace_back(row.name, row.summary);
    return rows;
  });
}

/// The row that a convolution of these shapes would run.
std::string conv2d_algorithm(const std::string& device, const std::string& dtype, const std::string& which,
                             const Sizes& input, const Sizes& weight, const Sizes& stride, const Sizes& padding,
                             const Sizes& dilation, int64_t groups, const std::string& algorithm) {
  TORCH_CHECK_VALUE(which == "forward" || which == "grad_input" || which == "grad_weight", "unknown pass '", which,
                    "'; known are forward, grad_input, grad_weight");
  const Pass pass = which == "forward" ? Pass::forward : which == "grad_input" ? Pass::grad_input : Pass::grad_weight;
  check_algorithm(algorithm);
  const auto g = conv2d_geometry<int64_t>("conv2d", input, weight, stride, padding, dilation, groups);
  return with_table(device, dtype,
                    [&](const auto& table) { return std::string(choose_or_throw(table, g, pass, algorithm).name); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info);
  m.def("instruction_sets", instruction_sets);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
  m.def("set_instruction_set", set_instruction_set);
  m.def("algorithms", algorithms);
  m.def("conv2d_algorithm", conv2d_algorithm);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });
}

}  // namespace cnnops
