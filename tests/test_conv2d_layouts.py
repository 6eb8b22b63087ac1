"""conv2d and its two gradients on tensors of every layout."""

from dataclasses import replace

import pytest
import torch
from cases import CONV2D, Conv2dCase
from helpers import (
    ALGORITHMS,
    DEVICES,
    PASSES,
    accepts,
    assert_equal,
    awkward,
    conv2d_operands,
    expected_pass,
    name_of,
    or_refusal,
    run_pass,
    torch_pass,
)
from torch.autograd import grad
from torch.nn import functional as TF

from cnnops import functional as F

by_name = {case.name: case for case in CONV2D}

every_algorithm = pytest.mark.parametrize(("device", "algorithm"), ALGORITHMS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_case = pytest.mark.parametrize("case", CONV2D, ids=str)


@pytest.mark.parametrize(
    "name", ["two-layer-1", "asymmetric", "kernel-over-input", "mobilenet-down", "1x1-image-1x1", "empty-batch"]
)
@every_algorithm
def test_any_strides(device, algorithm, name):
    """Operands that are transposed, sliced, misaligned or channels_last give what contiguous ones do."""
    case = by_name[name]
    t = conv2d_operands(case, whole=True).to(device, torch.float32)
    for which in PASSES:
        if not accepts(which, t, case, algorithm):
            continue
        expected = expected_pass(which, case, whole=True)[0].float()
        for operand in "x", "w", "gy":
            for _, view in awkward(getattr(t, operand)):
                with or_refusal(algorithm):  # some read one layout only
                    assert_equal(run_pass(which, replace(t, **{operand: view}), case, algorithm), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@every_algorithm
@every_case
def test_contiguous_filters_among_channels_last(case, device, algorithm, dtype):
    """Some algorithms read them where they are, others have them copied: the bits are the same."""
    t = conv2d_operands(case).to(device, dtype).formatted(torch.channels_last)
    if t.x.is_contiguous() or t.gy.is_contiguous():
        pytest.skip("it takes the filters to ask for channels_last")
    for which in "forward", "grad_input":
        if accepts(which, t, case, algorithm):
            expected = run_pass(which, t, case, algorithm)
            assert_equal(run_pass(which, replace(t, w=t.w.contiguous()), case, algorithm), expected)


@every_algorithm
def test_zero_strides(device, algorithm):
    """What sum().backward() sends: a gradient of one number, expanded. Expanded inputs and weights as well."""
    case = Conv2dCase("expanded", 3, 4, 7, 8, 6, (3, 3), padding=(1, 1))
    t = conv2d_operands(case, whole=True).to(device, torch.float32)
    for operand in "x", "w", "gy":
        whole = getattr(t, operand)
        for part in whole[:1], whole[:, :1], whole[..., :1], whole[:1, :1, :1, :1]:
            expanded = replace(t, **{operand: part.expand_as(whole)})
            for which in PASSES:
                if accepts(which, t, case, algorithm):
                    expected = torch_pass(which, expanded.to("cpu"), case)
                    assert_equal(run_pass(which, expanded, case, algorithm), expected)


@pytest.mark.parametrize("name", ["two-layer-1", "asymmetric", "everything-is-one", "1x1-image-1x1", "one-row"])
@every_device
def test_layout_of_results(device, name):
    """Strides are torch's: channels_last in, channels_last out, for the output and for the input's gradient."""
    case = by_name[name]
    t = conv2d_operands(case).to(device, torch.float32)
    for x_format in torch.contiguous_format, torch.channels_last:
        for w_format in torch.contiguous_format, torch.channels_last:
            x = t.x.contiguous(memory_format=x_format)
            w = t.w.contiguous(memory_format=w_format)
            strides = []
            for function in F.conv2d, TF.conv2d:
                leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
                y = function(*leaves, **case.arguments)
                gx, gw = grad(y, leaves, torch.ones_like(y))
                strides.append({"y": y.stride(), "gx": gx.stride(), "gw": gw.shape})
            assert strides[0] == strides[1], (x_format, w_format)
