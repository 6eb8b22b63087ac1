// Convolution in many small groups, of channels_last tensors.
//
//   y[p, k]        = bias[k] + sum over (j, tap) of x[pixel of (p, tap), (group of k) + j] * w[k, tap, j]
//   gw[k, tap, j]  =           sum over p        of x[pixel of (p, tap), (group of k) + j] * gy[p, k]
//
// Where a group has fewer channels than a vector has lanes, a tile of pixels x channels of one group would leave most
// lanes empty. Here a lane is an output channel k, and a vector covers as many whole groups as fit, with their inputs:
// those are one vector too, from which lane k picks channel j of its group. So every multiply-add is a useful one, and
// picking costs nothing: processors permute vectors elsewhere than they multiply.
//
// A tile is 2x4 outputs of one vector of channels, as in conv2d_depthwise_channels_last.cpp, with its table of pixels. For
// one j, the weights of all taps of a 3x3 filter stay in registers, and a pixel that was picked from once serves up to 6
// of the tile's outputs. Other filters, and the classes of a strided grad_input (../correlation.h), pick anew for every
// tap. grad_weight turns it round: the tile's gradients stay in registers, and the sums of all taps.
//
// A task is two rows of outputs of a block of channels, or in grad_weight one j of a vector of channels. There sums are
// made over the 8 pixels of a tile, over the tiles of some rows, and over all rows and images, in this order, lane by lane.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses the contiguous layout, groups of more than half a vector, and filters of more than 512 weights.
#include "conv2d_depthwise.h"
#include "conv2d_depthwise_tiles.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostSteps = 512;        // weights of a filter
constexpr int64_t kGoodWeights = 1 << 15;  // bytes of a block's
constexpr int64_t kSumPixels = 128;        // grad_weight: about as many are summed before they are added to the total
constexpr int64_t kMostTasks = 64;         // grad_weight: computed together

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
    for (int64_t j = 0; j < channels; ++j)
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) places[j][lane] = lane < out ? lane / rows * channels + j : 0;
  }
};

/// Masks cost whole vectors dearly.
template <class S>
static inline Vec<Sum<S>> load_some(const S* p, int64_t lanes) {
  return lanes == kLanes<Sum<S>> ? load(p) : load_first(p, lanes);
}

template <class S>
static inline void store_some(S* p, Vec<Sum<S>> v, int64_t lanes) {
  lanes == kLanes<Sum<S>> ? store(p, v) : store_first(p, v, lanes);
}

/// Whether a filter's tiles are unrolled: 3x3, of stride 1 or 2.
bool unrolled(const Windows& t) {
  return t.h.taps == 3 && t.w.taps == 3 && t.h.in_step == t.w.in_step && t.h.in_step <= 2 && t.h.offset_step == 1 &&
         t.w.offset_step == 1;
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
template <int stride, class Load, class F>
[[gnu::always_inline]] static inline void each_meeting(const Load& pixel, const F& f) {
  constexpr int rows = (kTileH - 1) * stride + 3, columns = (kTileW - 1) * stride + 3;
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < columns; ++j) {
      const auto x = pixel(i * columns + j);
#pragma GCC unroll 8
      for (int o = 0; o < kTile; ++o) {
        const int kh = i - o / kTileW * stride, kw = j - o % kTileW * stride;
        if (kh >= 0 && kh < 3 && kw >= 0 && kw < 3) f(x, o, kh * 3 + kw);
      }
    }
}

/// Starts loading what the tiles two rows down will see first.
template <class S, int stride>
static inline void prefetch_below(const Tiles<S>& tiles, int64_t c) {
  constexpr int rows = (kTileH - 1) * stride + 3, columns = (kTileW - 1) * stride + 3;
  const int64_t below = tiles.in_shift + c + tiles.below;
#pragma GCC unroll 16
  for (int i = rows - kTileH * stride; i < rows; ++i)
#pragma GCC unroll 16
    for (int j = columns - kTileW * stride; j < columns; ++j)
      __builtin_prefetch(tiles.seen[i * columns + j] + below, 0, 2);
}

// ---- forward and grad_input ----

/// sum[o] = what the tile's outputs see of a vector of inputs at c, of which `lanes` may be read. weights[j][tap].
template <class S, int stride, bool whole>
void dense_tile(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const Sum<S>* weights, int64_t c, int64_t lanes,
                Vec<Sum<S>>* sums) {
  using T = Sum<S>;
  const S* const* seen = tiles.seen;
  const int64_t at = tiles.in_shift + c;
  Vec<T> sum[kTile]{};
  for (int64_t j = 0; j < pack.channels; ++j, weights += 9 * kLanes<T>) {
    if (j == 0) prefetch_below<S, stride>(tiles, c);
    const Vec<Places<T>> places = pack.places[j];
    Vec<T> weight[9];
#pragma GCC unroll 16
    for (int tap = 0; tap < 9; ++tap) weight[tap] = load(weights + tap * kLanes<T>);
    each_meeting<stride>(
        [&](int i) { return pick<T>(whole ? load(seen[i] + at) : load_first(seen[i] + at, lanes), places); },
        [&](Vec<T> x, int o, int tap) { sum[o] = multiply_add(x, weight[tap], sum[o]); });
  }
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) sums[o] = sum[o];
}

template <class S>
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
          sum[o] = multiply_add(pick<T>(load_first(x, lanes), pack.places[j]), weight, sum[o]);
        }
      }
#pragma GCC unroll 8
  for (int o = 0; o < kTile; ++o) sums[o] = sum[o];
}

/// A block of vectors that is computed together.
template <class T>
struct Blocks {
  int64_t vectors, count;
  Blocks(const Conv2dGeometry& g, const Packing<T>& pack) {
    const int64_t weights = g.kernel[0] * g.kernel[1] * pack.channels * kVectorBytes;
    const int64_t most = smaller(larger(kGoodWeights / weights, 1), kBlockVectors);
    vectors = ceil_div(pack.vectors, ceil_div(pack.vectors, most));
    count = ceil_div(pack.vectors, vectors);
  }
};

/// to[vector][j][tap][lane], zeros in lanes without a channel.
template <class T, class S>
void pack_weights(const Conv2dGeometry& g, const Windows& t, const Packing<T>& pack, const S* weight, int64_t vector,
                  int64_t end, T* to) {
  const int64_t group_weight = g.k / g.groups * g.kernel[0] * g.kernel[1] * (g.c / g.groups);
  for (; vector < end; ++vector)
    for (int64_t j = 0; j < t.channels; ++j)
      for (int64_t th = 0; th < t.h.taps; ++th)
        for (int64_t tw = 0; tw < t.w.taps; ++tw, to += kLanes<T>) {
          const S* from = weight + vector * pack.groups * group_weight + t.weight_of(th, tw) + j * t.weight_channel;
          for (int64_t lane = 0, group = vector * pack.groups; group < (vector + 1) * pack.groups; ++group) {
            for (int64_t row = 0; row < pack.rows; ++row, ++lane)
              to[lane] = group < g.groups ? value(from[row * t.weight_row]) : T(0);
            from += group_weight;
          }
          for (int64_t lane = pack.out; lane < kLanes<T>; ++lane) to[lane] = 0;
        }
}

template <class T>
constexpr int64_t kZeros = (kBlockVectors + 1) * kLanes<T>;

/// Zeros, a place for outputs that do not exist, and the weights of a block.
template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  return kZeros<T> + kLanes<T> + Blocks<T>(g, pack).vectors * g.kernel[0] * g.kernel[1] * pack.channels * kLanes<T>;
}

int64_t tile_rows(const Conv2dGeometry& g, Pass pass) {
  return ceil_div(make_windows(g, pass, 0, 0).h.count, kTileH);  // class 0 has the most
}

/// Tasks are numbered (n, two rows, block of channels), but done block by block: so a block's weights are packed once.
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  const Blocks<T> blocks(g, pack);
  const int64_t rows = tile_rows(g, pass);
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kZeros<T>; ++c) zeros[c] = S{};
  S* bin = reinterpret_cast<S*>(workspace + kZeros<T>);
  T* const weights = workspace + kZeros<T> + L;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = (begin + blocks.count - 1 - block) / blocks.count;
    const int64_t last = (end + blocks.count - 1 - block) / blocks.count;
    if (first == last) continue;
    const int64_t v0 = block * blocks.vectors, v1 = smaller(v0 + blocks.vectors, pack.vectors);
    for (int64_t cls = 0; cls < classes(g, pass); ++cls) {
      const Windows t = make_windows(g, pass, 0, cls);
      const int64_t filter = t.h.taps * t.w.taps * t.channels * L;
      Tiles<S> tiles(t, unrolled(t));
      tiles.in = o.a + v0 * pack.in;
      tiles.zeros = zeros;
      pack_weights<T, S>(g, t, pack, o.b, v0, v1, weights);
      const auto run_tile = [&] {
        for (int64_t v = v0; v < v1; ++v) {
          const int64_t c = (v - v0) * pack.in, lanes = smaller(L, t.in_channels - v * pack.in);
          const T* w = weights + (v - v0) * filter;
          Vec<T> sums[kTile];
          const auto tile = !tiles.dense       ? any_tile<S>
                            : t.h.in_step == 1 ? (lanes == L ? dense_tile<S, 1, true> : dense_tile<S, 1, false>)
                                               : (lanes == L ? dense_tile<S, 2, true> : dense_tile<S, 2, false>);
          tile(tiles, pack, w, c, lanes, sums);
          const int64_t k = v * pack.out, made = smaller(pack.out, t.out_channels - k);
          const Vec<T> bias = o.bias ? load_some(o.bias + k, made) : Vec<T>{};
          for (int i = 0; i < kTile; ++i) {
            S* out = tiles.places[i] < 0 ? bin : o.out + (tiles.places[i] + tiles.place_shift) * t.out_channels + k;
            store_some(out, sums[i] + bias, made);
          }
        }
      };
      for (int64_t i = first; i < last; ++i)
        if (i % rows * kTileH < t.h.count) tiles.each(i / rows, i % rows * kTileH, run_tile);
    }
  }
}

// ---- grad_weight ----

/// sums[j - j0][tap] += sum over a tile of what is picked of the inputs at c * gy, which is at k.
template <class S, int stride, bool whole>
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
  prefetch_below<S, stride>(tiles, c);
  for (int64_t j = j0; j < j1; ++j, sums += 9 * kLanes<T>) {
    const Vec<Places<T>> places = pack.places[j];
    Vec<T> sum[9]{};
    each_meeting<stride>(
        [&](int i) { return pick<T>(whole ? load(seen[i] + at) : load_first(seen[i] + at, lanes), places); },
        [&](Vec<T> x, int o, int tap) { sum[tap] = multiply_add(x, grad[o], sum[tap]); });
#pragma GCC unroll 16
    for (int tap = 0; tap < 9; ++tap) store(sums + tap * kLanes<T>, load(sums + tap * kLanes<T>) + sum[tap]);
  }
}

template <class S>
void any_sums(const Tiles<S>& tiles, const Packing<Sum<S>>& pack, const S* const* gy, int64_t c, int64_t lanes,
              int64_t k, int64_t out_lanes, int64_t j0, int64_t j1, Sum<S>* sums) {
  using T = Sum<S>;
  const TableSteps<S> steps(tiles);
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t th = 0; th < tiles.t.h.taps; ++th)
      for (int64_t tw = 0; tw < tiles.t.w.taps; ++tw, sums += kLanes<T>) {
        const S* const* seen = tiles.seen + th * tiles.w.count + tw;
        Vec<T> sum{};
        for (int o = 0; o < kTile; ++o)
          if (gy[o]) {
            const S* x = seen[o / kTileW * steps.h + o % kTileW * steps.w] + tiles.in_shift + c;
            sum = multiply_add(pick<T>(load_first(x, lanes), pack.places[j]), load_first(gy[o] + k, out_lanes), sum);
          }
        store(sums, load(sums) + sum);
      }
}

/// Zeros, and two sums for every weight of kMostTasks: of some rows, and of all.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  return kZeros<T> + 2 * kMostTasks * g.kernel[0] * g.kernel[1] * kLanes<T>;
}

/// Tasks are numbered (vector of channels, j). Those of a few vectors are done together, tile by tile.
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Windows t = make_windows(g, Pass::grad_weight, 0, 0);
  const Packing<T> pack(g, t);
  const int64_t taps = t.h.taps * t.w.taps, channels = t.channels;
  Tiles<S> tiles(t, unrolled(t));
  S* zeros = reinterpret_cast<S*>(workspace);
  for (int64_t c = 0; c < kZeros<T>; ++c) zeros[c] = S{};
  tiles.zeros = zeros;
  T *const sums = workspace + kZeros<T>, *const totals = sums + kMostTasks * taps * L;

  for (int64_t last; begin < end; begin = last) {
    const int64_t v0 = begin / channels;
    last = smaller(end, smaller(begin + kMostTasks, (v0 + kBlockVectors) * channels));
    const int64_t used = (last - begin) * taps * L;
    for (int64_t i = 0; i < used; ++i) sums[i] = totals[i] = 0;
    int64_t pixels = 0;
    const auto add_up = [&] {
      for (int64_t i = 0; i < used; i += L) {
        store(totals + i, load(totals + i) + load(sums + i));
        store(sums + i, Vec<T>{});
      }
      pixels = 0;
    };
    const auto add_tile = [&] {
      const S* gy[kTile];
      for (int m = 0; m < kTile; ++m)
        gy[m] = tiles.places[m] < 0 ? nullptr : o.a + (tiles.places[m] + tiles.place_shift) * g.k;
      for (int64_t task = begin, next; task < last; task = next) {
        const int64_t v = task / channels, k = v * pack.out, c = v * pack.in;
        next = smaller(last, (v + 1) * channels);
        const int64_t lanes = smaller(L, g.c - c), out_lanes = smaller(L, g.k - k);
        const bool whole = lanes == L && out_lanes == L;
        const auto add = !tiles.dense || !tiles.whole ? any_sums<S>
                         : t.h.in_step == 1           ? (whole ? dense_sums<S, 1, true> : dense_sums<S, 1, false>)
                                                      : (whole ? dense_sums<S, 2, true> : dense_sums<S, 2, false>);
        add(tiles, pack, gy, c - v0 * pack.in, lanes, k, out_lanes, task - v * channels, next - v * channels,
            sums + (task - begin) * taps * L);
      }
    };
    tiles.in = o.b + v0 * pack.in;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t i0 = 0; i0 < t.h.count; i0 += kTileH) {
        tiles.each(n, i0, add_tile);
        pixels += kTileH * t.w.count;
        if (pixels >= kSumPixels) add_up();
      }
    add_up();
    for (int64_t task = begin; task < last; ++task)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t lane = 0; lane < pack.out; ++lane) {
          const int64_t k = task / channels * pack.out + lane;
          if (k < g.k)
            o.out[(k * taps + tap) * channels + task % channels] =
                rounded<S>(totals[((task - begin) * taps + tap) * L + lane]);
        }
  }
}

// ---- the row of the table ----

/// What is accepted forwards is accepted backwards.
template <class T>
const char* refuses(const Conv2dGeometry& g, Pass) {
  const int64_t widest = larger(g.c, g.k) / g.groups;
  if (g.layout != Layout::channels_last) return "its vectors lie along the channels: it wants channels_last";
  if (g.groups == 1 || 2 * widest > kLanes<T>) return "its vectors hold two groups at least, and these are wider";
  if (widest * g.kernel[0] * g.kernel[1] > kMostSteps) return "a filter's weights pass its buffer of 512";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) {
            const Packing<T> pack(g, make_windows(g, pass, 0, 0));
            return g.n * tile_rows(g, pass) * Blocks<T>(g, pack).count;
          },
          [](const Conv2dGeometry& g) { return correlation_workspace<T>(g, pass); }, correlate<S, pass>};
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_groups() {
  using T = Sum<S>;
  return {"depthwise",
          "",
          refuses<T>,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          {[](const Conv2dGeometry& g) {
             const Packing<T> pack(g, make_windows(g, Pass::grad_weight, 0, 0));
             return pack.vectors * pack.channels;
           },
           weight_workspace<T>, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_groups();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_groups();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_groups();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_groups();

}  // namespace cnnops::cpu::CNNOPS_ISA
