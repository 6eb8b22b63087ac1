// What the convolutions of channels_last tensors share: from an output pixel to the inputs that it sees.
//
// In (n, h, w, c) all channels of a pixel lie together, so an address is found once per pixel and tap, and whatever the
// border says is just another address. A *window* is what one output pixel sees, in the order (kernel row, kernel
// column, channel): that of the filters' own numbers.
#pragma once

#include "../correlation.h"
#include "kernels.h"
#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// The windows of one group and one class of outputs (../correlation.h). Taps are numbered in the order in which their
/// inputs lie in memory.
struct Windows {
  Axis h, w;
  Border border;
  int64_t in_channels, out_channels;   // of all groups: the distance between pixels
  int64_t channels, rows;              // of this group: summed over, and produced
  int64_t in_channel0, out_channel0;   // where the group begins
  int64_t weight0, tap_weight;         // its first filter, and the distance between two taps of one
  int64_t weight_row, weight_channel;  // the distance between produced channels, and between summed ones
  int64_t kernel_width, out_height, out_width;
  int64_t pixels() const { return h.count * w.count; }
  /// Whether a row of taps is one run of numbers in memory.
  bool adjacent() const { return w.offset_step == 1 && channels == in_channels; }
  /// Whether it is the taps of a channel that follow each other in a filter, as in contiguous ones.
  bool by_channel() const { return weight_row != 1 && weight_channel != 1; }
  int64_t weight_of(int64_t th, int64_t tw) const {
    return weight0 + ((h.k0 + th * h.k_step) * kernel_width + w.k0 + tw * w.k_step) * tap_weight;
  }
};

static inline Axis in_memory_order(Axis a) {
  if (a.offset_step >= 0) return a;
  a.offset0 += (a.taps - 1) * a.offset_step;
  a.k0 += (a.taps - 1) * a.k_step;
  a.offset_step = -a.offset_step;
  a.k_step = -a.k_step;
  return a;
}

/// Class number `cls` of all classes of both axes.
static inline Windows make_windows(const Conv2dGeometry& g, Pass pass, int64_t group, int64_t cls) {
  const bool forward = pass != Pass::grad_input, contiguous = g.filters == Layout::contiguous;
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, taps = g.kernel[0] * g.kernel[1];
  const int64_t filter = taps * c_group, channel = contiguous ? taps : 1;
  const Pass axes = forward ? Pass::forward : pass;
  const int64_t classes_w = axis_classes(g, axes, 1);
  Windows t;
  t.h = in_memory_order(make_axis(g, axes, 0, cls / classes_w));
  t.w = in_memory_order(make_axis(g, axes, 1, cls % classes_w));
  t.border = g.border;
  t.in_channels = forward ? g.c : g.k;
  t.out_channels = forward ? g.k : g.c;
  t.channels = forward ? c_group : k_group;
  t.rows = forward ? k_group : c_group;
  t.in_channel0 = group * t.channels;
  t.out_channel0 = group * t.rows;
  t.weight0 = group * k_group * filter;
  t.tap_weight = contiguous ? 1 : c_group;
  t.weight_row = forward ? filter : channel;
  t.weight_channel = forward ? channel : filter;
  t.kernel_width = g.kernel[1];
  t.out_height = forward ? g.out[0] : g.in[0];
  t.out_width = forward ? g.out[1] : g.in[1];
  return t;
}

static inline int64_t classes(const Conv2dGeometry& g, Pass pass) {
  return axis_classes(g, pass, 0) * axis_classes(g, pass, 1);
}

/// One output: the image that it sees (from the group's first channel on), the place of its window's first tap in that
/// as a row, a column and an offset, whether the window lies inside, and its own place among all output pixels.
template <class S>
struct Pixel {
  const S* image;
  int64_t h, w, at, out;
  bool inside;
};

/// `count` outputs of a class from number `first` on: they run on from one image to the next.
template <class S>
static inline void find_pixels(const Windows& t, const S* in, int64_t first, int64_t count, Pixel<S>* pixels) {
  int64_t n = first / t.pixels(), i = first % t.pixels() / t.w.count, j = first % t.w.count;
  const int64_t reach_h = (t.h.taps - 1) * t.h.offset_step, reach_w = (t.w.taps - 1) * t.w.offset_step;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t h = i * t.h.in_step + t.h.offset0, w = j * t.w.in_step + t.w.offset0;
    pixels[p] = {in + n * t.h.in_size * t.w.in_size * t.in_channels + t.in_channel0,
                 h,
                 w,
                 (h * t.w.in_size + w) * t.in_channels,
                 (n * t.out_height + t.h.first + i * t.h.step) * t.out_width + t.w.first + j * t.w.step,
                 h >= 0 && h + reach_h < t.h.in_size && w >= 0 && w + reach_w < t.w.in_size};
    if (++j < t.w.count) continue;
    j = 0;
    if (++i < t.h.count) continue;
    i = 0;
    ++n;
  }
}

/// How far tap (th, tw) of a window lies from its first.
static inline int64_t tap_offset(const Windows& t, int64_t th, int64_t tw) {
  return (th * t.h.offset_step * t.w.in_size + tw * t.w.offset_step) * t.in_channels;
}

/// The channels that a pixel sees through a tap, or nullptr where there is nothing to see.
template <class S>
static inline const S* seen(const Windows& t, const Pixel<S>& p, int64_t th, int64_t tw) {
  const int64_t h = pixel_at(p.h + th * t.h.offset_step, t.h.in_size, t.border);
  const int64_t w = pixel_at(p.w + tw * t.w.offset_step, t.w.in_size, t.border);
  return h < 0 || w < 0 ? nullptr : p.image + (h * t.w.in_size + w) * t.in_channels;
}

/// All of forward or grad_input by one thread, in blocks of pixels as large as they get; with conv2d_channels_last()'s
/// workspace. conv2d_channels_last.cpp
template <class S>
void channels_last_alone(const Conv2dGeometry& g, Pass pass, const Conv2dOperands<S>& o, Sum<S>* workspace);

}  // namespace cnnops::cpu::CNNOPS_ISA
