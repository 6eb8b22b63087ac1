"""torch.nn.functional's convolution, pooling and rectifiers, with our kernels below.

Same names, same order of arguments, same errors. Tensors are float32, float64, bfloat16 or float16 (the 16-bit types
are summed in float32 and rounded once), on the CPU or a GPU, contiguous or channels_last; the result has the input's
layout. Every function is differentiable to any order, forward and backward, and an element of its result has the same
bits whatever the batch size, the position in the batch, the thread count or the run.
"""

from math import prod

from torch import Tensor, arange, nn, sign
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from cnnops import _C, ops
from cnnops._arguments import four_sides, is_integer, overridable, pair
from cnnops._blocks import conv_relu2d, conv_relu_max_pool2d  # noqa: F401

# Where torch.compile looks on, functions call the operators by torch.ops; otherwise by _C, which costs less.


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    algorithm: str = "auto",
) -> Tensor:
    r"""2-D convolution (cross-correlation), as :func:`torch.nn.functional.conv2d`.

    .. math:: y_{n,k,oh,ow} = b_k + \sum_{c,kh,kw} w_{k,c,kh,kw} \, x_{n,c,ih,iw}

    where ``ih = oh*stride - padding + kh*dilation``, ``iw`` likewise, and ``padding_mode`` says what x is outside its
    borders.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (K, C / groups, KH, KW).
        bias: (K), optional.
        stride, dilation: an int or a pair (h, w), in pixels.
        padding: an int, a pair (h, w), ``"valid"`` (none) or ``"same"`` (as much as keeps H and W; stride 1 only); or
            all four sides as ((top, bottom), (left, right)).
        groups: C and K are cut into so many groups, each convolved with its own.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``; the input is not copied.
        algorithm: for this pass and its gradients: ``"auto"``, the fastest; ``"accurate"``, the fastest of those that
            round about as ``"direct"`` does (``cnnops.settings.accurate`` makes ``"auto"`` mean this);
            or a name from ``cnnops.ops.algorithms()``.

    Returns:
        (N, K, OH, OW) with ``OH = (H + 2*padding - dilation*(KH-1) - 1) // stride + 1``, OW likewise.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an algorithm that refuses this geometry.
        NotImplementedError: a dtype without kernels.
        ValueError: an unknown algorithm or padding_mode.
    """
    if not is_integer(padding) and (isinstance(padding, str) or not is_integer(padding[0])):
        if has_torch_function((input, weight)):
            settings = {"padding_mode": padding_mode, "algorithm": algorithm}
            arguments = (input, weight, bias, stride, padding, dilation, groups)
            return handle_torch_function(conv2d, (input, weight), *arguments, **settings)
        if weight.dim() == 4:  # otherwise the operator says so
            padding = four_sides(padding, weight.shape[2:], stride, dilation)
        else:
            padding = 0
    call = ops.conv2d if is_dynamo_compiling() else _C.conv2d
    return call(input, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode, algorithm=algorithm)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    r"""The transposed convolution, as :func:`torch.nn.functional.conv_transpose2d`: conv2d's gradient of its input.

    .. math:: y_{n,k,oh,ow} = b_k + \sum_{c,kh,kw} w_{c,k,kh,kw} \, x_{n,c,ih,iw}, \quad oh = ih*stride - padding + kh*dilation

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (C, K / groups, KH, KW).
        bias: (K), optional.
        stride, padding, dilation: ints or pairs (h, w), in pixels.
        output_padding: so many rows and columns more at the bottom and the right; less than stride or dilation.

    Returns:
        (N, K, OH, OW) with ``OH = (H-1)*stride - 2*padding + dilation*(KH-1) + output_padding + 1``, OW likewise.

    Raises:
        RuntimeError, NotImplementedError, ValueError: as :func:`conv2d`.
    """  # noqa: E501
    if is_dynamo_compiling():
        arguments = (stride, padding, pair(output_padding), groups, dilation)
        return ops.conv_transpose2d(input, weight, bias, *arguments, algorithm=algorithm)
    arguments = (stride, padding, output_padding, groups, dilation)
    return _C.conv_transpose2d(input, weight, bias, *arguments, algorithm=algorithm)


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, algorithm: str = "auto") -> Tensor:
    r"""A fully connected layer, as :func:`torch.nn.functional.linear`: the convolution of images of one pixel.

    .. math:: y_{\dots,k} = b_k + \sum_c w_{k,c} \, x_{\dots,c}

    Args:
        input: (..., C).
        weight: (K, C); or (C), for a result without the last dimension.
        bias: (K), optional.
        algorithm: as for :func:`conv2d`.

    Returns:
        (..., K). As with all functions here, a row has the same bits alone and among others.

    Raises:
        RuntimeError, NotImplementedError, ValueError: as :func:`conv2d`.
    """
    if weight.dim() not in (1, 2) or input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"linear: expected input of shape (..., C) and weight of shape (K, C), "
            f"but got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    *outer, channels = input.shape
    *rows, _ = weight.shape
    if weight.numel() == 0 and input.is_floating_point():
        return nn.functional.linear(input, weight, bias)  # nothing to add up
    pixels, filters = input.reshape(prod(outer), channels, 1, 1), weight.reshape(prod(rows), channels, 1, 1)
    return conv2d(pixels, filters, bias, algorithm=algorithm).view(*outer, *rows)


def max_pool2d(
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode: bool = False,
    return_indices: bool = False,
):
    """The largest value of each window, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); of integers as well.
        kernel_size, stride, padding, dilation: ints or pairs (h, w); stride is kernel_size by default.
        ceil_mode: let a last window hang over the border if it starts inside.
        return_indices: also return where each maximum stands, as int64 indices into the plane (H, W).

    Returns:
        (N, C, OH, OW), and the indices if asked for. A NaN in a window wins; of equal values the first in scan order.

    Raises:
        RuntimeError: windows that do not fit, padding of more than half a window.
    """
    if return_indices:
        return _max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)
    if is_dynamo_compiling():
        return ops.max_pool2d(input, kernel_size, () if stride is None else stride, padding, dilation, ceil_mode)[0]
    return _C.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


@overridable
def _max_pool2d_with_indices(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode):
    stride = kernel_size if stride in (None, ()) else stride
    kernel_size, stride, padding, dilation = map(pair, (kernel_size, stride, padding, dilation))
    values, positions = ops.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    starts = [
        arange(out, device=input.device) * s - p for out, s, p in zip(values.shape[-2:], stride, padding, strict=True)
    ]
    return values, _plane_indices(input, positions, kernel_size[1], dilation, *starts)


def _plane_indices(input: Tensor, positions: Tensor, width: int, dilation, tops, lefts) -> Tensor:
    """torch's indices ih*W + iw, from the positions kh*width + kw in windows that start at these rows and columns."""
    positions = positions.long()
    ih = tops.unsqueeze(1) + positions // width * dilation[0]
    iw = lefts + positions % width * dilation[1]
    return ih * input.shape[-1] + iw


@overridable
def max_unpool2d(input: Tensor, indices: Tensor, kernel_size, stride=None, padding=0, output_size=None) -> Tensor:
    """Puts numbers back where max pooling found them, as :func:`torch.nn.functional.max_unpool2d`; zeros elsewhere.

    Args:
        input: (N, C, H, W) or (C, H, W).
        indices: int64, of input's shape, as max_pool2d returns them. Of several numbers with one index the last in
            scan order stays, on every device.
        kernel_size, stride, padding: of the pooling to be undone.
        output_size: (OH, OW) or the whole shape, where the pooling dropped rows or columns.

    Returns:
        (N, C, OH, OW) with ``OH = (H-1)*stride - 2*padding + kernel_size`` unless output_size says otherwise.

    Raises:
        RuntimeError: indices that do not fit (on a GPU they are not looked at).
        ValueError: an output_size that the pooling could not have come from.
    """
    if input.dim() == 3:
        arguments = (kernel_size, stride, padding, output_size if output_size is None else tuple(output_size)[-2:])
        return max_unpool2d(input.unsqueeze(0), indices.unsqueeze(0), *arguments).squeeze(0)
    kernel_size, padding = pair(kernel_size), pair(padding)
    stride = kernel_size if stride is None else pair(stride)
    default = [
        (i - 1) * s + k - 2 * p for i, s, k, p in zip(input.shape[-2:], stride, kernel_size, padding, strict=True)
    ]
    if output_size is None:
        output_size = default
    elif len(output_size) not in (2, 4):
        raise ValueError(f"max_unpool2d: output_size should have 2 or 4 elements, but got {output_size}")
    output_size = list(output_size)[-2:]
    for size, usual, s in zip(output_size, default, stride, strict=True):
        if not usual - s < size < usual + s:
            raise ValueError(
                f"max_unpool2d: invalid output_size {output_size}: it must differ from {default} by less than stride"
            )
    return ops.max_unpool2d(input, indices, output_size)


def avg_pool2d(
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); of int64 as well, then rounded towards zero.
        kernel_size, stride, padding: ints or pairs (h, w); stride is kernel_size by default.
        ceil_mode: let a last window hang over the border if it starts inside.
        count_include_pad: count the padding's zeros among the window's places.
        divisor_override: divide the sums by this number instead.

    Returns:
        (N, C, OH, OW).

    Raises:
        RuntimeError: windows that do not fit, padding of more than half a window, a divisor of 0.
    """
    if is_dynamo_compiling():
        return ops.avg_pool2d(
            input,
            kernel_size,
            () if stride is None else stride,
            padding,
            ceil_mode,
            count_include_pad,
            divisor_override,
        )
    return _C.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _adaptive_size(input: Tensor, output_size):
    """The pair (OH, OW), where None stands for the input's own size."""
    return [i if o is None else o for i, o in zip(input.shape[-2:], output_size, strict=True)]


def adaptive_avg_pool2d(input: Tensor, output_size) -> Tensor:
    """The mean of each of OH x OW windows that cut the image into parts of about the same size, as
    :func:`torch.nn.functional.adaptive_avg_pool2d`. Window o covers ``floor(o*H/OH)`` to ``ceil((o+1)*H/OH)``.

    Args:
        input: (N, C, H, W) or (C, H, W).
        output_size: an int or a pair (OH, OW); None stands for the input's size.

    Returns:
        (N, C, OH, OW).
    """
    if not is_integer(output_size) and None in output_size:
        if has_torch_function((input,)):
            return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
        output_size = _adaptive_size(input, output_size)
    if is_dynamo_compiling():
        return ops.adaptive_avg_pool2d(input, pair(output_size))
    return _C.adaptive_avg_pool2d(input, output_size)


@overridable
def adaptive_max_pool2d(input: Tensor, output_size, return_indices: bool = False):
    """The largest value of each of OH x OW windows, as :func:`torch.nn.functional.adaptive_max_pool2d`.

    The windows are those of :func:`adaptive_avg_pool2d`; the rest is as for :func:`max_pool2d`.
    """
    if not is_integer(output_size) and None in output_size:
        output_size = _adaptive_size(input, output_size)
    values, positions = ops.adaptive_max_pool2d(input, pair(output_size))
    if not return_indices:
        return values
    starts = [
        arange(out, device=input.device) * size // out
        for size, out in zip(input.shape[-2:], values.shape[-2:], strict=True)
    ]
    size, out = input.shape[-1], values.shape[-1]
    width = -(-size // out) + (1 if size % out else 0) if out else 1  # the widest window
    return values, _plane_indices(input, positions, width, (1, 1), *starts)


def lp_pool2d(input: Tensor, norm_type, kernel_size, stride=None, ceil_mode: bool = False) -> Tensor:
    """The p-norm of each window, ``(sum of x**p) ** (1/p)``, as :func:`torch.nn.functional.lp_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        norm_type: p; infinity gives max pooling of the absolute values, minus infinity the least of them.
        kernel_size, stride: ints or pairs (h, w); stride is kernel_size by default.
        ceil_mode: let a last window hang over the border if it starts inside.

    Raises:
        ValueError: a norm_type of 0.
    """
    if norm_type == 0:
        raise ValueError(f"lp_pool2d: norm_type must not be zero, but got {norm_type}")
    if norm_type == float("inf"):
        return max_pool2d(input.abs(), kernel_size, stride, ceil_mode=ceil_mode)
    if norm_type == -float("inf"):
        return -max_pool2d(-input.abs(), kernel_size, stride, ceil_mode=ceil_mode)
    mean = avg_pool2d(input.pow(norm_type), kernel_size, stride, ceil_mode=ceil_mode)
    kh, kw = pair(kernel_size)
    return (sign(mean) * relu(mean.abs())).mul(kh * kw).pow(1.0 / norm_type)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(x, 0)`` of every element of a tensor of any shape, as :func:`torch.nn.functional.relu`; integers as well.

    NaN stays NaN; the gradient at 0 is 0. The backward pass keeps the result, never the input. ``inplace=True`` writes
    the result over the input.
    """
    if is_dynamo_compiling():
        return ops.relu_(input) if inplace else ops.relu(input)
    return _C.relu(input, inplace)


def relu_(input: Tensor) -> Tensor:
    """:func:`relu` in place."""
    return relu(input, True)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """Every element clamped to [min_val, max_val], as :func:`torch.nn.functional.hardtanh`; integers as well.

    The gradient at the limits is 0. The backward pass keeps the result, never the input.

    Raises:
        ValueError: min_val above max_val.
    """
    if is_dynamo_compiling():
        return (ops.hardtanh_ if inplace else ops.hardtanh)(input, min_val, max_val)
    return _C.hardtanh(input, min_val, max_val, inplace)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """:func:`hardtanh` in place."""
    return hardtanh(input, min_val, max_val, True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(x, 0), 6)`` of every element, as :func:`torch.nn.functional.relu6`.

    Source: Krizhevsky, Convolutional Deep Belief Networks on CIFAR-10, 2010.
    """
    return hardtanh(input, 0.0, 6.0, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``x`` where positive, ``negative_slope * x`` elsewhere, for a tensor of any shape, as
    :func:`torch.nn.functional.leaky_relu`.

    Raises:
        RuntimeError: a derivative of the in-place form with a negative slope, whose result hides the input's sign.
    """
    if is_dynamo_compiling():
        return (ops.leaky_relu_ if inplace else ops.leaky_relu)(input, negative_slope)
    return _C.leaky_relu(input, negative_slope, inplace)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """:func:`leaky_relu` in place."""
    return leaky_relu(input, negative_slope, True)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``x`` where positive, ``weight * x`` elsewhere; ``weight`` has one element, or one per channel (dimension 1).

    Source: He et al., Delving Deep into Rectifiers, 2015.
    """
    if is_dynamo_compiling():
        return ops.prelu(input, weight)
    return _C.prelu(input, weight)
