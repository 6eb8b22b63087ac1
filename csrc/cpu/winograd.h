// How numbers come to the transforms of Winograd's convolution (winograd_points.h): vectors of channels, and tiles.
// winograd_products.h has what is done with them.
//
// Vectors lie along channels in channels_last tensors: tiles are read and written where they stand. Contiguous tensors
// go through a scratch array, transposed. Of small images it holds whole rows, as many as there is room for: they are
// one run of numbers in each plane, and tiles are read from there as they are in channels_last. Of others it holds what
// a run of tiles sees, the border filled in; with a dilation, the pixels of all phases of a row (winograd_forms.h):
// each run of tiles picks those of its own.
#pragma once

#include "channels_last.h"
#include "turn.h"
#include "winograd_forms.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kRunTiles = 8;  // neighbours, transformed together, at most
constexpr int64_t kMostPatch = 8, kRunColumns = (kRunTiles - 1) * 4 + kMostPatch;  // their pixels
constexpr int64_t kBandPixels = 448;                                               // of small images, turned together
constexpr int64_t kLine = 16;  // numbers between two points: or they would share their places in the cache

// ---- from tensors to vectors of channels, and back ----

/// The forward convolution or the gradient of its input, which is one with mirrored taps: output (h, w) sees inputs
/// (h + offset, w + offset) to (h + offset + taps - 1, w + offset + taps - 1). In the transposed form a tile of inputs
/// goes to a patch of outputs, that which the forward convolution's tile sees.
struct Layer {
  Layout layout;
  Border border;
  bool mirrored, transposed;
  int64_t channels, rows, groups;  // summed over and produced, of one group
  const int64_t *in_size, *out_size;
  int64_t taps, tile[2];        // along each axis
  int64_t apart[2];             // the pixels of a tile and of its patch
  int64_t offset[2], seen[2];   // inputs from `seen` on are seen by nobody
  int64_t phases[2], tiles[2];  // of an image; of a phase
  int64_t all_tiles, points;
  Strides<> in, out;
  int64_t weight_group, weight_row, weight_channel, weight_tap;

  Layer(const Conv2dGeometry& g, Pass pass) {
    const bool forward = pass != Pass::grad_input, contiguous = g.filters == Layout::contiguous;
    const Tiling form = fewest_products(g, pass);
    taps = g.kernel[0];
    points = form.points;
    transposed = form.transposed;
    const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, filter = taps * taps * c_group;
    const int64_t k_step = filter, c_step = contiguous ? taps * taps : 1;
    layout = g.layout;
    border = g.border;
    mirrored = !forward && !transposed;
    channels = forward ? c_group : k_group;
    rows = forward ? k_group : c_group;
    groups = g.groups;
    in_size = forward ? g.in : g.out;
    out_size = forward ? g.out : g.in;
    for (int dim = 0; dim < 2; ++dim) {
      const int64_t reach = (taps - 1) * g.dilation[dim];
      apart[dim] = g.dilation[dim];
      offset[dim] = transposed ? 0 : forward ? -g.padding[dim] : g.padding[dim] - reach;
      seen[dim] = transposed ? in_size[dim] : out_size[dim] + offset[dim] + reach;
      tile[dim] = form.size[dim];
      phases[dim] = form.phases[dim];
      tiles[dim] = form.count[dim];
    }
    all_tiles = g.n * rows_of_tiles() * phases[1] * tiles[1];
    in = {layout, channels * groups, in_size};
    out = {layout, rows * groups, out_size};
    weight_group = k_group * filter;
    weight_row = forward ? k_step : c_step;
    weight_channel = forward ? c_step : k_step;
    weight_tap = contiguous ? 1 : c_group;
  }

  /// How many outputs of its phase there are from output i on.
  int64_t left(int64_t i, int dim) const { return i < out_size[dim] ? ceil_div(out_size[dim] - i, apart[dim]) : 0; }
  /// Tiles that are transformed together.
  int64_t most_tiles() const {
    const int64_t columns = layout == Layout::contiguous ? kRunColumns / apart[1] : kRunColumns;
    return smaller(kRunTiles, (columns - (taps - 1)) / tile[1]);
  }
  int64_t rows_of_tiles() const { return phases[0] * tiles[0]; }  // of an image
  /// The pixel that position i of an axis shows; -1 for none, or where it does not matter.
  int64_t pixel(int64_t i, int dim) const { return i < seen[dim] ? pixel_at(i, in_size[dim], border) : -1; }
};

/// Neighbours in a row of tiles: as many as are transformed at a time. (h, w) is the first one's first output, `first`
/// its number within the task.
struct TileRun {
  int64_t n, h, w, phase, count, first;  // the columns' phase
};

/// Calls f(run, c) for all runs of some tiles and all vectors of `channels` channels, in the order of memory.
template <class T, class F>
static inline void for_runs(const Layer& t, int64_t begin, int64_t count, int64_t channels, const F& f) {
  const bool contiguous = t.layout == Layout::contiguous;
  const auto runs = [&](int64_t c0, int64_t c1) {
    for (int64_t first = 0; first < count;) {
      const int64_t tile = begin + first, w = tile % t.tiles[1], phase = tile / t.tiles[1];
      const int64_t row = phase / t.phases[1], h = row % t.rows_of_tiles();
      const int64_t length = smaller(smaller(t.tiles[1] - w, count - first), t.most_tiles());
      const TileRun run{row / t.rows_of_tiles(),
                        h / t.phases[0] * t.tile[0] * t.apart[0] + h % t.phases[0],
                        w * t.tile[1] * t.apart[1] + phase % t.phases[1],
                        phase % t.phases[1],
                        length,
                        first};
      for (int64_t c = c0; c < c1; c += kLanes<T>) f(run, c, smaller(kLanes<T>, c1 - c));
      first += length;
    }
  };
  if (!contiguous) return runs(0, channels);
  for (int64_t c = 0; c < channels; c += kLanes<T>) runs(c, smaller(c + kLanes<T>, channels));
}

/// to[i][j][lane] = what `rows` rows of a phase, from h on, x columns [w, w + columns) of the first `lanes` planes
/// show; contiguous.
template <class S>
static inline void copy_patch(const Layer& t, const S* image, int64_t h, int64_t w, int64_t rows, int64_t columns,
                              int64_t lanes, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i, to += columns * L) {
    const int64_t row = t.pixel(h + i * t.apart[0], 0);
    if (row < 0) {
      for (int64_t j = 0; j < columns; ++j) store(to + j * L, Vec<T>{});
      continue;
    }
    const S* from = image + row * t.in.h;
    const int64_t width = smaller(t.in_size[1], larger(t.seen[1], 0));
    for (int64_t next = 0; next < columns; next += L) {
      const int64_t j = columns >= L ? smaller(next, columns - L) : next, count = smaller(L, columns - j);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const S* plane = from + lane * t.in.c;
        square[lane] = load_inside(plane, width, w + j, count);
        __builtin_prefetch(plane + t.tile[0] * t.apart[0] * t.in.h + w + j);  // of the tiles below
      }
      transpose<T>(square);
      for (int64_t lane = 0; lane < count; ++lane) store(to + (j + lane) * L, square[lane]);
    }
    if (t.border == Border::zeros) continue;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t column = t.pixel(w + j, 1);
      if (column < 0 || column == w + j) continue;
      for (int64_t lane = 0; lane < lanes; ++lane) to[j * L + lane] = value(from[lane * t.in.c + column]);
    }
  }
}

/// The inverse: `rows` rows and `width` columns of a phase, from (h, w) on, from rows of `columns`. Of whole rows
/// without gaps several are one.
template <class S>
static inline void copy_back(const Layer& t, const Sum<S>* from, int64_t h, int64_t w, int64_t rows, int64_t width,
                             int64_t columns, int64_t lanes, S* image) {
  constexpr int64_t L = kLanes<Sum<S>>;
  if (t.apart[0] * t.apart[1] == 1 && width == columns && width == t.out_size[1]) {
    columns = width *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i, from += columns * L) {
    S* to = image + (h + i * t.apart[0]) * t.out.h + w;
    if (t.apart[1] == 1) {
      turn_back(from, L, width, lanes, to, t.out.c);
      continue;
    }
    for (int64_t j = 0; j < width; j += L) {
      const int64_t count = smaller(L, width - j);
      Vec<Sum<S>> square[L]{};
      for (int64_t lane = 0; lane < count; ++lane) square[lane] = load(from + (j + lane) * L);
      transpose<Sum<S>>(square);
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t k = 0; k < count; ++k) to[lane * t.out.c + (j + k) * t.apart[1]] = rounded<S>(square[lane][k]);
    }
  }
}

/// Where a row of a patch begins, and how many channels are to be seen there: none outside of the image.
struct Line {
  int64_t at, lanes;
};

/// Rows [first, last) of a vector of planes, turned round: those that a run of tiles sees, and as many below as there
/// is room for and the tiles before `end` see.
template <class S>
struct Band {
  const S* image = nullptr;
  int64_t first = 0, last = 0;

  static int64_t rows_seen(const Layer& t, int64_t height) { return (height - 1) * t.apart[0] + 1; }
  static bool serves(const Layer& t, int64_t height) {
    return t.layout == Layout::contiguous && t.border == Border::zeros &&
           rows_seen(t, height) * t.in_size[1] <= kBandPixels;
  }
  void turn_rows(const Layer& t, const S* planes, int64_t n, int64_t h, int64_t height, int64_t end, int64_t lanes,
                 Sum<S>* to) {
    const int64_t reach = rows_seen(t, height), size = smaller(t.in_size[0], larger(t.seen[0], 0));
    const int64_t top = larger(h, 0), bottom = smaller(h + reach, size);
    if (top >= bottom || (planes == image && top >= first && bottom <= last)) return;
    const int64_t per_row = t.phases[1] * t.tiles[1], per_image = t.rows_of_tiles() * per_row;
    const int64_t last_row = (smaller(end, (n + 1) * per_image) - 1) % per_image / per_row / t.phases[0];
    const int64_t below = last_row * t.tile[0] * t.apart[0] + t.phases[0] - 1 + t.offset[0] + reach;
    image = planes;
    first = top;
    last = smaller(top + kBandPixels / t.in_size[1], larger(bottom, smaller(below, size)));
    turn(planes + top * t.in.h, t.in.c, (last - first) * t.in.h, lanes, kLanes<Sum<S>>, to);
  }
};

/// to[point][tile][channel]: `point` numbers from point to point, `stride` from tile to tile. Columns come first: where
/// patches overlap, a column is transformed for both.
template <class Rows, class Columns, class S>
static inline void transform_tiles(const Layer& t, const S* in, int64_t tile0, int64_t count, int64_t channels,
                                   int64_t point, int64_t stride, Sum<S>* scratch, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>, height = Rows::from, width = Columns::from;
  struct Pixels {
    const S* image;
    int64_t h, w, count;
    bool operator==(const Pixels&) const = default;
  } copied{};
  Band<S> band;
  const bool in_band = band.serves(t, height);
  for_runs<T>(t, tile0, count, channels, [&](const TileRun& run, int64_t c, int64_t lanes) {
    const int64_t h = run.h + t.offset[0], w = run.w + t.offset[1], columns = (run.count - 1) * t.tile[1] + width;
    const S* image = in + run.n * t.in.n + c * t.in.c;
    T* lines = scratch + kBandPixels * L;
    const auto transform_column = [&](int64_t j, const auto& load) {
      Vec<T> column[height], points[Rows::to];
      for (int i = 0; i < height; ++i) column[i] = load(i);
      Rows::template at<T>(column, points);
      for (int i = 0; i < Rows::to; ++i) store(lines + (i * kRunColumns + j) * L, points[i]);
    };
    const auto transform_pixels = [&](const auto* pixels, int64_t row_step, int64_t pixel_step, int64_t lanes) {
      using Number = std::remove_cvref_t<decltype(*pixels)>;
      static const Number zeros[L]{};
      Line rows[height];
      bool inside = lanes == L;
      for (int i = 0; i < height; ++i) {
        const int64_t row = t.pixel(h + i * t.apart[0], 0);
        rows[i] = row < 0 ? Line{0, 0} : Line{row * row_step, lanes};
        inside &= row >= 0;
      }
      const int64_t right = smaller(t.seen[1], t.in_size[1]), ahead = t.tile[1] * t.apart[1] * pixel_step;
      for (int64_t j = 0, at = w; j < columns; ++j, at += t.apart[1]) {
        if (inside && at >= 0 && at < right) {
          const Number* pixel = pixels + at * pixel_step;
          transform_column(j, [&](int i) {
            __builtin_prefetch(pixel + rows[i].at + ahead);
            return load(pixel + rows[i].at);
          });
          continue;
        }
        const int64_t column = t.pixel(at, 1);
        const Number* pixel = pixels + larger(column, 0) * pixel_step;
        if (lanes == L) {
          transform_column(j,
                           [&](int i) { return load(column < 0 || rows[i].lanes == 0 ? zeros : pixel + rows[i].at); });
        } else {
          transform_column(j, [&](int i) { return load_first(pixel + rows[i].at, column < 0 ? 0 : rows[i].lanes); });
        }
      }
    };
    if (t.layout == Layout::channels_last) {
      transform_pixels(image, t.in.h, t.in.w, lanes);
    } else if (in_band) {
      band.turn_rows(t, image, run.n, h, height, tile0 + count, lanes, scratch);
      transform_pixels(scratch - band.first * t.in.h * L, t.in.h * L, L, L);
    } else {
      const Pixels pixels{image, h, w - run.phase, columns * t.apart[1]};  // of all phases
      if (pixels != copied) copy_patch(t, image, h, pixels.w, height, pixels.count, lanes, scratch);
      copied = pixels;
      for (int64_t j = 0; j < columns; ++j)
        transform_column(j, [&](int i) { return load(scratch + (i * pixels.count + j * t.apart[1] + run.phase) * L); });
    }
    for (int64_t tile = 0; tile < run.count; ++tile) {
      T* points = to + (run.first + tile) * stride + c;
      const int64_t apart = counted(point);
      for (int i = 0; i < Rows::to; ++i) {
        Vec<T> x[width], v[Columns::to];
        for (int j = 0; j < width; ++j) x[j] = load(lines + (i * kRunColumns + tile * t.tile[1] + j) * L);
        Columns::template at<T>(x, v);
        for (int j = 0; j < Columns::to; ++j) store(points + (i * Columns::to + j) * apart, v[j]);
      }
    }
  });
}

/// Scratch numbers: enough for a run of tiles and its transformed columns, or for a square of filters.
template <class T>
constexpr int64_t kScratch = kLanes<T> * (kBandPixels + kMostPatch * kRunColumns + 25 * kLanes<T>);

/// The gradient of the input in its transposed form, and the gradient of the weight.
template <class S>
Conv2dRun<S> winograd_transposed();
template <class S>
Conv2dRun<S> winograd_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
