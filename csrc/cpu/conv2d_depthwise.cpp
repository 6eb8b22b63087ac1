// Convolution in many small groups: vectors along the channels of channels_last tensors. (One filter per channel has
// files of its own: conv2d_depthwise_channels_last.cpp, conv2d_depthwise_contiguous.cpp and conv2d_depthwise_small.cpp. The
// row `depthwise` of the table is made of the four.)
//
//   y[p, k]          = bias[k] + sum over (tap, j) of x[pixel of (p, tap), (group of k) + j] * w[k, tap, j]
//   gw[k, tap, j]    =           sum over p        of x[pixel of (p, tap), (group of k) + j] * gy[p, k]
//
// Where a group has fewer channels than half a vector, a tile of pixels x channels of one group would leave most lanes
// empty. Here a lane is an output channel k, and a vector covers as many whole groups as fit, with their inputs: those
// are one vector too, from which lane k picks channel j of its group.
// One tile makes all three passes (the gradient of the input is forward with other taps, ../correlation.h): its rows
// are pixels and its steps (tap, j), or its rows are taps and its steps pixels. Inputs are read where they stand.
//
// A task is a block of pixels x a block of channels (forward, grad_input), or some taps of a panel of channels
// (grad_weight, whose sums are made in blocks of pixels that are then added in order). Zeros of the border are
// multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would skip it. Refuses the
// contiguous layout, groups of more than half a vector, and filters of more than 512 weights.
#include "conv2d_depthwise.h"

#include "channels_last.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kMostVectors = kTileRows == 8 ? 4 : 3;
constexpr int kPixelRows = 4, kTapRows = 3;  // of a tile
constexpr int64_t kBlockVectors = 12;        // channels of a task; any panel's size divides it
constexpr int64_t kMostSteps = 512;          // weights of a filter
constexpr int64_t kMostPixels = 256;         // of a task
constexpr int64_t kGoodTasks = 32;
constexpr int64_t kSumPixels = 128;  // of a block in grad_weight

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
  int64_t groups, in, out, vectors;  // of a vector: groups, inputs, outputs; of all groups: vectors
  int64_t channels, rows;
  explicit Packing(const Conv2dGeometry& g, const Windows& t)
      : groups(kLanes<T> / larger(t.channels, t.rows)),
        in(groups * t.channels),
        out(groups * t.rows),
        vectors(ceil_div(g.groups, groups)),
        channels(t.channels),
        rows(t.rows) {}
  bool picked() const { return channels > 1 || rows > 1; }
  /// Where lane k finds channel j of its group.
  Vec<Places<T>> places(int64_t j) const {
    Vec<Places<T>> p{};
    for (int64_t lane = 0; lane < out; ++lane) p[lane] = lane / rows * channels + j;
    return p;
  }
};

/// What all rows of a tile share: for step r, the vectors at b + r*step + v*next, and the places to pick from.
template <class S>
struct Steps {
  int64_t count, in;  // steps; inputs of a vector
  const Vec<Places<Sum<S>>>* places;
  int64_t next_places;
  const S* b;
  int64_t step, next;
  int64_t last_in, last_b;  // numbers that a tile of one vector may read
};

/// sums[m][V vectors] (+)= sum over steps of (what is picked from) the vectors at a[r][m] * b[r].
template <class S, int M, int V, bool picked>
void lanes_tile(const Steps<S>& steps, const S* const* a, int64_t channel, Sum<S>* sums, bool add) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[M][V]{};
  const S* b = steps.b;
  const Vec<Places<T>>* places = steps.places;
  for (int64_t r = 0; r < steps.count; ++r, a += M, b += steps.step) {
    Vec<T> shared[V];
    for (int v = 0; v < V; ++v) shared[v] = V == 1 ? load_first(b, steps.last_b) : load(b + v * steps.next);
    for (int m = 0; m < M; ++m) {
      const S* x = a[m] + channel;
      for (int v = 0; v < V; ++v) {
        Vec<T> seen = V == 1 ? load_first(x, steps.last_in) : load(x + v * steps.in);
        if constexpr (picked) seen = pick<T>(seen, *places);
        sum[m][v] = multiply_add(seen, shared[v], sum[m][v]);
      }
    }
    if constexpr (picked) places += steps.next_places;
  }
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = sums + (m * V + v) * L;
      store(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
}

template <class S, int M>
auto lanes_tile_of(int64_t vectors, bool picked) {
  if (picked)
    return vectors == 1   ? lanes_tile<S, M, 1, true>
           : vectors == 2 ? lanes_tile<S, M, 2, true>
           : vectors == 3 ? lanes_tile<S, M, 3, true>
                          : lanes_tile<S, M, kMostVectors, true>;
  return vectors == 1   ? lanes_tile<S, M, 1, false>
         : vectors == 2 ? lanes_tile<S, M, 2, false>
         : vectors == 3 ? lanes_tile<S, M, 3, false>
                        : lanes_tile<S, M, kMostVectors, false>;
}

/// Vectors of the panel that begins with number `vector`: only a panel of one may reach beyond the last channel.
template <class T>
int64_t panel_vectors(const Packing<T>& pack, int64_t vector, int64_t end, int64_t channels, int64_t out_channels) {
  const int64_t left = end - vector;
  for (int64_t vectors = ceil_div(left, ceil_div(left, kMostVectors)); vectors > 1; --vectors) {
    const int64_t last = vector + vectors - 1;
    if (last * pack.in + kLanes<T> <= channels && last * pack.out + kLanes<T> <= out_channels) return vectors;
  }
  return 1;
}

/// Where the taps of a window lie, counted from its first.
struct Taps {
  int64_t count, th[kMostSteps], tw[kMostSteps], offset[kMostSteps];
  explicit Taps(const Windows& t) : count(0) {
    for (int64_t h = 0; h < t.h.taps; ++h)
      for (int64_t w = 0; w < t.w.taps; ++w, ++count) {
        th[count] = h;
        tw[count] = w;
        offset[count] = tap_offset(t, h, w);
      }
  }
};

/// a[tap*step] = what a pixel sees through tap number tap0 + tap from `channel` on: zeros, where there is no pixel.
template <class S>
void find_taps(const Windows& t, const Taps& taps, const Pixel<S>& p, int64_t tap0, int64_t count, int64_t channel,
               const S* zeros, const S** a, int64_t step) {
  if (p.inside) {
    const S* from = p.image + p.at + channel;
    for (int64_t tap = 0; tap < count; ++tap) a[tap * step] = from + taps.offset[tap0 + tap];
  } else {
    for (int64_t tap = 0; tap < count; ++tap) {
      const S* from = seen(t, p, taps.th[tap0 + tap], taps.tw[tap0 + tap]);
      a[tap * step] = from ? from + channel : zeros;
    }
  }
}

template <class T>
constexpr int64_t kZeros = (kBlockVectors + 1) * kLanes<T>;

template <class S>
const S* make_zeros(Sum<S>* workspace) {
  for (int64_t i = 0; i < kZeros<Sum<S>>; ++i) workspace[i] = 0;
  return reinterpret_cast<const S*>(workspace);
}

// ---- forward and grad_input ----

/// Tasks are numbered (class, block of channels, block of pixels).
template <class T>
struct Tasks {
  int64_t classes, channels, blocks, pixels, total;
  Tasks(const Conv2dGeometry& g, Pass pass) : classes(cpu::CNNOPS_ISA::classes(g, pass)) {
    const Windows t = make_windows(g, pass, 0, 0);  // class 0 has the most outputs
    const int64_t most = g.n * t.pixels();
    channels = ceil_div(Packing<T>(g, t).vectors, kBlockVectors);
    pixels = smaller(larger(most * classes * channels / kGoodTasks, 4 * kPixelRows), kMostPixels);
    blocks = ceil_div(most, pixels);
    total = classes * channels * blocks;
  }
};

/// to[step][V vectors] = the weights of a panel.
template <class S>
void pack_weights(const Conv2dGeometry& g, const Windows& t, const Packing<Sum<S>>& pack, const S* weight,
                  int64_t vector, int64_t vectors, S* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t group_weight = g.k / g.groups * g.kernel[0] * g.kernel[1] * (g.c / g.groups);
  for (int64_t i = 0; i < vectors * L; ++i) {
    const int64_t lane = i % L, group = (vector + i / L) * pack.groups + lane / t.rows;
    const bool used = lane < pack.out && group < g.groups;
    const S* from = weight + (used ? group * group_weight + lane % t.rows * t.weight_row : 0);
    S* at = to + i;
    for (int64_t th = 0; th < t.h.taps; ++th)
      for (int64_t tw = 0; tw < t.w.taps; ++tw)
        for (int64_t j = 0; j < t.channels; ++j, at += vectors * L)
          *at = used ? from[t.weight_of(th, tw) + j * t.weight_channel] : S{};
  }
}

template <class T>
constexpr int64_t kWorkspace = kZeros<T> + kBlockVectors * kLanes<T> * kMostSteps;

template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Tasks<T> tasks(g, pass);
  const S* zeros = make_zeros<S>(workspace);
  S* const weights = reinterpret_cast<S*>(workspace + kZeros<T>);
  for (int64_t task = begin; task < end; ++task) {
    const Windows t = make_windows(g, pass, 0, task / tasks.blocks / tasks.channels);
    const Packing<T> pack(g, t);
    const int64_t vector0 = task / tasks.blocks % tasks.channels * kBlockVectors;
    const int64_t last = smaller(vector0 + kBlockVectors, pack.vectors);
    const Taps taps(t);
    const int64_t steps = taps.count * t.channels;
    const auto each_panel = [&](auto f) {
      for (int64_t vector = vector0, vectors; vector < last; vector += vectors) {
        vectors = panel_vectors(pack, vector, last, t.in_channels, t.out_channels);
        f(vector, vectors, weights + (vector - vector0) * L * steps);
      }
    };
    if (task == begin || task % tasks.blocks == 0)
      each_panel([&](int64_t vector, int64_t vectors, S* to) { pack_weights(g, t, pack, o.b, vector, vectors, to); });

    const int64_t first = task % tasks.blocks * tasks.pixels;
    const int64_t count = smaller(tasks.pixels, g.n * t.pixels() - first);
    if (count <= 0) continue;  // a smaller class than class 0
    Pixel<S> pixels[kMostPixels];
    find_pixels(t, o.a, first, count, pixels);
    Vec<Places<T>> places[kMostSteps];
    for (int64_t i = 0; i < steps; ++i) places[i] = i < t.channels ? pack.places(i) : places[i - t.channels];

    for (int64_t p = 0; p < count; p += kPixelRows) {
      const S* a[kMostSteps * kPixelRows];
      for (int64_t m = 0; m < kPixelRows; ++m)
        for (int64_t j = 0; j < t.channels; ++j)
          find_taps(t, taps, pixels[smaller(p + m, count - 1)], 0, taps.count, vector0 * pack.in, zeros,
                    a + j * kPixelRows + m, t.channels * kPixelRows);
      each_panel([&](int64_t vector, int64_t vectors, const S* b) {
        const int64_t in = smaller(L, t.in_channels - vector * pack.in);
        const Steps<S> shared{steps, pack.in, places, 1, b, vectors * L, L, in, L};
        T sums[kPixelRows * kMostVectors * L];
        lanes_tile_of<S, kPixelRows>(vectors, pack.picked())(shared, a, (vector - vector0) * pack.in, sums, false);
        for (int64_t m = 0; m < smaller(kPixelRows, count - p); ++m)
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t k = (vector + v) * pack.out, lanes = smaller(pack.out, t.out_channels - k);
            const Vec<T> bias = o.bias ? load_first(o.bias + k, lanes) : Vec<T>{};
            S* out = o.out + pixels[p + m].out * t.out_channels + k;
            store_first(out, load(sums + (m * vectors + v) * L) + bias, lanes);
          }
      });
    }
  }
}

// ---- grad_weight ----

template <class T>
constexpr int64_t kWeightWorkspace = kZeros<T> + kLanes<T> / 2 * kMostVectors * kTapRows * kLanes<T>;

/// Tasks are numbered (panel of channels, kTapRows taps).
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Windows t = make_windows(g, Pass::grad_weight, 0, 0);
  const Packing<T> pack(g, t);
  const S* zeros = make_zeros<S>(workspace);
  T* const totals = workspace + kZeros<T>;
  const Taps taps(t);
  const int64_t tiles = ceil_div(taps.count, kTapRows), all = g.n * t.pixels();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t tap0 = task % tiles * kTapRows, vector0 = task / tiles * kMostVectors;
    const int64_t tap_count = smaller(kTapRows, taps.count - tap0);
    const int64_t last = smaller(vector0 + kMostVectors, pack.vectors);
    const auto each_panel = [&](auto f) {
      for (int64_t vector = vector0, vectors; vector < last; vector += vectors) {
        vectors = panel_vectors(pack, vector, last, t.in_channels, t.out_channels);
        for (int64_t j = 0; j < t.channels; ++j)
          f(vector, vectors, j, totals + (j * kMostVectors + vector - vector0) * kTapRows * L);
      }
    };
    for (int64_t p0 = 0; p0 < all; p0 += kSumPixels) {
      const int64_t count = smaller(kSumPixels, all - p0);
      Pixel<S> pixels[kSumPixels];
      find_pixels(t, o.b, p0, count, pixels);
      const S* a[kSumPixels * kTapRows];
      for (int64_t p = 0; p < count; ++p) {
        const S** to = a + p * kTapRows;
        find_taps(t, taps, pixels[p], tap0, tap_count, vector0 * pack.in, zeros, to, 1);
        for (int64_t m = tap_count; m < kTapRows; ++m) to[m] = to[0];
      }
      each_panel([&](int64_t vector, int64_t vectors, int64_t j, T* sums) {
        const int64_t in = smaller(L, g.c - vector * pack.in), out = smaller(L, g.k - vector * pack.out);
        const Vec<Places<T>> places = pack.places(j);
        const Steps<S> shared{count, pack.in, &places, 0, o.a + p0 * g.k + vector * pack.out, g.k, pack.out, in, out};
        lanes_tile_of<S, kTapRows>(vectors, pack.picked())(shared, a, (vector - vector0) * pack.in, sums, p0 > 0);
      });
    }
    each_panel([&](int64_t vector, int64_t vectors, int64_t j, const T* sums) {
      for (int64_t m = 0; m < tap_count; ++m)
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t lane = 0; lane < pack.out; ++lane) {
            const int64_t k = (vector + v) * pack.out + lane;
            if (k < g.k)
              o.out[(k * taps.count + tap0 + m) * t.channels + j] = rounded<S>(sums[(m * vectors + v) * L + lane]);
          }
    });
  }
}

template <class T>
int64_t weight_tasks(const Conv2dGeometry& g) {
  const Packing<T> pack(g, make_windows(g, Pass::grad_weight, 0, 0));
  return ceil_div(pack.vectors, kMostVectors) * ceil_div(g.kernel[0] * g.kernel[1], kTapRows);
}

// ---- the row of the table ----

/// What is accepted forwards is accepted backwards.
template <class T>
const char* refuses(const Conv2dGeometry& g, Pass) {
  const int64_t widest = larger(g.c, g.k) / g.groups;
  if (g.groups == 1 || 2 * widest > kLanes<T>) return "its vectors hold two groups at least, and these are wider";
  if (widest * g.kernel[0] * g.kernel[1] > kMostSteps) return "a filter's weights pass its buffer of 512";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) { return Tasks<Sum<S>>(g, pass).total; },
          [](const Conv2dGeometry&) { return kWorkspace<Sum<S>>; }, correlate<S, pass>};
}

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> small_groups() {
  return {"depthwise",
          "",
          refuses<Sum<S>>,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          {weight_tasks<Sum<S>>, [](const Conv2dGeometry&) { return kWeightWorkspace<Sum<S>>; }, grad_weight<S>}};
}

/// Four files, and one row.
template <class S>
struct Depthwise {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static const Row& of(const Conv2dGeometry& g, Pass pass) {
    static const Row contiguous = depthwise_contiguous<S>(), small = depthwise_small<S>(),
                     channels_last = depthwise_channels_last<S>(), groups = small_groups<S>();
    if (g.layout == Layout::contiguous)
      return contiguous.refuses(g, pass) || small.refuses(g, pass) ? contiguous : small;
    return g.c == g.groups && g.k == g.groups ? channels_last : groups;
  }

  template <Pass pass>
  static Conv2dRun<S> run() {
    return {[](const Conv2dGeometry& g) { return of(g, pass).run(pass).tasks(g); },
            [](const Conv2dGeometry& g) { return of(g, pass).run(pass).workspace(g); },
            [](const Conv2dGeometry& g, const Conv2dOperands<S>& operands, Sum<S>* workspace, int64_t begin,
               int64_t end) { of(g, pass).run(pass).run(g, operands, workspace, begin, end); }};
  }
};

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_depthwise() {
  return {"depthwise",
          "one filter per channel, or few; in channels_last also many small groups",
          [](const Conv2dGeometry& g, Pass pass) { return Depthwise<S>::of(g, pass).refuses(g, pass); },
          Depthwise<S>::template run<Pass::forward>(),
          Depthwise<S>::template run<Pass::grad_input>(),
          Depthwise<S>::template run<Pass::grad_weight>()};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_depthwise();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_depthwise();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_depthwise();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_depthwise();

}  // namespace cnnops::cpu::CNNOPS_ISA
