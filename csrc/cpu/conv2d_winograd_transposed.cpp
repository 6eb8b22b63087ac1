// Winograd's gradient of the input in its transposed form: for layers without padding, or with little.
//
//   z[i] = transform of a tile of the output's gradient, of each channel k    u[i] = transform of each filter (k, c)
//   s[i][tile, c] = sum over k of z[i][tile, k] * u[i][c, k]                  for each point i: a product of matrices
//   gx += transform of the tile's sums, a patch, of each channel c
//
// The gradient of the input is a convolution as well, with mirrored taps, and conv2d_winograd.cpp computes it as one.
// But without padding its outputs are more than the forward convolution's, 24x24 against 20x20 or 10x10 against 6x6,
// and many of its products have a factor that lies outside of the image. The derivative of a linear map is its
// transpose, and has as many products as the map: so here are the forward convolution's tiles, its filters, and its
// transforms, but each the other way round. What was read from a patch is now added to it, and patches overlap.
//
// Adding is done in two steps, as the transform has two: along a row of tiles, before columns are transformed, and then
// from row to row of tiles. The taps - 1 last rows of a row of patches stay open until the next row of tiles has been
// added; the others are done and written. So each pixel is written once, each number is added in the same order
// whatever else a task does, and no buffer grows with the image's height.
//
// A task is some images, or a band of one image's rows, times a block of input channels. Bands that see the same tiles
// both transform them. A NaN or infinity in a tile reaches the whole patch.
#include "winograd_products.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostTiles = 104, kKeptTiles = 80;  // of a step
constexpr int64_t kKeptChannels = 64;                 // the most summed where filters are kept
constexpr int64_t kMostChannels = 256;                // produced by a task
constexpr int64_t kBlockChannels = 32;                // summed at a time
constexpr int64_t kGoodTasks = 4, kManyTasks = 16;

/// How the work is cut: tasks are numbered (group, block of panels, images or band). A task goes by steps of some rows
/// of tiles, from one image to the next.
template <class T>
struct Tasks {
  int64_t points, vectors, width;      // of a panel
  int64_t all_panels, panels, blocks;  // a task has at most `panels` panels
  int64_t depth;                       // summed channels of a block
  bool kept;     // all filters are one panel and one block: they are transformed for a thread's first task only
  int64_t rows;  // of tiles, of a step
  int64_t images, bands, band;  // of a task; of an image, and the pixel rows of one
  int64_t tiles, columns;       // of a step, and the pixels that a row of patches covers
  int64_t pieces, total;

  explicit Tasks(const Layer& t, int64_t n) {
    constexpr int64_t L = kLanes<T>;
    kept = Panels<T>(t.rows).count == 1 && t.channels <= kKeptChannels;
    const Panels<T> all(t.rows, kept ? kMostVectors : 2);
    points = t.points;
    vectors = all.vectors;
    width = all.width;
    depth = kept ? round_up(t.channels, L) : round_up(ceil_div(t.channels, ceil_div(t.channels, kBlockChannels)), L);
    all_panels = all.count;
    rows = larger(1, (kept ? kKeptTiles : kMostTiles) * 36 / points / t.tiles[1]);
    blocks = ceil_div(all.count, larger(1, kMostChannels / width));
    images = larger(1, kept ? smaller(rows, t.groups * n / kManyTasks) : rows / t.tiles[0]);
    // Where filters are many, two tasks rather have filters of their own than the same ones.
    blocks = larger(blocks, smaller(all.count, ceil_div(kGoodTasks, t.groups * ceil_div(n, images))));
    panels = ceil_div(all.count, blocks);
    images = smaller(images, ceil_div(n, ceil_div(kGoodTasks, t.groups * blocks)));
    bands = t.groups * blocks * n > 1 || t.tiles[0] < 4 ? 1 : 2;
    band = ceil_div(t.out_size[0], bands);
    tiles = rows * t.tiles[1];
    columns = t.tiles[1] * t.tile[1] + t.taps - 1;
    pieces = bands > 1 ? n * bands : ceil_div(n, images);
    total = t.groups * blocks * pieces;
  }
  int64_t row(int64_t block) const { return all_panels * block / blocks * width; }  // a block's first channel
  int64_t gradient_point() const { return tiles * depth + kLine; }
  int64_t filter_point() const { return width * depth + kLine; }
  int64_t sum_point() const { return tiles * width + kLine; }
  int64_t line() const { return columns * kLanes<T>; }
  int64_t open(const Layer& t) const { return panels * vectors * (t.taps - 1) * line(); }
  int64_t workspace(const Layer& t) const {
    return points * (gradient_point() + filter_point() + panels * sum_point()) + open(t) + 16 * line() + kScratch<T>;
  }
};

/// Pixel rows of some images, and the rows of tiles that reach them; of a band, or of `images` whole images.
struct Band {
  int64_t top, bottom, first, last;

  template <class T>
  Band(const Layer& t, const Tasks<T>& tasks, int64_t n, int64_t padding, int64_t part) {
    if (tasks.bands == 1) {
      top = 0;
      bottom = t.out_size[0];
      first = part * tasks.images * t.tiles[0];
      last = smaller((part + 1) * tasks.images, n) * t.tiles[0];
    } else {
      const int64_t image = part / tasks.bands, tile = t.tile[0];
      top = part % tasks.bands * tasks.band;
      bottom = smaller(top + tasks.band, t.out_size[0]);
      first = image * t.tiles[0] + larger(0, top + padding - (t.taps - 1)) / tile;
      last = image * t.tiles[0] + smaller(t.tiles[0], (bottom - 1 + padding) / tile + 1);
    }
  }
};

/// Adds rows [row, row + count) of tiles, from sums[panel][point][tile][lane], to the outputs.
template <class Form, class S>
void add_tiles(const Layer& t, const Tasks<Sum<S>>& tasks, const Band& band, const int64_t* padding, const Sum<S>* sums,
               const S* bias, int64_t row, int64_t count, int64_t channels, Sum<S>* open, Sum<S>* lines, S* out) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>, overlap = Form::taps - 1, height = Form::height, width = Form::width;
  const int64_t point = tasks.sum_point(), line = tasks.line();
  T* done = lines + Form::rows * line;
  for (int64_t c = 0; c < channels; c += L, open += overlap * line) {
    const int64_t lanes = smaller(L, channels - c);
    const Vec<T> plus = bias ? load_first(bias + c, lanes) : Vec<T>{};
    const T* from = sums + c / tasks.width * Form::points * point + c % tasks.width;
    for (int64_t r = row; r < row + count; ++r, from += t.tiles[1] * tasks.width) {
      const int64_t h = r % t.tiles[0] * height - padding[0];
      for (int64_t i = 0; i < Form::rows; ++i) {
        const T* tile = from + i * Form::columns * point;
        T* to = lines + i * line;
        Vec<T> added[Form::columns]{};  // the first `overlap` were the last of the tile before
        for (int64_t j = 0; j < t.tiles[1]; ++j, tile += tasks.width, to += width * L) {
          Vec<T> m[Form::columns], x[Form::columns];
          for (int q = 0; q < Form::columns; ++q) m[q] = load(tile + q * point);
          InputGradients<Form::columns>::template at<T>(m, x);
          for (int q = 0; q < overlap; ++q) x[q] += added[q];
          for (int q = 0; q < width; ++q) store(to + q * L, x[q]);
          for (int q = 0; q < overlap; ++q) added[q] = x[q + width];
        }
        for (int q = 0; q < overlap; ++q) store(to + q * L, added[q]);
      }
      const bool begins = r % t.tiles[0] == 0 || r == band.first, ends = r % t.tiles[0] == t.tiles[0] - 1;
      const int64_t left = smaller(t.out_size[1], tasks.columns - padding[1]);
      const int64_t from_row = larger(0, band.top - h), to_row = smaller(ends ? Form::rows : height, band.bottom - h);
      S* image = out + r / t.tiles[0] * t.out.n + c * t.out.c;
      for (int64_t w = 0; w < tasks.columns; ++w) {
        Vec<T> m[Form::rows], x[Form::rows];
        for (int q = 0; q < Form::rows; ++q) m[q] = load(lines + q * line + w * L);
        InputGradients<Form::rows>::template at<T>(m, x);
        if (!begins)
          for (int q = 0; q < overlap; ++q) x[q] += load(open + q * line + w * L);
        for (int q = 0; q < overlap; ++q) store(open + q * line + w * L, x[q + height]);
        if (t.layout == Layout::contiguous) {
          for (int q = 0; q < Form::rows && w >= padding[1] && w - padding[1] < left; ++q)
            store(done + (q * left + w - padding[1]) * L, x[q] + plus);
        } else if (w >= padding[1] && w - padding[1] < left) {
          S* to = image + h * t.out.h + (w - padding[1]) * t.out.w;
          for (int q = 0; q < Form::rows; ++q)
            if (q >= from_row && q < to_row) store_first(to + q * t.out.h, x[q] + plus, lanes);
        }
      }
      if (t.layout == Layout::contiguous && from_row < to_row)
        copy_back(t, done + from_row * left * L, h + from_row, 0, to_row - from_row, left, left, lanes, image);
    }
  }
}

template <class Form, class S>
void grad_input(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Layer t(g, Pass::grad_input);
  const Tasks<T> tasks(t, g.n);
  T* z = workspace;
  T* u = z + Form::points * tasks.gradient_point();
  T* sums = u + Form::points * tasks.filter_point();
  T* open = sums + Form::points * tasks.sum_point() * tasks.panels;
  T* lines = open + tasks.open(t);
  T* scratch = lines + 16 * tasks.line();
  const auto multiply = multiply_points_by<T>(tasks.vectors);
  for (int64_t task = begin, kept = -1; task < end; ++task) {
    const int64_t block = task / tasks.pieces, group = block / tasks.blocks;
    const int64_t row0 = tasks.row(block % tasks.blocks), channel = group * t.rows + row0;
    const int64_t rows = smaller(tasks.row(block % tasks.blocks + 1), t.rows) - row0;
    const Band band(t, tasks, g.n, g.padding[0], task % tasks.pieces);
    for (int64_t r = band.first; r < band.last; r += tasks.rows) {
      const int64_t tile_rows = smaller(tasks.rows, band.last - r), tiles = tile_rows * t.tiles[1];
      for (int64_t k0 = 0; k0 < t.channels; k0 += tasks.depth) {
        const int64_t depth = smaller(tasks.depth, t.channels - k0);
        transform_tiles<Points<Form::rows, Form::height, false>, Points<Form::columns, Form::width, false>>(
            t, o.a + (group * t.channels + k0) * t.in.c, r * t.tiles[1], tiles, depth, tasks.gradient_point(),
            tasks.depth, scratch, z);
        const S* weight = o.b + group * t.weight_group + row0 * t.weight_row + k0 * t.weight_channel;
        Factors<T> factors{z, u, sums, tasks.gradient_point(), tasks.filter_point(), tasks.sum_point(), tasks.depth};
        for (int64_t c = 0; c < rows; c += tasks.width, factors.sums += Form::points * tasks.sum_point()) {
          if (kept != block)
            transform_filters<Form>(t, weight + c * t.weight_row, rows - c, depth, tasks.width, tasks.filter_point(),
                                    scratch, u);
          multiply(factors, Form::points, tiles, depth, k0 > 0);
        }
      }
      if (tasks.kept) kept = block;
      add_tiles<Form>(t, tasks, band, g.padding, sums, o.bias ? o.bias + channel : nullptr, r, tile_rows, rows, open,
                      lines, o.out + channel * t.out.c);
    }
  }
}

}  // namespace

template <class S>
Conv2dRun<S> winograd_transposed() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) { return Tasks<T>(Layer(g, Pass::grad_input), g.n).total; },
          [](const Conv2dGeometry& g) {
            const Layer t(g, Pass::grad_input);
            return Tasks<T>(t, g.n).workspace(t);
          },
          [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, T* workspace, int64_t begin, int64_t end) {
            const Layer t(g, Pass::grad_input);
            with_form(t.taps, t.tile, [&](auto form) { grad_input<decltype(form)>(g, o, workspace, begin, end); });
          }};
}

template Conv2dRun<float> winograd_transposed();
template Conv2dRun<BFloat16> winograd_transposed();
template Conv2dRun<Float16> winograd_transposed();

}  // namespace cnnops::cpu::CNNOPS_ISA
