// What max and average pooling share: which outputs see which pixels, and the loops over both.
//
// Tap (kh, kw) of the window of output (oh, ow) sees x[oh*stride - padding + kh*dilation, ...]; taps outside the image
// are skipped. An image is a plane, or in channels_last all planes of one n, whose pixels are then `depth` numbers
// deep.
//
// Forward, a vector holds outputs that see alike: the channels of a pixel (pool2d_pixels.h), or neighbours in a row
// (pool2d_rows.h; for_groups where taps are many or apart). All other outputs are found one by one, among them adaptive
// pooling's, whose windows are of different sizes.
//
// The backward kernels gather: the gradient of an input row is the sum over the few output rows whose windows cover it,
// so nothing is cleared beforehand and no two tasks write to the same place. A pixel's terms are added up in registers
// or on the stack, in the order that the kernel's file says, and rounded once, at the end.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

struct Range {
  int64_t begin, end;
};

/// What an output sees along an axis: tap k the pixel start + k*dilation, which for k in [begin, end) exists.
struct Window {
  int64_t start, begin, end;
};

static inline Window window_at(const Pool2dGeometry& g, int dim, int64_t o) {
  const int64_t in = g.in[dim], out = g.out[dim], dilation = g.dilation[dim];
  if (g.adaptive) {
    const int64_t start = o * in / out;
    return {start, 0, ceil_div((o + 1) * in, out) - start};
  }
  const auto steps = [=](int64_t pixels) { return dilation == 1 ? pixels : ceil_div(pixels, dilation); };
  const int64_t start = o * g.stride[dim] - g.padding[dim];
  return {start, start < 0 ? steps(-start) : 0, start < in ? smaller(g.kernel[dim], steps(in - start)) : 0};
}

/// The outputs that have pixel i of an axis between their first tap and their last.
static inline Range outputs_over(const Pool2dGeometry& g, int dim, int64_t i) {
  const int64_t in = g.in[dim], out = g.out[dim], stride = g.stride[dim];
  if (g.adaptive) return {i * out / in, ceil_div((i + 1) * out, in)};
  const auto strides = [=](int64_t pixels) {  // a row costs little more than a division does
    return stride == 1 ? pixels : stride == 2 ? pixels >> 1 : pixels / stride;
  };
  const int64_t last = i + g.padding[dim], first = last - (g.kernel[dim] - 1) * g.dilation[dim];
  return {first > 0 ? strides(first + stride - 1) : 0, smaller(out, strides(last) + 1)};
}

/// Calls visit(o, k) for the outputs o among outputs_over(g, dim, i) that see pixel i, through tap k: in the order of
/// k, so backwards.
template <class Visit>
static void for_outputs_over(const Pool2dGeometry& g, int dim, int64_t i, Range over, const Visit& visit) {
  for (int64_t o = over.end - 1; o >= over.begin; --o) {
    const int64_t reach = i - window_at(g, dim, o).start;
    if (g.dilation[dim] == 1) {
      visit(o, reach);
    } else if (reach % g.dilation[dim] == 0) {
      visit(o, reach / g.dilation[dim]);
    }
  }
}

/// The outputs along an axis for which all taps lie inside the image.
static inline Range whole_windows(const Pool2dGeometry& g, int dim) {
  const int64_t out = g.out[dim], stride = g.stride[dim], padding = g.padding[dim];
  const int64_t room = g.in[dim] + padding - (g.kernel[dim] - 1) * g.dilation[dim];  // for where a window starts
  const int64_t begin = smaller(out, ceil_div(padding, stride));
  return {begin, larger(begin, room > 0 ? smaller(out, ceil_div(room, stride)) : 0)};
}

static inline int64_t depth_of(const Pool2dGeometry& g) { return g.layout == Layout::channels_last ? g.c : 1; }

// ---- forward ----

/// One output, or as many as a vector has lanes, at y[to], y[to + 1], ...: the first of them at (oh, ow).
struct Group {
  int64_t oh, ow, to, count;
  Window rows, columns;
  int64_t from, lane;  // lane j's tap (kh, kw) is x[from + j*lane + kh*row + kw*column]
  int64_t row, column;
};

/// In contiguous layout. Calls visit(zero, group) for all outputs of some rows, where `zero` is a number if the group
/// is a single output and a vector if it is more.
template <class T, class Visit>
static void for_groups(const Pool2dGeometry& g, int64_t begin, int64_t end, const Visit& visit) {
  const bool in_vectors = !g.adaptive && g.stride[1] <= 2;
  Range whole = in_vectors ? whole_windows(g, 1) : Range{0, 0};
  if (whole.end - whole.begin == 1) whole = {0, 0};
  Group at;
  at.row = g.dilation[0] * g.in[1];
  at.column = g.dilation[1];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.out[0] * g.in[0];
    at.oh = task % g.out[0];
    at.rows = window_at(g, 0, at.oh);
    for (at.ow = 0; at.ow < g.out[1];) {
      at.columns = window_at(g, 1, at.ow);
      at.from = (image + at.rows.start) * g.in[1] + at.columns.start;
      at.to = task * g.out[1] + at.ow;
      if (at.ow >= whole.begin && at.ow < whole.end) {
        at.lane = g.stride[1];
        at.count = smaller(whole.end - at.ow, kLanes<T>);
        visit(Vec<T>{}, at);
        at.ow += at.count;
      } else {
        at.lane = at.count = 1;
        visit(T{}, at);
        ++at.ow;
      }
    }
  }
}

template <class V, class S>
static V load_group(const S* p, const Group& at) {
  if constexpr (std::is_same_v<V, Sum<S>>) {
    return value(*p);
  } else {
    return load_strided(p, at.lane, at.count);
  }
}

template <class V, class S>
static void store_group(S* y, V v, const Group& at) {
  if constexpr (std::is_same_v<V, Sum<S>>) {
    y[at.to] = rounded<S>(v);
  } else {
    store_first(y + at.to, v, at.count);
  }
}

template <class S>
void set_max_pool2d_backward(Kernels<S>&);
template <class S>
void set_avg_pool2d(Kernels<S>&);
template <class S>
void set_avg_pool2d_backward(Kernels<S>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
