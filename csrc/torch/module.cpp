// The Python module cnnops._C: importing it registers the operators; its own functions report what was built, which
// algorithms there are, which of them a convolution would run, and the settings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <map>

#include "checks.h"
#include "functional.h"
#include "memory.h"
#include "numbers.h"
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

/// Calls body(table) with the algorithms of a device for type of number S.
template <class S, class Body>
auto with_table(const c10::Device& device, const Body& body) {
  TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(), "no kernels for device ", device, "; cpu and cuda work");
#ifdef CNNOPS_CUDA
  if (device.is_cuda()) return body(cuda::kernels<S>().conv2d);
#else
  if (device.is_cuda()) refuse_cuda();
#endif
  return body(cpu_kernels<S>().conv2d);
}

/// Rows (name, summary, accurate), fastest first.
std::vector<std::tuple<std::string, std::string, bool>> algorithms(const std::string& device) {
  return with_table<float>(c10::Device(device), [](const auto& table) {
    std::vector<std::tuple<std::string, std::string, bool>> rows;
    for (const auto& row : table) rows.emplace_back(row.name, row.summary, row.accurate);
    return rows;
  });
}

/// Calls body(row, geometry, pass, number) with the row that a convolution of these tensors would run.
template <class Body>
void with_row(const at::Tensor& input, const at::Tensor& weight, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, int64_t groups, const std::string& padding_mode, const std::string& algorithm,
              const std::string& which, const Body& body) {
  TORCH_CHECK_VALUE(which == "forward" || which == "grad_input" || which == "grad_weight", "unknown pass '", which,
                    "'; known are forward, grad_input, grad_weight");
  const Pass pass = which == "forward" ? Pass::forward : which == "grad_input" ? Pass::grad_input : Pass::grad_weight;
  check_algorithm(algorithm);
  check_dim("conv2d", "input", input, 4);
  check_dim("conv2d", "weight", weight, 4);
  check_alike("conv2d", {{"input", input}, {"weight", weight}});
  const Conv2dSettings s("conv2d", stride, padding, dilation, groups, padding_mode, algorithm);
  auto g = conv2d_geometry<int64_t>("conv2d", input.sizes(), weight.sizes(), s, layout_of({input, weight}));
  if (pass == Pass::grad_input) g = written_out(g);
  with_real_number(input.scalar_type(), [&](auto number) {
    with_table<decltype(number)>(
        input.device(), [&](const auto& table) { body(choose_or_throw(table, g, pass, algorithm), g, pass, number); });
  });
}

std::string conv2d_algorithm(const at::Tensor& input, const at::Tensor& weight, const Sizes& stride,
                             const Sizes& padding, const Sizes& dilation, int64_t groups,
                             const std::string& padding_mode, const std::string& algorithm, const std::string& which) {
  std::string name;
  with_row(input, weight, stride, padding, dilation, groups, padding_mode, algorithm, which,
           [&](const auto& row, const auto&...) { name = row.name; });
  return name;
}

/// The row's scratch memory in bytes: of each thread on a CPU, and of parts of sums; of the whole call on a GPU.
int64_t conv2d_workspace(const at::Tensor& input, const at::Tensor& weight, const Sizes& stride, const Sizes& padding,
                         const Sizes& dilation, int64_t groups, const std::string& padding_mode,
                         const std::string& algorithm, const std::string& which) {
  int64_t bytes = 0;
  with_row(input, weight, stride, padding, dilation, groups, padding_mode, algorithm, which,
           [&](const auto& row, const Conv2dGeometry& g, Pass pass, auto number) {
             const auto& run = row.run(pass);
             int64_t numbers = run.workspace(g);
             if constexpr (requires { run.parts; }) {
               if (run.parts && run.parts(g) > 1)
                 numbers += run.parts(g) * g.k * (g.c / g.groups) * g.kernel[0] * g.kernel[1];
             }
             bytes = numbers * int64_t(sizeof(Sum<decltype(number)>));
           });
  return bytes;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  add_functional(m);
  m.def("build_info", build_info);
  m.def("instruction_sets", instruction_sets);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
  m.def("set_instruction_set", set_instruction_set);
  m.def("accurate", [] { return accurate().load(); });
  m.def("set_accurate", [](bool on) { accurate() = on; });
  m.def("algorithms", algorithms);
  m.def("conv2d_algorithm", conv2d_algorithm);
  m.def("conv2d_workspace", conv2d_workspace);
  m.def("memory_stats", [] {
    const MemoryStats s = memory_stats();
    return std::map<std::string, int64_t>{{"bytes_in_use", s.in_use}, {"bytes_in_use_peak", s.in_use_peak},
                                          {"bytes_cached", s.cached}, {"bytes_cached_peak", s.cached_peak},
                                          {"hits", s.hits},           {"misses", s.misses},
                                          {"evictions", s.evictions}, {"limit", s.limit}};
  });
  m.def("empty_cache", empty_cache, py::call_guard<py::gil_scoped_release>());
  m.def("set_cache_limit", set_cache_limit, py::call_guard<py::gil_scoped_release>());
  m.def("set_cache_seconds", set_cache_seconds);
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
