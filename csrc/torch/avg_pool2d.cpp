// Average pooling, fixed and adaptive, from arguments to kernels. It is linear: its derivative in a direction is the
// average of the direction, its gradient an operator (`..._backward`) whose gradient is average pooling again.
#include "pool2d.h"

namespace cnnops {
namespace {

/// A kind of average: windows and what their sums are divided by. Adaptive windows divide by their own sizes.
struct FixedAverage : Fixed {
  static constexpr const char *name = "avg_pool2d", *backward_name = "avg_pool2d_backward";
  Divisor divisor;
  std::optional<int64_t> divisor_override;

  FixedAverage(const char* op, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
               bool count_include_pad, std::optional<int64_t> divisor_override)
      : Fixed(op, kernel_size, stride, padding, 1, ceil_mode),
        divisor{count_include_pad, divisor_override.value_or(0)},
        divisor_override(divisor_override) {
    TORCH_CHECK(!divisor_override || *divisor_override != 0, op, ": divisor must be not zero");
  }
};

struct AdaptiveAverage : Adaptive {
  static constexpr const char *name = "adaptive_avg_pool2d", *backward_name = "adaptive_avg_pool2d_backward";
  static constexpr Divisor divisor{true, 0};
  using Adaptive::Adaptive;
};

// ---- check, allocate, run ----

template <class Int, class Average>
PreparedPool<Int> prepare(const Tensor& input, const Average& average) {
  if constexpr (std::is_same_v<Average, AdaptiveAverage>) check_some_image(average.name, input);
  check_image(average.name, input);
  check_alike(average.name, {{"input", input}},
              std::is_same_v<Average, FixedAverage> ? Numbers::real_and_int64 : Numbers::real);
  const Layout layout = layout_of({input});
  const auto g = average.template geometry<Int>(average.name, sizes_of<Int>(input), layout);
  const Int sizes[] = {g.n, g.c, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of(layout))};
}

template <class Int, class Average>
PreparedPool<Int> prepare_backward(const Tensor& grad_output, c10::ArrayRef<Int> input_size, const Average& average) {
  const char* op = average.backward_name;
  check_alike(op, {{"grad_output", grad_output}});
  const auto sizes = input_sizes<Int>(op, grad_output, input_size);
  const Layout layout = layout_of({grad_output});
  const auto g = average.template geometry<Int>(op, sizes, layout);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.c, g.out[0], g.out[1]});
  return {g, empty<Int>(sizes, grad_output.options(), format_of(layout))};
}

template <class Average>
Tensor run(const Tensor& input, const Average& average) {
  const auto [g, y] = prepare<int64_t>(input, average);
  if (y.numel() == 0) return y;
  const Tensor x = in_layout(input, g.layout);
  with_number(x.scalar_type(), [&, &g = g, &y = y](auto number) {
    using S = decltype(number);
    run_on_device<S>(x, rows_of(g, g.out), row_grain(g), [&](const auto& kernels, const auto& call) {
      call(kernels.avg_pool2d, g, average.divisor, data_of<S>(x), mutable_data_of<S>(y));
    });
  });
  return y;
}

template <class Average>
Tensor run_backward(const Tensor& grad_output, IntArrayRef input_size, const Average& average) {
  const auto [g, gx] = prepare_backward<int64_t>(grad_output, input_size, average);
  if (grad_output.numel() == 0) return gx.zero_();
  const Tensor gy = in_layout(grad_output, g.layout);
  with_real_number(gy.scalar_type(), [&, &g = g, &gx = gx](auto number) {
    using S = decltype(number);
    run_on_device<S>(gy, rows_of(g, g.in), row_grain(g), [&](const auto& kernels, const auto& call) {
      call(kernels.avg_pool2d_backward, g, average.divisor, data_of<S>(gy), mutable_data_of<S>(gx));
    });
  });
  return gx;
}

// ---- the operators ----

Tensor avg_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                  bool count_include_pad, std::optional<int64_t> divisor_override) {
  const FixedAverage average("avg_pool2d", kernel_size, stride, padding, ceil_mode, count_include_pad,
                             divisor_override);
  return batched(input, [&](const Tensor& x) { return run(x, average); });
}

Tensor avg_pool2d_meta(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                       bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  const FixedAverage average("avg_pool2d", kernel_size, stride, padding, ceil_mode, count_include_pad,
                             divisor_override);
  return batched(input, [&](const Tensor& x) { return prepare<c10::SymInt>(x, average).out; });
}

Tensor avg_pool2d_backward(const Tensor& grad_output, IntArrayRef input_size, IntArrayRef kernel_size,
                           IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override) {
  return run_backward(grad_output, input_size,
                      FixedAverage("avg_pool2d_backward", kernel_size, stride, padding, ceil_mode, count_include_pad,
                                   divisor_override));
}

Tensor avg_pool2d_backward_meta(const Tensor& grad_output, c10::SymIntArrayRef input_size, IntArrayRef kernel_size,
                                IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                                std::optional<int64_t> divisor_override) {
  const FixedAverage average("avg_pool2d_backward", kernel_size, stride, padding, ceil_mode, count_include_pad,
                             divisor_override);
  return prepare_backward<c10::SymInt>(grad_output, input_size, average).out;
}

Tensor adaptive_avg_pool2d(const Tensor& input, c10::SymIntArrayRef output_size) {
  return batched(input, [&](const Tensor& x) { return run(x, AdaptiveAverage(output_size)); });
}

Tensor adaptive_avg_pool2d_meta(const Tensor& input, c10::SymIntArrayRef output_size) {
  return batched(input, [&](const Tensor& x) { return prepare<c10::SymInt>(x, AdaptiveAverage(output_size)).out; });
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad_output, IntArrayRef input_size) {
  check_dim("adaptive_avg_pool2d_backward", "grad_output", grad_output, 4);
  return run_backward(grad_output, input_size, AdaptiveAverage(plane_of(grad_output)));
}

Tensor adaptive_avg_pool2d_backward_meta(const Tensor& grad_output, c10::SymIntArrayRef input_size) {
  check_dim("adaptive_avg_pool2d_backward", "grad_output", grad_output, 4);
  return prepare_backward<c10::SymInt>(grad_output, input_size, AdaptiveAverage(plane_of(grad_output))).out;
}

// ---- derivatives ----

const c10::TypedOperatorHandle<decltype(avg_pool2d)>& avg_operator() {
  static const auto op = find_operator<decltype(avg_pool2d)>("cnnops::avg_pool2d");
  return op;
}

Tensor call(const Tensor& input, const FixedAverage& a) {
  return avg_operator().call(input, a.kernel_size, a.stride, a.padding, a.ceil_mode, a.divisor.count_include_pad,
                             a.divisor_override);
}

Tensor call(const Tensor& input, const AdaptiveAverage& a) {
  static const auto op = find_operator<decltype(adaptive_avg_pool2d)>("cnnops::adaptive_avg_pool2d");
  return op.call(input, a.output_size);
}

Tensor call_backward(const Tensor& grad_output, c10::SymIntArrayRef input_size, const FixedAverage& a) {
  static const auto op = find_operator<decltype(avg_pool2d_backward_meta)>("cnnops::avg_pool2d_backward");
  return op.call(grad_output, input_size, a.kernel_size, a.stride, a.padding, a.ceil_mode, a.divisor.count_include_pad,
                 a.divisor_override);
}

Tensor call_backward(const Tensor& grad_output, c10::SymIntArrayRef input_size, const AdaptiveAverage&) {
  static const auto op =
      find_operator<decltype(adaptive_avg_pool2d_backward_meta)>("cnnops::adaptive_avg_pool2d_backward");
  return op.call(grad_output, input_size);
}

const auto keep_nothing = [](const variable_list&) { return variable_list{}; };

template <class Average>
Tensor differentiable_average(const Tensor& input, const Average& a) {
  if (!may_be_differentiated(input)) return below_autograd([&] { return call(input, a); });
  return batched(input, [&](const Tensor& x) {
    std::vector<c10::SymInt> plane;  // a tensor of another dimension is refused by the operator itself
    if (x.dim() == 4) plane = plane_of(x).vec();
    return differentiable(
        "AvgPool2dBackward", {x}, [&] { return variable_list{call(x, a)}; }, keep_nothing,
        [a, plane](const Backward& b) { return variable_list{call_backward(b.grads[0], plane, a)}; },
        [&](const variable_list&, const variable_list& tangents, const variable_list&) {
          return variable_list{call(tangents[0], a)};
        })[0];
  });
}

template <class Average>
Tensor differentiable_backward(const Tensor& grad_output, c10::SymIntArrayRef input_size, const Average& a) {
  return differentiable(
      "AvgPool2dBackwardBackward", {grad_output},
      [&] { return variable_list{call_backward(grad_output, input_size, a)}; }, keep_nothing,
      [a](const Backward& b) { return variable_list{call(b.grads[0], a)}; },
      [&](const variable_list&, const variable_list& tangents, const variable_list&) {
        return variable_list{call_backward(tangents[0], input_size, a)};
      })[0];
}

Tensor avg_pool2d_autograd(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                           bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  if (!may_be_differentiated(input)) {
    return below_autograd([&] {
      return avg_operator().call(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override);
    });
  }
  return differentiable_average(
      input, FixedAverage("avg_pool2d", kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override));
}

Tensor avg_pool2d_backward_autograd(const Tensor& grad_output, c10::SymIntArrayRef input_size, IntArrayRef kernel_size,
                                    IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                                    std::optional<int64_t> divisor_override) {
  return differentiable_backward(grad_output, input_size,
                                 FixedAverage("avg_pool2d_backward", kernel_size, stride, padding, ceil_mode,
                                              count_include_pad, divisor_override));
}

Tensor adaptive_avg_pool2d_autograd(const Tensor& input, c10::SymIntArrayRef output_size) {
  return differentiable_average(input, AdaptiveAverage(output_size));
}

Tensor adaptive_avg_pool2d_backward_autograd(const Tensor& grad_output, c10::SymIntArrayRef input_size) {
  check_dim("adaptive_avg_pool2d_backward", "grad_output", grad_output, 4);
  return differentiable_backward(grad_output, input_size, AdaptiveAverage(plane_of(grad_output)));
}

void register_kernels(torch::Library& m) {
  m.impl("avg_pool2d", avg_pool2d);
  m.impl("avg_pool2d_backward", avg_pool2d_backward);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d);
  m.impl("adaptive_avg_pool2d_backward", adaptive_avg_pool2d_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "avg_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, bool ceil_mode=False, "
      "bool count_include_pad=True, int? divisor_override=None) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size, int[2] kernel_size, int[2] stride=[], "
      "int[2] padding=0, bool ceil_mode=False, bool count_include_pad=True, int? divisor_override=None) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor input, SymInt[2] output_size) -> Tensor");
  m.def("adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(cnnops, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  m.impl("avg_pool2d", avg_pool2d_meta);
  m.impl("avg_pool2d_backward", avg_pool2d_backward_meta);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d_meta);
  m.impl("adaptive_avg_pool2d_backward", adaptive_avg_pool2d_backward_meta);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  m.impl("avg_pool2d", avg_pool2d_autograd);
  m.impl("avg_pool2d_backward", avg_pool2d_backward_autograd);
  m.impl("adaptive_avg_pool2d", adaptive_avg_pool2d_autograd);
  m.impl("adaptive_avg_pool2d_backward", adaptive_avg_pool2d_backward_autograd);
}

}  // namespace cnnops
