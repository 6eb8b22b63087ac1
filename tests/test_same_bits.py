"""Law 3, bit by bit: an element's bits depend on the numbers in its formula and on nothing else.

Not on the batch's size nor its place in it, not on the number of threads, the memory address or the run. Sums over the
batch (gradients of weights and biases) depend on the batch, of course, but on nothing else of these.
"""

from dataclasses import replace

import pytest
import torch
from cases import AVG_POOL2D, CONV2D, MAX_POOL2D, Conv2dCase
from circumstances import CONVOLUTIONS, OTHERS, Subject, Trial, changes, restridings
from helpers import (
    DTYPES,
    PASSES,
    Conv2dOperands,
    accepts,
    conv2d_operands,
    name_of,
    numbers,
    run_pass,
    same_bits,
    torch_pass,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import cnnops

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)

BATCH = 7
CONV2D_NAMES = [
    "two-layer-1",
    "keras-2",
    "alexnet-stem",
    "resnet-down",
    "resnet-1x1-narrow",
    "longer-sum",
    "resnext",
    "mobilenet-5x5",
    "1x1-image-1x1",
    "1x1-prime",
    "1x1-prime-strided",
    "asymmetric",
    "stride-3",
    "row-of-33",
    "channels-prime",
    "depthwise-multiplier",
    "depthwise-many",
    "depthwise-large",
    "groups-of-4",
    "groups-of-16",
    "groups-of-16-small",
    "groups-of-32",
]
POOL2D_NAMES = ["resnet-stem", "asymmetric-ceil", "overlapping-padded", "row-over-vector-3x3", "window-of-289"]


def named(table, names):
    chosen = [replace(case, n=BATCH) for case in table if case.name in names]
    assert len(chosen) == len(names)
    return chosen


def assert_law_holds(subject: Subject, changes=changes):
    for kind, details, expected, got in changes(subject):
        for a, b in zip(expected, got, strict=True):
            assert same_bits(a, b), f"other bits with other {kind}: {details}"


def conv2d_subject(which, case: Conv2dCase, t: Conv2dOperands, run) -> Subject:
    """A pass as a function of its own two operands."""
    if which == "forward":
        return Subject(lambda x, w, *b: run(which, replace(t, x=x, w=w, b=b[0] if b else None), case),
                       [t.x], [v for v in (t.w, t.b) if v is not None])  # fmt: skip
    if which == "grad_input":
        return Subject(lambda gy, w: run(which, replace(t, gy=gy, w=w), case), [t.gy], [t.w])
    return Subject(lambda gy, x: run(which, replace(t, gy=gy, x=x), case), [t.gy, t.x], [], reduces=True)


@pytest.mark.parametrize("which", PASSES)
@every_dtype
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (case, algorithm)
        for case in named(CONV2D, CONV2D_NAMES)
        for algorithm in ["auto", *cnnops.ops.algorithms()]
        if algorithm != "reference" or case.flops < 1e7  # it is slow
    ],
    ids=str,
)
def test_conv2d(case, dtype, algorithm, which, instruction_set):
    t = conv2d_operands(case).to(dtype)
    if algorithm == "auto" or accepts(which, t, case, algorithm):
        assert_law_holds(conv2d_subject(which, case, t, lambda *args: run_pass(*args, algorithm)))


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("case", named(CONV2D, CONV2D_NAMES), ids=str)
def test_conv2d_channels_last(case, dtype, which, instruction_set):
    t = conv2d_operands(case).to(dtype).formatted(torch.channels_last)
    assert_law_holds(conv2d_subject(which, case, t, run_pass))


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=name_of)
@pytest.mark.parametrize("case", named(CONV2D, ["keras-2", "lecture-3", "channels-prime-5x5-wide"]), ids=str)
def test_conv2d_16_bit_transforms(case, memory_format, dtype, which, instruction_set):
    """By name: processors with an instruction for bfloat16 may choose that."""
    t = conv2d_operands(case).to(dtype).formatted(memory_format)
    assert_law_holds(conv2d_subject(which, case, t, lambda *args: run_pass(*args, "winograd")))


every_format = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=name_of)


@pytest.mark.parametrize("which", ["forward", "grad_input"])
@pytest.mark.parametrize(
    ("c", "k", "kernel", "groups"),
    [(16, 96, 1, 1), (96, 16, 1, 1), (96, 96, 1, 1), (192, 96, 1, 6), (3, 96, 3, 1), (96, 3, 3, 1), (96, 96, 3, 96)],
)
@every_format
def test_batches_that_pass_the_cache(memory_format, c, k, kernel, groups, which):
    """Results larger than the cache are written past it, perhaps in tiles of their own."""
    padding = (kernel // 2, kernel // 2)
    case = Conv2dCase("large", 16, c, 64, 66, k, (kernel, kernel), padding=padding, groups=groups, bias=False)
    t = conv2d_operands(case).to(torch.float32).formatted(memory_format)
    together = run_pass(which, t, case)
    for i in 0, 15:
        one = replace(t, x=t.x[i : i + 1], gy=t.gy[i : i + 1])
        assert same_bits(together[i : i + 1], run_pass(which, one, case))


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@every_format
def test_borders(memory_format, padding_mode, which, instruction_set):
    case = replace(next(case for case in CONV2D if case.name == "row-of-33"), n=BATCH)
    t = conv2d_operands(case).to(torch.bfloat16).formatted(memory_format)
    rest = (*case.arguments.values(), padding_mode)
    functions = {
        "forward": lambda t: torch.ops.cnnops.conv2d(t.x, t.w, t.b, *rest),
        "grad_input": lambda t: torch.ops.cnnops.conv2d_grad_input(t.gy, t.w, None, t.x.shape[2:], *rest),
        "grad_weight": lambda t: torch.ops.cnnops.conv2d_grad_weight(t.gy, t.x, t.w.shape[2:], *rest),
    }
    assert_law_holds(conv2d_subject(which, case, t, lambda which, t, _: functions[which](t)))


def pooling_subjects(x):
    """Every pooling there is and its gradient, of a (BATCH, c, 13, 12) tensor, in its layout."""
    ops, window = torch.ops.cnnops, ((3, 2), (2, 1), (1, 0))
    y, positions = ops.max_pool2d(x, *window)
    gy = torch.empty_like(y).copy_(numbers(*y.shape, seed="gy"))
    small, at = ops.adaptive_max_pool2d(x, (5, 7))
    pooled, indices = cnnops.functional.max_pool2d(x, 2, return_indices=True)
    return [
        Subject(lambda x: ops.max_pool2d(x, *window), [x], []),
        Subject(lambda gy, at: ops.max_pool2d_backward(gy, at, (13, 12), *window), [gy, positions], []),
        Subject(lambda x: ops.avg_pool2d(x, *window), [x], []),
        Subject(lambda gy: ops.avg_pool2d_backward(gy, (13, 12), *window), [gy], []),
        Subject(lambda x: ops.adaptive_max_pool2d(x, (5, 7)), [x], []),
        Subject(lambda gy, at: ops.adaptive_max_pool2d_backward(gy, at, (13, 12)), [small, at], []),
        Subject(lambda x, at: ops.adaptive_max_pool2d_gather(x, at), [x, at], []),
        Subject(lambda x: ops.adaptive_avg_pool2d(x, (5, 7)), [x], []),
        Subject(lambda x: ops.adaptive_avg_pool2d(x, (1, 1)), [x], []),
        Subject(lambda gy: ops.adaptive_avg_pool2d_backward(gy, (13, 12)), [small], []),
        Subject(lambda x, at: ops.max_unpool2d(x, at, (13, 12)), [pooled, indices], []),
        Subject(ops.channel_sum, [x], [], reduces=True),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@every_format
def test_pooling_of_other_kinds(memory_format, dtype, instruction_set):
    """channels_last, adaptive windows, unpooling."""
    for subject in pooling_subjects(numbers(BATCH, 19, 13, 12).to(dtype, memory_format=memory_format)):
        assert_law_holds(subject)


@every_dtype
@pytest.mark.parametrize("case", named(MAX_POOL2D, POOL2D_NAMES), ids=str)
def test_max_pool2d(case, dtype, instruction_set):
    ops, window = torch.ops.cnnops, tuple(case.max_arguments.values())
    x, gy = numbers(*case.input_shape).to(dtype), numbers(*case.output_shape).to(dtype)
    positions = ops.max_pool2d(x, *window)[1]
    size = x.shape[2:]
    assert_law_holds(Subject(lambda x: ops.max_pool2d(x, *window), [x], []))
    assert_law_holds(Subject(lambda gy, at: ops.max_pool2d_backward(gy, at, size, *window), [gy, positions], []))
    assert_law_holds(Subject(lambda x, at: ops.max_pool2d_gather(x, at, *window), [x, positions], []))


@every_dtype
@pytest.mark.parametrize("case", named(AVG_POOL2D, [*POOL2D_NAMES, "padded-excluded-ceil"]), ids=str)
def test_avg_pool2d(case, dtype, instruction_set):
    ops, window = torch.ops.cnnops, tuple(case.avg_arguments.values())
    x, gy = numbers(*case.input_shape).to(dtype), numbers(*case.output_shape).to(dtype)
    assert_law_holds(Subject(lambda x: ops.avg_pool2d(x, *window), [x], []))
    assert_law_holds(Subject(lambda gy: ops.avg_pool2d_backward(gy, x.shape[2:], *window), [gy], []))


def activation_subjects(x, gy, w):
    ops = torch.ops.cnnops
    return [
        Subject(ops.relu, [x], []),
        Subject(ops.relu_backward, [gy, ops.relu(x)], []),
        Subject(lambda x: ops.hardtanh(x, -0.5, 0.7), [x], []),
        Subject(lambda x: ops.leaky_relu(x, 0.3), [x], []),
        Subject(lambda gy, x: ops.leaky_relu_backward(gy, x, 0.3), [gy, x], []),
        Subject(ops.prelu, [x], [w]),
        Subject(lambda gy, x, w: ops.prelu_backward(gy, x, w)[0], [gy, x], [w]),
        Subject(lambda gy, x, w: ops.prelu_backward(gy, x, w)[1], [gy, x], [w], reduces=True),
        Subject(ops.channel_sum, [x], [], reduces=True),
    ]


@every_dtype
@pytest.mark.parametrize("shape", [(BATCH, 5, 13, 17), (BATCH, 3, 1, 1), (BATCH, 4, 64, 65)])
def test_activations(shape, dtype, instruction_set):
    x, gy, w = numbers(*shape).to(dtype), numbers(*shape, seed="gy").to(dtype), numbers(shape[1]).to(dtype)
    for subject in activation_subjects(x, gy, w):
        assert_law_holds(subject)


# --- hypothesis ---


@st.composite
def trials(draw, generators):
    def pick(options):
        return draw(st.sampled_from(options))

    trial: Trial = generators[pick(list(generators))](pick)
    trial.dtype = pick([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    trial.memory_format = pick([torch.contiguous_format, torch.channels_last])
    if trial.operator in CONVOLUTIONS:
        algorithm = pick(["auto", *cnnops.ops.algorithms()])
        trial.ours["algorithm"] = "auto" if algorithm == "reference" and trial.steps > 1e6 else algorithm
    if trial.operator == "conv2d":
        mode = pick(["zeros", "reflect", "replicate", "circular"])
        fits = all(p < i for p, i in zip(trial.arguments["padding"], trial.input_shape[2:], strict=True))
        trial.ours["padding_mode"] = mode if fits else "zeros"
    return trial, pick(trial.passes), pick(list(cnnops.settings.instruction_sets))


def assert_law_holds_in(trial: Trial, which, instruction_set):
    before = cnnops.settings.instruction_set
    cnnops.settings.instruction_set = instruction_set
    try:
        try:
            subject = trial.subject(which, cnnops.functional)
            subject()
        except RuntimeError as refusal:
            assert "refuses" in str(refusal), refusal
            trial.ours["algorithm"] = "auto"
            subject = trial.subject(which, cnnops.functional)
        assert_law_holds(subject)
        assert_law_holds(subject, restridings)
    finally:
        cnnops.settings.instruction_set = before


@settings(max_examples=2 * settings.default.max_examples)
@given(trials(CONVOLUTIONS))
def test_random_convolutions(trial):
    """Any geometry, algorithm, pass, layout, dtype, border and instruction set."""
    assert_law_holds_in(*trial)


@given(trials(OTHERS))
def test_random_others(trial):
    assert_law_holds_in(*trial)


# --- through autograd ---


@every_dtype
def test_a_training_step(dtype):
    """Through autograd and the modules: loss and all gradients, for every number of threads."""
    torch.manual_seed(1)
    nn = cnnops.nn
    net = torch.nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3), nn.LeakyReLU(),
        nn.AvgPool2d(2), nn.Conv2d(24, 8, 3, stride=2), nn.ReLU(),
    ).to(dtype)  # fmt: skip
    x = numbers(19, 3, 24, 20).to(dtype)
    results = []
    for threads in 1, 2, 3, 4, 1:
        torch.set_num_threads(threads)
        y = net(x)
        results.append([y, *torch.autograd.grad(y, list(net.parameters()), torch.ones_like(y))])
    for result in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], result, strict=True))


# --- that these tests can fail ---


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", cnnops.ops.algorithms())
def test_the_numbers_tell_orders_of_summation_apart(algorithm, which):
    """The same sums taken backwards have other bits, so a kernel that changed its order would be seen."""
    case = replace(next(case for case in CONV2D if case.name == "row-of-33"), n=BATCH, bias=False)
    t = conv2d_operands(case)
    flipped = {
        "forward": replace(t, x=t.x.flip(1), w=t.w.flip(1)),
        "grad_input": replace(t, gy=t.gy.flip(1), w=t.w.flip(0)),
        "grad_weight": replace(t, gy=t.gy.flip(0), x=t.x.flip(0)),
    }[which]
    if accepts(which, t, case, algorithm):
        forwards, backwards = run_pass(which, t, case, algorithm), run_pass(which, flipped, case, algorithm)
        assert not same_bits(forwards, backwards)
        torch.testing.assert_close(forwards, backwards)


CULPRITS = {
    "threads": lambda x: x * (1 + torch.get_num_threads() * 2**-23),
    "batch": lambda x: x * (1 + len(x) * 2**-23),
    "place": lambda x: x + 1e-6 * torch.arange(len(x)).view(-1, 1, 1, 1),
    "address": lambda x: x * (1 + (x.data_ptr() % 64) * 2**-23),
    "run": lambda x: x + 1e-6 * torch.rand(()),
    "sign of zero": lambda x: x * 0 * (-1) ** torch.get_num_threads(),
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_the_harness_finds(culprit):
    """An operator that breaks the law in one of these ways is caught."""
    with pytest.raises(AssertionError, match="other bits"):
        assert_law_holds(Subject(CULPRITS[culprit], [numbers(BATCH, 2, 3, 4).float()], []))


def test_the_harness_finds_strides():
    with pytest.raises(AssertionError, match="other strides: transposed"):
        assert_law_holds(
            Subject(lambda x: x * (1 + x.stride(-1) * 2**-23), [numbers(2, 2, 3, 4).float()], []), restridings
        )


def test_torch_itself_does_not_keep_this_law():
    """Why all this: torch's weight gradient depends on the number of threads. If torch mends it, drop this test."""
    case = replace(next(case for case in CONV2D if case.name == "lecture-2"), n=64)
    t = conv2d_operands(case).to(torch.float32)
    results = []
    for threads in 1, 2, 3, 4:
        torch.set_num_threads(threads)
        results.append(torch_pass("grad_weight", t, case))
    if all(same_bits(results[0], result) for result in results[1:]):
        pytest.skip("on this machine it does, for this case")
