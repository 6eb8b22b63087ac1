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
// and packing costs an addition and a test against the borders.
//
// A slice is 8 steps of the sum, for 64 rows and 128 columns of the product; 128 threads hold 8 x 8 sums each in
// registers (float32), so that 16 numbers read from shared memory make 64 products; direct needs 12 for 32, and makes
// its tiles within one image, while pixels here run across the batch. While a slice is multiplied the next is on its
// way from memory to registers. Each sum runs over its taps in order, whatever the tile it falls in; those of
// grad_weight run over pixels in parts (parts_for), chunk by chunk, so that rounding errors do not grow with the batch.
//
// Refused: only what does not fit 32-bit counts within an image. An infinite weight at a tap that falls on padding
// gives NaN, as inf * 0 does.
#include "conv2d.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kDepth = 8;             // steps of a slice
constexpr int kTable = 128;           // steps whose taps or pixels are worked out at a time
constexpr int kNowhere = -(1 << 30);  // a height outside of every tensor, also after adding a tap's or a pixel's

/// Where a tap's weight is, and what it adds to its pixel's place in the unfolded tensor.
struct alignas(16) Tap {
  int weight, x, h, w;
};

/// Where a pixel's output is (-1: nowhere), and its first input; h and w to test for borders.
struct Pixel {
  int64_t out, x;
  int h, w;
};

/// A block's tile of the product, kRows x kColumns, and its threads' parts of that.
template <class T, int kRows_, int kColumns_>
struct Tile {
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
    return (i / kVector * kThreadRows + threadIdx.x / kThreadColumns) * kVector + i % kVector;
  }
  __device__ static int column(int i) {
    return (i / kVector * kThreadColumns + threadIdx.x % kThreadColumns) * kVector + i % kVector;
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

  /// Adds the products of `steps` steps. Element number i that this thread brings of a slice comes from a(first, i),
  /// where `first` is the slice's first step; PlaceA and PlaceB say which elements those are.
  template <class PlaceA, class PlaceB, class A, class B>
  __device__ void add_products(Slice (&slices)[2], int steps, const A& a, const B& b) {
    T next_a[kStagedA], next_b[kStagedB];
    const auto bring = [&](int first) {
      for (int i = 0; i < kStagedA; ++i) next_a[i] = a(first, i);
      for (int i = 0; i < kStagedB; ++i) next_b[i] = b(first, i);
    };
    const auto put = [&](Slice& slice) {
      for (int i = 0; i < kStagedA; ++i) slice.a[PlaceA::step(i)][PlaceA::column(i)] = next_a[i];
      for (int i = 0; i < kStagedB; ++i) slice.b[PlaceB::step(i)][PlaceB::column(i)] = next_b[i];
    };
    bring(0);
    put(slices[0]);
    sync_block();
    for (int first = 0, current = 0; first < steps; first += kDepth, current ^= 1) {
      const bool more = first + kDepth < steps;
      if (more) bring(first + kDepth);
      multiply(slices[current]);
      if (more) put(slices[current ^ 1]);
      sync_block();
    }
  }
};

/// Neighbouring threads bring neighbouring steps of a slice, for data whose steps are neighbours in memory...
struct StepsFirst {
  __device__ static int step(int) { return threadIdx.x % kDepth; }
  __device__ static int column(int i) { return threadIdx.x / kDepth + i * (kThreads / kDepth); }
};

/// ... or neighbouring columns.
template <int kColumns>
struct ColumnsFirst {
  static_assert(kThreads % kColumns == 0, "a thread keeps to one column");
  __device__ static int step(int i) { return threadIdx.x / kColumns + i * (kThreads / kColumns); }
  __device__ static int column(int) { return threadIdx.x % kColumns; }
};

template <class T>
__device__ inline T unfolded(const T* x, const Pixel& pixel, const Tap& tap, int in_h, int in_w) {
  const int h = pixel.h + tap.h, w = pixel.w + tap.w;
  const bool inside = 0 <= h && h < in_h && 0 <= w && w < in_w;
  return inside ? x[pixel.x + tap.x] : T(0);
}

/// What a product's taps and pixels are, along both axes.
struct Axes {
  SmallAxis h, w;
  Channels channels;
  int kernel_w;

  __device__ Axes(const Conv2dGeometry& g, Pass pass, int64_t class_h, int64_t class_w)
      : h(make_axis(g, pass, 0, class_h)),
        w(make_axis(g, pass, 1, class_w)),
        channels(g, pass),
        kernel_w(static_cast<int>(g.kernel[1])) {}

  __device__ int taps() const { return channels.reduce * h.taps * w.taps; }

  __device__ Tap tap(int number) const {
    if (number >= taps()) return {-1, 0, kNowhere, 0};
    const int c = number / (h.taps * w.taps), kh = number / w.taps % h.taps, kw = number % w.taps;
    const int tap_h = kh * h.offset_step, tap_w = kw * w.offset_step;
    const int weight = c * channels.weight_reduce + (h.k0 + kh * h.k_step) * kernel_w + w.k0 + kw * w.k_step;
    return {weight, (c * h.in_size + tap_h) * w.in_size + tap_w, tap_h, tap_w};
  }

  /// Pixel (n, i, j) of the class, in a tensor of out_h x out_w planes.
  __device__ Pixel pixel(int64_t number, int64_t count, int group, int64_t out_h, int64_t out_w) const {
    if (number >= count) return {-1, 0, kNowhere, 0};
    Digits digits(number);
    const int j = static_cast<int>(digits.next(w.count)), i = static_cast<int>(digits.next(h.count));
    const int64_t group_of_image = digits.rest() * channels.groups + group;
    const int in_h = i * h.in_step + h.offset0, in_w = j * w.in_step + w.offset0;
    const int64_t out =
        (group_of_image * channels.produce * out_h + h.first + i * h.step) * out_w + w.first + j * w.step;
    return {out, (group_of_image * channels.reduce * h.in_size + in_h) * w.in_size + in_w, in_h, in_w};
  }
};

template <class T>
using CorrelateTile = Tile<T, 64, sizeof(T) == 4 ? 128 : 64>;

template <class T>
struct CorrelateShared {
  typename CorrelateTile<T>::Slice slices[2];
  Tap taps[kTable];
  Pixel pixels[CorrelateTile<T>::kColumns];
};

/// Forward and the gradient of the input: rows are output channels, columns pixels.
template <class T>
__global__ void __launch_bounds__(kThreads)
    correlate_kernel(Conv2dGeometry g, Pass pass, int64_t tiles, int64_t row_tiles, int64_t column_tiles,
                     Conv2dOperands<T> o) {
  using Product = CorrelateTile<T>;
  using PlaceB = ColumnsFirst<Product::kColumns>;
  CorrelateShared<T>& shared = *shared_memory<CorrelateShared<T>>();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Digits digits(tile);
    const int row0 = static_cast<int>(digits.next(row_tiles)) * Product::kRows;
    const int64_t column0 = digits.next(column_tiles) * Product::kColumns;
    const int64_t class_w = digits.next(classes_of(g, pass, 1)), class_h = digits.next(classes_of(g, pass, 0));
    const int group = static_cast<int>(digits.rest());
    const Axes axes(g, pass, class_h, class_w);
    const Channels& channels = axes.channels;
    const int64_t out_h = pass == Pass::forward ? g.out[0] : g.in[0],
                  out_w = pass == Pass::forward ? g.out[1] : g.in[1];
    const int64_t pixels = g.n * axes.h.count * axes.w.count;
    for (int i = threadIdx.x; i < Product::kColumns; i += kThreads) {
      shared.pixels[i] = axes.pixel(column0 + i, pixels, group, out_h, out_w);
    }
    sync_block();

    const Pixel pixel = shared.pixels[PlaceB::column(0)];
    const T* weights = o.b + group * channels.weight_group;
    Product product;
    product.clear();
    const int taps = axes.taps();
    for (int tap0 = 0; tap0 < taps; tap0 += kTable) {
      for (int i = threadIdx.x; i < kTable; i += kThreads) shared.taps[i] = axes.tap(tap0 + i);
      sync_block();
      const auto a = [&](int first, int i) {
        const int row = row0 + StepsFirst::column(i), weight = shared.taps[first + StepsFirst::step(i)].weight;
        return row < channels.produce && weight >= 0 ? weights[row * channels.weight_produce + weight] : T(0);
      };
      const auto b = [&](int first, int i) {
        return unfolded(o.a, pixel, shared.taps[first + PlaceB::step(i)], axes.h.in_size, axes.w.in_size);
      };
      product.template add_products<StepsFirst, PlaceB>(shared.slices, smaller(kTable, taps - tap0), a, b);
    }

    for (int i = 0; i < Product::kHeight; ++i) {
      const int row = row0 + Product::row(i);
      if (row >= channels.produce) continue;
      const T bias = o.bias ? o.bias[group * channels.produce + row] : T(0);
      for (int j = 0; j < Product::kWidth; ++j) {
        const int64_t out = shared.pixels[Product::column(j)].out;
        if (out >= 0) o.out[out + row * out_h * out_w] = product.sum[i][j] + bias;
      }
    }
    sync_block();
  }
}

template <class T, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T*, Stream stream) {
  const int64_t pixels = g.n * make_axis(g, kPass, 0, 0).count * make_axis(g, kPass, 1, 0).count;
  const int64_t row_tiles = ceil_div(Channels(g, kPass).produce, CorrelateTile<T>::kRows);
  const int64_t column_tiles = ceil_div(pixels, CorrelateTile<T>::kColumns);
  const int64_t tiles = g.groups * classes_of(g, kPass, 0) * classes_of(g, kPass, 1) * row_tiles * column_tiles;
  launch(kPass == Pass::forward ? "conv2d_im2col forward" : "conv2d_im2col grad_input", correlate_kernel<T>, tiles,
         kThreads, sizeof(CorrelateShared<T>), stream, g, kPass, tiles, row_tiles, column_tiles, o);
}

template <class T>
using WeightTile = Tile<T, 64, sizeof(T) == 4 ? 64 : 32>;

template <class T>
struct WeightShared {
  typename WeightTile<T>::Slice slices[2];
  Tap taps[WeightTile<T>::kColumns];
  Pixel pixels[kTable];
};

/// The gradient of the weights: rows are output channels, columns taps, and the steps of the sum pixels. Chunks of
/// kTable pixels go round the parts like cards.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_weight_kernel(Conv2dGeometry g, int64_t tiles, int64_t row_tiles, int64_t column_tiles, int64_t parts,
                       Conv2dOperands<T> o) {
  using Product = WeightTile<T>;
  WeightShared<T>& shared = *shared_memory<WeightShared<T>>();
  const Axes axes(g, Pass::forward, 0, 0);
  const Channels& channels = axes.channels;
  const int64_t pixels = g.n * g.out[0] * g.out[1], gy_plane = g.out[0] * g.out[1];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Digits digits(tile);
    const int row0 = static_cast<int>(digits.next(row_tiles)) * Product::kRows;
    const int column0 = static_cast<int>(digits.next(column_tiles)) * Product::kColumns;
    const int group = static_cast<int>(digits.next(channels.groups));
    const int64_t part = digits.rest();
    for (int i = threadIdx.x; i < Product::kColumns; i += kThreads) shared.taps[i] = axes.tap(column0 + i);
    sync_block();

    Tap taps[Product::kStagedB];
    for (int i = 0; i < Product::kStagedB; ++i) taps[i] = shared.taps[StepsFirst::column(i)];
    Product total;
    total.clear();
    for (int64_t pixel0 = part * kTable; pixel0 < pixels; pixel0 += parts * kTable) {
      for (int i = threadIdx.x; i < kTable; i += kThreads) {
        shared.pixels[i] = axes.pixel(pixel0 + i, pixels, group, g.out[0], g.out[1]);
      }
      sync_block();
      const auto a = [&](int first, int i) {
        const int64_t gy = shared.pixels[first + StepsFirst::step(i)].out;
        const int row = row0 + StepsFirst::column(i);
        return gy >= 0 && row < channels.produce ? o.a[gy + row * gy_plane] : T(0);
      };
      const auto b = [&](int first, int i) {
        return unfolded(o.b, shared.pixels[first + StepsFirst::step(i)], taps[i], axes.h.in_size, axes.w.in_size);
      };
      Product chunk;
      chunk.clear();
      const int steps = static_cast<int>(smaller<int64_t>(kTable, pixels - pixel0));
      chunk.template add_products<StepsFirst, StepsFirst>(shared.slices, steps, a, b);
      for (int i = 0; i < Product::kHeight; ++i) {
        for (int j = 0; j < Product::kWidth; ++j) total.sum[i][j] += chunk.sum[i][j];
      }
    }

    for (int i = 0; i < Product::kHeight; ++i) {
      const int row = row0 + Product::row(i);
      if (row >= channels.produce) continue;
      const int64_t from = (part * g.k + group * channels.produce + row) * channels.weight_produce;
      for (int j = 0; j < Product::kWidth; ++j) {
        const int column = column0 + Product::column(j);
        if (column < channels.weight_produce) o.out[from + column] = total.sum[i][j];
      }
    }
    sync_block();
  }
}

struct WeightPlan {
  int64_t row_tiles, column_tiles, parts, tiles, weights;
};

template <class T>
WeightPlan plan_grad_weight(const Conv2dGeometry& g) {
  const Channels channels(g, Pass::forward);
  WeightPlan plan{};
  plan.row_tiles = ceil_div(channels.produce, WeightTile<T>::kRows);
  plan.column_tiles = ceil_div(channels.weight_produce, WeightTile<T>::kColumns);
  plan.parts = parts_for(g.groups * plan.row_tiles * plan.column_tiles);
  plan.tiles = plan.parts * g.groups * plan.row_tiles * plan.column_tiles;
  plan.weights = g.k * channels.weight_produce;
  return plan;
}

template <class T>
int64_t grad_weight_workspace(const Conv2dGeometry& g) {
  const WeightPlan plan = plan_grad_weight<T>(g);
  return plan.parts > 1 ? plan.parts * plan.weights : 0;
}

template <class T>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* workspace, Stream stream) {
  const WeightPlan plan = plan_grad_weight<T>(g);
  Conv2dOperands<T> parts = o;
  if (plan.parts > 1) parts.out = workspace;
  launch("conv2d_im2col grad_weight", grad_weight_kernel<T>, plan.tiles, kThreads, sizeof(WeightShared<T>), stream, g,
         plan.tiles, plan.row_tiles, plan.column_tiles, plan.parts, parts);
  if (plan.parts > 1) {
    launch_items("conv2d_im2col add_parts", add_parts<T>, plan.weights, stream, workspace, plan.parts, plan.weights,
                 o.out);
  }
}

const char* refuses(const Conv2dGeometry& g, Pass) {
  return small(g) ? nullptr
                  : "the im2col algorithm counts within an image in 32 bits, and this image or kernel is larger";
}

int64_t no_workspace(const Conv2dGeometry&) { return 0; }

}  // namespace

template <class T>
Conv2dRow<T> conv2d_im2col() {
  return {"im2col",
          "a matrix product whose tiles are packed straight from the tensors; register tiles of 8 x 8",
          refuses,
          {no_workspace, correlate<T, Pass::forward>},
          {no_workspace, correlate<T, Pass::grad_input>},
          {grad_weight_workspace<T>, grad_weight<T>}};
}

template Conv2dRow<float> conv2d_im2col();
template Conv2dRow<double> conv2d_im2col();

}  // namespace cnnops::cuda
