// The gradient of a fused convolution's own results, of which only the pooled ones were written: activation and pooling
// of 2 x 2 windows turned round, in one pass.
//
//   gx[h][w] = the activation's gradient at y[h/2][w/2], times gy[h/2][w/2], if the window's largest was here; or else 0
//
// A thread takes a window, numbered as the pooled tensor lies in memory: so y, gy and the position are read once, and
// all four pixels are written, two at a time where they are neighbours. Nothing is zeroed beforehand. A last row or
// column that was not pooled counts as windows cut in half, and gets zeros.
#include "epilogue.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

template <class S>
struct alignas(2 * sizeof(S)) Pair {
  S first, second;
};

template <class S, class Index>
__global__ void backward_kernel(Pool2dGeometry g, Index pixel_size, int64_t windows, bool pairs, Epilogue<S> epilogue,
                                const S* gy, const S* y, S* gx) {
  const Index in_h = static_cast<Index>(g.in[0]), in_w = static_cast<Index>(g.in[1]);
  const Index out_h = static_cast<Index>(g.out[0]), out_w = static_cast<Index>(g.out[1]);
  const Index rows = in_h - in_h / 2, columns = in_w - in_w / 2;
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(windows)) {
    const Index pixel = static_cast<Index>(item) / pixel_size, number = static_cast<Index>(item) - pixel * pixel_size;
    const Index line = pixel / columns, column = pixel - line * columns, plane = line / rows, row = line - plane * rows;
    S gradient{};
    int position = -1;
    if (row < out_h && column < out_w) {
      const Index at = ((plane * out_h + row) * out_w + column) * pixel_size + number;
      gradient = pooled_gradient(gy[at], y[at], epilogue);
      position = epilogue.positions[at];
    }
    S* to = gx + ((plane * in_h + 2 * row) * in_w + 2 * column) * pixel_size + number;
    CNNOPS_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (2 * row + h >= in_h) break;
      const Pair<S> both{position == 2 * h ? gradient : S{}, position == 2 * h + 1 ? gradient : S{}};
      S* place = to + h * in_w * pixel_size;
      if (pairs) {
        check_aligned(place, sizeof(both), Here::current());
        *reinterpret_cast<Pair<S>*>(place) = both;
      } else {
        *place = both.first;
        if (2 * column + 1 < in_w) place[pixel_size] = both.second;
      }
    }
  }
}

template <class S>
void backward(const Pool2dGeometry& g, const Epilogue<S>& epilogue, const S* gy, const S* y, S* gx, Stream stream) {
  const int64_t planes = g.n * g.c, size = planes * g.in[0] * g.in[1];
  const int64_t windows = planes * ceil_div(g.in[0], 2) * ceil_div(g.in[1], 2);
  const auto start = [&](auto pixel_size) {
    const bool aligned = reinterpret_cast<uintptr_t>(gx) % sizeof(Pair<S>) == 0;
    const bool pairs = pixel_size == 1 && g.in[1] % 2 == 0 && aligned;
    launch_items("epilogue_backward", backward_kernel<S, decltype(pixel_size)>, windows, stream, g, pixel_size, windows,
                 pairs, epilogue, gy, y, gx);
  };
  const int64_t pixel_size = g.layout == Layout::channels_last ? g.c : 1;
  if (size < index_limit()) {
    start(static_cast<int32_t>(pixel_size));
  } else {
    start(pixel_size);
  }
}

}  // namespace

template <class S>
void add_epilogue_backward(Kernels<S>& kernels) {
  kernels.epilogue_backward = backward<S>;
}

template void add_epilogue_backward(Kernels<float>&);
template void add_epilogue_backward(Kernels<double>&);
template void add_epilogue_backward(Kernels<BFloat16>&);
template void add_epilogue_backward(Kernels<Float16>&);

}  // namespace cnnops::cuda
