"""conv2d beyond one layout, two dtypes and zeros around: channels_last, 16-bit numbers, borders, four sides."""

from dataclasses import replace

import pytest
import torch
from cases import CONV2D, Conv2dCase
from helpers import (
    ALGORITHMS,
    DEVICES,
    PASSES,
    assert_equal,
    assert_rounded_once,
    assert_rounds_well,
    assert_whole,
    conv2d_operands,
    expected_pass,
    name_of,
    numbers,
    or_refusal,
    run_pass,
    runs_winograd,
    terms,
)
from hypothesis import given
from hypothesis import strategies as st
from test_conv2d import geometries
from torch.autograd import grad
from torch.nn import functional as TF

from cnnops import functional as F
from cnnops import nn

by_name = {case.name: case for case in CONV2D}
every_algorithm = pytest.mark.parametrize(("device", "algorithm"), ALGORITHMS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_pass = pytest.mark.parametrize("which", PASSES)
CHEAP = [case for case in CONV2D if case.flops < 3e7]
BORDERS = ["reflect", "replicate", "circular"]
FORMATS = [torch.contiguous_format, torch.channels_last]
every_format = pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)


# --- channels_last ---


@every_pass
@every_algorithm
@pytest.mark.parametrize("case", CONV2D, ids=str)
def test_channels_last_is_exact(case, device, algorithm, which):
    t = conv2d_operands(case, whole=True).to(device, torch.float32).formatted(torch.channels_last)
    with or_refusal(algorithm):
        result = run_pass(which, t, case, algorithm)
        fractions = runs_winograd(which, t, case, algorithm)
        assert_whole(result, expected_pass(which, case, whole=True)[0].float(), fractions)
        if t.x.numel() > case.n and not t.x.is_contiguous() and not t.gy.is_contiguous():  # no doubt about the layout
            assert result.is_contiguous(memory_format=torch.channels_last)


@every_pass
@pytest.mark.parametrize("case", CONV2D, ids=str)
def test_channels_last_rounds_well(case, which):
    t = conv2d_operands(case).to(torch.float32).formatted(torch.channels_last)
    fractions = runs_winograd(which, t, case)
    assert_rounds_well(run_pass(which, t, case), *expected_pass(which, case), terms(which, case), fractions)


@pytest.mark.parametrize("name", ["two-layer-1", "resnet-down", "mobilenet", "resnet-1x1-wide"])
@every_format
def test_nothing_is_converted(name, memory_format):
    """With profiling of what runs below our operators: neither a copy nor a layout's conversion of a tensor."""
    case = by_name[name]
    t = conv2d_operands(case).to(torch.float32).formatted(memory_format)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for which in PASSES:
            run_pass(which, t, case)
    names = {event.key for event in profile.key_averages()}
    assert {"cnnops::conv2d", "cnnops::conv2d_grad_input", "cnnops::conv2d_grad_weight"} <= names
    assert not {name for name in names if "copy" in name or "clone" in name or "contiguous" in name}, names


# --- bfloat16, float16 ---


@every_pass
@every_algorithm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("case", CHEAP, ids=str)
def test_16_bit_numbers_are_rounded_once(case, dtype, device, algorithm, which):
    """Sums of small whole numbers are exact in float32; what is left is the one rounding at the end."""
    for memory_format in FORMATS:
        t = conv2d_operands(case, whole=True).to(device, dtype).formatted(memory_format)
        with or_refusal(algorithm):
            result = run_pass(which, t, case, algorithm)
            assert result.dtype == dtype
            exact = expected_pass(which, case, whole=True)[0]
            assert_rounded_once(result, exact, runs_winograd(which, t, case, algorithm))


@every_pass
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", ["long-sum", "lecture-3", "vgg-56", "alexnet-5x5", "mobilenet"])
def test_16_bit_rounding(name, dtype, which):
    """The sum is float32's, so the error of long sums is that of one rounding, not of thousands."""
    case = by_name[name]
    t = conv2d_operands(case).to(dtype)
    exact = run_pass(which, t.to(torch.float64), case)
    for memory_format in FORMATS:
        got = run_pass(which, t.formatted(memory_format), case).double()
        assert ((got - exact).norm() / exact.norm()).item() < torch.finfo(dtype).eps / 2


# --- borders ---


def padded(x, padding, mode):
    """((top, bottom), (left, right)) written out by torch."""
    (top, bottom), (left, right) = padding
    return TF.pad(x, (left, right, top, bottom), **({} if mode == "zeros" else {"mode": mode}))


SIDES = [((1, 1), (2, 2)), ((0, 2), (3, 1)), ((3, 0), (0, 0))]


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("mode", ["zeros", *BORDERS])
@every_format
@every_algorithm
def test_borders(device, algorithm, memory_format, mode, sides):
    """Every way to fill the border, as much on each side as one likes: output and gradients."""
    for groups, stride, dilation, kernel in (1, 1, 1, (3, 3)), (2, (2, 1), (1, 2), (2, 3)), (4, 1, 1, (3, 2)):
        x = numbers(3, 4, 6, 23, whole=True).to(device, memory_format=memory_format).requires_grad_()
        w = numbers(8, 4 // groups, *kernel, whole=True).to(device, memory_format=memory_format).requires_grad_()
        b = numbers(8, whole=True).to(device).requires_grad_()
        settings = {"stride": stride, "dilation": dilation, "groups": groups}
        expected = TF.conv2d(padded(x, sides, mode), w, b, **settings)
        gy = numbers(*expected.shape, whole=True, seed="gy").to(device)
        with or_refusal(algorithm):
            y = F.conv2d(x, w, b, padding=sides, padding_mode=mode, algorithm=algorithm, **settings)
            assert_equal(y.detach(), expected.detach())
            for ours, theirs in zip(grad(y, (x, w, b), gy), grad(expected, (x, w, b), gy), strict=True):
                assert_equal(ours, theirs)


# (sides, input, weight, dilation): pixels at the end that no output sees, and taps that see beyond them.
TAKEN_AWAY = [
    (((0, -1), (0, -1)), (2, 8, 6, 7), (5, 8, 1, 1), 1),
    (((0, -2), (0, 0)), (2, 16, 9, 12), (16, 16, 1, 1), 1),
    (((1, -2), (1, 1)), (2, 16, 18, 15), (128, 16, 3, 3), 1),
    (((0, -3), (0, -1)), (1, 32, 17, 13), (64, 32, 5, 5), 1),
    (((0, 2), (0, 2)), (2, 8, 3, 3), (5, 8, 3, 3), 2),
]


@pytest.mark.parametrize("sides, x, w, dilation", TAKEN_AWAY, ids=str)
@every_format
@every_algorithm
def test_padding_that_takes_away(device, algorithm, memory_format, sides, x, w, dilation):
    """At the bottom and the right padding may be negative, as output_padding makes it for transposed convolutions."""
    x, w = (numbers(*shape, whole=True).to(device, memory_format=memory_format) for shape in (x, w))
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    expected = TF.conv2d(padded(leaves[0], sides, "zeros"), leaves[1], dilation=dilation)
    gy = numbers(*expected.shape, whole=True, seed="gy").to(device, memory_format=memory_format)
    gx, gw = grad(expected, leaves, gy)
    (top, bottom), (left, right) = sides
    rest = (1, (top, left, bottom, right), dilation, 1, "zeros", algorithm)
    ops = torch.ops.cnnops
    for run, right_one in (
        (lambda: ops.conv2d(x, w, None, *rest), expected.detach()),
        (lambda: ops.conv2d_grad_input(gy, w, None, x.shape[2:], *rest), gx),
        (lambda: ops.conv2d_grad_weight(gy, x, w.shape[2:], *rest), gw),
    ):
        with or_refusal(algorithm):
            got = run()
            assert_rounded(got, right_one) if algorithm == "winograd" else assert_equal(got, right_one)


def assert_rounded(got, expected):
    """Transforms round whole numbers too."""
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("mode", BORDERS)
def test_borders_are_differentiable_twice(mode):
    x, w = numbers(2, 2, 4, 5).requires_grad_(), numbers(3, 2, 3, 2).requires_grad_()

    def function(x, w):
        return F.conv2d(x, w, padding=((2, 1), (0, 3)), padding_mode=mode, stride=(1, 2))

    assert torch.autograd.gradcheck(function, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, w))


@pytest.mark.parametrize("mode", BORDERS)
def test_a_border_needs_no_padded_copy(mode):
    """Memory grows by the output; a padded copy of the input would be four times as much."""
    module = nn.Conv2d(16, 4, 3, padding=1, padding_mode=mode, bias=False)
    x = torch.randn(1, 16, 64, 64)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        y = module(x)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert allocated <= 1.01 * y.nbytes
    assert not any("pad" in event.key for event in profile.key_averages())


def test_borders_that_do_not_fit():
    x, w = torch.randn(1, 1, 4, 5), torch.randn(1, 1, 3, 3)
    for mode, padding in ("reflect", 4), ("circular", (1, 6)), ("reflect", ((0, 0), (0, 5))):
        with pytest.raises(RuntimeError, match="padding") as raised:
            F.conv2d(x, w, padding=padding, padding_mode=mode)
        assert "[1, 1, 4, 5]" in str(raised.value)
    with pytest.raises(ValueError, match="mirror.*'zeros', 'reflect'|'zeros', 'reflect'.*mirror"):
        F.conv2d(x, w, padding=1, padding_mode="mirror")
    with pytest.raises(RuntimeError, match="bottom and the right|padding"):
        F.conv2d(x, w, padding=((0, 0), (-1, 0)))


# --- hypothesis: everything at once ---


@given(
    case=geometries(),
    memory_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    mode=st.sampled_from(["zeros", *BORDERS]),
    more=st.tuples(st.integers(-2, 3), st.integers(-2, 3)),
)
def test_random_settings(case: Conv2dCase, memory_format, dtype, mode, more):
    """Any geometry with any border, layout and dtype, and other padding on one side than on the other, even below 0."""
    (top, left), (h, w) = case.padding, (case.h, case.w)
    most = {"reflect": (h - 1, w - 1), "circular": (h, w)}.get(mode, (99, 99))
    if mode != "zeros":
        more = [abs(e) for e in more]
    sides = tuple((min(p, m), min(p + e, m)) for p, e, m in zip((top, left), more, most, strict=True))
    case = replace(case, padding=(0, 0))
    reach = [d * (k - 1) for k, d in zip(case.kernel, case.dilation, strict=True)]
    if any(i + sum(side) <= r for i, side, r in zip((h, w), sides, reach, strict=True)):
        return
    x, weight = (
        numbers(*shape, whole=True, seed=str(case)).to(dtype).contiguous(memory_format=memory_format)
        for shape in (case.input_shape, case.weight_shape)
    )
    settings = {"stride": case.stride, "dilation": case.dilation, "groups": case.groups}
    expected = TF.conv2d(padded(x.double(), sides, mode), weight.double(), **settings)
    assert_equal(F.conv2d(x, weight, padding=sides, padding_mode=mode, **settings), expected.to(dtype))
