// How the matrix products of several kernels are cut into register tiles: of M rows x V vectors of sums, in panels of V
// vectors of columns.
#pragma once

#include <type_traits>

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kSums = 3 * kTileRows;                  // vectors of sums in a tile
constexpr int kMostVectors = kTileRows == 8 ? 4 : 3;  // in a row of it

/// Columns in panels of at most `most` vectors, all about as wide: narrower ones where fewer columns of the last panel
/// stay unused then.
template <class T>
struct Panels {
  int64_t vectors, width, count;

  explicit Panels(int64_t columns, int64_t most = kMostVectors) {
    const int64_t all = ceil_div(columns, kLanes<T>);
    vectors = ceil_div(all, ceil_div(all, most));
    if (vectors > 2 && round_up(all, vectors - 1) < round_up(all, vectors)) --vectors;
    width = vectors * kLanes<T>;
    count = ceil_div(columns, width);
  }
};

/// Calls f(std::integral_constant V) for a panel of so many columns.
template <class T, class F>
void with_vectors(int64_t columns, const F& f) {
  const int64_t vectors = ceil_div(columns, kLanes<T>);
  if (vectors == 1) f(std::integral_constant<int, 1>());
  if (vectors == 2) f(std::integral_constant<int, 2>());
  if (vectors == 3) f(std::integral_constant<int, 3>());
  if constexpr (kMostVectors == 4) {
    if (vectors == 4) f(std::integral_constant<int, 4>());
  }
}

/// Calls tile(first row, std::integral_constant of its height) for rows [begin, end): tiles of M rows, and one of half
/// as many where no more are left.
template <int M, class Tile>
[[gnu::always_inline]] static inline void for_tiles(int64_t begin, int64_t end, const Tile& tile) {
  for (int64_t row = begin; row < end;) {
    if (end - row > M / 2) {
      tile(row, std::integral_constant<int, M>());
      row += M;
    } else {
      tile(row, std::integral_constant<int, M / 2>());
      row += M / 2;
    }
  }
}

/// Calls tile(std::integral_constant M) with the height of the first of the tiles of at most `most` rows, all about as
/// high, that so many rows make.
template <int most, int M = most, class Tile>
[[gnu::always_inline]] static inline void with_rows(int64_t rows, const Tile& tile) {
  if constexpr (M > 1) {
    if ((M - 1) * ceil_div(rows, most) >= rows) return with_rows<most, M - 1>(rows, tile);
  }
  tile(std::integral_constant<int, M>());
}

}  // namespace cnnops::cpu::CNNOPS_ISA
