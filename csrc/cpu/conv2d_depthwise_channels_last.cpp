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
// for a vector of channels; neighbouring tasks are computed together. There a thread sees a few lines of every pixel,
// which processors do not read ahead by themselves, so it asks for the tiles below. Sums are made over the 8 pixels of a
// tile, over the tiles of some rows, and over all rows and images, in this order, lane by lane.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses the contiguous layout, filters per group other than one, and filters of more than 512 weights.
#include "channels_last_tile.h"
#include "conv2d_depthwise.h"
#include "conv2d_depthwise_tiles.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kGoodTasks = 16, kPartPixels = 512, kPartNumbers = 1 << 16;  // grad_weight
constexpr int64_t kSumPixels = 128;  // grad_weight: about as many are summed before they are added to the total

// ---- forward and grad_input ----

/// What a tile's outputs are made of besides pixels; channels are counted from the first of the block.
template <class S>
struct Filters {
  const Sum<S>* weights;  // [tap][block]
  int64_t block, channels;
  const S* bias;  // or nullptr
  S* out[kTile];
  bool past;  // whether outputs are written past the cache
};

/// Starts loading what the tiles two rows down will see first, of one vector of channels.
template <class S, int rows, int columns, int stride>
static inline void prefetch_below(const Tiles<S>& tiles, const S* const* seen, int64_t c) {
  const int64_t below = tiles.in_shift + c + tiles.below;
#pragma GCC unroll 16
  for (int i = larger(rows - kTileH * stride, 0); i < rows; ++i)
#pragma GCC unroll 16
    for (int j = columns - kTileW * stride; j < columns; ++j) __builtin_prefetch(seen[i * columns + j] + below, 0, 2);
}

/// Masks cost whole vectors dearly: a masked store may wait for its line.
template <class S>
static inline Vec<Sum<S>> load_some(const S* p, int64_t lanes) {
  return lanes == kLanes<Sum<S>> ? load(p) : load_first(p, lanes);
}

template <class S>
static inline void put(const Filters<S>& f, const Vec<Sum<S>>* sum, int64_t c, int64_t lanes) {
  const Vec<Sum<S>> bias = f.bias ? load_some(f.bias + c, lanes) : Vec<Sum<S>>{};
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) {
    if (lanes == kLanes<Sum<S>>) {
      if constexpr (std::is_same_v<S, Sum<S>>) {
        if (f.past) {
          store_past_cache(f.out[o] + c, sum[o] + bias);
          continue;
        }
      }
      store(f.out[o] + c, sum[o] + bias);
    } else {
      store_first(f.out[o] + c, sum[o] + bias, lanes);
    }
  }
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
    prefetch_below<S, rows, columns, stride>(tiles, seen, c);
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
  const int64_t* size = pass == Pass::forward ? g.out : g.in;
  const bool past = past_cache(o.out, g.n * size[0] * size[1] * g.c) && g.c % kLanes<T> == 0;
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kBlock<T>; ++c) zeros[c] = S{};
  S* bin = reinterpret_cast<S*>(workspace + kBlock<T>);
  T* const weights = workspace + 2 * kBlock<T>;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = (begin + blocks.count - 1 - block) / blocks.count;
    const int64_t last = (end + blocks.count - 1 - block) / blocks.count;
    if (first == last) continue;
    const int64_t c0 = block * blocks.size, channels = smaller(blocks.size, g.c - c0);
    // All classes of some rows before the next: they read the same inputs.
    for (int64_t row = first; row < last; row += kClassRows) {
      T* w = weights;
      for (int64_t cls = 0; cls < classes(g, pass); ++cls) {
        const Windows t = make_windows(g, pass, 0, cls);
        Tiles<S> tiles(t, unrolled(t) > 0);
        tiles.in = o.a + c0;
        tiles.zeros = zeros;
        if (row == first) pack_weights(t, o.b + c0 * filter, filter, channels, blocks.size, w);
        Filters<S> f{w, blocks.size, channels, o.bias ? o.bias + c0 : nullptr, {}, past};
        for (int64_t i = row; i < smaller(row + kClassRows, last); ++i)
          if (i % rows * kTileH < t.h.count)
            tiles.each(i / rows, i % rows * kTileH, [&] { run_tile(tiles, f, o.out + c0, g.c, bin); });
        w += t.h.taps * t.w.taps * blocks.size;
      }
    }
  }
  if (past) stores_done();
}

// ---- grad_weight ----

/// sums[th - th0][tw][block] += sum over a tile of what TH rows of taps see * gy, for the whole vectors of [c, end).
template <class S, int TH, int K, int stride>
int64_t dense_sums(const Tiles<S>& tiles, const S* const* gy, int64_t th0, int64_t c, int64_t end, int64_t block,
                   Sum<S>* sums) {
  using T = Sum<S>;
  constexpr int rows = (kTileH - 1) * stride + TH, columns = (kTileW - 1) * stride + K;
  const S* const* seen = tiles.seen + th0 * columns;
  const int64_t shift = tiles.in_shift, gy_below = kTileH * tiles.t.out_width * tiles.t.out_channels;
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
    prefetch_below<S, rows, columns, stride>(tiles, seen, c);
#pragma GCC unroll 8
    for (int o = 0; o < kTile; ++o) __builtin_prefetch(gy[o] + gy_below + c, 0, 2);
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

/// Few channels' long sums are made in parts of the images' rows of tiles, so that threads need not part the channels.
struct Parts {
  int64_t tasks, rows, count;  // of one part; of all; parts
  template <class T>
  static Parts of(const Conv2dGeometry& g) {
    const int64_t numbers = g.c * g.kernel[0] * g.kernel[1], pixels = g.n * g.out[0] * g.out[1];
    Parts p{ceil_div(g.c, kLanes<T>) * g.kernel[0], g.n * tile_rows(g, Pass::forward), 1};
    while (p.tasks * p.count < kGoodTasks && pixels >= 2 * p.count * kPartPixels &&
           2 * p.count * numbers <= kPartNumbers)
      p.count *= 2;
    return p;
  }
};

/// Zeros, and two sums for every weight of a block: of some rows, and of all.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  return kBlock<T> * (1 + 2 * g.kernel[0] * g.kernel[1]);
}

/// Neighbouring vectors of channels, and the rows of taps that are summed for them.
struct Segment {
  int64_t v0, v1, th0, th1;
};

/// Tasks are numbered (vector of channels, row of taps).
struct WeightTasks {
  int64_t rows;
  int64_t th(int64_t task, int64_t v) const {  // the first row of taps of vector v that is not before the task
    return smaller(larger(task - v * rows, 0), rows);
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

/// Sums over rows [row0, row1) of tiles, of [tap of a segment][channel of a block], segment after segment; to `out` as T or S.
template <class S, class Out>
void sum_rows(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end,
              int64_t row0, int64_t row1, Out* out) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Windows t = make_windows(g, Pass::grad_weight, 0, 0);
  const WeightTasks tasks{t.h.taps};
  const int64_t vectors = ceil_div(g.c, L), rows = tile_rows(g, Pass::forward);
  const int64_t filter = t.h.taps * t.w.taps;
  Tiles<S> tiles(t, unrolled(t) > 0);
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kBlock<T>; ++c) zeros[c] = S{};
  tiles.zeros = zeros;
  T *const sums = workspace + kBlock<T>, *const totals = sums + kBlock<T> * filter;

  for (int64_t v0 = 0; v0 < vectors; v0 += kBlockVectors) {
    Segment segments[kBlockVectors];
    int64_t count = 0, used = 0;
    const int64_t last = smaller(v0 + kBlockVectors, vectors);
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
    for (int64_t row = row0; row < row1; ++row) {
      tiles.each(row / rows, row % rows * kTileH, [&] {
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
          if (c < g.c) out[c * filter + tap] = rounded<Out>(*from);
  }
}

/// Tasks are numbered (part, task of it).
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  const Parts all = Parts::of<Sum<S>>(g);
  if (all.count == 1) return sum_rows(g, o, workspace, begin, end, 0, all.rows, o.out);
  for (int64_t part = begin / all.tasks; part * all.tasks < end; ++part) {
    const int64_t first = part * all.tasks;
    sum_rows(g, o, workspace, larger(begin - first, 0), smaller(end - first, all.tasks), all.rows * part / all.count,
             all.rows * (part + 1) / all.count, o.parts + part * g.c * g.kernel[0] * g.kernel[1]);
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
          {[](const Conv2dGeometry& g) {
             const Parts all = Parts::of<Sum<S>>(g);
             return all.tasks * all.count;
           },
           weight_workspace<Sum<S>>, grad_weight<S>, [](const Conv2dGeometry& g) { return Parts::of<Sum<S>>(g).count; },
           channels_last_grad_weight<S>().add_parts}};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_channels_last();

}  // namespace cnnops::cpu::CNNOPS_ISA
