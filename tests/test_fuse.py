"""convert(model, fuse=True) and convert(model, inference=True): what becomes a block, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
import torchvision
from helpers import assert_equal, numbers
from torch import nn
from torch.nn import functional as TF
from torch.nn.utils import parametrizations

import cnnops
from cnnops import functional as F


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 4, 1),
        nn.MaxPool2d((2, 1)),
        nn.ReLU6(),
        nn.Conv2d(4, 4, 1),
    )


def classes(model):
    return [type(module).__name__ for module in model]


def images(*shape):
    return numbers(*shape).float()


def step(model, x):
    """The result, and the gradients of all parameters."""
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])]


def assert_all_equal(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert_equal(a, b)


def test_a_sequential():
    model = small()
    before, parameters = copy.deepcopy(model), [*model.parameters()]
    keys = [*model.state_dict()]
    assert cnnops.convert(model, fuse=True) is model
    assert classes(model) == [
        "ConvReLUMaxPool2d", "AbsorbedReLU", "AbsorbedMaxPool2d", "ConvReLU2d", "AbsorbedLeakyReLU",
        "ConvReLUMaxPool2d", "AbsorbedMaxPool2d", "ReLU6", "Conv2d",
    ]  # fmt: skip
    assert [*model.state_dict()] == keys and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    x = images(2, 3, 16, 14)
    assert_all_equal(step(model, x), step(cnnops.convert(copy.deepcopy(before)), x))
    assert_all_equal(step(copy.deepcopy(model), x), step(model, x))
    assert not cnnops.left_alone(model)
    assert "ReLU" in repr(model[1])
    cnnops.convert(model, fuse=True)  # a second time changes nothing
    assert classes(model)[:3] == ["ConvReLUMaxPool2d", "AbsorbedReLU", "AbsorbedMaxPool2d"]
    assert isinstance(model[1], nn.ReLU) and isinstance(model[2], nn.MaxPool2d)  # for a forward that asks
    assert classes(pickle.loads(pickle.dumps(model))) == classes(model)
    assert repr(cnnops.restore(model)) == repr(before)
    assert_all_equal(step(model, x), step(before, x))
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model, before, strict=True))


class Shared(nn.Module):
    """One ReLU for two convolutions, and a convolution's output that two look at."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu, self.other, self.last = nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.two(self.relu(self.one(x))))
        z = self.three(y)
        return self.other(z) + z


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = small()

    def forward(self, x):
        return self.features(x if x.sum() > 0 else -x)


class Modes(nn.Module):
    """While it trains it looks at what it does not look at later."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3), nn.ReLU()

    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) + y if self.training else self.relu(y)


def count_of_blocks(model):
    in_place = sum(isinstance(module, cnnops.nn.ConvReLU2d) for module in model.modules())
    return in_place + sum(len(getattr(module, "_blocks", ())) for module in model.modules())


@pytest.mark.parametrize(
    "make, blocks", [(Shared, 0), (Untraceable, 3), (Modes, 0)], ids=lambda v: getattr(v, "__name__", v)
)
def test_what_is_a_chain(make, blocks):
    model = make().eval()
    x = images(2, 3, 12, 12)
    expected = step(cnnops.convert(copy.deepcopy(model)), x)
    training = cnnops.convert(copy.deepcopy(model).train(), fuse=True)
    assert training.training and training(x).shape == expected[0].shape
    cnnops.convert(model, fuse=True)
    assert not model.training
    assert count_of_blocks(model) == blocks
    assert_all_equal(step(model, x), expected)


def test_watched_modules_stay():
    for index in 0, 1, 2:
        model, seen = small(), []
        model[index].register_forward_hook(lambda module, args, y, seen=seen: seen.append(y.shape))
        cnnops.convert(model, fuse=True)
        model(images(1, 3, 16, 14))
        assert seen == [(1, 8, 8, 7) if index == 2 else (1, 8, 16, 14)]
    model = small()
    parametrizations.weight_norm(model[0])
    assert not any(name.startswith("Absorbed") for name in classes(cnnops.convert(model, fuse=True))[:3])
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.LeakyReLU(-0.5), nn.Conv2d(3, 3, 1), nn.MaxPool2d(17))
    assert not any(name.startswith("Absorbed") for name in classes(cnnops.convert(model, fuse=True)))


class Picks(nn.Module):
    """Calls some of a Sequential's modules by themselves, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.features = small()

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError
        y = self.features[0](x)
        for module in self.features[1:3]:
            y = module(y)
        return self.features(x), y, self.features[:2](x), self.features[1:](self.features[0](x))


def test_modules_of_a_sequential_that_others_call():
    model = Picks()
    x = images(2, 3, 16, 14)
    expected = cnnops.convert(copy.deepcopy(model))(x)
    fused = cnnops.convert(copy.deepcopy(model), fuse=True)
    for copied in fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)):
        assert len(copied.features._blocks) == 3
        assert_all_equal(copied(x), expected)
        with torch.no_grad():
            copied.features[0].weight.mul_(2)
        assert not torch.equal(copied(x)[0], expected[0])
    assert repr(cnnops.restore(fused)) == repr(model)


class MyReLU(nn.ReLU):
    def forward(self, x):
        return -super().forward(x)


def test_a_subclass_is_another_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), MyReLU())
    x = images(1, 3, 8, 8)
    expected = cnnops.convert(copy.deepcopy(model))(x)
    assert_equal(cnnops.convert(model, fuse=True)(x), expected)
    assert_equal(cnnops.convert(copy.deepcopy(model), inference=True)(x), expected)


def test_pooling_alone_keeps_no_result():
    """What follows may write over it."""
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    x = images(2, 1, 20, 20)
    expected = step(cnnops.convert(copy.deepcopy(model)), x)
    assert_all_equal(step(cnnops.convert(model, fuse=True), x), expected)


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x))) * self.conv.weight.abs().sum()


def test_what_inference_leaves():
    model = ReadsWeight().eval()
    model.norm.running_mean.normal_()
    model.register_forward_hook(lambda module, args, y: -y)
    x = images(1, 3, 8, 8)
    expected = cnnops.convert(copy.deepcopy(model))(x)
    assert_equal(cnnops.convert(model, inference=True)(x), expected)


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name, blocks", [("vgg16", 13), ("resnet18", 0), ("mobilenet_v2", 0)])
def test_fusing_torchvision(name, blocks):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    x = images(1, 3, 64, 64)
    expected = cnnops.convert(copy.deepcopy(model))(x)
    cnnops.convert(model, fuse=True)
    assert sum(isinstance(module, cnnops.nn.ConvReLU2d) for module in model.modules()) == blocks
    assert_equal(model(x), expected)


@pytest.mark.parametrize("name, blocks", [("vgg16", 13), ("vgg11_bn", 8), ("resnet18", 9), ("mobilenet_v2", 35)])
def test_inference_of_torchvision(name, blocks):
    """No BatchNorm2d is left, and float32's rounding is all that differs."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in module.running_mean, module.weight, module.bias:
                nn.init.normal_(t, 0.5, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    ready = cnnops.convert(model, inference=True)
    modules = [*ready.modules()]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert sum(isinstance(module, cnnops.nn.ConvReLU2d) for module in modules) == blocks
    assert model.training and not ready.training
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    x = images(2, 3, 64, 64)
    exact = copy.deepcopy(model).eval().double()(x.double())
    theirs = copy.deepcopy(model).eval()
    assert relative_error(ready(x), exact) < max(1e-5, 4 * relative_error(theirs(x), exact))


def test_inference_keeps_filters_contiguous():
    """Those that may be transformed, whatever layout the model changes to, and with results of the same bits."""

    def contiguous(model):
        return [m.weight.is_contiguous() for m in model.modules() if isinstance(m, nn.Conv2d)]

    layers = [
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 5),
        nn.Conv2d(24, 32, 3, stride=2),
        nn.Conv2d(32, 32, 3, groups=2),
    ]
    model = nn.Sequential(*layers).eval()
    kept = [False, True, True, False, False]
    x = images(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    ready = cnnops.convert(model, inference=True)
    assert all(contiguous(ready))
    later = copy.deepcopy(ready).to(memory_format=torch.channels_last)
    sooner = cnnops.convert(model.to(memory_format=torch.channels_last), inference=True)
    assert contiguous(later) == contiguous(sooner) == kept
    assert contiguous(later.double().float()) == contiguous(pickle.loads(pickle.dumps(later)).to("cpu")) == kept
    elsewhere = copy.deepcopy(later)
    assert not any(contiguous(elsewhere.bfloat16()))
    assert contiguous(elsewhere.float()) == kept
    assert not any(contiguous(elsewhere.to("meta")))  # which is no CPU, as a GPU
    assert not any(contiguous(model))
    expected = sooner(x)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    assert_equal(later(x), expected)
    for conv in sooner.modules():
        if isinstance(conv, nn.Conv2d):
            conv.contiguous_filters = False
    assert_equal(sooner.to(memory_format=torch.channels_last)(x), expected)
    assert not any(contiguous(sooner))


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        y = TF.max_pool2d(torch.relu_(self.norm(self.conv(x))), 3, stride=2, padding=1)
        return TF.relu6(TF.leaky_relu(self.last(y), 0.3, inplace=True))


def test_inference_of_functions():
    model = Functions()
    with torch.no_grad():
        for _ in range(3):
            model(images(4, 3, 20, 20) + 1)
    x = images(2, 3, 20, 20)
    ready = cnnops.convert(model, inference=True)
    assert [node.op for node in ready.graph.nodes] == [
        "placeholder",
        "call_module",
        "call_module",
        "call_function",
        "output",
    ]
    assert isinstance(ready.conv, cnnops.nn.ConvReLUMaxPool2d) and ready.last.negative_slope == 0.3
    torch.testing.assert_close(ready(x), model.eval()(x))


class Sums(nn.Module):
    """`first` and `second` are added to, in place; `third` is read twice, `one` has not its sum's shape, `wide` not its
    type, and `scaled` needs more than a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.wide, self.scaled = (nn.Conv2d(4, 4, 1) for _ in range(2))
        self.one = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        y = self.first(x) + x
        y = torch.add(y, self.second(y))
        z = self.third(y)
        z = (z + y) * z + (self.one(x) + x) * (self.one(y) + 1)
        return z + (self.wide(x) + x.double()) + torch.add(self.scaled(x), y, alpha=2)


def test_inference_adds_in_place(monkeypatch):
    model = Sums()
    in_place = []
    x = images(2, 4, 8, 8)
    ready = cnnops.convert(model, inference=True)
    expected = cnnops.convert(copy.deepcopy(model))(x)
    add_ = torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda a, b: in_place.append(a.shape) or add_(a, b))
    kept = x.clone()
    assert_equal(ready(x), expected)
    assert in_place == [x.shape] * 2 and torch.equal(x, kept)
    assert_equal(pickle.loads(pickle.dumps(ready))(x), expected)


def test_gradients_of_what_was_added_in_place():
    model = Sums()
    x = images(2, 4, 8, 8).requires_grad_()
    ready = cnnops.convert(copy.deepcopy(model), inference=True)
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (ready, cnnops.convert(model))]
    assert_equal(*grads)


def test_a_hook_sees_the_convolution_before_it_is_added_to():
    model, seen = Sums().eval(), []
    model.first.register_forward_hook(lambda module, args, y: seen.append(y))
    x = images(2, 4, 8, 8)
    cnnops.convert(model, inference=True)(x)
    assert_equal(seen[0], cnnops.convert(copy.deepcopy(model)).first(x))


def test_inference_wants_a_graph():
    with pytest.raises(RuntimeError, match="torch.fx can trace"):
        cnnops.convert(Untraceable(), inference=True)


def test_a_function_sees_overrides():
    """As all functions: a subclass of Tensor may take over."""

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function.__name__

    x = images(1, 1, 4, 4).as_subclass(Mine)
    assert F.conv_relu2d(x, x) == "conv_relu2d"
    assert F.conv_relu_max_pool2d(x, x, pool_kernel_size=2) == "conv_relu_max_pool2d"
