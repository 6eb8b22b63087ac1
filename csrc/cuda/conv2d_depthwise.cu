// Depthwise convolution: one filter per channel, or a few; channels are never added to each other.
//
//   y[n,k,oh,ow] = bias[k] + sum over kh, kw of x[n, k/M, oh*stride - padding + kh, ...] * w[k,kh,kw],    M = K / C
//   gx[n,c,h,w]  =           sum over the M filters of c of what correlation.h says
//
// There is little to compute, so all depends on reading each number from memory once, and on few instructions besides
// the multiply-adds. A thread takes a strip: some outputs one below the other, in channels_last of a vector of
// channels. It walks down the strip's window row by row; each number that it reads meets the taps of all the outputs
// that see it, a few sums that are open at a time. They and the weights are in registers. Neighbouring threads take
// neighbours in memory, columns or channels, so that what their windows share comes from the L1 cache; no barrier makes
// one wait for another, and the loads of several rows are on their way at once. In channels_last, a block first turns
// its weights in shared memory, so that they too can be read as vectors.
//
// The gradient of the input at stride 1 is the same with the kernel turned round. At stride 2 a strip's element is not
// one output but a cell of 2 x 2: each of them has the parity classes' taps to itself, and all see the same small
// window.
//
// Strips are for kernels of 3x3 and 5x5, stride 1 or 2, and 7x7, stride 1; in channels_last for whole vectors, and
// where M > 1 only forward, contiguous. All else takes a thread per output, with a loop over its taps in the same
// order: so an address that is not aligned, which vectors cannot have, changes nothing in the bits.
//
// Refused: groups of several input channels, more than 8 filters per channel, and what does not fit 32-bit counts
// within an image. An infinite weight at a tap that falls on padding gives NaN, as inf * 0 does.
#include "depthwise.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kMostFilters = 8;
constexpr int kMostCells = 8;  // of a strip
constexpr int kTurns = 4;      // outputs of a thread of loop_kernel

/// How cells lie in the input. kWindow: rows and columns that a cell sees; kMove: how far on the next cell's are;
/// kMade: a cell's outputs along either axis; kOpen: cells of a column whose windows share a row, at most.
template <int kKernel_, int kMove_, int kMade_>
struct Shape {
  static constexpr int kKernel = kKernel_, kMove = kMove_, kMade = kMade_, kTaps = kKernel * kKernel;
  static constexpr int kWindow = kMade == 1 ? kKernel : (kKernel + 1) / 2;
  static constexpr int kOpen = (kWindow + kMove - 1) / kMove, kRound = kOpen * kMove;
};

/// An axis in cells: cell i sees the inputs from first + i*kMove on.
struct CellAxis {
  int in, out, cells, first, odd;
};

template <class Shape>
CellAxis cell_axis(const Conv2dGeometry& g, Pass pass, int dim) {
  const int x = static_cast<int>(g.in[dim]), y = static_cast<int>(g.out[dim]);
  const int padding = static_cast<int>(g.padding[dim]), odd = padding % 2;
  if (pass == Pass::forward) return {x, y, y, -padding, odd};
  if (Shape::kMade == 1) return {y, x, x, padding - Shape::kKernel + 1, odd};
  // With h + padding = 2*i + r, taps of parity r see cell i's window; so its outputs begin at an odd row if padding is
  // odd. But they begin at an even column in any case, for pairs to be aligned, and then padding says which is which.
  if (dim == 0) return {y, x, (x + odd + 1) / 2, padding / 2 - Shape::kWindow + 1, odd};
  return {y, x, (x + 1) / 2, (padding + 1) / 2 - Shape::kWindow + 1, odd};
}

struct StripPlan {
  Spread spread;
  Tensors tensors;
  CellAxis h, w;
  int strip, channels;       // cells of a strip
  int positions;             // of strips: in all channels if contiguous, or else in one
  int weight0, weight_step;  // backwards for the gradient at stride 1
  bool pairs;                // of outputs side by side are aligned
  int64_t blocks;
  Divider by_columns, by_strips, by_blocks, by_filters;
};

template <class Shape>
StripPlan plan_strips(const Conv2dGeometry& g, Pass pass, int lanes) {
  const bool forward = pass == Pass::forward, turned = !forward && Shape::kMade == 1;
  const CellAxis h = cell_axis<Shape>(g, pass, 0), w = cell_axis<Shape>(g, pass, 1);
  const int channels = static_cast<int>(forward ? g.k : g.c);
  const Spread spread(g, channels, lanes);
  const int64_t strips = ceil_div(h.cells, kMostCells);
  const int64_t positions = w.cells * strips * (g.layout == Layout::contiguous ? channels : 1);
  const int64_t blocks = ceil_div(positions, spread.places);
  return {spread,
          Tensors(g, pass),
          h,
          w,
          static_cast<int>(ceil_div(h.cells, strips)),
          channels,
          static_cast<int>(positions),
          turned ? Shape::kTaps - 1 : 0,
          turned ? -1 : 1,
          false,
          g.n * blocks * spread.chunks,
          Divider(w.cells),
          Divider(strips),
          Divider(blocks),
          Divider(g.k / g.c)};
}

/// Adds what a cell gets from row number kh of its window.
template <class Shape, int kLanes, class T>
__device__ inline void add(T (&sum)[Shape::kMade][Shape::kMade][kLanes], const T (&seen)[Shape::kWindow][kLanes],
                           const T (&weights)[Shape::kTaps][kLanes], int kh, bool odd) {
  constexpr int kKernel = Shape::kKernel, kWindow = Shape::kWindow;
  const auto multiply = [&](T(&to)[kLanes], const T(&x)[kLanes], int tap) {
    CNNOPS_UNROLL
    for (int i = 0; i < kLanes; ++i) to[i] += x[i] * weights[tap][i];
  };
  if constexpr (Shape::kMade == 1) {
    CNNOPS_UNROLL
    for (int kw = 0; kw < kWindow; ++kw) multiply(sum[0][0], seen[kw], kh * kKernel + kw);
  } else {
    CNNOPS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = r + 2 * (kWindow - 1 - kh);
      if (row >= kKernel) continue;
      CNNOPS_UNROLL
      for (int i = 0; i < kWindow; ++i) multiply(sum[r][0], seen[i], row * kKernel + kKernel - 1 - 2 * i);
      CNNOPS_UNROLL
      for (int i = 0; i < kWindow - 1; ++i) {
        T x[kLanes];
        CNNOPS_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) x[lane] = odd ? seen[i][lane] : seen[i + 1][lane];
        multiply(sum[r][1], x, row * kKernel + kKernel - 2 - 2 * i);
      }
    }
  }
}

/// kLast: in channels_last.
template <class S, class Shape, int kLanes, bool kLast>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks<S, Shape::kKernel>)
    strip_kernel(StripPlan plan, Conv2dOperands<S> o) {
  using T = Sum<S>;
  constexpr int kTaps = Shape::kTaps, kMove = Shape::kMove, kMade = Shape::kMade, kWindow = Shape::kWindow;
  const Strides<int>&x = plan.tensors.x, &y = plan.tensors.y;
  S* staged = shared_memory<S>();
  int vector = static_cast<int>(threadIdx.x);
  const int place = plan.spread.by_vectors.divide(vector);
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    int64_t chunk = block, place_block = plan.spread.by_chunks.divide(chunk);
    const int64_t n = plan.by_blocks.divide(place_block);
    int channel = static_cast<int>(chunk) * plan.spread.vectors * kLanes;
    if constexpr (kLast) {
      sync_block();
      const int count = smaller(plan.spread.vectors * kLanes, plan.channels - channel) * kTaps;
      for (int i = threadIdx.x; i < count; i += kDepthwiseThreads) {
        const int tap = plan.weight0 + i % kTaps * plan.weight_step;
        staged[tap * kBlockChannels + i / kTaps] = o.b[channel * kTaps + i];
      }
      sync_block();
      channel += vector * kLanes;
    }
    const int64_t position = place_block * plan.spread.places + place;
    if (place >= plan.spread.places || position >= plan.positions || channel >= plan.channels) continue;
    int column = static_cast<int>(position), strip = plan.by_columns.divide(column);
    const int plane = plan.by_strips.divide(strip);
    if constexpr (!kLast) channel = plane;

    const S* filter = o.b + static_cast<int64_t>(channel) * kTaps + plan.weight0;
    T weights[kTaps][kLanes];
    CNNOPS_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) {
      S held[kLanes];
      load_whole<kLanes>(held,
                         kLast ? staged + tap * kBlockChannels + vector * kLanes : filter + tap * plan.weight_step);
      CNNOPS_UNROLL
      for (int i = 0; i < kLanes; ++i) weights[tap][i] = value(held[i]);
    }
    T bias[kLanes];
    CNNOPS_UNROLL
    for (int i = 0; i < kLanes; ++i) bias[i] = o.bias ? value(o.bias[channel + i]) : T(0);

    const int cell0 = strip * plan.strip, cells = smaller(plan.strip, plan.h.cells - cell0);
    const int rows = (cells - 1) * kMove + kWindow;
    const int h0 = plan.h.first + cell0 * kMove, w0 = plan.w.first + column * kMove;
    const int h_end = smaller(h0 + rows, plan.h.in);
    const int oh0 = kMade == 1 ? cell0 : cell0 * 2 - plan.h.odd, ow = column * kMade;
    int rest = channel;
    const int other = kLast ? channel : plan.by_filters.divide(rest);  // the channel that is read
    const S* from = o.a + n * x.n + static_cast<int64_t>(other) * x.c + static_cast<int64_t>(h0) * x.h +
                    static_cast<int64_t>(w0) * x.w;
    S* to = o.out + n * y.n + static_cast<int64_t>(channel) * y.c + static_cast<int64_t>(oh0) * y.h +
            static_cast<int64_t>(ow) * y.w;
    const auto inside = [](int i, int end) { return static_cast<unsigned>(i) < static_cast<unsigned>(end); };

    T sum[Shape::kOpen][kMade][kMade][kLanes] = {};  // cell i's in number i % kOpen
    CNNOPS_NO_UNROLL
    for (int row0 = 0; row0 < rows; row0 += Shape::kRound) {
      CNNOPS_UNROLL
      for (int r = 0; r < Shape::kRound; ++r, from += x.h) {
        T seen[kWindow][kLanes];
        CNNOPS_UNROLL
        for (int kw = 0; kw < kWindow; ++kw) {
          S held[kLanes] = {};
          const int h = h0 + row0 + r;
          if (0 <= h && h < h_end && inside(w0 + kw, plan.w.in))
            load_whole<kLanes>(held, from + kw * (kLast ? x.w : 1));
          CNNOPS_UNROLL
          for (int i = 0; i < kLanes; ++i) seen[kw][i] = value(held[i]);
        }
        CNNOPS_UNROLL
        for (int ahead = 1 - Shape::kOpen; ahead < Shape::kOpen; ++ahead) {  // of row0's cell
          const int kh = r - ahead * kMove;
          if (kh < 0 || kh >= kWindow) continue;
          auto& of = sum[(ahead + Shape::kOpen) % Shape::kOpen];
          add<Shape>(of, seen, weights, kh, plan.w.odd);
          if (kh < kWindow - 1) continue;
          const int cell = row0 / kMove + ahead;
          CNNOPS_UNROLL
          for (int i = 0; i < kMade; ++i) {
            S sides[2][kLanes];
            CNNOPS_UNROLL
            for (int lane = 0; lane < kLanes; ++lane) {
              const S one = rounded<S>(of[i][0][lane] + bias[lane]);
              const S two = rounded<S>(of[i][kMade - 1][lane] + bias[lane]);
              sides[0][lane] = plan.w.odd ? two : one;
              sides[1][lane] = plan.w.odd ? one : two;
              of[i][0][lane] = 0;
              of[i][kMade - 1][lane] = 0;
            }
            const int row = cell * kMade + i;
            if (cell < 0 || cell >= cells || !inside(oh0 + row, plan.h.out)) continue;
            S* place = to + static_cast<int64_t>(row) * y.h;
            if (kMade == 2 && !kLast && plan.pairs) {
              store_whole<2 * kLanes>(place, sides[0]);
            } else {
              store_whole<kLanes>(place, sides[0]);
              if (kMade == 2 && ow + 1 < plan.w.out) store_whole<kLanes>(place + y.w, sides[1]);
            }
          }
        }
      }
    }
  }
}

/// An Axis whose taps come in the order of their inputs.
__device__ inline SmallAxis in_order(Axis axis) {
  if (axis.offset_step < 0) {
    axis.k0 += (axis.taps - 1) * axis.k_step;
    axis.offset0 += (axis.taps - 1) * axis.offset_step;
    axis.k_step = -axis.k_step;
    axis.offset_step = -axis.offset_step;
  }
  return SmallAxis(axis);
}

/// For each of a class's outputs a thread: numbered as they lie in memory.
template <class S>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    loop_kernel(Conv2dGeometry g, Pass pass, Tensors tensors, int64_t class_blocks, int64_t blocks,
                Conv2dOperands<S> o) {
  const Strides<int>&x = tensors.x, &y = tensors.y;
  const bool forward = pass == Pass::forward;
  const int filters = static_cast<int>(g.k / g.c), reduce = forward ? 1 : filters;
  const int64_t channels = forward ? g.k : g.c, kernel_w = g.kernel[1], taps = g.kernel[0] * kernel_w;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    Digits digits(block);
    const int64_t item0 = digits.next(class_blocks) * kDepthwiseThreads * kTurns;
    const SmallAxis w = in_order(make_axis(g, pass, 1, digits.next(axis_classes(g, pass, 1))));
    const SmallAxis h = in_order(make_axis(g, pass, 0, digits.next(axis_classes(g, pass, 0))));
    const int64_t n = digits.rest();
    const int64_t end = smaller(item0 + kDepthwiseThreads * kTurns, channels * h.count * w.count);
    CNNOPS_NO_UNROLL
    for (int64_t item = item0 + threadIdx.x; item < end; item += kDepthwiseThreads) {
      const auto number = static_cast<unsigned>(item), width = static_cast<unsigned>(w.count);
      const auto inner = static_cast<unsigned>(y.c == 1 ? channels : w.count);
      const unsigned first = number % inner, second = number / inner % (y.c == 1 ? width : h.count),
                     third = number / inner / (y.c == 1 ? width : h.count);
      const int channel = static_cast<int>(y.c == 1 ? first : third), row = static_cast<int>(y.c == 1 ? third : second);
      const int column = static_cast<int>(y.c == 1 ? second : first);
      const int other = forward ? channel / filters : channel * filters;
      Sum<S> sum = 0;
      for (int j = 0; j < reduce; ++j) {
        const S* plane = o.a + n * x.n + static_cast<int64_t>(other + j) * x.c;
        const S* filter = o.b + (static_cast<int64_t>(channel) * reduce + j) * taps;
        for (int kh = 0; kh < h.taps; ++kh) {
          const int in_h = tensors.h.pixel(row * h.in_step + h.offset0 + kh * h.offset_step, h.in_size);
          const S* weight = filter + (h.k0 + kh * h.k_step) * kernel_w + w.k0;
          for (int kw = 0; kw < w.taps; ++kw, weight += w.k_step) {
            const int in_w = tensors.w.pixel(column * w.in_step + w.offset0 + kw * w.offset_step, w.in_size);
            const Sum<S> seen = in_h >= 0 && in_w >= 0 ? value(plane[in_h * x.h + in_w * x.w]) : Sum<S>(0);
            sum += seen * value(*weight);
          }
        }
      }
      const Sum<S> bias = o.bias ? value(o.bias[channel]) : Sum<S>(0);
      o.out[n * y.n + static_cast<int64_t>(channel) * y.c + static_cast<int64_t>(h.first + row * h.step) * y.h +
            static_cast<int64_t>(w.first + column * w.step) * y.w] = rounded<S>(sum + bias);
    }
  }
}

template <Pass kPass>
constexpr const char* kName = kPass == Pass::forward ? "conv2d_depthwise forward" : "conv2d_depthwise grad_input";

/// Whether strips of this shape could do it.
template <class S, Pass kPass, class Shape>
bool correlate_in(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Stream stream) {
  const auto start = [&](auto kernel, int lanes, auto pairs) {
    StripPlan plan = plan_strips<Shape>(g, kPass, lanes);
    plan.pairs = pairs;
    const int64_t staged = g.layout == Layout::contiguous ? 0 : kBlockChannels * Shape::kTaps;
    launch(kName<kPass>, kernel, plan.blocks, kDepthwiseThreads, staged * sizeof(S), stream, plan, o);
    return true;
  };
  if (kPass == Pass::grad_input && g.k != g.c) return false;
  if (g.layout == Layout::contiguous) {
    return start(strip_kernel<S, Shape, 1, false>, 1, g.in[1] % 2 == 0 && aligned<2>(o.out));
  }
  constexpr int kCount = kLanes<S, Shape::kKernel>;
  if (g.k != g.c || g.c % kCount != 0 || !aligned<kCount>(o.a, o.out)) return false;
  return start(strip_kernel<S, Shape, kCount, true>, kCount, false);
}

template <class S, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>*, Stream stream) {
  constexpr bool kForward = kPass == Pass::forward;
  using Strided3 = std::conditional_t<kForward, Shape<3, 2, 1>, Shape<3, 1, 2>>;
  using Strided5 = std::conditional_t<kForward, Shape<5, 2, 1>, Shape<5, 1, 2>>;
  if (square(g, 3, 1) && correlate_in<S, kPass, Shape<3, 1, 1>>(g, o, stream)) return;
  if (square(g, 5, 1) && correlate_in<S, kPass, Shape<5, 1, 1>>(g, o, stream)) return;
  if (square(g, 7, 1) && correlate_in<S, kPass, Shape<7, 1, 1>>(g, o, stream)) return;
  if (square(g, 3, 2) && correlate_in<S, kPass, Strided3>(g, o, stream)) return;
  if (square(g, 5, 2) && correlate_in<S, kPass, Strided5>(g, o, stream)) return;
  const int64_t items = (kForward ? g.k : g.c) * make_axis(g, kPass, 0, 0).count * make_axis(g, kPass, 1, 0).count;
  const int64_t class_blocks = ceil_div(items, kDepthwiseThreads * kTurns);
  const int64_t blocks = g.n * axis_classes(g, kPass, 0) * axis_classes(g, kPass, 1) * class_blocks;
  launch(kName<kPass>, loop_kernel<S>, blocks, kDepthwiseThreads, 0, stream, g, kPass, Tensors(g, kPass), class_blocks,
         blocks, o);
}

const char* refuses(const Conv2dGeometry& g, Pass) {
  if (!small(g)) return "the depthwise algorithm counts within an image in 32 bits, and this image or kernel is larger";
  if (g.groups != g.c || g.c == 1) return "the depthwise algorithm is for groups of one input channel, several of them";
  if (g.k / g.c > kMostFilters) return "the depthwise algorithm is for at most 8 filters per channel";
  return nullptr;
}

}  // namespace

template <class S>
Conv2dRow<S> conv2d_depthwise() {
  return {"depthwise",
          "one filter per channel, or few: strips of outputs in registers, inputs read once",
          refuses,
          {no_workspace, correlate<S, Pass::forward>},
          {no_workspace, correlate<S, Pass::grad_input>},
          {depthwise_weight_workspace<S>, depthwise_weight<S>}};
}

template Conv2dRow<float> conv2d_depthwise();
template Conv2dRow<double> conv2d_depthwise();
template Conv2dRow<BFloat16> conv2d_depthwise();
template Conv2dRow<Float16> conv2d_depthwise();

}  // namespace cnnops::cuda
