// The gradient of the weights by direct convolution.
//
//   gw[k,c,kh,kw] = sum over n, oh, ow of gy[n,k,oh,ow] * x[n,c, oh*stride - padding + kh*dilation, ...]
//
// A lane has a weight (c, kh, kw), and 8 output channels of it in registers. A tile of gy and of the input that it
// meets are staged in shared memory; the warps of a block share out the rows of the tile, so that all lanes of one read
// the same 8 numbers of gy, and each its own input. A block sums over the tiles of its part of the batch (Parts).
#include "direct.h"

namespace cnnops::cuda {
namespace {

int produced_at_once(const Conv2dGeometry& g) { return g.k == g.groups ? 1 : 8; }

struct WeightPlan {
  int channels;  // that the weights of one warp's lanes touch
  int produce_blocks, column_blocks;
  Parts parts;
  int64_t blocks, shared_bytes;
  int tile[2], tiles[2], extent[2];  // outputs per tile, tiles per image, inputs per tile

  WeightPlan(const Conv2dGeometry& g, std::size_t number_bytes)
      : channels(static_cast<int>(smaller(g.c / g.groups, (kWarp - 2 + taps(g)) / taps(g) + 1))),
        produce_blocks(static_cast<int>(ceil_div(g.k / g.groups, produced_at_once(g)))),
        column_blocks(static_cast<int>(ceil_div(g.c / g.groups * taps(g), kWarp))),
        parts(g.groups * produce_blocks * column_blocks, weight_count(g)),
        blocks(parts.count * g.groups * produce_blocks * column_blocks) {
    const int64_t sums = kDirectThreads * produced_at_once(g);
    for (int widest = 32; widest >= 4; widest /= 2) {
      tile[0] = static_cast<int>(even_tile(g.out[0], 8));
      tile[1] = static_cast<int>(even_tile(g.out[1], widest));
      int64_t inputs = channels;
      for (int dim = 0; dim < 2; ++dim) {
        const int64_t inputs_here = (tile[dim] - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1;
        tiles[dim] = static_cast<int>(ceil_div(g.out[dim], tile[dim]));
        extent[dim] = static_cast<int>(inputs_here);
        inputs *= inputs_here;
      }
      const int64_t staged = int64_t{tile[0]} * tile[1] * produced_at_once(g) + inputs;
      shared_bytes = larger(staged, sums) * static_cast<int64_t>(number_bytes);
      if (shared_bytes <= kSharedMemory) break;
    }
  }

 private:
  static int64_t taps(const Conv2dGeometry& g) { return g.kernel[0] * g.kernel[1]; }
};

/// Weights are numbered (k, c, kh, kw) here, wherever they lie in memory, so that a warp sees few channels.
template <class S, int kProduce>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks<Sum<S>, kProduce>)
    grad_weight_kernel(Conv2dGeometry g, WeightPlan plan, Tensors tensors, Conv2dOperands<S> o, Sum<S>* workspace) {
  using T = Sum<S>;
  const Channels channels(g, Pass::forward);
  const int out_h = static_cast<int>(g.out[0]), out_w = static_cast<int>(g.out[1]);
  const int in_h = static_cast<int>(g.in[0]), in_w = static_cast<int>(g.in[1]);
  const int taps = static_cast<int>(g.kernel[0] * g.kernel[1]), columns = channels.reduce * taps;
  T* gy = shared_memory<T>();
  T* x = gy + plan.tile[0] * plan.tile[1] * kProduce;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    Digits digits(block);
    const int produce0 = static_cast<int>(digits.next(plan.produce_blocks)) * kProduce;
    const int column0 = static_cast<int>(digits.next(plan.column_blocks)) * kWarp;
    const int group = static_cast<int>(digits.next(channels.groups));
    const int64_t part = digits.rest();
    const int c0 = column0 / taps, staged = smaller(plan.channels, channels.reduce - c0);
    const int column = column0 + lane, tap = column % taps;
    const int kh = tap / static_cast<int>(g.kernel[1]), kw = tap % static_cast<int>(g.kernel[1]);
    const int stride_w = static_cast<int>(g.stride[1]);
    const int x_at = column < columns ? ((column / taps - c0) * plan.extent[0] + kh * static_cast<int>(g.dilation[0])) *
                                                plan.extent[1] +
                                            kw * static_cast<int>(g.dilation[1])
                                      : 0;
    T total[kProduce] = {};
    const int64_t units = g.n * plan.tiles[0] * plan.tiles[1];
    for (int64_t unit = part; unit < units; unit += plan.parts.count) {
      Digits place(unit);
      const int ow0 = static_cast<int>(place.next(plan.tiles[1])) * plan.tile[1];
      const int oh0 = static_cast<int>(place.next(plan.tiles[0])) * plan.tile[0];
      const int64_t n = place.rest();
      const int rows = smaller(plan.tile[0], out_h - oh0), width = smaller(plan.tile[1], out_w - ow0);
      const S* from_gy = o.a + n * tensors.y.n + (group * channels.produce + produce0) * tensors.y.c;
      sync_block();
      for (int row = warp; row < rows; row += warps) {
        const int k = lane % kProduce;
        for (int i = lane / kProduce; i < width; i += kWarp / kProduce) {
          const bool exists = produce0 + k < channels.produce;
          const int from = k * tensors.y.c + (oh0 + row) * tensors.y.h + (ow0 + i) * tensors.y.w;
          gy[(row * plan.tile[1] + i) * kProduce + k] = exists ? value(from_gy[from]) : T(0);
        }
      }
      const int h0 = oh0 * static_cast<int>(g.stride[0]) - static_cast<int>(g.padding[0]);
      const int w0 = ow0 * stride_w - static_cast<int>(g.padding[1]);
      stage(o.b + n * tensors.x.n + (group * channels.reduce + c0) * tensors.x.c, tensors, in_h, in_w, staged, h0, w0,
            plan.extent, x);
      sync_block();
      T sum[kProduce] = {};  // a sum per tile keeps rounding errors from growing with the batch
      for (int row = warp; row < rows; row += warps) {
        const T* gy_row = gy + row * plan.tile[1] * kProduce;
        const T* x_row = x + x_at + row * static_cast<int>(g.stride[0]) * plan.extent[1];
        for (int i = 0; i < width; ++i) {
          const T value = x_row[i * stride_w];
          T held[kProduce];
          load<kProduce>(held, gy_row + i * kProduce);
          for (int k = 0; k < kProduce; ++k) sum[k] += held[k] * value;
        }
      }
      for (int k = 0; k < kProduce; ++k) total[k] += sum[k];
    }

    T* totals = shared_memory<T>();
    sync_block();
    for (int k = 0; k < kProduce; ++k) totals[(warp * kProduce + k) * kWarp + lane] = total[k];
    sync_block();
    for (int k = warp; k < kProduce && produce0 + k < channels.produce && column < columns; k += warps) {
      T sum = 0;
      for (int other = 0; other < warps; ++other) sum += totals[(other * kProduce + k) * kWarp + lane];
      const int64_t weight = group * channels.weight_group +
                             static_cast<int64_t>(produce0 + k) * channels.weight_produce +
                             column / taps * channels.weight_reduce + kh * channels.weight_h + kw * channels.weight_w;
      plan.parts.put(part, weight, sum, workspace, o.out);
    }
    sync_block();
  }
}

}  // namespace

int64_t direct_weight_shared_bytes(const Conv2dGeometry& g, std::size_t number_bytes) {
  return WeightPlan(g, number_bytes).shared_bytes;
}

template <class S>
int64_t direct_weight_workspace(const Conv2dGeometry& g) {
  return WeightPlan(g, sizeof(Sum<S>)).parts.workspace();
}

template <class S>
void direct_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  const WeightPlan plan(g, sizeof(Sum<S>));
  const auto kernel = produced_at_once(g) == 1 ? grad_weight_kernel<S, 1> : grad_weight_kernel<S, 8>;
  launch("conv2d_direct grad_weight", kernel, plan.blocks, kDirectThreads, plan.shared_bytes, stream, g, plan,
         Tensors(g, Pass::grad_weight), o, workspace);
  add_up("conv2d_direct add_up", plan.parts, workspace, o.out, stream);
}

template int64_t direct_weight_workspace<float>(const Conv2dGeometry&);
template int64_t direct_weight_workspace<double>(const Conv2dGeometry&);
template int64_t direct_weight_workspace<BFloat16>(const Conv2dGeometry&);
template int64_t direct_weight_workspace<Float16>(const Conv2dGeometry&);
template void direct_weight(const Conv2dGeometry&, const Conv2dOperands<float>&, float*, Stream);
template void direct_weight(const Conv2dGeometry&, const Conv2dOperands<double>&, double*, Stream);
template void direct_weight(const Conv2dGeometry&, const Conv2dOperands<BFloat16>&, float*, Stream);
template void direct_weight(const Conv2dGeometry&, const Conv2dOperands<Float16>&, float*, Stream);

}  // namespace cnnops::cuda
