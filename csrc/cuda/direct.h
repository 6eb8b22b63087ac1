// What the kernels of direct convolution share: the tile of the input that a block stages in shared memory.
#pragma once

#include "conv2d.h"
#include "warp.h"

namespace cnnops::cuda {

constexpr int kDirectThreads = 128;  // at most; small images take fewer

/// Blocks that should fit a processor together, by their registers: as many as spill none.
template <class T, int kProduce>
constexpr int kDirectBlocks = sizeof(T) * kProduce == 64 ? 3 : 4;

/// `count` in the fewest pieces of at most `most`, all of nearly one size: that size.
inline int64_t even_tile(int64_t count, int64_t most) { return count > 0 ? ceil_div(count, ceil_div(count, most)) : 1; }

/// Copies a tile's inputs to shared memory, as [channel][row][column]: `depth` channels of an image of in_h x in_w, the
/// first of which is at `from`. Neighbouring threads read neighbours in memory.
template <class S>
__device__ inline void stage(const S* from, const Tensors& tensors, int in_h, int in_w, int depth, int h0, int w0,
                             const int (&extent)[2], Sum<S>* inputs) {
  const Strides<int>& x = tensors.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int together = x.c == 1 ? depth : 1;  // channels that lie side by side
  for (int row = warp; row < depth / together * extent[0]; row += warps) {
    const int c0 = row / extent[0], row_of_channel = row % extent[0];
    const int h = tensors.h.pixel(h0 + row_of_channel, in_h);
    for (int i = lane; i < extent[1] * together; i += kWarp) {
      const int column = together == 1 ? i : i / together, c = c0 + i - column * together;
      const int w = tensors.w.pixel(w0 + column, in_w);
      inputs[(c * extent[0] + row_of_channel) * extent[1] + column] =
          h >= 0 && w >= 0 ? value(from[c * x.c + h * x.h + w * x.w]) : Sum<S>(0);
    }
  }
}

/// The gradient of the weights: conv2d_direct_weight.cu. `number_bytes` are those of a Sum.
int64_t direct_weight_shared_bytes(const Conv2dGeometry&, std::size_t number_bytes);
template <class S>
int64_t direct_weight_workspace(const Conv2dGeometry&);
template <class S>
void direct_weight(const Conv2dGeometry&, const Conv2dOperands<S>&, Sum<S>* workspace, Stream);

}  // namespace cnnops::cuda
