// Strips of images, of one vector of groups, as small images of their own: contiguous ones are turned round for that,
// of channels_last ones it is a copy. How images are cut, and where the strips lie.
#pragma once

#include "conv2d_depthwise_groups.h"
#include "turn.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kGoodNumbers = 1 << 14, kMostNumbers = 1 << 18;  // of a strip's inputs

/// How an image is cut into strips: of rows of its outputs y, or in grad_input of gx.
template <class T>
struct TurnedStrips {
  int64_t height, rows, count;
  int64_t in, out;  // numbers of a strip's inputs (y's or x's rows that are read), and of its outputs

  /// `together` rows of outputs of one class are never parted.
  TurnedStrips(const Conv2dGeometry& g, Pass pass, int64_t together, int64_t good = kGoodNumbers) {
    constexpr int64_t L = kLanes<T>;
    const bool forward = pass != Pass::grad_input;
    const int64_t reach = (g.kernel[0] - 1) * g.dilation[0], stride = g.stride[0];
    const int64_t row = (forward ? g.in : g.out)[1] * L;
    if (!forward) together *= stride;
    height = (forward ? g.out : g.in)[0];
    const auto seen = [&](int64_t rows) {
      return forward ? (rows - 1) * stride + reach + 1 : (rows - 1 + reach) / stride + 1;
    };
    rows = together;
    while (rows < height && seen(rows + together) * row <= good) rows += together;
    rows = round_up(ceil_div(height, larger(ceil_div(height, rows), 1)), together);
    count = ceil_div(height, larger(rows, 1));
    in = (forward && g.border != Border::zeros ? larger(seen(rows), g.in[0]) : seen(rows)) * row;
    out = rows * (forward ? g.out : g.in)[1] * L;
  }
};

/// A strip as an image of its own: rows [in, in + size of `a`) of what is read, rows [out, ...) of the result.
struct TurnedStrip {
  Conv2dGeometry g;
  int64_t in, out;
};

template <class T>
static inline TurnedStrip make_strip(const Conv2dGeometry& g, Pass pass, const TurnedStrips<T>& strips,
                                     int64_t number) {
  TurnedStrip s{g, 0, number * strips.rows};
  const int64_t reach = (g.kernel[0] - 1) * g.dilation[0], stride = g.stride[0], padding = g.padding[0];
  const int64_t rows = smaller(strips.rows, strips.height - s.out);
  s.g.n = 1;
  if (pass == Pass::grad_input) {
    s.in = smaller(larger(ceil_div(s.out + padding - reach, stride), 0), g.out[0]);
    s.g.out[0] = larger(smaller((s.out + rows - 1 + padding) / stride + 1, g.out[0]) - s.in, 0);
    s.g.in[0] = rows;
    s.g.padding[0] = padding + s.out - s.in * stride;
  } else if (g.border != Border::zeros) {  // the only one: a border may show any pixel
    s.g.out[0] = rows;
  } else {
    const int64_t first = s.out * stride - padding;
    s.in = smaller(larger(first, 0), g.in[0]);
    s.g.in[0] = larger(smaller(first + (rows - 1) * stride + reach + 1, g.in[0]) - s.in, 0);
    s.g.out[0] = rows;
    s.g.padding[0] = s.in - first;
  }
  return s;
}

/// Windows of images whose pixels have a vector of channels.
template <class T>
static inline Windows turned_windows(const Conv2dGeometry& g, Pass pass, int64_t cls) {
  Windows t = make_windows(g, pass, 0, cls);
  t.in_channels = t.out_channels = kLanes<T>;
  return t;
}

/// Where a task's scratch memory lies. Strips are kept as stored numbers.
template <class S>
struct Memory {
  const S* zeros;
  S *in, *out, *bias;
  Sum<S>* rest;

  Memory(const TurnedStrips<Sum<S>>& strips, Sum<S>* memory, int64_t vectors = 1) : zeros(make_zeros<S>(memory)) {
    in = reinterpret_cast<S*>(memory + kZeros<Sum<S>>);
    out = in + vectors * strips.in;
    bias = out + vectors * strips.out;  // and after it a place for outputs that do not exist
    rest = memory + size(strips, vectors);
  }
  static int64_t size(const TurnedStrips<Sum<S>>& strips, int64_t vectors = 1) {
    return kZeros<Sum<S>> + vectors * (strips.in + strips.out) + 2 * kLanes<Sum<S>>;
  }
};

/// Pixels [first, first + pixels) of image n, whose `size` is given, `in` channels to a vector: to[vector][pixel][lane]
/// of the vectors [v0, v1), `next` numbers from one to the next.
template <class S>
void gather_pixels(Layout layout, const int64_t* size, int64_t channels, int64_t in, const S* from, int64_t n,
                   int64_t first, int64_t pixels, int64_t v0, int64_t v1, int64_t next, S* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t plane = size[0] * size[1];
  if (layout == Layout::contiguous) {
    for (int64_t v = v0, c; v < v1; ++v, to += next) {
      c = v * in;
      turn(from + (n * channels + c) * plane + first, plane, pixels, smaller(in, channels - c), L, to);
    }
    return;
  }
  const S* x = from + (n * plane + first) * channels;
  for (int64_t p = 0; p < pixels; ++p, x += channels, to += L)
    for (int64_t v = v0; v < v1; ++v) store(to + (v - v0) * next, load_some(x + v * in, smaller(L, channels - v * in)));
}

/// The inputs of a strip of image n, of the vectors [v0, v1) of groups.
template <Pass pass, class S>
void gather_strip(const Conv2dGeometry& g, const TurnedStrip& s, const Packing<Sum<S>>& pack, const S* from, int64_t n,
                  int64_t v0, int64_t v1, int64_t next, S* to) {
  const int64_t* size = pass == Pass::grad_input ? g.out : g.in;
  const int64_t rows = (pass == Pass::grad_input ? s.g.out : s.g.in)[0];
  gather_pixels(g.layout, size, g.groups * pack.channels, pack.in, from, n, s.in * size[1], rows * size[1], v0, v1,
                next, to);
}

/// The way back, `out` channels to a vector.
template <class S>
void scatter_pixels(Layout layout, const int64_t* size, int64_t channels, int64_t out, const S* from, int64_t n,
                    int64_t first, int64_t pixels, int64_t v0, int64_t v1, int64_t next, S* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t plane = size[0] * size[1];
  if (layout == Layout::contiguous) {
    for (int64_t v = v0, k; v < v1; ++v, from += next) {
      k = v * out;
      turn_back(from, L, pixels, smaller(out, channels - k), to + (n * channels + k) * plane + first, plane);
    }
    return;
  }
  S* y = to + (n * plane + first) * channels;
  for (int64_t p = 0; p < pixels; ++p, from += L, y += channels)
    for (int64_t v = v0; v < v1; ++v)
      store_some(y + v * out, load(from + (v - v0) * next), smaller(out, channels - v * out));
}

/// The outputs of a strip of image n.
template <Pass pass, class S>
void scatter_strip(const Conv2dGeometry& g, const TurnedStrip& s, const Packing<Sum<S>>& pack, const S* from, int64_t n,
                   int64_t v0, int64_t v1, int64_t next, S* to) {
  const int64_t* size = pass == Pass::grad_input ? g.in : g.out;
  const int64_t rows = (pass == Pass::grad_input ? s.g.in : s.g.out)[0];
  scatter_pixels(g.layout, size, g.groups * pack.rows, pack.out, from, n, s.out * size[1], rows * size[1], v0, v1, next,
                 to);
}

}  // namespace cnnops::cpu::CNNOPS_ISA
