// The shapes of an operation as plain integers: everything a kernel needs to know besides its pointers.
//
// A geometry is made once per call, by checks.h, from arguments that were found to be right. It is a template only so
// that the same arithmetic serves real sizes (int64_t) and torch.compile's symbolic ones; kernels use the int64_t form.
// Height comes before width, always; a pair {h, w} is indexed 0 for height and 1 for width.
#pragma once

#include <cstdint>

#ifndef CNNOPS_HOST_DEVICE
#define CNNOPS_HOST_DEVICE  // nvcc's device.h defines it as __host__ __device__
#endif

namespace cnnops {

/// Which of convolution's three bilinear operators is meant. Each is the derivative of the other two.
enum class Pass { forward, grad_input, grad_weight };

/// How the tensors of an operation lie in memory: (n, c, h, w) or (n, h, w, c), the last axis densest.
enum class Layout { contiguous, channels_last };

/// What lies beyond the border of an image of `size` pixels: nothing; or the image mirrored at the outermost pixel's
/// middle; that pixel, on and on; or the image again.
enum class Border { zeros, reflect, replicate, circular };

/// y[n,k,oh,ow] = bias[k] + sum over c, kh, kw of
///     x[n, g*C/G + c, oh*stride - padding + kh*dilation, ow*stride - padding + kw*dilation] * w[k,c,kh,kw]
/// where g = k / (K/G) is the group of output channel k, and `border` says what x is outside its image. `padding` is
/// what comes above and to the left; how much there is below and to the right shows in the size of y alone.
///
/// Kernels of grad_input see Border::zeros only: the gradient beyond other borders is folded back in a step of its own.
template <class Int>
struct BasicConv2dGeometry {
  Int n, c, k;        // batch, input channels, output channels (of all groups together)
  int64_t groups;     // G: divides c and k
  Int in[2], out[2];  // H, W of x and OH, OW of y
  Int kernel[2];      // KH, KW
  int64_t stride[2], padding[2], dilation[2];
  Layout layout;
  Layout filters;  // how the weight lies: as all the rest, unless the algorithm reads others where they are
  Border border;
};
using Conv2dGeometry = BasicConv2dGeometry<int64_t>;

/// Whether there is one window, as large as the image, as in a fully connected layer.
static inline bool is_connected(const Conv2dGeometry& g) {
  bool connected = true;
  for (int dim = 0; dim < 2; ++dim)
    connected &= g.kernel[dim] == g.in[dim] && (g.dilation[dim] == 1 || g.kernel[dim] == 1) && g.out[dim] == 1 &&
                 g.padding[dim] == 0;
  return connected;
}

/// Whether what a 1x1 kernel sees for neighbouring rows of a plane's results follows each other in memory.
static inline bool rows_adjoin(const Conv2dGeometry& g) {
  return g.stride[0] * g.stride[1] == 1 && g.out[1] == g.in[1];
}

/// Of an input with its border written out, which is plain: what the gradient of an input with a border starts from.
static inline Conv2dGeometry written_out(Conv2dGeometry g) {
  if (g.border == Border::zeros) return g;
  g.border = Border::zeros;
  for (int dim = 0; dim < 2; ++dim) {
    g.padding[dim] = 0;
    g.in[dim] = (g.out[dim] - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1;
  }
  return g;
}

/// A window slides over each plane of x: output (oh, ow) sees the inputs (oh*stride - padding + kh*dilation, ...).
/// Adaptive pooling cuts each axis into `out` windows of about the same size instead, window o from floor(o*in/out) to
/// ceil((o+1)*in/out): then `kernel` is the largest window's size, and stride, padding and dilation are 1, 0, 1.
template <class Int>
struct BasicPool2dGeometry {
  Int n, c;  // planes are independent: kernels see n*c of them
  Int in[2], out[2];
  Int kernel[2];
  int64_t stride[2], padding[2], dilation[2];
  Layout layout;
  bool adaptive;
};
using Pool2dGeometry = BasicPool2dGeometry<int64_t>;

/// What average pooling divides its sums by: the window's size clipped to the input, or to input + padding
/// (count_include_pad), or a number of the caller's own (divisor_override, 0 for none).
struct Divisor {
  bool count_include_pad;
  int64_t divisor_override;
};

/// Max unpooling: planes of `in` numbers, each put at its index into a plane of `out` zeros. Of numbers with the same
/// index the last stays.
struct Unpool2dGeometry {
  int64_t n, c, in, out;
  Layout layout;
};

/// How far apart neighbours along each axis of an (n, c, h, w) tensor are in memory; a weight's n and c are its k and
/// c. Index holds what is within an image.
template <class Index = int64_t>
struct Strides {
  int64_t n;
  Index c, h, w;

  Strides() = default;
  CNNOPS_HOST_DEVICE Strides(Layout layout, int64_t channels, int64_t height, int64_t width)
      : n(channels * height * width),
        c(static_cast<Index>(layout == Layout::contiguous ? height * width : 1)),
        h(static_cast<Index>(layout == Layout::contiguous ? width : width * channels)),
        w(static_cast<Index>(layout == Layout::contiguous ? 1 : channels)) {}
  Strides(Layout layout, int64_t channels, const int64_t* size) : Strides(layout, channels, size[0], size[1]) {}
};

/// The pixel that position i of an axis shows, for i beyond [0, size): -1 for none. Where it shows the
/// image again or mirrored, i is at most `size` away.
CNNOPS_HOST_DEVICE static inline int64_t pixel_at(int64_t i, int64_t size, Border border) {
  if (i >= 0 && i < size) return i;
  switch (border) {
    case Border::reflect:
      return i < 0 ? -i : 2 * (size - 1) - i;
    case Border::replicate:
      return i < 0 ? 0 : size - 1;
    case Border::circular:
      return i < 0 ? i + size : i - size;
    default:
      return -1;
  }
}

}  // namespace cnnops
