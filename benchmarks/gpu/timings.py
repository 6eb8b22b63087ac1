"""Every layer of the benchmark's table, ours beside torch, in every layout and precision, checked against float64.

Rows are ordered so that a run that is cut has some of every group; each gets its share of the time that is left.

cuDNN is asked twice, by its heuristics and in benchmark mode. torch remembers what cuDNN chose for a layer, per thread,
and does not look at the switch again; so benchmark mode has a thread of its own.
"""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest

import torch

from benchmarks import measure, operators
from benchmarks.gpu import stage
from benchmarks.gpu.clock import clock, race
from benchmarks.gpu.facts import precision
from benchmarks.workloads import WORKLOADS, Workload

PASSES = ("forward", "grad_input", "grad_weight", "backward")
BATCH = 32  # of the layers that are measured with 8 images on a CPU
BOUND = {**{str(d).removeprefix("torch."): bound for d, bound in measure.BOUND.items()}, "tf32": measure.TF32_BOUND}
LEAST = 0.05  # seconds of rounds per row


def plan(cases: list[str]) -> list[tuple[str, Workload]]:
    """(precision, load): round robin over groups, with single images at the end."""
    buckets = {}
    for load in WORKLOADS:
        if load.dtype == torch.bfloat16 or load.case.n == 16:  # every layer comes in bfloat16; MNIST with 64 alone
            continue
        if load.case.n == 8:
            load = replace(load, case=replace(load.case, n=BATCH))
        if not any(text in load.name for text in cases):
            continue
        names = ["float64"] if load.dtype == torch.float64 else ["float32", "bfloat16"]
        if names[0] == "float32" and load.kind == "conv2d":
            names.insert(1, "tf32")
        for name in names:
            of_dtype = replace(load, dtype=torch.bfloat16) if name == "bfloat16" else load
            buckets.setdefault((load.case.n == 1, name, *load.groups[:1]), []).append((name, of_dtype))
    rounds = []
    for single in False, True:
        turns = zip_longest(*(rows for key, rows in buckets.items() if key[0] == single))
        rounds += [row for turn in turns for row in turn if row]
    return rounds


@contextmanager
def benchmark_mode(on: bool):
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Measurement:
    """A load's operands, in as many copies as it takes to leave no cache warm, and everybody's calls on them."""

    def __init__(self, load: Workload, timer, workers):
        self.load, self.timer, self.workers = load, timer, workers
        leaves, gy = operators.operands(load, timer.device)
        sizes = [t.numel() * t.element_size() for t in (*leaves, gy)]
        copies = timer.copies(sum(sizes))
        self.exact = operators.calls(load, [t.double() for t in leaves], gy.double(), ours=False)
        self.calls, self.laid = {}, {}
        for layout, memory_format in measure.LAYOUTS.items():
            sets = [[measure.in_layout(t.clone(), memory_format) for t in (*leaves, gy)] for _ in range(copies)]
            self.laid[layout] = sets[0][:-1]
            for side in "ours", "torch":
                calls = [operators.calls(load, t[:-1], t[-1], ours=side == "ours") for t in sets]
                self.calls[f"{side} {layout}"] = calls

    def contestants(self, which: str) -> Iterator[tuple[str, list, bool]]:
        """Name, calls, whether cuDNN searches."""
        for name, copies in self.calls.items():
            calls = [calls[which] for calls in copies]
            yield name, calls, False
            if "torch" in name and self.load.kind == "conv2d" and self.timer.device == "cuda":
                yield f"{name} benchmark", calls, True

    def prepare(self, which: str):
        """Everybody's sampler and error; what somebody cannot do is a sentence."""
        expected = self.exact[which]()
        samplers, errors, refusals = {}, {}, {}
        for name, calls, search in self.contestants(which):
            try:
                with benchmark_mode(search):
                    worker = self.workers[search]
                    errors[name] = worker.submit(lambda c=calls[0]: measure.error(c(), expected)).result()
                    samplers[name] = worker.submit(self.timer.sampler, calls, self.timer.modes[-1]).result()
            except RuntimeError as error:
                refusals[name] = str(error).splitlines()[0]
        return samplers, errors, refusals

    def measure(self, name: str, which: str, seconds: float) -> dict:
        load = self.load
        samplers, errors, refusals = self.prepare(which)
        flops, moved = operators.work(load, which)
        return {
            "workload": load.name,
            "kind": load.kind,
            "groups": replace(load, dtype=torch.float32).groups,
            "precision": name,
            "input": list(load.case.input_shape),
            "pass": which,
            "flops": flops,
            "bytes": moved,
            "algorithm": {layout: operators.algorithm(load, t, which) for layout, t in self.laid.items()},
            "times": race(samplers, seconds) if samplers else {},
            "errors": errors,
            "wrong": [who for who, e in errors.items() if e > BOUND[name]],
            "refusals": refusals,
        }


def run(stage_: stage.Stage, options) -> None:
    timer, rows = clock(options.device), plan(options.case)
    stage_.add(planned=sum(which in load.passes for _, load in rows for which in PASSES))
    gc.freeze()  # what is imported stays; collecting the rest is quick
    with ThreadPoolExecutor(1) as heuristics, ThreadPoolExecutor(1) as benchmark:
        for at, (name, load) in enumerate(rows):
            seconds = stage_.left() / (len(rows) - at)
            if stage_.left() < LEAST:
                stage_.add(why=f"{at} of {len(rows)} layers were measured in the time")
                return
            passes = [which for which in PASSES if which in load.passes]
            with precision(name):
                measurement = Measurement(load, timer, [heuristics, benchmark])
                for which in passes:
                    stage_.row(measurement.measure(name, which, max(LEAST, seconds / 3 / len(passes))))
            del measurement
            gc.collect()
            timer.free()


if __name__ == "__main__":
    stage.main("timings", run, __doc__)
