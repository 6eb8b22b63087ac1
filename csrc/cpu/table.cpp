// The kernels of one instruction set, put together: the table of algorithms, fastest first, and the plain functions.
#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {
namespace {

template <class T>
Kernels<T> make_kernels() {
  static const Conv2dAlgorithm<Conv2dRun<T>> conv2d[] = {
      conv2d_direct<T>(),
      conv2d_im2col<T>(),
      conv2d_reference<T>(),
  };
  Kernels<T> kernels{};
  kernels.conv2d = {conv2d, sizeof conv2d / sizeof *conv2d};
  set_pool2d(kernels);
  set_activation(kernels);
  return kernels;
}

}  // namespace

// Made at the first call, not when the library is loaded: this code may be for another processor than the one at hand.
const Kernels<float>& float32() {
  static const Kernels<float> kernels = make_kernels<float>();
  return kernels;
}

const Kernels<double>& float64() {
  static const Kernels<double> kernels = make_kernels<double>();
  return kernels;
}

}  // namespace cnnops::cpu::CNNOPS_ISA
