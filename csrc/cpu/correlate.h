// What the forward convolution and the gradient of its input have in common on the CPU: see ../correlation.h for the
// idea.
//
// Seen from here, one of the two is "the correlation" of an input tensor with a weight, and only the names of the
// channels differ: forward sums over input channels c, the gradient over output channels k.
//
// Kernels copy pieces of the input to scratch memory before they compute. That is where stored numbers become numbers
// to compute with (../numbers.h), and where the image's border is filled in: a padded image never exists as a whole.
#pragma once

#include "../correlation.h"
#include "kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

/// One group and one class of outputs of a correlation.
///   out[n, out_channel0 + m, h.first + i*h.step, w.first + j*w.step] = bias + sum over channels c and taps of
///       in[n, in_channel0 + c, h-input of (i, th), w-input of (j, tw)] *
///       weight[weight0 + m*weight_row + c*weight_channel + kh*KW + kw]
struct Correlation {
  Axis h, w;
  Border border;           // what `in` is beyond its planes
  int64_t rows, channels;  // outputs m and inputs c of this group
  int64_t in_channel0, out_channel0, in_channels, out_channels;
  int64_t in_plane, in_width, out_plane, out_width;
  int64_t weight0, weight_row, weight_channel, kernel_width;
  int64_t taps() const { return h.taps * w.taps; }
  int64_t depth() const { return channels * taps(); }
  int64_t weight_tap(int64_t th, int64_t tw) const {
    return (h.k0 + th * h.k_step) * kernel_width + w.k0 + tw * w.k_step;
  }
};

static inline Correlation make_correlation(const Conv2dGeometry& g, Pass pass, int64_t group, int64_t class_h,
                                           int64_t class_w) {
  const bool forward = pass == Pass::forward;
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, kernel_plane = g.kernel[0] * g.kernel[1];
  Correlation t;
  t.h = make_axis(g, pass, 0, class_h);
  t.w = make_axis(g, pass, 1, class_w);
  t.border = g.border;
  t.rows = forward ? k_group : c_group;
  t.channels = forward ? c_group : k_group;
  t.in_channel0 = group * t.channels;
  t.out_channel0 = group * t.rows;
  t.in_channels = forward ? g.c : g.k;
  t.out_channels = forward ? g.k : g.c;
  const int64_t *in = forward ? g.in : g.out, *out = forward ? g.out : g.in;
  t.in_plane = in[0] * in[1];
  t.in_width = in[1];
  t.out_plane = out[0] * out[1];
  t.out_width = out[1];
  t.weight0 = group * k_group * c_group * kernel_plane;
  t.weight_row = forward ? c_group * kernel_plane : kernel_plane;
  t.weight_channel = forward ? kernel_plane : c_group * kernel_plane;
  t.kernel_width = g.kernel[1];
  return t;
}

/// Lane j is row[start + j*step] for j < count, zero after them; `border` says what is seen beyond [0, size).
template <class S>
static inline Vec<Sum<S>> load_padded(const S* row, int64_t size, int64_t start, int64_t step, int64_t count,
                                      Border border) {
  if (start >= 0 && start + (count - 1) * step < size) return load_strided(row + start, step, count);
  if (step == 1 && border == Border::zeros) return load_inside(row, size, start, count);
  Vec<Sum<S>> v{};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = pixel_at(start + j * step, size, border);
    if (i >= 0) v[j] = value(row[i]);
  }
  return v;
}

/// to[j] = from[start + j*step] for 0 <= j < count; `border` says what is seen beyond [0, size).
template <class S>
static inline void copy_padded(const S* from, int64_t size, int64_t start, int64_t step, int64_t count, Border border,
                               Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t j = 0; j < count; j += L) {
    const int64_t lanes = smaller(count - j, L);
    store_first(to + j, load_padded(from, size, start + j * step, step, lanes, border), lanes);
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
