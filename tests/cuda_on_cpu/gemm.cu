// A matrix product that uses all of copy_async.h and matrix.h: the emulation's proof that they fit together.
#include "cuda/gemm_tile.h"
#include "samples.h"

namespace cnnops::cuda {
namespace {

template <class Tile, int kStages>
__global__ void __launch_bounds__(Tile::kThreads)
    gemm_kernel(Gemm g, int64_t row_tiles, int64_t tiles, const typename Tile::S* a, const typename Tile::S* b,
                float* c) {
  using S = typename Tile::S;
  auto& stages = *shared_memory<typename Tile::Slice[kStages]>();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row0 = tile % row_tiles * Tile::kRows, column0 = tile / row_tiles * Tile::kColumns;
    Tile product;
    const int slices = static_cast<int>(ceil_div(g.k, kSlice<S>));
    product.multiply(stages, slices, [&](typename Tile::Slice& slice, int number) {
      const int64_t step0 = static_cast<int64_t>(number) * kSlice<S>;
      const int steps = static_cast<int>(g.k - step0);
      slice.a.template bring<Tile::kThreads>(steps, [&](int row, int step) -> const S* {
        return row0 + row < g.m ? a + (row0 + row) * g.a_row + step0 + step : nullptr;
      });
      if (g.steps_first) {
        slice.b.template bring<Tile::kThreads>(steps, [&](int column, int step) -> const S* {
          return column0 + column < g.n ? b + (column0 + column) * g.b_row + step0 + step : nullptr;
        });
      } else {
        slice.b.template bring<Tile::kThreads>(static_cast<int>(g.n - column0), [&](int step, int column) -> const S* {
          return step < steps ? b + (step0 + step) * g.b_row + column0 + column : nullptr;
        });
      }
    });
    product.each([&](int row, int column, float first, float second) {
      float* out = c + (row0 + row) * g.n + column0 + column;
      if (row0 + row < g.m && column0 + column < g.n) out[0] = first;
      if (row0 + row < g.m && column0 + column + 1 < g.n) out[1] = second;
    });
  }
}

template <class Tile, int kStages>
void start(const Gemm& g, const typename Tile::S* a, const typename Tile::S* b, float* c, Stream stream) {
  const int64_t row_tiles = ceil_div(g.m, Tile::kRows), tiles = row_tiles * ceil_div(g.n, Tile::kColumns);
  launch("gemm", gemm_kernel<Tile, kStages>, tiles, Tile::kThreads, kStages * sizeof(typename Tile::Slice), stream, g,
         row_tiles, tiles, a, b, c);
}

template <class Tile>
void start(const Gemm& g, const typename Tile::S* a, const typename Tile::S* b, float* c, Stream stream) {
  if (g.stages == 2) return start<Tile, 2>(g, a, b, c, stream);
  if (g.stages == 8) return start<Tile, 8>(g, a, b, c, stream);  // 64 KiB of shared memory
  start<Tile, 3>(g, a, b, c, stream);
}

}  // namespace

template <class S>
void gemm(const Gemm& g, const S* a, const S* b, float* c, Stream stream) {
  if (g.steps_first) return start<GemmTile<S, 2, 2, true>>(g, a, b, c, stream);
  if constexpr (sizeof(S) == 2) start<GemmTile<S, 2, 2, false>>(g, a, b, c, stream);
}

template void gemm(const Gemm&, const float*, const float*, float*, Stream);
template void gemm(const Gemm&, const BFloat16*, const BFloat16*, float*, Stream);
template void gemm(const Gemm&, const Float16*, const Float16*, float*, Stream);

}  // namespace cnnops::cuda
