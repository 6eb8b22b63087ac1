// The shapes of an operation as plain integers: everything a kernel needs to know besides its pointers.
//
// A geometry is made once per call, by checks.h, from arguments that were found to be right. It is a template only so
// that the same arithmetic serves real sizes (int64_t) and torch.compile's symbolic ones; kernels use the int64_t form.
// Height comes before width, always; a pair {h, w} is indexed 0 for height and 1 for width.
#pragma once

#include <cstdint>

namespace cnnops {

/// Which of convolution's three bilinear operators is meant. Each is the derivative of the other two.
enum class Pass { forward, grad_input, grad_weight };

/// y[n,k,oh,ow] = bias[k] + sum over c, kh, kw of
///     x[n, g*C/G + c, oh*stride - padding + kh*dilation, ow*stride - padding + kw*dilation] * w[k,c,kh,kw]
/// with x zero outside its borders and g = k / (K/G) the group of output channel k.
template <class Int>
struct BasicConv2dGeometry {
  Int n, c, k;        // batch, input channels, output channels (of all groups together)
  int64_t groups;     // G: divides c and k
  Int in[2], out[2];  // H, W of x and OH, OW of y
  Int kernel[2];      // KH, KW
  int64_t stride[2], padding[2], dilation[2];
};
using Conv2dGeometry = BasicConv2dGeometry<int64_t>;

/// A window slides over each plane of x: output (oh, ow) sees the inputs (oh*stride - padding + kh*dilation, ...).
template <class Int>
struct BasicPool2dGeometry {
  Int n, c;  // planes are independent: kernels see n*c of them
  Int in[2], out[2];
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};
using Pool2dGeometry = BasicPool2dGeometry<int64_t>;

/// What average pooling divides its sums by: the window's size clipped to the input, or to input + padding
/// (count_include_pad), or a number of the caller's own (divisor_override, 0 for none).
struct Divisor {
  bool count_include_pad;
  int64_t divisor_override;
};

}  // namespace cnnops
