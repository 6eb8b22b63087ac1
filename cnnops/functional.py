"""torch.nn.functional's convolution, pooling and rectifiers, with our kernels below.

Same names, same order of arguments, same errors. Tensors are float32 or float64, on the CPU or a GPU, contiguous or
channels_last (the result has the input's layout). Every function is differentiable to any order, and an element of its
result has the same bits whatever the batch size, the position in the batch, the thread count or the run.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnops import ops
from cnnops.ops import pair


def _batched(name: str, input: Tensor, run):
    """Calls run() with a batch dimension, which it adds for an input (C, H, W) and takes away again."""
    if input.dim() == 3:
        return run(input.unsqueeze(0)).squeeze(0)
    if input.dim() != 4:
        raise RuntimeError(f"{name}: expected 3D (unbatched) or 4D (batched) input, but got shape {list(input.shape)}")
    return run(input)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    algorithm: str = "auto",
) -> Tensor:
    r"""2-D convolution (cross-correlation), as :func:`torch.nn.functional.conv2d`.

    .. math:: y_{n,k,oh,ow} = b_k + \sum_{c,kh,kw} w_{k,c,kh,kw} \, x_{n,c,ih,iw}

    where ``ih = oh*stride - padding + kh*dilation``, ``iw`` likewise, and x is zero outside its borders.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (K, C / groups, KH, KW).
        bias: (K), optional.
        stride, dilation: an int or a pair (h, w), in pixels.
        padding: an int, a pair, ``"valid"`` (none) or ``"same"`` (as much as keeps H and W; stride 1 only).
        groups: C and K are cut into so many groups, each convolved with its own.
        algorithm: ``"auto"``, or a name from ``cnnops.ops.algorithms()`` for this pass and its gradients.

    Returns:
        (N, K, OH, OW) with ``OH = (H + 2*padding - dilation*(KH-1) - 1) // stride + 1``, OW likewise.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; an algorithm that refuses this geometry.
        ValueError: an unknown algorithm.
    """
    if isinstance(padding, str):
        input, padding = _string_padding(input, weight, stride, padding, dilation)
    return _batched(
        "conv2d",
        input,
        lambda x: ops.conv2d(x, weight, bias, pair(stride), pair(padding), pair(dilation), groups, algorithm),
    )


def _string_padding(input: Tensor, weight: Tensor, stride, padding: str, dilation):
    """The input and the pair that stand for padding="same" or "valid"."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise RuntimeError(f"conv2d: padding must be 'same', 'valid' or numbers, but got {padding!r}")
    if any(s != 1 for s in pair(stride)):
        raise RuntimeError(f"conv2d: padding='same' is not supported for strided convolutions, but stride={stride}")
    total = [d * (k - 1) for d, k in zip(pair(dilation), weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):  # one more row below or column to the right than on the other side
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [t // 2 for t in total]


def _window(kernel_size, stride) -> list[list[int]]:
    """Pooling's kernel_size and stride as pairs; no stride, None or [], means the kernel_size."""
    kernel_size = pair(kernel_size)
    return [kernel_size, kernel_size if stride is None else pair(stride) or kernel_size]


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
        input: (N, C, H, W) or (C, H, W).
        kernel_size, stride, padding, dilation: ints or pairs (h, w); stride is kernel_size by default.
        ceil_mode: let a last window hang over the border if it starts inside.
        return_indices: also return where each maximum stands, as int64 indices into the plane (H, W).

    Returns:
        (N, C, OH, OW), and the indices if asked for. A NaN in a window wins; of equal values the first in scan order.

    Raises:
        RuntimeError: windows that do not fit, padding of more than half a window.
    """
    window = [*_window(kernel_size, stride), pair(padding), pair(dilation)]
    if not return_indices:
        return _batched("max_pool2d", input, lambda x: ops.max_pool2d(x, *window, ceil_mode)[0])
    if input.dim() == 3:
        return tuple(t.squeeze(0) for t in max_pool2d(input.unsqueeze(0), *window, ceil_mode, True))
    values, positions = ops.max_pool2d(input, *window, ceil_mode)
    return values, _plane_indices(positions, input.shape[-1], *window)


def _plane_indices(positions: Tensor, width: int, kernel_size, stride, padding, dilation) -> Tensor:
    """torch's indices ih*W + iw from the positions kh*KW + kw within the windows."""
    positions = positions.long()
    oh = torch.arange(positions.shape[-2], device=positions.device).unsqueeze(1)
    ow = torch.arange(positions.shape[-1], device=positions.device)
    ih = oh * stride[0] - padding[0] + positions // kernel_size[1] * dilation[0]
    iw = ow * stride[1] - padding[1] + positions % kernel_size[1] * dilation[1]
    return ih * width + iw


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
        input: (N, C, H, W) or (C, H, W).
        kernel_size, stride, padding: ints or pairs (h, w); stride is kernel_size by default.
        ceil_mode: let a last window hang over the border if it starts inside.
        count_include_pad: count the padding's zeros among the window's places.
        divisor_override: divide the sums by this number instead.

    Returns:
        (N, C, OH, OW).

    Raises:
        RuntimeError: windows that do not fit, padding of more than half a window, a divisor of 0.
    """
    window = [*_window(kernel_size, stride), pair(padding)]
    return _batched(
        "avg_pool2d", input, lambda x: ops.avg_pool2d(x, *window, ceil_mode, count_include_pad, divisor_override)
    )


def _maybe_inplace(input: Tensor, output: Tensor, inplace: bool) -> Tensor:
    return input.copy_(output) if inplace else output


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(x, 0)`` of every element of a tensor of any shape. NaN stays NaN; the gradient at 0 is 0.

    The backward pass keeps the result, never the input. ``inplace=True`` writes the result into ``input``.
    """
    return _maybe_inplace(input, ops.relu(input), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``x`` where positive, ``negative_slope * x`` elsewhere, for a tensor of any shape."""
    return _maybe_inplace(input, ops.leaky_relu(input, negative_slope), inplace)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``x`` where positive, ``weight * x`` elsewhere; ``weight`` has one element, or one per channel (dimension 1).

    Source: He et al., Delving Deep into Rectifiers, 2015.
    """
    return ops.prelu(input, weight)
