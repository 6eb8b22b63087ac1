// Convolution where it stands: vectors of one output row, a few output channels at a time, sums in registers.
//
//   y[n, k..k+M, oh, ow..ow+V*lanes]  +=  w[k..k+M, c, kh, kw] (each number spread over a vector)
//                                       * x[n, c, ih, iw..] (V vectors, shared by the M channels)
//
// A register tile of M channels x V vectors makes M*V multiply-adds from V loads of the input. The input rows that a tile
// needs are first copied, with zeros for the border, to a small buffer: [c][th][phase][column]. With a stride s, every
// s-th pixel goes to the same phase, so that neighbouring outputs read neighbouring numbers whatever the stride. One copy
// serves all output channels and all taps of the row, and nothing else is packed: that is why `direct` beats `im2col`
// where channels are few, as in the first layers of a network. The gradient of the input runs through the same code
// (see ../correlation.h).
//
// The gradient of the weight turns the vectors round: lanes run along an output row, a tile holds M output channels x
// F taps of the kernel's row, and the lanes are added up at the end of each image, images in their order.
//
// A task is one tile of one output row (forward, grad_input), or M x 1 filter rows (grad_weight). Zeros of the border are
// multiplied (forward, grad_input): an infinite or NaN weight gives NaN there, where plain loops would skip it.
// Refuses rows too short to fill half a vector, very wide kernels, and layers whose rows overflow the buffer.
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kNarrowestRow = 8;
constexpr int64_t kWidestKernel = 64;            // taps whose column in the buffer is looked up in a table
constexpr int64_t kLargestBuffer = 1 << 18;      // elements: 1 MiB of float
constexpr int kMaxVectors = 3;

// ---- forward and grad_input ----

/// How an output row is cut into tiles, and where a tile's input lies in the buffer.
struct RowTiles {
  int64_t vectors, tiles;             // V, and tiles per row
  int64_t first_offset;               // of the tap furthest to the left
  int64_t phases, width;              // buffer: [c][th][phases][width]
};

template <class T>
RowTiles row_tiles(const Axis& w) {
  RowTiles r;
  const int64_t needed = ceil_div(w.count, kLanes<T>);
  r.vectors = 1;
  for (int64_t v = 2; v <= kMaxVectors; ++v) {
    if (round_up(needed, v) <= round_up(needed, r.vectors)) r.vectors = v;
  }
  r.tiles = ceil_div(needed, r.vectors);
  const int64_t reach = (w.taps - 1) * w.offset_step;
  r.first_offset = w.offset0 + smaller(reach, 0);
  r.phases = w.in_step;
  r.width = r.vectors * kLanes<T> + (reach < 0 ? -reach : reach) / w.in_step;
  return r;
}

/// M output channels x V vectors of one output row, for all inputs and taps of the correlation.
template <class T, int M, int V>
void row_tile(const Correlation& t, const RowTiles& r, const T* buffer, const int64_t* column, const T* weight,
              const T* bias, T* out, int64_t count) {
  Vec<T> sum[M][V]{};
  for (int64_t c = 0; c < t.channels; ++c)
    for (int64_t th = 0; th < t.h.taps; ++th, buffer += r.phases * r.width) {
      const T* filter = weight + c * t.weight_channel + t.weight_tap(th, 0);
      for (int64_t tw = 0; tw < t.w.taps; ++tw, filter += t.w.k_step) {
        Vec<T> x[V];
        for (int v = 0; v < V; ++v) x[v] = load(buffer + column[tw] + v * kLanes<T>);
        for (int m = 0; m < M; ++m) {
          const Vec<T> w = broadcast(filter[m * t.weight_row]);
          for (int v = 0; v < V; ++v) sum[m][v] = multiply_add(w, x[v], sum[m][v]);
        }
      }
    }
  for (int m = 0; m < M; ++m) {
    T* row = out + m * t.out_plane;
    for (int v = 0; v < V; ++v) {
      const Vec<T> y = sum[m][v] + broadcast(bias ? bias[m] : T(0));
      const int64_t left = smaller(count - v * kLanes<T>, kLanes<T>);
      if (t.w.step == 1 && left == kLanes<T>) {
        store(row + v * kLanes<T>, y);
      } else {
        for (int64_t j = 0; j < left; ++j) row[(v * kLanes<T> + j) * t.w.step] = y[j];
      }
    }
  }
}

template <class T, int M>
auto row_tile_of(int64_t vectors) {
  return vectors == 1 ? row_tile<T, M, 1> : vectors == 2 ? row_tile<T, M, 2> : row_tile<T, M, 3>;
}

/// Tasks are numbered (n, group, class, row i, tile), over class (0, 0): it has the most rows and tiles.
template <class T>
struct Tasks {
  int64_t classes_h, classes_w, rows, tiles, total;
  Tasks(const Conv2dGeometry& g, Pass pass) {
    classes_h = axis_classes(g, pass, 0);
    classes_w = axis_classes(g, pass, 1);
    rows = make_axis(g, pass, 0, 0).count;
    // The number of vectors per tile follows the class's own width, so the class with the most tiles may be any.
    tiles = 0;
    for (int64_t cls = 0; cls < classes_w; ++cls) tiles = larger(tiles, row_tiles<T>(make_axis(g, pass, 1, cls)).tiles);
    total = g.n * g.groups * classes_h * classes_w * rows * tiles;
  }
};

template <class T, Pass pass>
void correlate(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* buffer, int64_t begin, int64_t end) {
  const Tasks<T> tasks(g, pass);
  for (int64_t task = begin; task < end; ++task) {
    int64_t rest = task;
    const auto digit = [&rest](int64_t base) {
      const int64_t d = rest % base;
      rest /= base;
      return d;
    };
    const int64_t tile = digit(tasks.tiles), i = digit(tasks.rows), class_w = digit(tasks.classes_w);
    const int64_t class_h = digit(tasks.classes_h), group = digit(g.groups), n = rest;
    const Correlation t = make_correlation(g, pass, group, class_h, class_w);
    const RowTiles r = row_tiles<T>(t.w);
    if (i >= t.h.count || tile >= r.tiles) continue;

    const int64_t j0 = tile * r.vectors * kLanes<T>;
    int64_t column[kWidestKernel];
    for (int64_t tw = 0; tw < t.w.taps; ++tw) {
      const int64_t offset = t.w.offset0 + tw * t.w.offset_step - r.first_offset;
      column[tw] = offset % r.phases * r.width + offset / r.phases;
    }
    T* to = buffer;
    for (int64_t c = 0; c < t.channels; ++c)
      for (int64_t th = 0; th < t.h.taps; ++th) {
        const int64_t ih = i * t.h.in_step + t.h.offset0 + th * t.h.offset_step;
        const bool inside = ih >= 0 && ih < t.h.in_size;
        const T* row = o.a + (n * t.in_channels + t.in_channel0 + c) * t.in_plane + (inside ? ih : 0) * t.in_width;
        for (int64_t phase = 0; phase < r.phases; ++phase, to += r.width)
          copy_padded(row, inside ? t.w.in_size : 0, j0 * t.w.in_step + r.first_offset + phase, t.w.in_step, r.width, to);
      }

    for (int64_t m = 0; m < t.rows;) {
      const int64_t left = t.rows - m, channel = t.out_channel0 + m;
      const T* weight = o.b + t.weight0 + m * t.weight_row;
      T* out = o.out + (n * t.out_channels + channel) * t.out_plane + (t.h.first + i * t.h.step) * t.out_width +
               t.w.first + j0 * t.w.step;
      const int64_t size = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const auto run = size == kTileRows ? row_tile_of<T, kTileRows>(r.vectors)
                       : size == 4       ? row_tile_of<T, 4>(r.vectors)
                       : size == 2       ? row_tile_of<T, 2>(r.vectors)
                                         : row_tile_of<T, 1>(r.vectors);
      run(t, r, buffer, column, weight, o.bias ? o.bias + channel : nullptr, out, t.w.count - j0);
      m += size;
    }
  }
}

template <class T>
int64_t correlation_workspace(const Conv2dGeometry& g, Pass pass) {
  int64_t largest = 0;
  for (int64_t cls = 0; cls < axis_classes(g, pass, 1); ++cls) {
    const Correlation t = make_correlation(g, pass, 0, 0, cls);
    const RowTiles r = row_tiles<T>(t.w);
    const int64_t taps_h = ceil_div(g.kernel[0], t.h.k_step);
    largest = larger(largest, t.channels * taps_h * r.phases * r.width);
  }
  return largest;
}

// ---- grad_weight ----

constexpr int kTapsPerTile = 4;
constexpr int64_t kRowPiece = 256;                        // outputs of a row whose input is copied at a time
constexpr int kTileFilters = kVectorBytes == 64 ? 6 : 3;  // M * F sums: 24 of 32 registers, or 12 of 16

/// sums[m][f] += over one image of gy[k0 + m, oh, :] . x row (oh, kh) shifted by tap f, lane by lane.
template <class T, int M, int F>
void filter_tile(const Conv2dGeometry& g, const T* gy, const T* x, int64_t kh, int64_t kw, T* row, Vec<T> total[][F]) {
  const int64_t plane = g.out[0] * g.out[1];
  Vec<T> sum[M][F]{};
  for (int64_t oh = 0; oh < g.out[0]; ++oh) {
    const int64_t ih = oh * g.stride[0] - g.padding[0] + kh * g.dilation[0];
    if (ih < 0 || ih >= g.in[0]) continue;
    for (int64_t ow0 = 0; ow0 < g.out[1]; ow0 += kRowPiece) {
      const int64_t count = smaller(g.out[1] - ow0, kRowPiece);
      for (int f = 0; f < F; ++f) {
        const int64_t start = ow0 * g.stride[1] + (kw + f) * g.dilation[1] - g.padding[1];
        copy_padded(x + ih * g.in[1], g.in[1], start, g.stride[1], count, row + f * kRowPiece);
        for (int64_t j = count; j < round_up(count, kLanes<T>); ++j) row[f * kRowPiece + j] = 0;
      }
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        const int64_t left = smaller(count - j, kLanes<T>);
        Vec<T> window[F];
        for (int f = 0; f < F; ++f) window[f] = load(row + f * kRowPiece + j);
        for (int m = 0; m < M; ++m) {
          const T* from = gy + m * plane + oh * g.out[1] + ow0 + j;
          const Vec<T> grad = left == kLanes<T> ? load(from) : load_first(from, left);
          for (int f = 0; f < F; ++f) sum[m][f] = multiply_add(grad, window[f], sum[m][f]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int f = 0; f < F; ++f) total[m][f] += sum[m][f];
}

/// M filters' taps kw .. kw+F of row kh, summed over the batch.
template <class T, int M, int F>
void filters(const Conv2dGeometry& g, const Conv2dOperands<T>& o, int64_t k, int64_t c, int64_t kh, int64_t kw, T* row) {
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups;
  Vec<T> total[M][F]{};
  for (int64_t n = 0; n < g.n; ++n) {
    const T* gy = o.a + (n * g.k + k) * g.out[0] * g.out[1];
    const T* x = o.b + (n * g.c + k / k_group * c_group + c) * g.in[0] * g.in[1];
    filter_tile<T, M, F>(g, gy, x, kh, kw, row, total);
  }
  for (int m = 0; m < M; ++m)
    for (int f = 0; f < F; ++f)
      o.out[(((k + m) * c_group + c) * g.kernel[0] + kh) * g.kernel[1] + kw + f] = sum_lanes<T>(total[m][f]);
}

template <class T, int M>
void filters(const Conv2dGeometry& g, const Conv2dOperands<T>& o, int64_t k, int64_t c, int64_t kh, T* row) {
  int64_t kw = 0;
  for (; kw + kTapsPerTile <= g.kernel[1]; kw += kTapsPerTile) filters<T, M, kTapsPerTile>(g, o, k, c, kh, kw, row);
  const int64_t left = g.kernel[1] - kw;
  if (left == 3) filters<T, M, 3>(g, o, k, c, kh, kw, row);
  if (left == 2) filters<T, M, 2>(g, o, k, c, kh, kw, row);
  if (left == 1) filters<T, M, 1>(g, o, k, c, kh, kw, row);
}

/// Tasks are numbered (group, block of kTileFilters output channels, c, kh).
int64_t filter_tasks(const Conv2dGeometry& g) {
  return g.groups * ceil_div(g.k / g.groups, kTileFilters) * (g.c / g.groups) * g.kernel[0];
}

template <class T>
void grad_weight(const Conv2dGeometry& g, const Conv2dOperands<T>& o, T* row, int64_t begin, int64_t end) {
  const int64_t c_group = g.c / g.groups, k_group = g.k / g.groups, blocks = ceil_div(k_group, kTileFilters);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kh = task % g.kernel[0], c = task / g.kernel[0] % c_group, block = task / g.kernel[0] / c_group;
    const int64_t k0 = block / blocks * k_group, first = block % blocks * kTileFilters;
    const int64_t last = smaller(first + kTileFilters, k_group);
    int64_t k = first;
    for (; k + kTileFilters <= last; k += kTileFilters) filters<T, kTileFilters>(g, o, k0 + k, c, kh, row);
    for (; k < last; ++k) filters<T, 1>(g, o, k0 + k, c, kh, row);
  }
}

// ---- the row of the table ----

template <class T>
const char* refuses(const Conv2dGeometry& g, Pass pass) {
  const int64_t row = pass == Pass::grad_input ? g.in[1] / g.stride[1] : g.out[1];
  if (row < kNarrowestRow) return "its vectors run along an output row, and rows of fewer than 8 outputs leave them empty";
  if (g.kernel[1] > kWidestKernel) return "kernels wider than 64 do not fit its table of taps";
  if (pass != Pass::grad_weight && correlation_workspace<T>(g, pass) > kLargestBuffer)
    return "the input rows under one output row (channels x kernel height x width of a tile) pass its buffer of 1 MiB";
  return nullptr;
}

}  // namespace

template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_direct() {
  return {"direct",
          "register tiles along an output row; few channels, rows of 8 outputs and more",
          refuses<T>,
          {[](const Conv2dGeometry& g) { return Tasks<T>(g, Pass::forward).total; },
           [](const Conv2dGeometry& g) { return correlation_workspace<T>(g, Pass::forward); },
           correlate<T, Pass::forward>},
          {[](const Conv2dGeometry& g) { return Tasks<T>(g, Pass::grad_input).total; },
           [](const Conv2dGeometry& g) { return correlation_workspace<T>(g, Pass::grad_input); },
           correlate<T, Pass::grad_input>},
          {filter_tasks, [](const Conv2dGeometry&) { return kTapsPerTile * kRowPiece; }, grad_weight<T>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_direct();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_direct();

}  // namespace cnnops::cpu::CNNOPS_ISA
