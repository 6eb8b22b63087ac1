// The gradient of a border that is not made of zeros.
//
// A convolution sees its input x written out with its border: rows and columns of places, each of which shows a pixel
// (pixel_at() in ../geometry.h). Those within the image show themselves; beyond it, pixels are shown once more. The
// kernels of grad_input give the gradient of that larger image, and a pixel's own is the sum over all places that show
// it, along both axes:
//
//   gx[n,c,ih,iw] = sum over ph, pw of padded[n,c,ph,pw]
//                   where pixel_at(ph - padding, H, border) == ih and pixel_at(pw - padding, W, border) == iw
//
// A task is one row of gx. It adds up rows of places: its own first, then those above and below the image that show it,
// from top to bottom; of each row of places first those of the image, many at a time, then those beyond from left to
// right. Pieces of the row are summed in an array on the stack, in float for 16-bit numbers, and rounded once. In
// channels_last a place is C numbers that lie together, otherwise it is one: nothing else differs.
#include "correlate.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

constexpr int64_t kPiece = 512;  // numbers summed at a time

/// One axis of the image, and of the places around it.
struct PlaceAxis {
  int64_t size, padding, places;
  Border border;

  PlaceAxis(const Conv2dGeometry& g, int dim)
      : size(g.in[dim]),
        padding(g.padding[dim]),
        places((g.out[dim] - 1) * g.stride[dim] + (g.kernel[dim] - 1) * g.dilation[dim] + 1),
        border(g.border) {}

  /// visit(place, pixel) for all places beyond the image that show a pixel.
  template <class Visit>
  void beyond(const Visit& visit) const {
    if (border == Border::zeros) return;
    for (int64_t p = 0; p < smaller(padding, places); ++p) visit(p, pixel_at(p - padding, size, border));
    for (int64_t p = padding + size; p < places; ++p) visit(p, pixel_at(p - padding, size, border));
  }
};

template <class S>
void add(const S* from, int64_t count, Sum<S>* sums) {
  constexpr int64_t L = kLanes<Sum<S>>;
  for (int64_t j = 0; j < count; j += L) {
    const int64_t lanes = smaller(count - j, L);
    store_first(sums + j, load_first(sums + j, lanes) + load_first(from + j, lanes), lanes);
  }
}

template <class S>
void fold_border(const Conv2dGeometry& g, const S* padded, S* gx, int64_t begin, int64_t end) {
  using T = Sum<S>;
  const PlaceAxis h(g, 0), w(g, 1);
  const int64_t inner = g.layout == Layout::channels_last ? g.c : 1;
  const int64_t width = w.size * inner, pitch = w.places * inner, own = smaller(w.size, w.places - w.padding) * inner;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t ih = task % h.size;
    const S* plane = padded + task / h.size * h.places * pitch;
    const int64_t own_row = h.padding + ih;
    for (int64_t j0 = 0; j0 < width; j0 += kPiece) {
      const int64_t count = smaller(kPiece, width - j0), shown = larger(smaller(own - j0, count), 0);
      T sums[kPiece];
      const auto add_beyond = [&](const S* row) {
        w.beyond([&](int64_t place, int64_t pixel) {
          const int64_t first = larger(pixel * inner, j0), last = smaller((pixel + 1) * inner, j0 + count);
          if (first < last) add(row + (place - pixel) * inner + first, last - first, sums + first - j0);
        });
      };

      const bool has_row = own_row < h.places;
      const S* row = plane + (has_row ? own_row : 0) * pitch;
      copy_padded(row + w.padding * inner + j0, has_row ? shown : 0, 0, 1, count, Border::zeros, sums);
      if (has_row) add_beyond(row);
      h.beyond([&](int64_t place, int64_t pixel) {
        if (pixel != ih) return;
        add(plane + place * pitch + w.padding * inner + j0, shown, sums);
        add_beyond(plane + place * pitch);
      });

      S* to = gx + task * width + j0;
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        const int64_t lanes = smaller(count - j, kLanes<T>);
        store_first(to + j, load_first(sums + j, lanes), lanes);
      }
    }
  }
}

}  // namespace

template <class S>
void set_border(Kernels<S>& kernels) {
  kernels.fold_border = fold_border<S>;
}

template void set_border(Kernels<float>&);
template void set_border(Kernels<double>&);
template void set_border(Kernels<BFloat16>&);
template void set_border(Kernels<Float16>&);

}  // namespace cnnops::cpu::CNNOPS_ISA
