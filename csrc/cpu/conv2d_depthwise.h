// The kernels that the row `depthwise` is made of: conv2d_depthwise.cpp puts them together.
#pragma once

#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// One filter per channel, channels_last.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_channels_last();
/// One or several filters per channel, contiguous.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_contiguous();

}  // namespace cnnops::cpu::CNNOPS_ISA
