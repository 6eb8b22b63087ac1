"""cnnops.convert changes who computes, and nothing else; cnnops.restore undoes it."""

import copy
import inspect
import io
import logging
import pickle
import re

import pytest
import torch
import torch.ao.nn.quantized
import torchvision_models
from helpers import assert_equal, numbers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torchvision_models import Ran

import cnnops
from cnnops.convert import OURS


def of_our_kind(names):
    return [name for name in names if re.search("conv|pool|relu|threshold|hardtanh", name)]


def families(run):
    """The operators of our kind that ran: cnnops::conv2d, aten::relu, ..."""
    with Ran() as ran:
        run()
    return of_our_kind(ran.names)


def assert_ours(run):
    names = families(run)
    assert names and all(name.startswith("cnnops::") for name in names), names


class Compiled:
    """A model under torch.compile, which notes the operators of our kind in the graph that runs."""

    def __init__(self, model, **options):
        self.run = torch.compile(model, fullgraph=True, backend=self.backend, **options)

    def backend(self, module, inputs):
        names = of_our_kind([str(node.target) for node in module.graph.nodes if node.op != "placeholder"])
        run = torch._dynamo.lookup_backend("aot_eager")(module, inputs)

        def noted(*inputs):
            self.names = names
            return run(*inputs)

        return noted

    def __call__(self, x):
        return self.run(x)

    def is_ours(self):
        return all(name.startswith("cnnops.") for name in self.names)


class Block(nn.Module):
    """A module and functions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))

    def forward(self, x, scale=1.0):
        y = F.max_pool2d(F.relu(self.conv(x)), kernel_size=2)
        y = torch.conv2d(y, self.weight, padding="same")
        return F.avg_pool2d(torch.relu(y) + F.leaky_relu(y, 0.1), 2) * scale


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Twice(nn.Module):
    """A module under two names, in containers of torch.nn."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.again = self.layers[0]
        self.block = Block()

    def forward(self, x):
        return self.block(self.again(self.layers(x)))


@pytest.fixture
def x():
    return numbers(2, 3, 14, 14)


def twice():
    torch.manual_seed(1)
    return Twice().double()


def gradients(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.pow(2).sum(), list(model.parameters()))]


def assert_like(model, expected, x):
    torch.testing.assert_close(gradients(model, x), expected)


# --- modules ---


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_every_class_of_ours_replaces_torchs(cls):
    required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    module = cls(*[1 for p in required if p.kind is p.POSITIONAL_OR_KEYWORD])
    before, text = dict(vars(module)), repr(module)
    assert cnnops.convert(module) is module
    assert type(module) is getattr(cnnops.nn, cls.__name__) and repr(module) == text and vars(module) == before
    assert cnnops.convert(module) is module and type(module) in OURS.values()
    assert cnnops.restore(module) is module and type(module) is cls and vars(module) == before


def test_the_model_stays_the_same_but_for_who_computes(x):
    model = twice()
    expected = gradients(model, x)
    assert not any(name.startswith("cnnops") for name in families(lambda: gradients(model, x)))
    before = copy.deepcopy(model)
    parts = {name: (module, type(module), dict(vars(module))) for name, module in model.named_modules()}
    parameters, state = list(model.parameters()), model.state_dict()

    cnnops.convert(model)
    assert_ours(lambda: gradients(model, x))
    assert_like(model, expected, x)
    assert isinstance(model, Twice) and repr(model) == repr(before)
    assert model.again is model.layers[0]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    assert {name: vars(module) for name, module in model.named_modules()} == {n: p[2] for n, p in parts.items()}
    assert not any(name.startswith("cnnops") for name in families(lambda: before(x)))  # a copy is another model
    assert families(lambda: before.block.forward(x))[0].startswith("aten")

    cnnops.restore(model)
    for name, module in model.named_modules():
        assert parts[name] == (module, type(module), vars(module))
    assert_equal(model(x), before(x))


def test_whichever_part_is_called_or_converted(x):
    model = cnnops.convert(twice())
    assert_ours(lambda: model.block(x))
    assert_ours(lambda: model.block.forward(x, scale=2.0))
    assert list(inspect.signature(model.block.forward).parameters) == ["x", "scale"]
    half = twice()
    cnnops.convert(half.block)
    assert type(half) is Twice and type(half.again) is nn.Conv2d
    assert_like(half, gradients(twice(), x), x)


def test_hooks_training_mode_and_optimizers_survive(x):
    trained = []
    for change in (lambda model: model, cnnops.convert):
        model, calls = twice(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for module in (model.again, model.block):
            module.register_forward_pre_hook(lambda module, args, calls=calls: calls.append("before"))
            module.register_forward_hook(lambda module, args, y, calls=calls: calls.append("after"))
            module.register_full_backward_hook(lambda module, gx, gy, calls=calls: calls.append("backward"))
            module.register_state_dict_post_hook(lambda module, *rest, calls=calls: calls.append("state"))
        model.layers.eval()
        change(model)
        assert model.training and not model.again.training
        for _ in range(3):
            optimizer.zero_grad()
            model(x * 1).pow(2).sum().backward()
            optimizer.step()
        trained.append((model.state_dict(), calls))
    (expected, calls), (got, our_calls) = trained
    torch.testing.assert_close(got, expected)
    assert our_calls == calls and {"before", "after", "backward", "state"} == set(calls)


def test_parametrizations_survive(x):
    model = twice()
    parametrizations.weight_norm(model.again)
    parametrizations.spectral_norm(model.block)
    model.eval()
    other, expected, keys = copy.deepcopy(model), gradients(model, x), list(model.state_dict())
    cnnops.convert(model)
    assert_ours(lambda: gradients(model, x))
    assert_like(model, expected, x)
    assert list(model.state_dict()) == keys and repr(model) == repr(other)
    assert not any(name.startswith("cnnops") for name in families(lambda: other(x)))
    assert_ours(lambda: copy.deepcopy(model)(x))
    parametrizations.weight_norm(model.layers[0], "bias", dim=None)  # added to what was converted
    parametrize.remove_parametrizations(model.block, "weight")
    assert_ours(lambda: model(x))
    cnnops.restore(model)
    assert type(model.block) is Block and nn.Conv2d in type(model.again).__bases__
    assert not any(name.startswith("cnnops") for name in families(lambda: model(x)))


@pytest.mark.parametrize("name", [cls.__name__ for cls in OURS if cls.__name__.startswith("Lazy")])
def test_lazy_modules(name):
    model = cnnops.convert(nn.Sequential(getattr(nn, name)(4, 3)))
    assert_ours(lambda: model(torch.randn(1, 2, 5, 5)))
    settled = name.removeprefix("Lazy")
    assert type(model[0]) is getattr(cnnops.nn, settled) and type(cnnops.restore(model)[0]) is getattr(nn, settled)


def test_models_made_of_our_modules_can_be_restored():
    model = nn.Sequential(cnnops.nn.Conv2d(3, 4, 3, algorithm="reference"), cnnops.nn.ReLU())
    assert [type(module) for module in cnnops.restore(model)] == [nn.Conv2d, nn.ReLU]
    assert cnnops.convert(model)[0].algorithm == "reference"


# --- what else is done with models ---


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_are_converted_models(change, x):
    model = cnnops.convert(twice())
    other = change(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert other.again is other.layers[0] and other.again is not model.again
    assert_ours(lambda: other(x))
    assert_like(other, gradients(model, x), x)
    assert type(cnnops.restore(other)) is Twice


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, x):
    torch.compiler.reset()
    model = twice()
    expected = gradients(model, x)
    compiled = Compiled(model, dynamic=dynamic)
    for change, ours in (lambda model: model, False), (cnnops.convert, True), (cnnops.restore, False):
        change(model)
        torch.testing.assert_close(compiled(x), expected[0])
        assert len(compiled.names) > 5 and compiled.is_ours() is ours
        compiled.parameters = model.parameters
        assert_like(compiled, expected, x)


def test_inductor(x):
    torch.compiler.reset()
    model = cnnops.convert(twice())
    assert_like(torch.compile(model, fullgraph=True), gradients(twice(), x), x)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, x):
    model = cnnops.convert(twice().eval())
    program = torch.export.export(model, (x,), strict=strict)
    assert_ours(lambda: program.module()(x))
    torch.testing.assert_close(program.module()(x), model(x))


def test_symbolic_trace(x):
    model = cnnops.convert(twice())
    traced = torch.fx.symbolic_trace(model)
    assert cnnops.functional.max_pool2d in {node.target for node in traced.graph.nodes}
    assert_ours(lambda: gradients(traced, x))
    assert_like(traced, gradients(model, x), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace(x):
    model = cnnops.convert(twice().eval())
    traced = torch.jit.trace(model, x)
    assert_ours(lambda: traced(x))
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant, x):
    model, results = cnnops.convert(twice()).block, []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        leaf = x.clone().requires_grad_()
        names = families(lambda run=run, leaf=leaf: run(leaf).pow(2).sum().backward())
        results.append([leaf.grad, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert names.count("cnnops::conv2d") == 4 and all(name.startswith("cnnops::") for name in names)
    torch.testing.assert_close(*results)


def test_function_transforms(x):
    """The mode that reroutes functions is active under vmap and jvp as well."""
    model, expected = cnnops.convert(twice().eval()), twice().eval()
    parameters = dict(model.named_parameters())

    def loss(parameters, x, model=model):
        return torch.func.functional_call(model, parameters, x).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(loss)(parameters, x), torch.func.grad(loss)(parameters, x, expected))
    for transform in (
        lambda model: torch.func.vmap(lambda x: loss(parameters, x[None], model))(x),
        lambda model: torch.func.jvp(model, (x,), (x.cos(),)),
    ):
        torch.testing.assert_close(transform(model), transform(expected))


def test_parallel_wrappers(x):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        for model in (cnnops.convert(wrap(twice())), wrap(cnnops.convert(twice()))):
            assert_ours(lambda model=model: model(x).sum().backward())
    finally:
        torch.distributed.destroy_process_group()
    replica = cnnops.convert(twice())._replicate_for_data_parallel()
    assert_ours(lambda: replica.block(x))


# --- the report ---


class Quiet(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


def test_what_is_left_alone_is_said(caplog):
    replaced = nn.ReLU()
    replaced.forward = lambda x: x
    model = nn.Sequential(
        *[nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Linear(1, 1), nn.Dropout(), nn.GELU(), nn.Unfold(2), Block()],
        nn.Sequential(nn.Conv1d(1, 1, 1), nn.FractionalMaxPool2d(2, 1), nn.AvgPool3d(2)),
        Quiet(1, 1, 1),
        nn.Conv2d(1, 1, 1, dtype=torch.complex64),
        replaced,
        torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(1, 1))),
        torch.ao.nn.quantized.ReLU6(),
        torch.fx.symbolic_trace(Calls(F.relu)),
        torch.fx.symbolic_trace(nn.Sequential(nn.Flatten())),
    )
    expected = [
        ("7.0", "Conv1d", "cnnops.nn has no Conv1d"),
        ("7.1", "FractionalMaxPool2d", "cnnops.nn has no FractionalMaxPool2d"),
        ("7.2", "AvgPool3d", "cnnops.nn has no AvgPool3d"),
        ("8", "Quiet", "a subclass of torch.nn.Conv2d: only the functions that it calls are replaced"),
        ("9", "Conv2d", "its parameters are torch.complex64"),
        ("10", "ReLU", "its forward has been replaced"),
        ("11.0", "ReLU", "compiled by TorchScript"),
        ("12", "ReLU6", "a module of torch.ao's quantization"),
        ("13", "Calls", "written by torch.fx: the functions in its graph stay"),
    ]
    assert cnnops.left_alone(model) == expected
    with caplog.at_level(logging.INFO, "cnnops"):
        cnnops.convert(model)
    assert cnnops.left_alone(model) == expected
    assert caplog.messages == [
        "converted 2 modules; left alone: " + "; ".join(map("{0[0]} ({0[1]}): {0[2]}".format, expected))
    ]
    assert isinstance(model[8], Quiet) and type(model[9]) is nn.Conv2d and type(model[10]) is nn.ReLU
    assert_ours(lambda: model[8](torch.randn(1, 1, 3, 3)))
    assert cnnops.left_alone(cnnops.convert(twice())) == []


# --- torchvision ---

NOTES = """resnet18 alexnet squeezenet1_0 vgg16 densenet161 inception_v3 googlenet shufflenet_v2_x1_0 mobilenet_v2
resnext50_32x4d wide_resnet50_2 mnasnet1_0""".split()
IN_DOUBLE = ["resnet18", "googlenet", "mobilenet_v2"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in NOTES] + [(name, torch.float64) for name in IN_DOUBLE],
    ids=NOTES + [f"{name}-float64" for name in IN_DOUBLE],
)
def test_torchvision(name, dtype):
    """The models of the lecture notes; `make models` runs all."""
    row = torchvision_models.check(name, dtype)
    assert (row.torchs, row.left_alone) == ([], [])
    assert row.passed, row
    assert name != "vgg16" or row.parameters == 138_357_544
