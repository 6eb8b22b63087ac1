// Convolution of few input channels: the gradient of the weight, from the input's lines (few_channels.h).
//
//   gw[k, t] =  sum over q of gy[k, q] * line[t][q]            q = oh*OW + ow, t = (c, kw, kh)
//
// Contiguous, these are dot products of two lines, M filters x F taps at a time, whose lanes are added at the end. In
// channels_last the vectors hold filters: F taps x V vectors, and gy is read once for all of them.
//
// A task is the weights of a few filters or taps, whose sums are made for each band, or 64 places of it, from a fresh
// zero and added in the order of bands and images.
#include "few_channels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kSumPlaces = 64;  // of a sum in channels_last
constexpr int64_t kFewTasks = 4;

/// totals[f][m] += the products of line f and plane m of gy, lane by lane.
template <class S, int M, int F>
void planes_product(const int64_t* at, const Sum<S>* lines, const S* gy, int64_t plane, int64_t filters, int64_t places,
                    int64_t width, Vec<Sum<S>>* totals) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const S* grads[M];
  const T* x[F];
  for (int m = 0; m < M; ++m) grads[m] = gy + smaller(m, filters - 1) * plane;
  for (int f = 0; f < F; ++f) x[f] = lines + at[f];
  Vec<T> sum[M][F]{};
  int64_t q = 0;
  for (; q + L <= places; q += L) {
    Vec<T> seen[F];
    for (int f = 0; f < F; ++f) seen[f] = load(x[f] + q);
    for (int m = 0; m < M; ++m) {
      const Vec<T> grad = load(grads[m] + q);
      for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, seen[f], sum[m][f]);
    }
  }
  if (q < places) {
    for (int m = 0; m < M; ++m) {
      const Vec<T> grad = load_first(grads[m] + q, places - q);
      for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, load_first(x[f] + q, places - q), sum[m][f]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int f = 0; f < F; ++f) totals[f * width + m] += sum[m][f];
}

/// totals[f][V vectors] += the products of line f and V vectors of gy's filters, place by place.
template <class S, int F, int V>
void pixels_product(const int64_t* at, const Sum<S>* lines, const S* gy, int64_t filters, int64_t places, int64_t lanes,
                    Vec<Sum<S>>* totals) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const T* x[F];
  for (int f = 0; f < F; ++f) x[f] = lines + at[f];
  Vec<T> sum[F][V]{};
  for (int64_t q = 0; q < places; ++q, gy += filters) {
    Vec<T> grad[V];
    for (int v = 0; v < V - 1; ++v) grad[v] = load(gy + v * L);
    grad[V - 1] = load_first(gy + (V - 1) * L, lanes);
    for (int f = 0; f < F; ++f) {
      const Vec<T> seen = broadcast(x[f][q]);
      for (int v = 0; v < V; ++v) sum[f][v] = multiply_add(seen, grad[v], sum[f][v]);
    }
  }
#pragma GCC unroll 16
  for (int f = 0; f < F; ++f)
    for (int v = 0; v < V; ++v) totals[f * V + v] += sum[f][v];
}

/// Calls f(std::integral_constant n) for a `count` of 1 to `most`.
template <int most, class F>
void with_count(int64_t count, const F& f) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, f);
  }
  f(std::integral_constant<int, most>());
}

/// Tasks are numbered (block of filters, block of taps).
template <class T>
struct WeightTasks {
  int64_t filters, taps, tap_blocks, total;
  explicit WeightTasks(const Conv2dGeometry& g) {
    const bool planes = g.layout == Layout::contiguous;
    const int64_t all = taps_of(g);
    filters = !planes ? Panels<T>(g.k).width : g.k >= 2 * kFewTasks * kTileRows ? 2 * kTileRows : kTileRows;
    const int64_t blocks = ceil_div(g.k, filters), sums = planes ? kTileRows : filters / kLanes<T>;
    tap_blocks = 1;
    while (blocks * tap_blocks < kFewTasks && sums * all >= 12 * tap_blocks) tap_blocks *= 2;
    taps = ceil_div(all, tap_blocks);
    tap_blocks = ceil_div(all, taps);
    total = blocks * tap_blocks;
  }
};

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Bands bands(g, kWeightPlaces);
  const WeightTasks<T> tasks(g);
  const int64_t all = taps_of(g), plane = g.out[0] * g.out[1];
  const bool planes = g.layout == Layout::contiguous;
  T *lines = workspace, *row = lines + kMostLines;
  Vec<T>* totals = reinterpret_cast<Vec<T>*>(row + kLongestRow);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k0 = task / tasks.tap_blocks * tasks.filters, t0 = task % tasks.tap_blocks * tasks.taps;
    const int64_t filters = smaller(tasks.filters, g.k - k0), taps = smaller(tasks.taps, all - t0);
    const int64_t line0 = t0 / g.kernel[0], line1 = (t0 + taps - 1) / g.kernel[0] + 1;
    const int64_t width = planes ? tasks.filters : ceil_div(filters, L);  // vectors of a tap's sums
    for (int64_t i = 0; i < taps * width; ++i) totals[i] = Vec<T>{};
    int64_t at[kMostTaps], columns = -1;
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t i = 0; i < bands.count(); ++i) {
        const Band band(g, bands, i);
        const int64_t places = band.places(), first = band.oh * g.out[1] + band.ow;
        copy_lines(g, bands, band, o.b + n * g.c * g.in[0] * g.in[1], line0, line1, row, lines);
        if (band.columns != columns) {
          columns = band.columns;
          for (int64_t t = 0; t < taps; ++t) at[t] = line_of(g, bands, t0 + t, columns);
        }
        if (planes) {
          const S* gy = o.a + (n * g.k + k0) * plane + first;
          for (int64_t t = 0; t < taps; t += 3)
            with_count<3>(smaller(3, taps - t), [&](auto f) {
              for_filters(filters, [&](int64_t k, auto m) {
                planes_product<S, m, f>(at + t, lines, gy + k * plane, plane, filters - k, places, width,
                                        totals + t * width + k);
              });
            });
        } else {
          const S* gy = o.a + (n * plane + first) * g.k + k0;
          with_vectors<T>(filters, [&](auto v) {
            constexpr int most = kSums / v < kMostPlaces ? kSums / v : kMostPlaces;
            const int64_t size = ceil_div(taps, ceil_div(taps, most));
            for (int64_t q = 0; q < places; q += kSumPlaces)
              for (int64_t t = 0; t < taps; t += size)
                with_count<most>(smaller(size, taps - t), [&](auto f) {
                  pixels_product<S, f, v>(at + t, lines + q, gy + q * g.k, g.k, smaller(kSumPlaces, places - q),
                                          filters - (v - 1) * L, totals + t * width);
                });
          });
        }
      }
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t k = 0; k < filters; ++k)
        o.out[(k0 + k) * all + number_of(g, t0 + t)] =
            rounded<S>(planes ? sum_lanes<T>(totals[t * width + k]) : totals[t * width + k / L][k % L]);
  }
}

}  // namespace

template <class S>
Conv2dRun<S> few_channels_grad_weight() {
  return {[](const Conv2dGeometry& g) { return WeightTasks<Sum<S>>(g).total; },
          [](const Conv2dGeometry& g) {
            return kMostLines + kLongestRow + WeightTasks<Sum<S>>(g).taps * 2 * kTileRows * kLanes<Sum<S>>;
          },
          grad_weight<S>};
}

template Conv2dRun<float> few_channels_grad_weight();
template Conv2dRun<double> few_channels_grad_weight();
template Conv2dRun<BFloat16> few_channels_grad_weight();
template Conv2dRun<Float16> few_channels_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
