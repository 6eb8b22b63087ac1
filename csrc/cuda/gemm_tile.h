// A block's tile of a matrix product on tensor cores: c[row][column] += sum over steps of a[row][step] * b[step][column].
//
// The steps come in slices of 64 bytes, kSlice. Those of `a` lie in shared memory as rows of 4 vectors of 16 bytes; those
// of `b` likewise, with a row per column, if the steps are neighbours in memory, or else (16-bit numbers only) with a row
// per step, and ldmatrix transposes them. Vectors of neighbouring rows are shuffled (Rows), so that the 8 that ldmatrix
// reads at once lie in different banks. While a slice is multiplied, the next ones are on their way (copy_async.h).
//
// float is rounded to TF32 on its way to the registers, to the nearest. Sums are float32.
#pragma once

#include "copy_async.h"
#include "matrix.h"

namespace cnnops::cuda {

template <class S>
constexpr int kSlice = 64 / sizeof(S);  // steps

/// The type as which tensor cores see a stored number.
template <class S>
using MmaType = std::conditional_t<std::is_same_v<S, float>, Tf32, S>;

/// kCount rows of kVectors vectors.
template <class S, int kCount, int kVectors>
struct Rows {
  Vector<S> vectors[kCount * kVectors];

  __device__ S* at(int row, int vector) {
    return vectors[row * kVectors + (vector ^ row * kVectors / 8 % kVectors)].lane;
  }
  __device__ const S* at(int row, int vector) const { return const_cast<Rows*>(this)->at(row, vector); }

  /// Brings the vectors from where from(row, first) says, `first` being the number in its row of a vector's first element;
  /// of its elements only `limit - first`, and none if `from` is nullptr.
  template <int kThreads, class From>
  __device__ void bring(int limit, const From& from) {
    for (int i = threadIdx.x; i < kCount * kVectors; i += kThreads) {
      const int row = i / kVectors, vector = i % kVectors, first = vector * Vector<S>::size;
      const S* source = from(row, first);
      const int elements = source ? larger(0, smaller(Vector<S>::size, limit - first)) : 0;
      copy_async<16>(at(row, vector), source, elements * static_cast<int>(sizeof(S)));
    }
  }
};

/// kWarpRows x kWarpColumns warps, each with 32 x 32 of the results in its registers.
template <class S_, int kWarpRows, int kWarpColumns, bool kStepsFirst>
struct GemmTile {
  using S = S_;
  static_assert(kStepsFirst || sizeof(S) == 2, "ldmatrix transposes 16-bit numbers only");
  static constexpr int kThreads = kWarpRows * kWarpColumns * kWarp;
  static constexpr int kRows = kWarpRows * 32, kColumns = kWarpColumns * 32;
  using A = Rows<S, kRows, 4>;
  using B = std::conditional_t<kStepsFirst, Rows<S, kColumns, 4>, Rows<S, kSlice<S>, kColumns / Vector<S>::size>>;

  struct Slice {
    A a;
    B b;
  };

  float sum[2][4][4] = {};  // of 16 rows, of 8 columns, and what mma() gives a lane

  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp / kWarpColumns * 32; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / kWarp % kWarpColumns * 32; }

  __device__ void multiply(const Slice& slice) {
    const int matrix = lane() / 8, row = lane() % 8;  // of which this lane says where it is
    CNNOPS_UNROLL
    for (int vector = 0; vector < 4; vector += 2) {
      uint32_t a[2][4], b[2][4];  // b: two times 8 columns with 2 registers each
      CNNOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        load_matrix<4>(a[i], slice.a.at(warp_row() + 16 * i + 8 * (matrix % 2) + row, vector + matrix / 2));
        CNNOPS_UNROLL
        for (uint32_t& bits : a[i]) bits = operand(bits);
      }
      CNNOPS_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = warp_column() + 16 * j + 8 * (matrix / 2);
        if constexpr (kStepsFirst) {
          load_matrix<4>(b[j], slice.b.at(column + row, vector + matrix % 2));
        } else {
          load_matrix<4, true>(b[j], slice.b.at(8 * (vector + matrix % 2) + row, column / 8));
        }
        CNNOPS_UNROLL
        for (uint32_t& bits : b[j]) bits = operand(bits);
      }
      CNNOPS_UNROLL
      for (int i = 0; i < 2; ++i) {
        CNNOPS_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<MmaType<S>>(sum[i][j], a[i], column);
        }
      }
    }
  }

  /// Adds the products of `count` slices. bring(slice, number) starts the copies of one.
  template <int kStages, class Bring>
  __device__ void multiply(Slice (&stages)[kStages], int count, const Bring& bring) {
    for (int number = 0; number < kStages - 1; ++number) {
      if (number < count) bring(stages[number], number);
      commit_copies();
    }
    for (int number = 0; number < count; ++number) {
      wait_copies<kStages - 2>();
      sync_block();  // the slice is there, and all have done with the one before, whose place the next one gets
      const int next = number + kStages - 1;
      if (next < count) bring(stages[next % kStages], next);
      commit_copies();
      multiply(stages[number % kStages]);
    }
    sync_block();
  }

  /// use(row, column, sum, next) for each pair of results: those of a column and the one after it.
  template <class Use>
  __device__ void each(const Use& use) const {
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
    CNNOPS_UNROLL
    for (int i = 0; i < 4; ++i) {
      CNNOPS_UNROLL
      for (int j = 0; j < 4; ++j) {
        use(row + 8 * i, column + 8 * j, sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }

 private:
  __device__ static uint32_t operand(uint32_t bits) {
    if constexpr (std::is_same_v<S, float>) return to_tf32(cnnops::same_bits<float>(bits)).bits;
    return bits;
  }
};

}  // namespace cnnops::cuda
