// Planes turned round, so that their channels stand side by side as in channels_last, and back: by transposing squares of
// a vector of channels x a vector of pixels.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// to[p*pitch + c] = from[c*plane + p] for p < length and c < channels, and zeros on to c < pitch.
template <class S>
void turn(const S* from, int64_t plane, int64_t length, int64_t channels, S* to, int64_t pitch) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t c = 0; c < pitch; c += L) {
    const int64_t lanes = smaller(L, pitch - c);
    for (int64_t p = 0; p < length; p += L) {
      const int64_t first = length >= L ? smaller(p, length - L) : p, count = smaller(L, length - first);
      Vec<Sum<S>> square[L];
      for (int64_t i = 0; i < L; ++i) {
        const S* row = from + (c + i) * plane + first;
        square[i] = c + i >= channels ? Vec<Sum<S>>{} : count == L ? load(row) : load_first(row, count);
      }
      transpose<Sum<S>>(square);
      for (int64_t j = 0; j < count; ++j) store_first(to + (first + j) * pitch + c, square[j], lanes);
    }
  }
}

/// The way back: to[c*plane + p] = from[p*pitch + c] for c < channels; the numbers up to the next vector of channels are
/// read too.
template <class S>
void turn_back(const S* from, int64_t pitch, int64_t length, int64_t channels, S* to, int64_t plane) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t c = 0; c < channels; c += L)
    for (int64_t p = 0; p < length; p += L) {
      const int64_t first = length >= L ? smaller(p, length - L) : p, count = smaller(L, length - first);
      Vec<Sum<S>> square[L];
      for (int64_t j = 0; j < L; ++j) square[j] = j < count ? load(from + (first + j) * pitch + c) : Vec<Sum<S>>{};
      transpose<Sum<S>>(square);
      for (int64_t i = 0; i < smaller(L, channels - c); ++i) {
        S* row = to + (c + i) * plane + first;
        count == L ? store(row, square[i]) : store_first(row, square[i], count);
      }
    }
}

}  // namespace cnnops::cpu::CNNOPS_ISA
