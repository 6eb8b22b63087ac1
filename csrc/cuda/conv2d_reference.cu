// Convolution as it is written down: one thread per output element, plain loops, every geometry.
//
//   forward      y[n,k,oh,ow]  = bias[k] + sum over c,kh,kw  of x[n,c,h,w] * w[k,c,kh,kw]
//   grad_input   gx[n,c,h,w]   = bias[c] + sum over k,kh,kw  of gy[n,k,oh,ow] * w[k,c,kh,kw]
//   grad_weight  gw[k,c,kh,kw] =           sum over n,oh,ow  of gy[n,k,oh,ow] * x[n,c,h,w]
//
// where h = oh*stride - padding + kh*dilation, w alike, and only places inside the tensors count, or those that the
// border shows (pixel_at). All sums are taken in double: this is the yardstick of the other algorithms, and what is
// left when they refuse. Outputs are numbered as they lie in memory, whatever the layout.
#include "conv2d.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

/// Where element number `item` of a tensor is, in the order of memory.
struct Place {
  int64_t n, c, h, w;

  __device__ Place(int64_t item, Layout layout, int64_t channels, int64_t height, int64_t width) {
    Digits digits(item);
    if (layout == Layout::channels_last) c = digits.next(channels);
    w = digits.next(width);
    h = digits.next(height);
    if (layout == Layout::contiguous) c = digits.next(channels);
    n = digits.rest();
  }
};

template <class S>
__global__ void forward_kernel(Conv2dGeometry g, Conv2dOperands<S> o) {
  const int64_t channels = g.c / g.groups, k_per_group = g.k / g.groups;
  const Strides<int64_t> x(g.layout, g.c, g.in[0], g.in[1]), weight(g.layout, channels, g.kernel[0], g.kernel[1]);
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(g.n * g.k * g.out[0] * g.out[1])) {
    const Place y(i, g.layout, g.k, g.out[0], g.out[1]);
    const S* image = o.a + y.n * x.n + y.c / k_per_group * channels * x.c;
    double sum = 0;
    CNNOPS_NO_UNROLL
    for (int64_t kh = 0; kh < g.kernel[0]; ++kh) {
      const int64_t h = pixel_at(y.h * g.stride[0] - g.padding[0] + kh * g.dilation[0], g.in[0], g.border);
      CNNOPS_NO_UNROLL
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
        const int64_t w = pixel_at(y.w * g.stride[1] - g.padding[1] + kw * g.dilation[1], g.in[1], g.border);
        if (h < 0 || w < 0) continue;
        const S *pixel = image + h * x.h + w * x.w, *tap = o.b + y.c * weight.n + kh * weight.h + kw * weight.w;
        for (int64_t c = 0; c < channels; ++c) {
          sum += static_cast<double>(value(pixel[c * x.c])) * value(tap[c * weight.c]);
        }
      }
    }
    o.out[i] = rounded<S>(static_cast<Sum<S>>(o.bias ? sum + value(o.bias[y.c]) : sum));
  }
}

template <class S>
__global__ void grad_input_kernel(Conv2dGeometry g, Conv2dOperands<S> o) {
  const int64_t channels = g.c / g.groups, k_per_group = g.k / g.groups;
  const Strides<int64_t> gy(g.layout, g.k, g.out[0], g.out[1]), weight(g.layout, channels, g.kernel[0], g.kernel[1]);
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(g.n * g.c * g.in[0] * g.in[1])) {
    const Place x(i, g.layout, g.c, g.in[0], g.in[1]);
    const int64_t k0 = x.c / channels * k_per_group;
    double sum = 0;
    CNNOPS_NO_UNROLL
    for (int64_t kh = 0; kh < g.kernel[0]; ++kh) {
      const int64_t h_strides = x.h + g.padding[0] - kh * g.dilation[0], oh = h_strides / g.stride[0];
      if (h_strides != oh * g.stride[0] || oh < 0 || oh >= g.out[0]) continue;
      CNNOPS_NO_UNROLL
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
        const int64_t w_strides = x.w + g.padding[1] - kw * g.dilation[1], ow = w_strides / g.stride[1];
        if (w_strides != ow * g.stride[1] || ow < 0 || ow >= g.out[1]) continue;
        const S* pixel = o.a + x.n * gy.n + k0 * gy.c + oh * gy.h + ow * gy.w;
        const S* tap = o.b + k0 * weight.n + x.c % channels * weight.c + kh * weight.h + kw * weight.w;
        for (int64_t k = 0; k < k_per_group; ++k) {
          sum += static_cast<double>(value(pixel[k * gy.c])) * value(tap[k * weight.n]);
        }
      }
    }
    o.out[i] = rounded<S>(static_cast<Sum<S>>(o.bias ? sum + value(o.bias[x.c]) : sum));
  }
}

template <class S>
__global__ void grad_weight_kernel(Conv2dGeometry g, Conv2dOperands<S> o) {
  const int64_t channels = g.c / g.groups, k_per_group = g.k / g.groups;
  const Strides<int64_t> x(g.layout, g.c, g.in[0], g.in[1]), gy(g.layout, g.k, g.out[0], g.out[1]);
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(g.k * channels * g.kernel[0] * g.kernel[1])) {
    const Place weight(i, g.layout, channels, g.kernel[0], g.kernel[1]);
    const int64_t k = weight.n, c = k / k_per_group * channels + weight.c;
    double sum = 0;
    CNNOPS_NO_UNROLL
    for (int64_t n = 0; n < g.n; ++n) {
      CNNOPS_NO_UNROLL
      for (int64_t oh = 0; oh < g.out[0]; ++oh) {
        const int64_t h = pixel_at(oh * g.stride[0] - g.padding[0] + weight.h * g.dilation[0], g.in[0], g.border);
        if (h < 0) continue;
        for (int64_t ow = 0; ow < g.out[1]; ++ow) {
          const int64_t w = pixel_at(ow * g.stride[1] - g.padding[1] + weight.w * g.dilation[1], g.in[1], g.border);
          if (w < 0) continue;
          sum += static_cast<double>(value(o.a[n * gy.n + k * gy.c + oh * gy.h + ow * gy.w])) *
                 value(o.b[n * x.n + c * x.c + h * x.h + w * x.w]);
        }
      }
    }
    o.out[i] = rounded<S>(static_cast<Sum<S>>(sum));
  }
}

template <class S>
void forward(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>*, Stream stream) {
  launch_items("conv2d_reference forward", forward_kernel<S>, g.n * g.k * g.out[0] * g.out[1], stream, g, o);
}

template <class S>
void grad_input(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>*, Stream stream) {
  launch_items("conv2d_reference grad_input", grad_input_kernel<S>, g.n * g.c * g.in[0] * g.in[1], stream, g, o);
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>*, Stream stream) {
  launch_items("conv2d_reference grad_weight", grad_weight_kernel<S>, weight_count(g), stream, g, o);
}

const char* refuses(const Conv2dGeometry&, Pass) { return nullptr; }

}  // namespace

template <class S>
Conv2dRow<S> conv2d_reference() {
  return {"reference",
          "one thread per output, plain loops, sums in double; every geometry",
          refuses,
          {no_workspace, forward<S>},
          {no_workspace, grad_input<S>},
          {no_workspace, grad_weight<S>}};
}

template Conv2dRow<float> conv2d_reference();
template Conv2dRow<double> conv2d_reference();
template Conv2dRow<BFloat16> conv2d_reference();
template Conv2dRow<Float16> conv2d_reference();

}  // namespace cnnops::cuda
