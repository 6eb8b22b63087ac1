"""conv2d at the ends of its range: huge strides, sizes over 2^31, and scratch memory that grows with neither."""

import os
import subprocess
import sys

import pytest
import torch
from cases import CONV2D, Conv2dCase
from helpers import (
    ALGORITHMS,
    DEVICES,
    DTYPES,
    PASSES,
    accepts,
    assert_equal,
    conv2d_operands,
    name_of,
    or_refusal,
    run_pass,
)
from torch.nn import functional as TF

import cnnops
from cnnops import functional as F

by_name = {case.name: case for case in CONV2D}
every_algorithm = pytest.mark.parametrize(("device", "algorithm"), ALGORITHMS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_pass = pytest.mark.parametrize("which", PASSES)


def status(field):
    """From the kernel, in MB."""
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


@every_pass
@pytest.mark.parametrize("algorithm", cnnops.ops.algorithms())
def test_workspace_is_bounded(algorithm, which):
    """Peak memory grows by the result and a little scratch. The unfolded matrix would be 170 MB per image here."""
    case = Conv2dCase("large", 2, 32, 384, 384, 4, (3, 3), padding=(1, 1), bias=False)
    t = conv2d_operands(case).to(torch.float32)
    if accepts(which, t, case, algorithm):
        run_pass(which, conv2d_operands(by_name["two-layer-1"]).to(torch.float32), by_name["two-layer-1"], algorithm)
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # starts the peak anew
        except OSError:
            pytest.skip("this kernel does not tell the peak of memory")
        before = status("VmRSS")
        result = run_pass(which, t, case, algorithm)
        assert status("VmHWM") - before < 20 + result.nbytes / 2**20


FAR_STRIDE = """
import torch, cnnops
for algorithm in cnnops.ops.algorithms():
    for stride in 40_000, 2**40, 2**62:
        x = torch.ones(1, 2, 30, 40, requires_grad=True)
        w = torch.ones(3, 2, 3, 3, requires_grad=True)
        try:
            y = cnnops.functional.conv2d(x, w, stride=stride, algorithm=algorithm)
            y.sum().backward()
        except RuntimeError as error:
            assert "refuses" in str(error), error
        else:
            assert y.shape == (1, 3, 1, 1) and (y == 18).all()
            assert x.grad.sum() == 54 and (x.grad[..., :3, :3] == 3).all() and (w.grad == 1).all()
"""


def test_a_stride_far_over_the_input():
    """Work grows with the image, not with the stride: no loop over its remainders, no overflow of their product."""
    run = subprocess.run([sys.executable, "-c", FAR_STRIDE], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr


def test_sizes_are_64_bit():
    """Shapes whose elements or products pass 2^31 and 2^32 come out right; on meta tensors, so nothing is computed."""
    x, w = torch.empty(3, 2, 70_000, 80_000, device="meta"), torch.empty(5, 2, 3, 3, device="meta")
    assert F.conv2d(x, w).shape == (3, 5, 69_998, 79_998)
    assert F.conv2d(x, w, padding=2**33, stride=2**20).shape == TF.conv2d(x, w, padding=2**33, stride=2**20).shape


@pytest.mark.huge
@pytest.mark.skipif(os.environ.get("CNNOPS_TEST_HUGE") != "1", reason="needs 20 GB; set CNNOPS_TEST_HUGE=1")
@pytest.mark.parametrize("algorithm", cnnops.ops.algorithms())
def test_more_than_2_to_the_31_elements(algorithm):
    x = torch.zeros(1, 1, 2, 2**30 + 5)
    x[..., -1] = torch.tensor([2.0, 3.0])
    with or_refusal(algorithm):
        y = F.conv2d(x, torch.ones(1, 1, 2, 2), padding=(0, 1), algorithm=algorithm)
        assert_equal(y[0, 0, 0, -3:], torch.tensor([0.0, 5.0, 5.0]))


@pytest.mark.huge
@pytest.mark.skipif(os.environ.get("CNNOPS_TEST_HUGE") != "1", reason="needs 20 GB; set CNNOPS_TEST_HUGE=1")
@pytest.mark.parametrize("algorithm", ["direct", "depthwise"])
def test_more_than_2_to_the_31_elements_channels_last(algorithm):
    """Only the output is that large; its last pixel is looked at."""
    side, k = 16_400, 8
    x = torch.zeros(1, 4, side, side).to(memory_format=torch.channels_last)
    x[0, :, -1, -1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    groups = 4 if algorithm == "depthwise" else 1
    w = torch.ones(k, 4 // groups, 1, 1)
    y = F.conv2d(x, w, groups=groups, algorithm=algorithm)
    assert y.numel() > 2**31 and y.is_contiguous(memory_format=torch.channels_last)
    expected = torch.arange(1.0, 5).repeat_interleave(k // 4) if groups == 4 else torch.full((k,), 10.0)
    assert_equal(y[0, :, -1, -1], expected)
    assert y[0, :, -1, -2].abs().sum() == 0
