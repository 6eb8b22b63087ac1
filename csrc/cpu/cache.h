// What kernels say to the cache: which lines they will want, and what should not lie there. A line is 64 bytes.
#pragma once

#include "simd.h"

namespace cnnops::cpu::CNNOPS_ISA {

constexpr int kLineVectors = 64 / kVectorBytes;
template <class S>
constexpr int64_t kLineNumbers = 64 / int64_t(sizeof(S));

/// Starts loading `count` numbers from p on into the second-level cache. (Always inlined: GCC takes a function that
/// does nothing else for one without effect, and leaves its calls out.)
template <class S>
[[gnu::always_inline]] static inline void fetch(const S* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLineNumbers<S>) __builtin_prefetch(p + i, 0, 2);
}

/// Starts loading lines that will be written: a tile's share of a row of results is often no whole lines, and those
/// that it shares with others would be waited for.
template <class S>
[[gnu::always_inline]] static inline void fetch_to_write(S* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLineNumbers<S>) __builtin_prefetch(p + i, 1);
  __builtin_prefetch(p + count - 1, 1);
}

/// Writes past the cache, to an address that is a multiple of kVectorBytes: for what is not read again soon. A line
/// should be written in one go: half a line leaves several times as slowly. Whoever calls it calls stores_done() last.
template <class T>
static inline void store_past_cache(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}

static inline void stores_done() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

/// Whether so many numbers, from p on, are better written past the cache.
template <class S>
static inline bool past_cache(const S* p, int64_t count) {
  return std::is_same_v<S, Sum<S>> && count * sizeof(S) > (16 << 20) &&
         reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
