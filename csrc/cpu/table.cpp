// The kernels of one instruction set, put together: the table of algorithms, fastest first, and the plain functions.
#include "conv2d_planar.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// In a fully connected layer all numbers of an image stand in the order of a filter's, in either layout: so it is a 1x1
/// convolution of as many channels on images of one pixel.
Conv2dGeometry flattened(Conv2dGeometry g) {
  const int64_t pixels = g.in[0] * g.in[1];
  if (!is_connected(g) || (pixels > 1 && g.groups > 1)) return g;
  g.c *= pixels;
  for (int dim = 0; dim < 2; ++dim) g.kernel[dim] = g.in[dim] = 1;
  g.layout = Layout::channels_last;
  return g;
}

/// `direct` is three files, two of them for contiguous tensors, and one row.
template <class S>
struct Direct {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static const Row& of(const Conv2dGeometry& g, Pass pass) {
    static const Row contiguous = conv2d_direct<S>(), planar = conv2d_planar<S>(),
                     channels_last = conv2d_channels_last<S>();
    if (g.layout == Layout::channels_last) return channels_last;
    return planar.refuses(g, pass) ? contiguous : planar;
  }

  template <Pass pass>
  static Conv2dRun<S> run() {
    return {[](const Conv2dGeometry& shape) {
              const Conv2dGeometry g = flattened(shape);
              return of(g, pass).run(pass).tasks(g);
            },
            [](const Conv2dGeometry& shape) {
              const Conv2dGeometry g = flattened(shape);
              return of(g, pass).run(pass).workspace(g);
            },
            [](const Conv2dGeometry& shape, const Conv2dOperands<S>& operands, Sum<S>* workspace, int64_t begin,
               int64_t end) {
              const Conv2dGeometry g = flattened(shape);
              of(g, pass).run(pass).run(g, operands, workspace, begin, end);
            },
            [](const Conv2dGeometry& shape) {
              const Conv2dGeometry g = flattened(shape);
              const auto parts = of(g, pass).run(pass).parts;
              return parts ? parts(g) : 1;
            },
            conv2d_channels_last<S>().run(pass).add_parts};
  }

  static Row row() {
    return {"direct",
            "register tiles over the image where it stands; stride 1, or channels_last",
            [](const Conv2dGeometry& shape, Pass pass) {
              const Conv2dGeometry g = flattened(shape);
              return of(g, pass).refuses(g, pass);
            },
            run<Pass::forward>(),
            run<Pass::grad_input>(),
            run<Pass::grad_weight>(),
            true,
            [](const Conv2dGeometry& shape, Pass pass) {
              const Conv2dGeometry g = flattened(shape);
              return of(g, pass).yields && of(g, pass).yields(g, pass);
            }};
  }
};

template <class S>
Kernels<S> make_kernels() {
  Kernels<S> kernels{};
  if constexpr (kReal<S>) {
    static const Conv2dAlgorithm<Conv2dRun<S>> conv2d[] = {
        conv2d_depthwise<S>(), conv2d_winograd<S>(), conv2d_dot_products<S>(),
        conv2d_turned<S>(),    conv2d_fold<S>(),     conv2d_few_channels<S>(),
        Direct<S>::row(),      conv2d_im2col<S>(),   conv2d_reference<S>(),
    };
    kernels.conv2d = {conv2d, sizeof conv2d / sizeof *conv2d};
    set_border(kernels);
  }
  set_pool2d(kernels);
  set_activation(kernels);
  return kernels;
}

// Made at the first call, not when the library is loaded: this code may be for another processor than the one at hand.
template <class S>
const Kernels<S>& kernels_of() {
  static const Kernels<S> kernels = make_kernels<S>();
  return kernels;
}

template <class... S>
KernelSet set_of(const std::tuple<const Kernels<S>& (*)()...>*) {
  return {kernels_of<S>...};
}

}  // namespace

KernelSet kernels() { return set_of(static_cast<const KernelSet*>(nullptr)); }

}  // namespace cnnops::cpu::CNNOPS_ISA
