// Convolution where it stands: vectors of one output row, a few output channels at a time, sums in registers.
//
//   y[n, k..k+M, oh, ow..ow+V*lanes]  +=  w[k..k+M, c, kh, kw] (each number spread over a vector)
//                                       * x[n, c, ih, iw..] (V vectors, shared by the M channels)
//
// A register tile of M channels x V vectors makes M*V multiply-adds from V loads of the input. The input rows that a
// tile needs are first copied, with zeros for the border, to a small buffer: [c][th][column]. One copy serves all
// output channels and all taps of the row, and nothing else is packed: that is why `direct` beats `im2col` where
// channels are few, as in the first layers of a network. The gradient of the input runs through the same code (see
// ../correlation.h).
//
// The gradient of the weight turns the vectors round: lanes run along an output row, a tile holds M output channels x
// F taps of the kernel's row, and the lanes are added up at the end, after the images' sums, images in their order.
//
// A task is one output row of a group (forward, grad_input), or one row of eight filters (grad_weight). Zeros of the
// border are multiplied: an infinite or NaN weight (forward, grad_input) or gradient (grad_weight) gives NaN there,
// where plain loops would skip it. Refuses strides along the width, rows too short to fill half a vector, 1x1 kernels,
// and rows that overflow the buffer.
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kNarrowestRow = 8;
constexpr int64_t kLargestBuffer = 1 << 18;  // elements: 1 MiB of float
constexpr int kMaxVectors = 3;

// ---- forward and grad_input ----

/// How an output row is cut into tiles, and where a tile's input lies in the buffer.
struct RowTiles {
  int64_t vectors;       // V
  int64_t first_offset;  // of the tap furthest to the left
  int64_t width;         // of a row of the buffer
};

template <class T>
RowTiles row_tiles(const Axis& w) {
  const int64_t needed = ceil_div(w.count, kLanes<T>), reach = (w.taps - 1) * w.offset_step;
  RowTiles r{1, w.offset0 + smaller(reach, 0), 0};
  for (int64_t v = 2; v <= kMaxVectors; ++v) {
    if (round_up(needed, v) <= round_up(needed, r.vectors)) r.vectors = v;
  }
  r.width = round_up(r.vectors * kLanes<T> + larger(reach, -reach), kLanes<T>);
  return r;
}

/// The taps [begin, end) along the height for which output row i reads a row inside the image.
struct RowTaps {
  int64_t begin, end;
};

RowTaps row_taps(const Axis& h, int64_t i) {
  RowTaps taps{0, h.taps};
  const auto outside = [&](int64_t th) {
    const int64_t ih = i * h.in_step + h.offset0 + th * h.offset_step;
    return ih < 0 || ih >= h.in_size;
  };
  while (taps.begin < taps.end && outside(taps.begin)) ++taps.begin;
  while (taps.begin < taps.end && outside(taps.end - 1)) --taps.end;
  return taps;
}

/// M output channels x V vectors of one output row, for all inputs and taps of the correlation.
template <class T, int M, int V>
void row_tile(const Correlation& t, const RowTiles& r, RowTaps taps, const T* buffer, const T* weight, const T* bias,
              T* out, int64_t count) {
  Vec<T> sum[M][V]{};
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t th = taps.begin; th < taps.end; ++th, buffer += r.width) {
      const T* filter = weight + c * t.weight_channel + t.weight_tap(th, 0);
      const T* row = buffer + t.w.offset0 - r.first_offset;
      for (int64_t tw = 0; tw < t.w.taps; ++tw, filter += t.w.k_step, row += t.w.offset_step) {
        Vec<T> x[V];
        for (int v = 0; v < V; ++v) x[v] = load(row + v * kLanes<T>);
        for (int m = 0; m < M; ++m) {
          const Vec<T> w = broadcast(filter[m * t.weight_row]);
          for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(w, x[v], sum[m][v]);
        }
      }
    }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      const Vec<T> y = sum[m][v] + broadcast(bias ? bias[m] : T(0));
      T* to = out + m * t.out_plane + v * kLanes<T>;
      const int64_t left = count - v * kLanes<T>;
      if (left > 0) store_first(to, y, smaller(left, kLanes<T>));
    }
  }
}

template <class T, int M>
auto row_tile_of(int64_t vectors) {
  return vectors == 1 ? row_tile<T, M, 1> : vectors == 2 ? row_tile<T, M, 2> : row_tile<T, M, 3>;
}

/// Copies the input rows under the tile that begins at output (i, j0): [c][th][column].
template <class T>
void copy_rows(const Correlation& t, const RowTiles& r, RowTaps taps, const T* in, int64_t n, int64_t i, int64_t j0,
               T* to) {
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t th = taps.begin; th < taps.end; ++th, to += r.width) {
      const int64_t ih = i * t.h.in_step + t.h.offset0 + th * t.h.offset_step;
      const T* row = in + (n * t.in_channels + t.in_channel0 + c) * t.in_plane + ih * t.in_width;
      for (int64_t j = 0; j < r.width; j += kLanes<T>)
        store(to + j, load_inside(row, t.w.in_size, j0 + r.first_offset + j, 1, kLanes<T>));
    }
}

/// Tasks are numbered (group, class of rows, n, row i), over the rows of class 0: it has the most.
struct Tasks {
  int64_t classes, rows, total;
  Tasks(const Conv2dGeometry& g, Pass pass)
      : classes(axis_classes(g, pass, 0)),
        rows(make_axis(g, pass, 0, 0).count),
        total(g.groups * classes * g.n * rows) {}
};

template <class T, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* buffer, int64_t begin, int64_t end) {
  const Tasks tasks(g, pass);
  Correlation t{};
  RowTiles r{};
  for (int64_t task = begin, known = -1; task < end; ++task) {
    const int64_t i = task % tasks.rows, n = task / tasks.rows % g.n, cls = task / (tasks.rows * g.n);
    if (cls != known) {  // the next group, or class of rows
      known = cls;
      t = make_correlation(g, pass, cls / tasks.classes, cls % tasks.classes, 0);
      r = row_tiles<T>(t.w);
    }
    if (i >= t.h.count) continue;
    const RowTaps taps = row_taps(t.h, i);
    for (int64_t j0 = 0; j0 < t.w.count; j0 += r.vectors * kLanes<T>) {
      copy_rows(t, r, taps, o.a, n, i, j0, buffer);
      for (int64_t m = 0; m < t.rows;) {
        const int64_t left = t.rows - m, channel = t.out_channel0 + m;
        const T* weight = o.b + t.weight0 + m * t.weight_row;
        T* out = o.out + (n * t.out_channels + channel) * t.out_plane + (t.h.first + i * t.h.step) * t.out_width + j0;
        const int64_t size = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const auto run = size == kTileRows ? row_tile_of<T, kTileRows>(r.vectors)
                         : size == 4       ? row_tile_of<T, 4>(r.vectors)
                         : size == 2       ? row_tile_of<T, 2>(r.vectors)
                                           : row_tile_of<T, 1>(r.vectors);
        run(t, r, taps, buffer, weight, o.bias ? o.bias + channel : nullptr, out, t.w.count - j0);
        m += size;
      }
    }
  }
}

template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  const Correlation t = make_correlation(g, pass, 0, 0, 0);
  return t.channels * ceil_div(g.kernel[0], t.h.k_step) * row_tiles<T>(t.w).width;
}

// ---- grad_weight ----

// A tile of M output channels x F taps: M*F sums, 24 of 32 registers (or 12 of 16).
constexpr int kMostTaps = 5;
constexpr int64_t kTileFilters = 8;  // output channels of a task; a multiple of no tile, so that all F can share it
constexpr int filters_per_tile(int taps) {
  return kVectorBytes == 64 ? (taps <= 3 ? 8 : taps == 4 ? 6 : 4) : (taps <= 3 ? 4 : taps == 4 ? 3 : 2);
}

/// M filters' taps kw .. kw+F of row kh: over each image, sums[m][f] += gy[k + m, oh, :] * x[ih, : shifted by tap f],
/// lane by lane; then the images' sums in their order.
template <class T, int M, int F>
void filter_tile(const Conv2dGeometry& g, const Conv2dOperands<T>& o, int64_t k, int64_t c, int64_t kh, int64_t kw) {
  const int64_t c_group = g.c / g.groups, c_in = k / (g.k / g.groups) * c_group + c, plane = g.out[0] * g.out[1];
  Vec<T> total[M][F]{};
  for (int64_t n = 0; n < g.n; ++n) {
    const T* gy = o.a + (n * g.k + k) * plane;
    const T* x = o.b + (n * g.c + c_in) * g.in[0] * g.in[1];
    Vec<T> sum[M][F]{};
    for (int64_t oh = 0; oh < g.out[0]; ++oh) {
      const int64_t ih = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
      if (ih < 0 || ih >= g.in[0]) continue;
      for (int64_t ow = 0; ow < g.out[1]; ow += kLanes<T>) {
        const int64_t left = smaller(g.out[1] - ow, kLanes<T>);
        const int64_t iw = ow * g.stride[1] - g.padding[1] + kw * g.dilation[1];
        Vec<T> window[F];
        for (int f = 0; f < F; ++f)
          window[f] = load_inside(x + ih * g.in[1], g.in[1], iw + f * g.dilation[1], g.stride[1], left);
        for (int m = 0; m < M; ++m) {
          const T* from = gy + m * plane + oh * g.out[1] + ow;
          const Vec<T> grad = left == kLanes<T> ? load(from) : load_first(from, left);
          for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, window[f], sum[m][f]);
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int f = 0; f < F; ++f) total[m][f] += sum[m][f];
  }
  for (int m = 0; m < M; ++m)
    for (int f = 0; f < F; ++f)
      o.out[(((k + m) * c_group + c) * g.kernel[0] + kh) * g.kernel[1] + kw + f] = sum_lanes<T>(total[m][f]);
}

template <class T, int F>
void filters(const Conv2dGeometry& g, const Conv2dOperands<T>& o, int64_t k, int64_t last, int64_t c, int64_t kh,
             int64_t kw) {
  constexpr int M = filters_per_tile(F);
  for (; k + M <= last; k += M) filter_tile<T, M, F>(g, o, k, c, kh, kw);
  for (; k < last; ++k) filter_tile<T, 1, F>(g, o, k, c, kh, kw);
}

/// Tasks are numbered (group, block of kTileFilters output channels, c, kh).
int64_t filter_tasks(const Conv2dGeometry& g) {
  return g.groups * ceil_div(g.k / g.groups, kTileFilters) * (g.c / g.groups) * g.kernel[0];
}

template <class T>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T*, int64_t begin, int64_t end) {
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, blocks = ceil_div(k_group, kTileFilters);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kh = task % g.kernel[0], c = task / g.kernel[0] % c_group, block = task / g.kernel[0] / c_group;
    const int64_t k0 = block / blocks * k_group, first = k0 + block % blocks * kTileFilters;
    const int64_t last = smaller(first + kTileFilters, k0 + k_group);
    for (int64_t kw = 0; kw < g.kernel[1];) {
      const int64_t taps = smaller(g.kernel[1] - kw, kMostTaps);
      const auto run = taps == 5   ? filters<T, 5>
                       : taps == 4 ? filters<T, 4>
                       : taps == 3 ? filters<T, 3>
                       : taps == 2 ? filters<T, 2>
                                   : filters<T, 1>;
      run(g, o, first, last, c, kh, kw);
      kw += taps;
    }
  }
}

// ---- the row of the table ----

template <class T>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  if (g.stride[1] != 1)
    return "its neighbouring lanes read neighbouring pixels, so the stride along the width must be 1";
  if (g.in[1] < kNarrowestRow || (pass != Pass::grad_input && g.out[1] < kNarrowestRow))
    return "its vectors run along a row, and rows of fewer than 8 pixels leave most of a vector empty";
  if (g.kernel[0] * g.kernel[1] == 1)
    return "a 1x1 kernel has no taps to share a copied row: this is a plain matrix product";
  if (larger(correlation_workspace<T>(g, Pass::forward), correlation_workspace<T>(g, Pass::grad_input)) >
      kLargestBuffer)
    return "the rows under one row of results (channels x kernel height x width of a tile) pass its buffer of 2^18 "
           "numbers";
  return nullptr;
}

}  // namespace

template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_direct() {
  return {
      "direct",
      "register tiles along an output row; stride 1 along the width, rows of 8 pixels and more",
      refuses<T>,
      {[](const Conv2dGeometry& g) { return Tasks(g, Pass::forward).total; },
       [](const Conv2dGeometry& g) { return correlation_workspace<T>(g, Pass::forward); }, correlate<T, Pass::forward>},
      {[](const Conv2dGeometry& g) { return Tasks(g, Pass::grad_input).total; },
       [](const Conv2dGeometry& g) { return correlation_workspace<T>(g, Pass::grad_input); },
       correlate<T, Pass::grad_input>},
      {filter_tasks, [](const Conv2dGeometry&) { return int64_t(0); }, grad_weight<T>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_direct();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_direct();

}  // namespace cnnops::cpu::CNNOPS_ISA
