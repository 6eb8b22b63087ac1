// Max pooling, fixed and adaptive, and its partial inverse, from arguments to kernels.
//
// Max pooling is a gather: it returns, beside the largest values, where in its window each was found, in one byte. Its
// derivative in any direction is the gather of that direction at these places (`..._gather`), whose transpose
// (`..._backward`) is the gradient; the two are each other's derivatives.
#include "pool2d.h"

namespace cnnops {
namespace {

struct FixedMax : Fixed {
  static constexpr const char *name = "max_pool2d", *backward_name = "max_pool2d_backward",
                              *gather_name = "max_pool2d_gather";
  static constexpr Numbers numbers = Numbers::real_and_integers;
  using Fixed::Fixed;
};

struct AdaptiveMax : Adaptive {
  static constexpr const char *name = "adaptive_max_pool2d", *backward_name = "adaptive_max_pool2d_backward",
                              *gather_name = "adaptive_max_pool2d_gather";
  static constexpr Numbers numbers = Numbers::real;
  using Adaptive::Adaptive;
};

// ---- positions: where in its window a maximum was found, kh*KW + kw ----

/// The number of places of a window, or a little more.
template <class Int>
Int places_of(const FixedMax& w, const BasicPool2dGeometry<Int>&) {
  int64_t places;
  TORCH_CHECK(!__builtin_mul_overflow(w.kernel_size[0], w.kernel_size[1], &places) && places <= kMostPool2d, w.name,
              ": windows of more than 2^31 places are not supported, but got kernel_size=", IntArrayRef(w.kernel_size));
  return places;
}

template <class Int>
Int places_of(const AdaptiveMax& w, const BasicPool2dGeometry<Int>& g) {
  Int places = 1;
  for (int dim = 0; dim < 2; ++dim) {
    if (g.out[dim] > 0) places = places * ((g.in[dim] - 1) / g.out[dim] + 2);
  }
  TORCH_CHECK(places <= kMostPool2d, w.name,
              ": windows of more than 2^31 places are not supported, but got an image of ", g.in[0], " x ", g.in[1],
              " for output_size=(", g.out[0], ", ", g.out[1], ")");
  return places;
}

at::ScalarType dtype_of_positions(bool fit_a_byte) { return fit_a_byte ? at::kByte : at::kInt; }

template <class Max, class Int>
void check_positions(const char* op, const Max& max, const Tensor& positions, const BasicPool2dGeometry<Int>& g,
                     const Tensor& beside) {
  const auto dtype = dtype_of_positions(places_of(max, g) <= 256);
  TORCH_CHECK(positions.scalar_type() == dtype, op, ": expected positions of dtype ", dtype, ", but got ",
              positions.scalar_type());
  TORCH_CHECK(positions.device() == beside.device(), op, ": expected all tensors to be on the same device, but ",
              "positions is on ", positions.device(), " and another on ", beside.device());
  check_shape<Int>(op, "positions", positions, {g.n, g.c, g.out[0], g.out[1]});
}

/// Calls f(kernels of the right width, pointer to positions).
template <class Kernels, class F>
void with_positions(const Kernels& kernels, const Tensor& positions, const F& f) {
  if (positions.scalar_type() == at::kByte) {
    f(kernels.max_pool2d, mutable_data_of<uint8_t>(positions));
  } else {
    f(kernels.max_pool2d_wide, mutable_data_of<int32_t>(positions));
  }
}

// ---- check and allocate ----

template <class Int>
struct PreparedMax {
  BasicPool2dGeometry<Int> geometry;
  Tensor values, positions;
};

template <class Int, class Max>
PreparedMax<Int> prepare(const Tensor& input, const Max& max) {
  if constexpr (std::is_same_v<Max, AdaptiveMax>) check_some_image(max.name, input);
  check_image(max.name, input);
  check_alike(max.name, {{"input", input}}, max.numbers);
  const Layout layout = layout_of({input});
  const auto g = max.template geometry<Int>(max.name, sizes_of<Int>(input), layout);
  const auto dtype = dtype_of_positions(places_of(max, g) <= 256);
  const Int sizes[] = {g.n, g.c, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of(layout)),
          empty<Int>(sizes, input.options().dtype(dtype), format_of(layout))};
}

template <class Int, class Max>
PreparedPool<Int> prepare_backward(const Tensor& grad_output, const Tensor& positions, c10::ArrayRef<Int> input_size,
                                   const Max& max) {
  const char* op = max.backward_name;
  check_alike(op, {{"grad_output", grad_output}});
  const auto sizes = input_sizes<Int>(op, grad_output, input_size);
  const Layout layout = layout_of({positions});
  const auto g = max.template geometry<Int>(op, sizes, layout);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.c, g.out[0], g.out[1]});
  check_positions(op, max, positions, g, grad_output);
  return {g, empty<Int>(sizes, grad_output.options(), format_of(layout))};
}

template <class Int, class Max>
PreparedPool<Int> prepare_gather(const Tensor& input, const Tensor& positions, const Max& max) {
  const char* op = max.gather_name;
  check_dim(op, "input", input, 4);
  check_alike(op, {{"input", input}});
  const Layout layout = layout_of({positions});
  const auto g = max.template geometry<Int>(op, sizes_of<Int>(input), layout);
  check_positions(op, max, positions, g, input);
  const Int sizes[] = {g.n, g.c, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of(layout))};
}

// ---- run ----

template <class Max>
TwoTensors run(const Tensor& input, const Max& max) {
  return two_batched(input, [&](const Tensor& input) -> TwoTensors {
    const auto [g, y, p] = prepare<int64_t>(input, max);
    if (y.numel() == 0) return {y, p};
    const Tensor x = in_layout(input, g.layout);
    with_number(x.scalar_type(), [&, &g = g, &y = y, &p = p](auto number) {
      using S = decltype(number);
      run_on_device<S>(x, rows_of(g, g.out), row_grain(g), [&](const auto& kernels, const auto& call) {
        with_positions(kernels, p, [&](const auto& max, auto* positions) {
          call(max.forward, g, data_of<S>(x), mutable_data_of<S>(y), positions);
        });
      });
    });
    return {y, p};
  });
}

template <class Max>
TwoTensors run_meta(const Tensor& input, const Max& max) {
  return two_batched(input, [&](const Tensor& input) -> TwoTensors {
    const auto p = prepare<c10::SymInt>(input, max);
    return {p.values, p.positions};
  });
}

template <class Max>
Tensor run_backward(const Tensor& grad_output, const Tensor& positions, IntArrayRef input_size, const Max& max) {
  const auto [g, gx] = prepare_backward<int64_t>(grad_output, positions, input_size, max);
  if (grad_output.numel() == 0) return gx.zero_();
  const Tensor gy = in_layout(grad_output, g.layout), p = in_layout(positions, g.layout);
  with_real_number(gy.scalar_type(), [&, &g = g, &gx = gx](auto number) {
    using S = decltype(number);
    run_on_device<S>(gy, rows_of(g, g.in), row_grain(g), [&](const auto& kernels, const auto& call) {
      with_positions(kernels, p, [&](const auto& max, const auto* positions) {
        call(max.backward, g, data_of<S>(gy), positions, mutable_data_of<S>(gx));
      });
    });
  });
  return gx;
}

template <class Max>
Tensor run_gather(const Tensor& input, const Tensor& positions, const Max& max) {
  const auto [g, y] = prepare_gather<int64_t>(input, positions, max);
  if (y.numel() == 0) return y;
  const Tensor x = in_layout(input, g.layout), p = in_layout(positions, g.layout);
  with_real_number(x.scalar_type(), [&, &g = g, &y = y](auto number) {
    using S = decltype(number);
    run_on_device<S>(x, rows_of(g, g.out), row_grain(g), [&](const auto& kernels, const auto& call) {
      with_positions(kernels, p, [&](const auto& max, const auto* positions) {
        call(max.gather, g, data_of<S>(x), positions, mutable_data_of<S>(y));
      });
    });
  });
  return y;
}

// ---- the operators ----

TwoTensors max_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                      IntArrayRef dilation, bool ceil_mode) {
  return run(input, FixedMax("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode));
}

TwoTensors max_pool2d_meta(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                           IntArrayRef dilation, bool ceil_mode) {
  return run_meta(input, FixedMax("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode));
}

Tensor max_pool2d_backward(const Tensor& grad_output, const Tensor& positions, IntArrayRef input_size,
                           IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                           bool ceil_mode) {
  return run_backward(grad_output, positions, input_size,
                      FixedMax("max_pool2d_backward", kernel_size, stride, padding, dilation, ceil_mode));
}

Tensor max_pool2d_backward_meta(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                                IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                bool ceil_mode) {
  const FixedMax max("max_pool2d_backward", kernel_size, stride, padding, dilation, ceil_mode);
  return prepare_backward<c10::SymInt>(grad_output, positions, input_size, max).out;
}

Tensor max_pool2d_gather(const Tensor& input, const Tensor& positions, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  return run_gather(input, positions, FixedMax("max_pool2d_gather", kernel_size, stride, padding, dilation, ceil_mode));
}

Tensor max_pool2d_gather_meta(const Tensor& input, const Tensor& positions, IntArrayRef kernel_size, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const FixedMax max("max_pool2d_gather", kernel_size, stride, padding, dilation, ceil_mode);
  return prepare_gather<c10::SymInt>(input, positions, max).out;
}

TwoTensors adaptive_max_pool2d(const Tensor& input, c10::SymIntArrayRef output_size) {
  return run(input, AdaptiveMax(output_size));
}

TwoTensors adaptive_max_pool2d_meta(const Tensor& input, c10::SymIntArrayRef output_size) {
  return run_meta(input, AdaptiveMax(output_size));
}

AdaptiveMax adaptive_of(const char* op, const Tensor& outputs) {
  check_dim(op, op == AdaptiveMax::gather_name ? "positions" : "grad_output", outputs, 4);
  return AdaptiveMax(plane_of(outputs));
}

Tensor adaptive_max_pool2d_backward(const Tensor& grad_output, const Tensor& positions, IntArrayRef input_size) {
  return run_backward(grad_output, positions, input_size, adaptive_of(AdaptiveMax::backward_name, grad_output));
}

Tensor adaptive_max_pool2d_backward_meta(const Tensor& grad_output, const Tensor& positions,
                                         c10::SymIntArrayRef input_size) {
  const AdaptiveMax max = adaptive_of(AdaptiveMax::backward_name, grad_output);
  return prepare_backward<c10::SymInt>(grad_output, positions, input_size, max).out;
}

Tensor adaptive_max_pool2d_gather(const Tensor& input, const Tensor& positions) {
  return run_gather(input, positions, adaptive_of(AdaptiveMax::gather_name, positions));
}

Tensor adaptive_max_pool2d_gather_meta(const Tensor& input, const Tensor& positions) {
  return prepare_gather<c10::SymInt>(input, positions, adaptive_of(AdaptiveMax::gather_name, positions)).out;
}

// ---- derivatives ----

TwoTensors call(const Tensor& input, const FixedMax& w) {
  static const auto op = find_operator<decltype(max_pool2d)>("cnnops::max_pool2d");
  return op.call(input, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

TwoTensors call(const Tensor& input, const AdaptiveMax& w) {
  static const auto op = find_operator<decltype(adaptive_max_pool2d)>("cnnops::adaptive_max_pool2d");
  return op.call(input, w.output_size);
}

Tensor call_backward(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                     const FixedMax& w) {
  static const auto op = find_operator<decltype(max_pool2d_backward_meta)>("cnnops::max_pool2d_backward");
  return op.call(grad_output, positions, input_size, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

Tensor call_backward(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                     const AdaptiveMax&) {
  static const auto op =
      find_operator<decltype(adaptive_max_pool2d_backward_meta)>("cnnops::adaptive_max_pool2d_backward");
  return op.call(grad_output, positions, input_size);
}

Tensor call_gather(const Tensor& input, const Tensor& positions, const FixedMax& w) {
  static const auto op = find_operator<decltype(max_pool2d_gather)>("cnnops::max_pool2d_gather");
  return op.call(input, positions, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

Tensor call_gather(const Tensor& input, const Tensor& positions, const AdaptiveMax&) {
  static const auto op = find_operator<decltype(adaptive_max_pool2d_gather)>("cnnops::adaptive_max_pool2d_gather");
  return op.call(input, positions);
}

/// {h, w} to keep; a tensor of another dimension is refused by the operator itself.
std::vector<c10::SymInt> plane_if_any(const Tensor& t) {
  return t.dim() == 4 ? plane_of(t).vec() : std::vector<c10::SymInt>();
}

template <class Max>
TwoTensors differentiable_max(const Tensor& input, const Max& w) {
  if (!may_be_differentiated(input)) return below_autograd([&] { return call(input, w); });
  return two_batched(input, [&](const Tensor& x) -> TwoTensors {
    const auto outputs = differentiable(
        "MaxPool2dBackward", {x},
        [&] {
          const auto [values, positions] = call(x, w);
          return variable_list{values, positions};
        },
        [](const variable_list& outputs) { return variable_list{outputs[1]}; },
        [w, plane = plane_if_any(x)](const Backward& b) {
          return variable_list{b.grads[0].defined() ? call_backward(b.grads[0], b.kept[0], plane, w) : Tensor()};
        },
        [&](const variable_list&, const variable_list& tangents, const variable_list& outputs) {
          return variable_list{call_gather(tangents[0], outputs[1], w)};
        });
    return {outputs[0], outputs[1]};
  });
}

template <class Max>
Tensor differentiable_backward(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                               const Max& w) {
  return differentiable(
      "MaxPool2dBackwardBackward", {grad_output},
      [&] { return variable_list{call_backward(grad_output, positions, input_size, w)}; },
      [&](const variable_list&) { return variable_list{positions}; },
      [w](const Backward& b) { return variable_list{call_gather(b.grads[0], b.kept[0], w)}; },
      [&](const variable_list&, const variable_list& tangents, const variable_list&) {
        return variable_list{call_backward(tangents[0], positions, input_size, w)};
      })[0];
}

template <class Max>
Tensor differentiable_gather(const Tensor& input, const Tensor& positions, const Max& w) {
  return differentiable(
      "MaxPool2dGatherBackward", {input}, [&] { return variable_list{call_gather(input, positions, w)}; },
      [&](const variable_list&) { return variable_list{positions}; },
      [w, plane = plane_if_any(input)](const Backward& b) {
        return variable_list{call_backward(b.grads[0], b.kept[0], plane, w)};
      },
      [&](const variable_list&, const variable_list& tangents, const variable_list&) {
        return variable_list{call_gather(tangents[0], positions, w)};
      })[0];
}

TwoTensors max_pool2d_autograd(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                               IntArrayRef dilation, bool ceil_mode) {
  return differentiable_max(input, FixedMax("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode));
}

Tensor max_pool2d_backward_autograd(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                                    IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                    IntArrayRef dilation, bool ceil_mode) {
  const FixedMax max("max_pool2d_backward", kernel_size, stride, padding, dilation, ceil_mode);
  return differentiable_backward(grad_output, positions, input_size, max);
}

Tensor max_pool2d_gather_autograd(const Tensor& input, const Tensor& positions, IntArrayRef kernel_size,
                                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const FixedMax max("max_pool2d_gather", kernel_size, stride, padding, dilation, ceil_mode);
  return differentiable_gather(input, positions, max);
}

TwoTensors adaptive_max_pool2d_autograd(const Tensor& input, c10::SymIntArrayRef output_size) {
  return differentiable_max(input, AdaptiveMax(output_size));
}

Tensor adaptive_max_pool2d_backward_autograd(const Tensor& grad_output, const Tensor& positions,
                                             c10::SymIntArrayRef input_size) {
  return differentiable_backward(grad_output, positions, input_size,
                                 adaptive_of(AdaptiveMax::backward_name, grad_output));
}

Tensor adaptive_max_pool2d_gather_autograd(const Tensor& input, const Tensor& positions) {
  return differentiable_gather(input, positions, adaptive_of(AdaptiveMax::gather_name, positions));
}

void register_kernels(torch::Library& m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_backward", max_pool2d_backward);
  m.impl("max_pool2d_gather", max_pool2d_gather);
  m.impl("adaptive_max_pool2d", adaptive_max_pool2d);
  m.impl("adaptive_max_pool2d_backward", adaptive_max_pool2d_backward);
  m.impl("adaptive_max_pool2d_gather", adaptive_max_pool2d_gather);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
      "bool ceil_mode=False) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor positions, SymInt[2] input_size, int[2] kernel_size, "
      "int[2] stride=[], int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> Tensor");
  m.def(
      "max_pool2d_gather(Tensor input, Tensor positions, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False) -> Tensor");
  m.def("adaptive_max_pool2d(Tensor input, SymInt[2] output_size) -> (Tensor, Tensor)");
  m.def("adaptive_max_pool2d_backward(Tensor grad_output, Tensor positions, SymInt[2] input_size) -> Tensor");
  m.def("adaptive_max_pool2d_gather(Tensor input, Tensor positions) -> Tensor");
}

TORCH_LIBRARY_IMPL(cnnops, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  m.impl("max_pool2d", max_pool2d_meta);
  m.impl("max_pool2d_backward", max_pool2d_backward_meta);
  m.impl("max_pool2d_gather", max_pool2d_gather_meta);
  m.impl("adaptive_max_pool2d", adaptive_max_pool2d_meta);
  m.impl("adaptive_max_pool2d_backward", adaptive_max_pool2d_backward_meta);
  m.impl("adaptive_max_pool2d_gather", adaptive_max_pool2d_gather_meta);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  m.impl("max_pool2d", max_pool2d_autograd);
  m.impl("max_pool2d_backward", max_pool2d_backward_autograd);
  m.impl("max_pool2d_gather", max_pool2d_gather_autograd);
  m.impl("adaptive_max_pool2d", adaptive_max_pool2d_autograd);
  m.impl("adaptive_max_pool2d_backward", adaptive_max_pool2d_backward_autograd);
  m.impl("adaptive_max_pool2d_gather", adaptive_max_pool2d_gather_autograd);
}

}  // namespace cnnops
