// Convolution in small groups, of contiguous tensors.
//
// Vectors along a row would serve groups of few channels badly: a loaded vector meets few weights, and images are often
// narrower than a vector or two. So the planes of as many groups as a vector holds are turned round, in strips of rows
// that stay in the second-level cache: there their channels stand side by side, as in channels_last, and are computed
// with as there (conv2d_depthwise_groups.cpp). A number is turned once, in a few instructions for each vector, and then
// serves all taps and all channels of its group. The result is turned back.
//
// A task is a strip of one image for one vector of groups (forward, grad_input), or a vector of groups (grad_weight: its
// sums are made over tiles, strips and images in order). Zeros of the border are multiplied: an infinite or NaN weight or
// gradient gives NaN there, where plain loops would skip it. Refuses channels_last, one channel per group and more than
// half a vector, fewer groups than a vector holds, borders other than zeros, and rows that overflow the buffers.
#include "conv2d_depthwise.h"
#include "conv2d_depthwise_groups.h"
#include "turn.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kGoodNumbers = 1 << 14, kMostNumbers = 1 << 18;  // of a strip's inputs
constexpr int64_t kMostWeights = 512;                              // of a filter

/// How an image is cut into strips: of rows of its outputs y, or in grad_input of gx.
template <class T>
struct Strips {
  int64_t height, rows, count;
  int64_t in, out;  // numbers of a strip's inputs (y's or x's rows that are read), and of its outputs

  Strips(const Conv2dGeometry& g, Pass pass) {
    constexpr int64_t L = kLanes<T>;
    const bool forward = pass != Pass::grad_input;
    const int64_t reach = (g.kernel[0] - 1) * g.dilation[0], stride = g.stride[0];
    const int64_t row = (forward ? g.in : g.out)[1] * L, together = forward ? kTileH : kTileH * stride;
    height = (forward ? g.out : g.in)[0];
    const auto seen = [&](int64_t rows) {
      return forward ? (rows - 1) * stride + reach + 1 : (rows - 1 + reach) / stride + 1;
    };
    rows = together;
    while (rows < height && seen(rows + together) * row <= kGoodNumbers) rows += together;
    rows = round_up(ceil_div(height, larger(ceil_div(height, rows), 1)), together);
    count = ceil_div(height, larger(rows, 1));
    in = seen(rows) * row;
    out = rows * (forward ? g.out : g.in)[1] * L;
  }
};

/// A strip as an image of its own: rows [in, in + size of `a`) of what is read, rows [out, ...) of the result.
struct Strip {
  Conv2dGeometry g;
  int64_t in, out;
};

template <class T>
Strip make_strip(const Conv2dGeometry& g, Pass pass, const Strips<T>& strips, int64_t number) {
  Strip s{g, 0, number * strips.rows};
  const int64_t reach = (g.kernel[0] - 1) * g.dilation[0], stride = g.stride[0], padding = g.padding[0];
  const int64_t rows = smaller(strips.rows, strips.height - s.out);
  s.g.n = 1;
  if (pass == Pass::grad_input) {
    s.in = smaller(larger(ceil_div(s.out + padding - reach, stride), 0), g.out[0]);
    s.g.out[0] = larger(smaller((s.out + rows - 1 + padding) / stride + 1, g.out[0]) - s.in, 0);
    s.g.in[0] = rows;
    s.g.padding[0] = padding + s.out - s.in * stride;
  } else {
    const int64_t first = s.out * stride - padding;
    s.in = smaller(larger(first, 0), g.in[0]);
    s.g.in[0] = larger(smaller(first + (rows - 1) * stride + reach + 1, g.in[0]) - s.in, 0);
    s.g.out[0] = rows;
    s.g.padding[0] = s.in - first;
  }
  return s;
}

/// Windows of images whose pixels have a vector of channels, and whose weights are a contiguous tensor's.
template <class T>
Windows turned_windows(const Conv2dGeometry& g, Pass pass, int64_t cls) {
  Windows t = make_windows(g, pass, 0, cls);
  const int64_t taps = g.kernel[0] * g.kernel[1];
  t.in_channels = t.out_channels = kLanes<T>;
  t.tap_weight = 1;
  (pass == Pass::grad_input ? t.weight_row : t.weight_channel) = taps;
  return t;
}

int64_t group_weight(const Conv2dGeometry& g) { return g.k / g.groups * g.kernel[0] * g.kernel[1] * (g.c / g.groups); }

/// Where a task's scratch memory lies. Strips are kept as stored numbers.
template <class S>
struct Memory {
  const S* zeros;
  S *in, *out, *bias;
  Sum<S>* rest;

  Memory(const Strips<Sum<S>>& strips, Sum<S>* memory) : zeros(make_zeros<S>(memory)) {
    in = reinterpret_cast<S*>(memory + kZeros<Sum<S>>);
    out = in + round_up(strips.in, 64);
    bias = out + round_up(strips.out, 64);  // and after it a place for outputs that do not exist
    rest = memory + size(strips);
  }
  static int64_t size(const Strips<Sum<S>>& strips) {
    return kZeros<Sum<S>> + round_up(strips.in, 64) + round_up(strips.out, 64) + 2 * kLanes<Sum<S>>;
  }
};

/// Tasks are numbered (vector of groups, n, strip).
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  const Strips<T> strips(g, pass);
  const Memory<S> memory(strips, workspace);
  const int64_t* in_size = pass == Pass::forward ? g.in : g.out;
  const int64_t* out_size = pass == Pass::forward ? g.out : g.in;
  const int64_t in_plane = in_size[0] * in_size[1], out_plane = out_size[0] * out_size[1];
  for (int64_t task = begin, packed = -1; task < end; ++task) {
    const int64_t v = task / strips.count / g.n, n = task / strips.count % g.n, group = v * pack.groups;
    const int64_t groups = smaller(pack.groups, g.groups - group), c = group * pack.channels, k = group * pack.rows;
    if (packed != v) {
      T* weights = memory.rest;
      for (int64_t cls = 0; cls < classes(g, pass); ++cls) {
        const Windows t = turned_windows<T>(g, pass, cls);
        pack_weights<T, S>(t, pack, o.b + group * group_weight(g), group_weight(g), 1, groups, weights);
        weights += t.h.taps * t.w.taps * t.channels * L;
      }
      for (int64_t lane = 0; lane < L; ++lane)
        memory.bias[lane] = o.bias && lane < groups * pack.rows ? o.bias[k + lane] : S{};
      packed = v;
    }
    const Strip s = make_strip(g, pass, strips, task % strips.count);
    const int64_t in_rows = (pass == Pass::forward ? s.g.in : s.g.out)[0];
    const int64_t out_rows = (pass == Pass::forward ? s.g.out : s.g.in)[0];
    turn(o.a + (n * g.groups * pack.channels + c) * in_plane + s.in * in_size[1], in_plane, in_rows * in_size[1],
         groups * pack.channels, L, memory.in);
    const T* weights = memory.rest;
    for (int64_t cls = 0; cls < classes(s.g, pass); ++cls) {
      const Windows t = turned_windows<T>(s.g, pass, cls);
      const int64_t rows = ceil_div(t.h.count, kTileH);
      correlate_rows<S>(t, pack, {0, 1, memory.in, memory.bias, weights, memory.out, memory.zeros, memory.bias + L},
                        rows, 0, rows);
      weights += t.h.taps * t.w.taps * t.channels * L;
    }
    turn_back(memory.out, L, out_rows * out_size[1], groups * pack.rows,
              o.out + (n * g.groups * pack.rows + k) * out_plane + s.out * out_size[1], out_plane);
  }
}

template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const int64_t channels = (pass == Pass::forward ? g.c : g.k) / g.groups;
  return Memory<T>::size(Strips<T>(g, pass)) + g.kernel[0] * g.kernel[1] * channels * kLanes<T>;
}

/// Sums and totals of [j][tap][lane].
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Packing<T> pack(g, make_windows(g, Pass::grad_weight, 0, 0));
  const Strips<T> strips(g, Pass::grad_weight);
  const Memory<S> memory(strips, workspace);
  const int64_t in_plane = g.in[0] * g.in[1], out_plane = g.out[0] * g.out[1];
  const int64_t taps = g.kernel[0] * g.kernel[1], used = pack.channels * taps * L;
  T *const sums = memory.rest, *const totals = sums + used;
  for (int64_t v = begin; v < end; ++v) {
    const int64_t group = v * pack.groups, groups = smaller(pack.groups, g.groups - group);
    const int64_t c = group * pack.channels, k = group * pack.rows;
    for (int64_t i = 0; i < used; ++i) sums[i] = totals[i] = 0;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t number = 0; number < strips.count; ++number) {
        const Strip s = make_strip(g, Pass::grad_weight, strips, number);
        turn(o.b + (n * g.c + c) * in_plane + s.in * g.in[1], in_plane, s.g.in[0] * g.in[1], groups * pack.channels, L,
             memory.in);
        turn(o.a + (n * g.k + k) * out_plane + s.out * g.out[1], out_plane, s.g.out[0] * g.out[1], groups * pack.rows,
             L, memory.out);
        const Windows t = turned_windows<T>(s.g, Pass::grad_weight, 0);
        Tiles<S> tiles(t, is_unrolled(t));
        tiles.in = memory.in;
        tiles.zeros = memory.zeros;
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
  return Memory<T>::size(Strips<T>(g, Pass::grad_weight)) + 2 * g.c / g.groups * g.kernel[0] * g.kernel[1] * kLanes<T>;
}

template <class T>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  const int64_t widest = larger(g.c, g.k) / g.groups;
  const Strips<T> strips(g, pass);
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  if (g.c == g.groups && g.k == g.groups) return "its groups have several channels";
  if (2 * widest > kLanes<T>) return "its vectors hold two groups at least, and these are wider";
  if (g.groups < kLanes<T> / widest) return "it wants as many groups as its vectors hold";
  if (widest * g.kernel[0] * g.kernel[1] > kMostWeights) return "a filter's weights pass its buffer of 512";
  if (g.border != Border::zeros) return "it knows no border but zeros";
  if (larger(strips.in, strips.out) > kMostNumbers)
    return "the rows under two rows of results pass its buffer of 2^18 numbers";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) {
            return Packing<T>(g, make_windows(g, pass, 0, 0)).vectors * g.n * Strips<T>(g, pass).count;
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
