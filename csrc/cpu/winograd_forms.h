// Which tiles Winograd's convolution has transforms for, and which of them a layer takes.
//
// A dilated convolution is d*d plain ones: output o sees the inputs o - padding + d*tap, so outputs of one remainder
// modulo d (one *phase*) see inputs of one remainder. A tile's outputs, and the pixels of its patch, lie d apart then,
// and no transform knows of it.
#pragma once

#include "kernels.h"
#include "winograd_points.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// The numbers of taps, and of outputs of a tile along both axes, that there are transforms for.
template <int taps_, int height_, int width_>
struct Form {
  static constexpr int taps = taps_, height = height_, width = width_;
  static constexpr int rows = height + taps - 1, columns = width + taps - 1, points = rows * columns;  // of a patch
};

/// f(Form) for the form with so many taps and such tiles.
template <class F>
static inline auto with_form(int64_t taps, const int64_t* tile, const F& f) {
  if (taps == 3) return f(Form<3, 4, 4>());
  return tile[1] == 2 ? f(Form<5, 2, 2>()) : f(Form<5, 2, 4>());
}

/// How many tiles of a form an axis has: so many phases, and so many tiles of the first, which is the longest.
struct Tiling {
  int64_t size[2], phases[2], count[2], points;
  bool transposed;
  int64_t products() const { return phases[0] * count[0] * phases[1] * count[1] * points; }
};

static inline Tiling tiling(const Conv2dGeometry& g, int64_t height, int64_t width, const int64_t* outputs,
                            bool transposed) {
  const int64_t taps = g.kernel[0];
  Tiling t{{height, width}, {}, {}, (height + taps - 1) * (width + taps - 1), transposed};
  for (int dim = 0; dim < 2; ++dim) {
    t.phases[dim] = smaller(g.dilation[dim], outputs[dim]);
    t.count[dim] = ceil_div(ceil_div(outputs[dim], g.dilation[dim]), t.size[dim]);
  }
  return t;
}

constexpr int64_t kMostAcross = 24;  // tiles of a row of the transposed form

/// The form with the fewest products. The gradient of the input of a layer without padding has fewer in the transposed
/// one, whose tiles are those of the forward convolution; it costs a little more to add them up.
static inline Tiling fewest_products(const Conv2dGeometry& g, Pass pass) {
  const auto best = [&](const int64_t* outputs, bool transposed) {
    if (g.kernel[0] == 3) return tiling(g, 4, 4, outputs, transposed);
    const Tiling narrow = tiling(g, 2, 2, outputs, transposed), wide = tiling(g, 2, 4, outputs, transposed);
    return wide.products() < narrow.products() ? wide : narrow;
  };
  if (pass != Pass::grad_input) return best(g.out, false);
  const Tiling plain = best(g.in, false), transposed = best(g.out, true);
  bool can = g.dilation[0] * g.dilation[1] == 1;
  for (int dim = 0; dim < 2; ++dim)  // its patches reach the end of the image
    can &= transposed.count[dim] * transposed.size[dim] + g.kernel[dim] - 1 - g.padding[dim] >= g.in[dim];
  return can && transposed.count[1] <= kMostAcross && 10 * transposed.products() < 9 * plain.products() ? transposed
                                                                                                        : plain;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
