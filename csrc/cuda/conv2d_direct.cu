// Direct convolution, for layers with few channels: the first layers of a network, MNIST's, depthwise ones.
//
// A block computes a tile of outputs: a rectangle of one image, for a few output channels (8; 4 or 1 where a group has
// no more). A tile of the input, border included, and the weights that meet it are staged in shared memory, some
// channels at a time; then every thread walks channels and taps with 4 outputs x 8 channels of sums in registers, so
// that 4 inputs and 8 weights read from shared memory make 32 products. The reference reads two numbers from memory per
// product.
//
// Forward and the gradient of the input are one kernel: an Axis (correlation.h) says where a tile's inputs lie and
// which taps count. Strided gradients fall apart into classes of outputs that share their taps; a tile is of one class.
//
// The gradient of the weights is another kernel: conv2d_direct_weight.cu.
//
// Tensors are read and written by their strides, so both layouts are taken; what is staged comes in the order of
// memory. 16-bit numbers are widened as they are staged. Every border is staged as what it shows.
//
// Refused: many channels on both sides, where matrix tiles (im2col) reuse both operands better; tiles that do not fit
// shared memory. An infinite weight at a tap that falls on padding gives NaN, as inf * 0 does.
#include <numeric>

#include "direct.h"
#include "epilogue.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kPixels = 4;  // outputs per thread and channel
constexpr int kFew = 32;
constexpr int64_t kStaged = 16 * 1024;  // bytes that a block likes to stage at once, so that several fit a processor

/// How many output channels a thread holds.
int produced_at_once(int produce) { return produce == 1 ? 1 : produce <= 4 ? 4 : 8; }

struct Plan {
  int side;                                      // of a window of outputs: 2 if they are pooled, else 1
  int tile[2], tiles[2], extent[2], classes[2];  // outputs per tile, tiles per class, inputs per tile
  int chunk, produce_blocks;                     // channels staged at once, blocks of output channels in a group
  int weights_at;                                // where they begin in shared memory
  int threads;
  int64_t blocks, shared_bytes;
};

template <class T>
Plan plan_correlation(const Conv2dGeometry& g, Pass pass, int side = 1) {
  const Channels channels(g, pass);
  const int produce = produced_at_once(channels.produce);
  Plan plan{};
  plan.side = side;
  int64_t count[2], taps = 1, tiles = 1;
  for (int dim = 0; dim < 2; ++dim) count[dim] = make_axis(g, pass, dim, 0).count / side * side;
  // Pooling's tiles are not larger than others, or refuses() would have to know of it.
  const int64_t tile_w = even_tile(count[1], 64) / side * side;
  const int64_t tile[2] = {even_tile(count[0], kDirectThreads * kPixels / tile_w) / side * side, tile_w};
  for (int dim = 0; dim < 2; ++dim) {
    const int64_t apart = pass == Pass::forward ? 1 : std::gcd(g.stride[dim], g.dilation[dim]);
    const int64_t taps_here = pass == Pass::forward ? g.kernel[dim] : ceil_div(g.kernel[dim], g.stride[dim] / apart);
    const int64_t in_step = pass == Pass::forward ? g.stride[dim] : 1;
    plan.tile[dim] = static_cast<int>(tile[dim]);
    plan.tiles[dim] = static_cast<int>(ceil_div(count[dim], tile[dim]));
    plan.extent[dim] = static_cast<int>((tile[dim] - 1) * in_step + (taps_here - 1) * (g.dilation[dim] / apart) + 1);
    plan.classes[dim] = static_cast<int>(axis_classes(g, pass, dim));
    taps *= taps_here;
    tiles *= static_cast<int64_t>(plan.tiles[dim]) * plan.classes[dim];
  }
  const int64_t inputs = static_cast<int64_t>(plan.extent[0]) * plan.extent[1];
  const int64_t channel_bytes = (inputs + taps * produce) * sizeof(T);
  const int64_t chunk = smaller<int64_t>(larger<int64_t>(kStaged / channel_bytes, 1), channels.reduce);
  const int64_t weights_at = ceil_div(chunk * inputs, Vector<T>::size) * Vector<T>::size;
  plan.chunk = static_cast<int>(chunk);
  plan.weights_at = static_cast<int>(weights_at);
  plan.produce_blocks = static_cast<int>(ceil_div(channels.produce, produce));
  plan.threads = static_cast<int>(ceil_div(ceil_div(tile[0] * tile[1], kPixels), kWarp) * kWarp);
  plan.blocks = g.n * channels.groups * tiles * plan.produce_blocks;
  plan.shared_bytes = (weights_at + chunk * taps * produce) * static_cast<int64_t>(sizeof(T));
  return plan;
}

template <class S, int kProduce>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks<Sum<S>, kProduce>)
    correlate_kernel(Conv2dGeometry g, Pass pass, Plan plan, Tensors tensors, Conv2dOperands<S> o,
                     Epilogue<S> epilogue) {
  using T = Sum<S>;
  const Channels channels(g, pass);
  T* inputs = shared_memory<T>();
  T* weights = inputs + plan.weights_at;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    Digits digits(block);
    const int produce0 = static_cast<int>(digits.next(plan.produce_blocks)) * kProduce;
    // Blocks that run together should read neighbours in memory: other groups' channels, or the rest of the plane.
    int group = tensors.x.c == 1 ? static_cast<int>(digits.next(channels.groups)) : 0;
    const int ow0 = static_cast<int>(digits.next(plan.tiles[1])) * plan.tile[1];
    const int oh0 = static_cast<int>(digits.next(plan.tiles[0])) * plan.tile[0];
    const SmallAxis axis_w(make_axis(g, pass, 1, digits.next(plan.classes[1])));
    const SmallAxis axis_h(make_axis(g, pass, 0, digits.next(plan.classes[0])));
    if (tensors.x.c != 1) group = static_cast<int>(digits.next(channels.groups));
    const int64_t n = digits.rest();
    const int taps = axis_h.taps * axis_w.taps;

    // Tap 0 is the last in the tile where offsets decrease, as they do for the gradient.
    const int first_h = axis_h.offset_step < 0 ? -(axis_h.taps - 1) * axis_h.offset_step : 0;
    const int first_w = axis_w.offset_step < 0 ? -(axis_w.taps - 1) * axis_w.offset_step : 0;
    const int h0 = oh0 * axis_h.in_step + axis_h.offset0 - first_h;
    const int w0 = ow0 * axis_w.in_step + axis_w.offset0 - first_w;
    // Windows' pixels are a thread's that are above each other, and neighbouring threads' that are beside each other.
    const auto row_of = [&](int p) {
      const int pixel = threadIdx.x + p / plan.side * blockDim.x;
      return pixel / plan.tile[1] * plan.side + p % plan.side;
    };
    const auto column_of = [&](int p) -> int { return (threadIdx.x + p / plan.side * blockDim.x) % plan.tile[1]; };
    int first_of[kPixels];  // the input that a pixel sees through tap 0
    for (int p = 0; p < kPixels; ++p) {
      const int row = row_of(p), at = row * axis_h.in_step * plan.extent[1] + column_of(p) * axis_w.in_step;
      first_of[p] = first_h * plan.extent[1] + first_w + (row < plan.tile[0] ? at : 0);
    }

    const S* from = o.a + n * tensors.x.n + group * channels.reduce * tensors.x.c;
    const S* from_weights =
        o.b + group * channels.weight_group + static_cast<int64_t>(produce0) * channels.weight_produce;
    T sum[kPixels][kProduce] = {};
    for (int c0 = 0; taps > 0 && c0 < channels.reduce; c0 += plan.chunk) {
      const int depth = smaller(plan.chunk, channels.reduce - c0);
      sync_block();
      stage(from + c0 * tensors.x.c, tensors, axis_h.in_size, axis_w.in_size, depth, h0, w0, plan.extent, inputs);
      for (int i = threadIdx.x; i < kProduce * depth * taps; i += blockDim.x) {
        const int produce = i / (depth * taps), at = i % (depth * taps);
        const int c = at / taps, kh = at % taps / axis_w.taps, kw = at % axis_w.taps;
        const int tap =
            (axis_h.k0 + kh * axis_h.k_step) * channels.weight_h + (axis_w.k0 + kw * axis_w.k_step) * channels.weight_w;
        const int from_weight = produce * channels.weight_produce + (c0 + c) * channels.weight_reduce + tap;
        const bool exists = produce0 + produce < channels.produce;
        weights[at * kProduce + produce] = exists ? value(from_weights[from_weight]) : T(0);
      }
      sync_block();

      const T* weight = weights;
      for (int c = 0; c < depth; ++c) {
        for (int kh = 0; kh < axis_h.taps; ++kh) {
          const T* x = inputs + (c * plan.extent[0] + kh * axis_h.offset_step) * plan.extent[1];
          for (int kw = 0; kw < axis_w.taps; ++kw, x += axis_w.offset_step, weight += kProduce) {
            T held[kProduce];
            load<kProduce>(held, weight);
            for (int p = 0; p < kPixels; ++p) {
              const T value = x[first_of[p]];
              for (int k = 0; k < kProduce; ++k) sum[p][k] += value * held[k];
            }
          }
        }
      }
    }

    const int out_channel0 = group * channels.produce + produce0;
    const int64_t out = n * tensors.y.n + out_channel0 * tensors.y.c;
    const auto bias_of = [&](int k) { return o.bias ? value(o.bias[out_channel0 + k]) : T(0); };
    if (plan.side == 2) {  // of two neighbouring threads each pools one of their two windows
      const bool right = threadIdx.x % 2;
      const int row = row_of(right ? 2 : 0), column = column_of(right ? 2 : 0) / 2 * 2;
      const bool exists = row < plan.tile[0] && oh0 + row + 1 < axis_h.count && ow0 + column + 1 < axis_w.count;
      const int64_t place = out + (oh0 + row) / 2 * tensors.y.h + (ow0 + column) / 2 * tensors.y.w;
      CNNOPS_UNROLL
      for (int k = 0; k < kProduce; ++k) {
        const bool produced = exists && produce0 + k < channels.produce;
        const T bias = produced ? bias_of(k) : T(0);
        T window[4];
        exchange_columns({sum[0][k], sum[1][k], sum[2][k], sum[3][k]}, window);
        for (T& here : window) here = value(finished(here + bias, epilogue));
        const int64_t at = place + k * tensors.y.c;
        if (produced) pool(window, o.out + at, epilogue.positions + at);
      }
      continue;
    }
    CNNOPS_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      const int row = row_of(p), column = column_of(p);
      if (row >= plan.tile[0] || oh0 + row >= axis_h.count || ow0 + column >= axis_w.count) continue;
      S* place = o.out + out + (axis_h.first + (oh0 + row) * axis_h.step) * tensors.y.h +
                 (axis_w.first + (ow0 + column) * axis_w.step) * tensors.y.w;
      CNNOPS_UNROLL
      for (int k = 0; k < kProduce; ++k) {
        if (produce0 + k >= channels.produce) break;
        place[k * tensors.y.c] = finished(sum[p][k] + bias_of(k), epilogue);
      }
    }
  }
}

template <class S, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, const Epilogue<S>& epilogue, Sum<S>*,
               Stream stream) {
  const Plan plan = plan_correlation<Sum<S>>(g, kPass, epilogue.positions ? 2 : 1);
  const auto start = [&](auto kernel) {
    launch(kPass == Pass::forward ? "conv2d_direct forward" : "conv2d_direct grad_input", kernel, plan.blocks,
           plan.threads, plan.shared_bytes, stream, g, kPass, plan, Tensors(g, kPass, plan.side), o, epilogue);
  };
  switch (produced_at_once(Channels(g, kPass).produce)) {
    case 1:
      return start(correlate_kernel<S, 1>);
    case 4:
      return start(correlate_kernel<S, 4>);
    default:
      return start(correlate_kernel<S, 8>);
  }
}

template <class T>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (!small(g)) return "the direct algorithm counts within an image in 32 bits, and this image or kernel is larger";
  const Channels channels(g, pass);
  const int64_t taps = g.kernel[0] * g.kernel[1];
  if (channels.produce > kFew && channels.reduce * taps > kFew) {
    return "the direct algorithm is for few channels: here each group has more than 32 output channels, and more than "
           "32 products per output";
  }
  const int64_t shared_bytes =
      pass == Pass::grad_weight ? direct_weight_shared_bytes(g, sizeof(T)) : plan_correlation<T>(g, pass).shared_bytes;
  if (shared_bytes > kSharedMemory) {
    return "the direct algorithm stages a tile of the input in 48 KiB of shared memory, and with this kernel size, "
           "stride and dilation the smallest does not fit";
  }
  return nullptr;
}

}  // namespace

template <class S>
Conv2dRow<S> conv2d_direct() {
  return {"direct",
          "input tiles in shared memory, register tiles of 4 outputs x 8 channels; few channels",
          refuses<Sum<S>>,
          {no_workspace, no_epilogue<S, correlate<S, Pass::forward>>, correlate<S, Pass::forward>},
          {no_workspace, no_epilogue<S, correlate<S, Pass::grad_input>>},
          {direct_weight_workspace<S>, direct_weight<S>}};
}

template Conv2dRow<float> conv2d_direct();
template Conv2dRow<double> conv2d_direct();
template Conv2dRow<BFloat16> conv2d_direct();
template Conv2dRow<Float16> conv2d_direct();

}  // namespace cnnops::cuda
