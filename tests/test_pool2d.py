"""Max and average pooling against torch: values, positions, gradients; and what is easy to get wrong about them."""

import os
from dataclasses import replace

import pytest
import torch
from cases import AVG_POOL2D, MAX_POOL2D, Pool2dCase
from helpers import DEVICES, DTYPES, assert_equal, awkward, name_of, numbers
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as TF

from cnnops import functional as F

every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

nan, inf = torch.nan, torch.inf


def cases(table):
    return pytest.mark.parametrize("case", table, ids=str)


def window(case):
    """The arguments that max_pool2d's operators share."""
    return tuple(case.max_arguments.values())


# --- max pooling ---


def assert_max_pools_like_torch(x, case, device):
    """Values, indices and gradient, with a whole-numbered gradient, whose sums are exact."""
    gy = numbers(*case.output_shape, whole=True).to(x.dtype)
    results = []
    for function, where in (F.max_pool2d, device), (TF.max_pool2d, "cpu"):
        leaf = x.to(where).requires_grad_()
        y, indices = function(leaf, **case.max_arguments, return_indices=True)
        assert indices.dtype == torch.int64 and not indices.requires_grad
        results.append([y.detach(), indices, *grad(y, leaf, gy.to(where))])
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)
    assert_equal(F.max_pool2d(x.to(device), **case.max_arguments), results[0][0])


@every_dtype
@every_device
@cases(MAX_POOL2D)
def test_max_pool2d(case, device, dtype):
    assert_max_pools_like_torch(numbers(*case.input_shape).to(dtype), case, device)


@every_dtype
@every_device
@cases(MAX_POOL2D)
def test_max_pool2d_ties(case, device, dtype):
    """Among equals the first in the window wins, so the gradient goes where torch's goes. 0.0 and -0.0 are equal."""
    x = numbers(*case.input_shape, whole=True).to(dtype)
    assert_max_pools_like_torch(x.clamp(-1, 1) * torch.where(numbers(*x.shape) > 0, 1, -1).to(dtype), case, device)


@every_dtype
@every_device
@cases(MAX_POOL2D)
def test_max_pool2d_of_what_is_not_finite(case, device, dtype):
    """NaN beats everything, the last one of a window wins; infinities are numbers; all -inf still has a position."""
    x = numbers(*case.input_shape, whole=True).to(dtype)
    for value, share in (nan, 0.1), (inf, 0.1), (-inf, 0.6):
        x = torch.where(numbers(*x.shape, seed=value).abs() < share, value, x)
    assert_max_pools_like_torch(x, case, device)
    assert_max_pools_like_torch(torch.full_like(x, -inf), case, device)
    assert_max_pools_like_torch(torch.full_like(x, nan), case, device)


@every_device
@cases(MAX_POOL2D)
def test_positions(case, device):
    """The operator's positions are places in the window, in the smallest type that holds them; gather reads them."""
    x = numbers(*case.input_shape).float().to(device)
    y, positions = torch.ops.cnnops.max_pool2d(x, *window(case))
    places = case.kernel[0] * case.kernel[1]
    assert positions.dtype == (torch.uint8 if places <= 256 else torch.int32)
    assert y.numel() == 0 or 0 <= positions.min() and positions.max().item() < places
    assert_equal(torch.ops.cnnops.max_pool2d_gather(x, positions, *window(case)), y)
    _, indices = TF.max_pool2d(x.cpu(), **case.max_arguments, return_indices=True)
    kh, kw = (positions.cpu().long() // case.kernel[1], positions.cpu().long() % case.kernel[1])
    rows = torch.arange(case.out[0])[:, None] * case.stride[0] - case.padding[0] + kh * case.dilation[0]
    columns = torch.arange(case.out[1]) * case.stride[1] - case.padding[1] + kw * case.dilation[1]
    assert_equal(rows * case.w + columns, indices)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel", [2, 3])
def test_tensors_beyond_the_cache(kernel, memory_format):
    """What is much larger than the cache is written past it, to the same bits."""
    x = numbers(1, 64, 300, 300, whole=True).float().to(memory_format=memory_format).requires_grad_()
    whole = {"divisor_override": 4}
    for *functions, more in (F.max_pool2d, TF.max_pool2d, {}), (F.avg_pool2d, TF.avg_pool2d, whole):
        results = []
        for function in functions:
            y = function(x, kernel, kernel - 1, 1, **more)
            results.append((y.detach(), *grad(y, x, torch.ones_like(y))))
        for got, wanted in zip(*results, strict=True):
            assert_equal(got, wanted)


@every_device
@cases(MAX_POOL2D)
def test_gather_is_the_transpose_of_backward(case, device):
    """<gather(x), gy> = <x, backward(gy)>, exactly."""
    x, gy = numbers(*case.input_shape, whole=True).to(device), numbers(*case.output_shape, whole=True).to(device)
    positions = torch.ops.cnnops.max_pool2d(numbers(*case.input_shape).to(device), *window(case))[1]
    gathered = torch.ops.cnnops.max_pool2d_gather(x, positions, *window(case))
    scattered = torch.ops.cnnops.max_pool2d_backward(gy, positions, x.shape[2:], *window(case))
    assert (gathered * gy).sum() == (x * scattered).sum()


def test_positions_that_no_pooling_gave():
    """Rubbish in the positions reads and writes nothing outside the tensors: zeros inside NaN stay zeros."""
    for kernel, dtype, rubbish in ((3, 3), torch.uint8, [9, 200, 255]), ((17, 17), torch.int32, [-1, 289, 2**31 - 1]):
        window = kernel, (1, 1), (1, 1), (1, 1), False
        memory = torch.full((3 * 20 * 21,), nan)
        x = memory[20 * 21 : 2 * 20 * 21].view(1, 1, 20, 21).zero_()
        y, positions = torch.ops.cnnops.max_pool2d(x, *window)
        assert positions.dtype == dtype
        for value in [0, *rubbish]:
            positions.fill_(value)
            assert_equal(torch.ops.cnnops.max_pool2d_gather(x, positions, *window), torch.zeros_like(y))
            gx = torch.ops.cnnops.max_pool2d_backward(torch.ones_like(y), positions, x.shape[2:], *window)
            assert value == 0 or gx.count_nonzero() == 0


def test_a_window_over_nothing_but_padding():
    """With a dilation over the image's size every place of a window can fall outside: -inf, and no gradient."""
    x = torch.ones(1, 2, 5, 5, requires_grad=True)
    y = F.max_pool2d(x, 2, 1, 1, dilation=6)
    assert_equal(y.detach(), torch.full((1, 2, 1, 1), -inf))
    assert_equal(grad(y.sum(), x)[0], torch.zeros(1, 2, 5, 5))


def test_padding_never_wins():
    """Padding counts as -inf and not as 0."""
    x = torch.full((1, 1, 3, 3), -5.0)
    assert_equal(F.max_pool2d(x, 2, 2, 1), torch.full((1, 1, 2, 2), -5.0))


# --- average pooling ---


def assert_averages_well(got, expected, magnitude):
    """Each element to a few units of the sum of absolute values."""
    assert got.shape == expected.shape
    error = (got.double().cpu() - expected).abs()
    assert (error <= 4 * torch.finfo(got.dtype).eps * magnitude).all()


def assert_avg_pools_like_torch(case, device, dtype):
    """Value and gradient, against torch in float64."""
    x, gy = numbers(*case.input_shape), numbers(*case.output_shape)
    outcomes = []
    for function, where, kind in (F.avg_pool2d, device, dtype), (TF.avg_pool2d, "cpu", torch.float64):
        leaf = x.to(where, kind).requires_grad_()
        y = function(leaf, **case.avg_arguments)
        outcomes.append([y.detach(), *grad(y, leaf, gy.to(where, kind))])
    leaf = x.abs().requires_grad_()
    y = TF.avg_pool2d(leaf, **case.avg_arguments)
    magnitudes = [y.detach().abs(), grad(y, leaf, gy.abs())[0].abs()]
    for ours, theirs, magnitude in zip(*outcomes, magnitudes, strict=True):
        assert_averages_well(ours, theirs, magnitude)


@every_dtype
@every_device
@cases(AVG_POOL2D)
def test_avg_pool2d(case, device, dtype):
    assert_avg_pools_like_torch(case, device, dtype)


@every_dtype
@every_device
@cases([case for case in AVG_POOL2D if case.divisor_override is None])
def test_divisor(case, device, dtype):
    """The average of ones tells the divisor: the window clipped to the image, or to image and padding."""
    ones = torch.ones(case.input_shape, dtype=dtype)
    got = F.avg_pool2d(ones.to(device), **case.avg_arguments)
    torch.testing.assert_close(got.cpu(), TF.avg_pool2d(ones, **case.avg_arguments), rtol=1e-6, atol=0)
    if not case.count_include_pad:
        torch.testing.assert_close(got.cpu(), torch.ones(case.output_shape, dtype=dtype), rtol=1e-6, atol=0)


@every_device
def test_divisor_of_the_last_window(device):
    """By hand: 3x3 windows over 4x4 ones with padding 1, ceil_mode: 9 places of the padded 6x6, none beyond it."""
    x = torch.ones(1, 1, 4, 4, device=device)
    included = F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)[0, 0]
    # windows start at -1, 1, 3; the last one's places are 3, 4 (padding) and 5 (beyond): clipped to 2 of 3
    parts = torch.tensor([2 / 3, 1, 1 / 2])
    torch.testing.assert_close(included.cpu(), parts[:, None] * parts)
    assert_equal(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), torch.ones(1, 1, 3, 3))


@every_device
def test_the_average_of_what_is_not_finite(device):
    x = torch.ones(1, 3, 4, 6)
    x[0, 0, 0, 0], x[0, 1, 1, 3], x[0, 2, 2, 2], x[0, 2, 3, 3] = nan, inf, inf, -inf
    assert_equal(F.avg_pool2d(x.to(device), 2), TF.avg_pool2d(x, 2))


# --- both ---

POOLS = {
    "max": (F.max_pool2d, TF.max_pool2d, MAX_POOL2D, Pool2dCase.max_arguments.fget),
    "avg": (F.avg_pool2d, TF.avg_pool2d, AVG_POOL2D, Pool2dCase.avg_arguments.fget),
}
every_pool = pytest.mark.parametrize("pool", POOLS)


@pytest.mark.parametrize("name", ["asymmetric-ceil", "window-of-289", "resnet-stem", "1x1-image", "empty-batch"])
@every_device
@every_pool
def test_any_strides(pool, device, name):
    """Transposed, sliced, misaligned, channels_last and expanded operands give what contiguous ones do, both ways."""
    ours, theirs, table, arguments = POOLS[pool]
    case = next(case for case in table if case.name == name)
    x = numbers(*case.input_shape, whole=True).float().to(device)
    gy = numbers(*case.output_shape, whole=True).float().to(device)

    def both_ways(x, gy):
        leaf = x.detach().requires_grad_()
        y = ours(leaf, **arguments(case))
        return y.detach(), grad(y, leaf, gy)[0]

    expected = both_ways(x, gy)
    for _, view in awkward(x):
        for got, wanted in zip(both_ways(view, gy), expected, strict=True):
            assert_equal(got, wanted)
    for _, view in awkward(gy):
        for got, wanted in zip(both_ways(x, view), expected, strict=True):
            assert_equal(got, wanted)
    for small in x[:1], x[:, :1], x[..., :1]:
        y = ours(small.expand_as(x), **arguments(case))
        torch.testing.assert_close(y.cpu(), theirs(small.expand_as(x).cpu(), **arguments(case)))
    one = gy.new_ones(()).expand_as(gy)
    for got, wanted in zip(both_ways(x, one), both_ways(x, one.contiguous()), strict=True):
        assert_equal(got, wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_device
@every_pool
def test_layout_of_results(pool, device, memory_format):
    """Strides are torch's: channels_last in, channels_last out, indices and the input's gradient included."""
    ours, theirs, table, arguments = POOLS[pool]
    for case in table:
        if case.n == 0:
            continue  # strides of nothing
        strides = []
        for function in ours, theirs:
            x = numbers(*case.input_shape).float().to(device).contiguous(memory_format=memory_format).requires_grad_()
            y = function(x, **arguments(case))
            strides.append([y.stride(), grad(y, x, torch.ones_like(y))[0].stride()])
            if pool == "max":
                indices = function(x, **arguments(case), return_indices=True)[1]
                strides[-1].append([indices.stride(d) for d in range(4) if indices.shape[d] > 1])
        assert strides[0] == strides[1], case


@st.composite
def geometries(draw):
    pairs = {"in": [draw(st.integers(1, 12)), draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33, 65])))]}
    for name, upper in ("kernel", 6), ("stride", 5), ("dilation", 3):
        pairs[name] = [draw(st.integers(1, upper)) for _ in "hw"]
    padding = [draw(st.integers(0, k // 2)) for k in pairs["kernel"]]
    fits = zip(pairs["in"], pairs["kernel"], pairs["dilation"], padding, strict=True)
    pairs["in"] = [max(i, d * (k - 1) + 1 - 2 * p) for i, k, d, p in fits]
    return Pool2dCase(
        "random",
        draw(st.integers(0, 2)),
        draw(st.integers(1, 5)),
        *pairs["in"],
        *(tuple(pairs[name]) for name in ("kernel", "stride")),
        tuple(padding),
        tuple(pairs["dilation"]),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, 1, 3, -4])),
    )


def sees_the_image(case):
    """Whether every window does: with a dilation one can lie in the padding, and torch's own index is garbage then."""
    axes = zip((case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation, strict=True)
    return all(
        any(0 <= window * s - p + place * d < size for place in range(k))
        for size, out, k, s, p, d in axes
        for window in range(out)
    )


@every_dtype
@every_device
@given(case=geometries().filter(sees_the_image))
def test_random_max_pool2d(device, dtype, case):
    assert_max_pools_like_torch(numbers(*case.input_shape, whole=True).to(dtype), case, device)


@every_dtype
@every_device
@given(case=geometries())
def test_random_avg_pool2d(device, dtype, case):
    assert_avg_pools_like_torch(replace(case, dilation=(1, 1)), device, dtype)


DIFFERENTIABLE = [
    Pool2dCase("plain", 2, 2, 4, 4, (2, 2), (2, 2), (0, 0)),
    Pool2dCase("overlapping", 1, 2, 5, 4, (3, 2), (1, 1), (1, 1)),
    Pool2dCase("ceil", 1, 2, 6, 5, (3, 3), (2, 2), (1, 0), ceil_mode=True, count_include_pad=False),
    Pool2dCase("divisor", 1, 2, 5, 5, (2, 3), (3, 2), (0, 1), divisor_override=3),
    Pool2dCase("dilated", 1, 2, 6, 6, (2, 2), (1, 2), (1, 1), dilation=(2, 3)),
    Pool2dCase("empty", 0, 2, 4, 4, (2, 2), (2, 2), (0, 0)),
]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
@every_device
@every_pool
def test_gradcheck(pool, device, case):
    """First and second derivatives; no two inputs are close, so that the maximum stays where it is."""
    function, _, _, arguments = POOLS[pool]
    count = torch.Size(case.input_shape).numel()
    x = torch.randperm(count).double().view(case.input_shape).div(8).to(device).requires_grad_()
    assert gradcheck(lambda x: function(x, **arguments(case)), x)
    assert gradgradcheck(lambda x: function(x, **arguments(case)), x)


@every_device
@every_pool
def test_third_order(pool, device):
    """The backward's backward's backward, through a loss with gradients in it."""
    ours, theirs, _, arguments = POOLS[pool]
    case = DIFFERENTIABLE[1]
    grads = []
    for function, where in (ours, device), (theirs, "cpu"):
        x = numbers(*case.input_shape).to(where).requires_grad_()
        y = function(x, **arguments(case))
        (gx,) = grad(y.pow(4).sum(), x, create_graph=True)
        (ggx,) = grad(gx.pow(2).sum(), x, create_graph=True)
        grads.append([gx, ggx, *grad(ggx.pow(2).sum(), x)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)


@every_pool
def test_argument_forms(pool):
    """Numbers, tuples and lists; a stride that is left out is the kernel; by position; without a batch."""
    ours, theirs, *_ = POOLS[pool]
    x = numbers(2, 3, 9, 10)
    for arguments in [(2,), ((3, 2),), ([2, 3], 1), (3, (2, 1), 1), ((3,), (2,), (1,))]:
        torch.testing.assert_close(ours(x, *arguments), theirs(x, *arguments), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(ours(x[1], *arguments), theirs(x[1], *arguments), rtol=1e-14, atol=1e-14)
    last = (2, 3, 1, 1, True, True) if pool == "max" else (2, 3, 1, True, False, 5)
    got, expected = ours(x, *last), theirs(x, *last)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours(x[0], *last), theirs(x[0], *last))


@every_pool
def test_unbatched_gradients(pool):
    ours, theirs, *_ = POOLS[pool]
    x = numbers(3, 6, 7).requires_grad_()
    torch.testing.assert_close(*(grad(f(x, 3, 2, 1).pow(2).sum(), x)[0] for f in (ours, theirs)))


@every_pool
def test_sizes_are_64_bit(pool):
    ours, theirs, *_ = POOLS[pool]
    x = torch.empty(3, 2, 70_000, 80_001, device="meta")
    widest = (2**31 - 1, 1)
    for arguments in (2, 1), (3, 2, 1), (widest, widest, (2**30 - 1, 0), 1, False):
        if arguments[0] == 3 or pool == "max":
            assert ours(x, *arguments).shape == theirs(x, *arguments).shape
    if pool == "max":  # positions within a window are 32-bit
        with pytest.raises(RuntimeError, match="places"):
            ours(x, 2**31 - 1, 2**31 - 1, 2**30 - 1)


@pytest.mark.huge
@pytest.mark.skipif(os.environ.get("CNNOPS_TEST_HUGE") != "1", reason="needs 20 GB; set CNNOPS_TEST_HUGE=1")
@every_pool
def test_more_than_2_to_the_31_elements(pool):
    x = torch.zeros(1, 1, 2, 2**30 + 6)
    x[..., -1] = torch.tensor([4.0, 4.0])
    y = POOLS[pool][0](x, 2)
    assert_equal(y[0, 0, 0, -3:], torch.tensor([0.0, 0.0, 4.0 if pool == "max" else 2.0]))
