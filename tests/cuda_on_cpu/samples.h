// Kernels that only the emulation's own tests run (test_emulation.py).
#pragma once

#include <string>

#include "cuda/kernels.h"

namespace cnnops::cuda {

/// c[m][n] = a[m][k] * b, with tensor cores; b is [n][k], or [k][n] if not steps_first. Rows of a and b are a multiple of
/// 16 bytes long, which `k` and `n` need not be.
struct Gemm {
  int64_t m, n, k, a_row, b_row;
  bool steps_first;
  int stages;
};
template <class S>
void gemm(const Gemm& g, const S* a, const S* b, float* c, Stream stream);

/// One call of each collective, mma and ldmatrix by a single warp: see collectives.cu.
void collectives(const std::string& name, const void* in, void* out);

/// A kernel that reverses `size` numbers, with a mistake in it if `fault`: see faults.cu.
void fault(const std::string& name, int64_t size, bool fault, const float* in, float* out);

}  // namespace cnnops::cuda
