"""The CUDA kernels without a GPU: their own sources, compiled for the CPU and emulated (cuda_on_cpu/emulation.h).

Every kernel runs with its threads in three orders, outputs poisoned beforehand, and must give the same bits in each;
torch in float64 says what is right. With AddressSanitizer, which has to be there before Python is:

    export CNNOPS_EMULATE_FLAGS="-fsanitize=address -g"
    python -c "import test_cuda_on_cpu; test_cuda_on_cpu.build()"  # in tests/
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \\
        pytest tests/test_cuda_on_cpu.py
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import AVG_POOL2D, CONV2D, MAX_POOL2D, Conv2dCase
from torch.nn import functional as TF

ROOT = Path(__file__).parent.parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-DCNNOPS_EMULATE", "-Itests/cuda_on_cpu", "-Icsrc"]
FLAGS += shlex.split(os.environ.get("CNNOPS_EMULATE_FLAGS", ""))  # say, -fsanitize=address -g

pytestmark = pytest.mark.skipif(not shutil.which(CXX[0]), reason="needs a C++ compiler")

LARGEST = 2e6  # flops of a case
DTYPES = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
NUMBERS = DTYPES + HALVES + INTEGERS  # in the order of ForNumbers
LAYOUTS = ["contiguous", "channels_last"]
BORDERS = ["zeros", "reflect", "replicate", "circular"]
PASSES = ["forward", "grad_input", "grad_weight"]
ALGORITHMS = ["direct", "im2col", "reference"]
UNBOUNDED = 2**31 - 1
ORDERS = [  # order of threads, most blocks of a grid, elements from which on indices take 64 bits
    (0, UNBOUNDED, UNBOUNDED),
    (1, 3, UNBOUNDED),
    (2, UNBOUNDED, 0),
]


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


def build():
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests/cuda_on_cpu/harness.cpp"]
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("tests/cuda_on_cpu/*.h")]
    content = b"".join(path.read_bytes() for path in sorted(sources + headers)) + repr((CXX, FLAGS)).encode()
    folder = ROOT / "build" / "cuda_on_cpu" / hashlib.sha256(content).hexdigest()[:16]
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def run(*arguments):
        subprocess.run([*CXX, *FLAGS, *map(str, arguments)], cwd=ROOT, check=True)

    objects = [folder / f"{source.name}.{os.getpid()}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source, to: run("-x", "c++", "-c", source, "-o", to), sources, objects))
    fresh = folder / f"{os.getpid()}.so"
    run("-shared", *objects, "-o", fresh)
    for path in objects:
        path.unlink()
    return fresh.replace(library)  # in one step: other processes may be building it as well


class Kernels:
    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.cnnops_call.restype = self.library.cnnops_algorithm.restype = ctypes.c_char_p
        self.library.cnnops_workspace.restype = ctypes.c_int64

    @property
    def algorithms(self):
        names = [self.library.cnnops_algorithm(i) for i in range(len(ALGORITHMS) + 1)]
        return [name.decode() for name in names if name]

    def workspace(self, algorithm, which, case):
        integers = (ctypes.c_int64 * 18)(*conv2d_integers(case))
        return self.library.cnnops_workspace(self.algorithms.index(algorithm), PASSES.index(which), integers)

    def call(self, name, integers, *tensors, reals=()):
        """Runs a kernel once, in the order of threads set last. The type of numbers is that of the first tensor."""
        assert all(t is None or t.is_contiguous() for t in tensors)
        error = self.library.cnnops_call(
            name.encode(),
            NUMBERS.index(tensors[0].dtype),
            (ctypes.c_int64 * 18)(*integers),
            (ctypes.c_void_p * len(tensors))(*(t if t is None else t.data_ptr() for t in tensors)),
            (ctypes.c_double * 2)(*reals),
        )
        if error:
            raise RuntimeError(error.decode())

    def set_order(self, order=0, grid_limit=UNBOUNDED, index_limit=UNBOUNDED):
        self.library.cnnops_settings(order, ctypes.c_int64(grid_limit), ctypes.c_int64(index_limit))

    def run(self, name, integers, inputs, *outputs, reals=()):
        """Runs a kernel in every order. `outputs` are (shape, dtype): what was written there, the same each time."""
        results = []
        for order in ORDERS:
            self.set_order(*order)
            poisoned = [poison(shape, dtype) for shape, dtype in outputs]
            self.call(name, integers, *inputs, *poisoned, reals=reals)
            results.append(poisoned)
        self.set_order()
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert same_bits(a, b), "the order of threads or blocks shows in the result"
        return results[0][0] if len(outputs) == 1 else results[0]


@pytest.fixture(scope="session")
def kernels():
    return Kernels(build())


def poison(shape, dtype):
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


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


def assert_rounds_well(got, expected, magnitude):
    """`magnitude` is the same sum over absolute values, in units of which rounding errors are measured. A 16-bit result
    is a float32 sum, rounded once."""
    info = torch.finfo(got.dtype)
    bound = 8 * (info.eps if info.bits > 16 else 2**-23) * magnitude + 1e-300
    if info.bits == 16:
        bound += 0.501 * (info.eps * expected.abs()).clamp_min(info.smallest_normal * info.eps)
    error = (got.double() - expected).abs()
    assert got.shape == expected.shape and bool((error <= bound).all()), f"error {(error / bound).max():.2f} of bound"


# Convolution


@dataclass(frozen=True)
class Bordered(Conv2dCase):
    """A case with another padding below and to the right, and a border."""

    end: tuple[int, int] = (0, 0)
    border: str = "zeros"

    @property
    def out(self):
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.padding, self.end, self.dilation, strict=True)
        return tuple((i + p + e - d * (k - 1) - 1) // s + 1 for i, k, s, p, e, d in sizes)

    def padded(self, x):
        (top, left), (below, right) = self.padding, self.end
        mode = {"zeros": "constant"}.get(self.border, self.border)
        x = TF.pad(x, (left, max(right, 0), top, max(below, 0)), mode)
        return x[:, :, : x.shape[2] + min(below, 0), : x.shape[3] + min(right, 0)]


def conv2d_integers(case, layout="contiguous"):
    pairs = [(case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation]
    border = BORDERS.index(getattr(case, "border", "zeros"))
    return [case.n, case.c, case.k, case.groups, *(i for pair in pairs for i in pair), LAYOUTS.index(layout), border]


def conv2d_operands(case, dtype=torch.float32):
    """x, w, b, gy in float64, made of numbers that `dtype` has."""
    x, w, gy = draw(1, *case.input_shape), draw(2, *case.weight_shape), draw(3, *case.output_shape)
    b = draw(4, case.k) if case.bias else None
    return [t if t is None or dtype not in HALVES else t.to(dtype).double() for t in (x, w, b, gy)]


@cache
def conv2d_expected(case, which, dtype=torch.float32):
    """What is right, and the same over absolute values."""

    def of(x, w, b, gy):
        arguments, padding = case.arguments, case.padding
        if isinstance(case, Bordered):
            x, arguments, padding = case.padded(x), {**case.arguments, "padding": 0}, (0, 0)
        if which == "forward":
            return TF.conv2d(x, w, b, **arguments)
        mask = [which == "grad_input", which == "grad_weight", False]
        rest = (None, case.stride, padding, case.dilation, False, (0, 0), case.groups, mask)
        gradient = torch.ops.aten.convolution_backward(gy, x, w, *rest)[mask.index(True)]
        if isinstance(case, Bordered) and which == "grad_input":  # of a border of zeros
            (top, left), (below, right) = case.padding, case.end
            return TF.pad(gradient, (-left, -right, -top, -below))
        return gradient

    operands = conv2d_operands(case, dtype)
    return of(*operands), of(*(t if t is None else t.abs() for t in operands))


def conv2d(kernels, case, which, algorithm, x, w, b, gy, layout="contiguous"):
    inputs, shape = {
        "forward": ((x, w, b), case.output_shape),
        "grad_input": ((gy, w, None), case.input_shape),
        "grad_weight": ((gy, x, None), case.weight_shape),
    }[which]
    inputs, output = [to_memory(t, layout) for t in inputs], (shape_in_memory(shape, layout), x.dtype)
    integers = conv2d_integers(case, layout)
    return from_memory(kernels.run(f"conv2d/{which}/{algorithm}", integers, inputs, output), layout)


def conv2d_cases():
    cases = [replace(case, n=min(case.n, 3)) for case in CONV2D if case.n]
    return [case for case in cases if case.flops <= LARGEST]


def refused(case, which):
    """What the direct algorithm is not for."""
    c, k, taps = case.c // case.groups, case.k // case.groups, case.kernel[0] * case.kernel[1]
    produce, reduce = (c, k) if which == "grad_input" else (k, c)
    return produce > 32 and reduce * taps > 32


def check_conv2d(kernels, case, algorithm, which, dtype, layout):
    operands = [t if t is None else t.to(dtype) for t in conv2d_operands(case, dtype)]
    if algorithm == "direct" and refused(case, which):
        with pytest.raises(RuntimeError, match="the direct algorithm is for few channels"):
            conv2d(kernels, case, which, algorithm, *operands, layout)
        return
    try:
        got = conv2d(kernels, case, which, algorithm, *operands, layout)
    except RuntimeError as refusal:
        if algorithm != "direct" or "shared memory" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    assert_rounds_well(got, *conv2d_expected(case, which, dtype if dtype in HALVES else torch.float32))


@every_layout
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", conv2d_cases(), ids=str)
def test_conv2d(kernels, case, algorithm, which, dtype, layout):
    check_conv2d(kernels, case, algorithm, which, dtype, layout)


SOME = ["notes", "asymmetric", "stride-3-dilation-2", "depthwise-strided", "channels-prime", "batch-of-13", "lecture-1"]


@pytest.mark.parametrize(
    "dtype, layout",
    [
        (torch.float32, "channels_last"),
        (torch.float64, "contiguous"),
        *((h, layout) for h in HALVES for layout in LAYOUTS),
    ],
)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", [case for case in conv2d_cases() if case.name in SOME], ids=str)
def test_conv2d_in_every_type(kernels, case, algorithm, which, dtype, layout):
    check_conv2d(kernels, case, algorithm, which, dtype, layout)


def bordered_cases():
    """Borders are as wide as they may be in at least one place; all but zeros must be narrower than the image."""
    for border in BORDERS:
        options = [
            ("same", 2, 3, 9, 8, 5, (4, 3), {"padding": (1, 1), "end": (2, 1)}),
            ("none-before", 2, 4, 7, 9, 6, (3, 5), {"padding": (0, 0), "end": (2, 6), "groups": 2}),
            ("strided", 1, 3, 11, 10, 4, (3, 2), {"padding": (3, 5), "end": (4, 1), "stride": (3, 2)}),
            ("dilated", 2, 5, 6, 70, 5, (3, 3), {"padding": (4, 5), "end": (5, 2), "dilation": (4, 3), "groups": 5}),
            ("wide", 1, 2, 5, 6, 3, (3, 3), {"padding": (4, 5), "end": (4, 5)}),
            ("many-channels", 1, 35, 4, 5, 34, (2, 3), {"padding": (1, 1), "end": (0, 1)}),
        ]
        if border == "zeros":
            options += [
                ("cut-off", 2, 3, 9, 10, 5, (3, 3), {"padding": (1, 2), "end": (-3, -1)}),
                ("cut-off-strided", 2, 4, 9, 10, 5, (2, 2), {"end": (-2, -4), "stride": (2, 3)}),
                ("end-over-kernel", 1, 2, 4, 3, 3, (2, 2), {"padding": (1, 0), "end": (5, 7)}),
            ]
        if border == "circular":
            options.append(("whole-image", 1, 2, 5, 6, 3, (3, 3), {"padding": (5, 6), "end": (5, 6)}))
        if border == "replicate":
            options.append(("one-pixel", 2, 3, 1, 1, 4, (3, 2), {"padding": (1, 1), "end": (1, 0)}))
        for *sizes, rest in options:
            sizes[0] = f"{border}-{sizes[0]}"
            yield Bordered(*sizes, **rest, border=border)


@pytest.mark.parametrize(
    "dtype, layout", [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")], ids=LAYOUTS
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "case, which",
    [
        (case, which)
        for case in bordered_cases()
        for which in PASSES
        if which != "grad_input" or case.border == "zeros"  # others are folded back in a step of their own
    ],
    ids=str,
)
def test_conv2d_beyond_the_border(kernels, case, algorithm, which, dtype, layout):
    check_conv2d(kernels, case, algorithm, which, dtype, layout)


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in bordered_cases() if "cut-off" not in case.name], ids=str)
def test_fold_border(kernels, case, layout, dtype):
    x = torch.zeros(case.input_shape, dtype=torch.float64, requires_grad=True)
    sizes = zip(case.out, case.stride, case.kernel, case.dilation, strict=True)
    h, w = ((o - 1) * s + (k - 1) * d + 1 for o, s, k, d in sizes)  # what a stride leaves over at the end is cut off
    padded = case.padded(x)[:, :, :h, :w]
    gradient = draw(21, *padded.shape).to(dtype)

    def of(gradient):
        return torch.autograd.grad(padded, x, gradient.double(), retain_graph=True)[0]

    inputs, shape = (to_memory(gradient, layout),), shape_in_memory(x.shape, layout)
    got = kernels.run("fold_border", conv2d_integers(case, layout), inputs, (shape, dtype))
    assert_rounds_well(from_memory(got, layout), of(gradient), of(gradient.abs()))


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["stride-3", "stride-over-kernel", "groups"])
def test_the_gradient_of_the_input_takes_a_bias(kernels, name, algorithm, layout, dtype):
    """As a transposed convolution has one, also where no tap meets an input."""
    case = next(case for case in CONV2D if case.name == name)
    _, w, _, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case, dtype))
    bias = draw(22, case.c).to(dtype)
    inputs = [to_memory(gy, layout), to_memory(w, layout), bias]
    shape = shape_in_memory(case.input_shape, layout)
    got = kernels.run(f"conv2d/grad_input/{algorithm}", conv2d_integers(case, layout), inputs, (shape, dtype))
    expected, magnitude = conv2d_expected(case, "grad_input", dtype if dtype in HALVES else torch.float32)
    bias = bias.double()[:, None, None]
    assert_rounds_well(from_memory(got, layout), expected + bias, magnitude + bias.abs())


@every_layout
@pytest.mark.parametrize("which", PASSES[:2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["asymmetric", "stride-3", "depthwise-multiplier", "1x1-image-1x1", "row-of-17"])
def test_conv2d_of_an_image_alone_has_the_bits_it_has_in_a_batch(kernels, name, algorithm, which, dtype, layout):
    case = replace(next(case for case in CONV2D if case.name == name), n=5)
    x, w, b, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case))
    together = conv2d(kernels, case, which, algorithm, x, w, b, gy, layout)
    for i in (0, 3):
        image = x[i : i + 1].clone(), w, b, gy[i : i + 1].clone()
        alone = conv2d(kernels, replace(case, n=1), which, algorithm, *image, layout)
        assert same_bits(alone, together[i : i + 1].contiguous())


def test_algorithms(kernels):
    assert kernels.algorithms == ALGORITHMS


def test_workspace_is_bounded_and_does_not_look_at_the_batch(kernels):
    for case in CONV2D:
        for which in PASSES:
            for algorithm in ALGORITHMS:
                sizes = {kernels.workspace(algorithm, which, replace(case, n=n)) for n in (1, 7, 100_000)}
                assert len(sizes) == 1 and sizes.pop() <= 512 * 64 * 64, (case, which, algorithm)


def test_an_image_too_large_for_32_bits_is_refused(kernels):
    case = replace(CONV2D[0], h=2**17, w=2**17)
    operand = torch.zeros(1)
    for algorithm in ("direct", "im2col"):
        with pytest.raises(RuntimeError, match=f"the {algorithm} algorithm counts within an image in 32 bits"):
            kernels.call(f"conv2d/forward/{algorithm}", conv2d_integers(case), operand, operand, None, operand)


# Pooling


def pool2d_integers(case, layout="contiguous"):
    pairs = [(case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation]
    integers = [case.n, case.c, *(i for pair in pairs for i in pair), LAYOUTS.index(layout)]
    return [*integers, False, case.count_include_pad, case.divisor_override or 0]


def pool2d_cases(table):
    cases = [replace(case, n=min(case.n, 2), c=min(case.c, 3)) for case in table if case.n]
    return pytest.mark.parametrize("case", cases, ids=str)


def indices_of(case, positions):
    """Torch's indices, which count places of a plane, for ours, which count places of a window."""
    kh, kw = positions.long() // case.kernel[1], positions.long() % case.kernel[1]
    oh, ow = torch.arange(case.out[0])[:, None], torch.arange(case.out[1])
    h = oh * case.stride[0] - case.padding[0] + kh * case.dilation[0]
    w = ow * case.stride[1] - case.padding[1] + kw * case.dilation[1]
    return h * case.w + w


def max_pool2d_input(case, dtype, values):
    x = draw(5, *case.input_shape).to(dtype)
    if values == "ties":
        x = x.round()
    if values == "special":
        x[draw(6, *x.shape) > 1] = float("-inf")
        x[draw(7, *x.shape) > 1.5] = float("nan")
    return x


def run_in(kernels, layout, name, integers, inputs, *outputs, **rest):
    """Kernels.run() for (n, c, h, w) tensors, which lie in memory as `layout` says."""
    inputs = [to_memory(t, layout) for t in inputs]
    got = kernels.run(name, integers, inputs, *((shape_in_memory(s, layout), dtype) for s, dtype in outputs), **rest)
    return from_memory(got, layout) if len(outputs) == 1 else [from_memory(t, layout) for t in got]


@pytest.mark.parametrize(
    "dtype, values, layout",
    [
        (torch.float32, "random", "contiguous"),
        (torch.float32, "special", "channels_last"),
        (torch.float64, "ties", "channels_last"),
        (torch.float16, "special", "contiguous"),
    ],
)
@pool2d_cases([case for case in MAX_POOL2D if all(2 * p <= k for p, k in zip(case.padding, case.kernel, strict=True))])
def test_max_pool2d(kernels, case, dtype, values, layout):
    wide = case.kernel[0] * case.kernel[1] > 256
    integers = pool2d_integers(case, layout)
    x = max_pool2d_input(case, dtype, values)
    expected, indices = TF.max_pool2d(x, **case.max_arguments, return_indices=True)
    seen = indices_seen(case)
    for family, position in [("max_pool2d_wide", torch.int32)] + [("max_pool2d", torch.uint8)] * (not wide):
        outputs = (case.output_shape, position), (case.output_shape, dtype)
        positions, y = run_in(kernels, layout, f"{family}/forward", integers, (x,), *outputs)
        assert_same(y, expected)
        assert torch.equal(indices_of(case, positions)[seen], indices[seen])
        gathered = run_in(kernels, layout, f"{family}/gather", integers, (x, positions), (case.output_shape, dtype))
        assert_same(gathered[seen], expected[seen])
        gy = draw(8, *case.output_shape).to(dtype)
        gx = run_in(kernels, layout, f"{family}/backward", integers, (gy, positions), (case.input_shape, dtype))
        assert_rounds_well(gx, *max_backward(case.input_shape, indices, gy * seen))


def max_backward(shape, indices, gy):
    """The gradient of max pooling, and the same over absolute values."""

    def of(gy):
        return torch.zeros(shape).double().flatten(2).scatter_add_(2, indices.flatten(2), gy.double().flatten(2))

    # A window that sees nothing has an index that means nothing.
    indices = indices.clamp(0, shape[2] * shape[3] - 1)
    return of(gy).view(shape), of(gy.abs()).view(shape)


def indices_seen(case):
    """Which windows see an input at all: dilation can jump over a small one. Torch's indices of others mean nothing."""
    ones = torch.ones(1, 1, case.h, case.w)
    return (TF.max_pool2d(ones, **case.max_arguments) == 1).expand(case.output_shape)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected.detach(), rtol=0, atol=0, equal_nan=True)


@every_dtype
def test_gather_takes_any_position(kernels, dtype):
    case = next(case for case in MAX_POOL2D if case.name == "dilated-strided")
    x = draw(9, *case.input_shape).to(dtype)
    positions = torch.randint(-(2**31), 2**31 - 1, case.output_shape, dtype=torch.int32)
    y = kernels.run("max_pool2d_wide/gather", pool2d_integers(case), (x, positions), (case.output_shape, dtype))
    assert not y.isnan().any()
    positions = torch.randint(0, 255, case.output_shape, dtype=torch.uint8)
    y = kernels.run("max_pool2d/gather", pool2d_integers(case), (x, positions), (case.output_shape, dtype))
    assert not y.isnan().any()


@pytest.mark.parametrize(
    "dtype, layout",
    [
        (torch.float32, "contiguous"),
        (torch.float64, "channels_last"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "contiguous"),
    ],
    ids=["float32", "float64-channels_last", "bfloat16-channels_last", "float16"],
)
@pool2d_cases(AVG_POOL2D)
def test_avg_pool2d(kernels, case, dtype, layout):
    x, gy = draw(10, *case.input_shape).to(dtype), draw(11, *case.output_shape).to(dtype)
    check_average(
        kernels, lambda x: TF.avg_pool2d(x, **case.avg_arguments), pool2d_integers(case, layout), x, gy, layout
    )


def check_average(kernels, function, integers, x, gy, layout):
    def of(x, gy):
        x = x.double().requires_grad_()
        y = function(x)
        return y.detach(), torch.autograd.grad(y, x, gy.double())[0]

    (y, gx), (y_magnitude, gx_magnitude) = of(x, gy), of(x.abs(), gy.abs())
    got = run_in(kernels, layout, "avg_pool2d", integers, (x,), (y.shape, x.dtype))
    assert_rounds_well(got, y, y_magnitude.abs())
    got = run_in(kernels, layout, "avg_pool2d_backward", integers, (gy,), (x.shape, x.dtype))
    assert_rounds_well(got, gx, gx_magnitude.abs())


@pytest.mark.parametrize(
    "dtype, layout",
    [*zip(DTYPES, LAYOUTS, strict=True), *zip(HALVES, LAYOUTS, strict=True)],
    ids=["float32", "float64-channels_last", "bfloat16", "float16-channels_last"],
)
@pytest.mark.parametrize(
    "size, out",
    [((7, 9), (3, 4)), ((5, 6), (1, 1)), ((3, 4), (7, 6)), ((6, 10), (6, 5)), ((1, 1), (2, 3)), ((30, 20), (1, 2))],
    ids=str,
)
def test_adaptive_pooling(kernels, size, out, dtype, layout):
    n, c = 2, 3
    starts = [torch.arange(o) * i // o for i, o in zip(size, out, strict=True)]
    ends = [-(-(torch.arange(o) + 1) * i // o) for i, o in zip(size, out, strict=True)]
    kernel = [int((end - start).max()) for start, end in zip(starts, ends, strict=True)]
    integers = [n, c, *size, *out, *kernel, 1, 1, 0, 0, 1, 1, LAYOUTS.index(layout), True, True, 0]
    x, gy = draw(23, n, c, *size).to(dtype), draw(24, n, c, *out).to(dtype)
    check_average(kernels, lambda x: TF.adaptive_avg_pool2d(x, out), integers, x, gy, layout)
    y, indices = TF.adaptive_max_pool2d(x, out, return_indices=True)
    for family, position in [("max_pool2d_wide", torch.int32), ("max_pool2d", torch.uint8)]:
        if family == "max_pool2d" and kernel[0] * kernel[1] > 256:
            continue
        outputs = (y.shape, position), (y.shape, dtype)
        positions, got = run_in(kernels, layout, f"{family}/forward", integers, (x,), *outputs)
        assert_same(got, y)
        h = starts[0][:, None] + positions.long() // kernel[1]
        assert torch.equal(h * size[1] + starts[1] + positions.long() % kernel[1], indices)
        assert_same(run_in(kernels, layout, f"{family}/gather", integers, (x, positions), (y.shape, dtype)), y)
        gx = run_in(kernels, layout, f"{family}/backward", integers, (gy, positions), (x.shape, dtype))
        assert_rounds_well(gx, *max_backward(x.shape, indices, gy))


@real_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, c, size, out", [(1, 1, 1, 1), (2, 3, 40, 25), (2, 5, 12, 300), (1, 70, 9, 9)])
def test_max_unpool2d(kernels, n, c, size, out, layout, dtype):
    x = draw(25, n, c, 1, size).to(dtype)
    indices = torch.randint(-2, out + 2, x.shape, generator=torch.Generator().manual_seed(26))
    expected = torch.zeros(n, c, 1, out, dtype=dtype)
    for i in range(size):  # the last number of an index stays, and those beyond the plane are left out
        index, inside = indices[..., i : i + 1], (indices[..., i : i + 1] >= 0) & (indices[..., i : i + 1] < out)
        index = index.clamp(0, out - 1)
        expected.scatter_(3, index, torch.where(inside, x[..., i : i + 1], expected.gather(3, index)))
    got = run_in(
        kernels, layout, "max_unpool2d", [n, c, size, out, LAYOUTS.index(layout)], (x, indices), (expected.shape, dtype)
    )
    assert_same(got, expected)


# Activations

SIZES = [1, 31, 1024, 1025, 5000]


def activation_input(seed, size, dtype):
    if not dtype.is_floating_point:
        info, seeded = torch.iinfo(dtype), torch.Generator().manual_seed(seed)
        x = torch.randint(max(info.min, -9), 10, (size,), dtype=dtype, generator=seeded)
        x[3::41], x[5::41] = info.min, info.max
        return x
    x = draw(seed, size).to(dtype)
    for i, special in enumerate([float("nan"), float("inf"), float("-inf"), -0.0, 0.0]):
        x[i + 7 :: 41] = special
    return x


def run_in_place(kernels, name, integers, inputs, **rest):
    """The same with the output over the first input."""
    first = inputs[0].clone()
    kernels.call(name, integers, first, *inputs[1:], first, **rest)
    return first


def run_both_ways(kernels, name, inputs, **rest):
    x = inputs[0]
    y = kernels.run(name, [x.numel()], inputs, (x.shape, x.dtype), **rest)
    assert same_bits(y, run_in_place(kernels, name, [x.numel()], inputs, **rest))
    return y


@dtypes(*NUMBERS)
@pytest.mark.parametrize("size", SIZES)
def test_relu(kernels, size, dtype):
    x = activation_input(12, size, dtype)
    y = run_both_ways(kernels, "relu", (x,))
    assert_same(y, torch.where(x < 0, 0, x))
    if dtype.is_floating_point:
        gy = draw(13, size).to(dtype)
        assert_same(run_both_ways(kernels, "relu_backward", (gy, y)), torch.where(y <= 0, 0, gy))


@dtypes(*NUMBERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bounds", [(0, 6), (-0.7, 0.1), (-1000, 1000)])
def test_hardtanh(kernels, size, bounds, dtype):
    x = activation_input(27, size, dtype)
    if not dtype.is_floating_point:
        bounds = tuple(int(bound) for bound in bounds)
    y = run_both_ways(kernels, "hardtanh", (x,), reals=bounds)
    if dtype.is_floating_point:
        assert_same(y, TF.hardtanh(x, *bounds))
        gy, (low, high) = draw(28, size).to(dtype), torch.tensor(bounds, dtype=dtype)
        gx = run_both_ways(kernels, "hardtanh_backward", (gy, y), reals=bounds)
        assert_same(gx, torch.where((x <= low) | (x >= high), 0, gy))
    else:
        low, high = (min(max(bound, torch.iinfo(dtype).min), torch.iinfo(dtype).max) for bound in bounds)
        assert_same(y, x.clamp(low, high))


def test_integers_have_no_other_kernels(kernels):
    x = torch.ones(4, dtype=torch.int32)
    for name in ["relu_backward", "leaky_relu", "avg_pool2d", "max_pool2d/forward", "fold_border", "channel_sum"]:
        with pytest.raises(RuntimeError, match="no such kernel for this type"):
            kernels.call(name, [1] * 18, x, x, x, x)
    with pytest.raises(RuntimeError, match="no such algorithm"):
        kernels.call("conv2d/forward/reference", [1] * 18, x, x, x, x)


@real_dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slope", [0.01, -0.5])
def test_leaky_relu(kernels, size, slope, dtype):
    x, gy = activation_input(14, size, dtype), draw(15, size).to(dtype)
    exact = torch.tensor(slope, dtype=torch.float32 if dtype in HALVES else dtype)

    def of(values):
        return torch.where(x > 0, values, (values.to(exact.dtype) * exact).to(dtype))

    assert_same(run_both_ways(kernels, "leaky_relu", (x,), reals=(slope,)), of(x))
    assert_same(run_both_ways(kernels, "leaky_relu_backward", (gy, x), reals=(slope,)), of(gy))


@real_dtypes
@pytest.mark.parametrize(
    "n, channels, inner", [(1, 1, 1), (3, 5, 7), (2, 3, 2000), (700, 2, 1), (2, 70, 3), (5, 4, 511)]
)
def test_prelu_and_channel_sums(kernels, n, channels, inner, dtype):
    shape, size = (n, channels, inner), n * channels * inner
    x, gy, w = activation_input(16, size, dtype).view(shape), draw(17, *shape).to(dtype), draw(18, channels).to(dtype)
    y = kernels.run("prelu", [channels, inner, size], (x, w), (shape, dtype))
    assert_same(y, TF.prelu(x, w))
    gx = kernels.run("prelu_backward", [channels, inner, size], (gy, x, w), (shape, dtype))
    assert_same(gx, torch.where(x > 0, gy, gy * w[:, None]))
    terms = gy.double()
    sums = kernels.run("channel_sum", shape, (gy,), ((channels,), dtype))
    assert_rounds_well(sums, terms.sum((0, 2)), terms.abs().sum((0, 2)))
    x = x.nan_to_num(1, 1, -1)
    terms = torch.where(x > 0, 0, gy.double() * x.double())
    sums = kernels.run("prelu_grad_weight", shape, (gy, x), ((channels,), dtype))
    assert_rounds_well(sums, terms.sum((0, 2)), terms.abs().sum((0, 2)))


@every_dtype
def test_nothing_to_do(kernels, dtype):
    empty = torch.empty(0, dtype=dtype)
    kernels.run("relu", [0], (empty,), ((0,), dtype))
    sums = kernels.run("channel_sum", (0, 3, 5), (empty,), ((3,), dtype))
    assert_same(sums, torch.zeros(3, dtype=dtype))
    case = replace(CONV2D[0], n=0)
    x, w, b, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case))
    for algorithm in ALGORITHMS:
        for which in PASSES:
            got = conv2d(kernels, case, which, algorithm, x, w, b, gy)
            assert bool((got == 0).all())


# The emulation itself: kernels with a mistake planted in them (harness.cpp), and the same without.


@pytest.mark.parametrize("name, says", [("early_return", "not reached by every thread"), ("two_barriers", "waits at")])
def test_barriers_that_not_all_threads_reach_are_found(kernels, name, says):
    x = draw(19, 64).float()
    assert_same(kernels.run(f"planted/{name}", [64, 0], (x,), ((64,), x.dtype)), x)
    for order in ORDERS:
        kernels.set_order(*order)
        with pytest.raises(RuntimeError, match=says):
            kernels.call(f"planted/{name}", [64, 1], x, poison((64,), x.dtype))
    kernels.set_order()


@pytest.mark.parametrize("name, factor", [("reverse", 1), ("two_rounds", 3)])
@pytest.mark.parametrize("size", [32, 64])
def test_missing_barriers_show(kernels, name, factor, size):
    x = draw(20, size).float()
    got = kernels.run(f"planted/{name}", [size, 0], (x,), ((size,), x.dtype))
    assert_rounds_well(got, x.flip(0).double() * factor, x.flip(0).abs().double())
    with pytest.raises(AssertionError, match="the order of threads"):
        kernels.run(f"planted/{name}", [size, 1], (x,), ((size,), x.dtype))
