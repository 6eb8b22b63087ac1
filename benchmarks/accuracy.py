"""``python -m benchmarks.accuracy``: every algorithm's rounding error over the benchmark's convolutions, and what it
makes of NaN and infinity; writes docs/accuracy.md.

Errors are relative, in the L2 norm, against torch in float64, of normal operands that are rounded to the dtype first.
An element's error does not depend on the batch but in the weight's gradient, so one image is enough. The reference is
slow: it is left out where a pass has more than a tenth of a GFLOP.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch

import cnnops

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cases  # noqa: E402
from helpers import PASSES, conv2d_operands, run_pass, torch_pass  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
REFERENCE_FLOPS = 1e8
AS_TORCH = "as torch"

# One convolution for each algorithm to meet NaN and infinity in.
BAD = [
    cases.Conv2dCase("plain", 1, 16, 13, 14, 16, (3, 3), padding=(1, 1)),
    cases.Conv2dCase("depthwise", 1, 16, 13, 14, 16, (3, 3), padding=(1, 1), groups=16),
]


def error(got, expected) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def measure(case, dtype) -> dict[tuple, tuple]:
    """By algorithm and pass: the relative L2 errors where it accepts this convolution, and `direct`'s beside each. One
    layout is `direct`'s for all: where it refuses the other, it is compared with itself in this one."""
    operands, found = conv2d_operands(case).to(dtype), defaultdict(list)
    for which in PASSES:
        expected = torch_pass(which, operands.to(torch.float64), case)
        errors = []
        for layout in LAYOUTS:
            t = operands.formatted(layout)
            results = {name: result(t, case, name, which) for name in names(case)}
            errors.append({name: error(got, expected) for name, got in results.items() if got is not None})
        for here, there in (errors, errors[::-1]):
            for name, e in here.items():
                found[name, which].append((e, here.get("direct") or there.get("direct")))
    return found


def names(case) -> list[str]:
    rows = cnnops.ops.algorithms()
    return ["auto", "accurate", *(rows if case.flops <= REFERENCE_FLOPS else rows[:-1])]


def result(t, case, name, which):
    """None where the algorithm refuses."""
    try:
        return run_pass(which, t, case, name)
    except RuntimeError as refusal:
        if "refuses" not in str(refusal):
            raise


def not_finite(name, which, dtype) -> str:
    """What becomes of one NaN or infinity among an algorithm's operands, beside what becomes of it in torch."""
    found = set()
    for case in BAD:
        whole = conv2d_operands(case, whole=True).map(lambda v: v.abs() + 1)  # no zeros: infinity * 0 is NaN
        for value in torch.nan, torch.inf:
            for operand in {"forward": "xw", "grad_input": "yw", "grad_weight": "yx"}[which]:
                bad = whole.map(torch.clone)
                place = getattr(bad, {"y": "gy"}.get(operand, operand))
                place[0, 0, place.shape[2] // 2, place.shape[3] // 2] = value
                expected = torch_pass(which, bad, case)
                for layout in LAYOUTS:
                    t = bad.to(dtype).formatted(layout)
                    if (got := result(t, case, name, which)) is not None:
                        found.add(difference(got, expected))
    return "; ".join(sorted(found - {AS_TORCH})) or AS_TORCH


def difference(got, expected) -> str:
    bad, expected_bad = ~got.isfinite(), ~expected.isfinite()
    if (bad & ~expected_bad).any():
        return "spreads to the tile, as NaN"
    if (expected_bad & ~bad).any():
        return "is lost"
    return AS_TORCH if torch.equal(got.isnan(), expected.isnan()) else "infinity becomes NaN"


def table(dtype, layers) -> list[str]:
    errors, ratios = defaultdict(list), defaultdict(list)
    for case in layers:
        for key, pairs in measure(case, dtype).items():
            errors[key].append(max(e for e, _ in pairs))
            ratios[key] += [max(e / direct for e, direct in pairs if direct)] if pairs[0][1] else []
        print(dtype, case, len(errors), flush=True)
    lines = [
        "| algorithm | pass | layers | median | worst | over `direct`'s: median | worst | NaN and infinity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in errors):
        for which in PASSES:
            es, rs = errors[name, which], ratios[name, which]
            if es:
                special = "as the one taken" if name in ("auto", "accurate") else not_finite(name, which, dtype)
                lines.append(
                    f"| {name} | {which} | {len(es)} | {statistics.median(es):.1e} | {max(es):.1e} | "
                    f"{statistics.median(rs):.2f} | {max(rs):.2f} | {special} |"
                )
    return lines


HEAD = """# Rounding

Relative L2 error against float64 over the benchmark's convolutions ([tests/cases.py](../tests/cases.py)), one image
each, of normal operands; written by `python -m benchmarks.accuracy` on the instruction set `{isa}`.

`algorithm="auto"` takes the fastest that accepts, and stays within 1e-5. `algorithm="accurate"` (per call, or as the
module's argument) takes the fastest of those that round about as `direct` does:
{accurate}.
On every layer here its error is at most 1.5 times that of `direct`. `cnnops.settings.accurate = True`, or the
environment variable `CNNOPS_ACCURATE=1`, makes `"auto"` mean `"accurate"` everywhere, also in graphs compiled before.
The columns *over direct's* compare errors on the same layer, in the same layout where `direct` accepts it.

In 16 bits every algorithm sums in float32 and rounds once at the end: the error is that of the last rounding.
`dot_products` (bfloat16) uses an instruction that takes subnormal numbers, those below 1.2e-38, for zeros, in its
operands, its sums and its results, and always rounds to the nearest float whatever the processor is set to.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--case", default="", metavar="TEXT", help="layers with this in their name; nothing is written")
    parser.add_argument("--dtype", nargs="+", default=[str(d).removeprefix("torch.") for d in DTYPES], metavar="DTYPE")
    parser.add_argument("--page", default="accuracy", metavar="NAME", help="write docs/NAME.md, of another machine")
    options = parser.parse_args()
    layers = [case for case in cases.CONV2D if "mnist" in case.tags] + cases.BENCH_CONV2D
    layers = [replace(case, n=1) for case in layers if options.case in case.name]
    accurate = ", ".join(f"`{name}`" for name, _, yes in cnnops._C.algorithms("cpu") if yes)
    page = [HEAD.format(isa=cnnops.settings.instruction_set, accurate=accurate)]
    for name in options.dtype:
        page += [f"## {name}\n", *table(getattr(torch, name), layers), ""]
    text = "\n".join(page)
    if options.case:
        print(text)
    else:
        (ROOT / "docs" / f"{options.page}.md").write_text(text)


if __name__ == "__main__":
    main()
