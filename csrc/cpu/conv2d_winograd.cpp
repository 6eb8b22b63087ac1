#include "channels_last.h"
#include "winograd.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kSums = 3 * kTileRows;                  // vectors of sums in a register tile
constexpr int kMostVectors = kTileRows == 8 ? 4 : 3;  // in a row of it
constexpr int kMostRows = 12;
constexpr int64_t kMostTiles = 104, kFewTiles = 48;  // of a task
constexpr int64_t kMostChannels = 256;               // produced by a task
constexpr int64_t kGoodTasks = 4;
constexpr int64_t kBlockChannels = 32;  // summed at a time
constexpr int64_t kRunTiles = 8;        // copied at a time
constexpr int64_t kLine = 16;           // numbers between two points: or they would share their places in the cache

template <int V>
constexpr int kRows = kSums / V < kMostRows ? kSums / V : kMostRows;

/// sums[m][V vectors] (+)= sum over c of a[m*step + c] * b[c][V vectors].
template <class T, int V>
void multiply_tile(int64_t depth, const T* a, int64_t step, const T* b, T* sums, bool add) {
  constexpr int M = kRows<V>, L = kLanes<T>;
  Vec<T> sum[M][V]{};
  for (int64_t c = 0; c < depth; ++c, ++a, b += V * L) {
    Vec<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
    for (int m = 0; m < M; ++m) {
      const Vec<T> x = broadcast(a[m * step]);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(x, column[v], sum[m][v]);
    }
  }
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = sums + (m * V + v) * L;
      store(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
}

/// Where a tensor's numbers lie.
struct Strides {
  int64_t image, channel, row, pixel;
};

static Strides strides(Layout layout, int64_t channels, const int64_t* size) {
  const int64_t plane = size[0] * size[1];
  return layout == Layout::contiguous ? Strides{channels * plane, plane, size[1], 1}
                                      : Strides{channels * plane, 1, size[1] * channels, channels};
}

/// The forward convolution or the gradient of its input, which is one with mirrored taps: output (h, w) sees inputs
/// (h + offset, w + offset) to (h + offset + 2, w + offset + 2).
struct Layer {
  Layout layout;
  Border border;
  bool mirrored;
  int64_t channels, rows, groups;  // summed over and produced, of one group
  const int64_t *in_size, *out_size;
  int64_t offset[2], seen[2];  // inputs from `seen` on are seen by nobody
  int64_t tiles[2];            // of an image
  int64_t all_tiles;
  Strides in, out;
  int64_t weight_group, weight_row, weight_channel, weight_tap;

  Layer(const Conv2dGeometry& g, Pass pass) {
    const bool forward = pass == Pass::forward, contiguous = g.layout == Layout::contiguous;
    const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, filter = kTaps * kTaps * c_group;
    const int64_t k_step = filter, c_step = contiguous ? kTaps * kTaps : 1;
    layout = g.layout;
    border = g.border;
    mirrored = !forward;
    channels = forward ? c_group : k_group;
    rows = forward ? k_group : c_group;
    groups = g.groups;
    in_size = forward ? g.in : g.out;
    out_size = forward ? g.out : g.in;
    for (int dim = 0; dim < 2; ++dim) {
      offset[dim] = forward ? -g.padding[dim] : g.padding[dim] - (kTaps - 1);
      seen[dim] = out_size[dim] + offset[dim] + kTaps - 1;
      tiles[dim] = ceil_div(out_size[dim], kTile);
    }
    all_tiles = g.n * tiles[0] * tiles[1];
    in = strides(layout, channels * groups, in_size);
    out = strides(layout, rows * groups, out_size);
    weight_group = k_group * filter;
    weight_row = forward ? k_step : c_step;
    weight_channel = forward ? c_step : k_step;
    weight_tap = contiguous ? 1 : c_group;
  }

  /// The pixel that position i of an axis shows; -1 for none, or where it does not matter.
  int64_t pixel(int64_t i, int dim) const { return i < seen[dim] ? pixel_at(i, in_size[dim], border) : -1; }
  /// Whether positions [i, i + kPatch) are pixels.
  bool inside(int64_t i, int dim) const { return i >= 0 && i + kPatch <= smaller(seen[dim], in_size[dim]); }
};

/// Neighbours in a row of tiles: as many as are copied at a time. `first` is the first one's number within the task.
struct Run {
  int64_t n, h, w, count, first;
};

/// Calls f(run, c) for all runs of some tiles and all vectors of `channels` channels, in the order of memory.
template <class T, class F>
void for_runs(const Layer& t, int64_t begin, int64_t count, int64_t channels, const F& f) {
  const bool contiguous = t.layout == Layout::contiguous;
  const auto runs = [&](int64_t c0, int64_t c1) {
    for (int64_t first = 0; first < count;) {
      const int64_t tile = begin + first, w = tile % t.tiles[1], row = tile / t.tiles[1];
      const int64_t length = contiguous ? smaller(smaller(t.tiles[1] - w, count - first), kRunTiles) : 1;
      const Run run{row / t.tiles[0], row % t.tiles[0] * kTile, w * kTile, length, first};
      for (int64_t c = c0; c < c1; c += kLanes<T>) f(run, c, smaller(kLanes<T>, c1 - c));
      first += length;
    }
  };
  if (!contiguous) return runs(0, channels);
  for (int64_t c = 0; c < channels; c += kLanes<T>) runs(c, smaller(c + kLanes<T>, channels));
}

/// to[i][j][lane] = what rows [h, h + kPatch) x columns [w, w + columns) of the image's first `lanes` channels show.
template <class T>
void copy_patch(const Layer& t, const T* image, int64_t h, int64_t w, int64_t columns, int64_t lanes, T* to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < kPatch; ++i, to += columns * L) {
    const int64_t row = t.pixel(h + i, 0);
    if (row < 0) {
      for (int64_t j = 0; j < columns; ++j) store(to + j * L, Vec<T>{});
      continue;
    }
    const T* from = image + row * t.in.row;
    if (t.layout == Layout::channels_last) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t column = t.pixel(w + j, 1);
        store(to + j * L, column < 0 ? Vec<T>{} : load_first(from + column * t.in.pixel, lanes));
      }
      continue;
    }
    const int64_t width = smaller(t.in_size[1], larger(t.seen[1], 0));
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t count = smaller(L, columns - j);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* plane = from + lane * t.in.channel;
        square[lane] = load_inside(plane, width, w + j, count);
        __builtin_prefetch(plane + kTile * t.in.row + w + j);  // of the tiles below
      }
      transpose<T>(square);
      for (int64_t lane = 0; lane < count; ++lane) store(to + (j + lane) * L, square[lane]);
    }
    if (t.border == Border::zeros) continue;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t column = t.pixel(w + j, 1);
      if (column < 0 || column == w + j) continue;
      for (int64_t lane = 0; lane < lanes; ++lane) to[j * L + lane] = from[lane * t.in.channel + column];
    }
  }
}

/// The inverse: rows [h, h + kTile) x columns [w, w + columns), as far as the image has them.
template <class T>
void copy_back(const Layer& t, const T* from, int64_t h, int64_t w, int64_t columns, int64_t lanes, T* image) {
  constexpr int64_t L = kLanes<T>;
  const int64_t rows = smaller(kTile, t.out_size[0] - h), width = smaller(columns, t.out_size[1] - w);
  for (int64_t i = 0; i < rows; ++i, from += columns * L) {
    T* to = image + (h + i) * t.out.row + w * t.out.pixel;
    if (t.layout == Layout::channels_last) {
      for (int64_t j = 0; j < width; ++j) store_first(to + j * t.out.pixel, load(from + j * L), lanes);
      continue;
    }
    for (int64_t j = 0; j < width; j += L) {
      const int64_t count = smaller(L, width - j);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < count; ++lane) square[lane] = load(from + (j + lane) * L);
      transpose<T>(square);
      for (int64_t lane = 0; lane < lanes; ++lane) store_first(to + lane * t.out.channel + j, square[lane], count);
    }
  }
}

/// to[channel][tap][lane] = the weights of `lanes` produced and `count` summed channels, at most a vector of each.
template <class T>
void copy_filters(const Layer& t, const T* from, int64_t lanes, int64_t count, T* to) {
  constexpr int64_t L = kLanes<T>, taps = kTaps * kTaps;
  if (t.weight_row == 1) {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t tap = 0; tap < taps; ++tap)
        store(to + (c * taps + tap) * L, load_first(from + c * t.weight_channel + tap * t.weight_tap, lanes));
    return;
  }
  const bool by_tap = t.weight_tap == 1;  // otherwise channels lie side by side
  const bool all = by_tap && t.weight_channel == taps;
  const int64_t squares = all ? 1 : by_tap ? count : taps, square_step = by_tap ? t.weight_channel : t.weight_tap;
  const int64_t length = all ? count * taps : by_tap ? taps : count;
  const int64_t to_square = by_tap ? taps : 1, to_lane = by_tap ? 1 : taps;
  for (int64_t s = 0; s < squares; ++s)
    for (int64_t r = 0; r < length; r += L) {
      const int64_t columns = smaller(L, length - r);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* filter = from + s * square_step + lane * t.weight_row + r;
        square[lane] = load_first(filter, columns);
        __builtin_prefetch(filter + L * t.weight_row);  // of the next vector of produced channels
      }
      transpose<T>(square);
      for (int64_t i = 0; i < columns; ++i) store(to + (s * to_square + (r + i) * to_lane) * L, square[i]);
    }
}

/// How the work is cut: tasks are numbered (group, block of panels, block of tiles).
template <class T>
struct Tasks {
  int64_t vectors, width, panels;  // a panel: `vectors` vectors, `width` produced channels; and how many a task has
  int64_t blocks, tiles, tile_blocks;
  int64_t depth;  // summed channels of a block
  int64_t total;

  explicit Tasks(const Layer& t) {
    constexpr int64_t L = kLanes<T>;
    const int64_t all_vectors = ceil_div(t.rows, L);
    vectors = ceil_div(all_vectors, ceil_div(all_vectors, kMostVectors));
    width = vectors * L;
    const int64_t all_panels = ceil_div(t.rows, width);
    blocks = ceil_div(all_panels, larger(1, kMostChannels / width));
    tile_blocks = t.all_tiles <= kMostTiles ? 1 : round_up(ceil_div(t.all_tiles, kMostTiles), 2);
    if (t.groups * blocks * tile_blocks < kGoodTasks)
      blocks = smaller(all_panels, ceil_div(kGoodTasks, t.groups * tile_blocks));
    if (t.groups * blocks * tile_blocks < kGoodTasks)
      tile_blocks = larger(1, smaller(t.all_tiles / kFewTiles, ceil_div(kGoodTasks, t.groups * blocks)));
    panels = ceil_div(all_panels, blocks);
    blocks = ceil_div(all_panels, panels);
    tiles = round_up(ceil_div(t.all_tiles, tile_blocks), smaller(kSums / vectors, kMostRows));
    tile_blocks = ceil_div(t.all_tiles, tiles);
    depth = round_up(ceil_div(t.channels, ceil_div(t.channels, kBlockChannels)), L);
    total = t.groups * blocks * tile_blocks;
  }
  int64_t rows() const { return panels * width; }
  int64_t input_point() const { return tiles * depth + kLine; }
  int64_t filter_point() const { return width * depth + kLine; }
  int64_t sum_point() const { return tiles * width + kLine; }
  static constexpr int64_t kScratch = kPatch * (kRunTiles * kTile + kTaps - 1) * kLanes<T>;
  static_assert(kScratch >= kTaps * kTaps * kLanes<T> * kLanes<T>);
  int64_t workspace() const { return kPoints * (input_point() + filter_point() + panels * sum_point()) + kScratch; }
};

/// v[point][tile][c].
template <class T>
void transform_inputs(const Layer& t, const Tasks<T>& tasks, const T* in, int64_t tile0, int64_t count,
                      int64_t channels, T* scratch, T* v) {
  constexpr int64_t L = kLanes<T>;
  const int64_t point = tasks.input_point();
  for_runs<T>(t, tile0, count, channels, [&](const Run& run, int64_t c, int64_t lanes) {
    const int64_t h = run.h + t.offset[0], w = run.w + t.offset[1], columns = run.count * kTile + kTaps - 1;
    const T *image = in + run.n * t.in.image + c * t.in.channel, *from = scratch;
    int64_t row = columns * L, column = L;
    if (t.layout == Layout::channels_last && lanes == L && t.inside(h, 0) && t.inside(w, 1)) {
      from = image + h * t.in.row + w * t.in.pixel;
      row = t.in.row;
      column = t.in.pixel;
    } else {
      copy_patch(t, image, h, w, columns, lanes, scratch);
    }
    T* to = v + run.first * tasks.depth + c;
    for (int64_t i = 0; i < run.count; ++i, from += kTile * column, to += tasks.depth)
      transform<InputPoints, T>(
          [&](int i, int j) {
            __builtin_prefetch(from + i * row + (j + kTile) * column);
            return load(from + i * row + j * column);
          },
          [&](int i, int j, Vec<T> x) { store(to + (i * kPatch + j) * point, x); });
  });
}

/// u[point][c][lane], for a panel of `rows` produced channels.
template <class T>
void transform_filters(const Layer& t, const Tasks<T>& tasks, const T* weight, int64_t rows, int64_t channels,
                       T* scratch, T* u) {
  constexpr int64_t L = kLanes<T>, taps = kTaps * kTaps;
  const int64_t point = tasks.filter_point(), step = t.mirrored ? -L : L;
  for (int64_t row = 0; row < tasks.width; row += L)
    for (int64_t c0 = 0; c0 < channels; c0 += L) {
      const int64_t count = smaller(L, channels - c0), lanes = larger(smaller(L, rows - row), 0);
      copy_filters(t, weight + row * t.weight_row + c0 * t.weight_channel, lanes, count, scratch);
      for (int64_t c = 0; c < count; ++c) {
        const T* filter = scratch + (c * taps + (t.mirrored ? taps - 1 : 0)) * L;
        T* to = u + (c0 + c) * tasks.width + row;
        transform<FilterPoints, T>([&](int i, int j) { return load(filter + (i * kTaps + j) * step); },
                                   [&](int i, int j, Vec<T> x) { store(to + (i * kPatch + j) * point, x); });
      }
    }
}

/// From sums[panel][point][tile][lane] to outputs.
template <class T>
void transform_outputs(const Layer& t, const Tasks<T>& tasks, const T* sums, const T* bias, int64_t tile0,
                       int64_t count, int64_t channels, T* scratch, T* out) {
  constexpr int64_t L = kLanes<T>;
  const int64_t point = tasks.sum_point();
  for_runs<T>(t, tile0, count, channels, [&](const Run& run, int64_t c, int64_t lanes) {
    const Vec<T> plus = bias ? load_first(bias + c, lanes) : Vec<T>{};
    const int64_t columns = run.count * kTile;
    T *image = out + run.n * t.out.image + c * t.out.channel, *to = scratch;
    int64_t row = columns * L, column = L;
    const bool in_place = t.layout == Layout::channels_last && lanes == L && run.h + kTile <= t.out_size[0] &&
                          run.w + kTile <= t.out_size[1];
    if (in_place) {
      to = image + run.h * t.out.row + run.w * t.out.pixel;
      row = t.out.row;
      column = t.out.pixel;
    }
    if (t.layout == Layout::contiguous)
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t i = 0; i < smaller(kTile, t.out_size[0] - run.h); ++i)
          for (int64_t j = 0; j < columns; j += kLine)
            __builtin_prefetch(image + lane * t.out.channel + (run.h + i) * t.out.row + run.w + j, 1);
    const T* from = sums + c / tasks.width * kPoints * point + run.first * tasks.width + c % tasks.width;
    for (int64_t i = 0; i < run.count; ++i, from += tasks.width, to += kTile * column)
      transform<Outputs, T>([&](int i, int j) { return load(from + (i * kPatch + j) * point); },
                            [&](int i, int j, Vec<T> y) { store(to + i * row + j * column, y + plus); });
    if (!in_place) copy_back(t, scratch, run.h, run.w, columns, lanes, image);
  });
}

template <class T, int V>
void multiply(const Tasks<T>& tasks, int64_t tiles, int64_t depth, const T* v, const T* u, T* sums, bool add) {
  for (int64_t point = 0; point < kPoints; ++point) {
    const T* a = v + point * tasks.input_point();
    const T* b = u + point * tasks.filter_point();
    T* to = sums + point * tasks.sum_point();
    for (int64_t p = 0; p < tiles; p += kRows<V>)
      multiply_tile<T, V>(depth, a + p * tasks.depth, tasks.depth, b, to + p * tasks.width, add);
  }
}

template <class T, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* workspace, int64_t begin, int64_t end) {
  const Layer t(g, pass);
  const Tasks<T> tasks(t);
  T* v = workspace;
  T* u = v + kPoints * tasks.input_point();
  T* sums = u + kPoints * tasks.filter_point();
  T* scratch = sums + kPoints * tasks.sum_point() * tasks.panels;
  const auto multiply = tasks.vectors == 1   ? CNNOPS_ISA::multiply<T, 1>
                        : tasks.vectors == 2 ? CNNOPS_ISA::multiply<T, 2>
                        : tasks.vectors == 3 ? CNNOPS_ISA::multiply<T, 3>
                                             : CNNOPS_ISA::multiply<T, kMostVectors>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tile0 = task % tasks.tile_blocks * tasks.tiles, count = smaller(tasks.tiles, t.all_tiles - tile0);
    const int64_t row0 = task / tasks.tile_blocks % tasks.blocks * tasks.rows();
    const int64_t group = task / tasks.tile_blocks / tasks.blocks, rows = smaller(tasks.rows(), t.rows - row0);
    for (int64_t c0 = 0; c0 < t.channels; c0 += tasks.depth) {
      const int64_t depth = smaller(tasks.depth, t.channels - c0);
      const T* in = o.a + (group * t.channels + c0) * t.in.channel;
      transform_inputs(t, tasks, in, tile0, count, depth, scratch, v);
      const T* weight = o.b + group * t.weight_group + row0 * t.weight_row + c0 * t.weight_channel;
      T* to = sums;
      for (int64_t row = 0; row < rows; row += tasks.width, to += kPoints * tasks.sum_point()) {
        transform_filters(t, tasks, weight + row * t.weight_row, rows - row, depth, scratch, u);
        multiply(tasks, count, depth, v, u, to, c0 > 0);
      }
    }
    const int64_t channel = group * t.rows + row0;
    transform_outputs(t, tasks, sums, o.bias ? o.bias + channel : nullptr, tile0, count, rows, scratch,
                      o.out + channel * t.out.channel);
  }
}

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (!std::is_same_v<S, float>) return "its transforms round more than float64 or the 16-bit types are asked for";
  if (pass == Pass::grad_weight) return "it has no form of the gradient of the weight";
  for (int dim = 0; dim < 2; ++dim)
    if (g.kernel[dim] != kTaps || g.stride[dim] != 1 || g.dilation[dim] != 1)
      return "its transforms are those of a 3x3 kernel with stride and dilation 1";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> run() {
  if constexpr (std::is_same_v<S, float>) {
    return {[](const Conv2dGeometry& g) { return Tasks<S>(Layer(g, pass)).total; },
            [](const Conv2dGeometry& g) { return Tasks<S>(Layer(g, pass)).workspace(); }, correlate<S, pass>};
  } else {
    return {};
  }
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_winograd() {
  return {"winograd",
          "3x3 kernels by a quarter of the multiplications; float32",
          refuses<S>,
          run<S, Pass::forward>(),
          run<S, Pass::grad_input>(),
          {}};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_winograd();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_winograd();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_winograd();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_winograd();

}  // namespace cnnops::cpu::CNNOPS_ISA
