"""What is measured: an operator on a case of tests/cases.py, with a batch and a dtype; and the groups with goals.

A goal is a ratio of times, torch's over ours, each in its better layout (`contiguous`: both in that one). A workload
counts in every group that it fits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cases
import torch
from cases import Conv2dCase, Pool2dCase

FLOAT, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
CONVOLUTION = ("forward", "grad_input", "grad_weight", "step")
OTHER = ("forward", "backward", "step")
PASSES = ("forward", "grad_input", "grad_weight", "backward", "step")


@dataclass(frozen=True)
class Workload:
    kind: str  # the function's name, in cnnops.functional as in torch.nn.functional
    case: Conv2dCase | Pool2dCase
    dtype: torch.dtype = FLOAT

    @property
    def passes(self) -> tuple[str, ...]:
        return CONVOLUTION if self.kind == "conv2d" else OTHER

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        kind = "" if self.kind == "conv2d" else f"{self.kind}-"
        return f"{kind}{self.case}-n{self.case.n}" + f"-{self.dtype_name}" * (self.dtype != FLOAT)

    @property
    def groups(self) -> list[str]:
        return [group.name for group in GROUPS if group.has(self)]


@dataclass(frozen=True)
class Group:
    name: str
    about: str
    has: Callable[[Workload], bool]
    goal: dict[str, float]
    contiguous: dict[str, float]


def _goals(forward=None, grad_input=None, grad_weight=None, backward=None):
    goals = {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight, "backward": backward}
    return {which: goal for which, goal in goals.items() if goal}


def _conv(name, about, has, *goals):
    def accepts(load):
        return load.kind == "conv2d" and load.dtype == FLOAT and has(load.case)

    return Group(name, about, accepts, _goals(*goals), {})


def _plain(case, kernel):
    return case.kernel == (kernel, kernel) and case.stride == case.dilation == (1, 1) and case.groups == 1


def _grouped(case):
    return 1 < case.groups < case.c


GROUPS = [
    _conv("mnist", "the convolutions of the lecture notes' models", lambda c: "mnist" in c.tags, 1.5, 2.0, 1.4),
    _conv("3x3", "3x3, stride 1, 32 channels or more", lambda c: _plain(c, 3) and c.c >= 32, 2.0, 2.0, 1.4),
    _conv("5x5", "5x5, stride 1, 16 channels or more", lambda c: _plain(c, 5) and c.c >= 16, 1.4, 1.4, 1.1),
    _conv("stem", "first layers: 1 or 3 channels", lambda c: c.c <= 3, 1.1, 4.0, 1.1),
    _conv("1x1", "1x1", lambda c: c.kernel == (1, 1), 1.05, 1.05, 1.05),
    _conv("depthwise", "depthwise", lambda c: c.groups == c.c > 1, 1.3, 1.3, 1.3),
    _conv("grouped", "grouped", _grouped, 2.5, 2.5, 2.5),
    _conv("strided", "3x3, stride 2", lambda c: c.kernel == (3, 3) and c.stride == (2, 2) and c.groups == 1),
    _conv("dilated", "3x3, dilation 2 and more", lambda c: c.dilation != (1, 1)),
    Group(
        "float64",
        "convolutions in float64",
        lambda load: load.kind == "conv2d" and load.dtype == DOUBLE,
        _goals(2.5, 2.0, 2.5),
        {},
    ),
    Group(
        "bfloat16",
        "convolutions in bfloat16",
        lambda load: load.kind == "conv2d" and load.dtype == HALF,
        _goals(0.9, 0.9, 0.9),
        {},
    ),
    Group(
        "pooling",
        "max and average pooling",
        lambda load: load.kind in ("max_pool2d", "avg_pool2d"),
        _goals(1.5, backward=2.0),
        _goals(15, backward=4.0),
    ),
    Group("adaptive", "adaptive average pooling", lambda load: load.kind == "adaptive_avg_pool2d", {}, {}),
    Group(
        "relu",
        "the ReLU family",
        lambda load: isinstance(load.case, Pool2dCase) and "pool" not in load.kind,
        _goals(1.0, backward=1.0),
        {},
    ),
]


def _sampled(dtype, **batches):
    """Layers by name, with their batch, in another dtype."""
    by_name = {case.name: case for case in [*cases.CONV2D, *cases.BENCH_CONV2D]}
    return [Workload("conv2d", replace(by_name[name.replace("_", "-")], n=n), dtype) for name, n in batches.items()]


def _mnist(table, sizes):
    return [replace(case, n=n) for case in table if "mnist" in case.tags for n in sizes]


WORKLOADS = [
    *(Workload("conv2d", case) for case in _mnist(cases.CONV2D, [16, 64])),
    *(Workload("conv2d", replace(case, n=n)) for case in cases.BENCH_CONV2D for n in (1, 8)),
    *_sampled(
        DOUBLE, lecture_2=64, two_layer_2=64, resnet_3x3_64_64_56=8, resnet_1x1_64_256_56=8, mobilenet_3x3_144_144_56=8
    ),
    *_sampled(
        HALF,
        lecture_2=64,
        two_layer_2=64,
        resnet_7x7_3_64_224_s2=8,
        resnet_3x3_64_64_56=8,
        vgg_3x3_256_256_56=1,
        resnet_1x1_256_1024_14=8,
        mobilenet_3x3_144_144_56=8,
    ),
    *(Workload("max_pool2d", case) for case in _mnist(cases.MAX_POOL2D, [64])),
    *(Workload(kind, case) for kind in ("max_pool2d", "avg_pool2d") for case in cases.BENCH_POOL2D),
    *(Workload("adaptive_avg_pool2d", case) for case in cases.BENCH_ADAPTIVE),
    *(Workload(k, case) for k in ("relu", "leaky_relu", "relu6", "prelu") for case in cases.BENCH_ELEMENTWISE),
]
