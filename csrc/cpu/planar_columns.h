// What a task of a 1x1 kernel sees of contiguous planes: a block of columns, pixels of all images one after the other,
// as panels of a few vectors; and how these are copied, each with all planes, so that a tile reads them from one place.
//
// A panel may hold pieces of several images, and with strides, or to its end, stretches of several rows. A panel of one
// stretch is one loop of loads and stores. Otherwise stretches are copied as whole vectors, each overwriting what the
// one before it had too many of.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kMostColumns = 768;  // of a task

/// The product of one group: out[n][m][p] = sum over r of weight[m*row + r*channel] * in[n][r][p]. `plane` numbers of a
/// plane are computed; with strides it is forward's `in` that has more, and grad_input's `out`.
struct Product {
  int64_t rows, depth, plane, in_plane, in_image, out_plane, out_image, weight_row, weight_depth;
  int64_t width, row_step, step;  // of a row of results; from what it sees to the next row's, and along it
  int64_t above;                  // inputs of a plane before the first that is seen: of a band of a larger image's rows
  bool spread;                    // results lie apart
  /// What column `column` sees, as far from the first plane's first number.
  int64_t seen(int64_t column) const {
    const int64_t p = column % plane;
    return column / plane * in_image + above + p / width * row_step + p % width * step;
  }
  Product(const Conv2dGeometry& g, Pass pass) {
    const bool forward = pass == Pass::forward;
    const int64_t c = g.c / g.groups, k = g.k / g.groups;
    rows = forward ? k : c;
    depth = forward ? c : k;
    plane = g.out[0] * g.out[1];
    in_plane = forward ? g.in[0] * g.in[1] : plane;
    in_image = (forward ? g.c : g.k) * in_plane;
    out_plane = forward ? plane : g.in[0] * g.in[1];
    out_image = (forward ? g.k : g.c) * out_plane;
    weight_row = forward ? c : 1;
    weight_depth = forward ? 1 : c;
    const bool strided = forward && !rows_adjoin(g);
    width = strided ? g.out[1] : plane;  // or an image is one row
    row_step = strided ? g.stride[0] * g.in[1] : plane;
    step = forward ? g.stride[1] : 1;
    above = forward ? -g.padding[0] * g.in[1] : 0;
    spread = out_plane != plane;
  }
};

/// Calls f(std::integral_constant V) for a panel of that many vectors.
template <class F>
void with_column_vectors(int64_t vectors, const F& f) {
  if (vectors == 1) f(std::integral_constant<int, 1>());
  if (vectors == 2) f(std::integral_constant<int, 2>());
  if (vectors == 3) f(std::integral_constant<int, 3>());
}

/// Columns of a panel that lie in one image, from lane `lane` on.
struct Piece {
  int64_t n, p, lane, count;
};
/// What columns of one row see.
struct Stretch {
  int64_t from, lane, count;
};
struct ColumnPanel {
  const Piece* pieces;
  const Stretch* stretches;
  int64_t count, stretch_count, vectors, before;  // vectors of it, and of all before it
  int64_t next;                                   // what the next task's panel in this place sees, -1 if there is none
};

/// Consecutive columns as panels.
template <class T>
struct ColumnPanels {
  ColumnPanel panels[kMostColumns];
  Piece pieces[kMostColumns];
  Stretch stretches[kMostColumns];
  int64_t count = 0;

  /// The next task's begin at `next`.
  ColumnPanels(const Product& t, int64_t first, int64_t columns, int64_t next, int64_t all) {
    Piece* piece = pieces;
    Stretch* stretch = stretches;
    int64_t before = 0;
    for (int64_t column = 0; column < columns; ++count) {
      const int64_t width = smaller(columns - column, kTileColumns<T>), vectors = ceil_div(width, kLanes<T>);
      panels[count] = {piece, stretch, 0, 0, vectors, before, next + column < all ? t.seen(next + column) : -1};
      before += vectors;
      for (int64_t lane = 0; lane < width; ++panels[count].count, ++piece) {
        const int64_t n = (first + column) / t.plane, p = (first + column) % t.plane;
        *piece = {n, p, lane, smaller(width - lane, t.plane - p)};
        for (int64_t j = 0; j < piece->count; ++panels[count].stretch_count, ++stretch) {
          *stretch = {t.seen(first + column + j), lane + j, smaller(piece->count - j, t.width - (p + j) % t.width)};
          j += stretch->count;
        }
        lane += piece->count;
        column += piece->count;
      }
    }
  }
};

/// `count` numbers, `step` apart, as whole vectors: those too many are overwritten by what is packed next. But nothing
/// is read at `end` or beyond.
template <class S>
void copy_stretch(const S* from, int64_t step, int64_t count, const S* end, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t j = 0; j < count; j += L, from += L * step)
    store(to + j, load_strided(from, step, from + L * step <= end ? L : smaller(L, count - j)));
}

/// to[panel][r][V vectors], of what is summed over.
template <class S>
void pack_pixels(const Product& t, const S* in, const S* end, const ColumnPanels<Sum<S>>& columns, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (const ColumnPanel* panel = columns.panels; panel < columns.panels + columns.count; ++panel) {
    const Stretch &first = *panel->stretches, *last = panel->stretches + panel->stretch_count;
    with_column_vectors(panel->vectors, [&](auto vectors) {
      const S* plane = in;
      if (t.step == 1 && first.count == vectors * L) {
        for (int64_t r = 0; r < t.depth; ++r, plane += t.in_plane, to += vectors * L)
          for (int64_t v = 0; v < vectors; ++v) store(to + v * L, load(plane + first.from + v * L));
      } else {
        for (int64_t r = 0; r < t.depth; ++r, plane += t.in_plane, to += vectors * L)
          for (const Stretch* s = &first; s < last; ++s)
            copy_stretch(plane + s->from, t.step, s->count, end, to + s->lane);
      }
    });
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
