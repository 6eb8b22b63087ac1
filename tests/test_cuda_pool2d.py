"""The CUDA pooling, emulated (cuda_on_cpu/README.md): right, and the same bits in every order of threads."""

from dataclasses import replace

import pytest
import torch
from cases import AVG_POOL2D, MAX_POOL2D
from cuda_helpers import (
    DTYPES,
    HALVES,
    LAYOUTS,
    assert_rounds_well,
    assert_same,
    draw,
    every_dtype,
    from_memory,
    needs_compiler,
    real_dtypes,
    same_bits,
    shape_in_memory,
    to_memory,
)
from torch.nn import functional as TF

pytestmark = needs_compiler


def pool2d_integers(case, layout="contiguous"):
    pairs = [(case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation]
    integers = [case.n, case.c, *(i for pair in pairs for i in pair), LAYOUTS.index(layout)]
    return [*integers, False, case.count_include_pad, case.divisor_override or 0]


def pool2d_cases(table):
    cases = [replace(case, n=min(case.n, 2), c=min(case.c, 3)) for case in table if case.n]
    return pytest.mark.parametrize("case", cases, ids=str)


def indices_of(case, positions):
    """Torch's indices, which count places of a plane, for ours, which count places of a window."""
    kh, kw = positions.long() // case.kernel[1], positions.long() % case.kernel[1]
    oh, ow = torch.arange(case.out[0])[:, None], torch.arange(case.out[1])
    h = oh * case.stride[0] - case.padding[0] + kh * case.dilation[0]
    w = ow * case.stride[1] - case.padding[1] + kw * case.dilation[1]
    return h * case.w + w


def max_pool2d_input(case, dtype, values):
    x = draw(5, *case.input_shape).to(dtype)
    if values == "ties":
        x = x.round()
    if values == "special":
        x[draw(6, *x.shape) > 1] = float("-inf")
        x[draw(7, *x.shape) > 1.5] = float("nan")
    return x


@pytest.mark.parametrize(
    "dtype, values, layout",
    [
        (torch.float32, "random", "contiguous"),
        (torch.float32, "special", "channels_last"),
        (torch.float64, "ties", "channels_last"),
        (torch.float16, "special", "contiguous"),
    ],
)
@pool2d_cases([case for case in MAX_POOL2D if all(2 * p <= k for p, k in zip(case.padding, case.kernel, strict=True))])
def test_max_pool2d(kernels, case, dtype, values, layout):
    wide = case.kernel[0] * case.kernel[1] > 256
    integers = pool2d_integers(case, layout)
    x = max_pool2d_input(case, dtype, values)
    expected, indices = TF.max_pool2d(x, **case.max_arguments, return_indices=True)
    seen = indices_seen(case)
    for family, position in [("max_pool2d_wide", torch.int32)] + [("max_pool2d", torch.uint8)] * (not wide):
        outputs = (case.output_shape, position), (case.output_shape, dtype)
        positions, y = kernels.run_in(layout, f"{family}/forward", integers, (x,), *outputs)
        assert_same(y, expected)
        assert torch.equal(indices_of(case, positions)[seen], indices[seen])
        gathered = kernels.run_in(layout, f"{family}/gather", integers, (x, positions), (case.output_shape, dtype))
        assert_same(gathered[seen], expected[seen])
        gy = draw(8, *case.output_shape).to(dtype)
        gx = kernels.run_in(layout, f"{family}/backward", integers, (gy, positions), (case.input_shape, dtype))
        assert_rounds_well(gx, *max_backward(case.input_shape, indices, gy * seen))


def max_backward(shape, indices, gy):
    """The gradient of max pooling, and the same over absolute values."""

    def of(gy):
        return torch.zeros(shape).double().flatten(2).scatter_add_(2, indices.flatten(2), gy.double().flatten(2))

    # A window that sees nothing has an index that means nothing.
    indices = indices.clamp(0, shape[2] * shape[3] - 1)
    return of(gy).view(shape), of(gy.abs()).view(shape)


def indices_seen(case):
    """Which windows see an input at all: dilation can jump over a small one. Torch's indices of others mean nothing."""
    ones = torch.ones(1, 1, case.h, case.w)
    return (TF.max_pool2d(ones, **case.max_arguments) == 1).expand(case.output_shape)


WAYS = ["lecture", "vgg", "resnet-stem", "alexnet", "odd-sizes", "overlapping-padded", "asymmetric-ceil"]
WAYS += ["dilated-strided", "window-of-289"]
_ways = [replace(case, n=1, c=16) for case in MAX_POOL2D if case.name in WAYS]
_ways += [replace(case, name=f"{case.name}-in-vectors", w=case.w // 8 * 8 + 8) for case in _ways if case.w % 8]


@real_dtypes
@pytest.mark.parametrize("case", _ways, ids=str)
def test_the_bits_do_not_show_how_many_numbers_a_thread_takes(kernels, case, dtype):
    """Vectors of channels or of a row, tiles under two rows, or one number: by layout and by addresses."""
    x, gy = draw(29, *case.input_shape).to(dtype), draw(30, *case.output_shape).to(dtype)
    wide = case.kernel[0] * case.kernel[1] > 256
    family, position = ("max_pool2d_wide", torch.int32) if wide else ("max_pool2d", torch.uint8)
    outputs = (case.output_shape, position), (case.output_shape, dtype)
    special = max_pool2d_input(case, dtype, "special")
    positions, _ = run_every_way(kernels, f"{family}/forward", case, (special,), outputs)
    run_every_way(kernels, f"{family}/backward", case, (gy, positions), [(case.input_shape, dtype)])
    if case.dilation == (1, 1):
        run_every_way(kernels, "avg_pool2d", case, (x,), [(case.output_shape, dtype)])
        run_every_way(kernels, "avg_pool2d_backward", case, (gy,), [(case.input_shape, dtype)])


def run_every_way(kernels, name, case, inputs, outputs):
    every = []
    for layout in LAYOUTS:
        integers = pool2d_integers(case, layout)
        got = kernels.run_in(layout, name, integers, inputs, *outputs)
        every.append([got] if len(outputs) == 1 else got)
        operands = [t.dtype for t in inputs] + [dtype for _, dtype in outputs]
        there = [(shape_in_memory(shape, layout), dtype) for shape, dtype in outputs]
        for number, dtype in enumerate(operands):
            offsets = [dtype.itemsize * (i == number) for i in range(len(operands))]
            moved = kernels.call(name, integers, [to_memory(t, layout) for t in inputs], *there, offsets=offsets)
            every.append([from_memory(t, layout) for t in moved])
    for others in every[1:]:
        assert all(same_bits(a, b) for a, b in zip(every[0], others, strict=True))
    return every[0]


@every_dtype
def test_gather_takes_any_position(kernels, dtype):
    case = next(case for case in MAX_POOL2D if case.name == "dilated-strided")
    x = draw(9, *case.input_shape).to(dtype)
    positions = torch.randint(-(2**31), 2**31 - 1, case.output_shape, dtype=torch.int32)
    y = kernels.run("max_pool2d_wide/gather", pool2d_integers(case), (x, positions), (case.output_shape, dtype))
    assert not y.isnan().any()
    positions = torch.randint(0, 255, case.output_shape, dtype=torch.uint8)
    y = kernels.run("max_pool2d/gather", pool2d_integers(case), (x, positions), (case.output_shape, dtype))
    assert not y.isnan().any()


@pytest.mark.parametrize(
    "dtype, layout",
    [
        (torch.float32, "contiguous"),
        (torch.float64, "channels_last"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "contiguous"),
    ],
    ids=["float32", "float64-channels_last", "bfloat16-channels_last", "float16"],
)
@pool2d_cases(AVG_POOL2D)
def test_avg_pool2d(kernels, case, dtype, layout):
    x, gy = draw(10, *case.input_shape).to(dtype), draw(11, *case.output_shape).to(dtype)
    check_average(
        kernels, lambda x: TF.avg_pool2d(x, **case.avg_arguments), pool2d_integers(case, layout), x, gy, layout
    )


def check_average(kernels, function, integers, x, gy, layout):
    def of(x, gy):
        x = x.double().requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad(y, x, gy.double())[0]

    (y, gx), (y_magnitude, gx_magnitude) = of(x, gy), of(x.abs(), gy.abs())
    got = kernels.run_in(layout, "avg_pool2d", integers, (x,), (y.shape, x.dtype))
    assert_rounds_well(got, y, y_magnitude.abs())
    got = kernels.run_in(layout, "avg_pool2d_backward", integers, (gy,), (x.shape, x.dtype))
    assert_rounds_well(got, gx, gx_magnitude.abs())


@pytest.mark.parametrize(
    "dtype, layout",
    [*zip(DTYPES, LAYOUTS, strict=True), *zip(HALVES, LAYOUTS, strict=True)],
    ids=["float32", "float64-channels_last", "bfloat16", "float16-channels_last"],
)
@pytest.mark.parametrize(
    "size, out",
    [((7, 9), (3, 4)), ((5, 6), (1, 1)), ((3, 4), (7, 6)), ((6, 10), (6, 5)), ((1, 1), (2, 3)), ((30, 20), (1, 2))],
    ids=str,
)
def test_adaptive_pooling(kernels, size, out, dtype, layout):
    n, c = 2, 3
    starts = [torch.arange(o) * i // o for i, o in zip(size, out, strict=True)]
    ends = [-(-(torch.arange(o) + 1) * i // o) for i, o in zip(size, out, strict=True)]
    kernel = [int((end - start).max()) for start, end in zip(starts, ends, strict=True)]
    integers = [n, c, *size, *out, *kernel, 1, 1, 0, 0, 1, 1, LAYOUTS.index(layout), True, True, 0]
    x, gy = draw(23, n, c, *size).to(dtype), draw(24, n, c, *out).to(dtype)
    check_average(kernels, lambda x: TF.adaptive_avg_pool2d(x, out), integers, x, gy, layout)
    y, indices = TF.adaptive_max_pool2d(x, out, return_indices=True)
    for family, position in [("max_pool2d_wide", torch.int32), ("max_pool2d", torch.uint8)]:
        if family == "max_pool2d" and kernel[0] * kernel[1] > 256:
            continue
        outputs = (y.shape, position), (y.shape, dtype)
        positions, got = kernels.run_in(layout, f"{family}/forward", integers, (x,), *outputs)
        assert_same(got, y)
        h = starts[0][:, None] + positions.long() // kernel[1]
        assert torch.equal(h * size[1] + starts[1] + positions.long() % kernel[1], indices)
        assert_same(kernels.run_in(layout, f"{family}/gather", integers, (x, positions), (y.shape, dtype)), y)
        gx = kernels.run_in(layout, f"{family}/backward", integers, (gy, positions), (x.shape, dtype))
        assert_rounds_well(gx, *max_backward(x.shape, indices, gy))


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, c, size, out", [(1, 1, 1, 1), (2, 3, 40, 25), (2, 5, 12, 300), (1, 70, 9, 9)])
def test_max_unpool2d(kernels, n, c, size, out, layout, dtype):
    x = draw(25, n, c, 1, size).to(dtype)
    indices = torch.randint(-2, out + 2, x.shape, generator=torch.Generator().manual_seed(26))
    expected = torch.zeros(n, c, 1, out, dtype=dtype)
    for i in range(size):  # the last number of an index stays, and those beyond the plane are left out
        index, inside = indices[..., i : i + 1], (indices[..., i : i + 1] >= 0) & (indices[..., i : i + 1] < out)
        index = index.clamp(0, out - 1)
        expected.scatter_(3, index, torch.where(inside, x[..., i : i + 1], expected.gather(3, index)))
    got = kernels.run_in(
        layout, "max_unpool2d", [n, c, size, out, LAYOUTS.index(layout)], (x, indices), (expected.shape, dtype)
    )
    assert_same(got, expected)
