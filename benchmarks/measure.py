"""The clock, the check and the ceilings.

Contestants take turns: one sample each, in rounds, the first place passing from one to the next, so that whatever else
the machine does falls on all of them. A sample repeats a call until it lasts a millisecond, after one call that is not
counted. Ratios are taken within rounds; what is reported is their median and quartiles.
"""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import timer

from benchmarks import operators, peers
from benchmarks.workloads import Workload

SAMPLE = 1e-3  # seconds
# The relative L2 error against float64 beyond which a result is wrong.
BOUND = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-2}
TF32_BOUND = 2e-3
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
AVX2 = {"CNNOPS_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # both sides


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds as fit into so many seconds per workload and pass, within limits."""

    seconds: float = 1.5
    least: int = 7
    most: int = 60


QUICK = Effort(0.1, 3, 10)


# --- the clock ---


def sample(call: Callable, number: int) -> float:
    """Seconds per call."""
    start = timer()
    for _ in repeat(None, number):
        call()
    return (timer() - start) / number


def race(calls: dict[str, Callable], effort: Effort, pause: float = 0) -> dict[str, list[float]]:
    """Every contestant's samples, one of each round at the same place."""
    numbers = {}
    for name, call in calls.items():
        call()
        once = sample(call, 1)
        numbers[name] = ceil(SAMPLE / min(once, sample(call, max(1, ceil(SAMPLE / once / 4)))))
    spent = sum((number + 1) * sample(calls[name], number) + pause for name, number in numbers.items())
    rounds = max(effort.least, min(effort.most, int(effort.seconds / spent)))

    def sampler(name):
        def take():
            if pause:  # the pools of other libraries' threads fall asleep
                time.sleep(pause)
            calls[name]()
            return sample(calls[name], numbers[name])

        return take

    return take_turns({name: sampler(name) for name in calls}, range(rounds))


def take_turns(samplers: dict[str, Callable[[], float]], rounds: Iterable) -> dict[str, list[float]]:
    """A sample of everybody in each round, whose first place passes on; without Python's own collector of garbage."""
    samples = {name: [] for name in samplers}
    names = list(samplers)
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn, _ in enumerate(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(samplers[name]())
    finally:
        if collects:
            gc.enable()
    return samples


def spread(values: list[float]) -> list[float]:
    """Quartile, median, quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


# --- the check ---


def error(got, expected) -> float:
    """The worst relative L2 error of a pass's results; infinite for another shape and for NaN."""
    got, expected = ([t] if isinstance(t, Tensor) else list(t) for t in (got, expected))
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    errors = [(g.double() - e).norm() / e.norm() for g, e in zip(got, expected, strict=True)]
    return torch.stack(errors).max().nan_to_num(float("inf")).item()  # torch's max keeps a NaN


# --- a workload ---


def measure(load: Workload, passes: list[str], effort: Effort, with_peers=False) -> Iterator[dict]:
    """One row of results for each pass, as JSON has it; times in seconds."""
    leaves, gy = operators.operands(load)
    contestants, algorithms, expected = {}, {}, None
    for layout, memory_format in LAYOUTS.items():
        laid = [in_layout(t, memory_format) for t in leaves]
        for side in "ours", "torch":
            calls = operators.calls(load, laid, in_layout(gy, memory_format), ours=side == "ours")
            contestants[f"{side} {layout}"] = calls
        algorithms[layout] = laid
    expected = operators.calls(load, [t.double() for t in leaves], gy.double(), ours=False)
    for which in passes:
        if which not in load.passes:
            continue
        calls = {name: contestant[which] for name, contestant in contestants.items()}
        others = peers.forward(load, leaves) if with_peers and which == "forward" else {}
        calls |= others
        reference = expected[which]()
        errors = {name: error(call(), reference) for name, call in calls.items()}
        del reference
        samples = race(calls, effort, pause=0.005 if others else 0)
        yield {
            "workload": load.name,
            "kind": load.kind,
            "groups": load.groups,
            "dtype": load.dtype_name,
            "input": list(load.case.input_shape),
            "weight": list(load.case.weight_shape) if load.kind == "conv2d" else None,
            "pass": which,
            **dict(zip(("flops", "bytes"), operators.work(load, which), strict=True)),
            "algorithm": {layout: operators.algorithm(load, laid, which) for layout, laid in algorithms.items()},
            "times": {name: spread(times) for name, times in samples.items()},
            "errors": errors,
            "wrong": [name for name, e in errors.items() if e > BOUND[load.dtype]],
            "rounds": len(samples["ours contiguous"]),
            "ratios": _ratios(samples),
        }


def in_layout(t: Tensor, memory_format) -> Tensor:
    return t.to(memory_format=memory_format) if t.dim() == 4 else t


def _ratios(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """Others' times over ours: torch's in each layout, and the better layouts of both; each peer's."""

    def versus(other, ours):
        return spread([o / mine for o, mine in zip(samples[other], samples[ours], strict=True)])

    def better(side):
        return min((f"{side} {layout}" for layout in LAYOUTS), key=lambda name: statistics.median(samples[name]))

    found = {layout: versus(f"torch {layout}", f"ours {layout}") for layout in LAYOUTS}
    found["best"] = versus(better("torch"), better("ours"))
    found |= {name: versus(name, better("ours")) for name in samples if name.split()[0] not in ("ours", "torch")}
    return found


# --- ceilings ---


def ceilings(effort: Effort = QUICK) -> dict:
    """GFLOP/s by dtype, and GB/s read and written by copies of so many bytes in all, with the threads in use.

    Arithmetic is the fastest matrix product of torch's libraries; on a processor that they do not know well it is less
    than the instructions allow, and a fraction of it may exceed one. float64 counts half of float32: as many registers
    hold half as many numbers.
    """
    flops = {torch.float32: _fastest_product(torch.float32), torch.bfloat16: _fastest_product(torch.bfloat16)}
    flops[torch.float64] = max(_fastest_product(torch.float64), flops[torch.float32] / 2)
    copies = {}
    for size in [1, 4, 16, 64, 512]:
        source = torch.ones(size * 2**20 // 2, dtype=torch.uint8).view(torch.float32)
        target = torch.ones_like(source)
        times = race({"copy": lambda t=target, s=source: t.copy_(s)}, effort)["copy"]
        copies[size * 2**20] = size * 2**20 / statistics.median(times) / 1e9
    return {"flops": {str(d).removeprefix("torch."): rate for d, rate in flops.items()}, "copy": copies}


def _fastest_product(dtype: torch.dtype) -> float:
    best = 0
    for size in 512, 1024:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        calls = {"mm": lambda a=a, b=b: torch.mm(a, b)}
        if dtype != torch.float64 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # oneDNN's, often the faster one
            with suppress(RuntimeError):  # it has none for bfloat16 where it may not use AVX-512
                product = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
                product()
                calls["onednn"] = product
        for times in race(calls, QUICK).values():
            best = max(best, 2 * size**3 / min(times) / 1e9)
    return best


def fraction(row: dict, limits: dict) -> float:
    """Of the ceiling: the least time that its arithmetic or its bytes would need, over the time it took."""
    rate = next((rate for size, rate in limits["copy"].items() if int(size) >= row["bytes"]), None)
    rate = rate or list(limits["copy"].values())[-1]
    floor = max(row["flops"] / limits["flops"][row["dtype"]], row["bytes"] / rate) / 1e9
    return floor / ours(row)


def ours(row: dict) -> float:
    """Seconds, in our better layout."""
    return min(row["times"][f"ours {layout}"][1] for layout in LAYOUTS)


# --- the machine ---


def machine() -> dict[str, str]:
    from cnnops.__main__ import facts

    kept = all(os.environ.get(name) == value for name, value in KEEP_MEMORY.items())
    return {
        **facts(),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "oneDNN": "on" if torch.backends.mkldnn.is_available() else "off",
        "threads": str(torch.get_num_threads()),
        "memory": "kept by the allocator" if kept else "as it comes (glibc returns it to the system)",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        **peers.versions(),
    }


def where() -> str:
    """The machine and the versions, as a table's last line tells them."""
    m = machine()
    return (
        f"{m['processor']}; memory {m['memory']}; torch {m['torch'].split(',')[0]}; cnnops {m['commit']}; {m['date']}."
    )


def _processor() -> str:
    """Its name, and the numbers that tell it from others of this name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, found, value in (line.partition(":") for line in lines) if found}
    if "model name" not in facts:
        return platform.processor()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() or "unknown"
