// How depthwise convolution cuts contiguous planes into strips of rows, copies what a strip's outputs see to a buffer,
// and where the taps of a filter stand there.
#pragma once

#include "cache.h"
#include "channels_last.h"
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kRows = 4;  // of a tile
constexpr int64_t kMostTaps = 512, kMostStride = 16;
constexpr int64_t kWidestPiece = 256;  // outputs of a row; wider images are cut
constexpr int64_t kGoodBuffer = 1 << 12, kLargestBuffer = 1 << 17;

/// How images are cut into strips of rows x columns outputs (of every class), and how the buffer holds what they see.
struct PlaneStrips {
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

/// Outputs [i0, i0 + rows) x [j0, j0 + columns) of a plane.
struct PlaneStrip {
  int64_t plane, i0, rows, j0, columns;
};

/// The first tap and the reach of all classes of an axis.
static inline void find_reach(const Conv2dGeometry& g, Pass pass, int dim, int64_t& first, int64_t& reach) {
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
PlaneStrips make_strips(const Conv2dGeometry& g, Pass pass) {
  if (pass == Pass::grad_weight) pass = Pass::forward;
  const Axis h = make_axis(g, pass, 0, 0), w = make_axis(g, pass, 1, 0);
  PlaneStrips s;
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
  s.rows = round_up(ceil_div(h.count, ceil_div(h.count, larger(fitting, kRows))), kRows);
  s.down = ceil_div(h.count, s.rows);
  s.buffer_rows = (s.rows - 1) * s.step_h + s.reach_h + 1;
  s.plane = s.buffer_rows * s.pitch;
  return s;
}

/// Strips are numbered (plane, strip down, strip across). Of number after number, copy(strip, number % 2) is called one
/// strip ahead of compute(strip, number % 2): numbers just stored are loaded slowly.
template <class Copy, class Compute>
void each_strip(const PlaneStrips& s, int64_t begin, int64_t end, const Copy& copy, const Compute& compute) {
  const int64_t of_plane = s.down * s.across;
  PlaneStrip now{};
  for (int64_t i = begin; i <= end; ++i) {
    const PlaneStrip last = now;
    if (i < end) {
      const int64_t i0 = i % of_plane / s.across * s.rows, j0 = i % s.across * s.columns;
      now = {i / of_plane, i0, smaller(s.rows, s.count_h - i0), j0, smaller(s.columns, s.count_w - j0)};
      copy(now, i % 2 == 1);
    }
    if (i > begin) compute(last, i % 2 == 0);
  }
}

/// Parts columns into two phases: to[p*phase + j] is number 2*j + p; see(i) is the vector from number i on.
template <class T, class See>
void part_in_two(int64_t count, int64_t phase, T* to, const See& see) {
  constexpr int64_t L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
  // From the last: what its vector of the first phase spills into the second is written over.
  for (int64_t j = (ceil_div(count, 2) - 1) / L * L; j >= 0; j -= L) {
    store(to + j, even_places<T>(see(2 * j), see(2 * j + L - 1), lanes));
    store(to + phase + j, even_places<T>(see(2 * j + 1), see(2 * j + L), lanes));
  }
}

/// Parts columns into phases: to[p*phase + j] = line[j*step + p].
template <class T>
void part_columns(const T* line, int64_t count, int64_t step, int64_t phase, T* to) {
  if (step == 2) return part_in_two(count, phase, to, [=](int64_t i) { return load(line + i); });
  for (int64_t p = 0; p < step; ++p)
    for (int64_t j = 0; j < ceil_div(count, step); ++j) to[p * phase + j] = line[j * step + p];
}

/// Fills the buffer with what the outputs of a strip see of a plane. Meanwhile the rows from `next` on are asked for,
/// if it is not null, a row at a time: all of a strip at once would be waited for.
template <class S>
void copy_strip(const PlaneStrips& s, const S* plane, const int64_t* size, Border border, const PlaneStrip& strip,
                Sum<S>* line, Sum<S>* to, const S* next) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t row0 = strip.i0 * s.step_h + s.first_h, column0 = strip.j0 * s.step_w + s.first_w;
  const int64_t count = (strip.columns - 1) * s.step_w + s.reach_w + 1;
  const int64_t all = (strip.rows - 1) * s.step_h + s.reach_h + 1;
  if (s.step_w == 1 && border == Border::zeros) {
    const int64_t above = smaller(larger(-row0, 0), all), below = larger(smaller(size[0] - row0, all), above);
    for (int64_t j = 0; j < count; j += L) {
      const int64_t lanes = smaller(count - j, L);
      for (int64_t i = 0; i < above; ++i) store(to + i * s.pitch + j, Vec<Sum<S>>{});
      const S* from = plane + (row0 + above) * size[1];
      for (int64_t i = above; i < below; ++i, from += size[1]) {
        if (next && j % kLineNumbers<S> == 0) __builtin_prefetch(next + i * size[1] + j);
        store(to + i * s.pitch + j, load_inside(from, size[1], column0 + j, lanes));
      }
      for (int64_t i = below; i < all; ++i) store(to + i * s.pitch + j, Vec<Sum<S>>{});
    }
  } else {
    for (int64_t i = 0; i < all; ++i, to += s.pitch) {
      if (next) fetch(next + i * size[1], size[1]);
      const int64_t row = pixel_at(row0 + i, size[0], border);
      const bool inside = row >= 0 && row < size[0];
      const S* from = plane + (inside ? row : 0) * size[1];
      const int64_t width = inside ? size[1] : 0;
      if (s.step_w == 2 && border == Border::zeros) {  // numbers that a line would have just got are loaded slowly
        part_in_two(count, s.phase, to, [=](int64_t i) { return load_inside(from, width, column0 + i, L); });
        continue;
      }
      copy_padded(from, width, column0, 1, count, inside ? border : Border::zeros, s.step_w == 1 ? to : line);
      if (s.step_w > 1) part_columns(line, count, s.step_w, s.phase, to);
    }
  }
}

/// The taps of a class, in the order of their inputs: where these stand in the buffer, and their numbers in a filter.
struct Taps {
  int64_t count;
  const int64_t *place, *of_filter;
  int size;  // of an unrolled filter, or 0
};

/// Of all classes: a tap is one's alone.
struct AllTaps {
  Axis h[kMostStride];
  Taps of[kMostStride][kMostStride];
  int64_t place[kMostTaps], of_filter[kMostTaps];

  AllTaps(const Conv2dGeometry& g, Pass pass, const PlaneStrips& s) {
    int64_t used = 0;
    for (int64_t ch = 0; ch < s.classes_h; ++ch) {
      h[ch] = in_memory_order(make_axis(g, pass, 0, ch));
      for (int64_t cw = 0; cw < s.classes_w; ++cw) {
        const Axis w = in_memory_order(make_axis(g, pass, 1, cw));
        Taps& taps = of[ch][cw];
        taps = {h[ch].taps * w.taps, place + used, of_filter + used, unrolled(s, h[ch], w)};
        for (int64_t th = 0; th < h[ch].taps; ++th)
          for (int64_t tw = 0; tw < w.taps; ++tw, ++used) {
            place[used] =
                s.place(h[ch].offset0 + th * h[ch].offset_step - s.first_h, w.offset0 + tw * w.offset_step - s.first_w);
            of_filter[used] = (h[ch].k0 + th * h[ch].k_step) * g.kernel[1] + w.k0 + tw * w.k_step;
          }
      }
    }
  }
  AllTaps(const AllTaps&) = delete;

  static int unrolled(const PlaneStrips& s, const Axis& h, const Axis& w) {
    const bool square = h.taps == w.taps && h.in_step == w.in_step && h.offset_step == 1 && w.offset_step == 1 &&
                        s.classes_h * s.classes_w == 1;
    const bool known =
        w.in_step == 1 ? h.taps == 3 || h.taps == 5 || h.taps == 7 : w.in_step == 2 && (h.taps == 3 || h.taps == 5);
    return square && known ? int(h.taps) : 0;
  }
};

}  // namespace cnnops::cpu::CNNOPS_ISA
