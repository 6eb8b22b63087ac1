// The algorithm tables as torch's side sees them: a name that must exist, a choice that must be possible.
#pragma once

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "../algorithm.h"
#include "run.h"

namespace cnnops {

/// Whether "auto" means "accurate", in the whole process: at first, if the environment variable CNNOPS_ACCURATE is 1.
inline std::atomic<bool>& accurate() {
  static std::atomic<bool> on = [] {
    const char* wanted = std::getenv("CNNOPS_ACCURATE");
    return wanted && same_name(wanted, "1");
  }();
  return on;
}

/// Raises ValueError unless `name` is "auto", "accurate" or a row of a table, be it another device's.
inline void check_algorithm(const std::string& name) {
  if (name == "auto" || name == "accurate") return;
  std::string known = "auto, accurate";
  const auto has = [&](const auto& table) {
    for (const auto& row : table) {
      if (name == row.name) return true;
      if (known.find(row.name) == std::string::npos) known += std::string(", ") + row.name;
    }
    return false;
  };
  if (has(cpu_kernels<float>().conv2d)) return;
#ifdef CNNOPS_CUDA
  if (has(cuda::kernels<float>().conv2d)) return;
#endif
  TORCH_CHECK_VALUE(false, "unknown algorithm '", name, "'; known are ", known);
}

inline const char* pass_name(Pass pass) {
  return pass == Pass::forward ? "forward" : pass == Pass::grad_input ? "grad_input" : "grad_weight";
}

inline bool wants_accurate(const std::string& name) { return name == "accurate" || (name == "auto" && accurate()); }

/// The row to run, or an error with the row's own sentence.
template <class Row>
const Row& choose_or_throw(const Table<Row>& table, const Conv2dGeometry& g, Pass pass, const std::string& name) {
  const Choice<Row> choice = choose(table, g, pass, wants_accurate(name) ? "accurate" : name.c_str());
  TORCH_CHECK(choice.row, "algorithm '", name, "' refuses this convolution (", pass_name(pass),
              "): ", choice.refusal ? choice.refusal : "no such algorithm on this device");
  return *choice.row;
}

}  // namespace cnnops
