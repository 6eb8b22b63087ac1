"""Modules that take the place of torch.nn's: same constructor, parameters, initial values, repr and state_dict."""

from torch import Tensor, nn
from torch.nn import functional as F

from cnnops import functional


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on cnnops' kernels.

    One keyword more: ``algorithm``, ``"auto"`` or a name from ``cnnops.ops.algorithms()``. Input (N, C, H, W) or
    (C, H, W), float32 or float64. See :func:`cnnops.functional.conv2d` for shapes, errors and determinism.
    """

    algorithm = "auto"  # of converted modules, which __init__ has not seen

    def __init__(self, *args, algorithm: str = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        self.algorithm = algorithm

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, algorithm=self.algorithm
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", algorithm={self.algorithm}" if self.algorithm != "auto" else "")


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on cnnops' kernels. See :func:`cnnops.functional.max_pool2d`."""

    def forward(self, input: Tensor):
        return functional.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on cnnops' kernels. See :func:`cnnops.functional.avg_pool2d`."""

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


class ReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` on cnnops' kernels. See :func:`cnnops.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` on cnnops' kernels. See :func:`cnnops.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class PReLU(nn.PReLU):
    """:class:`torch.nn.PReLU` on cnnops' kernels. See :func:`cnnops.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.prelu(input, self.weight)
