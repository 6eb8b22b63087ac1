// What max and average pooling share: which outputs see which pixels, and the loops over both.
//
// Tap (kh, kw) of the window of output (oh, ow) sees x[oh*stride - padding + kh*dilation, ...]; taps outside the image
// are skipped. An image is a plane, or in channels_last all planes of one n, whose pixels are then `depth` numbers deep.
//
// Forward, a vector holds outputs that see alike: the channels of a pixel (pool2d_pixels.h), or neighbours in a row
// (pool2d_rows.h; for_groups where taps are many or apart). All other outputs are found one by one, among them adaptive
// pooling's, whose windows are of different sizes.
//
// The backward kernels gather: the gradient of an input row is the sum over the few output rows whose windows cover it,
// so nothing is cleared beforehand and no two tasks write to the same place. A pixel's terms are added up in registers or
// on the stack, in the order that the kernel's file says, and rounded once, at the end.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

struct Range {
  int64_t begin, end;
};

/// What an output sees along an axis: tap k the pixel start + k*dilation, which for k in [begin, end) exists.
struct Window {
  int64_t start, begin, end;
};

static inline Window window_at(const Pool2dGeometry& g, int dim, int64_t o) {
  const int64_t in = g.in[dim], out = g.out[dim], dilation = g.dilation[dim];
  if (g.adaptive) {
    const int64_t start = o * in / out;
    return {start, 0, ceil_div((o + 1) * in, out) - start};
  }
  const auto steps = [=](int64_t pixels) { return dilation == 1 ? pixels : ceil_div(pixels, dilation); };
  const int64_t start = o * g.stride[dim] - g.padding[dim];
  return {start, start < 0 ? steps(-start) : 0, start < in ? smaller(g.kernel[dim], steps(in - start)) : 0};
}

/// The outputs that have pixel i of an axis between their first tap and their last.
static inline Range outputs_over(const Pool2dGeometry& g, int dim, int64_t i) {
  const int64_t in = g.in[dim], out = g.out[dim];
  if (g.adaptive) return {i * out / in, ceil_div((i + 1) * out, in)};
  const int64_t first = i + g.padding[dim] - (g.kernel[dim] - 1) * g.dilation[dim];
  return {first > 0 ? ceil_div(first, g.stride[dim]) : 0, smaller(out, (i + g.padding[dim]) / g.stride[dim] + 1)};
}

/// Calls visit(o, k) for the outputs o among outputs_over(g, dim, i) that see pixel i, through tap k: in the order of k,
/// so backwards.
template <class Visit>
static void for_outputs_over(const Pool2dGeometry& g, int dim, int64_t i, Range over, const Visit& visit) {
  for (int64_t o = over.end - 1; o >= over.begin; --o) {
    const int64_t reach = i - window_at(g, dim, o).start;
    if (g.dilation[dim] == 1) {
      visit(o, reach);
    } else if (reach % g.dilation[dim] == 0) {
      visit(o, reach / g.dilation[dim]);
    }
  }
}

/// The outputs of a row for which all taps lie inside the image along the width.
static inline Range whole_windows(const Pool2dGeometry& g) {
  const int64_t room = g.in[1] + g.padding[1] - (g.kernel[1] - 1) * g.dilation[1];  // for where a window starts
  const int64_t begin = smaller(g.out[1], ceil_div(g.padding[1], g.stride[1]));
  return {begin, larger(begin, room > 0 ? smaller(g.out[1], ceil_div(room, g.stride[1])) : 0)};
}

static inline int64_t depth_of(const Pool2dGeometry& g) { return g.layout == Layout::channels_last ? g.c : 1; }

// ---- forward ----

/// One output, or as many as a vector has lanes, at y[to], y[to + 1], ...: the first of them at (oh, ow).
struct Group {
  int64_t oh, ow, to, count;
  Window rows, columns;
  int64_t from, lane;  // lane j's tap (kh, kw) is x[from + j*lane + kh*row + kw*column]
  int64_t row, column;
};

/// In contiguous layout. Calls visit(zero, group) for all outputs of some rows, where `zero` is a number if the group is a single output and a
/// vector if it is more.
template <class T, class Visit>
static void for_groups(const Pool2dGeometry& g, int64_t begin, int64_t end, const Visit& visit) {
  const bool in_vectors = !g.adaptive && g.stride[1] <= 2;
  Range whole = in_vectors ? whole_windows(g) : Range{0, 0};
  if (whole.end - whole.begin == 1) whole = {0, 0};
  Group at;
  at.row = g.dilation[0] * g.in[1];
  at.column = g.dilation[1];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.out[0] * g.in[0];
    at.oh = task % g.out[0];
    at.rows = window_at(g, 0, at.oh);
    for (at.ow = 0; at.ow < g.out[1];) {
      at.columns = window_at(g, 1, at.ow);
      at.from = (image + at.rows.start) * g.in[1] + at.columns.start;
      at.to = task * g.out[1] + at.ow;
      if (at.ow >= whole.begin && at.ow < whole.end) {
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
static V load_group(const S* p, const Group& at) {
  if constexpr (std::is_same_v<V, Sum<S>>) {
    return value(*p);
  } else {
    return load_strided(p, at.lane, at.count);
  }
}

template <class V, class S>
static void store_group(S* y, V v, const Group& at) {
  if constexpr (std::is_same_v<V, Sum<S>>) {
    y[at.to] = rounded<S>(v);
  } else {
    store_first(y + at.to, v, at.count);
  }
}

// ---- backward ----
//
// `Terms` says what a pixel gets from the outputs that see it. through(oh, ow, kh, kw) is for output (oh, ow) and tap
// (kh, kw), in all channels, or in contiguous layout for outputs ow, ow + 1, ... of row oh: called with (first, size,
// start), its lane j is the term of gy[first + start + j], or zero unless 0 <= start + j < size. of_output() adds what
// comes from gy[out] to the sums of those pixels of a row that see it.

/// The numbers of v and w by turns, from the first half of both or from the second.
template <class T, int... lane>
static Vec<T> by_turns(Vec<T> v, Vec<T> w, bool second_half, std::integer_sequence<int, lane...>) {
  constexpr int L = kLanes<T>;
  return second_half ? __builtin_shufflevector(v, w, (lane % 2 * L + L / 2 + lane / 2)...)
                     : __builtin_shufflevector(v, w, (lane % 2 * L + lane / 2)...);
}

/// Writes `count` pixels of a row: sums[0], or with a stride of 2 the lanes of sums[0] and sums[1] by turns.
template <class S, int... lane>
static void put_by_turns(S* to, const Vec<Sum<S>>* sums, int64_t stride, int64_t count,
                         std::integer_sequence<int, lane...> lanes) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Vec<T> low = stride == 2 ? by_turns<T>(sums[0], sums[1], false, lanes) : sums[0];
  count >= L ? store(to, low) : store_first(to, low, count);
  if (count <= L) return;
  const Vec<T> high = by_turns<T>(sums[0], sums[1], true, lanes);
  count == 2 * L ? store(to + L, high) : store_first(to + L, high, count - L);
}

/// Row ih of a plane, for strides 1 and 2: each vector holds pixels `stride` apart, whose outputs are neighbours. The last
/// vectors begin early enough to be whole.
template <class S, class Terms>
static void backward_row(const Pool2dGeometry& g, const Terms& terms, int64_t ih, int64_t first_output, S* gx) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
  const int64_t s = g.stride[1], width = g.in[1];
  const Range rows = outputs_over(g, 0, ih);
  for (int64_t i = 0; i < width; i += s * L) {
    const int64_t iw = larger(0, smaller(i, width - s * L));
    Vec<T> sums[2] = {};
    for_outputs_over(g, 0, ih, rows, [&](int64_t oh, int64_t kh) {
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw) {
        const int64_t reach = iw + g.padding[1] - kw * g.dilation[1], odd = s == 2 ? reach & 1 : 0;
        const int64_t start = s == 2 ? (reach + odd) >> 1 : reach;
        const auto term = terms.through(oh, start, kh, kw)(first_output + oh * g.out[1], g.out[1], start);
        odd ? sums[1] += term : sums[0] += term;
      }
    });
    put_by_turns(gx + iw, sums, s, smaller(width - iw, s * L), lanes);
  }
}

constexpr int64_t kPiece = 256;

/// Row ih of a plane, otherwise: from each output to the pixels that it sees.
template <class S, class Terms>
static void backward_row_by_outputs(const Pool2dGeometry& g, const Terms& terms, int64_t ih, int64_t first_output,
                                    S* gx) {
  const Range rows = outputs_over(g, 0, ih);
  for (int64_t iw = 0; iw < g.in[1]; iw += kPiece) {
    const Range pixels = {iw, smaller(iw + kPiece, g.in[1])};
    const int64_t first = outputs_over(g, 1, iw).begin, last = outputs_over(g, 1, pixels.end - 1).end - 1;
    Sum<S> sums[kPiece];
    for (int64_t i = 0; i < pixels.end - iw; ++i) sums[i] = 0;
    for_outputs_over(g, 0, ih, rows, [&](int64_t oh, int64_t kh) {
      for (int64_t ow = last; ow >= first; --ow)
        terms.of_output(oh, ow, kh, first_output + oh * g.out[1] + ow, pixels, sums);
    });
    for (int64_t i = 0; i < pixels.end - iw; ++i) gx[iw + i] = rounded<S>(sums[i]);
  }
}

/// Row ih of an image in channels_last.
template <class S, class Terms>
static void backward_pixels(const Pool2dGeometry& g, const Terms& terms, int64_t ih, int64_t first_output, S* gx) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Range rows = outputs_over(g, 0, ih);
  for (int64_t iw = 0; iw < g.in[1]; ++iw) {
    const Range columns = outputs_over(g, 1, iw);
    for (int64_t c = 0; c < g.c; c += kPiece) {
      const int64_t channels = smaller(g.c - c, kPiece);
      Vec<T> sums[kPiece / L];
      for (int64_t i = 0; i < channels; i += L) sums[i / L] = Vec<T>{};
      for_outputs_over(g, 0, ih, rows, [&](int64_t oh, int64_t kh) {
        for_outputs_over(g, 1, iw, columns, [&](int64_t ow, int64_t kw) {
          const int64_t first = (first_output + oh * g.out[1] + ow) * g.c + c;
          const auto term = terms.through(oh, ow, kh, kw);
          for (int64_t i = 0; i < channels; i += L) sums[i / L] += term(first, channels, i);
        });
      });
      for (int64_t i = 0; i < channels; i += L)
        store_first(gx + iw * g.c + c + i, sums[i / L], smaller(channels - i, L));
    }
  }
}

template <class S, class Terms>
static void backward(const Pool2dGeometry& g, const Terms& terms, S* gx, int64_t begin, int64_t end) {
  const int64_t depth = depth_of(g);
  const auto row = depth > 1                         ? backward_pixels<S, Terms>
                   : !g.adaptive && g.stride[1] <= 2 ? backward_row<S, Terms>
                                                     : backward_row_by_outputs<S, Terms>;
  int64_t ih = begin % g.in[0], image = begin / g.in[0];
  for (int64_t task = begin; task < end; ++task) {
    row(g, terms, ih, image * g.out[0] * g.out[1], gx + task * g.in[1] * depth);
    if (++ih == g.in[0]) ih = 0, ++image;
  }
}

template <class S>
void set_avg_pool2d(Kernels<S>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
