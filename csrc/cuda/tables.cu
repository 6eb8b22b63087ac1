// The kernels of each type of number, collected.
#include "launchers.h"

namespace cnnops::cuda {

template <class T>
const Kernels<T>& kernels() {
  static const Conv2dAlgorithm<Conv2dRun<T>> conv2d[] = {conv2d_direct<T>(), conv2d_im2col<T>(), conv2d_reference<T>()};
  static const Kernels<T> all = [] {
    Kernels<T> filled{};
    filled.conv2d = {conv2d, sizeof(conv2d) / sizeof(conv2d[0])};
    add_pool2d(filled);
    add_activation(filled);
    return filled;
  }();
  return all;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace cnnops::cuda
