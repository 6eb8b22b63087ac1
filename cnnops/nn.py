"""Modules that take the place of torch.nn's: same constructor, parameters, initial values, repr and state_dict.

Each computes by the function of the same name in :mod:`cnnops.functional`, where shapes, dtypes, errors and determinism
are said.
"""

import torch
from torch import Tensor, nn

from cnnops import functional


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on cnnops' kernels; see :func:`cnnops.functional.conv2d`.

    One keyword more: ``algorithm``, ``"auto"``, ``"accurate"`` or a name from ``cnnops.ops.algorithms()``.
    """

    algorithm = "auto"
    contiguous_filters = False  # also in a channels_last model, where kernels read them faster so
    filters_laid = False  # whether they were channels_last, and no longer are for that

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        algorithm: str = "auto",
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.algorithm = algorithm

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        faster = self.contiguous_filters and self.weight.is_cpu and self.weight.dtype != torch.bfloat16
        if faster and not self.weight.is_contiguous():
            self.weight.data, self.filters_laid = self.weight.data.contiguous(), True
        elif self.filters_laid and not faster:  # on a GPU, or for dot products, each call would copy them
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
            self.filters_laid = False
        return self

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if isinstance(padding, str):
            left, right, top, bottom = self._reversed_padding_repeated_twice
            padding = top, left, bottom, right
        return functional.conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            algorithm=self.algorithm,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", algorithm={self.algorithm}" if self.algorithm != "auto" else "")


class ConvReLU2d(Conv2d):
    """A :class:`Conv2d` and an activation as one operator; see :func:`cnnops.functional.conv_relu2d`.

    Parameters and state_dict are the convolution's. Two keywords more than its own: ``activation``, ``"relu"``,
    ``"relu6"``, ``"leaky_relu"`` or ``"none"``; and ``negative_slope``, of leaky_relu.
    """

    def __init__(self, *args, activation: str = "relu", negative_slope: float = 0.01, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv_relu2d(input, self.weight, self.bias, **self._settings())

    def _settings(self) -> dict:
        padding = self.padding
        if isinstance(padding, str):
            left, right, top, bottom = self._reversed_padding_repeated_twice
            padding = top, left, bottom, right
        return {
            "stride": self.stride,
            "padding": padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "padding_mode": self.padding_mode,
            "algorithm": self.algorithm,
        }

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return super().extra_repr() + f", activation={self.activation}{slope}"


class ConvReLUMaxPool2d(ConvReLU2d):
    """A :class:`ConvReLU2d` and a :class:`MaxPool2d` as one operator; see
    :func:`cnnops.functional.conv_relu_max_pool2d`.

    More keywords, those of MaxPool2d: ``pool_kernel_size`` (needed), ``pool_stride``, ``pool_padding``,
    ``pool_dilation``, ``ceil_mode``.
    """

    def __init__(
        self,
        *args,
        pool_kernel_size,
        pool_stride=None,
        pool_padding=0,
        pool_dilation=1,
        ceil_mode: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding, self.pool_dilation, self.ceil_mode = pool_padding, pool_dilation, ceil_mode

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv_relu_max_pool2d(input, self.weight, self.bias, **self._settings())

    def _settings(self) -> dict:
        names = "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"
        return super()._settings() | {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        pool = f"pool_kernel_size={self.pool_kernel_size}, pool_stride={self.pool_stride}"
        return f"{super().extra_repr()}, {pool}, pool_padding={self.pool_padding}"


class LazyConv2d(nn.LazyConv2d):
    """:class:`torch.nn.LazyConv2d`: a :class:`Conv2d` that learns its number of input channels from its first input."""

    cls_to_become = Conv2d
    algorithm = "auto"
    _conv_forward = Conv2d._conv_forward

    def __init__(
        self,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        algorithm: str = "auto",
    ):
        super().__init__(
            out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.algorithm = algorithm


class ConvTranspose2d(nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` on cnnops' kernels; see :func:`cnnops.functional.conv_transpose2d`.

    One keyword more: ``algorithm``, as in :class:`Conv2d`.
    """

    algorithm = "auto"

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        algorithm: str = "auto",
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self.algorithm = algorithm

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self.output_padding
        if output_size is not None:
            geometry = (self.stride, self.padding, self.kernel_size, 2, self.dilation)
            output_padding = self._output_padding(input, output_size, *geometry)
        return functional.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            algorithm=self.algorithm,
        )


class Linear(nn.Linear):
    """:class:`torch.nn.Linear` on cnnops' kernels; see :func:`cnnops.functional.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on cnnops' kernels; see :func:`cnnops.functional.max_pool2d`."""

    def forward(self, input: Tensor):
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxUnpool2d(nn.MaxUnpool2d):
    """:class:`torch.nn.MaxUnpool2d` on cnnops' kernels; see :func:`cnnops.functional.max_unpool2d`."""

    def forward(self, input: Tensor, indices: Tensor, output_size: list[int] | None = None) -> Tensor:
        return functional.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on cnnops' kernels; see :func:`cnnops.functional.avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` on cnnops' kernels; see :func:`cnnops.functional.adaptive_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """:class:`torch.nn.AdaptiveMaxPool2d` on cnnops' kernels; see :func:`cnnops.functional.adaptive_max_pool2d`."""

    def forward(self, input: Tensor):
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class LPPool2d(nn.LPPool2d):
    """:class:`torch.nn.LPPool2d` on cnnops' kernels; see :func:`cnnops.functional.lp_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class ReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` on cnnops' kernels; see :func:`cnnops.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class Hardtanh(nn.Hardtanh):
    """:class:`torch.nn.Hardtanh` on cnnops' kernels; see :func:`cnnops.functional.hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(nn.ReLU6):
    """:class:`torch.nn.ReLU6` on cnnops' kernels; see :func:`cnnops.functional.relu6`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` on cnnops' kernels; see :func:`cnnops.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class PReLU(nn.PReLU):
    """:class:`torch.nn.PReLU` on cnnops' kernels; see :func:`cnnops.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.prelu(input, self.weight)
