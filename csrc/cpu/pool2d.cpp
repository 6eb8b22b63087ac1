// Max and average pooling, forward and backward.
//
//   max   y[n,c,oh,ow] = the largest x in the window; the first in scan order wins a tie; a NaN wins over all
//   avg   y[n,c,oh,ow] = the sum of x over the window / divisor(oh, ow)
//
// Tap (kh, kw) of the window of output (oh, ow) sees x[oh*stride - padding + kh*dilation, ...]; taps outside the image
// are skipped. Instead of walking each window, a whole output row is held while one tap after the other is applied to
// all of it: each inner loop is a straight run over neighbouring outputs, with no bounds to check.
//
// Max pooling remembers the winner by its position in the window, kh*KW + kw: one byte where torch keeps an eight-byte
// index. The backward kernels gather: the gradient of an input row is the sum over the few output rows whose windows
// cover it, so nothing is cleared beforehand and no two tasks write to the same place. A task is one row.
#include "kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// The outputs [begin, end) of an axis for which tap k lies inside the image.
struct Inside {
  int64_t begin, end;
};

Inside outputs_inside(const Pool2dGeometry& g, int dim, int64_t k) {
  const int64_t offset = k * g.dilation[dim] - g.padding[dim];  // 0 <= o*stride + offset < in
  const int64_t begin = offset < 0 ? ceil_div(-offset, g.stride[dim]) : 0;
  const int64_t end = g.in[dim] - offset > 0 ? ceil_div(g.in[dim] - offset, g.stride[dim]) : 0;
  return {smaller(begin, g.out[dim]), larger(smaller(begin, g.out[dim]), smaller(end, g.out[dim]))};
}

/// The taps of an axis through which any of the outputs [first, last] sees the image, and perhaps a few more.
Inside taps_inside(const Pool2dGeometry& g, int dim, int64_t first, int64_t last) {
  const int64_t before = g.padding[dim] - last * g.stride[dim];               // k*dilation >= before
  const int64_t beyond = g.in[dim] + g.padding[dim] - first * g.stride[dim];  // k*dilation < beyond
  return {before > 0 ? ceil_div(before, g.dilation[dim]) : 0,
          beyond > 0 ? smaller(g.kernel[dim], ceil_div(beyond, g.dilation[dim])) : 0};
}

/// Calls tap(kh, kw, ow_begin, ow_end, row), where row[ow*stride] is what output (oh, ow) sees through the tap, for all
/// taps of output row oh that lie inside the image.
template <class T, class Tap>
void for_taps_of_output_row(const Pool2dGeometry& g, T* plane, int64_t oh, const Tap& tap) {
  const Inside height = taps_inside(g, 0, oh, oh), width = taps_inside(g, 1, 0, g.out[1] - 1);
  for (int64_t kh = height.begin; kh < height.end; ++kh) {
    const int64_t ih = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
    for (int64_t kw = width.begin; kw < width.end; ++kw) {
      const Inside ow = outputs_inside(g, 1, kw);
      tap(kh, kw, ow.begin, ow.end, plane + ih * g.in[1] + kw * g.dilation[1] - g.padding[1]);
    }
  }
}

/// The same from the input's side: calls tap(oh, kh, kw, ow_begin, ow_end, row) for all taps that see input row ih,
/// where `row` is the row of `plane` (a plane of the input's shape) at that tap.
template <class T, class Tap>
void for_taps_of_input_row(const Pool2dGeometry& g, T* plane, int64_t ih, const Tap& tap) {
  const Inside height = taps_inside(g, 0, 0, g.out[0] - 1), width = taps_inside(g, 1, 0, g.out[1] - 1);
  for (int64_t kh = height.begin; kh < height.end; ++kh) {
    const int64_t from = ih + g.padding[0] - kh * g.dilation[0];  // = oh * stride
    if (from < 0 || from % g.stride[0] != 0 || from / g.stride[0] >= g.out[0]) continue;
    for (int64_t kw = width.begin; kw < width.end; ++kw) {
      const Inside ow = outputs_inside(g, 1, kw);
      tap(from / g.stride[0], kh, kw, ow.begin, ow.end, plane + ih * g.in[1] + kw * g.dilation[1] - g.padding[1]);
    }
  }
}

template <class T, class Position>
void max_pool2d(const Pool2dGeometry& g, const T* x, T* y, Position* positions, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.out[0], oh = task % g.out[0], s = g.stride[1];
    T* best = y + task * g.out[1];
    Position* won = positions + task * g.out[1];
    for (int64_t ow = 0; ow < g.out[1]; ++ow) {
      best[ow] = -T(__builtin_huge_val());
      won[ow] = 0;
    }
    // Where all are -inf the first tap inside the image wins: taps write their position from the last to the first.
    const int64_t kh0 = taps_inside(g, 0, oh, oh).begin;
    const Inside width = taps_inside(g, 1, 0, g.out[1] - 1);
    for (int64_t kw = width.end - 1; kw >= width.begin; --kw) {
      const Inside ow = outputs_inside(g, 1, kw);
      for (int64_t j = ow.begin; j < ow.end; ++j) won[j] = Position(kh0 * g.kernel[1] + kw);
    }
    for_taps_of_output_row(g, x + plane * g.in[0] * g.in[1], oh,
                           [&](int64_t kh, int64_t kw, int64_t ow_begin, int64_t ow_end, const T* row) {
                             const Position here = Position(kh * g.kernel[1] + kw);
                             for (int64_t ow = ow_begin; ow < ow_end; ++ow) {
                               const T value = row[ow * s];
                               const bool wins = value > best[ow] || value != value;
                               best[ow] = wins ? value : best[ow];
                               won[ow] = wins ? here : won[ow];
                             }
                           });
  }
}

template <class T, class Position>
void max_pool2d_backward(const Pool2dGeometry& g, const T* gy, const Position* positions, T* gx, int64_t begin,
                         int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.in[0], ih = task % g.in[0], s = g.stride[1];
    T* to = gx + task * g.in[1];
    for (int64_t iw = 0; iw < g.in[1]; ++iw) to[iw] = 0;
    for_taps_of_input_row(g, gx + plane * g.in[0] * g.in[1], ih,
                          [&](int64_t oh, int64_t kh, int64_t kw, int64_t ow_begin, int64_t ow_end, T* row) {
                            const Position here = Position(kh * g.kernel[1] + kw);
                            const int64_t out = (plane * g.out[0] + oh) * g.out[1];
                            for (int64_t ow = ow_begin; ow < ow_end; ++ow)
                              row[ow * s] += positions[out + ow] == here ? gy[out + ow] : T(0);
                          });
  }
}

template <class T, class Position>
void max_pool2d_gather(const Pool2dGeometry& g, const T* x, const Position* positions, T* y, int64_t begin,
                       int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.out[0], oh = task % g.out[0];
    for (int64_t ow = 0; ow < g.out[1]; ++ow) {
      const int64_t position = positions[task * g.out[1] + ow];
      const int64_t ih = oh * g.stride[0] - g.padding[0] + position / g.kernel[1] * g.dilation[0];
      const int64_t iw = ow * g.stride[1] - g.padding[1] + position % g.kernel[1] * g.dilation[1];
      const bool inside = ih >= 0 && ih < g.in[0] && iw >= 0 && iw < g.in[1];
      y[task * g.out[1] + ow] = inside ? x[(plane * g.in[0] + ih) * g.in[1] + iw] : T(0);
    }
  }
}

/// How many places of the window of output o count, along one axis.
int64_t window_size(const Pool2dGeometry& g, int dim, int64_t o, bool count_include_pad) {
  const int64_t start = o * g.stride[dim] - g.padding[dim];
  const int64_t end = smaller(start + g.kernel[dim], g.in[dim] + g.padding[dim]);
  return count_include_pad ? end - start : smaller(end, g.in[dim]) - larger(start, 0);
}

template <class T>
T divisor_at(const Pool2dGeometry& g, const Divisor& d, int64_t oh, int64_t ow) {
  if (d.divisor_override) return T(d.divisor_override);
  return T(window_size(g, 0, oh, d.count_include_pad) * window_size(g, 1, ow, d.count_include_pad));
}

template <class T>
void avg_pool2d(const Pool2dGeometry& g, Divisor d, const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.out[0], oh = task % g.out[0], s = g.stride[1];
    T* sum = y + task * g.out[1];
    for (int64_t ow = 0; ow < g.out[1]; ++ow) sum[ow] = 0;
    for_taps_of_output_row(g, x + plane * g.in[0] * g.in[1], oh,
                           [&](int64_t, int64_t, int64_t ow_begin, int64_t ow_end, const T* row) {
                             for (int64_t ow = ow_begin; ow < ow_end; ++ow) sum[ow] += row[ow * s];
                           });
    for (int64_t ow = 0; ow < g.out[1]; ++ow) sum[ow] /= divisor_at<T>(g, d, oh, ow);
  }
}

template <class T>
void avg_pool2d_backward(const Pool2dGeometry& g, Divisor d, const T* gy, T* gx, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / g.in[0], ih = task % g.in[0], s = g.stride[1];
    T* to = gx + task * g.in[1];
    for (int64_t iw = 0; iw < g.in[1]; ++iw) to[iw] = 0;
    for_taps_of_input_row(g, gx + plane * g.in[0] * g.in[1], ih,
                          [&](int64_t oh, int64_t, int64_t, int64_t ow_begin, int64_t ow_end, T* row) {
                            const T* grad = gy + (plane * g.out[0] + oh) * g.out[1];
                            for (int64_t ow = ow_begin; ow < ow_end; ++ow)
                              row[ow * s] += grad[ow] / divisor_at<T>(g, d, oh, ow);
                          });
  }
}

}  // namespace

template <class T>
void set_pool2d(Kernels<T>& k) {
  k.max_pool2d = {max_pool2d<T, uint8_t>, max_pool2d_backward<T, uint8_t>, max_pool2d_gather<T, uint8_t>};
  k.max_pool2d_wide = {max_pool2d<T, int32_t>, max_pool2d_backward<T, int32_t>, max_pool2d_gather<T, int32_t>};
  k.avg_pool2d = avg_pool2d<T>;
  k.avg_pool2d_backward = avg_pool2d_backward<T>;
}

template void set_pool2d(Kernels<float>&);
template void set_pool2d(Kernels<double>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
