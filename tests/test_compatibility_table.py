"""docs/compatibility.md: every test that it names exists. And the two rows that no other file proves."""

import re
from pathlib import Path

import pytest
import torch
from helpers import DEVICES, assert_equal, numbers
from torch.nn import functional as TF

from cnnops import functional as F

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "compatibility.md"


def rows():
    """Of the tables of features; another one has figures."""
    tables = re.findall(r"^\| feature .*\n\|---.*\n((?:\|.*\n)+)", TABLE.read_text(), re.MULTILINE)
    return [line for table in tables for line in table.splitlines()]


def test_every_row_names_tests_that_exist():
    assert len(rows()) > 50
    for row in rows():
        feature, verdict, tests = row.strip("| ").split(" | ")
        named = re.findall(r"`(\w+\.py)::(\w+)`", tests)
        assert named and re.match("same|better|different|not yet", verdict), row
        for file, test in named:
            assert f"\ndef {test}(" in (TESTS / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("device", DEVICES)
def test_padding_of_four_sides(device, mode):
    """As after torch's pad; gradients, too."""
    x, w = (numbers(*shape).to(device).requires_grad_() for shape in [(2, 4, 7, 6), (6, 2, 3, 2)])
    (top, bottom), (left, right) = sides = (2, 0), (1, 3)
    ours = F.conv2d(x, w, None, (2, 1), sides, (1, 2), 2, padding_mode=mode)
    padded = TF.pad(x, (left, right, top, bottom), "constant" if mode == "zeros" else mode)
    theirs = TF.conv2d(padded, w, None, (2, 1), 0, (1, 2), 2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.pow(2).sum(), [x, w]) for y in (ours, theirs)))


@pytest.mark.parametrize("device", DEVICES)
def test_an_index_that_occurs_twice(device):
    """The last number stays; both get its gradient, as in torch."""
    x = torch.arange(1.0, 9.0, device=device).view(1, 2, 2, 2).requires_grad_()
    indices = torch.tensor([[[5, 5], [5, 0]], [[1, 2], [2, 1]]], device=device)[None]
    for memory_format in torch.contiguous_format, torch.channels_last:
        y = F.max_unpool2d(x.contiguous(memory_format=memory_format), indices, 2)
        expected = torch.zeros(1, 2, 16)
        expected[0, 0, 5], expected[0, 0, 0], expected[0, 1, 1], expected[0, 1, 2] = 3, 4, 8, 7
        assert_equal(y.detach().flatten(2), expected)
        slopes = torch.arange(32.0, device=device).view(1, 2, 4, 4)
        assert_equal(torch.autograd.grad(y, x, slopes)[0], slopes.flatten(2).gather(2, indices.flatten(2)).view_as(x))
