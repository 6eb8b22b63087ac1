// Convolution with a 1x1 kernel, contiguous: a product with matrices that lie there ready.
//
//   forward      y[n, k, p]  = bias[k] + sum over c of w[k, c] * x[n, c, p]
//   grad_input   gx[n, c, p] = sum over k of w[k, c] * gy[n, k, p]                                    p = (h, w)
//
// A register tile holds a few output channels x three vectors of pixels, and a step is a number of each channel's
// weights times three vectors of one plane. The planes lie far apart, so a task copies its pixels of all of them first,
// panel by panel of three vectors, and from there computes all output channels. Columns run on from one image to the
// next, so small images fill vectors too. The weights of some output channels are put side by side, once for all tasks
// of a thread: rows that lie a multiple of a page apart share too few places of the first-level cache. Forward with
// AVX-512, or if columns are few, reads them where they stand.
//
// Why it beats im2col's blocks: a pixel is copied once for all output channels instead of once for 128; sums stay with
// their tile, however many channels are summed, and go from there to where they belong; and while a task computes, the
// next one's pixels, short pieces of many planes which the processor does not foresee, are fetched into the cache.
//
// With strides, forward copies the pixels that are seen, and grad_input puts its results apart, the bias between them.
//
// A task is a block of columns, or if these are few, some output channels of it. Sums are made in chunks of 128 steps,
// each from a fresh zero, that are added in order. The gradient of the weight is in conv2d_planar_weight.cpp.
#include "cache.h"
#include "panels.h"
#include "planar_columns.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

// Packed pixels of a task, if not more are summed, and packed weights. Larger with AVX-512 was not measured.
constexpr int64_t kBlockBytes = (kVectorBytes == 64 ? 192 : 288) << 10;
constexpr int64_t kWeightBytes = (kVectorBytes == 64 ? 1 : 2) << 20;
constexpr int64_t kFewColumns = 192;   // of a task; kMostColumns at most
constexpr int64_t kManyColumns = 128;  // of all tasks, for which weights are put side by side
constexpr int64_t kGoodTasks = 16, kManyBlocks = 24;
constexpr int64_t kChunk = 128;          // steps that are summed from a fresh zero
constexpr int64_t kMostDepth = 1 << 13;  // channels that are summed over

/// Rows whose weights are packed side by side: a vector of them, or a tile's.
template <class T>
constexpr int64_t kSide = kLanes<T> > kTileRows ? kLanes<T> : kTileRows;
template <class T>
constexpr int64_t kWeights = kWeightBytes / int64_t(sizeof(T));
template <class T>
constexpr int64_t kPixels = 2 * kTileColumns<T> * kMostDepth;
template <class T>
constexpr int64_t kWorkspace = kWeights<T> + kPixels<T> + kLanes<T>;

/// Whether the weights of an output channel are read where they stand. To put them side by side costs little if they
/// then serve many columns.
template <class S>
bool stands(Pass pass, int64_t columns) {
  return pass == Pass::forward && std::is_same_v<S, Sum<S>> && (kVectorBytes == 64 || columns < kManyColumns);
}

/// Tasks are numbered (group, block of rows, block of columns).
template <class T>
struct Tasks {
  int64_t rows, row_blocks, columns, column_blocks, total;
  Tasks(const Conv2dGeometry& g, const Product& t, bool in_place) {
    constexpr int64_t panel = kTileColumns<T>;
    const int64_t pixels = g.n * t.plane, room = kBlockBytes / int64_t(sizeof(T)) / larger(1, t.depth);
    const int64_t most = smaller(kMostColumns, larger(2 * panel, room / panel * panel));
    const int64_t good = larger(smaller(kFewColumns, most), ceil_div(pixels, kGoodTasks));
    columns = smaller(most, round_up(good, panel));
    column_blocks = ceil_div(pixels, larger(1, columns));
    if (column_blocks >= kManyBlocks) {
      columns = round_up(ceil_div(pixels, column_blocks), panel);
      column_blocks = ceil_div(pixels, columns);
    } else if (column_blocks > 1) {  // all of about the same size, and an even number if that is near
      const auto size = [&](int64_t blocks) { return round_up(ceil_div(pixels, blocks), kLanes<T>); };
      int64_t blocks = round_up(column_blocks, 2);
      columns = size(blocks);
      for (int tries = 0; tries < 3 && ceil_div(pixels, size(blocks)) % 2 == 1; ++tries) blocks += 2;
      if (ceil_div(pixels, size(blocks)) % 2 == 0) columns = size(blocks);
      column_blocks = ceil_div(pixels, columns);
    }
    const int64_t wanted = column_blocks == 0 ? 1 : ceil_div(kGoodTasks / 2, column_blocks);
    const int64_t fit = larger(1, kWeights<T> / larger(1, t.depth) / kSide<T>) * kSide<T>;
    row_blocks = larger(wanted, in_place ? 1 : ceil_div(t.rows, fit));
    rows = larger(kTileRows, round_up(ceil_div(t.rows, row_blocks), in_place ? kTileRows : kSide<T>));
    row_blocks = ceil_div(t.rows, rows);
    total = g.groups * row_blocks * column_blocks;
  }
};

/// What the next task reads, to be brought into the cache meanwhile: by each tile of a panel V vectors of every
/// `every`-th plane.
constexpr int64_t kMostEvery = 8;
template <class T>
struct Ahead {
  const T* from;
  int64_t step, every;
};

/// to[m][V vectors] = bias[m] + sum over r of a[m][r] * b[r][V vectors]; if `in_place`, otherwise a's numbers lie side
/// by side.
template <class S, class T, bool in_place, int V, int M>
[[gnu::noinline]]  // or GCC 12 keeps too little of it in registers
void multiply_rows(int64_t depth, const T* const* a, const T* b, const T* bias, T* const* to, bool past,
                   Ahead<S> ahead) {
  constexpr int64_t step = in_place ? 1 : kSide<T>;
  constexpr int L = kLanes<T>;
  alignas(64) T so_far[M * V * L];
  const T* row[M];
  for (int m = 0; m < M; ++m) row[m] = a[m];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(so_far + (m * V + v) * L, broadcast(bias[m]));
  int64_t r = 0, fetch = ahead.from ? 0 : depth;
  do {
    Vec<T> sum[M][V]{};
    for (const int64_t end = smaller(depth, r + kChunk); r < end; ++r, b += V * L) {
      if (r == fetch) {
        for (int v = 0; v < V; ++v) __builtin_prefetch(ahead.from + v * L, 0, 2);
        ahead.from += ahead.step;
        fetch += ahead.every;
      }
      if (in_place && r % L == 0) {
        for (int m = 0; m < M; ++m) __builtin_prefetch(row[m] + r + M * depth);
      }
      Vec<T> column[V];
      for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
      for (int m = 0; m < M; ++m) {
        const Vec<T> x = broadcast(row[m][r * step]);
        for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(x, column[v], sum[m][v]);
      }
    }
    const bool last = r == depth;
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) {
        T* const place = so_far + (m * V + v) * L;
        const Vec<T> result = load(place) + sum[m][v];
        if (!last) {
          store(place, result);
        } else if (past) {
          store_past_cache(to[m] + v * L, result);
        } else {
          store(to[m] + v * L, result);
        }
      }
  } while (r < depth);
}

/// Rows of a tile of V vectors: all have about as many sums.
template <int V>
constexpr int kHeight = kTileVectors * kTileRows / V < 12 ? kTileVectors * kTileRows / V : 12;

/// to[side of rows][r][row] = the weights of `rows` rows.
template <class S, Pass pass>
void pack_weights(const Product& t, const S* from, int64_t rows, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t side = kSide<T>, L = kLanes<T>;
  if (pass == Pass::grad_input) {
    for (int64_t r = 0; r < t.depth; ++r, from += t.weight_depth)
      for (int64_t m = 0; m < rows; m += side) {
        __builtin_prefetch(from + m + 16 * t.weight_depth);
        copy_numbers(from + m, smaller(side, rows - m), to + m * t.depth + r * side);
      }
    return;
  }
  for (int64_t m = 0; m < rows; m += L)
    for (int64_t r = 0; r < t.depth; r += L) {
      const int64_t count = smaller(L, t.depth - r);
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = load_first(from + smaller(m + i, rows - 1) * t.weight_row + r, count);
      transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) store(to + m / side * side * t.depth + (r + i) * side + m % side, square[i]);
    }
}

/// `count` results of a plane of gy, from p on, to the pixels of a plane of gx that they are the gradients of; and what
/// no output sees between these and the next ones gets the bias alone.
template <class S>
void spread(const Conv2dGeometry& g, const Sum<S>* from, int64_t p, int64_t count, Sum<S> bias, S* plane) {
  const auto first_of = [&](int dim, int64_t o) { return o < g.out[dim] ? o * g.stride[dim] : g.in[dim]; };
  for (const int64_t end = p + count; p < end;) {
    const int64_t oh = p / g.out[1], ow = p % g.out[1], outputs = smaller(end - p, g.out[1] - ow);
    const int64_t h = first_of(0, oh), w = first_of(1, ow);
    for (int64_t below = h; below < first_of(0, oh + 1); ++below)
      for (int64_t i = w; i < first_of(1, ow + outputs); ++i) plane[below * g.in[1] + i] = rounded<S>(bias);
    for (int64_t j = 0; j < outputs; ++j) plane[h * g.in[1] + w + j * g.stride[1]] = rounded<S>(from[j]);
    from += outputs;
    p += outputs;
  }
}

/// M rows x V vectors of results, as far as there are so many rows, and where they belong.
template <class S, bool in_place, int V, int M>
void correlate_tile(const Conv2dGeometry& g, const Product& t, const Conv2dOperands<S>& o, const Sum<S>* const* a,
                    int64_t channel, int64_t rows, const ColumnPanel& panel, const Sum<S>* pixels, bool past,
                    Ahead<S> ahead) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Piece& first = *panel.pieces;
  const bool whole = std::is_same_v<S, T> && first.count == V * L && !t.spread;
  alignas(64) T beside[M * V * L];
  T bias[M], *to[M];
  for (int64_t m = 0; m < M; ++m) {
    bias[m] = o.bias && m < rows ? value(o.bias[channel + m]) : T(0);
    to[m] = beside + m * V * L;
    if constexpr (std::is_same_v<S, T>) {
      T* const place = o.out + first.n * t.out_image + (channel + m) * t.out_plane + first.p;
      if (whole && m < rows) to[m] = place;
      if (!past && !t.spread && m < rows) fetch_to_write(place, smaller(V * L, first.count));
    }
  }
  multiply_rows<S, T, in_place, V, M>(t.depth, a, pixels + panel.before * L * t.depth, bias, to,
                                      past && whole && rows == M, ahead);
  if (whole) return;
  for (int64_t m = 0; m < rows; ++m)
    for (const Piece* piece = panel.pieces; piece < panel.pieces + panel.count; ++piece) {
      S* const plane = o.out + piece->n * t.out_image + (channel + m) * t.out_plane;
      if (t.spread) {
        spread(g, beside + m * V * L + piece->lane, piece->p, piece->count, bias[m], plane);
        continue;
      }
      S* const out = plane + piece->p;
      for (int64_t j = 0; j < piece->count; j += L) {
        const int64_t lanes = smaller(L, piece->count - j);
        store_first(out + j, load_first(beside + m * V * L + piece->lane + j, lanes), lanes);
      }
    }
}

template <class S, Pass pass, bool in_place>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Product t(g, pass);
  const Tasks<T> tasks(g, t, in_place);
  T *const weights = workspace, *const pixels = weights + kWeights<T>;
  const int64_t all = g.n * t.plane;
  const bool past = past_cache(o.out, g.n * t.out_image) && t.plane % kLanes<T> == 0;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / tasks.column_blocks, group = block / tasks.row_blocks;
    const int64_t row0 = block % tasks.row_blocks * tasks.rows, rows = smaller(tasks.rows, t.rows - row0);
    const int64_t column0 = task % tasks.column_blocks * tasks.columns;
    const S* const filters = o.b + group * t.rows * t.depth + row0 * t.weight_row;
    if (!in_place && packed != block) pack_weights<S, pass>(t, filters, rows, weights);
    packed = block;
    const int64_t next = task + 1 < end ? column0 + tasks.columns : all;
    const ColumnPanels<T> columns(t, column0, smaller(tasks.columns, all - column0), next, all);
    const S* const in = o.a + group * t.depth * t.in_plane;
    pack_pixels(t, in, o.a + g.n * t.in_image, columns, pixels);

    const int64_t every = smaller(ceil_div(rows, kTileRows), kMostEvery);
    const auto tiles = [&](const ColumnPanel* first_panel, const ColumnPanel* last_panel, auto vectors, int64_t m0,
                           auto height) {
      const T* a[height];
      for (int64_t m = 0; m < height; ++m) {
        const int64_t row = smaller(m0 + m, rows - 1);
        if constexpr (in_place) {
          a[m] = filters + row * t.depth;
        } else {
          a[m] = weights + row / kSide<T> * kSide<T> * t.depth + row % kSide<T>;
        }
      }
      const int64_t turn = m0 / height, lines = turn / every;  // with strides, a panel sees more than its width
      const int64_t line = turn % every * t.in_plane + lines * vectors * kLanes<T>;
      const bool fetch = lines < (t.step == 1 ? 1 : 2 * t.step);
      for (const ColumnPanel* panel = first_panel; panel < last_panel; ++panel) {
        const S* const from = fetch && panel->next >= 0 ? in + panel->next + line : nullptr;
        correlate_tile<S, in_place, vectors, height>(g, t, o, a, group * t.rows + row0 + m0, smaller(height, rows - m0),
                                                     *panel, pixels, past, {from, every * t.in_plane, every});
      }
    };
    const auto columns_of_tiles = [&](const ColumnPanel* first_panel, const ColumnPanel* last_panel, auto vectors) {
      for_tiles<kHeight<vectors>>(0, rows,
                                  [&](int64_t m, auto height) { tiles(first_panel, last_panel, vectors, m, height); });
    };
    const ColumnPanel* const last = columns.panels + columns.count - 1;  // which may be narrower
    columns_of_tiles(columns.panels, last, std::integral_constant<int, kTileVectors>());
    with_column_vectors(last->vectors, [&](auto vectors) { columns_of_tiles(last, last + 1, vectors); });
  }
  stores_done();
}

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  if (g.kernel[0] * g.kernel[1] != 1 || g.padding[0] != 0 || g.padding[1] != 0 ||
      (g.out[0] - 1) * g.stride[0] >= g.in[0] || (g.out[1] - 1) * g.stride[1] >= g.in[1])
    return "it takes 1x1 kernels without padding: each output pixel sees one input pixel";
  if (pass == Pass::grad_weight) {
    if (!std::is_same_v<S, Sum<S>>) return "it reads planes where they stand, and 16-bit numbers must be widened";
    if (g.out[0] * g.out[1] < kLanes<Sum<S>>) return "planes of less than a vector of pixels are no runs to read";
  } else if ((pass == Pass::forward ? g.c : g.k) / g.groups > kMostDepth) {
    return "a sum over more than 2^13 channels passes its buffer";
  }
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) {
            const Product t(g, pass);
            return Tasks<Sum<S>>(g, t, stands<S>(pass, g.n * t.plane)).total;
          },
          [](const Conv2dGeometry&) { return kWorkspace<Sum<S>>; },
          [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
            if constexpr (pass == Pass::forward && std::is_same_v<S, Sum<S>>) {
              if (stands<S>(pass, g.n * g.out[0] * g.out[1]))
                return correlate<S, pass, true>(g, o, workspace, begin, end);
            }
            correlate<S, pass, false>(g, o, workspace, begin, end);
          }};
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_planar() {
  return {"direct",
          "",
          refuses<S>,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          planar_grad_weight<S>()};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_planar();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_planar();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_planar();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_planar();

}  // namespace cnnops::cpu::CNNOPS_ISA
