"""The worked examples of the lecture notes, as exact numbers, by every algorithm and in both dtypes."""

import itertools
import math

import pytest
import torch
from helpers import ALGORITHMS, DEVICES, DTYPES, assert_equal, name_of, or_refusal

import cnnops
from cnnops import functional as F

INPUT = [[1, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1]]
FILTER = [[2, 0, 1], [0, 1, 2], [1, 0, 2]]

OUTLINE = [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]
EMBOSS = [[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]
BLUR = [[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125], [0.0625, 0.125, 0.0625]]
DIAGONAL = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]

# A bright square of 4 on a background of 1.
SQUARE = [[1, 1, 1, 1, 1], [1, 4, 4, 4, 1], [1, 4, 4, 4, 1], [1, 4, 4, 4, 1], [1, 1, 1, 1, 1]]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def plane(rows, dtype, device="cpu"):
    return torch.tensor([[rows]], dtype=dtype, device=device)


CONVOLUTIONS = {
    "plain": (INPUT, FILTER, None, 0, [[15, 16], [6, 15]]),
    "padding": (INPUT, FILTER, None, 1, [[7, 12, 10, 2], [4, 15, 16, 10], [10, 6, 15, 6], [8, 10, 4, 3]]),
    "bias": (INPUT, FILTER, 3, 0, [[18, 19], [9, 18]]),
    "outline": (SQUARE, OUTLINE, None, 0, [[15, 9, 15], [9, 0, 9], [15, 9, 15]]),
    "emboss": (SQUARE, EMBOSS, None, 0, [[16, 13, 4], [13, 4, -5], [4, -5, -8]]),
    "blur": (SQUARE, BLUR, None, 0, [[2.6875, 3.25, 2.6875], [3.25, 4, 3.25], [2.6875, 3.25, 2.6875]]),
    "diagonal": (INPUT, DIAGONAL, None, 0, [[3, 6], [0, 3]]),
}


@pytest.mark.parametrize(("device", "algorithm"), ALGORITHMS)
@pytest.mark.parametrize("example", CONVOLUTIONS)
def test_convolution(example, device, algorithm, dtype):
    rows, kernel, bias, padding, expected = CONVOLUTIONS[example]
    x, w = plane(rows, dtype, device), plane(kernel, dtype, device)
    b = None if bias is None else torch.tensor([bias], dtype=dtype, device=device)
    with or_refusal(algorithm):
        assert_equal(F.conv2d(x, w, b, padding=padding, algorithm=algorithm), plane(expected, dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_pooling(device, dtype):
    x = plane([[1, 6, 4, 2], [4, 1, 5, 8], [1, 7, 9, 5], [8, 7, 6, 6]], dtype, device)
    assert_equal(F.max_pool2d(x, 2), plane([[6, 8], [8, 9]], dtype))
    assert_equal(F.avg_pool2d(x, 2), plane([[3, 4.75], [5.75, 6.5]], dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_relu(device, dtype):
    x = plane([[-2, 0, 3], [5, -0.5, 1]], dtype, device)
    assert_equal(F.relu(x), plane([[0, 0, 3], [5, 0, 1]], dtype))
    assert_equal(F.leaky_relu(x, 0.5), plane([[-1, 0, 3], [5, -0.25, 1]], dtype))


def test_parameters(dtype):
    assert count(cnnops.nn.Conv2d(3, 10, 5, dtype=dtype)) == 760
    keras = torch.nn.Sequential(
        cnnops.nn.Conv2d(1, 32, 5, dtype=dtype),
        cnnops.nn.ReLU(),
        cnnops.nn.MaxPool2d(2),
        cnnops.nn.Conv2d(32, 32, 3, dtype=dtype),
        cnnops.nn.ReLU(),
        cnnops.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(800, 1024, dtype=dtype),
        torch.nn.Linear(1024, 10, dtype=dtype),
    )
    assert count(keras) == 840_554
    assert keras(torch.zeros(2, 1, 28, 28, dtype=dtype)).shape == (2, 10)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", [5, 6, 7, 28, 32])
def test_output_size(size, dtype):
    x = torch.zeros(1, 1, size, size, dtype=dtype)
    for kernel, padding, stride in itertools.product([1, 2, 3, 5], [0, 1, 2], [1, 2, 3]):
        out = math.floor((size - kernel + 2 * padding) / stride + 1)
        w = torch.zeros(1, 1, kernel, kernel, dtype=dtype)
        assert F.conv2d(x, w, stride=stride, padding=padding).shape == (1, 1, out, out)
        if 2 * padding <= kernel:
            assert F.max_pool2d(x, kernel, stride, padding).shape == (1, 1, out, out)
            assert F.avg_pool2d(x, kernel, stride, padding).shape == (1, 1, out, out)
