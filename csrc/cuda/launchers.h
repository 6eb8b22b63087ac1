// What each kernel file gives to tables.cu.
#pragma once

#include "kernels.h"

namespace cnnops::cuda {

template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_direct();
template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_im2col();
template <class T>
Conv2dAlgorithm<Conv2dRun<T>> conv2d_reference();

/// These fill in their own fields.
template <class T>
void add_pool2d(Kernels<T>&);
template <class T>
void add_activation(Kernels<T>&);

}  // namespace cnnops::cuda
