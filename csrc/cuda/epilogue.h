// What happens to a result between its sum and memory: activations, number by number, and the choice of the largest in
// a pooling window. activation.cu and pool2d.cu do the same to whole tensors, with the same bits.
#pragma once

#include "warp.h"

namespace cnnops::cuda {

/// Bounds that are NaN bound nothing. A bound must be a number that S has.
template <class S>
__device__ inline S clipped(S x, Sum<S> low, Sum<S> high) {
  const Sum<S> here = value(x);
  return here < low ? rounded<S>(low) : here > high ? rounded<S>(high) : x;
}

/// Its gradient, where it gave y.
template <class S>
__device__ inline S clipped_gradient(S gy, S y, Sum<S> low, Sum<S> high) {
  const Sum<S> here = value(y);
  return here <= low || here >= high ? S{} : gy;
}

/// x where kept > 0, a fraction of it elsewhere: leaky_relu forward (both x) and backward.
template <class S>
__device__ inline S leaky(S x, S kept, Sum<S> slope) {
  return value(kept) > 0 ? x : rounded<S>(value(x) * slope);
}

template <class S>
__device__ inline bool leaks(const Epilogue<S>& epilogue) {
  return epilogue.slope == epilogue.slope;
}

/// A sum as it is written without pooling.
template <class S>
__device__ inline S finished(Sum<S> sum, const Epilogue<S>& epilogue) {
  const S x = rounded<S>(sum);
  return leaks(epilogue) ? leaky(x, x, epilogue.slope) : clipped(x, epilogue.low, epilogue.high);
}

/// Whether x is to replace the largest number so far: NaN wins over everything, as in torch.
template <class T>
__device__ inline bool wins(T x, T best) {
  return x > best || x != x;
}

/// Two neighbouring threads have a column each of two windows, the first and the last two of `columns`. The left thread
/// gets the whole of the first window, the right one that of the second, in scan order.
template <class T>
__device__ inline void exchange_columns(const T (&columns)[4], T (&window)[4]) {
  const bool right = threadIdx.x % 2;
  CNNOPS_UNROLL
  for (int row = 0; row < 2; ++row) {
    const T own = right ? columns[2 + row] : columns[row], given = right ? columns[row] : columns[2 + row];
    const T other = shuffle_xor(given, 1);
    window[2 * row] = right ? other : own;
    window[2 * row + 1] = right ? own : other;
  }
}

/// Writes the largest of a 2 x 2 window's numbers, which come in scan order, and its position.
template <class S>
__device__ inline void pool(const Sum<S> (&window)[4], S* y, uint8_t* position) {
  Sum<S> best = window[0];
  uint8_t at = 0;
  CNNOPS_UNROLL
  for (uint8_t i = 1; i < 4; ++i) {
    if (wins(window[i], best)) {
      best = window[i];
      at = i;
    }
  }
  *y = rounded<S>(best);
  *position = at;
}

/// What a window's largest number gets of the gradient of y. Pooling's backward pass adds to a zero, so -0 becomes 0
/// (an addition here might be contracted with leaky()'s product).
template <class S>
__device__ inline S pooled_gradient(S gy, S y, const Epilogue<S>& epilogue) {
  const S gradient =
      leaks(epilogue) ? leaky(gy, y, epilogue.slope) : clipped_gradient(gy, y, epilogue.low, epilogue.high);
  return value(gradient) == 0 ? S{} : rounded<S>(value(gradient));
}

}  // namespace cnnops::cuda
