// The kernels of one instruction set, put together: the table of algorithms, fastest first, and the plain functions.
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// In a fully connected layer all numbers of an image stand in the order of a filter's, in either layout: so it is a
/// 1x1 convolution of as many channels on images of one pixel. (Not so a bias that grad_input takes: it is one for all
/// pixels.)
Conv2dGeometry flattened(Conv2dGeometry g, Pass pass) {
  const int64_t pixels = g.in[0] * g.in[1];
  if (!is_connected(g) || (pixels > 1 && (g.groups > 1 || pass == Pass::grad_input))) return g;
  g.c *= pixels;
  for (int dim = 0; dim < 2; ++dim) g.kernel[dim] = g.in[dim] = 1;
  g.layout = g.filters = Layout::channels_last;
  return g;
}

/// `depthwise` is five files: one filter per channel or a few, and small groups.
template <class S>
struct Depthwise {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static Conv2dGeometry seen(const Conv2dGeometry& g, Pass) { return g; }
  static const Row& of(const Conv2dGeometry& g, Pass pass) {
    static const Row contiguous = depthwise_contiguous<S>(), small = depthwise_small<S>(),
                     turned = depthwise_turned<S>(), groups = depthwise_groups<S>();
    const bool single = g.c == g.groups;
    if (g.layout == Layout::channels_last) return single && g.k == g.groups ? all() : groups;
    if (!single) return turned;
    return contiguous.refuses(g, pass) || small.refuses(g, pass) ? contiguous : small;
  }
  static const Row& all() {
    static const Row row = depthwise_channels_last<S>();
    return row;
  }
};

/// `direct` is three files, two of them for contiguous tensors.
template <class S>
struct Direct {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static Conv2dGeometry seen(const Conv2dGeometry& g, Pass pass) { return flattened(g, pass); }
  static const Row& of(const Conv2dGeometry& g, Pass pass) {
    static const Row contiguous = conv2d_direct<S>(), planar = conv2d_planar<S>();
    if (g.layout == Layout::channels_last) return all();
    return planar.refuses(g, pass) ? contiguous : planar;
  }
  static const Row& all() {
    static const Row row = conv2d_channels_last<S>();
    return row;
  }
};

/// `winograd` is two files, one for groups of few channels.
template <class S>
struct Winograd {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static Conv2dGeometry seen(const Conv2dGeometry& g, Pass) { return g; }
  static const Row& of(const Conv2dGeometry& g, Pass pass) {
    static const Row groups = conv2d_winograd_groups<S>();
    return groups.refuses(g, pass) ? all() : groups;
  }
  static const Row& all() {
    static const Row row = conv2d_winograd<S>();
    return row;
  }
};

/// Several files as one row: `of` picks the one for a geometry as they have `seen` it; those that add parts up do it as
/// that for `all` does.
template <class S, class Files>
struct OneRow {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  template <Pass pass>
  static Conv2dRun<S> run() {
    return {[](const Conv2dGeometry& shape) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              return Files::of(g, pass).run(pass).tasks(g);
            },
            [](const Conv2dGeometry& shape) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              return Files::of(g, pass).run(pass).workspace(g);
            },
            [](const Conv2dGeometry& shape, const Conv2dOperands<S>& operands, Sum<S>* workspace, int64_t begin,
               int64_t end) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              Files::of(g, pass).run(pass).run(g, operands, workspace, begin, end);
            },
            [](const Conv2dGeometry& shape) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              const auto parts = Files::of(g, pass).run(pass).parts;
              return parts ? parts(g) : 1;
            },
            Files::all().run(pass).add_parts};
  }

  static Row row(const char* summary) {
    return {Files::all().name,
            summary,
            [](const Conv2dGeometry& shape, Pass pass) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              return Files::of(g, pass).refuses(g, pass);
            },
            run<Pass::forward>(),
            run<Pass::grad_input>(),
            run<Pass::grad_weight>(),
            Files::all().accurate,
            [](const Conv2dGeometry& shape, Pass pass) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              return Files::of(g, pass).yields && Files::of(g, pass).yields(g, pass);
            },
            Files::of,
            [](const Conv2dGeometry& shape, Pass pass) {
              const Conv2dGeometry g = Files::seen(shape, pass);
              const auto reads = Files::of(g, pass).reads_contiguous_filters;
              return reads && reads(g, pass);
            }};
  }
};

/// Small groups are computed faster still by transforms.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise() {
  Conv2dAlgorithm<Conv2dRun<S>> row = OneRow<S, Depthwise<S>>::row("one filter per channel, or few; small groups");
  row.yields = [](const Conv2dGeometry& g, Pass pass) { return !conv2d_winograd_groups<S>().refuses(g, pass); };
  return row;
}

template <class S>
Kernels<S> make_kernels() {
  Kernels<S> kernels{};
  if constexpr (kReal<S>) {
    static const Conv2dAlgorithm<Conv2dRun<S>> conv2d[] = {
        depthwise<S>(),
        OneRow<S, Winograd<S>>::row(conv2d_winograd<S>().summary),
        conv2d_dot_products<S>(),
        conv2d_turned<S>(),
        conv2d_few_channels<S>(),
        conv2d_fold<S>(),
        OneRow<S, Direct<S>>::row("register tiles over the image where it stands; stride 1, or channels_last"),
        conv2d_im2col<S>(),
        conv2d_reference<S>(),
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
