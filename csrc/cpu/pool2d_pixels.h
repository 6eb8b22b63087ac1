// Pooling in channels_last: what the kernels' loops over pixels share. The channels of a pixel go by stretches of a few
// vectors, held in registers while the pixels that matter are looked at one by one.
#pragma once

#include "cache.h"
#include "pool2d.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// `size` vectors of channels from c on: whole ones, or one of `lanes` lanes.
template <int count, bool whole>
struct Stretch {
  static constexpr int size = count;
  static constexpr bool is_whole = whole;
  int64_t c, lanes;
  bool past_cache;

  template <class S>
  Vec<Sum<S>> load(const S* p, int i) const {
    p += c + i * kLanes<Sum<S>>;
    if constexpr (whole) {
      return CNNOPS_ISA::load(p);
    } else {
      return load_first(p, lanes);
    }
  }
  template <class S>
  void prefetch(const S* p) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(p + c + i * kLanes<Sum<S>>);
  }
  template <class S, class V>
  void store(S* p, int i, V v) const {
    p += c + i * kLanes<Sum<S>>;
    if constexpr (!whole) {
      store_first(p, v, lanes);
    } else if constexpr (std::is_same_v<S, Sum<S>>) {
      past_cache ? store_past_cache(p, v) : CNNOPS_ISA::store(p, v);
    } else {
      CNNOPS_ISA::store(p, v);
    }
  }
};

/// Calls visit(stretch) for all channels.
template <class T, class Visit>
static inline void for_stretches(int64_t channels, bool past_cache, const Visit& visit) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) visit(Stretch<4, true>{c, L, past_cache});
  for (; c + 2 * L <= channels; c += 2 * L) visit(Stretch<2, true>{c, L, past_cache});
  for (; c + L <= channels; c += L) visit(Stretch<1, true>{c, L, past_cache});
  if (c < channels) visit(Stretch<1, false>{c, channels - c, false});
}

/// Whether the rows of a tensor of pixels are better written past the cache.
template <class S>
static bool pixels_past_cache(const Pool2dGeometry& g, const int64_t (&size)[2], const S* p) {
  return g.c * sizeof(S) % kVectorBytes == 0 && past_cache(p, g.n * g.c * size[0] * size[1]);
}

/// An output of one channel: its windows' taps in memory. Tap (kh, kw) is x[from + kh*row + kw*column + c].
struct Pixel {
  int64_t oh, ow, to, from, row, column;
  int64_t step, fresh;  // the next output's taps lie step further on; those from kw = fresh on are new
  Window rows, columns;
};

/// Fetches what an output a little further right sees that those before it do not.
template <class S, class Channels>
static inline void prefetch_taps(const Pixel& at, const S* x, const Channels& channels) {
  constexpr int64_t kAhead = 4;
  for (int64_t kh = at.rows.begin; kh < at.rows.end; ++kh)
    for (int64_t kw = larger(at.columns.begin, at.fresh); kw < at.columns.end; ++kw)
      channels.prefetch(x + (at.from + kAhead * at.step + kh * at.row + kw * at.column));
}

/// Calls visit(pixel) for all outputs of some rows.
template <class Visit>
static void for_pixels(const Pool2dGeometry& g, int64_t begin, int64_t end, const Visit& visit) {
  Pixel at;
  at.row = g.dilation[0] * g.in[1] * g.c;
  at.column = g.dilation[1] * g.c;
  at.step = g.stride[1] * g.c;
  at.fresh = larger(0, g.kernel[1] - g.stride[1]);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / g.out[0] * g.in[0];
    at.oh = task % g.out[0];
    at.rows = window_at(g, 0, at.oh);
    at.to = task * g.out[1] * g.c;
    for (at.ow = 0; at.ow < g.out[1]; ++at.ow, at.to += g.c) {
      at.columns = window_at(g, 1, at.ow);
      at.from = ((image + at.rows.start) * g.in[1] + at.columns.start) * g.c;
      visit(at);
    }
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
