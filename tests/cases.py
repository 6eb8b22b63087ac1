"""The one table of shapes, shared by the tests and the benchmarks.

Every pair is (height, width), as everywhere in cnnops. Batches are small here; a benchmark takes a case by its name or
tag and scales it: `replace(case, n=64)`. `flops` lets a test leave out what is too big for it. The lists at the end, at
the true sizes of well-known networks, are the benchmarks' alone.
"""

from dataclasses import dataclass
from math import prod

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv2dCase:
    name: str
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    tags: tuple[str, ...] = ()

    @property
    def input_shape(self):
        return (self.n, self.c, self.h, self.w)

    @property
    def weight_shape(self):
        return (self.k, self.c // self.groups, *self.kernel)

    @property
    def out(self) -> Pair:
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sizes)

    @property
    def output_shape(self):
        return (self.n, self.k, *self.out)

    @property
    def arguments(self):
        """What conv2d takes besides tensors."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def flops(self) -> int:
        """Of one pass; a multiplication and an addition count as two."""
        return 2 * prod(self.output_shape) * prod(self.weight_shape[1:])

    def __str__(self):
        return self.name


@dataclass(frozen=True)
class Pool2dCase:
    name: str
    n: int
    c: int
    h: int
    w: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    tags: tuple[str, ...] = ()

    @property
    def input_shape(self):
        return (self.n, self.c, self.h, self.w)

    @property
    def out(self) -> Pair:
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple(self._out(*size) for size in sizes)

    def _out(self, i, k, s, p, d):
        span = i + 2 * p - d * (k - 1) - 1
        if not self.ceil_mode:
            return span // s + 1
        out = -(-span // s) + 1
        return out - 1 if (out - 1) * s >= i + p else out  # the last window must start within input + left padding

    @property
    def output_shape(self):
        return (self.n, self.c, *self.out)

    @property
    def max_arguments(self):
        """What max_pool2d takes besides its input."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }

    @property
    def avg_arguments(self):
        """What avg_pool2d takes besides its input."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
            "count_include_pad": self.count_include_pad,
            "divisor_override": self.divisor_override,
        }

    @property
    def flops(self) -> int:
        """Inputs looked at."""
        return prod(self.output_shape) * prod(self.kernel)

    def __str__(self):
        return self.name


def _conv(tag, *rows):
    return [Conv2dCase(*args, **options, tags=(tag,)) for *args, options in rows]


def _pool(tag, *rows):
    return [Pool2dCase(*args, **options, tags=(tag,)) for *args, options in rows]


# name, n, c, h, w, k, kernel, {the rest}
CONV2D = [
    *_conv(
        "mnist",  # every convolution of the notes' models, at its true size
        ("lecture-1", 4, 1, 28, 28, 16, (5, 5), {}),
        ("lecture-2", 4, 16, 24, 24, 32, (5, 5), {}),
        ("lecture-3", 4, 32, 10, 10, 64, (5, 5), {}),
        ("lecture-4", 4, 64, 6, 6, 128, (5, 5), {}),
        ("two-layer-1", 4, 1, 28, 28, 32, (3, 3), {"padding": (1, 1)}),
        ("two-layer-2", 4, 32, 14, 14, 64, (3, 3), {"padding": (1, 1)}),
        ("keras-1", 4, 1, 28, 28, 32, (5, 5), {}),
        ("keras-2", 4, 32, 12, 12, 32, (3, 3), {}),
    ),
    *_conv(
        "layer",  # what well-known networks are made of, smaller in image or channels
        ("vgg-first", 2, 3, 32, 32, 64, (3, 3), {"padding": (1, 1)}),
        ("vgg-56", 1, 64, 28, 28, 64, (3, 3), {"padding": (1, 1)}),
        ("vgg-14", 1, 128, 14, 14, 128, (3, 3), {"padding": (1, 1)}),
        ("alexnet-stem", 1, 3, 63, 63, 64, (11, 11), {"stride": (4, 4), "padding": (2, 2)}),
        ("alexnet-5x5", 1, 32, 27, 27, 48, (5, 5), {"padding": (2, 2)}),
        ("resnet-stem", 2, 3, 56, 56, 64, (7, 7), {"stride": (2, 2), "padding": (3, 3), "bias": False}),
        ("resnet-7", 2, 128, 7, 7, 128, (3, 3), {"padding": (1, 1), "bias": False}),
        ("resnet-down", 2, 32, 28, 28, 64, (3, 3), {"stride": (2, 2), "padding": (1, 1), "bias": False}),
        ("resnet-shortcut", 2, 64, 28, 28, 128, (1, 1), {"stride": (2, 2), "bias": False}),
        ("resnet-1x1-wide", 1, 64, 28, 28, 256, (1, 1), {"bias": False}),
        ("resnet-1x1-narrow", 2, 256, 14, 14, 64, (1, 1), {"bias": False}),
        ("resnext", 2, 64, 14, 14, 64, (3, 3), {"padding": (1, 1), "groups": 16, "bias": False}),
        ("mobilenet", 2, 48, 28, 28, 48, (3, 3), {"padding": (1, 1), "groups": 48, "bias": False}),
        ("mobilenet-down", 2, 48, 28, 28, 48, (3, 3), {"stride": (2, 2), "padding": (1, 1), "groups": 48}),
        ("mobilenet-5x5", 1, 24, 14, 14, 24, (5, 5), {"padding": (2, 2), "groups": 24}),
        ("deeplab", 1, 32, 17, 17, 32, (3, 3), {"padding": (6, 6), "dilation": (6, 6)}),
        ("long-sum", 1, 512, 5, 5, 16, (3, 3), {"padding": (1, 1)}),
        ("longer-sum", 1, 4096, 3, 18, 2, (3, 3), {}),
    ),
    *_conv(
        "nasty",  # shapes on which kernels go wrong
        ("notes", 1, 1, 4, 4, 1, (3, 3), {}),
        ("everything-is-one", 1, 1, 1, 1, 1, (1, 1), {}),
        ("1x1-image-3x3", 2, 5, 1, 1, 7, (3, 3), {"padding": (1, 1)}),
        ("1x1-image-1x1", 3, 17, 1, 1, 19, (1, 1), {}),
        ("fully-connected", 3, 17, 5, 4, 37, (5, 4), {}),
        ("1x1-padded", 2, 3, 4, 5, 4, (1, 1), {"padding": (2, 1)}),
        ("one-output-channel", 2, 9, 11, 13, 1, (3, 3), {"padding": (1, 1)}),
        ("one-row", 2, 3, 1, 37, 5, (1, 3), {"padding": (0, 1)}),
        ("one-column", 2, 3, 37, 1, 5, (3, 1), {"padding": (1, 0)}),
        ("kernel-is-input", 2, 3, 5, 7, 6, (5, 7), {}),
        ("kernel-over-input", 2, 3, 2, 3, 4, (5, 6), {"padding": (2, 2)}),
        ("kernel-over-input-wide", 1, 2, 3, 4, 3, (3, 9), {"padding": (1, 4)}),
        ("padding-is-kernel", 2, 2, 5, 6, 3, (3, 2), {"padding": (3, 2)}),
        ("padding-over-kernel", 1, 2, 4, 3, 3, (2, 3), {"padding": (5, 7)}),
        ("padding-over-kernel-deep", 1, 64, 3, 4, 8, (2, 3), {"padding": (4, 5)}),
        ("padding-over-kernel-strided", 2, 2, 4, 3, 3, (2, 3), {"padding": (7, 5), "stride": (4, 3)}),
        (
            "asymmetric",
            2,
            6,
            17,
            23,
            10,
            (3, 5),
            {"stride": (2, 3), "padding": (1, 4), "dilation": (3, 2), "groups": 2},
        ),
        (
            "asymmetric-turned",
            3,
            9,
            23,
            14,
            6,
            (4, 2),
            {"stride": (3, 1), "padding": (0, 2), "dilation": (1, 4), "groups": 3, "bias": False},
        ),
        ("even-kernel", 2, 4, 9, 9, 5, (4, 4), {"padding": (2, 1)}),
        ("stride-over-kernel", 2, 3, 16, 17, 5, (2, 2), {"stride": (5, 4)}),
        ("stride-over-input", 2, 3, 5, 6, 4, (3, 3), {"stride": (50, 60), "padding": (1, 1)}),
        ("stride-3-kernel-2", 2, 3, 13, 14, 4, (2, 2), {"stride": (3, 3), "padding": (1, 0)}),
        ("stride-2-1x1", 2, 8, 9, 10, 6, (1, 1), {"stride": (2, 2)}),
        ("1x1-prime", 3, 37, 9, 11, 71, (1, 1), {}),
        ("1x1-prime-strided", 3, 67, 27, 22, 53, (1, 1), {"stride": (2, 2), "bias": False}),
        ("panel-of-1.5-mib", 1, 1850, 3, 4, 24, (3, 3), {"padding": (1, 1)}),
        ("stride-2-leftover", 2, 3, 10, 12, 4, (3, 3), {"stride": (2, 2)}),
        ("stride-3", 2, 5, 20, 19, 6, (5, 4), {"stride": (3, 3), "padding": (2, 1)}),
        ("stride-2-dilation-2", 2, 3, 15, 16, 4, (3, 3), {"stride": (2, 2), "dilation": (2, 2), "padding": (2, 2)}),
        ("stride-3-dilation-2", 2, 3, 15, 16, 4, (3, 2), {"stride": (3, 3), "dilation": (2, 2), "padding": (2, 1)}),
        ("stride-4-dilation-6", 1, 2, 30, 31, 3, (3, 3), {"stride": (4, 4), "dilation": (6, 6), "padding": (5, 7)}),
        ("dilation-over-input", 1, 2, 4, 5, 3, (3, 3), {"dilation": (7, 8), "padding": (7, 8)}),
        ("row-over-vector", 1, 2, 3, 200, 3, (3, 3), {"padding": (1, 1)}),
        ("row-over-vector-strided", 1, 2, 4, 203, 17, (3, 3), {"stride": (1, 2), "padding": (1, 1)}),
        ("row-over-block", 1, 2, 3, 403, 5, (2, 3), {"padding": (0, 1)}),
        ("tall", 1, 2, 200, 3, 3, (3, 3), {"padding": (1, 1)}),
        ("row-of-15", 1, 3, 6, 15, 15, (3, 3), {"padding": (1, 1)}),
        ("row-of-17", 1, 17, 6, 17, 17, (3, 3), {"padding": (1, 1)}),
        ("row-of-31", 1, 31, 4, 31, 33, (3, 3), {"padding": (1, 1)}),
        ("row-of-33", 1, 33, 4, 33, 31, (3, 3), {"padding": (1, 1)}),
        ("channels-prime", 2, 37, 7, 9, 41, (3, 3), {"padding": (1, 1)}),
        ("channels-prime-5x5", 1, 13, 9, 11, 67, (5, 5), {"padding": (2, 2)}),
        ("channels-prime-5x5-wide", 3, 19, 7, 9, 37, (5, 5), {"padding": (3, 1)}),
        ("groups-5x5", 1, 34, 10, 8, 40, (5, 5), {"padding": (2, 2), "groups": 2, "bias": False}),
        ("phases", 3, 19, 17, 22, 37, (3, 3), {"padding": (2, 1), "dilation": (2, 2)}),
        ("phases-apart", 2, 37, 20, 37, 21, (3, 3), {"padding": (0, 6), "dilation": (3, 6)}),
        ("phases-by-rows", 2, 18, 31, 13, 20, (3, 3), {"padding": (5, 0), "dilation": (5, 1)}),
        ("phases-5x5", 1, 17, 19, 26, 20, (5, 5), {"padding": (4, 6), "dilation": (2, 4), "bias": False}),
        ("phases-groups", 2, 40, 25, 18, 36, (3, 3), {"padding": (4, 2), "dilation": (4, 2), "groups": 2}),
        ("groups", 2, 12, 8, 9, 20, (3, 3), {"padding": (1, 1), "groups": 4}),
        ("groups-to-one", 2, 12, 8, 9, 4, (3, 3), {"padding": (1, 1), "groups": 4}),
        ("groups-1x1", 2, 16, 5, 6, 24, (1, 1), {"groups": 8}),
        ("groups-of-4", 2, 20, 40, 36, 20, (3, 3), {"padding": (1, 1), "groups": 5}),
        ("groups-of-4-strided", 1, 20, 41, 45, 30, (3, 3), {"stride": (2, 2), "padding": (1, 1), "groups": 5}),
        ("groups-of-8", 1, 40, 29, 31, 35, (3, 3), {"padding": (1, 2), "groups": 5}),
        ("groups-of-12", 2, 24, 45, 41, 18, (3, 3), {"padding": (0, 1), "groups": 2}),
        ("groups-of-16", 3, 48, 13, 10, 48, (3, 3), {"padding": (1, 1), "groups": 3, "bias": False}),
        ("groups-of-8-many", 3, 72, 7, 14, 63, (3, 3), {"padding": (1, 1), "groups": 9}),
        ("groups-of-12-many", 2, 60, 9, 6, 50, (3, 3), {"padding": (1, 0), "groups": 5, "bias": False}),
        ("groups-of-4-whole", 2, 48, 30, 22, 48, (3, 3), {"padding": (1, 1), "groups": 12}),
        ("groups-of-8-to-16", 1, 24, 8, 11, 48, (3, 3), {"padding": (1, 2), "groups": 3, "bias": False}),
        ("groups-of-16-small", 6, 64, 7, 6, 64, (3, 3), {"padding": (1, 1), "groups": 4}),
        ("groups-of-24", 2, 48, 12, 7, 48, (3, 3), {"padding": (0, 1), "groups": 2}),
        ("groups-of-32", 3, 96, 9, 14, 96, (3, 3), {"padding": (1, 1), "groups": 3}),
        ("groups-of-16-to-32", 2, 64, 10, 13, 128, (3, 3), {"padding": (1, 1), "groups": 4}),
        ("depthwise", 2, 7, 11, 13, 7, (3, 3), {"padding": (1, 1), "groups": 7}),
        ("depthwise-multiplier", 2, 5, 10, 9, 15, (3, 3), {"padding": (1, 1), "groups": 5}),
        ("depthwise-strided", 2, 5, 10, 9, 5, (5, 3), {"stride": (2, 3), "padding": (2, 0), "groups": 5}),
        ("depthwise-dilated", 2, 5, 17, 19, 5, (3, 3), {"dilation": (3, 4), "padding": (3, 4), "groups": 5}),
        ("depthwise-7x7", 1, 17, 9, 21, 17, (7, 7), {"padding": (3, 3), "groups": 17}),
        ("depthwise-5x5-strided", 2, 18, 12, 11, 18, (5, 5), {"stride": (2, 2), "padding": (2, 2), "groups": 18}),
        ("depthwise-strided-whole", 1, 2, 6, 32, 2, (3, 3), {"stride": (2, 2), "padding": (1, 1), "groups": 2}),
        ("depthwise-many", 2, 211, 3, 6, 211, (3, 3), {"padding": (1, 1), "groups": 211}),
        ("depthwise-large", 2, 19, 41, 43, 19, (3, 3), {"padding": (1, 1), "groups": 19}),
        ("depthwise-wide", 1, 2, 3, 270, 2, (3, 3), {"padding": (1, 1), "groups": 2}),
        ("kernel-over-64-wide", 1, 2, 2, 80, 3, (1, 70), {}),
        ("big-kernel", 1, 2, 24, 25, 3, (17, 19), {"padding": (8, 9)}),
        ("batch-of-one", 1, 3, 9, 8, 5, (3, 3), {"padding": (1, 1)}),
        ("batch-of-13", 13, 3, 5, 4, 6, (3, 3), {"padding": (1, 1)}),
        ("empty-batch", 0, 3, 9, 8, 5, (3, 3), {"padding": (1, 1)}),
        ("empty-batch-groups", 0, 4, 9, 8, 6, (3, 2), {"stride": (2, 1), "groups": 2, "bias": False}),
    ),
]

# name, n, c, h, w, kernel, stride, padding, {the rest}
_POOL2D = [
    *_pool(
        "mnist",
        ("lecture", 4, 32, 20, 20, (2, 2), (2, 2), (0, 0), {}),
        ("two-layer-1", 4, 32, 28, 28, (2, 2), (2, 2), (0, 0), {}),
        ("two-layer-2", 4, 64, 14, 14, (2, 2), (2, 2), (0, 0), {}),
    ),
    *_pool(
        "layer",
        ("vgg", 2, 16, 56, 56, (2, 2), (2, 2), (0, 0), {}),
        ("resnet-stem", 2, 16, 56, 56, (3, 3), (2, 2), (1, 1), {}),
        ("alexnet", 2, 16, 27, 27, (3, 3), (2, 2), (0, 0), {}),
        ("inception", 2, 12, 14, 14, (3, 3), (1, 1), (1, 1), {}),
        ("googlenet", 2, 12, 28, 28, (3, 3), (2, 2), (0, 0), {"ceil_mode": True}),
        ("global-7", 2, 64, 7, 7, (7, 7), (7, 7), (0, 0), {}),
    ),
    *_pool(
        "nasty",
        ("notes", 1, 1, 4, 4, (2, 2), (2, 2), (0, 0), {}),
        ("everything-is-one", 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), {}),
        ("window-1x1", 2, 3, 5, 6, (1, 1), (1, 1), (0, 0), {}),
        ("window-1x1-strided", 2, 3, 5, 6, (1, 1), (3, 2), (0, 0), {}),
        ("odd-sizes", 2, 3, 7, 9, (2, 2), (2, 2), (0, 0), {}),
        ("odd-sizes-ceil", 2, 3, 7, 9, (2, 2), (2, 2), (0, 0), {"ceil_mode": True}),
        ("overlapping", 2, 3, 9, 10, (4, 3), (1, 1), (0, 0), {}),
        ("overlapping-padded", 2, 3, 9, 10, (4, 5), (1, 2), (2, 2), {}),
        ("stride-over-window", 2, 3, 13, 14, (2, 2), (5, 4), (0, 0), {}),
        ("stride-over-window-ceil", 2, 3, 13, 14, (2, 2), (5, 4), (1, 0), {"ceil_mode": True}),
        ("stride-over-input-ceil", 2, 3, 3, 4, (2, 2), (30, 40), (1, 1), {"ceil_mode": True}),
        ("asymmetric", 2, 3, 17, 23, (3, 5), (2, 3), (1, 2), {}),
        ("asymmetric-ceil", 2, 3, 17, 24, (3, 5), (2, 3), (1, 2), {"ceil_mode": True}),
        ("ceil-window-hangs-over", 1, 2, 6, 6, (3, 3), (2, 2), (0, 0), {"ceil_mode": True}),
        ("ceil-drops-last-window", 1, 2, 5, 5, (2, 2), (3, 3), (1, 1), {"ceil_mode": True}),
        ("window-is-input", 2, 3, 5, 7, (5, 7), (1, 1), (0, 0), {}),
        ("window-over-input", 2, 3, 2, 3, (4, 5), (2, 2), (2, 2), {}),
        ("window-over-input-ceil", 2, 3, 2, 3, (4, 5), (3, 3), (2, 2), {"ceil_mode": True}),
        ("window-over-input-by-ceil-alone", 2, 3, 6, 7, (9, 2), (9, 2), (0, 0), {"ceil_mode": True}),
        ("1x1-image", 2, 3, 1, 1, (2, 2), (2, 2), (1, 1), {}),
        ("one-row", 2, 3, 1, 41, (1, 3), (1, 2), (0, 1), {}),
        ("one-column", 2, 3, 41, 1, (3, 1), (2, 1), (1, 0), {}),
        ("row-over-vector", 1, 2, 4, 203, (2, 2), (2, 2), (0, 0), {}),
        ("row-over-vector-3x3", 1, 2, 5, 201, (3, 3), (2, 2), (1, 1), {}),
        ("row-over-vector-stride-1", 1, 2, 4, 90, (3, 3), (1, 1), (1, 1), {}),
        ("row-over-vector-4x4", 1, 2, 5, 131, (4, 4), (2, 2), (1, 1), {}),
        ("row-over-256", 1, 1, 3, 530, (3, 3), (1, 1), (1, 1), {}),
        ("side-by-side", 2, 3, 12, 14, (3, 4), (3, 4), (0, 0), {}),
        ("side-by-side-padded", 2, 3, 8, 9, (3, 3), (2, 3), (1, 0), {}),
        ("side-by-side-over-256", 1, 1, 6, 401, (3, 3), (3, 3), (0, 0), {}),
        ("row-over-256-strided", 1, 1, 6, 530, (3, 4), (3, 3), (0, 0), {}),
        ("rows-alike", 1, 3, 24, 26, (8, 4), (8, 4), (0, 0), {}),
        ("channels-115", 2, 115, 5, 6, (3, 3), (2, 2), (1, 1), {}),
        ("window-of-256", 1, 2, 20, 21, (16, 16), (2, 3), (0, 0), {}),
        ("window-of-289", 1, 2, 20, 21, (17, 17), (1, 2), (8, 3), {}),
        ("window-of-1000", 1, 2, 26, 50, (20, 50), (3, 25), (10, 25), {}),
        ("batch-of-13", 13, 3, 5, 4, (2, 2), (2, 2), (0, 0), {}),
        ("empty-batch", 0, 3, 9, 8, (2, 2), (2, 2), (0, 0), {}),
    ),
]

MAX_POOL2D = [
    *_POOL2D,
    *_pool(
        "nasty",
        ("dilated", 2, 3, 12, 13, (3, 3), (1, 1), (1, 1), {"dilation": (2, 2)}),
        ("dilated-strided", 2, 3, 19, 23, (3, 2), (2, 3), (1, 1), {"dilation": (2, 5)}),
        ("dilated-ceil", 2, 3, 16, 18, (3, 3), (3, 2), (1, 1), {"dilation": (3, 2), "ceil_mode": True}),
        ("dilated-corners-only", 1, 2, 6, 5, (2, 2), (1, 1), (1, 1), {"dilation": (6, 5)}),
    ),
]

AVG_POOL2D = [
    *_POOL2D,
    *_pool(
        "nasty",
        ("padded-excluded", 2, 3, 9, 10, (3, 3), (2, 2), (1, 1), {"count_include_pad": False}),
        (
            "padded-excluded-ceil",
            2,
            3,
            9,
            10,
            (4, 4),
            (3, 3),
            (2, 1),
            {"count_include_pad": False, "ceil_mode": True},
        ),
        ("padded-included-ceil", 2, 3, 10, 9, (4, 4), (3, 3), (1, 2), {"ceil_mode": True}),
        ("window-over-input-excluded", 2, 3, 2, 3, (4, 5), (2, 2), (2, 2), {"count_include_pad": False}),
        ("divisor", 2, 3, 9, 10, (3, 3), (2, 2), (1, 1), {"divisor_override": 7}),
        ("divisor-one-is-a-sum", 2, 3, 9, 10, (3, 2), (1, 1), (0, 0), {"divisor_override": 1}),
        ("divisor-negative", 2, 3, 9, 10, (3, 3), (2, 2), (1, 1), {"divisor_override": -2, "ceil_mode": True}),
        (
            "divisor-beats-excluded",
            2,
            3,
            9,
            10,
            (3, 3),
            (2, 2),
            (1, 1),
            {"divisor_override": 5, "count_include_pad": False},
        ),
    ),
]

# --- benchmarks/ ---


def _square(prefix, *rows, **options):
    """(channels, filters, kernel, image[, stride]) -> a layer that keeps the image's size but for its stride."""
    cases = []
    for c, k, kernel, size, *stride in rows:
        stride = stride[0] if stride else 1
        name = f"{prefix}-{kernel}x{kernel}-{c}-{k}-{size}" + f"-s{stride}" * (stride > 1)
        layer = {"groups": 1, "dilation": 1, **options}
        groups = c if layer["groups"] == "depthwise" else layer["groups"]
        d = layer["dilation"]
        pair = [(v, v) for v in (kernel, stride, d * (kernel // 2), d)]
        bias = prefix in ("vgg", "alexnet")  # the others' normalization has it
        cases.append(Conv2dCase(name, 8, c, size, size, k, *pair, groups, bias, tags=("bench",)))
    return cases


BENCH_CONV2D = [
    *_square("vgg", (3, 64, 3, 224), (64, 64, 3, 224), (64, 128, 3, 112), (128, 128, 3, 112), (128, 256, 3, 56)),
    *_square("vgg", (256, 256, 3, 56), (256, 512, 3, 28), (512, 512, 3, 28), (512, 512, 3, 14)),
    Conv2dCase("alexnet-11x11-3-64-224-s4", 8, 3, 224, 224, 64, (11, 11), (4, 4), (2, 2), tags=("bench",)),
    *_square("alexnet", (64, 192, 5, 27)),
    *_square("resnet", (3, 64, 7, 224, 2)),
    *_square("resnet", (64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7)),
    *_square("resnet", (128, 128, 3, 56, 2), (256, 256, 3, 28, 2), (256, 512, 1, 56, 2), (512, 1024, 1, 28, 2)),
    *_square("resnet", (64, 64, 1, 56), (64, 256, 1, 56), (256, 64, 1, 56), (128, 512, 1, 28), (512, 128, 1, 28)),
    *_square("resnet", (256, 1024, 1, 14), (1024, 256, 1, 14), (512, 2048, 1, 7), (2048, 512, 1, 7)),
    *_square("mobilenet", (16, 96, 1, 112), (144, 24, 1, 56), (384, 64, 1, 14), (960, 320, 1, 7)),
    *_square("mobilenet", (32, 32, 3, 112), (96, 96, 3, 112, 2), (144, 144, 3, 56), groups="depthwise"),
    *_square("mobilenet", (384, 384, 3, 14), (960, 960, 3, 7), groups="depthwise"),
    *_square("resnext", (128, 128, 3, 56), (256, 256, 3, 28), (512, 512, 3, 14), (1024, 1024, 3, 7), groups=32),
    *_square("deeplab-d2", (256, 256, 3, 28), dilation=2),
    *_square("deeplab-d12", (512, 256, 3, 28), dilation=12),
]

# In the cache, 6 MB, and beyond it, 205 MB; n, c, h, w.
_SIZES = {"cache": (64, 32, 28, 28), "memory": (64, 64, 112, 112)}
BENCH_POOL2D = [
    *_pool(
        "bench",
        *((f"2x2-{name}", *size, (2, 2), (2, 2), (0, 0), {}) for name, size in _SIZES.items()),
        *((f"3x3-s2-{name}", *size, (3, 3), (2, 2), (1, 1), {}) for name, size in _SIZES.items()),
    )
]
BENCH_ADAPTIVE = _pool(  # to 7x7
    "bench",
    *((f"7-{name}", *size, *[(size[-1] // 7,) * 2] * 2, (0, 0), {}) for name, size in _SIZES.items()),
)
BENCH_ELEMENTWISE = _pool("bench", *((name, *size, (1, 1), (1, 1), (0, 0), {}) for name, size in _SIZES.items()))
