// What the convolution kernels share: how a pass sees the tensors, and the split of the weight gradient's sum.
#pragma once

#include "device.h"

namespace cnnops::cuda {

template <class T>
using Conv2dRow = Conv2dAlgorithm<Conv2dRun<T>>;

/// Forward and the gradient of the input are the same sum over channels and taps, with x and gy, c and k exchanged. In
/// each group, `produce` channels come out and `reduce` channels are summed over; the weights between two neighbours of
/// either kind are `weight_produce` and `weight_reduce` apart.
struct Channels {
  int groups, produce, reduce;
  int weight_produce, weight_reduce;
  int64_t weight_group;

  CNNOPS_HOST_DEVICE Channels(const Conv2dGeometry& g, Pass pass) : groups(static_cast<int>(g.groups)) {
    const int c = static_cast<int>(g.c / g.groups), k = static_cast<int>(g.k / g.groups);
    const int taps = static_cast<int>(g.kernel[0] * g.kernel[1]);
    const bool forward = pass != Pass::grad_input;  // which channels the gradient of the weights sees
    produce = forward ? k : c;
    reduce = forward ? c : k;
    weight_produce = forward ? c * taps : taps;
    weight_reduce = forward ? taps : c * taps;
    weight_group = static_cast<int64_t>(k) * c * taps;
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

/// Classes of outputs along an axis that have any; class 0 has the most.
CNNOPS_HOST_DEVICE inline int64_t classes_of(const Conv2dGeometry& g, Pass pass, int dim) {
  return pass == Pass::forward ? 1 : smaller(g.stride[dim], g.in[dim]);
}

/// Whether positions along an axis, and offsets within one image or the weights, fit 32 bits. The batch may be any.
inline bool small(const Conv2dGeometry& g) {
  int64_t reach[2];  // from a window's first tap to its last
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t longest = larger(larger(larger(g.in[dim], g.out[dim]), larger(g.stride[dim], g.padding[dim])),
                                   larger(g.kernel[dim], g.dilation[dim]));
    if (longest >= 1 << 24) return false;
    reach[dim] = (g.kernel[dim] - 1) * g.dilation[dim];
  }
  const int64_t weights = g.k * (g.c / g.groups) * g.kernel[0] * g.kernel[1];
  const int64_t x = (g.c * g.in[0] + reach[0]) * g.in[1] + reach[1];
  const int64_t y = (g.k * g.out[0] + reach[0]) * g.out[1] + reach[1];
  return larger(weights, larger(x, y)) < int64_t{1} << 31;
}

/// The weight gradient sums over the whole batch, and has few elements to share among the GPU's processors: so its sum
/// is split into parts, each a block's, added up in order afterwards. The number of parts follows from the number of
/// blocks that the weights make alone, never from the batch, which bounds the workspace as well.
inline int64_t parts_for(int64_t blocks) { return blocks > 0 ? larger<int64_t>(1, 512 / blocks) : 1; }

template <class T>
__global__ void add_parts(const T* parts, int64_t count, int64_t size, T* sums) {
  for (int64_t i : Items(size)) {
    T sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * size + i];
    sums[i] = sum;
  }
}

}  // namespace cnnops::cuda
