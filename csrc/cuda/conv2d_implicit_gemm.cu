// Convolution as a matrix product on tensor cores, the matrix never made.
//
// The product is conv2d_im2col.cu's, turned round: pixels are rows, since they are many, and channels columns.
//
//   forward      y[pixel, k]  = sum over taps   of unfolded[pixel, tap] * w[k, tap]
//   grad_input   the same with gy for x, k for c; the pixels of a strided gradient fall apart into classes that share
//                their taps, each a product of its own (correlation.h)
//   grad_weight  gw[k, tap]   = sum over pixels of gy[pixel, k] * unfolded[pixel, tap]
//
// A block computes a tile of the product (gemm_tile.h). Its operands come to shared memory slice by slice, kStages
// ahead (carrier.h). In which way they come, how large the tile is, and whether addresses are aligned change nothing in
// the bits: each sum runs over its slices in order. Those of grad_weight run over pixels in parts (Parts): slices go
// round the parts like cards.
//
// How numbers are multiplied:
//
//   float32    three products of TF32 numbers, about as exact as float32 (Math::split); one, if torch's switches allow
//              TF32 for convolutions. On sm_75 plain multiply-adds.
//   16 bits    exact products, summed in float32, rounded once. On sm_75 plain multiply-adds for bfloat16.
//
// Refused: float64, groups of few channels, and what does not fit 32-bit counts within an image. An infinite weight at
// a tap that falls on padding gives NaN, as inf * 0 does; with split float32 any infinity gives NaN, since what its big
// part leaves over is none.
#include "carrier.h"
#include "epilogue.h"
#include "launchers.h"
#include "unfolded.h"

namespace cnnops::cuda {
namespace {

constexpr int kStages = 3;
constexpr int kFew = 8;  // channels per group: fewer would fill little of a tile, or of a slice

// Without tensor cores a thread has no registers for operands of 64 rows.
template <class S, Math kMath>
using LargeTile = GemmTile<S, 2, 2, true, kMath, kMath == Math::plain ? 32 : 64, 32>;
template <class S, Math kMath>
using SmallTile = GemmTile<S, 2, 1, true, kMath>;
template <class S, Math kMath>
using WeightTile = GemmTile<S, 2, 2, true, kMath>;

/// Blocks that should fit a processor together, by their registers: as many as spill none. 0 leaves it to the compiler.
template <class Tile>
constexpr int kBlocks = 0;
template <>
constexpr int kBlocks<SmallTile<float, Math::plain>> = 6;
template <>
constexpr int kBlocks<SmallTile<float, Math::split>> = 4;
template <>
constexpr int kBlocks<LargeTile<float, Math::split>> = 2;
template <class Tile>
constexpr int kWeightBlocks = 0;
template <>
constexpr int kWeightBlocks<WeightTile<float, Math::split>> = 3;

template <class Tile>
struct CorrelateShared {
  typename Tile::Slice stages[kStages];
  Tap taps[2][kSlice<typename Tile::S>];  // of the slice that is brought, and of the next
  Pixel pixels[Tile::kRows];
  int64_t outs[Tile::kRows];
};

/// Forward and the gradient of the input. kWhole: vectors of taps are neighbours in memory. Where the epilogue pools, a
/// lane has all four results of a window.
template <class Tile, bool kWhole>
__global__ void __launch_bounds__(Tile::kThreads, kBlocks<Tile>)
    correlate_kernel(Conv2dGeometry g, Pass pass, Tensors tensors, CorrelatePlan plan, Way weights_way,
                     Conv2dOperands<typename Tile::S> o, Epilogue<typename Tile::S> epilogue) {
  if constexpr (!Tile::kMade) return stop();
  using S = typename Tile::S;
  CorrelateShared<Tile>& shared = *shared_memory<CorrelateShared<Tile>>();
  for (int64_t number = blockIdx.x; number < plan.tiles; number += gridDim.x) {
    const auto tile = plan.tile(g, pass, number);
    const int column0 = static_cast<int>(tile.channels) * Tile::kColumns, group = static_cast<int>(tile.group);
    const int64_t row0 = tile.pixels * Tile::kRows;
    const Axes axes(g, pass, tensors, tile.class_h, tile.class_w);
    const Channels& channels = axes.channels;
    const int64_t windows = plan.windows(g, axes);
    for (int i = threadIdx.x; i < Tile::kRows; i += Tile::kThreads) {
      axes.find(row0 + i, windows, group, shared.pixels[i], shared.outs[i], plan.apart);
    }

    const S* weights = o.b + group * channels.weight_group + static_cast<int64_t>(column0) * channels.weight_produce;
    Carrier<S, Tile::kRows, Tile::kThreads> a(kWhole ? Way::whole : axes.channels_last ? Way::steps : Way::rows);
    Carrier<S, Tile::kColumns, Tile::kThreads> b(weights_way);
    const auto prepare = [&](int64_t number) {
      const int step = threadIdx.x;
      if (step < kSlice<S>) shared.taps[number % 2][step] = axes.tap(static_cast<int>(number) * kSlice<S> + step);
    };
    const auto start = [&](typename Tile::Slice& slice, int64_t number) {
      const Tap* taps = shared.taps[number % 2];
      a.start(slice.a, [&](int row, int step) { return axes.place(o.a, shared.pixels[row], taps[step]); });
      b.start(slice.b, [&](int column, int step) {
        const int weight = taps[step].weight;
        return weight >= 0 && column0 + column < channels.produce ? weights + column * channels.weight_produce + weight
                                                                  : nullptr;
      });
    };
    const auto finish = [&](typename Tile::Slice& slice) {
      a.finish(slice.a);
      b.finish(slice.b);
    };
    Tile product;
    product.multiply(shared.stages, ceil_div(axes.taps(), kSlice<S>), start, finish, prepare);

    /// Calls use(where the outputs of row and column go, a function that makes one of a sum), if there are such.
    const auto finish_sum = [&](int row, int column, const auto& use) {
      const int64_t out = shared.outs[row];
      const int k = column0 + column;
      if (out < 0 || k >= channels.produce) return;
      const float bias = o.bias ? value(o.bias[group * channels.produce + k]) : 0.0f;
      use(out + static_cast<int64_t>(k) * tensors.y.c, [&](float sum) { return finished(sum + bias, epilogue); });
    };
    if (plan.apart) {
      product.each_four([&](int row, int column, const float (&sums)[4]) {
        finish_sum(row, column, [&](int64_t at, const auto& result) {
          const float window[] = {value(result(sums[0])), value(result(sums[1])), value(result(sums[2])),
                                  value(result(sums[3]))};
          pool(window, o.out + at, epilogue.positions + at);
        });
      });
    } else {
      product.each([&](int row, int column, float first, float second) {
        finish_sum(row, column, [&](int64_t at, const auto& result) { o.out[at] = result(first); });
        finish_sum(row, column + 1, [&](int64_t at, const auto& result) { o.out[at] = result(second); });
      });
    }
    sync_block();
  }
}

template <class Tile>
struct WeightShared {
  typename Tile::Slice stages[kStages];
  Tap taps[Tile::kColumns];
  Pixel pixels[2][kSlice<typename Tile::S>];
  int64_t outs[2][kSlice<typename Tile::S>];
};

struct WeightWays {
  Way gradient, input;
};

/// The gradient of the weights: rows are output channels, columns taps, and the steps of the sum pixels.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kWeightBlocks<Tile>)
    grad_weight_kernel(Conv2dGeometry g, Tensors tensors, WeightPlan plan, WeightWays ways,
                       Conv2dOperands<typename Tile::S> o, float* workspace) {
  if constexpr (!Tile::kMade) return stop();
  using S = typename Tile::S;
  WeightShared<Tile>& shared = *shared_memory<WeightShared<Tile>>();
  const Axes axes(g, Pass::forward, tensors, 0, 0);
  const Channels& channels = axes.channels;
  const int64_t pixels = g.n * g.out[0] * g.out[1], slices = ceil_div(pixels, kSlice<S>);
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    Digits digits(tile);
    const int row0 = static_cast<int>(digits.next(plan.row_tiles)) * Tile::kRows;
    const int column0 = static_cast<int>(digits.next(plan.column_tiles)) * Tile::kColumns;
    const int group = static_cast<int>(digits.next(channels.groups));
    const int64_t part = digits.rest();
    for (int i = threadIdx.x; i < Tile::kColumns; i += Tile::kThreads) shared.taps[i] = axes.tap(column0 + i);

    Carrier<S, Tile::kRows, Tile::kThreads> a(ways.gradient);
    Carrier<S, Tile::kColumns, Tile::kThreads> b(ways.input);
    const auto prepare = [&](int64_t number) {
      const int step = threadIdx.x;
      if (step >= kSlice<S>) return;
      axes.find((part + number * plan.parts.count) * kSlice<S> + step, pixels, group, shared.pixels[number % 2][step],
                shared.outs[number % 2][step]);
    };
    const auto start = [&](typename Tile::Slice& slice, int64_t number) {
      const Pixel* pixels = shared.pixels[number % 2];
      const int64_t* outs = shared.outs[number % 2];
      a.start(slice.a, [&](int row, int step) {
        const int64_t gy = outs[step];
        return gy >= 0 && row0 + row < channels.produce ? o.a + gy + static_cast<int64_t>(row0 + row) * tensors.y.c
                                                        : nullptr;
      });
      b.start(slice.b, [&](int column, int step) { return axes.place(o.b, pixels[step], shared.taps[column]); });
    };
    const auto finish = [&](typename Tile::Slice& slice) {
      a.finish(slice.a);
      b.finish(slice.b);
    };
    Tile product;
    product.multiply(shared.stages, part < slices ? ceil_div(slices - part, plan.parts.count) : 0, start, finish,
                     prepare);

    const int columns = axes.taps();
    product.each([&](int row, int column, float first, float second) {
      const int64_t weight = (static_cast<int64_t>(group) * channels.produce + row0 + row) * columns;
      const auto put = [&](int at, float sum) {
        if (row0 + row < channels.produce && at < columns) plan.parts.put(part, weight + at, sum, workspace, o.out);
      };
      put(column0 + column, first);
      put(column0 + column + 1, second);
    });
    sync_block();
  }
}

/// Calls start(math), where math() is a constant: how this device multiplies numbers of type S.
template <class S, class Start>
void with_math(bool tf32, const Start& start) {
  const bool tensor_cores = architecture() >= 80;
  if constexpr (std::is_same_v<S, Float16>) {
    start(std::integral_constant<Math, Math::tensor>{});
  } else if (!tensor_cores) {
    start(std::integral_constant<Math, Math::plain>{});
  } else if (std::is_same_v<S, BFloat16> || tf32) {
    start(std::integral_constant<Math, Math::tensor>{});
  } else if constexpr (std::is_same_v<S, float>) {
    start(std::integral_constant<Math, Math::split>{});
  }
}

template <class Tile, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<typename Tile::S>& o,
               const Epilogue<typename Tile::S>& epilogue, Stream stream) {
  constexpr int kSize = Vector<typename Tile::S>::size;
  const Channels channels(g, kPass);
  const CorrelatePlan plan(g, kPass, Tile::kColumns, Tile::kRows, epilogue.positions ? Tile::kApart : 0);
  Way weights = channels.weight_produce == 1 ? across_rows(o.b, channels.produce) : Way::steps;
  if (kPass == Pass::forward) {
    const bool whole = channels.reduce * g.kernel[0] * g.kernel[1] % kSize == 0 && aligned(o.b);
    weights = whole ? Way::whole : Way::steps;
  }
  const bool whole = g.layout == Layout::channels_last && channels.reduce % kSize == 0 && aligned(o.a);
  launch(kPass == Pass::forward ? "conv2d_implicit_gemm forward" : "conv2d_implicit_gemm grad_input",
         whole ? correlate_kernel<Tile, true> : correlate_kernel<Tile, false>, plan.tiles, Tile::kThreads,
         sizeof(CorrelateShared<Tile>), stream, g, kPass, Tensors(g, kPass, plan.side), plan, weights, o, epilogue);
}

template <class S, Pass kPass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<S>& o, const Epilogue<S>& epilogue, Sum<S>*,
               Stream stream) {
  with_math<S>(o.tf32, [&](auto math) {
    using Large = LargeTile<S, math()>;
    const int64_t produce = Channels(g, kPass).produce;
    const int64_t outputs = produce * make_axis(g, kPass, 0, 0).count * make_axis(g, kPass, 1, 0).count;
    if (produce > Large::kColumns / 2 && outputs >= 2 * Large::kRows * Large::kColumns) {
      correlate<Large, kPass>(g, o, epilogue, stream);
    } else {
      correlate<SmallTile<S, math()>, kPass>(g, o, epilogue, stream);
    }
  });
}

template <class S>
WeightPlan plan_grad_weight(const Conv2dGeometry& g) {
  using Tile = WeightTile<S, Math::tensor>;  // all Math has this size
  return {g, Tile::kRows, Tile::kColumns};
}

template <class S>
int64_t grad_weight_workspace(const Conv2dGeometry& g) {
  return plan_grad_weight<S>(g).parts.workspace();
}

template <class S>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, Stream stream) {
  const WeightPlan plan = plan_grad_weight<S>(g);
  WeightWays ways{across_rows(o.a, g.k / g.groups), across_rows(o.b, g.c / g.groups)};
  if (g.layout == Layout::contiguous) {
    const bool whole = g.out[0] * g.out[1] % Vector<S>::size == 0 && aligned(o.a);
    ways = {whole ? Way::whole : Way::steps, Way::steps};
  }
  with_math<S>(o.tf32, [&](auto math) {
    using Tile = WeightTile<S, math()>;
    launch("conv2d_implicit_gemm grad_weight", grad_weight_kernel<Tile>, plan.tiles, Tile::kThreads,
           sizeof(WeightShared<Tile>), stream, g, Tensors(g, Pass::grad_weight), plan, ways, o, workspace);
  });
  add_up("conv2d_implicit_gemm add_up", plan.parts, workspace, o.out, stream);
}

/// Few channels to sum over do, where their taps fill slices, as in the 7x7 of three colours that many networks begin
/// with.
bool yields(const Conv2dGeometry& g, Pass pass) {
  const Channels channels(g, pass);
  const bool short_sum = channels.reduce < kFew && channels.reduce * g.kernel[0] * g.kernel[1] < 64;
  return channels.produce < kFew || short_sum;
}

const char* refuses(const Conv2dGeometry& g, Pass) {
  if (!small(g)) {
    return "the implicit_gemm algorithm counts within an image in 32 bits, and this image or kernel is larger";
  }
  if (g.groups > 1 && (g.c / g.groups < kFew || g.k / g.groups < kFew)) {
    return "the implicit_gemm algorithm is for groups of 8 channels or more on either side: of fewer, its tiles would "
           "be almost empty";
  }
  return nullptr;
}

}  // namespace

template <class S>
Conv2dRow<S> conv2d_implicit_gemm() {
  constexpr const char* name = "implicit_gemm";
  constexpr const char* summary = "a matrix product on tensor cores, its operands copied straight from the tensors";
  if constexpr (std::is_same_v<S, double>) {
    const auto refuses_double = [](const Conv2dGeometry&, Pass) {
      return "the implicit_gemm algorithm is for float32, bfloat16 and float16";
    };
    return {name, summary, refuses_double, {no_workspace, nullptr}, {no_workspace, nullptr}, {no_workspace, nullptr}};
  } else {
    return {name,
            summary,
            refuses,
            {no_workspace, no_epilogue<S, correlate<S, Pass::forward>>, correlate<S, Pass::forward>},
            {no_workspace, no_epilogue<S, correlate<S, Pass::grad_input>>},
            {grad_weight_workspace<S>, grad_weight<S>},
            true,
            yields};
  }
}

template Conv2dRow<float> conv2d_implicit_gemm();
template Conv2dRow<double> conv2d_implicit_gemm();
template Conv2dRow<BFloat16> conv2d_implicit_gemm();
template Conv2dRow<Float16> conv2d_implicit_gemm();

}  // namespace cnnops::cuda
