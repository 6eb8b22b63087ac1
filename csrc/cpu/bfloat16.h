// Products of bfloat16 numbers, two at a time: the register tile and what packs its operands.
//
// AVX512_BF16 has one instruction that multiplies 32 pairs of bfloat16 numbers and adds each two products that lie side
// by side to a lane of 16 floats: twice the arithmetic of a float multiply-add. It treats subnormal numbers as zeros
// and rounds each addition to the nearest float.
//
// A tile holds kDotRows x V vectors of sums. A step reads for each of its rows the two numbers at one address,
// broadcasts them, and multiplies them with V vectors of pairs, packed in the order of the steps. The rows read numbers
// where they lie, in runs; if a run's length is odd, its last number makes a pair with zero.
#pragma once

#include "channels_last.h"
#include "panels.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kDotRows = 14;       // of a tile
constexpr int kDotVectors = 2;     // in a row of it, at most
constexpr int64_t kDotLanes = 16;  // of a vector of sums
constexpr int64_t kPanel = kDotVectors * kDotLanes;

/// Where the runs of a row begin, as distances from its address: i*outer_step + j*inner_step.
struct Steps {
  int64_t outer, outer_step, inner, inner_step;
  int64_t length;  // numbers of a run
  int64_t run_pairs() const { return ceil_div(length, 2); }
  int64_t pairs() const { return outer * inner * run_pairs(); }
};

#if defined(__AVX512F__)

typedef Vec<uint16_t> Words;

/// One step of a tile: a pair for each row, or one number and a zero.
template <int M, int V, class Read>
[[gnu::target("avx512bf16")]] static inline __attribute__((always_inline)) void dot_step(
    const BFloat16* const (&row)[M], int64_t r, const BFloat16* b, __m512 (&sum)[M][V]) {
  __m512bh column[V];
  for (int v = 0; v < V; ++v) column[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * kDotLanes);
  for (int m = 0; m < M; ++m) {
    Read numbers;
    __builtin_memcpy(&numbers, row[m] + r, sizeof numbers);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(int(numbers));
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], x, column[v]);
  }
}

/// sums[m][V vectors] (+)= sum over the steps of the pair that row m reads * b[V vectors], b going on forwards.
template <int M, int V>
[[gnu::target("avx512bf16")]] static void dot_tile(const Steps& steps, const BFloat16* const* rows, const BFloat16* b,
                                                   float* sums, bool add) {
  __m512 sum[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) sum[m][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < steps.outer; ++i)
    for (int64_t j = 0; j < steps.inner; ++j) {
      const BFloat16* row[M];
      for (int m = 0; m < M; ++m) row[m] = rows[m] + i * steps.outer_step + j * steps.inner_step;
      int64_t r = 0;
      for (; r + 2 <= steps.length; r += 2, b += V * 2 * kDotLanes) dot_step<M, V, uint32_t>(row, r, b, sum);
      if (r == steps.length) continue;
      dot_step<M, V, uint16_t>(row, r, b, sum);
      b += V * 2 * kDotLanes;
    }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      float* to = sums + (m * V + v) * kDotLanes;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[m][v]) : sum[m][v]);
    }
}

/// A vector of sums, rounded.
[[gnu::target("avx512bf16")]] static inline void store_rounded(BFloat16* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

/// Numbers [begin, end) of the 16 at p, widened; zeros elsewhere.
static inline Vec<uint32_t> load_words(const BFloat16* p, int64_t begin, int64_t end) {
  const uint32_t lanes = (1u << end) - (1u << begin);
  return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_maskz_loadu_epi16(__mmask16(lanes), p));
}

static inline __mmask32 first_words(int64_t count) { return __mmask32((uint64_t(1) << count) - 1); }

static inline Words load_first_words(const BFloat16* p, int64_t count) {
  return (Words)_mm512_maskz_loadu_epi16(first_words(count), p);
}
static inline void store_words(BFloat16* p, Vec<uint32_t> words, int64_t count) {
  _mm512_mask_storeu_epi16(p, first_words(count), (__m512i)words);
}

/// A block of `rows` x `columns` numbers, at most 32 x 16, with rows and columns exchanged: row(i) is a vector of row
/// i, and put(j, words) takes column j.
template <class Row, class Put>
static inline void transpose_words(int64_t rows, int64_t columns, const Row& row, const Put& put) {
  Vec<uint32_t> square[kDotLanes];
  for (int64_t i = 0; i < kDotLanes; ++i) {
    square[i] = Vec<uint32_t>{};
    if (2 * i < rows) square[i] = row(2 * i);
    if (2 * i + 1 < rows) square[i] |= row(2 * i + 1) << 16;
  }
  transpose<uint32_t>(square);
  for (int64_t j = 0; j < columns; ++j) put(j, square[j]);
}

/// 32 pairs of numbers from two vectors of them, as V vectors.
template <int V>
static inline void store_pairs(Words first, Words second, BFloat16* to) {
  zip<uint16_t>(first, second, std::make_integer_sequence<int, kLanes<uint16_t>>());
  _mm512_storeu_si512(to, (__m512i)first);
  if (V == 2) _mm512_storeu_si512(to + 2 * kDotLanes, (__m512i)second);
}

// ---- conv2d_bfloat16_grad_weight.cpp ----

const char* refuses_dot_products_grad_weight(const Conv2dGeometry&);
Conv2dRun<BFloat16> dot_products_grad_weight();

#endif

}  // namespace cnnops::cpu::CNNOPS_ISA
