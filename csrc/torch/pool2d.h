// What max and average pooling share: their windows, fixed or adaptive, and how their work is cut.
#pragma once

#include "autograd.h"
#include "checks.h"
#include "numbers.h"
#include "operators.h"
#include "run.h"

namespace cnnops {

/// The two kinds of windows. Each makes the geometry for an input {n, c, h, w}.
struct Fixed : Window {
  using Window::Window;
  template <class Int>
  BasicPool2dGeometry<Int> geometry(const char* op, c10::ArrayRef<Int> input, Layout layout) const {
    return pool2d_geometry<Int>(op, input, *this, layout);
  }
};

struct Adaptive {
  c10::SymInt output_size[2];
  explicit Adaptive(c10::SymIntArrayRef size) {
    TORCH_CHECK(size.size() == 1 || size.size() == 2, "adaptive pooling: expected output_size to be one integer or ",
                "two, {h, w}, but got ", size);
    output_size[0] = size.front();
    output_size[1] = size.back();
  }
  template <class Int>
  BasicPool2dGeometry<Int> geometry(const char* op, c10::ArrayRef<Int> input, Layout layout) const {
    if constexpr (std::is_same_v<Int, int64_t>) {
      const int64_t sizes[] = {output_size[0].expect_int(), output_size[1].expect_int()};
      return adaptive_geometry<int64_t>(op, input, sizes, layout);
    } else {
      return adaptive_geometry<Int>(op, input, output_size, layout);
    }
  }
};

inline c10::SymIntArrayRef plane_of(const Tensor& t) { return t.sym_sizes().slice(t.dim() - 2); }

/// A forward kernel's tasks are rows of outputs, a backward kernel's rows of inputs.
inline int64_t rows_of(const Pool2dGeometry& g, const int64_t (&size)[2]) {
  return g.n * size[0] * (g.layout == Layout::channels_last ? 1 : g.c);
}

/// About as many rows as are worth a thread.
inline int64_t row_grain(const Pool2dGeometry& g) {
  const int64_t channels = g.layout == Layout::channels_last ? g.c : 1;
  return grain_for((g.in[1] + g.out[1] * g.kernel[0] * g.kernel[1]) * channels);
}

/// A gradient {n, c, oh, ow} and the input's {h, w} give the input's shape.
template <class Int>
std::array<Int, 4> input_sizes(const char* op, const Tensor& grad_output, c10::ArrayRef<Int> input_size) {
  check_dim(op, "grad_output", grad_output, 4);
  TORCH_CHECK(input_size.size() == 2, op, ": expected input_size to be {h, w}, but got ", input_size);
  const auto y = sizes_of<Int>(grad_output);
  return {y[0], y[1], input_size[0], input_size[1]};
}

template <class Int>
struct PreparedPool {
  BasicPool2dGeometry<Int> geometry;
  Tensor out;
};

}  // namespace cnnops
