// How the outputs of a bfloat16 convolution are cut into strips, and how a strip's sums become numbers of a tensor.
#pragma once

#include "bfloat16.h"

namespace cnnops::cpu::CNNOPS_ISA {

#if defined(__AVX512F__)

/// How far the taps of an axis reach from the window's first place, and how many places `count` outputs see.
inline int64_t reach(const Axis& a) { return a.taps == 0 ? 0 : (a.taps - 1) * a.offset_step; }
inline int64_t seen_places(const Axis& a, int64_t count) { return (count - 1) * a.in_step + reach(a) + 1; }

/// How the outputs of a class are cut into strips: several images, or rows and columns of one.
struct ClassStrips {
  int64_t images, rows, columns;  // outputs of a strip
  int64_t batches, down, across;  // strips
  int64_t in_rows, in_columns;    // what a strip sees
  bool fits = true;
  int64_t count() const { return batches * down * across; }
  int64_t pixels() const { return images * rows * columns; }

  /// `most` pixels; at most `numbers` of what they see, so many for each place.
  ClassStrips(const Axis& h, const Axis& w, int64_t n, int64_t most, int64_t numbers_of_place, int64_t numbers) {
    const auto cut = [&](int64_t most_images, int64_t most_rows, int64_t most_columns) {
      images = larger(most_images, 1);
      down = ceil_div(h.count, larger(most_rows, 1));
      rows = ceil_div(h.count, larger(down, 1));
      across = ceil_div(w.count, larger(most_columns, 1));
      columns = ceil_div(w.count, larger(across, 1));
      batches = ceil_div(n, images);
      in_rows = seen_places(h, rows);
      in_columns = seen_places(w, columns);
      return images * in_rows * in_columns * numbers_of_place <= numbers;
    };
    cut(most / larger(h.count * w.count, 1), most / larger(smaller(w.count, most), 1), most);
    while (!cut(images, rows, columns)) {
      if (images > 1) {
        images /= 2;
      } else if (rows > 1) {
        rows /= 2;
      } else if (columns > 1) {
        columns /= 2;
      } else {
        fits = false;
        break;
      }
    }
  }
};

/// A strip's place in the tensors.
struct ClassStrip {
  int64_t n, i, j;  // its first image and output
  int64_t images, rows, columns;
  ClassStrip(const ClassStrips& s, int64_t number, const Axis& h, const Axis& w, int64_t n_all) {
    j = number % s.across * s.columns;
    i = number / s.across % s.down * s.rows;
    n = number / s.across / s.down * s.images;
    images = smaller(s.images, n_all - n);
    rows = smaller(s.rows, h.count - i);
    columns = smaller(s.columns, w.count - j);
  }
};

/// Blocks of about the same size, at most `most`.
struct Cut {
  int64_t size, count;
  Cut(int64_t all, int64_t most) {
    count = ceil_div(all, larger(most, 1));
    size = ceil_div(all, larger(count, 1));
    count = size == 0 ? 0 : ceil_div(all, size);
  }
};

/// Calls f(std::integral_constant V) for a panel of so many channels.
template <class F>
void with_panel(int64_t channels, const F& f) {
  if (channels > kDotLanes) {
    f(std::integral_constant<int, 2>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

/// out[k*line + p*step] = sums[p][V vectors], rounded, plus what the channel's bias adds.
template <int V>
void store_transposed(const float* sums, int64_t count, int64_t lanes, const BFloat16* bias, int64_t step, int64_t line,
                      BFloat16* out) {
  for (int64_t k = 0; k < lanes; k += kDotLanes)
    for (int64_t p = 0; p < count; p += kDotLanes) {
      const int64_t pixels = smaller(kDotLanes, count - p);
      Vec<float> square[kDotLanes];
      for (int64_t i = 0; i < kDotLanes; ++i)
        square[i] = i < pixels ? load(sums + (p + i) * V * kDotLanes + k) : Vec<float>{};
      transpose<float>(square);
      for (int64_t i = 0; i < smaller(kDotLanes, lanes - k); ++i) {
        const Vec<float> y = square[i] + broadcast(bias ? value(bias[k + i]) : 0.0f);
        BFloat16* to = out + (k + i) * line + p * step;
        if (step == 1) {
          store_rounded(to, y, pixels);
        } else {
          BFloat16 together[kDotLanes];
          store_rounded(together, y, kDotLanes);
          for (int64_t j = 0; j < pixels; ++j) to[j * step] = together[j];
        }
      }
    }
}

#endif

}  // namespace cnnops::cpu::CNNOPS_ISA
