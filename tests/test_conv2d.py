"""conv2d and its two gradients: every case by every algorithm, against torch and against float64."""

from dataclasses import replace

import pytest
import torch
from cases import CONV2D, Conv2dCase
from helpers import (
    ALGORITHMS,
    DEVICES,
    DTYPES,
    PASSES,
    accepts,
    assert_equal,
    assert_rounds_well,
    assert_whole,
    conv2d_operands,
    expected_pass,
    name_of,
    numbers,
    or_refusal,
    refused_by_processor,
    run_pass,
    runs_winograd,
    terms,
    torch_pass,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

by_name = {case.name: case for case in CONV2D}

every_algorithm = pytest.mark.parametrize(("device", "algorithm"), ALGORITHMS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_pass = pytest.mark.parametrize("which", PASSES)
every_case = pytest.mark.parametrize("case", CONV2D, ids=str)


# --- the operators, on every case ---


@every_pass
@every_dtype
@every_algorithm
@every_case
def test_whole_numbers_are_exact(case, device, algorithm, dtype, which):
    """No wrong index, border or tap can hide behind a tolerance: with small whole numbers there is no rounding."""
    t = conv2d_operands(case, whole=True).to(device, dtype)
    if accepts(which, t, case, algorithm):
        expected = expected_pass(which, case, whole=True)[0].to(dtype)
        assert_whole(run_pass(which, t, case, algorithm), expected, runs_winograd(which, t, case, algorithm))


@every_pass
@every_dtype
@every_algorithm
@every_case
def test_rounding(case, device, algorithm, dtype, which):
    """float32 means float32: no reduced precision and no sum that loses more than it must."""
    t = conv2d_operands(case).to(device, dtype)
    if accepts(which, t, case, algorithm):
        got, fractions = run_pass(which, t, case, algorithm), runs_winograd(which, t, case, algorithm)
        assert_rounds_well(got, *expected_pass(which, case), terms(which, case), fractions)


@every_dtype
@every_device
@every_case
def test_autograd_agrees_with_torch(case, device, dtype):
    """functional.conv2d and its gradients, bias included, as a user gets them."""
    t = conv2d_operands(case, whole=True).to(device, dtype)
    results = []
    for function, where in (F.conv2d, device), (TF.conv2d, "cpu"):
        leaves = [v.to(where).clone().requires_grad_() for v in (t.x, t.w, t.b) if v is not None]
        y = function(*leaves, **case.arguments)
        results.append([y, *grad(y, leaves, t.gy.to(where))])
    fractions = any(runs_winograd(which, t, case) for which in PASSES)
    for ours, theirs in zip(*results, strict=True):
        assert_whole(ours.detach(), theirs.detach(), fractions and ours.dim() == 4)


# --- the choice of an algorithm ---


@every_algorithm
def test_every_algorithm_is_of_use(device, algorithm):
    """A row that refuses every case would never be tested."""
    dtype = torch.bfloat16 if algorithm == "dot_products" else torch.float32
    if refusal := refused_by_processor(algorithm):
        pytest.skip(refusal)
    for memory_format in torch.contiguous_format, torch.channels_last:
        tensors = {case: conv2d_operands(case).to(device, dtype).formatted(memory_format) for case in CONV2D}
        which = "grad_input" if algorithm == "fold" else "forward"
        accepted = [case for case, t in tensors.items() if accepts(which, t, case, algorithm)]
        if algorithm == "reference":
            assert accepted == CONV2D
        if accepted:
            break
    assert accepted


# --- hypothesis ---


@st.composite
def geometries(draw):
    """Any geometry that torch takes; sizes favour those at which vectors and tiles begin and end."""
    size = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 47, 65]))
    channels = st.one_of(st.integers(1, 4), st.sampled_from([7, 8, 9, 16, 17, 33]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    pairs = {"in": [draw(st.integers(1, 12)), draw(size)]}
    for name, upper in ("kernel", 5), ("stride", 4), ("dilation", 3):
        pairs[name] = [draw(st.integers(1, upper)) for _ in "hw"]
    sizes = zip(pairs["in"], pairs["kernel"], pairs["dilation"], strict=True)
    least = [max(0, -((i - d * (k - 1) - 1) // 2)) for i, k, d in sizes]
    return Conv2dCase(
        "random",
        draw(st.integers(0, 3)),
        groups * draw(channels),
        *pairs["in"],
        groups * draw(channels),
        *(tuple(pairs[name]) for name in ("kernel", "stride")),
        padding=tuple(p + draw(st.integers(0, 4)) for p in least),
        dilation=tuple(pairs["dilation"]),
        groups=groups,
        bias=draw(st.booleans()),
    )


@every_dtype
@every_algorithm
@given(case=geometries())
def test_random_geometries(device, algorithm, dtype, case):
    """All three passes of geometries that nobody thought of, exactly."""
    t = conv2d_operands(case, whole=True).to(dtype)
    on_device = t.to(device)
    for which in PASSES:
        if accepts(which, on_device, case, algorithm):
            assert_equal(run_pass(which, on_device, case, algorithm), torch_pass(which, t, case))


# --- derivatives ---

DIFFERENTIABLE = [
    Conv2dCase("plain", 2, 2, 4, 5, 3, (3, 2)),
    Conv2dCase("padded", 1, 2, 3, 3, 2, (3, 3), padding=(1, 1)),
    Conv2dCase("strided", 2, 2, 5, 4, 2, (2, 2), stride=(2, 3), padding=(1, 0)),
    Conv2dCase("groups", 2, 4, 4, 3, 2, (2, 2), dilation=(2, 1), groups=2),
    Conv2dCase("depthwise", 1, 3, 4, 4, 3, (3, 3), stride=(2, 1), padding=(1, 2), groups=3, bias=False),
    Conv2dCase("wide", 1, 1, 3, 10, 2, (2, 3)),
    Conv2dCase("wide-strided", 1, 2, 3, 17, 2, (2, 2), stride=(1, 2), padding=(1, 0)),
    Conv2dCase("empty", 0, 2, 4, 11, 3, (3, 3)),
]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
@every_algorithm
def test_gradcheck(device, algorithm, case):
    """First and second derivatives are those of the function that is computed."""
    t = conv2d_operands(case).to(device)
    leaves = [v.clone().requires_grad_() for v in (t.x, t.w, t.b) if v is not None]

    def function(*leaves):
        return F.conv2d(*leaves, **case.arguments, algorithm=algorithm)

    if all(accepts(which, t, case, algorithm) for which in PASSES):
        assert gradcheck(function, leaves, check_batched_grad=False)
        assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("which", ["grad_input", "grad_weight"])
@every_device
def test_gradcheck_of_the_gradients(device, which, case):
    """The two gradient operators are differentiable on their own, twice."""
    t = conv2d_operands(case).to(device)
    names = ["gy", "w"] if which == "grad_input" else ["gy", "x"]

    def function(*leaves):
        return run_pass(which, replace(t, **dict(zip(names, leaves, strict=True))), case)

    leaves = [getattr(t, name).clone().requires_grad_() for name in names]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", ["two-layer-2", "asymmetric", "depthwise-multiplier", "stride-3"])
@every_device
def test_gradient_penalty(device, name):
    """A loss with a gradient's norm in it, as for WGAN-GP: third-order terms meet in one backward."""
    case = by_name[name]
    t = conv2d_operands(case).to(device)
    grads = []
    for function in F.conv2d, TF.conv2d:
        x, w = t.x.clone().requires_grad_(), t.w.clone().requires_grad_()
        y = function(x, w, t.b, **case.arguments)
        gx, gw = grad(y.pow(3).mean(), (x, w), create_graph=True)
        ggx, ggw = grad(gx.pow(2).sum() + gw.pow(2).sum(), (x, w), create_graph=True)
        grads.append([gx, gw, ggx, ggw, *grad(ggx.pow(2).sum() + ggw.sum(), (x, w))])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


@pytest.mark.parametrize("needed", ["x", "w", "b", "xw", "xb", "wb"])
def test_only_the_gradients_that_are_asked_for(needed):
    case = by_name["two-layer-1"]
    t = conv2d_operands(case, whole=True)
    leaves = {name: getattr(t, name).clone().requires_grad_(name in needed) for name in "xwb"}
    F.conv2d(*leaves.values(), **case.arguments).backward(t.gy)
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(needed)
    if "b" in needed:
        assert_equal(leaves["b"].grad, t.gy.sum((0, 2, 3)))


@every_case
def test_the_three_operators_are_one_form(case):
    """<conv2d(x, w), gy> = <x, grad_input(gy, w)> = <w, grad_weight(gy, x)>: each is the derivative of the others."""
    t = replace(conv2d_operands(case, whole=True), b=None)
    forms = [
        (run_pass(which, t, case) * operand).sum().item()
        for which, operand in zip(PASSES, (t.gy, t.x, t.w), strict=True)
    ]
    assert forms[0] == forms[1] == forms[2]


@every_algorithm
def test_linear(device, algorithm):
    """In each operand on its own; with whole numbers exactly."""
    case = by_name["asymmetric"]
    t = conv2d_operands(case, whole=True).to(device)
    x2 = numbers(*case.input_shape, whole=True, seed="another").to(device)
    if accepts("forward", t, case, algorithm):

        def f(x, w):
            return F.conv2d(x, w, **case.arguments, algorithm=algorithm)

        assert_equal(f(2 * t.x - 5 * x2, t.w), 2 * f(t.x, t.w) - 5 * f(x2, t.w))
        assert_equal(f(t.x, -3 * t.w), -3 * f(t.x, t.w))


# --- arguments ---


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (4, 4), (2, 5), (5, 2)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(kernel, dilation, padding):
    """`same` with an even kernel pads one more at the end, as torch does."""
    x, w, b = numbers(2, 3, 13, 14, whole=True), numbers(4, 3, *kernel, whole=True), numbers(4, whole=True)
    arguments = {"padding": padding, "dilation": dilation}
    ours, theirs = F.conv2d(x, w, b, **arguments), TF.conv2d(x, w, b, **arguments)
    assert_equal(ours, theirs)
    assert_equal(F.conv2d(x[0], w, b, **arguments), theirs[0])


def test_argument_forms():
    """Numbers, tuples and lists; by position in torch's order; without a batch."""
    x, w, b = numbers(2, 4, 9, 8, whole=True), numbers(6, 2, 3, 3, whole=True), numbers(6, whole=True)
    expected = TF.conv2d(x, w, b, 2, 1, 2, 2)
    assert_equal(F.conv2d(x, w, b, 2, 1, 2, 2), expected)
    assert_equal(F.conv2d(x, w, b, (2, 2), [1, 1], (2,), 2), expected)
    assert_equal(F.conv2d(x, w, b, stride=[2], padding=(1,), dilation=2, groups=2, algorithm="auto"), expected)
    assert_equal(F.conv2d(input=x, weight=w, bias=b, stride=2, padding=1, dilation=2, groups=2), expected)
    assert_equal(F.conv2d(x[1], w, b, 2, 1, 2, 2), expected[1])


def test_unbatched_gradients():
    x, w = numbers(3, 6, 7, whole=True).requires_grad_(), numbers(4, 3, 3, 3, whole=True).requires_grad_()
    results = [grad(f(x, w, padding=1).pow(2).sum(), (x, w)) for f in (F.conv2d, TF.conv2d)]
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


@every_algorithm
def test_grad_input_is_the_transposed_convolution(device, algorithm):
    """input_size decides among the sizes that a strided convolution maps to one; none of them gives wrong numbers."""
    gy, w = numbers(2, 6, 4, 9, whole=True).to(device), numbers(6, 2, 3, 2, whole=True).to(device)
    for extra_h, extra_w in (0, 0), (1, 0), (0, 2), (1, 2):
        expected = TF.conv_transpose2d(gy.cpu(), w.cpu(), None, (2, 3), (1, 0), (extra_h, extra_w), 2)
        rest = (None, expected.shape[2:], (2, 3), (1, 0), (1, 1), 2, "zeros", algorithm)
        with or_refusal(algorithm):
            assert_equal(torch.ops.cnnops.conv2d_grad_input(gy, w, *rest), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(8, 8), (16, 8), (16, 4), (64, 16), (32, 32)], ids=str)
@every_algorithm
def test_the_bias_of_a_transposed_convolution_of_groups(device, algorithm, channels, stride):
    """A group makes more channels than it sees, or less: its numbers of the bias are those of what it makes."""
    x, w = numbers(2, channels[0], 7, 9, whole=True), numbers(*channels, 3, 3, whole=True)
    b = numbers(2 * channels[1], whole=True) + 100
    expected = TF.conv_transpose2d(x, w, b, stride, 1, 0, 2).float()
    for layout in torch.contiguous_format, torch.channels_last:
        x, w, b = (v.to(device, torch.float32) for v in (x, w, b))
        x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
        with or_refusal(algorithm):
            y = F.conv_transpose2d(x, w, b, stride, 1, 0, 2, algorithm=algorithm)
            assert_whole(y, expected, algorithm in ("winograd", "auto"))


@every_dtype
@every_algorithm
def test_the_gradient_of_pixels_that_no_output_sees(device, algorithm, dtype):
    """With a 1x1 kernel and strides these are most: a transposed convolution has its bias there."""
    x, w, b = numbers(3, 6, 5, 9, whole=True), numbers(6, 5, 1, 1, whole=True), numbers(10, whole=True) + 20
    for stride, extra in ((2, 2), (1, 0)), ((3, 1), (2, 0)), ((1, 4), (0, 3)):
        expected = TF.conv_transpose2d(x, w, b, stride, 0, extra, 2).to(dtype)
        operands = (v.to(device, dtype) for v in (x, w, b))
        with or_refusal(algorithm):
            assert_equal(F.conv_transpose2d(*operands, stride, 0, extra, 2, algorithm=algorithm), expected)


@every_dtype
@every_algorithm
def test_empty_batch(device, algorithm, dtype):
    """Nothing in, nothing out; and the gradients of weight and bias are zeros, not garbage."""
    x = torch.empty(0, 4, 9, 8, dtype=dtype, device=device, requires_grad=True)
    w = torch.ones(6, 2, 3, 3, dtype=dtype, device=device, requires_grad=True)
    b = torch.ones(6, dtype=dtype, device=device, requires_grad=True)
    with or_refusal(algorithm):  # a tensor without elements counts as contiguous
        y = F.conv2d(x, w, b, 1, 1, 1, 2, algorithm=algorithm)
        assert y.shape == (0, 6, 9, 8)
        gx, gw, gb = grad(y, (x, w, b), torch.empty_like(y))
        assert gx.shape == x.shape
        assert_equal(gw, torch.zeros_like(gw))
        assert_equal(gb, torch.zeros_like(gb))
        assert gw.shape == w.shape and gb.shape == b.shape


# --- bfloat16 by its own instruction ---


@every_pass
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=name_of)
@given(case=geometries())
def test_dot_products_of_random_geometries(memory_format, which, case):
    """Small whole numbers, exact up to the one rounding at the end."""
    t = conv2d_operands(case, whole=True).to(torch.bfloat16).formatted(memory_format)
    with or_refusal("dot_products"):
        got = run_pass(which, t, case, "dot_products")
        assert_equal(got, torch_pass(which, t.to(torch.float64), case).to(torch.bfloat16))


@every_pass
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=name_of)
def test_dot_products_are_for_bfloat16(dtype, which):
    case = by_name["vgg-14"]
    with pytest.raises(RuntimeError, match="dot_products.*bfloat16|dot_products.*avx512"):
        run_pass(which, conv2d_operands(case).to(dtype), case, "dot_products")


def test_dot_products_come_before_direct():
    case = by_name["vgg-14"]
    if refusal := refused_by_processor("dot_products"):
        pytest.skip(refusal)
    for which in PASSES:
        t = conv2d_operands(case).to(torch.bfloat16)
        assert cnnops.ops.conv2d_algorithm(t.x, t.w, **case.arguments, which=which) == "dot_products"


@every_pass
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", ["two-layer-2", "vgg-14", "vgg-56", "alexnet-5x5"])
def test_transforms_come_before_what_widens(name, dtype, which):
    """And before dot products, if there are many channels and an image that is not small, or for gradients of 5x5."""
    case = by_name[name]
    many = name == "vgg-56" or (name == "alexnet-5x5" and which != "forward")
    dot_products = dtype == torch.bfloat16 and not refused_by_processor("dot_products")
    for memory_format in torch.contiguous_format, torch.channels_last:
        t = conv2d_operands(case).to(dtype).formatted(memory_format)
        chosen = cnnops.ops.conv2d_algorithm(t.x, t.w, **case.arguments, which=which)
        assert chosen == ("winograd" if many or not dot_products else "dot_products")


# --- what is not a number ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nan_and_infinity_reach_what_sees_them(device, algorithm, dtype, value):
    """Exactly the outputs that read a bad number become bad: nothing is skipped, nothing leaks to a neighbour."""
    case = Conv2dCase("bad", 3, 4, 9, 10, 5, (3, 3), padding=(1, 1))
    t = conv2d_operands(case, whole=True).to(dtype).map(lambda v: v + 10)  # no zeros: inf * 0 is NaN
    for which, operand in ("forward", "x"), ("grad_input", "gy"), ("grad_weight", "x"), ("grad_weight", "gy"):
        bad = t.map(torch.clone)
        flat = getattr(bad, operand).view(-1)
        flat[flat.numel() // 2] = value
        if not accepts(which, bad.to(device), case, algorithm):
            continue
        got = run_pass(which, bad.to(device), case, algorithm)
        assert_equal(got, torch_pass(which, bad.to(torch.float64), case).to(dtype))
        assert 0 < (~got.isfinite()).sum() < got.numel()


@every_algorithm
def test_an_infinite_weight(device, algorithm):
    """In the padding it meets zeros, and infinity * 0 may be NaN there, as in torch; inside the image it may not."""
    x, w = torch.ones(1, 2, 6, 12, device=device), torch.ones(3, 2, 3, 3, device=device)
    w[0, 0, 0, 0] = torch.inf
    with or_refusal(algorithm):
        y = F.conv2d(x, w, padding=1, algorithm=algorithm)
        assert (y[0, 0, 1:-1, 1:-1] == torch.inf).all()
        assert y[0, 1:].isfinite().all()
