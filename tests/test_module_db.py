"""torch's own test material for modules (`module_db`): every input of every module of ours, beside torch.nn's."""

import pytest
import torch
from helpers import name_of
from test_op_db import assert_alike, assert_rounded, database, for_each, gradients
from torch import nn as tnn

from cnnops import nn

FLOATS = [torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128, torch.complex32]

OURS = [name for name, kind in vars(nn).items() if isinstance(kind, type) and kind.__module__ == nn.__name__]
MODULES = [name for name in OURS if hasattr(tnn, name)]  # the blocks are ours alone: test_conv_block.py
NOT_IN_THE_DATABASE = ["MaxUnpool2d"]

# What torch takes and we refuse: (module, dtype) -> why.
REFUSED = {("ConvTranspose2d", dtype): "the kernels know real numbers only" for dtype in COMPLEX}

in_the_database = [name for name in MODULES if name not in NOT_IN_THE_DATABASE]
every_module = pytest.mark.parametrize("name", in_the_database)


def row(name):
    return next((row for row in database()[1] if row.module_cls is getattr(tnn, name)), None)


class Sample:
    """One ModuleInput: what the module is made from, and what it is called with."""

    def __init__(self, module_input):
        self.constructor, self.name = module_input.constructor_input, module_input.desc
        self.arguments = [*module_input.forward_input.args, *module_input.forward_input.kwargs.values()]

    def summary(self):
        shapes = [tuple(x.shape) for x in self.arguments]
        return f"{self.name}: args={self.constructor.args}, kwargs={self.constructor.kwargs}, inputs of {shapes}"

    def module(self, library, name, dtype):
        torch.manual_seed(7)
        return getattr(library, name)(*self.constructor.args, **self.constructor.kwargs).to(dtype)

    def inputs(self, dtype, strides=False):
        for x in self.arguments:
            x = torch.stack([x, x], dim=-1)[..., 0] if strides else x
            yield x.detach().to(dtype).requires_grad_(x.requires_grad)


def samples(name, dtype):
    return [
        Sample(made)
        for training in (True, False)
        for made in row(name).module_inputs_func(
            row(name), device="cpu", dtype=dtype, requires_grad=dtype.is_floating_point, training=training
        )
    ]


def results(library, name, sample, dtype, strides, computed_in=None):
    """(outputs, gradients of the inputs and the parameters)"""
    module = sample.module(library, name, dtype)
    if computed_in:
        module(*sample.inputs(dtype))  # where a lazy one gets its parameters
        module.to(computed_in)
    inputs = list(sample.inputs(computed_in or dtype, strides))
    outputs = module(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return outputs, gradients(outputs, [*inputs, *module.parameters()], dtype)


@every_module
def test_every_dtype_of_torch_is_decided(name):
    assert {*row(name).dtypes} == {*FLOATS, *(dtype for module, dtype in REFUSED if module == name)}


@pytest.mark.parametrize("name", NOT_IN_THE_DATABASE)
def test_a_module_without_samples(name):
    """Were this to fail, the module has samples now, and should leave the list."""
    assert row(name) is None


@pytest.mark.parametrize("strides", [False, True], ids=["contiguous", "strides"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@every_module
def test_samples(name, dtype, strides):
    def check(sample):
        ours, theirs = (results(library, name, sample, dtype, strides) for library in (nn, tnn))
        exact = results(tnn, name, sample, dtype, strides, computed_in=torch.float64)
        assert_alike(ours[0], theirs[0])
        for got, expected in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
            assert got.shape == expected.shape
            assert_rounded(got, expected)

    for_each(samples(name, dtype), check)


def test_error_inputs():
    """Raised by the constructor or the call, whichever torch's does."""
    checked = 0
    for name in in_the_database:
        make = row(name).module_error_inputs_func
        made = make(row(name), device="cpu", dtype=torch.float32, requires_grad=True, training=True) if make else []
        for error in made:
            sample, errors = Sample(error.module_error_input), []
            for library in nn, tnn:
                with pytest.raises(Exception) as raised:  # noqa: B017 - which one is what is looked at
                    sample.module(library, name, torch.float32)(*sample.inputs(torch.float32))
                errors.append(raised.value)
            assert isinstance(errors[0], type(errors[1])), f"{name}, {sample.summary()}: {errors}"
            checked += 1
    assert checked >= 3


@pytest.mark.filterwarnings("ignore:Complex")
@pytest.mark.parametrize(("name", "dtype"), REFUSED, ids=name_of)
def test_refused(name, dtype):
    def check(sample):
        with pytest.raises(NotImplementedError, match="no kernel for .* of dtype .*float32"):
            sample.module(nn, name, dtype)(*sample.inputs(dtype))

    for_each(samples(name, dtype), check)
