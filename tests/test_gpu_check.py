"""The check for the day a GPU is there: all its stages on a CPU, its time, its sums; CUDA's clock on fakes."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check, operators, report  # noqa: E402
from benchmarks.gpu import clock, sanitizer, stage, summary, timings, training  # noqa: E402
from benchmarks.workloads import WORKLOADS  # noqa: E402


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The folder and the output of a whole check of two layers."""
    folder = tmp_path_factory.mktemp("check")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--save", folder]
    options = ["--seconds", "120", "--case", "two-layer-1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, env=environment)
    return folder, run


def test_every_stage_runs_on_a_cpu(checked):
    folder, run = checked
    assert run.returncode == 0, run.stdout + run.stderr
    found = summary.load(folder)
    ends = {name: data["status"] for name, data in found.items()}
    assert {name for name, end in ends.items() if end == "skipped"} == {"build", "sanitizer"}
    assert set(ends.values()) == {"skipped", "done"}, ends
    assert all(data["device"] == "cpu" and 0 < data["spent"] <= data["limit"] for data in found.values())
    assert "CPU" in found["build"]["why"] and "CPU" in found["sanitizer"]["why"] + found["training"]["captured"]
    assert found["facts"]["bytes_per_second"] > 0 and len(found["facts"]["operations_per_second"]) == 4
    assert found["tests"]["tests"]["passed"] > 3 and not found["tests"]["failures"]
    assert len(found["timings"]["rows"]) == found["timings"]["planned"] == 13 and len(found["training"]["rows"]) == 4
    for row in found["timings"]["rows"]:
        assert not row["wrong"] and not row["refusals"] and len(row["times"]) == len(row["errors"]) == 4
        assert all(0 < low <= middle <= high for low, middle, high in row["times"].values())
    for text in ["two-layer-1-n64", "forward", "float32 convolution", "sanitizer", torch.__version__]:
        assert text in run.stdout


def test_the_section_of_the_documentation(checked, tmp_path):
    """It is written between its marks, and stays when the page is written for the CPU again."""
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    summary.write_docs(checked[0], tmp_path)
    written = page.read_text()
    for text in [torch.__version__, "driver none", "| two-layer-1-n64 | float32 | forward |", "| sanitizer |"]:
        assert text in written
    block = report.block_of(written, "gpu", "none")
    assert block.count("|") > 50 and "Not measured yet" not in block
    assert report.block_of("a page without one", "gpu", "none\n") == "<!-- gpu -->\nnone\n<!-- /gpu -->"


# --- time ---

SLOW = """
import argparse, subprocess, sys
from benchmarks.gpu import stage
options = argparse.Namespace(seconds=60, save=stage.Path(sys.argv[1]), device="cpu")
found = stage.Stage("timings", options)
found.row({"found": 1})
found.save()
subprocess.run(["sleep", "60"])
"""


def test_a_stage_over_its_time_is_cut_and_keeps_its_rows(tmp_path):
    started = time.monotonic()
    data = gpu_check.run_stage("timings", [sys.executable, "-c", SLOW, str(tmp_path)], 3, tmp_path)
    assert time.monotonic() - started < 10
    assert data == read(tmp_path, "timings")
    assert data["status"] == "cut" and data["why"] == "stopped after 3 s" and data["rows"] == [{"found": 1}]


def test_the_next_stage_goes_on(tmp_path, monkeypatch):
    """After one that is cut and one that crashes; what is left over is shared among those that come."""
    limits = []

    def run_command(command, seconds):
        limits.append(seconds)
        return {0: (None, ""), 1: (1, "Traceback\nRuntimeError: CUDA error")}.get(len(limits) - 1, (0, ""))

    monkeypatch.setattr(stage, "run_command", run_command)
    options = gpu_check.parser().parse_args(["--device", "cpu", "--save", str(tmp_path), "--seconds", "100"])
    data = gpu_check.run(options)
    ends = [(d["status"], d["why"]) for d in data.values()]
    assert ends[0][0] == "cut" and ends[1] == ("failed", "it found nothing")
    shares = [100 * 140 / 560, gpu_check.LEAST, 100 * 110 / 400, 100 * 80 / 290, 100 * 150 / 210, 100]
    assert limits == pytest.approx(shares, rel=0.01)  # nobody took any
    assert [line for line in summary.failures(data) if line.startswith("facts")]


def test_where_no_time_is_left_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "run_command", lambda command, seconds: pytest.fail("it was run"))
    data = gpu_check.run(gpu_check.parser().parse_args(["--device", "cpu", "--save", str(tmp_path), "--seconds", "0"]))
    assert {d["why"] for d in data.values()} == {"no time was left"}


def test_without_the_extension_nothing_else_is_run(tmp_path, monkeypatch):
    ran = []

    def run_stage(name, *_):
        ran.append(name)
        return {"status": "failed", "spent": 1.0}

    monkeypatch.setattr(gpu_check, "run_stage", run_stage)
    gpu_check.run(gpu_check.parser().parse_args(["--save", str(tmp_path)]))
    assert ran == ["build"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--save", str(tmp_path)])
    with pytest.raises(SystemExit, match="no GPU here; --device cpu"):
        gpu_check.main()


# --- what is measured ---


def test_the_plan_begins_with_some_of_every_group():
    rows = timings.plan([""])
    assert len({(name, load.name) for name, load in rows}) == len(rows)
    layers = {load.case.name for load in WORKLOADS}
    assert {load.case.name for _, load in rows} == layers
    groups = {group for load in WORKLOADS for group in load.groups[:1]}
    first = rows[: 3 * len(groups)]
    seen = {group for _, load in first for group in load.groups[:1]} | {"bfloat16"}
    assert seen >= groups and {name for name, _ in first} == {"float32", "tf32", "bfloat16", "float64"}
    batches = [load.case.n for _, load in rows]
    assert 1 not in batches[: batches.index(1)] and set(batches[batches.index(1) :]) == {1}


def test_steps_come_before_blocks_in_every_mode():
    options = SimpleNamespace(device="cuda", case=[""])
    rows = training.plan(options, ("eager", "captured"))
    assert [row[0] for row in rows[:8]] == [training.step_row] * 8 and len(rows) > 30
    assert {row[2:] for row in rows[:8]} == {(m, p) for m in ("eager", "captured") for p in ("float32", "tf32")}


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeGraph:
    """Does at its replay nothing for a while."""

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"

    def capture_end(self):
        pass

    def replay(self):
        time.sleep(1e-4)


@pytest.fixture
def cuda_clock(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=60 * 2**20, total_memory=2**37)
    for name, fake in {
        "Stream": lambda: None,
        "stream": lambda stream: nullcontext(),
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "synchronize": lambda: None,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock.clock("cuda")


def test_copies_are_more_than_the_cache_holds(cuda_clock):
    assert [cuda_clock.copies(size) for size in (2**30, 60 * 2**20, 2**20, 2**10)] == [1, 3, 32, 32]


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_calls_take_turns_in_whole_rounds(cuda_clock, mode):
    counts = [0, 0, 0]

    def call(i):
        counts[i] += 1
        return torch.ones(1)

    sampler = cuda_clock.sampler([lambda i=i: call(i) for i in range(3)], mode)
    before = list(counts)
    assert len(set(before)) == 1
    assert 0 < sampler() < 1e-3
    assert (counts == before) == (mode == "captured") and len(set(counts)) == 1


def test_a_graph_has_as_many_calls_as_last_a_millisecond(cuda_clock, monkeypatch):
    captured = []
    monkeypatch.setattr(cuda_clock, "capture", lambda calls, number: captured.append(number) or FakeGraph())
    cuda_clock.sampler([lambda: None] * 2)
    assert captured[0] == 2 and 4 <= captured[1] <= 22 and captured[1] % 2 == 0


def test_cudnn_searches_in_a_thread_of_its_own(cuda_clock, monkeypatch, tmp_path):
    """torch remembers per thread what cuDNN chose: neither mode must see the other's choice."""
    draw, theirs, seen = operators.operands, operators.calls, set()
    monkeypatch.setattr(operators, "operands", lambda load, device: draw(load))

    def calls(load, leaves, gy, ours):
        found = theirs(load, leaves, gy, ours)
        if ours or gy.dtype == torch.float64:
            return found

        def watched(call):
            seen.add((threading.get_ident(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32))
            return call()

        return {which: lambda call=call: watched(call) for which, call in found.items()}

    monkeypatch.setattr(operators, "calls", calls)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(clock.CudaClock, "copies", lambda self, size: 1)
    monkeypatch.setattr(clock, "LONGEST_GRAPH", 2)
    monkeypatch.setattr(timings, "LEAST", 0)
    options = SimpleNamespace(device="cuda", case=["two-layer-1-n64"], save=tmp_path, seconds=30)
    found = stage.Stage("timings", options)
    timings.run(found, options)
    rows = found.data["rows"]
    assert {row["precision"] for row in rows} == {"float32", "tf32", "bfloat16"}
    assert len(rows) == found.data["planned"] == 3 * 3 + 2 * 2
    benchmarked = {"torch contiguous benchmark", "torch channels_last benchmark"}
    for row in rows:
        assert (benchmarked <= set(row["times"])) == (row["kind"] == "conv2d") and not row["wrong"]
    assert {(benchmark, tf32) for _, benchmark, tf32 in seen} == {(b, t) for b in (False, True) for t in (False, True)}
    threads = [{thread for thread, benchmark, _ in seen if benchmark == mode} for mode in (False, True)]
    assert len(threads[0]) == len(threads[1]) == 1 and threads[0] != threads[1]


# --- sums ---


def row(**changes):
    times = {"ours contiguous": 4e-6, "ours channels_last": 2e-6, "torch contiguous": 3e-6, "torch channels_last": 9e-6}
    base = {
        "workload": "layer-n32", "kind": "conv2d", "groups": ["3x3"], "precision": "float32", "pass": "forward",
        "flops": 1e6, "bytes": 1e3, "algorithm": {"contiguous": "direct", "channels_last": "im2col"}, "wrong": [],
        "times": {who: [t, t, t] for who, t in times.items()}, "refusals": {},
    }  # fmt: skip
    return {**base, **changes}


FACTS = {"bytes_per_second": 1e9, "operations_per_second": {"float32": 1e12, "tf32": 1e13, "bfloat16": 2e13}}


def data_of(*rows, training=()):
    data = {name: {} for name in summary.STAGES}
    return data | {"facts": FACTS, "timings": {"rows": list(rows)}, "training": {"rows": list(training)}}


def goal(data, about):
    return next(line for line in summary.goals(data) if line[0] == about)


def test_floors_and_ratios():
    computes, moves = summary.entries(data_of(row(), row(bytes=3e3)))
    assert computes["ratio"] == pytest.approx(1.5) and computes["by"] == "im2col"
    assert computes["rival"] == "torch contiguous"
    assert computes["floor"] == pytest.approx(1e-6) and computes["fraction"] == pytest.approx(0.5)
    assert computes["computes"] == (1e6 / 1e12 > 1e3 / 1e9)
    assert moves["floor"] == pytest.approx(3e-6) and not moves["computes"]


def test_goals():
    half = {"precision": "bfloat16", "flops": 1e8}  # bound by arithmetic
    steps = [
        {"kind": "step", "name": "lecture", "mode": "captured", "precision": "float32", "wrong": [],
         "times": {"ours fused contiguous": [1, 1, 1], "torch contiguous": [1, 2, 3]}},
        {"kind": "block", "name": "b", "mode": "eager", "precision": "float32", "pooled": True, "layout": "contiguous",
         "pass": "forward", "times": {"fused": [1, 1, 1], "chain": [1, 1, 1], "torch": [1.2, 1.2, 1.2]}},
    ]  # fmt: skip
    pool = {"kind": "max_pool2d", "workload": "max_pool2d-2x2-memory-n64", "flops": 0, "groups": ["pooling"]}
    data = data_of(row(), row(**half), row(**pool), row(**pool, **{"pass": "backward"}), training=steps)
    assert goal(data, "float32 convolution, to cuDNN without TF32")[2:] == ["1.50", "1.50", "1"]
    assert goal(data, "TF32 and bfloat16, bound by arithmetic, to cuDNN")[2:] == ["1.50", "1.50", "1"]
    assert goal(data, "TF32 and bfloat16, bound by memory, to cuDNN")[2] == "not measured"
    assert goal(data, "pooling, of copy bandwidth")[2:] == ["0.50 (missed)", "0.50", "2"]
    assert goal(data, "pooling backward, to torch")[2:] == ["1.50", "1.50", "1"]
    assert goal(data, "MNIST training step, captured, to torch's")[2] == "2.00"
    assert goal(data, "convolution, ReLU and pooling as one, to torch's three")[2] == "1.20 (missed)"
    assert ["3x3", "bfloat16", "forward", "1.50"] in [line[:4] for line in summary.by_group(data)]


def test_what_is_wrong_or_refused_is_told():
    data = data_of(row(wrong=["ours contiguous", "torch contiguous"]), row(refusals={"ours contiguous": "why not"}))
    assert summary.failures(data) == [
        "layer-n32 float32 forward: ours contiguous is wrong",
        "layer-n32 float32 forward: ours contiguous: why not",
    ]
    assert summary.table(data)[0][0] == "layer-n32 WRONG"
    only_ours = row(times={"ours contiguous": [1, 1, 1]}, refusals={"torch contiguous": "no"})
    assert summary.table(data_of(only_ours)) == []


@pytest.mark.parametrize(
    "answers, status",
    [
        ([(0, "ERROR SUMMARY: 0 errors"), (0, "RACECHECK SUMMARY: 0 hazards displayed")], "cut"),
        ([(9, "ERROR SUMMARY: 1 error"), (0, "")], "failed"),
        ([(None, "Invalid __global__ write"), (0, "")], "failed"),
        ([(0, ""), (None, "12 passed")], "cut"),
    ],
)
def test_what_compute_sanitizer_says(tmp_path, monkeypatch, answers, status):
    said = iter(answers)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: name)
    monkeypatch.setattr(stage, "run_command", lambda *args, **settings: next(said))
    found = stage.Stage("sanitizer", SimpleNamespace(seconds=60, save=tmp_path, device="cuda"))
    sanitizer.run(found, SimpleNamespace(device="cuda"))
    assert found.data["status"] == status and [r["tool"] for r in found.data["rows"]] == sanitizer.TOOLS
    assert ("why" in found.data) == any(code != 0 for code, _ in answers)  # else it is done
