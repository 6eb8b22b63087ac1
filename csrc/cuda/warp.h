// What the 32 lanes of a warp do together. Every lane must come to the same call; none but sync_warp() orders memory.
#pragma once

#include "device.h"

namespace cnnops::cuda {

constexpr int kWarp = 32;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

#ifdef CNNOPS_EMULATE

using emulation::sync_warp;

template <class T>
inline T shuffle(T x, int from, Here here = Here::current()) {
  if (from < 0 || from >= kWarp) emulation::fail_thread("shuffles from a lane that is none, " + emulation::text(here));
  return emulation::exchange("shuffle", x, here).of[from];
}

template <class T>
inline T shuffle_down(T x, int distance, Here here = Here::current()) {
  const int from = lane() + distance;
  const auto all = emulation::exchange("shuffle_down", x, here);
  return from < kWarp ? all.of[from] : x;
}

template <class T>
inline T shuffle_xor(T x, int mask, Here here = Here::current()) {
  return emulation::exchange("shuffle_xor", x, here).of[lane() ^ mask];
}

inline uint32_t ballot(bool x, Here here = Here::current()) {
  const auto all = emulation::exchange("ballot", x, here);
  uint32_t bits = 0;
  for (int i = 0; i < kWarp; ++i) bits |= uint32_t{all.of[i]} << i;
  return bits;
}

#else

__device__ inline void sync_warp() { __syncwarp(); }

/// x of lane number `from`.
template <class T>
__device__ inline T shuffle(T x, int from) {
  return __shfl_sync(0xffffffffu, x, from);
}

/// x of the lane `distance` further up; one's own where there is none.
template <class T>
__device__ inline T shuffle_down(T x, int distance) {
  return __shfl_down_sync(0xffffffffu, x, distance);
}

/// x of the lane whose number differs in the bits of `mask`.
template <class T>
__device__ inline T shuffle_xor(T x, int mask, Here = Here::current()) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

/// Bit i is x of lane i.
__device__ inline uint32_t ballot(bool x, Here = Here::current()) { return __ballot_sync(0xffffffffu, x); }

#endif

__device__ inline bool any(bool x, Here here = Here::current()) { return ballot(x, here) != 0; }
__device__ inline bool all(bool x, Here here = Here::current()) { return ballot(x, here) == 0xffffffffu; }

/// The sum over the warp, in the same order for every lane: halves, quarters, ... of the warp are added to each other.
template <class T>
__device__ inline T reduce_add(T x, Here here = Here::current()) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask, here);
  return x;
}

}  // namespace cnnops::cuda
