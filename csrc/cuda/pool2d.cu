// Pooling: one thread per result, and every result a gather.
//
//   max, forward    y[n,c,oh,ow] = the largest input of the window, and where: kh*KW + kw, the first in scan order
//   max, backward   gx[n,c,h,w]  = sum of gy over those windows whose maximum was here
//   max, gather     y[n,c,oh,ow] = x at the position that won
//   avg, forward    y[n,c,oh,ow] = (sum of the window's inputs) / divisor
//   avg, backward   gx[n,c,h,w]  = sum of gy / divisor over the windows that cover (h, w)
//
// The backward passes turn the window round: an input looks at the windows that cover it, at most ceil(KH/stride) of
// them along an axis. So nothing is zeroed beforehand and no two threads add to one number: the order of each sum is
// fixed.
//
// All of them are bound by memory: what counts is that neighbouring threads take neighbouring elements, and that
// finding one's place is cheap. So indices take 32 bits (`Index`) unless the tensors are larger.
#include <limits>

#include "device.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

/// One axis of a pooling: output `o` sees inputs o*stride - padding + k*dilation.
template <class Index>
struct Windows {
  Index in, out, kernel, stride, padding, dilation;

  __device__ Windows(const Pool2dGeometry& g, int dim)
      : in(static_cast<Index>(g.in[dim])),
        out(static_cast<Index>(g.out[dim])),
        kernel(static_cast<Index>(g.kernel[dim])),
        stride(static_cast<Index>(g.stride[dim])),
        padding(static_cast<Index>(g.padding[dim])),
        dilation(static_cast<Index>(g.dilation[dim])) {}

  __device__ bool inside(Index i) const { return 0 <= i && i < in; }
  __device__ Index start(Index o) const { return o * stride - padding; }

  /// The first tap of window o that is not before the image.
  __device__ Index first_tap(Index o) const { return start(o) < 0 ? (dilation - 1 - start(o)) / dilation : 0; }

  /// The outputs whose windows may cover input i: [first, last]. With dilation, see tap().
  __device__ Index first_over(Index i) const {
    const Index from = i + padding - (kernel - 1) * dilation;
    return from <= 0 ? 0 : (from + stride - 1) / stride;
  }
  __device__ Index last_over(Index i) const { return smaller<Index>((i + padding) / stride, out - 1); }

  /// The tap through which output o sees input i, -1 for none; o must be one of the above.
  __device__ Index tap(Index o, Index i) const {
    const Index distance = i - start(o);
    if (dilation == 1) return distance;
    return distance % dilation == 0 ? distance / dilation : -1;
  }

  /// How many places of window o the average counts along this axis.
  __device__ Index counted(Index o, bool with_padding) const {
    const Index begin = start(o), end = smaller<Index>(begin + kernel, in + padding);
    return with_padding ? end - begin : smaller(end, in) - larger<Index>(begin, 0);
  }
};

/// Where element number `item` of planes of rows x columns is.
template <class Index>
struct Place {
  Index column, row, plane;

  __device__ Place(int64_t item, Index rows, Index columns) {
    const Index i = static_cast<Index>(item), line = i / columns;
    column = i - line * columns;
    plane = line / rows;
    row = line - plane * rows;
  }
};

template <class T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

template <class T, class Position, class Index>
__global__ void max_kernel(Pool2dGeometry g, int64_t size, const T* x, T* y, Position* positions) {
  const Windows<Index> height(g, 0), width(g, 1);
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, height.out, width.out);
    const T* plane = x + place.plane * height.in * width.in;
    T best = kLowest<T>;
    Index position = -1;
    for (Index kh = height.first_tap(place.row); kh < height.kernel; ++kh) {
      const Index h = height.start(place.row) + kh * height.dilation;
      if (h >= height.in) break;
      for (Index kw = width.first_tap(place.column); kw < width.kernel; ++kw) {
        const Index w = width.start(place.column) + kw * width.dilation;
        if (w >= width.in) break;
        const T value = plane[h * width.in + w];
        if (position < 0 || value > best || value != value) {  // NaN wins over everything, as in torch
          best = value;
          position = kh * width.kernel + kw;
        }
      }
    }
    y[item] = best;
    positions[item] = static_cast<Position>(larger<Index>(position, 0));
  }
}

template <class T, class Position, class Index>
__global__ void max_backward_kernel(Pool2dGeometry g, int64_t size, const T* gy, const Position* positions, T* gx) {
  const Windows<Index> height(g, 0), width(g, 1);
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, height.in, width.in);
    const Index plane = place.plane * height.out * width.out;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column);
    const Index last_h = height.last_over(place.row);
    T sum = 0;
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      const Index kh = height.tap(oh, place.row);
      for (Index ow = first_w; ow <= last_w; ++ow) {
        const Index kw = width.tap(ow, place.column), i = plane + oh * width.out + ow;
        if (kh >= 0 && kw >= 0 && static_cast<Index>(positions[i]) == kh * width.kernel + kw) sum += gy[i];
      }
    }
    gx[item] = sum;
  }
}

/// Positions may come from anywhere: those that point out of the input read as zero.
template <class T, class Position, class Index>
__global__ void gather_kernel(Pool2dGeometry g, int64_t size, const T* x, const Position* positions, T* y) {
  const Windows<int64_t> height(g, 0), width(g, 1);
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, static_cast<Index>(height.out), static_cast<Index>(width.out));
    const int64_t position = positions[item], kh = position / width.kernel, kw = position - kh * width.kernel;
    const int64_t h = height.start(place.row) + kh * height.dilation;
    const int64_t w = width.start(place.column) + kw * width.dilation;
    const int64_t plane = static_cast<int64_t>(place.plane) * height.in * width.in;
    y[item] = height.inside(h) && width.inside(w) ? x[plane + h * width.in + w] : T(0);
  }
}

/// What window (oh, ow) is divided by.
template <class T, class Index>
__device__ inline T divide_by(const Windows<Index>& height, const Windows<Index>& width, Divisor divisor, Index oh,
                              Index ow) {
  if (divisor.divisor_override != 0) return static_cast<T>(divisor.divisor_override);
  return static_cast<T>(height.counted(oh, divisor.count_include_pad) * width.counted(ow, divisor.count_include_pad));
}

template <class T, class Index>
__global__ void avg_kernel(Pool2dGeometry g, int64_t size, Divisor divisor, const T* x, T* y) {
  const Windows<Index> height(g, 0), width(g, 1);
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, height.out, width.out);
    const T* plane = x + place.plane * height.in * width.in;
    const Index h0 = height.start(place.row), w0 = width.start(place.column);
    const Index h_end = smaller<Index>(h0 + height.kernel, height.in);
    const Index w_end = smaller<Index>(w0 + width.kernel, width.in);
    T sum = 0;
    for (Index h = larger<Index>(h0, 0); h < h_end; ++h) {
      for (Index w = larger<Index>(w0, 0); w < w_end; ++w) sum += plane[h * width.in + w];
    }
    y[item] = sum / divide_by<T>(height, width, divisor, place.row, place.column);
  }
}

template <class T, class Index>
__global__ void avg_backward_kernel(Pool2dGeometry g, int64_t size, Divisor divisor, const T* gy, T* gx) {
  const Windows<Index> height(g, 0), width(g, 1);
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, height.in, width.in);
    const T* plane = gy + place.plane * height.out * width.out;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column);
    const Index last_h = height.last_over(place.row);
    T sum = 0;
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      for (Index ow = first_w; ow <= last_w; ++ow) {
        sum += plane[oh * width.out + ow] / divide_by<T>(height, width, divisor, oh, ow);
      }
    }
    gx[item] = sum;
  }
}

int64_t inputs(const Pool2dGeometry& g) { return g.n * g.c * g.in[0] * g.in[1]; }
int64_t outputs(const Pool2dGeometry& g) { return g.n * g.c * g.out[0] * g.out[1]; }

/// Calls start(Index{}) with the narrowest type that holds every index and every place of a window.
template <class Start>
void with_index(const Pool2dGeometry& g, const Start& start) {
  int64_t largest = larger(inputs(g), outputs(g));
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t reach = larger(g.kernel[dim] * g.dilation[dim], (g.out[dim] + 1) * g.stride[dim]) + g.padding[dim];
    largest = larger(largest, g.in[dim] + g.padding[dim] + reach);
  }
  largest = larger(largest, g.kernel[0] * g.kernel[1]);
  if (largest < index_limit()) {
    start(int32_t{});
  } else {
    start(int64_t{});
  }
}

template <class T, class Position>
void max_forward(const Pool2dGeometry& g, const T* x, T* y, Position* positions, Stream stream) {
  with_index(g, [&](auto index) {
    launch_items("max_pool2d", max_kernel<T, Position, decltype(index)>, outputs(g), stream, g, outputs(g), x, y,
                 positions);
  });
}

template <class T, class Position>
void max_backward(const Pool2dGeometry& g, const T* gy, const Position* positions, T* gx, Stream stream) {
  with_index(g, [&](auto index) {
    launch_items("max_pool2d_backward", max_backward_kernel<T, Position, decltype(index)>, inputs(g), stream, g,
                 inputs(g), gy, positions, gx);
  });
}

template <class T, class Position>
void max_gather(const Pool2dGeometry& g, const T* x, const Position* positions, T* y, Stream stream) {
  with_index(g, [&](auto index) {
    launch_items("max_pool2d_gather", gather_kernel<T, Position, decltype(index)>, outputs(g), stream, g, outputs(g), x,
                 positions, y);
  });
}

template <class T>
void avg_forward(const Pool2dGeometry& g, Divisor divisor, const T* x, T* y, Stream stream) {
  with_index(g, [&](auto index) {
    launch_items("avg_pool2d", avg_kernel<T, decltype(index)>, outputs(g), stream, g, outputs(g), divisor, x, y);
  });
}

template <class T>
void avg_backward(const Pool2dGeometry& g, Divisor divisor, const T* gy, T* gx, Stream stream) {
  with_index(g, [&](auto index) {
    launch_items("avg_pool2d_backward", avg_backward_kernel<T, decltype(index)>, inputs(g), stream, g, inputs(g),
                 divisor, gy, gx);
  });
}

}  // namespace

template <class T>
void add_pool2d(Kernels<T>& kernels) {
  kernels.max_pool2d = {max_forward<T, uint8_t>, max_backward<T, uint8_t>, max_gather<T, uint8_t>};
  kernels.max_pool2d_wide = {max_forward<T, int32_t>, max_backward<T, int32_t>, max_gather<T, int32_t>};
  kernels.avg_pool2d = avg_forward<T>;
  kernels.avg_pool2d_backward = avg_backward<T>;
}

template void add_pool2d(Kernels<float>&);
template void add_pool2d(Kernels<double>&);

}  // namespace cnnops::cuda
