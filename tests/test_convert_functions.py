"""The functions that a converted model's forward calls are ours, whatever they are called by."""

import pytest
import torch
from helpers import assert_equal, numbers
from test_convert import Calls, Compiled, assert_ours, families
from torch import nn
from torch.nn import functional as F

import cnnops
from cnnops.convert import FUNCTIONS, Reroute


@pytest.fixture
def x():
    return numbers(2, 3, 14, 14)


# One call at least of every function, by every name that it has.
CALLS = {
    "conv2d": [
        lambda x: F.conv2d(x, torch.ones(2, 3, 3, 3).to(x), stride=2),
        lambda x: torch.conv2d(input=x, weight=torch.ones(2, 1, 3, 3).to(x)[:, :1].repeat(3, 1, 1, 1), groups=3),
    ],
    "conv_transpose2d": [
        lambda x: F.conv_transpose2d(x, torch.ones(3, 2, 3, 3).to(x), stride=2),
        lambda x: torch.conv_transpose2d(x, torch.ones(3, 2, 2, 2).to(x), None, 2, 1, 1),
    ],
    "max_pool2d": [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, stride=1, return_indices=True)[0],
        lambda x: F.max_pool2d_with_indices(x, 2)[0],
        lambda x: torch.max_pool2d(x[0], (2, 3), padding=1),
    ],
    "max_unpool2d": [lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)],
    "avg_pool2d": [lambda x: F.avg_pool2d(x, 2), lambda x: F.avg_pool2d(input=x, kernel_size=3, divisor_override=2)],
    "adaptive_avg_pool2d": [lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, (3, None))],
    "adaptive_max_pool2d": [
        lambda x: F.adaptive_max_pool2d(x, (2, 5)),
        lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
        lambda x: F.adaptive_max_pool2d_with_indices(x, 2)[0],
    ],
    "lp_pool2d": [lambda x: F.lp_pool2d(x, 2, 3)],
    "relu": [F.relu, lambda x: F.relu(x * 1, inplace=True), torch.relu, torch.Tensor.relu, lambda x: x.relu()],
    "relu_": [lambda x: F.relu_(x * 1), lambda x: torch.relu_(x * 1), lambda x: (x * 1).relu_()],
    "relu6": [F.relu6, lambda x: F.relu6(x * 1, True)],
    "hardtanh": [F.hardtanh, lambda x: F.hardtanh(x * 1, -0.5, 0.25, inplace=True)],
    "hardtanh_": [lambda x: F.hardtanh_(x * 1, -0.5)],
    "leaky_relu": [F.leaky_relu, lambda x: F.leaky_relu(x * 1, 0.2, inplace=True)],
    "leaky_relu_": [lambda x: F.leaky_relu_(x * 1, 0.2)],
    "prelu": [
        lambda x: F.prelu(x, x.new_ones(3)),
        lambda x: torch.prelu(x, x.new_ones(1)),
        lambda x: x.prelu(x.sum()[None]),
    ],
}
NAMES = sorted({name for name, _ in FUNCTIONS.values()})


@pytest.mark.parametrize(
    "call", [pytest.param(call, id=f"{name}-{i}") for name in NAMES for i, call in enumerate(CALLS[name])]
)
def test_functions(call, x):
    results = []
    for model in (Calls(call), cnnops.convert(Calls(call))):
        leaf = x.clone().requires_grad_()
        names = families(lambda model=model, leaf=leaf: results.append(model(leaf)))
        results.append(torch.autograd.grad(results[-1].pow(2).sum(), leaf)[0])
    assert names and all(name.startswith("cnnops::") for name in names), names
    torch.testing.assert_close(results[2:], results[:2])


@pytest.mark.parametrize("name", NAMES)
def test_functions_compile(name, x):
    for call in CALLS[name]:
        torch.compiler.reset()
        model = cnnops.convert(Calls(call))
        compiled = Compiled(model)
        torch.testing.assert_close(compiled(x), model(x))
        in_place = name.endswith("_")  # torch.compile shows a mode x.relu_(), but neither torch.relu_ nor F.relu_
        assert compiled.names and (compiled.is_ours() or in_place)


def test_tensors_that_ours_do_not_take_go_to_torch():
    relu, conv = cnnops.convert(Calls(F.relu)), cnnops.convert(Calls(lambda x: F.conv2d(x, x)))
    for dtype in (torch.int32, torch.bfloat16, torch.float16):
        assert_equal(relu(torch.tensor([-1, 2], dtype=dtype)), torch.tensor([0, 2], dtype=dtype))
    assert conv(torch.ones(1, 1, 2, 2, dtype=torch.complex64)) == 4
    assert relu(torch.tensor([-1.0, 0, 2]).to_sparse()).layout is torch.sparse_coo
    assert relu(torch.empty(3, device="meta")).device.type == "meta"
    assert families(lambda: cnnops.convert(Calls(lambda x: F.max_pool1d(x, 2)))(torch.randn(1, 3, 8)))[0].startswith(
        "aten::"
    )


def test_errors_leave_nothing_behind(x):
    model = cnnops.convert(Calls(lambda x: F.max_pool2d(x, 99)))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(x)
    assert families(lambda: F.relu(x)) == ["aten::relu"]


def test_a_part_of_a_converted_model_does_not_reroute_again(x):
    stacks = []

    def look(x):
        stacks.append(torch.overrides._get_current_function_mode_stack())
        return x

    cnnops.convert(nn.Sequential(Calls(Calls(Calls(look))), Calls(look)))(x)
    assert [[type(mode) for mode in stack] for stack in stacks] == [[Reroute], [Reroute]]


def test_torch_nn_alone_costs_nothing(x):
    model = cnnops.convert(nn.Sequential(nn.Conv2d(3, 4, 3).double(), nn.ReLU(), nn.Flatten()))
    assert type(model) is nn.Sequential and type(model[2]) is nn.Flatten
    transformer = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)).eval()
    sequence = torch.randn(2, 5, 8)
    expected = transformer(sequence)
    with torch.no_grad():
        cnnops.convert(transformer)
        assert_ours(lambda: transformer(sequence))  # whose forward calls F.relu
        torch.testing.assert_close(transformer(sequence), expected)
