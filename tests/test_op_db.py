"""torch's own test material as a judge: every sample of its database of operators, ours beside torch's.

The database (`op_db`) says which dtypes each operator takes, and has sample inputs, a larger set of reference inputs,
and inputs that must raise. Values are compared with torch's bit by bit; where they differ, with torch's in float64.
"""

from functools import cache

import hypothesis
import pytest
import torch
from helpers import name_of, numbers
from torch import Tensor
from torch.autograd import forward_ad as fwAD
from torch.nn import functional as TF

from cnnops import functional as F

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]

DTYPES = {
    "conv2d": FLOATS,
    "conv_transpose2d": FLOATS,
    "linear": FLOATS,
    "max_pool2d": FLOATS + INTEGERS,
    "max_unpool2d": FLOATS,
    "avg_pool2d": [*FLOATS, torch.int64],
    "adaptive_avg_pool2d": FLOATS,
    "adaptive_max_pool2d": FLOATS,
    "relu": FLOATS + INTEGERS,
    "relu6": FLOATS + INTEGERS,
    "hardtanh": FLOATS + INTEGERS,
    "leaky_relu": FLOATS,
    "prelu": FLOATS,
}

# What torch takes and we refuse: (function, dtype) -> why.
REFUSED = {
    (name, dtype): why
    for name in ("conv2d", "conv_transpose2d", "linear")
    for dtype, why in {
        **dict.fromkeys(
            INTEGERS if name == "linear" else [torch.int64],
            "torch sums in integers on the CPU only, without gradients; no network is made of it",
        ),
        torch.complex64: "the kernels know real numbers only",
        torch.complex128: "the kernels know real numbers only",
    }.items()
}

every_operator = pytest.mark.parametrize("name", DTYPES)
every_dtype = pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes], ids=name_of
)


@cache
def database():
    """torch.testing._internal.common_methods_invocations, without what its import changes for other tests."""
    hypothesis.settings.register_profile("before", hypothesis.settings.default)
    frozen = torch.backends.flags_frozen()
    from torch.testing._internal import common_methods_invocations, common_modules

    torch.backends.__allow_nonbracketed_mutation_flag = not frozen
    hypothesis.settings.load_profile("before")
    return common_methods_invocations.op_db, common_modules.module_db


def rows(name):
    """The database's rows for a function: usually one, several where it has variants."""
    return [row for row in database()[0] if row.name == f"nn.functional.{name}"]


def samples(name, dtype):
    """Of all rows, as they are and with strides; the reference inputs begin with the sample inputs."""
    for row in rows(name):
        for sample in row.reference_inputs("cpu", dtype, requires_grad=dtype.is_floating_point, set_seed=False):
            yield sample
            yield sample.noncontiguous()


# --- comparison ---


def as_leaves(sample, dtype):
    """The sample with tensors of their own history, the floating-point ones of this dtype."""

    def leaf(t):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(dtype).requires_grad_(t.requires_grad)

    return sample.transform(leaf)


def in_float64(sample):
    """And not contiguous: torch's vector code has another gradient of hardtanh at NaN than its code for strides."""
    return as_leaves(sample, torch.float64).noncontiguous()


@cache
def cotangent(shape, dtype):
    return numbers(*shape).to(dtype)


def call(function, sample):
    outputs = function(sample.input, *sample.args, **sample.kwargs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def sources_of(sample):
    tensors = [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]
    return [t for t in tensors if t.requires_grad]


def gradients(outputs, sources, dtype):
    """Of all sources, for cotangents that `dtype` has."""
    outputs = [y for y in outputs if y.requires_grad]
    return torch.autograd.grad(outputs, sources, [cotangent(y.shape, dtype).to(y.dtype) for y in outputs])


def results(function, sample, dtype):
    """(outputs, gradients)"""
    outputs, sources = call(function, sample), sources_of(sample)
    return outputs, gradients(outputs, sources, dtype) if sources else []


def second_derivatives(function, sample):
    """The derivative of the gradients by the sources and by the cotangent."""
    y, sources = call(function, sample)[0], sources_of(sample)
    gy = cotangent(y.shape, y.dtype).clone().requires_grad_()
    grads = torch.autograd.grad(y, sources, gy, create_graph=True)
    directions = [cotangent(g.shape, g.dtype) for g in grads]
    return torch.autograd.grad(grads, [*sources, gy], directions, allow_unused=True, materialize_grads=True)


def tangents(function, sample):
    """The derivatives along a direction, by forward mode."""

    def dual(t):
        floating = isinstance(t, Tensor) and t.is_floating_point()
        return fwAD.make_dual(t.detach(), cotangent(t.shape, t.dtype)) if floating else t

    with fwAD.dual_level():
        return [fwAD.unpack_dual(y).tangent for y in call(function, sample.transform(dual)) if y.is_floating_point()]


def assert_rounded(got, exact):
    """Rounded once from a sum that was made in float32 at least; integers are the same."""
    if not got.is_floating_point() or got.numel() == 0:
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=0, atol=0)
        return
    exact = exact.to(got.dtype).double()
    atol = (1e-13 if got.dtype == torch.float64 else 1e-5) * exact.nan_to_num(0, 0, 0).abs().max().item()
    rtol = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=atol, equal_nan=True)


def strides(t):
    """Those that matter: a dimension of size 1 is never stepped along."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1] if t.numel() else []


def assert_alike(ours, theirs):
    """In everything but the numbers."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(our, what) == getattr(their, what), f"{what}: {getattr(our, what)}, {getattr(their, what)}"
        assert strides(our) == strides(their), f"strides: {our.stride()}, torch's {their.stride()}"


def compare(ours, theirs, sample, dtype):
    """The functions give the same for this sample: outputs, gradients, and all that can be asked of a tensor."""
    sample = as_leaves(sample, dtype)
    their, our = results(theirs, sample, dtype), results(ours, sample, dtype)
    assert_alike(our[0], their[0])
    exact = None
    for kind in 0, 1:
        for i, (mine, torchs) in enumerate(zip(our[kind], their[kind], strict=True)):
            assert mine.shape == torchs.shape and mine.dtype == torchs.dtype
            if not torch.equal(mine, torchs):
                exact = exact or results(theirs, in_float64(sample), dtype)
                assert_rounded(mine, exact[kind][i])


def for_each(samples, check):
    """Checks every sample, and names those that fail."""
    count, failures = 0, []
    for sample in samples:
        count += 1
        try:
            check(sample)
        except Exception as error:
            failures.append(f"{sample.summary()}\n    {type(error).__name__}: {str(error).strip()}")
    assert count > 0
    assert not failures, f"{len(failures)} of {count} samples:\n" + "\n".join(failures[:10])


# --- tests ---


@every_operator
def test_every_dtype_of_torch_is_decided(name):
    for row in rows(name):
        ours = {*DTYPES[name], *(dtype for function, dtype in REFUSED if function == name)}
        assert row.dtypes == ours


@every_dtype
def test_samples(name, dtype):
    ours, theirs = getattr(F, name), getattr(TF, name)
    for_each(samples(name, dtype), lambda sample: compare(ours, theirs, sample, dtype))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("relu", "relu6", "hardtanh", "leaky_relu") for dtype in DTYPES[name]],
    ids=name_of,
)
def test_in_place(name, dtype):
    def in_place(input, *args, **kwargs):
        x = input.clone()
        y = getattr(F, name)(x, *args, inplace=True, **kwargs)
        assert y is x
        return y

    for_each(samples(name, dtype), lambda sample: compare(in_place, getattr(TF, name), sample, dtype))


@pytest.mark.parametrize("derivative", [second_derivatives, tangents])
@every_operator
def test_further_derivatives(name, derivative):
    def check(sample):
        for got, expected in zip(derivative(ours, sample), derivative(theirs, in_float64(sample)), strict=True):
            assert_rounded(got, expected)

    ours, theirs = getattr(F, name), getattr(TF, name)
    for_each((s for row in rows(name) for s in row.sample_inputs("cpu", torch.float64, requires_grad=True)), check)


def error_of(function, sample):
    try:
        call(function, sample)
    except Exception as error:
        return error


@every_operator
def test_error_inputs(name):
    def check(sample):
        theirs, ours = error_of(getattr(TF, name), sample), error_of(getattr(F, name), sample)
        assert theirs is not None, "torch takes it"
        assert isinstance(ours, type(theirs)), f"{ours!r} instead of {theirs!r}"

    made = [e.sample_input for row in rows(name) if row.error_inputs_func for e in row.error_inputs("cpu")]
    if made:
        for_each(made, check)


@pytest.mark.parametrize(("name", "dtype"), REFUSED, ids=name_of)
def test_refused(name, dtype):
    def check(sample):
        with pytest.raises(NotImplementedError, match="no kernel for .* of dtype .*float32"):
            call(getattr(F, name), sample)

    for_each((s for row in rows(name) for s in row.sample_inputs("cpu", dtype)), check)
