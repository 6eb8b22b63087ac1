"""The modules are torch.nn's in everything but who computes."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from helpers import DEVICES, DTYPES, assert_equal, name_of, numbers
from torch import nn as tnn
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F
from cnnops import nn

every_device = pytest.mark.parametrize("device", DEVICES)

# class name, positional and keyword arguments, input shape
MODULES = {
    "Conv2d": [
        ((3, 6, 3), {}, (2, 3, 9, 8)),
        ((3, 6, (3, 2)), {"stride": 2, "padding": (1, 0), "bias": False}, (2, 3, 9, 8)),
        ((4, 6, 3, 1, 1, 2, 2, True, "zeros"), {}, (2, 4, 9, 8)),
        ((3, 6, 3), {"padding": "same"}, (3, 9, 8)),
        ((3, 6, (2, 4)), {"padding": "same", "dilation": (1, 2)}, (2, 3, 9, 8)),
        ((3, 6, 3), {"padding": "valid", "dtype": torch.float64}, (2, 3, 9, 8)),
        *[((3, 6, 3), {"padding": (1, 2), "padding_mode": mode}, (2, 3, 9, 8)) for mode in ("reflect", "replicate")],
        ((3, 6, 4), {"padding": "same", "padding_mode": "circular"}, (2, 3, 9, 8)),
    ],
    "Linear": [((7, 5), {}, (3, 7)), ((7, 5, False), {}, (7,)), ((7, 5), {"dtype": torch.float64}, (2, 3, 4, 7))],
    "MaxPool2d": [
        ((2,), {}, (2, 3, 9, 8)),
        ((3, 2, 1), {}, (3, 9, 8)),
        (((3, 2),), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "ceil_mode": True}, (2, 3, 9, 8)),
        ((2,), {"return_indices": True}, (2, 3, 9, 8)),
    ],
    "AvgPool2d": [
        ((2,), {}, (2, 3, 9, 8)),
        ((3, 2, 1), {"ceil_mode": True, "count_include_pad": False}, (3, 9, 8)),
        (((3, 2),), {"stride": (2, 1), "divisor_override": 4}, (2, 3, 9, 8)),
    ],
    "ReLU": [((), {}, (2, 3, 9, 8)), ((True,), {}, (5,))],
    "LeakyReLU": [((), {}, (2, 3, 9, 8)), ((0.2,), {"inplace": True}, (5,)), ((), {"negative_slope": 0.3}, (2, 3))],
    "PReLU": [((), {}, (2, 3, 9, 8)), ((3,), {"init": 0.1}, (2, 3, 9, 8)), ((), {"dtype": torch.float64}, (4,))],
}
every_module = pytest.mark.parametrize(
    ("name", "args", "kwargs", "shape"),
    [(name, *rest) for name, rows in MODULES.items() for rest in rows],
    ids=[f"{name}-{i}" for name, rows in MODULES.items() for i in range(len(rows))],
)


def twins(name, args, kwargs):
    """Our module and torch's, each made from the same seed."""
    made = []
    for library in nn, tnn:
        torch.manual_seed(7)
        made.append(getattr(library, name)(*args, **kwargs))
    return made


def parameters_equal(a, b):
    states = a.state_dict(), b.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@every_module
def test_same_module(name, args, kwargs, shape):
    """A subclass with torch's name, repr, and initial parameters to the bit."""
    ours, theirs = twins(name, args, kwargs)
    assert isinstance(ours, type(theirs)) and type(ours) is not type(theirs)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert parameters_equal(ours, theirs)


@every_module
@every_device
def test_same_results(name, args, kwargs, shape, device):
    """Output and all gradients."""
    results = []
    for module in twins(name, args, kwargs):
        dtype = kwargs.get("dtype", torch.float32)
        x = numbers(*shape).to(device, dtype).requires_grad_()
        y = module.to(device)(x * 1)
        y, *indices = y if isinstance(y, tuple) else (y,)
        grads = torch.autograd.grad(y.pow(2).sum(), [x, *module.parameters()])
        results.append([y.detach(), *indices, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert ours.stride() == theirs.stride()


@every_module
def test_state_dict_goes_both_ways(name, args, kwargs, shape):
    ours, theirs = twins(name, args, kwargs)
    for source, target in (ours, theirs), (theirs, ours):
        for p in source.parameters():
            p.data.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        assert parameters_equal(source, target)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True))


@every_module
def test_copies(name, args, kwargs, shape):
    """deepcopy and pickle keep the class, the arguments and the parameters."""
    module = twins(name, args, kwargs)[0]
    x = numbers(*shape).to(kwargs.get("dtype", torch.float32))
    expected = module(x.clone())
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert type(other) is type(module) and repr(other) == repr(module)
        assert parameters_equal(other, module)
        for got, wanted in zip(other(x.clone()), expected, strict=True):
            assert_equal(got, wanted)


def test_the_algorithm_is_a_keyword_of_the_module():
    """It is kept by copies, is no part of the state, and decides what runs."""
    module = nn.Conv2d(4, 8, 3, algorithm="reference")
    assert module.algorithm == "reference"
    assert copy.deepcopy(module).algorithm == pickle.loads(pickle.dumps(module)).algorithm == "reference"
    assert set(module.state_dict()) == {"weight", "bias"}
    assert nn.Conv2d(4, 8, 3).algorithm == "auto"
    x = numbers(2, 4, 9, 9).float()
    reference = torch.ops.cnnops.conv2d(x, module.weight, module.bias, (1, 1), (0, 0), (1, 1), 1, "zeros", "reference")
    assert torch.equal(module(x), reference)
    with pytest.raises(TypeError):
        nn.Conv2d(4, 8, 3, 1, 0, 1, 1, True, "zeros", None, None, "reference")


def test_a_module_computes_with_our_operators():
    """Were forward inherited by mistake, every comparison with torch would pass."""
    net = torch.nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.PReLU(), nn.MaxPool2d(2), nn.LeakyReLU(), nn.AvgPool2d(2), nn.ReLU()
    )
    names = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        net(torch.randn(1, 1, 12, 12))
    computing = [name.removesuffix(".default") for name in names if "detach" not in name]
    wanted = ["conv2d", "prelu", "max_pool2d", "leaky_relu", "avg_pool2d", "relu"]
    assert [name for name in computing if name.startswith("cnnops.")] == [f"cnnops.{name}" for name in wanted]
    assert not {"aten.convolution", "aten.max_pool2d_with_indices", "aten.avg_pool2d", "aten.relu"} & set(computing)


# --- training ---


def network(library, dtype):
    torch.manual_seed(3)
    return torch.nn.Sequential(
        library.Conv2d(1, 8, 5), library.ReLU(), library.MaxPool2d(2), library.Conv2d(8, 12, 3, padding=1),
        library.PReLU(12), library.AvgPool2d(2), library.Conv2d(12, 12, 3, groups=3), library.LeakyReLU(0.1),
        torch.nn.Flatten(), torch.nn.Linear(12, 5),
    ).to(dtype)  # fmt: skip


def train(library, dtype, device, channels_last=False, steps=40):
    """Loss curve and final parameters; every step has a batch of its own, and one batch is short."""
    net = network(library, dtype).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(steps):
        n = 3 if step == 7 else 16
        target = torch.arange(n) % 5
        x = (numbers(n, 1, 16, 16, seed=step) + target.view(-1, 1, 1, 1) * 0.7).to(device, dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(net(x), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), [p.detach().cpu() for p in net.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_device
def test_training_like_the_twin(device, dtype, channels_last):
    """The loss curve is torch.nn's, step by step, and it falls."""
    ours, our_parameters = train(nn, dtype, device, channels_last)
    theirs, their_parameters = train(tnn, dtype, device, channels_last)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(our_parameters, their_parameters, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=10 * tolerance)
    assert ours[-5:].mean() < 0.8 * ours[:5].mean()


def test_training_is_reproducible_to_the_bit():
    """Twice the same, with any number of threads."""
    runs = []
    for threads in 1, 2, 3:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        runs.append(train_convolutions())
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


def train_convolutions():
    """Only our operators, so that no other library's sums enter."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 6))
    for step in range(5):
        net.zero_grad()
        y = net(numbers(33, 1, 16, 16, seed=step).float())
        y.backward((y - 1).detach())
        for p in net.parameters():
            p.data -= 1e-4 * p.grad
    return [p.detach() for p in net.parameters()]


def test_integers_of_numpy():
    """torch takes them wherever it takes integers."""
    one, two = np.int64(1), np.int64(2)
    x, w = torch.randn(1, 4, 9, 8), torch.randn(2, 4, 3, 3)
    up = torch.randn(4, 2, 3, 3)
    for call in (
        lambda f: f.conv2d(x, w, None, two, one, one, one),
        lambda f: f.conv2d(x, w, None, (two, one), (one, two)),
        lambda f: f.conv_transpose2d(x, up, None, two, one, one),
        lambda f: f.max_pool2d(x, two),
        lambda f: f.max_pool2d(x, two, return_indices=True)[1],
        lambda f: f.avg_pool2d(x, two, one),
        lambda f: f.lp_pool2d(x, 2, two),
    ):
        torch.testing.assert_close(call(F), call(TF), rtol=1e-4, atol=1e-4)
    assert cnnops.nn.Conv2d(4, 2, 3, padding=one)(x).shape == (1, 2, 9, 8)
    assert F.conv_relu2d(x, w, padding=one).shape == (1, 2, 9, 8)
    assert cnnops.convert(torch.nn.MaxPool2d(two))(x).shape == (1, 4, 4, 4)


def test_a_misspelt_setting():
    with pytest.raises(AttributeError):
        cnnops.settings.acurate = True
