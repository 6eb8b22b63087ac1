// The gradient of the weight by Winograd's tiles, in groups of few channels.
//
// As in conv2d_winograd_grad_weight.cpp there are 36 multiplications for a tile of 4x4 outputs' gradients instead of
// 144,
//
//   gw[k, c] = transform of the 36 sums over all tiles of u[i][tile, k] * v[i][tile, c]
//
// and as in conv2d_winograd_groups.cpp a lane is an output channel, a vector covers whole groups, and lane k picks
// channel j of its group's inputs: so the sums of one point are a vector for each channel j, which fit in registers.
//
//   s[i][j] += (what is picked of v[i][tile] for j) * u[i][tile]
//
// Groups may also be a few whole vectors: then every vector of inputs meets every vector of gradients of its group.
//
// Strips of rows of both tensors come to a few vectors of channels as there. Their tiles are transformed a few at a
// time, running on from strip to strip and from image to image, so that these stay in the first-level cache. A task is
// a few vectors of channels, and walks all images: products are summed over the tiles that are transformed together,
// each from a fresh zero, and those sums are added in order. A NaN or infinity reaches all taps of the filters that see
// its tile. Refuses, besides what the file for the other passes does, groups of fewer than 5 channels, for which sums
// without transforms are as fast, or more than 32, for which the general file's register tiles are wider; groups of
// more than a vector that are not whole vectors; and too few groups to be tasks.
#include "winograd_groups.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kTiles = 8;           // transformed together
constexpr int64_t kFewestChannels = 5;  // of a group: with fewer, sums without transforms are as fast
constexpr int64_t kMostChannels = 32;   // with more, the general file's register tiles are wider
constexpr int64_t kGoodTasks = 4;
constexpr int64_t kTaskBytes = 256;  // of a pixel, in channels_last: neighbouring channels share what is fetched

/// The channels that a vector's sums are made for: those of its groups, and maybe some that nobody asks for.
template <class T, bool one_group>
constexpr int64_t kSummed = one_group ? kLanes<T> : kLanes<T> / 2;

/// Numbers of the sums that a pair of vectors makes.
template <class T>
int64_t pair_sums(const Units<T>& all) {
  return kProducts * (all.groups == 1 ? kSummed<T, true> : kSummed<T, false>)*kLanes<T>;
}

/// Tasks are a few units each.
template <class T>
struct Tasks {
  int64_t units, total;
  TurnedStrips<T> strips;
  Tasks(const Conv2dGeometry& g, const Units<T>& all)
      : units(g.layout == Layout::contiguous
                  ? 1
                  : larger(smaller(kTaskBytes / kVectorBytes / all.in_vectors, all.count / kGoodTasks), 1)),
        total(ceil_div(all.count, units)),
        strips(g, Pass::grad_weight, kOutputs, smaller(kGoodNumbers, 2 * kGoodNumbers / (units * all.in_vectors))) {}
};

/// Where a task's scratch memory lies: strips, transformed tiles (of each unit those of gradients, then those of
/// inputs), sums (of each unit those of all pairs of vectors).
template <class T>
struct TaskMemory {
  static constexpr int64_t points = kProducts * kTiles * kLanes<T>;  // numbers of a vector
  T *in, *out, *tiles, *sums;
  TaskMemory(const Units<T>& all, const Tasks<T>& tasks, T* memory)
      : in(memory),
        out(in + tasks.units * all.in_vectors * tasks.strips.in),
        tiles(out + tasks.units * all.out_vectors * tasks.strips.out),
        sums(tiles + tasks.units * all.vectors() * points) {}
  static int64_t size(const Units<T>& all, const Tasks<T>& tasks) {
    return tasks.units * (all.in_vectors * tasks.strips.in + all.out_vectors * tasks.strips.out +
                          all.vectors() * points + all.in_vectors * all.out_vectors * pair_sums(all));
  }
};

/// sums[i][j] += sum over some tiles m of what is picked of inputs[i][m] * gradients[i][m].
template <class T, bool one_group>
void add_products(const Units<T>& all, int64_t tiles, const T* gradients, const T* inputs, T* sums) {
  constexpr int64_t L = kLanes<T>, J = kSummed<T, one_group>;
  Vec<Places<T>> places[J]{};
  for (int64_t lane = 0; lane < all.out; ++lane) places[0][lane] = lane / all.rows * all.channels;
  for (int64_t j = 1; j < J; ++j) places[j] = places[0] + Places<T>(j);
  for (int64_t i = 0; i < kProducts; ++i, gradients += kTiles * L, inputs += kTiles * L, sums += J * L) {
    Vec<T> sum[J]{};
    for (int64_t m = 0; m < tiles; ++m) {
      const Vec<T> gradient = load(gradients + m * L);
      const T* x = inputs + m * L;
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j)
        sum[j] = multiply_add(one_group ? broadcast(x[j]) : pick<T>(load(x), places[j]), gradient, sum[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) store(sums + j * L, load(sums + j * L) + sum[j]);
  }
}

/// From the sums of an output vector, which meets one vector of inputs after the other, to its `rows` filters, by way
/// of `scratch`.
template <class T, bool one_group>
void write_filters(const Conv2dGeometry& g, const Units<T>& all, const T* sums, int64_t next, int64_t rows, T* scratch,
                   T* out) {
  constexpr int64_t L = kLanes<T>, J = kSummed<T, one_group>;
  using Taps = Numbers<kPatch, 3>;
  const bool by_channel = g.layout == Layout::contiguous;
  for (int64_t j = 0; j < all.channels; ++j) {
    const T* from = sums + j / L * next + j % L * L;
    transform<Taps, Taps, T>([&](int h, int w) { return load(from + (h * kPatch + w) * J * L); },
                             [&](int h, int w, Vec<T> x) {
                               const int64_t tap = h * 3 + w;
                               store(scratch + (by_channel ? j * 9 + tap : tap * all.channels + j) * L, x);
                             });
  }
  turn_back(scratch, L, 9 * all.channels, rows, out, 9 * all.channels);
}

template <class T, bool one_group>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* workspace, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>, kPoints = TaskMemory<T>::points;
  const Units<T> all(g, Pass::grad_weight);
  const Tasks<T> tasks(g, all);
  const TurnedStrips<T>& strips = tasks.strips;
  const TaskMemory<T> memory(all, tasks, workspace);
  const int64_t pairs = all.in_vectors * all.out_vectors;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t u0 = task * tasks.units, u1 = smaller(u0 + tasks.units, all.count);
    const int64_t a0 = u0 * all.in_vectors, b0 = u0 * all.out_vectors;
    for (int64_t i = 0; i < (u1 - u0) * pairs * pair_sums(all); i += L) store(memory.sums + i, Vec<T>{});
    const auto add = [&](int64_t u, int64_t tiles) {
      const T *gradients = memory.tiles + u * all.vectors() * kPoints, *inputs = gradients + all.out_vectors * kPoints;
      T* sums = memory.sums + u * pairs * pair_sums(all);
      for (int64_t b = 0; b < all.out_vectors; ++b)
        for (int64_t a = 0; a < all.in_vectors; ++a, sums += pair_sums(all))
          add_products<T, one_group>(all, tiles, gradients + b * kPoints, inputs + a * kPoints, sums);
    };
    int64_t waiting = 0;  // tiles that are transformed, but not summed
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t number = 0; number < strips.count; ++number) {
        const TurnedStrip s = make_strip(g, Pass::grad_weight, strips, number);
        const Windows t = turned_windows<T>(s.g, Pass::grad_weight, 0);
        gather_pixels(g.layout, g.in, g.c, all.in, o.b, n, s.in * g.in[1], s.g.in[0] * g.in[1], a0, u1 * all.in_vectors,
                      strips.in, memory.in);
        gather_pixels(g.layout, g.out, g.k, all.out, o.a, n, s.out * g.out[1], s.g.out[0] * g.out[1], b0,
                      u1 * all.out_vectors, strips.out, memory.out);
        const auto in = strip_view(memory.in, g.in[1], strips.in, 0),
                   out = strip_view(memory.out, g.out[1], strips.out, 0);
        const int64_t across = ceil_div(t.w.count, kOutputs), tiles = ceil_div(t.h.count, kOutputs) * across;
        for (int64_t tile = 0, next; tile < tiles; tile = next) {
          next = smaller(tile + kTiles - waiting, tiles);
          const auto each = [&](const auto& transform_tile, T* to) {
            for (int64_t m = tile; m < next; ++m)
              transform_tile(m / across * kOutputs, m % across * kOutputs, to + (waiting + m - tile) * L);
          };
          for (int64_t u = 0; u < u1 - u0; ++u) {
            T* to = memory.tiles + u * all.vectors() * kPoints;
            for (int64_t b = u * all.out_vectors; b < (u + 1) * all.out_vectors; ++b, to += kPoints)
              each([&](int64_t h, int64_t w,
                       T* to) { transform_gradients(s.g, out, out.at + b * out.vector, h, w, kTiles * L, to); },
                   to);
            for (int64_t a = u * all.in_vectors; a < (u + 1) * all.in_vectors; ++a, to += kPoints)
              each([&](int64_t h, int64_t w,
                       T* to) { transform_inputs(t, in, in.at + a * in.vector, h, w, kTiles * L, to); },
                   to);
            if (waiting + next - tile == kTiles) add(u, kTiles);
          }
          waiting = (waiting + next - tile) % kTiles;
        }
      }
    for (int64_t u = 0; u < u1 - u0 && waiting > 0; ++u) add(u, waiting);
    for (int64_t b = b0; b < u1 * all.out_vectors; ++b)
      write_filters<T, one_group>(g, all, memory.sums + (b - b0) * all.in_vectors * pair_sums(all), pair_sums(all),
                                  smaller(all.out, g.k - b * all.out), memory.tiles,
                                  o.out + b * all.out * 9 * all.channels);
  }
}

}  // namespace

template <class T>
const char* winograd_groups_grad_weight_refuses(const Conv2dGeometry& g) {
  const Units<T> all(g, Pass::grad_weight);
  if (smaller(all.channels, all.rows) < kFewestChannels || larger(all.channels, all.rows) > kMostChannels)
    return "its gradient of the weight is that of groups of 5 to 32 channels";
  if (!all.fit()) return "its groups wider than a vector are whole vectors";
  if (all.count < kGoodTasks) return "its gradient of the weight has a task for each vector of groups";
  const Tasks<T> tasks(g, all);
  if (g.border != Border::zeros && tasks.strips.count > 1) return "the strips of its images have borders of zeros only";
  if (larger(tasks.strips.in, tasks.strips.out) > kMostNumbers / (tasks.units * all.in_vectors))
    return "the rows under four rows of results pass its buffer of 2^18 numbers";
  return nullptr;
}

template <class T>
Conv2dRun<T> winograd_groups_grad_weight() {
  return {[](const Conv2dGeometry& g) { return Tasks<T>(g, Units<T>(g, Pass::grad_weight)).total; },
          [](const Conv2dGeometry& g) {
            const Units<T> all(g, Pass::grad_weight);
            return TaskMemory<T>::size(all, Tasks<T>(g, all));
          },
          [](const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* workspace, int64_t begin, int64_t end) {
            (Units<T>(g, Pass::grad_weight).groups == 1 ? grad_weight<T, true> : grad_weight<T, false>)(g, o, workspace,
                                                                                                        begin, end);
          }};
}

template const char* winograd_groups_grad_weight_refuses<float>(const Conv2dGeometry&);
template Conv2dRun<float> winograd_groups_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
