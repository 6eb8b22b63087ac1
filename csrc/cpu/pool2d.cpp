// Max and average pooling, forward and backward; and max unpooling.
//
//   max   y[n,c,oh,ow] = the largest x in the window; the first in scan order wins a tie; a NaN wins over all
//   avg   y[n,c,oh,ow] = the sum of x over the window / divisor(oh, ow)
//
// Tap (kh, kw) of the window of output (oh, ow) sees x[oh*stride - padding + kh*dilation, ...]; taps outside the image
// are skipped. An image is a plane, or in channels_last all planes of one n, whose pixels are then `depth` numbers deep.
//
// Forward, a vector holds outputs that see alike: neighbours in a row, if their windows lie inside the image along the
// width, or the channels of one pixel. All other outputs are found one by one, among them adaptive pooling's, whose
// windows are of different sizes. A sum goes tap by tap in scan order, save that of one output whose window has rows as
// long as a vector: it is taken in the lanes of one. (A window as wide as the image counts as one long row: so global
// pooling reads a plane in one go.)
//
// Max pooling remembers the winner by its position in the window, kh*KW + kw: one byte where torch keeps an eight-byte
// index. The backward kernels gather: the gradient of an input row is the sum over the few output rows whose windows
// cover it, so nothing is cleared beforehand and no two tasks write to the same place. A pixel's terms come in the order
// of its taps, and are added up in a piece of a row, or of a pixel's channels, on the stack: rounded once, at the end.
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

struct Range {
  int64_t begin, end;
};

/// What an output sees along an axis: tap k the pixel start + k*dilation, which for k in [begin, end) exists.
struct Window {
  int64_t start, begin, end;
};

Window window_at(const Pool2dGeometry& g, int dim, int64_t o) {
  const int64_t in = g.in[dim], out = g.out[dim], dilation = g.dilation[dim];
  if (g.adaptive) {
    const int64_t start = o * in / out;
    return {start, 0, ceil_div((o + 1) * in, out) - start};
  }
  const int64_t start = o * g.stride[dim] - g.padding[dim];
  return {start, start < 0 ? ceil_div(-start, dilation) : 0,
          start < in ? smaller(g.kernel[dim], ceil_div(in - start, dilation)) : 0};
}

/// The outputs that have pixel i of an axis between their first tap and their last.
Range outputs_over(const Pool2dGeometry& g, int dim, int64_t i) {
  const int64_t in = g.in[dim], out = g.out[dim];
  if (g.adaptive) return {i * out / in, ceil_div((i + 1) * out, in)};
  const int64_t first = i + g.padding[dim] - (g.kernel[dim] - 1) * g.dilation[dim];
  return {first > 0 ? ceil_div(first, g.stride[dim]) : 0, smaller(out, (i + g.padding[dim]) / g.stride[dim] + 1)};
}

/// Calls visit(o, k) for all outputs o that see pixel i of an axis, through tap k: in the order of k, so backwards.
template <class Visit>
void for_outputs_over(const Pool2dGeometry& g, int dim, int64_t i, const Visit& visit) {
  const Range over = outputs_over(g, dim, i);
  for (int64_t o = over.end - 1; o >= over.begin; --o) {
    const int64_t reach = i - window_at(g, dim, o).start;
    if (g.dilation[dim] == 1) {
      visit(o, reach);
    } else if (reach % g.dilation[dim] == 0) {
      visit(o, reach / g.dilation[dim]);
    }
  }
}

/// The outputs of a row that see one of the pixels through tap k.
Range outputs_onto(const Pool2dGeometry& g, int64_t k, Range pixels) {
  const int64_t offset = k * g.dilation[1] - g.padding[1], s = g.stride[1];  // output o sees pixel o*s + offset
  const int64_t begin = pixels.begin > offset ? smaller(g.out[1], ceil_div(pixels.begin - offset, s)) : 0;
  const int64_t end = pixels.end > offset ? smaller(g.out[1], ceil_div(pixels.end - offset, s)) : 0;
  return {begin, larger(begin, end)};
}

/// The outputs of a row for which all taps lie inside the image along the width.
Range whole_windows(const Pool2dGeometry& g) {
  const int64_t begin = outputs_onto(g, 0, {0, g.in[1]}).begin;
  return {begin, larger(begin, outputs_onto(g, g.kernel[1] - 1, {0, g.in[1]}).end)};
}

int64_t depth_of(const Pool2dGeometry& g) { return g.layout == Layout::channels_last ? g.c : 1; }

// ---- forward ----

/// One output, or as many as a vector has lanes, at y[to], y[to + 1], ...: the first of them at (oh, ow).
struct Group {
  int64_t oh, ow, to, count;
  Window rows, columns;
  int64_t from, lane;  // lane j's tap (kh, kw) is x[from + j*lane + kh*row + kw*column]
  int64_t row, column;
};

/// Calls visit(zero, group) for all outputs of some rows, where `zero` is a number if the group is a single output and a
/// vector if it is more.
template <class T, class Visit>
void for_groups(const Pool2dGeometry& g, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t depth = depth_of(g);
  const bool in_vectors = depth == 1 && !g.adaptive && g.stride[1] <= 2;
  Range whole = in_vectors ? whole_windows(g) : Range{0, 0};
  if (whole.end - whole.begin == 1) whole = {0, 0};
  Group at;
  at.row = g.dilation[0] * g.in[1] * depth;
  at.column = g.dilation[1] * depth;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.out[0] * g.in[0];
    at.oh = task % g.out[0];
    at.rows = window_at(g, 0, at.oh);
    for (at.ow = 0; at.ow < g.out[1];) {
      at.columns = window_at(g, 1, at.ow);
      at.from = ((image + at.rows.start) * g.in[1] + at.columns.start) * depth;
      at.to = (task * g.out[1] + at.ow) * depth;
      if (depth > 1) {
        at.lane = 1;
        for (int64_t c = 0; c < depth; c += kLanes<T>, at.from += kLanes<T>, at.to += kLanes<T>) {
          at.count = smaller(depth - c, kLanes<T>);
          visit(Vec<T>{}, at);
        }
        ++at.ow;
      } else if (at.ow >= whole.begin && at.ow < whole.end) {
        at.lane = g.stride[1];
        at.count = smaller(whole.end - at.ow, kLanes<T>);
        visit(Vec<T>{}, at);
        at.ow += at.count;
      } else {
        at.lane = at.count = 1;
        visit(T{}, at);
        ++at.ow;
      }
    }
  }
}

template <class V, class S>
V load_group(const S* p, const Group& at) {
  if constexpr (std::is_same_v<V, Sum<S>>) {
    return value(*p);
  } else {
    return load_strided(p, at.lane, at.count);
  }
}

template <class V, class S>
void store_group(S* y, V v, const Group& at) {
  if constexpr (std::is_same_v<V, Sum<S>>) {
    y[at.to] = rounded<S>(v);
  } else {
    store_first(y + at.to, v, at.count);
  }
}

/// Positions while computing: words as wide as T, so that they fit the masks that comparisons of T give.
template <class T>
using Word = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T, class Position>
using PackedWords __attribute__((vector_size(kLanes<T> * sizeof(Position)))) = Position;

template <class T, class Position>
void store_positions(Position* to, Vec<Word<T>> words, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    store_first(to, words, count);
  } else {
    const PackedWords<T, Position> packed = __builtin_convertvector(words, PackedWords<T, Position>);
    __builtin_memcpy(to, &packed, count * sizeof(Position));
  }
}

template <class T, class Position>
Vec<Word<T>> load_positions(const Position* from, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    return load_first(from, count);
  } else {
    PackedWords<T, Position> packed{};
    __builtin_memcpy(&packed, from, count * sizeof(Position));
    return __builtin_convertvector(packed, Vec<Word<T>>);
  }
}

template <class S>
constexpr Sum<S> lowest() {
  if constexpr (kReal<S>) {
    return -Sum<S>(__builtin_huge_val());
  } else {
    return std::numeric_limits<S>::lowest();
  }
}

template <class S, class Position>
void max_pool2d(const Pool2dGeometry& g, const S* x, S* y, Position* positions, int64_t begin, int64_t end) {
  using T = Sum<S>;
  for_groups<T>(g, begin, end, [&](auto zero, const Group& at) {
    using V = decltype(zero);
    constexpr bool one = std::is_same_v<V, T>;
    using Words = std::conditional_t<one, Word<T>, Vec<Word<T>>>;
    const bool sees = at.columns.begin < at.columns.end;
    V best = zero + lowest<S>();
    Words won = Words{} + Word<T>(sees ? at.rows.begin * g.kernel[1] + at.columns.begin : 0);
    for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh) {
      for (int64_t kw = at.columns.begin; kw < at.columns.end; ++kw) {
        const V seen = load_group<V>(x + (at.from + kh * at.row + kw * at.column), at);
        const auto wins = (seen > best) | (seen != seen);
        best = wins ? seen : best;
        won = wins ? Words{} + Word<T>(kh * g.kernel[1] + kw) : won;
      }
    }
    store_group(y, best, at);
    if constexpr (one) {
      positions[at.to] = Position(won);
    } else {
      store_positions<T>(positions + at.to, won, at.count);
    }
  });
}

template <class S, class Position>
void max_pool2d_gather(const Pool2dGeometry& g, const S* x, const Position* positions, S* y, int64_t begin,
                       int64_t end) {
  const int64_t depth = depth_of(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.out[0] * g.in[0], top = window_at(g, 0, task % g.out[0]).start;
    for (int64_t ow = 0; ow < g.out[1]; ++ow) {
      const int64_t left = window_at(g, 1, ow).start, to = (task * g.out[1] + ow) * depth;
      for (int64_t c = 0; c < depth; ++c) {
        const uint32_t position = positions[to + c], columns = g.kernel[1];
        const int64_t ih = top + position / columns * g.dilation[0], iw = left + position % columns * g.dilation[1];
        const bool inside = ih >= 0 && ih < g.in[0] && iw >= 0 && iw < g.in[1];
        y[to + c] = inside ? x[((image + ih) * g.in[1] + iw) * depth + c] : S{};
      }
    }
  }
}

/// How many places of the window of output o count, along one axis.
int64_t window_size(const Pool2dGeometry& g, int dim, int64_t o, bool count_include_pad) {
  const Window w = window_at(g, dim, o);
  if (g.adaptive || !count_include_pad) return w.end - w.begin;
  return smaller(g.kernel[dim], g.in[dim] + g.padding[dim] - w.start);
}

template <class T>
T divisor_at(const Pool2dGeometry& g, const Divisor& d, int64_t oh, int64_t ow) {
  if (d.divisor_override && !g.adaptive) return T(d.divisor_override);
  return T(window_size(g, 0, oh, d.count_include_pad) * window_size(g, 1, ow, d.count_include_pad));
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

// ---- backward ----

constexpr int64_t kPiece = 256;

template <class S>
void store_piece(S* to, const Sum<S>* sums, int64_t count) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = smaller(count - i, L);
    store_first(to + i, load_first(sums + i, lanes), lanes);
  }
}

/// A pass from gy to gx. Terms has the two ways of adding up what comes from output row oh through its taps kh:
/// add_vector(sums, step, out, count, oh, ow, kh, kw) adds to sums[j*step] what comes from gy[out + j] through tap
/// (kh, kw), for j < count; add_output(sums, pixels, out, oh, ow, kh) adds to sums[i - pixels.begin] what comes from
/// gy[out] to any pixel i of `pixels` in the row.
template <class S, class Terms>
void backward(const Pool2dGeometry& g, const Terms& terms, S* gx, int64_t begin, int64_t end) {
  const int64_t depth = depth_of(g), s = g.stride[1];
  const bool by_taps = !g.adaptive && s <= 2;
  Sum<S> sums[kPiece];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t ih = task % g.in[0], image = task / g.in[0] * g.out[0];
    if (depth > 1) {
      for (int64_t iw = 0; iw < g.in[1]; ++iw) {
        for (int64_t c = 0; c < depth; c += kPiece) {
          const int64_t channels = smaller(depth - c, kPiece);
          for (int64_t i = 0; i < channels; ++i) sums[i] = 0;
          for_outputs_over(g, 0, ih, [&](int64_t oh, int64_t kh) {
            for_outputs_over(g, 1, iw, [&](int64_t ow, int64_t kw) {
              const int64_t out = ((image + oh) * g.out[1] + ow) * depth + c;
              for (int64_t i = 0; i < channels; i += kLanes<Sum<S>>)
                terms.add_vector(sums + i, 1, out + i, smaller(channels - i, kLanes<Sum<S>>), oh, ow, kh, kw);
            });
          });
          store_piece(gx + (task * g.in[1] + iw) * depth + c, sums, channels);
        }
      }
      continue;
    }
    for (int64_t iw = 0; iw < g.in[1]; iw += kPiece) {
      const Range pixels = {iw, smaller(iw + kPiece, g.in[1])};
      for (int64_t i = 0; i < pixels.end - iw; ++i) sums[i] = 0;
      for_outputs_over(g, 0, ih, [&](int64_t oh, int64_t kh) {
        const int64_t out = (image + oh) * g.out[1];
        if (by_taps) {
          for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
            const Range onto = outputs_onto(g, kw, pixels);
            for (int64_t ow = onto.begin; ow < onto.end; ow += kLanes<Sum<S>>)
              terms.add_vector(sums + (ow * s - g.padding[1] + kw * g.dilation[1] - iw), s, out + ow,
                               smaller(onto.end - ow, kLanes<Sum<S>>), oh, ow, kh, kw);
          }
        } else {
          const int64_t first = outputs_over(g, 1, iw).begin, last = outputs_over(g, 1, pixels.end - 1).end - 1;
          for (int64_t ow = last; ow >= first; --ow) terms.add_output(sums, pixels, out + ow, oh, ow, kh);
        }
      });
      store_piece(gx + task * g.in[1] + iw, sums, pixels.end - iw);
    }
  }
}

template <class S, class Position>
struct MaxTerms {
  using T = Sum<S>;
  const Pool2dGeometry& g;
  const S* gy;
  const Position* positions;

  void add_vector(T* sums, int64_t step, int64_t out, int64_t count, int64_t, int64_t, int64_t kh, int64_t kw) const {
    const auto won = load_positions<T>(positions + out, count) == Word<T>(kh * g.kernel[1] + kw);
    add_strided(sums, step, won ? load_first(gy + out, count) : Vec<T>{}, count);
  }

  void add_output(T* sums, Range pixels, int64_t out, int64_t, int64_t ow, int64_t kh) const {
    const int64_t kw = positions[out] - kh * g.kernel[1];
    const int64_t iw = window_at(g, 1, ow).start + kw * g.dilation[1];
    if (kw >= 0 && kw < g.kernel[1] && iw >= pixels.begin && iw < pixels.end) sums[iw - pixels.begin] += value(gy[out]);
  }
};

template <class S, class Position>
void max_pool2d_backward(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                         int64_t end) {
  backward(g, MaxTerms<S, Position>{g, gy, positions}, gx, begin, end);
}

template <class S>
struct AverageTerms {
  using T = Sum<S>;
  const Pool2dGeometry& g;
  Divisor d;
  const S* gy;
  Range full;  // outputs whose windows count as many columns as windows have

  void add_vector(T* sums, int64_t step, int64_t out, int64_t count, int64_t oh, int64_t ow, int64_t, int64_t) const {
    Vec<T> divisors = broadcast(divisor_at<T>(g, d, oh, ow));
    if (depth_of(g) == 1 && (ow < full.begin || ow + count > full.end)) {
      for (int64_t j = 1; j < count; ++j) divisors[j] = divisor_at<T>(g, d, oh, ow + j);
    }
    add_strided(sums, step, load_first(gy + out, count) / divisors, count);
  }

  void add_output(T* sums, Range pixels, int64_t out, int64_t oh, int64_t ow, int64_t) const {
    const T term = value(gy[out]) / divisor_at<T>(g, d, oh, ow);
    const Window w = window_at(g, 1, ow);
    const int64_t end = smaller(w.start + w.end, pixels.end);
    for (int64_t iw = larger(w.start + w.begin, pixels.begin); iw < end; ++iw) sums[iw - pixels.begin] += term;
  }
};

template <class S>
void avg_pool2d_backward(const Pool2dGeometry& g, Divisor d, const S* gy, S* gx, int64_t begin, int64_t end) {
  const int64_t room = g.in[1] + 2 * g.padding[1] - g.kernel[1];
  const Range in_padding = {0, room >= 0 ? room / g.stride[1] + 1 : 0};
  const Range full = d.divisor_override ? Range{0, g.out[1]} : d.count_include_pad ? in_padding : whole_windows(g);
  backward(g, AverageTerms<S>{g, d, gy, full}, gx, begin, end);
}

// ---- unpooling ----

template <class S>
void max_unpool2d(const Unpool2dGeometry& g, const S* x, const int64_t* indices, S* y, int64_t begin, int64_t end) {
  const int64_t depth = g.layout == Layout::channels_last ? g.c : 1;
  for (int64_t image = begin; image < end; ++image) {
    S* plane = y + image * g.out * depth;
    for (int64_t i = 0; i < g.out * depth; ++i) plane[i] = S{};
    for (int64_t place = image * g.in; place < (image + 1) * g.in; ++place)
      for (int64_t c = 0; c < depth; ++c) plane[indices[place * depth + c] * depth + c] = x[place * depth + c];
  }
}

}  // namespace

template <class S>
void set_pool2d(Kernels<S>& k) {
  k.max_pool2d.forward = max_pool2d<S, uint8_t>;
  k.max_pool2d_wide.forward = max_pool2d<S, int32_t>;
  if constexpr (kReal<S> || std::is_same_v<S, int64_t>) k.avg_pool2d = avg_pool2d<S>;
  if constexpr (kReal<S>) {
    k.max_pool2d = {max_pool2d<S, uint8_t>, max_pool2d_backward<S, uint8_t>, max_pool2d_gather<S, uint8_t>};
    k.max_pool2d_wide = {max_pool2d<S, int32_t>, max_pool2d_backward<S, int32_t>, max_pool2d_gather<S, int32_t>};
    k.avg_pool2d_backward = avg_pool2d_backward<S>;
    k.max_unpool2d = max_unpool2d<S>;
  }
}

template void set_pool2d(Kernels<float>&);
template void set_pool2d(Kernels<double>&);
template void set_pool2d(Kernels<BFloat16>&);
template void set_pool2d(Kernels<Float16>&);
template void set_pool2d(Kernels<uint8_t>&);
template void set_pool2d(Kernels<int8_t>&);
template void set_pool2d(Kernels<int16_t>&);
template void set_pool2d(Kernels<int32_t>&);
template void set_pool2d(Kernels<int64_t>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
