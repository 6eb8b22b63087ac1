// The tiles of convolution in small groups: 2x4 outputs of one vector of channels (conv2d_depthwise_groups.cpp has the
// idea).
#pragma once

#include "conv2d_depthwise_tiles.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {

template <class T>
using Places = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

/// v[places[0]], v[places[1]], ...
template <class T>
static inline Vec<T> pick(Vec<T> v, Vec<Places<T>> places) {
#if defined(__clang__)
  Vec<T> picked;
  for (int i = 0; i < kLanes<T>; ++i) picked[i] = v[places[i]];
  return picked;
#else
  return __builtin_shuffle(v, places);
#endif
}

/// How groups of `channels` inputs and `rows` outputs lie in vectors.
template <class T>
struct Packing {
  int64_t channels, rows;
  int64_t groups, in, out, vectors;  // of a vector: groups, inputs, outputs; of all groups: vectors
  Vec<Places<T>> places[kLanes<T>];  // where lane k finds channel j of its group

  explicit Packing(const Conv2dGeometry& g, const Windows& t)
      : channels(t.channels),
        rows(t.rows),
        groups(kLanes<T> / larger(t.channels, t.rows)),
        in(groups * t.channels),
        out(groups * t.rows),
        vectors(ceil_div(g.groups, groups)) {
    places[0] = Vec<Places<T>>{};
    for (int64_t lane = 0; lane < out; ++lane) places[0][lane] = lane / rows * channels;
    for (int64_t j = 1; j < channels; ++j) places[j] = places[0] + Places<T>(j);
  }
};

/// Whether the taps' tiles are unrolled: those of 3x3 filters, of the classes of their grad_input, and of 1x1 filters.
static inline bool is_unrolled(const Windows& t) {
  const auto dense = [](const Axis& a) { return a.taps == 1 || a.offset_step == 1; };
  if (t.h.in_step != t.w.in_step || !dense(t.h) || !dense(t.w)) return false;
  const bool square = t.h.taps == 3 && t.w.taps == 3;
  return t.h.in_step == 1 ? square || (t.h.taps * t.w.taps > 0 && t.h.taps <= 2 && t.w.taps <= 2)
                          : t.h.in_step == 2 && square;
}

/// The distances between the tables' places that two outputs see, down and across, for tiles that are not unrolled.
template <class S>
struct TableSteps {
  int64_t h, w;
  explicit TableSteps(const Tiles<S>& tiles)
      : h(tiles.w.count * (tiles.dense ? tiles.t.h.in_step : tiles.t.h.taps)),
        w(tiles.dense ? tiles.t.w.in_step : tiles.t.w.taps) {}
};

/// f(pixel's number in the table, output of the tile, tap) for all three that meet, the numbers being constants after
/// unrolling; pixel by pixel.
template <int stride, int TH, int TW, class Load, class F>
[[gnu::always_inline]] static inline void each_meeting(const Load& pixel, const F& f) {
  constexpr int rows = (kTileH - 1) * stride + TH, columns = (kTileW - 1) * stride + TW;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) {
      const auto x = pixel(i * columns + j);
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) {
        const int th = i - o / kTileW * stride, tw = j - o % kTileW * stride;
        if (th >= 0 && th < TH && tw >= 0 && tw < TW) f(x, o, th * TW + tw);
      }
    }
}

// ---- forward and grad_input ----

/// sum[o] = what the tile's outputs see of a vector of inputs at c, of which `lanes` may be read. weights[j][tap].
template <class S, int stride, int TH, int TW, bool whole>
void dense_tile(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const Sum<S>* weights, int64_t c, int64_t lanes,
                Vec<Sum<S>>* sums) {
  using T = Sum<S>;
  constexpr int taps = TH * TW;
  const S* const* seen = tiles.seen;
  const int64_t at = tiles.in_shift + c;
  Vec<T> sum[kTile]{};
  for (int64_t j = 0; j < pack.channels; ++j, weights += taps * kLanes<T>) {
    if (j == 0 && c % kLineNumbers<S> < pack.in)
      prefetch_next<S, kTileH * stride - stride + TH, kTileW * stride - stride + TW, stride>(tiles, seen, c);
    const Vec<Places<T>> places = pack.places[j];
    Vec<T> weight[taps];
#pragma GCC unroll 16
    for (int tap = 0; tap < taps; ++tap) weight[tap] = load(weights + tap * kLanes<T>);
    each_meeting<stride, TH, TW>(
        [&](int i) { return pick<T>(whole ? load(seen[i] + at) : load_first(seen[i] + at, lanes), places); },
        [&](Vec<T> x, int o, int tap) { sum[o] = multiply_add(x, weight[tap], sum[o]); });
  }
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) sums[o] = sum[o];
}

template <class S, bool whole>
void any_tile(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const Sum<S>* weights, int64_t c, int64_t lanes,
              Vec<Sum<S>>* sums) {
  using T = Sum<S>;
  const TableSteps<S> steps(tiles);
  Vec<T> sum[kTile]{};
  for (int64_t j = 0; j < pack.channels; ++j)
    for (int64_t th = 0; th < tiles.t.h.taps; ++th)
      for (int64_t tw = 0; tw < tiles.t.w.taps; ++tw, weights += kLanes<T>) {
        const Vec<T> weight = load(weights);
        const S* const* seen = tiles.seen + th * tiles.w.count + tw;
#pragma GCC unroll 8
        for (int o = 0; o < kTile; ++o) {
          const S* x = seen[o / kTileW * steps.h + o % kTileW * steps.w] + tiles.in_shift + c;
          sum[o] = multiply_add(pick<T>(whole ? load(x) : load_first(x, lanes), pack.places[j]), weight, sum[o]);
        }
      }
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) sums[o] = sum[o];
}

template <class S, bool whole>
auto tile_of(const Tiles<S>& tiles) {
  const int64_t h = tiles.t.h.taps, w = tiles.t.w.taps;
  return !tiles.dense             ? any_tile<S, whole>
         : tiles.t.h.in_step == 2 ? dense_tile<S, 2, 3, 3, whole>
         : h == 3                 ? dense_tile<S, 1, 3, 3, whole>
         : h == 2                 ? (w == 2 ? dense_tile<S, 1, 2, 2, whole> : dense_tile<S, 1, 2, 1, whole>)
         : w == 2                 ? dense_tile<S, 1, 1, 2, whole>
                                  : dense_tile<S, 1, 1, 1, whole>;
}

/// Numbers between the weights of two groups.
static inline int64_t group_weight(const Conv2dGeometry& g) {
  return g.k / g.groups * g.kernel[0] * g.kernel[1] * (g.c / g.groups);
}

/// to[j][tap][lane] for a vector of groups, of which there are `groups`; zeros in lanes without a channel.
template <Pass pass, class T, class S>
void pack_weights(const Windows& t, const Packing<T>& pack, const S* weight, int64_t group_weight, int64_t groups,
                  T* to) {
  constexpr int64_t L = kLanes<T>;
  const int64_t taps = t.h.taps * t.w.taps, length = taps * t.channels;
  const int64_t lanes = smaller(groups, pack.groups) * pack.rows;
  if constexpr (pass == Pass::forward) {  // a lane's weights follow each other
    for (int64_t r = 0; r < length; r += L) {
      const int64_t count = smaller(L, length - r);
      Vec<T> square[L]{};
      for (int64_t lane = 0; lane < lanes; ++lane) square[lane] = load_first(weight + lane * length + r, count);
      transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t j = t.tap_weight == 1 ? (r + i) / taps : (r + i) % t.channels;
        const int64_t tap = t.tap_weight == 1 ? (r + i) % taps : (r + i) / t.channels;
        store(to + (j * taps + tap) * L, square[i]);
      }
    }
    return;
  }
  if (t.weight_row == 1) {  // a group's lanes lie side by side
    for (int64_t j = 0; j < t.channels; ++j)
      for (int64_t th = 0; th < t.h.taps; ++th)
        for (int64_t tw = 0; tw < t.w.taps; ++tw, to += L) {
          const S* from = weight + t.weight_of(th, tw) + j * t.weight_channel;
          store(to, load_some(from, pack.rows));
          for (int64_t lane = pack.rows; lane < lanes; lane += pack.rows) {
            from += group_weight;
            store_first(to + lane, load_first(from, pack.rows), pack.rows);
          }
        }
    return;
  }
  for (int64_t j = 0; j < t.channels; ++j)
    for (int64_t th = 0; th < t.h.taps; ++th)
      for (int64_t tw = 0; tw < t.w.taps; ++tw, to += L) {
        const S* from = weight + t.weight_of(th, tw) + j * t.weight_channel;
        store(to, Vec<T>{});
        for (int64_t lane = 0; lane < lanes; from += group_weight)
          for (int64_t row = 0; row < pack.rows; ++row, ++lane) to[lane] = value(from[row * t.weight_row]);
      }
}

template <class T>
constexpr int64_t kZeros = (kBlockVectors + 1) * kLanes<T>;

template <class S>
const S* make_zeros(Sum<S>* workspace) {
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t i = 0; i < kZeros<Sum<S>>; ++i) zeros[i] = S{};
  return zeros;
}

/// Vectors [v0, v1) of channels, in the memory of tensors whose pixels are t's: where their inputs, weights and outputs
/// are, counted from the first channel of v0.
template <class S>
struct Vectors {
  int64_t v0, v1;
  const S *in, *bias;
  const Sum<S>* weights;
  S* out;
  const S* zeros;
  S* bin;  // for outputs that do not exist
};

/// Rows [first, last) of tiles, written past the cache if that is wanted; they run on from image to image, each of
/// which has `rows`.
template <class S>
void correlate_rows(const Windows& t, const Packing<Sum<S>>& pack, const Vectors<S>& o, bool past, int64_t rows,
                    int64_t first, int64_t last) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t filter = t.h.taps * t.w.taps * t.channels * L;
  Tiles<S> tiles(t, is_unrolled(t));
  tiles.read_ahead((o.v1 - o.v0) * pack.in);
  tiles.in = o.in;
  tiles.zeros = o.zeros;
  const auto run_tile = [&] {
    for (int64_t v = 0; v < o.v1 - o.v0; ++v) {
      const int64_t c = v * pack.in, k = v * pack.out;
      const int64_t lanes = smaller(L, t.in_channels - (o.v0 + v) * pack.in);
      const int64_t made = smaller(pack.out, t.out_channels - (o.v0 + v) * pack.out);
      Vec<T> sums[kTile];
      const auto tile = lanes == L ? tile_of<S, true>(tiles) : tile_of<S, false>(tiles);
      tile(tiles, pack, o.weights + v * filter, c, lanes, sums);
      const Vec<T> bias = o.bias ? load_some(o.bias + k, made) : Vec<T>{};
      for (int i = 0; i < kTile; ++i) {
        S* out = tiles.places[i] < 0 ? o.bin : o.out + (tiles.places[i] + tiles.place_shift) * t.out_channels + k;
        if constexpr (std::is_same_v<S, T>) {
          if (past) {
            store_past_cache(out, sums[i] + bias);
            continue;
          }
        }
        store_some(out, sums[i] + bias, made);
      }
    }
  };
  for (int64_t i = first; i < last; ++i)
    if (i % rows * kTileH < t.h.count) tiles.each(i / rows, i % rows * kTileH, run_tile);
}

// ---- grad_weight ----

/// sums[j - j0][tap] += sum over a tile of what is picked of the inputs at c * gy, which is at k.
template <class S, int stride, int K, bool whole>
void dense_sums(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const S* const* gy, int64_t c, int64_t lanes,
                int64_t k, int64_t out_lanes, int64_t j0, int64_t j1, Sum<S>* sums) {
  using T = Sum<S>;
  const S* const* seen = tiles.seen;
  const int64_t at = tiles.in_shift + c, gy_below = kTileH * tiles.t.out_width * tiles.t.out_channels;
  Vec<T> grad[kTile];
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) {
    grad[o] = whole ? load(gy[o] + k) : load_first(gy[o] + k, out_lanes);
    __builtin_prefetch(gy[o] + gy_below + k, 0, 2);
  }
  if (c % kLineNumbers<S> < pack.in)
    prefetch_next<S, kTileH * stride - stride + K, kTileW * stride - stride + K, stride>(tiles, seen, c);
  for (int64_t j = j0; j < j1; ++j, sums += K * K * kLanes<T>) {
    const Vec<Places<T>> places = pack.places[j];
    Vec<T> sum[K * K]{};
    each_meeting<stride, K, K>(
        [&](int i) { return pick<T>(whole ? load(seen[i] + at) : load_first(seen[i] + at, lanes), places); },
        [&](Vec<T> x, int o, int tap) { sum[tap] = multiply_add(x, grad[o], sum[tap]); });
#pragma GCC unroll 16
    for (int tap = 0; tap < K * K; ++tap) store(sums + tap * kLanes<T>, load(sums + tap * kLanes<T>) + sum[tap]);
  }
}

template <class S, bool whole>
void any_sums(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const S* const* gy, int64_t c, int64_t lanes,
              int64_t k, int64_t out_lanes, int64_t j0, int64_t j1, Sum<S>* sums) {
  using T = Sum<S>;
  const TableSteps<S> steps(tiles);
  Vec<T> grad[kTile];
  int64_t there[kTile], count = 0;  // places in the table, of the outputs that exist
  for (int o = 0; o < kTile; ++o)
    if (gy[o]) {
      grad[count] = whole ? load(gy[o] + k) : load_first(gy[o] + k, out_lanes);
      there[count++] = o / kTileW * steps.h + o % kTileW * steps.w;
    }
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t th = 0; th < tiles.t.h.taps; ++th)
      for (int64_t tw = 0; tw < tiles.t.w.taps; ++tw, sums += kLanes<T>) {
        const S* const* seen = tiles.seen + th * tiles.w.count + tw;
        Vec<T> sum{};
        const auto add = [&](int o) {
          const S* x = seen[there[o]] + tiles.in_shift + c;
          sum = multiply_add(pick<T>(whole ? load(x) : load_first(x, lanes), pack.places[j]), grad[o], sum);
        };
        if (count == kTile) {
#pragma GCC unroll 8
          for (int o = 0; o < kTile; ++o) add(o);
        } else {
          for (int64_t o = 0; o < count; ++o) add(o);
        }
        store(sums, load(sums) + sum);
      }
}

template <class S, bool whole>
auto sums_of(const Tiles<S>& tiles) {
  const bool one = tiles.t.h.taps * tiles.t.w.taps == 1;
  return !tiles.dense || !tiles.whole || !(one || tiles.t.h.taps == 3) ? any_sums<S, whole>
         : one                                                         ? dense_sums<S, 1, 1, whole>
         : tiles.t.h.in_step == 1                                      ? dense_sums<S, 1, 3, whole>
                                                                       : dense_sums<S, 2, 3, whole>;
}

/// sums[task - begin][tap] += sums over a tile, for tasks numbered (vector, j); gradients from vector 0 on, inputs from
/// v0.
template <class S>
void add_tile(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const S* gradients, int64_t v0, int64_t begin,
              int64_t end, Sum<S>* sums) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const Windows& t = tiles.t;
  const S* gy[kTile];
  for (int m = 0; m < kTile; ++m)
    gy[m] = tiles.places[m] < 0 ? nullptr : gradients + (tiles.places[m] + tiles.place_shift) * t.out_channels;
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t v = task / t.channels, k = v * pack.out, c = v * pack.in;
    next = smaller(end, (v + 1) * t.channels);
    const int64_t lanes = smaller(L, t.in_channels - c), out_lanes = smaller(L, t.out_channels - k);
    const bool whole = lanes == L && out_lanes == L;
    const auto add = whole ? sums_of<S, true>(tiles) : sums_of<S, false>(tiles);
    add(tiles, pack, gy, c - v0 * pack.in, lanes, k, out_lanes, task - v * t.channels, next - v * t.channels, sums);
    sums += (next - task) * t.h.taps * t.w.taps * L;
  }
}

/// totals[i] += sums[i], and zeros again in sums.
template <class T>
void add_up(int64_t count, T* sums, T* totals) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store(totals + i, load(totals + i) + load(sums + i));
    store(sums + i, Vec<T>{});
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
