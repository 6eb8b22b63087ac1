// The kernels of one instruction set, put together: the table of algorithms, fastest first, and the plain functions.
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class S>
Kernels<S> make_kernels() {
  Kernels<S> kernels{};
  if constexpr (kReal<S>) {
    static const Conv2dAlgorithm<Conv2dRun<S>> conv2d[] = {
        conv2d_direct<S>(),
        conv2d_im2col<S>(),
        conv2d_reference<S>(),
    };
    kernels.conv2d = {conv2d, sizeof conv2d / sizeof *conv2d};
    set_border(kernels);
  }
  if constexpr (std::is_same_v<S, float> || std::is_same_v<S, double>) {
    set_pool2d(kernels);
    set_activation(kernels);
  }
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
