"""The operators on the GPU that is there, in all that tests/test_cuda_*.py prove of its kernels in emulation.

Every algorithm, pass, type of number and layout, TF32, and the law of the same bits, also on another stream and from a
graph. Without a GPU a slice of the cases runs on the CPU, by the algorithms that both devices have: so these tests are
known to work before the day when they are needed. Where there is one, most other tests of operators run on it as well;
`pytest -m gpu` takes all that do.
"""

import cuda_helpers
import pytest
import torch
from cases import AVG_POOL2D, CONV2D, MAX_POOL2D, Conv2dCase
from circumstances import Subject, changes
from cuda_helpers import HALVES, LAYOUTS, PASSES, assert_rounds_well, assert_same, draw, dtypes, real_dtypes
from helpers import DEVICES, Conv2dOperands, accepts, numbers, or_refusal, run_pass
from test_cuda_activation import activation_input
from test_cuda_conv2d import conv2d_expected, conv2d_operands, small_groups
from test_cuda_implicit_gemm import tiled_cases
from test_cuda_pool2d import indices_seen, max_backward, max_pool2d_input
from test_same_bits import (
    BATCH,
    CONV2D_NAMES,
    activation_subjects,
    assert_law_holds,
    conv2d_subject,
    named,
    pooling_subjects,
)
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The type of numbers, and whether torch's switch allows TF32.
MATH = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
ON_A_CPU = [
    "asymmetric",
    "stride-3",
    "channels-prime",
    "two-layer-1",
    "dilated-strided",
    "padded-excluded",
    "depthwise",
]

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_math = pytest.mark.parametrize("math", MATH)
every_pass = pytest.mark.parametrize("which", PASSES)


def algorithms(device):
    """All on a GPU; on a CPU those that are called the same there."""
    return [name for name in cnnops.ops.algorithms(device) if device == "cuda" or name in cuda_helpers.ALGORITHMS]


def on_devices(table, few=ON_A_CPU):
    return [(device, case) for device in DEVICES for case in table if device == "cuda" or case.name in few]


def every_case(table):
    return pytest.mark.parametrize("device, case", on_devices(table), ids=str)


def every_conv2d(table, few=ON_A_CPU):
    rows = [(device, name, case) for device, case in on_devices(table, few) for name in algorithms(device)]
    return pytest.mark.parametrize("device, algorithm, case", rows, ids=str)


@pytest.fixture
def allow_tf32(math):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=MATH[math][1]):
        yield


def rounds_to_tf32(device, algorithm, math):
    return (
        MATH[math][1] and (device, algorithm) == ("cuda", "implicit_gemm") and torch.cuda.get_device_capability()[0] > 7
    )


def symmetric(case):
    """The emulation's own cases are padded at the beginning alone."""
    rest = (case.kernel, case.stride, case.padding, case.dilation, case.groups, case.bias)
    return Conv2dCase(f"tiles-{case.name}", case.n, case.c, case.h, case.w, case.k, *rest)


def operands(case, dtype, layout, device):
    t = Conv2dOperands(*conv2d_operands(case, dtype))
    return t.to(device, dtype).formatted(FORMATS[layout])


# --- right ---


@every_layout
@every_math
@every_conv2d([*(case for case in CONV2D if case.n), *map(symmetric, tiled_cases())])
def test_conv2d(device, algorithm, case, math, layout, allow_tf32):
    dtype = MATH[math][0]
    t = operands(case, dtype, layout, device)
    for which in PASSES:
        with or_refusal(algorithm):
            got = run_pass(which, t, case, algorithm).cpu()
            tf32 = rounds_to_tf32(device, algorithm, math)
            expected = conv2d_expected(case, which, dtype if dtype in HALVES else torch.float32, tf32)
            assert_rounds_well(got, *expected)


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@every_pass
def test_float32_stays_float32(which):
    """Without TF32 the error is float32's; where the switch allows it, TF32's."""
    case = Conv2dCase("precision", 1, 64, 6, 6, 16, (3, 3), padding=(1, 1))
    t, (expected, _) = operands(case, torch.float32, "channels_last", "cuda"), conv2d_expected(case, which)
    errors = []
    for allowed in False, True:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            errors.append(float((run_pass(which, t, case).cpu() - expected).norm() / expected.norm()))
    assert errors[0] < 2e-6
    if torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-4 < errors[1] < 4e-4


@every_layout
@real_dtypes
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@every_device
def test_borders(device, mode, dtype, layout):
    case = Conv2dCase("borders", 2, 16, 7, 6, 9, (3, 3), stride=(1, 2))
    x, w, gy = draw(31, *case.input_shape), draw(32, *case.weight_shape), draw(33, 2, 9, 9, 4)
    x, w, gy = (t.to(dtype).double() for t in (x, w, gy))

    def results(conv2d, x, w, gy):
        x, w = (t.detach().requires_grad_() for t in (x, w))
        y = conv2d(x, w)
        return [y.detach(), *torch.autograd.grad(y, (x, w), gy)]

    def exact(x, w):
        return TF.conv2d(TF.pad(x, (2, 2, 2, 2), mode), w, stride=case.stride)

    expected, magnitude = results(exact, x, w, gy), results(exact, x.abs(), w.abs(), gy.abs())
    moved = (t.to(device, dtype).contiguous(memory_format=FORMATS[layout]) for t in (x, w, gy))
    ours = results(lambda x, w: F.conv2d(x, w, stride=case.stride, padding=2, padding_mode=mode), *moved)
    for which, got, e, m in zip(PASSES, ours, expected, magnitude, strict=True):
        if which == "grad_input" and dtype in HALVES:  # that of the padded image is rounded, then folded
            assert ((got.cpu().double() - e).abs() <= torch.finfo(dtype).eps * m).all()
        else:
            assert_rounds_well(got.cpu(), e, m)


def gradient(y, x, gy):
    return torch.autograd.grad(y, x, gy.to(y.device))[0].cpu()


@every_layout
@pytest.mark.parametrize("values", ["random", "ties", "special"])
@real_dtypes
@every_case([case for case in MAX_POOL2D if all(2 * p <= k for p, k in zip(case.padding, case.kernel, strict=True))])
def test_max_pool2d(device, case, dtype, values, layout):
    x, seen = max_pool2d_input(case, dtype, values), indices_seen(case)
    expected, indices = TF.max_pool2d(x, **case.max_arguments, return_indices=True)
    x = x.to(device).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    y, at = F.max_pool2d(x, **case.max_arguments, return_indices=True)
    assert_same(y.detach().cpu(), expected)
    assert torch.equal(at.cpu()[seen], indices[seen])
    gy = draw(8, *case.output_shape).to(dtype) * seen
    assert_rounds_well(gradient(y, x, gy), *max_backward(case.input_shape, indices, gy))


def assert_averages_well(function, ours, x, gy, device, layout):
    """A pooling that is linear, and its gradient."""

    def of(x, gy):
        x = x.double().requires_grad_()
        y = function(x)
        return y.detach(), gradient(y, x, gy.double())

    (y, gx), (y_magnitude, gx_magnitude) = of(x, gy), of(x.abs(), gy.abs())
    x = x.to(device).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    got = ours(x)
    assert_rounds_well(got.detach().cpu(), y, y_magnitude.abs())
    assert_rounds_well(gradient(got, x, gy), gx, gx_magnitude.abs())


@every_layout
@real_dtypes
@every_case(AVG_POOL2D)
def test_avg_pool2d(device, case, dtype, layout):
    x, gy = draw(10, *case.input_shape).to(dtype), draw(11, *case.output_shape).to(dtype)
    rest = case.avg_arguments
    ours, theirs = (lambda x, library=library: library.avg_pool2d(x, **rest) for library in (F, TF))
    assert_averages_well(theirs, ours, x, gy, device, layout)


@every_layout
@real_dtypes
@pytest.mark.parametrize("size, out", [((7, 9), (3, 4)), ((5, 6), (1, 1)), ((3, 4), (7, 6)), ((30, 20), (1, 2))])
@every_device
def test_adaptive_pooling(device, size, out, dtype, layout):
    x, gy = draw(23, 2, 3, *size).to(dtype), draw(24, 2, 3, *out).to(dtype)
    ours, theirs = (lambda x, library=library: library.adaptive_avg_pool2d(x, out) for library in (F, TF))
    assert_averages_well(theirs, ours, x, gy, device, layout)
    expected, indices = TF.adaptive_max_pool2d(x, out, return_indices=True)
    x = x.to(device).contiguous(memory_format=FORMATS[layout]).requires_grad_()
    y, at = F.adaptive_max_pool2d(x, out, return_indices=True)
    assert_same(y.detach().cpu(), expected)
    assert torch.equal(at.cpu(), indices)
    assert_rounds_well(gradient(y, x, gy), *max_backward(x.shape, indices, gy))


@dtypes(*cuda_helpers.NUMBERS)
@pytest.mark.parametrize("size", [1, 31, 1025, 5000])
@every_device
def test_relu(device, size, dtype):
    x = activation_input(12, size, dtype)
    expected, on_device = torch.where(x < 0, 0, x), x.to(device)
    assert_same(F.relu(on_device).cpu(), expected)
    assert_same(F.relu_(on_device).cpu(), expected)


@real_dtypes
@pytest.mark.parametrize("name, rest", [("relu", ()), ("relu6", ()), ("hardtanh", (-0.7, 0.1)), ("leaky_relu", (0.3,))])
@every_device
def test_activations(device, name, rest, dtype):
    """What is not finite is in test_activation.py."""
    x, gy = draw(14, 2, 3, 41, 13).to(dtype), draw(15, 2, 3, 41, 13).to(dtype)
    results = []
    for library, where, kind in (F, device, dtype), (TF, "cpu", torch.float64):
        leaf = x.to(where, kind).requires_grad_()
        y = getattr(library, name)(leaf, *(torch.tensor(v, dtype=dtype).item() for v in rest))
        results.append([y.detach().cpu(), gradient(y, leaf, gy.to(kind))])
    for got, expected in zip(*results, strict=True):
        assert_rounds_well(got, expected, expected.abs())


@real_dtypes
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 2000), (700, 2), (2, 70, 3)], ids=str)
@every_device
def test_prelu(device, shape, dtype):
    x, gy, w = draw(16, *shape).to(dtype), draw(17, *shape).to(dtype), draw(18, shape[1]).to(dtype)

    def of(library, where, kind, x, gy, w):
        leaves = [t.to(where, kind).requires_grad_() for t in (x, w)]
        y = library.prelu(*leaves)
        return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, gy.to(where, kind)))]

    expected = of(TF, "cpu", torch.float64, x, gy, w)
    terms = torch.where(x > 0, 0, (gy.double() * x.double()).abs()).transpose(0, 1).flatten(1).sum(1)
    magnitudes = expected[0].abs(), expected[1].abs(), terms
    for got, e, m in zip(of(F, device, dtype, x, gy, w), expected, magnitudes, strict=True):
        assert_rounds_well(got, e, m)


# --- the same bits ---


def on_another_stream(subject):
    expected, stream = subject(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = subject()
    stream.synchronize()
    yield "stream", "beside the current one", expected, got


def from_a_graph(subject):
    """Captured with other numbers, and replayed with these."""
    expected, operands = subject(), [*subject.batched, *subject.shared]
    others = [t.flip(-1) if t.is_floating_point() else t for t in operands]  # positions stay where they may be
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured = [torch.empty_like(t).copy_(other) for t, other in zip(operands, others, strict=True)]
        inside = Subject(subject.function, captured, [])
        inside()
        graph.capture_begin()
        got = inside()
        graph.capture_end()
        for t, original in zip(captured, operands, strict=True):
            t.copy_(original)
        graph.replay()
    stream.synchronize()
    yield "graph", "captured with other numbers", expected, got


def assert_same_bits(subject, device):
    assert_law_holds(subject, changes)
    if device == "cuda":
        assert_law_holds(subject, on_another_stream)
        assert_law_holds(subject, from_a_graph)


@every_layout
@every_math
@every_conv2d(named(CONV2D, CONV2D_NAMES), few=["1x1-image-1x1"])
def test_bits_of_conv2d(device, algorithm, case, math, layout, allow_tf32):
    t = operands(case, MATH[math][0], layout, device)
    for which in PASSES:
        with or_refusal(algorithm):
            subject = conv2d_subject(which, case, t, lambda *args: run_pass(*args, algorithm))
            assert_same_bits(subject, device)


@every_layout
@real_dtypes
@every_device
def test_bits_of_all_others(device, dtype, layout):
    def tensor(*shape, seed=()):
        return numbers(*shape, seed=seed).to(device, dtype).contiguous(memory_format=FORMATS[layout])

    x, gy, w = tensor(BATCH, 5, 13, 17), tensor(BATCH, 5, 13, 17, seed="gy"), numbers(5).to(device, dtype)
    filters, bias = tensor(8, 5, 3, 3), numbers(8).to(device, dtype)
    y, _ = torch.ops.cnnops.max_pool2d(F.conv2d(x, filters, bias), (2, 2), (2, 2))
    pooled = {"pool_kernel_size": 2, "activation": "relu"}

    def backward(x, gy, filters, bias):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.conv_relu_max_pool2d(x, filters, bias, **pooled), x, gy)

    blocks = [
        Subject(lambda x, w, b: F.conv_relu_max_pool2d(x, w, b, **pooled), [x], [filters, bias]),
        Subject(backward, [x, torch.ones_like(y)], [filters, bias]),
    ]
    for subject in [*pooling_subjects(tensor(BATCH, 19, 13, 12)), *activation_subjects(x, gy, w), *blocks]:
        assert_same_bits(subject, device)


@every_device
def test_implicit_gemm_takes_what_its_cases_are_for(device):
    """The tiles' own cases are refused by no table that has the algorithm."""
    if "implicit_gemm" not in cnnops.ops.algorithms(device):
        pytest.skip("no such algorithm on this device")
    for case in map(symmetric, tiled_cases()):
        t = operands(case, torch.float32, "channels_last", device)
        assert small_groups(case) or all(accepts(which, t, case, "implicit_gemm") for which in PASSES)
