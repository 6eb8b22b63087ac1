// How a block brings an operand of its product (gemm_tile.h) to shared memory, from wherever in a tensor its numbers
// are.
//
// An operand comes slice by slice, in the type in which it is stored: 64 bytes of steps for each row, or column. A
// thread brings vectors of 16 bytes: with one cp.async if the steps are neighbours in memory, as channels are in
// channels_last; or else number by number, float32 by cp.async of 4 bytes, 16-bit numbers by way of registers, which
// also transpose them where neighbours are of different rows.
#pragma once

#include "gemm_tile.h"

namespace cnnops::cuda {

/// How an operand comes to shared memory.
enum class Way {
  whole,   // a vector of steps that are neighbours in memory, by one cp.async
  across,  // 16-bit numbers: 4 steps of 4 rows, these being neighbours in memory
  steps,   // number by number, and neighbouring threads bring neighbouring steps
  rows,    // likewise, neighbouring rows
};

/// What a thread brings of kCount rows of a slice, or columns.
template <class S, int kCount, int kThreads>
class Carrier {
 public:
  using To = Rows<S, kCount, 4>;

  __device__ explicit Carrier(Way way) : way_(way) {}

  /// from(row, step) says where a number is; nullptr for zero.
  template <class From>
  __device__ void start(To& to, const From& from) {
    if (way_ == Way::whole) {
      CNNOPS_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const int row = first(i) / 4, vector = first(i) % 4;
        const S* source = from(row, vector * kSize);
        copy_async<16>(to.at(row, vector), source, source ? 16 : 0);
      }
      return;
    }
    if constexpr (kAsync) {
      CNNOPS_NO_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        CNNOPS_UNROLL
        for (int number = 0; number < kSize; ++number) {
          const S* source = from(row(i), vector(i) * kSize + number);
          copy_async<4>(to.at(row(i), vector(i)) + number, source, source ? 4 : 0);
        }
      }
    } else if (way_ == Way::across) {
      CNNOPS_UNROLL
      for (int i = 0; i < kFours; ++i) {
        const S* source = from(first(i / 4) / 8 * 4, first(i / 4) % 8 * 4 + i % 4);
        held_[i] = source ? load_four(source) : Four{};
      }
    } else {
      CNNOPS_UNROLL
      for (int i = 0; i < kFours * 4; ++i) {
        const S* source = from(row(i / kSize), vector(i / kSize) * kSize + i % kSize);
        held_[i / 4].lane[i % 4] = source ? *source : S{};
      }
    }
  }

  __device__ void finish(To& to) const {
    if constexpr (!kAsync) {
      if (way_ == Way::whole) return;
      CNNOPS_UNROLL
      for (int i = 0; i < kFours; ++i) {
        if (way_ == Way::across) {
          const int square = first(i / 4);
          const Four* held = held_ + i / 4 * 4;
          const Four steps{held[0].lane[i % 4], held[1].lane[i % 4], held[2].lane[i % 4], held[3].lane[i % 4]};
          store_four(to.at(square / 8 * 4 + i % 4, square % 8 / 2) + square % 2 * 4, steps);
        } else {
          store_four(to.at(row(i / 2), vector(i / 2)) + i % 2 * 4, held_[i]);
        }
      }
    }
  }

 private:
  static constexpr bool kAsync = sizeof(S) == 4;
  static constexpr int kSize = Vector<S>::size, kVectors = kCount * 4 / kThreads;
  static constexpr int kFours = kAsync ? 1 : kVectors * kSize / 4;
  static_assert(kCount * 4 % kThreads == 0 && (kAsync || kVectors % 2 == 0));

  struct alignas(8) Four {
    S lane[4];
  };
  __device__ static Four load_four(const S* from, Here here = Here::current()) {
    check_aligned(from, sizeof(Four), here);
    return *reinterpret_cast<const Four*>(from);
  }
  __device__ static void store_four(S* to, const Four& four, Here here = Here::current()) {
    check_aligned(to, sizeof(Four), here);
    *reinterpret_cast<Four*>(to) = four;
  }

  __device__ static int first(int i) { return static_cast<int>(threadIdx.x) + i * kThreads; }
  __device__ int row(int i) const { return way_ == Way::steps ? first(i) / 4 : first(i) % kCount; }
  __device__ int vector(int i) const { return way_ == Way::steps ? first(i) % 4 : first(i) / kCount; }

  Way way_;
  Four held_[kFours];
};

template <class S>
bool aligned(const S* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<S>) == 0;
}

/// For an operand whose rows are neighbours in memory, in runs of `count`.
template <class S>
Way across_rows(const S* pointer, int64_t count) {
  return sizeof(S) == 2 && count % 4 == 0 && aligned(pointer) ? Way::across : Way::rows;
}

}  // namespace cnnops::cuda
