// Convolution as it is written down: one thread per output element, plain loops, every geometry.
//
//   forward      y[n,k,oh,ow]  = bias[k] + sum over c,kh,kw  of x[n,c,h,w] * w[k,c,kh,kw]
//   grad_input   gx[n,c,h,w]   = sum over k,kh,kw            of gy[n,k,oh,ow] * w[k,c,kh,kw]
//   grad_weight  gw[k,c,kh,kw] = sum over n,oh,ow            of gy[n,k,oh,ow] * x[n,c,h,w]
//
// where h = oh*stride - padding + kh*dilation, w alike, and only places inside the tensors count. All sums are taken in
// double: this is the yardstick of the other algorithms, and what is left when they refuse.
#include "conv2d.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

__device__ inline bool inside(int64_t i, int64_t size) { return 0 <= i && i < size; }

template <class T>
__global__ void forward_kernel(Conv2dGeometry g, Conv2dOperands<T> o) {
  const int64_t channels = g.c / g.groups, k_per_group = g.k / g.groups;
  for (int64_t i : Items(g.n * g.k * g.out[0] * g.out[1])) {
    Digits digits(i);
    const int64_t ow = digits.next(g.out[1]), oh = digits.next(g.out[0]), k = digits.next(g.k), n = digits.rest();
    const T* x = o.a + (n * g.c + k / k_per_group * channels) * g.in[0] * g.in[1];
    const T* weight = o.b + k * channels * g.kernel[0] * g.kernel[1];
    double sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t kh = 0; kh < g.kernel[0]; ++kh) {
        for (int64_t kw = 0; kw < g.kernel[1]; ++kw, ++weight) {
          const int64_t h = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
          const int64_t w = ow * g.stride[1] - g.padding[1] + kw * g.dilation[1];
          if (!inside(h, g.in[0]) || !inside(w, g.in[1])) continue;
          sum += static_cast<double>(x[(c * g.in[0] + h) * g.in[1] + w]) * *weight;
        }
      }
    }
    o.out[i] = static_cast<T>(o.bias ? sum + o.bias[k] : sum);
  }
}

template <class T>
__global__ void grad_input_kernel(Conv2dGeometry g, Conv2dOperands<T> o) {
  const int64_t channels = g.c / g.groups, k_per_group = g.k / g.groups;
  for (int64_t i : Items(g.n * g.c * g.in[0] * g.in[1])) {
    Digits digits(i);
    const int64_t w = digits.next(g.in[1]), h = digits.next(g.in[0]), c = digits.next(g.c), n = digits.rest();
    const int64_t k_begin = c / channels * k_per_group;
    double sum = 0;
    for (int64_t k = k_begin; k < k_begin + k_per_group; ++k) {
      const T* gy = o.a + (n * g.k + k) * g.out[0] * g.out[1];
      const T* weight = o.b + (k * channels + c % channels) * g.kernel[0] * g.kernel[1];
      for (int64_t kh = 0; kh < g.kernel[0]; ++kh) {
        for (int64_t kw = 0; kw < g.kernel[1]; ++kw, ++weight) {
          const int64_t h_strides = h + g.padding[0] - kh * g.dilation[0], oh = h_strides / g.stride[0];
          const int64_t w_strides = w + g.padding[1] - kw * g.dilation[1], ow = w_strides / g.stride[1];
          if (h_strides != oh * g.stride[0] || !inside(oh, g.out[0])) continue;
          if (w_strides != ow * g.stride[1] || !inside(ow, g.out[1])) continue;
          sum += static_cast<double>(gy[oh * g.out[1] + ow]) * *weight;
        }
      }
    }
    o.out[i] = static_cast<T>(sum);
  }
}

template <class T>
__global__ void grad_weight_kernel(Conv2dGeometry g, Conv2dOperands<T> o) {
  const int64_t channels = g.c / g.groups, k_per_group = g.k / g.groups;
  for (int64_t i : Items(g.k * channels * g.kernel[0] * g.kernel[1])) {
    Digits digits(i);
    const int64_t kw = digits.next(g.kernel[1]), kh = digits.next(g.kernel[0]);
    const int64_t c = digits.next(channels), k = digits.rest();
    double sum = 0;
    for (int64_t n = 0; n < g.n; ++n) {
      const T* gy = o.a + (n * g.k + k) * g.out[0] * g.out[1];
      const T* x = o.b + (n * g.c + k / k_per_group * channels + c) * g.in[0] * g.in[1];
      for (int64_t oh = 0; oh < g.out[0]; ++oh) {
        for (int64_t ow = 0; ow < g.out[1]; ++ow) {
          const int64_t h = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
          const int64_t w = ow * g.stride[1] - g.padding[1] + kw * g.dilation[1];
          if (!inside(h, g.in[0]) || !inside(w, g.in[1])) continue;
          sum += static_cast<double>(gy[oh * g.out[1] + ow]) * x[h * g.in[1] + w];
        }
      }
    }
    o.out[i] = static_cast<T>(sum);
  }
}

template <class T>
void forward(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T*, Stream stream) {
  launch_items("conv2d_reference forward", forward_kernel<T>, g.n * g.k * g.out[0] * g.out[1], stream, g, o);
}

template <class T>
void grad_input(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T*, Stream stream) {
  launch_items("conv2d_reference grad_input", grad_input_kernel<T>, g.n * g.c * g.in[0] * g.in[1], stream, g, o);
}

template <class T>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T*, Stream stream) {
  const int64_t weights = g.k * (g.c / g.groups) * g.kernel[0] * g.kernel[1];
  launch_items("conv2d_reference grad_weight", grad_weight_kernel<T>, weights, stream, g, o);
}

const char* refuses(const Conv2dGeometry&, Pass) { return nullptr; }

int64_t no_workspace(const Conv2dGeometry&) { return 0; }

}  // namespace

template <class T>
Conv2dRow<T> conv2d_reference() {
  return {"reference",
          "one thread per output, plain loops, sums in double; every geometry",
          refuses,
          {no_workspace, forward<T>},
          {no_workspace, grad_input<T>},
          {no_workspace, grad_weight<T>}};
}

template Conv2dRow<float> conv2d_reference();
template Conv2dRow<double> conv2d_reference();

}  // namespace cnnops::cuda
