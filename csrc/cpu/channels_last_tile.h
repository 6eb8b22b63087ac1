// What the two files of `direct` in channels_last share, in part with other files: the register tile, how a window or a
// line of pixels is copied, and how gradients of the weight are put together.
#pragma once

#include "cache.h"
#include "channels_last.h"
#include "panels.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kMostRows = 12;  // of a tile
template <int V>
constexpr int kRows = kSums / V < kMostRows ? kSums / V : kMostRows;

/// to[m][V vectors] = sum over runs and their lengths of a[run][m][r*step] * b[run][r*b_step][V vectors], plus what
/// `plus` has; written past the cache if that is wanted. What lies ahead of a's rows, ahead[m] numbers of row m's, is
/// fetched into the cache meanwhile.
template <class T, int V, int M>
void multiply_tile(int64_t runs, const int64_t* lengths, const T* const* a, int64_t step, const T* const* b,
                   T* const* to, const T* const* plus, int64_t b_step = V * kLanes<T>, bool past = false,
                   const int64_t* ahead = nullptr) {
  constexpr int L = kLanes<T>;
  Vec<T> sum[M][V]{};
  for (int64_t i = 0; i < runs; ++i, a += M) {
    const T* row[M];
    for (int m = 0; m < M; ++m) row[m] = a[m];
    const T* columns = b[i];
    for (int64_t r = 0; r < lengths[i] * step; r += step, columns += b_step) {
      if (ahead && r % L == 0) {
        for (int m = 0; m < M; ++m) __builtin_prefetch(row[m] + r + ahead[m]);
      }
      Vec<T> column[V];
      for (int v = 0; v < V; ++v) column[v] = load(columns + v * L);
      for (int m = 0; m < M; ++m) {
        const Vec<T> x = broadcast(row[m][r]);
        for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(x, column[v], sum[m][v]);
      }
    }
  }
#pragma GCC unroll 16  // early, or GCC keeps the sums in memory
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      const Vec<T> result = plus ? load(plus[m] + v * L) + sum[m][v] : sum[m][v];
      if (past) {
        store_past_cache(to[m] + v * L, result);
      } else {
        store(to[m] + v * L, result);
      }
    }
}

/// `length` numbers of a window, all in one row of taps: from channel c of tap (th, tw) on. They are `straight` if they
/// are consecutive numbers of the input, too: then `offset` is how far they lie from the window's first.
struct Run {
  int64_t th, tw, c, length, offset;
  bool straight;
};

static inline Run make_run(const Windows& t, int64_t th, int64_t begin, int64_t end) {
  const int64_t tw = begin / t.channels, c = begin % t.channels;
  return {th, tw, c, end - begin, tap_offset(t, th, tw) + c, t.adjacent() || c + end - begin <= t.channels};
}

template <class S>
void copy_run(const Windows& t, const Pixel<S>& p, const Run& run, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  if (p.inside && run.straight) return copy_numbers(p.image + p.at + run.offset, run.length, to);
  if (t.adjacent() && t.border == Border::zeros) {
    const int64_t h = p.h + run.th * t.h.offset_step, row = t.w.in_size * t.channels;
    const bool inside = h >= 0 && h < t.h.in_size;
    const int64_t start = (p.w + run.tw) * t.channels + run.c;
    for (int64_t i = 0; i < run.length; i += L) {
      const int64_t lanes = smaller(run.length - i, L);
      store_first(to + i, load_inside(p.image + (inside ? h : 0) * row, inside ? row : 0, start + i, lanes), lanes);
    }
    return;
  }
  int64_t left = run.length;
  for (int64_t tw = run.tw, c = run.c; left > 0; ++tw, c = 0) {
    const int64_t count = smaller(t.channels - c, left);
    if (const S* from = seen(t, p, run.th, tw)) {
      copy_numbers(from + c, count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = 0;
    }
    to += count;
    left -= count;
  }
}

// ---- gradients of the weight ----

/// `pixels` pixels of row h of an image from column w on, border included.
template <class S>
void copy_line(const Conv2dGeometry& g, const S* image, int64_t h, int64_t w, int64_t pixels, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t row = pixel_at(h, g.in[0], g.border), width = row < 0 ? 0 : g.in[1] * g.c;
  const S* from = image + (row < 0 ? 0 : row) * g.in[1] * g.c;
  if (g.border == Border::zeros) {
    for (int64_t i = 0; i < pixels * g.c; i += L) {
      const int64_t lanes = smaller(L, pixels * g.c - i);
      store_first(to + i, load_inside(from, width, w * g.c + i, lanes), lanes);
    }
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      copy_numbers(from + pixel_at(w + p, g.in[1], g.border) * g.c, g.c, to + p * g.c);
  }
}

/// to[row*step + column] = from[row*pitch + column]; turned, to[column*step + row].
template <class T, class R>
void put_block(const T* from, int64_t pitch, int64_t rows, int64_t columns, bool turned, int64_t step, R* to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += turned ? L : 1)
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t lanes = smaller(L, columns - j), down = smaller(L, rows - r);
      if (!turned) {
        store_first(to + r * step + j, load(from + r * pitch + j), lanes);
        continue;
      }
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = i < down ? load(from + (r + i) * pitch + j) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < lanes; ++i) store_first(to + (j + i) * step + r, square[i], down);
    }
}

/// out[i] = the sum of all parts' number i, for i in [begin, end).
template <class S>
void add_parts(const Sum<S>* parts, int64_t count, int64_t numbers, S* out, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t i = begin; i < end; i += L) {
    const int64_t lanes = smaller(L, end - i);
    Vec<Sum<S>> sum = load_first(parts + i, lanes);
    for (int64_t part = 1; part < count; ++part) sum += load_first(parts + part * numbers + i, lanes);
    store_first(out + i, sum, lanes);
  }
}

/// conv2d_channels_last_weight.cpp
template <class S>
Conv2dRun<S> channels_last_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
