"""Which algorithm computes a convolution: the table's order, what accepts, what yields, what is named."""

from dataclasses import replace
from math import ceil, prod

import pytest
import torch
import torch.nn.functional as TF
from cases import CONV2D
from helpers import ALGORITHMS, DEVICES, PASSES, accepts, conv2d_operands, run_pass
from torch.autograd import grad

import cnnops
from cnnops import functional as F

by_name = {case.name: case for case in CONV2D}

every_algorithm = pytest.mark.parametrize(("device", "algorithm"), ALGORITHMS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_pass = pytest.mark.parametrize("which", PASSES)
every_case = pytest.mark.parametrize("case", CONV2D, ids=str)


@every_device
def test_the_last_row_is_the_reference(device):
    assert cnnops.ops.algorithms(device)[-1] == "reference"
    assert len(set(cnnops.ops.algorithms(device))) == len(cnnops.ops.algorithms(device)) >= 3


@every_pass
@every_case
def test_auto_takes_the_first_row_that_accepts_whatever_the_batch(case, which):
    """Or the next one, where it `yields` to those below."""
    choices = set()
    for n in (0, 1, 3, 64):
        t = conv2d_operands(replace(case, n=n)).to(torch.float32)
        choices.add(cnnops.ops.conv2d_algorithm(t.x, t.w, **case.arguments, which=which))
    t = conv2d_operands(case).to(torch.float32)
    names = [name for name in cnnops.ops.algorithms() if accepts(which, t, case, name)]
    assert choices == {next(name for name in names if not yields(name, which, case, names))}


def yields(name, which, case, accepting):
    """Contiguous direct, to im2col; winograd, to who leaves out products with the border; small groups, to winograd."""
    if name == "depthwise":
        return "winograd" in accepting
    if name == "direct":
        filters, size = case.weight_shape[0] // case.groups, prod(case.weight_shape[1:])
        return which == "grad_weight" and filters >= 64 and size >= 256 and case.kernel != (1, 1)
    if name == "winograd":
        if case.dilation != (1, 1):
            return 2 * seen_taps(case) < 3 * winograd_products(case, which)
        products = prod(case.kernel) * prod(case.output_shape[2:])
        return which == "grad_input" and 3 * products < 2 * winograd_products(case, which)
    return False


def seen_taps(case):
    """Pairs of an output and a tap that see a pixel of the plane."""
    x, w = torch.ones(1, 1, *case.input_shape[2:]), torch.ones(1, 1, *case.kernel)
    return TF.conv2d(x, w, None, case.stride, case.padding, case.dilation).sum().item()


def winograd_products(case, which):
    """Of a plane's gradient: from tiles over the input, or from those over the output if that makes a tenth fewer."""
    taps = case.kernel[0]
    forms = [(4, 4)] if taps == 3 else [(2, 2), (2, 4)]

    def fewest(size):
        """Products, and tiles in a row."""
        tilings = [(h + taps - 1, w + taps - 1, *map(tiles, size, case.dilation, (h, w))) for h, w in forms]
        return min((prod(tiling), tiling[3]) for tiling in tilings)

    def tiles(size, dilation, outputs):
        """Of all phases, which have as many as the first."""
        return min(dilation, size) * ceil(ceil(size / dilation) / outputs)

    (plain, _), (transposed, across) = fewest(case.input_shape[2:]), fewest(case.output_shape[2:])
    if which != "grad_input":
        return transposed
    if case.dilation != (1, 1):
        return plain
    return transposed if across <= 24 and 10 * transposed < 9 * plain else plain


@every_algorithm
def test_the_algorithm_reaches_the_backward(device, algorithm):
    """A named algorithm serves all three passes; its gradients are its own operators' bits."""
    case = by_name["two-layer-1"]
    t = conv2d_operands(case).to(device, torch.float32)
    if not all(accepts(which, t, case, algorithm) for which in PASSES):
        return
    x, w = t.x.clone().requires_grad_(), t.w.clone().requires_grad_()
    gx, gw = grad(F.conv2d(x, w, **case.arguments, algorithm=algorithm), (x, w), t.gy)
    assert torch.equal(gx, run_pass("grad_input", t, case, algorithm))
    assert torch.equal(gw, run_pass("grad_weight", t, case, algorithm))
