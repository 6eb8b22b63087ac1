// What depthwise convolution of channels_last tensors works in: blocks of channels, and tiles of 2x4 outputs with a
// table of the pixels under them.
#pragma once

#include "cache.h"
#include "channels_last.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kTileH = 2, kTileW = 4, kTile = kTileH * kTileW;
constexpr int64_t kMostTaps = 512;
constexpr int64_t kBlockLines = 12;  // of the cache, of the sums of a block of channels
constexpr int64_t kBlockVectors = kBlockLines * kLineVectors;
constexpr int64_t kClassRows = 4;  // rows of tiles of one class, before another's turn

template <class T>
constexpr int64_t kBlock = kBlockVectors * kLanes<T>;

/// Blocks of about the same size, which end where a line of the cache does.
template <class T>
struct Blocks {
  int64_t channels, size, count;
  explicit Blocks(int64_t channels) : channels(channels) {
    const int64_t vectors = ceil_div(channels, kLanes<T>);
    size = round_up(ceil_div(vectors, ceil_div(vectors, kBlockVectors)), kLineVectors) * kLanes<T>;
    count = ceil_div(channels, size);
  }
};

/// Along one axis, the inputs under a tile of outputs, counted from what the first output sees first. Dense: all inputs
/// from the first to the last, in order; otherwise those of the first output, of the second, ...
struct Footprint {
  int64_t count, at[kTileW * kMostTaps];
  Footprint(const Axis& a, int64_t outputs, bool dense) {
    count = dense ? (outputs - 1) * a.in_step + a.taps : outputs * a.taps;
    for (int64_t i = 0; i < count; ++i) at[i] = dense ? i : i / a.taps * a.in_step + i % a.taps * a.offset_step;
  }
};

/// The tiles of a class of outputs, and where the pixels under the current one stand.
template <class S>
struct Tiles {
  Windows t;
  bool dense;
  Footprint h, w;
  const S* in;                             // images, from the first channel of the block on
  const S* zeros;                          // for pixels that are not there
  int64_t table_j;                         // the tile for which the table was made, if it may be shifted
  const S* seen[kTile * kMostTaps];        // [h.count][w.count]
  int64_t places[kTile];                   // of the outputs among all pixels, -1 for none
  int64_t in_shift, place_shift;           // from the table to the current tile
  int64_t next[2 * kTileW * kBlockLines];  // from what a tile sees first to the lines of the next tile's
  bool whole;                              // all outputs of the tile exist

  Tiles(const Windows& t, bool dense) : t(t), dense(dense), h(t.h, kTileH, dense), w(t.w, kTileW, dense) {}

  /// So many channels will be read of every pixel: prepares prefetch_next().
  void read_ahead(int64_t channels) {
    if (!dense) return;
    const int64_t fresh = kTileW * t.w.in_step, lines = ceil_div(channels, kLineNumbers<S>);
    for (int64_t i = 0; i < fresh * lines; ++i)
      next[i] = (fresh + i / lines) * t.in_channels + i % lines * kLineNumbers<S>;
  }

  static int64_t inside(int64_t i, int64_t size, Border border) {
    const int64_t at = pixel_at(i, size, border);
    return at < size ? at : -1;
  }

  /// Outputs beyond the last see zeros, where the table is not dense.
  void make_table(int64_t n, int64_t i0, int64_t j0) {
    const int64_t pixels = t.h.in_size * t.w.in_size;
    const int64_t h0 = i0 * t.h.in_step + t.h.offset0, w0 = j0 * t.w.in_step + t.w.offset0;
    int64_t columns[kTileW * kMostTaps];
    for (int64_t b = 0; b < w.count; ++b)
      columns[b] = !dense && j0 + b / t.w.taps >= t.w.count ? -1 : inside(w0 + w.at[b], t.w.in_size, t.border);
    const S** to = seen;
    for (int64_t a = 0; a < h.count; ++a) {
      const int64_t row = !dense && i0 + a / t.h.taps >= t.h.count ? -1 : inside(h0 + h.at[a], t.h.in_size, t.border);
      const S* from = in + (n * pixels + row * t.w.in_size) * t.in_channels;
      for (int64_t b = 0; b < w.count; ++b)
        *to++ = row < 0 || columns[b] < 0 ? zeros : from + columns[b] * t.in_channels;
    }
    for (int64_t r = 0; r < kTileH; ++r)
      for (int64_t q = 0; q < kTileW; ++q)
        places[r * kTileW + q] =
            i0 + r < t.h.count && j0 + q < t.w.count
                ? (n * t.out_height + t.h.first + (i0 + r) * t.h.step) * t.out_width + t.w.first + (j0 + q) * t.w.step
                : -1;
  }

  /// f() for every tile of rows i0 and i0 + 1.
  template <class F>
  void each(int64_t n, int64_t i0, const F& f) {
    const int64_t h0 = i0 * t.h.in_step + t.h.offset0, last_h = (kTileH - 1) * t.h.in_step,
                  last_w = (kTileW - 1) * t.w.in_step;
    const bool rows_inside =
        i0 + kTileH <= t.h.count && h0 >= 0 && h0 + last_h + (t.h.taps - 1) * t.h.offset_step < t.h.in_size;
    table_j = -1;
    for (int64_t j0 = 0; j0 < t.w.count; j0 += kTileW) {
      const int64_t w0 = j0 * t.w.in_step + t.w.offset0;
      const bool all_inside = rows_inside && j0 + kTileW <= t.w.count && w0 >= 0 &&
                              w0 + last_w + (t.w.taps - 1) * t.w.offset_step < t.w.in_size;
      whole = i0 + kTileH <= t.h.count && j0 + kTileW <= t.w.count;
      if (!all_inside || table_j < 0) {
        make_table(n, i0, j0);
        table_j = all_inside ? j0 : -1;
        in_shift = place_shift = 0;
      } else {
        in_shift = (j0 - table_j) * t.w.in_step * t.in_channels;
        place_shift = (j0 - table_j) * t.w.step;
      }
      f();
    }
  }
};

/// Rows of tiles of an image.
static inline int64_t tile_rows(const Conv2dGeometry& g, Pass pass) {
  return ceil_div(make_windows(g, pass, 0, 0).h.count, kTileH);  // class 0 has the most
}

/// The size of an unrolled filter, or 0.
static inline int64_t unrolled(const Windows& t) {
  const int64_t taps = t.h.taps, stride = t.h.in_step;
  const bool square = t.w.taps == taps && t.w.in_step == stride && t.h.offset_step == 1 && t.w.offset_step == 1;
  return square && ((stride == 1 && (taps == 3 || taps == 5 || taps == 7)) || (stride == 2 && (taps == 3 || taps == 5)))
             ? taps
             : 0;
}

/// Starts loading, for a line of channels, a share of what the next tile will see first: in the order of memory, as
/// processors expect it. A function that does nothing else, GCC takes for one without effect, so it has to be inlined.
template <class S, int rows, int columns, int stride>
[[gnu::always_inline]] static inline void prefetch_next(const Tiles<S>& tiles, const S* const* seen, int64_t c) {
  constexpr int fresh = kTileW * stride;
  const int64_t* next = tiles.next + c / kLineNumbers<S> * fresh;
#pragma GCC unroll 16
  for (int i = larger(rows - kTileH * stride, 0); i < rows; ++i) {
    const S* from = seen[i * columns + columns - fresh] + tiles.in_shift;
#pragma GCC unroll 16
    for (int j = 0; j < fresh; ++j) __builtin_prefetch(from + next[j]);
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
