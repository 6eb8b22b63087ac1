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
// The gradient of the weights takes a lane per weight (c, kh, kw) and 8 output channels in each lane's registers. The
// warps of a block share out the rows of a tile, and a block sums over the tiles of its part of the batch (parts_for).
//
// Tensors are read and written by their strides, so both layouts are taken; what is staged comes in the order of memory.
// 16-bit numbers are widened as they are staged. Every border is staged as what it shows.
//
// Refused: many channels on both sides, where matrix tiles (im2col) reuse both operands better; tiles that do not fit
// shared memory. An infinite weight at a tap that falls on padding gives NaN, as inf * 0 does.
#include <numeric>

#include "conv2d.h"
#include "epilogue.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kPixels = 4;     // outputs per thread and channel
constexpr int kThreads = 128;  // at most; small images take fewer
constexpr int kFew = 32;
constexpr int kLanes = 32;
constexpr int64_t kStaged = 16 * 1024;  // bytes that a block likes to stage at once, so that several fit a processor

/// Blocks that should fit a processor together, by their registers: as many as spill none.
template <class T, int kProduce>
constexpr int kBlocks = sizeof(T) * kProduce == 64 ? 3 : 4;

/// How many output channels a thread holds.
int produced_at_once(int produce) { return produce == 1 ? 1 : produce <= 4 ? 4 : 8; }

/// `count` in the fewest pieces of at most `most`, all of nearly one size: that size.
int64_t even_tile(int64_t count, int64_t most) { return count > 0 ? ceil_div(count, ceil_div(count, most)) : 1; }

/// Copies a tile's inputs to shared memory, as [channel][row][column]: `depth` channels of an image of in_h x in_w, the
/// first of which is at `from`. Neighbouring threads read neighbours in memory.
template <class S>
__device__ inline void stage(const S* from, const Tensors& tensors, int in_h, int in_w, int depth, int h0, int w0,
                             const int (&extent)[2], Sum<S>* inputs) {
  const Strides<int>& x = tensors.x;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int together = x.c == 1 ? depth : 1;  // channels that lie side by side
  for (int row = warp; row < depth / together * extent[0]; row += warps) {
    const int c0 = row / extent[0], row_of_channel = row % extent[0];
    const int h = tensors.h.pixel(h0 + row_of_channel, in_h);
    for (int i = lane; i < extent[1] * together; i += kLanes) {
      const int column = together == 1 ? i : i / together, c = c0 + i - column * together;
      const int w = tensors.w.pixel(w0 + column, in_w);
      inputs[(c * extent[0] + row_of_channel) * extent[1] + column] =
          h >= 0 && w >= 0 ? value(from[c * x.c + h * x.h + w * x.w]) : Sum<S>(0);
    }
  }
}

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
  const int64_t tile[2] = {even_tile(count[0], kThreads * kPixels / tile_w) / side * side, tile_w};
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
  plan.threads = static_cast<int>(ceil_div(ceil_div(tile[0] * tile[1], kPixels), kLanes) * kLanes);
  plan.blocks = g.n * channels.groups * tiles * plan.produce_blocks;
  plan.shared_bytes = (weights_at + chunk * taps * produce) * static_cast<int64_t>(sizeof(T));
  return plan;
}

template <class S, int kProduce>
__global__ void __launch_bounds__(kThreads, kBlocks<Sum<S>, kProduce>)
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

template <class S, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  correlate<S, kPass>(g, o, Epilogue<S>{}, workspace, stream);
}

struct WeightPlan {
  int tile[2], tiles[2], extent[2];  // outputs per tile, tiles per image, inputs per tile
  int channels;                      // that the weights of one warp's lanes touch
  int produce_blocks, column_blocks;
  int64_t parts, blocks, shared_bytes;
};

template <class T>
WeightPlan plan_grad_weight(const Conv2dGeometry& g) {
  const Channels channels(g, Pass::forward);
  const int produce = channels.produce == 1 ? 1 : 8, taps = static_cast<int>(g.kernel[0] * g.kernel[1]);
  WeightPlan plan{};
  plan.channels = smaller(channels.reduce, (kLanes - 2 + taps) / taps + 1);
  plan.produce_blocks = static_cast<int>(ceil_div(channels.produce, produce));
  plan.column_blocks = static_cast<int>(ceil_div(static_cast<int64_t>(channels.reduce) * taps, kLanes));
  plan.parts = parts_for(static_cast<int64_t>(channels.groups) * plan.produce_blocks * plan.column_blocks);
  plan.blocks = plan.parts * channels.groups * plan.produce_blocks * plan.column_blocks;
  for (int widest = 32; widest >= 4; widest /= 2) {
    const int64_t tile[2] = {even_tile(g.out[0], 8), even_tile(g.out[1], widest)};
    int64_t inputs = plan.channels;
    for (int dim = 0; dim < 2; ++dim) {
      const int64_t extent = (tile[dim] - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1;
      plan.tile[dim] = static_cast<int>(tile[dim]);
      plan.tiles[dim] = static_cast<int>(ceil_div(g.out[dim], tile[dim]));
      plan.extent[dim] = static_cast<int>(extent);
      inputs *= extent;
    }
    const int64_t staged = tile[0] * tile[1] * produce + inputs, sums = kThreads * produce;
    plan.shared_bytes = larger(staged, sums) * static_cast<int64_t>(sizeof(T));
    if (plan.shared_bytes <= kSharedMemory) break;
  }
  return plan;
}

/// `parts`, if there are several, get the sum of each part instead of o.out. Weights are numbered (k, c, kh, kw) here,
/// wherever they lie in memory, so that a warp sees few channels.
template <class S, int kProduce>
__global__ void __launch_bounds__(kThreads, kBlocks<Sum<S>, kProduce>)
    grad_weight_kernel(Conv2dGeometry g, WeightPlan plan, Tensors tensors, Conv2dOperands<S> o, Sum<S>* parts) {
  using T = Sum<S>;
  const Channels channels(g, Pass::forward);
  const int out_h = static_cast<int>(g.out[0]), out_w = static_cast<int>(g.out[1]);
  const int in_h = static_cast<int>(g.in[0]), in_w = static_cast<int>(g.in[1]);
  const int taps = static_cast<int>(g.kernel[0] * g.kernel[1]), columns = channels.reduce * taps;
  T* gy = shared_memory<T>();
  T* x = gy + plan.tile[0] * plan.tile[1] * kProduce;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    Digits digits(block);
    const int produce0 = static_cast<int>(digits.next(plan.produce_blocks)) * kProduce;
    const int column0 = static_cast<int>(digits.next(plan.column_blocks)) * kLanes;
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
    for (int64_t unit = part; unit < units; unit += plan.parts) {
      Digits place(unit);
      const int ow0 = static_cast<int>(place.next(plan.tiles[1])) * plan.tile[1];
      const int oh0 = static_cast<int>(place.next(plan.tiles[0])) * plan.tile[0];
      const int64_t n = place.rest();
      const int rows = smaller(plan.tile[0], out_h - oh0), width = smaller(plan.tile[1], out_w - ow0);
      const S* from_gy = o.a + n * tensors.y.n + (group * channels.produce + produce0) * tensors.y.c;
      sync_block();
      for (int row = warp; row < rows; row += warps) {
        const int k = lane % kProduce;
        for (int i = lane / kProduce; i < width; i += kLanes / kProduce) {
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
    for (int k = 0; k < kProduce; ++k) totals[(warp * kProduce + k) * kLanes + lane] = total[k];
    sync_block();
    for (int k = warp; k < kProduce && produce0 + k < channels.produce && column < columns; k += warps) {
      T sum = 0;
      for (int other = 0; other < warps; ++other) sum += totals[(other * kProduce + k) * kLanes + lane];
      const int64_t weight = group * channels.weight_group +
                             static_cast<int64_t>(produce0 + k) * channels.weight_produce +
                             column / taps * channels.weight_reduce + kh * channels.weight_h + kw * channels.weight_w;
      if (plan.parts > 1) {
        parts[part * channels.groups * channels.weight_group + weight] = sum;
      } else {
        o.out[weight] = rounded<S>(sum);
      }
    }
    sync_block();
  }
}

int64_t weight_count(const Conv2dGeometry& g) { return g.k * (g.c / g.groups) * g.kernel[0] * g.kernel[1]; }

template <class S>
int64_t grad_weight_workspace(const Conv2dGeometry& g) {
  const int64_t parts = plan_grad_weight<Sum<S>>(g).parts;
  return parts > 1 ? parts * weight_count(g) : 0;
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  const WeightPlan plan = plan_grad_weight<Sum<S>>(g);
  const auto kernel = Channels(g, Pass::forward).produce == 1 ? grad_weight_kernel<S, 1> : grad_weight_kernel<S, 8>;
  launch("conv2d_direct grad_weight", kernel, plan.blocks, kThreads, plan.shared_bytes, stream, g, plan,
         Tensors(g, Pass::grad_weight), o, workspace);
  if (plan.parts > 1) {
    launch_items("conv2d_direct add_parts", add_parts<S>, weight_count(g), stream, workspace, plan.parts,
                 weight_count(g), o.out);
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
      pass == Pass::grad_weight ? plan_grad_weight<T>(g).shared_bytes : plan_correlation<T>(g, pass).shared_bytes;
  if (shared_bytes > kSharedMemory) {
    return "the direct algorithm stages a tile of the input in 48 KiB of shared memory, and with this kernel size, "
           "stride and dilation the smallest does not fit";
  }
  return nullptr;
}

int64_t no_workspace(const Conv2dGeometry&) { return 0; }

}  // namespace

template <class S>
Conv2dRow<S> conv2d_direct() {
  return {"direct",
          "input tiles in shared memory, register tiles of 4 outputs x 8 channels; few channels",
          refuses<Sum<S>>,
          {no_workspace, correlate<S, Pass::forward>, correlate<S, Pass::forward>},
          {no_workspace, correlate<S, Pass::grad_input>},
          {grad_weight_workspace<S>, grad_weight<S>}};
}

template Conv2dRow<float> conv2d_direct();
template Conv2dRow<double> conv2d_direct();
template Conv2dRow<BFloat16> conv2d_direct();
template Conv2dRow<Float16> conv2d_direct();

}  // namespace cnnops::cuda
