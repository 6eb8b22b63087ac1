// The kernels of each type of number, collected.
#include "launchers.h"

namespace cnnops::cuda {

template <class S>
const Kernels<S>& kernels() {
  static const Kernels<S> all = [] {
    Kernels<S> filled{};
    if constexpr (kReal<S>) {
      static const Conv2dAlgorithm<Conv2dRun<S>> conv2d[] = {conv2d_depthwise<S>(), conv2d_implicit_gemm<S>(),
                                                             conv2d_direct<S>(), conv2d_im2col<S>(),
                                                             conv2d_reference<S>()};
      filled.conv2d = {conv2d, sizeof(conv2d) / sizeof(conv2d[0])};
      add_border(filled);
      add_epilogue_backward(filled);
      add_pool2d(filled);
    }
    add_activation(filled);
    return filled;
  }();
  return all;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<BFloat16>& kernels();
template const Kernels<Float16>& kernels();
template const Kernels<uint8_t>& kernels();
template const Kernels<int8_t>& kernels();
template const Kernels<int16_t>& kernels();
template const Kernels<int32_t>& kernels();
template const Kernels<int64_t>& kernels();

}  // namespace cnnops::cuda
