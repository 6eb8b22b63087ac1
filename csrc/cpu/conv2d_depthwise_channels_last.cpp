// Depthwise convolution, one filter per channel, of channels_last tensors.
//
//   y[p, c]     = bias[c] + sum over taps of x[pixel of (p, tap), c] * w[c, tap]
//   gw[c, tap]  =           sum over p    of x[pixel of (p, tap), c] * gy[p, c]
//
// Every number of x serves as many outputs as the filter has taps and no more, so what counts is how often it is
// loaded. A tile is 2x4 outputs: a table says where the pixels under it stand, and a loop runs over the channels, a
// vector at a time. Of a 3x3 filter's tile each pixel is loaded once for up to 6 multiply-adds, and the numbers of a
// pixel follow each other in memory. What the border says is just another address (zeros stand in the workspace); for
// the next tile inside the image the same table serves, shifted. Filters of 3x3, 5x5 and 7x7 are unrolled; others, and
// the classes of a strided grad_input (../correlation.h), load a pixel once for every tap.
//
// A task is two rows of outputs (of each class) of a block of channels. In grad_weight it is a row of a filter's taps
// for a vector of channels; neighbouring tasks are computed together. Sums are made over the 8 pixels of a tile, over
// the tiles of some rows, and over all rows and images, in this order, lane by lane.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses the contiguous layout, filters per group other than one, and filters of more than 512 weights.
#include "channels_last.h"
#include "conv2d_depthwise.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kTileH = 2, kTileW = 4, kTile = kTileH * kTileW;
constexpr int64_t kBlockVectors = 12;  // channels of a block
constexpr int64_t kMostTaps = 512;
constexpr int64_t kSumPixels = 128;  // grad_weight: about as many are summed before they are added to the total

template <class T>
constexpr int64_t kBlock = kBlockVectors * kLanes<T>;

/// Blocks of about the same size.
template <class T>
struct Blocks {
  int64_t channels, size, count;
  explicit Blocks(int64_t channels) : channels(channels) {
    const int64_t vectors = ceil_div(channels, kLanes<T>);
    size = ceil_div(vectors, ceil_div(vectors, kBlockVectors)) * kLanes<T>;
    count = ceil_div(channels, size);
  }
};

// ---- which pixels a tile sees ----

/// Along one axis, the inputs under a tile of outputs, counted from what the first output sees first. Dense: all inputs
/// from the first to the last, in order; otherwise those of the first output, of the second, ...
struct Footprint {
  int64_t count, at[kTileW * kMostTaps];
  Footprint(const Axis& a, int64_t outputs, bool dense) {
    count = dense ? (outputs - 1) * a.in_step + a.taps : outputs * a.taps;
    for (int64_t i = 0; i < count; ++i) at[i] = dense ? i : i / a.taps * a.in_step + i % a.taps * a.offset_step;
  }
};

/// The tiles of a class of outputs, and where the pixels under the current one stand.
template <class S>
struct Tiles {
  Windows t;
  bool dense;
  Footprint h, w;
  const S* in;                       // images, from the first channel of the block on
  const S* zeros;                    // for pixels that are not there
  int64_t table_j;                   // the tile for which the table was made, if it may be shifted
  const S* seen[kTile * kMostTaps];  // [h.count][w.count]
  int64_t places[kTile];             // of the outputs among all pixels, -1 for none
  int64_t in_shift, place_shift;     // from the table to the current tile
  bool whole;                        // all outputs of the tile exist

  Tiles(const Windows& t, bool dense) : t(t), dense(dense), h(t.h, kTileH, dense), w(t.w, kTileW, dense) {}

  static int64_t inside(int64_t i, int64_t size, Border border) {
    const int64_t at = pixel_at(i, size, border);
    return at < size ? at : -1;
  }

  /// Outputs beyond the last see zeros, where the table is not dense.
  void make_table(int64_t n, int64_t i0, int64_t j0) {
    const int64_t pixels = t.h.in_size * t.w.in_size;
    const int64_t h0 = i0 * t.h.in_step + t.h.offset0, w0 = j0 * t.w.in_step + t.w.offset0;
    int64_t columns[kTileW * kMostTaps];
    for (int64_t b = 0; b < w.count; ++b)
      columns[b] = !dense && j0 + b / t.w.taps >= t.w.count ? -1 : inside(w0 + w.at[b], t.w.in_size, t.border);
    const S** to = seen;
    for (int64_t a = 0; a < h.count; ++a) {
      const int64_t row = !dense && i0 + a / t.h.taps >= t.h.count ? -1 : inside(h0 + h.at[a], t.h.in_size, t.border);
      const S* from = in + (n * pixels + row * t.w.in_size) * t.in_channels;
      for (int64_t b = 0; b < w.count; ++b)
        *to++ = row < 0 || columns[b] < 0 ? zeros : from + columns[b] * t.in_channels;
    }
    for (int64_t r = 0; r < kTileH; ++r)
      for (int64_t q = 0; q < kTileW; ++q)
        places[r * kTileW + q] =
            i0 + r < t.h.count && j0 + q < t.w.count
                ? (n * t.out_height + t.h.first + (i0 + r) * t.h.step) * t.out_width + t.w.first + (j0 + q) * t.w.step
                : -1;
  }

  /// f() for every tile of rows i0 and i0 + 1.
  template <class F>
  void each(int64_t n, int64_t i0, const F& f) {
    const int64_t h0 = i0 * t.h.in_step + t.h.offset0, last_h = (kTileH - 1) * t.h.in_step,
                  last_w = (kTileW - 1) * t.w.in_step;
    const bool rows_inside =
        i0 + kTileH <= t.h.count && h0 >= 0 && h0 + last_h + (t.h.taps - 1) * t.h.offset_step < t.h.in_size;
    table_j = -1;
    for (int64_t j0 = 0; j0 < t.w.count; j0 += kTileW) {
      const int64_t w0 = j0 * t.w.in_step + t.w.offset0;
      const bool all_inside = rows_inside && j0 + kTileW <= t.w.count && w0 >= 0 &&
                              w0 + last_w + (t.w.taps - 1) * t.w.offset_step < t.w.in_size;
      whole = i0 + kTileH <= t.h.count && j0 + kTileW <= t.w.count;
      if (!all_inside || table_j < 0) {
        make_table(n, i0, j0);
        table_j = all_inside ? j0 : -1;
        in_shift = place_shift = 0;
      } else {
        in_shift = (j0 - table_j) * t.w.in_step * t.in_channels;
        place_shift = (j0 - table_j) * t.w.step;
      }
      f();
    }
  }
};

// ---- forward and grad_input ----

/// What a tile's outputs are made of besides pixels; channels are counted from the first of the block.
template <class S>
struct Filters {
  const Sum<S>* weights;  // [tap][block]
  int64_t block, channels;
  const S* bias;  // or nullptr
  S* out[kTile];
};

template <class S, bool whole>
Vec<Sum<S>> load_some(const S* p, int64_t lanes) {
  return whole ? load(p) : load_first(p, lanes);
}

template <class S>
void put(const Filters<S>& f, const Vec<Sum<S>>* sum, int64_t c, int64_t lanes) {
  const Vec<Sum<S>> bias = f.bias ? load_first(f.bias + c, lanes) : Vec<Sum<S>>{};
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) store_first(f.out[o] + c, sum[o] + bias, lanes);
}

/// A filter of K x K taps, the table being dense; all vectors of channels that are whole.
template <class S, int K, int stride>
int64_t dense_tile(const Tiles<S>& tiles, const Filters<S>& f) {
  using T = Sum<S>;
  constexpr int rows = (kTileH - 1) * stride + K, columns = (kTileW - 1) * stride + K;
  const S* const* seen = tiles.seen;
  const int64_t shift = tiles.in_shift, block = f.block;
  int64_t c = 0;
  for (; c + kLanes<T> <= f.channels; c += kLanes<T>) {
    const T* w = f.weights + c;
    Vec<T> sum[kTile]{};
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        const Vec<T> x = load(seen[i * columns + j] + shift + c);
#pragma GCC unroll 8
        for (int o = 0; o < kTile; ++o) {
          const int kh = i - o / kTileW * stride, kw = j - o % kTileW * stride;
          if (kh >= 0 && kh < K && kw >= 0 && kw < K) sum[o] = multiply_add(x, load(w + (kh * K + kw) * block), sum[o]);
        }
      }
    put(f, sum, c, kLanes<T>);
  }
  return c;
}

/// Any taps; channels from c on. The distance between two outputs' columns in the table is `step_w`, and so on.
template <class S>
void any_tile(const Tiles<S>& tiles, const Filters<S>& f, int64_t c) {
  using T = Sum<S>;
  const Windows& t = tiles.t;
  const int64_t step_h = tiles.w.count * (tiles.dense ? t.h.in_step : t.h.taps);
  const int64_t step_w = tiles.dense ? t.w.in_step : t.w.taps;
  for (; c < f.channels; c += kLanes<T>) {
    const int64_t lanes = smaller(kLanes<T>, f.channels - c);
    const T* w = f.weights + c;
    Vec<T> sum[kTile]{};
    for (int64_t th = 0; th < t.h.taps; ++th)
      for (int64_t tw = 0; tw < t.w.taps; ++tw, w += f.block) {
        const Vec<T> weight = load(w);
        const S* const* seen = tiles.seen + th * tiles.w.count + tw;
#pragma GCC unroll 8
        for (int o = 0; o < kTile; ++o)
          sum[o] = multiply_add(load_first(seen[o / kTileW * step_h + o % kTileW * step_w] + tiles.in_shift + c, lanes),
                                weight, sum[o]);
      }
    put(f, sum, c, lanes);
  }
}

/// The size of an unrolled filter, or 0.
int64_t unrolled(const Windows& t) {
  const int64_t taps = t.h.taps, stride = t.h.in_step;
  const bool square = t.w.taps == taps && t.w.in_step == stride && t.h.offset_step == 1 && t.w.offset_step == 1;
  return square && ((stride == 1 && (taps == 3 || taps == 5 || taps == 7)) || (stride == 2 && (taps == 3 || taps == 5)))
             ? taps
             : 0;
}

template <class S>
auto dense_tile_of(int64_t size, int64_t stride) {
  return size == 3   ? (stride == 1 ? dense_tile<S, 3, 1> : dense_tile<S, 3, 2>)
         : size == 5 ? (stride == 1 ? dense_tile<S, 5, 1> : dense_tile<S, 5, 2>)
                     : dense_tile<S, 7, 1>;
}

template <class S>
void run_tile(const Tiles<S>& tiles, Filters<S>& f, S* out, int64_t out_channels, S* bin) {
  for (int o = 0; o < kTile; ++o)
    f.out[o] = tiles.places[o] < 0 ? bin : out + (tiles.places[o] + tiles.place_shift) * out_channels;
  const int64_t size = tiles.dense ? tiles.t.h.taps : 0;
  any_tile(tiles, f, size ? dense_tile_of<S>(size, tiles.t.h.in_step)(tiles, f) : 0);
}

/// to[tap][block] = the weights of the block's channels, zeros beyond the last; `filter` numbers lie between channels.
template <class S>
void pack_weights(const Windows& t, const S* weight, int64_t filter, int64_t channels, int64_t block, Sum<S>* to) {
  for (int64_t th = 0; th < t.h.taps; ++th)
    for (int64_t tw = 0; tw < t.w.taps; ++tw, to += block) {
      const S* from = weight + t.weight_of(th, tw);
      for (int64_t c = 0; c < block; ++c) to[c] = c < channels ? value(from[c * filter]) : Sum<S>(0);
    }
}

int64_t tile_rows(const Conv2dGeometry& g, Pass pass) {
  return ceil_div(make_windows(g, pass, 0, 0).h.count, kTileH);  // class 0 has the most
}

/// Zeros, a place for outputs that do not exist, and the weights of all classes.
template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g) {
  return kBlock<T> * (2 + g.kernel[0] * g.kernel[1]);
}

/// Tasks are numbered (n, two rows, block of channels), but done block by block: so a block's weights are packed once,
/// and threads part the rows, not the channels of a pixel. (Where they did, each one's processor would read ahead into
/// what the other was writing.)
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Blocks<T> blocks(g.c);
  const int64_t rows = tile_rows(g, pass), filter = g.kernel[0] * g.kernel[1];
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kBlock<T>; ++c) zeros[c] = S{};
  S* bin = reinterpret_cast<S*>(workspace + kBlock<T>);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = (begin + blocks.count - 1 - block) / blocks.count;
    const int64_t last = (end + blocks.count - 1 - block) / blocks.count;
    if (first == last) continue;
    const int64_t c0 = block * blocks.size, channels = smaller(blocks.size, g.c - c0);
    T* weights = workspace + 2 * kBlock<T>;
    for (int64_t cls = 0; cls < classes(g, pass); ++cls) {
      const Windows t = make_windows(g, pass, 0, cls);
      Tiles<S> tiles(t, unrolled(t) > 0);
      tiles.in = o.a + c0;
      tiles.zeros = zeros;
      pack_weights(t, o.b + c0 * filter, filter, channels, blocks.size, weights);
      Filters<S> f{weights, blocks.size, channels, o.bias ? o.bias + c0 : nullptr, {}};
      for (int64_t i = first; i < last; ++i)
        if (i % rows * kTileH < t.h.count)
          tiles.each(i / rows, i % rows * kTileH, [&] { run_tile(tiles, f, o.out + c0, g.c, bin); });
      weights += t.h.taps * t.w.taps * blocks.size;
    }
  }
}

// ---- grad_weight ----

/// sums[th - th0][tw][block] += sum over a tile of what TH rows of taps see * gy, for the whole vectors of [c, end).
template <class S, int TH, int K, int stride>
int64_t dense_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th0, int64_t c, int64_t end, int64_t block,
                   Sum<S>* sums) {
  using T = Sum<S>;
  constexpr int rows = (kTileH - 1) * stride + TH, columns = (kTileW - 1) * stride + K;
  const S* const* seen = tiles.seen + th0 * columns;
  const int64_t shift = tiles.in_shift;
  for (; c + kLanes<T> <= end; c += kLanes<T>) {
    Vec<T> sum[TH * K]{}, grad[kTile];
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) grad[o] = load(gy[o] + c);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        const Vec<T> x = load(seen[i * columns + j] + shift + c);
#pragma GCC unroll 8
        for (int o = 0; o < kTile; ++o) {
          const int th = i - o / kTileW * stride, tw = j - o % kTileW * stride;
          if (th >= 0 && th < TH && tw >= 0 && tw < K) sum[th * K + tw] = multiply_add(x, grad[o], sum[th * K + tw]);
        }
      }
#pragma GCC unroll 16
    for (int tap = 0; tap < TH * K; ++tap) store(sums + tap * block + c, load(sums + tap * block + c) + sum[tap]);
  }
  return c;
}

template <class S>
void any_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th, int64_t c, int64_t channels, int64_t block,
              Sum<S>* sums) {
  using T = Sum<S>;
  const Windows& t = tiles.t;
  const int64_t step_h = tiles.w.count * (tiles.dense ? t.h.in_step : t.h.taps);
  const int64_t step_w = tiles.dense ? t.w.in_step : t.w.taps;
  const S* const* seen = tiles.seen + th * tiles.w.count;
  for (; c < channels; c += kLanes<T>) {
    const int64_t lanes = smaller(kLanes<T>, channels - c);
    for (int64_t tw = 0; tw < t.w.taps; ++tw) {
      Vec<T> sum{};
      for (int o = 0; o < kTile; ++o)
        if (gy[o])
          sum =
              multiply_add(load_first(seen[o / kTileW * step_h + o % kTileW * step_w + tw] + tiles.in_shift + c, lanes),
                           load_first(gy[o] + c, lanes), sum);
      T* to = sums + tw * block + c;
      store(to, load(to) + sum);
    }
  }
}

/// Rows [th0, th1) of an unrolled filter: those of 3x3 together, others one by one.
template <class S>
int64_t all_dense_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th0, int64_t th1, int64_t c, int64_t end,
                       int64_t block, Sum<S>* sums) {
  const int64_t K = tiles.t.w.taps, stride = tiles.t.w.in_step;
  int64_t done = c;
  const auto run = [&](auto kernel, int64_t th) {
    done = kernel(tiles, gy, th, c, end, block, sums + (th - th0) * K * block);
  };
  if (K == 3) {
    const int64_t rows = th1 - th0;
    run(stride == 1 ? (rows == 3   ? dense_sums<S, 3, 3, 1>
                       : rows == 2 ? dense_sums<S, 2, 3, 1>
                                   : dense_sums<S, 1, 3, 1>)
                    : (rows == 3   ? dense_sums<S, 3, 3, 2>
                       : rows == 2 ? dense_sums<S, 2, 3, 2>
                                   : dense_sums<S, 1, 3, 2>),
        th0);
  } else {
    for (int64_t th = th0; th < th1; ++th)
      run(K == 7 ? dense_sums<S, 1, 7, 1> : stride == 1 ? dense_sums<S, 1, 5, 1> : dense_sums<S, 1, 5, 2>, th);
  }
  return done;
}

/// Zeros, and two sums for every weight of a block: of some rows, and of all.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  return kBlock<T> * (1 + 2 * g.kernel[0] * g.kernel[1]);
}

/// Neighbouring vectors of channels, and the rows of taps that are summed for them.
struct Segment {
  int64_t v0, v1, th0, th1;
};

/// Tasks are numbered (vector of channels, row of taps), or the other way round if there are few channels: then threads
/// part the taps and each reads whole pixels, run after run, which is what processors read ahead.
struct WeightTasks {
  int64_t vectors, rows;
  int64_t th(int64_t task, int64_t v) const {  // the first row of taps of vector v that is not before the task
    const int64_t th = vectors <= kBlockVectors ? (task + vectors - 1 - v) / vectors : task - v * rows;
    return smaller(larger(th, 0), rows);
  }
  /// The next segment of the tasks [begin, end) from vector v0 on, of at most kBlockVectors; empty if v0 == v1.
  Segment segment(int64_t begin, int64_t end, int64_t v0, int64_t limit) const {
    while (v0 < limit && th(begin, v0) == th(end, v0)) ++v0;
    Segment s{v0, v0, th(begin, v0), th(end, v0)};
    while (s.v1 < limit && th(begin, s.v1) == s.th0 && th(end, s.v1) == s.th1) ++s.v1;
    return s;
  }
};

/// A segment's sums for one tile.
template <class S>
void sum_tile(const Tiles<S>& tiles, const S* const* gy, const Segment& s, int64_t end, int64_t block, Sum<S>* sums) {
  const int64_t row = tiles.t.w.taps * block;
  const int64_t c = tiles.dense && tiles.whole ? all_dense_sums(tiles, gy, s.th0, s.th1, 0, end, block, sums) : 0;
  for (int64_t th = s.th0; th < s.th1; ++th) any_sums(tiles, gy, th, c, end, block, sums + (th - s.th0) * row);
}

/// Sums of [tap of a segment][channel of a block], segment after segment.
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Windows t = make_windows(g, Pass::grad_weight, 0, 0);
  const WeightTasks tasks{ceil_div(g.c, L), t.h.taps};
  const int64_t filter = t.h.taps * t.w.taps;
  Tiles<S> tiles(t, unrolled(t) > 0);
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kBlock<T>; ++c) zeros[c] = S{};
  tiles.zeros = zeros;
  T *const sums = workspace + kBlock<T>, *const totals = sums + kBlock<T> * filter;

  for (int64_t v0 = 0; v0 < tasks.vectors; v0 += kBlockVectors) {
    Segment segments[kBlockVectors];
    int64_t count = 0, used = 0;
    const int64_t last = smaller(v0 + kBlockVectors, tasks.vectors);
    for (Segment s = tasks.segment(begin, end, v0, last); s.v0 < s.v1; s = tasks.segment(begin, end, s.v1, last)) {
      segments[count++] = s;
      used += (s.v1 - s.v0) * L * (s.th1 - s.th0) * t.w.taps;
    }
    if (count == 0) continue;
    for (int64_t i = 0; i < used; ++i) sums[i] = totals[i] = 0;
    int64_t pixels = 0;
    const auto add_up = [&] {
      for (int64_t i = 0; i < used; i += L) {
        store(totals + i, load(totals + i) + load(sums + i));
        store(sums + i, Vec<T>{});
      }
      pixels = 0;
    };
    tiles.in = o.b + v0 * L;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t i0 = 0; i0 < t.h.count; i0 += kTileH) {
        tiles.each(n, i0, [&] {
          T* to = sums;
          for (int64_t i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const int64_t c0 = s.v0 * L, block = (s.v1 - s.v0) * L;
            const S* gy[kTile];
            for (int m = 0; m < kTile; ++m)
              gy[m] = tiles.places[m] < 0 ? nullptr : o.a + (tiles.places[m] + tiles.place_shift) * g.k + c0;
            tiles.in_shift += c0 - v0 * L;
            sum_tile(tiles, gy, s, smaller(block, g.c - c0), block, to);
            tiles.in_shift -= c0 - v0 * L;
            to += block * (s.th1 - s.th0) * t.w.taps;
          }
        });
        pixels += kTileH * t.w.count;
        if (pixels >= kSumPixels) add_up();
      }
    add_up();
    const T* from = totals;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t tap = segments[i].th0 * t.w.taps; tap < segments[i].th1 * t.w.taps; ++tap)
        for (int64_t c = segments[i].v0 * L; c < segments[i].v1 * L; ++c, ++from)
          if (c < g.c) o.out[c * filter + tap] = rounded<S>(*from);
  }
}

// ---- the row of the table ----

/// What is accepted forwards is accepted backwards.
const char* refuses(const Conv2dGeometry& g, Pass) {
  if (g.layout != Layout::channels_last) return "its vectors lie along the channels: it wants channels_last";
  if (g.groups == 1 || g.c != g.groups || g.k != g.groups) return "it takes one filter per channel, and two at least";
  if (g.kernel[0] * g.kernel[1] > kMostTaps) return "a filter's weights pass its buffer of 512";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) { return g.n * tile_rows(g, pass) * Blocks<Sum<S>>(g.c).count; },
          correlation_workspace<Sum<S>>, correlate<S, pass>};
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_channels_last() {
  return {"depthwise",
          "",
          refuses,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          {[](const Conv2dGeometry& g) { return ceil_div(g.c, kLanes<Sum<S>>) * g.kernel[0]; },
           weight_workspace<Sum<S>>, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_channels_last();

}  // namespace cnnops::cpu::CNNOPS_ISA
