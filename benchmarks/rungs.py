"""What each rung gains: ``python -m benchmarks.rungs [--write-docs]``.

The same few layers, forward, in float32, by every algorithm that accepts them, in both layouts, by one thread and by
two; one of them with every instruction set; and max pooling beside torch's. --write-docs puts the tables, and what each
rung gains over the one below, into docs/kernels.md.
"""

import argparse
from dataclasses import replace

import cases
import torch
from cases import Conv2dCase
from torch.nn import functional as theirs

import cnnops
from benchmarks import ROOT
from benchmarks.measure import LAYOUTS, Effort, race, where
from benchmarks.report import markdown, with_block

EFFORT, WARMING = Effort(0.3, 3, 40), Effort(0, 3, 3)
THREADS = 1, 2
_BY_NAME = {case.name: case for case in [*cases.CONV2D, *cases.BENCH_CONV2D]}
LAYERS = {
    "1→32, 3x3 @28, N=64": replace(_BY_NAME["two-layer-1"], n=64),
    "16→32, 5x5 @24, N=64": replace(_BY_NAME["lecture-2"], n=64),
    "32→64, 3x3 @14, N=64": replace(_BY_NAME["two-layer-2"], n=64),
    "64→64, 3x3 @56, N=1": replace(_BY_NAME["resnet-3x3-64-64-56"], n=1),
    "64→256, 1x1 @56, N=1": replace(_BY_NAME["resnet-1x1-64-256-56"], n=1),
    "depthwise 144, 3x3 @56, N=1": replace(_BY_NAME["mobilenet-3x3-144-144-56"], n=1),
}
VECTORS = "64→64, 3x3 @56, N=1"
NAMES = list(reversed(cnnops.ops.algorithms()))  # the slowest first, as one climbs


def operands(case: Conv2dCase, layout: str) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = case.input_shape, case.weight_shape
    return [torch.randn(shape, generator=draw).to(memory_format=LAYOUTS[layout]) for shape in shapes]


def calls(case: Conv2dCase, layout: str) -> dict:
    """By the names of algorithms; those that refuse are left out."""
    x, w = operands(case, layout)
    found = {}
    for name in NAMES:
        try:
            cnnops.ops.conv2d_algorithm(x, w, **case.arguments, algorithm=name)
        except RuntimeError:
            continue
        found[name] = lambda name=name: cnnops.functional.conv2d(x, w, **case.arguments, algorithm=name)
    return found


def rates(contestants: dict, work: float) -> dict[str, list[float]]:
    """Billions per second at best, by one thread and by two: a median would tell of the machine's other users."""
    found = {name: [] for name in contestants}
    race(contestants, WARMING)  # the first ones pay for fresh memory
    for threads in THREADS:
        torch.set_num_threads(threads)
        for name, samples in race(contestants, EFFORT).items():
            found[name].append(work / min(samples) / 1e9)
    return found


def cell(rate: list[float] | None) -> str:
    return " / ".join(f"{r:.2g}" if r < 10 else f"{r:.0f}" for r in rate) if rate else "–"


Found = dict[tuple[str, str], dict[str, list[float]]]  # layer, layout -> algorithm -> rates


def climb() -> Found:
    return {
        (about, layout): rates(calls(case, layout), case.flops) for about, case in LAYERS.items() for layout in LAYOUTS
    }


def algorithms(found: Found) -> str:
    rows = [[*place, *(cell(rungs.get(name)) for name in NAMES)] for place, rungs in found.items()]
    return markdown(["GFLOP/s", "layout", *NAMES], rows, left=2)


# A rung's block in the document -> its layout and algorithm, and those of the rung below.
GAINS = {
    "im2col": ("contiguous", "im2col", "contiguous", "reference"),
    "direct": ("contiguous", "direct", "contiguous", "im2col"),
    "channels_last": ("channels_last", "direct", "contiguous", "direct"),
    "depthwise": ("channels_last", "depthwise", "contiguous", "direct"),
    "winograd": ("channels_last", "winograd", "channels_last", "direct"),
    "few_channels": ("contiguous", "few_channels", "contiguous", "direct"),
}


def gains(found: Found, rung: str) -> str:
    """By what factor it is faster than the rung below, layer by layer; depthwise layers are for `depthwise` to gain."""
    layout, name, layout_below, name_below = GAINS[rung]
    said = []
    for about in dict.fromkeys(about for about, _ in found):
        above, below = found[about, layout].get(name), found[about, layout_below].get(name_below)
        if above and below and (name == "depthwise") == ("depthwise" in found[about, "channels_last"]):
            said.append(f"{about}: {cell([a / b for a, b in zip(above, below, strict=True)])}")
    where = "" if layout == layout_below else f", {layout_below}"
    return f"Gain over `{name_below}`{where}, by one thread / by two: {'; '.join(said)}.\n"


def instruction_sets() -> str:
    case, found = LAYERS[VECTORS], {}
    sets = list(reversed(cnnops.settings.instruction_sets))
    for name in sets:
        cnnops.settings.instruction_set = name
        by_algorithm = calls(case, "contiguous")
        found[name] = rates({n: by_algorithm[n] for n in ("reference", "direct")}, case.flops)
    rows = [[algorithm, *(cell(found[name][algorithm]) for name in sets)] for algorithm in ("reference", "direct")]
    return markdown([f"GFLOP/s, {VECTORS}", *sets], rows)


def pooling() -> str:
    rows = []
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(64, 32, 28, 28).to(memory_format=memory_format)
        contestants = {
            "torch": lambda x=x: theirs.max_pool2d(x, 2),
            "cnnops": lambda x=x: cnnops.functional.max_pool2d(x, 2),
        }
        read_and_written = x.numel() * 4 * 5 / 4
        rows.append([layout, *map(cell, rates(contestants, read_and_written).values())])
    return markdown(["GB/s, max 2x2, 32 @28, N=64", "torch", "cnnops"], rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rungs", description=__doc__)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    found = climb()
    blocks = {
        "rungs": f"{algorithms(found)}\n\nBy one thread / by two. {where()}\n",
        "vectors": f"{instruction_sets()}\n",
        "pooling": f"{pooling()}\n",
        **{rung: gains(found, rung) for rung in GAINS},
    }
    page = ROOT / "docs" / "kernels.md"
    for name, text in blocks.items():
        print(text)
        if options.write_docs:
            page.write_text(with_block(page.read_text(), name, text))


if __name__ == "__main__":
    main()
