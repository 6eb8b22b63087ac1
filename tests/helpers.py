"""What several test files need: operands for a case, the three passes of a convolution by name, and comparisons."""

import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod

import pytest
import torch
from cases import Conv2dCase
from torch import Tensor
from torch.nn import functional as TF

import cnnops

DTYPES = [torch.float32, torch.float64]
PASSES = ["forward", "grad_input", "grad_weight"]


def _cuda_works():
    try:
        return torch.cuda.is_available() and bool(cnnops.ops.algorithms("cuda"))
    except RuntimeError:  # a CPU-only build
        return False


DEVICES = ["cpu", "cuda"] if _cuda_works() else ["cpu"]
ALGORITHMS = [(device, name) for device in DEVICES for name in cnnops.ops.algorithms(device)]

# The rounding of each dtype's kernels, against float64: the relative L2 error of a whole result of up to 5000 terms per
# sum (beyond, it may grow with their root), and the error of each element in units of eps * (the same sum over absolute
# values), which a sum in any sensible order stays within. float64 is compared with another float64, which errs as well.
# (Winograd's transforms mix an element with its neighbours: a small one beside large ones errs by up to 18 units.)
RELATIVE_L2 = {torch.float32: 2e-6, torch.float64: 4e-15}
UNITS = {torch.float32: 4, torch.float64: 8}


def name_of(value):
    """A test id for what pytest has no name of its own for."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def generator(*seed):
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def numbers(*shape, whole=False, seed=()):
    """Random float64 numbers: normal, or whole ones in -3..3, whose sums are exact in every dtype and every order."""
    draw = generator(shape, whole, seed)
    if whole:
        return torch.randint(-3, 4, shape, generator=draw).double()
    return torch.randn(shape, generator=draw, dtype=torch.float64).float().double()  # exact in float32 too


@dataclass
class Conv2dOperands:
    x: Tensor
    w: Tensor
    b: Tensor | None
    gy: Tensor

    def map(self, f):
        return Conv2dOperands(*(v if v is None else f(v) for v in (self.x, self.w, self.b, self.gy)))

    def to(self, *args, **kwargs):
        return self.map(lambda v: v.to(*args, **kwargs))

    def formatted(self, memory_format):
        return self.map(lambda v: v.contiguous(memory_format=memory_format) if v.dim() == 4 else v)


def conv2d_operands(case: Conv2dCase, whole=False) -> Conv2dOperands:
    def draw(*shape, seed):
        return numbers(*shape, whole=whole, seed=(str(case), seed))

    return Conv2dOperands(
        draw(*case.input_shape, seed="x"),
        draw(*case.weight_shape, seed="w"),
        draw(case.k, seed="b") if case.bias else None,
        draw(*case.output_shape, seed="gy"),
    )


def run_pass(which, t: Conv2dOperands, case: Conv2dCase, algorithm="auto"):
    """One of our three operators."""
    ops, rest = torch.ops.cnnops, (*case.arguments.values(), "zeros", algorithm)
    if which == "forward":
        return ops.conv2d(t.x, t.w, t.b, *rest)
    if which == "grad_input":
        return ops.conv2d_grad_input(t.gy, t.w, None, t.x.shape[2:], *rest)
    return ops.conv2d_grad_weight(t.gy, t.x, t.w.shape[2:], *rest)


def torch_pass(which, t: Conv2dOperands, case: Conv2dCase):
    """The same by torch."""
    if which == "forward":
        return TF.conv2d(t.x, t.w, t.b, **case.arguments)
    mask = [which == "grad_input", which == "grad_weight", False]
    rest = (None, case.stride, case.padding, case.dilation, False, (0, 0), case.groups, mask)
    return torch.ops.aten.convolution_backward(t.gy, t.x, t.w, *rest)[mask.index(True)]


@cache
def expected_pass(which, case: Conv2dCase, whole=False):
    """In float64: the result, and the same pass over absolute values, which is what rounding errors are measured by."""
    t = conv2d_operands(case, whole)
    return torch_pass(which, t, case), torch_pass(which, t.map(torch.abs), case)


def accepts(which, t: Conv2dOperands, case: Conv2dCase, algorithm):
    """Whether the algorithm takes this geometry. Where it does not, the table and the operator say so in one voice."""
    try:
        chosen = cnnops.ops.conv2d_algorithm(t.x, t.w, **case.arguments, algorithm=algorithm, which=which)
    except RuntimeError as refusal:
        sentence = str(refusal).splitlines()[0]
        assert algorithm in sentence and len(sentence.split()) > 4, sentence
        with pytest.raises(RuntimeError) as raised:
            run_pass(which, t, case, algorithm)
        assert algorithm in str(raised.value)
        return False
    assert chosen == algorithm
    return True


@contextmanager
def or_refusal(algorithm):
    """Lets an algorithm refuse what happens inside, in a sentence that has its name."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(f"{algorithm}.* refuses .*: ", str(error)):
            raise


def refused_by_processor(algorithm):
    """Why a processor without AVX512_BF16 refuses what needs it; nothing otherwise."""
    x = torch.ones(1, 32, 8, 8, dtype=torch.bfloat16)
    try:
        cnnops.ops.conv2d_algorithm(x, x.expand(32, -1, -1, -1)[..., :3, :3], algorithm=algorithm)
    except RuntimeError as refusal:
        sentence = str(refusal).splitlines()[0]
        return sentence if "AVX512_BF16" in sentence else None


def terms(which, case: Conv2dCase):
    """How many products an element of this pass sums."""
    outputs = {"forward": case.output_shape, "grad_input": case.input_shape, "grad_weight": case.weight_shape}[which]
    return case.flops / 2 / max(1, prod(outputs))


def runs_winograd(which, t: Conv2dOperands, case: Conv2dCase, algorithm="auto"):
    """Whether a transform with fractions does this: its rounding is that of all of a tile's neighbourhood."""
    settings = {"algorithm": algorithm, "which": which}
    return cnnops.ops.conv2d_algorithm(t.x, t.w, **case.arguments, **settings) == "winograd"


def assert_whole(got: Tensor, expected: Tensor, fractions=False):
    """Whole numbers: the same exactly; after `fractions` so near that nothing but rounding can be in between."""
    if fractions:
        assert (got.cpu() - expected.cpu()).abs().max() < 1e-2
        got = got.round()
    assert_equal(got, expected)


def assert_rounded_once(got: Tensor, exact: Tensor, fractions=False):
    """Whole numbers, but for the rounding to `got`'s dtype; after `fractions`, a tie may go either way."""
    if not fractions:
        return assert_equal(got, exact.to(got.dtype))
    assert got.shape == exact.shape
    assert (got.cpu() >= (exact - 1e-2).to(got.dtype)).all() and (got.cpu() <= (exact + 1e-2).to(got.dtype)).all()


def assert_rounds_well(got: Tensor, expected: Tensor, magnitude: Tensor, terms=1, fractions=False):
    """`got` is `expected` up to the rounding that its dtype allows; `magnitude` is the sum over absolute values."""
    assert got.shape == expected.shape
    error = got.double().cpu() - expected
    if got.numel() == 0:
        return
    relative = (error.norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    assert relative <= RELATIVE_L2[got.dtype] * max(1, terms / 5000) ** 0.5, f"relative L2 error {relative:.2e}"
    units = (error.abs() / (torch.finfo(got.dtype).eps * magnitude).clamp_min(1e-300)).max().item()
    assert units <= (24 if fractions else UNITS[got.dtype]), (
        f"an element is wrong by {units:.2f} eps * sum of absolute values"
    )


def assert_equal(got: Tensor, expected: Tensor):
    """The same numbers exactly, shape and dtype included; NaN equals NaN, and -0.0 equals 0.0."""
    torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def bits(t: Tensor):
    return (
        t.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()])
    )


def same_bits(a: Tensor, b: Tensor):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def awkward(t: Tensor):
    """(name, tensor) pairs with t's values and unusual strides."""
    if t.dim() == 4:
        yield "channels_last", t.clone(memory_format=torch.channels_last)
    if t.dim() >= 2:
        yield "transposed", t.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan)
    wide[..., 1::2] = t
    yield "every second column", wide[..., 1::2]
    padded = t.new_full([s + 2 for s in t.shape], torch.nan)
    inside = padded[tuple(slice(1, 1 + s) for s in t.shape)]
    yield "inside a larger tensor", inside.copy_(t)
    yield "off by one element", off_by(t, 1)


def off_by(t: Tensor, elements):
    """A dense copy whose memory starts so many elements into its storage, with rubbish on both sides."""
    storage = t.new_full((t.numel() + 2 * elements,), torch.nan if t.is_floating_point() else 99)
    return storage.as_strided(t.shape, torch.empty_like(t).stride(), elements).copy_(t)
