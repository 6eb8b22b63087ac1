// What Winograd's convolution in groups (conv2d_winograd_groups.cpp) and its gradient of the weight share: how groups
// lie in vectors, where the pixels of an image are, and how its tiles are transformed.
#pragma once

#include "turned_strips.h"
#include "winograd_points.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kPatch = 6, kProducts = kPatch * kPatch;
constexpr int64_t kOutputs = 4;  // of a tile, along each axis

/// How channels lie in vectors. A unit is a vector of whole groups, or a group of whole vectors.
template <class T>
struct Units {
  int64_t channels, rows;           // of a group: summed over, and produced
  int64_t groups, in, out;          // of a vector: groups (1 if it is a part of one), inputs, outputs
  int64_t in_vectors, out_vectors;  // of a unit
  int64_t count;

  Units(const Conv2dGeometry& g, Pass pass)
      : channels((pass == Pass::grad_input ? g.k : g.c) / g.groups),
        rows((pass == Pass::grad_input ? g.c : g.k) / g.groups) {
    constexpr int64_t L = kLanes<T>;
    groups = larger(L / larger(channels, rows), 1);
    in = smaller(groups * channels, L);
    out = smaller(groups * rows, L);
    in_vectors = ceil_div(channels, L);
    out_vectors = ceil_div(rows, L);
    count = ceil_div(g.groups, groups);
  }
  int64_t vectors() const { return in_vectors + out_vectors; }
  /// Groups are parts of vectors, or whole vectors.
  bool fit() const {
    constexpr int64_t L = kLanes<T>;
    return larger(channels, rows) <= L || (channels % L == 0 && rows % L == 0);
  }
};

/// Where the pixels of images stand: `at` is the first one's first vector of channels; and the distances between
/// vectors, images, rows and pixels.
template <class T>
struct View {
  T* at;
  int64_t vector, image, row, pixel;
};

/// The pixels of a strip that has been turned or copied, of vectors that lie so far apart.
template <class T>
static inline View<const T> strip_view(const T* strip, int64_t width, int64_t vector, int64_t image) {
  return {strip, vector, image, width * kLanes<T>, kLanes<T>};
}

/// points[i][m] = the transform, by Form, of the pixels from (h0, w0) on, each a vector; `point` numbers lie between
/// two points. shown(dim, i) is the pixel that position i of an axis shows, -1 for none.
template <class Form, class T, class Shown>
static inline void transform_pixels(const View<const T>& from, const T* image, const int64_t* size, int64_t h0,
                                    int64_t w0, const Shown& shown, int64_t point, T* points) {
  const int64_t apart = counted(point);
  const auto put = [&](int i, int j, Vec<T> x) { store(points + (i * kPatch + j) * apart, x); };
  if (h0 >= 0 && h0 + Form::from <= size[0] && w0 >= 0 && w0 + Form::from <= size[1]) {
    const T* first = image + h0 * from.row + w0 * from.pixel;
    const int64_t row = counted(from.row), pixel = counted(from.pixel);
    transform<Form, Form, T>([&](int i, int j) { return load(first + i * row + j * pixel); }, put);
    return;
  }
  int64_t rows[Form::from], columns[Form::from];
  for (int i = 0; i < Form::from; ++i) {
    rows[i] = shown(0, h0 + i);
    columns[i] = shown(1, w0 + i);
  }
  transform<Form, Form, T>(
      [&](int i, int j) {
        return rows[i] < 0 || columns[j] < 0 ? Vec<T>{} : load(image + rows[i] * from.row + columns[j] * from.pixel);
      },
      put);
}

/// Of the inputs that a tile sees whose first output is (h, w).
template <class T>
static inline void transform_inputs(const Windows& t, const View<const T>& from, const T* image, int64_t h, int64_t w,
                                    int64_t point, T* points) {
  const int64_t size[] = {t.h.in_size, t.w.in_size};
  transform_pixels<InputPoints<kPatch>>(
      from, image, size, h + t.h.offset0, w + t.w.offset0,
      [&](int dim, int64_t i) {
        const Axis& axis = dim == 0 ? t.h : t.w;
        return i < axis.count + axis.offset0 + 2 ? pixel_at(i, axis.in_size, t.border) : -1;
      },
      point, points);
}

/// Of the gradients of a tile's outputs.
template <class T>
static inline void transform_gradients(const Conv2dGeometry& g, const View<const T>& from, const T* image, int64_t h,
                                       int64_t w, int64_t point, T* points) {
  transform_pixels<Points<kPatch, kOutputs>>(
      from, image, g.out, h, w, [&](int dim, int64_t i) { return i < g.out[dim] ? i : -1; }, point, points);
}

/// The gradient of the weight. conv2d_winograd_groups_grad_weight.cpp
template <class T>
const char* winograd_groups_grad_weight_refuses(const Conv2dGeometry& g);
template <class T>
Conv2dRun<T> winograd_groups_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
