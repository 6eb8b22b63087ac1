// One axis of a convolution, seen from its outputs.
//
// Along one axis, the convolution and the gradient of its input have the same shape of sum: output number i reads the
// inputs at i*in_step + offset[t] for a few taps t of the kernel. What differs is arithmetic:
//
//   forward      output o reads x[o*stride - padding + k*dilation] for every k.
//   grad_input   input h was read by output o through tap k when o*stride = h + padding - k*dilation. So only those
//                taps count for which the right side is a multiple of the stride, and which they are depends on h
//                modulo the stride alone. All h of one remainder (one *class*) therefore share their taps, and within
//                a class the gradient is again a sum over i*1 + offset[t] of the output's gradient: no zeros are
//                stuffed between elements, no multiplication by zero is done.
//
// The taps of a class are an arithmetic progression (kernel positions k0, k0 + k_step, ...; offsets likewise), so an
// Axis is a handful of integers and needs no list.
#pragma once

#include "geometry.h"

namespace cnnops {

/// Output `first + i*step`, for 0 <= i < count, is the sum over taps t in [0, taps) of
/// weight[k0 + t*k_step] * input[i*in_step + offset0 + t*offset_step], the input being zero outside [0, in_size).
struct Axis {
  int64_t count, first, step;
  int64_t taps, k0, k_step;
  int64_t in_size, in_step, offset0, offset_step;
};

/// How many classes of outputs an axis has: 1 forward; for the gradient of the input the stride, as far as there are
/// inputs to fill the classes.
CNNOPS_HOST_DEVICE static inline int64_t axis_classes(const Conv2dGeometry& g, Pass pass, int dim) {
  return pass == Pass::forward ? 1 : g.stride[dim] < g.in[dim] ? g.stride[dim] : g.in[dim];
}

/// Class number `cls` of axis `dim` (0 height, 1 width). A class may have outputs but no taps: those outputs are zero.
CNNOPS_HOST_DEVICE static inline Axis make_axis(const Conv2dGeometry& g, Pass pass, int dim, int64_t cls) {
  const int64_t stride = g.stride[dim], padding = g.padding[dim], dilation = g.dilation[dim], kernel = g.kernel[dim];
  if (pass == Pass::forward) {
    return {g.out[dim], 0, 1, kernel, 0, 1, g.in[dim], stride, -padding, dilation};
  }
  Axis axis{};
  axis.count = cls < g.in[dim] ? (g.in[dim] - cls + stride - 1) / stride : 0;
  axis.first = cls;
  axis.step = stride;
  axis.in_size = g.out[dim];
  axis.in_step = 1;
  // The first tap that meets this class, and the distance to the next that does: less than `stride`, if they exist.
  for (axis.k0 = 0; axis.k0 < stride && axis.k0 < kernel && (cls + padding - axis.k0 * dilation) % stride != 0;
       ++axis.k0) {
  }
  for (axis.k_step = 1; axis.k_step < kernel && (axis.k_step * dilation) % stride != 0; ++axis.k_step) {
  }
  const bool met = axis.k0 < stride && axis.k0 < kernel;
  axis.taps = met ? (kernel - axis.k0 + axis.k_step - 1) / axis.k_step : 0;
  axis.offset0 = met ? (cls + padding - axis.k0 * dilation) / stride : 0;
  axis.offset_step = -(axis.k_step * dilation) / stride;
  return axis;
}

}  // namespace cnnops
