// The gradient of the input, added up in scratch memory that is laid out by phases: of each row of gx first the columns
// 0, stride, 2*stride, ... then 1, stride + 1, ... So what a tap owes for neighbouring pixels of gy is added to
// consecutive numbers whatever the stride. Columns beyond gx, which the border owes, have their place as well.
#pragma once

#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {

struct Phases {
  int64_t stride, first, width;  // phases of a row, the first column of gy's that is added to, numbers of a phase

  explicit Phases(const Conv2dGeometry& g)
      : stride(g.stride[1]),
        first(floor_div(-g.padding[1], stride)),
        width(g.out[1] + floor_div((g.kernel[1] - 1) * g.dilation[1] - g.padding[1], stride) - first) {}

  int64_t row_numbers() const { return stride * width; }

  /// Where in a row column 0 of gy is added through tap kw; its neighbours follow.
  int64_t place(const Conv2dGeometry& g, int64_t kw) const {
    const int64_t left = kw * g.dilation[1] - g.padding[1], shift = floor_div(left, stride);
    return (left - shift * stride) * width + shift - first;
  }

  /// `columns` columns of gx, `step` from one to the next, from a row of sums; `bias` is added to each.
  template <class S>
  void write_row(const Sum<S>* sums, Sum<S> bias, int64_t columns, int64_t step, S* to) const {
    using T = Sum<S>;
    constexpr int64_t L = kLanes<T>;
    if (step == 1 && stride == 1) {
      for (int64_t j = 0; j < columns; j += L) {
        const int64_t lanes = smaller(L, columns - j);
        store_first(to + j, load_inside(sums, width, j - first, lanes) + broadcast(bias), lanes);
      }
      return;
    }
    for (int64_t phase = 0; phase < smaller(stride, columns); ++phase) {
      const T* places = sums + phase * width;
      for (int64_t j = phase, place = -first; j < columns; j += stride, ++place)
        to[j * step] = rounded<S>((place < width ? places[place] : T(0)) + bias);
    }
  }
};

/// The rows [first, last) of the kernel through which row oh of gy meets the rows [h0, h0 + rows) of gx.
struct KernelRows {
  int64_t first, last;

  KernelRows(const Conv2dGeometry& g, int64_t oh, int64_t h0, int64_t rows) {
    const int64_t top = h0 + g.padding[0] - oh * g.stride[0];
    first = larger(0, -floor_div(-top, g.dilation[0]));
    last = smaller(g.kernel[0], floor_div(top + rows - 1, g.dilation[0]) + 1);
  }
};

}  // namespace cnnops::cpu::CNNOPS_ISA
