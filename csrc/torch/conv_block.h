// What a convolution block consists of besides its convolution: an activation and pooling, as operators, with
// gradients.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include "conv2d.h"

namespace cnnops {

inline constexpr const char* kBlockName = "conv_relu_max_pool2d";

enum class Kind { none, relu, relu6, leaky_relu };

struct Activation {
  Kind kind;
  double negative_slope;

  Activation(std::string_view name, double negative_slope) : kind(kind_of(name)), negative_slope(negative_slope) {
    TORCH_CHECK_VALUE(kind != Kind::leaky_relu || negative_slope >= 0, kBlockName,
                      ": negative_slope must be at least 0, or outputs would not tell their inputs' sign, but got ",
                      negative_slope);
  }
  static constexpr std::string_view kNames[] = {"none", "relu", "relu6", "leaky_relu"};  // in the order of Kind
  std::string_view name() const { return kNames[static_cast<int>(kind)]; }
  static Kind kind_of(std::string_view name) {
    for (int i = 0; i < 4; ++i) {
      if (name == kNames[i]) return static_cast<Kind>(i);
    }
    TORCH_CHECK_VALUE(false, kBlockName,
                      ": activation must be one of 'none', 'relu', 'relu6' and 'leaky_relu', but got '", name, "'");
  }

  template <class S>
  void run(const cpu::Kernels<S>& kernels, const S* x, S* y, int64_t begin, int64_t end) const {
    switch (kind) {
      case Kind::relu:
        return kernels.relu(x, y, begin, end);
      case Kind::relu6:
        return kernels.hardtanh(x, Sum<S>(0), Sum<S>(6), y, begin, end);
      case Kind::leaky_relu:
        return kernels.leaky_relu(x, Sum<S>(negative_slope), y, begin, end);
      default:
        return;
    }
  }

  Tensor operator()(const Tensor& x) const {
    static const auto relu = find_operator<Tensor(const Tensor&)>("cnnops::relu");
    static const auto hardtanh = find_operator<Tensor(const Tensor&, double, double)>("cnnops::hardtanh");
    static const auto leaky_relu = find_operator<Tensor(const Tensor&, double)>("cnnops::leaky_relu");
    return kind == Kind::none         ? x
           : kind == Kind::relu       ? relu.call(x)
           : kind == Kind::leaky_relu ? leaky_relu.call(x, negative_slope)
                                      : hardtanh.call(x, 0, 6);
  }

  Tensor backward(const Tensor& grad_output, const Tensor& output) const {
    static const auto relu = find_operator<Tensor(const Tensor&, const Tensor&)>("cnnops::relu_backward");
    static const auto hardtanh =
        find_operator<Tensor(const Tensor&, const Tensor&, double, double)>("cnnops::hardtanh_backward");
    static const auto leaky_relu =
        find_operator<Tensor(const Tensor&, const Tensor&, double)>("cnnops::leaky_relu_backward");
    return kind == Kind::none         ? grad_output
           : kind == Kind::relu       ? relu.call(grad_output, output)
           : kind == Kind::leaky_relu ? leaky_relu.call(grad_output, output, negative_slope)
                                      : hardtanh.call(grad_output, output, 0, 6);
  }
};

/// Pooling's windows, or none.
struct Pooling : std::optional<Window> {
  Pooling(IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
    if (!kernel_size.empty()) emplace(kBlockName, kernel_size, stride, padding, dilation, ceil_mode);
  }

  TwoTensors operator()(const Tensor& x) const {
    static const auto op =
        find_operator<TwoTensors(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, bool)>(
            "cnnops::max_pool2d");
    const Window& w = **this;
    return op.call(x, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
  }

  Tensor backward(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size) const {
    static const auto op =
        find_operator<Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef,
                             IntArrayRef, bool)>("cnnops::max_pool2d_backward");
    const Window& w = **this;
    return op.call(grad_output, positions, input_size, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
  }
};

struct Block {
  Conv2dSettings conv;
  Activation activation;
  Pooling pooling;

  Block(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
        std::string_view activation, double negative_slope, IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
        IntArrayRef pool_padding, IntArrayRef pool_dilation, bool ceil_mode, std::string_view algorithm)
      : conv(kBlockName, stride, padding, dilation, groups, padding_mode, algorithm),
        activation(activation, negative_slope),
        pooling(pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode) {}
};

/// The gradient of the convolution's output from that of the block's, as an operator.
Tensor call_backward(const Tensor& grad_output, const Tensor& output, const Tensor& positions,
                     c10::SymIntArrayRef input_size, const Activation& activation, const Pooling& pooling);

#ifdef CNNOPS_CUDA
/// Whether windows are as cuda::Epilogue has them.
inline bool quarters(const Pool2dGeometry& p) {
  bool all = true;
  for (int dim = 0; dim < 2; ++dim)
    all &= p.kernel[dim] == 2 && p.stride[dim] == 2 && p.padding[dim] == 0 && p.dilation[dim] == 1 &&
           p.out[dim] == p.in[dim] / 2;
  return all;
}

template <class S>
cuda::Epilogue<S> epilogue_of(const Activation& activation) {
  cuda::Epilogue<S> epilogue;
  if (activation.kind == Kind::relu || activation.kind == Kind::relu6) epilogue.low = 0;
  if (activation.kind == Kind::relu6) epilogue.high = 6;
  if (activation.kind == Kind::leaky_relu) epilogue.slope = Sum<S>(activation.negative_slope);
  return epilogue;
}
#endif

}  // namespace cnnops
