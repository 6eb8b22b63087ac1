"""The operators as torch's dispatcher knows them (``torch.ops.cnnops``), and the tables of algorithms behind them.

Users call :mod:`cnnops.functional`; this page is for those who want an operator as it is: every argument given, sizes
as pairs ``[h, w]``, inputs of shape ``(N, C, H, W)``. All are differentiable to any order, traceable by torch.compile,
and return the same bits for an output element whatever the batch size, the thread count or the run.

=====================  ==============================================================================
conv2d                 cross-correlation; its derivatives are the next two, and theirs the other two
conv2d_grad_input      the gradient of conv2d's input (a transposed convolution)
conv2d_grad_weight     the gradient of conv2d's weight
channel_sum            ``(N, C, ...) -> (C)``: the gradient of a bias
max_pool2d             the largest values, and where in its window each was found
max_pool2d_backward    its gradient
max_pool2d_gather      its derivative along a direction: the values at the places found
avg_pool2d             averages
avg_pool2d_backward    their gradient
relu, relu_backward
leaky_relu, leaky_relu_backward
prelu, prelu_backward
=====================  ==============================================================================
"""

import torch

from cnnops import _C

conv2d = torch.ops.cnnops.conv2d.default
conv2d_grad_input = torch.ops.cnnops.conv2d_grad_input.default
conv2d_grad_weight = torch.ops.cnnops.conv2d_grad_weight.default
channel_sum = torch.ops.cnnops.channel_sum.default
max_pool2d = torch.ops.cnnops.max_pool2d.default
max_pool2d_backward = torch.ops.cnnops.max_pool2d_backward.default
max_pool2d_gather = torch.ops.cnnops.max_pool2d_gather.default
avg_pool2d = torch.ops.cnnops.avg_pool2d.default
avg_pool2d_backward = torch.ops.cnnops.avg_pool2d_backward.default
relu = torch.ops.cnnops.relu.default
relu_backward = torch.ops.cnnops.relu_backward.default
leaky_relu = torch.ops.cnnops.leaky_relu.default
leaky_relu_backward = torch.ops.cnnops.leaky_relu_backward.default
prelu = torch.ops.cnnops.prelu.default
prelu_backward = torch.ops.cnnops.prelu_backward.default


def pair(value) -> list[int]:
    """``3 -> [3, 3]``; ``(3, 5) -> [3, 5]``; ``(3,) -> [3, 3]``, as torch takes sizes."""
    if isinstance(value, int):
        return [value, value]
    value = list(value)
    return value * 2 if len(value) == 1 else value


def algorithms(device: str = "cpu") -> list[str]:
    """The names of conv2d's algorithms on ``"cpu"`` or ``"cuda"``, fastest first."""
    return [name for name, _ in _C.algorithms(device, "float32")]


def conv2d_algorithm(
    input, weight, stride=1, padding=0, dilation=1, groups=1, algorithm="auto", which="forward"
) -> str:
    """The name of the algorithm that a convolution of these tensors runs.

    ``which`` is ``"forward"``, ``"grad_input"`` or ``"grad_weight"``. Raises RuntimeError with the algorithm's own
    sentence if ``algorithm`` names one that refuses, ValueError if there is none of that name.
    """
    dtype = str(input.dtype).removeprefix("torch.")
    shapes = list(input.shape), list(weight.shape)
    return _C.conv2d_algorithm(
        input.device.type, dtype, which, *shapes, pair(stride), pair(padding), pair(dilation), groups, algorithm
    )
