// The kernels of one instruction set, put together: the table of algorithms, fastest first, and the plain functions.
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

/// `direct` is two files, one for each layout, and one row.
template <class S>
struct Direct {
  using Row = Conv2dAlgorithm<Conv2dRun<S>>;

  static const Row& of(const Conv2dGeometry& g) {
    static const Row contiguous = conv2d_direct<S>(), channels_last = conv2d_channels_last<S>();
    return g.layout == Layout::contiguous ? contiguous : channels_last;
  }

  template <Conv2dRun<S> Row::* pass>
  static Conv2dRun<S> run() {
    return {[](const Conv2dGeometry& g) { return (of(g).*pass).tasks(g); },
            [](const Conv2dGeometry& g) { return (of(g).*pass).workspace(g); },
            [](const Conv2dGeometry& g, const Conv2dOperands<S>& operands, Sum<S>* workspace, int64_t begin,
               int64_t end) { (of(g).*pass).run(g, operands, workspace, begin, end); },
            [](const Conv2dGeometry& g) { return (of(g).*pass).parts ? (of(g).*pass).parts(g) : 1; },
            (conv2d_channels_last<S>().*pass).add_parts};
  }

  static Row row() {
    return {"direct",
            "register tiles over the image where it stands; stride 1, or channels_last",
            [](const Conv2dGeometry& g, Pass pass) { return of(g).refuses(g, pass); },
            run<&Row::forward>(),
            run<&Row::grad_input>(),
            run<&Row::grad_weight>(),
            true,
            [](const Conv2dGeometry& g, Pass pass) { return of(g).yields && of(g).yields(g, pass); }};
  }
};

template <class S>
Kernels<S> make_kernels() {
  Kernels<S> kernels{};
  if constexpr (kReal<S>) {
    static const Conv2dAlgorithm<Conv2dRun<S>> conv2d[] = {
        conv2d_depthwise<S>(), conv2d_winograd<S>(), conv2d_dot_products<S>(), conv2d_few_channels<S>(),
        conv2d_fold<S>(),      Direct<S>::row(),     conv2d_im2col<S>(),       conv2d_reference<S>(),
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
