// An input of few channels laid out as lines, one for each channel and tap, as long as the outputs that see them.
//
//   line[t][q] = x[c, oh*stride + kh*dilation - padding, ...]            q = oh*OW + ow, t = (c, kw, kh)
//
// For each channel and each column kw of the kernel, the pixels that the outputs of a band of rows see through it are
// written one after the other, at the pitch of the *output*: no border, no stride and no row end is left. Rows of the
// kernel are shifts by whole rows (rows of the input are sorted by their remainder modulo the stride), so a band is
// copied KW times, not KH*KW times as `im2col` would.
//
// Where x is broadcast, a number at a time, its rows are copied as they stand (below).
#pragma once

#include "channels_last_tile.h"
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kMostTaps = 512;
constexpr int64_t kWidestBand = 512;                           // columns; wider images are cut
constexpr int64_t kGoodLines = 1 << 16, kMostLines = 1 << 17;  // numbers of a band
constexpr int64_t kLongestRow = 1 << 13;                       // numbers of a row of x under a band
constexpr int64_t kBandPlaces = 512;                           // about as many in a band
constexpr int kMostPlaces = 12;                                // in a tile of channels_last
constexpr int kPlaneVectors = kTileRows == 8 ? 3 : 2, kPlaneFilters = kTileRows == 8 ? 8 : 6;  // in one of planes

/// How the outputs are cut into bands of `rows` x `columns`, one row if an image is cut across; and how the lines of
/// one lie.
struct Bands {
  int64_t rows, columns, down, across;
  int64_t phase_rows,
      phase_row;  // rows of x under a band, and numbers of such a row, for each remainder modulo the stride
  int64_t line;   // numbers of a channel and a column of taps

  explicit Bands(const Conv2dGeometry& g) {
    across = ceil_div(g.out[1], kWidestBand);
    columns = ceil_div(g.out[1], across);
    rows = across > 1 ? 1 : smaller(g.out[0], larger(1, kBandPlaces / columns));
    for (;; --rows) {
      down = ceil_div(g.out[0], rows);
      rows = ceil_div(g.out[0], down);
      phase_rows = ceil_div((rows - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1, g.stride[0]);
      line = g.stride[0] * phase_rows * columns;
      if (rows == 1 || g.c * g.kernel[1] * line <= kGoodLines) break;
    }
    phase_row = ceil_div((columns - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1, g.stride[1]);
  }
  int64_t count() const { return down * across; }
};

/// One band of an image: outputs [oh, oh + rows) x [ow, ow + columns).
struct Band {
  int64_t oh, ow, rows, columns;
  int64_t places() const { return rows * columns; }
  Band(const Conv2dGeometry& g, const Bands& b, int64_t i)
      : oh(i / b.across * b.rows),
        ow(i % b.across * b.columns),
        rows(smaller(b.rows, g.out[0] - oh)),
        columns(smaller(b.columns, g.out[1] - ow)) {}
};

inline int64_t taps_of(const Conv2dGeometry& g) { return g.c * g.kernel[0] * g.kernel[1]; }

/// Where tap t = (c, kw, kh) stands in a filter.
inline int64_t number_of(const Conv2dGeometry& g, int64_t t) {
  const int64_t kh = t % g.kernel[0], kw = t / g.kernel[0] % g.kernel[1], c = t / g.kernel[0] / g.kernel[1];
  return g.layout == Layout::contiguous ? (c * g.kernel[0] + kh) * g.kernel[1] + kw : (kh * g.kernel[1] + kw) * g.c + c;
}

/// Where the line of tap t begins, in a band of so many columns.
inline int64_t line_of(const Conv2dGeometry& g, const Bands& b, int64_t t, int64_t columns) {
  const int64_t down = t % g.kernel[0] * g.dilation[0];
  return t / g.kernel[0] * b.line + (down % g.stride[0] * b.phase_rows + down / g.stride[0]) * columns;
}

/// A row of a channel: to[phase][i] = the pixel that column i*stride + phase of so many shows, from column `start` on.
template <class S>
void copy_row(const Conv2dGeometry& g, const S* row, int64_t step, int64_t start, int64_t columns, int64_t phase_row,
              Sum<S>* to) {
  const int64_t stride = g.stride[1], size = g.in[1];
  for (int64_t phase = 0; phase < smaller(stride, columns); ++phase, to += phase_row) {
    const int64_t first = start + phase, count = stride == 1 ? columns : ceil_div(columns - phase, stride);
    if (step == 1 && stride <= 2) {
      copy_padded(row, size, first, stride, count, g.border, to);
      continue;
    }
    const int64_t begin = smaller(count, first >= 0 ? 0 : ceil_div(-first, stride));
    const int64_t end = larger(begin, smaller(count, ceil_div(size - first, stride)));
    const auto show = [&](int64_t i) {
      const int64_t at = pixel_at(first + i * stride, size, g.border);
      to[i] = at < 0 ? Sum<S>(0) : value(row[at * step]);
    };
    for (int64_t i = 0; i < begin; ++i) show(i);
    for (int64_t i = begin; i < end; ++i) to[i] = value(row[(first + i * stride) * step]);
    for (int64_t i = end; i < count; ++i) show(i);
  }
}

/// The lines of (channel, column of taps) number [line0, line1), each where line_of() says.
template <class S>
void copy_lines(const Conv2dGeometry& g, const Bands& b, const Band& band, const S* image, int64_t line0, int64_t line1,
                Sum<S>* row, Sum<S>* lines) {
  const bool planes = g.layout == Layout::contiguous;
  const int64_t step = planes ? 1 : g.c, kernel_w = g.kernel[1];
  const int64_t rows = (band.rows - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1;
  const int64_t columns = (band.columns - 1) * g.stride[1] + (kernel_w - 1) * g.dilation[1] + 1;
  const int64_t h0 = band.oh * g.stride[0] - g.padding[0], w0 = band.ow * g.stride[1] - g.padding[1];
  int64_t from[kMostTaps];  // where a column of taps begins in a row
  for (int64_t kw = 0; kw < kernel_w; ++kw) {
    const int64_t right = kw * g.dilation[1];
    from[kw] = right % g.stride[1] * b.phase_row + right / g.stride[1];
  }
  for (int64_t c = line0 / kernel_w; c * kernel_w < line1; ++c) {
    const S* channel = image + (planes ? c * g.in[0] * g.in[1] : c);
    const int64_t kw0 = larger(0, line0 - c * kernel_w), kw1 = smaller(kernel_w, line1 - c * kernel_w);
    Sum<S>* to = lines + c * kernel_w * b.line;
    for (int64_t phase = 0; phase < smaller(g.stride[0], rows); ++phase, to += b.phase_rows * band.columns)
      for (int64_t r = phase, place = 0; r < rows; r += g.stride[0], place += band.columns) {
        const int64_t h = pixel_at(h0 + r, g.in[0], g.border);
        if (h < 0) {
          for (int64_t kw = kw0; kw < kw1; ++kw)
            for (int64_t j = 0; j < band.columns; ++j) to[kw * b.line + place + j] = 0;
          continue;
        }
        copy_row(g, channel + h * g.in[1] * step, step, w0, columns, b.phase_row, row);
        for (int64_t kw = kw0; kw < kw1; ++kw) copy_numbers(row + from[kw], band.columns, to + kw * b.line + place);
      }
  }
}

// ---- where numbers of x are broadcast, not loaded as lines: its rows are copied as they stand ----

/// Rows [h, h + rows) x columns [w, w + columns) of all channels of an image, border included, in the layout of x.
template <class S>
void copy_rows(const Conv2dGeometry& g, const S* image, int64_t h, int64_t w, int64_t rows, int64_t columns,
               Sum<S>* to) {
  const bool planes = g.layout == Layout::contiguous;
  Conv2dGeometry channel = g;  // a plane of x, as if it were all
  if (planes) channel.c = 1;
  for (int64_t c = 0; c < g.c / channel.c; ++c)
    for (int64_t r = 0; r < rows; ++r, to += columns * channel.c)
      copy_line(channel, image + c * g.in[0] * g.in[1], h + r, w, columns, to);
}

/// How far number t of a filter, in the order of memory, lies from the first in such rows.
inline void find_numbers(const Conv2dGeometry& g, int64_t rows, int64_t columns, int64_t* at) {
  const bool planes = g.layout == Layout::contiguous;
  const int64_t step = planes ? 1 : g.c;
  for (int64_t c = 0; c < g.c; ++c)
    for (int64_t kh = 0; kh < g.kernel[0]; ++kh)
      for (int64_t kw = 0; kw < g.kernel[1]; ++kw)
        at[planes ? (c * g.kernel[0] + kh) * g.kernel[1] + kw : (kh * g.kernel[1] + kw) * g.c + c] =
            (kh * g.dilation[0] * columns + kw * g.dilation[1]) * step + c * (planes ? rows * columns : 1);
}

/// Rows or columns of x under so many of outputs.
inline int64_t seen_by(const Conv2dGeometry& g, int dim, int64_t outputs) {
  return (outputs - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1;
}

/// Calls f(first, width) for tiles of `count` filters: kPlaneFilters of them, or 4.
template <class F>
void for_filters(int64_t count, const F& f) {
  for (int64_t k = 0; k < count;) {
    if (count - k > 4) {
      f(k, std::integral_constant<int, kPlaneFilters>());
      k += kPlaneFilters;
    } else {
      f(k, std::integral_constant<int, 4>());
      k += 4;
    }
  }
}

/// Calls f(std::integral_constant n) for a `count` of 1 to `most`.
template <int most, class F>
void with_count(int64_t count, const F& f) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, f);
  }
  f(std::integral_constant<int, most>());
}

// ---- conv2d_few_channels_grad_input.cpp, conv2d_few_channels_grad_weight.cpp ----

template <class S>
Conv2dRun<S> few_channels_grad_input();
template <class S>
Conv2dRun<S> few_channels_grad_weight();

/// A sentence where a row of results, or the rows of x under one strip of outputs, do not fit their buffer.
const char* few_channels_grad_input_refuses(const Conv2dGeometry& g);
const char* few_channels_grad_weight_refuses(const Conv2dGeometry& g);

}  // namespace cnnops::cpu::CNNOPS_ISA
