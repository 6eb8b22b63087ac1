// One small vector type, so that a kernel body is written once and compiled for every instruction set.
//
// Vec<T> is the compiler's own vector of as many T as the widest register holds: 64 bytes with AVX-512, 32 with AVX2,
// 16 otherwise (SSE2, NEON). Arithmetic operators work lane by lane. The build turns floating-point contraction off, so
// a multiply-add is fused where this file says so and nowhere else: that keeps the bits of main loops and remainders
// alike.
#pragma once

#include <cstdint>
#include <utility>

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

template <class T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

/// The first `count` lanes from memory, zeros after them; nothing beyond them is read.
template <class T>
static inline Vec<T> load_first(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
  }
#else
  if (count == kLanes<T>) return load(p);
  Vec<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

template <class T>
static inline void store_first(T* p, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
  }
#else
  if (count == kLanes<T>) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

/// The even places of two vectors that follow each other, the second begun one place early: p[0], p[2], ...
template <class T, int... lane>
static inline Vec<T> even_places(Vec<T> first, Vec<T> second, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(first, second, (2 * lane < kLanes<T> ? 2 * lane : 2 * lane + 1)...);
}

/// Lane j is p[j*step] for j < count, zero after them; nothing beyond p[(count - 1)*step] is read.
template <class T>
static inline Vec<T> load_strided(const T* p, int64_t step, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  if (step == 1) return load_first(p, count);
  if (step == 2) {
    const int64_t reach = 2 * count - 1;
    return even_places<T>(load_first(p, smaller(reach, L)), load_first(p + L - 1, larger(reach - L + 1, 0)),
                          std::make_integer_sequence<int, int(L)>());
  }
  Vec<T> v{};
  for (int64_t j = 0; j < count; ++j) v[j] = p[j * step];
  return v;
}

/// v's lanes from number `from` on, each followed by a zero.
template <class T, int... lane>
static inline Vec<T> between_zeros(Vec<T> v, std::integer_sequence<int, lane...>, bool upper) {
  constexpr int L = kLanes<T>;
  return upper ? __builtin_shufflevector(v, Vec<T>{}, (lane % 2 ? L : L / 2 + lane / 2)...)
               : __builtin_shufflevector(v, Vec<T>{}, (lane % 2 ? L : lane / 2)...);
}

/// p[j*step] += v[j] for j < count; nothing beyond p[(count - 1)*step] is touched.
template <class T>
static inline void add_strided(T* p, int64_t step, Vec<T> v, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  if (step == 1) {
    store_first(p, load_first(p, count) + v, count);
  } else if (step == 2) {
    const int64_t reach = 2 * count - 1, low = smaller(reach, L), high = reach - low;
    constexpr auto lanes = std::make_integer_sequence<int, int(L)>();
    store_first(p, load_first(p, low) + between_zeros<T>(v, lanes, false), low);
    if (high > 0) store_first(p + L, load_first(p + L, high) + between_zeros<T>(v, lanes, true), high);
  } else {
    for (int64_t j = 0; j < count; ++j) p[j * step] += v[j];
  }
}

/// A number whose bits are all ones, as a mask's lane.
template <class T>
static inline T all_ones() {
  T x;
  __builtin_memset(&x, 0xff, sizeof x);
  return x;
}

/// The lanes of v where mask's bits are ones, zero where they are zeros.
template <class T>
static inline Vec<T> keep(Vec<T> v, Vec<T> mask) {
  typedef long long bits __attribute__((vector_size(kVectorBytes)));
  return (Vec<T>)((bits)v & (bits)mask);
}

/// Lane j is row[start + j] where that lies in [0, size) and j < count, zero elsewhere.
template <class T>
static inline Vec<T> load_inside(const T* row, int64_t size, int64_t start, int64_t count) {
  if (start >= 0 && start + kLanes<T> <= size && count == kLanes<T>) return load(row + start);
#if defined(__AVX512F__)
  const int64_t begin = smaller(larger(-start, 0), count), end = larger(smaller(size - start, count), begin);
  const uint32_t lanes = (1u << end) - (1u << begin);
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16(lanes), row + start);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8(lanes), row + start);
  }
#else
  Vec<T> v{};
  for (int64_t j = 0; j < count; ++j) {
    if (start + j >= 0 && start + j < size) v[j] = row[start + j];
  }
  return v;
#endif
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
