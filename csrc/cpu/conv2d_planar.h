// The two files of 1x1 kernels in the contiguous layout: a part of the row `direct`.
#pragma once

#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {

template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_planar();
/// conv2d_turned.cpp
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> conv2d_turned();
/// conv2d_planar_weight.cpp
template <class S>
Conv2dRun<S> planar_grad_weight();

}  // namespace cnnops::cpu::CNNOPS_ISA
