// What the convolution kernels share: how a pass sees the tensors, and the split of the weight gradient's sum.
#pragma once

#include <utility>

#include "device.h"

namespace cnnops::cuda {

template <class S>
using Conv2dRow = Conv2dAlgorithm<Conv2dRun<S>>;

inline int64_t no_workspace(const Conv2dGeometry&) { return 0; }

/// What can do with an epilogue, without one.
template <class S, decltype(Conv2dRun<S>::fused) kFused>
void no_epilogue(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  kFused(g, o, Epilogue<S>{}, workspace, stream);
}

/// Forward and the gradient of the input are the same sum over channels and taps, with x and gy, c and k exchanged. In
/// each group, `produce` channels come out and `reduce` channels are summed over; neighbours of the weights along
/// either, and along the kernel, are `weight_...` apart.
struct Channels {
  int groups, produce, reduce;
  int weight_produce, weight_reduce, weight_h, weight_w;
  int64_t weight_group;

  CNNOPS_HOST_DEVICE Channels(const Conv2dGeometry& g, Pass pass) : groups(static_cast<int>(g.groups)) {
    const int c = static_cast<int>(g.c / g.groups), k = static_cast<int>(g.k / g.groups);
    const Strides<int> weight(g.layout, c, g.kernel[0], g.kernel[1]);
    const bool forward = pass != Pass::grad_input;  // which channels the gradient of the weights sees
    produce = forward ? k : c;
    reduce = forward ? c : k;
    weight_produce = forward ? static_cast<int>(weight.n) : weight.c;
    weight_reduce = forward ? weight.c : static_cast<int>(weight.n);
    weight_h = weight.h;
    weight_w = weight.w;
    weight_group = k * weight.n;
  }
};

/// pixel_at() in few instructions, since it is linear before and after the image. Tiles overhang the padding, so -1
/// also where there is no pixel that far out.
struct Beyond {
  int slope, before, after;

  Beyond(Border border, int64_t size)
      : slope(static_cast<int>(pixel_at(-1, size, border) - pixel_at(-2, size, border))),
        before(static_cast<int>(pixel_at(-1, size, border)) + slope),
        after(static_cast<int>(pixel_at(size, size, border) - slope * size)) {}

  __device__ int pixel(int i, int size) const {
    const int shown = i < 0 ? before + slope * i : i >= size ? after + slope * i : i;
    return 0 <= shown && shown < size ? shown : -1;
  }
};

/// What a pass reads and writes besides the weights: forward x and y, for the gradient of the input gy and gx. The
/// gradient of the weights sees them as forward does. `h` and `w` say what is beyond x. An output pixel is of `side` x
/// `side` results.
struct Tensors {
  Strides<int> x, y;
  Beyond h, w;

  Tensors(const Conv2dGeometry& g, Pass pass, int side = 1)
      : x(g.layout, g.c, g.in[0], g.in[1]),
        y(g.layout, g.k, g.out[0] / side, g.out[1] / side),
        h(g.border, g.in[0]),
        w(g.border, g.in[1]) {
    if (pass == Pass::grad_input) std::swap(x, y);
  }
};

/// An Axis in 32 bits, for geometries that small() accepts.
struct SmallAxis {
  int count, first, step, taps, k0, k_step, in_size, in_step, offset0, offset_step;

  CNNOPS_HOST_DEVICE explicit SmallAxis(const Axis& a)
      : count(static_cast<int>(a.count)),
        first(static_cast<int>(a.first)),
        step(static_cast<int>(a.step)),
        taps(static_cast<int>(a.taps)),
        k0(static_cast<int>(a.k0)),
        k_step(static_cast<int>(a.k_step)),
        in_size(static_cast<int>(a.in_size)),
        in_step(static_cast<int>(a.in_step)),
        offset0(static_cast<int>(a.offset0)),
        offset_step(static_cast<int>(a.offset_step)) {}
};

inline int64_t weight_count(const Conv2dGeometry& g) { return g.k * (g.c / g.groups) * g.kernel[0] * g.kernel[1]; }

/// Whether positions along an axis, and offsets within one image or the weights, fit 32 bits. The batch may be any.
inline bool small(const Conv2dGeometry& g) {
  int64_t reach[2];  // from a window's first tap to its last
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t longest = larger(larger(larger(g.in[dim], g.out[dim]), larger(g.stride[dim], g.padding[dim])),
                                   larger(g.kernel[dim], g.dilation[dim]));
    if (longest >= 1 << 24) return false;
    reach[dim] = (g.kernel[dim] - 1) * g.dilation[dim];
  }
  const int64_t x = ((g.in[0] + reach[0]) * g.in[1] + reach[1] + 1) * g.c;
  const int64_t y = ((g.out[0] + reach[0]) * g.out[1] + reach[1] + 1) * g.k;
  return larger(weight_count(g), larger(x, y)) < int64_t{1} << 31;
}

/// The weight gradient sums over the whole batch, and has few elements to share among the GPU's processors: so its sum
/// is split into parts, each a block's, added up in order afterwards. The number of parts follows from the number of
/// blocks that the weights make alone, never from the batch, which bounds the workspace as well.
struct Parts {
  int64_t count, weights;

  Parts(int64_t blocks, int64_t weights) : count(blocks > 0 ? larger<int64_t>(1, 512 / blocks) : 1), weights(weights) {}

  int64_t workspace() const { return count > 1 ? count * weights : 0; }

  /// The sum of one part for a weight goes to the workspace, for add_up(); if there is but one part it is the result.
  template <class S>
  __device__ void put(int64_t part, int64_t weight, Sum<S> sum, Sum<S>* workspace, S* gw) const {
    if (count > 1) {
      workspace[part * weights + weight] = sum;
    } else {
      gw[weight] = rounded<S>(sum);
    }
  }
};

constexpr int kSumThreads = 512;

/// How many threads share the parts of a weight: many parts are few weights, whose threads alone would wait for long.
inline int sum_rows(int64_t parts) {
  int rows = 16;
  while (rows > 1 && parts < 4 * rows) rows /= 2;
  return rows;
}

/// Of `rows` threads each adds up every so many parts, in order; and the first of them those sums, in order.
template <class S>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(Parts parts, const Sum<S>* sums, int rows, int64_t blocks, S* gw) {
  Sum<S>* shared = shared_memory<Sum<S>>();
  const int width = kSumThreads / rows, column = static_cast<int>(threadIdx.x) % width;
  const int row = static_cast<int>(threadIdx.x) / width;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t weight = block * width + column;
    const bool exists = weight < parts.weights;
    Sum<S> sum = 0;
    for (int64_t part = row; part < parts.count && exists; part += rows) sum += sums[part * parts.weights + weight];
    shared[threadIdx.x] = sum;
    sync_block();
    if (row == 0 && exists) {
      for (int other = 1; other < rows; ++other) sum += shared[other * width + column];
      gw[weight] = rounded<S>(sum);
    }
    sync_block();
  }
}

/// Adds up what put() left in the workspace, if anything.
template <class S>
void add_up(const char* name, const Parts& parts, const Sum<S>* workspace, S* gw, Stream stream) {
  if (parts.count == 1) return;
  const int rows = sum_rows(parts.count);
  const int64_t blocks = ceil_div(parts.weights, kSumThreads / rows);
  launch(name, sum_parts_kernel<S>, blocks, kSumThreads, kSumThreads * sizeof(Sum<S>), stream, parts, workspace, rows,
         blocks, gw);
}

}  // namespace cnnops::cuda
