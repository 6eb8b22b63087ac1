"""Fully connected layers: convolutions of images of one pixel. (test_nn.py and torch's database test them as well.)"""

import copy

import pytest
import torch
from helpers import numbers, same_bits
from torch import nn as tnn

import cnnops
from cnnops import functional as F
from cnnops import nn
from examples.models import MODELS


@pytest.mark.parametrize(
    ("input", "weight"), [((3, 7), (5, 6)), ((3, 7), (6,)), ((), (5, 1)), ((3, 7), (5, 7, 1))], ids=str
)
def test_bad_shapes(input, weight):
    with pytest.raises(RuntimeError, match=r"linear: expected input of shape \(\.\.\., C\)"):
        F.linear(numbers(*input), numbers(*weight))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)], ids=str)
def test_no_rows(shape):
    x, w = numbers(*shape).requires_grad_(), numbers(5, 7).requires_grad_()
    y = F.linear(x, w)
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert x.grad.shape == x.shape and not w.grad.any()


def test_second_derivatives():
    x, w, b = (numbers(*shape).requires_grad_() for shape in [(2, 3, 4), (5, 4), (5,)])
    assert torch.autograd.gradgradcheck(F.linear, (x, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "outputs"), [(7, 10), (37, 64), (512, 53), (3136, 10), (4100, 48)])
def test_a_row_has_the_same_bits_alone(channels, outputs, dtype, instruction_set):
    sizes = (9, channels), (outputs, channels), (outputs,), (9, outputs)
    x, w, b, grad = (numbers(*size).to(dtype) for size in sizes)

    def rows(n):
        row = x[n].clone().requires_grad_()
        y = F.linear(row, w, b)
        return y.detach(), *torch.autograd.grad(y, row, grad[n])

    torch.set_num_threads(2)
    together = rows(slice(None))
    assert all(same_bits(a[0], t[n]) for n in range(9) for a, t in zip(rows(slice(n, n + 1)), together, strict=True))


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"inference": True}], ids=str)
def test_a_whole_classifier_has_the_same_bits_for_every_batch(options):
    model = cnnops.convert(MODELS["two-layer"].build(tnn), linear=True, **options)
    digits = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        assert same_bits(model(digits)[:1], model(digits[:1]))


def test_convert_and_restore():
    model = MODELS["keras"].build(tnn).eval()
    layers = [module for module in model.modules() if type(module) is tnn.Linear]
    before = model(x := torch.randn(2, 1, 28, 28))
    cnnops.convert(model)
    assert all(type(module) is tnn.Linear for module in layers) and not cnnops.left_alone(model)
    cnnops.convert(model, linear=True)
    assert all(type(module) is nn.Linear for module in layers)
    assert type(copy.deepcopy(layers[0])) is nn.Linear
    torch.testing.assert_close(model(x), before)
    cnnops.restore(model)
    assert all(type(module) is tnn.Linear for module in layers) and torch.equal(model(x), before)
