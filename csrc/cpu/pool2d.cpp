// Max pooling, forward and backward; and max unpooling.
//
//   y[n,c,oh,ow] = the largest x in the window; the first in scan order wins a tie; a NaN wins over all
//
// The winner is remembered by its position in the window, kh*KW + kw: one byte where torch keeps an eight-byte index.
// Backward, a pixel gets gy of those outputs that see it through the tap at which they found their maximum.
#include "pool2d.h"

#include <limits>

#include "pool2d_pixels.h"
#include "pool2d_rows.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// Positions while computing: words as wide as T, so that they fit the masks that comparisons of T give.
template <class T>
using Word = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T, class Position>
using PackedWords __attribute__((vector_size(kLanes<T> * sizeof(Position)))) = Position;

template <class T, class Position>
void store_positions(Position* to, Vec<Word<T>> words, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    count == kLanes<T> ? store(to, words) : store_first(to, words, count);
  } else {
    const PackedWords<T, Position> packed = __builtin_convertvector(words, PackedWords<T, Position>);
    __builtin_memcpy(to, &packed, count * sizeof(Position));
  }
}

/// Like load_inside, for a vector of T's lanes.
template <class T, class Position>
Vec<Word<T>> load_positions(const Position* row, int64_t size, int64_t start) {
  if constexpr (sizeof(T) == 4) {
    return load_inside(row, size, start, kLanes<T>);
  } else {
    PackedWords<T, Position> packed{};
    const int64_t begin = larger(-start, 0), end = smaller(size - start, kLanes<T>);
    if (end - begin == kLanes<T>) {
      __builtin_memcpy(&packed, row + start, sizeof packed);
    } else {
      for (int64_t j = begin; j < end; ++j) packed[j] = row[start + j];
    }
    return __builtin_convertvector(packed, Vec<Word<T>>);
  }
}

template <class S>
constexpr Sum<S> lowest() {
  if constexpr (kReal<S>) {
    return -Sum<S>(__builtin_huge_val());
  } else {
    return std::numeric_limits<S>::lowest();
  }
}

/// Of two numbers the one seen later, where it wins.
template <class V>
auto wins(V seen, V best) {
  return (seen > best) | (seen != seen);
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
      Vec<T> best[count];
      Vec<Word<T>> won[count];
      for (int i = 0; i < count; ++i) best[i] = broadcast(lowest<S>()), won[i] = Vec<Word<T>>{} + first;
      for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh) {
        for (int64_t kw = at.columns.begin; kw < at.columns.end; ++kw) {
          const S* tap = x + (at.from + kh * at.row + kw * at.column);
          const Vec<Word<T>> place = Vec<Word<T>>{} + Word<T>(kh * g.kernel[1] + kw);
          for (int i = 0; i < count; ++i) {
            const Vec<T> seen = channels.load(tap, i);
            const auto better = wins(seen, best[i]);
            best[i] = better ? seen : best[i];
            won[i] = better ? place : won[i];
          }
        }
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
    const auto better = wins(seen, at.best);
    at.best = better ? seen : at.best;
    at.won = better ? Vec<Word<T>>{} + Word<T>(kh * g.kernel[1] + kw) : at.won;
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
  if (goes_by_rows(g)) return forward_rows(g, MaxRule<S, Position>{g, y, positions}, x, begin, end);
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

template <class S, class Position>
struct MaxTerms {
  using T = Sum<S>;
  const Pool2dGeometry& g;
  const S* gy;
  const Position* positions;

  auto through(int64_t, int64_t, int64_t kh, int64_t kw) const {
    const Word<T> place = kh * g.kernel[1] + kw;
    return [=, gy = gy, positions = positions](int64_t first, int64_t size, int64_t start) {
      const auto won_at = load_positions<T>(positions + first, size, start);
      return won_at == place ? load_inside(gy + first, size, start, kLanes<T>) : Vec<T>{};
    };
  }

  void of_output(int64_t, int64_t ow, int64_t kh, int64_t out, Range pixels, T* sums) const {
    const int64_t kw = positions[out] - kh * g.kernel[1];
    const int64_t iw = window_at(g, 1, ow).start + kw * g.dilation[1];
    if (kw >= 0 && kw < g.kernel[1] && iw >= pixels.begin && iw < pixels.end) sums[iw - pixels.begin] += value(gy[out]);
  }
};

/// Backward in channels_last, for dilation 1. Pixels whose distance is the stride are seen through the same taps: so these
/// are found once a row for each of `stride` phases, and pixels far from the border take them as they are.
constexpr int kMostSeers = 16;
struct Seer {
  int64_t offset, back, place;  // output q - back, if q is the last whose window begins at or before the pixel
};

/// The outputs that see the pixels of one phase of row ih.
int seers_of(const Pool2dGeometry& g, int64_t ih, int64_t phase, Seer* seers) {
  int count = 0;
  for_outputs_over(g, 0, ih, outputs_over(g, 0, ih), [&](int64_t oh, int64_t kh) {
    for (int64_t kw = phase, back = 0; kw < g.kernel[1]; kw += g.stride[1], ++back)
      seers[count++] = {(oh * g.out[1] - back) * g.c, back, kh * g.kernel[1] + kw};
  });
  return count;
}

template <class S, class Position>
void max_backward_of_pixels(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                            int64_t end) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const bool past = pixels_past_cache(g, g.in, gx);
  /// Pixels q of a phase, `step` apart from gx[to] on, seen by `count` outputs; `known` is count or, if that is unusual, 0.
  const auto run = [&](auto known, const Seer* see, int count, int64_t from, int64_t to, int64_t pixels) {
    constexpr int most = known.value ? known.value : kMostSeers;
    for_stretches<T>(g.c, past, [&](auto channels) {
      constexpr int size = channels.size;
      const int seeing = known.value ? known.value : count;
      Vec<Word<T>> places[most];
      for (int s = 0; s < seeing; ++s) places[s] = Vec<Word<T>>{} + Word<T>(see[s].place);
      for (int64_t q = 0; q < pixels; ++q) {
        Vec<T> sums[size] = {};
        for (int s = 0; s < seeing; ++s) {
          const int64_t out = from + q * g.c + see[s].offset;
          for (int i = 0; i < size; ++i) {
            const auto won = load_positions<T>(positions + out + channels.c + i * L, channels.lanes, 0);
            sums[i] += won == places[s] ? channels.load(gy + out, i) : Vec<T>{};
          }
        }
        for (int i = 0; i < size; ++i) channels.store(gx + to + q * g.stride[1] * g.c, i, sums[i]);
      }
    });
  };
  Seer seers[kMostSeers], inside[kMostSeers];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t ih = task % g.in[0], first = task / g.in[0] * g.out[0] * g.out[1] * g.c;
    for (int64_t phase = 0; phase < g.stride[1]; ++phase) {
      const int count = phase < g.kernel[1] ? seers_of(g, ih, phase, seers) : 0;
      const int64_t most = ceil_div(larger(g.kernel[1] - phase, 0), g.stride[1]);  // windows over a pixel
      int64_t q = phase < g.padding[1] ? ceil_div(g.padding[1] - phase, g.stride[1]) : 0;
      int64_t iw = q * g.stride[1] + phase - g.padding[1];
      while (iw < g.in[1]) {
        const int64_t from = first + q * g.c, to = (task * g.in[1] + iw) * g.c;
        int64_t pixels = smaller(ceil_div(g.in[1] - iw, g.stride[1]), g.out[1] - q);
        if (q + 1 < most || pixels <= 0) {
          int seeing = 0;
          for (int i = 0; i < count; ++i)
            if (q - seers[i].back >= 0 && q - seers[i].back < g.out[1]) inside[seeing++] = seers[i];
          run(std::integral_constant<int, 0>(), inside, seeing, from, to, pixels = 1);
        } else if (count == 1) {
          run(std::integral_constant<int, 1>(), seers, count, from, to, pixels);
        } else if (count == 2) {
          run(std::integral_constant<int, 2>(), seers, count, from, to, pixels);
        } else if (count == 4) {
          run(std::integral_constant<int, 4>(), seers, count, from, to, pixels);
        } else {
          run(std::integral_constant<int, 0>(), seers, count, from, to, pixels);
        }
        q += pixels;
        iw += pixels * g.stride[1];
      }
    }
  }
  if (past) stores_done();
}

template <class S, class Position>
void max_pool2d_backward(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                         int64_t end) {
  const bool plain = !g.adaptive && g.dilation[0] == 1 && g.dilation[1] == 1;
  const int64_t most = plain ? ceil_div(g.kernel[0], g.stride[0]) * ceil_div(g.kernel[1], g.stride[1]) : kMostSeers + 1;
  if (depth_of(g) > 1 && most <= kMostSeers) return max_backward_of_pixels(g, gy, positions, gx, begin, end);
  backward(g, MaxTerms<S, Position>{g, gy, positions}, gx, begin, end);
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
    k.max_pool2d = {max_pool2d<S, uint8_t>, max_pool2d_backward<S, uint8_t>, max_pool2d_gather<S, uint8_t>};
    k.max_pool2d_wide = {max_pool2d<S, int32_t>, max_pool2d_backward<S, int32_t>, max_pool2d_gather<S, int32_t>};
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
