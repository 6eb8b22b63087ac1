// Convolution's three operators, from arguments to kernels: check once, allocate, choose an algorithm, run.
//
// conv2d, conv2d_grad_input and conv2d_grad_weight are linear in each of two tensors, and the derivative of each is the
// other two: that is all there is to know for gradients of every order.
#include "autograd.h"
#include "checks.h"
#include "run.h"
#include "tables.h"

namespace cnnops {
namespace {

using OptionalTensor = std::optional<Tensor>;

/// The settings that every convolution operator carries.
struct Settings {
  IntArrayRef stride, padding, dilation;
  int64_t groups;
  std::string algorithm;
};

/// What is kept of them for the backward pass.
struct KeptSettings {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  std::string algorithm;
  explicit KeptSettings(const Settings& s)
      : stride(s.stride.vec()),
        padding(s.padding.vec()),
        dilation(s.dilation.vec()),
        groups(s.groups),
        algorithm(s.algorithm) {}
};

// ---- run ----

/// Nothing to compute: a refusal comes first all the same, so that it does not depend on the batch size.
bool nothing_to_do(const Conv2dGeometry& g, const Tensor& out) { return g.n == 0 || out.numel() == 0; }

/// Runs one pass. Kernels know contiguous tensors: others are copied here, and so is the result where it is to be
/// channels_last.
void run(const Conv2dGeometry& g, Pass pass, const std::string& algorithm, const Tensor& a, const Tensor& b,
         const OptionalTensor& bias, const Tensor& out) {
  const Tensor ac = a.contiguous(), bc = b.contiguous();
  const Tensor bias_c = bias ? bias->contiguous() : Tensor();
  const Tensor result = contiguous_like(out);

  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "conv2d", [&] {
    const scalar_t* bias_data = bias_c.defined() ? bias_c.const_data_ptr<scalar_t>() : nullptr;
    if (a.is_cuda()) {
#ifdef CNNOPS_CUDA
      const c10::cuda::CUDAGuard guard(a.device());
      const auto& row = choose_or_throw(cuda::kernels<scalar_t>().conv2d, g, pass, algorithm);
      if (nothing_to_do(g, out)) return;
      const int64_t size = row.run(pass).workspace(g);
      const Tensor workspace = at::empty({size}, a.options().memory_format(at::MemoryFormat::Contiguous));
      row.run(pass).run(
          g, {ac.const_data_ptr<scalar_t>(), bc.const_data_ptr<scalar_t>(), bias_data, result.data_ptr<scalar_t>()},
          workspace.data_ptr<scalar_t>(), c10::cuda::getCurrentCUDAStream().stream());
#else
      refuse_cuda();
#endif
    } else {
      const auto& row = choose_or_throw(cpu_kernels<scalar_t>().conv2d, g, pass, algorithm);
      if (nothing_to_do(g, out)) return;
      const cpu::Conv2dRun<scalar_t>& run = row.run(pass);
      const Conv2dOperands<scalar_t> operands{ac.const_data_ptr<scalar_t>(), bc.const_data_ptr<scalar_t>(), bias_data,
                                              result.data_ptr<scalar_t>()};
      const int64_t tasks = run.tasks(g), bytes = run.workspace(g) * int64_t(sizeof(scalar_t));
      const int64_t work = g.n * g.k * g.out[0] * g.out[1] * (g.c / g.groups) * g.kernel[0] * g.kernel[1];
      at::parallel_for(0, tasks, grain_for(work / tasks), [&](int64_t begin, int64_t end) {
        run.run(g, operands, static_cast<scalar_t*>(scratch(bytes)), begin, end);
      });
    }
  });
  copy_to(out, result);
}

// ---- check and allocate: the same for real sizes and symbolic ones ----

template <class Int>
struct Prepared {
  BasicConv2dGeometry<Int> geometry;
  Tensor out;
};

template <class Int>
Prepared<Int> prepare(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Settings& s) {
  check_dim("conv2d", "input", input, 4);
  check_dim("conv2d", "weight", weight, 4);
  check_alike("conv2d", {{"input", input}, {"weight", weight}, {"bias", bias ? *bias : Tensor()}});
  const auto g = conv2d_geometry<Int>("conv2d", sizes_of<Int>(input), sizes_of<Int>(weight), s.stride, s.padding,
                                      s.dilation, s.groups);
  if (bias) check_shape<Int>("conv2d", "bias", *bias, {g.k});
  check_algorithm(s.algorithm);
  const Int sizes[] = {g.n, g.k, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of({input, weight}))};
}

template <class Int>
Prepared<Int> prepare_grad_input(const Tensor& grad_output, const Tensor& weight, c10::ArrayRef<Int> input_size,
                                 const Settings& s) {
  const char* op = "conv2d_grad_input";
  check_dim(op, "grad_output", grad_output, 4);
  check_dim(op, "weight", weight, 4);
  check_alike(op, {{"grad_output", grad_output}, {"weight", weight}});
  TORCH_CHECK(input_size.size() == 2, op, ": expected input_size to be {h, w}, but got ", input_size);
  const auto w = sizes_of<Int>(weight);
  const Int sizes[] = {sizes_of<Int>(grad_output)[0], w[1] * s.groups, input_size[0], input_size[1]};
  const auto g = conv2d_geometry<Int>(op, sizes, w, s.stride, s.padding, s.dilation, s.groups);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.k, g.out[0], g.out[1]});
  check_algorithm(s.algorithm);
  return {g, empty<Int>(sizes, grad_output.options(), format_of({grad_output, weight}))};
}

template <class Int>
Prepared<Int> prepare_grad_weight(const Tensor& grad_output, const Tensor& input, c10::ArrayRef<Int> kernel_size,
                                  const Settings& s) {
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
  const auto g = conv2d_geometry<Int>(op, x, sizes, s.stride, s.padding, s.dilation, s.groups);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.k, g.out[0], g.out[1]});
  check_algorithm(s.algorithm);
  return {g, empty<Int>(sizes, input.options(), at::MemoryFormat::Contiguous)};
}

// ---- the operators on real tensors, and on meta tensors ----

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
              IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  const Settings s{stride, padding, dilation, groups, std::string(algorithm)};
  const auto [g, out] = prepare<int64_t>(input, weight, bias, s);
  run(g, Pass::forward, s.algorithm, input, weight, bias, out);
  return out;
}

Tensor conv2d_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  return prepare<c10::SymInt>(input, weight, bias, {stride, padding, dilation, groups, std::string(algorithm)}).out;
}

Tensor conv2d_grad_input(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  const Settings s{stride, padding, dilation, groups, std::string(algorithm)};
  const auto [g, out] = prepare_grad_input<int64_t>(grad_output, weight, input_size, s);
  run(g, Pass::grad_input, s.algorithm, grad_output, weight, {}, out);
  return out;
}

Tensor conv2d_grad_input_meta(const Tensor& grad_output, const Tensor& weight, c10::SymIntArrayRef input_size,
                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                              std::string_view algorithm) {
  return prepare_grad_input<c10::SymInt>(grad_output, weight, input_size,
                                         {stride, padding, dilation, groups, std::string(algorithm)})
      .out;
}

Tensor conv2d_grad_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  const Settings s{stride, padding, dilation, groups, std::string(algorithm)};
  const auto [g, out] = prepare_grad_weight<int64_t>(grad_output, input, kernel_size, s);
  run(g, Pass::grad_weight, s.algorithm, grad_output, input, {}, out);
  return g.n == 0 ? out.zero_() : out;
}

Tensor conv2d_grad_weight_meta(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                               std::string_view algorithm) {
  return prepare_grad_weight<c10::SymInt>(grad_output, input, kernel_size,
                                          {stride, padding, dilation, groups, std::string(algorithm)})
      .out;
}

// ---- the operators as others call them, and their derivatives ----

Tensor call_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const KeptSettings& s) {
  static const auto op = find_operator<decltype(conv2d)>("cnnops::conv2d");
  return op.call(input, weight, bias, s.stride, s.padding, s.dilation, s.groups, s.algorithm);
}

Tensor call_grad_input(const Tensor& grad_output, const Tensor& weight, c10::SymIntArrayRef input_size,
                       const KeptSettings& s) {
  static const auto op = find_operator<decltype(conv2d_grad_input_meta)>("cnnops::conv2d_grad_input");
  return op.call(grad_output, weight, input_size, s.stride, s.padding, s.dilation, s.groups, s.algorithm);
}

Tensor call_grad_weight(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                        const KeptSettings& s) {
  static const auto op = find_operator<decltype(conv2d_grad_weight_meta)>("cnnops::conv2d_grad_weight");
  return op.call(grad_output, input, kernel_size, s.stride, s.padding, s.dilation, s.groups, s.algorithm);
}

Tensor call_channel_sum(const Tensor& x) {
  static const auto op = find_operator<Tensor(const Tensor&)>("cnnops::channel_sum");
  return op.call(x);
}

c10::SymIntArrayRef plane_of(const Tensor& t) { return t.sym_sizes().slice(2); }

Tensor conv2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                       IntArrayRef padding, IntArrayRef dilation, int64_t groups, std::string_view algorithm) {
  const KeptSettings s({stride, padding, dilation, groups, std::string(algorithm)});
  return differentiable(
      "Conv2dBackward", {input, weight, bias ? *bias : Tensor()},
      [&] { return variable_list{call_conv2d(input, weight, bias, s)}; },
      [&](const variable_list&) { return variable_list{input, weight}; },
      [s](const Backward& b) {
        const Tensor &gy = b.grads[0], &input = b.kept[0], &weight = b.kept[1];
        return variable_list{b.needs(0) ? call_grad_input(gy, weight, plane_of(input), s) : Tensor(),
                             b.needs(1) ? call_grad_weight(gy, input, plane_of(weight), s) : Tensor(),
                             b.needs(2) ? call_channel_sum(gy) : Tensor()};
      })[0];
}

Tensor conv2d_grad_input_autograd(const Tensor& grad_output, const Tensor& weight, c10::SymIntArrayRef input_size,
                                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                  std::string_view algorithm) {
  const KeptSettings s({stride, padding, dilation, groups, std::string(algorithm)});
  return differentiable(
      "Conv2dGradInputBackward", {grad_output, weight},
      [&] { return variable_list{call_grad_input(grad_output, weight, input_size, s)}; },
      [&](const variable_list&) { return variable_list{grad_output, weight}; },
      [s](const Backward& b) {
        const Tensor &ggx = b.grads[0], &gy = b.kept[0], &weight = b.kept[1];
        return variable_list{b.needs(0) ? call_conv2d(ggx, weight, {}, s) : Tensor(),
                             b.needs(1) ? call_grad_weight(gy, ggx, plane_of(weight), s) : Tensor()};
      })[0];
}

Tensor conv2d_grad_weight_autograd(const Tensor& grad_output, const Tensor& input, c10::SymIntArrayRef kernel_size,
                                   IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                   std::string_view algorithm) {
  const KeptSettings s({stride, padding, dilation, groups, std::string(algorithm)});
  return differentiable(
      "Conv2dGradWeightBackward", {grad_output, input},
      [&] { return variable_list{call_grad_weight(grad_output, input, kernel_size, s)}; },
      [&](const variable_list&) { return variable_list{grad_output, input}; },
      [s](const Backward& b) {
        const Tensor &ggw = b.grads[0], &gy = b.kept[0], &input = b.kept[1];
        return variable_list{b.needs(0) ? call_conv2d(input, ggw, {}, s) : Tensor(),
                             b.needs(1) ? call_grad_input(gy, ggw, plane_of(input), s) : Tensor()};
      })[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
      "str algorithm) -> Tensor");
  m.def(
      "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[2] input_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, str algorithm) -> Tensor");
  m.def(
      "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, str algorithm) -> Tensor");
}

static void register_kernels(torch::Library& m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d_grad_input", conv2d_grad_input);
  m.impl("conv2d_grad_weight", conv2d_grad_weight);
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

}  // namespace cnnops
