// From contiguous planes to pixels with their channels side by side, and back: by transposing squares of a vector of
// channels x a vector of pixels. Numbers may be widened or rounded on the way.
#pragma once

#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// The first `length` numbers of planes that lie `plane` apart become columns of `to`, which are `rows` apart; what is
/// beyond the first `some` planes is zeros.
template <class S, class To>
void turn(const S* from, int64_t plane, int64_t length, int64_t some, int64_t rows, To* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t r = 0; r < rows; r += L) {
    const int64_t lanes = smaller(L, rows - r);
    for (int64_t p = 0; p < length; p += L) {
      const int64_t first = length >= L ? smaller(p, length - L) : p, count = smaller(L, length - first);
      Vec<Sum<S>> square[L];
      for (int64_t i = 0; i < L; ++i) {
        const S* row = from + (r + i) * plane + first;
        square[i] = r + i >= some ? Vec<Sum<S>>{} : count == L ? load(row) : load_first(row, count);
      }
      transpose<Sum<S>>(square);
      for (int64_t j = 0; j < count; ++j) {
        To* column = to + (first + j) * rows + r;
        lanes == L ? store(column, square[j]) : store_first(column, square[j], lanes);
      }
    }
  }
}

/// The way back: columns of `from` become the first `length` numbers of `some` planes. Of each column whole vectors are
/// read.
template <class S, class To>
void turn_back(const S* from, int64_t rows, int64_t length, int64_t some, To* to, int64_t plane) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t r = 0; r < some; r += L)
    for (int64_t p = 0; p < length; p += L) {
      const int64_t first = length >= L ? smaller(p, length - L) : p, count = smaller(L, length - first);
      Vec<Sum<S>> square[L];
      for (int64_t j = 0; j < L; ++j) square[j] = j < count ? load(from + (first + j) * rows + r) : Vec<Sum<S>>{};
      transpose<Sum<S>>(square);
      for (int64_t i = 0; i < smaller(L, some - r); ++i) {
        To* row = to + (r + i) * plane + first;
        count == L ? store(row, square[i]) : store_first(row, square[i], count);
      }
    }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
