// The gradient through a block's activation and pooling: from that of the pooled output to that of the convolution's.
//
// On a GPU windows of 2 x 2 take one kernel. All else, and whatever is itself differentiated or mapped, takes the two
// operators one after the other.
#include "autograd.h"
#include "conv_block.h"
#include "numbers.h"
#include "pool2d.h"
#include "run.h"

namespace cnnops {
namespace {

constexpr const char* kName = "relu_max_pool2d_backward";

Tensor chain(const Tensor& grad_output, const Tensor& output, const Tensor& positions, c10::SymIntArrayRef input_size,
             const Activation& activation, const Pooling& pooling) {
  TORCH_CHECK_VALUE(pooling, kName, ": expected a kernel_size, but got []");
  return pooling.backward(activation.backward(grad_output, output), positions, input_size);
}

#ifdef CNNOPS_CUDA
/// Undefined where the kernel is not for this: what is wrong with it, if anything, the chain will say.
Tensor run_cuda(const Tensor& grad_output, const Tensor& output, const Tensor& positions, IntArrayRef input_size,
                const Activation& activation, const Pooling& pooling) {
  const auto sizes = input_sizes<int64_t>(kName, grad_output, input_size);
  const Layout layout = layout_of({positions});
  const auto g = pool2d_geometry<int64_t>(kName, sizes, *pooling, layout);
  const auto fits = [&](const Tensor& t, at::ScalarType dtype) {
    return t.sizes() == IntArrayRef({g.n, g.c, g.out[0], g.out[1]}) && t.device() == positions.device() &&
           t.scalar_type() == dtype;
  };
  const auto dtype = grad_output.scalar_type();
  const bool all_fit = fits(grad_output, dtype) && fits(output, dtype) && fits(positions, at::kByte);
  if (!all_fit || !quarters(g) || !has_kernels(dtype, Numbers::real)) return {};
  const Tensor gy = in_layout(grad_output, layout), y = in_layout(output, layout), p = in_layout(positions, layout);
  const Tensor gx = empty<int64_t>(sizes, grad_output.options(), format_of(layout));
  const c10::cuda::CUDAGuard guard(gy.device());
  with_real_number(dtype, [&](auto number) {
    using S = decltype(number);
    auto epilogue = epilogue_of<S>(activation);
    epilogue.positions = const_cast<uint8_t*>(data_of<uint8_t>(p));
    cuda::kernels<S>().epilogue_backward(g, epilogue, data_of<S>(gy), data_of<S>(y), mutable_data_of<S>(gx),
                                         c10::cuda::getCurrentCUDAStream().stream());
  });
  return gx;
}
#endif

Tensor relu_max_pool2d_backward(const Tensor& grad_output, const Tensor& output, const Tensor& positions,
                                c10::SymIntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                                IntArrayRef padding, IntArrayRef dilation, bool ceil_mode, std::string_view activation,
                                double negative_slope) {
  const Activation before(activation, negative_slope);
  const Pooling pooling(kernel_size, stride, padding, dilation, ceil_mode);
#ifdef CNNOPS_CUDA
  if (positions.is_cuda() && pooling) {
    const Tensor gx = run_cuda(grad_output, output, positions, C10_AS_INTARRAYREF_SLOW(input_size), before, pooling);
    if (gx.defined()) return gx;
  }
#endif
  return chain(grad_output, output, positions, input_size, before, pooling);
}

Tensor relu_max_pool2d_backward_autograd(const Tensor& grad_output, const Tensor& output, const Tensor& positions,
                                         c10::SymIntArrayRef input_size, IntArrayRef kernel_size, IntArrayRef stride,
                                         IntArrayRef padding, IntArrayRef dilation, bool ceil_mode,
                                         std::string_view activation, double negative_slope) {
  const Activation before(activation, negative_slope);
  const Pooling pooling(kernel_size, stride, padding, dilation, ceil_mode);
  if (may_be_differentiated(grad_output, output))
    return chain(grad_output, output, positions, input_size, before, pooling);
  return below_autograd([&] { return call_backward(grad_output, output, positions, input_size, before, pooling); });
}

}  // namespace

Tensor call_backward(const Tensor& grad_output, const Tensor& output, const Tensor& positions,
                     c10::SymIntArrayRef input_size, const Activation& activation, const Pooling& pooling) {
  static const auto op = find_operator<decltype(relu_max_pool2d_backward)>("cnnops::relu_max_pool2d_backward");
  TORCH_CHECK_VALUE(pooling, kName, ": expected a kernel_size, but got []");
  const Window& w = *pooling;
  return op.call(grad_output, output, positions, input_size, w.kernel_size, w.stride, w.padding, w.dilation,
                 w.ceil_mode, activation.name(), activation.negative_slope);
}

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "relu_max_pool2d_backward(Tensor grad_output, Tensor output, Tensor positions, SymInt[2] input_size, "
      "int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, bool ceil_mode=False, "
      "str activation='relu', float negative_slope=0.01) -> Tensor");
}
TORCH_LIBRARY_IMPL(cnnops, CPU, m) { m.impl("relu_max_pool2d_backward", relu_max_pool2d_backward); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { m.impl("relu_max_pool2d_backward", relu_max_pool2d_backward); }
TORCH_LIBRARY_IMPL(cnnops, Meta, m) { m.impl("relu_max_pool2d_backward", relu_max_pool2d_backward); }
TORCH_LIBRARY_IMPL(cnnops, Autograd, m) { m.impl("relu_max_pool2d_backward", relu_max_pool2d_backward_autograd); }

}  // namespace cnnops
