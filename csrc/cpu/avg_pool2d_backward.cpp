// Average pooling, backward: a pixel gets gy / divisor of each output that sees it.
//
// What the outputs of a column give to row ih is divided and added up first, then that of the columns, each in the
// order of the taps.
#include "avg_pool2d.h"
#include "pool2d_overlaps.h"
#include "pool2d_pixels.h"
#include "pool2d_rows.h"
#include "pool2d_squares.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kMostRows = 8;
constexpr int64_t kRing = 8;

/// A row of pixels in channels_last that is seen by output rows `rows` of the plane gy, for windows at equal distances,
/// at most `most` of which show a pixel.
template <int most, class S, class Channels>
void spread_columns(const Pool2dGeometry& g, const Divisions<Sum<S>>& divisions, Range rows, const S* gy,
                    const Channels& channels, S* row) {
  using T = Sum<S>;
  constexpr int size = Channels::size;
  const int64_t stride = g.stride[1], depth = g.c, outputs = g.out[1], width = g.in[1], taps = g.kernel[1];
  const Range full = divisions.columns;
  const int64_t count = rows.end - rows.begin;
  Division<T> by_row[kMostRows] = {};
  for (int64_t i = 0; i < count; ++i) by_row[i] = divisions.at(rows.end - 1 - i, full.begin);
  Vec<T> columns[most][size] = {};  // columns[back] is that of output ow - back, zero if there is none
  for (int64_t ow = 0, first = -g.padding[1]; first < width; ++ow, first += stride) {
    for (int back = most - 1; back > 0; --back)
      for (int i = 0; i < size; ++i) columns[back][i] = columns[back - 1][i];
    for (int i = 0; i < size; ++i) columns[0][i] = Vec<T>{};
    if (ow < outputs) {
      const bool is_full = ow >= full.begin && ow < full.end;
      const S* from = gy + ((rows.end - 1) * outputs + ow) * depth;
      for (int64_t i = 0; i < count; ++i, from -= outputs * depth) {
        const Division<T> divide = is_full ? by_row[i] : divisions.at(rows.end - 1 - i, ow);
        for (int j = 0; j < size; ++j) columns[0][j] += divide(channels.load(from, j));
      }
    }
    const int64_t begin = larger(0, -first), end = smaller(stride, width - first);
    for (int64_t kw = begin; kw < end; ++kw) {
      Vec<T> sums[size] = {};
      for (int back = 0; back < most; ++back)
        for (int i = 0; i < size; ++i)
          if (kw + back * stride < taps) sums[i] += columns[back][i];
      for (int i = 0; i < size; ++i) channels.store(row + (first + kw) * depth, i, sums[i]);
    }
  }
}

/// In channels_last. What a column gives is kept in `ring` for all pixels that it reaches.
template <class S>
void average_backward_of_pixels(const Pool2dGeometry& g, Divisor d, const S* gy, S* gx, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const bool past = pixels_past_cache(g, g.in, gx);
  const Divisions<T> divisions{g, d};
  const int64_t most = g.adaptive ? g.out[1] / g.in[1] + 2 : ceil_div(g.kernel[1], g.stride[1]);
  const bool in_ring = most <= kRing, alike = !g.adaptive && ceil_div(g.kernel[0], g.stride[0]) <= kMostRows;
  Range rows{0, 0};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t ih = task % g.in[0], image = task / g.in[0] * g.out[0];
    S* row = gx + task * g.in[1] * g.c;
    const Range before = rows;
    rows = outputs_over(g, 0, ih);
    if (!past && task > begin && ih > 0 && rows.begin == before.begin && rows.end == before.end) {
      __builtin_memcpy(row, row - g.in[1] * g.c, g.in[1] * g.c * sizeof(S));
      continue;
    }
    for_stretches<T>(g.c, past, [&](auto channels) {
      constexpr int size = channels.size;
      Vec<T> ring[kRing][size], sums[size];
      const auto find_column = [&](int64_t ow, Vec<T>* column) {
        for (int i = 0; i < size; ++i) column[i] = Vec<T>{};
        for (int64_t oh = rows.end - 1; oh >= rows.begin; --oh) {
          const Division<T> divide = divisions.at(oh, ow);
          const S* from = gy + ((image + oh) * g.out[1] + ow) * g.c;
          for (int i = 0; i < size; ++i) column[i] += divide(channels.load(from, i));
        }
      };
      const S* plane = gy + image * g.out[1] * g.c;
      if (alike && most == 1) return spread_columns<1>(g, divisions, rows, plane, channels, row);
      if (alike && most == 2) return spread_columns<2>(g, divisions, rows, plane, channels, row);
      if (alike && most == 3) return spread_columns<3>(g, divisions, rows, plane, channels, row);
      int64_t first = 0, last = 0;  // the outputs that see the pixel
      Window next = window_at(g, 1, 0);
      int64_t starts = next.start, ends = next.start + next.end;  // of `last` and `first`
      for (int64_t iw = 0; iw < g.in[1];) {
        for (; last < g.out[1] && starts <= iw; starts = window_at(g, 1, ++last).start)
          if (in_ring) find_column(last, ring[last % kRing]);
        while (first < last && ends <= iw) {
          next = window_at(g, 1, ++first);
          ends = next.start + next.end;
        }
        for (int i = 0; i < size; ++i) sums[i] = Vec<T>{};
        for (int64_t ow = last - 1; ow >= first; --ow) {
          if (!in_ring) find_column(ow, ring[0]);
          const Vec<T>* column = ring[in_ring ? ow % kRing : 0];
          for (int i = 0; i < size; ++i) sums[i] += column[i];
        }
        int64_t until = g.in[1];
        if (last < g.out[1]) until = smaller(until, starts);
        if (first < last) until = smaller(until, ends);
        for (; iw < until; ++iw)
          for (int i = 0; i < size; ++i) channels.store(row + iw * g.c, i, sums[i]);
      }
    });
  }
  if (past) stores_done();
}

/// What columns [ow, ow + lanes) give, zero for those that do not exist.
template <class S>
Vec<Sum<S>> columns_at(const Pool2dGeometry& g, const Divisor& d, Range full, Range rows, const S* gy, int64_t ow) {
  using T = Sum<S>;
  Vec<T> columns{};
  for (int64_t oh = rows.end - 1; oh >= rows.begin; --oh)
    columns += divided<T>(g, d, full, oh, ow, load_inside(gy + oh * g.out[1], g.out[1], ow, kLanes<T>));
  return columns;
}

constexpr int64_t kPixels = 256;  // of a row at a time

/// Some rows in contiguous layout, for strides 1 and 2: vectors hold pixels `stride` apart. What the columns give is
/// found for all rows first, as numbers just written are slow to read at other places.
template <class S>
void average_backward_by_vectors(const Pool2dGeometry& g, const Divisor& d, Range full, const S* gy, S* gx,
                                 int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  T columns[kRowsTogether][kPixels + kMostTaps + 3 * L];
  const T* of_row[kRowsTogether];
  const int64_t s = g.stride[1], shift = s - 1, width = g.in[1];
  for (int64_t task = begin; task < end;) {
    const int64_t image = task / g.in[0],
                  next = smaller(smaller(end, task + rows_together<T>(g)), (image + 1) * g.in[0]);
    for (int64_t from = 0; from < width; from += kPixels) {
      const int64_t to = smaller(from + kPixels, width), last_block = larger(from, to - s * L);
      const int64_t first = (from + g.padding[1] - g.kernel[1] + s) >> shift;
      const int64_t last = ((last_block + g.padding[1] + shift) >> shift) + L;
      Range rows{0, 0};
      for (int64_t row = 0; row < next - task; ++row) {
        const Range before = rows;
        rows = outputs_over(g, 0, task + row - image * g.in[0]);
        of_row[row] = columns[row];
        if (row > 0 && rows.begin == before.begin && rows.end == before.end) {
          of_row[row] = of_row[row - 1];
          continue;
        }
        const S* plane = gy + image * g.out[0] * g.out[1];
        for (int64_t ow = first; ow < last; ow += L) {
          const bool exist = ow < g.out[1] && ow + L > 0;
          store(columns[row] + (ow - first), exist ? columns_at(g, d, full, rows, plane, ow) : Vec<T>{});
        }
      }
      for (int64_t row = task; row < next; ++row) {
        const T* column = of_row[row - task] - first;
        for (int64_t i = from; i < to; i += s * L) {
          const int64_t iw = larger(from, smaller(i, to - s * L));
          Vec<T> sums[2] = {};
          const int64_t reach = iw + g.padding[1], odd = reach & shift;
          for (int64_t kw = odd; kw < g.kernel[1]; kw += s) sums[0] += load(column + ((reach - kw) >> shift));
          for (int64_t kw = shift - odd; s == 2 && kw < g.kernel[1]; kw += s)
            sums[1] += load(column + ((reach + 1 - kw) >> shift));
          const int64_t count = width > kPixels ? smaller(to - iw, s * L) : pixels_to_put<T>(g, iw, end - row);
          put_by_turns(gx + row * width + iw, sums, s, count, std::make_integer_sequence<int, int(L)>());
        }
      }
    }
    task = next;
  }
}

/// The same for any strides, and for adaptive windows.
template <class S>
void average_backward_by_outputs(const Pool2dGeometry& g, const Divisor& d, Range full, Range rows, const S* gy, S* gx,
                                 int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  T sums[kPixels] = {}, columns[L];
  const int64_t first = outputs_over(g, 1, begin).begin;
  for (int64_t ow = outputs_over(g, 1, end - 1).end - L; ow > first - L; ow -= L) {
    store(columns, columns_at(g, d, full, rows, gy, ow));
    for (int64_t j = L - 1; j >= 0 && ow + j >= first; --j) {
      const Window w = window_at(g, 1, ow + j);
      const int64_t to = smaller(w.start + w.end, end);
      for (int64_t iw = larger(w.start + w.begin, begin); iw < to; ++iw) sums[iw - begin] += columns[j];
    }
  }
  for (int64_t i = 0; i < end - begin; i += L) {
    const int64_t count = smaller(end - begin - i, L);
    count == L ? store(gx + begin + i, load(sums + i)) : store_first(gx + begin + i, load(sums + i), count);
  }
}

/// A row for windows side by side.
template <class S>
void average_backward_side_by_side(const Pool2dGeometry& g, const Divisor& d, Range full, Range rows, const S* gy,
                                   S* gx) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  T columns[L];
  S* const end = gx + g.in[1];
  for (int64_t ow = 0; ow < g.out[1]; ow += L) {
    store(columns, columns_at(g, d, full, rows, gy, ow));
    for (int64_t j = 0; j < smaller(L, g.out[1] - ow); ++j) {
      const S grad = rounded<S>(columns[j]);
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) *gx++ = grad;
    }
  }
  while (gx < end) *gx++ = S{};
}

/// The same for windows of 2x2 that do not overlap.
template <class S>
void average_backward_of_squares(const Pool2dGeometry& g, const Divisor& d, const S* gy, S* gx, int64_t begin,
                                 int64_t end) {
  using T = Sum<S>;
  const Division<T> divide(divisor_at<T>(g, d, 0, 0));
  const auto give = [&](int64_t out, auto count) {
    const Vec<T> grad = Vec<T>{} + divide(count == kLanes<T> ? load(gy + out) : load_first(gy + out, count));
    return Square<T>{{{grad, grad}, {grad, grad}}};
  };
  backward_squares(g, give, gx, begin, end);
}

/// The same for windows of 3x3 that are two apart.
template <class S>
struct AverageOverlaps {
  using T = Sum<S>;
  using Given = Vec<T>;
  const Pool2dGeometry& g;
  const Divisor& d;
  const S* gy;
  Divisions<T> divisions{g, d};
  const S* plane = gy;

  void begin(int64_t number) { plane = gy + number * g.out[0] * g.out[1]; }
  Vec<T> at(int64_t oh, int64_t ow, Lanes lanes) const {
    const Vec<T> grad = load_outputs(plane + oh * g.out[1] + ow, lanes);
    if (divisions.are_full(oh, ow + lanes.begin) && divisions.are_full(oh, ow + lanes.end - 1))
      return divisions.full(grad);
    return divided<T>(g, d, divisions.columns, oh, ow, grad);
  }
  template <int padding>
  void give(const Vec<T> (&given)[2][2], Vec<T> (&sums)[2][2]) const {
    for (int row = 0; row < 2; ++row)
      for (int later = 1; later >= 0; --later) {
        Vec<T> column{};
        for (int lower = 1; lower >= 0; --lower)
          if (is_tap(tap_of(padding, row, lower))) column += given[lower][later];
        for (int odd = 0; odd < 2; ++odd)
          if (is_tap(tap_of(padding, odd, later))) sums[row][odd] += column;
      }
  }
};

template <class S>
void average_backward_of_rows(const Pool2dGeometry& g, Divisor d, const S* gy, S* gx, int64_t begin, int64_t end) {
  const Range full = full_windows(g, d, 1);
  if (goes_by_squares(g)) return average_backward_of_squares(g, d, gy, gx, begin, end);
  if (goes_by_overlaps(g)) return backward_overlaps(g, AverageOverlaps<S>{g, d, gy}, gx, begin, end);
  if (goes_by_rows(g)) return average_backward_by_vectors(g, d, full, gy, gx, begin, end);
  const bool side_by_side = lie_side_by_side(g);
  Range rows{0, 0};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t ih = task % g.in[0];
    const S* plane = gy + task / g.in[0] * g.out[0] * g.out[1];
    S* row = gx + task * g.in[1];
    const Range before = rows;
    rows = outputs_over(g, 0, ih);
    if (task > begin && ih > 0 && rows.begin == before.begin && rows.end == before.end) {
      __builtin_memcpy(row, row - g.in[1], g.in[1] * sizeof(S));
      continue;
    }
    if (side_by_side) {
      average_backward_side_by_side(g, d, full, rows, plane, row);
      continue;
    }
    for (int64_t iw = 0; iw < g.in[1]; iw += kPixels)
      average_backward_by_outputs(g, d, full, rows, plane, row, iw, smaller(iw + kPixels, g.in[1]));
  }
}

/// One output that sees the whole image: all pixels get the same.
template <class S>
void spread(const Pool2dGeometry& g, Sum<S> divisor, const S* gy, S* gx, int64_t begin, int64_t end) {
  const int64_t depth = depth_of(g);
  for (int64_t task = begin; task < end; ++task) {
    const S* from = gy + task / g.in[0] * depth;
    S* row = gx + task * g.in[1] * depth;
    for (int64_t c = 0; c < depth; ++c) row[c] = rounded<S>(Sum<S>(0) + value(from[c]) / divisor);
    for (int64_t i = depth; i < g.in[1] * depth; ++i) row[i] = row[i - depth];
  }
}

template <class S>
void avg_pool2d_backward(const Pool2dGeometry& g, Divisor d, const S* gy, S* gx, int64_t begin, int64_t end) {
  const Window height = window_at(g, 0, 0), width = window_at(g, 1, 0);
  if (g.out[0] * g.out[1] == 1 && height.end - height.begin == g.in[0] && width.end - width.begin == g.in[1])
    return spread(g, divisor_at<Sum<S>>(g, d, 0, 0), gy, gx, begin, end);
  if (depth_of(g) > 1) return average_backward_of_pixels(g, d, gy, gx, begin, end);
  average_backward_of_rows(g, d, gy, gx, begin, end);
}

}  // namespace

template <class S>
void set_avg_pool2d_backward(Kernels<S>& k) {
  k.avg_pool2d_backward = avg_pool2d_backward<S>;
}

template void set_avg_pool2d_backward(Kernels<float>&);
template void set_avg_pool2d_backward(Kernels<double>&);
template void set_avg_pool2d_backward(Kernels<BFloat16>&);
template void set_avg_pool2d_backward(Kernels<Float16>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
