"""Bad calls: an error with torch's type and the values that do not fit, the same on real and on meta tensors."""

import re

import pytest
import torch
from helpers import DEVICES
from torch import randn
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

IMAGE, WEIGHT = (2, 4, 6, 7), (8, 4, 3, 3)


def conv2d(x=IMAGE, w=WEIGHT, b=None, **arguments):
    return lambda f, at: f.conv2d(at(x), at(w), at(b), **arguments)


def max_pool2d(x=IMAGE, kernel_size=2, **arguments):
    return lambda f, at: f.max_pool2d(at(x), kernel_size, **arguments)


def avg_pool2d(x=IMAGE, kernel_size=2, **arguments):
    return lambda f, at: f.avg_pool2d(at(x), kernel_size, **arguments)


# Calls of a functional interface `f`, ours or torch's, whose tensors `at` makes of shapes, and what the message holds.
BAD = {
    "conv2d: 2-D input": (conv2d((6, 7)), ["[6, 7]"]),
    "conv2d: 5-D input": (conv2d((1, 2, 4, 6, 7)), ["[1, 2, 4, 6, 7]"]),
    "conv2d: 3-D weight": (conv2d(w=(8, 4, 3)), ["[8, 4, 3]"]),
    "conv2d: channels": (conv2d(w=(8, 5, 3, 3)), ["[8, 5, 3, 3]", "[2, 4, 6, 7]", "5", "4"]),
    "conv2d: channels of groups": (conv2d(groups=2), ["groups=2", "8", "4"]),
    "conv2d: channels, unbatched": (conv2d((5, 6, 7)), ["[8, 4, 3, 3]", "5", "4"]),
    "conv2d: outputs not divisible": (conv2d(w=(7, 2, 3, 3), groups=2), ["[7, 2, 3, 3]", "2"]),
    "conv2d: no groups": (conv2d(groups=0), ["groups", "0"]),
    "conv2d: negative groups": (conv2d(groups=-2), ["groups", "-2"]),
    "conv2d: negative padding": (conv2d(padding=-1), ["padding", "-1"]),
    "conv2d: one negative padding": (conv2d(padding=(3, -2)), ["padding", "-2"]),
    "conv2d: no stride": (conv2d(stride=0), ["stride", "0"]),
    "conv2d: negative stride": (conv2d(stride=(1, -1)), ["stride", "-1"]),
    "conv2d: no dilation": (conv2d(dilation=0), ["dilation", "0"]),
    "conv2d: three strides": (conv2d(stride=(1, 2, 3)), ["stride", "1, 2, 3"]),
    "conv2d: empty kernel": (conv2d(w=(8, 4, 0, 3)), ["0"]),
    "conv2d: no output channel": (conv2d(w=(0, 4, 3, 3)), ["[0, 4, 3, 3]"]),
    "conv2d: empty image": (conv2d((2, 4, 0, 7), padding=3), ["[2, 4, 0, 7]"]),
    "conv2d: kernel too high": (conv2d(w=(8, 4, 7, 1)), ["6 x 7", "7 x 1"]),
    "conv2d: kernel too wide": (conv2d(w=(8, 4, 1, 12), padding=(0, 2)), ["6 x 11", "1 x 12"]),
    "conv2d: dilated kernel too wide": (conv2d(dilation=(1, 4)), ["6 x 7", "3 x 9"]),
    "conv2d: bias of another size": (conv2d(b=(7,)), ["bias", "7", "8"]),
    "conv2d: bias of one": (conv2d(b=(1,)), ["bias", "1", "8"]),
    "conv2d: 2-D bias": (conv2d(b=(8, 1)), ["bias", "[8, 1]"]),
    "conv2d: 0-D bias": (conv2d(b=()), ["bias", "[]"]),
    "conv2d: dtypes of input and weight": (
        lambda f, at: f.conv2d(at(IMAGE), at(WEIGHT).double()),
        ["Float", "Double"],
    ),
    "conv2d: dtype of bias": (lambda f, at: f.conv2d(at(IMAGE), at(WEIGHT), at((8,)).double()), ["Float", "Double"]),
    "conv2d: same and strided": (conv2d(padding="same", stride=2), ["same"]),
    "conv2d: padding by another name": (conv2d(padding="full"), ["full"]),
    "max_pool2d: 2-D input": (max_pool2d((6, 7)), ["2"]),
    "max_pool2d: 5-D input": (max_pool2d((1, 2, 4, 6, 7)), ["[1, 2, 4, 6, 7]"]),
    "max_pool2d: no kernel": (max_pool2d(kernel_size=0), ["kernel_size", "0"]),
    "max_pool2d: negative kernel": (max_pool2d(kernel_size=(2, -3)), ["kernel_size", "-3"]),
    "max_pool2d: three kernels": (max_pool2d(kernel_size=(2, 3, 4)), ["kernel_size"]),
    "max_pool2d: no stride": (max_pool2d(stride=0), ["stride", "0"]),
    "max_pool2d: negative stride": (max_pool2d(stride=-1), ["stride", "-1"]),
    "max_pool2d: negative padding": (max_pool2d(padding=-1), ["padding", "-1"]),
    "max_pool2d: padding over half": (max_pool2d(kernel_size=3, padding=2), ["padding", "2", "3"]),
    "max_pool2d: no dilation": (max_pool2d(dilation=0), ["dilation", "0"]),
    "max_pool2d: window too large": (max_pool2d(kernel_size=8), ["[2, 4, 6, 7]", "8"]),
    "max_pool2d: window too large, ceil": (
        max_pool2d(kernel_size=(9, 2), stride=1, ceil_mode=True),
        ["[2, 4, 6, 7]", "9"],
    ),
    "max_pool2d: dilated window too large": (max_pool2d(dilation=7), ["[2, 4, 6, 7]", "7"]),
    "max_pool2d: no channels": (max_pool2d((2, 0, 6, 7)), ["[2, 0, 6, 7]"]),
    "max_pool2d: empty image": (max_pool2d((2, 4, 6, 0)), ["[2, 4, 6, 0]"]),
    "avg_pool2d: 5-D input": (avg_pool2d((1, 2, 4, 6, 7)), ["[1, 2, 4, 6, 7]"]),
    "avg_pool2d: no kernel": (avg_pool2d(kernel_size=0), ["kernel_size", "0"]),
    "avg_pool2d: no stride": (avg_pool2d(stride=(0, 2)), ["stride", "0"]),
    "avg_pool2d: negative padding": (avg_pool2d(padding=-1), ["padding", "-1"]),
    "avg_pool2d: padding over half": (avg_pool2d(kernel_size=(4, 3), padding=2), ["padding", "2", "3"]),
    "avg_pool2d: window too large": (avg_pool2d(kernel_size=8), ["[2, 4, 6, 7]", "8"]),
    "avg_pool2d: divisor of 0": (avg_pool2d(divisor_override=0), ["divisor", "zero"]),
    "avg_pool2d: no channels": (avg_pool2d((2, 0, 6, 7)), ["[2, 0, 6, 7]"]),
    "avg_pool2d: empty image": (avg_pool2d((2, 4, 0, 7)), ["[2, 4, 0, 7]"]),
    "prelu: weights": (lambda f, at: f.prelu(at(IMAGE), at((3,))), ["3", "4"]),
    "prelu: weights, 1-D input": (lambda f, at: f.prelu(at((3,)), at((3,))), ["3", "1"]),
    "prelu: 2-D weight": (lambda f, at: f.prelu(at(IMAGE), at((1, 4))), ["weight", "[1, 4]"]),
    "prelu: dtypes": (lambda f, at: f.prelu(at(IMAGE), at((4,)).double()), ["Float", "Double"]),
}


def tensors_on(device):
    return lambda shape: None if shape is None else randn(shape, device=device)


def error_of(call, *args, **kwargs):
    with pytest.raises(Exception) as raised:  # noqa: B017 - which one is what the tests look at
        call(*args, **kwargs)
    return raised.value


def text_of(error):
    return str(error).split("\nException raised from")[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD)
def test_bad_call(name):
    call, values = BAD[name]
    theirs = error_of(call, TF, tensors_on("cpu"))
    texts = set()
    for device in *DEVICES, "meta":
        ours = error_of(call, F, tensors_on(device))
        assert isinstance(ours, type(theirs)), f"torch raises {type(theirs).__name__}, we {type(ours).__name__}: {ours}"
        texts.add(text_of(ours))
    assert len(texts) == 1, texts
    (text,) = texts
    missing = [value for value in values if value not in text]
    assert not missing, f"{missing} should be in: {text}"


@pytest.mark.gpu
def test_avg_pool2d_of_a_matrix():
    """torch's message here is an accident (an IndexError about dimension -3); ours names the shape."""
    texts = {text_of(error_of(avg_pool2d((6, 7)), F, tensors_on(device))) for device in (*DEVICES, "meta")}
    assert len(texts) == 1 and re.search(r"2-?D|\[6, 7\]", texts.pop())


BEYOND_32_BITS = {
    "kernel_size": {"kernel_size": 2**31, "padding": 2**30},
    "stride": {"kernel_size": 2, "stride": 2**31},
    "dilation": {"kernel_size": 5, "stride": 1, "dilation": 2**62},  # times 4 it is 0 again
}


def test_an_adaptive_window_beyond_32_bits():
    error = error_of(F.adaptive_max_pool2d, torch.empty(1, 1, 65536, 65536, device="meta"), 1)
    assert isinstance(error, RuntimeError) and "65536 x 65536" in str(error)


def test_a_kernel_that_reaches_beyond_64_bits():
    for convolution in F.conv2d, F.conv_transpose2d:
        error = error_of(convolution, randn(1, 1, 4, 4), torch.ones(1, 1, 65537, 1), dilation=(2**48, 1))
        assert isinstance(error, RuntimeError) and str(2**48) in str(error)


@pytest.mark.parametrize("name", BEYOND_32_BITS)
@pytest.mark.parametrize("pool", ["max_pool2d", "avg_pool2d"])
def test_windows_beyond_32_bits(pool, name):
    """As in torch an error, on meta tensors at once: real ones would be walked for hours, or outside of memory."""
    arguments = BEYOND_32_BITS[name]
    if pool == "max_pool2d" or "dilation" not in arguments:
        assert isinstance(error_of(getattr(TF, pool), randn(IMAGE), **arguments), RuntimeError)
        error = error_of(getattr(F, pool), randn(IMAGE, device="meta"), **arguments)
        assert isinstance(error, RuntimeError) and name in str(error)


# --- the operators beneath, called directly ---

PAIRS = ((1, 1), (0, 0), (1, 1))
WINDOW = ((2, 2), (2, 2), (0, 0), (1, 1), False)
AVERAGE = ((2, 2), (2, 2), (0, 0), False, True, None)
POOLED = (2, 4, 3, 3)

BAD_OPERATORS = {
    "grad_output of another size": (
        "conv2d_grad_input",
        [(2, 8, 4, 4), WEIGHT, None, (6, 7), *PAIRS, 1],
        ["[2, 8, 4, 4]"],
    ),
    "grad_output of other channels": ("conv2d_grad_input", [(2, 7, 4, 5), WEIGHT, None, (6, 7), *PAIRS, 1], ["7"]),
    "input_size too small": ("conv2d_grad_input", [(2, 8, 1, 1), WEIGHT, None, (2, 3), *PAIRS, 1], ["3"]),
    "3-D grad_output": ("conv2d_grad_input", [(8, 4, 5), WEIGHT, None, (6, 7), *PAIRS, 1], ["[8, 4, 5]"]),
    "groups of the gradient": ("conv2d_grad_input", [(2, 8, 4, 5), WEIGHT, None, (6, 7), *PAIRS, 3], ["3"]),
    "another size": ("conv2d_grad_weight", [(2, 8, 4, 4), IMAGE, (3, 3), *PAIRS, 1], ["[2, 8, 4, 4]"]),
    "another batch": ("conv2d_grad_weight", [(3, 8, 4, 5), IMAGE, (3, 3), *PAIRS, 1], ["3"]),
    "kernel_size over input": ("conv2d_grad_weight", [(2, 8, 4, 5), IMAGE, (9, 3), *PAIRS, 1], ["9"]),
    "empty kernel": ("conv2d_grad_weight", [(2, 8, 4, 5), IMAGE, (0, 3), *PAIRS, 1], ["0"]),
    "indivisible channels": ("conv2d_grad_weight", [(2, 8, 4, 5), (2, 3, 6, 7), (3, 3), *PAIRS, 2], ["2", "3"]),
    "pooling's positions of another size": (
        "max_pool2d_backward",
        [POOLED, torch.zeros(2, 4, 3, 2, dtype=torch.uint8), (6, 7), *WINDOW],
        ["[2, 4, 3, 2]"],
    ),
    "pooling's positions of another type": (
        "max_pool2d_backward",
        [POOLED, torch.zeros(POOLED, dtype=torch.int64), (6, 7), *WINDOW],
        ["Long"],
    ),
    "pooling's grad_output of another size": (
        "max_pool2d_backward",
        [(2, 4, 3, 2), torch.zeros(2, 4, 3, 2, dtype=torch.uint8), (6, 7), *WINDOW],
        ["[2, 4, 3, 2]"],
    ),
    "gather's positions of another size": (
        "max_pool2d_gather",
        [IMAGE, torch.zeros(2, 4, 2, 3, dtype=torch.uint8), *WINDOW],
        ["[2, 4, 2, 3]"],
    ),
    "gather's positions of another type": (
        "max_pool2d_gather",
        [IMAGE, torch.zeros(POOLED, dtype=torch.int32), *WINDOW],
        ["Int"],
    ),
    "average's grad_output": ("avg_pool2d_backward", [(2, 4, 2, 3), (6, 7), *AVERAGE], ["[2, 4, 2, 3]"]),
    "relu's shapes": ("relu_backward", [(2, 3), (3, 2)], ["[2, 3]", "[3, 2]"]),
    "relu's broadcast": ("relu_backward", [(2, 3), (1, 3)], ["[2, 3]", "[1, 3]"]),
    "leaky_relu's shapes": ("leaky_relu_backward", [(2, 3), (3, 2), 0.5], ["[2, 3]", "[3, 2]"]),
    "prelu's shapes": ("prelu_backward", [(2, 3), (3, 2), (1,)], ["[2, 3]", "[3, 2]"]),
    "prelu's weights": ("prelu_backward", [(2, 3), (2, 3), (2,)], ["2", "3"]),
    "channel_sum of a vector": ("channel_sum", [(3,)], ["[3]"]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD_OPERATORS)
def test_bad_operator_call(name):
    """A wrong shape here would be memory read or written where it should not be."""
    operator, arguments, values = BAD_OPERATORS[name]
    algorithm = ["zeros", "auto"] if operator.startswith("conv2d") else []
    texts = set()
    for device in *DEVICES, "meta":
        made = [
            argument.to(device)
            if isinstance(argument, torch.Tensor)
            else randn(argument, device=device)
            if is_shape(operator, i)
            else argument
            for i, argument in enumerate(arguments)
        ]
        error = error_of(getattr(torch.ops.cnnops, operator), *made, *algorithm)
        assert isinstance(error, RuntimeError)
        texts.add(text_of(error))
    assert len(texts) == 1, texts
    (text,) = texts
    assert all(value in text for value in values), text


def is_shape(operator, i):
    """Whether argument i stands for a tensor of that shape."""
    argument = getattr(torch.ops.cnnops, operator).default._schema.arguments[i]
    return str(argument.type) == "Tensor"


def test_devices_may_not_be_mixed():
    x, w = randn(IMAGE), randn(WEIGHT, device="meta")
    with pytest.raises(RuntimeError, match="device.*(cpu|meta).*(meta|cpu)"):
        torch.ops.cnnops.conv2d(x, w)


# --- dtypes ---

CALLS = {
    "conv2d": lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3, device=x.device).to(x.dtype)),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.ones(4, device=x.device).to(x.dtype)),
}


INTEGERS = {"max_pool2d": [torch.int64, torch.uint8], "relu": [torch.int64, torch.uint8], "avg_pool2d": [torch.int64]}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_are_not_numbers_of_ours(name, dtype):
    """Nothing is converted in silence: the error names the dtype and those that work, on meta tensors too."""
    if dtype in INTEGERS.get(name, []):
        return
    texts = set()
    for device in *DEVICES, "meta":
        error = error_of(CALLS[name], torch.zeros(IMAGE, dtype=dtype, device=device))
        assert isinstance(error, RuntimeError)
        texts.add(text_of(error))
    assert len(texts) == 1, texts
    (text,) = texts
    assert "float32" in text and "float64" in text, text
    assert str(dtype).removeprefix("torch.")[:4].lower() in text.lower() or "Long" in text or "Byte" in text, text


# --- algorithms ---


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_an_unknown_algorithm(device):
    """The known ones are named; the error is the same from the call, the table and the module."""
    x, w = randn(IMAGE, device=device), randn(WEIGHT, device=device)
    calls = [
        lambda: F.conv2d(x, w, algorithm="fastest"),
        lambda: cnnops.ops.conv2d_algorithm(x, w, algorithm="fastest"),
        lambda: cnnops.nn.Conv2d(4, 8, 3, algorithm="fastest", device=device)(x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="fastest") as raised:
            call()
        assert all(name in str(raised.value) for name in ("auto", *cnnops.ops.algorithms())), raised.value


def test_an_unknown_pass():
    with pytest.raises((ValueError, RuntimeError), match="sideways"):
        cnnops.ops.conv2d_algorithm(randn(IMAGE), randn(WEIGHT), which="sideways")


def test_the_table_refuses_bad_shapes_too():
    with pytest.raises(RuntimeError, match=re.escape("[8, 5, 3, 3]")):
        cnnops.ops.conv2d_algorithm(randn(IMAGE), randn(8, 5, 3, 3))


def test_an_unknown_instruction_set():
    before = cnnops.settings.instruction_set
    with pytest.raises((ValueError, RuntimeError), match="sse17") as raised:
        cnnops.settings.instruction_set = "sse17"
    assert all(name in str(raised.value) for name in cnnops.settings.instruction_sets)
    assert cnnops.settings.instruction_set == before


def test_an_error_leaves_nothing_broken():
    """After a refused call the next one works: no lock is held, no state half changed."""
    for call, _ in BAD.values():
        error_of(call, F, tensors_on("cpu"))
    x, w = randn(IMAGE), randn(WEIGHT)
    torch.testing.assert_close(F.conv2d(x, w), TF.conv2d(x, w))
