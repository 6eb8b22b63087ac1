// Convolution as a matrix product, the matrix never made.
//
// Unfolded, x is a matrix with a row per (c, kh, kw), a *tap*, and a column per (n, oh, ow), a *pixel*; the weights are
// a matrix [k, tap], and
//
//   forward      y[k, pixel] = sum over taps   of w[k, tap]    * unfolded[tap, pixel]
//   grad_input   the same with gy for x, k for c: an Axis (correlation.h) says which taps meet which pixels. The pixels
//                of a strided gradient fall apart into classes that share their taps; each is a product of its own.
//   grad_weight  gw[k, tap]  = sum over pixels of gy[k, pixel] * unfolded[tap, pixel]
//
// The unfolded matrix would be KH*KW times as large as x. Here a block packs what its tile of the product needs, slice
// by slice, straight from the tensors into shared memory: an element of the unfolded matrix lies at pixel.x + tap.x,
// one number of its pixel plus one of its tap, so both are worked out once (tables of Tap and Pixel in shared memory)
// and packing costs an addition and a test against the borders. Where a border shows the image once more, the distance
// to the pixel shown is added.
//
// Taps are numbered (c, kh, kw), or in channels_last (kh, kw, c): so do the weights lie in memory. A slice's elements
// are shared out to the threads so that neighbours read neighbours: pixels of one tap, or in channels_last taps of one
// pixel. 16-bit numbers are widened when they are packed.
//
// A slice is 8 steps of the sum, for 64 rows and 128 columns of the product; 128 threads hold 8 x 8 sums each in
// registers (float32), so that 16 numbers read from shared memory make 64 products; direct needs 12 for 32, and makes
// its tiles within one image, while pixels here run across the batch. While a slice is multiplied the next is on its
// way from memory to registers. Each sum runs over its taps in order, whatever the tile it falls in; those of
// grad_weight run over pixels in parts (Parts), chunk by chunk, so that rounding errors do not grow with the batch.
//
// Refused: only what does not fit 32-bit counts within an image. An infinite weight at a tap that falls on padding
// gives NaN, as inf * 0 does.
#include "conv2d.h"
#include "epilogue.h"
#include "launchers.h"
#include "unfolded.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kDepth = 8;    // steps of a slice
constexpr int kTable = 128;  // steps whose taps or pixels are worked out at a time

/// Blocks that should fit a processor together, by their registers: as many as spill none.
template <class S>
constexpr int kBlocks = sizeof(Sum<S>) == 4 ? 3 : 2;

/// Which elements of a slice a thread brings: number i is column(i) of step(i).
struct Place {
  int first_step, next_step, first_column, next_column;
  __device__ int step(int i) const { return first_step + i * next_step; }
  __device__ int column(int i) const { return first_column + i * next_column; }
};

/// Neighbouring threads bring neighbouring steps, for data whose steps are neighbours in memory...
__device__ inline Place steps_first() {
  const int thread = threadIdx.x;
  return {thread % kDepth, 0, thread / kDepth, kThreads / kDepth};
}
/// ... or neighbouring columns, `columns` being a slice's.
__device__ inline Place columns_first(int columns) {
  const int thread = threadIdx.x;
  return {thread / columns, kThreads / columns, thread % columns, 0};
}

/// A block's tile of the product, kRows x kColumns, and its threads' parts of that. Neighbouring threads have
/// neighbouring rows if kRowsFirst, or else columns: as the results are neighbours in memory.
template <class S, int kRows_, int kColumns_, bool kRowsFirst>
struct Tile {
  using T = Sum<S>;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kVector = Vector<T>::size;
  static constexpr int kThreadColumns = 16, kThreadRows = kThreads / kThreadColumns;
  static constexpr int kHeight = kRows / kThreadRows, kWidth = kColumns / kThreadColumns;  // of a thread's part
  static constexpr int kStagedA = kDepth * kRows / kThreads, kStagedB = kDepth * kColumns / kThreads;

  // One vector more per step, or threads that write steps of one column would meet in the same bank.
  struct alignas(16) Slice {
    T a[kDepth][kRows + kVector], b[kDepth][kColumns + kVector];
  };

  T sum[kHeight][kWidth];

  /// A thread's rows and columns come in vectors, those of neighbours side by side.
  __device__ static int row(int i) {
    const int thread = kRowsFirst ? threadIdx.x % kThreadRows : threadIdx.x / kThreadColumns;
    return (i / kVector * kThreadRows + thread) * kVector + i % kVector;
  }
  __device__ static int column(int i) {
    const int thread = kRowsFirst ? threadIdx.x / kThreadRows : threadIdx.x % kThreadColumns;
    return (i / kVector * kThreadColumns + thread) * kVector + i % kVector;
  }

  __device__ void clear() {
    for (int i = 0; i < kHeight; ++i) {
      for (int j = 0; j < kWidth; ++j) sum[i][j] = 0;
    }
  }

  __device__ void multiply(const Slice& slice) {
    for (int step = 0; step < kDepth; ++step) {
      T a[kHeight], b[kWidth];
      for (int i = 0; i < kHeight; i += kVector) load<kVector>(a + i, &slice.a[step][row(i)]);
      for (int j = 0; j < kWidth; j += kVector) load<kVector>(b + j, &slice.b[step][column(j)]);
      for (int i = 0; i < kHeight; ++i) {
        for (int j = 0; j < kWidth; ++j) sum[i][j] += a[i] * b[j];
      }
    }
  }

  /// Adds the products of `steps` steps. Element number i that this thread brings of a slice comes from a(first, i) and
  /// b(first, i), where `first` is the slice's first step, and is the one that place_a and place_b say.
  template <class A, class B>
  __device__ void add_products(Slice (&slices)[2], int steps, const Place& place_a, const Place& place_b, const A& a,
                               const B& b) {
    S next_a[kStagedA], next_b[kStagedB];
    const auto bring = [&](int first) {
      for (int i = 0; i < kStagedA; ++i) next_a[i] = a(first, i);
      for (int i = 0; i < kStagedB; ++i) next_b[i] = b(first, i);
    };
    const auto put = [&](Slice& slice) {
      for (int i = 0; i < kStagedA; ++i) slice.a[place_a.step(i)][place_a.column(i)] = value(next_a[i]);
      for (int i = 0; i < kStagedB; ++i) slice.b[place_b.step(i)][place_b.column(i)] = value(next_b[i]);
    };
    for (int first = 0, next = 0; first - kDepth < steps; first += kDepth, next ^= 1) {
      const bool more = first < steps;
      if (more) bring(first);
      if (first > 0) multiply(slices[next ^ 1]);
      if (more) put(slices[next]);
      sync_block();
    }
  }
};

template <class S, Layout kLayout>
using CorrelateTile = Tile<S, 64, sizeof(Sum<S>) == 4 ? 128 : 64, kLayout == Layout::channels_last>;

template <class Product>
struct CorrelateShared {
  typename Product::Slice slices[2];
  Tap taps[kTable];
  Pixel pixels[Product::kColumns];
  int64_t outs[Product::kColumns];
};

/// Forward and the gradient of the input: rows are output channels, columns pixels.
template <class S, Layout kLayout>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    correlate_kernel(Conv2dGeometry g, Pass pass, Tensors tensors, CorrelatePlan plan, Conv2dOperands<S> o,
                     Epilogue<S> epilogue) {
  using Product = CorrelateTile<S, kLayout>;
  CorrelateShared<Product>& shared = *shared_memory<CorrelateShared<Product>>();
  for (int64_t number = blockIdx.x; number < plan.tiles; number += gridDim.x) {
    const auto tile = plan.tile(g, pass, number);
    const int row0 = static_cast<int>(tile.channels) * Product::kRows, group = static_cast<int>(tile.group);
    const int64_t column0 = tile.pixels * Product::kColumns;
    const Axes axes(g, pass, tensors, tile.class_h, tile.class_w);
    const Channels& channels = axes.channels;
    const int64_t windows = plan.windows(g, axes);
    for (int i = threadIdx.x; i < Product::kColumns; i += kThreads) {
      axes.find(column0 + i, windows, group, shared.pixels[i], shared.outs[i], plan.apart);
    }
    sync_block();

    // Steps of the weights are neighbours, unless rows are.
    const Place place_a = channels.weight_produce == 1 ? columns_first(Product::kRows) : steps_first();
    const Place place_b = kLayout == Layout::channels_last ? steps_first() : columns_first(Product::kColumns);
    const Pixel pixel = shared.pixels[place_b.column(0)];
    const S* weights = o.b + group * channels.weight_group;
    Product product;
    product.clear();
    const int taps = axes.taps();
    for (int tap0 = 0; tap0 < taps; tap0 += kTable) {
      for (int i = threadIdx.x; i < kTable; i += kThreads) shared.taps[i] = axes.tap(tap0 + i);
      sync_block();
      const auto a = [&](int first, int i) {
        const int row = row0 + place_a.column(i), weight = shared.taps[first + place_a.step(i)].weight;
        return row < channels.produce && weight >= 0 ? weights[row * channels.weight_produce + weight] : S{};
      };
      const auto b = [&](int first, int i) {
        const Tap& tap = shared.taps[first + place_b.step(i)];
        if constexpr (kLayout == Layout::contiguous) return axes.unfolded(o.a, pixel, tap);  // of all i
        return axes.unfolded(o.a, shared.pixels[place_b.column(i)], tap);
      };
      product.add_products(shared.slices, smaller(kTable, taps - tap0), place_a, place_b, a, b);
    }

    CNNOPS_UNROLL
    for (int i = 0; i < Product::kHeight; ++i) {
      const int row = row0 + Product::row(i);
      if (row >= channels.produce) continue;
      const auto bias = o.bias ? value(o.bias[group * channels.produce + row]) : Sum<S>(0);
      const auto result = [&](int j) { return finished(product.sum[i][j] + bias, epilogue); };
      if (plan.apart) {
        if constexpr (Product::kVector == 4) {  // a window each
          CNNOPS_UNROLL
          for (int j = 0; j < Product::kWidth; j += 4) {
            const Sum<S> window[] = {value(result(j)), value(result(j + 1)), value(result(j + 2)),
                                     value(result(j + 3))};
            const int64_t out = shared.outs[Product::column(j)] + row * tensors.y.c;
            if (shared.outs[Product::column(j)] >= 0) pool(window, o.out + out, epilogue.positions + out);
          }
        }
      } else {
        CNNOPS_UNROLL
        for (int j = 0; j < Product::kWidth; ++j) {
          const int64_t out = shared.outs[Product::column(j)];
          if (out >= 0) o.out[out + row * tensors.y.c] = result(j);
        }
      }
    }
    sync_block();
  }
}

/// Calls start(layout), where layout() is g's and a constant.
template <class Start>
void with_layout(const Conv2dGeometry& g, const Start& start) {
  if (g.layout == Layout::contiguous) {
    start(std::integral_constant<Layout, Layout::contiguous>{});
  } else {
    start(std::integral_constant<Layout, Layout::channels_last>{});
  }
}

template <class S, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, const Epilogue<S>& epilogue, Sum<S>*,
               Stream stream) {
  with_layout(g, [&](auto layout) {
    using Product = CorrelateTile<S, layout()>;
    const CorrelatePlan plan(g, kPass, Product::kRows, Product::kColumns, epilogue.positions ? 1 : 0);
    launch(kPass == Pass::forward ? "conv2d_im2col forward" : "conv2d_im2col grad_input", correlate_kernel<S, layout()>,
           plan.tiles, kThreads, sizeof(CorrelateShared<Product>), stream, g, kPass, Tensors(g, kPass, plan.side), plan,
           o, epilogue);
  });
}

/// A thread has whole windows if its vectors are of four numbers.
template <class S>
constexpr auto fused() -> decltype(Conv2dRun<S>::fused) {
  if constexpr (Vector<Sum<S>>::size == 4) return correlate<S, Pass::forward>;
  return nullptr;
}

template <class S>
using WeightTile = Tile<S, 64, sizeof(Sum<S>) == 4 ? 64 : 32, false>;

template <class S>
struct WeightShared {
  typename WeightTile<S>::Slice slices[2];
  Tap taps[WeightTile<S>::kColumns];
  Pixel pixels[kTable];
  int64_t outs[kTable];
};

/// The gradient of the weights: rows are output channels, columns taps, and the steps of the sum pixels. Chunks of
/// kTable pixels go round the parts like cards.
template <class S, Layout kLayout>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    grad_weight_kernel(Conv2dGeometry g, Tensors tensors, WeightPlan plan, Conv2dOperands<S> o, Sum<S>* workspace) {
  using Product = WeightTile<S>;
  WeightShared<S>& shared = *shared_memory<WeightShared<S>>();
  const Axes axes(g, Pass::forward, tensors, 0, 0);
  const Channels& channels = axes.channels;
  const int64_t pixels = g.n * g.out[0] * g.out[1];
  const Place place_a = kLayout == Layout::channels_last ? columns_first(Product::kRows) : steps_first();
  const Place place_b = kLayout == Layout::channels_last ? columns_first(Product::kColumns) : steps_first();
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    Digits digits(tile);
    const int row0 = static_cast<int>(digits.next(plan.row_tiles)) * Product::kRows;
    const int column0 = static_cast<int>(digits.next(plan.column_tiles)) * Product::kColumns;
    const int group = static_cast<int>(digits.next(channels.groups));
    const int64_t part = digits.rest();
    for (int i = threadIdx.x; i < Product::kColumns; i += kThreads) shared.taps[i] = axes.tap(column0 + i);
    sync_block();

    Tap taps[Product::kStagedB];
    for (int i = 0; i < Product::kStagedB; ++i) taps[i] = shared.taps[place_b.column(i)];
    Product total;
    total.clear();
    for (int64_t pixel0 = part * kTable; pixel0 < pixels; pixel0 += plan.parts.count * kTable) {
      for (int i = threadIdx.x; i < kTable; i += kThreads) {
        axes.find(pixel0 + i, pixels, group, shared.pixels[i], shared.outs[i]);
      }
      sync_block();
      const auto a = [&](int first, int i) {
        const int64_t gy = shared.outs[first + place_a.step(i)];
        const int row = row0 + place_a.column(i);
        return gy >= 0 && row < channels.produce ? o.a[gy + row * tensors.y.c] : S{};
      };
      const auto b = [&](int first, int i) {
        return axes.unfolded(o.b, shared.pixels[first + place_b.step(i)], taps[i]);
      };
      Product chunk;
      chunk.clear();
      const int steps = static_cast<int>(smaller<int64_t>(kTable, pixels - pixel0));
      chunk.add_products(shared.slices, steps, place_a, place_b, a, b);
      for (int i = 0; i < Product::kHeight; ++i) {
        for (int j = 0; j < Product::kWidth; ++j) total.sum[i][j] += chunk.sum[i][j];
      }
    }

    const int columns = axes.taps();
    CNNOPS_UNROLL
    for (int i = 0; i < Product::kHeight; ++i) {
      const int row = row0 + Product::row(i);
      if (row >= channels.produce) continue;
      const int64_t weight = (static_cast<int64_t>(group) * channels.produce + row) * columns;
      CNNOPS_UNROLL
      for (int j = 0; j < Product::kWidth; ++j) {
        const int column = column0 + Product::column(j);
        if (column < columns) plan.parts.put(part, weight + column, total.sum[i][j], workspace, o.out);
      }
    }
    sync_block();
  }
}

template <class S>
WeightPlan plan_grad_weight(const Conv2dGeometry& g) {
  return {g, WeightTile<S>::kRows, WeightTile<S>::kColumns};
}

template <class S>
int64_t grad_weight_workspace(const Conv2dGeometry& g) {
  return plan_grad_weight<S>(g).parts.workspace();
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  const WeightPlan plan = plan_grad_weight<S>(g);
  with_layout(g, [&](auto layout) {
    launch("conv2d_im2col grad_weight", grad_weight_kernel<S, layout()>, plan.tiles, kThreads, sizeof(WeightShared<S>),
           stream, g, Tensors(g, Pass::grad_weight), plan, o, workspace);
  });
  add_up("conv2d_im2col add_up", plan.parts, workspace, o.out, stream);
}

const char* refuses(const Conv2dGeometry& g, Pass) {
  return small(g) ? nullptr
                  : "the im2col algorithm counts within an image in 32 bits, and this image or kernel is larger";
}

}  // namespace

template <class S>
Conv2dRow<S> conv2d_im2col() {
  return {"im2col",
          "a matrix product whose tiles are packed straight from the tensors; register tiles of 8 x 8",
          refuses,
          {no_workspace, no_epilogue<S, correlate<S, Pass::forward>>, fused<S>()},
          {no_workspace, no_epilogue<S, correlate<S, Pass::grad_input>>},
          {grad_weight_workspace<S>, grad_weight<S>}};
}

template Conv2dRow<float> conv2d_im2col();
template Conv2dRow<double> conv2d_im2col();
template Conv2dRow<BFloat16> conv2d_im2col();
template Conv2dRow<Float16> conv2d_im2col();

}  // namespace cnnops::cuda
