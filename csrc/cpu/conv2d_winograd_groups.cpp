// Winograd's convolution, F(4x4, 3x3), in groups of few channels.
//
// The transforms are those of winograd_points.h, and an output is made of products at 36 points as there. What differs
// is how numbers lie in vectors: as in conv2d_depthwise_groups.cpp, a vector covers as many whole groups as fit, and
// lane k picks channel j of its group; if there is one group to a vector, or to a few vectors, it is a number that is
// broadcast.
//
//   v[i] = transform of a tile's 6x6 vectors of inputs        u[i][j] = transform of the filters' weights of channel j
//   s[i] = sum over j of (what is picked of v[i] for j) * u[i][j]
//   y of the tile = transform of its 36 vectors s
//
// So a tile's transforms are of whole vectors of channels, however many groups there are, and what stands between them
// are few products: it pays that pixels come to the transforms by the shortest way. In channels_last, where groups fill
// vectors, they are read and written where they stand. Otherwise images are cut into strips of rows, of a few vectors
// of channels, that stay in the second-level cache: contiguous ones are turned round (turned_strips.h), of
// channels_last ones it is a copy. Tiles are computed 8 or 16 at a time, running on from image to image where these are
// small. The gradient of the input is the same with mirrored taps and exchanged channels.
//
// A task is a strip of one image, or some small images, for a block of vectors. A thread transforms the filters that it
// meets, and keeps them. An output's rounding depends on all 6x6 inputs of its tile, also on those that it does not
// see. A NaN or infinity among them makes all outputs of the tile NaN. Refuses all but float32, all but 3x3 kernels of
// stride and dilation 1, groups of a quarter of a vector and less, for which `depthwise` is as fast, groups of more
// than 32 channels or that are not whole vectors, small images, and layers whose filters pass its buffer. With vectors
// of 16 lanes it also refuses groups of half a vector in channels_last, and of more than one, as long as nobody has
// measured them. The gradient of the weight is in conv2d_winograd_groups_grad_weight.cpp: that takes groups of 5 to 32
// channels.
#include "winograd_groups.h"
#include "winograd_products.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostTogether = 16;      // tiles
constexpr int64_t kMostFilters = 1 << 20;  // numbers
constexpr int64_t kBlockBytes = 256;       // of a pixel's channels, in channels_last: they share what is fetched
constexpr int64_t kMostChannels = 32;      // of a group
constexpr int64_t kFewestOutputs = 6;
constexpr int64_t kSmallImage = 1 << 17;  // numbers, of all channels
constexpr int64_t kTaskTiles = 16;        // of small images, a task has several

/// Which number of a vector of inputs lane k is to see for channel j of its group: the only one of it that lies j
/// places on from the first; the one j places on from the first of its four; one that has to be looked up.
enum class Pick { one, of_four, any };

/// How the work is cut: tasks are numbered (block of units, images, strip), so a thread makes the filters of its own
/// blocks only, and a block's stay in the second-level cache. But large images in channels_last are walked in their own
/// order, (images, strip, block): then a thread makes the filters of a block when it first meets it, and keeps them
/// all.
template <class T>
struct Tasks {
  Units<T> units;
  Pick pick;
  bool in_place, by_block;
  int64_t block, blocks;  // units of a block
  TurnedStrips<T> strips;
  int64_t images, image_groups;  // of a task; of all
  int64_t total;
  int64_t together;                        // tiles
  int64_t point, sum_point, filter_point;  // numbers from one point to the next

  Tasks(const Conv2dGeometry& g, Pass pass)
      : units(g, pass),
        pick(units.groups == 1                                                  ? Pick::one
             : units.channels == 4 && units.rows == 4 && units.out == kLanes<T> ? Pick::of_four
                                                                                : Pick::any),
        in_place(kLanes<T> <= 8 && g.layout == Layout::channels_last && units.in == kLanes<T> &&
                 units.out == kLanes<T> && (g.c | g.k) % kLanes<T> == 0),
        by_block(g.layout == Layout::contiguous || larger(g.c, g.k) * g.in[0] * g.in[1] <= kSmallImage),
        block(most_units(g)),
        blocks(ceil_div(units.count, block)),
        strips(g, pass, kOutputs, kGoodNumbers * 2 / vectors()) {
    constexpr int64_t L = kLanes<T>;
    const int64_t* size = pass == Pass::grad_input ? g.in : g.out;
    const int64_t tiles = ceil_div(size[0], kOutputs) * ceil_div(size[1], kOutputs);
    images = strips.count > 1 ? 1 : smaller(larger(g.n, 1), larger(1, kTaskTiles / larger(tiles, 1)));
    image_groups = ceil_div(g.n, images);
    total = blocks * image_groups * strips.count;
    together = units.in_vectors * units.out_vectors == 1 ? 2 * kTileRows : kMostTogether;
    point = together * units.in_vectors * L + kPad;
    sum_point = together * units.out_vectors * L + kPad;
    filter_point = units.channels * units.out_vectors * L + kPad;
  }
  static constexpr int64_t kPad = 16;  // or points would share their places in the cache
  int64_t most_units(const Conv2dGeometry& g) const {
    const int64_t most = g.layout == Layout::contiguous ? 4
                         : in_place                     ? kBlockBytes / kVectorBytes
                                                        : smaller(16, 128 / units.channels);
    return larger(1, most / larger(units.in_vectors, units.out_vectors));
  }
  int64_t vectors() const { return block * larger(units.in_vectors, units.out_vectors); }
  int64_t filter() const { return kProducts * filter_point; }  // of a unit
  int64_t filters() const { return (by_block ? 1 : blocks) * block * filter(); }
  int64_t in() const { return in_place ? 0 : block * units.in_vectors * images * strips.in; }
  int64_t out() const { return in_place ? 0 : block * units.out_vectors * images * strips.out; }
  int64_t bias() const { return block * units.out_vectors * kLanes<T>; }
  /// A block's strips and bias, points, sums, filters, and which of these are made.
  int64_t workspace() const { return in() + out() + bias() + kProducts * (point + sum_point) + filters() + blocks; }
};

// ---- filters ----

/// filters[point][j][lane], for all units of a block that are there.
template <class T, Pass pass>
void make_filters(const Conv2dGeometry& g, const Tasks<T>& tasks, const T* weights, int64_t u0, int64_t u1, T* scratch,
                  T* filters) {
  constexpr int64_t L = kLanes<T>;
  const Units<T>& units = tasks.units;
  for (int64_t u = u0; u < u1; ++u, filters += tasks.filter()) {
    const T* weight = weights + u * units.groups * group_weight(g);
    if (units.groups == 1) {
      Layer t(g, pass);
      t.mirrored = pass == Pass::grad_input;
      transform_filters<Form<3, kOutputs, kOutputs>>(t, weight, units.rows, units.channels, units.out_vectors * L,
                                                     tasks.filter_point, scratch, filters);
      continue;
    }
    const Windows t = turned_windows<T>(g, pass, 0);
    pack_weights<pass, T, T>(t, Packing<T>(g, t), weight, group_weight(g), g.groups - u * units.groups, scratch);
    for (int64_t j = 0; j < units.channels; ++j)
      transform<Points<kPatch, 3>, Points<kPatch, 3>, T>(
          [&](int h, int w) { return load(scratch + (j * 9 + h * 3 + w) * L); },
          [&](int h, int w, Vec<T> x) { store(filters + (h * kPatch + w) * tasks.filter_point + j * L, x); });
  }
}

// ---- products ----

template <class T>
struct Factors {
  const T *points, *filters;
  T* sums;
  int64_t channels, in, out;  // in numbers: from tile to tile of the points; from channel to channel, and of the sums
  const Vec<Places<T>>* places;
};

/// Each four lanes see their number j.
template <int j, class T, int... lane>
Vec<T> of_four(Vec<T> v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane / 4 * 4 + j)...);
}

/// sums[m][V vectors] = sum over j of what is picked of points[m] for j * filters[j][V vectors].
template <class T, int M, int V, Pick pick>
void multiply_tiles(const Factors<T>& f) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[M][V]{};
  const T* filter = f.filters;
  const auto add = [&](const auto& x) {
    Vec<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(filter + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<T> number = x(f.points + m * f.in);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(number, column[v], sum[m][v]);
    }
    filter += f.out;
  };
  if constexpr (pick == Pick::of_four) {
    constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
    add([&](const T* from) { return of_four<0, T>(load(from), lanes); });
    add([&](const T* from) { return of_four<1, T>(load(from), lanes); });
    add([&](const T* from) { return of_four<2, T>(load(from), lanes); });
    add([&](const T* from) { return of_four<3, T>(load(from), lanes); });
  } else {
    for (int64_t j = 0; j < f.channels; ++j)
      add([&](const T* from) {
        return pick == Pick::one ? broadcast(from[j]) : CNNOPS_ISA::pick<T>(load(from), f.places[j]);
      });
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(f.sums + m * f.out + v * L, sum[m][v]);
}

/// Of all points, for `tiles` tiles.
template <class T, int V, Pick pick>
void multiply(const Tasks<T>& tasks, const Vec<Places<T>>* places, int64_t tiles, const T* points, const T* filters,
              T* sums) {
  constexpr int64_t L = kLanes<T>;
  constexpr int M = 2 * kTileRows / V;
  const int64_t in = tasks.units.in_vectors * L, out = tasks.units.out_vectors * L, channels = tasks.units.channels;
  for (int64_t i = 0; i < kProducts; ++i, points += tasks.point, sums += tasks.sum_point, filters += tasks.filter_point)
    for (int64_t v = 0; v < out; v += V * L)
      for (int64_t m = 0; m < tiles; m += M) {
        const Factors<T> f{points + m * in, filters + v, sums + m * out + v, channels, in, out, places};
        if (tiles - m > M / 2) {
          multiply_tiles<T, M, V, pick>(f);
        } else if (tiles - m > M / 4) {
          multiply_tiles<T, M / 2, V, pick>(f);
        } else {
          multiply_tiles<T, M / 4, V, pick>(f);
        }
      }
}

// ---- tiles ----

/// Where a task's pixels are, and its images, which are strips.
template <class T>
struct TiledStrip {
  const Windows& t;
  View<const T> in;
  View<T> out;
  int64_t images;
};

template <class T>
void transform_outputs(const TiledStrip<T>& strip, T* image, int64_t h, int64_t w, Vec<T> bias, int64_t point,
                       const T* sums) {
  const View<T>& out = strip.out;
  const int64_t height = strip.t.h.count - h, width = strip.t.w.count - w;
  T* to = image + h * out.row + w * out.pixel;
  using Outputs = Numbers<kPatch, kOutputs>;
  const int64_t apart = counted(point);
  const auto get = [&](int i, int j) { return load(sums + (i * kPatch + j) * apart); };
  if (height >= kOutputs && width >= kOutputs) {
    const int64_t row = counted(out.row), pixel = counted(out.pixel);
    transform<Outputs, Outputs, T>(get, [&](int i, int j, Vec<T> y) { store(to + i * row + j * pixel, y + bias); });
  } else {
    transform<Outputs, Outputs, T>(get, [&](int i, int j, Vec<T> y) {
      if (i < height && j < width) store(to + i * out.row + j * out.pixel, y + bias);
    });
  }
}

/// All tiles of a task's strips, for the units of its block.
template <class T>
void correlate_tiles(const Tasks<T>& tasks, const TiledStrip<T>& strip, int64_t block, const Vec<Places<T>>* places,
                     const T* bias, const T* filters, T* points, T* sums) {
  constexpr int64_t L = kLanes<T>;
  const Units<T>& units = tasks.units;
  const int64_t a = units.in_vectors, b = units.out_vectors;
  const auto multiply = b % 2 == 0                    ? CNNOPS_ISA::multiply<T, 2, Pick::one>
                        : tasks.pick == Pick::one     ? CNNOPS_ISA::multiply<T, 1, Pick::one>
                        : tasks.pick == Pick::of_four ? CNNOPS_ISA::multiply<T, 1, Pick::of_four>
                                                      : CNNOPS_ISA::multiply<T, 1, Pick::any>;
  struct Place {
    int64_t n, h, w;
  } next{}, tiles[kMostTogether];
  while (next.n < strip.images) {
    int64_t count = 0;
    for (; count < tasks.together && next.n < strip.images; ++count) {
      tiles[count] = next;
      next.w += kOutputs;
      if (next.w >= strip.t.w.count) next = {next.n, next.h + kOutputs, 0};
      if (next.h >= strip.t.h.count) next = {next.n + 1, 0, 0};
    }
    for (int64_t u = 0; u < block; ++u) {
      for (int64_t v = 0; v < a; ++v)
        for (int64_t m = 0; m < count; ++m)
          transform_inputs(strip.t, strip.in, strip.in.at + (u * a + v) * strip.in.vector + tiles[m].n * strip.in.image,
                           tiles[m].h, tiles[m].w, tasks.point, points + (m * a + v) * L);
      multiply(tasks, places, count, points, filters + u * tasks.filter(), sums);
      for (int64_t v = 0; v < b; ++v) {
        const Vec<T> plus = load(bias + (u * b + v) * L);
        for (int64_t m = 0; m < count; ++m)
          transform_outputs(strip, strip.out.at + (u * b + v) * strip.out.vector + tiles[m].n * strip.out.image,
                            tiles[m].h, tiles[m].w, plus, tasks.sum_point, sums + (m * b + v) * L);
      }
    }
  }
}

template <class T, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* workspace, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  constexpr bool forward = pass == Pass::forward;
  const Tasks<T> tasks(g, pass);
  const Units<T>& units = tasks.units;
  const TurnedStrips<T>& strips = tasks.strips;
  T *const in = workspace, *const out = in + tasks.in(), *const bias = out + tasks.out(),
           *const points = bias + tasks.bias(), *const sums = points + kProducts * tasks.point,
           *const filters = sums + kProducts * tasks.sum_point, *const made = filters + tasks.filters();
  const int64_t* in_size = forward ? g.in : g.out;
  const int64_t* out_size = forward ? g.out : g.in;
  const int64_t read = units.channels * g.groups, produced = units.rows * g.groups;
  const int64_t in_plane = in_size[0] * in_size[1], out_plane = out_size[0] * out_size[1];
  Vec<Places<T>> places[kLanes<T>]{};
  for (int64_t lane = 0; lane < units.out; ++lane) places[0][lane] = lane / units.rows * units.channels;
  for (int64_t j = 1; j < L; ++j) places[j] = places[0] + Places<T>(j);
  for (int64_t block = 0; block < tasks.blocks; ++block) made[block] = 0;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t all_strips = tasks.image_groups * strips.count;
    const int64_t block = tasks.by_block ? task / all_strips : task % tasks.blocks;
    const int64_t strip = tasks.by_block ? task % all_strips : task / tasks.blocks;
    const int64_t n0 = strip / strips.count * tasks.images, n1 = smaller(n0 + tasks.images, g.n);
    const int64_t u0 = block * tasks.block, u1 = smaller(u0 + tasks.block, units.count);
    const int64_t a0 = u0 * units.in_vectors, a1 = u1 * units.in_vectors;
    const int64_t b0 = u0 * units.out_vectors, b1 = u1 * units.out_vectors;
    T* const block_filters = filters + (tasks.by_block ? 0 : block * tasks.block * tasks.filter());
    if (made[block] == 0) {  // the points' place serves for weights as they are
      make_filters<T, pass>(g, tasks, o.b, u0, u1, points, block_filters);
      made[block] = 1;
    }
    for (int64_t lane = 0, k = b0 * units.out; lane < (b1 - b0) * L; ++lane)
      bias[lane] = o.bias && lane / L * units.out + lane % L + k < produced && lane % L < units.out
                       ? o.bias[k + lane / L * units.out + lane % L]
                       : T(0);
    const TurnedStrip s = make_strip(g, pass, strips, strip % strips.count);
    const Windows t = turned_windows<T>(s.g, pass, 0);
    const int64_t in_row = in_size[1], out_row = out_size[1];
    const int64_t in_rows = (forward ? s.g.in : s.g.out)[0], out_rows = (forward ? s.g.out : s.g.in)[0];
    TiledStrip<T> tiled{t, {}, {}, n1 - n0};
    if (tasks.in_place) {
      tiled.in = {o.a + (n0 * in_plane + s.in * in_row) * read + a0 * L, L, in_plane * read, in_row * read, read};
      tiled.out = {o.out + (n0 * out_plane + s.out * out_row) * produced + b0 * L, L, out_plane * produced,
                   out_row * produced, produced};
    } else {
      tiled.in = {in, tasks.images * strips.in, strips.in, in_row * L, L};
      tiled.out = {out, tasks.images * strips.out, strips.out, out_row * L, L};
      for (int64_t n = n0; n < n1; ++n)
        gather_pixels(g.layout, in_size, read, units.in, o.a, n, s.in * in_row, in_rows * in_row, a0, a1,
                      tiled.in.vector, in + (n - n0) * strips.in);
    }
    correlate_tiles<T>(tasks, tiled, u1 - u0, places, bias, block_filters, points, sums);
    for (int64_t n = n0; n < n1 && !tasks.in_place; ++n)
      scatter_pixels(g.layout, out_size, produced, units.out, out + (n - n0) * strips.out, n, s.out * out_row,
                     out_rows * out_row, b0, b1, tiled.out.vector, o.out);
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
  if (4 * fewest <= L) return "its groups have more channels than a quarter of a vector has lanes";
  if (widest > (kTileRows == 8 ? L : kMostChannels))
    return "for groups of so many channels the general file's tiles are as fast";
  if (kTileRows == 8 && g.layout == Layout::channels_last && 2 * fewest <= L)
    return "in channels_last, groups of half so long a vector are computed as fast without transforms";
  const Tasks<Sum<S>> tasks(g, pass);
  if (!tasks.units.fit()) return "its groups wider than a vector are whole vectors";
  const TurnedStrips<Sum<S>>& strips = tasks.strips;
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
    return {[](const Conv2dGeometry& g) { return Tasks<S>(g, pass).total; },
            [](const Conv2dGeometry& g) { return Tasks<S>(g, pass).workspace(); }, correlate<S, pass>};
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
