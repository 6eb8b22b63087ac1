// What a kernel runs on. This file, warp.h, matrix.h and copy_async.h are the only ones that know.
//
// Kernels reach the device through these and nothing else, so the same sources compile twice: by nvcc for
// GPUs, and, with CNNOPS_EMULATE defined, by the host's compiler against tests/cuda_on_cpu/emulation.h, which runs a
// block's threads one after the other. For both to mean the same, a kernel
//   - is started by launch(), with blocks and threads along x only;
//   - walks its work with a stride (Items, or from blockIdx.x by gridDim.x), since a grid may be smaller;
//   - takes shared memory from shared_memory(), as much as its launch asked for;
//   - lets every thread of a block reach every sync_block(): no early return, no barrier within a thread's own if;
//   - likewise all 32 lanes of a warp what is in warp.h and matrix.h, and expects no order between lanes otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef CNNOPS_EMULATE
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define CNNOPS_HOST_DEVICE __host__ __device__

/// Before a loop over an array that is to stay in registers; before one that rarely goes round more than a few times,
/// and unrolled would be several times as large, no faster.
#ifdef CNNOPS_EMULATE
#define CNNOPS_UNROLL
#define CNNOPS_NO_UNROLL
#else
#define CNNOPS_UNROLL _Pragma("unroll")
#define CNNOPS_NO_UNROLL _Pragma("unroll 1")
#endif

#include "../correlation.h"
#include "kernels.h"

#ifndef CNNOPS_EMULATE
namespace cnnops {

// One instruction each, where numbers.h takes twenty: a kernel that holds its results in registers rounds many at once.
template <>
__host__ __device__ inline BFloat16 rounded<BFloat16>(float x) {
  return same_bits<BFloat16>(__float2bfloat16_rn(x));
}
template <>
__host__ __device__ inline Float16 rounded<Float16>(float x) {
  return same_bits<Float16>(__float2half_rn(x));
}

}  // namespace cnnops
#endif

namespace cnnops::cuda {

/// Shared memory that a block may have on every architecture without asking for more.
constexpr int64_t kSharedMemory = 48 * 1024;

/// The most that launch() can get a block on an architecture, in bytes; on one not known here, what the one before has.
constexpr int64_t shared_memory_limit(int architecture) {
  constexpr struct {
    int architecture;
    int64_t kilobytes;
  } table[] = {{120, 99}, {100, 227}, {90, 227}, {89, 99}, {87, 163}, {86, 99}, {80, 163}, {75, 64}};
  for (const auto& row : table) {
    if (architecture >= row.architecture) return row.kilobytes * 1024;
  }
  return kSharedMemory;
}

#ifdef CNNOPS_EMULATE

using emulation::atomic_max;
using emulation::check_aligned;
using emulation::Here;
using emulation::sync_block;

/// The architecture, as in sm_75, that the code which the current device runs was compiled for.
inline int architecture() { return emulation::settings.architecture; }

inline bool hidden(bool condition) { return condition; }

template <class T>
inline T* shared_memory() {
  return static_cast<T*>(emulation::shared_memory());
}

inline int64_t grid_limit() { return emulation::settings.grid_limit; }
inline int64_t index_limit() { return emulation::settings.index_limit; }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, std::size_t shared_bytes,
            Stream, const Arguments&... arguments) {
  if (blocks > 0) {
    emulation::run(name, blocks < grid_limit() ? blocks : grid_limit(), threads, shared_bytes,
                   shared_memory_limit(architecture()), [&] { kernel(arguments...); });
  }
}

#else

/// Where a kernel called something: the emulation names the line of a mistake.
struct Here {
  __host__ __device__ static constexpr Here current() { return {}; }
};

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void check_aligned(const void*, std::size_t, const Here&) {}

inline void check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error reported here is not to be found again by the next launch
  const bool missing = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
  throw std::runtime_error(std::string("cnnops: CUDA kernel ") + name + ": " + cudaGetErrorString(error) +
                           (missing ? "; build cnnops with the GPU's architecture in TORCH_CUDA_ARCH_LIST" : ""));
}

template <class>
__global__ void nothing_kernel() {}

/// Less than the device's own where that was not compiled for: sm_80's code runs on sm_86, and the portable code of any
/// on all later ones. What a kernel leaves out for an older architecture is then missing on a newer device, too.
template <class Any = void>  // so that the kernel is there only where this is called
int architecture() {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, nothing_kernel<Any>), "(none yet)");
  return attributes.ptxVersion;
}

/// A condition that stays the same through a loop, but hidden from the compiler: it would make a copy of the loop for
/// each outcome, and for each combination with others.
__device__ inline bool hidden(bool condition) {
  int bit = condition;
  asm volatile("" : "+r"(bit));
  return bit != 0;
}

/// *place = max(*place, x), whoever else does the same. There is none for floats, on purpose.
__device__ inline void atomic_max(int64_t* place, int64_t x) {
  static_assert(sizeof(long long) == sizeof(int64_t));
  atomicMax(reinterpret_cast<long long*>(place), static_cast<long long>(x));
}

/// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ inline T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

/// The most blocks of a grid, and the number of elements from which on indices take 64 bits.
inline int64_t grid_limit() { return 0x7fffffff; }
inline int64_t index_limit() { return 0x7fffffff; }

/// Starts a kernel; throws when it could not be started. No blocks, no kernel.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, std::size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  if (blocks <= 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks < grid_limit() ? blocks : grid_limit()));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  if (static_cast<int64_t>(shared_bytes) > kSharedMemory) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

#endif

CNNOPS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Number>
CNNOPS_HOST_DEVICE constexpr Number smaller(Number a, Number b) {
  return b < a ? b : a;
}

template <class Number>
CNNOPS_HOST_DEVICE constexpr Number larger(Number a, Number b) {
  return a < b ? b : a;
}

constexpr int kItemThreads = 256;

/// Starts a kernel that has a thread for each of `items` items, give or take its grid: see Items.
template <class... Parameters, class... Arguments>
void launch_items(const char* name, void (*kernel)(Parameters...), int64_t items, Stream stream,
                  const Arguments&... arguments) {
  launch(name, kernel, ceil_div(items, kItemThreads), kItemThreads, 0, stream, arguments...);
}

/// The items of one thread, out of [0, size): `for (int64_t i : Items(size))`.
class Items {
 public:
  struct End {};
  class Iterator {
   public:
    __device__ Iterator(int64_t item, int64_t size) : item_(item), size_(size) {}
    __device__ int64_t operator*() const { return item_; }
    __device__ void operator++() { item_ += static_cast<int64_t>(gridDim.x) * blockDim.x; }
    __device__ bool operator!=(End) const { return item_ < size_; }

   private:
    int64_t item_, size_;
  };

  __device__ explicit Items(int64_t size) : size_(size) {}
  __device__ Iterator begin() const {
    return Iterator(static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size_);
  }
  __device__ End end() const { return {}; }

 private:
  int64_t size_;
};

/// Takes a number apart into digits of mixed radix, the fastest first: tile % columns, tile / columns % rows, ...
class Digits {
 public:
  CNNOPS_HOST_DEVICE explicit Digits(int64_t number) : rest_(number) {}
  CNNOPS_HOST_DEVICE int64_t next(int64_t radix) {
    const int64_t number = rest_;
    rest_ = number / radix;
    return number - rest_ * radix;
  }
  CNNOPS_HOST_DEVICE int64_t rest() const { return rest_; }

 private:
  int64_t rest_;
};

/// As many bytes as one instruction reads or writes, 16 if not said otherwise.
template <class T, int kBytes = 16>
struct alignas(kBytes) Vector {
  static constexpr int size = kBytes / sizeof(T);
  T lane[size];
};

/// `kCount` neighbours in memory, a power of two: in one such piece, or in several of 16 bytes.
template <class T, int kCount>
using Piece = Vector<T, kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16>;

/// Reads `kCount` neighbours, a power of two, by Pieces: `from` must be aligned like one.
template <int kCount, class T>
__device__ inline void load_whole(T* to, const T* from, Here here = Here::current()) {
  using Whole = Piece<T, kCount>;
  check_aligned(from, sizeof(Whole), here);
  for (int i = 0; i < kCount; i += Whole::size) {
    const Whole piece = *reinterpret_cast<const Whole*>(from + i);
    for (int lane = 0; lane < Whole::size; ++lane) to[i + lane] = piece.lane[lane];
  }
}

/// Writes `kCount` neighbours, likewise.
template <int kCount, class T>
__device__ inline void store_whole(T* to, const T* from, Here here = Here::current()) {
  using Whole = Piece<T, kCount>;
  check_aligned(to, sizeof(Whole), here);
  for (int i = 0; i < kCount; i += Whole::size) {
    Whole piece;
    for (int lane = 0; lane < Whole::size; ++lane) piece.lane[lane] = from[i + lane];
    *reinterpret_cast<Whole*>(to + i) = piece;
  }
}

/// Whether `kCount` neighbours can be read and written whole at each of these places.
template <int kCount, class... T>
bool aligned(const T*... places) {
  return ((reinterpret_cast<uintptr_t>(places) % sizeof(Piece<T, kCount>) == 0) && ...);
}

/// Reads `kCount` neighbours, as whole vectors if that many fill some: then `from` must be aligned like one.
template <int kCount, class T>
__device__ inline void load(T* to, const T* from, Here here = Here::current()) {
  if constexpr (kCount % Vector<T>::size == 0) {
    load_whole<kCount>(to, from, here);
  } else {
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

/// Writes `kCount` neighbours, likewise.
template <int kCount, class T>
__device__ inline void store(T* to, const T* from, Here here = Here::current()) {
  if constexpr (kCount % Vector<T>::size == 0) {
    store_whole<kCount>(to, from, here);
  } else {
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

}  // namespace cnnops::cuda
