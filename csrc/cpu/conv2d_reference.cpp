// Convolution as the formula says it: seven plain loops, no tricks. This is the rung all others are measured against.
//
//   forward      y[n,k,oh,ow]   = bias[k] + sum over c, kh, kw   of x[n,c,ih,iw] * w[k,c,kh,kw]
//   grad_input   gx[n,c,ih,iw]  =           sum over k, kh, kw   of gy[n,k,oh,ow] * w[k,c,kh,kw]
//   grad_weight  gw[k,c,kh,kw]  =           sum over n, oh, ow   of gy[n,k,oh,ow] * x[n,c,ih,iw]
//
// where ih = oh*stride - padding + kh*dilation, iw likewise. Beyond the image stands the pixel that the border shows
// there (pixel_at() in ../geometry.h); where it shows none, x counts as absent, not as a zero to be multiplied. Every
// sum is kept in double and rounded when it is whole (to 16 bits by way of float), so this is also the most accurate
// algorithm. Tensors are read through strides, so both layouts are alike to it. A task is one plane of outputs
// (forward, grad_input) or one (k, c) filter plane (grad_weight). Refuses nothing.
#include "../correlation.h"
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// Forward and grad_input are one loop nest: `rows` are the channels written, `channels` those summed over.
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& t, Sum<S>*, int64_t begin, int64_t end) {
  constexpr bool forward = pass == Pass::forward;
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  const int64_t rows = forward ? k_group : c_group, channels = forward ? c_group : k_group;
  const int64_t in_channels = forward ? g.c : g.k, out_channels = forward ? g.k : g.c;
  const Strides in(g.layout, in_channels, forward ? g.in : g.out), out(g.layout, out_channels, forward ? g.out : g.in);
  const Strides weight(g.layout, c_group, g.kernel);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / out_channels, row = task % out_channels, group = row / rows;
    const S* x = t.a + n * in.n + group * channels * in.c;
    S* y = t.out + n * out.n + row * out.c;
    for (int64_t class_h = 0; class_h < axis_classes(g, pass, 0); ++class_h)
      for (int64_t class_w = 0; class_w < axis_classes(g, pass, 1); ++class_w) {
        const Axis h = make_axis(g, pass, 0, class_h), w = make_axis(g, pass, 1, class_w);
        for (int64_t i = 0; i < h.count; ++i)
          for (int64_t j = 0; j < w.count; ++j) {
            double sum = t.bias ? double(value(t.bias[row])) : 0.0;
            for (int64_t c = 0; c < channels; ++c) {
              const S* filter = forward ? t.b + row * weight.n + c * weight.c
                                        : t.b + (group * k_group + c) * weight.n + row % rows * weight.c;
              for (int64_t th = 0; th < h.taps; ++th)
                for (int64_t tw = 0; tw < w.taps; ++tw) {
                  const int64_t ih = pixel_at(i * h.in_step + h.offset0 + th * h.offset_step, h.in_size, g.border);
                  const int64_t iw = pixel_at(j * w.in_step + w.offset0 + tw * w.offset_step, w.in_size, g.border);
                  if (ih < 0 || iw < 0) continue;
                  const int64_t kh = h.k0 + th * h.k_step, kw = w.k0 + tw * w.k_step;
                  sum += double(value(x[c * in.c + ih * in.h + iw * in.w])) *
                         double(value(filter[kh * weight.h + kw * weight.w]));
                }
            }
            y[(h.first + i * h.step) * out.h + (w.first + j * w.step) * out.w] = rounded<S>(Sum<S>(sum));
          }
      }
  }
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& t, Sum<S>*, int64_t begin, int64_t end) {
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  const Strides gy(g.layout, g.k, g.out), x(g.layout, g.c, g.in), gw(g.layout, c_group, g.kernel);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k = task / c_group, c = task % c_group;
    const S *grad = t.a + k * gy.c, *input = t.b + (k / k_group * c_group + c) * x.c;
    for (int64_t kh = 0; kh < g.kernel[0]; ++kh)
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
        double sum = 0;
        for (int64_t n = 0; n < g.n; ++n)
          for (int64_t oh = 0; oh < g.out[0]; ++oh)
            for (int64_t ow = 0; ow < g.out[1]; ++ow) {
              const int64_t ih = pixel_at(oh * g.stride[0] - g.padding[0] + kh * g.dilation[0], g.in[0], g.border);
              const int64_t iw = pixel_at(ow * g.stride[1] - g.padding[1] + kw * g.dilation[1], g.in[1], g.border);
              if (ih < 0 || iw < 0) continue;
              sum += double(value(grad[n * gy.n + oh * gy.h + ow * gy.w])) *
                     double(value(input[n * x.n + ih * x.h + iw * x.w]));
            }
        t.out[k * gw.n + c * gw.c + kh * gw.h + kw * gw.w] = rounded<S>(Sum<S>(sum));
      }
  }
}

const char* refuses(const Conv2dGeometry&, Pass) { return nullptr; }
int64_t no_workspace(const Conv2dGeometry&) { return 0; }

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_reference() {
  return {"reference",
          "plain loops, sums in double; any geometry",
          refuses,
          {[](const Conv2dGeometry& g) { return g.n * g.k; }, no_workspace, correlate<S, Pass::forward>},
          {[](const Conv2dGeometry& g) { return g.n * g.c; }, no_workspace, correlate<S, Pass::grad_input>},
          {[](const Conv2dGeometry& g) { return g.k * (g.c / g.groups); }, no_workspace, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_reference();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_reference();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_reference();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_reference();

}  // namespace cnnops::cpu::CNNOPS_ISA
