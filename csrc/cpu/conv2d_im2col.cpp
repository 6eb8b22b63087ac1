// Convolution as a matrix product, without the matrix.
//
//   forward, grad_input    out[m, p]  = sum over r=(c,th,tw) of weight[m, r] * unfolded[r, p]
//   grad_weight            gw[k, r]   = sum over p=(n,oh,ow) of gy[k, p] * unfolded[r, p]
//
// An output pixel p = (n, i, j) is a column of the unfolded input. Columns run on from one image to the next, so small
// images still fill whole vectors. gemm.h asks for the unfolded input block by block, and the packing below writes each
// block straight from the image, border included; at no time does more of it exist than a block of 128 x 384. Packing
// also widens 16-bit numbers: sums are kept in float and rounded once, when a block is done.
//
// Why it beats plain loops a hundred times: packed panels let the inner loop run at the pace of the multiply-adds
// whatever the image's width, and each packed value is used for 128 output channels. But a pixel is packed once for
// every tap, and where there are few channels that costs more than the products: so other rungs come first where they
// can.
//
// A task is one block of the result, 128 channels x 384 pixels at most (or x 384 weights of a filter). Zeros are
// multiplied where a window hangs over a border of zeros: an infinite or NaN weight gives NaN there, where plain loops
// would skip it. Refuses channels_last.
#include "correlate.h"
#include "gemm.h"
#include "transpose.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// Where a window is one pixel, an image is one long row.
Conv2dGeometry flattened(Conv2dGeometry g) {
  const bool pointwise = g.kernel[0] * g.kernel[1] == 1 && g.in[0] == g.out[0] && g.in[1] == g.out[1];
  if (!pointwise || g.stride[0] * g.stride[1] != 1 || g.padding[0] != 0 || g.padding[1] != 0) return g;
  g.in[1] = g.out[1] = g.in[0] * g.in[1];
  g.in[0] = g.out[0] = 1;
  return g;
}

// ---- forward and grad_input ----

/// Consecutive columns of the unfolded input that lie in one row of one image and in one panel, from `lane` on.
struct Segment {
  int64_t n, i, j, count, panel, lane;
};

constexpr int64_t kGoodTasks = 16, kGoodColumns = 192;

/// Blocks of the result. Those of columns are of one size, or the thread that got the small ones would wait.
struct Blocks {
  int64_t rows, columns, size, per_class, tasks;  // `columns` blocks of `size` columns
};

template <class T>
Blocks correlation_blocks(const Conv2dGeometry& g, Pass pass) {
  const Correlation t = make_correlation(g, pass, 0, 0, 0);  // class 0 has the most outputs
  const int64_t pixels = g.n * t.h.count * t.w.count;
  const int64_t products = g.groups * axis_classes(g, pass, 0) * axis_classes(g, pass, 1);
  Blocks b;
  b.rows = ceil_div(t.rows, kBlockRows);
  b.columns = ceil_div(pixels, kBlockColumns);
  const int64_t wanted = ceil_div(kGoodTasks, larger(1, products * b.rows));
  b.columns = larger(b.columns, smaller(wanted, pixels / kGoodColumns));
  b.size = round_up(ceil_div(pixels, larger(1, b.columns)), kLanes<T>);
  b.columns = b.size == 0 ? 0 : ceil_div(pixels, b.size);
  b.per_class = b.rows * b.columns;
  b.tasks = products * b.per_class;
  return b;
}

/// The tap counters (c, th, tw) of depth r, stepped like an odometer.
struct Taps {
  int64_t c, th, tw;
  Taps(const Correlation& t, int64_t r) : c(r / t.taps()), th(r % t.taps() / t.w.taps), tw(r % t.w.taps) {}
  void next(const Correlation& t) {
    if (++tw < t.w.taps) return;
    tw = 0;
    if (++th < t.h.taps) return;
    th = 0;
    ++c;
  }
};

template <class S, Pass pass>
void pack_weights(const Correlation& t, const S* weight, int64_t row0, int64_t rows, int64_t r0, int64_t depth,
                  Sum<S>* to) {
  for (int64_t m0 = 0; m0 < rows; m0 += kTileRows, to += depth * kTileRows) {
    const int64_t count = smaller(kTileRows, rows - m0);
    const S* from = weight + t.weight0 + (row0 + m0) * t.weight_row;
    if (pass == Pass::forward) {  // a filter's numbers stand in this order
      pack_rows(from + r0, t.weight_row, count, depth, to);
    } else if (t.weight_row == 1) {
      for (int64_t r = 0; r < depth; ++r) pack_column(from + (r0 + r) * t.weight_channel, count, to + r * kTileRows);
    } else {
      Taps tap(t, r0);
      for (int64_t r = 0; r < depth; ++r, tap.next(t)) {
        const S* filter = from + tap.c * t.weight_channel + t.weight_tap(tap.th, tap.tw);
        for (int m = 0; m < count; ++m) to[r * kTileRows + m] = value(filter[m * t.weight_row]);
      }
    }
  }
}

template <class S>
void pack_pixels(const Correlation& t, const S* in, const Segment* segments, int64_t count, int64_t r0, int64_t depth,
                 Sum<S>* to) {
  using T = Sum<S>;
  Taps tap(t, r0);
  const int64_t image = t.in_channels * t.in_plane, panel = depth * kTileColumns<T>;
  for (int64_t r = 0; r < depth; ++r, to += kTileColumns<T>, tap.next(t)) {
    const S* plane = in + (t.in_channel0 + tap.c) * t.in_plane;
    const int64_t offset_h = t.h.offset0 + tap.th * t.h.offset_step, offset_w = t.w.offset0 + tap.tw * t.w.offset_step;
    for (int64_t s = 0; s < count; ++s) {
      const Segment& seg = segments[s];
      const int64_t ih = pixel_at(seg.i * t.h.in_step + offset_h, t.h.in_size, t.border);
      const bool inside = ih >= 0;
      const S* row = plane + seg.n * image + (inside ? ih : 0) * t.in_width;
      copy_padded(row, inside ? t.w.in_size : 0, seg.j * t.w.in_step + offset_w, t.w.in_step, seg.count, t.border,
                  to + seg.panel * panel + seg.lane);
    }
    const Segment& last = segments[count - 1];
    for (int64_t j = last.lane + last.count; j % kLanes<T> != 0; ++j) to[last.panel * panel + j] = 0;
  }
}

/// to[j*step] = from[j] + bias, rounded, for j < count; no more than a panel's columns.
template <class S>
void store_row(const Sum<S>* from, Sum<S> bias, int64_t count, int64_t step, S* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  if (step != 1 && std::is_same_v<S, Sum<S>>) {
    for (int64_t j = 0; j < count; ++j) to[j * step] = rounded<S>(from[j] + bias);
    return;
  }
  S together[kTileColumns<Sum<S>>];
  S* row = step == 1 ? to : together;
  for (int64_t j = 0; j < count; j += L) {
    const int64_t lanes = smaller(count - j, L);
    store_first(row + j, load_first(from + j, lanes) + broadcast(bias), lanes);
  }
  for (int64_t j = 0; j < count && step != 1; ++j) to[j * step] = together[j];
}

template <class S, Pass pass>
void correlate(const Conv2dGeometry& shape, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const Conv2dGeometry g = flattened(shape);
  const Blocks blocks = correlation_blocks<T>(g, pass);
  const int64_t classes_h = axis_classes(g, pass, 0), classes_w = axis_classes(g, pass, 1);
  for (int64_t task = begin; task < end; ++task) {
    // Classes have unlike numbers of taps, and each thread should get of all: they stand innermost.
    const int64_t cls = task % (classes_h * classes_w), block = task / (classes_h * classes_w) % blocks.per_class;
    const int64_t group = task / (classes_h * classes_w) / blocks.per_class;
    const Correlation t = make_correlation(g, pass, group, cls / classes_w, cls % classes_w);
    const int64_t pixels = t.h.count * t.w.count;
    const int64_t row0 = block % blocks.rows * kBlockRows, rows = smaller(kBlockRows, t.rows - row0);
    const int64_t p0 = block / blocks.rows * blocks.size, columns = smaller(blocks.size, g.n * pixels - p0);
    if (columns <= 0) continue;  // a smaller class than class 0

    Segment segments[kBlockColumns];
    int64_t count = 0;
    for (int64_t column = 0; column < columns; ++count) {
      const int64_t p = p0 + column, i = p % pixels / t.w.count, j = p % t.w.count;
      const int64_t lane = column % kTileColumns<T>;
      const int64_t run = smaller(smaller(t.w.count - j, kTileColumns<T> - lane), columns - column);
      segments[count] = {p / pixels, i, j, run, column / kTileColumns<T>, lane};
      column += run;
    }

    const T* c = multiply_block(
        rows, columns, t.depth(),
        [&](int64_t r0, int64_t depth, T* to) { pack_weights<S, pass>(t, o.b, row0, rows, r0, depth, to); },
        [&](int64_t r0, int64_t depth, T* to) { pack_pixels(t, o.a, segments, count, r0, depth, to); }, workspace);

    for (int64_t m = 0; m < rows; ++m) {
      const int64_t channel = t.out_channel0 + row0 + m;
      const T bias = o.bias ? value(o.bias[channel]) : T(0);
      for (int64_t s = 0; s < count; ++s) {
        const Segment& seg = segments[s];
        S* out = o.out + (seg.n * t.out_channels + channel) * t.out_plane +
                 (t.h.first + seg.i * t.h.step) * t.out_width + t.w.first + seg.j * t.w.step;
        store_row<S>(c + m * kBlockColumns + seg.panel * kTileColumns<T> + seg.lane, bias, seg.count, t.w.step, out);
      }
    }
  }
}

// ---- grad_weight ----

/// gy as the left factor: a[panel][p][row], pixels p = (n, oh, ow) running through the batch.
template <class S>
void pack_gradient(const Conv2dGeometry& g, const S* gy, int64_t k0, int64_t rows, int64_t p0, int64_t depth,
                   Sum<S>* to) {
  const int64_t plane = g.out[0] * g.out[1];
  for (int64_t m0 = 0; m0 < rows; m0 += kTileRows, to += depth * kTileRows)
    for (int64_t p = 0; p < depth;) {
      const int64_t n = (p0 + p) / plane, at = (p0 + p) % plane, count = smaller(depth - p, plane - at);
      pack_rows(gy + (n * g.k + k0 + m0) * plane + at, plane, smaller(kTileRows, rows - m0), count, to + p * kTileRows);
      p += count;
    }
}

/// The unfolded input as the right factor: b[panel][p][weight], one lane per (c, kh, kw) of the filter. A vector of
/// pixels of one row is loaded for each of a vector of weights, and turned.
template <class S>
void pack_windows(const Conv2dGeometry& g, const S* x, int64_t c0, int64_t r0, int64_t columns, int64_t p0,
                  int64_t depth, Sum<S>* to) {
  using T = Sum<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t plane = g.out[0] * g.out[1], kernel_plane = g.kernel[0] * g.kernel[1];
  int64_t channel[kBlockColumns], dh[kBlockColumns], dw[kBlockColumns];
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t r = r0 + j;
    channel[j] = (c0 + r / kernel_plane) * g.in[0] * g.in[1];
    dh[j] = r % kernel_plane / g.kernel[1] * g.dilation[0] - g.padding[0];
    dw[j] = r % g.kernel[1] * g.dilation[1] - g.padding[1];
  }
  for (int64_t p = 0; p < depth;) {
    const int64_t n = (p0 + p) / plane, oh = (p0 + p) % plane / g.out[1], ow = (p0 + p) % g.out[1];
    const int64_t pixels = smaller(smaller(depth - p, g.out[1] - ow), L);
    const S* image = x + n * g.c * g.in[0] * g.in[1];
    for (int64_t j0 = 0; j0 < columns; j0 += L) {
      Vec<T> square[L];
      for (int64_t i = 0, j = j0; i < L; ++i, ++j) {
        const int64_t ih = j < columns ? pixel_at(oh * g.stride[0] + dh[j], g.in[0], g.border) : -1;
        square[i] = ih < 0 ? Vec<T>{}
                           : load_padded(image + channel[j] + ih * g.in[1], g.in[1], ow * g.stride[1] + dw[j],
                                         g.stride[1], pixels, g.border);
      }
      transpose<T>(square);
      T* panel = to + j0 / kTileColumns<T> * kTileColumns<T> * depth + j0 % kTileColumns<T>;
      for (int64_t i = 0; i < pixels; ++i) store(panel + (p + i) * kTileColumns<T>, square[i]);
    }
    p += pixels;
  }
}

constexpr int64_t kFewTasks = 4;

/// Blocks of gw, smaller ones where they would be few: the longer side is halved, as long as a tile is left.
template <class T>
struct WeightBlocks {
  int64_t rows, columns, down, across, tasks;
  explicit WeightBlocks(const Conv2dGeometry& g) {
    const int64_t k_group = g.k / g.groups, filter = g.c / g.groups * g.kernel[0] * g.kernel[1];
    const auto cut = [&](int64_t most_rows, int64_t most_columns) {
      rows = smaller(most_rows, round_up(ceil_div(k_group, ceil_div(k_group, most_rows)), kTileRows));
      columns = smaller(most_columns, round_up(ceil_div(filter, ceil_div(filter, most_columns)), kLanes<T>));
      down = ceil_div(k_group, rows);
      across = ceil_div(filter, columns);
      tasks = g.groups * down * across;
    };
    cut(kBlockRows, kBlockColumns);
    while (tasks < kFewTasks && (rows > kTileRows || columns > kLanes<T>)) {
      const bool columns_first = columns > kLanes<T> && (columns >= rows || rows <= kTileRows);
      cut(columns_first ? rows : round_up(rows / 2, kTileRows),
          columns_first ? round_up(columns / 2, kLanes<T>) : columns);
    }
  }
};

template <class S>
void grad_weight(const Conv2dGeometry& shape, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin,
                 int64_t end) {
  using T = Sum<S>;
  const Conv2dGeometry g = flattened(shape);
  const WeightBlocks<T> blocks(g);
  const int64_t k_group = g.k / g.groups, c_group = g.c / g.groups, filter = c_group * g.kernel[0] * g.kernel[1];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row0 = task % blocks.down * blocks.rows, rows = smaller(blocks.rows, k_group - row0);
    const int64_t r0 = task / blocks.down % blocks.across * blocks.columns;
    const int64_t columns = smaller(blocks.columns, filter - r0), group = task / blocks.down / blocks.across;
    const int64_t k0 = group * k_group + row0;
    const T* c = multiply_block(
        rows, columns, g.n * g.out[0] * g.out[1],
        [&](int64_t p0, int64_t depth, T* to) { pack_gradient(g, o.a, k0, rows, p0, depth, to); },
        [&](int64_t p0, int64_t depth, T* to) { pack_windows(g, o.b, group * c_group, r0, columns, p0, depth, to); },
        workspace);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < columns; ++j) o.out[(k0 + m) * filter + r0 + j] = rounded<S>(c[m * kBlockColumns + j]);
  }
}

const char* refuses(const Conv2dGeometry& g, Pass) {
  return g.layout == Layout::contiguous ? nullptr
                                        : "it reads contiguous planes; in channels_last a plane's pixels lie apart";
}
int64_t workspace(const Conv2dGeometry&) { return kGemmWorkspace; }

}  // namespace

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_im2col() {
  return {"im2col",
          "blocked matrix multiply, the input unfolded block by block; contiguous tensors",
          refuses,
          {[](const Conv2dGeometry& g) { return correlation_blocks<Sum<S>>(g, Pass::forward).tasks; }, workspace,
           correlate<S, Pass::forward>},
          {[](const Conv2dGeometry& g) { return correlation_blocks<Sum<S>>(g, Pass::grad_input).tasks; }, workspace,
           correlate<S, Pass::grad_input>},
          {[](const Conv2dGeometry& g) { return WeightBlocks<Sum<S>>(g).tasks; }, workspace, grad_weight<S>}};
}

template Conv2dAlgorithm<Conv2dRun<float>> conv2d_im2col();
template Conv2dAlgorithm<Conv2dRun<double>> conv2d_im2col();
template Conv2dAlgorithm<Conv2dRun<BFloat16>> conv2d_im2col();
template Conv2dAlgorithm<Conv2dRun<Float16>> conv2d_im2col();

}  // namespace cnnops::cpu::CNNOPS_ISA
