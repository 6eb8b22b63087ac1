// What a border shows, its gradient gets back: one thread per pixel's number, and every result a gather.
//
//   fold_border   gx[n,c,h,w] = sum of padded[n,c,i,j] over all places (i, j) that show pixel (h, w)
//
// `padded` is the gradient of x with its border written out. Along an axis a pixel shows in its own place, and before
// and after the image in at most one more, or, where the outermost pixel is repeated, in all of them. The order of each
// sum is fixed: rows first to last, in each columns first to last.
#include "device.h"
#include "launchers.h"

namespace cnnops::cuda {
namespace {

/// The places of an axis of `padded` numbers that show pixel i of `size`: three ranges, from `begin` up to `end`, in
/// ascending order.
struct Shown {
  int64_t begin[3], end[3];

  __device__ Shown(int64_t i, int64_t size, int64_t padding, int64_t padded, Border border) {
    const int64_t own = i + padding;
    only(1, own, padded);
    only(0, -1, padded);
    only(2, -1, padded);
    if (border == Border::reflect) {
      if (i > 0) only(0, padding - i, padded);
      if (i < size - 1) only(2, own + 2 * (size - 1 - i), padded);
    } else if (border == Border::replicate) {
      if (i == 0) begin[0] = 0, end[0] = smaller(padding, padded);
      if (i == size - 1) begin[2] = own + 1, end[2] = padded;
    } else if (border == Border::circular) {
      only(0, own - size, padded);
      only(2, own + size, padded);
    }
  }

 private:
  /// Makes a range of one place, or of none if there is no such place.
  __device__ void only(int range, int64_t place, int64_t padded) {
    begin[range] = place;
    end[range] = 0 <= place && place < padded ? place + 1 : place;
  }
};

template <class S>
__global__ void fold_kernel(Conv2dGeometry g, int64_t padded_h, int64_t padded_w, const S* padded, S* gx) {
  const int64_t together = g.layout == Layout::channels_last ? g.c : 1;  // numbers of a pixel that lie side by side
  CNNOPS_NO_UNROLL
  for (int64_t item : Items(g.n * g.c * g.in[0] * g.in[1])) {
    Digits digits(item);
    const int64_t number = digits.next(together);
    const Shown columns(digits.next(g.in[1]), g.in[1], g.padding[1], padded_w, g.border);
    const Shown rows(digits.next(g.in[0]), g.in[0], g.padding[0], padded_h, g.border);
    const S* plane = padded + digits.rest() * padded_h * padded_w * together + number;
    Sum<S> sum = 0;
    for (int range_h = 0; range_h < 3; ++range_h) {
      CNNOPS_NO_UNROLL
      for (int64_t h = rows.begin[range_h]; h < rows.end[range_h]; ++h) {
        for (int range_w = 0; range_w < 3; ++range_w) {
          CNNOPS_NO_UNROLL
          for (int64_t w = columns.begin[range_w]; w < columns.end[range_w]; ++w) {
            sum += value(plane[(h * padded_w + w) * together]);
          }
        }
      }
    }
    gx[item] = rounded<S>(sum);
  }
}

template <class S>
void fold(const Conv2dGeometry& g, const S* padded, S* gx, Stream stream) {
  int64_t size[2];
  for (int dim = 0; dim < 2; ++dim) {
    size[dim] = (g.out[dim] - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1;
  }
  launch_items("fold_border", fold_kernel<S>, g.n * g.c * g.in[0] * g.in[1], stream, g, size[0], size[1], padded, gx);
}

}  // namespace

template <class S>
void add_border(Kernels<S>& kernels) {
  kernels.fold_border = fold<S>;
}

template void add_border(Kernels<float>&);
template void add_border(Kernels<double>&);
template void add_border(Kernels<BFloat16>&);
template void add_border(Kernels<Float16>&);

}  // namespace cnnops::cuda
