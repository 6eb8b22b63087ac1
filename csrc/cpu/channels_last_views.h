// What output pixels of a channels_last convolution see of their image, and those that see alike put together.
//
// Near a border of zeros a pixel sees less than a window. If a tile holds pixels of one sort, the taps that they miss
// need not be multiplied.
#pragma once

#include "channels_last_tile.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kMostPixels = 480;  // sorted at a time
constexpr int64_t kShortRow = 256;    // numbers of a window, or of a row of it, that is not worth taking apart

/// The taps through which a pixel sees its image: rows [h0, h1), columns [w0, w1).
struct View {
  int64_t h0, h1, w0, w1;
  bool operator==(const View& v) const { return h0 == v.h0 && h1 == v.h1 && w0 == v.w0 && w1 == v.w1; }
};

/// The taps t of an axis with 0 <= at + t*offset_step < in_size.
static inline void see_taps(const Axis& axis, int64_t at, int64_t* begin, int64_t* end) {
  const int64_t step = larger(1, axis.offset_step);
  *begin = smaller(at >= 0 ? 0 : ceil_div(-at, step), axis.taps);
  *end = larger(*begin, at >= axis.in_size ? 0 : smaller(axis.taps, (axis.in_size - 1 - at) / step + 1));
}

/// The part of a run that is seen: all or nothing of a tap, some taps of a row of them.
static inline Run seen_part(const Windows& t, const Run& run, const View& view, bool row) {
  const bool nothing = run.th < view.h0 || run.th >= view.h1 || (!row && (run.tw < view.w0 || run.tw >= view.w1));
  if (nothing || !row) return {run.th, run.tw, run.c, nothing ? 0 : run.length, run.offset, run.straight};
  return make_run(t, run.th, view.w0 * t.channels, view.w1 * t.channels);
}

/// Pixels that see alike, [first, last) of a task's.
struct Alike {
  View view;
  int64_t first, last;
};

/// Sorts pixels by what they see, into `sorted`; each is inside its image then, as far as it looks. Where a window is
/// short, or its border shows pixels, all count as alike, and what is outside is copied. Returns how many sorts there
/// are.
template <class S>
int64_t sort_pixels(const Windows& t, const Pixel<S>* pixels, int64_t count, Pixel<S>* sorted, Alike* sorts) {
  int64_t kinds = 0, last = 0;
  if (t.border != Border::zeros || t.h.taps * t.w.taps * t.channels < kShortRow) {
    for (int64_t p = 0; p < count; ++p) sorted[p] = pixels[p];
    sorts[0] = {{0, t.h.taps, 0, t.w.taps}, 0, count};
    return 1;
  }
  int16_t kind[kMostPixels];
  for (int64_t p = 0; p < count; ++p) {
    View view{0, t.h.taps, 0, t.w.taps};
    if (!pixels[p].inside) {
      see_taps(t.h, pixels[p].h, &view.h0, &view.h1);
      see_taps(t.w, pixels[p].w, &view.w0, &view.w1);
    }
    if (kinds == 0 || !(sorts[last].view == view)) {
      for (last = 0; last < kinds && !(sorts[last].view == view);) ++last;
      if (last == kinds) sorts[kinds++] = {view, 0, 0};
    }
    ++sorts[last].last;
    kind[p] = int16_t(last);
  }
  for (int64_t k = 0, first = 0; k < kinds; ++k) {
    const int64_t size = sorts[k].last;
    sorts[k].first = sorts[k].last = first;
    first += size;
  }
  for (int64_t p = 0; p < count; ++p) {
    Pixel<S>& to = sorted[sorts[kind[p]].last++];
    to = pixels[p];
    to.inside = true;
  }
  return kinds;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
