// From arguments to a geometry, or to an error: every check of the package, once, for CPU, CUDA and meta tensors alike.
//
// Everything is a template over the type of a size: int64_t for real tensors, c10::SymInt for torch.compile's fake
// ones. Messages name the values that do not fit; where torch refuses the same thing, the exception's type is torch's.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "../geometry.h"
#include "memory.h"

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
    if (options.device().is_cpu()) {  // by the short way that torch's own kernels take
      return at::detail::empty_generic(sizes, warm_memory(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                       options.dtype().toScalarType(), format);
    }
    return at::empty(sizes, options, format);
  } else {
    return at::empty_symint(sizes, options, format);
  }
}

/// A tensor of `t`'s shape, dense, in the layout that torch's own element-wise operators would choose.
inline Tensor empty_alike(const Tensor& t) {
  // torch.compile's fake tensors say that they are on the CPU, too, but answer to Python.
  if (!t.is_cpu() || t.key_set().has(c10::DispatchKey::Python)) return at::empty_like(t);
  const auto make = [&](IntArrayRef strides) {
    return at::detail::empty_strided_generic(t.sizes(), strides, warm_memory(),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU), t.scalar_type());
  };
  return t.is_non_overlapping_and_dense() ? make(t.strides()) : make(at::infer_dense_strides(t.sizes(), t.strides()));
}

using Named = std::pair<const char*, const Tensor&>;

/// Which types of numbers an operator takes.
enum class Numbers { real, real_and_int64, real_and_integers };

inline bool has_kernels(at::ScalarType dtype, Numbers numbers) {
  switch (dtype) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
      return true;
    case at::kLong:
      return numbers != Numbers::real;
    case at::kByte:
    case at::kChar:
    case at::kShort:
    case at::kInt:
      return numbers == Numbers::real_and_integers;
    default:
      return false;
  }
}

/// All tensors have a dtype that has kernels, the same one, and live on one device.
inline void check_alike(const char* op, std::initializer_list<Named> tensors, Numbers numbers = Numbers::real) {
  const auto& [first_name, first] = *tensors.begin();
  const auto dtype = first.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(has_kernels(dtype, numbers), op, ": no kernel for ", first_name, " of dtype ", dtype,
                              "; float32, float64, bfloat16, float16",
                              numbers == Numbers::real             ? ""
                              : numbers == Numbers::real_and_int64 ? " and int64"
                                                                   : ", int8, uint8, int16, int32 and int64",
                              " work");
  for (const auto& [name, t] : tensors) {
    if (!t.defined()) continue;
    TORCH_CHECK(t.scalar_type() == dtype, op, ": ", first_name, " and ", name, " should have the same dtype, but have ",
                dtype, " and ", t.scalar_type());
    TORCH_CHECK(t.device() == first.device(), op, ": expected all tensors to be on the same device, but ", first_name,
                " is on ", first.device(), " and ", name, " is on ", t.device());
  }
}

/// torch's adaptive pooling raises ValueError for less than an image.
inline void check_some_image(const char* op, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() >= 3, op, ": expected 3D (unbatched) or 4D (batched) input, but got ", t.dim(),
                    "D of shape ", t.sym_sizes());
}

/// An image, with a batch by now.
inline void check_image(const char* op, const Tensor& t) {
  TORCH_CHECK(t.dim() == 4, op, ": expected 3D (unbatched) or 4D (batched) input, but got ", t.dim(), "D of shape ",
              t.sym_sizes());
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  TORCH_CHECK(t.dim() == dim, op, ": expected ", dim, "D ", name, ", but got ", t.dim(), "D of shape ", t.sym_sizes());
}

// Beyond these, sums and products of sizes might not fit 64 bits. Pooling's limit is torch's.
constexpr int64_t kMostStride = int64_t(1) << 62, kMostConv2d = int64_t(1) << 48, kMostPool2d = (int64_t(1) << 31) - 1;

/// {h, w}.
using Pair = std::array<int64_t, 2>;
/// {top, left, bottom, right}.
using Sides = std::array<int64_t, 4>;

/// As torch takes sizes: one integer for both, or two.
inline Pair pair_of(const char* op, const char* name, IntArrayRef pair) {
  TORCH_CHECK(pair.size() == 1 || pair.size() == 2, op, ": expected ", name,
              " to be one integer or two, {h, w}, but got ", pair);
  return {pair.front(), pair.back()};
}

/// As torch takes padding, or all four sides.
inline Sides sides_of(const char* op, IntArrayRef padding) {
  TORCH_CHECK(padding.size() == 1 || padding.size() == 2 || padding.size() == 4, op,
              ": expected padding to be one integer, two, {h, w}, or four, {top, left, bottom, right}, but got ",
              padding);
  if (padding.size() == 4) return {padding[0], padding[1], padding[2], padding[3]};
  return {padding.front(), padding.back(), padding.front(), padding.back()};
}

inline void check_range(const char* op, const char* name, IntArrayRef pair, int64_t least, int64_t most) {
  TORCH_CHECK(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be at least ", least, ", but got ", pair);
  TORCH_CHECK(pair[0] <= most && pair[1] <= most, op, ": ", name, " must be at most ", most, ", but got ", pair);
}

inline Border border_of(const char* op, std::string_view padding_mode) {
  if (padding_mode == "zeros") return Border::zeros;
  if (padding_mode == "reflect") return Border::reflect;
  if (padding_mode == "replicate") return Border::replicate;
  if (padding_mode == "circular") return Border::circular;
  TORCH_CHECK_VALUE(false, op,
                    ": padding_mode must be one of 'zeros', 'reflect', 'replicate' and 'circular', but got '",
                    padding_mode, "'");
}

/// The settings that every convolution operator carries.
struct Conv2dSettings {
  Pair stride;
  Sides padding;
  Pair dilation;
  int64_t groups;
  Border border;
  std::string padding_mode, algorithm;

  Conv2dSettings(const char* op, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                 std::string_view padding_mode, std::string_view algorithm)
      : stride(pair_of(op, "stride", stride)),
        padding(sides_of(op, padding)),
        dilation(pair_of(op, "dilation", dilation)),
        groups(groups),
        border(border_of(op, padding_mode)),
        padding_mode(padding_mode),
        algorithm(algorithm) {}
};

template <class Int>
void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<Int> expected) {
  const c10::ArrayRef<Int> shape(expected.begin(), expected.size());
  TORCH_CHECK(sizes_of<Int>(t).equals(shape), op, ": expected ", name, " of shape ", shape, ", but got ",
              sizes_of<Int>(t));
}

/// How far a kernel reaches must be a number.
template <class Int>
void check_reach(const char* op, c10::ArrayRef<Int> weight, const Pair& dilation) {
  TORCH_CHECK(weight[2] - 1 <= kMostConv2d / dilation[0] && weight[3] - 1 <= kMostConv2d / dilation[1], op,
              ": dilation * (kernel size - 1) must be at most ", kMostConv2d,
              ", but got dilation=", IntArrayRef(dilation), " for weight of shape ", weight);
}

/// The geometry of a convolution from the shapes of its input {n, c, h, w} and weight {k, c/groups, kh, kw}.
template <class Int>
BasicConv2dGeometry<Int> conv2d_geometry(const char* op, c10::ArrayRef<Int> input, c10::ArrayRef<Int> weight,
                                         const Conv2dSettings& s, Layout layout) {
  BasicConv2dGeometry<Int> g{};
  const Sides& p = s.padding;
  check_range(op, "stride", s.stride, 1, kMostStride);
  check_range(op, "padding", IntArrayRef(p).slice(0, 2), 0, kMostConv2d);
  // What is taken away at the bottom or the right is negative padding: conv_transpose2d's output_padding.
  check_range(op, "padding at the bottom and the right", IntArrayRef(p).slice(2, 2), -kMostConv2d, kMostConv2d);
  check_range(op, "dilation", s.dilation, 1, kMostConv2d);
  TORCH_CHECK(s.groups >= 1, op, ": groups must be at least 1, but got ", s.groups);
  TORCH_CHECK(weight[0] >= s.groups && weight[0] % s.groups == 0, op, ": expected weight of shape ", weight,
              " to have output channels divisible by groups, but groups=", s.groups);
  TORCH_CHECK(weight[1] >= 1 && weight[2] >= 1 && weight[3] >= 1, op, ": weight must not be empty, but got shape ",
              weight);
  TORCH_CHECK(input[1] == weight[1] * s.groups, op, ": given groups=", s.groups, " and weight of shape ", weight,
              ", expected input of shape ", input, " to have ", weight[1] * s.groups, " channels, but got ", input[1]);
  TORCH_CHECK(input[2] >= 1 && input[3] >= 1, op, ": expected an input with a non-empty image, but got shape ", input);
  g.n = input[0];
  g.c = input[1];
  g.k = weight[0];
  g.groups = s.groups;
  g.layout = g.filters = layout;
  g.border = s.border;
  check_reach<Int>(op, weight, s.dilation);
  Int padded[2], extent[2];
  for (int dim = 0; dim < 2; ++dim) {
    g.in[dim] = input[2 + dim];
    g.kernel[dim] = weight[2 + dim];
    g.stride[dim] = s.stride[dim];
    g.padding[dim] = p[dim];
    g.dilation[dim] = s.dilation[dim];
    padded[dim] = g.in[dim] + p[dim] + p[2 + dim];
    extent[dim] = (g.kernel[dim] - 1) * g.dilation[dim] + 1;
    const int64_t widest = std::max(p[dim], p[2 + dim]);
    TORCH_CHECK(s.border != Border::reflect || widest < g.in[dim], op,
                ": reflected padding must be less than the image's size, but got padding=", IntArrayRef(p),
                " for input of shape ", input);
    TORCH_CHECK(s.border != Border::circular || widest <= g.in[dim], op,
                ": circular padding must be at most the image's size, but got padding=", IntArrayRef(p),
                " for input of shape ", input);
  }
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

/// Pooling's windows.
struct Window {
  Pair kernel_size, stride, padding, dilation;
  bool ceil_mode;

  /// An empty stride stands for the kernel_size, as in torch.
  Window(const char* op, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
         bool ceil_mode)
      : kernel_size(pair_of(op, "kernel_size", kernel_size)),
        stride(stride.empty() ? this->kernel_size : pair_of(op, "stride", stride)),
        padding(pair_of(op, "padding", padding)),
        dilation(pair_of(op, "dilation", dilation)),
        ceil_mode(ceil_mode) {}
};

template <class Int>
void check_planes(const char* op, c10::ArrayRef<Int> input) {
  TORCH_CHECK(input[1] >= 1 && input[2] >= 1 && input[3] >= 1, op,
              ": expected an input whose dimensions other than the batch are not empty, but got shape ", input);
}

/// The geometry of pooling from the shape of its input {n, c, h, w}.
template <class Int>
BasicPool2dGeometry<Int> pool2d_geometry(const char* op, c10::ArrayRef<Int> input, const Window& w, Layout layout) {
  BasicPool2dGeometry<Int> g{};
  check_range(op, "kernel_size", w.kernel_size, 1, kMostPool2d);
  check_range(op, "stride", w.stride, 1, kMostPool2d);
  check_range(op, "padding", w.padding, 0, kMostPool2d);
  check_range(op, "dilation", w.dilation, 1, kMostPool2d);
  TORCH_CHECK(w.padding[0] <= w.kernel_size[0] / 2 && w.padding[1] <= w.kernel_size[1] / 2, op,
              ": padding should be at most half of kernel size, but got padding=", IntArrayRef(w.padding),
              " and kernel_size=", IntArrayRef(w.kernel_size));
  check_planes(op, input);
  g.n = input[0];
  g.c = input[1];
  g.layout = layout;
  for (int dim = 0; dim < 2; ++dim) {
    g.in[dim] = input[2 + dim];
    g.kernel[dim] = w.kernel_size[dim];
    g.stride[dim] = w.stride[dim];
    g.padding[dim] = w.padding[dim];
    g.dilation[dim] = w.dilation[dim];
    g.out[dim] =
        pool_output(g.in[dim], w.kernel_size[dim], g.stride[dim], g.padding[dim], g.dilation[dim], w.ceil_mode);
  }
  TORCH_CHECK(g.out[0] >= 1 && g.out[1] >= 1, op, ": given input of shape ", input,
              ", kernel_size=", IntArrayRef(w.kernel_size), ", stride=", IntArrayRef(w.stride),
              ", padding=", IntArrayRef(w.padding), ", dilation=", IntArrayRef(w.dilation),
              ": calculated output size (", g.out[0], " x ", g.out[1], ") is too small");
  return g;
}

/// The geometry of adaptive pooling. Where the windows come out all alike it is that of plain pooling.
template <class Int>
BasicPool2dGeometry<Int> adaptive_geometry(const char* op, c10::ArrayRef<Int> input, c10::ArrayRef<Int> output_size,
                                           Layout layout) {
  BasicPool2dGeometry<Int> g{};
  TORCH_CHECK(output_size.size() == 2, op, ": expected output_size to be {h, w}, but got ", output_size);
  TORCH_CHECK(output_size[0] >= 0 && output_size[1] >= 0, op, ": output_size must be at least 0, but got ",
              output_size);
  check_planes(op, input);
  g.n = input[0];
  g.c = input[1];
  g.layout = layout;
  for (int dim = 0; dim < 2; ++dim) {
    g.in[dim] = input[2 + dim];
    g.out[dim] = output_size[dim];
    g.padding[dim] = 0;
    g.stride[dim] = g.dilation[dim] = 1;
  }
  if constexpr (std::is_same_v<Int, int64_t>) {
    bool alike = true;
    for (int dim = 0; dim < 2; ++dim) alike &= g.out[dim] > 0 && g.in[dim] % g.out[dim] == 0;
    g.adaptive = !alike;
    for (int dim = 0; dim < 2 && g.out[0] > 0 && g.out[1] > 0; ++dim) {
      // A window that starts and ends between two pixels covers one more.
      g.kernel[dim] = (g.in[dim] + g.out[dim] - 1) / g.out[dim] + (g.in[dim] % g.out[dim] ? 1 : 0);
      if (alike) g.stride[dim] = g.kernel[dim];
    }
  }
  return g;
}

/// channels_last where one of the tensors is laid out so, as torch does it.
inline Layout layout_of(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    if (t.suggest_memory_format() == at::MemoryFormat::ChannelsLast) return Layout::channels_last;
  }
  return Layout::contiguous;
}

inline at::MemoryFormat format_of(Layout layout) {
  return layout == Layout::channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

/// `t` as kernels read it: itself, or a copy if it does not lie dense in this layout.
inline Tensor in_layout(const Tensor& t, Layout layout) {
  const at::MemoryFormat format = format_of(layout);
  return t.is_contiguous(format) ? t : empty<int64_t>(t.sizes(), t.options(), format).copy_(t);
}

}  // namespace cnnops
