// A block's tile of a matrix product: c[row][column] += sum over steps of a[row][step] * b[step][column].
//
// The steps come in slices of 64 bytes, kSlice. Those of `a` lie in shared memory as rows of 4 vectors of 16 bytes;
// those of `b` likewise, with a row per column, if the steps are neighbours in memory, or else (16-bit numbers on
// tensor cores only) with a row per step, and ldmatrix transposes them. Vectors of neighbouring rows are shuffled
// (Rows), so that the 8 that are read at once lie in different banks. While a slice is multiplied, the next ones are on
// their way (copy_async.h).
//
// How numbers are multiplied is the tile's Math; sums are float32.
#pragma once

#include "copy_async.h"
#include "matrix.h"

namespace cnnops::cuda {

enum class Math {
  tensor,  // tensor cores; of float32 what TF32 keeps: 10 bits of mantissa, to the nearest
  split,   // float32 as the sum of a big and a small TF32: three products, exact to about 2^-22. Infinity gives NaN
  plain,   // multiply-adds, without tensor cores
};

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

  /// Brings the vectors from where from(row, first) says, `first` being the number in its row of a vector's first
  /// element; of its elements only `limit - first`, and none if `from` is nullptr.
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

struct Nothing {
  template <class... Anything>
  __device__ void operator()(const Anything&...) const {}
};

/// kWarpRows x kWarpColumns warps, each with kHeight x kWidth of the results in its registers.
template <class S_, int kWarpRows, int kWarpColumns, bool kStepsFirst, Math kMath = Math::tensor, int kHeight = 32,
          int kWidth = 32>
struct GemmTile {
  using S = S_;
  static_assert(kStepsFirst || (sizeof(S) == 2 && kMath == Math::tensor),
                "ldmatrix transposes 16-bit numbers only, and for tensor cores");
  static_assert(kMath != Math::split || std::is_same_v<S, float>);
  static constexpr int kThreads = kWarpRows * kWarpColumns * kWarp;
  static constexpr int kRows = kWarpRows * kHeight, kColumns = kWarpColumns * kWidth;
  static constexpr int kApart = 8;  // a lane's rows
  using A = Rows<S, kRows, 4>;
  using B = std::conditional_t<kStepsFirst, Rows<S, kColumns, 4>, Rows<S, kSlice<S>, kColumns / Vector<S>::size>>;

  /// Whether this tile's Math is for the GPUs that code is being made for: other kernels would be dead weight.
  static constexpr bool kMade = kMath == Math::plain ? kNoTensorCores : kTensorCores || std::is_same_v<S, Float16>;

  struct Slice {
    A a;
    B b;
  };

  float sum[kHeight / 16][kWidth / 8][4] = {};  // of 16 rows, of 8 columns, and what mma() gives a lane

  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp / kWarpColumns * kHeight; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / kWarp % kWarpColumns * kWidth; }

  __device__ void multiply(const Slice& slice) {
    if constexpr (kMath == Math::plain) {
      multiply_plain(slice);
    } else {
      multiply_tensor(slice);
    }
  }

  /// Adds the products of `count` slices. start(stage, number) starts the copies of one, and keeps in registers what
  /// cp.async cannot bring; finish(stage) writes that to shared memory. prepare(number) comes before, a barrier
  /// between.
  template <int kStages, class Start, class Finish = Nothing, class Prepare = Nothing>
  __device__ void multiply(Slice (&stages)[kStages], int64_t count, const Start& start, const Finish& finish = {},
                           const Prepare& prepare = {}) {
    if (count > 0) prepare(int64_t{0});
    int stage = 1, next_stage = 0;
    CNNOPS_NO_UNROLL
    for (int64_t next = 0; next - (kStages - 1) < count; ++next) {
      const bool filled = next >= kStages - 1;
      if (filled) wait_copies<kStages - 2>();
      sync_block();  // the slice is there, and all have done with the one before, whose place the next one gets
      if (next < count) start(stages[next_stage], next);
      commit_copies();
      if (next + 1 < count) prepare(next + 1);
      if (filled) multiply(stages[stage]);
      if (next < count) finish(stages[next_stage]);
      next_stage = stage;
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
    sync_block();
  }

  /// use(row, column, sum, next) for each pair of results: those of a column and the one after it.
  template <class Use>
  __device__ void each(const Use& use) const {
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
    CNNOPS_UNROLL
    for (int i = 0; i < kHeight / 8; ++i) {
      CNNOPS_UNROLL
      for (int j = 0; j < kWidth / 8; ++j) {
        use(row + 8 * i, column + 8 * j, sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }

  /// use(row, column, sums) for each four results of a column that are kApart rows apart, `row` being the first: a lane
  /// has those.
  template <class Use>
  __device__ void each_four(const Use& use) const {
    static_assert(kHeight % 32 == 0);
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
    CNNOPS_UNROLL
    for (int i = 0; i < kHeight / 16; i += 2) {
      CNNOPS_UNROLL
      for (int j = 0; j < kWidth / 8; ++j) {
        CNNOPS_UNROLL
        for (int next = 0; next < 2; ++next) {
          const float four[] = {sum[i][j][next], sum[i][j][2 + next], sum[i + 1][j][next], sum[i + 1][j][2 + next]};
          use(row + 16 * i, column + 8 * j + next, four);
        }
      }
    }
  }

 private:
  /// A slice's vectors are two operands of mma() one after the other, 32 bytes of steps each.
  __device__ void multiply_tensor(const Slice& slice) {
    constexpr int kSplit = kMath == Math::split ? 2 : 1;
    const int matrix = lane() / 8, row = lane() % 8;  // of which this lane says where it is
    uint32_t b[kSplit][2][kWidth / 8][2];
    CNNOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      CNNOPS_UNROLL
      for (int j = 0; j < kWidth / 8; j += 2) {
        const int column = warp_column() + 8 * j + 8 * (matrix / 2), vector = 2 * half + matrix % 2;
        uint32_t bits[4];  // of two times 8 columns
        if constexpr (kStepsFirst) {
          load_matrix<4>(bits, slice.b.at(column + row, vector));
        } else {
          load_matrix<4, true>(bits, slice.b.at(8 * vector + row, column / 8));
        }
        CNNOPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          for (int part = 0; part < kSplit; ++part) b[part][half][j + r / 2][r % 2] = operand(bits[r], part);
        }
      }
    }
    CNNOPS_UNROLL
    for (int i = 0; i < kHeight / 16; ++i) {
      float parts[kWidth / 8][4] = {};
      CNNOPS_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t bits[4], a[kSplit][4];
        load_matrix<4>(bits, slice.a.at(warp_row() + 16 * i + 8 * (matrix % 2) + row, 2 * half + matrix / 2));
        CNNOPS_UNROLL
        for (int r = 0; r < 4; ++r) {
          for (int part = 0; part < kSplit; ++part) a[part][r] = operand(bits[r], part);
        }
        if constexpr (kMath == Math::split) {  // the small products first
          CNNOPS_UNROLL
          for (int j = 0; j < kWidth / 8; ++j) mma<Tf32>(parts[j], a[1], b[0][half][j]);
          CNNOPS_UNROLL
          for (int j = 0; j < kWidth / 8; ++j) mma<Tf32>(parts[j], a[0], b[1][half][j]);
          CNNOPS_UNROLL
          for (int j = 0; j < kWidth / 8; ++j) mma<Tf32>(parts[j], a[0], b[0][half][j]);
        } else {
          CNNOPS_UNROLL
          for (int j = 0; j < kWidth / 8; ++j) mma<MmaType<S>>(sum[i][j], a[0], b[0][half][j]);
        }
      }
      if constexpr (kMath ==
                    Math::split) {  // tensor cores cut sums off, additions round them: so few stay in the former
        CNNOPS_UNROLL
        for (int j = 0; j < kWidth / 8; ++j) {
          CNNOPS_UNROLL
          for (int r = 0; r < 4; ++r) sum[i][j][r] += parts[j][r];
        }
      }
    }
  }

  /// Each lane for those results that mma() would give it.
  __device__ void multiply_plain(const Slice& slice) {
    constexpr int kSize = Vector<S>::size;
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
    CNNOPS_NO_UNROLL
    for (int vector = 0; vector < 4; ++vector) {
      Vector<S> a[kHeight / 8], b[kWidth / 4];
      CNNOPS_UNROLL
      for (int i = 0; i < kHeight / 8; ++i) load<kSize>(a[i].lane, slice.a.at(row + 8 * i, vector));
      CNNOPS_UNROLL
      for (int j = 0; j < kWidth / 4; ++j) load<kSize>(b[j].lane, slice.b.at(column + j / 2 * 8 + j % 2, vector));
      CNNOPS_UNROLL
      for (int step = 0; step < kSize; ++step) {
        CNNOPS_UNROLL
        for (int i = 0; i < kHeight / 8; ++i) {
          CNNOPS_UNROLL
          for (int j = 0; j < kWidth / 4; ++j) {
            sum[i / 2][j / 2][i % 2 * 2 + j % 2] += value(a[i].lane[step]) * value(b[j].lane[step]);
          }
        }
      }
    }
  }

  /// A register as tensor cores take it: the number, or the big part of it (0), or what that leaves over (1).
  __device__ static uint32_t operand(uint32_t bits, int part) {
    if constexpr (std::is_same_v<S, float>) {
      const float x = cnnops::same_bits<float>(bits);
      const uint32_t big = to_tf32(x).bits & ~0x1fffu;
      return part == 0 ? big : to_tf32(x - cnnops::same_bits<float>(big)).bits;
    }
    return bits;
  }
};

}  // namespace cnnops::cuda
