"""Warm and scratch memory, seen from the kernels: what is left in them changes no number, and they stay small."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod

import cases
import pytest
import torch
from helpers import PASSES, accepts, conv2d_operands, or_refusal, run_pass, same_bits
from test_memory import MB, changes, clean, make  # noqa: F401

import cnnops
from cnnops import functional as F

# ---- the numbers are the same ----


def poison(size):
    """Makes sure that the next blocks of this size are full of NaN."""
    if size >= 65536:
        blocks = [make(size // 4 * 4).fill_(torch.nan) for _ in range(6)]
        del blocks


def sizes_of(*tensors):
    return {t.untyped_storage().nbytes() for t in tensors}


def assert_indifferent(call):
    """The same bits from torch's memory, from fresh blocks, and from blocks full of NaN."""
    cnnops.settings.cache_limit = 0
    expected = [t.clone() for t in call()]
    cnnops.settings.cache_limit = 256 * MB
    fresh = call()
    assert all(same_bits(a, b) for a, b in zip(expected, fresh, strict=True))
    sizes = sizes_of(*fresh)
    del fresh
    for size in sizes:
        poison(size)
    change, got = changes(call)
    assert change["hits"] >= sum(size >= 65536 for size in sizes)
    assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))


formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


def with_large_output(case):
    """With a batch that makes the output a block of the cache in float32."""
    return replace(case, n=max(case.n, -(-32768 // prod(case.output_shape[1:]))))


LARGE = [case for case in map(with_large_output, cases.CONV2D) if case.n <= 64 and case.flops < 2e8]


@formats
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("algorithm", ["auto", *(a for a in cnnops.ops.algorithms() if a != "reference")])
def test_convolutions_write_every_element(algorithm, which, memory_format):
    ran = 0
    for case in LARGE:
        t = conv2d_operands(case).to(torch.float32).formatted(memory_format)
        settings = {**case.arguments, "algorithm": algorithm, "which": which}
        if algorithm != "auto" and not accepts(which, t, case, algorithm):
            continue
        workspace = cnnops.ops.conv2d_workspace(t.x, t.w, **settings)

        # In a thread of its own, so that its scratch memory comes from the same blocks.
        def call(t=t, case=case, workspace=workspace):
            poison(workspace)
            with ThreadPoolExecutor(1) as thread:
                return [thread.submit(run_pass, which, t, case, algorithm).result()]

        with or_refusal(algorithm):
            assert_indifferent(call)
            ran += 1
    if not ran:
        pytest.skip(f"{algorithm} takes none of these in this layout")


def with_gradients(function):
    """The result and the gradients of all its operands."""

    def call(*operands):
        leaves = [t.detach().requires_grad_() for t in operands]
        y = function(*leaves)
        gy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(memory_format=memory_format_of(operands[0]))
        return [y.detach(), *torch.autograd.grad(y, leaves, gy)]

    return call


def memory_format_of(t):
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.full((16,), 0.3)),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d with gaps": lambda x: F.max_pool2d(x, 2, 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 33),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d with gaps": lambda x: F.avg_pool2d(x, 2, 3),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 33),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, torch.ones(16, 3, 3, 3) / 7, torch.ones(3), stride=2),
    "reflect": lambda x: torch.ops.cnnops.conv2d(x, torch.ones(16, 16, 3, 3), None, 1, 1, 1, 1, "reflect", "auto"),
}


@formats
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_others_write_every_element(name, memory_format):
    x = torch.randn(2, 16, 66, 66).contiguous(memory_format=memory_format)
    assert_indifferent(lambda: with_gradients(FUNCTIONS[name])(x))


# ---- workspace ----


@formats
@pytest.mark.parametrize("which", PASSES)
def test_workspace_is_at_most_8_mib_per_thread(which, memory_format):
    """Every algorithm, on every convolution that is benchmarked or tested."""
    for case in [*cases.BENCH_CONV2D, *cases.CONV2D]:
        x = torch.empty(case.input_shape).to(memory_format=memory_format)
        w = torch.empty(case.weight_shape).to(memory_format=memory_format)
        for algorithm in cnnops.ops.algorithms():
            try:
                size = cnnops.ops.conv2d_workspace(x, w, **case.arguments, algorithm=algorithm, which=which)
            except RuntimeError:  # it refuses
                continue
            assert size <= 8 * MB, f"{algorithm}, {case}: {size / MB:.1f} MiB"
