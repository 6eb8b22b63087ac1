// The gradient of the weight for channels_last tensors.
//
//   gw[k, r]  =  sum over p of gy[p, k] * window[p, r]                      p = (n, oh, ow), r = (kh, kw, c)
//
// The tile of conv2d_channels_last.cpp makes it in one of two ways.
//
// By windows: the rows of a tile are output channels, its vectors lie along r, the steps go through blocks of 128 pixels,
// whose windows are copied. A task is a block of output channels x a panel of the filter.
//
// By rows, where channels are few and a row of pixels is not short: windows of neighbours overlap, and most of a copy
// would be copied again. So the rows of a tile are numbers of the filter, its vectors output channels, and the steps go
// along a row of pixels: what number r of the filter sees there is a line of x, one number every stride*C. Only the
// KH lines of x under a row of gy are copied, once for all r, with their border. A task is a panel of output channels x
// some numbers of the filter.
//
// Sums are made for each block of pixels, or row of them, from a fresh zero and added in order. Zeros of the border are
// multiplied: an infinite or NaN gradient gives NaN there, where plain loops would skip it.
#include "channels_last_tile.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kFewTasks = 4;
constexpr int64_t kBlockRows = 144, kBlockPixels = 128;  // output channels of a task, pixels of a block

// ---- by windows ----

/// Tasks are numbered (group, block of output channels, panel of the filter).
template <class T>
struct WeightTasks {
  int64_t rows, blocks, filter, total;
  Panels<T> panels;
  explicit WeightTasks(const Conv2dGeometry& g) : filter(g.c / g.groups * g.kernel[0] * g.kernel[1]), panels(filter) {
    const int64_t k_group = g.k / g.groups;
    blocks = ceil_div(k_group, kBlockRows);
    rows = ceil_div(k_group, blocks);
    blocks = ceil_div(k_group, rows);
    for (int most = kMostVectors - 1; most > 0 && g.groups * blocks * panels.count < kFewTasks; --most)
      panels = Panels<T>(filter, most);
    total = g.groups * blocks * panels.count;
  }
};

template <class T>
constexpr int64_t kWeightWorkspace =
    kBlockPixels * (kBlockRows + kMostVectors * kLanes<T>)+kBlockRows * kMostVectors * kLanes<T>;

/// The weights [k0, k0 + rows) x [r0, r0 + columns) of a group.
template <class S, int V>
void grad_weight_panel(const Conv2dGeometry& g, const Windows& t, const Conv2dOperands<S>& o, int64_t k0, int64_t rows,
                       int64_t r0, int64_t columns, Sum<S>* workspace) {
  using T = Sum<S>;
  constexpr int64_t M = kRows<V>, L = kLanes<T>, kPixels = kBlockPixels;
  T *grads = workspace, *windows = grads + kPixels * kBlockRows, *sums = windows + kPixels * V * L;
  const int64_t row = t.w.taps * t.channels, first_row = r0 / row, last_row = (r0 + columns - 1) / row;
  const int64_t padded = round_up(rows, M);
  for (int64_t i = 0; i < kPixels * kBlockRows; ++i) grads[i] = 0;
  for (int64_t i = 0; i < kPixels * V * L; ++i) windows[i] = 0;
  for (int64_t i = 0; i < padded * V * L; ++i) sums[i] = 0;

  const int64_t all = g.n * t.pixels();
  for (int64_t p0 = 0; p0 < all; p0 += kPixels) {
    const int64_t count = smaller(kPixels, all - p0);
    Pixel<S> pixels[kPixels];
    find_pixels(t, o.b, p0, count, pixels);
    for (int64_t p = 0; p < count; ++p)
      copy_numbers(o.a + (p0 + p) * g.k + t.out_channel0 + k0, rows, grads + p * kBlockRows);
    for (int64_t th = first_row; th <= last_row; ++th) {
      const int64_t begin = larger(r0, th * row), end = smaller(r0 + columns, (th + 1) * row);
      const Run run = make_run(t, th, begin - th * row, end - th * row);
      for (int64_t p = 0; p < count; ++p) copy_run(t, pixels[p], run, windows + p * V * L + begin - r0);
    }
    for (int64_t k = 0; k < rows; k += M) {
      const T *a[M], *b = windows;
      T* to[M];
      for (int64_t m = 0; m < M; ++m) {
        a[m] = grads + k + m;
        to[m] = sums + (k + m) * V * L;
      }
      multiply_tile<T, V, int(M)>(1, &count, a, kBlockRows, &b, to, to);
    }
  }
  for (int64_t k = 0; k < rows; ++k) {
    S* out = o.out + t.weight0 + (k0 + k) * t.weight_row + r0;
    for (int64_t j = 0; j < columns; j += L) store_first(out + j, load(sums + k * V * L + j), smaller(L, columns - j));
  }
}

template <class S>
void grad_weight_by_windows(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin,
                            int64_t end) {
  using T = Sum<S>;
  const WeightTasks<T> tasks(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r0 = task % tasks.panels.count * tasks.panels.width;
    const int64_t k0 = task / tasks.panels.count % tasks.blocks * tasks.rows;
    const Windows t = make_windows(g, Pass::grad_weight, task / tasks.panels.count / tasks.blocks, 0);
    const int64_t rows = smaller(tasks.rows, t.rows - k0), columns = smaller(tasks.panels.width, tasks.filter - r0);
    with_vectors<T>(columns, [&](auto v) { grad_weight_panel<S, v>(g, t, o, k0, rows, r0, columns, workspace); });
  }
}

// ---- by rows ----

constexpr int64_t kFewChannels = 16, kShortestRow = 16;
constexpr int64_t kMostNumbers = 512, kMostLines = 1 << 14;  // of a filter; of x under a row of gy

/// Tasks are numbered (panel of output channels, block of the filter's numbers).
template <class T>
struct RowTasks {
  int64_t filter, numbers, blocks, total;  // numbers of the filter: all, of a task
  int64_t line;                            // numbers of x's lines
  Panels<T> panels;
  explicit RowTasks(const Conv2dGeometry& g) : filter(g.c * g.kernel[0] * g.kernel[1]), panels(g.k) {
    const int64_t wanted = smaller(ceil_div(kFewTasks, panels.count), ceil_div(filter, 4));
    numbers = ceil_div(filter, wanted);
    blocks = ceil_div(filter, numbers);
    total = panels.count * blocks;
    line = ((smaller(g.out[1], kBlockPixels) - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1) * g.c;
    line = round_up(line, kLanes<T>);
  }
};

template <class T>
bool by_rows(const Conv2dGeometry& g) {
  if (g.groups != 1 || g.c < 1 || g.k < 1 || g.c > kFewChannels || g.out[1] < kShortestRow) return false;
  const RowTasks<T> tasks(g);
  return tasks.filter <= kMostNumbers && g.kernel[0] * tasks.line <= kMostLines;
}

template <class T>
constexpr int64_t kRowWorkspace = kMostLines + (kBlockPixels + kMostNumbers + kMostRows) * kMostVectors * kLanes<T>;

/// `pixels` pixels of row h of an image from column w on, border included.
template <class S>
void copy_line(const Conv2dGeometry& g, const S* image, int64_t h, int64_t w, int64_t pixels, Sum<S>* to) {
  constexpr int64_t L = kLanes<Sum<S>>;
  const int64_t row = pixel_at(h, g.in[0], g.border), width = row < 0 ? 0 : g.in[1] * g.c;
  const S* from = image + (row < 0 ? 0 : row) * g.in[1] * g.c;
  if (g.border == Border::zeros) {
    for (int64_t i = 0; i < pixels * g.c; i += L) {
      const int64_t lanes = smaller(L, pixels * g.c - i);
      store_first(to + i, load_inside(from, width, w * g.c + i, lanes), lanes);
    }
  } else {
    for (int64_t p = 0; p < pixels; ++p)
      copy_numbers(from + pixel_at(w + p, g.in[1], g.border) * g.c, g.c, to + p * g.c);
  }
}

/// The weights of V vectors of output channels from k0 on, numbers [r0, r1) of each filter.
template <class S, int V>
void grad_weight_panel_by_rows(const Conv2dGeometry& g, const Conv2dOperands<S>& o, int64_t line, int64_t k0,
                               int64_t r0, int64_t r1, Sum<S>* workspace) {
  using T = Sum<S>;
  constexpr int64_t M = kRows<V>, L = kLanes<T>;
  const int64_t taps_row = g.kernel[1] * g.c, channels = smaller(V * L, g.k - k0);
  T *lines = workspace, *grads = lines + kMostLines, *sums = grads + kBlockPixels * V * L;
  T* beyond = sums + kMostNumbers * V * L;  // what a tile has too many of
  const T* grads_begin = grads;
  for (int64_t i = 0; i < kBlockPixels * V * L; i += L) store(grads + i, Vec<T>{});
  for (int64_t i = 0; i < (r1 - r0) * V * L; i += L) store(sums + i, Vec<T>{});
  for (int64_t i = 0; i < M * V * L; i += L) store(beyond + i, Vec<T>{});

  for (int64_t n = 0; n < g.n; ++n)
    for (int64_t oh = 0; oh < g.out[0]; ++oh)
      for (int64_t ow = 0; ow < g.out[1]; ow += kBlockPixels) {
        const int64_t count = smaller(kBlockPixels, g.out[1] - ow);
        const S* gy = o.a + ((n * g.out[0] + oh) * g.out[1] + ow) * g.k + k0;
        for (int64_t p = 0; p < count; ++p) copy_numbers(gy + p * g.k, channels, grads + p * V * L);
        const S* image = o.b + n * g.in[0] * g.in[1] * g.c;
        for (int64_t kh = r0 / taps_row; kh <= (r1 - 1) / taps_row; ++kh)
          copy_line(g, image, oh * g.stride[0] + kh * g.dilation[0] - g.padding[0], ow * g.stride[1] - g.padding[1],
                    (count - 1) * g.stride[1] + (g.kernel[1] - 1) * g.dilation[1] + 1, lines + kh * line);

        const auto tile = [&](int64_t r, auto rows) {
          const T* a[rows];
          T* to[rows];
          for (int64_t m = 0; m < rows; ++m) {
            const int64_t number = smaller(r + m, r1 - 1);
            a[m] = lines + number / taps_row * line + number % taps_row / g.c * g.dilation[1] * g.c + number % g.c;
            to[m] = r + m < r1 ? sums + (r + m - r0) * V * L : beyond + m * V * L;
          }
          multiply_tile<T, V, rows>(1, &count, a, g.stride[1] * g.c, &grads_begin, to, to);
        };
        for (int64_t r = r0; r < r1;) {
          if (r1 - r > M / 2) {
            tile(r, std::integral_constant<int, int(M)>());
            r += M;
          } else {
            tile(r, std::integral_constant<int, int(M) / 2>());
            r += M / 2;
          }
        }
      }

  const int64_t filter = g.kernel[0] * taps_row;
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t r = r0; r < r1; ++r) o.out[(k0 + k) * filter + r] = rounded<S>(sums[(r - r0) * V * L + k]);
}

template <class S>
void grad_weight_by_rows(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin,
                         int64_t end) {
  using T = Sum<S>;
  const RowTasks<T> tasks(g);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t k0 = task / tasks.blocks * tasks.panels.width, r0 = task % tasks.blocks * tasks.numbers;
    with_vectors<T>(smaller(tasks.panels.width, g.k - k0), [&](auto v) {
      grad_weight_panel_by_rows<S, v>(g, o, tasks.line, k0, r0, smaller(r0 + tasks.numbers, tasks.filter), workspace);
    });
  }
}

}  // namespace

template <class S>
Conv2dRun<S> channels_last_grad_weight() {
  using T = Sum<S>;
  return {[](const Conv2dGeometry& g) { return by_rows<T>(g) ? RowTasks<T>(g).total : WeightTasks<T>(g).total; },
          [](const Conv2dGeometry& g) { return by_rows<T>(g) ? kRowWorkspace<T> : kWeightWorkspace<T>; },
          [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, T* workspace, int64_t begin, int64_t end) {
            (by_rows<T>(g) ? grad_weight_by_rows<S> : grad_weight_by_windows<S>)(g, o, workspace, begin, end);
          }};
}

template Conv2dRun<float> channels_last_grad_weight();
template Conv2dRun<double> channels_last_grad_weight();
template Conv2dRun<BFloat16> channels_last_grad_weight();
template Conv2dRun<Float16> channels_last_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
