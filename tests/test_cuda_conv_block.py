"""The CUDA convolutions with an epilogue, emulated: the bits of convolution, activation and pooling one after the other."""

from dataclasses import replace

import pytest
import torch
from cases import CONV2D
from cuda_helpers import DTYPES, HALVES, LAYOUTS, assert_same, draw, needs_compiler, same_bits
from test_cuda_conv2d import MATH, Bordered, bordered_cases, conv2d, conv2d_cases, conv2d_integers, conv2d_operands
from test_cuda_conv2d import refused, small_groups, tiled_cases
from torch.nn import functional as TF

pytestmark = needs_compiler

ACTIVATIONS = ["none", "relu", "relu6", "leaky_relu"]
SLOPE = 0.3
UNUSED = ((1,), torch.uint8)  # without pooling


def pooled_shape(case):
    n, k, h, w = case.output_shape
    return n, k, h // 2, w // 2


def can_pool(case):
    return min(case.out) >= 2


def fused(kernels, case, algorithm, operands, activation, pools, layout="contiguous", tf32=False, **rest):
    """What comes out, and with pooling the positions."""
    integers = [*conv2d_integers(case, layout), tf32, ACTIVATIONS.index(activation), pools]
    x, w, b, _ = operands
    outputs = [(pooled_shape(case), torch.uint8)] if pools else []
    outputs.insert(0, (pooled_shape(case) if pools else case.output_shape, x.dtype))
    got = kernels.run_in(layout, f"conv_block/{algorithm}", integers, (x, w, b), *outputs, reals=[SLOPE], **rest)
    return got if pools else [got]


def chain(kernels, case, algorithm, operands, activation, pools, layout="contiguous", tf32=False, **rest):
    """The same from three kernels, each tested on its own."""
    y = conv2d(kernels, case, "forward", algorithm, *operands, layout, tf32, **rest)
    name, reals = {"relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0]), "leaky_relu": ("leaky_relu", [SLOPE])}.get(
        activation, (None, [])
    )
    if name:
        [y] = kernels.call(name, [y.numel()], [y], (y.shape, y.dtype), reals=reals)
    if not pools:
        return [y]
    pairs = [y.shape[2:], pooled_shape(case)[2:], (2, 2), (2, 2), (0, 0), (1, 1)]
    integers = [*y.shape[:2], *(i for pair in pairs for i in pair), LAYOUTS.index(layout), 0]
    shape = pooled_shape(case)
    positions, y = kernels.run_in(layout, "max_pool2d/forward", integers, [y], (shape, torch.uint8), (shape, y.dtype))
    return [y, positions]


def check(kernels, case, algorithm, dtype, layout, tf32=False, activations=ACTIVATIONS, **rest):
    operands = [t if t is None else t.to(dtype) for t in conv2d_operands(case)]
    for activation in activations:
        for pools in (False, True)[: 1 + can_pool(case)]:
            settings = case, algorithm, operands, activation, pools, layout, tf32
            ours, theirs = fused(kernels, *settings, **rest), chain(kernels, *settings, **rest)
            for a, b in zip(ours, theirs, strict=True):
                assert same_bits(a, b), (activation, pools)
    return operands


def accepted(case, algorithm):
    return not (small_groups(case) if algorithm == "implicit_gemm" else refused(case, "forward"))


def all_cases(algorithm):
    return [case for case in conv2d_cases() if accepted(case, algorithm)]


@pytest.mark.parametrize("dtype, layout", [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")], ids=LAYOUTS)
@pytest.mark.parametrize(
    "algorithm, case", [(a, case) for a in ("implicit_gemm", "direct") for case in all_cases(a)], ids=str
)
def test_bits_of_the_chain(kernels, algorithm, case, dtype, layout):
    number = [*map(str, CONV2D)].index(str(case)) if str(case) in map(str, CONV2D) else 0
    try:
        check(kernels, case, algorithm, dtype, layout, activations=[ACTIVATIONS[number % 4]], architecture=80)
    except RuntimeError as refusal:
        if algorithm != "direct" or "shared memory" not in str(refusal):
            raise
        pytest.skip(str(refusal))
