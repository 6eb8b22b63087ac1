// Convolution of few input channels: the gradient of the weight.
//
//   gw[k, t]  =  sum over p of gy[p, k] * x[place of p + offset of t]         p = (n, oh, ow), t a number of the filter
//
// A first layer's gy is large, its x and gw are small: so gy is read once, for all numbers of the filter. The vectors
// hold output channels, the rows of a tile numbers of the filter, the steps go along a row of outputs; what tap t sees
// there is a line of x, one number every stride. In channels_last, gy is multiplied where it stands. Contiguous, its
// planes are turned a block at a time, which costs little against the many taps that a block is used for.
//
// The rows of outputs are cut into strips, strips into blocks of about 64 places that are summed from a fresh zero and
// added in order. A task is the filters of a panel and one of at most 16 parts of all strips: parts are added up in
// their order at the end. Only the rows of x under a few strips are copied, with their border.
#include "channels_last_tile.h"
#include "few_channels.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockPlaces = 64;
constexpr int64_t kMostParts = 16, kPartPlaces = 512;  // of a part at least
constexpr int64_t kPartNumbers = 1 << 19;              // of all parts together at most
constexpr int64_t kGoodImage = 1 << 14;  // numbers of x that are copied at a time, where one strip has fewer

/// How the outputs are cut, and the tasks: numbered (panel of filters, part).
template <class T>
struct WeightTasks {
  int64_t taps;
  int64_t columns, rows, strips;  // of a block; strips of `rows` rows in an image
  int64_t x_columns;              // of x under a row of outputs
  Panels<T> panels;
  int64_t parts, total;

  explicit WeightTasks(const Conv2dGeometry& g) : taps(taps_of(g)), panels(g.k) {
    const int64_t width = g.out[1];
    columns = width <= kBlockPlaces ? width : round_up(ceil_div(width, ceil_div(width, kBlockPlaces)), kLanes<T>);
    rows = smaller(larger(1, kBlockPlaces / columns), g.out[0]);
    strips = ceil_div(g.out[0], rows);
    x_columns = seen_by(g, 1, width);
    parts = 1;
    while (parts < kMostParts && g.n * g.out[0] * width >= 2 * parts * kPartPlaces &&
           2 * parts * g.k * taps <= kPartNumbers)
      parts *= 2;
    total = panels.count * parts;
  }
  int64_t x_numbers(const Conv2dGeometry& g, int64_t out_rows) const {
    return g.c * x_columns * seen_by(g, 0, out_rows);
  }
};

/// to[place][width]: channels [0, channels) of so many places, and what a whole panel has more is zero.
template <class S>
void copy_gradients(const Conv2dGeometry& g, const S* gy, int64_t places, int64_t channels, int64_t width, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  if (g.layout == Layout::channels_last) {
    for (int64_t q = 0; q < places; ++q, gy += g.k, to += width)
      for (int64_t k = 0; k < width; k += L) store(to + k, load_first(gy + k, larger(0, smaller(L, channels - k))));
    return;
  }
  const int64_t plane = g.out[0] * g.out[1];
  for (int64_t k = 0; k < width; k += L)
    for (int64_t q = 0; q < places; q += L) {
      const int64_t count = smaller(L, places - q);
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i)
        square[i] = k + i < channels ? load_first(gy + (k + i) * plane + q, count) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) store(to + (q + i) * width + k, square[i]);
    }
}

/// A block of outputs: where its gradients and the first pixel that it sees stand, and how far it is to the next of
/// each.
template <class T>
struct Block {
  int64_t rows, columns;
  const T* gy;
  int64_t gy_step, gy_row;
  const T* x;
  int64_t x_step, x_row;
};

/// totals[f][V vectors] += the products of a block's gradients and what tap f sees of it.
template <class T, int F, int V>
void add_products(const Block<T>& block, const int64_t* at, T* totals) {
  constexpr int64_t L = kLanes<T>;
  const T* x[F];
  for (int f = 0; f < F; ++f) x[f] = block.x + at[f];
  Vec<T> sum[F][V]{};
  for (int64_t i = 0; i < block.rows; ++i) {
    const T* gy = block.gy + i * block.gy_row;
    for (int64_t q = 0; q < block.columns * block.x_step; q += block.x_step, gy += block.gy_step) {
      Vec<T> grad[V];
      for (int v = 0; v < V; ++v) grad[v] = load(gy + v * L);
      for (int f = 0; f < F; ++f) {
        const Vec<T> seen = broadcast(x[f][q]);
        for (int v = 0; v < V; ++v) sum[f][v] = multiply_add(seen, grad[v], sum[f][v]);
      }
    }
    for (int f = 0; f < F; ++f) x[f] += block.x_row;
  }
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int f = 0; f < F; ++f)
    for (int v = 0; v < V; ++v, totals += L) store(totals, load(totals) + sum[f][v]);
}

/// Gradients that are wanted soon: `lines` lines of so many numbers.
template <class S>
struct Ahead {
  const S* from;
  int64_t lines, pitch, length;
  /// Fetches part i of `parts` of them.
  void fetch(int64_t i, int64_t parts) const {
    for (int64_t line = lines * i / parts; line < lines * (i + 1) / parts; ++line)
      CNNOPS_ISA::fetch(from + line * pitch, length);
  }
};

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const WeightTasks<T> tasks(g);
  const bool planes = g.layout == Layout::contiguous;
  const int64_t taps = tasks.taps, plane = g.out[0] * g.out[1];
  T *x = workspace, *grads = x + kMostLines, *totals = grads + kBlockPlaces * kMostVectors * kLanes<T>;
  const int64_t step = planes ? 1 : g.c;  // from a pixel of x to the next

  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % tasks.parts, k0 = task / tasks.parts * tasks.panels.width;
    const int64_t filters = smaller(tasks.panels.width, g.k - k0), width = round_up(filters, kLanes<T>);
    for (int64_t i = 0; i < taps * width; ++i) totals[i] = 0;

    const int64_t last = g.n * tasks.strips * (part + 1) / tasks.parts;
    for (int64_t strip = g.n * tasks.strips * part / tasks.parts, next; strip < last; strip = next) {
      const int64_t n = strip / tasks.strips, oh0 = strip % tasks.strips * tasks.rows;
      const auto rows_to = [&](int64_t s) { return smaller((s - n * tasks.strips) * tasks.rows, g.out[0]) - oh0; };
      next = strip + 1;
      while (next < smaller(last, (n + 1) * tasks.strips) && tasks.x_numbers(g, rows_to(next + 1)) <= kGoodImage)
        ++next;
      const int64_t rows = rows_to(next), x_rows = seen_by(g, 0, rows);
      copy_rows(g, o.b + n * g.c * g.in[0] * g.in[1], oh0 * g.stride[0] - g.padding[0], -g.padding[1], x_rows,
                tasks.x_columns, x);
      int64_t at[kMostTaps];
      find_numbers(g, x_rows, tasks.x_columns, at);

      for (int64_t r = 0; r < rows; r += tasks.rows)
        for (int64_t ow = 0; ow < g.out[1]; ow += tasks.columns) {
          const int64_t block_rows = smaller(tasks.rows, rows - r), columns = smaller(tasks.columns, g.out[1] - ow);
          const int64_t place = (oh0 + r) * g.out[1] + ow, x_row = g.stride[0] * tasks.x_columns * step;
          const int64_t x_step = g.stride[1] * step;
          const S* gy = planes ? o.a + (n * g.k + k0) * plane + place : o.a + (n * plane + place) * g.k + k0;
          const int64_t places = block_rows * columns, left = smaller(places, plane - place - places);
          const Ahead<S> ahead =
              planes ? Ahead<S>{gy + places, filters, plane, left} : Ahead<S>{gy + places * g.k, left, g.k, filters};
          Block<T> block{block_rows, columns, grads, width, g.out[1] * width, x + r * x_row + ow * x_step,
                         x_step,     x_row};
          bool stands = false;
          if constexpr (std::is_same_v<S, T>) {
            if (!planes && k0 + width <= g.k) {
              stands = true;
              block.gy = gy;
              block.gy_step = g.k;
              block.gy_row = g.out[1] * g.k;
            }
          }
          if (!stands) copy_gradients(g, gy, places, filters, width, grads);
          with_vectors<T>(width, [&](auto v) {
            constexpr int64_t most = kRows<v>;
            const int64_t tiles = ceil_div(taps, most), size = ceil_div(taps, tiles);
            for (int64_t t = 0; t < taps; t += size) {
              ahead.fetch(t / size, tiles);
              with_count<most>(smaller(size, taps - t),
                               [&](auto f) { add_products<T, f, v>(block, at + t, totals + t * width); });
            }
          });
        }
    }
    const auto put = [&](auto* to) { put_block(totals, width, taps, filters, true, taps, to + k0 * taps); };
    if (tasks.parts > 1)
      put(o.parts + part * g.k * taps);
    else
      put(o.out);
  }
}

}  // namespace

const char* few_channels_grad_weight_refuses(const Conv2dGeometry& g) {
  const WeightTasks<float> tasks(g);
  if (tasks.x_numbers(g, tasks.rows) > kMostLines)
    return "the rows under a strip of outputs pass its buffer of 2^17 numbers";
  return nullptr;
}

template <class S>
Conv2dRun<S> few_channels_grad_weight() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) { return WeightTasks<T>(g).total; },
          [](const Conv2dGeometry& g) { return kMostLines + (kBlockPlaces + taps_of(g)) * kMostVectors * kLanes<T>; },
          grad_weight<S>, [](const Conv2dGeometry& g) { return WeightTasks<T>(g).parts; }, add_parts<S>};
}

template Conv2dRun<float> few_channels_grad_weight();
template Conv2dRun<double> few_channels_grad_weight();
template Conv2dRun<BFloat16> few_channels_grad_weight();
template Conv2dRun<Float16> few_channels_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
