// Our own matrix multiply, C = A B, for operands that do not exist as matrices.
//
// A convolution is a matrix product whose left factor is the weight and whose right factor is the input *unfolded*: one
// column per output pixel, one row per (channel, kh, kw). Unfolding it whole would cost KH*KW times the input's memory.
// Instead the caller gives two functions that write a small block of A or B, whenever the product wants it, into
// panels:
//
//   a[panel][r][kTileRows]   b[panel][r][kTileColumns]       r runs along the common dimension, `depth`
//
// so that the innermost loop reads both strictly forwards. One block of C (kBlockRows x kBlockColumns) is one task. It
// walks the depth in steps of kBlockDepth; the packed blocks stay in the second-level cache, and a register tile of
// kTileRows x kTileColumns sums is kept for a whole step. Every element of C is summed in the same order (steps in
// order, each from a fresh zero), wherever its tile lies; tiles at the edges have fewer rows and vectors.
#pragma once

#include "simd.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kTileVectors = 3;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

constexpr int64_t kBlockRows = 128, kBlockColumns = 384, kBlockDepth = 128;
static_assert(kBlockColumns % kTileColumns<float> == 0 && kBlockColumns % kTileColumns<double> == 0);

/// Workspace of one task, in elements.
constexpr int64_t kGemmWorkspace = kBlockRows * kBlockDepth + kBlockDepth * kBlockColumns + kBlockRows * kBlockColumns;

/// c[m][j] (+)= sum over r of a[r][m] * b[r][j], for M rows and V vectors of a register tile.
template <class T, int M, int V>
void multiply_tile(int64_t depth, const T* a, const T* b, T* c, bool add) {
  Vec<T> sum[M][V]{};
  for (int64_t r = 0; r < depth; ++r, a += kTileRows, b += kTileColumns<T>) {
    Vec<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(b + v * kLanes<T>);
    for (int m = 0; m < M; ++m) {
      const Vec<T> row = broadcast(a[m]);
      for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(row, column[v], sum[m][v]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      T* to = c + m * kBlockColumns + v * kLanes<T>;
      store(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
}

template <class T, int M>
auto multiply_tile_of(int64_t vectors) {
  return vectors == 1 ? multiply_tile<T, M, 1> : vectors == 2 ? multiply_tile<T, M, 2> : multiply_tile<T, M, 3>;
}

/// Some columns of a block: tiles of fewer rows where fewer are left.
template <class T>
void multiply_panel(int64_t rows, int64_t columns, int64_t depth, const T* a, const T* b, T* c, bool add) {
  const int64_t vectors = smaller(kTileVectors, ceil_div(columns, kLanes<T>));
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m, size = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto tile = size == kTileRows ? multiply_tile_of<T, kTileRows>(vectors)
                      : size == 4       ? multiply_tile_of<T, 4>(vectors)
                      : size == 2       ? multiply_tile_of<T, 2>(vectors)
                                        : multiply_tile_of<T, 1>(vectors);
    tile(depth, a + m / kTileRows * kTileRows * depth + m % kTileRows, b, c + m * kBlockColumns, add);
    m += size;
  }
}

/// A panel's numbers of one depth: to[m] = from[m] for m < rows. What a vector holds too many of falls beyond, to be
/// overwritten by what is packed next.
template <class S>
void pack_column(const S* from, int64_t rows, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t m = 0; m < rows; m += L) store(to + m, load_first(from + m, smaller(L, rows - m)));
}

/// A panel of A from rows that lie apart, each a run of numbers: to[r][m] = from[m*row_stride + r].
template <class S>
void pack_rows(const S* from, int64_t row_stride, int64_t rows, int64_t depth, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < depth; r += L) {
    const int64_t count = smaller(L, depth - r);
    for (int64_t m0 = 0; m0 < rows; m0 += L) {
      Vec<T> square[L];
      for (int64_t m = 0; m < L; ++m)
        square[m] = m0 + m < rows ? load_first(from + (m0 + m) * row_stride + r, count) : Vec<T>{};
      transpose<T>(square);
      for (int64_t i = 0; i < count; ++i) store(to + (r + i) * kTileRows + m0, square[i]);
    }
  }
}

/// One block of C: `rows` x `columns`, at most kBlockRows x kBlockColumns, left in the returned array of row stride
/// kBlockColumns. pack_a(r0, depth, to) and pack_b(r0, depth, to) write the panels for the depths [r0, r0 + depth).
template <class T, class PackA, class PackB>
const T* multiply_block(int64_t rows, int64_t columns, int64_t depth, const PackA& pack_a, const PackB& pack_b,
                        T* workspace) {
  T* a = workspace;
  T* b = a + kBlockRows * kBlockDepth;
  T* c = b + kBlockDepth * kBlockColumns;
  if (depth == 0) {
    for (int64_t i = 0; i < rows * kBlockColumns; ++i) c[i] = 0;
  }
  for (int64_t r0 = 0; r0 < depth; r0 += kBlockDepth) {
    const int64_t step = smaller(kBlockDepth, depth - r0);
    pack_a(r0, step, a);
    pack_b(r0, step, b);
    for (int64_t j = 0; j < columns; j += kTileColumns<T>)
      multiply_panel(rows, columns - j, step, a, b + j * step, c + j, r0 > 0);
  }
  return c;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
