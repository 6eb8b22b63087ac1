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
// order, each from a fresh zero), wherever its tile lies: zeros pad the panels, so edges take the same path.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kTileVectors = 3;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

constexpr int64_t kBlockRows = 128, kBlockColumns = 384, kBlockDepth = 256;
static_assert(kBlockColumns % kTileColumns<float> == 0 && kBlockColumns % kTileColumns<double> == 0);

/// Workspace of one task, in elements.
constexpr int64_t kGemmWorkspace = kBlockRows * kBlockDepth + kBlockDepth * kBlockColumns + kBlockRows * kBlockColumns;

/// c[m][j] (+)= sum over r of a[r][m] * b[r][j], for one register tile.
template <class T>
static inline void multiply_tile(int64_t depth, const T* a, const T* b, T* c, bool add) {
  Vec<T> sum[kTileRows][kTileVectors]{};
  for (int64_t r = 0; r < depth; ++r, a += kTileRows, b += kTileColumns<T>) {
    Vec<T> column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) column[v] = load(b + v * kLanes<T>);
    for (int m = 0; m < kTileRows; ++m) {
      const Vec<T> row = broadcast(a[m]);
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = multiply_add(row, column[v], sum[m][v]);
    }
  }
  for (int m = 0; m < kTileRows; ++m)
    for (int v = 0; v < kTileVectors; ++v) {
      T* to = c + m * kBlockColumns + v * kLanes<T>;
      store(to, add ? load(to) + sum[m][v] : sum[m][v]);
    }
}

/// One block of C: `rows` x `columns`, at most kBlockRows x kBlockColumns, left in the returned array of row stride
/// kBlockColumns. pack_a(r0, depth, to) and pack_b(r0, depth, to) write the panels for the depths [r0, r0 + depth).
template <class T, class PackA, class PackB>
static inline const T* multiply_block(int64_t rows, int64_t columns, int64_t depth, const PackA& pack_a,
                                      const PackB& pack_b, T* workspace) {
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
      for (int64_t m = 0; m < rows; m += kTileRows)
        multiply_tile(step, a + m * step, b + j * step, c + m * kBlockColumns + j, r0 > 0);
  }
  return c;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
