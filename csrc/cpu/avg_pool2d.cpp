// Average pooling, forward and backward.
//
//   y[n,c,oh,ow] = the sum of x over the window / divisor(oh, ow)
//
// A sum goes tap by tap in scan order, save that of an output found on its own whose window has rows as long as a
// vector: it is taken in the lanes of one. (A window as wide as the image counts as one long row: so global pooling
// reads a plane in one go.) Backward, a pixel gets gy / divisor of each output that sees it.
#include "pool2d.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// How many places of the window of output o count, along one axis.
int64_t window_size(const Pool2dGeometry& g, int dim, int64_t o, bool count_include_pad) {
  if (g.adaptive) return window_at(g, dim, o).end;
  const int64_t start = o * g.stride[dim] - g.padding[dim], beyond = count_include_pad ? g.padding[dim] : 0;
  return smaller(start + g.kernel[dim], g.in[dim] + beyond) - larger(start, -beyond);
}

/// The divisor of an output of row oh whose window counts `columns` columns.
template <class T>
T divisor_of(const Pool2dGeometry& g, const Divisor& d, int64_t oh, int64_t columns) {
  if (d.divisor_override && !g.adaptive) return T(d.divisor_override);
  return T(window_size(g, 0, oh, d.count_include_pad) * columns);
}

template <class T>
T divisor_at(const Pool2dGeometry& g, const Divisor& d, int64_t oh, int64_t ow) {
  return divisor_of<T>(g, d, oh, window_size(g, 1, ow, d.count_include_pad));
}

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
void avg_pool2d(const Pool2dGeometry& g, Divisor d, const S* x, S* y, int64_t begin, int64_t end) {
  using T = Sum<S>;
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

template <class S>
struct AverageTerms {
  using T = Sum<S>;
  const Pool2dGeometry& g;
  Divisor d;
  const S* gy;
  Range full;  // outputs whose windows count as many columns as windows have

  auto through(int64_t oh, int64_t ow, int64_t, int64_t) const {
    const bool pixel = depth_of(g) > 1;
    Vec<T> divisors = broadcast(pixel ? divisor_at<T>(g, d, oh, ow) : divisor_of<T>(g, d, oh, g.kernel[1]));
    if (!pixel) {
      const int64_t begin = larger(ow, 0), end = smaller(g.out[1], ow + kLanes<T>);
      for (int64_t o = begin; o < smaller(end, full.begin); ++o) divisors[o - ow] = divisor_at<T>(g, d, oh, o);
      for (int64_t o = larger(begin, full.end); o < end; ++o) divisors[o - ow] = divisor_at<T>(g, d, oh, o);
    }
    return [=, gy = gy](int64_t first, int64_t size, int64_t start) {
      return load_inside(gy + first, size, start, kLanes<T>) / divisors;
    };
  }

  void of_output(int64_t oh, int64_t ow, int64_t, int64_t out, Range pixels, T* sums) const {
    const T term = value(gy[out]) / divisor_at<T>(g, d, oh, ow);
    const Window w = window_at(g, 1, ow);
    const int64_t end = smaller(w.start + w.end, pixels.end);
    for (int64_t iw = larger(w.start + w.begin, pixels.begin); iw < end; ++iw) sums[iw - pixels.begin] += term;
  }
};

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
  const int64_t room = g.in[1] + 2 * g.padding[1] - g.kernel[1];
  const Range in_padding = {0, room >= 0 ? room / g.stride[1] + 1 : 0};
  const Range full = d.divisor_override ? Range{0, g.out[1]} : d.count_include_pad ? in_padding : whole_windows(g);
  backward(g, AverageTerms<S>{g, d, gy, full}, gx, begin, end);
}

}  // namespace

template <class S>
void set_avg_pool2d(Kernels<S>& k) {
  if constexpr (kReal<S> || std::is_same_v<S, int64_t>) k.avg_pool2d = avg_pool2d<S>;
  if constexpr (kReal<S>) k.avg_pool2d_backward = avg_pool2d_backward<S>;
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
