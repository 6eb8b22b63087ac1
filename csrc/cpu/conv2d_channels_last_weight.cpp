// The gradient of the weight for channels_last tensors.
//
//   gw[k, r]  =  sum over p of gy[p, k] * window[p, r]                      p = (n, oh, ow), r = (kh, kw, c)
//
// The tile of conv2d_channels_last.cpp makes it in one of two ways.
//
// By taps: what all pixels see through one tap is x again, moved and cut off at its border. So for each tap gw is the
// product of two matrices, pixels x output channels and pixels x input channels, which lie in memory ready for the
// tile: its rows are channels of one, its vectors channels of the other, the steps go through pixels. For a 1x1 kernel
// they are read where they stand, unless pixels are so far apart, a multiple of 512 bytes, that a cache has few places
// for them; otherwise the pixels that see through the tap are put together in blocks, and what would see the border is
// not there to be multiplied. (Where channels are few, or the border shows pixels, whole windows are copied instead.)
// While a block is multiplied, the next one's pixels are fetched into the cache.
//
// A task is a block of the product. If such blocks would be few and pixels are many, the sums are made in parts, each a
// task of its own, that are added up in their order at the end.
//
// By rows, where channels are few and a row of pixels is not short: windows of neighbours overlap, and most of a copy
// would be copied again. So the rows of a tile are numbers of the filter, its vectors output channels, and the steps go
// along a row of pixels: what number r of the filter sees there is a line of x, one number every stride*C. Only the
// KH lines of x under a row of gy are copied, once for all r, with their border. A task is a panel of output channels x
// some numbers of the filter.
//
// Sums are made for each block of pixels, or row of them, from a fresh zero and added in order. Zeros of a border that
// is copied are multiplied: an infinite or NaN gradient gives NaN there, where plain loops would skip it.
#include "weight_products.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

// ---- by taps ----

constexpr int64_t kManyRows = 128;       // for which it pays to copy columns
constexpr int64_t kMuchInput = 8 << 20;  // bytes that are not in a cache when they are read

/// A distance between pixels of at least `numbers` by which many of them fit in a cache: an odd number of lines.
template <class T>
int64_t spread(int64_t numbers) {
  return round_up(numbers, 2 * kLineNumbers<T>) + kLineNumbers<T>;
}

/// Whether pixels so far apart share so few places in a cache that they are better copied for so many rows of tiles.
template <class T>
bool crowded(int64_t step, int64_t rows) {
  return step % (8 * kLineNumbers<T>) == 0 && rows >= kManyRows;
}

template <class T>
constexpr int64_t kProductWorkspace =
    kBlockPixels * (kBlockRows + kBlockColumns<T> + 4 * kLineNumbers<T>)+(kBlockRows + kMostRows) * kBlockColumns<T>;

/// Only the outputs that see the image through one tap, and only that tap.
static void narrow(Axis& axis, int64_t tap, Border border) {
  axis.offset0 += tap * axis.offset_step;
  axis.k0 = tap;
  axis.taps = 1;
  if (border != Border::zeros) return;
  const int64_t begin = axis.offset0 >= 0 ? 0 : ceil_div(-axis.offset0, axis.in_step);
  const int64_t last = axis.in_size - 1 - axis.offset0;
  axis.count = larger(0, smaller(axis.count, last < 0 ? 0 : last / axis.in_step + 1) - begin);
  axis.first = begin;
  axis.offset0 += begin * axis.in_step;
}

/// Numbers of pixels, `step` from one pixel to the next: a side of a product.
template <class T>
struct Side {
  const T* from;
  int64_t step;
};

/// sums[row][column], rows `pitch` apart, of a block: V vectors of columns at a time.
template <class S, int V>
void sum_block(const Conv2dGeometry& g, const Windows& t, const Conv2dOperands<S>& o, bool by_tap, bool turned,
               const Block& block, Sum<S>* workspace, Sum<S>* sums) {
  using T = Sum<S>;
  constexpr int M = kRows<V>;
  constexpr int64_t L = kLanes<T>, kPanel = V * L;
  const int64_t pitch = round_up(block.columns, kPanel);
  const int64_t x0 = turned ? block.row0 : block.column0, xs = turned ? block.rows : block.columns;
  const int64_t gy0 = turned ? block.column0 : block.row0, gys = turned ? block.columns : block.rows;
  const int64_t x_pitch = spread<T>(turned ? block.rows : pitch), gy_pitch = spread<T>(turned ? pitch : block.rows);

  // A side that is a matrix in memory already is read where it stands, if a cache can hold it as it stands.
  const bool all_outputs = std::is_same_v<S, T> && t.pixels() == g.out[0] * g.out[1];
  const auto stands = [&](int64_t step, bool left) {
    return all_outputs && !crowded<T>(step, left ? kManyRows : block.rows);
  };
  const bool gy_stands = stands(g.k, !turned) && (!turned || t.out_channel0 + gy0 + pitch <= g.k);
  const bool x_stands = stands(g.c, turned) && by_tap && g.stride[0] * g.stride[1] == 1 &&
                        t.pixels() == g.in[0] * g.in[1] && t.border == Border::zeros &&
                        (turned || t.in_channel0 + x0 + pitch <= g.c);
  T *gy_copy = workspace, *x_copy = gy_copy + kBlockPixels * gy_pitch;

  if (block.first == block.last) {
    for (int64_t i = 0; i < block.rows * pitch; i += L) store(sums + i, Vec<T>{});
  }
  const int64_t numbers = g.n * (g.out[0] * g.out[1] * g.k + g.in[0] * g.in[1] * g.c);
  const bool ahead = by_tap && numbers * int64_t(sizeof(S)) > kMuchInput;
  Pixel<S> found[2][kBlockPixels], *pixels = found[0], *next = found[1];
  const auto find = [&](int64_t p0, Pixel<S>* to) {
    const int64_t left = block.last - p0;
    if (left == 0) return int64_t(0);
    const int64_t count = ceil_div(left, ceil_div(left, kBlockPixels));
    if (ahead || !gy_stands || !x_stands) find_pixels(t, o.b, p0, count, to);
    return count;
  };
  int64_t count = find(block.first, pixels), next_count;
  for (int64_t p0 = block.first; p0 < block.last; p0 += count, count = next_count, std::swap(pixels, next)) {
    next_count = find(p0 + count, next);
    Side<T> gy{gy_copy, gy_pitch}, x{x_copy, x_pitch};
    if constexpr (std::is_same_v<S, T>) {
      if (gy_stands) gy = {o.a + p0 * g.k + t.out_channel0 + gy0, g.k};
      if (x_stands) x = {o.b + p0 * g.c + t.in_channel0 + x0, g.c};
    }
    for (int64_t p = 0; p < count && !gy_stands; ++p)
      copy_numbers(o.a + pixels[p].out * g.k + t.out_channel0 + gy0, gys, gy_copy + p * gy_pitch);
    if (!x_stands) {
      const int64_t row = t.w.taps * t.channels;
      for (int64_t th = x0 / row; th <= (x0 + xs - 1) / row; ++th) {
        const int64_t begin = larger(x0, th * row), end = smaller(x0 + xs, (th + 1) * row);
        const Run run = make_run(t, th, begin - th * row, end - th * row);
        for (int64_t p = 0; p < count; ++p) copy_run(t, pixels[p], run, x_copy + p * x_pitch + begin - x0);
      }
    }

    // The next block's numbers, some before each tile.
    const int64_t tiles = ceil_div(block.columns, kPanel) * ceil_div(block.rows, M);
    int64_t fetched = 0, turn = 0;
    const auto fetch_next = [&] {
      for (const int64_t until = smaller(next_count, next_count * ++turn / tiles + 1); fetched < until; ++fetched) {
        const Pixel<S>& pixel = next[fetched];
        fetch(o.a + pixel.out * g.k + t.out_channel0 + gy0, gys);
        fetch(pixel.image + pixel.at + x0, xs);
      }
    };

    const Side<T> left = turned ? x : gy, right = turned ? gy : x;
    for (int64_t j = 0; j < block.columns; j += kPanel) {
      const T* b = right.from + j;
      for_tiles<M>(0, block.rows, [&](int64_t r, auto rows) {
        if (ahead) fetch_next();
        const T* a[rows];
        T* to[rows];
        for (int64_t m = 0; m < rows; ++m) {
          a[m] = left.from + smaller(r + m, block.rows - 1);
          to[m] = sums + (r + m) * pitch + j;
        }
        multiply_tile<T, V, rows>(1, &count, a, left.step, &b, to, p0 == block.first ? nullptr : to, right.step);
      });
    }
  }
}

template <class S>
void grad_weight_by_taps(const Conv2dGeometry& g, const Conv2dOperands<S>& o, Sum<S>* workspace, int64_t begin,
                         int64_t end) {
  using T = Sum<S>;
  const Products<T> all(g);
  T* sums = workspace + kBlockPixels * (kBlockRows + kBlockColumns<T> + 4 * kLineNumbers<T>);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % all.parts, columns = task / all.parts % all.column_blocks;
    const int64_t rows = task / all.parts / all.column_blocks % all.row_blocks;
    const int64_t product = task / all.parts / all.column_blocks / all.row_blocks, tap = product % all.taps;
    Windows t = make_windows(g, Pass::grad_weight, product / all.taps, 0);
    if (all.by_tap) {
      narrow(t.h, tap / g.kernel[1], g.border);
      narrow(t.w, tap % g.kernel[1], g.border);
    }
    const Block block = all.block(rows, columns, part, g.n * t.pixels());
    with_vectors<T>(all.panel,
                    [&](auto v) { sum_block<S, v>(g, t, o, all.by_tap, all.turned, block, workspace, sums); });
    const int64_t at = t.weight_of(0, 0) + (all.turned ? block.column0 : block.row0) * t.weight_row +
                       (all.turned ? block.row0 : block.column0);
    const int64_t pitch = round_up(block.columns, all.panel), numbers = g.k * t.weight_row;
    if (all.parts == 1) {
      put_block(sums, pitch, block.rows, block.columns, all.turned, t.weight_row, o.out + at);
    } else {
      put_block(sums, pitch, block.rows, block.columns, all.turned, t.weight_row, o.parts + part * numbers + at);
    }
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
  if (g.groups != 1 || g.kernel[0] * g.kernel[1] == 1 || g.c < 1 || g.k < 1 || g.c > kFewChannels ||
      g.out[1] < kShortestRow)
    return false;
  const RowTasks<T> tasks(g);
  return tasks.filter <= kMostNumbers && g.kernel[0] * tasks.line <= kMostLines;
}

template <class T>
constexpr int64_t kRowWorkspace = kMostLines + (kBlockPixels + kMostNumbers + kMostRows) * kMostVectors * kLanes<T>;

/// The weights of V vectors of output channels from k0 on, numbers [r0, r1) of each filter.
template <class S, int V>
void grad_weight_panel_by_rows(const Conv2dGeometry& g, const Conv2dOperands<S>& o, int64_t line, int64_t k0,
                               int64_t r0, int64_t r1, Sum<S>* workspace) {
  using T = Sum<S>;
  constexpr int M = kRows<V>;
  constexpr int64_t L = kLanes<T>;
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

        for_tiles<M>(r0, r1, [&](int64_t r, auto rows) {
          const T* a[rows];
          T* to[rows];
          for (int64_t m = 0; m < rows; ++m) {
            const int64_t number = smaller(r + m, r1 - 1);
            a[m] = lines + number / taps_row * line + number % taps_row / g.c * g.dilation[1] * g.c + number % g.c;
            to[m] = r + m < r1 ? sums + (r + m - r0) * V * L : beyond + m * V * L;
          }
          multiply_tile<T, V, rows>(1, &count, a, g.stride[1] * g.c, &grads_begin, to, to);
        });
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
  return {[](const Conv2dGeometry& g) { return by_rows<T>(g) ? RowTasks<T>(g).total : Products<T>(g).total; },
          [](const Conv2dGeometry& g) { return by_rows<T>(g) ? kRowWorkspace<T> : kProductWorkspace<T>; },
          [](const Conv2dGeometry& g, const Conv2dOperands<S>& o, T* workspace, int64_t begin, int64_t end) {
            (by_rows<T>(g) ? grad_weight_by_rows<S> : grad_weight_by_taps<S>)(g, o, workspace, begin, end);
          },
          [](const Conv2dGeometry& g) { return by_rows<T>(g) ? 1 : Products<T>(g).parts; }, add_parts<S>};
}

template Conv2dRun<float> channels_last_grad_weight();
template Conv2dRun<double> channels_last_grad_weight();
template Conv2dRun<BFloat16> channels_last_grad_weight();
template Conv2dRun<Float16> channels_last_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
