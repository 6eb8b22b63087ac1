// Winograd's gradient of the weight: 36 multiplications for a tile of outputs instead of 144 or 100, as in
// conv2d_winograd.cpp.
//
//   gw[k, c] = transform of the 36 sums over all tiles of u[i][tile, k] * v[i][tile, c]
//
// where v[i] are the transforms of the tiles' inputs, and u[i] those of their outputs' gradients. A task is a block of
// output channels x some panels of input channels, which share the transforms of the gradients: as many as its sums
// leave room for in the cache. It walks all tiles of all images in blocks, makes the transforms of each block by
// itself, and keeps its sums: those of a block, each from a fresh zero, are added in order. Where such tasks would be
// few, the tiles are cut into parts, each with tasks and sums of its own, which are added up last. A NaN or infinity
// reaches all taps of the filters that see its tile.
#include "winograd_products.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockTiles = 48;                        // summed at a time
constexpr int64_t kMostChannels = 128, kFewChannels = 32;  // output channels of a task
constexpr int64_t kMostPairs = 1 << 13;                    // of an output and an input channel, unless it is a panel's
constexpr int64_t kGoodTasks = 4;
constexpr int64_t kPartTiles = 192, kPartNumbers = 1 << 19;  // of a part at least; of all parts together at most

/// The tiles of the output's gradient, as if they were the input.
Layer gradient_of(const Layer& t) {
  Layer y = t;
  y.border = Border::zeros;
  y.in_size = t.out_size;
  y.in = t.out;
  for (int dim = 0; dim < 2; ++dim) {
    y.offset[dim] = 0;
    y.seen[dim] = t.out_size[dim];
  }
  return y;
}

/// Tasks are numbered (group, block of output channels, block of panels, part of the tiles).
template <class T>
struct Tasks {
  int64_t points;
  int64_t vectors, width;                    // of a panel of input channels
  int64_t all_panels, panels, panel_blocks;  // a block has at most `panels` panels
  int64_t rows, blocks;                      // of output channels
  int64_t stride;                            // from tile to tile of the transformed gradients
  int64_t parts, tile_blocks;                // of all tiles
  int64_t total;

  explicit Tasks(const Layer& t) {
    constexpr int64_t L = kLanes<T>;
    const Panels<T> all(t.channels);
    points = t.points;
    vectors = all.vectors;
    width = all.width;
    all_panels = all.count;
    blocks = ceil_div(t.rows, kMostChannels);
    panel_blocks = ceil_div(all.count, larger(1, kMostPairs / (ceil_div(t.rows, blocks) * width)));
    parts = 1;
    const auto tasks = [&] { return t.groups * panel_blocks * blocks * parts; };
    tile_blocks = ceil_div(t.all_tiles, kBlockTiles);
    const int64_t numbers = t.groups * t.rows * t.channels * t.taps * t.taps;
    while (tasks() < kGoodTasks && t.all_tiles >= 2 * parts * kPartTiles && 2 * parts * numbers <= kPartNumbers)
      parts *= 2;
    if (tasks() < kGoodTasks)
      blocks = larger(1, smaller(larger(t.rows / kFewChannels, smaller(t.rows / (kFewChannels / 2), 2)),
                                 ceil_div(kGoodTasks, tasks() / blocks)));
    if (tasks() < kGoodTasks) panel_blocks = smaller(all.count, ceil_div(kGoodTasks, tasks() / panel_blocks));
    panels = ceil_div(all.count, panel_blocks);
    rows = ceil_div(t.rows, blocks);
    blocks = ceil_div(t.rows, rows);
    stride = round_up(rows, L);
    total = tasks();
  }
  int64_t channel(int64_t block) const { return all_panels * block / panel_blocks * width; }  // a block's first
  int64_t input_point() const { return kBlockTiles * width + kLine; }
  int64_t gradient_point() const { return kBlockTiles * stride + kLine; }
  int64_t sum_point() const { return rows * width + kLine; }
  int64_t workspace() const { return points * (input_point() + gradient_point() + panels * sum_point()) + kScratch<T>; }
};

template <class T, int V>
void multiply(const Tasks<T>& tasks, int64_t rows, int64_t tiles, const T* u, const T* v, T* sums, bool add) {
  for (int64_t point = 0; point < tasks.points; ++point) {
    const T* a = u + point * tasks.gradient_point();
    const T* b = v + point * tasks.input_point();
    multiply_rows<T, V>(rows, tiles, a, 1, tasks.stride, b, sums + point * tasks.sum_point(), add);
  }
}

/// From sums[point][k][c] to the filters of `rows` output channels and `channels` input channels.
template <class Form, class T, class S>
void write_filters(const Layer& t, const Tasks<T>& tasks, const T* sums, int64_t rows, int64_t channels, S* out) {
  constexpr int64_t L = kLanes<T>, taps = Form::taps;
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c = 0; c < channels; c += L) {
      const T* from = sums + k * tasks.width + c;
      S* filter = out + k * t.weight_row + c * t.weight_channel;
      const int64_t lanes = smaller(L, channels - c);
      const bool by_tap = t.weight_channel == 1;  // otherwise a channel's taps lie side by side
      const int64_t apart = counted(tasks.sum_point());
      T turned[taps * taps * L];
      transform<Numbers<Form::rows, taps>, Numbers<Form::columns, taps>, T>(
          [&](int i, int j) { return load(from + (i * Form::columns + j) * apart); },
          [&](int i, int j, Vec<T> w) {
            const int64_t tap = i * taps + j;
            by_tap ? store_first(filter + tap * t.weight_tap, w, lanes) : store(turned + tap * L, w);
          });
      if (!by_tap) turn_back(turned, L, taps * taps, lanes, filter, t.weight_channel);
    }
}

template <class Form, class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Layer x(g, Pass::grad_weight), y = gradient_of(x);
  const Tasks<T> tasks(x);
  T* v = workspace;
  T* u = v + Form::points * tasks.input_point();
  T* sums = u + Form::points * tasks.gradient_point();
  T* scratch = sums + Form::points * tasks.sum_point() * tasks.panels;
  const int64_t numbers = x.groups * x.weight_group;
  const auto multiply = tasks.vectors == 1   ? CNNOPS_ISA::multiply<T, 1>
                        : tasks.vectors == 2 ? CNNOPS_ISA::multiply<T, 2>
                        : tasks.vectors == 3 ? CNNOPS_ISA::multiply<T, 3>
                                             : CNNOPS_ISA::multiply<T, kMostVectors>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % tasks.parts, block = task / tasks.parts;
    const int64_t panels = block % tasks.panel_blocks, c0 = tasks.channel(panels);
    const int64_t c_end = smaller(tasks.channel(panels + 1), x.channels);
    const int64_t k0 = block / tasks.panel_blocks % tasks.blocks * tasks.rows, rows = smaller(tasks.rows, x.rows - k0);
    const int64_t group = block / tasks.panel_blocks / tasks.blocks;
    const auto for_panels = [&](const auto& body) {
      T* to = sums;
      for (int64_t c = c0; c < c_end; c += tasks.width, to += Form::points * tasks.sum_point())
        body(c, smaller(tasks.width, c_end - c), to);
    };
    const S* gy = o.a + (group * x.rows + k0) * y.in.c;
    const int64_t first = tasks.tile_blocks * part / tasks.parts * kBlockTiles;
    const int64_t end_tile = smaller(tasks.tile_blocks * (part + 1) / tasks.parts * kBlockTiles, x.all_tiles);
    for (int64_t tile = first; tile < end_tile; tile += kBlockTiles) {
      const int64_t count = smaller(kBlockTiles, end_tile - tile);
      transform_tiles<Points<Form::rows, Form::height>, Points<Form::columns, Form::width>>(
          y, gy, tile, count, rows, tasks.gradient_point(), tasks.stride, scratch, u);
      for_panels([&](int64_t c, int64_t channels, T* to) {
        const S* in = o.b + (group * x.channels + c) * x.in.c;
        transform_tiles<InputPoints<Form::rows>, InputPoints<Form::columns>>(
            x, in, tile, count, channels, tasks.input_point(), tasks.width, scratch, v);
        multiply(tasks, rows, count, u, v, to, tile > first);
      });
    }
    for_panels([&](int64_t c, int64_t channels, const T* from) {
      const int64_t filter = group * x.weight_group + k0 * x.weight_row + c * x.weight_channel;
      if (tasks.parts > 1) {
        write_filters<Form>(x, tasks, from, rows, channels, o.parts + part * numbers + filter);
      } else {
        write_filters<Form>(x, tasks, from, rows, channels, o.out + filter);
      }
    });
  }
}

}  // namespace

template <class S>
Conv2dRun<S> winograd_grad_weight() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) { return Tasks<T>(Layer(g, Pass::grad_weight)).total; },
          [](const Conv2dGeometry& g) { return Tasks<T>(Layer(g, Pass::grad_weight)).workspace(); },
          [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, T* workspace, int64_t begin, int64_t end) {
            const Layer t(g, Pass::grad_weight);
            with_form(t.taps, t.tile, [&](auto form) { grad_weight<decltype(form)>(g, o, workspace, begin, end); });
          },
          [](const Conv2dGeometry& g) { return Tasks<T>(Layer(g, Pass::grad_weight)).parts; },
          conv2d_channels_last<S>().grad_weight.add_parts};
}

template Conv2dRun<float> winograd_grad_weight();
template Conv2dRun<BFloat16> winograd_grad_weight();
template Conv2dRun<Float16> winograd_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
