"""Convolution, activation and max pooling as one operator: the same bits as one after the other, and less kept."""

import copy
import pickle

import pytest
import torch
from helpers import ALGORITHMS, DEVICES, bits, name_of, numbers, or_refusal, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

FORMATS = [torch.contiguous_format, torch.channels_last]
ACTIVATIONS = {
    "none": lambda y, slope: y,
    "relu": lambda y, slope: F.relu(y),
    "relu6": lambda y, slope: F.relu6(y),
    "leaky_relu": lambda y, slope: F.leaky_relu(y, slope),
}
# kernel size, stride, padding, dilation, ceil_mode
POOLINGS = [None, (2, None, 0, 1, False), (3, 2, 1, 1, False), (3, 2, 0, 1, True), (2, 3, 1, 1, True)]
POOLINGS += [((2, 3), (1, 2), (1, 0), (2, 1), False)]
NAMES = "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode"

every_device = pytest.mark.parametrize("device", DEVICES)
every_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


def block(x, w, b, conv=(), pool=None, activation="relu", slope=0.1, **settings):
    settings |= {"activation": activation, "negative_slope": slope}
    if pool is None:
        return F.conv_relu2d(x, w, b, *conv, **settings)
    return F.conv_relu_max_pool2d(x, w, b, *conv, **dict(zip(NAMES, pool, strict=True)), **settings)


def chain(x, w, b, conv=(), pool=None, activation="relu", slope=0.1, **settings):
    y = ACTIVATIONS[activation](F.conv2d(x, w, b, *conv, **settings), slope)
    return y if pool is None else F.max_pool2d(y, *pool)


def operands(x, w, device="cpu", dtype=torch.float32, memory_format=torch.contiguous_format):
    """An input, a weight and a bias of these shapes, to differentiate by."""
    dense = [numbers(*shape).to(device, dtype).contiguous(memory_format=memory_format) for shape in (x, w)]
    return [t.requires_grad_() for t in (*dense, numbers(w[0]).to(device, dtype))]


def overlaps(pool):
    return pool is not None and pool[1] is not None and pool[0] != pool[1]


def assert_the_chain(leaves, **settings):
    """Outputs and gradients of the block have the bits of the chain's."""
    results = []
    for run in block, chain:
        y = run(*leaves, **settings)
        gy = numbers(*y.shape).to(y)
        results.append([y, *torch.autograd.grad(y, [t for t in leaves if t is not None], gy)])
    assert results[0][0].stride() == results[1][0].stride()
    ours, theirs = results
    assert same_bits(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        if settings.get("activation") == "leaky_relu" and overlaps(settings.get("pool")):
            assert (a - b).double().norm() <= 4 * torch.finfo(a.dtype).eps * b.double().norm()
        else:
            assert same_bits(a, b)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLINGS, ids=str)
@every_device
def test_bits_of_the_chain(device, pool, activation, dtype, memory_format):
    leaves = operands((2, 4, 9, 8), (6, 2, 3, 3), device, dtype, memory_format)
    assert_the_chain(leaves, conv=((2, 1), (1, 2), 1, 2), pool=pool, activation=activation)
    assert_the_chain([*leaves[:2], None], conv=(1, 1, 1, 2), pool=pool, activation=activation)


@every_format
@pytest.mark.parametrize("pool", POOLINGS, ids=str)
@pytest.mark.parametrize("device, algorithm", ALGORITHMS)
def test_bits_of_the_chain_in_bands(device, algorithm, pool, memory_format):
    """Images too large for one chunk, with every algorithm."""
    groups = 16 if algorithm == "depthwise" else 1
    channels = 2 if algorithm == "reference" else 16
    x, w = (1, channels, 139, 150), (64 if groups == 1 else 16, channels // groups, 3, 3)
    if groups > 1:
        x = (1, channels, 239, 250)
    leaves = operands(x, w, device, memory_format=memory_format)
    with or_refusal(algorithm), torch.no_grad():
        settings = {"conv": (1, 1, 1, groups), "pool": pool, "algorithm": algorithm}
        assert same_bits(block(*leaves, **settings), chain(*leaves, **settings))


# Bands of these alone would be computed by other files, in tiles that begin elsewhere, or of other pairs.
IN_BANDS = {
    "1x1": ((1, 256, 120, 120), (64, 256, 1, 1), (), "auto"),
    "groups": ((1, 64, 221, 224), (64, 4, 3, 3), (1, 1, 1, 16), "auto"),
    "dilation 2": ((1, 32, 220, 236), (64, 32, 3, 3), (1, 2, 2), "auto"),
    "dilation 3": ((1, 32, 220, 200), (64, 32, 3, 3), (1, 3, 3), "auto"),
    "pairs": ((1, 30, 139, 150), (64, 15, 3, 3), (1, 1, 1, 2), "dot_products"),
}


@every_format
@pytest.mark.parametrize("name", IN_BANDS)
def test_bits_of_bands_are_those_of_the_image(name, memory_format):
    x, w, conv, algorithm = IN_BANDS[name]
    leaves = operands(x, w, dtype=torch.bfloat16 if name == "pairs" else torch.float32, memory_format=memory_format)
    with or_refusal(algorithm), torch.no_grad():
        settings = {"conv": conv, "algorithm": algorithm}
        assert same_bits(block(*leaves, **settings), chain(*leaves, **settings))


@given(data=st.data())
def test_bits_of_the_chain_of_random_geometries(data):
    def integer(low, high):
        return data.draw(st.integers(low, high))

    groups = integer(1, 2)
    kernel = integer(1, 3), integer(1, 3)
    x = integer(1, 5), integer(1, 20) * groups, integer(8, 40), integer(8, 40)
    w = integer(1, 20) * groups, x[1] // groups, *kernel
    pool_kernel = integer(1, 3), integer(1, 3)
    padding = tuple(integer(0, k // 2) for k in pool_kernel)
    pool = (pool_kernel, (integer(1, 3), integer(1, 3)), padding, 1, data.draw(st.booleans()))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    leaves = operands(x, w, memory_format=data.draw(st.sampled_from(FORMATS)))
    conv = (integer(1, 2), (integer(0, 2), integer(0, 2)), 1, groups)
    assert_the_chain(leaves, conv=conv, pool=data.draw(st.sampled_from([None, pool])), padding_mode=mode)


@every_format
@pytest.mark.parametrize("pool", POOLINGS[:3], ids=str)
def test_same_bits_in_any_batch_and_with_any_threads(pool, memory_format):
    x, w, b = (t.detach() for t in operands((5, 16, 60, 66), (64, 16, 3, 3), memory_format=memory_format))
    expected = block(x, w, b, (1, 1), pool)
    threads = torch.get_num_threads()
    try:
        for count in 1, 3, 4:
            torch.set_num_threads(count)
            for n in 0, 3:
                assert same_bits(block(x[n : n + 2], w, b, (1, 1), pool), expected[n : n + 2])
    finally:
        torch.set_num_threads(threads)


@every_device
def test_numbers_that_are_none(device):
    """NaN, infinities and minus zero go where the chain has them go."""
    x = torch.tensor([0.0, -0.0, 1, -1, torch.inf, -torch.inf, torch.nan, 7], device=device)
    x = x[torch.arange(64, device=device).mul(37) % 61 % 8].view(1, 1, 8, 8)
    weight = torch.ones(1, 1, 1, 1, device=device)
    for pool in POOLINGS:
        for activation in ACTIVATIONS:
            results = [run(x, weight, None, pool=pool, activation=activation) for run in (block, chain)]
            assert torch.equal(*(bits(t.nan_to_num(nan=0.5)) for t in results))
            assert torch.equal(*(t.isnan() for t in results))


@every_device
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLINGS, ids=str)
def test_derivatives(device, pool, activation):
    leaves = operands((2, 2, 6, 5), (3, 2, 3, 2), device, torch.float64)

    def run(x, w, b):
        return block(x, w, b, (1, 1), pool, activation)

    assert gradcheck(run, leaves, check_forward_ad=True)
    assert gradgradcheck(run, leaves)


def test_tangents_are_the_chains():
    x, w, b = (t.detach() for t in operands((2, 3, 8, 8), (4, 3, 3, 3)))
    tangents = []
    for run in block, chain:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in (x, w, b)]
            tangents.append(forward_ad.unpack_dual(run(*duals, (1, 1), POOLINGS[2])).tangent)
    assert same_bits(*tangents)


@every_device
def test_opcheck_and_unbatched_and_empty(device):
    x, w, b = operands((2, 4, 9, 8), (6, 4, 3, 3), device)
    operator = torch.ops.cnnops.conv_relu_max_pool2d.default
    for pool in [], [2], [3, 2]:
        torch.library.opcheck(operator, (x, w, b, 1, 1), {"pool_kernel_size": pool})
        y, positions = operator(x, w, b, 1, 1, pool_kernel_size=pool)
        single = operator(x[1], w, b, 1, 1, pool_kernel_size=pool)
        assert same_bits(single[0], y[1])
        assert not pool or same_bits(single[1], positions[1])
        assert operator(x[:0], w, b, 1, 1, pool_kernel_size=pool)[0].shape == (0, *y.shape[1:])
        grads = torch.autograd.grad(operator(x[:0], w, b, 1, 1, pool_kernel_size=pool)[0].sum(), [w, b])
        assert not any(t.any() for t in grads)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pool", [None, {"pool_kernel_size": 3, "pool_stride": 2}], ids=str)
def test_compile(pool, dynamic):
    cls = cnnops.nn.ConvReLU2d if pool is None else cnnops.nn.ConvReLUMaxPool2d
    module = cls(4, 6, 3, padding=1, activation="leaky_relu", negative_slope=0.2, **(pool or {}))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = numbers(2, 4, 9, 8).float().requires_grad_()
    leaves = [x, *module.parameters()]
    ours, expected = (run(x) for run in (compiled, module))
    assert same_bits(ours, expected)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, expected)), strict=True):
        assert same_bits(a, b)


@every_device
def test_autocast(device):
    leaves = operands((2, 4, 9, 8), (6, 4, 3, 3), device)
    with torch.autocast(device, torch.bfloat16):
        y = block(*leaves, (1, 1), POOLINGS[1])
        assert y.dtype == torch.bfloat16 and same_bits(y, chain(*leaves, (1, 1), POOLINGS[1]))
    assert torch.autograd.grad(y.sum(), leaves)[0].dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, 0), (None, 0, None), (0, None, 0)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", [None, POOLINGS[1]], ids=str)
def test_vmap(pool, activation, in_dims):
    shapes = (2, 3, 7, 8), (4, 3, 3, 3), (4,)
    leaves = [
        numbers(*shape) if dim is None else numbers(3, *shape).movedim(0, dim)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    def run(x, w, b):
        return block(x, w, b, (1, 1), pool, activation)

    expected = []
    for i in range(3):
        expected.append(run(*(t if dim is None else t.select(dim, i) for t, dim in zip(leaves, in_dims, strict=True))))
    torch.testing.assert_close(torch.func.vmap(run, in_dims)(*leaves), torch.stack(expected))
    if in_dims[0] == 0:  # images without a batch
        images = leaves[0][:, 0], *leaves[1:]
        torch.testing.assert_close(torch.func.vmap(run, in_dims)(*images), torch.stack(expected)[:, 0])


def kept_bytes(run, leaves):
    """Of what autograd keeps besides the leaves."""
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = run(*leaves)
    own = {t.untyped_storage().data_ptr() for t in leaves}
    assert y.isfinite().all()
    return sum(size for pointer, size in storages.items() if pointer not in own)


@every_device
def test_what_is_kept(device):
    """The result, and a byte for each of its elements: less than a quarter of torch's."""
    leaves = operands((2, 4, 16, 16), (8, 4, 3, 3), device)
    outputs = 2 * 8 * 8 * 8
    kept = kept_bytes(lambda *t: block(*t, (1, 1), POOLINGS[1]), leaves)
    assert kept == outputs * 5

    def theirs(x, w, b):
        return TF.max_pool2d(TF.relu(TF.conv2d(x, w, b, 1, 1)), 2)

    assert kept_bytes(theirs, leaves) > 4 * kept


@every_device
def test_errors(device):
    x, w, b = operands((2, 4, 9, 8), (6, 4, 3, 3), device)
    wrong = [
        (ValueError, "activation must be one of", {"activation": "tanh"}),
        (ValueError, "negative_slope must be at least 0", {"activation": "leaky_relu", "negative_slope": -1.0}),
        (ValueError, "unknown algorithm", {"algorithm": "magic"}),
        (RuntimeError, "refuses", {"algorithm": "winograd", "stride": 2}),
        (RuntimeError, "too small", {"pool_kernel_size": 15}),
        (RuntimeError, "more than 256 places", {"pool_kernel_size": 17}),
        (RuntimeError, "at most half of kernel size", {"pool_kernel_size": 2, "pool_padding": 2}),
        (RuntimeError, "same dtype", {"weight": w.double()}),
        (RuntimeError, "3D .unbatched. or 4D", {"input": x[0, 0]}),
    ]
    for error, message, more in wrong:
        arguments = {"input": x, "weight": w, "bias": b, "pool_kernel_size": 2} | more
        with pytest.raises(error, match=message):
            F.conv_relu_max_pool2d(**arguments)
        if not any(name.startswith("pool") for name in more):
            with pytest.raises(error, match=message):
                F.conv_relu2d(**{name: value for name, value in arguments.items() if name != "pool_kernel_size"})


# --- modules ---


def test_modules():
    conv = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
    x = numbers(2, 3, 10, 10).float()
    ours = cnnops.nn.ConvReLUMaxPool2d(
        3, 8, 3, padding="same", padding_mode="reflect", pool_kernel_size=3, pool_stride=2, activation="relu6"
    )
    assert list(ours.state_dict()) == list(conv.state_dict())
    ours.load_state_dict(conv.state_dict())
    torch.testing.assert_close(ours(x), TF.max_pool2d(TF.relu6(conv(x)), 3, 2))
    assert "activation=relu6" in repr(ours) and "pool_stride=2" in repr(ours)
    plain = cnnops.nn.ConvReLU2d(3, 8, 3, activation="leaky_relu", negative_slope=0.2)
    torch.testing.assert_close(plain(x), TF.leaky_relu(TF.conv2d(x, plain.weight, plain.bias), 0.2))
    assert "negative_slope=0.2" in repr(plain)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), plain(x))
    model = nn.Sequential(copy.deepcopy(plain), nn.ReLU())
    for change in cnnops.convert, cnnops.restore:  # torch has no such module: it stays
        assert type(change(model)[0]) is cnnops.nn.ConvReLU2d and not cnnops.left_alone(model)
