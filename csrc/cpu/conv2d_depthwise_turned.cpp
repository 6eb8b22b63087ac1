// Convolution in small groups, of contiguous tensors.
//
// Vectors along a row would serve groups of few channels badly: a loaded vector meets few weights, and images are often
// narrower than a vector or two. So the planes of as many groups as a vector holds are turned round, in strips of rows
// that stay in the second-level cache: there their channels stand side by side, as in channels_last, and are computed
// with as there (conv2d_depthwise_groups.cpp). A number is turned once, in a few instructions for each vector, and then
// serves all taps and all channels of its group. The result is turned back.
//
// A task is a strip of one image for one vector of groups (forward, grad_input), or a vector of groups (grad_weight:
// its sums are made over tiles, strips and images in order). Zeros of the border are multiplied: an infinite or NaN
// weight or gradient gives NaN there, where plain loops would skip it. Refuses channels_last, groups of more than half
// a vector, fewer groups than a vector holds, other borders of images that are cut into strips, rows and filters that
// overflow the buffers, and the gradient of the weight where registers are few (AVX2).
#include "turned_strips.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostWeights = 512;  // of a filter

/// Tasks are numbered (vector of groups, n, strip).
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  const TurnedStrips<T> strips(g, pass, kTileH);
  const Memory<S> memory(strips, workspace);
  for (int64_t task = begin, packed = -1; task < end; ++task) {
    const int64_t v = task / strips.count / g.n, n = task / strips.count % g.n, group = v * pack.groups;
    const int64_t groups = smaller(pack.groups, g.groups - group), k = group * pack.rows;
    if (packed != v) {
      T* weights = memory.rest;
      for (int64_t cls = 0; cls < classes(g, pass); ++cls) {
        const Windows t = turned_windows<T>(g, pass, cls);
        pack_weights<pass, T, S>(t, pack, o.b + group * group_weight(g), group_weight(g), groups, weights);
        weights += t.h.taps * t.w.taps * t.channels * L;
      }
      for (int64_t lane = 0; lane < L; ++lane)
        memory.bias[lane] = o.bias && lane < groups * pack.rows ? o.bias[k + lane] : S{};
      packed = v;
    }
    const TurnedStrip s = make_strip(g, pass, strips, task % strips.count);
    gather_strip<pass>(g, s, pack, o.a, n, v, v + 1, 0, memory.in);
    const T* weights = memory.rest;
    for (int64_t cls = 0; cls < classes(s.g, pass); ++cls) {
      const Windows t = turned_windows<T>(s.g, pass, cls);
      const int64_t rows = ceil_div(t.h.count, kTileH);
      correlate_rows<S>(t, pack, {0, 1, memory.in, memory.bias, weights, memory.out, memory.zeros, memory.bias + L},
                        false, rows, 0, rows);
      weights += t.h.taps * t.w.taps * t.channels * L;
    }
    scatter_strip<pass>(g, s, pack, memory.out, n, v, v + 1, 0, o.out);
  }
}

template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const int64_t channels = (pass == Pass::forward ? g.c : g.k) / g.groups;
  return Memory<T>::size(TurnedStrips<T>(g, pass, kTileH)) + g.kernel[0] * g.kernel[1] * channels * kLanes<T>;
}

/// Sums and totals of [j][tap][lane].
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Packing<T> pack(g, make_windows(g, Pass::grad_weight, 0, 0));
  const TurnedStrips<T> strips(g, Pass::grad_weight, kTileH);
  const Memory<S> memory(strips, workspace);
  const int64_t out_plane = g.out[0] * g.out[1];
  const int64_t taps = g.kernel[0] * g.kernel[1], used = pack.channels * taps * L;
  T *const sums = memory.rest, *const totals = sums + used;
  for (int64_t v = begin; v < end; ++v) {
    const int64_t group = v * pack.groups, groups = smaller(pack.groups, g.groups - group);
    const int64_t k = group * pack.rows;
    for (int64_t i = 0; i < used; ++i) sums[i] = totals[i] = 0;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t number = 0; number < strips.count; ++number) {
        const TurnedStrip s = make_strip(g, Pass::grad_weight, strips, number);
        gather_strip<Pass::grad_weight>(g, s, pack, o.b, n, v, v + 1, 0, memory.in);
        turn(o.a + (n * g.k + k) * out_plane + s.out * g.out[1], out_plane, s.g.out[0] * g.out[1], groups * pack.rows,
             L, memory.out);
        const Windows t = turned_windows<T>(s.g, Pass::grad_weight, 0);
        Tiles<S> tiles(t, is_unrolled(t));
        tiles.in = memory.in;
        tiles.zeros = memory.zeros;
        tiles.read_ahead(pack.in);
        for (int64_t i0 = 0; i0 < t.h.count; i0 += kTileH)
          tiles.each(0, i0, [&] { add_tile(tiles, pack, memory.out, 0, 0, pack.channels, sums); });
        add_up(used, sums, totals);
      }
    for (int64_t j = 0; j < pack.channels; ++j)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t lane = 0; lane < groups * pack.rows; ++lane)
          o.out[((k + lane) * pack.channels + j) * taps + tap] = rounded<S>(totals[(j * taps + tap) * L + lane]);
  }
}

template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  return Memory<T>::size(TurnedStrips<T>(g, Pass::grad_weight, kTileH)) +
         2 * g.c / g.groups * g.kernel[0] * g.kernel[1] * kLanes<T>;
}

template <class T>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  const int64_t widest = larger(g.c, g.k) / g.groups;
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  if (g.groups == 1 || 2 * widest > kLanes<T>) return "its vectors hold two groups at least, and these are wider";
  if (pass == Pass::grad_weight && kTileRows < 8) return "a tile's gradients and its sums want more registers";
  if (g.groups < kLanes<T> / widest) return "it wants as many groups as its vectors hold";
  if (widest * g.kernel[0] * g.kernel[1] > kMostWeights) return "a filter's weights pass its buffer of 512";
  const TurnedStrips<T> strips(g, pass, kTileH);
  if (g.border != Border::zeros && strips.count > 1) return "the strips of its images have borders of zeros only";
  if (larger(strips.in, strips.out) > kMostNumbers)
    return "the rows under two rows of results pass its buffer of 2^18 numbers";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) {
            return Packing<T>(g, make_windows(g, pass, 0, 0)).vectors * g.n * TurnedStrips<T>(g, pass, kTileH).count;
          },
          [](const Conv2dGeometry& g) { return correlation_workspace<T>(g, pass); }, correlate<S, pass>};
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_turned() {
  using T = Sum<S>;
  return {"depthwise",
          "",
          refuses<T>,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          {[](const Conv2dGeometry& g) { return Packing<T>(g, make_windows(g, Pass::grad_weight, 0, 0)).vectors; },
           weight_workspace<T>, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_turned();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_turned();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_turned();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_turned();

}  // namespace cnnops::cpu::CNNOPS_ISA
