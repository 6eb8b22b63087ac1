// What all pooling shares: where windows are, where a thread's result is, and how many numbers it takes at once.
//
// Pooling is bound by memory: what counts is that neighbouring threads take neighbouring elements, many bytes at once, and
// that finding one's place is cheap. So results are numbered as they lie in memory, in either layout, indices take 32 bits
// (`Index`) unless the tensors are larger, and a thread finds its place once for several results where it can:
//
//   across(g, ...)     channels_last: a vector of 16 bytes of one pixel's channels
//   tiled(g, ...)      contiguous, windows of 2x2 side by side: those under one vector of each of two rows
//
// Each result is computed alike in all ways: its bits do not show which was taken.
#pragma once

#include "device.h"

namespace cnnops::cuda {

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
inline int64_t pixel_size(const Pool2dGeometry& g) { return g.layout == Layout::channels_last ? g.c : 1; }

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

/// Whether each pixel is a row of whole vectors, at addresses that let them be read and written as such.
template <class S, class... T>
bool across(const Pool2dGeometry& g, const S* first, const T*... others) {
  return pixel_size(g) % Vector<S>::size == 0 && aligned<Vector<S>::size>(first, others...);
}

/// Whether windows of 2x2 tile the planes, and rows of `large`, the tensor with four numbers to each of the `small` ones,
/// are whole vectors: then vectors 2*row*columns + column of `large` and the next row's lie over half a vector of outputs.
template <class S, class... T>
bool tiled(const Pool2dGeometry& g, const S* large, const T*... small) {
  constexpr int kWidth = Vector<S>::size;
  bool tiles = !g.adaptive && pixel_size(g) == 1 && g.in[1] % kWidth == 0;
  for (int dim = 0; dim < 2; ++dim) {
    tiles = tiles && g.kernel[dim] == 2 && g.stride[dim] == 2 && g.padding[dim] == 0 && g.dilation[dim] == 1 &&
            g.in[dim] == 2 * g.out[dim];
  }
  return tiles && aligned<kWidth>(large) && aligned<kWidth / 2>(small...);
}

/// Where the upper of the two vectors over outputs item*kWidth/2, ... begins.
template <int kWidth, class Index>
__device__ inline Index tile_start(int64_t item, Index columns) {
  const Index first = static_cast<Index>(item) * kWidth;
  return first + first / columns * columns;
}

inline int64_t inputs(const Pool2dGeometry& g) { return g.n * g.c * g.in[0] * g.in[1]; }
inline int64_t outputs(const Pool2dGeometry& g) { return g.n * g.c * g.out[0] * g.out[1]; }

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

/// For pool2d.cu: the averages are in a file of their own.
template <class S>
void add_avg_pool2d(Kernels<S>&);

}  // namespace cnnops::cuda
