// The gradient of the weights of a depthwise convolution.
//
//   gw[k,kh,kw] = sum over n, oh, ow of gy[n,k,oh,ow] * x[n, k/M, oh*stride - padding + kh, ...]
//
// Many pixels, few results: so each thread adds up all taps of its channels, in registers, over strips of a column of
// gy. Walking down the strip's window in x, row by row, it meets each number of x with the numbers of gy that see it,
// the last few, which are in registers too: so both tensors are read once, neighbouring threads reading neighbours
// (depthwise.h).
//
// Strips go round the threads of a block and the parts of the sum (Parts) like cards; threads, then parts, are added
// up in a fixed order.
//
// As in conv2d_depthwise.cu, strips are for usual kernels. Vectors that are not aligned are read number by number. All
// other geometries go pixel by pixel, a few taps at a time.
#include "depthwise.h"

namespace cnnops::cuda {
namespace {

constexpr int kMostRows = 8;  // of gy in a strip
constexpr int kLoopTaps = 8;  // that a thread of loop_kernel adds up
constexpr int kSums = 20;     // how many of its sums a thread adds to others' at a time

struct WeightPlan {
  Spread spread;
  Tensors tensors;
  int in_h, in_w, out_h, out_w, padding_h, padding_w;
  int strip, channels, taps;  // rows of a strip, of gy
  int tap_blocks, channel_blocks;
  int64_t positions;
  Parts parts;
  int64_t blocks;
  Divider by_columns, by_strips, by_filters;
};

WeightPlan make_plan(const Conv2dGeometry& g, int lanes, int most_rows, int taps) {
  const Spread spread(g, g.k, lanes);
  const int64_t all_taps = g.kernel[0] * g.kernel[1], tap_blocks = ceil_div(all_taps, taps);
  const int64_t channel_blocks = g.layout == Layout::contiguous ? g.k : spread.chunks;
  const int64_t strips = ceil_div(g.out[0], most_rows);
  const Parts parts(tap_blocks * channel_blocks, weight_count(g));
  return {spread,
          Tensors(g, Pass::grad_weight),
          static_cast<int>(g.in[0]),
          static_cast<int>(g.in[1]),
          static_cast<int>(g.out[0]),
          static_cast<int>(g.out[1]),
          static_cast<int>(g.padding[0]),
          static_cast<int>(g.padding[1]),
          static_cast<int>(ceil_div(g.out[0], strips)),
          static_cast<int>(g.k),
          static_cast<int>(all_taps),
          static_cast<int>(tap_blocks),
          static_cast<int>(channel_blocks),
          g.n * strips * g.out[1],
          parts,
          parts.count * tap_blocks * channel_blocks,
          Divider(g.out[1]),
          Divider(strips),
          Divider(g.k / g.c)};
}

/// Where a thread works: its channel, or the first of some; and the positions first, first + step, ... of strips.
struct Work {
  int tap0, channel;
  int64_t part, first, step;

  __device__ Work(const WeightPlan& plan, int64_t block, int lanes) {
    int vector = static_cast<int>(threadIdx.x);
    const int place = plan.spread.by_vectors.divide(vector);
    Digits digits(block);
    tap0 = static_cast<int>(digits.next(plan.tap_blocks)) * kLoopTaps;
    const auto channel_block = static_cast<int>(digits.next(plan.channel_blocks));
    part = digits.rest();
    channel = plan.tensors.x.c == 1 ? (channel_block * plan.spread.vectors + vector) * lanes : channel_block;
    first = part * plan.spread.places + place;
    step = plan.parts.count * plan.spread.places;
    if (place >= plan.spread.places || channel >= plan.channels) first = plan.positions;
  }
};

/// Adds up what the threads of a block have for each tap and channel: some taps at a time, sixteen places, then those
/// sums.
template <class S, int kTaps, int kCount>
__device__ inline void put(Sum<S> (&sum)[kTaps][kCount], const WeightPlan& plan, int64_t block, S* out,
                           Sum<S>* workspace) {
  using T = Sum<S>;
  const Work work(plan, block, kCount);
  constexpr int kSlice = kSums / kCount, kTogether = 16;
  T* shared = shared_memory<T>();
  const int width = plan.spread.vectors * kCount, thread = static_cast<int>(threadIdx.x);
  int vector = thread;
  const int place = plan.spread.by_vectors.divide(vector);
  CNNOPS_UNROLL
  for (int tap0 = 0; tap0 < kTaps; tap0 += kSlice) {
    const int taps = smaller(kSlice, kTaps - tap0), items = taps * width;
    sync_block();
    CNNOPS_UNROLL
    for (int tap = 0; tap < taps; ++tap) {
      CNNOPS_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (place >= plan.spread.places) continue;
        shared[place * items + tap * width + vector * kCount + i] = sum[tap0 + tap][i];
      }
    }
    sync_block();
    const int groups = (plan.spread.places + kTogether - 1) / kTogether;
    CNNOPS_NO_UNROLL
    for (int i = thread; i < groups * items; i += kDepthwiseThreads) {
      const int place0 = i / items * kTogether;
      T* first = shared + place0 * items + i % items;
      T total = *first;
      const int places = smaller(kTogether, plan.spread.places - place0);
      for (int other = 1; other < places; ++other) total += first[other * items];
      *first = total;
    }
    sync_block();
    CNNOPS_NO_UNROLL
    for (int i = thread; i < items; i += kDepthwiseThreads) {
      T total = shared[i];
      for (int group = 1; group < groups; ++group) total += shared[group * kTogether * items + i];
      const int tap = work.tap0 + tap0 + i / width, channel = work.channel - vector * kCount + i % width;
      if (tap >= plan.taps || channel >= plan.channels) continue;
      plan.parts.put(work.part, static_cast<int64_t>(channel) * plan.taps + tap, total, workspace, out);
    }
  }
  sync_block();
}

/// kWhole: `from` is aligned.
template <int kCount, bool kWhole, class S>
__device__ inline void bring(S (&to)[kCount], const S* from) {
  if constexpr (kWhole) {
    load_whole<kCount>(to, from);
  } else {
    CNNOPS_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

template <class S, int kKernel, int kMove, int kCount, bool kLast, bool kWhole>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks<S, kKernel>)
    strip_kernel(WeightPlan plan, Conv2dOperands<S> o, Sum<S>* workspace) {
  using T = Sum<S>;
  constexpr int kOpen = (kKernel + kMove - 1) / kMove, kRound = kOpen * kMove;
  const Strides<int>&x = plan.tensors.x, &y = plan.tensors.y;
  const auto inside = [](int i, int end) { return static_cast<unsigned>(i) < static_cast<unsigned>(end); };
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    const Work work(plan, block, kCount);
    int rest = work.channel;
    const int other = kLast ? work.channel : plan.by_filters.divide(rest);
    T sum[kKernel * kKernel][kCount] = {};
    CNNOPS_NO_UNROLL
    for (int64_t position = work.first; position < plan.positions; position += work.step) {
      int64_t column = position, strip = plan.by_columns.divide(column);
      const int64_t n = plan.by_strips.divide(strip);
      const int oh0 = static_cast<int>(strip) * plan.strip, ow = static_cast<int>(column);
      const int cells = smaller(plan.strip, plan.out_h - oh0), rows = (cells - 1) * kMove + kKernel;
      const int h0 = oh0 * kMove - plan.padding_h, w0 = ow * kMove - plan.padding_w;
      const S* from_y = o.a + n * y.n + static_cast<int64_t>(work.channel) * y.c + static_cast<int64_t>(oh0) * y.h +
                        static_cast<int64_t>(ow) * y.w;
      const S* from_x = o.b + n * x.n + static_cast<int64_t>(other) * x.c + static_cast<int64_t>(h0) * x.h +
                        static_cast<int64_t>(w0) * x.w;
      T gy[kOpen][kCount] = {};  // of cell i in number i % kOpen
      CNNOPS_NO_UNROLL
      for (int row0 = 0; row0 < rows; row0 += kRound) {
        CNNOPS_UNROLL
        for (int r = 0; r < kRound; ++r, from_x += x.h) {
          if (r % kMove == 0) {
            S held[kCount] = {};
            if ((row0 + r) / kMove < cells) bring<kCount, kWhole>(held, from_y);
            CNNOPS_UNROLL
            for (int i = 0; i < kCount; ++i) gy[r / kMove][i] = value(held[i]);
            from_y += y.h;
          }
          T seen[kKernel][kCount];
          CNNOPS_UNROLL
          for (int kw = 0; kw < kKernel; ++kw) {
            S held[kCount] = {};
            if (inside(h0 + row0 + r, plan.in_h) && row0 + r < rows && inside(w0 + kw, plan.in_w)) {
              bring<kCount, kWhole>(held, from_x + kw * (kLast ? x.w : 1));
            }
            CNNOPS_UNROLL
            for (int i = 0; i < kCount; ++i) seen[kw][i] = value(held[i]);
          }
          CNNOPS_UNROLL
          for (int ahead = 1 - kOpen; ahead < kOpen; ++ahead) {  // of row0's cell
            const int kh = r - ahead * kMove, cell = row0 / kMove + ahead;
            if (kh < 0 || kh >= kKernel) continue;
            if (cell < 0 || cell >= cells) continue;  // 0 * inf
            CNNOPS_UNROLL
            for (int kw = 0; kw < kKernel; ++kw) {
              CNNOPS_UNROLL
              for (int i = 0; i < kCount; ++i) {
                sum[kh * kKernel + kw][i] += gy[(ahead + kOpen) % kOpen][i] * seen[kw][i];
              }
            }
          }
        }
      }
    }
    put<S>(sum, plan, block, o.out, workspace);
  }
}

/// Any geometry: strips of one pixel.
template <class S>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    loop_kernel(Conv2dGeometry g, WeightPlan plan, Conv2dOperands<S> o, Sum<S>* workspace) {
  using T = Sum<S>;
  const Strides<int>&x = plan.tensors.x, &y = plan.tensors.y;
  const int kernel_w = static_cast<int>(g.kernel[1]);
  const int stride_h = static_cast<int>(g.stride[0]), stride_w = static_cast<int>(g.stride[1]);
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    const Work work(plan, block, 1);
    int rest = work.channel;
    const int other = plan.by_filters.divide(rest);
    int tap_h[kLoopTaps], tap_w[kLoopTaps];
    CNNOPS_UNROLL
    for (int i = 0; i < kLoopTaps; ++i) {
      tap_h[i] = (work.tap0 + i) / kernel_w * static_cast<int>(g.dilation[0]) - plan.padding_h;
      tap_w[i] = (work.tap0 + i) % kernel_w * static_cast<int>(g.dilation[1]) - plan.padding_w;
    }
    T sum[kLoopTaps][1] = {};
    CNNOPS_NO_UNROLL
    for (int64_t position = work.first; position < plan.positions; position += work.step) {
      int64_t ow = position, oh = plan.by_columns.divide(ow);
      const int64_t n = plan.by_strips.divide(oh);
      const T gy = value(o.a[n * y.n + static_cast<int64_t>(work.channel) * y.c + oh * y.h + ow * y.w]);
      const S* from = o.b + n * x.n + static_cast<int64_t>(other) * x.c;
      const int h0 = static_cast<int>(oh) * stride_h, w0 = static_cast<int>(ow) * stride_w;
      CNNOPS_UNROLL
      for (int i = 0; i < kLoopTaps; ++i) {
        const int h = plan.tensors.h.pixel(h0 + tap_h[i], plan.in_h);
        const int w = plan.tensors.w.pixel(w0 + tap_w[i], plan.in_w);
        const bool inside = h >= 0 && w >= 0 && work.tap0 + i < plan.taps;
        sum[i][0] += inside ? gy * value(from[h * x.h + w * x.w]) : T(0);
      }
    }
    put<S>(sum, plan, block, o.out, workspace);
  }
}

/// How many channels strips take at once; 0 if a loop does it. Addresses are not looked at, as that decides the bits.
template <class S>
int strip_lanes(const Conv2dGeometry& g) {
  const bool usual = square(g, 3, 1) || square(g, 3, 2) || square(g, 5, 1) || square(g, 5, 2) || square(g, 7, 1);
  const int lanes = g.layout == Layout::contiguous ? 1
                    : g.kernel[0] == 3             ? kLanes<S, 3>
                    : g.kernel[0] == 5             ? kLanes<S, 5>
                                                   : kLanes<S, 7>;
  return usual && (g.layout == Layout::contiguous || (g.k == g.c && g.c % lanes == 0)) ? lanes : 0;
}

template <class S>
WeightPlan plan_grad_weight(const Conv2dGeometry& g) {
  const int lanes = strip_lanes<S>(g);
  return lanes > 0 ? make_plan(g, lanes, kMostRows, static_cast<int>(g.kernel[0] * g.kernel[1]))
                   : make_plan(g, 1, 1, kLoopTaps);
}

template <class S>
constexpr std::size_t kShared = kDepthwiseThreads * kSums * sizeof(Sum<S>);
constexpr const char* kName = "conv2d_depthwise grad_weight";

/// Whether this is the kernel's size and stride.
template <class S, int kKernel, int kMove>
bool start_strips(const Conv2dGeometry& g, const WeightPlan& plan, const Conv2dOperands<S>& o, Sum<S>* workspace,
                  Stream stream) {
  if (!square(g, kKernel, kMove)) return false;
  const auto start = [&](auto kernel) {
    launch(kName, kernel, plan.blocks, kDepthwiseThreads, kShared<S>, stream, plan, o, workspace);
    return true;
  };
  constexpr int kCount = kLanes<S, kKernel>;
  if (g.layout == Layout::contiguous) return start(strip_kernel<S, kKernel, kMove, 1, false, true>);
  if (aligned<kCount>(o.a, o.b)) return start(strip_kernel<S, kKernel, kMove, kCount, true, true>);
  return start(strip_kernel<S, kKernel, kMove, kCount, true, kCount == 1>);
}

}  // namespace

template <class S>
int64_t depthwise_weight_workspace(const Conv2dGeometry& g) {
  return plan_grad_weight<S>(g).parts.workspace();
}

template <class S>
void depthwise_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  const WeightPlan plan = plan_grad_weight<S>(g);
  const bool started =
      strip_lanes<S>(g) > 0 &&
      (start_strips<S, 3, 1>(g, plan, o, workspace, stream) || start_strips<S, 5, 1>(g, plan, o, workspace, stream) ||
       start_strips<S, 7, 1>(g, plan, o, workspace, stream) || start_strips<S, 3, 2>(g, plan, o, workspace, stream) ||
       start_strips<S, 5, 2>(g, plan, o, workspace, stream));
  if (!started) {
    launch(kName, loop_kernel<S>, plan.blocks, kDepthwiseThreads, kShared<S>, stream, g, plan, o, workspace);
  }
  add_up("conv2d_depthwise add_up", plan.parts, workspace, o.out, stream);
}

template int64_t depthwise_weight_workspace<float>(const Conv2dGeometry&);
template int64_t depthwise_weight_workspace<double>(const Conv2dGeometry&);
template int64_t depthwise_weight_workspace<BFloat16>(const Conv2dGeometry&);
template int64_t depthwise_weight_workspace<Float16>(const Conv2dGeometry&);
template void depthwise_weight(const Conv2dGeometry&, const Conv2dOperands<float>&, float*, Stream);
template void depthwise_weight(const Conv2dGeometry&, const Conv2dOperands<double>&, double*, Stream);
template void depthwise_weight(const Conv2dGeometry&, const Conv2dOperands<BFloat16>&, float*, Stream);
template void depthwise_weight(const Conv2dGeometry&, const Conv2dOperands<Float16>&, float*, Stream);

}  // namespace cnnops::cuda
