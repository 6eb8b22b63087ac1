// How numbers come to the transforms of Winograd's convolution (winograd_points.h), and what its passes share: vectors of
// channels, tiles, filters, products.
//
// Vectors lie along channels in channels_last tensors: tiles are read and written where they stand. In the contiguous
// layout a run of tiles goes through a scratch array, transposed. That also fills in the border. With a dilation it holds
// the pixels of all phases of a row (winograd_forms.h): each run of tiles picks those of its own.
#pragma once

#include "channels_last.h"
#include "winograd_forms.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kRunTiles = 8;  // neighbours, transformed together, at most
constexpr int64_t kMostPatch = 8, kRunColumns = (kRunTiles - 1) * 4 + kMostPatch;  // their pixels
constexpr int64_t kLine = 16;         // numbers between two points: or they would share their places in the cache
constexpr int kSums = 3 * kTileRows;  // vectors of sums in a register tile
constexpr int kMostVectors = kTileRows == 8 ? 4 : 3;  // in a row of it
/// Of a single vector even and odd terms are summed apart: so many rows that each had its sum would be more than there
/// are registers for their addresses.
constexpr int ways(int64_t vectors) { return vectors < 3 ? 2 : 1; }
/// The register tile's rows. Where registers are left over, numbers of channels and tiles that are multiples of 8 fit.
constexpr int tile_rows(int64_t vectors) {
  return static_cast<int>((kTileRows == 8 && vectors < 3 ? 16 / vectors : kSums / vectors) / ways(vectors));
}

// ---- from tensors to vectors of channels, and back ----

/// Where a tensor's numbers lie.
struct Strides {
  int64_t image, channel, row, pixel;
};

static inline Strides strides(Layout layout, int64_t channels, const int64_t* size) {
  const int64_t plane = size[0] * size[1];
  return layout == Layout::contiguous ? Strides{channels * plane, plane, size[1], 1}
                                      : Strides{channels * plane, 1, size[1] * channels, channels};
}

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
  Strides in, out;
  int64_t weight_group, weight_row, weight_channel, weight_tap;

  Layer(const Conv2dGeometry& g, Pass pass) {
    const bool forward = pass != Pass::grad_input, contiguous = g.layout == Layout::contiguous;
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
    in = strides(layout, channels * groups, in_size);
    out = strides(layout, rows * groups, out_size);
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

/// Neighbours in a row of tiles: as many as are transformed at a time. (h, w) is the first one's first output, `first` its
/// number within the task.
struct Run {
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
      const Run run{row / t.rows_of_tiles(),
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

/// to[i][j][lane] = what `rows` rows of a phase, from h on, x columns [w, w + columns) of the first `lanes` planes show;
/// contiguous.
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
    const S* from = image + row * t.in.row;
    const int64_t width = smaller(t.in_size[1], larger(t.seen[1], 0));
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t count = smaller(L, columns - j);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const S* plane = from + lane * t.in.channel;
        square[lane] = load_inside(plane, width, w + j, count);
        __builtin_prefetch(plane + t.tile[0] * t.apart[0] * t.in.row + w + j);  // of the tiles below
      }
      transpose<T>(square);
      for (int64_t lane = 0; lane < count; ++lane) store(to + (j + lane) * L, square[lane]);
    }
    if (t.border == Border::zeros) continue;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t column = t.pixel(w + j, 1);
      if (column < 0 || column == w + j) continue;
      for (int64_t lane = 0; lane < lanes; ++lane) to[j * L + lane] = value(from[lane * t.in.channel + column]);
    }
  }
}

/// p[j*step] = v[j] for j < count; nothing else is touched.
template <class S>
static inline void store_strided(S* p, int64_t step, Vec<Sum<S>> v, int64_t count) {
  if (step == 1) return store_first(p, v, count);
  for (int64_t j = 0; j < count; ++j) p[j * step] = rounded<S>(v[j]);
}

/// The inverse: `rows` rows and `width` columns of a phase, from (h, w) on, from rows of `columns`.
template <class S>
static inline void copy_back(const Layer& t, const Sum<S>* from, int64_t h, int64_t w, int64_t rows, int64_t width,
                             int64_t columns, int64_t lanes, S* image) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t i = 0; i < rows; ++i, from += columns * L) {
    S* to = image + (h + i * t.apart[0]) * t.out.row + w;
    for (int64_t j = 0; j < width; j += L) {
      const int64_t count = smaller(L, width - j);
      Vec<Sum<S>> square[L]{};
      for (int64_t lane = 0; lane < count; ++lane) square[lane] = load(from + (j + lane) * L);
      transpose<Sum<S>>(square);
      for (int64_t lane = 0; lane < lanes; ++lane)
        store_strided(to + lane * t.out.channel + j * t.apart[1], t.apart[1], square[lane], count);
    }
  }
}

/// to[channel][tap][lane] = the weights of `lanes` produced and `count` summed channels, at most a vector of each.
template <class S>
static inline void copy_filters(const Layer& t, const S* from, int64_t lanes, int64_t count, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t taps = t.taps * t.taps;
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
      Vec<Sum<S>> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const S* filter = from + s * square_step + lane * t.weight_row + r;
        square[lane] = load_first(filter, columns);
        __builtin_prefetch(filter + L * t.weight_row);  // of the next vector of produced channels
      }
      transpose<Sum<S>>(square);
      for (int64_t i = 0; i < columns; ++i) store(to + (s * to_square + (r + i) * to_lane) * L, square[i]);
    }
}

/// Where a row or a column of a patch begins, and how many channels are to be seen there: none outside of the image.
struct Line {
  int64_t at, lanes;
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
  for_runs<T>(t, tile0, count, channels, [&](const Run& run, int64_t c, int64_t lanes) {
    const int64_t h = run.h + t.offset[0], w = run.w + t.offset[1], columns = (run.count - 1) * t.tile[1] + width;
    const S* image = in + run.n * t.in.image + c * t.in.channel;
    T* lines = scratch + kMostPatch * kRunColumns * L;
    const auto transform_column = [&](int64_t j, const auto& load) {
      Vec<T> column[height], points[Rows::to];
      for (int i = 0; i < height; ++i) column[i] = load(i);
      Rows::template at<T>(column, points);
      for (int i = 0; i < Rows::to; ++i) store(lines + (i * kRunColumns + j) * L, points[i]);
    };
    if (t.layout == Layout::contiguous) {
      const Pixels pixels{image, h, w - run.phase, columns * t.apart[1]};  // of all phases
      if (pixels != copied) copy_patch(t, image, h, pixels.w, height, pixels.count, lanes, scratch);
      copied = pixels;
      for (int64_t j = 0; j < columns; ++j)
        transform_column(j, [&](int i) { return load(scratch + (i * pixels.count + j * t.apart[1] + run.phase) * L); });
    } else {
      Line rows[height];
      bool inside = lanes == L;
      for (int i = 0; i < height; ++i) {
        const int64_t row = t.pixel(h + i * t.apart[0], 0);
        rows[i] = row < 0 ? Line{0, 0} : Line{row * t.in.row, lanes};
        inside &= row >= 0;
      }
      const int64_t right = smaller(t.seen[1], t.in_size[1]), ahead = t.tile[1] * t.apart[1] * t.in.pixel;
      for (int64_t j = 0, at = w; j < columns; ++j, at += t.apart[1]) {
        if (inside && at >= 0 && at < right) {
          const S* pixel = image + at * t.in.pixel;
          transform_column(j, [&](int i) {
            __builtin_prefetch(pixel + rows[i].at + ahead);
            return load(pixel + rows[i].at);
          });
        } else {
          const int64_t column = t.pixel(at, 1);
          const S* pixel = image + larger(column, 0) * t.in.pixel;
          transform_column(j, [&](int i) { return load_first(pixel + rows[i].at, column < 0 ? 0 : rows[i].lanes); });
        }
      }
    }
    for (int64_t tile = 0; tile < run.count; ++tile) {
      T* points = to + (run.first + tile) * stride + c;
      for (int i = 0; i < Rows::to; ++i) {
        Vec<T> x[width], v[Columns::to];
        for (int j = 0; j < width; ++j) x[j] = load(lines + (i * kRunColumns + tile * t.tile[1] + j) * L);
        Columns::template at<T>(x, v);
        for (int j = 0; j < Columns::to; ++j) store(points + (i * Columns::to + j) * point, v[j]);
      }
    }
  });
}

// ---- filters and products ----

/// Produced channels in panels of `vectors` vectors, all about as wide.
template <class T>
struct ChannelPanels {
  int64_t vectors, width, count;

  explicit ChannelPanels(int64_t channels, int64_t most_vectors = kMostVectors) {
    const int64_t all = ceil_div(channels, kLanes<T>);
    vectors = ceil_div(all, ceil_div(all, most_vectors));
    width = vectors * kLanes<T>;
    count = ceil_div(channels, width);
  }
};

/// to[point][c][lane], for a panel of `rows` produced channels: `point` numbers from point to point.
template <class Form, class S>
static inline void transform_filters(const Layer& t, const S* weight, int64_t rows, int64_t channels, int64_t width,
                                     int64_t point, Sum<S>* scratch, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>, taps = Form::taps, all = taps * taps;
  const int64_t step = t.mirrored ? -L : L;
  for (int64_t row = 0; row < width; row += L)
    for (int64_t c0 = 0; c0 < channels; c0 += L) {
      const int64_t count = smaller(L, channels - c0), lanes = larger(smaller(L, rows - row), 0);
      copy_filters(t, weight + row * t.weight_row + c0 * t.weight_channel, lanes, count, scratch);
      for (int64_t c = 0; c < count; ++c) {
        const T* filter = scratch + (c * all + (t.mirrored ? all - 1 : 0)) * L;
        T* points = to + (c0 + c) * width + row;
        transform<Points<Form::rows, taps>, Points<Form::columns, taps>, T>(
            [&](int i, int j) { return load(filter + (i * taps + j) * step); },
            [&](int i, int j, Vec<T> x) { store(points + (i * Form::columns + j) * point, x); });
      }
    }
}

/// sums[m][V vectors] (+)= sum over c of a[m*row_step + c*step] * b[c][V vectors].
template <class T, int V>
static inline void multiply_tile(int64_t depth, const T* a, int64_t row_step, int64_t step, const T* b, T* sums,
                                 bool add) {
  constexpr int M = tile_rows(V), W = ways(V), L = kLanes<T>;
  Vec<T> sum[W][M][V]{};
  const auto add_terms = [&](int terms) {
    for (int way = 0; way < terms; ++way, a += step, b += V * L) {
      Vec<T> column[V];
      for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
      for (int m = 0; m < M; ++m) {
        const Vec<T> x = broadcast(a[m * row_step]);
        for (int v = 0; v < V; ++v) sum[way][m][v] = multiply_add(x, column[v], sum[way][m][v]);
      }
    }
  };
  int64_t c = 0;
  for (; c + W <= depth; c += W) add_terms(W);
  if (c < depth) add_terms(1);
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = sums + (m * V + v) * L;
      if (W > 1) sum[0][m][v] += sum[W - 1][m][v];
      store(to, add ? load(to) + sum[0][m][v] : sum[0][m][v]);
    }
}

/// sums[point][tile][lane] (+)= sum over c of v[point][tile][c] * u[point][c][lane]: `*_point` numbers from point to
/// point, `stride` from tile to tile of v.
template <class T>
struct Factors {
  const T *v, *u;
  T* sums;
  int64_t v_point, u_point, sum_point, stride;
};

template <class T, int V>
static inline void multiply_points(const Factors<T>& f, int64_t points, int64_t tiles, int64_t depth, bool add) {
  for (int64_t point = 0; point < points; ++point) {
    const T *a = f.v + point * f.v_point, *b = f.u + point * f.u_point;
    T* to = f.sums + point * f.sum_point;
    for (int64_t p = 0; p < tiles; p += tile_rows(V))
      multiply_tile<T, V>(depth, a + p * f.stride, f.stride, 1, b, to + p * V * kLanes<T>, add);
  }
}

template <class T>
static inline auto multiply_points_by(int64_t vectors) {
  return vectors == 1   ? multiply_points<T, 1>
         : vectors == 2 ? multiply_points<T, 2>
         : vectors == 3 ? multiply_points<T, 3>
                        : multiply_points<T, kMostVectors>;
}

/// Scratch numbers: enough for a run of tiles and its transformed columns, or for a square of filters.
template <class T>
constexpr int64_t kScratch = kLanes<T> * (2 * kMostPatch * kRunColumns + 25 * kLanes<T>);

/// The gradient of the input in its transposed form, and the gradient of the weight.
template <class S>
Conv2dRun<S> winograd_transposed();
template <class S>
Conv2dRun<S> winograd_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
