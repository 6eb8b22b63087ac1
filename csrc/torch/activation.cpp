// ReLU and its relatives, and the sum per channel, from arguments to kernels.
//
// ReLU's backward needs only its output (is it above zero?), so a chain conv -> ReLU -> conv keeps one tensor, not two.
// These operators work on tensors of any shape; elements are visited in the order they lie in memory.
#include "autograd.h"
#include "checks.h"
#include "run.h"

namespace cnnops {
namespace {

// ---- elements in memory order ----

/// `t` with the strides of `like`, so that both can be walked in step.
Tensor aligned_to(const Tensor& like, const Tensor& t) {
  if (t.strides() == like.strides() || t.numel() <= 1) return t;
  return at::empty_like(like).copy_(t);
}

/// One output, dense, in the layout that torch's own element-wise operators would choose for `input`.
Tensor result_like(const Tensor& input) { return at::empty_like(input); }

void check_same_shape(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  TORCH_CHECK(t.sym_sizes().equals(like.sym_sizes()), op, ": expected ", name, " of the shape of ", like_name, ", ",
              like.sym_sizes(), ", but got ", t.sym_sizes());
}

// ---- relu ----

Tensor check_relu(const Tensor& input) {
  check_alike("relu", {{"input", input}});
  return result_like(input);
}

Tensor relu(const Tensor& input) {
  const Tensor y = check_relu(input), x = aligned_to(y, input);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "relu", [&] {
    run_on_device<scalar_t>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.relu, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>());
    });
  });
  return y;
}

Tensor check_relu_backward(const Tensor& grad_output, const Tensor& output) {
  check_alike("relu_backward", {{"grad_output", grad_output}, {"output", output}});
  check_same_shape("relu_backward", "grad_output", grad_output, "output", output);
  return result_like(output);
}

Tensor relu_backward(const Tensor& grad_output, const Tensor& output) {
  const Tensor gx = check_relu_backward(grad_output, output);
  const Tensor gy = aligned_to(gx, grad_output), y = aligned_to(gx, output);
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "relu_backward", [&] {
    run_on_device<scalar_t>(y, y.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.relu_backward, gy.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(), gx.data_ptr<scalar_t>());
    });
  });
  return gx;
}

Tensor call_relu_backward(const Tensor& grad_output, const Tensor& output) {
  static const auto op = find_operator<decltype(relu_backward)>("cnnops::relu_backward");
  return op.call(grad_output, output);
}

Tensor relu_autograd(const Tensor& input) {
  static const auto op = find_operator<decltype(relu)>("cnnops::relu");
  return differentiable(
      "ReluBackward", {input}, [&] { return variable_list{op.call(input)}; },
      [](const variable_list& outputs) { return outputs; },
      [](const Backward& b) { return variable_list{call_relu_backward(b.grads[0], b.kept[0])}; })[0];
}

/// Linear in the gradient; of the output it needs only the sign, whose derivative is zero.
Tensor relu_backward_autograd(const Tensor& grad_output, const Tensor& output) {
  return differentiable(
      "ReluBackwardBackward", {grad_output, output},
      [&] { return variable_list{call_relu_backward(grad_output, output)}; },
      [&](const variable_list&) { return variable_list{output}; },
      [](const Backward& b) {
        return variable_list{b.needs(0) ? call_relu_backward(b.grads[0], b.kept[0]) : Tensor(), Tensor()};
      })[0];
}

// ---- leaky_relu ----

Tensor check_leaky_relu(const Tensor& input) {
  check_alike("leaky_relu", {{"input", input}});
  return result_like(input);
}

Tensor leaky_relu(const Tensor& input, double negative_slope) {
  const Tensor y = check_leaky_relu(input), x = aligned_to(y, input);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "leaky_relu", [&] {
    run_on_device<scalar_t>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.leaky_relu, x.const_data_ptr<scalar_t>(), scalar_t(negative_slope), y.data_ptr<scalar_t>());
    });
  });
  return y;
}

Tensor leaky_relu_meta(const Tensor& input, double) { return check_leaky_relu(input); }

Tensor check_leaky_relu_backward(const Tensor& grad_output, const Tensor& kept) {
  check_alike("leaky_relu_backward", {{"grad_output", grad_output}, {"kept", kept}});
  check_same_shape("leaky_relu_backward", "grad_output", grad_output, "kept", kept);
  return result_like(kept);
}

Tensor leaky_relu_backward(const Tensor& grad_output, const Tensor& kept, double negative_slope) {
  const Tensor gx = check_leaky_relu_backward(grad_output, kept);
  const Tensor gy = aligned_to(gx, grad_output), k = aligned_to(gx, kept);
  AT_DISPATCH_FLOATING_TYPES(k.scalar_type(), "leaky_relu_backward", [&] {
    run_on_device<scalar_t>(k, k.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.leaky_relu_backward, gy.const_data_ptr<scalar_t>(), k.const_data_ptr<scalar_t>(),
           scalar_t(negative_slope), gx.data_ptr<scalar_t>());
    });
  });
  return gx;
}

Tensor leaky_relu_backward_meta(const Tensor& grad_output, const Tensor& kept, double) {
  return check_leaky_relu_backward(grad_output, kept);
}

Tensor call_leaky_relu_backward(const Tensor& grad_output, const Tensor& kept, double negative_slope) {
  static const auto op = find_operator<decltype(leaky_relu_backward)>("cnnops::leaky_relu_backward");
  return op.call(grad_output, kept, negative_slope);
}

/// The output has the input's sign unless the slope is negative: then the input is kept.
Tensor leaky_relu_autograd(const Tensor& input, double negative_slope) {
  static const auto op = find_operator<decltype(leaky_relu)>("cnnops::leaky_relu");
  return differentiable(
      "LeakyReluBackward", {input}, [&] { return variable_list{op.call(input, negative_slope)}; },
      [&](const variable_list& outputs) { return negative_slope < 0 ? variable_list{input} : outputs; },
      [negative_slope](const Backward& b) {
        return variable_list{call_leaky_relu_backward(b.grads[0], b.kept[0], negative_slope)};
      })[0];
}

Tensor leaky_relu_backward_autograd(const Tensor& grad_output, const Tensor& kept, double negative_slope) {
  return differentiable(
      "LeakyReluBackwardBackward", {grad_output, kept},
      [&] { return variable_list{call_leaky_relu_backward(grad_output, kept, negative_slope)}; },
      [&](const variable_list&) { return variable_list{kept}; },
      [negative_slope](const Backward& b) {
        return variable_list{b.needs(0) ? call_leaky_relu_backward(b.grads[0], b.kept[0], negative_slope) : Tensor(),
                             Tensor()};
      })[0];
}

// ---- sums per channel ----

/// A tensor (n, channels, ...) as kernels see it. Tensors of one dimension have one channel.
struct Channels {
  int64_t n, channels, inner;
};

Channels channels_of(const Tensor& t) {
  Channels c{t.dim() > 0 ? t.size(0) : 1, t.dim() > 1 ? t.size(1) : 1, 1};
  for (int64_t dim = 2; dim < t.dim(); ++dim) c.inner *= t.size(dim);
  return c;
}

Tensor check_channel_sum(const Tensor& input) {
  check_alike("channel_sum", {{"input", input}});
  TORCH_CHECK(input.dim() >= 2,
              "channel_sum: expected input of at least 2 dimensions (n, channels, ...), but got shape ",
              input.sym_sizes());
  return at::empty_symint({input.sym_size(1)}, input.options().memory_format(at::MemoryFormat::Contiguous));
}

template <class T>
void sum_channels(const Tensor& x, const Channels& c, const Tensor& sums) {
  run_on_device<T>(x, c.channels, grain_for(c.n * c.inner), [&](const auto& kernels, const auto& call) {
    call(kernels.channel_sum, x.const_data_ptr<T>(), c.n, c.channels, c.inner, sums.data_ptr<T>());
  });
}

Tensor channel_sum(const Tensor& input) {
  const Tensor sums = check_channel_sum(input), x = input.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "channel_sum", [&] { sum_channels<scalar_t>(x, channels_of(x), sums); });
  return sums;
}

Tensor call_channel_sum(const Tensor& input) {
  static const auto op = find_operator<decltype(channel_sum)>("cnnops::channel_sum");
  return op.call(input);
}

/// A value per channel, spread over a tensor of the shape of `like`.
Tensor spread(const Tensor& per_channel, c10::SymIntArrayRef shape) {
  std::vector<c10::SymInt> view(shape.size(), 1);
  if (view.size() > 1) view[1] = per_channel.sym_size(0);
  return per_channel.view_symint(view).expand_symint(shape);
}

Tensor channel_sum_autograd(const Tensor& input) {
  const auto shape = input.sym_sizes().vec();
  return differentiable(
      "ChannelSumBackward", {input}, [&] { return variable_list{call_channel_sum(input)}; },
      [](const variable_list&) { return variable_list{}; },
      [shape](const Backward& b) { return variable_list{spread(b.grads[0], shape)}; })[0];
}

// ---- prelu ----

void check_prelu_weight(const char* op, const Tensor& input, const Tensor& weight) {
  check_alike(op, {{"input", input}, {"weight", weight}});
  TORCH_CHECK(weight.dim() <= 1, op, ": expected weight to be a scalar or 1D, but got shape ", weight.sym_sizes());
  const c10::SymInt channels = input.dim() > 1 ? input.sym_size(1) : c10::SymInt(1);
  TORCH_CHECK(weight.sym_numel() == 1 || weight.sym_numel() == channels, op, ": expected weight to have 1 element or ",
              channels, ", one per channel of input of shape ", input.sym_sizes(), ", but got ", weight.sym_numel());
}

Tensor check_prelu(const Tensor& input, const Tensor& weight) {
  check_prelu_weight("prelu", input, weight);
  return at::empty_symint(input.sym_sizes(), input.options(), format_of({input}));
}

/// How the weight's elements lie over the input: one weight for all is one channel for all.
Channels weight_channels(const Tensor& x, const Tensor& weight) {
  Channels c = channels_of(x);
  if (weight.numel() == 1) {
    c.channels = 1;
    c.inner = x.dim() > 1 ? x.size(1) * c.inner : c.inner;
  }
  return c;
}

Tensor prelu(const Tensor& input, const Tensor& weight) {
  const Tensor out = check_prelu(input, weight), x = input.contiguous(), w = weight.contiguous();
  const Tensor y = contiguous_like(out);
  const Channels c = weight_channels(x, w);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "prelu", [&] {
    run_on_device<scalar_t>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.prelu, x.const_data_ptr<scalar_t>(), w.const_data_ptr<scalar_t>(), c.channels, c.inner,
           y.data_ptr<scalar_t>());
    });
  });
  copy_to(out, y);
  return out;
}

std::tuple<Tensor, Tensor> check_prelu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  check_prelu_weight("prelu_backward", input, weight);
  check_alike("prelu_backward", {{"input", input}, {"grad_output", grad_output}});
  check_same_shape("prelu_backward", "grad_output", grad_output, "input", input);
  return {at::empty_symint(input.sym_sizes(), input.options(), format_of({input})),
          at::empty_symint(weight.sym_sizes(), weight.options(), at::MemoryFormat::Contiguous)};
}

std::tuple<Tensor, Tensor> prelu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  const auto [out, gw] = check_prelu_backward(grad_output, input, weight);
  const Tensor gy = grad_output.contiguous(), x = input.contiguous(), w = weight.contiguous();
  const Tensor gx = contiguous_like(out);
  const Channels c = weight_channels(x, w), all = channels_of(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "prelu_backward", [&, &gw = gw] {
    const scalar_t *gy_data = gy.const_data_ptr<scalar_t>(), *x_data = x.const_data_ptr<scalar_t>();
    run_on_device<scalar_t>(x, x.numel(), kGrain, [&](const auto& kernels, const auto& call) {
      call(kernels.prelu_backward, gy_data, x_data, w.const_data_ptr<scalar_t>(), c.channels, c.inner,
           gx.data_ptr<scalar_t>());
    });
    // A weight for all channels is summed per channel first, so that threads still have something to share.
    const Tensor sums = w.numel() == all.channels ? gw : at::empty({all.channels}, x.options());
    run_on_device<scalar_t>(x, all.channels, grain_for(all.n * all.inner), [&](const auto& kernels, const auto& call) {
      call(kernels.prelu_grad_weight, gy_data, x_data, all.n, all.channels, all.inner, sums.data_ptr<scalar_t>());
    });
    if (!sums.is_same(gw)) {
      sum_channels<scalar_t>(sums, {1, 1, all.channels}, gw);
    }
  });
  copy_to(out, gx);
  return {out, gw};
}

std::tuple<Tensor, Tensor> call_prelu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight) {
  static const auto op = find_operator<decltype(prelu_backward)>("cnnops::prelu_backward");
  return op.call(grad_output, input, weight);
}

Tensor prelu_autograd(const Tensor& input, const Tensor& weight) {
  static const auto op = find_operator<decltype(prelu)>("cnnops::prelu");
  return differentiable(
      "PreluBackward", {input, weight}, [&] { return variable_list{op.call(input, weight)}; },
      [&](const variable_list&) { return variable_list{input, weight}; },
      [](const Backward& b) {
        const auto [gx, gw] = call_prelu_backward(b.grads[0], b.kept[0], b.kept[1]);
        return variable_list{gx, gw};
      })[0];
}

/// gx = gy * (x > 0 ? 1 : w) and gw = sum of gy * min(x, 0) per channel, differentiated once more. Rarely run, so it is
/// written with torch's operators, but for the sums: those are ours, for the sake of their bits.
variable_list prelu_backward_gradients(const Backward& b) {
  const Tensor &ggx = b.grads[0], &ggw = b.grads[1];
  const Tensor &gy = b.kept[0], &x = b.kept[1], &weight = b.kept[2];
  const Tensor negative = at::le(x, 0).logical_or(at::isnan(x));
  const Tensor none = at::zeros({}, x.options());
  const auto over_x = [&](const Tensor& w) {  // a tensor of weight's shape, spread over x
    return w.sym_numel() == 1 ? w.reshape({}).expand_symint(x.sym_sizes()) : spread(w, x.sym_sizes());
  };
  const auto per_weight = [&](const Tensor& t) {  // summed to weight's shape
    const Tensor sums = call_channel_sum(t.dim() > 1 ? t : t.reshape({-1, 1}));
    return weight.sym_numel() == 1 ? call_channel_sum(sums.reshape({-1, 1})).reshape_symint(weight.sym_sizes()) : sums;
  };
  Tensor grad_gy, grad_x, grad_w;
  if (ggx.defined()) {
    if (b.needs(0)) grad_gy = at::where(negative, ggx * over_x(weight), ggx);
    if (b.needs(2)) grad_w = per_weight(at::where(negative, ggx * gy, none));
  }
  if (ggw.defined()) {
    const Tensor g = over_x(ggw);
    if (b.needs(0)) {
      const Tensor t = at::where(negative, g * x, none);
      grad_gy = grad_gy.defined() ? grad_gy + t : t;
    }
    if (b.needs(1)) grad_x = at::where(negative, g * gy, none);
  }
  return {grad_gy, grad_x, grad_w};
}

std::tuple<Tensor, Tensor> prelu_backward_autograd(const Tensor& grad_output, const Tensor& input,
                                                   const Tensor& weight) {
  const auto outputs = differentiable(
      "PreluBackwardBackward", {grad_output, input, weight},
      [&] {
        const auto [gx, gw] = call_prelu_backward(grad_output, input, weight);
        return variable_list{gx, gw};
      },
      [&](const variable_list&) { return variable_list{grad_output, input, weight}; }, prelu_backward_gradients);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def("relu(Tensor input) -> Tensor");
  m.def("relu_backward(Tensor grad_output, Tensor output) -> Tensor");
  m.def("leaky_relu(Tensor input, float negative_slope) -> Tensor");
  m.def("leaky_relu_backward(Tensor grad_output, Tensor kept, float negative_slope) -> Tensor");
  m.def("prelu(Tensor input, Tensor weight) -> Tensor");
  m.def("prelu_backward(Tensor grad_output, Tensor input, Tensor weight) -> (Tensor, Tensor)");
  m.def("channel_sum(Tensor input) -> Tensor");
}

static void register_kernels(torch::Library& m) {
  m.impl("relu", relu);
  m.impl("relu_backward", relu_backward);
  m.impl("leaky_relu", leaky_relu);
  m.impl("leaky_relu_backward", leaky_relu_backward);
  m.impl("prelu", prelu);
  m.impl("prelu_backward", prelu_backward);
  m.impl("channel_sum", channel_sum);
}
TORCH_LIBRARY_IMPL(cnnops, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { register_kernels(m); }

TORCH_LIBRARY_IMPL(cnnops, Meta, m) {
  m.impl("relu", check_relu);
  m.impl("relu_backward", check_relu_backward);
  m.impl("leaky_relu", leaky_relu_meta);
  m.impl("leaky_relu_backward", leaky_relu_backward_meta);
  m.impl("prelu", check_prelu);
  m.impl("prelu_backward", check_prelu_backward);
  m.impl("channel_sum", check_channel_sum);
}

TORCH_LIBRARY_IMPL(cnnops, Autograd, m) {
  m.impl("relu", relu_autograd);
  m.impl("relu_backward", relu_backward_autograd);
  m.impl("leaky_relu", leaky_relu_autograd);
  m.impl("leaky_relu_backward", leaky_relu_backward_autograd);
  m.impl("prelu", prelu_autograd);
  m.impl("prelu_backward", prelu_backward_autograd);
  m.impl("channel_sum", channel_sum_autograd);
}

}  // namespace cnnops
