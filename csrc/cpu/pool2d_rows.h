// Pooling in contiguous layout with strides of 1 and 2: vectors hold outputs that are neighbours in a row. What lies
// beyond the border is read as a number that changes nothing, and the last vector of a row begins early enough to be
// whole: it computes a few outputs once more, which is cheaper than writing part of a vector.
#pragma once

#include "cache.h"
#include "pool2d.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kMostTaps = 16;
constexpr int64_t kRowsTogether = 8;  // share what is known about their columns, at most

static inline bool goes_by_rows(const Pool2dGeometry& g) {
  const int64_t taps = g.kernel[1];
  return g.layout == Layout::contiguous && !g.adaptive && g.stride[1] <= 2 && g.dilation[1] == 1 && taps >= 2 &&
         taps <= kMostTaps && g.out[1] > 1;
}

/// Few of long rows, so that what they are made from is read in the order in which it lies in memory.
template <class T>
static inline int64_t rows_together(const Pool2dGeometry& g) {
  return g.out[1] > 2 * kLanes<T> ? 2 : kRowsTogether;
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

/// Whether x does not fit the cache. Then it is asked for early: the processor by itself does so for long rows only.
template <class S>
static inline bool comes_from_memory(const Pool2dGeometry& g) {
  return g.n * g.c * g.in[0] * g.in[1] * int64_t(sizeof(S)) > (16 << 20);
}

/// Fetches what lies 4 KiB beyond two vectors at p.
template <class S>
static inline void prefetch_beyond(const S* p) {
  constexpr int64_t far = 4096 / sizeof(S);
  __builtin_prefetch(p + far);
  __builtin_prefetch(p + far + kLanes<Sum<S>>);
}

/// A vector of outputs of some rows of a plane. `known` is how many taps a window's row has or, if that is unusual, 0.
/// A row shorter than a vector runs over into the next, which is written later: cheaper than writing part of a vector.
template <class S, int stride, bool inside, int known, class Rule>
static void forward_block(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t ow, int64_t begin, int64_t end,
                          int64_t range_end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  constexpr auto sequence = std::make_integer_sequence<int, int(L)>();
  const int64_t taps = known ? known : g.kernel[1], start = ow * stride - g.padding[1];
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
  const int64_t image = begin / g.out[0];
  const bool from_memory = comes_from_memory<S>(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t oh = task - image * g.out[0];
    const Window rows = window_at(g, 0, oh);
    auto state = rule.begin(rows, first);
    for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
      const int64_t ih = rows.start + kh * g.dilation[0];
      const S* row = x + ((image * g.in[0] + ih) * g.in[1] + start);
      if (from_memory) prefetch_beyond(row);
      const auto load_at = [&](int64_t load) {
        const S* p = row + first_tap(load);
        if constexpr (inside) {
          return CNNOPS_ISA::load(p);
        } else {
          return lanes[load].end - lanes[load].begin == L
                     ? CNNOPS_ISA::load(p)
                     : load_between(p, lanes[load].begin, lanes[load].end, Rule::outside);
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
    const bool room = g.out[1] >= L || L <= (range_end - task) * g.out[1];
    rule.end(state, oh, ow, task * g.out[1] + ow, room ? L : g.out[1]);
  }
}

template <class S, int stride, class Rule>
static void forward_rows_of(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t task = begin; task < end;) {
    const int64_t next = smaller(smaller(end, task + rows_together<Sum<S>>(g)), (task / g.out[0] + 1) * g.out[0]);
    for (int64_t o = 0; o < g.out[1]; o += L) {
      const int64_t ow = larger(0, smaller(o, g.out[1] - L)), start = ow * stride - g.padding[1];
      const bool inside = start >= 0 && start + g.kernel[1] + stride * (L - 1) <= g.in[1];
      const auto block =
          g.kernel[1] == 3 ? inside ? forward_block<S, stride, true, 3, Rule> : forward_block<S, stride, false, 3, Rule>
          : inside         ? forward_block<S, stride, true, 0, Rule>
                           : forward_block<S, stride, false, 0, Rule>;
      block(g, rule, x, ow, task, next, end);
    }
    task = next;
  }
}

/// `rule` says how an output is found: begin(rows, first) makes a state, where first[j] is the first tap of a row that
/// exists for lane j; see(state, numbers, kh, kw) adds what a tap sees, Rule::outside beyond the border; and end(state,
/// oh, ow, to, count) writes the outputs.
template <class S, class Rule>
static void forward_rows(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t begin, int64_t end) {
  g.stride[1] == 1 ? forward_rows_of<S, 1>(g, rule, x, begin, end) : forward_rows_of<S, 2>(g, rule, x, begin, end);
}

// ---- backward ----

/// The numbers of v and w by turns, from the first half of both or from the second.
template <class T, int... lane>
static Vec<T> by_turns(Vec<T> v, Vec<T> w, bool second_half, std::integer_sequence<int, lane...>) {
  constexpr int L = kLanes<T>;
  return second_half ? __builtin_shufflevector(v, w, (lane % 2 * L + L / 2 + lane / 2)...)
                     : __builtin_shufflevector(v, w, (lane % 2 * L + lane / 2)...);
}

/// Writes `count` pixels: sums[0], or with a stride of 2 the lanes of sums[0] and sums[1] by turns.
template <class S, int... lane>
static void put_by_turns(S* to, const Vec<Sum<S>>* sums, int64_t stride, int64_t count,
                         std::integer_sequence<int, lane...> lanes) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const Vec<T> low = stride == 2 ? by_turns<T>(sums[0], sums[1], false, lanes) : sums[0];
  count >= L ? store(to, low) : store_first(to, low, count);
  if (count <= L) return;
  const Vec<T> high = by_turns<T>(sums[0], sums[1], true, lanes);
  count == 2 * L ? store(to + L, high) : store_first(to + L, high, count - L);
}

/// How many pixels may be written at pixel iw of a row with `left` rows of the task's range from it on. A row shorter
/// than what is computed at once runs over into the next, which is written later: cheaper than writing part of a
/// vector.
template <class T>
static inline int64_t pixels_to_put(const Pool2dGeometry& g, int64_t iw, int64_t left) {
  const int64_t most = g.stride[1] * kLanes<T>, count = g.in[1] - iw;
  return count >= most ? most : smaller(round_up(count, kLanes<T>), left * g.in[1]);
}

}  // namespace cnnops::cpu::CNNOPS_ISA
