// Depthwise convolution of contiguous tensors, with one filter per channel or several.
//
//   y[k, oh, ow]  = bias[k] + sum over taps of x[k / multiplier, pixel of (oh, ow, tap)] * w[k, tap]
//   gw[k, tap]    =           sum over n, oh, ow of the same pixel * gy[k, oh, ow]
//
// Vectors run along the rows of one plane. A strip of rows is copied to a buffer that stays in the first-level cache:
// there rows have their border, 16-bit numbers are widened, and with a stride s the columns s*i, s*i + 1, ... stand
// together (a *phase*), so that neighbouring outputs see neighbouring numbers, whatever the stride. A strip is copied
// while the one before is computed, for numbers just stored are loaded slowly by vectors that begin elsewhere. A tile
// is 4 rows of one vector. Under filters of 3x3, 5x5 and 7x7, unrolled, it loads a number of a row once per column of
// taps; otherwise once per tap. The classes of a strided grad_input (../correlation.h) are computed side by side and
// zipped.
//
// A task is a strip of one group's planes (forward, grad_input) or the filter of one output channel (grad_weight). That
// is summed lane by lane, over a strip, then over strips and images in their order; lanes are added up at the very end.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses channels_last, more than one input channel per filter, filters of more than 512 weights, and strides
// and reaches for which a strip of four rows overflows the buffer.
#include "conv2d_depthwise_strips.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

// ---- forward and grad_input ----

/// sums[vector of columns][r] = sum over the taps of channel after channel, for kRows rows from `x` on.
template <class T, int K, int stride>
void dense_rows(const PlaneStrips& s, const Taps&, const T* x, const T* weight, int64_t channels, int64_t columns,
                Vec<T>* sums) {
  for (int64_t j = 0; j < columns; j += kLanes<T>, x += kLanes<T>, sums += kRows) {
    Vec<T> sum[kRows]{};
    for (int64_t c = 0; c < channels; ++c) {
      const T *from = x + c * s.plane, *w = weight + c * K * K;
#pragma GCC unroll 8
      for (int kw = 0; kw < K; ++kw)  // a column's weights fit in registers
#pragma GCC unroll 16
        for (int i = 0; i < (kRows - 1) * stride + K; ++i) {
          const Vec<T> seen = load(from + i * s.pitch + kw % stride * s.phase + kw / stride);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const int kh = i - r * stride;
            if (kh >= 0 && kh < K) sum[r] = multiply_add(broadcast(w[kh * K + kw]), seen, sum[r]);
          }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] = sum[r];
  }
}

template <class T>
void any_rows(const PlaneStrips& s, const Taps& taps, const T* x, const T* weight, int64_t channels, int64_t columns,
              Vec<T>* sums) {
  for (int64_t j = 0; j < columns; j += kLanes<T>, x += kLanes<T>, sums += kRows) {
    Vec<T> sum[kRows]{};
    const T* w = weight;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t tap = 0; tap < taps.count; ++tap, ++w)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          sum[r] =
              multiply_add(broadcast(*w), load(x + c * s.plane + taps.place[tap] + r * s.step_h * s.pitch), sum[r]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] = sum[r];
  }
}

template <class T>
auto rows_of(int size, int64_t stride) {
  return size == 3   ? (stride == 1 ? dense_rows<T, 3, 1> : dense_rows<T, 3, 2>)
         : size == 5 ? (stride == 1 ? dense_rows<T, 5, 1> : dense_rows<T, 5, 2>)
         : size == 7 ? dense_rows<T, 7, 1>
                     : any_rows<T>;
}

/// row[0..count) = one vector of each class, which lie `next` apart, interleaved. Whole vectors are stored while `room`
/// allows: what comes after the row is written later.
template <class S>
void put(const Vec<Sum<S>>* sums, int64_t next, int64_t classes, Vec<Sum<S>> bias, int64_t count, int64_t room,
         S* row) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  if (classes == 1) {
    store_some(row, sums[0] + bias, room);
  } else if (classes == 2) {
    Vec<T> low = sums[0] + bias, high = sums[next] + bias;
    zip<T>(low, high, std::make_integer_sequence<int, int(L)>());
    store_some(row, low, room);
    if (count > L) store_some(row + L, high, room - L);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = rounded<S>(sums[i % classes * next][i / classes] + bias[0]);
  }
}

/// Tasks are numbered (n, group, strip down, strip across).
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const PlaneStrips s = make_strips<T>(g, pass);
  const Correlation t = make_correlation(g, pass, 0, 0, 0);
  const int64_t filter = g.kernel[0] * g.kernel[1];
  const int64_t size[2] = {t.h.in_size, t.w.in_size};
  T* const buffers[2] = {workspace + s.pitch, workspace + s.pitch + t.channels * s.plane};  // after a line
  Vec<T>* const sums = reinterpret_cast<Vec<T>*>(buffers[1] + t.channels * s.plane);
  T* const weights = buffers[1] + t.channels * s.plane + s.classes_w * s.sums() * L;
  const AllTaps all_taps(g, pass, s);
  const bool rows_in_order = s.across == 1 && s.classes_h == 1;

  const auto copy = [&](const PlaneStrip& strip, T* to) {
    for (int64_t c = 0; c < t.channels; ++c) {
      const S* from = o.a + (strip.plane * t.channels + c) * t.in_plane;
      const S* next = from + (strip.i0 + strip.rows) * s.step_h * size[1];  // of this plane, or the one after it
      copy_strip(s, from, size, t.border, strip, workspace, to + c * s.plane, next);
    }
  };
  const auto compute = [&](const PlaneStrip& strip, const T* buffer) {
    const auto [plane, i0, rows, j0, columns] = strip;
    const int64_t group = plane % g.groups;
    for (int64_t ch = 0; ch < s.classes_h; ++ch) {
      const Axis& h = all_taps.h[ch];
      const Taps* taps = all_taps.of[ch];
      for (int64_t m = 0; m < t.rows; ++m) {
        // Of one filter in forward, of one for each channel in grad_input: either way those of the group in order.
        const S* from = o.b + (group * (g.k / g.groups) + m) * filter;
        T* to = weights;
        for (int64_t cw = 0; cw < s.classes_w; ++cw)
          for (int64_t c = 0; c < t.channels; ++c)
            for (int64_t tap = 0; tap < taps[cw].count; ++tap)
              *to++ = value(from[c * filter + taps[cw].of_filter[tap]]);
        const Vec<T> bias = broadcast(o.bias ? value(o.bias[group * t.rows + m]) : T(0));
        S* out = o.out + (plane * t.rows + m) * t.out_plane;
        for (int64_t i = 0; i < smaller(rows, h.count - i0); i += kRows) {
          const T* weight = weights;
          for (int64_t cw = 0; cw < s.classes_w; weight += t.channels * taps[cw++].count)
            rows_of<T>(taps[cw].size, s.step_w)(s, taps[cw], buffer + i * s.step_h * s.pitch, weight, t.channels,
                                                columns, sums + cw * s.sums());
          for (int r = 0; r < kRows && i + r < rows && i0 + i + r < h.count; ++r) {
            S* row = out + (h.first + (i0 + i + r) * h.step) * t.out_width;
            for (int64_t j = 0; j < columns; j += L) {
              const int64_t column = (j0 + j) * t.w.step;
              const int64_t count = smaller(smaller(L, columns - j) * t.w.step, t.out_width - column);
              const int64_t room = rows_in_order ? (i0 + rows) * t.out_width - (row - out) - column : count;
              put<S>(sums + j / L * kRows + r, s.sums(), s.classes_w, bias, count, room, row + column);
            }
          }
        }
      }
    }
  };
  each_strip(
      s, begin, end, [&](const PlaneStrip& strip, bool odd) { copy(strip, buffers[odd]); },
      [&](const PlaneStrip& strip, bool odd) { compute(strip, buffers[odd]); });
}

/// A line, two times the strips of a group's channels, the sums of kRows rows, and the weights of one output channel.
template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const PlaneStrips s = make_strips<T>(g, pass);
  const int64_t channels = pass == Pass::grad_input ? g.k / g.groups : 1;
  return s.pitch + channels * (2 * s.plane + g.kernel[0] * g.kernel[1]) + s.classes_w * s.sums() * kLanes<T>;
}

// ---- grad_weight ----

/// totals[th*TW + tw] += sum over `columns` outputs of R rows, for TH x TW taps that stand at x + places.
template <class S, int R, int TH, int TW, int stride>
void sum_taps(const PlaneStrips& s, const S* gy, int64_t width, int64_t columns, const Sum<S>* x, Vec<Sum<S>>* totals) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[TH * TW]{};
  const auto add = [&](int64_t j, auto get) {
    Vec<T> grad[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) grad[r] = get(gy + r * width + j);
#pragma GCC unroll 16
    for (int i = 0; i < (R - 1) * stride + TH; ++i)
#pragma GCC unroll 8
      for (int tw = 0; tw < TW; ++tw) {
        const Vec<T> seen = get(x + i * s.pitch + tw % stride * s.phase + tw / stride + j);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int th = i - r * stride;
          if (th >= 0 && th < TH) sum[th * TW + tw] = multiply_add(seen, grad[r], sum[th * TW + tw]);
        }
      }
  };
  int64_t j = 0;
  for (; j + L <= columns; j += L) add(j, [](auto* p) { return load(p); });
  if (j < columns) add(j, [&](auto* p) { return load_first(p, columns - j); });
#pragma GCC unroll 16
  for (int tap = 0; tap < TH * TW; ++tap) totals[tap] += sum[tap];
}

/// Any tap alone: the first of it.
template <class S>
void sum_tap(const PlaneStrips& s, const S* gy, int64_t width, int64_t rows, int64_t columns, const Sum<S>* x,
             Vec<Sum<S>>* total) {
  using T = Sum<S>;
  Vec<T> sum{};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const int64_t lanes = smaller(columns - j, kLanes<T>);
      sum = multiply_add(load_first(x + i * s.step_h * s.pitch + j, lanes), load_first(gy + i * width + j, lanes), sum);
    }
  *total += sum;
}

template <class S, int K, int stride>
void sum_filter(const PlaneStrips& s, const S* gy, int64_t width, int64_t rows, int64_t columns, const Sum<S>* x,
                Vec<Sum<S>>* totals) {
  constexpr int TH = K == 3 ? 3 : 1;  // whole filters of 9 sums, or row by row
  for (int64_t kh = 0; kh < K; kh += TH, x += TH * s.pitch, totals += TH * K) {
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t left = rows - i;
      const auto sum = left == 1   ? sum_taps<S, 1, TH, K, stride>
                       : left == 2 ? sum_taps<S, 2, TH, K, stride>
                       : left == 3 ? sum_taps<S, 3, TH, K, stride>
                                   : sum_taps<S, kRows, TH, K, stride>;
      sum(s, gy + i * width, width, columns, x + i * stride * s.pitch, totals);
    }
  }
}

template <class S>
auto sum_filter_of(int size, int64_t stride) {
  return size == 3   ? (stride == 1 ? sum_filter<S, 3, 1> : sum_filter<S, 3, 2>)
         : size == 5 ? (stride == 1 ? sum_filter<S, 5, 1> : sum_filter<S, 5, 2>)
                     : sum_filter<S, 7, 1>;
}

/// A line, two strips, and a vector of sums for each tap.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  const PlaneStrips s = make_strips<T>(g, Pass::forward);
  return s.pitch + 2 * s.plane + g.kernel[0] * g.kernel[1] * kLanes<T>;
}

/// A task is an output channel.
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const PlaneStrips s = make_strips<T>(g, Pass::forward);
  const AllTaps all_taps(g, Pass::forward, s);
  const Taps& taps = all_taps.of[0][0];
  const int64_t plane = g.in[0] * g.in[1], out_plane = g.out[0] * g.out[1], strips = s.down * s.across;
  T* const buffers[2] = {workspace + s.pitch, workspace + s.pitch + s.plane};
  Vec<T>* const totals = reinterpret_cast<Vec<T>*>(buffers[1] + s.plane);
  for (int64_t k = begin; k < end; ++k) {
    const S* x = o.b + k / (g.k / g.groups) * plane;
    const S* gy = o.a + k * out_plane;
    const auto copy = [&](const PlaneStrip& strip, bool odd) {
      const bool last = strip.i0 + s.rows >= g.out[0];  // the next strip is another image's first
      const int64_t n = strip.plane + last, i0 = last ? 0 : strip.i0 + s.rows;
      const bool known = s.across == 1 && n < g.n;
      if (known) fetch(gy + n * g.k * out_plane + i0 * g.out[1], s.rows * g.out[1]);
      copy_strip(s, x + strip.plane * g.c * plane, g.in, g.border, strip, workspace, buffers[odd],
                 known ? x + n * g.c * plane + i0 * s.step_h * g.in[1] : nullptr);
    };
    const auto add = [&](const PlaneStrip& strip, bool odd) {
      const S* grad = gy + strip.plane * g.k * out_plane + strip.i0 * g.out[1] + strip.j0;
      if (taps.size) {
        sum_filter_of<S>(taps.size, s.step_w)(s, grad, g.out[1], strip.rows, strip.columns, buffers[odd], totals);
      } else {
        for (int64_t tap = 0; tap < taps.count; ++tap)
          sum_tap(s, grad, g.out[1], strip.rows, strip.columns, buffers[odd] + taps.place[tap], totals + tap);
      }
    };
    for (int64_t tap = 0; tap < taps.count; ++tap) totals[tap] = Vec<T>{};
    each_strip(s, 0, g.n * strips, copy, add);
    for (int64_t tap = 0; tap < taps.count; ++tap) o.out[k * taps.count + tap] = rounded<S>(sum_lanes<T>(totals[tap]));
  }
}

// ---- the row of the table ----

/// A buffer of 2^17 numbers at most, and in grad_weight a vector for each of 512 taps at most: about 1 MiB. What is
/// accepted forwards is accepted backwards, where borders other than zeros are written out (conv2d_border.cpp).
template <class T>
const char* refuses(const Conv2dGeometry& g, Pass) {
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  if (g.groups == 1 || g.c != g.groups) return "it takes one input channel per group, and two groups at least";
  if (g.kernel[0] * g.kernel[1] > kMostTaps) return "a filter's weights pass its buffer of 512";
  if (larger(g.stride[0], g.stride[1]) > kMostStride) return "it computes 16 classes of a strided gradient at most";
  if (larger(correlation_workspace<T>(g, Pass::forward), correlation_workspace<T>(written_out(g), Pass::grad_input)) >
      kLargestBuffer)
    return "the rows under four rows of results pass its buffer of 2^17 numbers";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) {
            const PlaneStrips s = make_strips<Sum<S>>(g, pass);
            return g.n * g.groups * s.down * s.across;
          },
          [](const Conv2dGeometry& g) { return correlation_workspace<Sum<S>>(g, pass); }, correlate<S, pass>};
}

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_contiguous() {
  return {"depthwise",
          "",
          refuses<Sum<S>>,
          correlation_run<S, Pass::forward>(),
          correlation_run<S, Pass::grad_input>(),
          {[](const Conv2dGeometry& g) { return g.k; }, weight_workspace<Sum<S>>, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> depthwise_contiguous();
template Conv2dAlgorithm<Conv2dRun<double>> depthwise_contiguous();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> depthwise_contiguous();
template Conv2dAlgorithm<Conv2dRun<Float16>> depthwise_contiguous();

}  // namespace cnnops::cpu::CNNOPS_ISA
