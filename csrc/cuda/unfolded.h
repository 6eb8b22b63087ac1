// The unfolded tensor, a matrix that is never made: a row per (c, kh, kw), a *tap*, and a column per (n, oh, ow), a
// *pixel*. conv2d_im2col.cu says what convolution is with it.
//
// Its element lies at pixel.x + tap.x in the tensor: one number of its pixel plus one of its tap, so both are worked
// out once, and finding an element costs an addition and a test against the borders. Where a border shows the image
// once more, the distance to the pixel shown is added.
//
// Taps are numbered (c, kh, kw), or in channels_last (kh, kw, c): so do the weights lie in memory.
#pragma once

#include "conv2d.h"

namespace cnnops::cuda {

constexpr int kNowhere = -(1 << 30);  // a height outside of every tensor, also after adding a tap's or a pixel's

/// Where a tap's weight is, and what it adds to its pixel's place in the unfolded tensor.
struct alignas(16) Tap {
  int weight, x, h, w;
};

/// A pixel's first input; h and w to test for borders.
struct alignas(16) Pixel {
  int64_t x;
  int h, w;
};

/// What a product's taps and pixels are, along both axes.
struct Axes {
  SmallAxis h, w;
  Channels channels;
  const Tensors& tensors;
  Border border;
  bool channels_last;

  __device__ Axes(const Conv2dGeometry& g, Pass pass, const Tensors& tensors, int64_t class_h, int64_t class_w)
      : h(make_axis(g, pass, 0, class_h)),
        w(make_axis(g, pass, 1, class_w)),
        channels(g, pass),
        tensors(tensors),
        border(g.border),
        channels_last(g.layout == Layout::channels_last) {}

  __device__ int taps() const { return channels.reduce * h.taps * w.taps; }

  __device__ Tap tap(int number) const {
    if (number >= taps()) return {-1, 0, kNowhere, 0};
    const int c = channels_last ? number % channels.reduce : number / (h.taps * w.taps);
    const int tap = channels_last ? number / channels.reduce : number % (h.taps * w.taps);
    const int kh = tap / w.taps, kw = tap % w.taps, tap_h = kh * h.offset_step, tap_w = kw * w.offset_step;
    const int weight = c * channels.weight_reduce + (h.k0 + kh * h.k_step) * channels.weight_h +
                       (w.k0 + kw * w.k_step) * channels.weight_w;
    return {weight, c * tensors.x.c + tap_h * tensors.x.h + tap_w * tensors.x.w, tap_h, tap_w};
  }

  /// The class's pixel of this number, and where its first output is: -1 if there is no such pixel. If `apart`, pixels
  /// come in windows of 2 x 2, each of which has one output, and `count` is that of windows. The pixels of one are
  /// `apart` numbers apart.
  __device__ void find(int64_t number, int64_t count, int group, Pixel& pixel, int64_t& out, int apart = 0) const {
    pixel = {0, kNowhere, 0};
    out = -1;
    const int side = apart ? 2 : 1, place = apart ? static_cast<int>(number / apart % 4) : 0;
    const int64_t window = apart ? number / (4 * apart) * apart + number % apart : number;
    if (window >= count) return;
    Digits digits(window);
    const int j = static_cast<int>(digits.next(w.count / side)), i = static_cast<int>(digits.next(h.count / side));
    const int64_t n = digits.rest(), in_h = (i * side + place / 2) * h.in_step + h.offset0,
                  in_w = (j * side + place % 2) * w.in_step + w.offset0;
    pixel.x = n * tensors.x.n + group * channels.reduce * tensors.x.c + in_h * tensors.x.h + in_w * tensors.x.w;
    pixel.h = static_cast<int>(in_h);
    pixel.w = static_cast<int>(in_w);
    out = n * tensors.y.n + group * channels.produce * tensors.y.c + (h.first + i * h.step) * tensors.y.h +
          (w.first + j * w.step) * tensors.y.w;
  }

  /// Where an element is; nullptr if it is a zero beyond the border.
  template <class S>
  __device__ const S* place(const S* x, const Pixel& pixel, const Tap& tap) const {
    const int at_h = pixel.h + tap.h, at_w = pixel.w + tap.w;
    int64_t at = pixel.x + tap.x;
    bool inside = 0 <= at_h && at_h < h.in_size && 0 <= at_w && at_w < w.in_size;
    if (border != Border::zeros && at_h > kNowhere / 2) {
      const int shown_h = tensors.h.pixel(at_h, h.in_size), shown_w = tensors.w.pixel(at_w, w.in_size);
      at += static_cast<int64_t>(shown_h - at_h) * tensors.x.h + static_cast<int64_t>(shown_w - at_w) * tensors.x.w;
      inside = shown_h >= 0 && shown_w >= 0;
    }
    return inside ? x + at : nullptr;
  }

  template <class S>
  __device__ S unfolded(const S* x, const Pixel& pixel, const Tap& tap) const {
    const S* at = place(x, pixel, tap);
    return at ? *at : S{};
  }
};

/// Forward and the gradient of the input as a product of channels and pixels, in tiles; of each group and each class of
/// pixels. See Axes::find() for `apart`.
struct CorrelatePlan {
  int apart, side;  // that of a window
  int64_t channel_tiles, pixel_tiles, tiles;

  CorrelatePlan(const Conv2dGeometry& g, Pass pass, int channels, int pixels, int apart)
      : apart(apart), side(apart ? 2 : 1) {
    const int64_t windows = g.n * (make_axis(g, pass, 0, 0).count / side) * (make_axis(g, pass, 1, 0).count / side);
    channel_tiles = ceil_div(Channels(g, pass).produce, channels);
    pixel_tiles = ceil_div(windows, pixels / (side * side));
    tiles = g.groups * axis_classes(g, pass, 0) * axis_classes(g, pass, 1) * channel_tiles * pixel_tiles;
  }

  struct Tile {
    int64_t channels, pixels, class_h, class_w, group;  // the first two count tiles
  };
  __device__ Tile tile(const Conv2dGeometry& g, Pass pass, int64_t number) const {
    Digits digits(number);
    Tile tile;
    tile.channels = digits.next(channel_tiles);
    tile.pixels = digits.next(pixel_tiles);
    tile.class_w = digits.next(axis_classes(g, pass, 1));
    tile.class_h = digits.next(axis_classes(g, pass, 0));
    tile.group = digits.rest();
    return tile;
  }

  /// How many windows a class has.
  __device__ int64_t windows(const Conv2dGeometry& g, const Axes& axes) const {
    return g.n * (axes.h.count / side) * (axes.w.count / side);
  }
};

/// The gradient of the weights as a product: a row per output channel and a column per tap, in tiles, and the sum over
/// pixels in parts.
struct WeightPlan {
  int64_t row_tiles, column_tiles;
  Parts parts;
  int64_t tiles;

  WeightPlan(const Conv2dGeometry& g, int rows, int columns)
      : row_tiles(ceil_div(g.k / g.groups, rows)),
        column_tiles(ceil_div(g.c / g.groups * g.kernel[0] * g.kernel[1], columns)),
        parts(g.groups * row_tiles * column_tiles, weight_count(g)),
        tiles(parts.count * g.groups * row_tiles * column_tiles) {}
};

}  // namespace cnnops::cuda
