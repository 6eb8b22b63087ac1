// Pooling by windows of 2x2 pixels side by side, in contiguous layout: the commonest, and the simplest. Output row r,
// counted through all planes, sees pixel rows 2r and 2r + 1 and nobody else does.
//
// A vector holds neighbouring outputs; 2 x 2 vectors hold what they see. The last vector of a row begins early enough
// to be whole. In a row shorter than a vector it runs over into rows that are written later, and reads what it then
// computes for nothing: cheaper than reading and writing part of a vector, which only the last rows of a range do.
#pragma once

#include "pool2d_rows.h"

namespace cnnops::cpu::CNNOPS_ISA {

static inline bool goes_by_squares(const Pool2dGeometry& g) {
  bool so = g.layout == Layout::contiguous && !g.adaptive;
  for (int dim = 0; dim < 2; ++dim) {
    so &= g.kernel[dim] == 2 && g.stride[dim] == 2 && g.padding[dim] == 0 && g.dilation[dim] == 1;
    so &= g.in[dim] == 2 * g.out[dim];
  }
  return so;
}

/// Calls run(o, count) for all vectors of a row of outputs, with the first output and how many there are: all of a
/// vector's if the row is `free` to run over.
template <class T, class Run>
static inline void for_vectors(int64_t outputs, bool free, const Run& run) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t o = 0; o < outputs; o += L) {
    const int64_t left = outputs - o;
    if (left >= L || (outputs < L && free)) {
      run(o, std::integral_constant<int64_t, L>());
    } else if (outputs < L || left * 2 == L) {
      run(o, left);
    } else {
      run(outputs - L, std::integral_constant<int64_t, L>());
    }
  }
}

/// `rule` as in forward_rows().
template <class S, class Rule>
static void forward_squares(const Pool2dGeometry& g, const Rule& rule, const S* x, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
  const int64_t outputs = g.out[1], width = g.in[1];
  const bool from_memory = comes_from_memory<S>(g);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % g.out[0];
    for_vectors<T>(outputs, L <= (end - row) * outputs, [&](int64_t o, auto count) {
      auto state = rule.begin(Window{2 * oh, 0, 2}, Vec<T>{});
      for (int64_t kh = 0; kh < 2; ++kh) {
        const S* from = x + (2 * row + kh) * width + 2 * o;
        const int64_t pixels = 2 * count;
        if (from_memory) prefetch_beyond(from);
        const Vec<T> low = pixels >= L ? load(from) : load_first(from, pixels);
        const Vec<T> high = pixels == 2 * L ? load(from + L) : load_first(from + L, larger(0, pixels - L));
        rule.see(state, every_second<false, T>(low, high, lanes), kh, 0);
        rule.see(state, every_second<true, T>(low, high, lanes), kh, 1);
      }
      rule.end(state, oh, o, row * outputs + o, count);
    });
  }
}

/// What the outputs of a vector give to the pixels of their windows.
template <class T>
struct Square {
  Vec<T> tap[2][2];
};

/// square(out, count) is what outputs out, out + 1, ... give. Rows of pixels [begin, end).
template <class S, class Give>
static void backward_squares(const Pool2dGeometry& g, const Give& give, S* gx, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
  const int64_t outputs = g.out[1], width = g.in[1];
  const bool past = past_cache(gx, g.n * g.c * g.in[0] * width) && width % L == 0;
  const auto put = [&](S* to, Vec<T> v) {
    if constexpr (std::is_same_v<S, T>) {
      if (past) return store_past_cache(to, v);
    }
    store(to, v);
  };
  for (int64_t row = begin / 2; 2 * row < end; ++row) {
    const bool both = 2 * row >= begin && 2 * row + 1 < end;
    for_vectors<T>(outputs, both && L <= (end / 2 - row) * outputs, [&](int64_t o, auto count) [[gnu::always_inline]] {
      const Square<T> square = give(row * outputs + o, count);
      for (int64_t kh = 0; kh < 2; ++kh) {
        if (!both && (2 * row + kh < begin || 2 * row + kh >= end)) continue;
        S* to = gx + (2 * row + kh) * width + 2 * o;
        const int64_t pixels = 2 * count;
        const Vec<T> low = by_turns<T>(square.tap[kh][0], square.tap[kh][1], false, lanes);
        const Vec<T> high = by_turns<T>(square.tap[kh][0], square.tap[kh][1], true, lanes);
        pixels >= L ? put(to, low) : store_first(to, low, pixels);
        if (pixels == 2 * L) {
          put(to + L, high);
        } else if (pixels > L) {
          store_first(to + L, high, pixels - L);
        }
      }
    });
  }
  if (past) stores_done();
}

}  // namespace cnnops::cpu::CNNOPS_ISA
