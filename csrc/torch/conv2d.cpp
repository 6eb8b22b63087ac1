// Convolution's three operators, from arguments to kernels: check once, allocate, choose an algorithm, run.
//
// conv2d, conv2d_grad_input and conv2d_grad_weight are linear in each of two tensors, and the derivative of each is the
// other two: that is all there is to know for gradients and tangents of every order. conv_transpose2d is
// conv2d_grad_input, which takes a bias for its sake.
#include "conv2d.h"

#include <ATen/autocast_mode.h>

#include "autograd.h"
#include "numbers.h"
#include "run.h"

namespace cnnops {
namespace {

// ---- check and allocate: the same for real sizes and symbolic ones ----

template <class Int>
struct Prepared {
  BasicConv2dGeometry<Int> geometry;
  Tensor out;
};

template <class Int>
Prepared<Int> prepare(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Conv2dSettings& s) {
  const auto g = check_conv2d<Int>("conv2d", input, weight, bias, s);
  const Int sizes[] = {g.n, g.k, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of(g.layout))};
}

template <class Int>
Prepared<Int> prepare_grad_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                                 c10::ArrayRef<Int> input_size, const Conv2dSettings& s) {
  const char* op = "conv2d_grad_input or conv_transpose2d";
  check_dim(op, "grad_output", grad_output, 4);
  check_dim(op, "weight", weight, 4);
  check_alike(op, {{"grad_output", grad_output}, {"weight", weight}, {"bias", or_none(bias)}});
  TORCH_CHECK(input_size.size() == 2, op, ": expected input_size to be {h, w}, but got ", input_size);
  TORCH_CHECK(!bias || s.border == Border::zeros, op, ": a bias goes with padding_mode='zeros' only, but got '",
              s.padding_mode, "'");
  const auto w = sizes_of<Int>(weight);
  const Int sizes[] = {sizes_of<Int>(grad_output)[0], w[1] * s.groups, input_size[0], input_size[1]};
  const Layout layout = layout_of({grad_output, weight});
  const auto g = conv2d_geometry<Int>(op, sizes, w, s, layout);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.k, g.out[0], g.out[1]});
  if (bias) check_shape<Int>(op, "bias", *bias, {g.c});
  check_algorithm(s.algorithm);
  return {g, empty<Int>(sizes, grad_output.options(), format_of(layout))};
}

template <class Int>
Prepared<Int> prepare_grad_weight(const Tensor& grad_output, const Tensor& input, c10::ArrayRef<Int> kernel_size,
                                  const Conv2dSettings& s) {
  const char* op = "conv2d_grad_weight";
  check_dim(op, "grad_output", grad_output, 4);
  check_dim(op, "input", input, 4);
  check_alike(op, {{"grad_output", grad_output}, {"input", input}});
  TORCH_CHECK(kernel_size.size() == 2, op, ": expected kernel_size to be {h, w}, but got ", kernel_size);
  TORCH_CHECK(s.groups >= 1, op, ": groups must be at least 1, but got ", s.groups);
  const auto x = sizes_of<Int>(input);
  TORCH_CHECK(x[1] % s.groups == 0, op, ": expected input of shape ", x,
              " to have channels divisible by groups=", s.groups);
  const Int sizes[] = {sizes_of<Int>(grad_output)[1], x[1] / s.groups, kernel_size[0], kernel_size[1]};
  const Layout layout = layout_of({grad_output, input});
  const auto g = conv2d_geometry<Int>(op, x, sizes, s, layout);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.k, g.out[0], g.out[1]});
  check_algorithm(s.algorithm);
  return {g, empty<Int>(sizes, input.options(), format_of(layout))};
}

// ---- run ----

/// Nothing to compute: a refusal comes first all the same, so that it does not depend on the batch size.
bool nothing_to_do(const Conv2dGeometry& g, const Tensor& out) { return g.n == 0 || out.numel() == 0; }

template <class S>
void run_pass(Conv2dGeometry g, Pass pass, const std::string& algorithm, const Tensor& a, const Tensor& b,
              const Tensor& bias, const Tensor& out) {
  Conv2dOperands<S> operands{data_of<S>(a), nullptr, bias.defined() ? data_of<S>(bias) : nullptr,
                             mutable_data_of<S>(out)};
  if (a.is_cuda()) {
#ifdef CNNOPS_CUDA
    operands.tf32 = allows_tf32(algorithm);
    const c10::cuda::CUDAGuard guard(a.device());
    const auto& row = choose_or_throw(cuda::kernels<S>().conv2d, g, pass, algorithm);
    if (nothing_to_do(g, out)) return;
    const Tensor b_dense = in_layout(b, g.layout);
    operands.b = data_of<S>(b_dense);
    const Tensor workspace = cuda_workspace<S>(row.run(pass).workspace(g), a);
    row.run(pass).run(g, operands, mutable_data_of<Sum<S>>(workspace), c10::cuda::getCurrentCUDAStream().stream());
#else
    refuse_cuda();
#endif
  } else {
    const auto& row = choose_or_throw(cpu_kernels<S>().conv2d, g, pass, algorithm);
    if (nothing_to_do(g, out)) return;
    if (pass != Pass::grad_weight) g.filters = layout_of_filters(row, g, pass, b);
    const Tensor b_dense = in_layout(b, g.filters);
    operands.b = data_of<S>(b_dense);
    const cpu::Conv2dRun<S>& run = row.run(pass);
    const int64_t tasks = run.tasks(g), bytes = run.workspace(g) * int64_t(sizeof(Sum<S>));
    const int64_t work = g.n * g.k * g.out[0] * g.out[1] * (g.c / g.groups) * g.kernel[0] * g.kernel[1];
    const int64_t parts = run.parts ? run.parts(g) : 1, numbers = out.numel();
    if (parts > 1) operands.parts = static_cast<Sum<S>*>(scratch(parts * numbers * sizeof(Sum<S>), Scratch::of_caller));
    split(tasks, grain_for(work / tasks),
          [&](int64_t begin, int64_t end) { run.run(g, operands, static_cast<Sum<S>*>(scratch(bytes)), begin, end); });
    if (parts > 1)
      split(numbers, kGrain / parts, [&](int64_t begin, int64_t end) {
        run.add_parts(operands.parts, parts, numbers, operands.out, begin, end);
      });
  }
}

void run(const Conv2dGeometry& g, Pass pass, const std::string& algorithm, const Tensor& a, const Tensor& b,
         const Tensor& bias, const Tensor& out) {
  const Tensor a_dense = in_layout(a, g.layout);
  const Tensor bias_dense = bias.defined() ? bias.contiguous() : bias;
  with_real_number(a.scalar_type(),
                   [&](auto number) { run_pass<decltype(number)>(g, pass, algorithm, a_dense, b, bias_dense, out); });
}

/// The gradient of an input whose border is not zeros: first that of the input with its border written out, which is
/// plain, then each pixel adds up the places that show it.
void run_grad_input_and_fold(const Conv2dGeometry& g, const std::string& algorithm, const Tensor& grad_output,
                             const Tensor& weight, const Tensor& out) {
  const Conv2dGeometry plain = written_out(g);
  const int64_t sizes[] = {g.n, g.c, plain.in[0], plain.in[1]};
  const Tensor padded = empty<int64_t>(sizes, out.options(), format_of(g.layout));
  run(plain, Pass::grad_input, algorithm, grad_output, weight, {}, padded);
  const int64_t rows = g.n * g.in[0] * (g.layout == Layout::channels_last ? 1 : g.c);
  with_real_number(out.scalar_type(), [&](auto number) {
    using S = decltype(number);
    run_on_device<S>(out, rows, 1, [&](const auto& kernels, const auto& call) {
      call(kernels.fold_border, g, data_of<S>(padded), mutable_data_of<S>(out));
    });
  });
}

// ---- the operators on real tensors, and on meta tensors ----

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
              std::string_view algorithm) {
  const Conv2dSettings s("conv2d", stride, padding, dilation, groups, padding_mode, algorithm);
  return batched(input, [&](const Tensor& x) {
    const auto [g, out] = prepare<int64_t>(x, weight, bias, s);
    run(g, Pass::forward, s.algorithm, x, weight, or_none(bias), out);
    return out;
  });
}

Tensor conv2d_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                   std::string_view algorithm) {
  const Conv2dSettings s("conv2d", stride, padding, dilation, groups, padding_mode, algorithm);
  return batched(input, [&](const Tensor& x) { return prepare<c10::SymInt>(x, weight, bias, s).out; });
}

Tensor conv2d_grad_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                         IntArrayRef input_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                         int64_t groups, std::string_view padding_mode, std::string_view algorithm) {
  const Conv2dSettings s("conv2d_grad_input", stride, padding, dilation, groups, padding_mode, algorithm);
  const auto [g, out] = prepare_grad_input<int64_t>(grad_output, weight, bias, input_size, s);
  if (g.border == Border::zeros) {
    run(g, Pass::grad_input, s.algorithm, grad_output, weight, or_none(bias), out);
  } else {
    run_grad_input_and_fold(g, s.algorithm, grad_output, weight, out);
  }
  return out;
}

Tensor conv2d_grad_input_meta(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                              c10::SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                              std::string_view algorithm) {
  const Conv2dSettings s("conv2d_grad_input", stride, padding, dilation, groups, padding_mode, algorithm);
  return prepare_grad_input<c10::SymInt>(grad_output, weight, bias, input_size, s).out;
}

Tensor conv2d_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                          std::string_view algorithm) {
  const Conv2dSettings s("conv2d_grad_weight", stride, padding, dilation, groups, padding_mode, algorithm);
  const auto [g, out] = prepare_grad_weight<int64_t>(grad_output, input, kernel_size, s);
  run(g, Pass::grad_weight, s.algorithm, grad_output, input, {}, out);
  return g.n == 0 ? out.zero_() : out;
}

Tensor conv2d_grad_weight_meta(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                               std::string_view padding_mode, std::string_view algorithm) {
  const Conv2dSettings s("conv2d_grad_weight", stride, padding, dilation, groups, padding_mode, algorithm);
  return prepare_grad_weight<c10::SymInt>(grad_output, input, kernel_size, s).out;
}

// ---- the operators as others call them, and their derivatives ----

const c10::TypedOperatorHandle<decltype(conv2d)>& conv2d_operator() {
  static const auto op = find_operator<decltype(conv2d)>("cnnops::conv2d");
  return op;
}

}  // namespace

Tensor call_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Conv2dSettings& s) {
  return conv2d_operator().call(input, weight, bias, s.stride, s.padding, s.dilation, s.groups, s.padding_mode,
                                s.algorithm);
}

Tensor call_grad_input(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef input_size, const Conv2dSettings& s) {
  static const auto op = find_operator<decltype(conv2d_grad_input_meta)>("cnnops::conv2d_grad_input");
  return op.call(grad_output, weight, bias, input_size, s.stride, s.padding, s.dilation, s.groups, s.padding_mode,
                 s.algorithm);
}

Tensor call_grad_weight(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                        const Conv2dSettings& s) {
  static const auto op = find_operator<decltype(conv2d_grad_weight_meta)>("cnnops::conv2d_grad_weight");
  return op.call(grad_output, input, kernel_size, s.stride, s.padding, s.dilation, s.groups, s.padding_mode,
                 s.algorithm);
}

namespace {

c10::SymIntArrayRef plane_of(const Tensor& t) { return t.sym_sizes().slice(2); }

/// The tangent of a bias in an output of this shape.
Tensor spread_bias(const Tensor& bias, const Tensor& output) {
  return bias.view_symint({1, -1, 1, 1}).expand_symint(output.sym_sizes());
}

/// A bias adds its tangent; where something else has one as well, the operator does that.
OptionalTensor bias_beside(const Tensor& other, const Tensor& bias) {
  return other.defined() && bias.defined() ? OptionalTensor(bias) : std::nullopt;
}

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                       std::string_view algorithm) {
  if (!may_be_differentiated(input, weight, or_none(bias))) {
    return below_autograd([&] {
      return conv2d_operator().call(input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm);
    });
  }
  const Conv2dSettings s("conv2d", stride, padding, dilation, groups, padding_mode, algorithm);
  return batched(input, [&](const Tensor& x) {
    return differentiable(
        "Conv2dBackward", {x, weight, or_none(bias)}, [&] { return variable_list{call_conv2d(x, weight, bias, s)}; },
        [&](const variable_list&) { return variable_list{x, weight}; },
        [s](const Backward& b) {
          const Tensor &gy = b.grads[0], &x = b.kept[0], &weight = b.kept[1];
          return variable_list{b.needs(0) ? call_grad_input(gy, weight, {}, plane_of(x), s) : Tensor(),
                               b.needs(1) ? call_grad_weight(gy, x, plane_of(weight), s) : Tensor(),
                               b.needs(2) ? channel_sum(gy) : Tensor()};
        },
        [&](const variable_list& primals, const variable_list& tangents, const variable_list& outputs) {
          const Tensor &x = primals[0], &w = primals[1], &dx = tangents[0], &dw = tangents[1], &db = tangents[2];
          if (!dx.defined() && !dw.defined()) return variable_list{spread_bias(db, outputs[0])};
          const Tensor first = dx.defined() ? call_conv2d(dx, w, bias_beside(dx, db), s) : Tensor();
          const Tensor second =
              dw.defined() ? call_conv2d(x, dw, dx.defined() ? std::nullopt : bias_beside(dw, db), s) : Tensor();
          return variable_list{sum_of(first, second)};
        })[0];
  });
}

Tensor conv2d_grad_input_autograd(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                                  c10::SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                                  IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                                  std::string_view algorithm) {
  const Conv2dSettings s("conv2d_grad_input", stride, padding, dilation, groups, padding_mode, algorithm);
  return differentiable(
      "Conv2dGradInputBackward", {grad_output, weight, or_none(bias)},
      [&] { return variable_list{call_grad_input(grad_output, weight, bias, input_size, s)}; },
      [&](const variable_list&) { return variable_list{grad_output, weight}; },
      [s](const Backward& b) {
        const Tensor &ggx = b.grads[0], &gy = b.kept[0], &weight = b.kept[1];
        return variable_list{b.needs(0) ? call_conv2d(ggx, weight, {}, s) : Tensor(),
                             b.needs(1) ? call_grad_weight(gy, ggx, plane_of(weight), s) : Tensor(),
                             b.needs(2) ? channel_sum(ggx) : Tensor()};
      },
      [&](const variable_list& primals, const variable_list& tangents, const variable_list& outputs) {
        const Tensor &gy = primals[0], &w = primals[1], &dgy = tangents[0], &dw = tangents[1], &db = tangents[2];
        if (!dgy.defined() && !dw.defined()) return variable_list{spread_bias(db, outputs[0])};
        const Tensor first = dgy.defined() ? call_grad_input(dgy, w, bias_beside(dgy, db), input_size, s) : Tensor();
        const Tensor second =
            dw.defined() ? call_grad_input(gy, dw, dgy.defined() ? std::nullopt : bias_beside(dw, db), input_size, s)
                         : Tensor();
        return variable_list{sum_of(first, second)};
      })[0];
}

Tensor conv2d_grad_weight_autograd(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                   std::string_view padding_mode, std::string_view algorithm) {
  const Conv2dSettings s("conv2d_grad_weight", stride, padding, dilation, groups, padding_mode, algorithm);
  return differentiable(
      "Conv2dGradWeightBackward", {grad_output, input},
      [&] { return variable_list{call_grad_weight(grad_output, input, kernel_size, s)}; },
      [&](const variable_list&) { return variable_list{grad_output, input}; },
      [s](const Backward& b) {
        const Tensor &ggw = b.grads[0], &gy = b.kept[0], &input = b.kept[1];
        return variable_list{b.needs(0) ? call_conv2d(input, ggw, {}, s) : Tensor(),
                             b.needs(1) ? call_grad_input(gy, ggw, {}, plane_of(input), s) : Tensor()};
      },
      [&](const variable_list& primals, const variable_list& tangents, const variable_list&) {
        const Tensor &gy = primals[0], &x = primals[1], &dgy = tangents[0], &dx = tangents[1];
        return variable_list{sum_of(dgy.defined() ? call_grad_weight(dgy, x, kernel_size, s) : Tensor(),
                                    dx.defined() ? call_grad_weight(gy, dx, kernel_size, s) : Tensor())};
      })[0];
}

// ---- autocast: in the lower precision, as torch's convolutions ----

}  // namespace

OptionalTensor lower_precision(at::DeviceType device, const OptionalTensor& t) {
  if (!t || !t->defined()) return std::nullopt;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), *t, device);
}

namespace {

template <at::DeviceType device, c10::DispatchKey key>
Tensor conv2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                       std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(key);
  const Conv2dSettings s("conv2d", stride, padding, dilation, groups, padding_mode, algorithm);
  return call_conv2d(*lower_precision(device, input), *lower_precision(device, weight), lower_precision(device, bias),
                     s);
}

template <at::DeviceType device, c10::DispatchKey key>
Tensor conv2d_grad_input_autocast(const Tensor& grad_output, const Tensor& weight, const OptionalTensor& bias,
                                  c10::SymIntArrayRef input_size, IntArrayRef stride, IntArrayRef padding,
                                  IntArrayRef dilation, int64_t groups, std::string_view padding_mode,
                                  std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(key);
  const Conv2dSettings s("conv2d_grad_input", stride, padding, dilation, groups, padding_mode, algorithm);
  return call_grad_input(*lower_precision(device, grad_output), *lower_precision(device, weight),
                         lower_precision(device, bias), input_size, s);
}

template <at::DeviceType device, c10::DispatchKey key>
void register_autocast(torch::Library& m) {
  m.impl("conv2d", conv2d_autocast<device, key>);
  m.impl("conv2d_grad_input", conv2d_grad_input_autocast<device, key>);
}

void register_kernels(torch::Library& m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d_grad_input", conv2d_grad_input);
  m.impl("conv2d_grad_weight", conv2d_grad_weight);
}

}  // namespace

// `padding` is one integer, two or four: {top, left, bottom, right}.
TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
      "int groups=1, str padding_mode='zeros', str algorithm='auto') -> Tensor");
  m.def(
      "conv2d_grad_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[2] input_size, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1, str padding_mode='zeros', str algorithm='auto') -> Tensor");
  m.def(
      "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] kernel_size, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, str padding_mode='zeros', str algorithm='auto') -> Tensor");
}

TORCH_LIBRARY_IMPL(cnnops, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  m.impl("conv2d", conv2d_meta);
  m.impl("conv2d_grad_input", conv2d_grad_input_meta);
  m.impl("conv2d_grad_weight", conv2d_grad_weight_meta);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  m.impl("conv2d", conv2d_autograd);
  m.impl("conv2d_grad_input", conv2d_grad_input_autograd);
  m.impl("conv2d_grad_weight", conv2d_grad_weight_autograd);
}

TORCH_LIBRARY_IMPL(cnnops, AutocastCPU, m) { register_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>(m); }
TORCH_LIBRARY_IMPL(cnnops, AutocastCUDA, m) { register_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>(m); }

}  // namespace cnnops
