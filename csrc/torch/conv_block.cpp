// Convolution, activation and max pooling as one operator, from arguments to kernels.
//
//   y = max_pool2d(activation(conv2d(x, w) + bias))        without pooling: y = activation(conv2d(x, w) + bias)
//
// The convolution's output is the largest tensor of such a chain, and nobody wants it: it is made a chunk at a time, in
// memory that stays in the cache, and from there activated and pooled. A chunk is some images, or of a large image a
// band of rows. Both are convolutions again, by the same kernels, of fewer images or of fewer rows with another padding
// at the top. So all bits are those of the three operators one after the other (law 3); the size of a chunk may look at
// what it likes. A thread makes whole chunks in its own cache, without waiting for others between the steps; where
// there are too few for that, or filters to transform for each, all threads share a chunk.
//
// For the gradient the input, the weight, the output and the positions of its maxima are kept: an activation's slope at
// a maximum can be told from the output. The gradient of the convolution's output exists while it is made use of. With
// leaky_relu and windows that overlap it is rounded in another order than the chain's.
//
// On a GPU the convolution's kernel activates its results before it writes them; where windows of 2 x 2 are pooled, as
// they mostly are, it writes the largest of each and the position alone. Other windows, and algorithms that cannot do
// this, take one operator after the other.
#include "conv_block.h"

#include <ATen/autocast_mode.h>

#include "autograd.h"
#include "numbers.h"
#include "run.h"

namespace cnnops {
namespace {

// Bytes of a chunk: as the second-level cache holds them, but several times the filters, which are packed for each
// chunk; where winograd transforms them, as the third-level cache does.
constexpr int64_t kChunk = int64_t(1) << 18, kWinogradChunk = int64_t(1) << 22, kLargestChunk = int64_t(1) << 23;
constexpr int64_t kManyChunks = 8;  // of a thread, which may then be one more or less
constexpr int64_t kOverlap = 8;     // Where windows overlap, one row of so many is made twice, if they fit.

// ---- check and allocate ----

template <class Int>
struct Prepared {
  BasicConv2dGeometry<Int> conv;
  BasicPool2dGeometry<Int> pool;  // of the convolution's output; without pooling, windows of one pixel
  Tensor out, positions;
};

template <class Int>
Prepared<Int> prepare(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Block& b) {
  const auto g = check_conv2d<Int>(kBlockName, input, weight, bias, b.conv);
  const Window window = b.pooling.value_or(Window(kBlockName, 1, {}, 0, 1, false));
  TORCH_CHECK(window.kernel_size[0] <= 256 && window.kernel_size[1] <= 256 / window.kernel_size[0], kBlockName,
              ": pooling windows of more than 256 places are not fused, but got pool_kernel_size=",
              IntArrayRef(window.kernel_size));
  const Int planes[] = {g.n, g.k, g.out[0], g.out[1]};
  const auto p = pool2d_geometry<Int>(kBlockName, planes, window, g.layout);
  const Int sizes[] = {g.n, g.k, p.out[0], p.out[1]}, none[] = {0};
  const auto bytes = input.options().dtype(at::kByte);
  const auto format = format_of(g.layout);
  return {g, p, empty<Int>(sizes, input.options(), format),
          b.pooling ? empty<Int>(sizes, bytes, format) : empty<Int>(none, bytes, at::MemoryFormat::Contiguous)};
}

// ---- run ----

/// Rows of outputs in steps of which bands begin and end: those of winograd's tiles, which share their rounding.
int64_t tile_rows(const Conv2dGeometry& g, bool winograd) { return winograd ? 4 * g.dilation[0] : 1; }

/// A chunk is `images` whole images, or of one image the rows that `rows` rows of outputs are made from.
struct Chunks {
  int64_t images, rows;

  Chunks(const Conv2dGeometry& g, const Pool2dGeometry& p, int64_t element, int64_t size, int64_t tile) {
    const int64_t row = g.k * g.out[1] * element, image = row * g.out[0];
    images = std::max<int64_t>(1, size / image);
    rows = p.out[0];
    if (image <= size) return;
    const int64_t reach = (p.kernel[0] - 1) * p.dilation[0] + 1;
    const int64_t wanted = kOverlap * (reach - p.stride[0]) / p.stride[0];
    const auto fit = [&](int64_t bytes) { return std::max<int64_t>(1, (bytes / row - reach) / p.stride[0] + 1); };
    rows = std::max(fit(size), std::min(fit(kWinogradChunk), wanted));
    rows = rows > tile ? rows / tile * tile : std::max(rows, tile / p.stride[0]);
    rows = std::min(rows, p.out[0]);
  }
};

/// The convolution of one chunk.
struct Chunk {
  int64_t first_row, end_row;  // of outputs, of each image
  int64_t first, end;          // rows of the convolution that they are made from
  Conv2dGeometry conv;
  bool dense;           // Rows of outputs lie together, those of all planes.
  Pool2dGeometry pool;  // of all that is dense, otherwise of a plane

  /// Bands start and end where the algorithm's tiles of outputs do, of so many rows.
  Chunk(const Conv2dGeometry& g, const Pool2dGeometry& p, int64_t images, int64_t row, int64_t rows, int64_t tile)
      : first_row(row), end_row(std::min(row + rows, p.out[0])), conv(g), pool(p) {
    const int64_t reach = (p.kernel[0] - 1) * p.dilation[0] + 1;
    first = std::max<int64_t>(0, first_row * p.stride[0] - p.padding[0]) / tile * tile;
    end = (end_row - 1) * p.stride[0] - p.padding[0] + reach;
    end = std::min(g.out[0], (end + tile - 1) / tile * tile);
    conv.n = images;
    conv.out[0] = end - first;
    conv.padding[0] = g.padding[0] - first * g.stride[0];
    dense = end_row - first_row == p.out[0] || g.layout == Layout::channels_last;
    pool.n = images;
    if (!dense) pool.n = pool.c = 1;
    pool.in[0] = end - first;
    pool.out[0] = end_row - first_row;
    pool.padding[0] = p.padding[0] + first - first_row * p.stride[0];
  }
};

/// The chunks of a block, and how one is made.
template <class S>
struct Maker {
  const Conv2dGeometry& g;
  const Pool2dGeometry& p;
  const Activation& activation;
  const bool pools;
  const cpu::Kernels<S>& kernels;
  const cpu::Conv2dRun<S>& conv;
  const Conv2dOperands<S> operands;  // whose output has no place yet
  S* const y;
  uint8_t* const positions;

  /// divide(tasks, grain, run) calls run(begin, end) for parts of each step.
  template <class Divide>
  void operator()(const Chunk& chunk, int64_t n, const Divide& divide) const {
    const Conv2dGeometry& c = chunk.conv;
    const int64_t depth = g.layout == Layout::channels_last ? g.k : 1, planes = g.k / depth;  // of an image
    const int64_t units = c.n * planes, unit = c.out[0] * c.out[1] * depth, all = units * unit;
    const auto output = [&](int64_t i) { return ((n * planes + i) * p.out[0] + chunk.first_row) * p.out[1] * depth; };
    const bool in_place = !pools && chunk.dense;
    S* const made = in_place ? y + output(0) : static_cast<S*>(scratch(all * sizeof(S), Scratch::of_caller));
    const Conv2dOperands<S> here{operands.a + n * g.c * g.in[0] * g.in[1], operands.b, operands.bias, made};
    const int64_t tasks = conv.tasks(c), bytes = conv.workspace(c) * int64_t(sizeof(Sum<S>));
    divide(tasks, grain_for(all * (g.c / g.groups) * g.kernel[0] * g.kernel[1] / tasks),
           [&](int64_t begin, int64_t end) { conv.run(c, here, static_cast<Sum<S>*>(scratch(bytes)), begin, end); });
    if (pools || in_place) {
      divide(all, kGrain, [&](int64_t begin, int64_t end) { activation.run(kernels, made, made, begin, end); });
    } else {
      divide(units, grain_for(unit), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) activation.run(kernels, made + i * unit, y + output(i), 0, unit);
      });
    }
    if (!pools) return;
    const int64_t rows = chunk.pool.out[0], work = p.out[1] * depth * p.kernel[0] * p.kernel[1];  // of a row
    const auto pool_rows = [&](int64_t i, int64_t begin, int64_t end) {
      kernels.max_pool2d.forward(chunk.pool, made + i * unit, y + output(i), positions + output(i), begin, end);
    };
    if (chunk.dense) {
      divide(units * rows, grain_for(work), [&](int64_t begin, int64_t end) { pool_rows(0, begin, end); });
    } else {
      divide(units, grain_for(work * rows), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pool_rows(i, 0, rows);
      });
    }
  }
};

template <class S>
void run_chunks(const Prepared<int64_t>& prepared, const Block& block, const Tensor& x, const Tensor& weight,
                const Tensor& bias) {
  Conv2dGeometry g = prepared.conv;
  const Pool2dGeometry& p = prepared.pool;
  const auto& kernels = cpu_kernels<S>();
  const auto& algorithm = choose_or_throw(kernels.conv2d, g, Pass::forward, block.conv.algorithm);
  if (g.n == 0) return;
  g.filters = layout_of_filters(algorithm, g, Pass::forward, weight);
  const Tensor w = in_layout(weight, g.filters);
  const bool winograd = same_name(algorithm.name, "winograd");
  const int64_t tile = tile_rows(g, winograd), filters = w.numel() * int64_t(sizeof(S));
  const Chunks chunks(g, p, sizeof(S), winograd ? kWinogradChunk : std::clamp(4 * filters, kChunk, kWinogradChunk),
                      tile);
  const int64_t bands = (p.out[0] + chunks.rows - 1) / chunks.rows, count = g.n * bands;
  // The file that a whole image wants computes its bands too: for them alone another might be chosen, which rounds
  // otherwise.
  const auto& file = bands > 1 && algorithm.file ? algorithm.file(g, Pass::forward) : algorithm;
  const Maker<S> make{g,
                      p,
                      block.activation,
                      block.pooling.has_value(),
                      kernels,
                      file.forward,
                      {data_of<S>(x), data_of<S>(w), bias.defined() ? data_of<S>(bias) : nullptr, nullptr},
                      mutable_data_of<S>(prepared.out),
                      mutable_data_of<uint8_t>(prepared.positions)};
  const auto make_some = [&](int64_t begin, int64_t end, const auto& divide) {
    for (int64_t i = begin, images; i < end; i += images) {
      images = bands == 1 ? std::min(chunks.images, end - i) : 1;
      const Chunk chunk(g, p, images, i % bands * chunks.rows, chunks.rows, tile);
      make(chunk, i / bands, divide);
    }
  };
  const int64_t threads = at::get_num_threads(), work = g.k * g.out[0] * g.out[1];
  if (!winograd && count >= chunks.images * threads && (count % threads == 0 || count >= kManyChunks * threads)) {
    split(count, grain_for(work / bands), [&](int64_t begin, int64_t end) {
      make_some(begin, end, [](int64_t tasks, int64_t, const auto& run) { run(0, tasks); });
    });
  } else {
    make_some(0, count, [](int64_t tasks, int64_t grain, const auto& run) { split(tasks, grain, run); });
  }
}

/// One operator after the other.
TwoTensors chain(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Block& b) {
  const Tensor made = b.activation(call_conv2d(input, weight, bias, b.conv));
  if (b.pooling) return b.pooling(made);
  return {made, at::empty_symint({0}, made.options().dtype(at::kByte))};
}

#ifdef CNNOPS_CUDA
/// Whether the algorithm could.
template <class S>
bool run_epilogue(const Conv2dGeometry& g, const Block& block, const Tensor& x, const Tensor& w, const Tensor& bias,
                  const Tensor& out, uint8_t* positions) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto& run = choose_or_throw(cuda::kernels<S>().conv2d, g, Pass::forward, block.conv.algorithm).forward;
  if (!run.fused) return false;
  if (g.n == 0) return true;
  const Conv2dOperands<S> operands{data_of<S>(x), data_of<S>(w), bias.defined() ? data_of<S>(bias) : nullptr,
                                   mutable_data_of<S>(out), allows_tf32(block.conv.algorithm)};
  auto epilogue = epilogue_of<S>(block.activation);
  epilogue.positions = positions;
  const Tensor workspace = cuda_workspace<S>(run.workspace(g), x);
  run.fused(g, operands, epilogue, mutable_data_of<Sum<S>>(workspace), c10::cuda::getCurrentCUDAStream().stream());
  return true;
}
#endif

TwoTensors run_cuda(const Prepared<int64_t>& prepared, const Tensor& input, const Tensor& weight,
                    const OptionalTensor& bias, const Block& b) {
#ifdef CNNOPS_CUDA
  const Conv2dGeometry& g = prepared.conv;
  const bool pools = b.pooling && quarters(prepared.pool), pools_afterwards = b.pooling && !pools;
  if (!pools && b.activation.kind == Kind::none) return chain(input, weight, bias, b);
  const int64_t sizes[] = {g.n, g.k, g.out[0], g.out[1]};
  const Tensor out = pools_afterwards ? empty<int64_t>(sizes, input.options(), format_of(g.layout)) : prepared.out;
  const Tensor x = in_layout(input, g.layout), w = in_layout(weight, g.layout);
  uint8_t* const positions = pools ? mutable_data_of<uint8_t>(prepared.positions) : nullptr;
  bool done = false;
  with_real_number(x.scalar_type(), [&](auto number) {
    done = run_epilogue<decltype(number)>(g, b, x, w, bias ? bias->contiguous() : Tensor(), out, positions);
  });
  if (!done) return chain(input, weight, bias, b);
  if (pools_afterwards) return b.pooling(out);
  return {out, prepared.positions};
#else
  refuse_cuda();
#endif
}

TwoTensors run(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Block& b) {
  const auto prepared = prepare<int64_t>(input, weight, bias, b);
  if (input.is_cuda()) return run_cuda(prepared, input, weight, bias, b);
  const Conv2dGeometry& g = prepared.conv;
  const Pool2dGeometry& p = prepared.pool;
  const int64_t tile = tile_rows(g, true);
  const Chunks chunks(g, p, input.element_size(), kWinogradChunk, tile);
  const int64_t largest = Chunk(g, p, 1, 0, chunks.rows, tile).end * g.k * g.out[1] * input.element_size();
  const bool nothing_to_fuse = !b.pooling && b.activation.kind == Kind::none;
  if (nothing_to_fuse || largest > kLargestChunk) return chain(input, weight, bias, b);
  const Tensor x = in_layout(input, g.layout);
  with_real_number(x.scalar_type(), [&](auto number) {
    run_chunks<decltype(number)>(prepared, b, x, weight, bias ? bias->contiguous() : Tensor());
  });
  return {prepared.out, prepared.positions};
}

// ---- the operator ----

TwoTensors conv_relu_max_pool2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                std::string_view padding_mode, std::string_view activation, double negative_slope,
                                IntArrayRef pool_kernel_size, IntArrayRef pool_stride, IntArrayRef pool_padding,
                                IntArrayRef pool_dilation, bool ceil_mode, std::string_view algorithm) {
  const Block b(stride, padding, dilation, groups, padding_mode, activation, negative_slope, pool_kernel_size,
                pool_stride, pool_padding, pool_dilation, ceil_mode, algorithm);
  return two_batched(input, [&](const Tensor& x) { return run(x, weight, bias, b); });
}

TwoTensors conv_relu_max_pool2d_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                     std::string_view padding_mode, std::string_view activation, double negative_slope,
                                     IntArrayRef pool_kernel_size, IntArrayRef pool_stride, IntArrayRef pool_padding,
                                     IntArrayRef pool_dilation, bool ceil_mode, std::string_view algorithm) {
  const Block b(stride, padding, dilation, groups, padding_mode, activation, negative_slope, pool_kernel_size,
                pool_stride, pool_padding, pool_dilation, ceil_mode, algorithm);
  return two_batched(input, [&](const Tensor& x) -> TwoTensors {
    const auto p = prepare<c10::SymInt>(x, weight, bias, b);
    return {p.out, p.positions};
  });
}

TwoTensors call(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Block& b) {
  static const auto op = find_operator<decltype(conv_relu_max_pool2d)>("cnnops::conv_relu_max_pool2d");
  const Conv2dSettings& s = b.conv;
  const Window w = b.pooling.value_or(Window(kBlockName, 1, {}, 0, 1, false));
  return op.call(input, weight, bias, s.stride, s.padding, s.dilation, s.groups, s.padding_mode, b.activation.name(),
                 b.activation.negative_slope, b.pooling ? IntArrayRef(w.kernel_size) : IntArrayRef(), w.stride,
                 w.padding, w.dilation, w.ceil_mode, s.algorithm);
}

TwoTensors conv_relu_max_pool2d_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                         std::string_view padding_mode, std::string_view activation,
                                         double negative_slope, IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
                                         IntArrayRef pool_padding, IntArrayRef pool_dilation, bool ceil_mode,
                                         std::string_view algorithm) {
  const Block b(stride, padding, dilation, groups, padding_mode, activation, negative_slope, pool_kernel_size,
                pool_stride, pool_padding, pool_dilation, ceil_mode, algorithm);
  const auto has_tangent = [](const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); };
  if (!may_be_differentiated(input, weight, or_none(bias)))
    return below_autograd([&] { return call(input, weight, bias, b); });
  return two_batched(input, [&](const Tensor& x) -> TwoTensors {
    if (has_tangent(x) || has_tangent(weight) || has_tangent(or_none(bias))) return chain(x, weight, bias, b);
    const auto outputs = differentiable(
        "ConvReluMaxPool2dBackward", {x, weight, or_none(bias)},
        [&] {
          const auto [y, positions] = call(x, weight, bias, b);
          return variable_list{y, positions};
        },
        [&](const variable_list& outputs) {
          const bool has_slope = b.activation.kind != Kind::none;
          return variable_list{x, weight, has_slope ? outputs[0] : Tensor(), outputs[1]};
        },
        [b](const Backward& step) {
          const Tensor &x = step.kept[0], &weight = step.kept[1], &positions = step.kept[3];
          if (!step.grads[0].defined()) return variable_list(3);
          const Tensor& y = step.kept[2].defined() ? step.kept[2] : step.grads[0];  // not looked at
          const auto plane = [](const Tensor& t) { return t.sym_sizes().slice(2); };
          const auto g =
              conv2d_geometry<c10::SymInt>(kBlockName, x.sym_sizes(), weight.sym_sizes(), b.conv, Layout::contiguous);
          const Tensor gy = b.pooling ? call_backward(step.grads[0], y, positions, g.out, b.activation, b.pooling)
                                      : b.activation.backward(step.grads[0], y);
          return variable_list{step.needs(0) ? call_grad_input(gy, weight, {}, plane(x), b.conv) : Tensor(),
                               step.needs(1) ? call_grad_weight(gy, x, plane(weight), b.conv) : Tensor(),
                               step.needs(2) ? channel_sum(gy) : Tensor()};
        },
        [](const variable_list&, const variable_list&, const variable_list&) { return variable_list{}; });
    return {outputs[0], outputs[1]};
  });
}

template <at::DeviceType device, c10::DispatchKey key>
TwoTensors conv_relu_max_pool2d_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                         IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                                         std::string_view padding_mode, std::string_view activation,
                                         double negative_slope, IntArrayRef pool_kernel_size, IntArrayRef pool_stride,
                                         IntArrayRef pool_padding, IntArrayRef pool_dilation, bool ceil_mode,
                                         std::string_view algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(key);
  const Block b(stride, padding, dilation, groups, padding_mode, activation, negative_slope, pool_kernel_size,
                pool_stride, pool_padding, pool_dilation, ceil_mode, algorithm);
  return call(*lower_precision(device, input), *lower_precision(device, weight), lower_precision(device, bias), b);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cnnops, m) {
  m.def(
      "conv_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, str padding_mode='zeros', str activation='relu', float negative_slope=0.01, "
      "int[2] pool_kernel_size=[], int[2] pool_stride=[], int[2] pool_padding=0, int[2] pool_dilation=1, "
      "bool ceil_mode=False, str algorithm='auto') -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(cnnops, CPU, m) { m.impl("conv_relu_max_pool2d", conv_relu_max_pool2d); }
TORCH_LIBRARY_IMPL(cnnops, CUDA, m) { m.impl("conv_relu_max_pool2d", conv_relu_max_pool2d); }
TORCH_LIBRARY_IMPL(cnnops, Meta, m) { m.impl("conv_relu_max_pool2d", conv_relu_max_pool2d_meta); }
TORCH_LIBRARY_IMPL(cnnops, Autograd, m) { m.impl("conv_relu_max_pool2d", conv_relu_max_pool2d_autograd); }
TORCH_LIBRARY_IMPL(cnnops, AutocastCPU, m) {
  m.impl("conv_relu_max_pool2d", conv_relu_max_pool2d_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(cnnops, AutocastCUDA, m) {
  m.impl("conv_relu_max_pool2d", conv_relu_max_pool2d_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace cnnops
