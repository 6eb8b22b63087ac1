// The sum over all but the channel axis: the gradient of a bias.
#include "autograd.h"
#include "channels.h"
#include "numbers.h"
#include "operators.h"
#include "run.h"

namespace cnnops {
namespace {

Tensor prepare(const Tensor& input) {
  check_alike("channel_sum", {{"input", input}});
  TORCH_CHECK(input.dim() >= 2,
              "channel_sum: expected input of at least 2 dimensions (n, channels, ...), but got shape ",
              input.sym_sizes());
  return at::empty_symint({input.sym_size(1)}, input.options().memory_format(at::MemoryFormat::Contiguous));
}

Tensor run(const Tensor& input) {
  const Tensor sums = prepare(input);
  const Layout layout = layout_of({input});
  const Tensor x = in_layout(input, layout);
  const Channels c = channels_of(x, layout);
  with_real_number(x.scalar_type(), [&](auto number) {
    using S = decltype(number);
    run_on_device<S>(x, c.channels, grain_for(c.n * c.inner), [&](const auto& kernels, const auto& call) {
      call(kernels.channel_sum, data_of<S>(x), c.n, c.channels, c.inner, mutable_data_of<S>(sums));
    });
  });
  return sums;
}

Tensor autograd(const Tensor& input) {
  return differentiable(
      "ChannelSumBackward", {input}, [&] { return variable_list{channel_sum(input)}; },
      [](const variable_list&) { return variable_list{}; },
      [shape = input.sym_sizes().vec()](const Backward& b) { return variable_list{spread(b.grads[0], shape)}; },
      [](const variable_list&, const variable_list& tangents, const variable_list&) {
        return variable_list{channel_sum(tangents[0])};
      })[0];
}

}  // namespace

Tensor channel_sum(const Tensor& input) {
  static const auto op = find_operator<Tensor(const Tensor&)>("cnnops::channel_sum");
  return op.call(input);
}

TORCH_LIBRARY_FRAGMENT(cnnops, m) { m.def("channel_sum(Tensor input) -> Tensor"); }
TORCH_LIBRARY_IMPL(cnnops, CPU, m) { m.impl("channel_sum", run); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { m.impl("channel_sum", run); }
TORCH_LIBRARY_IMPL(cnnops, Meta, m) { m.impl("channel_sum", prepare); }
TORCH_LIBRARY_IMPL(cnnops, Autograd, m) { m.impl("channel_sum", autograd); }

}  // namespace cnnops
