// Max pooling and its inverse: every result a gather.
//
//   max, forward    y[n,c,oh,ow] = the largest input of the window, and where: kh*KW + kw, the first in scan order
//   max, backward   gx[n,c,h,w]  = sum of gy over those windows whose maximum was here
//   max, gather     y[n,c,oh,ow] = x at the position that won
//   max_unpool      y[n,c,i]     = the last x[n,c,j] with index j = i, or zero
//
// The backward pass turns the window round: an input looks at the windows that cover it, at most ceil(KH/stride) of
// them along an axis. So nothing is zeroed beforehand and no two threads add to one number: the order of each sum is
// fixed. Unpooling finds out first who is last, with integer maxima, which come out the same in any order. Indices that
// point out of the plane are left out. Which results a thread takes: pool2d.h.
#include <limits>

#include "epilogue.h"
#include "launchers.h"
#include "pool2d.h"

namespace cnnops::cuda {
namespace {

/// Positions of either width: so one kernel does for both.
struct Positions {
  uint8_t* narrow;
  int32_t* wide;  // nullptr if narrow

  explicit Positions(const uint8_t* positions) : narrow(const_cast<uint8_t*>(positions)), wide(nullptr) {}
  explicit Positions(const int32_t* positions) : narrow(nullptr), wide(const_cast<int32_t*>(positions)) {}

  template <int kCount>
  __device__ void load(int32_t (&to)[kCount], int64_t i) const {
    if (hidden(wide)) return load_whole<kCount>(to, wide + i);
    uint8_t bytes[kCount];
    load_whole<kCount>(bytes, narrow + i);
    for (int lane = 0; lane < kCount; ++lane) to[lane] = bytes[lane];
  }
  template <int kCount>
  __device__ void store(int64_t i, const int32_t (&from)[kCount]) const {
    if (hidden(wide)) return store_whole<kCount>(wide + i, from);
    uint8_t bytes[kCount];
    for (int lane = 0; lane < kCount; ++lane) bytes[lane] = static_cast<uint8_t>(from[lane]);
    store_whole<kCount>(narrow + i, bytes);
  }
};

/// The largest so far, and its position: -1 before there was any.
template <class S>
struct Largest {
  Sum<S> number = -std::numeric_limits<Sum<S>>::infinity();
  int32_t position = -1;

  __device__ void see(S x, int32_t at) {
    const Sum<S> here = value(x);
    if (position < 0 || wins(here, number)) {
      number = here;
      position = at;
    }
  }
};

/// Writes what `kCount` neighbouring windows found.
template <class S, int kCount>
__device__ inline void store_largest(const Largest<S> (&largest)[kCount], int64_t first, S* y, Positions positions) {
  S numbers[kCount];
  int32_t found[kCount];
  for (int lane = 0; lane < kCount; ++lane) {
    numbers[lane] = rounded<S>(largest[lane].number);
    found[lane] = larger(largest[lane].position, 0);
  }
  store_whole<kCount>(y + first, numbers);
  positions.store(first, found);
}

template <int kWidth, class W, class S>
__global__ void max_kernel(Pool2dGeometry g, typename W::Index pixel_size, int64_t size, const S* x, S* y,
                           Positions positions) {
  const W height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kWidth)) {
    const Place<typename W::Index> place(item * kWidth, pixel_size, height.out, width.out);
    const S* plane = x + place.plane * height.in * width.in * pixel_size + place.number;
    Largest<S> largest[kWidth];
    each_pixel(height, width, place.row, place.column, [&](auto pixel, auto tap) {
      S here[kWidth];
      load_whole<kWidth>(here, plane + pixel * pixel_size);
      for (int lane = 0; lane < kWidth; ++lane) largest[lane].see(here[lane], static_cast<int32_t>(tap));
    });
    store_largest(largest, item * kWidth, y, positions);
  }
}

/// The same for windows that are tiled().
template <class S, class Index>
__global__ void max_tiles_kernel(Index columns, int64_t size, const S* x, S* y, Positions positions) {
  constexpr int kWidth = Vector<S>::size, kHalf = kWidth / 2;
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kHalf)) {
    const S* tile = x + tile_start<kWidth>(item, columns);
    S upper[kWidth], lower[kWidth];
    load_whole<kWidth>(upper, tile);
    load_whole<kWidth>(lower, tile + columns);
    Largest<S> largest[kHalf];
    for (int i = 0; i < kWidth; ++i) largest[i / 2].see(upper[i], i % 2);
    for (int i = 0; i < kWidth; ++i) largest[i / 2].see(lower[i], 2 + i % 2);
    store_largest(largest, item * kHalf, y, positions);
  }
}

template <int kWidth, class W, class S>
__global__ void max_backward_kernel(Pool2dGeometry g, typename W::Index pixel_size, int64_t size, const S* gy,
                                    Positions positions, S* gx) {
  using Index = typename W::Index;
  const W height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kWidth)) {
    const Place<Index> place(item * kWidth, pixel_size, height.in, width.in);
    const Index plane = place.plane * height.out * width.out * pixel_size + place.number;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column);
    const Index last_h = height.last_over(place.row);
    Sum<S> sums[kWidth] = {};
    CNNOPS_NO_UNROLL
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      const Index kh = height.tap(oh, place.row);
      CNNOPS_NO_UNROLL
      for (Index ow = first_w; ow <= last_w; ++ow) {
        const Index kw = width.tap(ow, place.column), i = plane + (oh * width.out + ow) * pixel_size;
        int32_t won[kWidth];
        positions.load(won, i);
        S here[kWidth];
        if (kWidth > 1) load_whole<kWidth>(here, gy + i);
        for (int lane = 0; lane < kWidth; ++lane) {
          const bool mine = kh >= 0 && kw >= 0 && static_cast<Index>(won[lane]) == kh * width.kernel + kw;
          if (mine) sums[lane] += value(kWidth > 1 ? here[lane] : gy[i]);
        }
      }
    }
    S results[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) results[lane] = rounded<S>(sums[lane]);
    store_whole<kWidth>(gx + item * kWidth, results);
  }
}

/// The same along_rows(): a window's gradient is added to that one of the thread's inputs which it names, if any.
template <class W, class S>
__global__ void max_rows_backward_kernel(Pool2dGeometry g, int64_t size, const S* gy, Positions positions, S* gx) {
  using Index = typename W::Index;
  constexpr int kWidth = Vector<S>::size;
  const W height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kWidth)) {
    const Place<Index> place(item * kWidth, 1, height.in, width.in);
    const Index plane = place.plane * height.out * width.out;
    const Index first_w = width.first_over(place.column), last_w = width.last_over(place.column + kWidth - 1);
    const Index last_h = height.last_over(place.row);
    Sum<S> sums[kWidth] = {};
    CNNOPS_NO_UNROLL
    for (Index oh = height.first_over(place.row); oh <= last_h; ++oh) {
      const Index kh = height.tap(oh, place.row);
      CNNOPS_NO_UNROLL
      for (Index ow = first_w; ow <= last_w; ++ow) {
        const Index i = plane + oh * width.out + ow;
        int32_t won[1];
        positions.load(won, i);
        const Sum<S> here = value(gy[i]);
        const Index kw = static_cast<Index>(won[0]) - kh * width.kernel;
        const bool in_row = kh >= 0 && 0 <= kw && kw < width.kernel;
        const Index mine = width.start(ow) + kw * width.dilation - place.column;
        // Not `if (lane == mine)`: of that the compiler makes sums[mine], in memory. And adding 0 changes no sum from 0
        // on.
        for (int lane = 0; lane < kWidth; ++lane) sums[lane] += in_row && lane == mine ? here : 0;
      }
    }
    S results[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) results[lane] = rounded<S>(sums[lane]);
    store_whole<kWidth>(gx + item * kWidth, results);
  }
}

template <class S, class Index>
__global__ void max_tiles_backward_kernel(Index columns, int64_t size, const S* gy, Positions positions, S* gx) {
  constexpr int kWidth = Vector<S>::size, kHalf = kWidth / 2;
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size / kHalf)) {
    S here[kHalf];
    int32_t won[kHalf];
    load_whole<kHalf>(here, gy + item * kHalf);
    positions.load(won, item * kHalf);
    S* tile = gx + tile_start<kWidth>(item, columns);
    for (int row = 0; row < 2; ++row) {
      S results[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        Sum<S> sum = 0;
        if (won[i / 2] == row * 2 + i % 2) sum += value(here[i / 2]);
        results[i] = rounded<S>(sum);
      }
      store_whole<kWidth>(tile + row * columns, results);
    }
  }
}

/// Positions may come from anywhere: those that point out of the input read as zero.
template <class S, class Index>
__global__ void gather_kernel(Pool2dGeometry g, Index pixel_size, int64_t size, const S* x, Positions positions, S* y) {
  const Windows<int64_t> height(g, 0), width(g, 1);
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    const Place<Index> place(item, pixel_size, static_cast<Index>(height.out), static_cast<Index>(width.out));
    int32_t position[1];
    positions.load(position, item);
    const int64_t kh = position[0] / width.kernel, kw = position[0] - kh * width.kernel;
    const int64_t h = height.start(place.row) + kh * height.dilation;
    const int64_t w = width.start(place.column) + kw * width.dilation;
    const int64_t pixel = (place.plane * height.in + h) * width.in + w;
    y[item] = height.inside(h) && width.inside(w) ? x[pixel * pixel_size + place.number] : S{};
  }
}

__global__ void no_source_kernel(int64_t size, int64_t* sources) {
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(size)) sources[i] = -1;
}

/// sources[i] becomes the number of the last x that belongs at number i of y. Planes are of `in` and `out` pixels.
__global__ void source_kernel(int64_t in, int64_t out, int64_t pixel_size, int64_t size, const int64_t* indices,
                              int64_t* sources) {
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(size)) {
    Digits digits(item);
    const int64_t number = digits.next(pixel_size);
    digits.next(in);
    const int64_t index = indices[item];
    if (0 <= index && index < out) atomic_max(sources + (digits.rest() * out + index) * pixel_size + number, item);
  }
}

template <class S>
__global__ void take_kernel(int64_t size, const S* x, const int64_t* sources, S* y) {
  CNNOPS_NO_UNROLL
  for (int64_t i : Items(size)) y[i] = sources[i] < 0 ? S{} : x[sources[i]];
}

template <class S, class Position>
void max_forward(const Pool2dGeometry& g, const S* x, S* y, Position* positions, Stream stream) {
  constexpr int kWidth = Vector<S>::size;
  constexpr const char* name = "max_pool2d";
  const int64_t size = outputs(g);
  const Positions found(positions);
  if (tiled(g, x, y, positions)) {
    return with_index(g, [&](auto pixel_size) {
      launch_items(name, max_tiles_kernel<S, decltype(pixel_size)>, size / (kWidth / 2), stream, g.in[1], size, x, y,
                   found);
    });
  }
  with_windows(g, [&](auto windows) {
    using W = typename decltype(windows)::type;
    if (across(g, x, y, positions)) {
      launch_items(name, max_kernel<kWidth, W, S>, size / kWidth, stream, g, pixel_size(g), size, x, y, found);
    } else {
      launch_items(name, max_kernel<1, W, S>, size, stream, g, pixel_size(g), size, x, y, found);
    }
  });
}

template <class S, class Position>
void max_backward(const Pool2dGeometry& g, const S* gy, const Position* positions, S* gx, Stream stream) {
  constexpr int kWidth = Vector<S>::size;
  constexpr const char* name = "max_pool2d_backward";
  const int64_t size = inputs(g);
  const Positions found(positions);
  if (tiled(g, gx, gy, positions)) {
    return with_index(g, [&](auto pixel_size) {
      launch_items(name, max_tiles_backward_kernel<S, decltype(pixel_size)>, outputs(g) / (kWidth / 2), stream, g.in[1],
                   outputs(g), gy, found, gx);
    });
  }
  with_windows(g, [&](auto windows) {
    using W = typename decltype(windows)::type;
    if (across(g, gx, gy, positions)) {
      launch_items(name, max_backward_kernel<kWidth, W, S>, size / kWidth, stream, g, pixel_size(g), size, gy, found,
                   gx);
    } else if (along_rows(g, gx)) {
      launch_items(name, max_rows_backward_kernel<W, S>, size / kWidth, stream, g, size, gy, found, gx);
    } else {
      launch_items(name, max_backward_kernel<1, W, S>, size, stream, g, pixel_size(g), size, gy, found, gx);
    }
  });
}

template <class S, class Position>
void max_gather(const Pool2dGeometry& g, const S* x, const Position* positions, S* y, Stream stream) {
  with_index(g, [&](auto pixel_size) {
    launch_items("max_pool2d_gather", gather_kernel<S, decltype(pixel_size)>, outputs(g), stream, g, pixel_size,
                 outputs(g), x, Positions(positions), y);
  });
}

template <class S>
void max_unpool(const Unpool2dGeometry& g, const S* x, const int64_t* indices, int64_t* sources, S* y, Stream stream) {
  const int64_t pixel_size = g.layout == Layout::channels_last ? g.c : 1;
  const int64_t inputs = g.n * g.c * g.in, outputs = g.n * g.c * g.out;
  launch_items("max_unpool2d clear", no_source_kernel, outputs, stream, outputs, sources);
  launch_items("max_unpool2d find", source_kernel, inputs, stream, g.in, g.out, pixel_size, inputs, indices, sources);
  launch_items("max_unpool2d take", take_kernel<S>, outputs, stream, outputs, x, sources, y);
}

}  // namespace

template <class S>
void add_pool2d(Kernels<S>& kernels) {
  kernels.max_pool2d = {max_forward<S, uint8_t>, max_backward<S, uint8_t>, max_gather<S, uint8_t>};
  kernels.max_pool2d_wide = {max_forward<S, int32_t>, max_backward<S, int32_t>, max_gather<S, int32_t>};
  kernels.max_unpool2d = max_unpool<S>;
  add_avg_pool2d(kernels);
}

template void add_pool2d(Kernels<float>&);
template void add_pool2d(Kernels<double>&);
template void add_pool2d(Kernels<BFloat16>&);
template void add_pool2d(Kernels<Float16>&);

}  // namespace cnnops::cuda
