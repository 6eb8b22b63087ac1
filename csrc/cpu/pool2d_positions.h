// Max pooling's winners: how they are found, and how their positions in the window are kept.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// Positions while computing: words as wide as T, so that they fit the masks that comparisons of T give.
template <class T>
using Word = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
template <class T, class Position>
using PackedWords __attribute__((vector_size(kLanes<T> * sizeof(Position)))) = Position;

template <class T, class Position>
static void store_positions(Position* to, Vec<Word<T>> words, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    count == kLanes<T> ? store(to, words) : store_first(to, words, count);
  } else {
    const PackedWords<T, Position> packed = __builtin_convertvector(words, PackedWords<T, Position>);
    __builtin_memcpy(to, &packed, count * sizeof(Position));
  }
}

/// The positions of lanes [begin, end) of the vector at p, zeros elsewhere; nothing outside them is read.
template <class T, class Position>
static Vec<Word<T>> load_positions(const Position* p, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 4) {
    return end - begin == kLanes<T> ? load(p) : load_between(p, begin, end, Word<T>(0));
  } else {
    PackedWords<T, Position> packed{};
    if (end - begin == kLanes<T>) {
      __builtin_memcpy(&packed, p, sizeof packed);
    } else {
      for (int64_t j = begin; j < end; ++j) packed[j] = p[j];
    }
    return __builtin_convertvector(packed, Vec<Word<T>>);
  }
}

/// A position in all lanes, to compare with: words, or bytes where their comparison gives a mask at once.
#if defined(__AVX512F__)
template <class T, class Position>
constexpr bool kComparesBytes = sizeof(T) == 4 && sizeof(Position) == 1;
#else
template <class T, class Position>
constexpr bool kComparesBytes = false;
#endif
template <class T, class Position>
using Place = std::conditional_t<kComparesBytes<T, Position>, PackedWords<T, Position>, Vec<Word<T>>>;

/// The positions of lanes [begin, end) of the vector at p, to be compared, zeros elsewhere; nothing outside them is
/// read.
template <class T, class Position>
static inline Place<T, Position> load_places(const Position* p, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if constexpr (kComparesBytes<T, Position>) {
    const __mmask16 lanes((1u << end) - (1u << begin));
    return (Place<T, Position>)(end - begin == kLanes<T> ? _mm_loadu_si128((const __m128i*)p)
                                                         : _mm_maskz_loadu_epi8(lanes, p));
  } else
#endif
  {
    return load_positions<T>(p, begin, end);
  }
}

/// v in the lanes where `won` is `place`, zero elsewhere.
template <class T, class Words>
static inline Vec<T> where_won(Words won, Words place, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof won == 16) {
    return (Vec<T>)_mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask((__m128i)won, (__m128i)place), (__m512)whole_load<T>(v));
  } else
#endif
  {
    return won == place ? whole_load<T>(v) : Vec<T>{};
  }
}

/// Whether a number seen later wins.
template <class V>
static auto wins(V seen, V best) {
  return (seen > best) | (seen != seen);
}

/// Where `seen` wins, best becomes seen, and won becomes place.
template <class T, class Words>
static void take_larger(Vec<T> seen, Words place, Vec<T>& best, Words& won) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {  // as comparisons of comparisons, which GCC does not find
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)seen, (__m512)seen, _CMP_ORD_Q);
    const __mmask16 stays = _mm512_mask_cmp_ps_mask(number, (__m512)seen, (__m512)best, _CMP_NGT_UQ);
    best = (Vec<T>)_mm512_mask_mov_ps((__m512)seen, stays, (__m512)best);
    won = (Words)_mm512_mask_mov_epi32((__m512i)place, stays, (__m512i)won);
    return;
  }
#endif
  const auto better = wins(seen, best);
  best = better ? seen : best;
  won = better ? place : won;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
