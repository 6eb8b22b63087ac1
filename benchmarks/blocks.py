"""Convolution, ReLU and max pooling as one operator beside the same as three, ours and torch's.

    python -m benchmarks.blocks [--threads N] [--case TEXT] [--seconds S] [--keep-memory] [--layout NAME]

Milliseconds, contestants in turns; then what the backward pass keeps besides the input and the parameters, which the
layer before and the optimizer keep anyway. Results are checked against float64 first.
"""

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as TF

from cnnops import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for cases.py
from benchmarks import measure  # noqa: E402

# name -> batch, channels, size, output channels, kernel, stride, padding, pooling's (kernel, stride, padding) or none
CASES = {
    "lecture-1": (64, 1, 28, 16, 5, 1, 0, None),
    "lecture-2": (64, 16, 24, 32, 5, 1, 0, (2, 2, 0)),
    "lecture-3": (64, 32, 10, 64, 5, 1, 0, None),
    "lecture-4": (64, 64, 6, 128, 5, 1, 0, None),
    "two-layer-1": (64, 1, 28, 32, 3, 1, 1, (2, 2, 0)),
    "two-layer-2": (64, 32, 14, 64, 3, 1, 1, (2, 2, 0)),
    "vgg-64-224-n1": (1, 64, 224, 64, 3, 1, 1, (2, 2, 0)),
    "vgg-128-112-n1": (1, 128, 112, 128, 3, 1, 1, (2, 2, 0)),
    "vgg-256-56-n1": (1, 256, 56, 256, 3, 1, 1, (2, 2, 0)),
    "vgg-512-14-n1": (1, 512, 14, 512, 3, 1, 1, (2, 2, 0)),
    "vgg-64-224-relu-n1": (1, 64, 224, 64, 3, 1, 1, None),
    "vgg-64-224-n8": (8, 64, 224, 64, 3, 1, 1, (2, 2, 0)),
    "vgg-128-112-n8": (8, 128, 112, 128, 3, 1, 1, (2, 2, 0)),
    "vgg-512-14-n8": (8, 512, 14, 512, 3, 1, 1, (2, 2, 0)),
    "resnet-stem-n8": (8, 3, 224, 64, 7, 2, 3, (3, 2, 1)),
}


def fused(x, w, b, stride, padding, pool):
    if not pool:
        return F.conv_relu2d(x, w, b, stride, padding)
    window = dict(zip(("pool_kernel_size", "pool_stride", "pool_padding"), pool, strict=True))
    return F.conv_relu_max_pool2d(x, w, b, stride, padding, **window)


def chain(functions):
    def run(x, w, b, stride, padding, pool):
        y = functions.relu(functions.conv2d(x, w, b, stride, padding))
        return functions.max_pool2d(y, *pool) if pool else y

    return run


CONTESTANTS = {"fused": fused, "chain": chain(F), "torch": chain(TF)}


def kept_bytes(call, without) -> int:
    """Of the tensors that the backward pass of a call keeps, but for some."""
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    for t in without:
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def passes(case, layout, device="cpu") -> tuple[list, dict]:
    """Leaves, and each contestant's calls by pass: forward, and forward and backward. Checked: a wrong one ends all."""
    n, c, size, k, kernel, *rest = case
    torch.manual_seed(0)
    draw = partial(torch.randn, device=device)
    x, w = draw(n, c, size, size), draw(k, c, kernel, kernel) / (c * kernel**2) ** 0.5
    x, w = (t.to(memory_format=measure.LAYOUTS[layout]).requires_grad_() for t in (x, w))
    leaves = [x, w, draw(k).requires_grad_()]

    def forward(run, leaves=leaves):
        with torch.no_grad():
            return run(*leaves, *rest)

    exact = forward(CONTESTANTS["torch"], [t.double() for t in leaves])
    gy = draw(exact.shape).to(memory_format=measure.LAYOUTS[layout])

    def backward(run):
        return torch.autograd.grad(run(*leaves, *rest), leaves, gy)

    for name, run in CONTESTANTS.items():
        if (error := measure.error(forward(run), exact)) > measure.BOUND[torch.float32]:
            sys.exit(f"{name} is wrong by {error}")
    for ours, theirs in zip(backward(fused), backward(CONTESTANTS["chain"]), strict=True):
        if not torch.equal(ours, theirs):
            sys.exit("the gradients of the block are not the chain's")
    steps = {"forward": forward, "backward": backward}
    return leaves, {
        which: {name: partial(step, run) for name, run in CONTESTANTS.items()} for which, step in steps.items()
    }


def race(case, layout, options) -> tuple[dict, dict, dict]:
    """Milliseconds forward, and forward and backward; kept bytes: of each contestant."""
    leaves, calls = passes(case, layout)
    rest = case[5:]
    effort = measure.Effort(options.seconds, 5, 60)
    times = []
    for contestants in calls.values():
        samples = measure.race(contestants, effort)
        times.append({name: statistics.median(samples[name]) * 1e3 for name in samples})
    kept = {name: kept_bytes(partial(run, *leaves, *rest), leaves) for name, run in CONTESTANTS.items()}
    return *times, kept


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--layout", choices=measure.LAYOUTS, help="only this one")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case, layout and pass")
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc not to return memory to the system")
    options = parser.parse_args()
    if options.keep_memory and not measure.KEEP_MEMORY.items() <= os.environ.items():
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.blocks", *sys.argv[1:]],
            {**os.environ, **measure.KEEP_MEMORY},
        )
    torch.set_num_threads(options.threads)
    table = Table(
        "block", "layout", "forward: fused", "chain", "torch", "with backward: fused", "chain", "torch", "kept"
    )
    for name, case in CASES.items():
        if options.case not in name:
            continue
        for layout in [options.layout] if options.layout else measure.LAYOUTS:
            *times, kept = race(case, layout, options)
            cells = []
            for step in times:
                cells.append(f"{step['fused']:.3f}")
                cells += [f"x{step[other] / step['fused']:.2f}" for other in ("chain", "torch")]
            megabytes = " / ".join(f"{kept[other] / 2**20:.1f}" for other in CONTESTANTS)
            table.add_row(name, layout, *cells, f"{megabytes} MiB (x{kept['torch'] / kept['fused']:.1f})")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
