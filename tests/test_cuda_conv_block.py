"""The CUDA convolutions with an epilogue, emulated: the bits of one kernel after the other."""

from dataclasses import replace

import pytest
import torch
from cases import CONV2D
from cuda_helpers import HALVES, LAYOUTS, assert_rounds_well, draw, needs_compiler, real_dtypes, same_bits
from test_cuda_conv2d import (
    BORDERS,
    Bordered,
    bordered_cases,
    conv2d,
    conv2d_cases,
    conv2d_expected,
    conv2d_integers,
    conv2d_operands,
    refused,
    small_groups,
)
from test_cuda_implicit_gemm import MATH, every_math, tiled_cases
from torch.nn import functional as TF

pytestmark = needs_compiler

FUSED = ["implicit_gemm", "direct", "im2col"]
ACTIVATIONS = ["none", "relu", "relu6", "leaky_relu"]
SLOPE = 0.3
every_algorithm = pytest.mark.parametrize("algorithm", FUSED)
two_dtypes = pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")], ids=LAYOUTS
)


def pooled_shape(case):
    *planes, h, w = case.output_shape
    return *planes, h // 2, w // 2


def fused(kernels, case, algorithm, operands, activation, pools, layout="contiguous", tf32=False, **rest):
    """[y], with pooling [y, positions]."""
    integers = [*conv2d_integers(case, layout), tf32, ACTIVATIONS.index(activation), pools]
    dtype = operands[0].dtype
    outputs = (
        [(pooled_shape(case), dtype), (pooled_shape(case), torch.uint8)] if pools else [(case.output_shape, dtype)]
    )
    name = f"conv_block/{algorithm}"
    got = kernels.run_in(layout, name, integers, operands[:3], *outputs, reals=[SLOPE], **rest)
    return got if pools else [got]


def activated(kernels, activation, y):
    if activation == "none":
        return y
    name = "hardtanh" if activation == "relu6" else activation
    reals = {"relu6": [0.0, 6.0], "leaky_relu": [SLOPE]}.get(activation, [])
    return kernels.call(name, [y.numel()], [y], (y.shape, y.dtype), reals=reals)[0]


def chain(kernels, case, algorithm, operands, activation, pools, layout="contiguous", tf32=False, **rest):
    """The same from kernels that are tested on their own."""
    y = conv2d(kernels, case, "forward", algorithm, *operands, layout, tf32, **rest)
    y = activated(kernels, activation, y)
    if not pools:
        return [y]
    shape = pooled_shape(case)
    pairs = [y.shape[2:], shape[2:], (2, 2), (2, 2), (0, 0), (1, 1)]
    integers = [*y.shape[:2], *(i for pair in pairs for i in pair), LAYOUTS.index(layout), 0]
    outputs = (shape, torch.uint8), (shape, y.dtype)
    return kernels.run_in(layout, "max_pool2d/forward", integers, [y], *outputs)[::-1]


def check(kernels, case, algorithm, operands, *settings, activations=ACTIVATIONS, **rest):
    for activation in activations:
        for pools in [False, True] if min(case.out) > 1 else [False]:
            arguments = case, algorithm, operands, activation, pools, *settings
            for a, b in zip(fused(kernels, *arguments, **rest), chain(kernels, *arguments, **rest), strict=True):
                assert same_bits(a, b), (activation, pools)


def drawn(case, dtype):
    return [t if t is None else t.to(dtype) for t in conv2d_operands(case)]


def accepts(algorithm, case):
    return {"implicit_gemm": not small_groups(case), "direct": not refused(case, "forward")}.get(algorithm, True)


def skip_float64(algorithm, dtype):
    if algorithm != "direct" and dtype == torch.float64:
        pytest.skip("not for float64")


@two_dtypes
@pytest.mark.parametrize("algorithm, case", [(a, c) for a in FUSED for c in conv2d_cases() if accepts(a, c)], ids=str)
def test_bits_of_the_chain(kernels, algorithm, case, dtype, layout):
    number = next(i for i, other in enumerate(CONV2D) if other.name == case.name)
    some = [ACTIVATIONS[number % 4]]
    try:
        check(kernels, case, algorithm, drawn(case, dtype), layout, activations=some, architecture=80)
    except RuntimeError as refusal:
        if algorithm != "direct" or "shared memory" not in str(refusal):
            raise
        pytest.skip(str(refusal))


@real_dtypes
@every_algorithm
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, kernel", [((2, 16, 9, 10, 9), (3, 2)), ((1, 16, 5, 70, 40), (2, 2))], ids=str)
def test_bits_of_the_chain_in_every_type(kernels, sizes, kernel, layout, algorithm, dtype):
    skip_float64(algorithm, dtype)
    case = Bordered("block", *sizes, kernel, padding=(1, 1))
    if accepts(algorithm, case):
        check(kernels, case, algorithm, drawn(case, dtype), layout)
    case = replace(case, k=24, groups=2, bias=False)
    check(kernels, case, algorithm, drawn(case, dtype), layout, activations=["relu"])


@every_math
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*tiled_cases()], ids=str)
def test_implicit_gemm(kernels, case, layout, math):
    dtype, tf32, architecture = MATH[math]
    some = ["relu"]
    check(kernels, case, "implicit_gemm", drawn(case, dtype), layout, tf32, activations=some, architecture=architecture)


@two_dtypes
@every_algorithm
@pytest.mark.parametrize("border", BORDERS)
def test_beyond_the_border(kernels, border, algorithm, dtype, layout):
    case = next(case for case in bordered_cases() if case.name == f"{border}-strided")
    check(kernels, case, algorithm, drawn(case, dtype), layout, activations=["leaky_relu"])


@real_dtypes
@every_algorithm
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ties_and_nan(kernels, layout, algorithm, dtype):
    """Where several of a window are largest, the first; NaN over everything."""
    skip_float64(algorithm, dtype)
    case = Bordered("ties", 2, 8, 7, 12, 9, (1, 1), bias=False)
    x, w, _, gy = drawn(case, dtype)
    x, w = x.double().sign() * (draw(5, *x.shape) > 0), torch.eye(9, 8, dtype=torch.float64)[:, :, None, None]
    x[0, 3, 2:4, 4:6] = torch.tensor([[torch.nan, 1], [torch.nan, 2]])
    x[1, 2, 1, 1] = -torch.nan
    operands = x.to(dtype), w.to(dtype), None, gy
    check(kernels, case, algorithm, operands, layout)
    y, positions = fused(kernels, case, algorithm, operands, "none", True, layout)
    expected, indices = TF.max_pool2d(TF.conv2d(x, w).to(dtype), 2, return_indices=True)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
    rows, columns = indices // case.out[1] % 2, indices % case.out[1] % 2
    assert torch.equal(positions, (2 * rows + columns).to(torch.uint8))


@two_dtypes
@every_algorithm
def test_right(kernels, algorithm, dtype, layout):
    case = Bordered("right", 3, 16, 8, 11, 24, (3, 3), padding=(1, 1))
    if not accepts(algorithm, case):
        case = replace(case, c=3)
    operands = [t if t is None else t.to(dtype) for t in conv2d_operands(case, dtype)]
    y, _ = fused(kernels, case, algorithm, operands, "relu", True, layout, architecture=80)
    expected, magnitude = conv2d_expected(case, "forward", dtype if dtype in HALVES else torch.float32)
    assert_rounds_well(y, TF.max_pool2d(expected.relu(), 2), TF.max_pool2d(magnitude, 2))


@two_dtypes
@every_algorithm
def test_an_image_alone_has_the_bits_it_has_in_a_batch(kernels, algorithm, dtype, layout):
    case = Bordered("batch", 5, 8, 9, 7, 12, (3, 3), padding=(1, 1))
    x, *rest = drawn(case, dtype)
    together = fused(kernels, case, algorithm, (x, *rest), "relu6", True, layout)
    for i in (0, 3):
        alone = fused(kernels, replace(case, n=1), algorithm, (x[i : i + 1].clone(), *rest), "relu6", True, layout)
        for a, b in zip(alone, together, strict=True):
            assert same_bits(a, b[i : i + 1].contiguous())


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("h, w", [(6, 8), (7, 9), (2, 5), (5, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(kernels, activation, h, w, layout, dtype):
    """The bits of the activation's gradient, then pooling's: also of -0, of NaN, and where y is at a bound."""
    shape, pooled = (2, 5, h, w), (2, 5, h // 2, w // 2)
    gy, y = draw(7, *pooled), draw(8, *pooled) * 4
    gy[0, 0], gy[0, 1] = -0.0, torch.nan
    y[:, 2], y[:, 3, 0], y[1, 4] = 0, 6, torch.nan
    positions = (draw(9, *pooled).abs() * 1e4).long() % 4
    inputs = gy.to(dtype), y.to(dtype), positions.to(torch.uint8)
    pairs = [(h, w), pooled[2:], (2, 2), (2, 2), (0, 0), (1, 1)]
    integers = [2, 5, *(i for pair in pairs for i in pair), LAYOUTS.index(layout), 0]
    outputs = [(shape, dtype)]
    ours = [*integers, ACTIVATIONS.index(activation)]
    got = kernels.run_in(layout, "epilogue_backward", ours, inputs, *outputs, reals=[SLOPE])
    gradient = inputs[0]
    if activation != "none":
        name = {"relu6": "hardtanh"}.get(activation, activation) + "_backward"
        reals = {"relu6": [0.0, 6.0], "leaky_relu": [SLOPE]}.get(activation, [])
        gradient = kernels.run(name, [gy.numel()], inputs[:2], (pooled, dtype), reals=reals)
    expected = kernels.run_in(layout, "max_pool2d/backward", integers, (gradient, inputs[2]), *outputs)
    assert same_bits(got, expected)


@every_algorithm
def test_an_empty_batch(kernels, algorithm):
    case = Bordered("empty", 0, 8, 6, 6, 8, (3, 3))
    for pools in (False, True):
        assert all(t.numel() == 0 for t in fused(kernels, case, algorithm, drawn(case, torch.float32), "relu", pools))
