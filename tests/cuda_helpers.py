"""The emulated CUDA kernels for tests: tensors in, tensors out, in every order of threads."""

import os

import pytest
import torch
from emulated import SANITIZERS, Emulation, has_compiler

DTYPES = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NUMBERS = DTYPES + HALVES + INTEGERS
LAYOUTS = ["contiguous", "channels_last"]
PASSES = ["forward", "grad_input", "grad_weight"]
ALGORITHMS = ["depthwise", "implicit_gemm", "direct", "im2col", "reference"]
ORDERS = [
    {"order": 0, "poison": 0xFF},
    {"order": 1, "poison": 0x5A, "grid_limit": 3},
    {"order": 2, "poison": 0x5A, "index_limit": 0},
]
LAZY = [{**order, "copies": 1} for order in ORDERS]  # cp.async lands only at its wait

SANITIZER = os.environ.get("CNNOPS_EMULATE_SANITIZE", "")
assert SANITIZER in SANITIZERS, f"CNNOPS_EMULATE_SANITIZE is one of {[*SANITIZERS]}"

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


def dtypes(*dtypes):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))


every_dtype = dtypes(*DTYPES)
real_dtypes = dtypes(*DTYPES, *HALVES)
# Layouts change where numbers are and nothing else, so most cases see each with one type of number.
every_layout = pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float32, "contiguous"), (torch.float64, "channels_last")],
    ids=["float32", "float64-channels_last"],
)


def to_bytes(t):
    assert t is None or t.is_contiguous()
    return None if t is None else t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(data, shape, dtype):
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


class Kernels:
    def __init__(self, sanitizer=SANITIZER):
        self.emulation = Emulation(sanitizer)
        self.sanitizer = sanitizer

    def call(self, name, integers, inputs, *outputs, **rest):
        """Runs a kernel once. The type of numbers is that of the first input; `outputs` are (shape, dtype)."""
        kind = str(inputs[0].dtype).removeprefix("torch.")
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in outputs]
        results = self.emulation.call(name, kind, integers, [*map(to_bytes, inputs)], sizes, **rest)
        return [from_bytes(data, *output) for data, output in zip(results, outputs, strict=False)]

    def in_place(self, name, integers, inputs, **rest):
        """The same with the output over the first input."""
        kind = str(inputs[0].dtype).removeprefix("torch.")
        [data] = self.emulation.call(name, kind, integers, [*map(to_bytes, inputs)], in_place=True, **rest)
        return from_bytes(data, inputs[0].shape, inputs[0].dtype)

    def run(self, name, integers, inputs, *outputs, **rest):
        """Runs a kernel in every order, and if it uses cp.async with both ways in which that lands. `outputs` are
        (shape, dtype): what was written there, the same each time."""
        first, *others = ORDERS
        expected = self.call(name, integers, inputs, *outputs, **first, **rest)
        if self.emulation.copies_seen:
            others = others + LAZY
        for order in others:
            for a, b in zip(expected, self.call(name, integers, inputs, *outputs, **order, **rest), strict=True):
                if not same_bits(a, b):
                    a, b = (t.reshape(-1).view(torch.uint8)[:, None].view(-1, t.element_size()) for t in (a, b))
                    unwritten = ((a == first["poison"]) & (b == order["poison"])).all(1).sum().item()
                    assert not unwritten, f"{unwritten} elements of an output are written by no thread"
                    raise AssertionError(f"the order of threads, blocks or copies shows in the result: {order}")
        return expected[0] if len(outputs) == 1 else expected

    def run_in(self, layout, name, integers, inputs, *outputs, **rest):
        """run() for (n, c, h, w) tensors, which lie in memory as `layout` says."""
        inputs = [to_memory(t, layout) for t in inputs]
        got = self.run(name, integers, inputs, *((shape_in_memory(s, layout), dtype) for s, dtype in outputs), **rest)
        return from_memory(got, layout) if len(outputs) == 1 else [from_memory(t, layout) for t in got]

    def close(self):
        self.emulation.stop()


def same_bits(a, b):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).double()


def to_memory(t, layout):
    """The numbers of an (n, c, h, w) tensor in the order in which a layout has them."""
    return t if t is None or layout == "contiguous" or t.dim() < 4 else t.permute(0, 2, 3, 1).contiguous()


def shape_in_memory(shape, layout):
    n, *rest = shape
    return (n, *rest) if layout == "contiguous" else (n, *rest[1:], rest[0])


def from_memory(t, layout):
    return t if layout == "contiguous" else t.permute(0, 3, 1, 2).contiguous()


def assert_same(got, expected):
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=0, equal_nan=True)


def assert_rounds_well(got, expected, magnitude):
    """`magnitude` is the same sum over absolute values, in units of which rounding errors are measured. A 16-bit result
    is a float32 sum, rounded once."""
    info = torch.finfo(got.dtype)
    bound = 8 * (info.eps if info.bits > 16 else 2**-23) * magnitude + 1e-300
    if info.bits == 16:
        bound += 0.501 * (info.eps * expected.abs()).clamp_min(info.smallest_normal * info.eps)
    error = (got.double() - expected).abs()
    assert got.shape == expected.shape and bool((error <= bound).all()), f"error {(error / bound).max():.2f} of bound"
