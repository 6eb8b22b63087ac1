// What all pooling shares: where windows are, where a thread's result is, and how many numbers it takes at once.
//
// Pooling is bound by memory: what counts is that neighbouring threads take neighbouring elements, many bytes at once,
// and that finding one's place is cheap. So results are numbered as they lie in memory, in either layout, indices take
// 32 bits (`Index`) unless the tensors are larger, and a thread finds its place once for several results where it can:
//
//   across(g, ...)       channels_last: a vector of 16 bytes of one pixel's channels
//   tiled(g, ...)        contiguous, windows of 2x2 side by side: those under one vector of each of two rows
//   along_rows(g, ...)   contiguous, backward: a vector of a row's inputs
//
// Each result is computed alike in all ways: its bits do not show which was taken.
#pragma once

#include <type_traits>

#include "device.h"

namespace cnnops::cuda {

/// One axis of a pooling: output `o` sees inputs start(o) + k*dilation, for k < taps(o). The commonest windows have a
/// type of their own (kKernel, kStride; never dilated), in which divisions are shifts and loops over taps have no ends
/// to test.
template <class Index_, int kKernel_ = 0, int kStride_ = 0>
struct Windows {
  using Index = Index_;
  static constexpr int kKernel = kKernel_, kStride = kStride_;
  static constexpr bool kFixed = kKernel > 0;
  Index in, out, kernel, stride, padding, dilation;
  bool adapts;

  __device__ Windows(const Pool2dGeometry& g, int dim)
      : in(static_cast<Index>(g.in[dim])),
        out(static_cast<Index>(g.out[dim])),
        kernel(kFixed ? kKernel : static_cast<Index>(g.kernel[dim])),
        stride(kFixed ? kStride : static_cast<Index>(g.stride[dim])),
        padding(static_cast<Index>(g.padding[dim])),
        dilation(kFixed ? 1 : static_cast<Index>(g.dilation[dim])),
        adapts(g.adaptive) {}

  __device__ bool adaptive() const { return !kFixed && hidden(adapts); }
  __device__ bool inside(Index i) const { return 0 <= i && i < in; }
  __device__ Index start(Index o) const { return adaptive() ? o * in / out : o * stride - padding; }
  __device__ Index taps(Index o) const { return adaptive() ? ((o + 1) * in + out - 1) / out - start(o) : kernel; }

  /// The first tap of a window that is not before the image.
  __device__ Index first_tap(Index start) const { return start < 0 ? (dilation - 1 - start) / dilation : 0; }

  /// The outputs whose windows may cover input i: [first, last]. With dilation, see tap().
  __device__ Index first_over(Index i) const {
    if (adaptive()) return i * out / in;
    const Index from = i + padding - (kernel - 1) * dilation;
    return from <= 0 ? 0 : divided(from + stride - 1);
  }
  __device__ Index last_over(Index i) const {
    return adaptive() ? ((i + 1) * out - 1) / in : smaller<Index>(divided(i + padding), out - 1);
  }

  /// The tap through which output o sees input i, -1 for none; o must be one of the above.
  __device__ Index tap(Index o, Index i) const {
    const Index distance = i - start(o);
    if (kFixed || hidden(dilation == 1)) return distance;
    return distance % dilation == 0 ? distance / dilation : -1;
  }

  /// How many places of window o the average counts along this axis.
  __device__ Index counted(Index o, bool with_padding) const {
    const Index begin = start(o), end = smaller<Index>(begin + taps(o), in + padding);
    return with_padding ? end - begin : smaller(end, in) - larger<Index>(begin, 0);
  }

 private:
  /// i / stride for i >= 0, which the compiler cannot know.
  __device__ Index divided(Index i) const {
    return kFixed ? static_cast<Index>(static_cast<std::make_unsigned_t<Index>>(i) / kStride_) : i / stride;
  }
};

/// see(pixel, tap) for those pixels of window (oh, ow) that are in the image, in scan order.
template <class W, class See>
__device__ inline void each_pixel(const W& height, const W& width, typename W::Index oh, typename W::Index ow,
                                  const See& see) {
  using Index = typename W::Index;
  const Index h0 = height.start(oh), w0 = width.start(ow);
  if constexpr (W::kFixed) {  // inner windows: nothing to test, so that all is read at once
    if (h0 >= 0 && w0 >= 0 && h0 + W::kKernel <= height.in && w0 + W::kKernel <= width.in) {
      CNNOPS_UNROLL
      for (int kh = 0; kh < W::kKernel; ++kh) {
        CNNOPS_UNROLL
        for (int kw = 0; kw < W::kKernel; ++kw) see((h0 + kh) * width.in + w0 + kw, kh * W::kKernel + kw);
      }
      return;
    }
  }
  const Index taps_h = height.taps(oh), taps_w = width.taps(ow), first_w = width.first_tap(w0);
  CNNOPS_NO_UNROLL
  for (Index kh = height.first_tap(h0); kh < taps_h; ++kh) {
    const Index h = h0 + kh * height.dilation;
    if (h >= height.in) break;
    CNNOPS_NO_UNROLL
    for (Index kw = first_w; kw < taps_w; ++kw) {
      const Index w = w0 + kw * width.dilation;
      if (w >= width.in) break;
      see(h * width.in + w, kh * width.kernel + kw);
    }
  }
}

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

/// Whether rows of the input are whole vectors, likewise.
template <class S>
bool along_rows(const Pool2dGeometry& g, const S* gx) {
  return pixel_size(g) == 1 && g.in[1] % Vector<S>::size == 0 && aligned<Vector<S>::size>(gx);
}

/// Whether all windows are of kernel x kernel, `stride` apart.
inline bool square(const Pool2dGeometry& g, int64_t kernel, int64_t stride) {
  bool all = !g.adaptive;
  for (int dim = 0; dim < 2; ++dim) {
    all = all && g.kernel[dim] == kernel && g.stride[dim] == stride && g.dilation[dim] == 1;
  }
  return all;
}

/// Whether windows of 2x2 tile the planes, and rows of `large`, the tensor with four numbers to each of the `small`
/// ones, are whole vectors: then vectors 2*row*columns + column of `large` and the next row's lie over half a vector of
/// outputs.
template <class S, class... T>
bool tiled(const Pool2dGeometry& g, const S* large, const T*... small) {
  constexpr int kWidth = Vector<S>::size;
  bool tiles = square(g, 2, 2) && pixel_size(g) == 1 && g.in[1] % kWidth == 0;
  for (int dim = 0; dim < 2; ++dim) tiles = tiles && g.padding[dim] == 0 && g.in[dim] == 2 * g.out[dim];
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

/// Calls start(std::type_identity<W>), with the Windows that fit: fixed ones for what networks have, in 32 bits only.
template <class Start>
void with_windows(const Pool2dGeometry& g, const Start& start) {
  with_index(g, [&](auto pixel_size) {
    using Index = decltype(pixel_size);
    if constexpr (sizeof(Index) == 4) {
      if (square(g, 2, 2)) return start(std::type_identity<Windows<Index, 2, 2>>{});
      if (square(g, 3, 2)) return start(std::type_identity<Windows<Index, 3, 2>>{});
    }
    start(std::type_identity<Windows<Index>>{});
  });
}

/// For pool2d.cu: the averages are in a file of their own.
template <class S>
void add_avg_pool2d(Kernels<S>&);

}  // namespace cnnops::cuda
