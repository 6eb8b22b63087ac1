// Depthwise convolution of contiguous tensors, with one filter per channel or several.
//
//   y[k, oh, ow]  = bias[k] + sum over taps of x[k / multiplier, pixel of (oh, ow, tap)] * w[k, tap]
//   gw[k, tap]    =           sum over n, oh, ow of the same pixel * gy[k, oh, ow]
//
// Vectors run along the rows of one plane. A strip of rows is copied to a buffer that stays in the first-level cache:
// there rows have their border, 16-bit numbers are widened, and with a stride s the columns s*i, s*i + 1, ... stand
// together (a *phase*), so that neighbouring outputs see neighbouring numbers, whatever the stride. A tile is 4 rows
// of one vector. Under filters of 3x3, 5x5 and 7x7, unrolled, it loads a number of a row once per column of taps;
// otherwise once per tap. The classes of a strided grad_input (../correlation.h) are computed side by side and zipped.
//
// A task is a strip of one group's planes (forward, grad_input) or the filter of one output channel (grad_weight). That
// is summed lane by lane, over a strip, then over strips and images in their order; lanes are added up at the very end.
//
// Zeros of the border are multiplied: an infinite or NaN weight or gradient gives NaN there, where plain loops would
// skip it. Refuses channels_last, more than one input channel per filter, filters of more than 512 weights, and strides
// and reaches for which a strip of one row overflows the buffer.
#include "channels_last.h"
#include "conv2d_depthwise.h"
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int kRows = 4;  // of a tile
constexpr int64_t kMostTaps = 512, kMostStride = 16;
constexpr int64_t kWidestPiece = 256;  // outputs of a row; wider images are cut
constexpr int64_t kGoodBuffer = 1 << 12, kLargestBuffer = 1 << 17;

/// How images are cut into strips of rows x columns outputs (of every class), and how the buffer holds what they see.
struct Strips {
  int64_t classes_h, classes_w;
  int64_t count_h, count_w;  // outputs of class 0, which has the most
  int64_t step_h, step_w;    // between the inputs of two outputs
  int64_t first_h, first_w;  // offset of the first tap of all classes
  int64_t reach_h, reach_w;  // from there to the last
  int64_t down, across, rows, columns;
  int64_t phase, pitch, buffer_rows, plane, lanes;
  int64_t sums() const { return ceil_div(columns, lanes) * kRows; }  // vectors of kRows rows
  int64_t place(int64_t h, int64_t w) const { return h * pitch + w % step_w * phase + w / step_w; }
};

/// The first tap and the reach of all classes of an axis.
static void find_reach(const Conv2dGeometry& g, Pass pass, int dim, int64_t& first, int64_t& reach) {
  int64_t last = INT64_MIN;
  first = INT64_MAX;
  for (int64_t cls = 0; cls < axis_classes(g, pass, dim); ++cls) {
    const Axis a = in_memory_order(make_axis(g, pass, dim, cls));
    if (a.taps == 0) continue;
    first = smaller(first, a.offset0);
    last = larger(last, a.offset0 + (a.taps - 1) * a.offset_step);
  }
  if (last < first) first = last = 0;
  reach = last - first;
}

template <class T>
Strips make_strips(const Conv2dGeometry& g, Pass pass) {
  if (pass == Pass::grad_weight) pass = Pass::forward;
  const Axis h = make_axis(g, pass, 0, 0), w = make_axis(g, pass, 1, 0);
  Strips s;
  s.classes_h = axis_classes(g, pass, 0);
  s.classes_w = axis_classes(g, pass, 1);
  s.count_h = h.count;
  s.count_w = w.count;
  s.step_h = h.in_step;
  s.step_w = w.in_step;
  find_reach(g, pass, 0, s.first_h, s.reach_h);
  find_reach(g, pass, 1, s.first_w, s.reach_w);
  s.lanes = kLanes<T>;
  s.across = ceil_div(w.count, kWidestPiece);
  s.columns = ceil_div(w.count, s.across);
  s.phase = round_up(s.columns, kLanes<T>) + s.reach_w / s.step_w + 1;
  s.pitch = round_up(s.phase * s.step_w, kLanes<T>) + kLanes<T>;
  const int64_t channels = pass == Pass::forward ? 1 : g.k / g.groups;
  const int64_t fitting = (kGoodBuffer / channels / s.pitch - s.reach_h - 1) / s.step_h / kRows * kRows;
  s.down = ceil_div(h.count, larger(fitting, kRows));
  s.rows = ceil_div(h.count, s.down);
  s.buffer_rows = (round_up(s.rows, kRows) - 1) * s.step_h + s.reach_h + 1;
  s.plane = s.buffer_rows * s.pitch;
  return s;
}

/// Parts columns into phases: to[p*phase + j] = line[j*step + p].
template <class T>
void part_columns(const T* line, int64_t count, int64_t step, int64_t phase, T* to) {
  constexpr int64_t L = kLanes<T>;
  const int64_t each = ceil_div(count, step);
  if (step == 2) {
    constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
    for (int64_t j = 0; j < each; j += L) {
      const T* from = line + 2 * j;
      store(to + j, even_places<T>(load(from), load(from + L - 1), lanes));
      store(to + phase + j, even_places<T>(load(from + 1), load(from + L), lanes));
    }
  } else {
    for (int64_t p = 0; p < step; ++p)
      for (int64_t j = 0; j < each; ++j) to[p * phase + j] = line[j * step + p];
  }
}

/// Starts loading the `count` numbers from p on.
template <class S>
void prefetch(const S* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(S))) __builtin_prefetch(p + i, 0, 2);
}

/// Fills the buffer with what the outputs [i0, i0 + rows) x [j0, j0 + columns) see of a plane.
template <class S>
void copy_strip(const Strips& s, const S* plane, const int64_t* size, Border border, int64_t i0, int64_t rows,
                int64_t j0, int64_t columns, Sum<S>* line, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t row0 = i0 * s.step_h + s.first_h, column0 = j0 * s.step_w + s.first_w;
  const int64_t count = (columns - 1) * s.step_w + s.reach_w + 1, all = (rows - 1) * s.step_h + s.reach_h + 1;
  if (s.step_w == 1 && border == Border::zeros) {
    const int64_t above = smaller(larger(-row0, 0), all), below = larger(smaller(size[0] - row0, all), above);
    for (int64_t j = 0; j < count; j += L) {
      const int64_t lanes = smaller(count - j, L);
      for (int64_t i = 0; i < above; ++i) store(to + i * s.pitch + j, Vec<Sum<S>>{});
      const S* from = plane + (row0 + above) * size[1];
      for (int64_t i = above; i < below; ++i, from += size[1])
        store(to + i * s.pitch + j, load_inside(from, size[1], column0 + j, lanes));
      for (int64_t i = below; i < all; ++i) store(to + i * s.pitch + j, Vec<Sum<S>>{});
    }
  } else {
    for (int64_t i = 0; i < all; ++i, to += s.pitch) {
      const int64_t row = pixel_at(row0 + i, size[0], border);
      const bool inside = row >= 0 && row < size[0];
      copy_padded(plane + (inside ? row : 0) * size[1], inside ? size[1] : 0, column0, 1, count,
                  inside ? border : Border::zeros, s.step_w == 1 ? to : line);
      if (s.step_w > 1) part_columns(line, count, s.step_w, s.phase, to);
    }
  }
  prefetch(plane + larger(row0 + all, 0) * size[1], all * size[1]);  // the next strip's, very likely
}

// ---- forward and grad_input ----

/// The taps of a class, in the order of their inputs: where these stand in the buffer, and their numbers in a filter.
struct Taps {
  int64_t count, place[kMostTaps], of_filter[kMostTaps];
  int size;  // of an unrolled filter, or 0
  Taps() = default;
  Taps(const Strips& s, const Axis& h, const Axis& w, int64_t kernel_width) : count(0) {
    for (int64_t th = 0; th < h.taps; ++th)
      for (int64_t tw = 0; tw < w.taps; ++tw, ++count) {
        place[count] = s.place(h.offset0 + th * h.offset_step - s.first_h, w.offset0 + tw * w.offset_step - s.first_w);
        of_filter[count] = (h.k0 + th * h.k_step) * kernel_width + w.k0 + tw * w.k_step;
      }
    const bool square = h.taps == w.taps && h.in_step == w.in_step && h.offset_step == 1 && w.offset_step == 1 &&
                        s.classes_h * s.classes_w == 1;
    const bool known =
        w.in_step == 1 ? h.taps == 3 || h.taps == 5 || h.taps == 7 : w.in_step == 2 && (h.taps == 3 || h.taps == 5);
    size = square && known ? int(h.taps) : 0;
  }
};

/// sums[vector of columns][r] = sum over the taps of channel after channel, for kRows rows from `x` on.
template <class T, int K, int stride>
void dense_rows(const Strips& s, const Taps&, const T* x, const T* weight, int64_t channels, int64_t columns,
                Vec<T>* sums) {
  for (int64_t j = 0; j < columns; j += kLanes<T>, x += kLanes<T>, sums += kRows) {
    Vec<T> sum[kRows]{};
    for (int64_t c = 0; c < channels; ++c) {
      const T *from = x + c * s.plane, *w = weight + c * K * K;
#pragma GCC unroll 16
      for (int i = 0; i < (kRows - 1) * stride + K; ++i, from += s.pitch)
#pragma GCC unroll 8
        for (int kw = 0; kw < K; ++kw) {
          const Vec<T> seen = load(from + kw % stride * s.phase + kw / stride);
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
void any_rows(const Strips& s, const Taps& taps, const T* x, const T* weight, int64_t channels, int64_t columns,
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

/// row[0..count) = one vector of each class, which lie `next` apart, interleaved.
template <class S>
void put(const Vec<Sum<S>>* sums, int64_t next, int64_t classes, Vec<Sum<S>> bias, int64_t count, S* row) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  if (classes == 1) {
    store_first(row, sums[0] + bias, count);
  } else if (classes == 2) {
    Vec<T> low = sums[0] + bias, high = sums[next] + bias;
    zip<T>(low, high, std::make_integer_sequence<int, int(L)>());
    store_first(row, low, smaller(count, L));
    if (count > L) store_first(row + L, high, count - L);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = rounded<S>(sums[i % classes * next][i / classes] + bias[0]);
  }
}

/// Tasks are numbered (n, group, strip down, strip across).
template <class S, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Strips s = make_strips<T>(g, pass);
  const Correlation t = make_correlation(g, pass, 0, 0, 0);
  const int64_t filter = g.kernel[0] * g.kernel[1], per_group = s.down * s.across;
  const int64_t size[2] = {t.h.in_size, t.w.in_size};
  T* const buffer = workspace + s.pitch;  // after a line
  Vec<T>* const sums = reinterpret_cast<Vec<T>*>(buffer + t.channels * s.plane);
  T* const weights = buffer + t.channels * s.plane + s.classes_w * s.sums() * L;
  Taps taps[kMostStride];
  int64_t taps_of = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t plane = task / per_group, group = plane % g.groups, strip = task % per_group;
    const int64_t i0 = strip / s.across * s.rows, rows = smaller(s.rows, s.count_h - i0);
    const int64_t j0 = strip % s.across * s.columns, columns = smaller(s.columns, s.count_w - j0);
    for (int64_t c = 0; c < t.channels; ++c)
      copy_strip(s, o.a + (plane * t.channels + c) * t.in_plane, size, t.border, i0, rows, j0, columns, workspace,
                 buffer + c * s.plane);

    for (int64_t ch = 0; ch < s.classes_h; ++ch) {
      const Axis h = in_memory_order(make_axis(g, pass, 0, ch));
      if (taps_of != ch) {
        for (int64_t cw = 0; cw < s.classes_w; ++cw)
          taps[cw] = Taps(s, h, in_memory_order(make_axis(g, pass, 1, cw)), g.kernel[1]);
        taps_of = ch;
      }
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
              put<S>(sums + j / L * kRows + r, s.sums(), s.classes_w, bias, count, row + column);
            }
          }
        }
      }
    }
  }
}

/// A line, the strips of a group's channels, the sums of kRows rows, and the weights of one output channel.
template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const Strips s = make_strips<T>(g, pass);
  const int64_t channels = pass == Pass::grad_input ? g.k / g.groups : 1;
  return s.pitch + channels * (s.plane + g.kernel[0] * g.kernel[1]) + s.classes_w * s.sums() * kLanes<T>;
}

// ---- grad_weight ----

/// totals[th*TW + tw] += sum over `columns` outputs of R rows, for TH x TW taps that stand at x + places.
template <class S, int R, int TH, int TW, int stride>
void sum_taps(const Strips& s, const S* gy, int64_t width, int64_t columns, const Sum<S>* x, Vec<Sum<S>>* totals) {
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
void sum_tap(const Strips& s, const S* gy, int64_t width, int64_t rows, int64_t columns, const Sum<S>* x,
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
void sum_filter(const Strips& s, const S* gy, int64_t width, int64_t rows, int64_t columns, const Sum<S>* x,
                Vec<Sum<S>>* totals) {
  constexpr int TH = K == 3 ? 3 : 1;  // whole filters of 9 sums, or row by row
  for (int64_t kh = 0; kh < K; kh += TH, x += TH * s.pitch, totals += TH * K) {
    int64_t i = 0;
    const auto at = [&] { return x + i * stride * s.pitch; };
    for (; i + kRows <= rows; i += kRows)
      sum_taps<S, kRows, TH, K, stride>(s, gy + i * width, width, columns, at(), totals);
    for (; i < rows; ++i) sum_taps<S, 1, TH, K, stride>(s, gy + i * width, width, columns, at(), totals);
  }
}

template <class S>
auto sum_filter_of(int size, int64_t stride) {
  return size == 3   ? (stride == 1 ? sum_filter<S, 3, 1> : sum_filter<S, 3, 2>)
         : size == 5 ? (stride == 1 ? sum_filter<S, 5, 1> : sum_filter<S, 5, 2>)
                     : sum_filter<S, 7, 1>;
}

/// A line, a strip, and a vector of sums for each tap.
template <class T>
int64_t weight_workspace(const Conv2dGeometry& g) {
  const Strips s = make_strips<T>(g, Pass::forward);
  return s.pitch + s.plane + g.kernel[0] * g.kernel[1] * kLanes<T>;
}

/// A task is an output channel.
template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Strips s = make_strips<T>(g, Pass::forward);
  const Taps taps(s, make_axis(g, Pass::forward, 0, 0), make_axis(g, Pass::forward, 1, 0), g.kernel[1]);
  T* const buffer = workspace + s.pitch;
  Vec<T>* const totals = reinterpret_cast<Vec<T>*>(buffer + s.plane);
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t tap = 0; tap < taps.count; ++tap) totals[tap] = Vec<T>{};
    for (int64_t n = 0; n < g.n; ++n)
      for (int64_t i0 = 0; i0 < g.out[0]; i0 += s.rows)
        for (int64_t j0 = 0; j0 < g.out[1]; j0 += s.columns) {
          const int64_t rows = smaller(s.rows, g.out[0] - i0), columns = smaller(s.columns, g.out[1] - j0);
          copy_strip(s, o.b + (n * g.c + k / (g.k / g.groups)) * g.in[0] * g.in[1], g.in, g.border, i0, rows, j0,
                     columns, workspace, buffer);
          const S* gy = o.a + ((n * g.k + k) * g.out[0] + i0) * g.out[1] + j0;
          if (taps.size) {
            sum_filter_of<S>(taps.size, s.step_w)(s, gy, g.out[1], rows, columns, buffer, totals);
          } else {
            for (int64_t tap = 0; tap < taps.count; ++tap)
              sum_tap(s, gy, g.out[1], rows, columns, buffer + taps.place[tap], totals + tap);
          }
        }
    for (int64_t tap = 0; tap < taps.count; ++tap) o.out[k * taps.count + tap] = rounded<S>(sum_lanes<T>(totals[tap]));
  }
}

// ---- the row of the table ----

/// What is accepted forwards is accepted backwards, where borders other than zeros are written out (conv2d_border.cpp).
template <class T>
const char* refuses(const Conv2dGeometry& g, Pass) {
  if (g.layout != Layout::contiguous) return "it reads contiguous planes; in channels_last a plane's pixels lie apart";
  if (g.groups == 1 || g.c != g.groups) return "it takes one input channel per group, and two groups at least";
  if (g.kernel[0] * g.kernel[1] > kMostTaps) return "a filter's weights pass its buffer of 512";
  if (larger(g.stride[0], g.stride[1]) > kMostStride) return "it computes 16 classes of a strided gradient at most";
  Conv2dGeometry back = g;
  for (int dim = 0; dim < 2 && g.border != Border::zeros; ++dim)
    back.in[dim] = (g.out[dim] - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1;
  if (larger(correlation_workspace<T>(g, Pass::forward), correlation_workspace<T>(back, Pass::grad_input)) >
      kLargestBuffer)
    return "the rows under four rows of results pass its buffer of 2^17 numbers";
  return nullptr;
}

template <class S, Pass pass>
Conv2dRun<S> correlation_run() {
  return {[](const Conv2dGeometry& g) {
            const Strips s = make_strips<Sum<S>>(g, pass);
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
