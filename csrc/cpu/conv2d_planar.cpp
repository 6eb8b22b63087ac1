// Convolution with a 1x1 kernel at stride 1, contiguous: a product with a matrix that lies there ready.
#include "conv2d_planar.h"

#include "gemm.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockBytes = 192 << 10;                // packed pixels of a task, if not more are summed
constexpr int64_t kMostColumns = 768, kFewColumns = 192;  // of a task
constexpr int64_t kGoodTasks = 16;
constexpr int64_t kChunk = 128;          // steps that are summed from a fresh zero
constexpr int64_t kWeights = 1 << 18;    // numbers of packed weights
constexpr int64_t kMostDepth = 1 << 13;  // channels that are summed over

/// Rows whose weights are packed side by side: a vector of them, or a tile's.
template <class T>
constexpr int64_t kSide = kLanes<T> > kTileRows ? kLanes<T> : kTileRows;
template <class T>
constexpr int64_t kPixels = 2 * kTileColumns<T> * kMostDepth;
template <class T>
constexpr int64_t kWorkspace = kWeights + kPixels<T>;

/// The product of one group: out[n][m][p] = sum over r of weight[m*row + r*channel] * in[n][r][p].
struct Product {
  int64_t rows, depth, plane, in_image, out_image, weight_row, weight_depth;
  Product(const Conv2dGeometry& g, Pass pass) {
    const bool forward = pass == Pass::forward;
    const int64_t c = g.c / g.groups, k = g.k / g.groups;
    rows = forward ? k : c;
    depth = forward ? c : k;
    plane = g.out[0] * g.out[1];
    in_image = (forward ? g.c : g.k) * plane;
    out_image = (forward ? g.k : g.c) * plane;
    weight_row = forward ? c : 1;
    weight_depth = forward ? 1 : c;
  }
};

/// Whether the weights of an output channel are read where they stand.
template <class S, Pass pass>
constexpr bool kInPlace = pass == Pass::forward && std::is_same_v<S, Sum<S>>;

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
    if (column_blocks > 1) {  // all of about the same size, and an even number
      column_blocks = round_up(column_blocks, 2);
      columns = round_up(ceil_div(pixels, column_blocks), kLanes<T>);
      column_blocks = ceil_div(pixels, columns);
    }
    const int64_t wanted = column_blocks == 0 ? 1 : ceil_div(kGoodTasks / 2, column_blocks);
    const int64_t fit = larger(1, kWeights / larger(1, t.depth) / kSide<T>) * kSide<T>;
    row_blocks = larger(wanted, in_place ? 1 : ceil_div(t.rows, fit));
    rows = round_up(ceil_div(t.rows, row_blocks), in_place ? kTileRows : kSide<T>);
    row_blocks = ceil_div(t.rows, rows);
    total = g.groups * row_blocks * column_blocks;
  }
};

/// Calls f(std::integral_constant V) for a panel of that many vectors.
template <class F>
void with_vectors(int64_t vectors, const F& f) {
  if (vectors == 1) f(std::integral_constant<int, 1>());
  if (vectors == 2) f(std::integral_constant<int, 2>());
  if (vectors == 3) f(std::integral_constant<int, 3>());
}

/// What the next task reads, to be brought into the cache meanwhile: V vectors of every `every`-th plane.
template <class T>
struct Ahead {
  const T* from;
  int64_t step, every;
};

/// to[m][V vectors] = bias[m] + sum over r of a[m][r*step] * b[r][V vectors].
template <class S, class T, int V, int M>
void multiply_rows(int64_t depth, const T* const* a, int64_t step, const T* b, const T* bias, T* const* to, bool past,
                   Ahead<S> ahead, int64_t rows_ahead) {
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
      if (rows_ahead && r % L == 0) {
        for (int m = 0; m < M; ++m) __builtin_prefetch(row[m] + r + rows_ahead);
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

/// Columns of a panel that lie in one image, from lane `lane` on.
struct Piece {
  int64_t n, p, lane, count;
};
struct Panel {
  int64_t first, pieces, vectors, before;  // its pieces' numbers; vectors of it and of all before it
};
constexpr int64_t kMostPanels = kMostColumns, kMostPieces = 2 * kMostColumns;

template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Product t(g, pass);
  constexpr bool in_place = kInPlace<S, pass>;
  const Tasks<T> tasks(g, t, in_place);
  T *const weights = workspace, *const pixels = weights + kWeights;
  const bool large = past_cache(o.out, g.n * t.out_image) && t.plane % L == 0;
  const int64_t all = g.n * t.plane;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / tasks.column_blocks, group = block / tasks.row_blocks;
    const int64_t row0 = block % tasks.row_blocks * tasks.rows, rows = smaller(tasks.rows, t.rows - row0);
    const int64_t column0 = task % tasks.column_blocks * tasks.columns, columns = smaller(tasks.columns, all - column0);
    const S* const filters = o.b + group * t.rows * t.depth + row0 * t.weight_row;
    if (!in_place && packed != block) {
      packed = block;
      if (pass == Pass::forward) {
        for (int64_t m = 0; m < rows; ++m) copy_numbers(filters + m * t.depth, t.depth, weights + m * t.depth);
      } else {
        for (int64_t r = 0; r < t.depth; ++r)
          for (int64_t m = 0; m < rows; m += kSide<T>) {
            const S* from = filters + r * t.weight_depth + m;
            __builtin_prefetch(from + 16 * t.weight_depth);
            copy_numbers(from, smaller(kSide<T>, rows - m), weights + m * t.depth + r * kSide<T>);
          }
      }
    }

    Panel panels[kMostPanels];
    Piece pieces[kMostPieces];
    int64_t count = 0, found = 0;
    for (int64_t column = 0, before = 0; column < columns; ++count) {
      const int64_t width = smaller(columns - column, kTileVectors * L);
      panels[count] = {found, 0, ceil_div(width, L), before};
      before += panels[count].vectors;
      for (int64_t lane = 0; lane < width;) {
        const int64_t n = (column0 + column) / t.plane, p = (column0 + column) % t.plane;
        const int64_t run = smaller(width - lane, t.plane - p);
        pieces[found++] = {n, p, lane, run};
        lane += run;
        column += run;
      }
      panels[count].pieces = found - panels[count].first;
    }

    const S* const in = o.a + group * t.depth * t.plane;
    for (int64_t r = 0; r < t.depth; ++r)
      for (int64_t i = 0; i < count; ++i) {
        T* to = pixels + (panels[i].before * t.depth + r * panels[i].vectors) * L;
        for (int64_t j = panels[i].first; j < panels[i].first + panels[i].pieces; ++j)
          copy_numbers(in + pieces[j].n * t.in_image + r * t.plane + pieces[j].p, pieces[j].count, to + pieces[j].lane);
      }

    for (int64_t i = 0; i < count; ++i) {
      const Panel& panel = panels[i];
      const Piece& only = pieces[panel.first];
      const T* const b = pixels + panel.before * L * t.depth;
      const int64_t channel0 = group * t.rows + row0;
      const int64_t next = column0 + tasks.columns + panel.before * L;
      const S* const ahead = task + 1 < end && next < all ? in + next / t.plane * t.in_image + next % t.plane : nullptr;
      with_vectors(panel.vectors, [&](auto v) {
        constexpr int M = kTileRows;
        const bool whole = std::is_same_v<S, T> && panel.pieces == 1 && only.count == v * L;
        alignas(64) T beside[M * v * L];
        const int64_t every = smaller(ceil_div(rows, M), 8);
        const auto tile = [&](int64_t m0, auto height) {
          const int64_t inside = smaller(height, rows - m0);
          const T* a[height];
          T bias[height], *to[height];
          for (int64_t m = 0; m < height; ++m) {
            const int64_t row = m0 + smaller(m, inside - 1);
            if constexpr (in_place) {
              a[m] = filters + row * t.depth;
            } else {
              a[m] = weights +
                     (pass == Pass::forward ? row * t.depth : row / kSide<T> * kSide<T> * t.depth + row % kSide<T>);
            }
            bias[m] = o.bias ? value(o.bias[channel0 + row]) : T(0);
            to[m] = beside + m * v * L;
            if constexpr (std::is_same_v<S, T>) {
              if (whole && m < inside) to[m] = o.out + only.n * t.out_image + (channel0 + row) * t.plane + only.p;
            }
          }
          const int64_t turn = m0 / M;
          multiply_rows<S, T, v, height>(
              t.depth, a, pass == Pass::forward ? 1 : kSide<T>, b, bias, to, large && whole && inside == height,
              {ahead && turn < every ? ahead + turn * t.plane : nullptr, every * t.plane, every},
              pass == Pass::forward ? height * t.depth : 0);
          if (whole) return;
          for (int64_t m = 0; m < inside; ++m)
            for (int64_t j = panel.first; j < panel.first + panel.pieces; ++j) {
              const Piece& piece = pieces[j];
              S* const out = o.out + piece.n * t.out_image + (channel0 + m0 + m) * t.plane + piece.p;
              for (int64_t lane = 0; lane < piece.count; lane += L) {
                const int64_t lanes = smaller(L, piece.count - lane);
                store_first(out + lane, load_first(beside + m * v * L + piece.lane + lane, lanes), lanes);
              }
            }
        };
        for (int64_t m = 0; m < rows; m += M) {
          if (rows - m > M / 2) {
            tile(m, std::integral_constant<int, M>());
          } else {
            tile(m, std::integral_constant<int, M / 2>());
          }
        }
      });
    }
  }
  stores_done();
}

template <class S>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  for (int dim = 0; dim < 2; ++dim) {
    if (g.kernel[dim] != 1 || g.stride[dim] != 1 || g.padding[dim] != 0 || g.in[dim] != g.out[dim])
      return "it takes 1x1 kernels at stride 1 without padding: output pixels and input pixels are the same";
  }
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
  return {[](const Conv2dGeometry& g) { return Tasks<Sum<S>>(g, Product(g, pass), kInPlace<S, pass>).total; },
          [](const Conv2dGeometry&) { return kWorkspace<Sum<S>>; }, correlate<S, pass>};
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
#ifndef FLOAT_ONLY
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_planar();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_planar();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_planar();
#endif

}  // namespace cnnops::cpu::CNNOPS_ISA
