// Squares of numbers, a vector per row, transposed in registers.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// a[0], b[0], a[1], b[1], ... in each run of lanes: with AVX2 two instructions, but one for runs of 16 bytes.
template <class T, int run = kLanes<T>, int... lane>
static inline void zip(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int L = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, (lane % 2 * L + lane / run * run + lane % run / 2)...);
  b = __builtin_shufflevector(a, b, (lane % 2 * L + lane / run * run + (run + lane % run) / 2)...);
  a = low;
}

/// Runs of `step` lanes change places, the odd ones of a row with the even ones of that `step` below; then twice as
/// long ones.
template <int step, class T, int... lane>
static inline void swap_runs(Vec<T> (&rows)[kLanes<T>], std::integer_sequence<int, lane...> lanes) {
  constexpr int L = kLanes<T>;
  if constexpr (step < L) {
    for (int i = 0; i < L; i += (i + 1) & step ? 1 + step : 1) {
      const Vec<T> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shufflevector(a, b, (lane & step ? L + lane - step : lane)...);
      rows[i + step] = __builtin_shufflevector(a, b, (lane & step ? L + lane : lane + step)...);
    }
    swap_runs<2 * step, T>(rows, lanes);
  }
}

/// Rows become columns: of as many rows as 16 bytes have numbers by zipping, in log2(rows) rounds; then runs change
/// places.
template <class T>
static inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>, Q = 16 / int(sizeof(T));
  for (int first = 0; first < L; first += Q)
    for (int round = 1; round < Q; round *= 2) {
      Vec<T> zipped[Q];
      for (int i = 0; i < Q / 2; ++i) {
        zipped[2 * i] = rows[first + i];
        zipped[2 * i + 1] = rows[first + i + Q / 2];
        zip<T, Q>(zipped[2 * i], zipped[2 * i + 1], std::make_integer_sequence<int, L>());
      }
      for (int i = 0; i < Q; ++i) rows[first + i] = zipped[i];
    }
  swap_runs<Q, T>(rows, std::make_integer_sequence<int, L>());
}

}  // namespace cnnops::cpu::CNNOPS_ISA
