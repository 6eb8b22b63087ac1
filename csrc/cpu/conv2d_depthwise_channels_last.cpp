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
// Processors read ahead of a program that reads on from where it was. A tile takes a line from each of many pixels
// instead, so inputs that come from memory are asked for one tile ahead, in the order in which they lie.
//
// A task is two rows of outputs (of each class) of a block of channels. The gradient of the weight is in
// conv2d_depthwise_grad_weight.cpp.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses the contiguous layout, filters per group other than one, and filters of more than 512 weights.
#include "conv2d_depthwise_tiles.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMuchInput = 4 << 20;  // bytes

// ---- forward and grad_input ----

/// What a tile's outputs are made of besides pixels; channels are counted from the first of the block.
template <class S>
struct Filters {
  const Sum<S>* weights;  // [tap][block]
  int64_t block, channels;
  const S* bias;  // or nullptr
  S* out[kTile];
  Vec<Sum<S>>* line;  // of the cache, of each output; if outputs are written past it, which wants lines as a whole
  bool fetch;         // whether inputs come from beyond the second-level cache
};

template <class S>
static inline void put(const Filters<S>& f, const Vec<Sum<S>>* sum, int64_t c, int64_t lanes) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const Vec<Sum<S>> bias = f.bias ? load_some(f.bias + c, lanes) : Vec<Sum<S>>{};
  if constexpr (std::is_same_v<S, Sum<S>>) {
    if (f.line) {
      const int64_t v = c / L % kLineVectors;
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) {
        if (v < kLineVectors - 1) {
          f.line[o * kLineVectors + v] = sum[o] + bias;
          continue;
        }
        for (int64_t i = 0; i < v; ++i) store_past_cache(f.out[o] + c + (i - v) * L, f.line[o * kLineVectors + i]);
        store_past_cache(f.out[o] + c, sum[o] + bias);
      }
      return;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) store_some(f.out[o] + c, sum[o] + bias, lanes);
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
    if (f.fetch && c % kLineNumbers<S> == 0) prefetch_next<S, rows, columns, stride>(tiles, seen, c);
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
  const bool past = past_cache(o.out, g.n * size[0] * size[1] * g.c) && g.c % (kLineVectors * kLanes<T>) == 0;
  Vec<T> line[kTile * kLineVectors];
  const int64_t* in_size = pass == Pass::forward ? g.in : g.out;
  const bool fetch = g.n * in_size[0] * in_size[1] * g.c * int64_t(sizeof(S)) > kMuchInput;
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
        if (fetch) tiles.read_ahead(channels);
        tiles.in = o.a + c0;
        tiles.zeros = zeros;
        if (row == first) pack_weights(t, o.b + c0 * filter, filter, channels, blocks.size, w);
        Filters<S> f{w, blocks.size, channels, o.bias ? o.bias + c0 : nullptr, {}, past ? line : nullptr, fetch};
        for (int64_t i = row; i < smaller(row + kClassRows, last); ++i)
          if (i % rows * kTileH < t.h.count)
            tiles.each(i / rows, i % rows * kTileH, [&] { run_tile(tiles, f, o.out + c0, g.c, bin); });
        w += t.h.taps * t.w.taps * blocks.size;
      }
    }
  }
  if (past) stores_done();
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
          depthwise_grad_weight<S>()};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_channels_last();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_channels_last();

}  // namespace cnnops::cpu::CNNOPS_ISA
