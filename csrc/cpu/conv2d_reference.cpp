// Convolution as the formula says it: seven plain loops, no tricks. This is the rung all others are measured against.
//
//   forward      y[n,k,oh,ow]   = bias[k] + sum over c, kh, kw   of x[n,c,ih,iw] * w[k,c,kh,kw]
//   grad_input   gx[n,c,ih,iw]  =           sum over k, kh, kw   of gy[n,k,oh,ow] * w[k,c,kh,kw]
//   grad_weight  gw[k,c,kh,kw]  =           sum over n, oh, ow   of gy[n,k,oh,ow] * x[n,c,ih,iw]
//
// where ih = oh*stride - padding + kh*dilation, iw likewise; whatever lies outside the image counts as absent, not as a
// zero to be multiplied. Every sum is kept in double and rounded once, so this is also the most accurate algorithm.
// A task is one plane of outputs (forward, grad_input) or one (k, c) filter plane (grad_weight). Refuses nothing.
#include "../correlation.h"
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// Forward and grad_input are one loop nest: `rows` are the channels written, `channels` those summed over.
template <class T, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& t, T*, int64_t begin, int64_t end) {
  constexpr bool forward = pass == Pass::forward;
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  const int64_t rows = forward ? k_group : c_group, channels = forward ? c_group : k_group;
  const int64_t in_channels = forward ? g.c : g.k, out_channels = forward ? g.k : g.c;
  const int64_t *in = forward ? g.in : g.out, *out = forward ? g.out : g.in;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / out_channels, row = task % out_channels, group = row / rows;
    const T* x = t.a + (n * in_channels + group * channels) * in[0] * in[1];
    T* y = t.out + task * out[0] * out[1];
    for (int64_t class_h = 0; class_h < axis_classes(g, pass, 0); ++class_h)
      for (int64_t class_w = 0; class_w < axis_classes(g, pass, 1); ++class_w) {
        const Axis h = make_axis(g, pass, 0, class_h), w = make_axis(g, pass, 1, class_w);
        for (int64_t i = 0; i < h.count; ++i)
          for (int64_t j = 0; j < w.count; ++j) {
            double sum = t.bias ? double(t.bias[row]) : 0.0;
            for (int64_t c = 0; c < channels; ++c)
              for (int64_t th = 0; th < h.taps; ++th)
                for (int64_t tw = 0; tw < w.taps; ++tw) {
                  const int64_t ih = i * h.in_step + h.offset0 + th * h.offset_step;
                  const int64_t iw = j * w.in_step + w.offset0 + tw * w.offset_step;
                  if (ih < 0 || ih >= h.in_size || iw < 0 || iw >= w.in_size) continue;
                  const int64_t kh = h.k0 + th * h.k_step, kw = w.k0 + tw * w.k_step;
                  const int64_t filter = forward ? row * c_group + c : (group * k_group + c) * c_group + row % rows;
                  sum += double(x[(c * in[0] + ih) * in[1] + iw]) *
                         double(t.b[(filter * g.kernel[0] + kh) * g.kernel[1] + kw]);
                }
            y[(h.first + i * h.step) * out[1] + w.first + j * w.step] = T(sum);
          }
      }
  }
}

template <class T>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<T>& t, T*, int64_t begin, int64_t end) {
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k = task / c_group, c = k / k_group * c_group + task % c_group;
    for (int64_t kh = 0; kh < g.kernel[0]; ++kh)
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
        double sum = 0;
        for (int64_t n = 0; n < g.n; ++n)
          for (int64_t oh = 0; oh < g.out[0]; ++oh)
            for (int64_t ow = 0; ow < g.out[1]; ++ow) {
              const int64_t ih = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
              const int64_t iw = ow * g.stride[1] - g.padding[1] + kw * g.dilation[1];
              if (ih < 0 || ih >= g.in[0] || iw < 0 || iw >= g.in[1]) continue;
              sum += double(t.a[((n * g.k + k) * g.out[0] + oh) * g.out[1] + ow]) *
                     double(t.b[((n * g.c + c) * g.in[0] + ih) * g.in[1] + iw]);
            }
        t.out[(task * g.kernel[0] + kh) * g.kernel[1] + kw] = T(sum);
      }
  }
}

const char* refuses(const Conv2dGeometry&, Pass) { return nullptr; }
int64_t no_workspace(const Conv2dGeometry&) { return 0; }

}  // namespace

template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_reference() {
  return {"reference",
          "plain loops, sums in double; any geometry",
          refuses,
          {[](const Conv2dGeometry& g) { return g.n * g.k; }, no_workspace, correlate<T, Pass::forward>},
          {[](const Conv2dGeometry& g) { return g.n * g.c; }, no_workspace, correlate<T, Pass::grad_input>},
          {[](const Conv2dGeometry& g) { return g.k * (g.c / g.groups); }, no_workspace, grad_weight<T>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_reference();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_reference();

}  // namespace cnnops::cpu::CNNOPS_ISA
