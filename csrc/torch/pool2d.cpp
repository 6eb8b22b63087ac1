// Max and average pooling, from arguments to kernels.
//
// Max pooling is a gather: it returns, beside the largest values, where in its window each was found, in one byte. Its
// derivative in any direction is the gather of that direction at these places (max_pool2d_gather), whose transpose
// (max_pool2d_backward) is the gradient; the two are each other's derivatives. Average pooling is linear, and likewise
// the transpose of its transpose.
#include "autograd.h"
#include "checks.h"
#include "run.h"

namespace cnnops {
namespace {

constexpr int64_t kBytePlaces = 256;  // positions are uint8 while the window has at most this many places

struct Window {
  IntArrayRef kernel_size, stride, padding, dilation;
  bool ceil_mode;
};

struct KeptWindow {
  std::vector<int64_t> kernel_size, stride, padding, dilation;
  bool ceil_mode;
  explicit KeptWindow(const Window& w)
      : kernel_size(w.kernel_size.vec()),
        stride(w.stride.vec()),
        padding(w.padding.vec()),
        dilation(w.dilation.vec()),
        ceil_mode(w.ceil_mode) {}
};

struct KeptAverage {
  std::vector<int64_t> kernel_size, stride, padding;
  bool ceil_mode, count_include_pad;
  std::optional<int64_t> divisor_override;
};

template <class Int>
BasicPool2dGeometry<Int> geometry(const char* op, c10::ArrayRef<Int> input, const Window& w) {
  return pool2d_geometry<Int>(op, input, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

at::ScalarType position_type(const Window& w) {
  return w.kernel_size[0] * w.kernel_size[1] <= kBytePlaces ? at::kByte : at::kInt;
}

/// The sizes {n, c, h, w} of a pooling's input, given its gradient and {h, w}.
template <class Int>
std::array<Int, 4> input_sizes(const char* op, const Tensor& grad_output, c10::ArrayRef<Int> input_size) {
  check_dim(op, "grad_output", grad_output, 4);
  check_alike(op, {{"grad_output", grad_output}});
  TORCH_CHECK(input_size.size() == 2, op, ": expected input_size to be {h, w}, but got ", input_size);
  const auto grad = sizes_of<Int>(grad_output);
  return {grad[0], grad[1], input_size[0], input_size[1]};
}

template <class Int>
void check_positions(const char* op, const Tensor& positions, const Tensor& like, const BasicPool2dGeometry<Int>& g,
                     const Window& w) {
  TORCH_CHECK(positions.scalar_type() == position_type(w), op, ": expected positions of dtype ", position_type(w),
              " for kernel_size=", w.kernel_size, ", but got ", positions.scalar_type());
  TORCH_CHECK(positions.device() == like.device(), op, ": expected all tensors to be on the same device, but got ",
              like.device(), " and ", positions.device());
  check_dim(op, "positions", positions, 4);
  check_shape<Int>(op, "positions", positions, {g.n, g.c, g.out[0], g.out[1]});
}

Divisor divisor_of(bool count_include_pad, std::optional<int64_t> divisor_override) {
  TORCH_CHECK(!divisor_override || *divisor_override != 0, "avg_pool2d: divisor_override must not be zero");
  return {count_include_pad, divisor_override.value_or(0)};
}

/// Calls run(table of kernels, pointer to positions) with the positions' type.
template <class Kernels, class Run>
void with_positions(const Kernels& kernels, const Tensor& positions, const Run& run) {
  if (positions.scalar_type() == at::kByte) {
    run(kernels.max_pool2d, positions.data_ptr<uint8_t>());
  } else {
    run(kernels.max_pool2d_wide, positions.data_ptr<int32_t>());
  }
}

int64_t output_rows(const Pool2dGeometry& g) { return g.n * g.c * g.out[0]; }
int64_t input_rows(const Pool2dGeometry& g) { return g.n * g.c * g.in[0]; }
int64_t row_grain(const Pool2dGeometry& g) { return grain_for(g.out[1] * g.kernel[0] * g.kernel[1]); }

// ---- max pooling: check and allocate ----

template <class Int>
struct MaxPrepared {
  BasicPool2dGeometry<Int> geometry;
  Tensor values, positions;
};

template <class Int>
MaxPrepared<Int> prepare_max(const Tensor& input, const Window& w) {
  check_dim("max_pool2d", "input", input, 4);
  check_alike("max_pool2d", {{"input", input}});
  const auto g = geometry<Int>("max_pool2d", sizes_of<Int>(input), w);
  TORCH_CHECK(g.kernel[0] <= kMostPool2d / g.kernel[1], "max_pool2d: a window of kernel_size=", w.kernel_size,
              " has more than ", kMostPool2d, " places");
  const Int sizes[] = {g.n, g.c, g.out[0], g.out[1]};
  const auto format = format_of({input});
  return {g, empty<Int>(sizes, input.options(), format),
          empty<Int>(sizes, input.options().dtype(position_type(w)), format)};
}

template <class Int>
struct Prepared {
  BasicPool2dGeometry<Int> geometry;
  Tensor out;
};

template <class Int>
Prepared<Int> prepare_max_backward(const Tensor& grad_output, const Tensor& positions, c10::ArrayRef<Int> input_size,
                                   const Window& w) {
  const char* op = "max_pool2d_backward";
  const auto sizes = input_sizes<Int>(op, grad_output, input_size);
  const auto g = geometry<Int>(op, sizes, w);
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.c, g.out[0], g.out[1]});
  check_positions(op, positions, grad_output, g, w);
  return {g, empty<Int>(sizes, grad_output.options(), format_of({grad_output}))};
}

template <class Int>
Prepared<Int> prepare_gather(const Tensor& input, const Tensor& positions, const Window& w) {
  const char* op = "max_pool2d_gather";
  check_dim(op, "input", input, 4);
  check_alike(op, {{"input", input}});
  const auto g = geometry<Int>(op, sizes_of<Int>(input), w);
  check_positions(op, positions, input, g, w);
  const Int sizes[] = {g.n, g.c, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of({input}))};
}

// ---- max pooling: the operators ----

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                      IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const auto [g, values, positions] = prepare_max<int64_t>(input, {kernel_size, stride, padding, dilation, ceil_mode});
  const Tensor x = input.contiguous(), y = contiguous_like(values), p = contiguous_like(positions);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "max_pool2d", [&, &g = g] {
    run_on_device<scalar_t>(x, output_rows(g), row_grain(g), [&](const auto& kernels, const auto& call) {
      with_positions(kernels, p, [&](const auto& max, auto* positions) {
        call(max.forward, g, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), positions);
      });
    });
  });
  copy_to(values, y);
  copy_to(positions, p);
  return {values, positions};
}

std::tuple<Tensor, Tensor> max_pool2d_meta(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                           IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const auto p = prepare_max<c10::SymInt>(input, {kernel_size, stride, padding, dilation, ceil_mode});
  return {p.values, p.positions};
}

Tensor max_pool2d_backward(const Tensor& grad_output, const Tensor& positions, IntArrayRef input_size,
                           IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                           bool ceil_mode) {
  const auto [g, out] = prepare_max_backward<int64_t>(grad_output, positions, input_size,
                                                      {kernel_size, stride, padding, dilation, ceil_mode});
  const Tensor gy = grad_output.contiguous(), p = positions.contiguous(), gx = contiguous_like(out);
  AT_DISPATCH_FLOATING_TYPES(gy.scalar_type(), "max_pool2d_backward", [&, &g = g] {
    run_on_device<scalar_t>(gy, input_rows(g), row_grain(g), [&](const auto& kernels, const auto& call) {
      with_positions(kernels, p, [&](const auto& max, const auto* positions) {
        call(max.backward, g, gy.const_data_ptr<scalar_t>(), positions, gx.data_ptr<scalar_t>());
      });
    });
  });
  copy_to(out, gx);
  return out;
}

Tensor max_pool2d_backward_meta(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                                IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                bool ceil_mode) {
  return prepare_max_backward<c10::SymInt>(grad_output, positions, input_size,
                                           {kernel_size, stride, padding, dilation, ceil_mode})
      .out;
}

Tensor max_pool2d_gather(const Tensor& input, const Tensor& positions, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const auto [g, out] = prepare_gather<int64_t>(input, positions, {kernel_size, stride, padding, dilation, ceil_mode});
  const Tensor x = input.contiguous(), p = positions.contiguous(), y = contiguous_like(out);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "max_pool2d_gather", [&, &g = g] {
    run_on_device<scalar_t>(x, output_rows(g), row_grain(g), [&](const auto& kernels, const auto& call) {
      with_positions(kernels, p, [&](const auto& max, const auto* positions) {
        call(max.gather, g, x.const_data_ptr<scalar_t>(), positions, y.data_ptr<scalar_t>());
      });
    });
  });
  copy_to(out, y);
  return out;
}

Tensor max_pool2d_gather_meta(const Tensor& input, const Tensor& positions, IntArrayRef kernel_size, IntArrayRef stride,
                              IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  return prepare_gather<c10::SymInt>(input, positions, {kernel_size, stride, padding, dilation, ceil_mode}).out;
}

// ---- max pooling: derivatives ----

std::tuple<Tensor, Tensor> call_max(const Tensor& input, const KeptWindow& w) {
  static const auto op = find_operator<decltype(max_pool2d)>("cnnops::max_pool2d");
  return op.call(input, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

Tensor call_max_backward(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                         const KeptWindow& w) {
  static const auto op = find_operator<decltype(max_pool2d_backward_meta)>("cnnops::max_pool2d_backward");
  return op.call(grad_output, positions, input_size, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

Tensor call_gather(const Tensor& input, const Tensor& positions, const KeptWindow& w) {
  static const auto op = find_operator<decltype(max_pool2d_gather)>("cnnops::max_pool2d_gather");
  return op.call(input, positions, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode);
}

using SymInts = std::vector<c10::SymInt>;

std::tuple<Tensor, Tensor> max_pool2d_autograd(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride,
                                               IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const KeptWindow w({kernel_size, stride, padding, dilation, ceil_mode});
  SymInts plane;  // input's {h, w}; a tensor of another dimension is refused by the operator itself
  if (input.dim() == 4) plane = input.sym_sizes().slice(2).vec();
  const auto outputs = differentiable(
      "MaxPool2dBackward", {input},
      [&] {
        const auto [values, positions] = call_max(input, w);
        return variable_list{values, positions};
      },
      [](const variable_list& outputs) { return variable_list{outputs[1]}; },
      [w, plane](const Backward& b) {
        return variable_list{b.grads[0].defined() ? call_max_backward(b.grads[0], b.kept[0], plane, w) : Tensor()};
      });
  return {outputs[0], outputs[1]};
}

Tensor max_pool2d_backward_autograd(const Tensor& grad_output, const Tensor& positions, c10::SymIntArrayRef input_size,
                                    IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                                    IntArrayRef dilation, bool ceil_mode) {
  const KeptWindow w({kernel_size, stride, padding, dilation, ceil_mode});
  return differentiable(
      "MaxPool2dBackwardBackward", {grad_output},
      [&] { return variable_list{call_max_backward(grad_output, positions, input_size, w)}; },
      [&](const variable_list&) { return variable_list{positions}; },
      [w](const Backward& b) { return variable_list{call_gather(b.grads[0], b.kept[0], w)}; })[0];
}

Tensor max_pool2d_gather_autograd(const Tensor& input, const Tensor& positions, IntArrayRef kernel_size,
                                  IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool ceil_mode) {
  const KeptWindow w({kernel_size, stride, padding, dilation, ceil_mode});
  SymInts plane;
  if (input.dim() == 4) plane = input.sym_sizes().slice(2).vec();
  return differentiable(
      "MaxPool2dGatherBackward", {input}, [&] { return variable_list{call_gather(input, positions, w)}; },
      [&](const variable_list&) { return variable_list{positions}; },
      [w, plane](const Backward& b) { return variable_list{call_max_backward(b.grads[0], b.kept[0], plane, w)}; })[0];
}

// ---- average pooling ----

constexpr int64_t kOnes[] = {1, 1};

template <class Int>
Prepared<Int> prepare_avg(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                          bool ceil_mode) {
  check_dim("avg_pool2d", "input", input, 4);
  check_alike("avg_pool2d", {{"input", input}});
  const auto g = geometry<Int>("avg_pool2d", sizes_of<Int>(input), {kernel_size, stride, padding, kOnes, ceil_mode});
  const Int sizes[] = {g.n, g.c, g.out[0], g.out[1]};
  return {g, empty<Int>(sizes, input.options(), format_of({input}))};
}

template <class Int>
Prepared<Int> prepare_avg_backward(const Tensor& grad_output, c10::ArrayRef<Int> input_size, IntArrayRef kernel_size,
                                   IntArrayRef stride, IntArrayRef padding, bool ceil_mode) {
  const char* op = "avg_pool2d_backward";
  const auto sizes = input_sizes<Int>(op, grad_output, input_size);
  const auto g = geometry<Int>(op, sizes, {kernel_size, stride, padding, kOnes, ceil_mode});
  check_shape<Int>(op, "grad_output", grad_output, {g.n, g.c, g.out[0], g.out[1]});
  return {g, empty<Int>(sizes, grad_output.options(), format_of({grad_output}))};
}

Tensor avg_pool2d(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding, bool ceil_mode,
                  bool count_include_pad, std::optional<int64_t> divisor_override) {
  const Divisor divisor = divisor_of(count_include_pad, divisor_override);
  const auto [g, out] = prepare_avg<int64_t>(input, kernel_size, stride, padding, ceil_mode);
  const Tensor x = input.contiguous(), y = contiguous_like(out);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "avg_pool2d", [&, &g = g] {
    run_on_device<scalar_t>(x, output_rows(g), row_grain(g), [&](const auto& kernels, const auto& call) {
      call(kernels.avg_pool2d, g, divisor, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>());
    });
  });
  copy_to(out, y);
  return out;
}

Tensor avg_pool2d_meta(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                       bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  divisor_of(count_include_pad, divisor_override);
  return prepare_avg<c10::SymInt>(input, kernel_size, stride, padding, ceil_mode).out;
}

Tensor avg_pool2d_backward(const Tensor& grad_output, IntArrayRef input_size, IntArrayRef kernel_size,
                           IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override) {
  const Divisor divisor = divisor_of(count_include_pad, divisor_override);
  const auto [g, out] = prepare_avg_backward<int64_t>(grad_output, input_size, kernel_size, stride, padding, ceil_mode);
  const Tensor gy = grad_output.contiguous(), gx = contiguous_like(out);
  AT_DISPATCH_FLOATING_TYPES(gy.scalar_type(), "avg_pool2d_backward", [&, &g = g] {
    run_on_device<scalar_t>(gy, input_rows(g), row_grain(g), [&](const auto& kernels, const auto& call) {
      call(kernels.avg_pool2d_backward, g, divisor, gy.const_data_ptr<scalar_t>(), gx.data_ptr<scalar_t>());
    });
  });
  copy_to(out, gx);
  return out;
}

Tensor avg_pool2d_backward_meta(const Tensor& grad_output, c10::SymIntArrayRef input_size, IntArrayRef kernel_size,
                                IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                                std::optional<int64_t> divisor_override) {
  divisor_of(count_include_pad, divisor_override);
  return prepare_avg_backward<c10::SymInt>(grad_output, input_size, kernel_size, stride, padding, ceil_mode).out;
}

Tensor call_avg(const Tensor& input, const KeptAverage& w) {
  static const auto op = find_operator<decltype(avg_pool2d)>("cnnops::avg_pool2d");
  return op.call(input, w.kernel_size, w.stride, w.padding, w.ceil_mode, w.count_include_pad, w.divisor_override);
}

Tensor call_avg_backward(const Tensor& grad_output, c10::SymIntArrayRef input_size, const KeptAverage& w) {
  static const auto op = find_operator<decltype(avg_pool2d_backward_meta)>("cnnops::avg_pool2d_backward");
  return op.call(grad_output, input_size, w.kernel_size, w.stride, w.padding, w.ceil_mode, w.count_include_pad,
                 w.divisor_override);
}

const auto keep_nothing = [](const variable_list&) { return variable_list{}; };

Tensor avg_pool2d_autograd(const Tensor& input, IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                           bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  const KeptAverage w{kernel_size.vec(), stride.vec(), padding.vec(), ceil_mode, count_include_pad, divisor_override};
  SymInts plane;
  if (input.dim() == 4) plane = input.sym_sizes().slice(2).vec();
  return differentiable(
      "AvgPool2dBackward", {input}, [&] { return variable_list{call_avg(input, w)}; }, keep_nothing,
      [w, plane](const Backward& b) { return variable_list{call_avg_backward(b.grads[0], plane, w)}; })[0];
}

Tensor avg_pool2d_backward_autograd(const Tensor& grad_output, c10::SymIntArrayRef input_size, IntArrayRef kernel_size,
                                    IntArrayRef stride, IntArrayRef padding, bool ceil_mode, bool count_include_pad,
                                    std::optional<int64_t> divisor_override) {
  const KeptAverage w{kernel_size.vec(), stride.vec(), padding.vec(), ceil_mode, count_include_pad, divisor_override};
  return differentiable(
      "AvgPool2dBackwardBackward", {grad_output},
      [&] { return variable_list{call_avg_backward(grad_output, input_size, w)}; }, keep_nothing,
      [w](const Backward& b) { return variable_list{call_avg(b.grads[0], w)}; })[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> "
      "(Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor positions, SymInt[2] input_size, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool2d_gather(Tensor input, Tensor positions, int[2] kernel_size, int[2] stride, int[2] padding, "
      "int[2] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "avg_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad_output, SymInt[2] input_size, int[2] kernel_size, int[2] stride, "
      "int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor");
}

static void register_kernels(torch::Library& m) {
  m.impl("max_pool2d", max_pool2d);
  m.impl("max_pool2d_backward", max_pool2d_backward);
  m.impl("max_pool2d_gather", max_pool2d_gather);
  m.impl("avg_pool2d", avg_pool2d);
  m.impl("avg_pool2d_backward", avg_pool2d_backward);
}
TORCH_LIBRARY_IMPL(cnnops, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  m.impl("max_pool2d", max_pool2d_meta);
  m.impl("max_pool2d_backward", max_pool2d_backward_meta);
  m.impl("max_pool2d_gather", max_pool2d_gather_meta);
  m.impl("avg_pool2d", avg_pool2d_meta);
  m.impl("avg_pool2d_backward", avg_pool2d_backward_meta);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  m.impl("max_pool2d", max_pool2d_autograd);
  m.impl("max_pool2d_backward", max_pool2d_backward_autograd);
  m.impl("max_pool2d_gather", max_pool2d_gather_autograd);
  m.impl("avg_pool2d", avg_pool2d_autograd);
  m.impl("avg_pool2d_backward", avg_pool2d_backward_autograd);
}

}  // namespace cnnops
