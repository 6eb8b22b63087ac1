// The filters of Winograd's convolution (winograd.h): how their weights come to the transforms; and the products of
// what has been transformed, a matrix product for each point, in register tiles.
#pragma once

#include "panels.h"
#include "winograd.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// Of few vectors even and odd terms are summed apart: so many rows that each had its sum would be more than there are
/// registers for their addresses.
constexpr int ways(int64_t vectors) { return vectors < (kTileRows == 8 ? 3 : 2) ? 2 : 1; }
/// The register tile's rows. Where registers are left over, numbers of channels and tiles that are multiples of 8 fit.
constexpr int tile_rows(int64_t vectors) {
  return static_cast<int>((kTileRows == 8 && vectors < 3 ? 16 / vectors : kSums / vectors) / ways(vectors));
}

/// Where copy_filters() leaves the weights of a channel and a tap: so many vectors from one to the next.
struct FilterSteps {
  int64_t channel, tap;
};

/// The weights of `lanes` produced and `count` summed channels, at most a vector of each, as vectors of produced
/// channels.
template <class S>
static inline FilterSteps copy_filters(const Layer& t, const S* from, int64_t lanes, int64_t count, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t taps = t.taps * t.taps;
  const FilterSteps by_channel{taps, 1}, by_tap{1, L};
  if (t.weight_row == 1) {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t tap = 0; tap < taps; ++tap)
        store(to + (c * taps + tap) * L, load_first(from + c * t.weight_channel + tap * t.weight_tap, lanes));
    return by_channel;
  }
  const auto turn_run = [&](const S* run, int64_t length, Sum<S>* vectors) {
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t i = 0; i < length; i += kLine)
        __builtin_prefetch(run + (L + lane) * t.weight_row + i);  // of the next vector of produced channels
    turn(run, t.weight_row, length, lanes, L, vectors);
  };
  if (t.weight_tap != 1) {  // channels lie side by side
    for (int64_t tap = 0; tap < taps; ++tap) turn_run(from + tap * t.weight_tap, count, to + tap * L * L);
    return by_tap;
  }
  if (t.weight_channel == taps) {
    turn_run(from, count * taps, to);
  } else {
    for (int64_t c = 0; c < count; ++c) turn_run(from + c * t.weight_channel, taps, to + c * taps * L);
  }
  return by_channel;
}

/// to[point][c][lane], for a panel of `rows` produced channels: `point` numbers from point to point.
template <class Form, class S>
static inline void transform_filters(const Layer& t, const S* weight, int64_t rows, int64_t channels, int64_t width,
                                     int64_t point, Sum<S>* scratch, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>, taps = Form::taps, all = taps * taps;
  for (int64_t row = 0; row < width; row += L)
    for (int64_t c0 = 0; c0 < channels; c0 += L) {
      const int64_t count = smaller(L, channels - c0), lanes = larger(smaller(L, rows - row), 0);
      const FilterSteps steps =
          copy_filters(t, weight + row * t.weight_row + c0 * t.weight_channel, lanes, count, scratch);
      const int64_t tap = (t.mirrored ? -L : L) * steps.tap;
      for (int64_t c = 0; c < count; ++c) {
        const T* filter = scratch + (c * steps.channel + (t.mirrored ? all - 1 : 0) * steps.tap) * L;
        T* points = to + (c0 + c) * width + row;
        const int64_t apart = counted(point);
        transform<Points<Form::rows, taps>, Points<Form::columns, taps>, T>(
            [&](int i, int j) { return load(filter + (i * taps + j) * tap); },
            [&](int i, int j, Vec<T> x) { store(points + (i * Form::columns + j) * apart, x); });
      }
    }
}

/// sums[m][V vectors] (+)= sum over c of a[m*row_step + c*step] * b[c][V vectors].
template <class T, int V, int M>
static inline void multiply_tile(int64_t depth, const T* a, int64_t row_step, int64_t step, const T* b, T* sums,
                                 bool add) {
  constexpr int W = ways(V), L = kLanes<T>;
  Vec<T> sum[W][M][V]{};
  const auto add_terms = [&](int terms) {
    for (int way = 0; way < terms; ++way, a += step, b += V * L) {
      Vec<T> column[V];
      for (int v = 0; v < V; ++v) column[v] = load(b + v * L);
      for (int m = 0; m < M; ++m) {
        const Vec<T> x = broadcast(a[m * row_step]);
        for (int v = 0; v < V; ++v) sum[way][m][v] = multiply_add(x, column[v], sum[way][m][v]);
      }
    }
  };
  int64_t c = 0;
  for (; c + W <= depth; c += W) add_terms(W);
  if (c < depth) add_terms(1);
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = sums + (m * V + v) * L;
      if (W > 1) sum[0][m][v] += sum[W - 1][m][v];
      store(to, add ? load(to) + sum[0][m][v] : sum[0][m][v]);
    }
}

/// The same for any number of rows.
template <class T, int V>
static inline void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t row_step, int64_t step, const T* b,
                                 T* sums, bool add) {
  for (int64_t row = 0; row < rows;)
    with_rows<tile_rows(V)>(rows - row, [&](auto m) {
      multiply_tile<T, V, m>(depth, a + row * row_step, row_step, step, b, sums + row * V * kLanes<T>, add);
      row += m;
    });
}

/// sums[point][tile][lane] (+)= sum over c of v[point][tile][c] * u[point][c][lane]: `*_point` numbers from point to
/// point, `stride` from tile to tile of v.
template <class T>
struct Factors {
  const T *v, *u;
  T* sums;
  int64_t v_point, u_point, sum_point, stride;
};

template <class T, int V>
static inline void multiply_points(const Factors<T>& f, int64_t points, int64_t tiles, int64_t depth, bool add) {
  for (int64_t point = 0; point < points; ++point)
    multiply_rows<T, V>(tiles, depth, f.v + point * f.v_point, f.stride, 1, f.u + point * f.u_point,
                        f.sums + point * f.sum_point, add);
}

template <class T>
static inline auto multiply_points_by(int64_t vectors) {
  return vectors == 1   ? multiply_points<T, 1>
         : vectors == 2 ? multiply_points<T, 2>
         : vectors == 3 ? multiply_points<T, 3>
                        : multiply_points<T, kMostVectors>;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
