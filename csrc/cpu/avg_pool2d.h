// What average pooling divides by.
#pragma once

#include "pool2d.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// How many places of the window of output o count, along one axis.
static inline int64_t window_size(const Pool2dGeometry& g, int dim, int64_t o, bool count_include_pad) {
  if (g.adaptive) return window_at(g, dim, o).end;
  const int64_t start = o * g.stride[dim] - g.padding[dim], beyond = count_include_pad ? g.padding[dim] : 0;
  return smaller(start + g.kernel[dim], g.in[dim] + beyond) - larger(start, -beyond);
}

/// The divisor of an output of row oh whose window counts `columns` columns.
template <class T>
static inline T divisor_of(const Pool2dGeometry& g, const Divisor& d, int64_t oh, int64_t columns) {
  if (d.divisor_override) return T(d.divisor_override);
  return T(window_size(g, 0, oh, d.count_include_pad) * columns);
}

template <class T>
static inline T divisor_at(const Pool2dGeometry& g, const Divisor& d, int64_t oh, int64_t ow) {
  return divisor_of<T>(g, d, oh, window_size(g, 1, ow, d.count_include_pad));
}

/// Divides by a whole number: by multiplication where that gives the same bits.
template <class T>
struct Division {
  T divisor, exact;
  Division() : divisor(1), exact(0) {}
  explicit Division(T by) : divisor(by), exact(0) {
    if constexpr (kReal<T>) {
      const int64_t whole = by;
      if (whole > 0 && (whole & (whole - 1)) == 0) exact = 1 / by;
    }
  }
  Vec<T> operator()(Vec<T> v) const { return exact != 0 ? v * exact : v / divisor; }
};

/// Divisors of the outputs from (oh, ow) on. `full`: those whose windows count as many columns as windows have.
template <class T>
static Vec<T> divisors_of(const Pool2dGeometry& g, const Divisor& d, Range full, int64_t oh, int64_t ow) {
  Vec<T> divisors = broadcast(divisor_of<T>(g, d, oh, g.kernel[1]));
  const int64_t begin = larger(0, ow), end = smaller(g.out[1], ow + kLanes<T>);
  for (int64_t o = begin; o < smaller(end, full.begin); ++o) divisors[o - ow] = divisor_at<T>(g, d, oh, o);
  for (int64_t o = larger(begin, full.end); o < end; ++o) divisors[o - ow] = divisor_at<T>(g, d, oh, o);
  return divisors;
}

/// v, which belongs to the outputs from (oh, ow) on, divided.
template <class T>
static Vec<T> divided(const Pool2dGeometry& g, const Divisor& d, Range full, int64_t oh, int64_t ow, Vec<T> v) {
  if (larger(ow, 0) >= full.begin && smaller(ow + kLanes<T>, g.out[1]) <= full.end)
    return Division<T>(divisor_of<T>(g, d, oh, g.kernel[1]))(v);
  return v / divisors_of<T>(g, d, full, oh, ow);
}

/// The outputs along an axis whose windows count as many places as windows have.
static inline Range full_windows(const Pool2dGeometry& g, const Divisor& d, int dim) {
  if (g.adaptive) return {0, 0};
  if (d.divisor_override) return {0, g.out[dim]};
  if (!d.count_include_pad) return whole_windows(g, dim);
  const int64_t room = g.in[dim] + 2 * g.padding[dim] - g.kernel[dim];
  return {0, room >= 0 ? smaller(g.out[dim], room / g.stride[dim] + 1) : 0};
}

/// The divisions of all outputs, with that of full windows at hand.
template <class T>
struct Divisions {
  const Pool2dGeometry& g;
  const Divisor& d;
  Range rows = full_windows(g, d, 0), columns = full_windows(g, d, 1);
  Division<T> full{d.divisor_override ? T(d.divisor_override) : T(g.kernel[0] * g.kernel[1])};

  bool are_full(int64_t oh, int64_t ow) const {
    return oh >= rows.begin && oh < rows.end && ow >= columns.begin && ow < columns.end;
  }
  Division<T> at(int64_t oh, int64_t ow) const { return are_full(oh, ow) ? full : unusual(oh, ow); }
  [[gnu::noinline, gnu::cold]] Division<T> unusual(int64_t oh, int64_t ow) const {
    return Division<T>(divisor_at<T>(g, d, oh, ow));
  }
};

/// Whether no pixel of a row is seen by two columns of outputs, nor one between them by none; in contiguous layout.
static inline bool lie_side_by_side(const Pool2dGeometry& g) {
  return g.layout == Layout::contiguous && !g.adaptive && g.stride[1] == g.kernel[1] && g.padding[1] == 0 &&
         g.dilation[1] == 1 && g.out[1] * g.kernel[1] <= g.in[1];
}

}  // namespace cnnops::cpu::CNNOPS_ISA
