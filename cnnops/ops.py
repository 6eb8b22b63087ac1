"""The operators as torch's dispatcher knows them (``torch.ops.cnnops``), and the tables of algorithms behind them.

Users call :mod:`cnnops.functional`; this page is for those who want an operator as it is: inputs of shape
``(N, C, H, W)``, sizes as integers or pairs ``[h, w]``. All are differentiable to any order, forward and backward,
traceable by torch.compile, and return the same bits for an output element whatever the batch size, the thread count or
the run.

============================  =======================================================================
conv2d                        cross-correlation; its derivatives are the next two, and theirs the other two
conv2d_grad_input             the gradient of conv2d's input
conv2d_grad_weight            the gradient of conv2d's weight
conv_transpose2d              conv2d_grad_input with torch's sizes and a bias
channel_sum                   ``(N, C, ...) -> (C)``: the gradient of a bias
conv_relu_max_pool2d          convolution, activation and, if windows are given, max pooling at once; positions as
                              from max_pool2d
relu_max_pool2d_backward      the gradient through a block's activation and pooling
max_pool2d                    the largest values, and where in its window each was found
max_pool2d_backward           its gradient
max_pool2d_gather             its derivative along a direction: the values at the places found
adaptive_max_pool2d           the same three for windows that cut the image into a given number of parts
max_unpool2d                  a plane of zeros with numbers put at torch's indices
avg_pool2d, _backward         averages, and their gradient
adaptive_avg_pool2d           the same two for windows that cut the image into a given number of parts
relu, relu_, relu_backward    plain, in place, gradient; so for the next two
hardtanh, leaky_relu
prelu, prelu_backward
============================  =======================================================================
"""

import torch

from cnnops import _C
from cnnops._arguments import is_integer

conv2d = torch.ops.cnnops.conv2d.default
conv2d_grad_input = torch.ops.cnnops.conv2d_grad_input.default
conv2d_grad_weight = torch.ops.cnnops.conv2d_grad_weight.default
conv_transpose2d = torch.ops.cnnops.conv_transpose2d.default
channel_sum = torch.ops.cnnops.channel_sum.default
conv_relu_max_pool2d = torch.ops.cnnops.conv_relu_max_pool2d.default
relu_max_pool2d_backward = torch.ops.cnnops.relu_max_pool2d_backward.default
max_pool2d = torch.ops.cnnops.max_pool2d.default
max_pool2d_backward = torch.ops.cnnops.max_pool2d_backward.default
max_pool2d_gather = torch.ops.cnnops.max_pool2d_gather.default
adaptive_max_pool2d = torch.ops.cnnops.adaptive_max_pool2d.default
adaptive_max_pool2d_backward = torch.ops.cnnops.adaptive_max_pool2d_backward.default
adaptive_max_pool2d_gather = torch.ops.cnnops.adaptive_max_pool2d_gather.default
max_unpool2d = torch.ops.cnnops.max_unpool2d.default
avg_pool2d = torch.ops.cnnops.avg_pool2d.default
avg_pool2d_backward = torch.ops.cnnops.avg_pool2d_backward.default
adaptive_avg_pool2d = torch.ops.cnnops.adaptive_avg_pool2d.default
adaptive_avg_pool2d_backward = torch.ops.cnnops.adaptive_avg_pool2d_backward.default
relu = torch.ops.cnnops.relu.default
relu_ = torch.ops.cnnops.relu_.default
relu_backward = torch.ops.cnnops.relu_backward.default
hardtanh = torch.ops.cnnops.hardtanh.default
hardtanh_ = torch.ops.cnnops.hardtanh_.default
hardtanh_backward = torch.ops.cnnops.hardtanh_backward.default
leaky_relu = torch.ops.cnnops.leaky_relu.default
leaky_relu_ = torch.ops.cnnops.leaky_relu_.default
leaky_relu_backward = torch.ops.cnnops.leaky_relu_backward.default
prelu = torch.ops.cnnops.prelu.default
prelu_backward = torch.ops.cnnops.prelu_backward.default


def algorithms(device: str = "cpu") -> list[str]:
    """The names of conv2d's algorithms on ``"cpu"`` or ``"cuda"``, fastest first."""
    return [name for name, *_ in _C.algorithms(device)]


def conv2d_algorithm(
    input,
    weight,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    padding_mode="zeros",
    algorithm="auto",
    which="forward",
) -> str:
    """The name of the algorithm that a convolution of these tensors runs.

    ``which`` is ``"forward"``, ``"grad_input"`` or ``"grad_weight"``. Raises RuntimeError with the algorithm's own
    sentence if ``algorithm`` names one that refuses, ValueError if there is none of that name.
    """
    stride, padding, dilation = ([v] if is_integer(v) else v for v in (stride, padding, dilation))
    return _C.conv2d_algorithm(input, weight, stride, padding, dilation, groups, padding_mode, algorithm, which)


def conv2d_workspace(
    input,
    weight,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    padding_mode="zeros",
    algorithm="auto",
    which="forward",
) -> int:
    """The scratch memory of the same algorithm, in bytes: each thread's on the CPU, all of a call's on a GPU.

    It is bounded, whatever the batch and the image are. Arguments and errors are :func:`conv2d_algorithm`'s.
    """
    stride, padding, dilation = ([v] if is_integer(v) else v for v in (stride, padding, dilation))
    return _C.conv2d_workspace(input, weight, stride, padding, dilation, groups, padding_mode, algorithm, which)
