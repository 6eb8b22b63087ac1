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
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import AVG_POOL2D, CONV2D, MAX_POOL2D
from torch.nn import functional as TF

ROOT = Path(__file__).parent.parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-DCNNOPS_EMULATE", "-Itests/cuda_on_cpu", "-Icsrc"]
FLAGS += shlex.split(os.environ.get("CNNOPS_EMULATE_FLAGS", ""))  # say, -fsanitize=address -g

pytestmark = pytest.mark.skipif(not shutil.which(CXX[0]), reason="needs a C++ compiler")

LARGEST = 2e6  # flops of a case
DTYPES = [torch.float32, torch.float64]
PASSES = ["forward", "grad_input", "grad_weight"]
ALGORITHMS = ["direct", "im2col", "reference"]
UNBOUNDED = 2**31 - 1
ORDERS = [  # order of threads, most blocks of a grid, elements from which on indices take 64 bits
    (0, UNBOUNDED, UNBOUNDED),
    (1, 3, UNBOUNDED),
    (2, UNBOUNDED, 0),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


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
        integers = (ctypes.c_int64 * 16)(*conv2d_integers(case))
        return self.library.cnnops_workspace(self.algorithms.index(algorithm), PASSES.index(which), integers)

    def call(self, name, integers, *tensors, slope=0.0):
        """Runs a kernel once, in the order of threads set last."""
        dtypes = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
        assert len(dtypes) == 1 and all(t is None or t.is_contiguous() for t in tensors)
        error = self.library.cnnops_call(
            name.encode(),
            dtypes == {torch.float64},
            (ctypes.c_int64 * 16)(*integers),
            (ctypes.c_void_p * len(tensors))(*(t if t is None else t.data_ptr() for t in tensors)),
            ctypes.c_double(slope),
        )
        if error:
            raise RuntimeError(error.decode())

    def set_order(self, order=0, grid_limit=UNBOUNDED, index_limit=UNBOUNDED):
        self.library.cnnops_settings(order, ctypes.c_int64(grid_limit), ctypes.c_int64(index_limit))

    def run(self, name, integers, inputs, *outputs, slope=0.0):
        """Runs a kernel in every order. `outputs` are (shape, dtype): what was written there, the same each time."""
        results = []
        for order in ORDERS:
            self.set_order(*order)
            poisoned = [poison(shape, dtype) for shape, dtype in outputs]
            self.call(name, integers, *inputs, *poisoned, slope=slope)
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
    kind = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).double()


def assert_rounds_well(got, expected, magnitude):
    """`magnitude` is the same sum over absolute values, in units of which rounding errors are measured."""
    error = (got.double() - expected).abs()
    bound = 8 * torch.finfo(got.dtype).eps * magnitude + 1e-300
    assert got.shape == expected.shape and bool((error <= bound).all()), f"error {(error / bound).max() * 8:.1f} units"


# Convolution


def conv2d_integers(case):
    pairs = [(case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation]
    return [case.n, case.c, case.k, case.groups, *(i for pair in pairs for i in pair)]


def conv2d_operands(case):
    x, w, gy = draw(1, *case.input_shape), draw(2, *case.weight_shape), draw(3, *case.output_shape)
    return x, w, draw(4, case.k) if case.bias else None, gy


@cache
def conv2d_expected(case, which):
    """What is right, and the same over absolute values."""

    def of(x, w, b, gy):
        if which == "forward":
            return TF.conv2d(x, w, b, **case.arguments)
        mask = [which == "grad_input", which == "grad_weight", False]
        rest = (None, case.stride, case.padding, case.dilation, False, (0, 0), case.groups, mask)
        return torch.ops.aten.convolution_backward(gy, x, w, *rest)[mask.index(True)]

    operands = conv2d_operands(case)
    return of(*operands), of(*(t if t is None else t.abs() for t in operands))


def conv2d(kernels, case, which, algorithm, x, w, b, gy):
    inputs, shape = {
        "forward": ((x, w, b), case.output_shape),
        "grad_input": ((gy, w, None), case.input_shape),
        "grad_weight": ((gy, x, None), case.weight_shape),
    }[which]
    return kernels.run(f"conv2d/{which}/{algorithm}", conv2d_integers(case), inputs, (shape, x.dtype))


def conv2d_cases():
    cases = [replace(case, n=min(case.n, 3)) for case in CONV2D if case.n]
    return [case for case in cases if case.flops <= LARGEST]


def refused(case, which):
    """What the direct algorithm is not for."""
    c, k, taps = case.c // case.groups, case.k // case.groups, case.kernel[0] * case.kernel[1]
    produce, reduce = (c, k) if which == "grad_input" else (k, c)
    return produce > 32 and reduce * taps > 32


@every_dtype
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", conv2d_cases(), ids=str)
def test_conv2d(kernels, case, algorithm, which, dtype):
    operands = [t if t is None else t.to(dtype) for t in conv2d_operands(case)]
    if algorithm == "direct" and refused(case, which):
        with pytest.raises(RuntimeError, match="the direct algorithm is for few channels"):
            conv2d(kernels, case, which, algorithm, *operands)
        return
    try:
        got = conv2d(kernels, case, which, algorithm, *operands)
    except RuntimeError as refusal:
        if algorithm != "direct" or "shared memory" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    assert_rounds_well(got, *conv2d_expected(case, which))


@every_dtype
@pytest.mark.parametrize("which", PASSES[:2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["asymmetric", "stride-3", "depthwise-multiplier", "1x1-image-1x1", "row-of-17"])
def test_conv2d_of_an_image_alone_has_the_bits_it_has_in_a_batch(kernels, name, algorithm, which, dtype):
    case = replace(next(case for case in CONV2D if case.name == name), n=5)
    x, w, b, gy = (t if t is None else t.to(dtype) for t in conv2d_operands(case))
    together = conv2d(kernels, case, which, algorithm, x, w, b, gy)
    for i in range(case.n):
        alone = conv2d(kernels, replace(case, n=1), which, algorithm, x[i : i + 1].clone(), w, b, gy[i : i + 1].clone())
        assert same_bits(alone, together[i : i + 1])


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


def pool2d_integers(case):
    pairs = [(case.h, case.w), case.out, case.kernel, case.stride, case.padding, case.dilation]
    return [case.n, case.c, *(i for pair in pairs for i in pair)] + [case.count_include_pad, case.divisor_override or 0]


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


@every_dtype
@pytest.mark.parametrize("values", ["random", "ties", "special"])
@pool2d_cases([case for case in MAX_POOL2D if all(2 * p <= k for p, k in zip(case.padding, case.kernel, strict=True))])
def test_max_pool2d(kernels, case, values, dtype):
    wide = case.kernel[0] * case.kernel[1] > 256
    integers = pool2d_integers(case)
    x = max_pool2d_input(case, dtype, values).requires_grad_()
    expected, indices = TF.max_pool2d(x, **case.max_arguments, return_indices=True)
    seen = indices_seen(case)
    for family, position in [("max_pool2d_wide", torch.int32)] + [("max_pool2d", torch.uint8)] * (not wide):
        positions, y = kernels.run(
            f"{family}/forward", integers, (x,), (case.output_shape, position), (case.output_shape, dtype)
        )
        assert_same(y, expected)
        assert torch.equal(indices_of(case, positions)[seen], indices[seen])
        gathered = kernels.run(f"{family}/gather", integers, (x, positions), (case.output_shape, dtype))
        assert_same(gathered[seen], expected[seen])
        gy = draw(8, *case.output_shape).to(dtype)
        gx = kernels.run(f"{family}/backward", integers, (gy, positions), (case.input_shape, dtype))
        exact = torch.zeros(case.input_shape).double().flatten(2)
        exact.scatter_add_(2, (indices * seen).flatten(2), (gy * seen).double().flatten(2))
        torch.testing.assert_close(gx.double().flatten(2), exact, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


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


@every_dtype
@pool2d_cases(AVG_POOL2D)
def test_avg_pool2d(kernels, case, dtype):
    integers = pool2d_integers(case)
    x, gy = draw(10, *case.input_shape), draw(11, *case.output_shape)

    def of(x, gy):
        x = x.clone().requires_grad_()
        y = TF.avg_pool2d(x, **case.avg_arguments)
        return y.detach(), torch.autograd.grad(y, x, gy)[0]

    (y, gx), (y_magnitude, gx_magnitude) = of(x, gy), of(x.abs(), gy.abs())
    got = kernels.run("avg_pool2d", integers, (x.to(dtype),), (y.shape, dtype))
    assert_rounds_well(got, y, y_magnitude.abs())
    got = kernels.run("avg_pool2d_backward", integers, (gy.to(dtype),), (x.shape, dtype))
    assert_rounds_well(got, gx, gx_magnitude.abs())


# Activations

SIZES = [1, 31, 1024, 1025, 5000]


def activation_input(seed, size, dtype):
    x = draw(seed, size).to(dtype)
    for i, value in enumerate([float("nan"), float("inf"), float("-inf"), -0.0, 0.0]):
        x[i + 7 :: 41] = value
    return x


@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_relu(kernels, size, dtype):
    x, gy = activation_input(12, size, dtype), draw(13, size).to(dtype)
    y = kernels.run("relu", [size], (x,), (x.shape, dtype))
    assert_same(y, TF.relu(x))
    gx = kernels.run("relu_backward", [size], (gy, y), (x.shape, dtype))
    assert_same(gx, torch.where(y <= 0, 0, gy))


@every_dtype
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slope", [0.01, -0.5])
def test_leaky_relu(kernels, size, slope, dtype):
    x, gy = activation_input(14, size, dtype), draw(15, size).to(dtype)
    y = kernels.run("leaky_relu", [size], (x,), (x.shape, dtype), slope=slope)
    assert_same(y, TF.leaky_relu(x, slope))
    gx = kernels.run("leaky_relu_backward", [size], (gy, x), (x.shape, dtype), slope=slope)
    assert_same(gx, torch.where(x > 0, gy, gy * torch.tensor(slope, dtype=dtype)))


@every_dtype
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
