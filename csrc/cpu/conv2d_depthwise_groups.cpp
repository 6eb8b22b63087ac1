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
// A tile is 2x4 outputs of one vector of channels, as in conv2d_depthwise_channels_last.cpp, with its table of pixels.
// For one j, the weights of all taps of a 3x3 filter stay in registers, and a pixel that was picked from once serves up
// to 6 of the tile's outputs. So it is with 1x1 filters and the classes of a 3x3 filter's grad_input of stride 2
// (../correlation.h); for others it is picked anew for every tap. grad_weight turns it round: the tile's gradients stay
// in registers, and the sums of all taps.
//
// A task is two rows of outputs of a block of channels, or in grad_weight one j of a vector of channels. There sums are
// made over the 8 pixels of a tile, over the tiles of some rows, and over all rows and images, in this order, lane by
// lane.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses the contiguous layout, groups of more than half a vector, and filters of more than 512 weights.
#include "conv2d_depthwise_groups.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostSteps = 512;        // weights of a filter
constexpr int64_t kGoodWeights = 1 << 15;  // bytes of a block's
constexpr int64_t kSumPixels = 128;        // grad_weight: about as many are summed before they are added to the total
constexpr int64_t kMostTasks = 64;         // grad_weight: computed together

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

/// Zeros, a place for outputs that do not exist, and the weights of a block.
template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  return kZeros<T> + kLanes<T> + Blocks<T>(g, pack).vectors * g.kernel[0] * g.kernel[1] * pack.channels * kLanes<T>;
}

/// Tasks are numbered (n, two rows, block of channels), but done block by block: so a block's weights are packed once.
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  const Blocks<T> blocks(g, pack);
  const int64_t* size = pass == Pass::forward ? g.out : g.in;
  const int64_t out_channels = pass == Pass::forward ? g.k : g.c;
  const bool past = past_cache(o.out, g.n * size[0] * size[1] * out_channels) && out_channels % L == 0 && pack.out == L;
  const S* zeros = make_zeros<S>(workspace);
  S* bin = reinterpret_cast<S*>(workspace + kZeros<T>);
  T* const weights = workspace + kZeros<T> + L;
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t first = (begin + blocks.count - 1 - block) / blocks.count;
    const int64_t last = (end + blocks.count - 1 - block) / blocks.count;
    if (first == last) continue;
    const int64_t v0 = block * blocks.vectors, v1 = smaller(v0 + blocks.vectors, pack.vectors);
    const int64_t k = v0 * pack.out;
    // All classes of some rows before the next: they read the same inputs.
    for (int64_t row = first; row < last; row += kClassRows) {
      T* w = weights;
      for (int64_t cls = 0; cls < classes(g, pass); ++cls) {
        const Windows t = make_windows(g, pass, 0, cls);
        const int64_t filter = t.h.taps * t.w.taps * t.channels * L;
        for (int64_t v = v0; v < v1 && row == first; ++v)
          pack_weights<pass, T, S>(t, pack, o.b + v * pack.groups * group_weight(g), group_weight(g),
                                   g.groups - v * pack.groups, w + (v - v0) * filter);
        correlate_rows<S>(t, pack,
                          {v0, v1, o.a + v0 * pack.in, o.bias ? o.bias + k : nullptr, w, o.out + k, zeros, bin}, past,
                          tile_rows(g, pass), row, smaller(row + kClassRows, last));
        w += (v1 - v0) * filter;
      }
    }
  }
  if (past) stores_done();
}

// ---- grad_weight ----

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
  Tiles<S> tiles(t, is_unrolled(t));
  tiles.zeros = make_zeros<S>(workspace);
  T *const sums = workspace + kZeros<T>, *const totals = sums + kMostTasks * taps * L;

  for (int64_t last; begin < end; begin = last) {
    const int64_t v0 = begin / channels;
    last = smaller(end, smaller(begin + kMostTasks, (v0 + kBlockVectors) * channels));
    const int64_t used = (last - begin) * taps * L;
    for (int64_t i = 0; i < used; ++i) sums[i] = totals[i] = 0;
    tiles.in = o.b + v0 * pack.in;
    tiles.read_ahead((ceil_div(last, channels) - v0) * pack.in);
    int64_t pixels = 0;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t i0 = 0; i0 < t.h.count; i0 += kTileH) {
        tiles.each(n, i0, [&] { add_tile(tiles, pack, o.a, v0, begin, last, sums); });
        pixels += kTileH * t.w.count;
        if (pixels < kSumPixels) continue;
        add_up(used, sums, totals);
        pixels = 0;
      }
    add_up(used, sums, totals);
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
