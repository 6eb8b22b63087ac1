// The three transforms of Winograd's convolution F(4x4, 3x3), on vectors of channels.
//
// A row of 4 outputs of a 3-tap correlation is a product of two polynomials. It is computed as such: evaluate both at 6
// points, multiply there, interpolate. Along both axes that takes 6*6 multiplications where the sums take 4*4*3*3.
//
//   y = A' [(G w G') * (B' x B)] A        w 3x3, x 6x6, y 4x4, and * point by point
//
// The points are 0, a, -a, b, -b and infinity with a = 3/4, b = 3/2: every number of B and A is exact in float, and the
// result errs half as much as with the usual 1 and 2.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kTile = 4, kTaps = 3, kPatch = kTile + kTaps - 1, kPoints = kPatch * kPatch;
constexpr double kA = 0.75, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;

/// B' x.
struct InputPoints {
  static constexpr int from = kPatch, to = kPatch;
  template <class T>
  static void at(const Vec<T>* x, Vec<T>* v) {
    const auto ends = [&](const Vec<T>* x) {
      return multiply_add(broadcast(T(kA2 * kB2)), x[0], multiply_add(broadcast(T(-kA2 - kB2)), x[2], x[4]));
    };
    const auto pair = [&](double point, double other, Vec<T>* v) {
      const Vec<T> other2 = broadcast(T(-other * other));
      const Vec<T> even = multiply_add(other2, x[2], x[4]), odd = multiply_add(other2, x[1], x[3]);
      v[0] = multiply_add(broadcast(T(point)), odd, even);
      v[1] = multiply_add(broadcast(T(-point)), odd, even);
    };
    v[0] = ends(x);
    pair(kA, kB, v + 1);
    pair(kB, kA, v + 3);
    v[5] = ends(x + 1);
  }
};

/// G w.
struct FilterPoints {
  static constexpr int from = kTaps, to = kPatch;
  template <class T>
  static void at(const Vec<T>* w, Vec<T>* u) {
    const auto pair = [&](double point, double other, Vec<T>* u) {
      const double p2 = point * point, scale = 1 / (2 * p2 * (p2 - other * other));
      const Vec<T> even = multiply_add(broadcast(T(scale * p2)), w[2], broadcast(T(scale)) * w[0]);
      u[0] = multiply_add(broadcast(T(scale * point)), w[1], even);
      u[1] = multiply_add(broadcast(T(-scale * point)), w[1], even);
    };
    u[0] = broadcast(T(1 / (kA2 * kB2))) * w[0];
    pair(kA, kB, u + 1);
    pair(kB, kA, u + 3);
    u[5] = w[2];
  }
};

/// A' m.
struct Outputs {
  static constexpr int from = kPatch, to = kTile;
  template <class T>
  static void at(const Vec<T>* m, Vec<T>* y) {
    const Vec<T> even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = multiply_add(broadcast(T(kA)), odd_a, broadcast(T(kB)) * odd_b);
    y[2] = multiply_add(broadcast(T(kA2)), even_a, broadcast(T(kB2)) * even_b);
    y[3] = multiply_add(broadcast(T(kA2 * kA)), odd_a, multiply_add(broadcast(T(kB2 * kB)), odd_b, m[5]));
  }
};

/// Along both axes: load(i, j) gives a vector, store(i, j, v) takes one.
template <class Step, class T, class Load, class Store>
[[gnu::always_inline]] static inline void transform(const Load& load, const Store& store) {
  Vec<T> half[Step::to][Step::from];
  for (int j = 0; j < Step::from; ++j) {
    Vec<T> column[Step::from], points[Step::to];
    for (int i = 0; i < Step::from; ++i) column[i] = load(i, j);
    Step::template at<T>(column, points);
    for (int i = 0; i < Step::to; ++i) half[i][j] = points[i];
  }
  for (int i = 0; i < Step::to; ++i) {
    Vec<T> points[Step::to];
    Step::template at<T>(half[i], points);
    for (int j = 0; j < Step::to; ++j) store(i, j, points[j]);
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
