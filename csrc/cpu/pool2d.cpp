// Max pooling and its gather; and max unpooling.
//
//   y[n,c,oh,ow] = the largest x in the window; the first in scan order wins a tie; a NaN wins over all
//
// The winner is remembered by its position in the window, kh*KW + kw: one byte where torch keeps an eight-byte index.
#include "pool2d.h"

#include <limits>

#include "pool2d_pixels.h"
#include "pool2d_positions.h"
#include "pool2d_rows.h"
#include "pool2d_squares.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class S>
constexpr Sum<S> lowest() {
  if constexpr (kReal<S>) {
    return -Sum<S>(__builtin_huge_val());
  } else {
    return std::numeric_limits<S>::lowest();
  }
}

template <class S, class Position>
void max_of_pixels(const Pool2dGeometry& g, const S* x, S* y, Position* positions, int64_t begin, int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const bool past = pixels_past_cache(g, g.out, y);
  for_pixels(g, begin, end, [&](const Pixel& at) {
    const bool sees = at.columns.begin < at.columns.end;
    const Word<T> first = sees ? at.rows.begin * g.kernel[1] + at.columns.begin : 0;
    for_stretches<T>(g.c, past, [&](auto channels) {
      constexpr int count = channels.size;
      if (past) prefetch_taps(at, x, channels);
      Vec<T> best[count];
      Vec<Word<T>> won[count];
      for (int i = 0; i < count; ++i) best[i] = broadcast(lowest<S>()), won[i] = Vec<Word<T>>{} + first;
      Vec<Word<T>> place = Vec<Word<T>>{} + first;
      for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh) {
        for (int64_t kw = at.columns.begin; kw < at.columns.end; ++kw, place += 1) {
          const S* tap = x + (at.from + kh * at.row + kw * at.column);
          for (int i = 0; i < count; ++i) take_larger<T>(channels.load(tap, i), place, best[i], won[i]);
        }
        place += Word<T>(g.kernel[1] - (at.columns.end - at.columns.begin));
      }
      for (int i = 0; i < count; ++i) {
        channels.store(y + at.to, i, best[i]);
        store_positions<T>(positions + at.to + channels.c + i * L, won[i], channels.lanes);
      }
    });
  });
  if (past) stores_done();
}

template <class S, class Position>
struct MaxRule {
  using T = Sum<S>;
  static constexpr T outside = lowest<S>();
  const Pool2dGeometry& g;
  S* y;
  Position* positions;
  struct State {
    Vec<T> best;
    Vec<Word<T>> won;
  };

  State begin(const Window& rows, Vec<T> first) const {
    return {broadcast(outside), __builtin_convertvector(first, Vec<Word<T>>) + Word<T>(rows.begin * g.kernel[1])};
  }
  void see(State& at, Vec<T> seen, int64_t kh, int64_t kw) const {
    take_larger<T>(seen, Vec<Word<T>>{} + Word<T>(kh * g.kernel[1] + kw), at.best, at.won);
  }
  void end(const State& at, int64_t, int64_t, int64_t to, int64_t count) const {
    count == kLanes<T> ? store(y + to, at.best) : store_first(y + to, at.best, count);
    store_positions<T>(positions + to, at.won, count);
  }
};

template <class S, class Position>
void max_pool2d(const Pool2dGeometry& g, const S* x, S* y, Position* positions, int64_t begin, int64_t end) {
  using T = Sum<S>;
  if (depth_of(g) > 1) return max_of_pixels(g, x, y, positions, begin, end);
  const MaxRule<S, Position> rule{g, y, positions};
  if (goes_by_squares(g)) return forward_squares(g, rule, x, begin, end);
  if (goes_by_rows(g)) return forward_rows(g, rule, x, begin, end);
  for_groups<T>(g, begin, end, [&](auto zero, const Group& at) {
    using V = decltype(zero);
    constexpr bool one = std::is_same_v<V, T>;
    using Words = std::conditional_t<one, Word<T>, Vec<Word<T>>>;
    const bool sees = at.columns.begin < at.columns.end;
    V best = zero + lowest<S>();
    Words won = Words{} + Word<T>(sees ? at.rows.begin * g.kernel[1] + at.columns.begin : 0);
    for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh) {
      for (int64_t kw = at.columns.begin; kw < at.columns.end; ++kw) {
        const V seen = load_group<V>(x + (at.from + kh * at.row + kw * at.column), at);
        const auto better = wins(seen, best);
        best = better ? seen : best;
        won = better ? Words{} + Word<T>(kh * g.kernel[1] + kw) : won;
      }
    }
    store_group(y, best, at);
    if constexpr (one) {
      positions[at.to] = Position(won);
    } else {
      store_positions<T>(positions + at.to, won, at.count);
    }
  });
}

template <class S, class Position>
void max_pool2d_gather(const Pool2dGeometry& g, const S* x, const Position* positions, S* y, int64_t begin,
                       int64_t end) {
  const int64_t depth = depth_of(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.out[0] * g.in[0], top = window_at(g, 0, task % g.out[0]).start;
    for (int64_t ow = 0; ow < g.out[1]; ++ow) {
      const int64_t left = window_at(g, 1, ow).start, to = (task * g.out[1] + ow) * depth;
      for (int64_t c = 0; c < depth; ++c) {
        const uint32_t position = positions[to + c], columns = g.kernel[1];
        const int64_t ih = top + position / columns * g.dilation[0], iw = left + position % columns * g.dilation[1];
        const bool inside = ih >= 0 && ih < g.in[0] && iw >= 0 && iw < g.in[1];
        y[to + c] = inside ? x[((image + ih) * g.in[1] + iw) * depth + c] : S{};
      }
    }
  }
}

template <class S>
void max_unpool2d(const Unpool2dGeometry& g, const S* x, const int64_t* indices, S* y, int64_t begin, int64_t end) {
  const int64_t depth = g.layout == Layout::channels_last ? g.c : 1;
  for (int64_t image = begin; image < end; ++image) {
    S* plane = y + image * g.out * depth;
    for (int64_t i = 0; i < g.out * depth; ++i) plane[i] = S{};
    for (int64_t place = image * g.in; place < (image + 1) * g.in; ++place)
      for (int64_t c = 0; c < depth; ++c) plane[indices[place * depth + c] * depth + c] = x[place * depth + c];
  }
}

}  // namespace

template <class S>
void set_pool2d(Kernels<S>& k) {
  k.max_pool2d.forward = max_pool2d<S, uint8_t>;
  k.max_pool2d_wide.forward = max_pool2d<S, int32_t>;
  if constexpr (kReal<S>) {
    k.max_pool2d.gather = max_pool2d_gather<S, uint8_t>;
    k.max_pool2d_wide.gather = max_pool2d_gather<S, int32_t>;
    set_max_pool2d_backward(k);
    k.max_unpool2d = max_unpool2d<S>;
  }
  set_avg_pool2d(k);
}

template void set_pool2d(Kernels<float>&);
template void set_pool2d(Kernels<double>&);
template void set_pool2d(Kernels<BFloat16>&);
template void set_pool2d(Kernels<Float16>&);
template void set_pool2d(Kernels<uint8_t>&);
template void set_pool2d(Kernels<int8_t>&);
template void set_pool2d(Kernels<int16_t>&);
template void set_pool2d(Kernels<int32_t>&);
template void set_pool2d(Kernels<int64_t>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
