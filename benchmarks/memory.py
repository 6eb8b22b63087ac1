"""Memory, ours and torch's: ``python -m benchmarks.memory [PART ...] [--write-docs]``.

kept        what blocks keep for their backward pass
peak        how much more a process holds while it trains
workspace   every algorithm's scratch memory
warm        times and page faults, with memory as it comes and kept
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cnnops

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import cases  # noqa: E402
from models import MODELS  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.report import markdown, with_block  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
LIBRARIES = {"ours": cnnops.nn, "torch": nn}
MB = 1e6


# --- kept: for the backward pass ---


@dataclass(frozen=True)
class Block:
    """Convolution, ReLU and, unless `pool` is 0, max pooling."""

    name: str
    n: int
    c: int
    size: int
    k: int
    kernel: int
    padding: int
    pool: int

    @property
    def shape(self):
        return (self.n, self.c, self.size, self.size)

    def chain(self, ops) -> nn.Module:
        layers = [ops.Conv2d(self.c, self.k, self.kernel, padding=self.padding), ops.ReLU()]
        return nn.Sequential(*layers, *([ops.MaxPool2d(self.pool)] if self.pool else []))

    def contestants(self) -> dict[str, nn.Module]:
        return {
            "torch": self.chain(nn),
            "ours": self.chain(cnnops.nn),
            "ours, fused": cnnops.convert(self.chain(nn), fuse=True),
        }


BLOCKS = [
    Block("lecture, 1 -> 16 5x5", 64, 1, 28, 16, 5, 0, 0),
    Block("lecture, 16 -> 32 5x5 with pooling", 64, 16, 24, 32, 5, 0, 2),
    Block("two-layer, 1 -> 32 3x3 with pooling", 64, 1, 28, 32, 3, 1, 2),
    Block("two-layer, 32 -> 64 3x3 with pooling", 64, 32, 14, 64, 3, 1, 2),
    Block("VGG, 3 -> 64 3x3", 8, 3, 224, 64, 3, 1, 0),
    Block("VGG, 64 -> 64 3x3 with pooling", 8, 64, 224, 64, 3, 1, 2),
]


def kept_for_backward(module: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that the graph holds, other than parameters and the input."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    for t in [x, *module.parameters()]:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def part_kept() -> tuple[list[str], list[list[str]]]:
    rows = []
    for block in BLOCKS:
        x = torch.randn(block.shape, requires_grad=True)
        kept = {name: kept_for_backward(module, x) for name, module in block.contestants().items()}
        for name, size in kept.items():
            rows.append([f"{block.name}, N={block.n}", name, f"{size / MB:.2f}", f"{size / kept['torch']:.2f}"])
    return ["block", "", "MB kept", "of torch's"], rows


# --- models ---


def vgg16(ops) -> nn.Module:
    layers, c = [], 3
    for k in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]:
        layers += [ops.Conv2d(c, k, 3, padding=1), ops.ReLU()] if k else [ops.MaxPool2d(2)]
        c = k or c
    dense = [nn.Linear(25088, 4096), ops.ReLU(), nn.Linear(4096, 4096), ops.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


NETWORKS = {  # how it is built, and its input's shape
    "lecture": (MODELS["lecture"].build, (64, 1, 28, 28)),
    "two-layer": (MODELS["two-layer"].build, (64, 1, 28, 28)),
    "VGG-16": (vgg16, (8, 3, 224, 224)),
}


def training_step(network: str, side: str, memory_format=torch.contiguous_format):
    """A call that is one step: forward, backward, SGD."""
    build, shape = NETWORKS[network]
    model = build(nn if side == "fused" else LIBRARIES[side])
    if side == "fused":
        cnnops.convert(model, fuse=True)
    model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, labels = torch.randn(shape).to(memory_format=memory_format), torch.zeros(shape[0], dtype=torch.long)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


# --- peak: of a process that trains ---


def status(name: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(network: str, side: str, memory_format: str) -> dict:
    """In a process of its own: how much the most that it held exceeds what it held with the model made."""
    step = training_step(network, side, measure.LAYOUTS[memory_format])
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(3):
        step()
    return {"peak": status("VmHWM") - before, "cached": cnnops.memory_stats()["bytes_cached"]}


def in_a_process(function: str, *arguments: str, **environment: str):
    code = f"import json; from benchmarks import memory; print(json.dumps(memory.{function}(*{arguments!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    run.check_returncode()
    return json.loads(run.stdout.splitlines()[-1])


def part_peak() -> tuple[list[str], list[list[str]]]:
    rows = []
    for network, (_, shape) in NETWORKS.items():
        for layout in measure.LAYOUTS:
            found = {side: in_a_process("peak_of", network, side, layout) for side in (*LIBRARIES, "fused")}
            found["off"] = in_a_process("peak_of", network, "ours", layout, CNNOPS_CACHE_LIMIT="0")
            rows.append(
                [f"{network}, N={shape[0]}", layout]
                + [f"{found[side]['peak'] / MB:.0f}" for side in ("torch", "off", "ours", "fused")]
                + [f"{found['ours']['cached'] / MB:.0f}"]
                + [f"{found[side]['peak'] / found['torch']['peak']:.2f}" for side in ("ours", "fused")]
            )
    header = ["training step", "layout", "torch, MB", "ours, cache off", "ours", "ours, fused"]
    return [*header, "ours cached at the end", "ours / torch's", "fused / torch's"], rows


# --- workspace: per algorithm ---


def part_workspace() -> tuple[list[str], list[list[str]]]:
    table = [
        case for case in [*cases.BENCH_CONV2D, *cases.CONV2D] if case in cases.BENCH_CONV2D or "mnist" in case.tags
    ]
    rows = []
    for algorithm in cnnops.ops.algorithms():
        for which in ("forward", "grad_input", "grad_weight"):
            found = {}
            for case in table:
                for memory_format in measure.LAYOUTS.values():
                    x = torch.empty(case.input_shape).to(memory_format=memory_format)
                    w = torch.empty(case.weight_shape).to(memory_format=memory_format)
                    settings = {**case.arguments, "algorithm": algorithm, "which": which}
                    try:
                        size = cnnops.ops.conv2d_workspace(x, w, **settings)
                    except RuntimeError:  # it refuses
                        continue
                    found[str(case)] = max(size, found.get(str(case), 0))
            if found:
                most = max(found, key=found.get)
                cells = [f"{statistics.median(found.values()) / 2**10:.0f}", f"{found[most] / 2**10:.0f}", most]
                rows.append([algorithm, which, str(len(found)), *cells])
    return ["algorithm", "pass", "layers", "KiB per thread, median", "most", "of layer"], rows


# --- warm: times and page faults ---


def forward(name: str, shape: tuple, side: str, memory_format, *arguments):
    module = getattr(LIBRARIES[side], name)(*arguments).to(memory_format=memory_format)
    x = torch.randn(shape).to(memory_format=memory_format)

    def call():
        with torch.no_grad():
            return module(x)

    return call


CALLS = {
    "conv 1 -> 32 3x3 @28, N=64": lambda *a: forward("Conv2d", (64, 1, 28, 28), *a, 1, 32, 3, 1, 1),
    "conv 16 -> 32 5x5 @24, N=64": lambda *a: forward("Conv2d", (64, 16, 24, 24), *a, 16, 32, 5),
    "ReLU (64, 64, 112, 112)": lambda *a: forward("ReLU", (64, 64, 112, 112), *a),
    "max pooling 2x2 (64, 64, 112, 112)": lambda *a: forward("MaxPool2d", (64, 64, 112, 112), *a, 2),
    "two-layer training step, N=64": lambda *a: training_step("two-layer", *a),
    "lecture training step, N=64": lambda *a: training_step("lecture", *a),
}


def faults(call, calls=5) -> float:
    """Pages that a call has the system bring in."""
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def limited(call, limit: int):
    """With the cache's limit as given."""

    def limited_call():
        cnnops.settings.cache_limit = limit
        call()

    return limited_call


def race_of(name: str, layout: str, sides: str) -> dict:
    """Medians in milliseconds, and faults, of torch, and of ours with and without the cache."""
    memory_format, limit = measure.LAYOUTS[layout], cnnops.settings.cache_limit
    calls = {"torch": CALLS[name]("torch", memory_format)}
    if sides == "both":
        ours = CALLS[name]("ours", memory_format)
        calls |= {"ours, cache off": limited(ours, 0), "ours": limited(ours, limit)}
    samples = measure.race(calls, measure.Effort(0.6, 5, 40))
    return {n: [statistics.median(samples[n]) * 1e3, faults(call)] for n, call in calls.items()}


def races(sides: str) -> list[dict]:
    """Each in a process of its own, as what was freed before changes what the C library does."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(race_of, [(*of, sides) for of in product(CALLS, measure.LAYOUTS)], chunksize=1)


def part_warm() -> tuple[list[str], list[list[str]]]:
    order, rows = ["torch", "torch, memory kept", "ours, cache off", "ours"], []
    as_it_comes, kept = in_a_process("races", "both"), in_a_process("races", "torch", **measure.KEEP_MEMORY)
    for of, found, other in zip(product(CALLS, measure.LAYOUTS), as_it_comes, kept, strict=True):
        found["torch, memory kept"] = other["torch"]
        cells = [f"{found[n][0]:.3g} ({found[n][1]:.0f})" for n in order]
        ratios = [f"{found[n][0] / found['ours'][0]:.2f}" for n in ("torch", "ours, cache off")]
        rows.append([*of, *cells, *ratios])
    return ["milliseconds (page faults)", "layout", *order, "torch / ours", "off / ours"], rows


# --- the command ---

PARTS = {"kept": part_kept, "peak": part_peak, "workspace": part_workspace, "warm": part_warm}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--write-docs", action="store_true", help=f"put the tables into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    for part in options.parts or PARTS:
        header, rows = PARTS[part]()
        shown = Table(*header, title=part, title_justify="left")
        for row in rows:
            shown.add_row(*row)
        Console(width=max(120, Console().width)).print(shown)
        if options.write_docs:
            table = f"{markdown(header, rows, left=2)}\n\n{measure.where()}\n"
            PAGE.write_text(with_block(PAGE.read_text(), part, table))


if __name__ == "__main__":
    main()
