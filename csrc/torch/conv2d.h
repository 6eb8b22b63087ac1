// Convolution as the operators that contain one see it: check and allocate, and the calls that differentiate it.
#pragma once

#include "checks.h"
#include "operators.h"
#include "tables.h"

namespace cnnops {

inline Tensor or_none(const OptionalTensor& t) { return t ? *t : Tensor(); }

/// The geometry of conv2d, in the layout that its operands ask for.
template <class Int>
BasicConv2dGeometry<Int> check_conv2d(const char* op, const Tensor& input, const Tensor& weight,
                                      const OptionalTensor& bias, const Conv2dSettings& s) {
  check_image(op, input);
  check_dim(op, "weight", weight, 4);
  check_alike(op, {{"input", input}, {"weight", weight}, {"bias", or_none(bias)}});
  const auto g = conv2d_geometry<Int>(op, sizes_of<Int>(input), sizes_of<Int>(weight), s, layout_of({input, weight}));
  if (bias) check_shape<Int>(op, "bias", *bias, {g.k});
  check_algorithm(s.algorithm);
  return g;
}

/// Whether torch's switches and the choice of an algorithm allow TF32.
inline bool allows_tf32(const std::string& algorithm) {
  return !wants_accurate(algorithm) && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
}

/// How the weight of a pass is to lie: as all the rest, or where it is if the algorithm reads it there.
template <class Row>
Layout layout_of_filters(const Row& row, const Conv2dGeometry& g, Pass pass, const Tensor& weight) {
  const bool reads = weight.is_contiguous() && row.reads_contiguous_filters && row.reads_contiguous_filters(g, pass);
  return reads ? Layout::contiguous : g.layout;
}

/// Scratch memory for a launch, from torch's allocator.
template <class S>
Tensor cuda_workspace(int64_t elements, const Tensor& like) {
  return at::empty({elements * int64_t(sizeof(Sum<S>))}, like.options().dtype(at::kByte).memory_format(std::nullopt));
}

Tensor call_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Conv2dSettings& s);
Tensor call_grad_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef input_size, const Conv2dSettings& s);
Tensor call_grad_weight(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                        const Conv2dSettings& s);

/// A tensor as autocast wants it for a convolution.
OptionalTensor lower_precision(at::DeviceType device, const OptionalTensor& t);

}  // namespace cnnops
