// Max unpooling: a plane of zeros with each number put back where max pooling found it, from arguments to kernels.
//
// Indices are torch's int64 ones, into the plane (H, W). Of several numbers with the same index the last stays, on
// every device and in every run. The derivative gathers at the indices, as torch's does.
#include "autograd.h"
#include "checks.h"
#include "numbers.h"
#include "operators.h"
#include "run.h"

namespace cnnops {
namespace {

template <class Int>
struct Prepared {
  Layout layout;
  Tensor out;
};

template <class Int>
Prepared<Int> prepare(const Tensor& input, const Tensor& indices, c10::ArrayRef<Int> output_size) {
  const char* op = "max_unpool2d";
  check_dim(op, "input", input, 4);
  check_alike(op, {{"input", input}});
  TORCH_CHECK(indices.scalar_type() == at::kLong, op, ": expected indices of dtype Long, but got ",
              indices.scalar_type());
  TORCH_CHECK(indices.device() == input.device(), op,
              ": expected all tensors to be on the same device, but input is "
              "on ",
              input.device(), " and indices is on ", indices.device());
  TORCH_CHECK(indices.sym_sizes().equals(input.sym_sizes()), op, ": expected indices of the shape of input, ",
              input.sym_sizes(), ", but got ", indices.sym_sizes());
  TORCH_CHECK(output_size.size() == 2, op, ": expected output_size to be {h, w}, but got ", output_size);
  const auto x = sizes_of<Int>(input);
  check_planes(op, x);
  TORCH_CHECK(output_size[0] >= 1 && output_size[1] >= 1, op, ": output_size must be at least 1, but got ",
              output_size);
  const Int sizes[] = {x[0], x[1], output_size[0], output_size[1]};
  const Layout layout = layout_of({input});
  return {layout, empty<Int>(sizes, input.options(), format_of(layout))};
}

Tensor max_unpool2d(const Tensor& input, const Tensor& indices, IntArrayRef output_size) {
  const auto [layout, y] = prepare<int64_t>(input, indices, output_size);
  if (y.numel() == 0) return y;
  const Unpool2dGeometry g{input.size(0), input.size(1), input.size(2) * input.size(3), output_size[0] * output_size[1],
                           layout};
  const Tensor x = in_layout(input, layout), at = in_layout(indices, layout);
  if (!at.is_cuda()) {  // asking a GPU would mean to wait for it
    const auto [least, most] = at::aminmax(at);
    const int64_t low = least.item<int64_t>(), high = most.item<int64_t>();
    TORCH_CHECK(low >= 0 && high < g.out, "max_unpool2d: found an invalid max index: ", low < 0 ? low : high,
                " (output volumes are of size ", output_size[0], "x", output_size[1], ")");
  }
  with_real_number(x.scalar_type(), [&, layout = layout, &y = y](auto number) {
    using S = decltype(number);
    run_on_device<S>(x, g.n * (layout == Layout::channels_last ? 1 : g.c), grain_for(g.out),
                     [&](const auto& kernels, const auto& call) {
                       if constexpr (std::is_same_v<std::decay_t<decltype(kernels)>, cpu::Kernels<S>>) {
                         call(kernels.max_unpool2d, g, data_of<S>(x), data_of<int64_t>(at), mutable_data_of<S>(y));
                       } else {
                         const Tensor workspace = at::empty(y.sizes(), at.options());
                         call(kernels.max_unpool2d, g, data_of<S>(x), data_of<int64_t>(at),
                              mutable_data_of<int64_t>(workspace), mutable_data_of<S>(y));
                       }
                     });
  });
  return y;
}

Tensor max_unpool2d_meta(const Tensor& input, const Tensor& indices, c10::SymIntArrayRef output_size) {
  return prepare<c10::SymInt>(input, indices, output_size).out;
}

Tensor call(const Tensor& input, const Tensor& indices, c10::SymIntArrayRef output_size) {
  static const auto op = find_operator<decltype(max_unpool2d_meta)>("cnnops::max_unpool2d");
  return op.call(input, indices, output_size);
}

/// {n, c, h * w}: not by flatten, which the vmap of gradcheck's kind does not know.
Tensor flat(const Tensor& t) {
  const auto s = t.sym_sizes();
  const c10::SymInt sizes[] = {s[0], s[1], s[2] * s[3]};
  return t.reshape_symint(sizes);
}

Tensor gather(const Tensor& output, const Tensor& indices) {
  return flat(output).gather(2, flat(indices)).view_symint(indices.sym_sizes());
}

Tensor max_unpool2d_autograd(const Tensor& input, const Tensor& indices, c10::SymIntArrayRef output_size) {
  return differentiable(
      "MaxUnpool2dBackward", {input}, [&] { return variable_list{call(input, indices, output_size)}; },
      [&](const variable_list&) { return variable_list{indices}; },
      [](const Backward& b) { return variable_list{gather(b.grads[0], b.kept[0])}; },
      [&](const variable_list&, const variable_list& tangents, const variable_list&) {
        return variable_list{call(tangents[0], indices, output_size)};
      })[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def("max_unpool2d(Tensor input, Tensor indices, SymInt[2] output_size) -> Tensor");
}
TORCH_LIBRARY_IMPL(cnnops, CPU, m) { m.impl("max_unpool2d", max_unpool2d); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { m.impl("max_unpool2d", max_unpool2d); }
TORCH_LIBRARY_IMPL(cnnops, Meta, m) { m.impl("max_unpool2d", max_unpool2d_meta); }
TORCH_LIBRARY_IMPL(cnnops, Autograd, m) { m.impl("max_unpool2d", max_unpool2d_autograd); }

}  // namespace cnnops
