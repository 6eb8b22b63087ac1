// The three transforms of Winograd's convolution, F(4x4, 3x3) and F(2x2, 5x5), and how numbers come to them: as vectors
// of channels.
//
// A row of 4 outputs of a 3-tap correlation, or of 2 of a 5-tap one, is a product of two polynomials. It is computed
// so: evaluate both at 6 points, multiply there, interpolate. Along both axes that takes 6*6 products where the sums
// take 4*4*3*3 or 2*2*5*5.
//
//   y = A' [(G w G') * (B' x B)] A        w 3x3, x 6x6, y 4x4, and * point by point; or w 5x5, x 6x6, y 2x2
//
// The points are 0, a, -a, b, -b and infinity with a = 3/4, b = 3/2: every number of B and A is exact in float, and the
// result errs half as much as with the usual 1 and 2. B does not depend on the kernel's size.
//
// Vectors lie along channels in channels_last tensors: tiles are read and written where they stand. In the contiguous
// layout a run of tiles goes through a scratch array, transposed. That also fills in the border.
#pragma once

#include "channels_last.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kRunTiles = 8;      // copied at a time
constexpr int64_t kLine = 16;         // numbers between two points: or they would share their places in the cache
constexpr int kSums = 3 * kTileRows;  // vectors of sums in a register tile
constexpr int kMostVectors = kTileRows == 8 ? 4 : 3;  // in a row of it
/// Its rows. Where registers are left over, numbers of channels and tiles that are multiples of 8 or 16 fit.
constexpr int tile_rows(int64_t vectors) {
  return static_cast<int>(kTileRows == 8 && vectors < 3 ? 16 / vectors : kSums / vectors);
}
constexpr int kPatch = 6, kPoints = kPatch * kPatch;
constexpr double kA = 0.75, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;

constexpr double power(double x, int n) { return n ? x * power(x, n - 1) : 1; }

/// B' x.
struct InputPoints {
  static constexpr int from = kPatch, to = kPatch;
  template <class T>
  static void at(const Vec<T>* x, Vec<T>* v) {
    const auto ends = [&](const Vec<T>* x) {
      return multiply_add(broadcast(T(kA2 * kB2)), x[0], multiply_add(broadcast(T(-kA2 - kB2)), x[2], x[4]));
    };
    const auto pair = [&](double point, double other, Vec<T>* v) {
      const Vec<T> other2 = broadcast(T(-other * other));
      const Vec<T> even = multiply_add(other2, x[2], x[4]), odd = multiply_add(other2, x[1], x[3]);
      v[0] = multiply_add(broadcast(T(point)), odd, even);
      v[1] = multiply_add(broadcast(T(-point)), odd, even);
    };
    v[0] = ends(x);
    pair(kA, kB, v + 1);
    pair(kB, kA, v + 3);
    v[5] = ends(x + 1);
  }
};

/// G w, of so many numbers: the taps of a filter, or a tile of gradients.
template <int count>
struct Points {
  static constexpr int from = count, to = kPatch;
  template <class T>
  static void at(const Vec<T>* w, Vec<T>* u) {
    const auto pair = [&](double point, double other, Vec<T>* u) {
      const double scale = 1 / (2 * point * point * (point * point - other * other));
      Vec<T> part[] = {broadcast(T(scale)) * w[0], broadcast(T(scale * point)) * w[1]};  // even and odd powers
#pragma GCC unroll 8
      for (int i = 2; i < count; ++i)
        part[i % 2] = multiply_add(broadcast(T(scale * power(point, i))), w[i], part[i % 2]);
      u[0] = part[0] + part[1];
      u[1] = part[0] - part[1];
    };
    u[0] = broadcast(T(1 / (kA2 * kB2))) * w[0];
    pair(kA, kB, u + 1);
    pair(kB, kA, u + 3);
    u[5] = w[count - 1];
  }
};

/// A' m, of so many numbers: a tile of outputs, or the taps of a filter's gradient.
template <int count>
struct Numbers {
  static constexpr int from = kPatch, to = count;
  template <class T>
  static void at(const Vec<T>* m, Vec<T>* y) {
    const Vec<T> a[] = {m[1] + m[2], m[1] - m[2]}, b[] = {m[3] + m[4], m[3] - m[4]};  // for even and odd powers
    y[0] = m[0] + a[0] + b[0];
#pragma GCC unroll 8
    for (int i = 1; i < count; ++i) {
      const Vec<T> more = broadcast(T(power(kB, i)));
      y[i] = multiply_add(broadcast(T(power(kA, i))), a[i % 2],
                          i == count - 1 ? multiply_add(more, b[i % 2], m[5]) : more * b[i % 2]);
    }
  }
};

/// Along both axes: load(i, j) gives a vector, store(i, j, v) takes one.
template <class Step, class T, class Load, class Store>
[[gnu::always_inline]] static inline void transform(const Load& load, const Store& store) {
  Vec<T> half[Step::to][Step::from];
  for (int j = 0; j < Step::from; ++j) {
    Vec<T> column[Step::from], points[Step::to];
    for (int i = 0; i < Step::from; ++i) column[i] = load(i, j);
    Step::template at<T>(column, points);
    for (int i = 0; i < Step::to; ++i) half[i][j] = points[i];
  }
  for (int i = 0; i < Step::to; ++i) {
    Vec<T> points[Step::to];
    Step::template at<T>(half[i], points);
    for (int j = 0; j < Step::to; ++j) store(i, j, points[j]);
  }
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
/// (h + offset, w + offset) to (h + offset + taps - 1, w + offset + taps - 1).
struct Layer {
  Layout layout;
  Border border;
  bool mirrored;
  int64_t channels, rows, groups;  // summed over and produced, of one group
  const int64_t *in_size, *out_size;
  int64_t taps, tile;          // along each axis
  int64_t offset[2], seen[2];  // inputs from `seen` on are seen by nobody
  int64_t tiles[2];            // of an image
  int64_t all_tiles;
  Strides in, out;
  int64_t weight_group, weight_row, weight_channel, weight_tap;

  Layer(const Conv2dGeometry& g, Pass pass) {
    const bool forward = pass == Pass::forward, contiguous = g.layout == Layout::contiguous;
    taps = g.kernel[0];
    tile = kPatch + 1 - taps;
    const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, filter = taps * taps * c_group;
    const int64_t k_step = filter, c_step = contiguous ? taps * taps : 1;
    layout = g.layout;
    border = g.border;
    mirrored = !forward;
    channels = forward ? c_group : k_group;
    rows = forward ? k_group : c_group;
    groups = g.groups;
    in_size = forward ? g.in : g.out;
    out_size = forward ? g.out : g.in;
    for (int dim = 0; dim < 2; ++dim) {
      offset[dim] = forward ? -g.padding[dim] : g.padding[dim] - (taps - 1);
      seen[dim] = out_size[dim] + offset[dim] + taps - 1;
      tiles[dim] = ceil_div(out_size[dim], tile);
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
  /// Whether positions [i, i + length) are pixels.
  bool inside(int64_t i, int64_t length, int dim) const {
    return i >= 0 && i + length <= smaller(seen[dim], in_size[dim]);
  }
};

/// Neighbours in a row of tiles: as many as are copied at a time. `first` is the first one's number within the task.
struct Run {
  int64_t n, h, w, count, first;
};

/// Calls f(run, c) for all runs of some tiles and all vectors of `channels` channels, in the order of memory.
template <class T, class F>
static inline void for_runs(const Layer& t, int64_t begin, int64_t count, int64_t channels, const F& f) {
  const bool contiguous = t.layout == Layout::contiguous;
  const auto runs = [&](int64_t c0, int64_t c1) {
    for (int64_t first = 0; first < count;) {
      const int64_t tile = begin + first, w = tile % t.tiles[1], row = tile / t.tiles[1];
      const int64_t length = contiguous ? smaller(smaller(t.tiles[1] - w, count - first), kRunTiles) : 1;
      const Run run{row / t.tiles[0], row % t.tiles[0] * t.tile, w * t.tile, length, first};
      for (int64_t c = c0; c < c1; c += kLanes<T>) f(run, c, smaller(kLanes<T>, c1 - c));
      first += length;
    }
  };
  if (!contiguous) return runs(0, channels);
  for (int64_t c = 0; c < channels; c += kLanes<T>) runs(c, smaller(c + kLanes<T>, channels));
}

/// to[i][j][lane] = what rows [h, h + rows) x columns [w, w + columns) of the first `lanes` planes show; contiguous.
template <class T>
static inline void copy_patch(const Layer& t, const T* image, int64_t h, int64_t w, int64_t rows, int64_t columns,
                              int64_t lanes, T* to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i, to += columns * L) {
    const int64_t row = t.pixel(h + i, 0);
    if (row < 0) {
      for (int64_t j = 0; j < columns; ++j) store(to + j * L, Vec<T>{});
      continue;
    }
    const T* from = image + row * t.in.row;
    const int64_t width = smaller(t.in_size[1], larger(t.seen[1], 0));
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t count = smaller(L, columns - j);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* plane = from + lane * t.in.channel;
        square[lane] = load_inside(plane, width, w + j, count);
        __builtin_prefetch(plane + t.tile * t.in.row + w + j);  // of the tiles below
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

/// The inverse: rows [h, h + tile) x columns [w, w + columns), as far as the image has them.
template <class T>
static inline void copy_back(const Layer& t, const T* from, int64_t h, int64_t w, int64_t columns, int64_t lanes,
                             T* image) {
  constexpr int64_t L = kLanes<T>;
  const int64_t rows = smaller(t.tile, t.out_size[0] - h), width = smaller(columns, t.out_size[1] - w);
  for (int64_t i = 0; i < rows; ++i, from += columns * L) {
    T* to = image + (h + i) * t.out.row + w;
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
static inline void copy_filters(const Layer& t, const T* from, int64_t lanes, int64_t count, T* to) {
  constexpr int64_t L = kLanes<T>;
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

/// Where a row or a column of a patch begins, and how many channels are to be seen there: none outside of the image.
struct Line {
  int64_t at, lanes;
};

/// to[point][tile][channel]: `point` numbers from point to point, `stride` from tile to tile.
template <class Step, class T>
static inline void transform_tiles(const Layer& t, const T* in, int64_t tile0, int64_t count, int64_t channels,
                                   int64_t point, int64_t stride, T* scratch, T* to) {
  constexpr int64_t L = kLanes<T>, patch = Step::from;
  for_runs<T>(t, tile0, count, channels, [&](const Run& run, int64_t c, int64_t lanes) {
    const int64_t h = run.h + t.offset[0], w = run.w + t.offset[1], columns = (run.count - 1) * t.tile + patch;
    const T* image = in + run.n * t.in.image + c * t.in.channel;
    T* tile = to + run.first * stride + c;
    const auto put = [&](int i, int j, Vec<T> x) { store(tile + (i * kPatch + j) * point, x); };
    if (t.layout == Layout::contiguous) {
      copy_patch(t, image, h, w, patch, columns, lanes, scratch);
      for (const T* from = scratch; from < scratch + run.count * t.tile * L; from += t.tile * L, tile += stride)
        transform<Step, T>([&](int i, int j) { return load(from + (i * columns + j) * L); }, put);
    } else if (lanes == L && t.inside(h, patch, 0) && t.inside(w, patch, 1)) {
      const T* from = image + h * t.in.row + w * t.in.pixel;
      transform<Step, T>(
          [&](int i, int j) {
            __builtin_prefetch(from + i * t.in.row + (j + t.tile) * t.in.pixel);
            return load(from + i * t.in.row + j * t.in.pixel);
          },
          put);
    } else {
      Line line[2][patch];
      for (int i = 0; i < patch; ++i) {
        const int64_t row = t.pixel(h + i, 0), column = t.pixel(w + i, 1);
        line[0][i] = row < 0 ? Line{0, 0} : Line{row * t.in.row, lanes};
        line[1][i] = column < 0 ? Line{0, 0} : Line{column * t.in.pixel, lanes};
      }
      transform<Step, T>(
          [&](int i, int j) {
            const Line &row = line[0][i], &column = line[1][j];
            __builtin_prefetch(image + row.at + (w + j + t.tile) * t.in.pixel);
            return load_first(image + row.at + column.at, row.lanes & column.lanes);
          },
          put);
    }
  });
}

// ---- products ----

/// sums[m][V vectors] (+)= sum over c of a[m*row_step + c*step] * b[c][V vectors].
template <class T, int V>
static inline void multiply_tile(int64_t depth, const T* a, int64_t row_step, int64_t step, const T* b, T* sums,
                                 bool add) {
  constexpr int M = tile_rows(V), L = kLanes<T>;
  Vec<T> sum[M][V]{};
  for (int64_t c = 0; c < depth; ++c, a += step, b += V * L) {
    Vec<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
    for (int m = 0; m < M; ++m) {
      const Vec<T> x = broadcast(a[m * row_step]);
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

/// Scratch numbers: enough for a run of a contiguous layer's tiles, or for a square of its filters.
template <class T>
constexpr int64_t kScratch = kLanes<T> * (kPatch * (kRunTiles * 4 + 2) + 25 * kLanes<T>);

/// The gradient of the weight.
template <class T>
Conv2dRun<T> winograd_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
