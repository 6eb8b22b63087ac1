// Max and average pooling, forward and backward.
//
//   max   y[n,c,oh,ow] = the largest x in the window; the first in scan order wins a tie; a NaN wins over all
//   avg   y[n,c,oh,ow] = the sum of x over the window / divisor(oh, ow)
//
// Tap (kh, kw) of the window of output (oh, ow) sees x[oh*stride - padding + kh*dilation, ...]; taps outside the image
// are skipped. The maxima of windows that lie inside the image are found a vector at a time, tap by tap, those at the
// borders one by one; averages hold a whole output row and add one tap after the other to all of it.
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

/// The outputs [begin, end) of a row for which all taps lie inside the image along the width.
Inside whole_windows(const Pool2dGeometry& g) {
  const int64_t begin = outputs_inside(g, 1, 0).begin;
  return {begin, larger(begin, outputs_inside(g, 1, g.kernel[1] - 1).end)};
}

/// A vector of positions, as wide as a vector of T; and how they are stored and loaded as bytes or words.
template <class T>
using Places = decltype(Vec<T>{} > Vec<T>{});
template <class T>
Places<T> all_places(int64_t position) {
  Places<T> places{};
  return places + decltype(places[0] + 0)(position);
}
template <class T, class Position>
using PackedPlaces __attribute__((vector_size(kLanes<T> * sizeof(Position)))) = Position;

template <class T, class Position>
void store_positions(Position* to, Places<T> places, int64_t count) {
  const PackedPlaces<T, Position> packed = __builtin_convertvector(places, PackedPlaces<T, Position>);
  __builtin_memcpy(to, &packed, count * sizeof(Position));
}

template <class T, class Position>
Places<T> load_positions(const Position* from, int64_t count) {
  PackedPlaces<T, Position> packed{};
  __builtin_memcpy(&packed, from, count * sizeof(Position));
  return __builtin_convertvector(packed, Places<T>);
}

/// Outputs ow .. ow + count of row oh, whose windows are whole along the width; `rows` are the taps inside the image.
template <class T, class Position>
void max_of_vector(const Pool2dGeometry& g, const T* plane, int64_t oh, Inside rows, int64_t ow, int64_t count,
                   T* best_of, Position* won_at) {
  Vec<T> best = broadcast(-T(__builtin_huge_val()));
  Places<T> won = all_places<T>(rows.begin * g.kernel[1]);
  for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
    const int64_t ih = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
    const T* row = plane + ih * g.in[1] + ow * g.stride[1] - g.padding[1];
    for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
      const Vec<T> value = load_strided(row + kw * g.dilation[1], g.stride[1], count);
      const auto wins = (value > best) | (value != value);
      best = wins ? value : best;
      won = wins ? all_places<T>(kh * g.kernel[1] + kw) : won;
    }
  }
  store_first(best_of, best, count);
  store_positions<T>(won_at, won, count);
}

/// The same for one output, whose window may hang over the border.
template <class T, class Position>
void max_of_window(const Pool2dGeometry& g, const T* plane, int64_t oh, Inside rows, int64_t ow, T* best_of,
                   Position* won_at) {
  const Inside columns = taps_inside(g, 1, ow, ow);
  T best = -T(__builtin_huge_val());
  int64_t won = columns.begin < columns.end ? rows.begin * g.kernel[1] + columns.begin : 0;
  for (int64_t kh = rows.begin; kh < rows.end; ++kh)
    for (int64_t kw = columns.begin; kw < columns.end; ++kw) {
      const int64_t ih = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
      const T value = plane[ih * g.in[1] + ow * g.stride[1] - g.padding[1] + kw * g.dilation[1]];
      if (value > best || value != value) {
        best = value;
        won = kh * g.kernel[1] + kw;
      }
    }
  *best_of = best;
  *won_at = Position(won);
}

template <class T, class Position>
void max_pool2d(const Pool2dGeometry& g, const T* x, T* y, Position* positions, int64_t begin, int64_t end) {
  const Inside whole = whole_windows(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t oh = task % g.out[0];
    const T* plane = x + task / g.out[0] * g.in[0] * g.in[1];
    T* best = y + task * g.out[1];
    Position* won = positions + task * g.out[1];
    const Inside rows = taps_inside(g, 0, oh, oh);
    for (int64_t ow = 0; ow < whole.begin; ++ow) max_of_window(g, plane, oh, rows, ow, best + ow, won + ow);
    for (int64_t ow = whole.begin; ow < whole.end; ow += kLanes<T>)
      max_of_vector(g, plane, oh, rows, ow, smaller(whole.end - ow, kLanes<T>), best + ow, won + ow);
    for (int64_t ow = whole.end; ow < g.out[1]; ++ow) max_of_window(g, plane, oh, rows, ow, best + ow, won + ow);
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
                            const int64_t out = (plane * g.out[0] + oh) * g.out[1], here = kh * g.kernel[1] + kw;
                            for (int64_t ow = ow_begin; ow < ow_end; ow += kLanes<T>) {
                              const int64_t count = smaller(ow_end - ow, kLanes<T>);
                              const auto won = load_positions<T>(positions + out + ow, count) == all_places<T>(here);
                              add_strided(row + ow * s, s, won ? load_first(gy + out + ow, count) : Vec<T>{}, count);
                            }
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
