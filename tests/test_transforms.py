"""Forward mode, torch.func, vmap: every operator against finite differences and a loop, every function against torch's.

That vmap falls back to a loop of its own is an error here.
"""

from itertools import product

import pytest
import torch
from helpers import DEVICES, assert_equal, numbers
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

ops = torch.ops.cnnops
pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")

CONV = ((2, 1), (1, 0), (1, 2), 2)
WINDOW = ((3, 2), (2, 2), (1, 1), (1, 1), True)
AVERAGE = ((3, 2), (2, 2), (1, 1), True, False)


def samples():
    """For each operator (name of the row without what follows the comma): a function, and the tensors it takes."""
    x, w, b, gy = numbers(2, 2, 4, 5), numbers(4, 1, 3, 2), numbers(4), numbers(2, 4, 2, 3)
    dense = numbers(3, 2, 2, 3)
    values, positions = ops.max_pool2d(x, *WINDOW)
    adaptive, places = ops.adaptive_max_pool2d(x, (2, 1))
    _, indices = TF.max_pool2d(x, 2, return_indices=True)
    pooled, unpooled, plane = values.shape, indices.shape, (4, 5)
    return {
        "conv2d": (lambda x, w, b: ops.conv2d(x, w, b, *CONV), x, w, b),
        "conv2d, dense": (lambda x, w: ops.conv2d(x, w, None, 1, (1, 0)), x, dense),
        "conv2d, border": (lambda x, w, b: ops.conv2d(x, w, b, *CONV, "circular"), x, w, b),
        "conv2d, unbatched": (lambda x, w, b: ops.conv2d(x, w, b, *CONV), x[0], w, b),
        "conv2d_grad_input": (lambda gy, w, b: ops.conv2d_grad_input(gy, w, b, plane, *CONV), gy, w, numbers(2)),
        "conv2d_grad_input, dense": (
            lambda gy, w: ops.conv2d_grad_input(gy, w, None, plane, 1, (1, 0)), numbers(2, 3, 5, 3), dense),
        "conv2d_grad_input, border": (
            lambda gy, w: ops.conv2d_grad_input(gy, w, None, plane, *CONV, "circular"), gy, w),
        "conv2d_grad_weight": (lambda gy, x: ops.conv2d_grad_weight(gy, x, (3, 2), *CONV), gy, x),
        "conv2d_grad_weight, dense": (
            lambda gy, x: ops.conv2d_grad_weight(gy, x, (2, 3), 1, (1, 0)), numbers(2, 3, 5, 3), x),
        "conv2d_grad_weight, border": (
            lambda gy, x: ops.conv2d_grad_weight(gy, x, (3, 2), *CONV, "circular"), gy, x),
        "conv_transpose2d": (lambda x, w, b: ops.conv_transpose2d(x, w, b, 2, 1, (1, 0)), x, numbers(2, 3, 3, 2),
                             numbers(3)),
        "conv_relu_max_pool2d": (
            lambda x, w, b: ops.conv_relu_max_pool2d(x, w, b, *CONV, "zeros", "leaky_relu", 0.1, 2, (), 0, 1, False)[0],
            x, w, b),
        "relu_max_pool2d_backward": (
            lambda gy, y, p: ops.relu_max_pool2d_backward(gy, y, p, plane, *WINDOW, "relu6"),
            numbers(*pooled), numbers(*pooled, seed=1), positions),
        "channel_sum": (ops.channel_sum, x),
        "max_pool2d": (lambda x: ops.max_pool2d(x, *WINDOW)[0], x),
        "max_pool2d, unbatched": (lambda x: ops.max_pool2d(x, *WINDOW)[0], x[0]),
        "max_pool2d_backward": (
            lambda gy, p: ops.max_pool2d_backward(gy, p, plane, *WINDOW), numbers(*pooled), positions),
        "max_pool2d_gather": (lambda x, p: ops.max_pool2d_gather(x, p, *WINDOW), x, positions),
        "adaptive_max_pool2d": (lambda x: ops.adaptive_max_pool2d(x, (3, 2))[0], x),
        "adaptive_max_pool2d, alike": (lambda x: ops.adaptive_max_pool2d(x, (2, 1))[0], x),
        "adaptive_max_pool2d_backward": (
            lambda gy, p: ops.adaptive_max_pool2d_backward(gy, p, plane), numbers(*adaptive.shape), places),
        "adaptive_max_pool2d_gather": (ops.adaptive_max_pool2d_gather, x, places),
        "max_unpool2d": (lambda x, i: ops.max_unpool2d(x, i, plane), numbers(*unpooled), indices),
        "avg_pool2d": (lambda x: ops.avg_pool2d(x, *AVERAGE), x),
        "avg_pool2d, divisor": (lambda x: ops.avg_pool2d(x, *AVERAGE, 5), x),
        "avg_pool2d_backward": (lambda gy: ops.avg_pool2d_backward(gy, plane, *AVERAGE), numbers(*pooled)),
        "adaptive_avg_pool2d": (lambda x: ops.adaptive_avg_pool2d(x, (3, 2)), x),
        "adaptive_avg_pool2d, alike": (lambda x: ops.adaptive_avg_pool2d(x, (2, 1)), x),
        "adaptive_avg_pool2d_backward": (
            lambda gy: ops.adaptive_avg_pool2d_backward(gy, plane), numbers(2, 2, 3, 2)),
        "relu": (ops.relu, x),
        "relu_": (lambda x: ops.relu_(x.clone()), x),
        "relu_backward": (ops.relu_backward, gy, numbers(*gy.shape, seed=1)),
        "hardtanh": (lambda x: ops.hardtanh(x, -0.7, 0.6), x),
        "hardtanh_": (lambda x: ops.hardtanh_(x.clone(), -0.7, 0.6), x),
        "hardtanh_backward": (lambda gy, x: ops.hardtanh_backward(gy, x, -0.7, 0.6), gy, numbers(*gy.shape, seed=1)),
        "leaky_relu": (lambda x: ops.leaky_relu(x, -0.2), x),
        "leaky_relu_": (lambda x: ops.leaky_relu_(x.clone(), 0.2), x),
        "leaky_relu_backward": (lambda gy, x: ops.leaky_relu_backward(gy, x, 0.2), gy, numbers(*gy.shape, seed=1)),
        "prelu": (ops.prelu, x, numbers(2)),
        "prelu, one slope": (ops.prelu, x, numbers(1)),
        "prelu, a vector": (ops.prelu, numbers(5), numbers(1)),
        "prelu_backward": (ops.prelu_backward, numbers(*x.shape, seed=1), x, numbers(2)),
        "prelu_backward, one slope": (ops.prelu_backward, numbers(*x.shape, seed=1), x, numbers(1)),
    }  # fmt: skip


SAMPLES = samples()
every_sample = pytest.mark.parametrize(("name", "device"), [*product(SAMPLES, DEVICES)])


def sample(name, device):
    """The function and its tensors there; those of floating point are leaves, the others are no variables."""
    function, *tensors = SAMPLES[name]
    return function, [t.to(device).requires_grad_(t.is_floating_point()) for t in tensors]


def test_every_operator_has_a_sample():
    """A new operator cannot go without the tests of this file."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cnnops::")}
    assert {name.removeprefix("cnnops::").split(".")[0] for name in registered} == {n.split(",")[0] for n in SAMPLES}


@every_sample
def test_first_derivatives(name, device):
    """Backward and forward mode, and vmap over either."""
    assert gradcheck(*sample(name, device), check_forward_ad=True, check_batched_grad=True,
                     check_batched_forward_grad=True)  # fmt: skip


@every_sample
def test_second_derivatives(name, device):
    """Backward and forward mode over backward, and vmap over it."""
    assert gradgradcheck(*sample(name, device), check_fwd_over_rev=True, check_rev_over_rev=True,
                         check_batched_grad=True)  # fmt: skip


def alternatives(t, axis):
    """t and two like it along a new axis; whole numbers, which stand for places in a plane, only change planes."""
    others = [t.sin() - 0.01, 0.5 - t] if t.is_floating_point() else [t.flip(0), t.flip(1)]
    return torch.stack([t, *others], axis)


@every_sample
def test_vmap(name, device):
    """Over each choice of arguments, along their first or last axis: the numbers of a loop."""
    function, *tensors = SAMPLES[name]
    tensors = [t.to(device) for t in tensors]
    for axes in product([None, 0, -1], repeat=len(tensors)):
        if set(axes) == {None}:
            continue
        inputs = [t if a is None else alternatives(t, a) for t, a in zip(tensors, axes, strict=True)]
        got = vmap(function, in_dims=axes)(*inputs)
        parts = [[t if a is None else t.select(a, i) for t, a in zip(inputs, axes, strict=True)] for i in range(3)]
        assert_close(got, stacked([function(*part) for part in parts]))


def stacked(results):
    """A list of results as one, where each may be several tensors."""
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# --- functions, against torch's ---

X, W, W2, B = numbers(2, 4, 6, 7), numbers(6, 4, 3, 3), numbers(6, 2, 3, 2), numbers(6)
UNPOOLED = TF.max_pool2d(X, 2, return_indices=True)[1]
FUNCTIONS = {
    "conv2d": (lambda F, x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 2)), X, W, B),
    "conv2d, groups": (lambda F, x, w, b: F.conv2d(x, w, b, groups=2), X, W2, B),
    "conv2d, same": (lambda F, x, w, b: F.conv2d(x, w, b, padding="same", dilation=2), X, W, B),
    "conv2d, depthwise": (lambda F, x, w: F.conv2d(x, w, padding=1, groups=4), X, numbers(8, 1, 2, 3)),
    "conv2d, unbatched": (lambda F, x, w, b: F.conv2d(x, w, b), X[0], W, B),
    "conv_transpose2d": (
        lambda F, x, w, b: F.conv_transpose2d(x, w, b, (2, 1), 1, (1, 0)), X, numbers(4, 3, 3, 2), numbers(3)),
    "conv_transpose2d, groups": (
        lambda F, x, w: F.conv_transpose2d(x, w, None, 2, 1, 0, 2, 2), X, numbers(4, 3, 3, 2)),
    "conv_transpose2d, unbatched": (lambda F, x, w: F.conv_transpose2d(x, w), X[0], numbers(4, 3, 3, 2)),
    "max_pool2d": (lambda F, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), X),
    "max_pool2d, indices": (lambda F, x: F.max_pool2d(x, 2, 1, return_indices=True)[0], X),
    "max_pool2d, unbatched": (lambda F, x: F.max_pool2d(x, 2), X[0]),
    "max_unpool2d": (lambda F, x: F.max_unpool2d(x, UNPOOLED, 2, output_size=(6, 7)), numbers(2, 4, 3, 3)),
    "avg_pool2d": (lambda F, x: F.avg_pool2d(x, 3, 2, 1, True, False), X),
    "avg_pool2d, unbatched": (lambda F, x: F.avg_pool2d(x, (2, 3)), X[0]),
    "adaptive_avg_pool2d": (lambda F, x: F.adaptive_avg_pool2d(x, (4, None)), X),
    "adaptive_max_pool2d": (lambda F, x: F.adaptive_max_pool2d(x, (2, 3)), X),
    "lp_pool2d": (lambda F, x: F.lp_pool2d(x, 2.0, 2), X),
    "relu": (lambda F, x: F.relu(x), X),
    "relu, a number": (lambda F, x: F.relu(x), X[0, 0, 0, 0]),
    "relu in place": (lambda F, x: F.relu(x * 1, inplace=True), X),
    "relu in place on a view": (lambda F, x: part_in_place(F, x), X),
    "hardtanh": (lambda F, x: F.hardtanh(x, -0.5, 0.8), X),
    "relu6 in place": (lambda F, x: F.relu6(x * 4, inplace=True), X),
    "leaky_relu": (lambda F, x: F.leaky_relu(x, 0.2), X),
    "leaky_relu in place": (lambda F, x: F.leaky_relu(x * 1, 0.2, inplace=True), X),
    "prelu": (lambda F, x, w: F.prelu(x, w), X, numbers(4)),
    "prelu, one slope": (lambda F, x, w: F.prelu(x, w), X, numbers(1)),
    "prelu, a matrix": (lambda F, x, w: F.prelu(x, w), numbers(5, 3), numbers(3)),
}  # fmt: skip


def part_in_place(F, x):
    y = x * 1
    F.relu(y[:, 1:, ::2], inplace=True)
    return y * y


every_function = pytest.mark.parametrize(("name", "device"), [*product(FUNCTIONS, DEVICES)])


def both(name, device):
    """Our function, torch's, and tensors for them."""
    function, *tensors = FUNCTIONS[name]
    if name == "max_unpool2d" and device != "cpu":
        pytest.skip("its indices are a constant on the CPU")
    return (lambda *t: function(F, *t)), (lambda *t: function(TF, *t)), tuple(t.to(device) for t in tensors)


def directions(tensors):
    return tuple(numbers(*t.shape, seed=("direction", i)).to(t.device) for i, t in enumerate(tensors))


@every_function
def test_jvp_and_vjp(name, device):
    """Values, tangents and gradients; the tangent along each choice of arguments, the others being constants."""
    ours, theirs, tensors = both(name, device)
    tangents = directions(tensors)
    assert_close(linearize(ours, *tensors)[1](*tangents), jvp(theirs, tensors, tangents)[1])
    results = []
    for function in ours, theirs:
        y, pull = vjp(function, *tensors)
        results.append([y, pull(*directions([y]))])
        for chosen in product([False, True], repeat=len(tensors)):
            if any(chosen):
                results[-1].append(jvp_along(function, chosen, tensors, tangents))
    assert_close(*results)


def jvp_along(function, chosen, tensors, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) if c else t for t, d, c in zip(tensors, tangents, chosen, strict=True)]
        return tuple(forward_ad.unpack_dual(function(*duals)))


def small(tensors):
    """Few enough numbers for whole matrices of derivatives: one image, whose border is cut off."""
    return tuple(t[:1, :, :4, :5] if t.shape == X.shape else t for t in tensors)


@every_function
def test_jacobians(name, device):
    """By rows and by columns."""
    ours, theirs, tensors = both(name, device)
    tensors = small(tensors)
    expected = jacrev(theirs)(*tensors)
    assert_close(jacrev(ours)(*tensors), expected)
    assert_close(jacfwd(ours)(*tensors), expected)


@every_function
def test_vmap_like_torchs(name, device):
    """Over all arguments, from their last axis to the result's, in chunks; over a part of them; and nested."""
    ours, theirs, tensors = both(name, device)
    last = tuple(alternatives(t, -1) for t in tensors)
    expected = torch.stack([theirs(*(t[..., i] for t in last)) for i in range(3)], -1)
    assert_close(vmap(ours, -1, -1, chunk_size=2)(*last), expected)
    for i in range(len(tensors)):
        axes = [None] * len(tensors)
        axes[i] = -1
        inputs = [*tensors[:i], last[i], *tensors[i + 1 :]]
        parts = [[*tensors[:i], last[i][..., k], *tensors[i + 1 :]] for k in range(3)]
        assert_close(vmap(ours, tuple(axes))(*inputs), torch.stack([theirs(*part) for part in parts]))
    first = alternatives(tensors[0], 0)
    inner = vmap(ours, (None, *([-1] * (len(tensors) - 1)))) if len(tensors) > 1 else vmap(ours, 0)
    outer = first if len(tensors) > 1 else alternatives(first, 0)
    got = vmap(inner, (0, *([None] * (len(tensors) - 1))))(outer, *last[1:])
    rows = [[(x, *(t[..., k] for t in last[1:])) if len(tensors) > 1 else (x[k],) for k in range(3)] for x in outer]
    assert_close(got, torch.stack([torch.stack([theirs(*part) for part in row]) for row in rows]))


def test_vmap_of_indices():
    """max_pool2d's indices, adaptive_max_pool2d's, and what max_unpool2d does with them, one image at a time."""
    for pool in (
        lambda F, x: F.max_pool2d(x, 2, return_indices=True),
        lambda F, x: F.adaptive_max_pool2d(x, (2, 3), return_indices=True),
    ):
        values, indices = vmap(lambda x, pool=pool: pool(F, x))(X)
        for got, expected in zip((values, indices), pool(TF, X), strict=True):
            assert_equal(got, expected)
    values, indices = TF.max_pool2d(X, 2, return_indices=True)
    size = X.shape[-2:]
    got = vmap(lambda x, i: F.max_unpool2d(x, i, 2, output_size=size))(values, indices)
    assert_equal(got, TF.max_unpool2d(values, indices, 2, output_size=size))


@pytest.mark.parametrize("function", [F.relu_, F.hardtanh_, F.leaky_relu_], ids=lambda f: f.__name__)
def test_vmap_in_place(function):
    """The tensor given to vmap is written over."""
    x = numbers(3, 4, 5)
    expected = function(x.clone())
    y = vmap(function, 1, 1)(x)
    assert_equal(x, expected)
    assert_equal(y, expected)


# --- networks ---


def network(library, device):
    torch.manual_seed(5)
    return torch.nn.Sequential(
        library.Conv2d(2, 4, 3, padding=1), library.ReLU(inplace=True), library.MaxPool2d(2),
        library.Conv2d(4, 4, 3, groups=2, padding="same"), library.PReLU(4), library.ConvTranspose2d(4, 3, 2, stride=2),
        library.ReLU6(), library.AvgPool2d(2), library.Conv2d(3, 2, 2, bias=False), library.LeakyReLU(0.1),
        library.AdaptiveAvgPool2d(1), torch.nn.Flatten(0),
    ).to(device, torch.float64)  # fmt: skip


@pytest.fixture(params=DEVICES)
def nets(request):
    """Ours and torch's with the same parameters; what follows asks the same of both."""
    return network(cnnops.nn, request.param), network(torch.nn, request.param)


def images(net, n):
    return numbers(n, 2, 6, 6).to(next(net.parameters()).device)


def loss(parameters, net, x):
    return functional_call(net, parameters, x[None]).pow(2).sum()


def test_gradients_per_sample(nets):
    """vmap of grad: a gradient for each image of a batch, in one pass; the loop's, and torch's."""
    per_sample = []
    for net in nets:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        x = images(net, 5)
        per_sample.append(vmap(grad(loss), (None, None, 0))(parameters, net, x))
        for i, image in enumerate(x):
            one = grad(loss)(parameters, net, image)
            assert_close({name: g[i] for name, g in per_sample[-1].items()}, one)
    assert_close(*per_sample)


def test_an_ensemble(nets):
    """vmap over stacked parameters: several networks at once, with one batch each or the same batch."""
    net = nets[0]
    models = [network(cnnops.nn, images(net, 1).device) for _ in range(3)]
    for i, model in enumerate(models):
        for p in model.parameters():
            p.data.add_(0.1 * i)
    parameters, buffers = stack_module_state(models)
    x = images(net, 4)
    for data, axis in (x, None), (torch.stack([x, 2 * x, -x]), 0):

        def run(p, x):
            return functional_call(net, (p, buffers), x)

        got = vmap(run, (0, axis))(parameters, data)
        parts = [data] * 3 if axis is None else data
        assert_close(got, torch.stack([model(part) for model, part in zip(models, parts, strict=True)]))


def test_forward_mode_of_a_network(nets):
    """dual_level with modules: tangents of the input, and of a parameter."""
    results = []
    for net in nets:
        x, tangent = images(net, 3), images(net, 3).cos()
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p.detach(), p.detach().sin()) for n, p in net.named_parameters()}
            y = net(forward_ad.make_dual(x, tangent))
            z = functional_call(net, duals, x)
            results.append([forward_ad.unpack_dual(y).tangent.detach(), forward_ad.unpack_dual(z).tangent])
    assert_close(*results)


def test_tangents_of_channels_last(nets):
    """As torch's, down to the strides of the tangent."""
    results = []
    for net in nets:
        x = images(net, 3).contiguous(memory_format=torch.channels_last)
        y, dy = jvp(net[:5], (x,), (x.cos().contiguous(),))
        assert y.stride() == dy.stride()
        results.append((y.detach(), dy.detach()))
    assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()


def test_hessian(nets):
    """Forward over backward, of the loss by one layer's weight; and its product with a vector."""
    results = []
    for net in nets:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        image, name = images(net, 1)[0], "8.weight"

        def by(weight, net=net, parameters=parameters, image=image, name=name):
            return loss({**parameters, name: weight}, net, image)

        weight = parameters[name]
        product = jvp(grad(by), (weight,), (weight.sin(),))[1]
        results.append((hessian(by)(weight), jacrev(jacrev(by))(weight), product))
        assert_close(results[-1][0], results[-1][1])
    assert_close(*results)
