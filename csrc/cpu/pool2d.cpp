// Max pooling, forward and backward; and max unpooling.
//
//   y[n,c,oh,ow] = the largest x in the window; the first in scan order wins a tie; a NaN wins over all
//
// The winner is remembered by its position in the window, kh*KW + kw: one byte where torch keeps an eight-byte index.
// Backward, a pixel gets gy of those outputs that see it through the tap at which they found their maximum.
#include "pool2d.h"

#include <limits>

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
    store_first(to, words, count);
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

template <class S, class Position>
void max_pool2d(const Pool2dGeometry& g, const S* x, S* y, Position* positions, int64_t begin, int64_t end) {
  using T = Sum<S>;
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
        const auto wins = (seen > best) | (seen != seen);
        best = wins ? seen : best;
        won = wins ? Words{} + Word<T>(kh * g.kernel[1] + kw) : won;
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

template <class S, class Position>
void max_pool2d_backward(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, int64_t begin,
                         int64_t end) {
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
