// Pooling in contiguous layout with strides of 1 and 2: vectors hold outputs that are neighbours in a row. What lies beyond
// the border is read as a number that changes nothing, and the last vector of a row begins early enough to be whole: it
// computes a few outputs once more, which is cheaper than writing part of a vector.
#pragma once

#include "pool2d.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kMostTaps = 16;
constexpr int64_t kRowsTogether = 8;  // share what is known about their columns

static inline bool goes_by_rows(const Pool2dGeometry& g) {
  const int64_t taps = g.kernel[1];
  return g.layout == Layout::contiguous && !g.adaptive && g.stride[1] <= 2 && g.dilation[1] == 1 && taps >= 2 &&
         taps <= kMostTaps && g.out[1] > 1;
}

/// Lanes of a vector that lie inside a row.
struct Lanes {
  int64_t begin, end;
};

template <class T>
static inline Lanes lanes_inside(int64_t start, int64_t size) {
  const int64_t begin = larger(0, smaller(-start, kLanes<T>));
  return {begin, larger(begin, smaller(size - start, kLanes<T>))};
}

/// Every second number of two vectors that follow each other, from the first or the second on.
template <bool odd, class T, int... lane>
static inline Vec<T> every_second(Vec<T> v, Vec<T> w, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, w, (2 * lane + odd)...);
}

template <class S, int stride, bool inside, class Rule>
static void forward_block(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t ow, int64_t begin,
                          int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  constexpr auto sequence = std::make_integer_sequence<int, int(L)>();
  const int64_t taps = g.kernel[1], start = ow * stride - g.padding[1], count = smaller(g.out[1], L);
  const auto first_tap = [=](int64_t load) {
    return stride == 1 ? load : smaller(load / 2 * 2, taps - 2) + load % 2 * L;
  };
  const int64_t loads = stride == 1 ? taps : round_up(taps, 2);
  Lanes lanes[kMostTaps];
  Vec<T> first{};  // tap that exists
  if constexpr (!inside) {
    for (int64_t load = 0; load < loads; ++load) lanes[load] = lanes_inside<T>(start + first_tap(load), g.in[1]);
    for (int64_t j = 0; j < L && start + j * stride < 0; ++j) first[j] = T(-(start + j * stride));
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t oh = task % g.out[0];
    const Window rows = window_at(g, 0, oh);
    auto state = rule.begin(rows, first);
    for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
      const int64_t ih = rows.start + kh * g.dilation[0];
      const S* row = x + ((task / g.out[0] * g.in[0] + ih) * g.in[1] + start);
      const auto load_at = [&](int64_t load) {
        const S* p = row + first_tap(load);
        if constexpr (inside) {
          return CNNOPS_ISA::load(p);
        } else {
          return load_between(p, lanes[load].begin, lanes[load].end, Rule::outside);
        }
      };
      if constexpr (stride == 1) {
        for (int64_t kw = 0; kw < taps; ++kw) rule.see(state, load_at(kw), kh, kw);
      } else {
        for (int64_t kw = 0; kw < taps; kw += 2) {
          const Vec<T> v = load_at(kw), w = load_at(kw + 1);
          if (kw + 1 < taps) rule.see(state, every_second<false, T>(v, w, sequence), kh, kw);
          rule.see(state, every_second<true, T>(v, w, sequence), kh, smaller(kw + 1, taps - 1));
        }
      }
    }
    rule.end(state, oh, ow, task * g.out[1] + ow, count);
  }
}

template <class S, int stride, class Rule>
static void forward_rows_of(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t task = begin; task < end;) {
    const int64_t next = smaller(smaller(end, task + kRowsTogether), (task / g.out[0] + 1) * g.out[0]);
    for (int64_t o = 0; o < g.out[1]; o += L) {
      const int64_t ow = larger(0, smaller(o, g.out[1] - L)), start = ow * stride - g.padding[1];
      if (start >= 0 && start + g.kernel[1] + stride * (L - 1) <= g.in[1]) {
        forward_block<S, stride, true>(g, rule, x, ow, task, next);
      } else {
        forward_block<S, stride, false>(g, rule, x, ow, task, next);
      }
    }
    task = next;
  }
}

/// `rule` says how an output is found: begin(rows, first) makes a state, where first[j] is the first tap of a row that exists
/// for lane j; see(state, numbers, kh, kw) adds what a tap sees, Rule::outside beyond the border; and end(state, oh, ow,
/// to, count) writes the outputs.
template <class S, class Rule>
static void forward_rows(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t begin, int64_t end) {
  g.stride[1] == 1 ? forward_rows_of<S, 1>(g, rule, x, begin, end) : forward_rows_of<S, 2>(g, rule, x, begin, end);
}

}  // namespace cnnops::cpu::CNNOPS_ISA
