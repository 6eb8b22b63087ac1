// What Winograd's convolution in groups (conv2d_winograd_groups.cpp) and its gradient of the weight share: the tiles of a
// strip, and how they are transformed.
#pragma once

#include "turned_strips.h"
#include "winograd_points.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kPatch = 6, kProducts = kPatch * kPatch;
constexpr int64_t kOutputs = 4;  // of a tile, along each axis

/// points[i][m] = the transform, by Form, of the pixels from (h0, w0) on, each a vector; `point` numbers lie between two
/// points. shown(dim, i) is the pixel that position i of an axis shows, -1 for none.
template <class Form, class T, class Shown>
static inline void transform_pixels(const T* strip, const int64_t* size, int64_t h0, int64_t w0, const Shown& shown,
                                    int64_t point, T* points) {
  constexpr int64_t L = kLanes<T>;
  const int64_t row = size[1] * L;
  const auto put = [&](int i, int j, Vec<T> x) { store(points + (i * kPatch + j) * point, x); };
  if (h0 >= 0 && h0 + Form::from <= size[0] && w0 >= 0 && w0 + Form::from <= size[1]) {
    const T* from = strip + h0 * row + w0 * L;
    transform<Form, Form, T>([&](int i, int j) { return load(from + i * row + j * L); }, put);
    return;
  }
  int64_t rows[Form::from], columns[Form::from];
  for (int i = 0; i < Form::from; ++i) {
    rows[i] = shown(0, h0 + i);
    columns[i] = shown(1, w0 + i);
  }
  transform<Form, Form, T>(
      [&](int i, int j) {
        return rows[i] < 0 || columns[j] < 0 ? Vec<T>{} : load(strip + rows[i] * row + columns[j] * L);
      },
      put);
}

/// Of the inputs that a tile sees whose first output is (h, w).
template <class T>
static inline void transform_inputs(const Windows& t, const T* strip, int64_t h, int64_t w, int64_t point, T* points) {
  const int64_t size[] = {t.h.in_size, t.w.in_size};
  transform_pixels<InputPoints<kPatch>>(
      strip, size, h + t.h.offset0, w + t.w.offset0,
      [&](int dim, int64_t i) {
        const Axis& axis = dim == 0 ? t.h : t.w;
        return i < axis.count + axis.offset0 + 2 ? pixel_at(i, axis.in_size, t.border) : -1;
      },
      point, points);
}

/// Of the gradients of a tile's outputs.
template <class T>
static inline void transform_gradients(const Conv2dGeometry& g, const T* strip, int64_t h, int64_t w, int64_t point,
                                       T* points) {
  transform_pixels<Points<kPatch, kOutputs>>(
      strip, g.out, h, w, [&](int dim, int64_t i) { return i < g.out[dim] ? i : -1; }, point, points);
}

/// The gradient of the weight. conv2d_winograd_groups_grad_weight.cpp
template <class T>
const char* winograd_groups_grad_weight_refuses(const Conv2dGeometry& g);
template <class T>
Conv2dRun<T> winograd_groups_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
