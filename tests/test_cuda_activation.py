"""The CUDA activations, emulated (cuda_on_cpu/README.md): right, and the same bits in every order of threads."""

import pytest
import torch
from cuda_helpers import (
    HALVES,
    NUMBERS,
    assert_rounds_well,
    assert_same,
    draw,
    dtypes,
    every_dtype,
    needs_compiler,
    real_dtypes,
    same_bits,
)
from torch.nn import functional as TF

pytestmark = needs_compiler

SIZES = [1, 31, 1024, 1025, 8200]  # a vector is of 2 to 16 numbers, a block's share of 1024 to 8192


def activation_input(seed, size, dtype):
    if not dtype.is_floating_point:
        info, seeded = torch.iinfo(dtype), torch.Generator().manual_seed(seed)
        x = torch.randint(max(info.min, -9), 10, (size,), dtype=dtype, generator=seeded)
        x[3::41], x[5::41] = info.min, info.max
        return x
    x = draw(seed, size).to(dtype)
    for i, special in enumerate([float("nan"), float("inf"), float("-inf"), -0.0, 0.0]):
        x[i + 7 :: 41] = special
    return x


def run_every_way(kernels, name, inputs, integers=None, **rest):
    """Into memory of its own, over its first input, and with each operand in turn off a vector's address."""
    x = inputs[0]
    integers = integers or [x.numel()]
    y = kernels.run(name, integers, inputs, (x.shape, x.dtype), **rest)
    assert same_bits(y, kernels.in_place(name, integers, inputs, **rest))
    for operand in range(len(inputs) + 1):
        offsets = [x.element_size() * (i == operand) for i in range(len(inputs) + 1)]
        [got] = kernels.call(name, integers, inputs, (x.shape, x.dtype), offsets=offsets, **rest)
        assert same_bits(y, got), f"operand {operand} at another address"
    return y


@dtypes(*NUMBERS)
@pytest.mark.parametrize("size", SIZES)
def test_relu(kernels, size, dtype):
    x = activation_input(12, size, dtype)
    y = run_every_way(kernels, "relu", (x,))
    assert_same(y, torch.where(x < 0, 0, x))
    if dtype.is_floating_point:
        gy = draw(13, size).to(dtype)
        assert_same(run_every_way(kernels, "relu_backward", (gy, y)), torch.where(y <= 0, 0, gy))


@dtypes(*NUMBERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bounds", [(0, 6), (-0.7, 0.1), (-1000, 1000)])
def test_hardtanh(kernels, size, bounds, dtype):
    x = activation_input(27, size, dtype)
    if not dtype.is_floating_point:
        bounds = tuple(int(bound) for bound in bounds)
    y = run_every_way(kernels, "hardtanh", (x,), reals=bounds)
    if dtype.is_floating_point:
        assert_same(y, TF.hardtanh(x, *bounds))
        gy, (low, high) = draw(28, size).to(dtype), torch.tensor(bounds, dtype=dtype)
        gx = run_every_way(kernels, "hardtanh_backward", (gy, y), reals=bounds)
        assert_same(gx, torch.where((x <= low) | (x >= high), 0, gy))
    else:
        low, high = (min(max(bound, torch.iinfo(dtype).min), torch.iinfo(dtype).max) for bound in bounds)
        assert_same(y, x.clamp(low, high))


def test_integers_have_no_other_kernels(kernels):
    x = torch.ones(4, dtype=torch.int32)
    for name in ["relu_backward", "leaky_relu", "avg_pool2d", "max_pool2d/forward", "fold_border", "channel_sum"]:
        with pytest.raises(RuntimeError, match="no such kernel for this type"):
            kernels.call(name, [1] * 18, (x, x, x), (x.shape, x.dtype))
    with pytest.raises(RuntimeError, match="no such algorithm"):
        kernels.call("conv2d/forward/reference", [1] * 18, (x, x, x), (x.shape, x.dtype))


@real_dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slope", [0.01, -0.5])
def test_leaky_relu(kernels, size, slope, dtype):
    x, gy = activation_input(14, size, dtype), draw(15, size).to(dtype)
    exact = torch.tensor(slope, dtype=torch.float32 if dtype in HALVES else dtype)

    def of(values):
        return torch.where(x > 0, values, (values.to(exact.dtype) * exact).to(dtype))

    assert_same(run_every_way(kernels, "leaky_relu", (x,), reals=(slope,)), of(x))
    assert_same(run_every_way(kernels, "leaky_relu_backward", (gy, x), reals=(slope,)), of(gy))


@real_dtypes
@pytest.mark.parametrize(
    "n, channels, inner",
    [(1, 1, 1), (3, 5, 7), (2, 3, 2000), (700, 2, 1), (90, 24, 1), (2, 70, 3), (5, 4, 511), (2, 9, 8)],
)
def test_prelu_and_channel_sums(kernels, n, channels, inner, dtype):
    shape, size = (n, channels, inner), n * channels * inner
    x, gy, w = activation_input(16, size, dtype).view(shape), draw(17, *shape).to(dtype), draw(18, channels).to(dtype)
    y = run_every_way(kernels, "prelu", (x, w), [channels, inner, size])
    assert_same(y, TF.prelu(x, w))
    gx = run_every_way(kernels, "prelu_backward", (gy, x, w), [channels, inner, size])
    assert_same(gx, torch.where(x > 0, gy, gy * w[:, None]))
    terms = gy.double()
    sums = kernels.run("channel_sum", shape, (gy,), ((channels,), dtype))
    assert_rounds_well(sums, terms.sum((0, 2)), terms.abs().sum((0, 2)))
    x = x.nan_to_num(1, 1, -1)
    terms = torch.where(x > 0, 0, gy.double() * x.double())
    sums = kernels.run("prelu_grad_weight", shape, (gy, x), ((channels,), dtype))
    assert_rounds_well(sums, terms.sum((0, 2)), terms.abs().sum((0, 2)))


@every_dtype
def test_nothing_to_do(kernels, dtype):
    empty = torch.empty(0, dtype=dtype)
    kernels.run("relu", [0], (empty,), ((0,), dtype))
    sums = kernels.run("channel_sum", (0, 3, 5), (empty,), ((3,), dtype))
    assert_same(sums, torch.zeros(3, dtype=dtype))
