// From arguments to a geometry, or to an error: every check of the package, once, for CPU, CUDA and meta tensors alike.
//
// Everything is a template over the type of a size: int64_t for real tensors, c10::SymInt for torch.compile's fake
// ones. Messages name the values that do not fit; where torch refuses the same thing, the exception's type is torch's.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <utility>

#include "../geometry.h"

namespace cnnops {

using at::IntArrayRef;
using at::Tensor;

template <class Int>
c10::ArrayRef<Int> sizes_of(const Tensor& t) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return t.sizes();
  } else {
    return t.sym_sizes();
  }
}

template <class Int>
Tensor empty(c10::ArrayRef<Int> sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  if constexpr (std::is_same_v<Int, int64_t>) {
    return at::empty(sizes, options, format);
  } else {
    return at::empty_symint(sizes, options, format);
  }
}

using Named = std::pair<const char*, const Tensor&>;

/// All tensors have a dtype that has kernels, the same one, and live on one device.
inline void check_alike(const char* op, std::initializer_list<Named> tensors) {
  const auto& [first_name, first] = *tensors.begin();
  const auto dtype = first.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble, op, ": no kernel for ", first_name,
                              " of dtype ", dtype, "; float32 and float64 work");
  for (const auto& [name, t] : tensors) {
    if (!t.defined()) continue;
    TORCH_CHECK(t.scalar_type() == dtype, op, ": ", first_name, " and ", name, " should have the same dtype, but have ",
                dtype, " and ", t.scalar_type());
    TORCH_CHECK(t.device() == first.device(), op, ": expected all tensors to be on the same device, but ", first_name,
                " is on ", first.device(), " and ", name, " is on ", t.device());
  }
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  TORCH_CHECK(t.dim() == dim, op, ": expected ", dim, "D ", name, ", but got ", t.dim(), "D of shape ", t.sym_sizes());
}

// Beyond these, sums and products of sizes might not fit 64 bits. Pooling's limit is torch's.
constexpr int64_t kMostStride = int64_t(1) << 62, kMostConv2d = int64_t(1) << 48, kMostPool2d = (int64_t(1) << 31) - 1;

/// A pair {h, w}, each at least `least` and at most `most`.
inline std::array<int64_t, 2> check_pair(const char* op, const char* name, IntArrayRef pair, int64_t least,
                                         int64_t most) {
  TORCH_CHECK(pair.size() == 2, op, ": expected ", name, " to be two integers {h, w}, but got ", pair);
  TORCH_CHECK(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be at least ", least, ", but got ", pair);
  TORCH_CHECK(pair[0] <= most && pair[1] <= most, op, ": ", name, " must be at most ", most, ", but got ", pair);
  return {pair[0], pair[1]};
}

template <class Int>
void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<Int> expected) {
  const c10::ArrayRef<Int> shape(expected.begin(), expected.size());
  TORCH_CHECK(sizes_of<Int>(t).equals(shape), op, ": expected ", name, " of shape ", shape, ", but got ",
              sizes_of<Int>(t));
}

/// The geometry of a convolution from the shapes of its input {n, c, h, w} and weight {k, c/groups, kh, kw}.
template <class Int>
BasicConv2dGeometry<Int> conv2d_geometry(const char* op, c10::ArrayRef<Int> input, c10::ArrayRef<Int> weight,
                                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                         int64_t groups) {
  BasicConv2dGeometry<Int> g{};
  const auto s = check_pair(op, "stride", stride, 1, kMostStride),
             p = check_pair(op, "padding", padding, 0, kMostConv2d),
             d = check_pair(op, "dilation", dilation, 1, kMostConv2d);
  TORCH_CHECK(groups >= 1, op, ": groups must be at least 1, but got ", groups);
  TORCH_CHECK(weight[0] >= groups && weight[0] % groups == 0, op, ": expected weight of shape ", weight,
              " to have output channels divisible by groups, but groups=", groups);
  TORCH_CHECK(weight[1] >= 1 && weight[2] >= 1 && weight[3] >= 1, op, ": weight must not be empty, but got shape ",
              weight);
  TORCH_CHECK(input[1] == weight[1] * groups, op, ": given groups=", groups, " and weight of shape ", weight,
              ", expected input of shape ", input, " to have ", weight[1] * groups, " channels, but got ", input[1]);
  g.n = input[0];
  g.c = input[1];
  g.k = weight[0];
  g.groups = groups;
  for (int dim = 0; dim < 2; ++dim) {
    g.in[dim] = input[2 + dim];
    g.kernel[dim] = weight[2 + dim];
    g.stride[dim] = s[dim];
    g.padding[dim] = p[dim];
    g.dilation[dim] = d[dim];
  }
  const Int padded[2] = {g.in[0] + 2 * g.padding[0], g.in[1] + 2 * g.padding[1]};
  const Int extent[2] = {(g.kernel[0] - 1) * g.dilation[0] + 1, (g.kernel[1] - 1) * g.dilation[1] + 1};
  TORCH_CHECK(g.in[0] >= 1 && g.in[1] >= 1, op, ": expected an input with a non-empty image, but got shape ", input);
  TORCH_CHECK(padded[0] >= extent[0] && padded[1] >= extent[1], op, ": calculated padded input size per channel: (",
              padded[0], " x ", padded[1], "), kernel size with dilation: (", extent[0], " x ", extent[1],
              "): the kernel can't be greater than the padded input");
  for (int dim = 0; dim < 2; ++dim) g.out[dim] = (padded[dim] - extent[dim]) / g.stride[dim] + 1;
  return g;
}

/// How many windows fit along an axis of pooling. With ceil_mode a last one may hang over the end, but it must start
/// within the input or its left padding.
template <class Int>
Int pool_output(const Int& in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
  const Int span = in + 2 * padding - dilation * (kernel - 1) - 1;
  // Rounds down for negative spans too, so that a window that does not fit gives no output.
  Int out = (span + (ceil_mode ? stride - 1 : 0) + stride) / stride;
  if (ceil_mode && (out - 1) * stride >= in + padding) out = out - 1;
  return out;
}

/// The geometry of pooling from the shape of its input {n, c, h, w}.
template <class Int>
BasicPool2dGeometry<Int> pool2d_geometry(const char* op, c10::ArrayRef<Int> input, IntArrayRef kernel_size,
                                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                         bool ceil_mode) {
  BasicPool2dGeometry<Int> g{};
  const auto k = check_pair(op, "kernel_size", kernel_size, 1, kMostPool2d),
             s = check_pair(op, "stride", stride, 1, kMostPool2d),
             p = check_pair(op, "padding", padding, 0, kMostPool2d),
             d = check_pair(op, "dilation", dilation, 1, kMostPool2d);
  TORCH_CHECK(p[0] <= k[0] / 2 && p[1] <= k[1] / 2, op,
              ": padding should be at most half of kernel size, but got padding=", padding,
              " and kernel_size=", kernel_size);
  TORCH_CHECK(input[1] >= 1 && input[2] >= 1 && input[3] >= 1, op,
              ": expected an input whose dimensions other than the batch are not empty, but got shape ", input);
  g.n = input[0];
  g.c = input[1];
  for (int dim = 0; dim < 2; ++dim) {
    g.in[dim] = input[2 + dim];
    g.kernel[dim] = k[dim];
    g.stride[dim] = s[dim];
    g.padding[dim] = p[dim];
    g.dilation[dim] = d[dim];
    g.out[dim] = pool_output(g.in[dim], k[dim], s[dim], p[dim], d[dim], ceil_mode);
  }
  TORCH_CHECK(g.out[0] >= 1 && g.out[1] >= 1, op, ": given input of shape ", input, ", kernel_size=", kernel_size,
              ", stride=", stride, ", padding=", padding, ", dilation=", dilation, ": calculated output size (",
              g.out[0], " x ", g.out[1], ") is too small");
  return g;
}

/// channels_last where one of the tensors is laid out so, as torch does it.
inline at::MemoryFormat format_of(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    if (t.suggest_memory_format() == at::MemoryFormat::ChannelsLast) return at::MemoryFormat::ChannelsLast;
  }
  return at::MemoryFormat::Contiguous;
}

/// What kernels write, which is always contiguous: `out` itself, or a tensor that copy_to() brings to its layout.
inline Tensor contiguous_like(const Tensor& out) {
  return out.is_contiguous() ? out : at::empty(out.sizes(), out.options());
}

inline void copy_to(const Tensor& out, const Tensor& result) {
  if (!result.is_same(out)) out.copy_(result);
}

}  // namespace cnnops
