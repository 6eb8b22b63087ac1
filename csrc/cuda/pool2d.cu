// Pooling: one thread per result, and every result a gather.
//
//   max, forward    y[n,c,oh,ow] = the largest input of the window, and where: kh*KW + kw, the first in scan order
//   max, backward   gx[n,c,h,w]  = sum of gy over those windows whose maximum was here
//   max, gather     y[n,c,oh,ow] = x at the position that won
//   avg, forward    y[n,c,oh,ow] = (sum of the window's inputs) / divisor
//   avg, backward   gx[n,c,h,w]  = sum of gy / divisor over the windows that cover (h, w)
//   max_unpool      y[n,c,i]     = the last x[n,c,j] with index j = i, or zero
//
// The backward passes turn the window round: an input looks at the windows that cover it, at most ceil(KH/stride) of
// them along an axis. So nothing is zeroed beforehand and no two threads add to one number: the order of each sum is
// fixed. Unpooling finds out first who is last, with integer maxima, which come out the same in any order. Indices that
// point out of the plane are left out.
//
// All of them are bound by memory: what counts is that neighbouring threads take neighbouring elements, and that
// finding one's place is cheap. So results are numbered as they lie in memory, in either layout, and indices take 32
// bits (`Index`) unless the tensors are larger.
#include <limits>

#include "epilogue.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

/// One axis of a pooling: output `o` sees inputs start(o) + k*dilation, for k < taps(o).
template <class Index>
struct Windows {
  Index in, out, kernel, stride, padding, dilation;
  bool adaptive;

  __device__ Windows(const Pool2dGeometry& g, int dim)
      : in(static_cast<Index>(g.in[dim])),
        out(static_cast<Index>(g.out[dim])),
        kernel(static_cast<Index>(g.kernel[dim])),
        stride(static_cast<Index>(g.stride[dim])),
        padding(static_cast<Index>(g.padding[dim])),
        dilation(static_cast<Index>(g.dilation[dim])),
        adaptive(g.adaptive) {}

  __device__ bool inside(Index i) const { return 0 <= i && i < in; }
  __device__ Index start(Index o) const { return hidden(adaptive) ? o * in / out : o * stride - padding; }
  __device__ Index taps(Index o) const { return hidden(adaptive) ? ((o + 1) * in + out - 1) / out - start(o) : kernel; }

  /// The first tap of a window that is not before the image.
  __device__ Index first_tap(Index start) const { return start < 0 ? (dilation - 1 - start) / dilation : 0; }

  /// The outputs whose windows may cover input i: [first, last]. With dilation, see tap().
  __device__ Index first_over(Index i) const {
    if (hidden(adaptive)) return i * out / in;
    const Index from = i + padding - (kernel - 1) * dilation;
    return from <= 0 ? 0 : (from + stride - 1) / stride;
  }
  __device__ Index last_over(Index i) const {
    return hidden(adaptive) ? ((i + 1) * out - 1) / in : smaller<Index>((i + padding) / stride, out - 1);
  }

  /// The tap through which output o sees input i, -1 for none; o must be one of the above.
  __device__ Index tap(Index o, Index i) const {
    const Index distance = i - start(o);
    if (hidden(dilation == 1)) return distance;
    return distance % dilation == 0 ? distance / dilation : -1;
  }

  /// How many places of window o the average counts along this axis.
  __device__ Index counted(Index o, bool with_padding) const {
    const Index begin = start(o), end = smaller<Index>(begin + taps(o), in + padding);
    return with_padding ? end - begin : smaller(end, in) - larger<Index>(begin, 0);
  }
};

/// How many numbers of one pixel lie side by side. To pooling, a tensor is planes of pixels of so many numbers.
int64_t pixel_size(const Pool2dGeometry& g) { return g.layout == Layout::channels_last ? g.c : 1; }

/// Where element number `item` of a tensor with rows x columns pixels is: in which plane, pixel and number of it.
template <class Index>
struct Place {
  Index number, column, row, plane;

  __device__ Place(int64_t item, Index pixel_size, Index rows, Index columns) {
    Index i = static_cast<Index>(item);
    number = 0;
    if (hidden(pixel_size != 1)) {
      const Index pixel = i / pixel_size;
      number = i - pixel * pixel_size;
      i = pixel;
    }
    const Index line = i / columns;
    column = i - line * columns;
    plane = line / rows;
    row = line - plane * rows;
  }
};

/// Positions of either width: so one kernel does for both.
struct Positions {
  uint8_t* narrow;
  int32_t* wide;  // nullptr if narrow

  explicit Positions(const uint8_t* positions) : narrow(const_cast<uint8_t*>(positions)), wide(nullptr) {}
  explicit Positions(const int32_t* positions) : narrow(nullptr), wide(const_cast<int32_t*>(positions)) {}

  __device__ int32_t operator[](int64_t i) const { return hidden(wide) ? wide[i] : narrow[i]; }
  __device__ void set(int64_t i, int32_t position) const {
    if (hidden(wide)) {
      wide[i] = position;
    } else {
      narrow[i] = static_cast<uint8_t>(position);
    }
  }
};

template <class T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

template <class S, class Index>
__global__ void max_kernel(Pool2dGeometry g, Index pixel_size, int64_t size, const S* x, S* y, Positions positions) {
  const Windows<Index> height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, pixel_size, height.out, width.out);
    const S* plane = x + place.plane * height.in * width.in * pixel_size + place.number;
    const Index h0 = height.start(place.row), w0 = width.start(place.column);
    const Index taps_h = height.taps(place.row), taps_w = width.taps(place.column);
    const Index first_h = height.first_tap(h0), first_w = width.first_tap(w0);
    Sum<S> best = kLowest<Sum<S>>;
    Index position = -1;
    for (Index kh = first_h; kh < taps_h; ++kh) {
      const Index h = h0 + kh * height.dilation;
      if (h >= height.in) break;
      for (Index kw = first_w; kw < taps_w; ++kw) {
        const Index w = w0 + kw * width.dilation;
        if (w >= width.in) break;
        const Sum<S> here = value(plane[(h * width.in + w) * pixel_size]);
        if (position < 0 || wins(here, best)) {
          best = here;
          position = kh * width.kernel + kw;
        }
      }
    }
    y[item] = rounded<S>(best);
    positions.set(item, static_cast<int32_t>(larger<Index>(position, 0)));
  }
}

template <class S, class Index>
__global__ void max_backward_kernel(Pool2dGeometry g, Index pixel_size, int64_t size, const S* gy, Positions positions,
                                    S* gx) {
  const Windows<Index> height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, pixel_size, height.in, width.in);
    const Index plane = place.plane * height.out * width.out * pixel_size + place.number;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column);
    const Index last_h = height.last_over(place.row);
    Sum<S> sum = 0;
    CNNOPS_NO_UNROLL
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      const Index kh = height.tap(oh, place.row);
      CNNOPS_NO_UNROLL
      for (Index ow = first_w; ow <= last_w; ++ow) {
        const Index kw = width.tap(ow, place.column), i = plane + (oh * width.out + ow) * pixel_size;
        const bool won = kh >= 0 && kw >= 0 && static_cast<Index>(positions[i]) == kh * width.kernel + kw;
        if (won) sum += value(gy[i]);
      }
    }
    gx[item] = rounded<S>(sum);
  }
}

/// Positions may come from anywhere: those that point out of the input read as zero.
template <class S, class Index>
__global__ void gather_kernel(Pool2dGeometry g, Index pixel_size, int64_t size, const S* x, Positions positions, S* y) {
  const Windows<int64_t> height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, pixel_size, static_cast<Index>(height.out), static_cast<Index>(width.out));
    const int64_t position = positions[item], kh = position / width.kernel, kw = position - kh * width.kernel;
    const int64_t h = height.start(place.row) + kh * height.dilation;
    const int64_t w = width.start(place.column) + kw * width.dilation;
    const int64_t pixel = (place.plane * height.in + h) * width.in + w;
    y[item] = height.inside(h) && width.inside(w) ? x[pixel * pixel_size + place.number] : S{};
  }
}

/// What window (oh, ow) is divided by.
template <class T, class Index>
__device__ inline T divide_by(const Windows<Index>& height, const Windows<Index>& width, Divisor divisor, Index oh,
                              Index ow) {
  if (divisor.divisor_override != 0) return static_cast<T>(divisor.divisor_override);
  return static_cast<T>(height.counted(oh, divisor.count_include_pad) * width.counted(ow, divisor.count_include_pad));
}

template <class S, class Index>
__global__ void avg_kernel(Pool2dGeometry g, Index pixel_size, int64_t size, Divisor divisor, const S* x, S* y) {
  const Windows<Index> height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, pixel_size, height.out, width.out);
    const S* plane = x + place.plane * height.in * width.in * pixel_size + place.number;
    const Index h0 = height.start(place.row), w0 = width.start(place.column);
    const Index h_end = smaller<Index>(h0 + height.taps(place.row), height.in);
    const Index w_end = smaller<Index>(w0 + width.taps(place.column), width.in);
    Sum<S> sum = 0;
    for (Index h = larger<Index>(h0, 0); h < h_end; ++h) {
      for (Index w = larger<Index>(w0, 0); w < w_end; ++w) sum += value(plane[(h * width.in + w) * pixel_size]);
    }
    y[item] = rounded<S>(sum / divide_by<Sum<S>>(height, width, divisor, place.row, place.column));
  }
}

template <class S, class Index>
__global__ void avg_backward_kernel(Pool2dGeometry g, Index pixel_size, int64_t size, Divisor divisor, const S* gy,
                                    S* gx) {
  const Windows<Index> height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, pixel_size, height.in, width.in);
    const S* plane = gy + place.plane * height.out * width.out * pixel_size + place.number;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column);
    const Index last_h = height.last_over(place.row);
    Sum<S> sum = 0;
    CNNOPS_NO_UNROLL
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      CNNOPS_NO_UNROLL
      for (Index ow = first_w; ow <= last_w; ++ow) {
        sum += value(plane[(oh * width.out + ow) * pixel_size]) / divide_by<Sum<S>>(height, width, divisor, oh, ow);
      }
    }
    gx[item] = rounded<S>(sum);
  }
}

__global__ void no_source_kernel(int64_t size, int64_t* sources) {
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(size)) sources[i] = -1;
}

/// sources[i] becomes the number of the last x that belongs at number i of y. Planes are of `in` and `out` pixels.
__global__ void source_kernel(int64_t in, int64_t out, int64_t pixel_size, int64_t size, const int64_t* indices,
                              int64_t* sources) {
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    Digits digits(item);
    const int64_t number = digits.next(pixel_size);
    digits.next(in);
    const int64_t index = indices[item];
    if (0 <= index && index < out) atomic_max(sources + (digits.rest() * out + index) * pixel_size + number, item);
  }
}

template <class S>
__global__ void take_kernel(int64_t size, const S* x, const int64_t* sources, S* y) {
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(size)) y[i] = sources[i] < 0 ? S{} : x[sources[i]];
}

int64_t inputs(const Pool2dGeometry& g) { return g.n * g.c * g.in[0] * g.in[1]; }
int64_t outputs(const Pool2dGeometry& g) { return g.n * g.c * g.out[0] * g.out[1]; }

/// Calls start(pixel_size(g)), in the narrowest type that holds every index and every place of a window.
template <class Start>
void with_index(const Pool2dGeometry& g, const Start& start) {
  int64_t largest = larger(inputs(g), outputs(g));
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t reach = larger(g.kernel[dim] * g.dilation[dim], (g.out[dim] + 1) * g.stride[dim]) + g.padding[dim];
    largest = larger(largest, g.in[dim] + g.padding[dim] + reach);
    if (g.adaptive) largest = larger(largest, (g.in[dim] + 1) * (g.out[dim] + 1));
  }
  largest = larger(largest, g.kernel[0] * g.kernel[1]);
  if (largest < index_limit()) {
    start(static_cast<int32_t>(pixel_size(g)));
  } else {
    start(pixel_size(g));
  }
}

template <class S, class Position>
void max_forward(const Pool2dGeometry& g, const S* x, S* y, Position* positions, Stream stream) {
  with_index(g, [&](auto pixel_size) {
    launch_items("max_pool2d", max_kernel<S, decltype(pixel_size)>, outputs(g), stream, g, pixel_size, outputs(g), x, y,
                 Positions(positions));
  });
}

template <class S, class Position>
void max_backward(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, Stream stream) {
  with_index(g, [&](auto pixel_size) {
    launch_items("max_pool2d_backward", max_backward_kernel<S, decltype(pixel_size)>, inputs(g), stream, g, pixel_size,
                 inputs(g), gy, Positions(positions), gx);
  });
}

template <class S, class Position>
void max_gather(const Pool2dGeometry& g, const S* x, const Position* positions, S* y, Stream stream) {
  with_index(g, [&](auto pixel_size) {
    launch_items("max_pool2d_gather", gather_kernel<S, decltype(pixel_size)>, outputs(g), stream, g, pixel_size,
                 outputs(g), x, Positions(positions), y);
  });
}

template <class S>
void avg_forward(const Pool2dGeometry& g, Divisor divisor, const S* x, S* y, Stream stream) {
  with_index(g, [&](auto pixel_size) {
    launch_items("avg_pool2d", avg_kernel<S, decltype(pixel_size)>, outputs(g), stream, g, pixel_size, outputs(g),
                 divisor, x, y);
  });
}

template <class S>
void avg_backward(const Pool2dGeometry& g, Divisor divisor, const S* gy, S* gx, Stream stream) {
  with_index(g, [&](auto pixel_size) {
    launch_items("avg_pool2d_backward", avg_backward_kernel<S, decltype(pixel_size)>, inputs(g), stream, g, pixel_size,
                 inputs(g), divisor, gy, gx);
  });
}

template <class S>
void max_unpool(const Unpool2dGeometry& g, const S* x, const int64_t* indices, int64_t* sources, S* y, Stream stream) {
  const int64_t pixel_size = g.layout == Layout::channels_last ? g.c : 1;
  const int64_t inputs = g.n * g.c * g.in, outputs = g.n * g.c * g.out;
  launch_items("max_unpool2d clear", no_source_kernel, outputs, stream, outputs, sources);
  launch_items("max_unpool2d find", source_kernel, inputs, stream, g.in, g.out, pixel_size, inputs, indices, sources);
  launch_items("max_unpool2d take", take_kernel<S>, outputs, stream, outputs, x, sources, y);
}

}  // namespace

template <class S>
void add_pool2d(Kernels<S>& kernels) {
  kernels.max_pool2d = {max_forward<S, uint8_t>, max_backward<S, uint8_t>, max_gather<S, uint8_t>};
  kernels.max_pool2d_wide = {max_forward<S, int32_t>, max_backward<S, int32_t>, max_gather<S, int32_t>};
  kernels.avg_pool2d = avg_forward<S>;
  kernels.avg_pool2d_backward = avg_backward<S>;
  kernels.max_unpool2d = max_unpool<S>;
}

template void add_pool2d(Kernels<float>&);
template void add_pool2d(Kernels<double>&);
template void add_pool2d(Kernels<BFloat16>&);
template void add_pool2d(Kernels<Float16>&);

}  // namespace cnnops::cuda
