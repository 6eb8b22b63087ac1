"""Who rather waits than rounds: algorithm="accurate" and cnnops.settings.accurate."""

import os
import subprocess
import sys

import pytest
import torch
from cases import CONV2D
from helpers import DEVICES, PASSES, conv2d_operands, expected_pass, or_refusal, run_pass, same_bits

import cnnops
from cnnops import functional as F

by_name = {case.name: case for case in CONV2D}
ACCURATE = {name for name, _, accurate in cnnops._C.algorithms("cpu") if accurate}
every_pass = pytest.mark.parametrize("which", PASSES)


def chosen(t, case, which, algorithm="auto"):
    return cnnops.ops.conv2d_algorithm(t.x, t.w, **case.arguments, algorithm=algorithm, which=which)


@pytest.fixture
def accurate():
    cnnops.settings.accurate = True
    yield
    cnnops.settings.accurate = False


@every_pass
@pytest.mark.parametrize("device", DEVICES)
def test_accurate_leaves_out_what_rounds_more(device, which):
    left_out = set()
    for case in CONV2D:
        for layout in torch.contiguous_format, torch.channels_last:
            t = conv2d_operands(case).to(device, torch.float32).formatted(layout)
            auto, accurate = chosen(t, case, which), chosen(t, case, which, "accurate")
            assert accurate in ACCURATE
            assert accurate == auto or auto in ("winograd", "turned", "im2col")  # to im2col others yield
            left_out.add(auto)
    assert left_out - ACCURATE == ({"winograd", "turned"} if device == "cpu" else set())


@every_pass
def test_the_setting(accurate, which):
    """It changes what auto means, and nothing else."""
    case = by_name["vgg-14"]
    t = conv2d_operands(case).to(torch.float32)
    with_setting = run_pass(which, t, case)
    assert chosen(t, case, which) in ACCURATE
    assert chosen(t, case, which, "winograd") == "winograd"
    cnnops.settings.accurate = False
    assert chosen(t, case, which) == "winograd"
    assert same_bits(with_setting, run_pass(which, t, case, "accurate"))
    assert not same_bits(with_setting, run_pass(which, t, case))


def test_the_setting_is_read_when_a_graph_runs(accurate):
    case = by_name["vgg-14"]
    t = conv2d_operands(case).to(torch.float32)
    compiled = torch.compile(lambda x, w: F.conv2d(x, w, **case.arguments), backend="aot_eager", fullgraph=True)
    first = compiled(t.x, t.w)
    cnnops.settings.accurate = False
    second = compiled(t.x, t.w)
    assert same_bits(first, F.conv2d(t.x, t.w, **case.arguments, algorithm="accurate"))
    assert same_bits(second, F.conv2d(t.x, t.w, **case.arguments))
    assert not same_bits(first, second)


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_variable(value):
    script = "import cnnops; print(cnnops.settings.accurate)"
    environment = {**os.environ, "CNNOPS_ACCURATE": value}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(value == "1")


@every_pass
@pytest.mark.parametrize("case", [case for case in CONV2D if "nasty" not in case.tags], ids=str)
def test_accurate_rounds_like_direct(case, which):
    """The promise of the switch. Where `direct` refuses a layout, against what it does in the other."""
    expected, errors = expected_pass(which, case)[0], {}
    for layout in torch.contiguous_format, torch.channels_last:
        t = conv2d_operands(case).to(torch.float32).formatted(layout)
        for algorithm in "accurate", "direct":
            with or_refusal(algorithm):
                errors[algorithm, layout] = (run_pass(which, t, case, algorithm).double() - expected).norm().item()
    for layout in torch.contiguous_format, torch.channels_last:
        direct = errors.get(("direct", layout)) or errors["direct", torch.channels_last]
        assert errors["accurate", layout] <= 1.5 * direct, errors
