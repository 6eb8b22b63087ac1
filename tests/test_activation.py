"""relu, leaky_relu and prelu against torch, bit by bit, both ways."""

import os

import pytest
import torch
from helpers import DEVICES, DTYPES, assert_equal, awkward, name_of, numbers
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as TF

from cnnops import functional as F

every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

SPECIAL = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3e38, -3e38, 2.5]
SLOPES = [0.01, 0.25, 0.0, 1.0, 2.0, -0.5, -1.0]
SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 3), (1, 1, 1, 1), (1, 7, 33)]

FUNCTIONS = {
    "relu": lambda f, x: f.relu(x),
    **{f"leaky_relu-{slope}": lambda f, x, slope=slope: f.leaky_relu(x, slope) for slope in SLOPES},
    "prelu": lambda f, x: f.prelu(x, torch.tensor([0.25], dtype=x.dtype, device=x.device)),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def assert_like_torch(call, x, gy, device):
    """Value and gradient; with the sign of every zero."""
    results = []
    for functional, where in (F, device), (TF, "cpu"):
        leaf = x.to(where).requires_grad_()
        y = call(functional, leaf)
        results.append([y.detach(), *grad(y, leaf, gy.to(where))])
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)
        finite = ~theirs.isnan()
        assert torch.equal(ours.cpu().signbit()[finite], theirs.signbit()[finite]), "a zero has the other sign"


@every_dtype
@every_device
@every_function
def test_values_and_gradients(function, device, dtype):
    for shape in SHAPES:
        x = numbers(*shape, whole=True).to(dtype)
        assert_like_torch(FUNCTIONS[function], x, numbers(*shape, seed="gy").to(dtype), device)


@every_dtype
@every_device
@every_function
def test_special_values_in_every_lane(function, device, dtype):
    """NaN, infinities, zeros of both signs and denormals, at every place of a vector and in its tail; gradients too."""
    special = torch.tensor(SPECIAL, dtype=dtype)
    short, long = special.repeat(13), special.repeat_interleave(13)
    for x, gy in (short, long), (long, short):
        for shift in range(len(SPECIAL)):
            assert_like_torch(FUNCTIONS[function], x[shift:], gy[shift:], device)


@every_device
@every_function
def test_every_length(function, device):
    """Vector bodies and tails meet at every length; nothing beyond the end is written."""
    call = FUNCTIONS[function]
    x = numbers(140).float().to(device)
    expected = call(TF, x)
    for length in range(140):
        assert_equal(call(F, x[:length]), expected[:length])


def test_tensors_beyond_the_cache():
    """What is much larger than the cache is written past it, also where a thread begins in the midst of a vector."""
    x = numbers(10_000_007).float().requires_grad_()
    y, wanted = F.relu(x), TF.relu(x)
    assert_equal(y.detach(), wanted.detach())
    assert_equal(grad(y, x, x.detach())[0], grad(wanted, x, x.detach())[0])


@every_device
@every_function
def test_any_strides(function, device):
    call = FUNCTIONS[function]
    x, gy = numbers(2, 3, 5, 7).float().to(device), numbers(2, 3, 5, 7, seed="gy").float().to(device)

    def both_ways(x, gy):
        leaf = x.detach().requires_grad_()
        y = call(F, leaf)
        return y.detach(), grad(y, leaf, gy)[0]

    expected = both_ways(x, gy)
    for (_, odd_x), (_, odd_gy) in zip(awkward(x), awkward(gy), strict=True):
        for ours in both_ways(odd_x, gy), both_ways(x, odd_gy), both_ways(odd_x, odd_gy):
            for got, wanted in zip(ours, expected, strict=True):
                assert_equal(got, wanted)
    one = torch.ones((), device=device).expand_as(x)
    for got, wanted in zip(both_ways(x, one), both_ways(x, one.contiguous()), strict=True):
        assert_equal(got, wanted)
    for part in x[:1], x[:, :1], x[..., :1]:
        assert_equal(call(F, part.expand_as(x)), call(TF, part.expand_as(x)))


@every_device
@every_function
def test_layout_of_results(function, device):
    """Strides are torch's: channels_last in, channels_last out, for output and gradient."""
    for shape in (2, 3, 5, 7), (1, 1, 4, 4), (2, 8, 1, 1):
        strides = []
        for functional in F, TF:
            x = numbers(*shape).float().to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
            y = FUNCTIONS[function](functional, x)
            strides.append([y.stride(), grad(y, x, torch.ones_like(y))[0].stride()])
        assert strides[0] == strides[1]


@every_device
def test_gradient_at_zero_is_zero(device):
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45], device=device, requires_grad=True)
    assert_equal(grad(F.relu(x).sum(), x)[0], torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert_equal(grad(F.leaky_relu(x, 0.5).sum(), x)[0], torch.tensor([0.5, 0.5, 1.0, 0.5]))


# --- in place ---

IN_PLACE = {"relu": (), "leaky_relu": (0.1,)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("name", IN_PLACE)
@every_device
def test_in_place(device, name, layout):
    """The same tensor, changed, with the same gradient; neighbours of a slice stay as they are."""
    ours, theirs = getattr(F, name), getattr(TF, name)
    x = numbers(2, 3, 5, 7).to(device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for function in ours, theirs:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        copy = leaf * 1
        argument = copy[:, 1:, ::2] if layout == "slice" else copy
        version = argument._version
        y = function(argument, *IN_PLACE[name], inplace=True)
        assert y.data_ptr() == argument.data_ptr() and argument._version > version
        results.append([copy.detach(), *grad(copy.pow(2).sum(), leaf)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_returns_its_argument(name):
    x = numbers(7)
    assert getattr(F, name)(x, *IN_PLACE[name], inplace=True) is x


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_where_autograd_forbids_it(name):
    """A leaf may not be overwritten, nor a number that a backward still needs."""
    function = getattr(F, name)
    with pytest.raises(RuntimeError, match="leaf"):
        function(torch.ones(3, requires_grad=True), *IN_PLACE[name], inplace=True)
    x = numbers(5).requires_grad_()
    y = (x * 1).pow(2)  # keeps x * 1
    squared = x * 1
    z = squared.pow(2)
    function(squared, *IN_PLACE[name], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    y.sum().backward()


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_noticed_in_inference_mode(name):
    x, w = numbers(4), torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = (x * w).sum()  # keeps x
    with torch.inference_mode():
        getattr(F, name)(x, *IN_PLACE[name], inplace=True)
        made_there = numbers(4)
        getattr(F, name)(made_there, *IN_PLACE[name], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(RuntimeError, match="inference tensor"):
        getattr(F, name)(made_there, *IN_PLACE[name], inplace=True)


def test_what_is_kept_may_not_be_overwritten():
    for function in F.relu, F.relu6, F.hardtanh, F.leaky_relu:
        y = function(numbers(4).requires_grad_()).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_in_place_with_a_negative_slope():
    """The output's sign no longer tells the input's, so the gradient may not be computed from it."""
    x = numbers(9).requires_grad_()
    try:
        (got,) = grad(F.leaky_relu(x * 1, -0.5, inplace=True).sum(), x)
    except RuntimeError as error:
        assert "negative" in str(error) or "modified by an inplace operation" in str(error)
    else:
        assert_equal(got, torch.where(x.detach() > 0, 1.0, -0.5).double())


# --- prelu's weight ---


@pytest.mark.parametrize(
    "shape", [(6,), (4, 3), (67, 43), (2, 3, 5), (2, 3, 5, 7), (2, 3, 2, 3, 4), (0, 3, 4), (2, 3, 0), ()]
)
@pytest.mark.parametrize("per_channel", [False, True])
@every_dtype
@every_device
def test_prelu(device, dtype, per_channel, shape):
    """Values and both gradients, one weight for all or one per channel (dimension 1)."""
    channels = shape[1] if per_channel and len(shape) > 1 else 1
    x, w, gy = (numbers(*s, whole=True, seed=i).to(dtype) for i, s in enumerate([shape, (channels,), shape]))
    results = []
    for functional, where in (F, device), (TF, "cpu"):
        leaves = [v.to(where).requires_grad_() for v in (x, w)]
        y = functional.prelu(*leaves)
        results.append([y.detach(), *grad(y, leaves, gy.to(where))])
    for got, wanted in zip(*results, strict=True):
        assert_equal(got, wanted)


@every_device
def test_prelu_takes_a_weight_without_dimensions(device):
    x, w = numbers(2, 3, whole=True).to(device), torch.tensor(0.5, dtype=torch.float64, device=device)
    assert_equal(F.prelu(x, w), TF.prelu(x, w))
    leaves = x.requires_grad_(), w.requires_grad_()
    for got, wanted in zip(*(grad(f.prelu(*leaves).sum(), leaves) for f in (F, TF)), strict=True):
        assert_equal(got, wanted)


@every_device
def test_prelu_weight_gradient_sees_nan(device):
    """A NaN input makes its channel's weight gradient NaN and no other, as in torch."""
    x, gy = numbers(2, 3, 4, whole=True).to(device), torch.ones(2, 3, 4, dtype=torch.float64, device=device)
    x[1, 2, 3] = torch.nan
    w = torch.full((3,), 0.5, dtype=torch.float64, device=device, requires_grad=True)
    assert_equal(*(grad(f.prelu(x, w), w, gy)[0] for f in (F, TF)))


@every_dtype
@every_device
def test_prelu_weight_gradient_rounds_well(device, dtype):
    """A sum over 60,000 elements keeps its digits."""
    x, gy, w = numbers(6, 3, 100, 100), numbers(6, 3, 100, 100, seed="gy"), numbers(3)
    weight = w.to(device, dtype).requires_grad_()
    (got,) = grad(F.prelu(x.to(device, dtype), weight), weight, gy.to(device, dtype))
    expected = torch.where(x > 0, 0.0, x * gy)
    error = (got.double().cpu() - expected.sum((0, 2, 3))).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * expected.abs().sum((0, 2, 3))).all()


# --- the sum that conv2d's bias gradient is ---


@every_dtype
@every_device
@pytest.mark.parametrize(
    "shape",
    [
        *[(2, 3, 5, 7), (1, 1, 1, 1), (3, 5), (131, 83), (2, 3, 70_001), (64, 2, 9, 9), (0, 4, 3), (5, 4, 0)],
        *[(2, 519, 2, 3), (7, 1031)],  # more channels than are summed at a time
    ],
)
def test_channel_sum(device, dtype, shape):
    x = numbers(*shape, whole=True)
    others = [d for d in range(len(shape)) if d != 1]
    for _, view in [("contiguous", x), *awkward(x)]:
        assert_equal(torch.ops.cnnops.channel_sum(view.to(dtype).to(device)), x.sum(others).to(dtype))
    x = numbers(*shape)
    error = (torch.ops.cnnops.channel_sum(x.to(device, dtype)).double().cpu() - x.sum(others)).abs()
    assert (error <= 8 * torch.finfo(dtype).eps * x.abs().sum(others)).all()


# --- derivatives ---


@pytest.mark.parametrize("function", FUNCTIONS)
@every_device
def test_gradcheck(function, device):
    x = numbers(2, 3, 4)
    x = (x + x.sign() * 0.1).to(device).requires_grad_()  # away from the corner
    assert gradcheck(lambda x: FUNCTIONS[function](F, x), x)
    assert gradgradcheck(lambda x: FUNCTIONS[function](F, x), x)


@pytest.mark.parametrize("weights", [1, 3])
@every_device
def test_gradcheck_of_prelu(device, weights):
    x = numbers(2, 3, 4)
    x = (x + x.sign() * 0.1).to(device).requires_grad_()
    w = numbers(weights).to(device).requires_grad_()
    assert gradcheck(F.prelu, (x, w))
    assert gradgradcheck(F.prelu, (x, w))


@pytest.mark.huge
@pytest.mark.skipif(os.environ.get("CNNOPS_TEST_HUGE") != "1", reason="needs 20 GB; set CNNOPS_TEST_HUGE=1")
def test_more_than_2_to_the_31_elements():
    x = torch.full((2**31 + 17,), -1.0)
    x[-1] = 2.0
    y = F.relu(x)
    assert y[-1] == 2 and y[-2] == 0 and y.sum() == 2
