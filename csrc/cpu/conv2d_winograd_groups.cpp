// Winograd's convolution, F(4x4, 3x3), in groups that fill a vector, or half of one.
//
// The transforms are those of winograd_points.h, and an output is made of products at 36 points as there. What differs is how
// numbers lie in vectors: as in conv2d_depthwise_groups.cpp, a vector covers as many whole groups as fit, and lane k picks
// channel j of its group; if there is one group to a vector, it is a number that is broadcast.
//
//   v[i] = transform of a tile's 6x6 vectors of inputs        u[i][j] = transform of the filters' weights of channel j
//   s[i] = sum over j of (what is picked of v[i] for j) * u[i][j]
//   y of the tile = transform of its 36 vectors s
//
// So a tile's transforms are of one vector of channels, however many groups there are, and what stands between them are
// few products. Images are cut into strips of rows, of a few vectors of channels, that stay in the second-level cache:
// contiguous ones are turned round (turned_strips.h), of channels_last ones it is a copy. There tiles are computed 16 at a
// time, s in the place of v. The gradient of the input is the same with mirrored taps and exchanged channels.
//
// A task is a strip of one image for a block of vectors. A thread transforms the filters that it meets, and keeps them.
// An output's rounding depends on all 6x6 inputs of its tile, also on those that it does not see. A NaN or infinity among
// them makes all outputs of the tile NaN. Refuses all but float32, all but 3x3 kernels of stride and dilation 1, groups of
// a quarter of a vector and less, in channels_last of half a vector, for which `depthwise` is as fast, groups of more than
// a vector, small images, and layers whose filters pass its buffer. The gradient of the weight is in
// conv2d_winograd_groups_grad_weight.cpp: that takes groups of 5 to 32 channels.
#include "winograd_groups.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kTogether = kTileRows == 8 ? 16 : 8;  // tiles
constexpr int64_t kMostFilters = 1 << 20;               // numbers
constexpr int64_t kFewestOutputs = 6;
constexpr int64_t kSmallImage = 1 << 17;  // numbers, of all channels

/// The tiles of a strip, whose pixels are vectors.
template <class T>
struct TiledStrip {
  const Windows& t;
  const Packing<T>& pack;
  const T *in, *bias, *filters;
  T* out;
};

/// filters[point][j][lane] from weights[j][tap][lane].
template <class T>
void transform_filters(int64_t channels, const T* weights, T* filters) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t j = 0; j < channels; ++j, weights += 9 * L)
    transform<Points<kPatch, 3>, Points<kPatch, 3>, T>(
        [&](int h, int w) { return load(weights + (h * 3 + w) * L); },
        [&](int h, int w, Vec<T> x) { store(filters + ((h * kPatch + w) * channels + j) * L, x); });
}

/// In place: points[i][m] = sum over j of what is picked of points[i][m] * filters[i][j], for M tiles.
template <class T, int M, bool one_group>
void multiply(const Packing<T>& pack, const T* filters, T* points) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < kProducts; ++i, points += kTogether * L) {
    Vec<T> sum[M]{};
    for (int64_t j = 0; j < pack.channels; ++j, filters += L) {
      const Vec<T> filter = load(filters);
      const Vec<Places<T>> places = pack.places[j];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        sum[m] = multiply_add(one_group ? broadcast(points[m * L + j]) : pick<T>(load(points + m * L), places), filter,
                              sum[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store(points + m * L, sum[m]);
  }
}

template <class T>
void transform_outputs(const TiledStrip<T>& strip, int64_t h, int64_t w, const T* points) {
  constexpr int64_t L = kLanes<T>;
  const Windows& t = strip.t;
  const int64_t row = t.out_width * L;
  const int64_t height = smaller(kOutputs, t.h.count - h), width = smaller(kOutputs, t.w.count - w);
  const Vec<T> bias = load(strip.bias);
  T* to = strip.out + h * row + w * L;
  const auto get = [&](int i, int j) { return load(points + (i * kPatch + j) * kTogether * L); };
  transform<Numbers<kPatch, kOutputs>, Numbers<kPatch, kOutputs>, T>(get, [&](int i, int j, Vec<T> y) {
    if (i < height && j < width) store(to + i * row + j * L, y + bias);
  });
}

/// Tiles [first, last) of all strip. `points` are 36 * kTogether vectors.
template <class T>
void correlate_tiles(const TiledStrip<T>& strip, T* points) {
  constexpr int64_t L = kLanes<T>;
  int64_t first = 0;
  const int64_t across = ceil_div(strip.t.w.count, kOutputs), last = ceil_div(strip.t.h.count, kOutputs) * across;
  const auto each = [&](int64_t count, auto f) {
    for (int64_t m = 0; m < count; ++m) {
      const int64_t tile = first + m;
      f(strip, tile / across * kOutputs, tile % across * kOutputs, points + m * L);
    }
  };
  const bool one = strip.pack.groups == 1;
  for (; first < last; first += kTogether) {
    const int64_t count = smaller(kTogether, last - first);
    each(count, [](const TiledStrip<T>& strip, int64_t h, int64_t w, T* to) {
      transform_inputs(strip.t, strip.in, h, w, kTogether * L, to);
    });
    const auto multiply_some = [&](auto M) {
      (one ? multiply<T, M, true> : multiply<T, M, false>)(strip.pack, strip.filters, points);
    };
    if (count > kTogether / 2) {
      multiply_some(std::integral_constant<int, int(kTogether)>());
    } else if (count > kTogether / 4) {
      multiply_some(std::integral_constant<int, int(kTogether) / 2>());
    } else {
      multiply_some(std::integral_constant<int, int(kTogether) / 4>());
    }
    each(count, transform_outputs<T>);
  }
}

/// Tasks are numbered (block of vectors, n, strip): so a thread makes the filters of its own blocks only, and a block's stay
/// in the second-level cache. But large images in channels_last are walked in their own order: (n, strip, block). A thread
/// makes the filters of a block when it first meets it.
template <class T>
struct Tasks {
  Strips<T> strips;
  bool by_block;
  int64_t vectors, blocks, total;  // of a block; of all channels
  int64_t filter;                  // numbers of a vector's filters
  Tasks(const Conv2dGeometry& g, Pass pass, const Packing<T>& pack)
      : strips(g, pass, kOutputs, kGoodNumbers * 4 / most_vectors(g, pack)),
        by_block(g.layout == Layout::contiguous || larger(g.c, g.k) * g.in[0] * g.in[1] <= kSmallImage),
        vectors(ceil_div(pack.vectors, ceil_div(pack.vectors, most_vectors(g, pack)))),
        blocks(ceil_div(pack.vectors, vectors)),
        total(blocks * g.n * strips.count),
        filter(kProducts * pack.channels * kLanes<T>) {}
  static int64_t most_vectors(const Conv2dGeometry& g, const Packing<T>& pack) {
    return g.layout == Layout::contiguous ? 4 : smaller(16, 128 / pack.channels);
  }
  int64_t filters() const { return blocks * vectors * filter; }
  /// A block's strips, points, filters, and which of them are made.
  int64_t workspace() const {
    return Memory<T>::size(strips, vectors) + kProducts * kTogether * kLanes<T> + filters() + blocks;
  }
};

template <class T, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* workspace, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const int64_t produced = pass == Pass::forward ? g.k : g.c;
  const Packing<T> pack(g, make_windows(g, pass, 0, 0));
  const Tasks<T> tasks(g, pass, pack);
  const Strips<T>& strips = tasks.strips;
  const Memory<T> memory(strips, workspace, tasks.vectors);
  T *const points = memory.rest, *const filters = points + kProducts * kTogether * L;
  T* const made = filters + tasks.filters();
  for (int64_t block = 0; block < tasks.blocks; ++block) made[block] = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t all_strips = g.n * strips.count;
    const int64_t block = tasks.by_block ? task / all_strips : task % tasks.blocks;
    const int64_t strip = tasks.by_block ? task % all_strips : task / tasks.blocks, n = strip / strips.count;
    const int64_t v0 = block * tasks.vectors, v1 = smaller(v0 + tasks.vectors, pack.vectors);
    for (int64_t v = v0; v < v1 && made[block] == 0; ++v) {  // the points' place serves for weights as they are
      const int64_t group = v * pack.groups;
      pack_weights<pass, T, T>(turned_windows<T>(g, pass, 0), pack, o.b + group * group_weight(g), group_weight(g),
                               g.groups - group, points);
      transform_filters(pack.channels, points, filters + v * tasks.filter);
    }
    made[block] = 1;
    const Strip s = make_strip(g, pass, strips, strip % strips.count);
    const Windows t = turned_windows<T>(s.g, pass, 0);
    gather_strip<pass>(g, s, pack, o.a, n, v0, v1, strips.in, memory.in);
    for (int64_t v = v0; v < v1; ++v) {
      for (int64_t lane = 0, k = v * pack.out; lane < L; ++lane)
        memory.bias[lane] = o.bias && k + lane < produced ? o.bias[k + lane] : T(0);
      correlate_tiles<T>({t, pack, memory.in + (v - v0) * strips.in, memory.bias, filters + v * tasks.filter,
                          memory.out + (v - v0) * strips.out},
                         points);
    }
    scatter_strip<pass>(g, s, pack, memory.out, n, v0, v1, strips.out, o.out);
  }
}

// ---- the row of the table ----

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (!std::is_same_v<S, float>) return "its transforms round more than float64 or the 16-bit types are asked for";
  if (g.groups == 1) return "it is for groups";
  for (int dim = 0; dim < 2; ++dim) {
    if (g.kernel[dim] != 3 || g.stride[dim] != 1 || g.dilation[dim] != 1)
      return "its transforms are those of a 3x3 kernel with stride and dilation 1";
    if ((pass == Pass::grad_input ? g.in : g.out)[dim] < kFewestOutputs)
      return "the image is too small to share its filters";
  }
  if (pass == Pass::grad_weight) {
    if constexpr (std::is_same_v<S, float>) return winograd_groups_grad_weight_refuses<S>(g);
  }
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t fewest = smaller(g.c, g.k) / g.groups, widest = larger(g.c, g.k) / g.groups;
  if (4 * fewest <= L || widest > L)
    return "its groups have more channels than a quarter of a vector has lanes, and no more than a vector";
  if (g.layout == Layout::channels_last && 2 * fewest <= L)
    return "in channels_last, groups of half a vector are computed as fast without transforms";
  const Tasks<Sum<S>> tasks(g, pass, Packing<Sum<S>>(g, make_windows(g, pass, 0, 0)));
  const Strips<Sum<S>>& strips = tasks.strips;
  if (g.border != Border::zeros && strips.count > 1) return "the strips of its images have borders of zeros only";
  if (larger(strips.in, strips.out) > kMostNumbers)
    return "the rows under four rows of results pass its buffer of 2^18 numbers";
  if (tasks.filters() > kMostFilters) return "its transformed filters pass its buffer of 2^20 numbers";
  return nullptr;
}

template <class S>
Conv2dRun<S> grad_weight_run() {
  if constexpr (std::is_same_v<S, float>) {
    return winograd_groups_grad_weight<S>();
  } else {
    return {};
  }
}

template <class S, Pass pass>
Conv2dRun<S> run() {
  if constexpr (std::is_same_v<S, float>) {
    return {[](const Conv2dGeometry& g) { return Tasks<S>(g, pass, Packing<S>(g, make_windows(g, pass, 0, 0))).total; },
            [](const Conv2dGeometry& g) {
              return Tasks<S>(g, pass, Packing<S>(g, make_windows(g, pass, 0, 0))).workspace();
            },
            correlate<S, pass>};
  } else {
    return {};
  }
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_winograd_groups() {
  return {"winograd", "", refuses<S>, run<S, Pass::forward>(), run<S, Pass::grad_input>(), grad_weight_run<S>(), false};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_winograd_groups();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_winograd_groups();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_winograd_groups();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_winograd_groups();

}  // namespace cnnops::cpu::CNNOPS_ISA
