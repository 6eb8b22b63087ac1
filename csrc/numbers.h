// The types of numbers that tensors hold, and the types in which they are added up.
//
// A kernel is written for a type S of stored numbers and computes in Sum<S>: the 16-bit floats are widened to float as
// they are read and rounded once as they are written; small integers are widened to int32. For all others the two are
// the same type. value() widens one number, rounded<S>() is its inverse, to the nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#ifndef CNNOPS_HOST_DEVICE
#define CNNOPS_HOST_DEVICE  // nvcc's device.h defines it as __host__ __device__
#endif

namespace cnnops {

/// The upper half of a float's bits: 8 bits of exponent, 7 of mantissa.
struct BFloat16 {
  uint16_t bits;
};
/// IEEE half precision: 5 bits of exponent, 10 of mantissa.
struct Float16 {
  uint16_t bits;
};

template <class S>
struct SumOf {
  using type = std::conditional_t<std::is_integral_v<S> && sizeof(S) < 4, int32_t, S>;
};
template <>
struct SumOf<BFloat16> {
  using type = float;
};
template <>
struct SumOf<Float16> {
  using type = float;
};
template <class S>
using Sum = typename SumOf<S>::type;

template <class S>
constexpr bool kReal = !std::is_integral_v<S>;

/// All types of numbers, as the arguments of a template. Integers are for pooling and ReLU only.
template <template <class...> class List>
using ForNumbers = List<float, double, BFloat16, Float16, uint8_t, int8_t, int16_t, int32_t, int64_t>;

template <class To, class From>
CNNOPS_HOST_DEVICE static inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class S>
CNNOPS_HOST_DEVICE static inline Sum<S> value(S x) {
  return Sum<S>(x);
}

CNNOPS_HOST_DEVICE static inline float value(BFloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

CNNOPS_HOST_DEVICE static inline float value(Float16 x) {
  // The exponent's bias grows from 15 to 127 by a multiplication, which also normalises what was subnormal.
  const float small = same_bits<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN keep their mantissa
  return same_bits<float>(same_bits<uint32_t>(small) | special | uint32_t(x.bits & 0x8000) << 16);
}

template <class S>
CNNOPS_HOST_DEVICE static inline S rounded(Sum<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t bits = same_bits<uint32_t>(x);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<S, Float16>) {
    const uint32_t bits = same_bits<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
    if (size < 0x38800000) {  // subnormal: adding 0.5 lines the last bit up with float's own rounding
      const float shifted = same_bits<float>(size) + 0.5f;
      return {uint16_t(sign | (same_bits<uint32_t>(shifted) - 0x3f000000))};
    }
    return {uint16_t(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
  } else {
    return S(x);
  }
}

}  // namespace cnnops
