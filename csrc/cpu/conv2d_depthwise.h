// The kernels that the row `depthwise` is made of: conv2d_depthwise.cpp puts them together.
#pragma once

#include "kernels.h"

namespace cnnops::cpu::CNNOPS_ISA {

/// One filter per channel, channels_last.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_channels_last();
template <class S>
Conv2dRun<S> depthwise_grad_weight();
/// Small groups, channels_last.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_groups();
/// Small groups of several channels, contiguous.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_turned();
/// One or several filters per channel, contiguous.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_contiguous();
/// One filter per channel, contiguous, of small images; of what depthwise_contiguous() accepts.
template <class S>
Conv2dAlgorithm<Conv2dRun<S>> depthwise_small();

}  // namespace cnnops::cpu::CNNOPS_ISA
