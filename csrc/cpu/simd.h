// One small vector type, so that a kernel body is written once and compiled for every instruction set.
//
// Vec<T> is the compiler's own vector of as many T as the widest register holds: 64 bytes with AVX-512, 32 with AVX2,
// 16 otherwise (SSE2, NEON). Arithmetic operators work lane by lane. Functions that load and store take pointers to any
// type S of stored numbers (../numbers.h) and widen to Sum<S> or round on the way. The build turns floating-point
// contraction off, so a multiply-add is fused where this file says so and nowhere else: that keeps the bits of main
// loops and remainders alike.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "../numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace cnnops::cpu::CNNOPS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 8;  // with three vectors a row, 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 4;  // 12 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;
#endif

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

/// As many stored numbers S as a vector of Sum<S> has lanes.
template <class S>
struct PackedOf {
  static constexpr int lanes = kLanes<Sum<S>>;
  using bits = std::conditional_t<sizeof(S) == 2 && kReal<S>, uint16_t, S>;
  typedef bits type __attribute__((vector_size(lanes * sizeof(S))));
};
template <class S>
using Packed = typename PackedOf<S>::type;

typedef uint32_t WordLanes __attribute__((vector_size(kVectorBytes)));

/// Converts integers lane by lane. Where their size changes more than twofold, GCC 12 would take the lanes one at a
/// time: so it goes by steps of two.
template <class To, class From>
static inline To convert_lanes(From v) {
  constexpr int lanes = sizeof(From) / sizeof(v[0]), from = sizeof(v[0]), to = sizeof(To) / lanes;
  if constexpr (to > 2 * from || from > 2 * to) {
    constexpr bool is_signed = std::is_signed_v<std::remove_cvref_t<decltype(v[0])>>;
    using Signed = std::conditional_t<(to > from ? 2 * from : from / 2) == 2, int16_t, int32_t>;
    typedef std::conditional_t<is_signed, Signed, std::make_unsigned_t<Signed>> Step
        __attribute__((vector_size(lanes * sizeof(Signed))));
    return convert_lanes<To>(__builtin_convertvector(v, Step));
  } else {
    return __builtin_convertvector(v, To);
  }
}

/// Vectors of stored numbers to vectors that are computed with, and back: numbers.h's value() and rounded(), by lanes.
template <class S>
static inline Vec<Sum<S>> widen(Packed<S> packed) {
  if constexpr (std::is_same_v<S, Sum<S>>) {
    return packed;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
#if defined(__AVX512F__)  // GCC 12 would convert by halves
    const auto words = _mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)packed);
#elif defined(__AVX2__)
    const auto words = _mm256_cvtepu16_epi32((__m128i)packed);
#else
    const auto words = __builtin_convertvector(packed, WordLanes);
#endif
    return (Vec<float>)((WordLanes)words << 16);
  } else if constexpr (std::is_same_v<S, Float16>) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)packed);  // unmasked, GCC 12 warns
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)packed);
#else
    Vec<float> v{};
    for (int i = 0; i < kLanes<float>; ++i) v[i] = value(Float16{packed[i]});
    return v;
#endif
  } else {
    return convert_lanes<Vec<Sum<S>>>(packed);
  }
}

template <class S>
static inline Packed<S> narrow(Vec<Sum<S>> v) {
  if constexpr (std::is_same_v<S, Sum<S>>) {
    return v;
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    const WordLanes bits = (WordLanes)v, even = bits + 0x7fff + (bits >> 16 & 1);
    const WordLanes nan = WordLanes{} + 0x7fc00000;
    return __builtin_convertvector(((v == v) ? even : nan) >> 16, Packed<S>);
  } else if constexpr (std::is_same_v<S, Float16>) {
#if defined(__AVX512F__)
    return (Packed<S>)_mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Packed<S>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Packed<S> packed;
    for (int i = 0; i < kLanes<float>; ++i) packed[i] = rounded<Float16>(v[i]).bits;
    return packed;
#endif
  } else {
    return convert_lanes<Packed<S>>(v);
  }
}

template <class S>
static inline Vec<Sum<S>> load(const S* p) {
  if constexpr (std::is_same_v<S, Sum<S>>) {
    return *reinterpret_cast<const typename VectorOf<S>::unaligned*>(p);
  } else {
    Packed<S> packed;
    __builtin_memcpy(&packed, p, sizeof packed);
    return widen<S>(packed);
  }
}

template <class S>
static inline void store(S* p, Vec<Sum<S>> v) {
  if constexpr (std::is_same_v<S, Sum<S>>) {
    *reinterpret_cast<typename VectorOf<S>::unaligned*>(p) = v;
  } else {
    const Packed<S> packed = narrow<S>(v);
    __builtin_memcpy(p, &packed, sizeof packed);
  }
}

template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

#if !defined(__AVX512F__)
/// True in lanes [begin, end) of a vector of words as wide as T.
template <class T>
static inline auto lanes_between(int64_t begin, int64_t end) {
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<Integer> lane;
  for (int i = 0; i < kLanes<Integer>; ++i) lane[i] = i;
  return (lane >= Integer(begin)) & (lane < Integer(end));
}

typedef unsigned __int128 Bytes;

/// The first `count` of at most 16 bytes, zeros after them: two words that overlap instead of a loop.
static inline Bytes load_bytes(const void* p, int64_t count) {
  const auto words = [=](auto word) {
    constexpr int64_t size = sizeof word;
    auto first = word, last = word;
    __builtin_memcpy(&first, p, size);
    __builtin_memcpy(&last, (const char*)p + count - size, size);
    return Bytes(first) | Bytes(last) << 8 * (count - size);
  };
  if (count >= 8) return words(uint64_t());
  if (count >= 4) return words(uint32_t());
  if (count >= 2) return words(uint16_t());
  return count == 1 ? *(const uint8_t*)p : 0;
}

static inline void store_bytes(void* p, Bytes bytes, int64_t count) {
  const auto words = [=](auto word) {
    constexpr int64_t size = sizeof word;
    const auto first = decltype(word)(bytes), last = decltype(word)(bytes >> 8 * (count - size));
    __builtin_memcpy(p, &first, size);
    __builtin_memcpy((char*)p + count - size, &last, size);
  };
  if (count >= 8) {
    words(uint64_t());
  } else if (count >= 4) {
    words(uint32_t());
  } else if (count >= 2) {
    words(uint16_t());
  } else if (count == 1) {
    *(uint8_t*)p = uint8_t(bytes);
  }
}

/// load_lanes() and store_first() of part of a vector: rare, and kept out of the loops that call them.
template <class S>
[[gnu::noinline]] static Vec<Sum<S>> load_part(const S* p, int64_t begin, int64_t end) {
  if (begin >= end) return Vec<Sum<S>>{};
  const Bytes bytes = load_bytes(p + begin, (end - begin) * sizeof(S)) << 8 * sizeof(S) * begin;
  Packed<S> packed;
  __builtin_memcpy(&packed, &bytes, sizeof packed);
  return widen<S>(packed);
}

template <class S>
[[gnu::noinline]] static void store_part(S* p, Vec<Sum<S>> v, int64_t count) {
  const Packed<S> packed = narrow<S>(v);
  Bytes bytes = 0;
  __builtin_memcpy(&bytes, &packed, smaller(sizeof packed, sizeof bytes));
  if constexpr (sizeof packed > sizeof bytes) {
    constexpr int64_t half = sizeof bytes / sizeof(S);
    if (count > half) {
      __builtin_memcpy(p, &bytes, sizeof bytes);
      __builtin_memcpy(&bytes, (const char*)&packed + sizeof bytes, sizeof bytes);
      p += half, count -= half;
    }
  }
  store_bytes(p, bytes, count * sizeof(S));
}
#endif

/// Lanes [begin, end) of the vector at p, zeros elsewhere; nothing outside them is read.
template <class S>
static inline Vec<Sum<S>> load_lanes(const S* p, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << end) - (1u << begin);
  if constexpr (sizeof(S) == 8) {
    return (Vec<S>)_mm512_maskz_loadu_epi64(__mmask8(lanes), p);
  } else if constexpr (sizeof(S) == 4) {
    return (Vec<S>)_mm512_maskz_loadu_epi32(__mmask16(lanes), p);
  } else if constexpr (sizeof(S) == 2) {
    return widen<S>((Packed<S>)_mm256_maskz_loadu_epi16(__mmask16(lanes), p));
  } else {
    return widen<S>((Packed<S>)_mm_maskz_loadu_epi8(__mmask16(lanes), p));
  }
#else
  if constexpr (sizeof(Packed<S>) <= sizeof(Bytes)) {
    return load_part(p, begin, end);
#if defined(__AVX2__)
  } else if constexpr (sizeof(S) == 8) {
    return (Vec<S>)_mm256_maskload_epi64((const long long*)p, (__m256i)lanes_between<S>(begin, end));
  } else {
    return (Vec<S>)_mm256_maskload_epi32((const int*)p, (__m256i)lanes_between<S>(begin, end));
#endif
  }
#endif
}

/// The first `count` lanes from memory, zeros after them; nothing beyond them is read.
template <class S>
static inline Vec<Sum<S>> load_first(const S* p, int64_t count) {
#if !defined(__AVX512F__)
  if (count == kLanes<Sum<S>>) return load(p);
#endif
  return load_lanes(p, 0, count);
}

/// Lanes [begin, end) of the vector at p, `rest` elsewhere; nothing outside them is read.
template <class S>
static inline Vec<Sum<S>> load_between(const S* p, int64_t begin, int64_t end, Sum<S> rest) {
  using T = Sum<S>;
#if defined(__AVX512F__)
  const Vec<T> inside = load_lanes(p, begin, end);
  const uint32_t lanes = (1u << end) - (1u << begin);
  if constexpr (sizeof(T) == 8) {
    return (Vec<T>)_mm512_mask_blend_epi64(__mmask8(lanes), (__m512i)broadcast(rest), (__m512i)inside);
  } else {
    return (Vec<T>)_mm512_mask_blend_epi32(__mmask16(lanes), (__m512i)broadcast(rest), (__m512i)inside);
  }
#else
  if (end - begin == kLanes<T>) return load(p);
  return lanes_between<T>(begin, end) ? load_lanes(p, begin, end) : broadcast(rest);
#endif
}

template <class S>
static inline void store_first(S* p, Vec<Sum<S>> v, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) {
    _mm512_mask_storeu_epi64(p, __mmask8(lanes), (__m512i)v);
  } else if constexpr (sizeof(S) == 4) {
    _mm512_mask_storeu_epi32(p, __mmask16(lanes), (__m512i)v);
  } else if constexpr (sizeof(S) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(lanes), (__m256i)narrow<S>(v));
  } else {
    _mm_mask_storeu_epi8(p, __mmask16(lanes), (__m128i)narrow<S>(v));
  }
#else
  if (count == kLanes<Sum<S>>) return store(p, v);
  store_part(p, v, count);
#endif
}

/// As load_first() and store_first(), of at most or of any number of lanes: masks cost whole vectors dearly, as a
/// masked store may wait for its line.
template <class S>
static inline Vec<Sum<S>> load_some(const S* p, int64_t lanes) {
  return lanes >= kLanes<Sum<S>> ? load(p) : load_first(p, lanes);
}

template <class S>
static inline void store_some(S* p, Vec<Sum<S>> v, int64_t lanes) {
  lanes >= kLanes<Sum<S>> ? store(p, v) : store_first(p, v, lanes);
}

/// The even places of two vectors that follow each other, the second begun one place early: p[0], p[2], ...
template <class T, int... lane>
static inline Vec<T> even_places(Vec<T> first, Vec<T> second, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(first, second, (2 * lane < kLanes<T> ? 2 * lane : 2 * lane + 1)...);
}

/// Lane j is p[j*step] for j < count, zero after them; nothing beyond p[(count - 1)*step] is read.
template <class S>
static inline Vec<Sum<S>> load_strided(const S* p, int64_t step, int64_t count) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  if (step == 1) return load_first(p, count);
  if (step == 2) {
    const int64_t reach = 2 * count - 1;
    return even_places<T>(load_first(p, smaller(reach, L)), load_first(p + L - 1, larger(reach - L + 1, 0)),
                          std::make_integer_sequence<int, int(L)>());
  }
  Vec<T> v{};
  for (int64_t j = 0; j < count; ++j) v[j] = value(p[j * step]);
  return v;
}

/// A number whose bits are all ones, as a mask's lane.
template <class T>
static inline T all_ones() {
  T x;
  __builtin_memset(&x, 0xff, sizeof x);
  return x;
}

/// v, loaded as a whole where only some of its lanes will be taken: GCC would rather load by the mask that says which,
/// and such a load waits for its mask.
template <class T>
static inline Vec<T> whole_load(Vec<T> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

/// The lanes of v where mask's bits are ones, zero where they are zeros.
template <class T>
static inline Vec<T> keep(Vec<T> v, Vec<T> mask) {
  typedef long long bits __attribute__((vector_size(kVectorBytes)));
  return (Vec<T>)((bits)v & (bits)mask);
}

/// Lane j is row[start + j] where that lies in [0, size) and j < count, zero elsewhere.
template <class S>
static inline Vec<Sum<S>> load_inside(const S* row, int64_t size, int64_t start, int64_t count) {
  using T = Sum<S>;
  if (start >= 0 && start + kLanes<T> <= size && count == kLanes<T>) return load(row + start);
  const int64_t begin = smaller(larger(-start, 0), count), end = larger(smaller(size - start, count), begin);
  return load_lanes(row + start, begin, end);
}

/// to[i] = from[i] for i < count, widened.
template <class S>
static inline void copy_numbers(const S* from, int64_t count, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, count - i), count - i);
}

/// a*b + c, rounded once where the processor can.
static inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

static inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

/// The sum of all lanes, by halves: the same tree every time.
template <class T>
static inline T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace cnnops::cpu::CNNOPS_ISA
