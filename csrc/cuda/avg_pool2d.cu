// Average pooling: every result a gather. Which results a thread takes: pool2d.h.
//
//   forward     y[n,c,oh,ow] = (sum of the window's inputs) / divisor
//   backward    gx[n,c,h,w]  = sum of gy / divisor over the windows that cover (h, w)
#include "pool2d.h"

namespace cnnops::cuda {
namespace {

/// What window (oh, ow) is divided by.
template <class T, class W>
__device__ inline T divide_by(const W& height, const W& width, Divisor divisor, typename W::Index oh,
                              typename W::Index ow) {
  if (divisor.divisor_override != 0) return static_cast<T>(divisor.divisor_override);
  return static_cast<T>(height.counted(oh, divisor.count_include_pad) * width.counted(ow, divisor.count_include_pad));
}

/// What every window of 2x2 within its image is divided by.
template <class T>
T tile_divisor(Divisor divisor) {
  return static_cast<T>(divisor.divisor_override != 0 ? divisor.divisor_override : 4);
}

template <int kWidth, class W, class S>
__global__ void avg_kernel(Pool2dGeometry g, typename W::Index pixel_size, int64_t size, Divisor divisor, const S* x,
                           S* y) {
  const W height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kWidth)) {
    const Place<typename W::Index> place(item * kWidth, pixel_size, height.out, width.out);
    const S* plane = x + place.plane * height.in * width.in * pixel_size + place.number;
    Sum<S> sums[kWidth] = {};
    each_pixel(height, width, place.row, place.column, [&](auto pixel, auto) {
      S here[kWidth];
      load_whole<kWidth>(here, plane + pixel * pixel_size);
      for (int lane = 0; lane < kWidth; ++lane) sums[lane] += value(here[lane]);
    });
    const Sum<S> by = divide_by<Sum<S>>(height, width, divisor, place.row, place.column);
    S results[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) results[lane] = rounded<S>(sums[lane] / by);
    store_whole<kWidth>(y + item * kWidth, results);
  }
}

/// The same for windows that are tiled(); `by` divides all of them.
template <class S, class Index>
__global__ void avg_tiles_kernel(Index columns, int64_t size, Sum<S> by, const S* x, S* y) {
  constexpr int kWidth = Vector<S>::size, kHalf = kWidth / 2;
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kHalf)) {
    const S* tile = x + tile_start<kWidth>(item, columns);
    S upper[kWidth], lower[kWidth], results[kHalf];
    load_whole<kWidth>(upper, tile);
    load_whole<kWidth>(lower, tile + columns);
    for (int i = 0; i < kHalf; ++i) {
      Sum<S> sum = 0;
      for (const S* row : {upper, lower}) sum = sum + value(row[2 * i]) + value(row[2 * i + 1]);
      results[i] = rounded<S>(sum / by);
    }
    store_whole<kHalf>(y + item * kHalf, results);
  }
}

template <int kWidth, class W, class S>
__global__ void avg_backward_kernel(Pool2dGeometry g, typename W::Index pixel_size, int64_t size, Divisor divisor,
                                    const S* gy, S* gx) {
  using Index = typename W::Index;
  const W height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kWidth)) {
    const Place<Index> place(item * kWidth, pixel_size, height.in, width.in);
    const S* plane = gy + place.plane * height.out * width.out * pixel_size + place.number;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column);
    const Index last_h = height.last_over(place.row);
    Sum<S> sums[kWidth] = {};
    CNNOPS_NO_UNROLL
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      CNNOPS_NO_UNROLL
      for (Index ow = first_w; ow <= last_w; ++ow) {
        S here[kWidth];
        load_whole<kWidth>(here, plane + (oh * width.out + ow) * pixel_size);
        const Sum<S> by = divide_by<Sum<S>>(height, width, divisor, oh, ow);
        for (int lane = 0; lane < kWidth; ++lane) sums[lane] += value(here[lane]) / by;
      }
    }
    S results[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) results[lane] = rounded<S>(sums[lane]);
    store_whole<kWidth>(gx + item * kWidth, results);
  }
}

/// The same along_rows(): a window's share, found once, is added to those of the thread's inputs that it covers.
template <class W, class S>
__global__ void avg_rows_backward_kernel(Pool2dGeometry g, int64_t size, Divisor divisor, const S* gy, S* gx) {
  using Index = typename W::Index;
  constexpr int kWidth = Vector<S>::size;
  const W height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kWidth)) {
    const Place<Index> place(item * kWidth, 1, height.in, width.in);
    const S* plane = gy + place.plane * height.out * width.out;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column + kWidth - 1);
    const Index last_h = height.last_over(place.row);
    Sum<S> sums[kWidth] = {};
    CNNOPS_NO_UNROLL
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      CNNOPS_NO_UNROLL
      for (Index ow = first_w; ow <= last_w; ++ow) {
        const Sum<S> share = value(plane[oh * width.out + ow]) / divide_by<Sum<S>>(height, width, divisor, oh, ow);
        const Index begin = width.start(ow) - place.column, end = begin + width.taps(ow);
        for (int lane = 0; lane < kWidth; ++lane) {
          if (begin <= lane && lane < end) sums[lane] += share;
        }
      }
    }
    S results[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) results[lane] = rounded<S>(sums[lane]);
    store_whole<kWidth>(gx + item * kWidth, results);
  }
}

template <class S, class Index>
__global__ void avg_tiles_backward_kernel(Index columns, int64_t size, Sum<S> by, const S* gy, S* gx) {
  constexpr int kWidth = Vector<S>::size, kHalf = kWidth / 2;
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kHalf)) {
    S here[kHalf], results[kWidth];
    load_whole<kHalf>(here, gy + item * kHalf);
    for (int i = 0; i < kHalf; ++i) results[2 * i] = results[2 * i + 1] = rounded<S>(0 + value(here[i]) / by);
    S* tile = gx + tile_start<kWidth>(item, columns);
    store_whole<kWidth>(tile, results);
    store_whole<kWidth>(tile + columns, results);
  }
}

template <class S>
void avg_forward(const Pool2dGeometry& g, Divisor divisor, const S* x, S* y, Stream stream) {
  constexpr int kWidth = Vector<S>::size;
  constexpr const char* name = "avg_pool2d";
  const int64_t size = outputs(g);
  if (tiled(g, x, y)) {
    return with_index(g, [&](auto pixel_size) {
      launch_items(name, avg_tiles_kernel<S, decltype(pixel_size)>, size / (kWidth / 2), stream, g.in[1], size,
                   tile_divisor<Sum<S>>(divisor), x, y);
    });
  }
  with_windows(g, [&](auto windows) {
    using W = typename decltype(windows)::type;
    if (across(g, x, y)) {
      launch_items(name, avg_kernel<kWidth, W, S>, size / kWidth, stream, g, pixel_size(g), size, divisor, x, y);
    } else {
      launch_items(name, avg_kernel<1, W, S>, size, stream, g, pixel_size(g), size, divisor, x, y);
    }
  });
}

template <class S>
void avg_backward(const Pool2dGeometry& g, Divisor divisor, const S* gy, S* gx, Stream stream) {
  constexpr int kWidth = Vector<S>::size;
  constexpr const char* name = "avg_pool2d_backward";
  const int64_t size = inputs(g);
  if (tiled(g, gx, gy)) {
    return with_index(g, [&](auto pixel_size) {
      launch_items(name, avg_tiles_backward_kernel<S, decltype(pixel_size)>, outputs(g) / (kWidth / 2), stream, g.in[1],
                   outputs(g), tile_divisor<Sum<S>>(divisor), gy, gx);
    });
  }
  with_windows(g, [&](auto windows) {
    using W = typename decltype(windows)::type;
    if (across(g, gx, gy)) {
      launch_items(name, avg_backward_kernel<kWidth, W, S>, size / kWidth, stream, g, pixel_size(g), size, divisor, gy,
                   gx);
    } else if (along_rows(g, gx)) {
      launch_items(name, avg_rows_backward_kernel<W, S>, size / kWidth, stream, g, size, divisor, gy, gx);
    } else {
      launch_items(name, avg_backward_kernel<1, W, S>, size, stream, g, pixel_size(g), size, divisor, gy, gx);
    }
  });
}

}  // namespace

template <class S>
void add_avg_pool2d(Kernels<S>& kernels) {
  kernels.avg_pool2d = avg_forward<S>;
  kernels.avg_pool2d_backward = avg_backward<S>;
}

template void add_avg_pool2d(Kernels<float>&);
template void add_avg_pool2d(Kernels<double>&);
template void add_avg_pool2d(Kernels<BFloat16>&);
template void add_avg_pool2d(Kernels<Float16>&);

}  // namespace cnnops::cuda
