// cp.async: copies from global to shared memory that pass by the registers and go on while the thread computes.
//
//   copy_async<16>(shared + i, x + i, inside ? 16 : 0);   // starts one; what is not read is zeros
//   commit_copies();                                      // closes a group of them
//   wait_copies<1>();                                     // all but the last committed group have landed, for this thread
//   sync_block();                                         // ... and for all
//
// Zeros at a border cost nothing this way: no branch, and `x + i` may then point anywhere. GPUs before sm_80 have no
// such instruction; there copy_async is a load and a store, done when it returns.
#pragma once

#include "device.h"

namespace cnnops::cuda {

/// Copies the first `bytes` of kBytes (4, 8 or 16), and zeros for the rest. Both places must be aligned to kBytes.
template <int kBytes, class T>
__device__ inline void copy_async(T* shared, const T* global, int bytes = kBytes, Here here = Here::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(CNNOPS_EMULATE)
  using namespace emulation;
  check_aligned(shared, kBytes, here);
  check_shared(shared, kBytes, "a cp.async to somewhere", here);
  if (bytes > 0) check_aligned(global, kBytes, here);
  if (bytes < 0 || bytes > kBytes) fail_thread("copies " + std::to_string(bytes) + " bytes, " + text(here));
  copies().back().push_back({shared, global, bytes, kBytes, here});
  if (settings.copies == Copies::eager) land(copies().back());
#elif __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // through the L2 cache alone: what goes to shared memory is not read again from the L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, unsigned> >;
  Word word{};
  if (bytes == kBytes) {
    word = *reinterpret_cast<const Word*>(global);
  } else {
    for (int i = 0; i < bytes; ++i) {
      reinterpret_cast<unsigned char*>(&word)[i] = reinterpret_cast<const unsigned char*>(global)[i];
    }
  }
  *reinterpret_cast<Word*>(shared) = word;
#endif
}

__device__ inline void commit_copies() {
#if defined(CNNOPS_EMULATE)
  emulation::copies().emplace_back();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until of this thread's committed groups all but the last kGroups have landed.
template <int kGroups>
__device__ inline void wait_copies() {
#if defined(CNNOPS_EMULATE)
  auto& groups = emulation::copies();
  while (groups.size() > kGroups + 1) {  // the last is not committed
    emulation::land(groups.front());
    groups.erase(groups.begin());
  }
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace cnnops::cuda
