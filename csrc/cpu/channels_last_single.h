// Convolution of channels_last tensors where each output sees one pixel, through the only tap of a 1x1 kernel; and how
// weights are packed, for these and for others.
//
// A tile reads its pixels where they stand, with strides as well as without. Of inputs too many for the caches the next
// tile's are fetched ahead: where strides leave pixels out, no processor expects the next one's place. Where there is but
// one pixel, as in a fully connected layer of a single image, its weights are turned in registers instead of packed, and
// memory sets the pace.
#pragma once

#include "channels_last_tile.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int64_t kWeightBytes = 65536;   // packed weights of a block
constexpr int64_t kKeptBytes = 3 << 19;   // packed weights of a set of panels, kept from task to task
constexpr int64_t kMuchInput = 16 << 20;  // bytes that are not in a cache when they are read
constexpr int64_t kAhead = 128;           // of weights that are in no cache, so many numbers are fetched ahead
template <class T>
constexpr int64_t kWeights = kWeightBytes / int64_t(sizeof(T));
template <class T>
constexpr int64_t kKept = kKeptBytes / int64_t(sizeof(T));

/// square[r][lane] = the weight of number r, of at most a vector of them, for produced channel `lane`. They are turned:
/// each channel's lie side by side.
template <class S>
[[gnu::always_inline]] static inline void turn_weights(const Windows& t, const S* from, int64_t lanes, int64_t count,
                                                       bool far, Vec<Sum<S>> (&square)[kLanes<Sum<S>>]) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < L; ++i) square[i] = i < lanes ? load_first(from + i * t.weight_row, count) : Vec<T>{};
  for (int64_t i = 0; i < L && far; ++i) __builtin_prefetch(from + i * t.weight_row + kAhead);
  transpose<T>(square);
}

/// Whether all weights are too many for the caches.
template <class S>
bool lie_far(const Windows& t) {
  return t.rows * t.weight_row * int64_t(sizeof(S)) > kMuchInput;
}

/// to[r][lane] = the weight of number r of the run for produced channel row0 + lane, zero from channel `rows` on.
template <class S, int V>
void pack_weights(const Windows& t, const S* weight, int64_t row0, const Run& run, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const bool far = lie_far<S>(t);
  for (int v = 0; v < V; ++v) {
    const int64_t row = row0 + v * L, lanes = smaller(L, t.rows - row);
    T* panel = to + v * L;
    if (t.weight_row == 1) {
      int64_t left = run.length;
      for (int64_t tw = run.tw, c = run.c; left > 0; ++tw, c = 0) {
        const S* from = weight + t.weight_of(run.th, tw) + row;
        for (; c < t.channels && left > 0; ++c, --left, panel += V * L)
          store(panel, load_first(from + c * t.weight_channel, lanes));
      }
    } else {  // a row of taps is consecutive in the filter, too
      const S* from = weight + t.weight_of(run.th, run.tw) + row * t.weight_row + run.c;
      for (int64_t r = 0; r < run.length; r += L) {
        const int64_t count = smaller(L, run.length - r);
        Vec<T> square[L];
        turn_weights<S>(t, from + r, lanes, count, far, square);
        for (int64_t i = 0; i < count; ++i, panel += V * L) store(panel, square[i]);
      }
    }
  }
}

/// The same for all numbers of a window, of contiguous filters.
template <class S, int V>
void pack_by_channel(const Windows& t, const S* weight, int64_t row0, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t taps = t.h.taps * t.w.taps, length = taps * t.channels;
  for (int v = 0; v < V; ++v) {
    const int64_t row = row0 + v * L, lanes = smaller(L, t.rows - row);
    const S* from = weight + t.weight0 + row * t.weight_row;
    for (int64_t r = 0, c = 0, tap = 0; r < length; r += L) {
      const int64_t count = smaller(L, length - r);
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = i < lanes ? load_first(from + i * t.weight_row + r, count) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) {
        store(to + ((tap * t.channels + c) * V + v) * L, square[i]);
        if (++tap < taps) continue;
        tap = 0;
        ++c;
      }
    }
  }
}

/// Whether every output sees one pixel, through the only tap.
static inline bool is_single(const Windows& t) {
  const auto inside = [](const Axis& axis) {
    return axis.offset0 >= 0 && axis.offset0 + (axis.count - 1) * axis.in_step < axis.in_size;
  };
  return t.h.taps * t.w.taps == 1 && inside(t.h) && inside(t.w);
}

/// Whether then output p sees pixel p, for all p.
static inline bool in_order(const Windows& t) {
  return t.pixels() == t.h.in_size * t.w.in_size && t.pixels() == t.out_height * t.out_width;
}

/// Where the pixels that outputs [first, first + count) see begin, and these themselves.
static inline void find_single(const Windows& t, int64_t first, int64_t count, int64_t* seen, int64_t* made) {
  const int64_t step = t.w.in_step * t.in_channels, out_step = t.w.step * t.out_channels;
  for (int64_t p = 0; p < count;) {
    const int64_t j = (first + p) % t.w.count, row = (first + p) / t.w.count, n = row / t.h.count, i = row % t.h.count;
    const int64_t h = n * t.h.in_size + i * t.h.in_step + t.h.offset0;
    const int64_t out = n * t.out_height + t.h.first + i * t.h.step;
    int64_t from = (h * t.w.in_size + j * t.w.in_step + t.w.offset0) * t.in_channels + t.in_channel0;
    int64_t to = (out * t.out_width + t.w.first + j * t.w.step) * t.out_channels;
    for (const int64_t end = smaller(count, p + t.w.count - j); p < end; ++p, from += step, to += out_step) {
      seen[p] = from;
      made[p] = to;
    }
  }
}

/// multiply_tile() for one pixel, by the weights of numbers [c, c + depth) where they stand: each is used once, so that
/// packing it would be most of the work.
template <class T, int V>
void multiply_one(const Windows& t, const T* a, const T* weight, int64_t row0, int64_t c, int64_t depth, T* to,
                  const T* plus) {
  constexpr int64_t L = kLanes<T>;
  const bool far = lie_far<T>(t);
  Vec<T> sum[V]{};
  const auto add = [&](int v, int64_t r, int64_t lanes, int64_t count) __attribute__((always_inline)) {
    const T* from = weight + t.weight_of(0, 0) + (row0 + v * L) * t.weight_row + (c + r) * t.weight_channel;
    Vec<T> square[L];
    if (t.weight_row == 1) {
      for (int64_t i = 0; i < count; ++i) square[i] = load_first(from + i * t.weight_channel, lanes);
    } else {
      turn_weights<T>(t, from, lanes, count, far, square);
    }
    for (int64_t i = 0; i < count; ++i) sum[v] = multiply_add(broadcast(a[r + i]), square[i], sum[v]);
  };
  for (int64_t line = 0; line < depth; line += kLineNumbers<T>)  // all of a line at once: rows compete for its place
    for (int v = 0; v < V; ++v) {
      const int64_t lanes = smaller(L, t.rows - row0 - v * L), end = smaller(line + kLineNumbers<T>, depth);
      for (int64_t r = line; r < end; r += L) {
        if (lanes == L && end - r >= L) {
          add(v, r, L, L);
        } else {
          add(v, r, lanes, smaller(L, end - r));
        }
      }
    }
  for (int v = 0; v < V; ++v) store(to + v * L, plus ? load(plus + v * L) + sum[v] : sum[v]);
}

/// correlate_panel() for `count` outputs that see one pixel each: seen(p) and made(p) say where these begin.
template <class T, int V, class Seen, class Made>
void correlate_single(const Windows& t, const Conv2dOperands<T>& o, int64_t row0, int64_t count, bool past, bool fetch,
                      const Seen& seen, const Made& made, bool packed, T* weights) {
  constexpr int M = kRows<V>;
  constexpr int64_t L = kLanes<T>, kDepth = kWeights<T> / (V * L);
  const int64_t channel = t.out_channel0 + row0, left = t.rows - row0;
  const int64_t piece = ceil_div(t.channels, ceil_div(t.channels, kDepth));
  alignas(64) T rest[M * V * L] = {};  // what has no place in y
  for (int64_t c = 0; c < t.channels; c += piece) {
    const int64_t depth = smaller(piece, t.channels - c);
    const bool last = c + depth == t.channels;
    const bool one = !packed && count == 1;
    if (!packed && !one) pack_weights<T, V>(t, o.b, row0, {0, 0, c, depth, c, true}, weights);
    const T* const columns = packed ? weights + c * V * L : weights;
    for_tiles<M>(0, count, [&](int64_t p, auto rows) {
      const T *a[rows], *bias[rows];
      T* to[rows];
      const int64_t inside = smaller(rows, count - p);
      int64_t ahead[rows];
      for (int64_t m = 0; m < rows; ++m) {
        a[m] = o.a + seen(p + smaller(m, inside - 1)) + c;
        to[m] = left >= V * L && m < inside ? o.out + made(p + m) + channel : rest + m * V * L;
        bias[m] = o.bias + channel;
        if (!past) fetch_to_write(to[m], V * L);
        if (fetch) ahead[m] = o.a + seen(smaller(p + rows + m, count - 1)) + c - a[m];
      }
      const auto multiply = [&](const T* const* plus, bool beyond) {
        if (one) return multiply_one<T, V>(t, a[0], o.b, row0, c, depth, to[0], plus ? plus[0] : nullptr);
        multiply_tile<T, V, rows>(1, &depth, a, 1, &columns, to, plus, V * L, beyond, fetch ? ahead : nullptr);
      };
      if (left >= V * L)
        return multiply(c > 0 ? to : o.bias ? bias : nullptr, past && depth == t.channels && inside == rows);
      multiply(nullptr, false);
      for (int64_t m = 0; m < inside; ++m)
        for (int64_t j = 0; j < left; j += L) {
          T* const out = o.out + made(p + m) + channel + j;
          const int64_t lanes = smaller(L, left - j);
          Vec<T> v = load(to[m] + j);
          if (c > 0) v = load_first(out, lanes) + v;
          if (last && o.bias) v = v + load_first(o.bias + channel + j, lanes);
          store_first(out, v, lanes);
        }
    });
  }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
