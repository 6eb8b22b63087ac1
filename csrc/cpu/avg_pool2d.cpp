// Average pooling.
//
//   y[n,c,oh,ow] = the sum of x over the window / divisor(oh, ow)
//
// A sum goes tap by tap in scan order, but for two kinds of windows in contiguous layout: small ones side by side sum
// up their columns first, and an output found on its own whose window has rows as long as a vector is summed in the
// lanes of one. (A window as wide as the image counts as one long row: so global pooling reads a plane in one go.)
#include "avg_pool2d.h"

#include "pool2d_pixels.h"
#include "pool2d_rows.h"
#include "pool2d_squares.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// The sum of `rows` stretches of `count` numbers, `step` apart, in the lanes of a vector.
template <class S>
Sum<S> sum_of_rows(const S* x, int64_t rows, int64_t step, int64_t count) {
  constexpr int64_t L = kLanes<Sum<S>>;
  Vec<Sum<S>> sum{};
  for (int64_t row = 0; row < rows; ++row, x += step) {
    int64_t i = 0;
    for (; i + L <= count; i += L) sum += load(x + i);
    if (i < count) sum += load_first(x + i, count - i);
  }
  return sum_lanes<Sum<S>>(sum);
}

template <class S>
struct AverageRule {
  using T = Sum<S>;
  static constexpr T outside = 0;
  const Pool2dGeometry& g;
  Divisor d;
  S* y;
  Range full;

  Vec<T> begin(const Window&, Vec<T>) const { return Vec<T>{}; }
  void see(Vec<T>& sum, Vec<T> seen, int64_t, int64_t) const { sum += seen; }
  void end(Vec<T> sum, int64_t oh, int64_t ow, int64_t to, int64_t count) const {
    const Vec<T> average = divided<T>(g, d, full, oh, ow, sum);
    count == kLanes<T> ? store(y + to, average) : store_first(y + to, average, count);
  }
};

/// The same where all windows count as many places.
template <class S>
struct AlikeRule {
  using T = Sum<S>;
  static constexpr T outside = 0;
  Division<T> divide;
  S* y;

  Vec<T> begin(const Window&, Vec<T>) const { return Vec<T>{}; }
  void see(Vec<T>& sum, Vec<T> seen, int64_t, int64_t) const { sum += seen; }
  void end(Vec<T> sum, int64_t, int64_t, int64_t to, int64_t count) const {
    count == kLanes<T> ? store(y + to, divide(sum)) : store_first(y + to, divide(sum), count);
  }
};

template <class S>
void average_pixels(const Pool2dGeometry& g, Divisor d, const S* x, S* y, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const bool past = pixels_past_cache(g, g.out, y);
  const Divisions<T> divisions{g, d};
  for_pixels(g, begin, end, [&](const Pixel& at) {
    const Division<T> divide = divisions.at(at.oh, at.ow);
    for_stretches<T>(g.c, past, [&](auto channels) {
      constexpr int count = channels.size;
      if (past) prefetch_taps(at, x, channels);
      Vec<T> sums[count] = {};
      for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh) {
        for (int64_t kw = at.columns.begin; kw < at.columns.end; ++kw) {
          const S* tap = x + (at.from + kh * at.row + kw * at.column);
          for (int i = 0; i < count; ++i) sums[i] += channels.load(tap, i);
        }
      }
      for (int i = 0; i < count; ++i) channels.store(y + at.to, i, divide(sums[i]));
    });
  });
  if (past) stores_done();
}

/// Of windows side by side: sums up columns, in vectors, then each window's.
template <class S>
void average_columns(const Pool2dGeometry& g, const Divisor& d, const S* x, S* y, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>, kColumns = 256;
  const int64_t taps = g.kernel[1], most = kColumns / taps;
  T columns[kColumns + L];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t oh = task % g.out[0];
    const Window rows = window_at(g, 0, oh);
    const S* first = x + (task / g.out[0] * g.in[0] + rows.start) * g.in[1];
    const T divisor = divisor_of<T>(g, d, oh, taps);
    for (int64_t from = 0; from < g.out[1]; from += most) {
      const int64_t outputs = smaller(most, g.out[1] - from), width = outputs * taps;
      for (int64_t i = 0; i < width; i += L) {
        const S* tap = first + from * taps + i;
        Vec<T> sum{};
        for (int64_t kh = rows.begin; kh < rows.end; ++kh)
          sum += load_first(tap + kh * g.dilation[0] * g.in[1], smaller(width - i, L));
        store(columns + i, sum);
      }
      for (int64_t ow = 0; ow < outputs; ++ow) {
        T sum = columns[ow * taps];
        for (int64_t kw = 1; kw < taps; ++kw) sum += columns[ow * taps + kw];
        y[task * g.out[1] + from + ow] = rounded<S>(sum / divisor);
      }
    }
  }
}

template <class S>
void avg_pool2d(const Pool2dGeometry& g, Divisor d, const S* x, S* y, int64_t begin, int64_t end) {
  using T = Sum<S>;
  if (depth_of(g) > 1) return average_pixels(g, d, x, y, begin, end);
  if (goes_by_squares(g))
    return forward_squares(g, AlikeRule<S>{Division<T>(divisor_at<T>(g, d, 0, 0)), y}, x, begin, end);
  if (goes_by_rows(g)) return forward_rows(g, AverageRule<S>{g, d, y, full_windows(g, d, 1)}, x, begin, end);
  if (lie_side_by_side(g) && g.kernel[1] < kLanes<T>) return average_columns(g, d, x, y, begin, end);
  for_groups<T>(g, begin, end, [&](auto sum, const Group& at) {
    using V = decltype(sum);
    const int64_t width = at.columns.end - at.columns.begin, rows = at.rows.end - at.rows.begin;
    const bool one_row = width == g.in[1];
    const int64_t row_length = one_row ? rows * width : width;
    if (std::is_same_v<V, T> && rows > 0 && row_length >= kLanes<T>) {
      const S* first = x + (at.from + at.rows.begin * at.row + at.columns.begin);
      sum += sum_of_rows(first, one_row ? 1 : rows, at.row, row_length);
    } else {
      for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh)
        for (int64_t kw = at.columns.begin; kw < at.columns.end; ++kw)
          sum += load_group<V>(x + (at.from + kh * at.row + kw * at.column), at);
    }
    store_group(y, V(sum / divisor_at<T>(g, d, at.oh, at.ow)), at);
  });
}

}  // namespace

template <class S>
void set_avg_pool2d(Kernels<S>& k) {
  if constexpr (kReal<S> || std::is_same_v<S, int64_t>) k.avg_pool2d = avg_pool2d<S>;
  if constexpr (kReal<S>) set_avg_pool2d_backward(k);
}

template void set_avg_pool2d(Kernels<float>&);
template void set_avg_pool2d(Kernels<double>&);
template void set_avg_pool2d(Kernels<BFloat16>&);
template void set_avg_pool2d(Kernels<Float16>&);
template void set_avg_pool2d(Kernels<uint8_t>&);
template void set_avg_pool2d(Kernels<int8_t>&);
template void set_avg_pool2d(Kernels<int16_t>&);
template void set_avg_pool2d(Kernels<int32_t>&);
template void set_avg_pool2d(Kernels<int64_t>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
