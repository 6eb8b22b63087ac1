// Products of small matrices by a warp: mma.sync, and ldmatrix, which brings its operands from shared memory.
//
//   c[16][8] += a[16][depth] * b[depth][8]
//
// A register is 32 bits: kPack elements of type S that are neighbours along the depth, 1 TF32 or 2 of 16 bits. Lane
// number l of the warp, with g = l / 4 and t = l % 4, holds
//
//   a   register r:   row g + 8 * (r % 2),  steps kPack * (t + 4 * (r / 2)) and following   2 * kSteps registers
//   b   register r:   column g,             steps kPack * (t + 4 * r)       and following   kSteps registers
//   c   float i:      row g + 8 * (i / 2),  column 2 * t + i % 2                            4 floats
//
// where kSteps = 1 or 2 is the number of groups of 4 * kPack steps in the depth. This is the layout of all of PTX's
// mma.m16n8 for floats: m16n8k8 and k16 for 16 bits, k4 and k8 for TF32. Sums are float32; their order within one
// product is the hardware's own affair, and fixed.
#pragma once

#include "warp.h"

namespace cnnops::cuda {

/// A float with 10 bits of mantissa, in the upper 19 bits; the others are not looked at by mma().
struct Tf32 {
  uint32_t bits;
};

template <class S>
constexpr int kPack = 4 / sizeof(S);

/// Which GPUs code is being made for: those whose tensor cores take all of these types, or others. The emulation is
/// both.
#ifdef CNNOPS_EMULATE
constexpr bool kTensorCores = true, kNoTensorCores = true;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool kTensorCores = true, kNoTensorCores = false;
#else
constexpr bool kTensorCores = false, kNoTensorCores = true;
#endif

/// Ends a kernel that was not made for this GPU, with an error.
__device__ inline void stop() {
#ifdef CNNOPS_EMULATE
  emulation::fail_thread("runs what was not made for this GPU");
#else
  __trap();
#endif
}

/// To the nearest, ties away from zero: cvt.rna.tf32.f32.
__device__ inline Tf32 to_tf32(float x) {
#if !defined(CNNOPS_EMULATE) && __CUDA_ARCH__ >= 800
  Tf32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y.bits) : "f"(x));
  return y;
#else
  return {x != x ? 0x7fffffffu : (cnnops::same_bits<uint32_t>(x) + 0x1000u) & ~0x1fffu};
#endif
}

/// Two numbers in a register, the first in its lower half.
template <class S>
__device__ inline uint32_t pair(S first, S second) {
  static_assert(sizeof(S) == 2);
  return uint32_t{first.bits} | uint32_t{second.bits} << 16;
}

/// Two floats, rounded to S, in a register.
template <class S>
__device__ inline uint32_t rounded_pair(float first, float second) {
#ifdef CNNOPS_EMULATE
  return pair(rounded<S>(first), rounded<S>(second));
#else
  if constexpr (std::is_same_v<S, BFloat16>) {
    return cnnops::same_bits<uint32_t>(__floats2bfloat162_rn(first, second));
  } else {
    return cnnops::same_bits<uint32_t>(__floats2half2_rn(first, second));
  }
#endif
}

/// Half number 0 or 1 of a register.
template <class S>
__device__ inline S half(uint32_t pair, int number) {
  return {static_cast<uint16_t>(pair >> 16 * number)};
}

/// Reads kCount (1, 2 or 4) matrices of 8 rows, 16 bytes each, from shared memory. Lane 8 * i + j says where row j of
/// matrix i is; those of the lanes beyond are not used, but must point to rows as well. Lane 4 * j + t gets into
/// register i what stands in row j of matrix i at bytes 4 * t to 4 * t + 3; or, if transposed, of the column number j
/// of 16-bit elements those of rows 2 * t and 2 * t + 1.
template <int kCount, bool kTransposed = false>
__device__ inline void load_matrix(uint32_t (&registers)[kCount], const void* row, Here here = Here::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef CNNOPS_EMULATE
  check_aligned(row, 16, here);
  emulation::check_shared(row, 16, "an ldmatrix", here);
  const auto rows = emulation::exchange("ldmatrix", row, here);
  const int major = lane() / 4, minor = lane() % 4;
  for (int i = 0; i < kCount; ++i) {
    uint16_t halves[2];
    for (int h = 0; h < 2; ++h) {
      const int at_row = kTransposed ? 2 * minor + h : major, at_column = kTransposed ? major : 2 * minor + h;
      halves[h] = static_cast<const uint16_t*>(rows.of[8 * i + at_row])[at_column];
    }
    registers[i] = uint32_t{halves[0]} | uint32_t{halves[1]} << 16;
  }
#else
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  uint32_t* r = registers;
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
#endif
}

/// c += a * b, laid out as said above. sm_75 has Float16 only; what it lacks stops the kernel there.
template <class S, int kSteps>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[2 * kSteps], const uint32_t (&b)[kSteps],
                           Here here = Here::current()) {
  static_assert(kSteps == 1 || kSteps == 2);
#ifdef CNNOPS_EMULATE
  if (!std::is_same_v<S, Float16> && architecture() < 80) {
    emulation::fail_thread("multiplies what tensor cores of sm_" + std::to_string(architecture()) + " cannot, " +
                           emulation::text(here));
  }
  struct Operands {
    uint32_t a[2 * kSteps], b[kSteps];
  } mine;
  for (int r = 0; r < 2 * kSteps; ++r) mine.a[r] = a[r];
  for (int r = 0; r < kSteps; ++r) mine.b[r] = b[r];
  const auto all = emulation::exchange("mma", mine, here);
  const auto element = [](uint32_t bits, int number) -> double {
    if constexpr (std::is_same_v<S, Tf32>) return cnnops::same_bits<float>(bits & ~0x1fffu);
    if constexpr (!std::is_same_v<S, Tf32>) return value(half<S>(bits, number));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + 8 * (i / 2), column = 2 * (lane() % 4) + i % 2;
    double sum = c[i];
    for (int step = 0; step < 4 * kPack<S> * kSteps; ++step) {
      const int t = step / kPack<S> % 4, r = step / kPack<S> / 4, number = step % kPack<S>;
      sum += element(all.of[row % 8 * 4 + t].a[row / 8 + 2 * r], number) * element(all.of[column * 4 + t].b[r], number);
    }
    c[i] = static_cast<float>(sum);
  }
#elif __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<S, Tf32> && kSteps == 2) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<S, Tf32>) {
    asm volatile(
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else if constexpr (std::is_same_v<S, BFloat16> && kSteps == 2) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else if constexpr (kSteps == 2) {
    static_assert(std::is_same_v<S, Float16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<S, Float16>);
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  }
#else
  if constexpr (std::is_same_v<S, Float16>) {
    for (int step = 0; step < kSteps; ++step) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[2 * step]), "r"(a[2 * step + 1]), "r"(b[step]));
    }
  } else {
    __trap();
  }
#endif
}

}  // namespace cnnops::cuda
