"""Fused blocks beside the chain of three operators, and a training step of the notes' models beside torch's.

Both call by call, as Python runs them, and captured in a CUDA graph.
"""

import copy

import torch

import cnnops
from benchmarks import blocks, measure, models
from benchmarks.gpu import stage
from benchmarks.gpu.clock import clock, race
from benchmarks.gpu.facts import precision
from benchmarks.gpu.timings import BATCH

PRECISIONS = ("float32", "tf32")
LEAST = 0.1  # seconds of rounds per row
STEPS = [load for load in models.LOADS if load.training and load.model in ("lecture", "two-layer")]


def plan(options, modes) -> list[tuple]:
    """(function, what it takes), the steps first, each with every precision and mode."""
    on_this = PRECISIONS if options.device == "cuda" else PRECISIONS[:1]
    rows = [(step_row, load, mode, name) for load in STEPS for name in on_this for mode in modes]
    for name, (n, *rest) in blocks.CASES.items():
        if n == 1 and "-n1" in name:
            continue
        case = BATCH if n == 8 else n, *rest
        name = name.replace("-n8", f"-n{BATCH}")
        rows += [(block_row, (name, case, layout), mode, on_this[0]) for layout in measure.LAYOUTS for mode in modes]
    return [row for row in rows if any(text in str(row[1]) for text in options.case)]


def block_row(what, mode, timer, seconds) -> list[dict]:
    name, case, layout = what
    _, calls = blocks.passes(case, layout, timer.device)
    rows = []
    for which, contestants in calls.items():
        samplers = {who: timer.sampler([call], mode) for who, call in contestants.items()}
        row = {"kind": "block", "name": name, "layout": layout, "pass": which, "pooled": bool(case[-1])}
        rows.append({**row, "times": race(samplers, seconds / 2)})
    return rows


def step_row(load, mode, timer, seconds) -> list[dict]:
    """Everybody trains a copy of the same network, in both layouts."""
    model, x, classes = load.make()
    model, x, classes = model.to(timer.device), x.to(timer.device), classes.to(timer.device)
    exact = copy.deepcopy(model).double()
    reference = torch.cat([g.flatten() for g in models.step(exact, x.double(), classes)()])
    samplers, errors = {}, {}
    for layout, memory_format in measure.LAYOUTS.items():
        image = x.contiguous(memory_format=memory_format)
        for who, convert in {
            "ours": cnnops.convert,
            "ours fused": lambda model: cnnops.convert(model, fuse=True),
            "torch": lambda model: model,
        }.items():
            changed = convert(copy.deepcopy(model)).to(memory_format=memory_format)
            call = models.step(changed, image, classes)
            got = torch.cat([g.double().flatten() for g in call()])
            errors[f"{who} {layout}"] = measure.error(got, reference)
            samplers[f"{who} {layout}"] = timer.sampler([call], mode)
    wrong = [who for who, e in errors.items() if e > models.GRADIENTS]
    return [{"kind": "step", "name": load.name, "times": race(samplers, seconds), "errors": errors, "wrong": wrong}]


def run(stage_: stage.Stage, options) -> None:
    timer = clock(options.device)
    rows = plan(options, timer.modes)
    if len(timer.modes) == 1:
        stage_.add(captured=f"skipped: {timer.why_not_captured}")
    for at, (function, what, mode, name) in enumerate(rows):
        if stage_.left() < LEAST:
            stage_.add(why=f"{at} of {len(rows)} rows were measured in the time")
            return
        seconds = max(LEAST, stage_.left() / (len(rows) - at) / 3)
        with precision(name):
            try:
                found = function(what, mode, timer, seconds)
            except (RuntimeError, SystemExit) as error:  # one that cannot be captured, or is wrong, is told and passed
                found = [{"kind": function.__name__, "name": str(what), "refused": str(error)[:500]}]
        for row in found:
            stage_.row({**row, "mode": mode, "precision": name})
        timer.free()


if __name__ == "__main__":
    stage.main("training", run, __doc__)
