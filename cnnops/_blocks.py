"""Convolution, activation and max pooling as one operator; part of :mod:`cnnops.functional`."""

from torch import Tensor

from cnnops import ops
from cnnops._arguments import four_sides, is_integer, overridable, pair


@overridable
def conv_relu2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
) -> Tensor:
    """``activation(conv2d(...))`` as one operator, with the bits of :func:`conv2d` and then the activation.

    The convolution's output is activated while it is in the cache. The backward pass keeps the input, the weight and
    the result, as the two functions do, but nothing is written twice.

    Args:
        input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm: as for :func:`conv2d`.
        activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"`` or ``"none"``.
        negative_slope: of leaky_relu; at least 0.

    Returns:
        (N, K, OH, OW), as :func:`conv2d`.

    Raises:
        RuntimeError, NotImplementedError: as :func:`conv2d`.
        ValueError: an unknown activation, algorithm or padding_mode; a negative slope below 0.
    """
    convolution = _convolution(weight, stride, padding, dilation, groups, padding_mode)
    return ops.conv_relu_max_pool2d(input, weight, bias, *convolution, activation, negative_slope, algorithm=algorithm)[
        0
    ]


@overridable
def conv_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    pool_kernel_size,
    pool_stride=None,
    pool_padding=0,
    pool_dilation=1,
    ceil_mode: bool = False,
    activation: str = "relu",
    negative_slope: float = 0.01,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
) -> Tensor:
    """``max_pool2d(activation(conv2d(...)))`` as one operator, with the bits of the three functions.

    The output of the convolution is never a tensor: on the CPU it is made a piece at a time, and activated and pooled
    while it is in the cache. The backward pass keeps the input, the weight, the result and one byte for each of its
    elements. Gradients, too, have the bits of the three functions' but for leaky_relu with windows that overlap, where
    the last step is rounded otherwise. As everywhere, they do not depend on batch size, thread
    count or run.

    Args:
        input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm: as for :func:`conv2d`.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode: as for :func:`max_pool2d`, of at most 256
            places per window.
        activation, negative_slope: as for :func:`conv_relu2d`.

    Returns:
        (N, K, PH, PW): what :func:`max_pool2d` makes of (N, K, OH, OW).

    Raises:
        RuntimeError, NotImplementedError, ValueError: as :func:`conv_relu2d` and :func:`max_pool2d`.
    """
    convolution = _convolution(weight, stride, padding, dilation, groups, padding_mode)
    pooling = (pool_kernel_size, () if pool_stride is None else pool_stride, pool_padding, pool_dilation, ceil_mode)
    return ops.conv_relu_max_pool2d(input, weight, bias, *convolution, activation, negative_slope, *pooling, algorithm)[
        0
    ]


def _convolution(weight, stride, padding, dilation, groups, padding_mode):
    if not is_integer(padding) and (isinstance(padding, str) or not is_integer(padding[0])):
        padding = four_sides(padding, weight.shape[2:], stride, dilation) if weight.dim() == 4 else 0
    stride, padding, dilation = (pair(v) if is_integer(v) else v for v in (stride, padding, dilation))
    return stride, padding, dilation, groups, padding_mode
