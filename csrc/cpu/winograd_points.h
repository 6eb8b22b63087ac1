// The transforms of Winograd's convolution: between numbers and the values of polynomials.
//
// A row of `tile` outputs of a correlation with `taps` taps is a product of two polynomials. It is computed so:
// evaluate both at patch = tile + taps - 1 points, multiply there, interpolate. Along both axes that takes patch*patch
// products where the sums take tile*tile*taps*taps.
//
//   y = A' [(G w G') * (B' x B)] A        w taps x taps, x patch x patch, y tile x tile, and * point by point
//
// This is linear in x. The derivative of a linear map is its transpose: the same matrices, turned round, in the
// opposite order. So the gradient of the patch x has as few products,
//
//   gx = B [(G w G') * (A gy A')] B'
//
// and where patches overlap, their gradients are added.
//
// Six points are 0, a, -a, b, -b and infinity with a = 3/4, b = 3/2: every number of B and A is exact in float, and the
// result errs half as much as with the usual 1 and 2. Eight are 0, 1/2, 1, 2 with both signs, and infinity. B depends
// on the points alone. Columns may have another number of points than rows. All is inlined by force: where GCC calls it
// instead, as it does when types of stored numbers are many, vectors go through memory, and a layer takes up to 1.5
// times as long.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// So many points: pairs of a number and its negative, and 0 and infinity.
template <int patch>
struct PointSet {
  static constexpr int pairs = (patch - 2) / 2;
  double powers[pairs][patch] = {};  // of each pair's positive number
  double all[pairs + 1] = {1};       // coefficients of x^0, x^2, ... in the product of (x*x - number*number)
  double others[pairs][pairs] = {};  // in the product without this pair
  double scales[pairs] = {};         // 1 / the product of a number's distances from all others
  constexpr PointSet() {
    for (int p = 0; p < pairs; ++p) {
      const double number = patch == 6 ? 0.75 * (p + 1) : 0.5 * (1 << p);
      powers[p][0] = others[p][0] = 1;
      for (int i = 1; i < patch; ++i) powers[p][i] = powers[p][i - 1] * number;
    }
    for (int p = 0; p < pairs; ++p) {
      times(all, p + 1, powers[p][2]);
      scales[p] = 1 / (2 * powers[p][2]);
      for (int q = 0, degree = 0; q < pairs; ++q) {
        if (q == p) continue;
        times(others[p], ++degree, powers[q][2]);
        scales[p] /= powers[p][2] - powers[q][2];
      }
    }
  }
  /// A polynomial in x*x, times x*x - square: of this degree, then.
  static constexpr void times(double* polynomial, int degree, double square) {
    for (int i = degree; i >= 0; --i)
      polynomial[i] = (i > 0 ? polynomial[i - 1] : 0) - (i < degree ? square * polynomial[i] : 0);
  }
};
template <int patch>
constexpr PointSet<patch> kPoints;

/// B' x.
template <int patch>
struct InputPoints {
  static constexpr int from = patch, to = patch, pairs = PointSet<patch>::pairs;
  template <class T>
  [[gnu::always_inline]] static void at(const Vec<T>* x, Vec<T>* v) {
    constexpr auto& points = kPoints<patch>;
    const auto ends = [&](const Vec<T>* x) {
      Vec<T> sum = x[2 * pairs];
#pragma GCC unroll 8
      for (int j = pairs - 1; j >= 0; --j) sum = multiply_add(broadcast(T(points.all[j])), x[2 * j], sum);
      return sum;
    };
    v[0] = ends(x);
    v[patch - 1] = ends(x + 1);
#pragma GCC unroll 8
    for (int p = 0; p < pairs; ++p) {
      Vec<T> even = x[patch - 2], odd = x[patch - 3];
#pragma GCC unroll 8
      for (int j = pairs - 2; j >= 0; --j) {
        const Vec<T> factor = broadcast(T(points.others[p][j]));
        even = multiply_add(factor, x[2 * j + 2], even);
        odd = multiply_add(factor, x[2 * j + 1], odd);
      }
      v[2 * p + 1] = multiply_add(broadcast(T(points.powers[p][1])), odd, even);
      v[2 * p + 2] = multiply_add(broadcast(T(-points.powers[p][1])), odd, even);
    }
  }
};

/// B m: the transpose.
template <int patch>
struct InputGradients {
  static constexpr int from = patch, to = patch, pairs = PointSet<patch>::pairs;
  template <class T>
  [[gnu::always_inline]] static void at(const Vec<T>* m, Vec<T>* x) {
    constexpr auto& points = kPoints<patch>;
    Vec<T> sums[pairs], differences[pairs];
#pragma GCC unroll 8
    for (int p = 0; p < pairs; ++p) {
      sums[p] = m[2 * p + 1] + m[2 * p + 2];
      differences[p] = broadcast(T(points.powers[p][1])) * (m[2 * p + 1] - m[2 * p + 2]);
    }
#pragma GCC unroll 8
    for (int j = 0; j <= pairs; ++j) {
      const Vec<T> factor = broadcast(T(points.all[j]));
      Vec<T> even = factor * m[0], odd = factor * m[patch - 1];
#pragma GCC unroll 8
      for (int p = 0; p < pairs; ++p) {
        if (j > 0) even = multiply_add(broadcast(T(points.others[p][j - 1])), sums[p], even);
        if (j < pairs) odd = multiply_add(broadcast(T(points.others[p][j])), differences[p], odd);
      }
      x[2 * j] = even;
      x[2 * j + 1] = odd;
    }
  }
};

/// G w, of so many numbers: the taps of a filter, or a tile of gradients. Unscaled, A w.
template <int patch, int count, bool scaled = true>
struct Points {
  static constexpr int from = count, to = patch;
  template <class T>
  [[gnu::always_inline]] static void at(const Vec<T>* w, Vec<T>* u) {
    constexpr auto& points = kPoints<patch>;
    u[0] = scaled ? broadcast(T(1 / points.all[0])) * w[0] : w[0];
    u[patch - 1] = w[count - 1];
#pragma GCC unroll 8
    for (int p = 0; p < points.pairs; ++p) {
      const double* power = points.powers[p];
      const double scale = scaled ? points.scales[p] : 1;
      Vec<T> part[] = {scaled ? broadcast(T(scale)) * w[0] : w[0], broadcast(T(scale * power[1])) * w[1]};
#pragma GCC unroll 8
      for (int i = 2; i < count; ++i) part[i % 2] = multiply_add(broadcast(T(scale * power[i])), w[i], part[i % 2]);
      u[2 * p + 1] = part[0] + part[1];
      u[2 * p + 2] = part[0] - part[1];
    }
  }
};

/// A' m, of so many numbers: a tile of outputs, or the taps of a filter's gradient.
template <int patch, int count>
struct Numbers {
  static constexpr int from = patch, to = count, last = PointSet<patch>::pairs - 1;
  template <class T>
  [[gnu::always_inline]] static void at(const Vec<T>* m, Vec<T>* y) {
    Vec<T> parts[2][last + 1];  // for even and odd powers
    y[0] = m[0];
#pragma GCC unroll 8
    for (int p = 0; p <= last; ++p) {
      parts[0][p] = m[2 * p + 1] + m[2 * p + 2];
      parts[1][p] = m[2 * p + 1] - m[2 * p + 2];
      y[0] += parts[0][p];
    }
#pragma GCC unroll 8
    for (int i = 1; i < count; ++i) {
      const Vec<T> factor = broadcast(T(kPoints<patch>.powers[last][i])), *part = parts[i % 2];
      y[i] = i == count - 1 ? multiply_add(factor, part[last], m[patch - 1]) : factor * part[last];
#pragma GCC unroll 8
      for (int p = last - 1; p >= 0; --p) y[i] = multiply_add(broadcast(T(kPoints<patch>.powers[p][i])), part[p], y[i]);
    }
  }
};

/// A distance of which the compiler knows no more, so that it counts addresses up from one to the next. It would rather
/// prepare those of all points before a loop over tiles, many more than there are registers.
static inline int64_t counted(int64_t distance) {
  asm("" : "+r"(distance));
  return distance;
}

/// Along both axes: load(i, j) gives a vector, store(i, j, v) takes one.
template <class Rows, class Columns, class T, class Load, class Store>
[[gnu::always_inline]] static inline void transform(const Load& load, const Store& store) {
  Vec<T> half[Rows::to][Columns::from];
  for (int j = 0; j < Columns::from; ++j) {
    Vec<T> column[Rows::from], points[Rows::to];
    for (int i = 0; i < Rows::from; ++i) column[i] = load(i, j);
    Rows::template at<T>(column, points);
    for (int i = 0; i < Rows::to; ++i) half[i][j] = points[i];
  }
  for (int i = 0; i < Rows::to; ++i) {
    Vec<T> points[Columns::to];
    Columns::template at<T>(half[i], points);
    for (int j = 0; j < Columns::to; ++j) store(i, j, points[j]);
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
