// torch's dtypes and our types of numbers.
#pragma once

#include <ATen/ATen.h>

#include "../numbers.h"

namespace cnnops {

/// Calls f(S{}) with the type of number that tensors of this dtype hold.
template <class F>
void with_number(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Float16{});
    case at::kByte:
      return f(uint8_t{});
    case at::kChar:
      return f(int8_t{});
    case at::kShort:
      return f(int16_t{});
    case at::kInt:
      return f(int32_t{});
    case at::kLong:
      return f(int64_t{});
    default:
      TORCH_INTERNAL_ASSERT(false, "a dtype that no check lets through: ", dtype);
  }
}

template <class F>
void with_real_number(at::ScalarType dtype, const F& f) {
  with_number(dtype, [&](auto number) {
    if constexpr (kReal<decltype(number)>) f(number);
  });
}

template <class S>
const S* data_of(const at::Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <class S>
S* mutable_data_of(const at::Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

}  // namespace cnnops
