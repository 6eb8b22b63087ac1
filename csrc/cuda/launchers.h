// What each kernel file gives to tables.cu.
#pragma once

#include "kernels.h"

namespace cnnops::cuda {

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_depthwise();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_direct();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_implicit_gemm();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_im2col();
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_reference();

/// These fill in their own fields; the last also for integers.
template <class S>
void add_epilogue_backward(Kernels<S>&);
template <class S>
void add_border(Kernels<S>&);
template <class S>
void add_pool2d(Kernels<S>&);
template <class S>
void add_activation(Kernels<S>&);

}  // namespace cnnops::cuda
