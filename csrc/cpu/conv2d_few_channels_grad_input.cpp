// Convolution of few input channels: the gradient of the input, where every pixel of gy hands out what it owes.
//
//   gx[c, oh*stride + kh*dilation - padding, ow*stride + kw*dilation - padding]  +=  sum over k of w[k,c,kh,kw] * gy[k,oh,ow]
//
// Asked what it has to collect, a pixel of gx would be a long sum over filters and taps, and with one or three channels
// few of them fill a register tile. So the loops are turned round. A tile is the products, summed over k, of some
// vectors of a row of gy and one column of taps, all its rows and channels: these go to different rows of gx, to which
// they are added from the registers. gx is summed up in scratch memory (phases.h), so that consecutive outputs are
// added to consecutive numbers.
//
// gy is read once, a few vectors of all its channels at a time, which the first tile (or in channels_last a
// transposition) leaves in the first-level cache for the others; what comes next is fetched from memory meanwhile.
//
// A task is a band of rows of an image. A pixel adds up rows of gy from the first to the last, their taps in one order,
// so that its sum is the same in every band. Refuses few output channels, where adding costs more than the products,
// and rows that fill no vector.
#include "few_channels.h"
#include "phases.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kFewOutputs = 4, kShortestRow = 12;
constexpr int64_t kMostSums = 1 << 16;            // of a task: its part of gx
constexpr int64_t kGoodBands = 4, kFewRows = 28;  // of a large image; rows of a band at least
constexpr int64_t kDepth = 128;                   // of gy's channels that are summed from a fresh zero
constexpr int64_t kPieceColumns = 256;            // of a row of gy, fetched ahead
constexpr int kMostColumnVectors = 3;
constexpr int kTileTaps = kTileRows == 8 ? 9 : kTileRows;

/// Tasks are numbered (n, band).
struct InputTasks {
  Phases phases;
  int64_t rows, bands;

  explicit InputTasks(const Conv2dGeometry& g) : phases(g) {
    rows = smaller(kMostSums / (g.c * phases.row_numbers()), larger(kFewRows, ceil_div(g.in[0], kGoodBands)));
    rows = larger(1, smaller(g.in[0], rows));
    bands = ceil_div(g.in[0], rows);
  }
};

/// Rows of gy that are wanted next, fetched a line at a time.
struct Ahead {
  const char* from = nullptr;
  int64_t rows = 0, bytes = 0, pitch = 0, at = 0;

  void fetch() {
    if (rows == 0) return;
    __builtin_prefetch(from + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    from += pitch;
    --rows;
  }
};

/// to[m][V vectors] += sum over `depth` channels of weights[channel][m] * their V vectors of columns. These come from
/// `gy`, and are left in `columns`, or are there.
template <class S, int M, int V, bool copies>
void add_products(int64_t depth, const Sum<S>* weights, int64_t pitch, const S* gy, int64_t plane, Sum<S>* columns,
                  int64_t lanes, Sum<S>* const* to, Ahead& fetched) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  Ahead ahead = fetched;
  Vec<T> sum[M][V]{};
  for (int64_t k = 0; k < depth; ++k, weights += pitch, columns += V * L) {
    ahead.fetch();
    Vec<T> grad[V];
    for (int v = 0; v < V; ++v) {
      if constexpr (copies) {
        grad[v] = v < V - 1 ? load(gy + v * L) : load_first(gy + v * L, lanes);
        store(columns + v * L, grad[v]);
      } else {
        grad[v] = load(columns + v * L);
      }
    }
    if constexpr (copies) gy += plane;
    for (int m = 0; m < M; ++m) {
      const Vec<T> weight = broadcast(weights[m]);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(weight, grad[v], sum[m][v]);
    }
  }
  fetched = ahead;
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* p = to[m] + v * L;
      if (v < V - 1) {
        store(p, load(p) + sum[m][v]);
      } else {
        store_first(p, load_first(p, lanes) + sum[m][v], lanes);
      }
    }
}

/// columns[channel][width] = gy's of so many pixels, which each have their channels together.
template <class S>
void turn(const S* gy, int64_t step, int64_t depth, int64_t pixels, int64_t width, Sum<S>* columns) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t q = 0; q < width; q += L)
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t count = smaller(L, depth - k);
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = load_first(gy + smaller(q + i, pixels - 1) * step + k, count);
      transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) store(columns + (k + i) * width + q, square[i]);
    }
}

/// to[kw][k][kh, c]
template <class S>
void pack_filters(const Conv2dGeometry& g, const S* weight, int64_t depth, Sum<S>* to) {
  const bool planes = g.layout == Layout::contiguous;
  const int64_t c_step = planes ? g.kernel[0] * g.kernel[1] : 1, tap_step = planes ? 1 : g.c, taps = taps_of(g);
  for (int64_t kw = 0; kw < g.kernel[1]; ++kw)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t kh = 0; kh < g.kernel[0]; ++kh)
        for (int64_t c = 0; c < g.c; ++c)
          *to++ = value(weight[k * taps + (kh * g.kernel[1] + kw) * tap_step + c * c_step]);
}

/// Rows of gx from their sums.
template <class S>
void write_rows(const Conv2dGeometry& g, const InputTasks& tasks, const Sum<S>* sums, const S* bias, int64_t h0,
                int64_t rows, S* image) {
  const bool planes = g.layout == Layout::contiguous;
  for (int64_t c = 0; c < g.c; ++c)
    for (int64_t i = 0; i < rows; ++i, sums += tasks.phases.row_numbers())
      tasks.phases.write_row(sums, bias ? value(bias[c]) : Sum<S>(0), g.in[1], planes ? 1 : g.c,
                             image + (planes ? (c * g.in[0] + h0 + i) * g.in[1] : (h0 + i) * g.in[1] * g.c + c));
}

template <class S>
void grad_input(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const InputTasks tasks(g);
  const bool planes = g.layout == Layout::contiguous;
  const int64_t plane = g.out[0] * g.out[1], taps = taps_of(g), lines = g.kernel[0] * g.c;
  const int64_t pieces = ceil_div(g.out[1], kPieceColumns), piece = ceil_div(g.out[1], pieces);
  T *sums = workspace, *weights = sums + kMostSums + L, *columns = weights + taps * smaller(g.k, kDepth) + L;
  int64_t packed = -1;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / tasks.bands, h0 = task % tasks.bands * tasks.rows;
    const int64_t rows = smaller(tasks.rows, g.in[0] - h0);
    for (int64_t i = 0; i < g.c * rows * tasks.phases.row_numbers(); i += L) store(sums + i, Vec<T>{});
    int64_t line[kMostTaps];  // where row kh of taps adds to channel c, if the row of gy were the band's first of gx
    for (int64_t i = 0; i < lines; ++i)
      line[i] = (i % g.c * rows + i / g.c * g.dilation[0] - g.padding[0] - h0) * tasks.phases.row_numbers();

    for (int64_t k0 = 0; k0 < g.k; k0 += kDepth) {
      const int64_t depth = smaller(kDepth, g.k - k0);
      if (packed != k0) pack_filters(g, o.b + k0 * taps, depth, weights);
      packed = k0;
      const S* gy = o.a + (planes ? (n * g.k + k0) * plane : n * plane * g.k + k0);
      for (int64_t oh = 0; oh < g.out[0]; ++oh) {
        const KernelRows kh(g, oh, h0, rows);
        const int64_t kh0 = kh.first, kh1 = kh.last;
        if (kh0 >= kh1) continue;
        const int64_t size = ceil_div((kh1 - kh0) * g.c, ceil_div((kh1 - kh0) * g.c, kTileTaps));
        T* to = sums + oh * g.stride[0] * tasks.phases.row_numbers();
        for (int64_t ow0 = 0, ow1; ow0 < g.out[1]; ow0 = ow1) {
          ow1 = smaller(ow0 + piece, g.out[1]);
          const int64_t next = oh * g.out[1] + ow1, count = smaller(piece, plane - next), bytes = sizeof(S);
          Ahead ahead;
          if (count > 0 && planes)
            ahead = {(const char*)(gy + next), depth, count * bytes, plane * bytes};
          else if (count > 0)
            ahead = {(const char*)(gy + next * g.k), count, depth * bytes, g.k * bytes};

          const int64_t vectors = ceil_div(ow1 - ow0, L), panels = ceil_div(vectors, kMostColumnVectors);
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t v0 = vectors * panel / panels, v1 = vectors * (panel + 1) / panels, ow = ow0 + v0 * L;
            const int64_t pixels = smaller((v1 - v0) * L, ow1 - ow), lanes = pixels - (v1 - v0 - 1) * L;
            const S* from = gy + (oh * g.out[1] + ow) * (planes ? 1 : g.k);
            if (!planes) turn(from, g.k, depth, pixels, (v1 - v0) * L, columns);
            bool copied = !planes;
            for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
              T* column = to + tasks.phases.place(g, kw) + ow;
              for (int64_t m0 = kh0 * g.c; m0 < kh1 * g.c; m0 += size)
                with_count<kMostColumnVectors>(v1 - v0, [&](auto v) {
                  with_count<kTileTaps>(smaller(size, kh1 * g.c - m0), [&](auto m) {
                    T* rows_of[m];
                    for (int64_t i = 0; i < m; ++i) rows_of[i] = column + line[m0 + i];
                    const T* filters = weights + kw * depth * lines + m0;
                    if (copied) {
                      add_products<T, m, v, false>(depth, filters, lines, nullptr, 0, columns, lanes, rows_of, ahead);
                    } else {
                      add_products<S, m, v, true>(depth, filters, lines, from, plane, columns, lanes, rows_of, ahead);
                    }
                    copied = true;
                  });
                });
            }
          }
        }
      }
    }
    write_rows(g, tasks, sums, o.bias, h0, rows, o.out + n * g.c * g.in[0] * g.in[1]);
  }
}

}  // namespace

const char* few_channels_grad_input_refuses(const Conv2dGeometry& g) {
  if (g.k < kFewOutputs) return "with less than 4 output channels the adding costs more than the products";
  if (g.out[1] < kShortestRow) return "rows of less than 12 outputs fill no vector";
  if (g.c * Phases(g).row_numbers() > kMostSums) return "a row of results passes its buffer of 2^16 numbers";
  return nullptr;
}

template <class S>
Conv2dRun<S> few_channels_grad_input() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) { return g.n * InputTasks(g).bands; },
          [](const Conv2dGeometry& g) {
            return kMostSums + taps_of(g) * smaller(g.k, kDepth) + (kMostColumnVectors * kDepth + 2) * kLanes<T>;
          },
          grad_input<S>};
}

template Conv2dRun<float> few_channels_grad_input();
template Conv2dRun<double> few_channels_grad_input();
template Conv2dRun<BFloat16> few_channels_grad_input();
template Conv2dRun<Float16> few_channels_grad_input();

}  // namespace cnnops::cpu::CNNOPS_ISA
