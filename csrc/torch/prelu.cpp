// PReLU, a ReLU whose slope below zero is learnt, one for all or one per channel; from arguments to kernels.
#include <ATen/autocast_mode.h>

#include "autograd.h"
#include "channels.h"
#include "numbers.h"
#include "operators.h"
#include "run.h"

namespace cnnops {
namespace {

// ---- check and allocate ----

void check_weight(const char* op, const Tensor& input, const Tensor& weight) {
  check_alike(op, {{"input", input}, {"weight", weight}});
  TORCH_CHECK(weight.dim() <= 1, op, ": expected weight to be a scalar or 1D, but got shape ", weight.sym_sizes());
  const c10::SymInt channels = input.dim() > 1 ? input.sym_size(1) : c10::SymInt(1);
  TORCH_CHECK(weight.sym_numel() == 1 || weight.sym_numel() == channels, op, ": expected weight to have 1 element or ",
              channels, ", one per channel of input of shape ", input.sym_sizes(), ", but got ", weight.sym_numel());
}

Tensor prepare(const Tensor& input, const Tensor& weight) {
  check_weight("prelu", input, weight);
  return empty_alike(input);
}

TwoTensors prepare_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  const char* op = "prelu_backward";
  check_weight(op, input, weight);
  check_alike(op, {{"input", input}, {"grad_output", grad_output}});
  TORCH_CHECK(grad_output.sym_sizes().equals(input.sym_sizes()), op, ": expected grad_output of the shape of input, ",
              input.sym_sizes(), ", but got ", grad_output.sym_sizes());
  return {empty_alike(input), at::empty_symint(weight.sym_sizes(), weight.options(), at::MemoryFormat::Contiguous)};
}

// ---- run ----

/// What the kernels write: `result` itself where it lies dense in this layout, otherwise a tensor to be copied to it.
Tensor written(const Tensor& result, Layout layout) {
  return result.is_contiguous(format_of(layout)) ? result
                                                 : empty<int64_t>(result.sizes(), result.options(), format_of(layout));
}

void put(const Tensor& written, const Tensor& result) {
  if (!written.is_same(result)) result.copy_(written);
}

/// How the weight's elements lie over the input: one weight for all is one channel for all.
Channels weight_channels(const Tensor& x, Layout layout, const Tensor& weight) {
  if (weight.numel() == 1) return {1, 1, x.numel()};
  return channels_of(x, layout);
}

Tensor run(const Tensor& input, const Tensor& weight) {
  const Tensor result = prepare(input, weight);
  const Layout layout = layout_of({input});
  const Tensor y = written(result, layout);
  const Tensor x = in_layout(input, layout), w = weight.contiguous();
  const Channels c = weight_channels(x, layout, w);
  with_real_number(x.scalar_type(), [&](auto number) {
    using S = decltype(number);
    run_on_device<S>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.prelu, data_of<S>(x), data_of<S>(w), c.channels, c.inner, mutable_data_of<S>(y));
    });
  });
  put(y, result);
  return result;
}

TwoTensors run_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  const auto [result, gw] = prepare_backward(grad_output, input, weight);
  const Layout layout = layout_of({input});
  const Tensor gx = written(result, layout);
  const Tensor gy = in_layout(grad_output, layout), x = in_layout(input, layout), w = weight.contiguous();
  const Channels c = weight_channels(x, layout, w), all = channels_of(x, layout);
  with_real_number(x.scalar_type(), [&, &gw = gw](auto number) {
    using S = decltype(number);
    const S *gy_data = data_of<S>(gy), *x_data = data_of<S>(x);
    run_on_device<S>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.prelu_backward, gy_data, x_data, data_of<S>(w), c.channels, c.inner, mutable_data_of<S>(gx));
    });
    if (w.numel() == all.channels || sizeof(S) == 2) {  // sums of sums would be rounded to 16 bits twice
      const Channels summed = w.numel() == all.channels ? all : c;
      run_on_device<S>(x, summed.channels, grain_for(summed.n * summed.inner),
                       [&](const auto& kernels, const auto& call) {
                         call(kernels.prelu_grad_weight, gy_data, x_data, summed.n, summed.channels, summed.inner,
                              mutable_data_of<S>(gw));
                       });
      return;
    }
    // A weight for all channels is summed per channel first, so that threads still have something to share.
    const Tensor sums = at::empty({all.channels}, x.options());
    run_on_device<S>(x, all.channels, grain_for(all.n * all.inner), [&](const auto& kernels, const auto& call) {
      call(kernels.prelu_grad_weight, gy_data, x_data, all.n, all.channels, all.inner, mutable_data_of<S>(sums));
    });
    run_on_device<S>(x, 1, 1, [&](const auto& kernels, const auto& call) {
      call(kernels.channel_sum, data_of<S>(sums), int64_t(1), int64_t(1), all.channels, mutable_data_of<S>(gw));
    });
  });
  put(gx, result);
  return {result, gw};
}

// ---- derivatives ----

Tensor call(const Tensor& input, const Tensor& weight) {
  static const auto op = find_operator<decltype(run)>("cnnops::prelu");
  return op.call(input, weight);
}

TwoTensors call_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  static const auto op = find_operator<decltype(run_backward)>("cnnops::prelu_backward");
  return op.call(grad_output, input, weight);
}

/// gx = gy * (x > 0 ? 1 : w) and gw = sum of gy * min(x, 0) per channel. What follows from them in second derivatives
/// is rarely run, so it is written with torch's operators, but for the sums: those are ours, for the sake of their
/// bits.
struct Formula {
  Tensor x, weight, negative, none;
  Formula(const Tensor& x, const Tensor& weight)
      : x(x), weight(weight), negative(at::le(x, 0).logical_or(at::isnan(x))), none(at::zeros({}, x.options())) {}

  /// Where x is negative, and zero elsewhere.
  Tensor below(const Tensor& t) const { return at::where(negative, t, none); }

  /// A tensor of weight's shape, over all of x.
  Tensor over_x(const Tensor& w) const {
    return w.sym_numel() == 1 ? w.reshape({}).expand_symint(x.sym_sizes()) : spread(w, x.sym_sizes());
  }

  /// Summed to weight's shape.
  Tensor per_weight(const Tensor& t) const {
    const Tensor sums = channel_sum(t.dim() > 1 ? t : t.reshape({-1, 1}));
    return weight.sym_numel() == 1 ? channel_sum(sums.reshape({-1, 1})).reshape_symint(weight.sym_sizes()) : sums;
  }
};

Tensor autograd(const Tensor& input, const Tensor& weight) {
  return differentiable(
      "PreluBackward", {input, weight}, [&] { return variable_list{call(input, weight)}; },
      [&](const variable_list&) { return variable_list{input, weight}; },
      [](const Backward& b) {
        const auto [gx, gw] = call_backward(b.grads[0], b.kept[0], b.kept[1]);
        return variable_list{gx, gw};
      },
      [](const variable_list& primals, const variable_list& tangents, const variable_list&) {
        const Tensor &x = primals[0], &weight = primals[1], &dx = tangents[0], &dw = tangents[1];
        Tensor result;
        if (dx.defined()) result = std::get<0>(call_backward(dx, x, weight));
        if (dw.defined()) {
          const Formula f(x, weight);
          result = sum_of(result, f.below(x * f.over_x(dw)));
        }
        return variable_list{result};
      })[0];
}

variable_list gradients_of_backward(const Backward& b) {
  const Tensor &ggx = b.grads[0], &ggw = b.grads[1], &gy = b.kept[0];
  const Formula f(b.kept[1], b.kept[2]);
  Tensor grad_gy, grad_x, grad_w;
  if (ggx.defined()) {
    if (b.needs(0)) grad_gy = at::where(f.negative, ggx * f.over_x(f.weight), ggx);
    if (b.needs(2)) grad_w = f.per_weight(f.below(ggx * gy));
  }
  if (ggw.defined()) {
    const Tensor g = f.over_x(ggw);
    if (b.needs(0)) grad_gy = sum_of(grad_gy, f.below(g * f.x));
    if (b.needs(1)) grad_x = f.below(g * gy);
  }
  return {grad_gy, grad_x, grad_w};
}

TwoTensors autograd_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  const auto outputs = differentiable(
      "PreluBackwardBackward", {grad_output, input, weight},
      [&] {
        const auto [gx, gw] = call_backward(grad_output, input, weight);
        return variable_list{gx, gw};
      },
      [&](const variable_list&) { return variable_list{grad_output, input, weight}; }, gradients_of_backward,
      [](const variable_list& primals, const variable_list& tangents, const variable_list&) {
        const Tensor &gy = primals[0], &dgy = tangents[0], &dx = tangents[1], &dw = tangents[2];
        const Formula f(primals[1], primals[2]);
        Tensor to_gx, to_gw;
        if (dgy.defined()) {
          to_gx = at::where(f.negative, dgy * f.over_x(f.weight), dgy);
          to_gw = f.below(dgy * f.x);
        }
        if (dw.defined()) to_gx = sum_of(to_gx, f.below(gy * f.over_x(dw)));
        if (dx.defined()) to_gw = sum_of(to_gw, f.below(gy * dx));
        return variable_list{to_gx, to_gw.defined() ? f.per_weight(to_gw) : Tensor()};
      });
  return {outputs[0], outputs[1]};
}

void register_kernels(torch::Library& m) {
  m.impl("prelu", run);
  m.impl("prelu_backward", run_backward);
}

template <at::DeviceType device, c10::DispatchKey key>
Tensor prelu_autocast(const Tensor& input, const Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(key);
  static const auto op = find_operator<Tensor(const Tensor&, const Tensor&)>("cnnops::prelu");
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return op.call(at::autocast::cached_cast(dtype, input, device), at::autocast::cached_cast(dtype, weight, device));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def("prelu(Tensor input, Tensor weight) -> Tensor");
  m.def("prelu_backward(Tensor grad_output, Tensor input, Tensor weight) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(cnnops, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(cnnops, AutocastCPU, m) { m.impl("prelu", prelu_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>); }
TORCH_LIBRARY_IMPL(cnnops, AutocastCUDA, m) {
  m.impl("prelu", prelu_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  m.impl("prelu", prepare);
  m.impl("prelu_backward", prepare_backward);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  m.impl("prelu", autograd);
  m.impl("prelu_backward", autograd_backward);
}

}  // namespace cnnops
