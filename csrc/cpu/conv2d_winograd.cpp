// Winograd's convolution for 3x3 and 5x5 kernels: tiles of 4x4 outputs by 36 multiplications each instead of 144; of
// 2x2 outputs by 36 instead of 100, or 2x4 by 48 instead of 200.
//
//   v[i] = transform of a tile's 6x6 inputs, of each channel c      u[i] = transform of each filter (k, c)
//   s[i][tile, k] = sum over c of v[i][tile, c] * u[i][c, k]        for each of 36 points i: a product of matrices
//   y of the tile = transform of its 36 sums, of each channel k
//
// winograd_points.h has the transforms, winograd.h how numbers come to them. An input's is worth its additions if many
// output channels share it, a filter's if many tiles do, a sum's if it has many channels. So a task is a block of
// tiles, running on from image to image, times a block of output channels, and transforms what it needs by itself:
// filters once per task, which costs about as much as 7 tiles do, or, where they are few, once per thread. It walks the
// input channels in blocks, whose transforms stay in the second-level cache, and keeps the sums of all its tiles. No
// buffer grows with the layer. The gradient of the input is the same with mirrored taps and exchanged channels, or,
// where that takes fewer products, conv2d_winograd_transposed.cpp.
//
// Sums are made in blocks of channels, each from a fresh zero, that are then added in order, whatever the tasks are.
// But the transforms mix the inputs of a tile: an output's rounding depends on its whole patch, also on inputs that it
// does not see. A NaN or infinity among them makes all outputs of the tile NaN; in a filter, all outputs of its
// channel. The relative L2 error is about 6e-7 with 3x3 kernels and 1.2e-6 with 5x5 ones (docs/accuracy.md), but a
// small output beside large ones may err by 24 eps times its own sum of absolute values. Tiles of 4x4 would take fewer
// products for 5x5 kernels, 64 for 16 outputs, but err by 2e-6 and more.
//
// With a dilation d an image is d*d images of its own, one for each phase (winograd_forms.h), and so are its tiles:
// their pixels are read and written d apart, where they stand.
//
// Contiguous filters are read where they are also among channels_last tensors: a block of channels is one run of numbers
// there, and with all its taps far apart in channels_last filters.
//
// The 16-bit floats are widened as they are read and rounded once, as they are written: all between is float32's, whose
// errors are far below their own rounding. Where bfloat16 has an instruction of its own, that is mostly left to
// `dot_products`.
//
// Refuses float64, kernels other than 3x3 and 5x5, strides, and where `direct` is faster: few channels, or small images
// or phases. The gradient of the weight is in conv2d_winograd_grad_weight.cpp.
#include "winograd_products.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostTiles = 104, kFewTiles = 48;     // of a task
constexpr int64_t kMostChannels = 256;                  // produced by a task
constexpr int64_t kKeptChannels = 64, kKeptTiles = 24;  // the most summed where filters are kept, and of a task there
constexpr int64_t kGoodTasks = 4;
constexpr int64_t kFewestChannels = 16;  // with fewer, `direct` is faster
constexpr int64_t kBlockChannels = 32;   // summed at a time

/// How the work is cut: tasks are numbered (group, block of panels, block of tiles).
template <class T>
struct Tasks {
  int64_t vectors, width;              // a panel: `vectors` vectors, `width` produced channels
  int64_t all_panels, panels, blocks;  // `blocks` blocks of at most `panels` panels
  int64_t points, tiles, tile_blocks;
  int64_t depth;  // summed channels of a block
  bool kept;  // all filters are one panel and one block: they are transformed for the first of a thread's tasks only
  int64_t total;

  explicit Tasks(const Layer& t) {
    constexpr int64_t L = kLanes<T>;
    const Panels<T> all(t.rows);
    all_panels = all.count;
    points = t.points;
    vectors = all.vectors;
    width = all.width;
    blocks = ceil_div(all_panels, larger(1, kMostChannels / width));
    kept = all_panels == 1 && t.channels <= kKeptChannels;
    const int64_t most = kept ? kKeptTiles : kMostTiles * 36 / points;
    tile_blocks = t.all_tiles <= most ? 1 : round_up(ceil_div(t.all_tiles, most), 2);
    if (t.groups * blocks * tile_blocks < kGoodTasks)
      blocks = smaller(all_panels, ceil_div(kGoodTasks, t.groups * tile_blocks));
    if (t.groups * blocks * tile_blocks < kGoodTasks)
      tile_blocks = larger(1, smaller(t.all_tiles / kFewTiles, ceil_div(kGoodTasks, t.groups * blocks)));
    panels = ceil_div(all_panels, blocks);
    tiles = ceil_div(t.all_tiles, tile_blocks);
    tile_blocks = ceil_div(t.all_tiles, tiles);
    depth = kept ? round_up(t.channels, L) : round_up(ceil_div(t.channels, ceil_div(t.channels, kBlockChannels)), L);
    total = t.groups * blocks * tile_blocks;
  }
  int64_t row(int64_t block) const { return all_panels * block / blocks * width; }  // a block's first channel
  int64_t input_point() const { return tiles * depth + kLine; }
  int64_t filter_point() const { return width * depth + kLine; }
  int64_t sum_point() const { return tiles * width + kLine; }
  int64_t workspace() const { return points * (input_point() + filter_point() + panels * sum_point()) + kScratch<T>; }
};

/// From sums[panel][point][tile][lane] to outputs.
template <class Form, class S>
void transform_outputs(const Layer& t, const Tasks<Sum<S>>& tasks, const Sum<S>* sums, const S* bias, int64_t tile0,
                       int64_t count, int64_t channels, Sum<S>* scratch, S* out) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t point = tasks.sum_point();
  using Rows = Numbers<Form::rows, Form::height>;
  using Columns = Numbers<Form::columns, Form::width>;
  for_runs<T>(t, tile0, count, channels, [&](const TileRun& run, int64_t c, int64_t lanes) {
    const Vec<T> plus = bias ? load_first(bias + c, lanes) : Vec<T>{};
    const int64_t height = smaller(Form::height, t.left(run.h, 0));
    S* image = out + run.n * t.out.n + c * t.out.c;
    const T* from = sums + c / tasks.width * Form::points * point + run.first * tasks.width + c % tasks.width;
    const auto get = [&](int i, int j) { return load(from + (i * Form::columns + j) * point); };
    if (t.layout == Layout::channels_last) {
      for (int64_t tile = 0; tile < run.count; ++tile, from += tasks.width) {
        const int64_t w = run.w + tile * Form::width * t.apart[1], width = smaller(Form::width, t.left(w, 1));
        S* to = image + run.h * t.out.h + w * t.out.w;
        const int64_t row = t.apart[0] * t.out.h, pixel = t.apart[1] * t.out.w;
        transform<Rows, Columns, T>(get, [&](int i, int j, Vec<T> y) {
          if (i < height && j < width) store_first(to + i * row + j * pixel, y + plus, lanes);
        });
      }
      return;
    }
    const int64_t columns = smaller(run.count * Form::width, t.left(run.w, 1));
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < columns; j += kLine)
          __builtin_prefetch(image + lane * t.out.c + (run.h + i * t.apart[0]) * t.out.h + run.w + j * t.apart[1], 1);
    for (int64_t w = 0; w < columns; w += Form::width, from += tasks.width)
      transform<Rows, Columns, T>(get, [&](int i, int j, Vec<T> y) {
        if (w + j < columns) store(scratch + (i * columns + w + j) * L, y + plus);
      });
    copy_back(t, scratch, run.h, run.w, height, columns, columns, lanes, image);
  });
}

template <class Form, class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Layer t(g, pass);
  const Tasks<T> tasks(t);
  T* v = workspace;
  T* u = v + Form::points * tasks.input_point();
  T* sums = u + Form::points * tasks.filter_point();
  T* scratch = sums + Form::points * tasks.sum_point() * tasks.panels;
  const auto multiply = multiply_points_by<T>(tasks.vectors);
  for (int64_t task = begin, kept = -1; task < end; ++task) {
    const int64_t tile0 = task % tasks.tile_blocks * tasks.tiles, count = smaller(tasks.tiles, t.all_tiles - tile0);
    const int64_t block = task / tasks.tile_blocks % tasks.blocks, group = task / tasks.tile_blocks / tasks.blocks;
    const int64_t row0 = tasks.row(block), rows = smaller(tasks.row(block + 1), t.rows) - row0;
    for (int64_t c0 = 0; c0 < t.channels; c0 += tasks.depth) {
      const int64_t depth = smaller(tasks.depth, t.channels - c0);
      const S* in = o.a + (group * t.channels + c0) * t.in.c;
      transform_tiles<InputPoints<Form::rows>, InputPoints<Form::columns>>(
          t, in, tile0, count, depth, tasks.input_point(), tasks.depth, scratch, v);
      const S* weight = o.b + group * t.weight_group + row0 * t.weight_row + c0 * t.weight_channel;
      Factors<T> factors{v, u, sums, tasks.input_point(), tasks.filter_point(), tasks.sum_point(), tasks.depth};
      for (int64_t row = 0; row < rows; row += tasks.width, factors.sums += Form::points * tasks.sum_point()) {
        if (kept != task / tasks.tile_blocks)
          transform_filters<Form>(t, weight + row * t.weight_row, rows - row, depth, tasks.width, tasks.filter_point(),
                                  scratch, u);
        multiply(factors, Form::points, count, depth, c0 > 0);
      }
    }
    if (tasks.kept) kept = task / tasks.tile_blocks;
    const int64_t channel = group * t.rows + row0;
    transform_outputs<Form>(t, tasks, sums, o.bias ? o.bias + channel : nullptr, tile0, count, rows, scratch,
                            o.out + channel * t.out.c);
  }
}

/// The smallest image, along an axis, whose tiles are worth the transforms of the filters whatever the batch is. Where
/// a single image has few tiles, `direct` is hard to beat in channels_last; and a gradient of the weight from few tiles
/// errs by more than its few terms should.
int64_t smallest_image(const Conv2dGeometry& g, Pass pass) {
  if (pass != Pass::forward || g.layout == Layout::channels_last) return 6;
  return g.kernel[0] == 3 ? 4 : 2;
}

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (g.kernel[0] != 3 && g.kernel[0] != 5) return "its transforms are those of 3x3 and 5x5 kernels";
  if (!std::is_same_v<Sum<S>, float>) return "its transforms round more than float64 is asked for";
  for (int dim = 0; dim < 2; ++dim) {
    if (g.kernel[dim] != g.kernel[0] || g.stride[dim] != 1)
      return "its transforms are those of a square kernel with stride 1";
    if (dim == 1 && g.layout == Layout::contiguous && g.dilation[dim] * (g.kernel[dim] + 3) > kRunColumns)
      return "a row of its patch would show too many pixels of other phases";
    if (ceil_div((pass == Pass::grad_input ? g.in : g.out)[dim], g.dilation[dim]) < smallest_image(g, pass))
      return "the image is too small to share its filters";
  }
  if (g.c / g.groups < kFewestChannels || g.k / g.groups < kFewestChannels)
    return "too few channels share what it transforms";
  return nullptr;
}

/// Where one instruction multiplies and adds twice as many bfloat16 numbers, transforms still pay for many channels and
/// images large enough to share the filters', and for the gradients of 5x5 kernels: so say float32's times beside
/// `dot_products`'; on widened numbers it has yet to be measured.
bool beats_dot_products(const Conv2dGeometry& g, Pass pass) {
  const int64_t channels = smaller(g.c, g.k) / g.groups, image = smaller(g.out[0], g.out[1]);
  return (channels >= 64 && image >= 24) || (pass != Pass::forward && g.kernel[0] == 5 && image >= 20);
}

/// Pairs of an output and a tap that see a pixel, along an axis.
int64_t seen_taps(const Conv2dGeometry& g, int dim) {
  int64_t count = 0;
  for (int64_t tap = 0; tap < g.kernel[dim]; ++tap) {
    const int64_t first = tap * g.dilation[dim] - g.padding[dim];  // what output 0 sees
    count += larger(0, smaller(g.out[dim], g.in[dim] - first) - larger(0, -first));
  }
  return count;
}

/// Few outputs leave the tiles at the border of a small image, or of a dilation's small phases, half empty: those who
/// do without tiles are faster there.
template <class S>
bool yields(const Conv2dGeometry& g, Pass pass) {
  if (!beats_dot_products(g, pass) && !conv2d_dot_products<S>().refuses(g, pass)) return true;
  if (g.dilation[0] * g.dilation[1] > 1)
    return 2 * seen_taps(g, 0) * seen_taps(g, 1) < 3 * fewest_products(g, pass).products();
  if (pass != Pass::grad_input) return false;
  const int64_t products = g.kernel[0] * g.kernel[1] * g.out[0] * g.out[1];
  return 3 * products < 2 * fewest_products(g, pass).products();
}

template <class S, Pass pass>
Conv2dRun<S> run() {
  if constexpr (std::is_same_v<Sum<S>, float>) {
    return {[](const Conv2dGeometry& g) {
              const Layer t(g, pass);
              return t.transposed ? winograd_transposed<S>().tasks(g) : Tasks<float>(t).total;
            },
            [](const Conv2dGeometry& g) {
              const Layer t(g, pass);
              return t.transposed ? winograd_transposed<S>().workspace(g) : Tasks<float>(t).workspace();
            },
            [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, float* workspace, int64_t begin, int64_t end) {
              const Layer t(g, pass);
              if (t.transposed) return winograd_transposed<S>().run(g, o, workspace, begin, end);
              with_form(t.taps, t.tile,
                        [&](auto form) { correlate<decltype(form), S, pass>(g, o, workspace, begin, end); });
            }};
  } else {
    return {};
  }
}

template <class S>
Conv2dRun<S> grad_weight_run() {
  if constexpr (std::is_same_v<Sum<S>, float>) {
    return winograd_grad_weight<S>();
  } else {
    return {};
  }
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_winograd() {
  return {"winograd",
          "3x3 and 5x5 kernels by a quarter of the multiplications; not float64",
          refuses<S>,
          run<S, Pass::forward>(),
          run<S, Pass::grad_input>(),
          grad_weight_run<S>(),
          false,
          yields<S>,
          nullptr,
          [](const Conv2dGeometry&, Pass pass) { return pass != Pass::grad_weight; }};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_winograd();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_winograd();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_winograd();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_winograd();

}  // namespace cnnops::cpu::CNNOPS_ISA
