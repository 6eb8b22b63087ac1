// The transposed convolution is conv2d's gradient of its input by another name: all that is left to do here is torch's
// arithmetic of sizes. A decomposition: autograd, autocast, vmap and torch.compile see conv2d_grad_input.
#include <torch/library.h>

#include "checks.h"
#include "operators.h"

namespace cnnops {
namespace {

Tensor conv_transpose2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                        IntArrayRef padding, c10::SymIntArrayRef output_padding, int64_t groups, IntArrayRef dilation,
                        std::string_view algorithm) {
  const char* op = "conv_transpose2d";
  static const auto grad_input =
      find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::SymIntArrayRef, IntArrayRef,
                           IntArrayRef, IntArrayRef, int64_t, std::string_view, std::string_view)>(
          "cnnops::conv2d_grad_input");
  const Pair s = pair_of(op, "stride", stride), p = pair_of(op, "padding", padding),
             d = pair_of(op, "dilation", dilation);
  std::vector<int64_t> more_given;
  for (const c10::SymInt& more : output_padding) more_given.push_back(more.guard_int(__FILE__, __LINE__));
  const Pair more = pair_of(op, "output_padding", more_given);
  check_range(op, "stride", s, 1, kMostConv2d);
  check_range(op, "padding", p, 0, kMostConv2d);
  check_range(op, "dilation", d, 1, kMostConv2d);
  check_dim(op, "weight", weight, 4);
  for (int dim = 0; dim < 2; ++dim) {
    TORCH_CHECK(more[dim] >= 0 && (more[dim] < s[dim] || more[dim] < d[dim]), op,
                ": output_padding must be at least 0 and smaller than stride or dilation, but got output_padding=",
                IntArrayRef(more), ", stride=", IntArrayRef(s), " and dilation=", IntArrayRef(d));
  }
  return batched(input, [&](const Tensor& x) {
    check_image(op, x);
    TORCH_CHECK(x.sym_size(1) == weight.sym_size(0), op, ": given weight of shape ", weight.sym_sizes(),
                ", expected input of shape ", x.sym_sizes(), " to have ", weight.sym_size(0), " channels, but got ",
                x.sym_size(1));
    check_reach<c10::SymInt>(op, weight.sym_sizes(), d);
    c10::SymInt size[2];
    for (int dim = 0; dim < 2; ++dim) {
      size[dim] =
          (x.sym_size(2 + dim) - 1) * s[dim] - 2 * p[dim] + d[dim] * (weight.sym_size(2 + dim) - 1) + more[dim] + 1;
    }
    TORCH_CHECK(size[0] >= 1 && size[1] >= 1, op, ": given input of shape ", x.sym_sizes(), " and weight of shape ",
                weight.sym_sizes(), ", calculated output size (", size[0], " x ", size[1], ") is too small");
    // Padding that much less at the bottom and the right, conv2d would make of an image of this size just the input.
    const int64_t sides[] = {p[0], p[1], p[0] - more[0], p[1] - more[1]};
    return grad_input.call(x, weight, bias, size, s, sides, d, groups, "zeros", algorithm);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "SymInt[2] output_padding=0, int groups=1, int[2] dilation=1, str algorithm='auto') -> Tensor");
}
TORCH_LIBRARY_IMPL(cnnops, CompositeImplicitAutograd, m) { m.impl("conv_transpose2d", conv_transpose2d); }
TORCH_LIBRARY_IMPL(cnnops, FuncTorchBatchedDecomposition, m) { m.impl("conv_transpose2d", conv_transpose2d); }

}  // namespace cnnops
