"""The benchmark: its fields, that it notices wrong results, and its documents. Times themselves are not tested."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cnnops  # noqa: E402
from benchmarks import cli, measure, operators, peers, report  # noqa: E402
from benchmarks.workloads import GROUPS, PASSES, WORKLOADS, Workload  # noqa: E402

TINY = measure.Effort(0, 2, 2)


def by_name(table, name, n=2):
    return replace(next(case for case in table if case.name == name), n=n)


CONV = by_name(cases.CONV2D, "two-layer-1")
POOL = by_name(cases.MAX_POOL2D, "lecture")
PLAIN = replace(POOL, kernel=(1, 1), stride=(1, 1))
LOADS = [
    *(Workload("conv2d", CONV, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    Workload("conv2d", by_name(cases.CONV2D, "mobilenet-down", 1)),
    *(Workload(kind, POOL) for kind in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")),
    *(Workload(kind, PLAIN) for kind in ("relu", "leaky_relu", "relu6", "prelu")),
]


@pytest.fixture(scope="module")
def data():
    rows = [row for load in LOADS for row in measure.measure(load, list(PASSES), TINY)]
    limits = {"flops": {"float32": 200.0, "float64": 100.0, "bfloat16": 400.0}, "copy": {2**20: 100.0, 2**29: 40.0}}
    data = {"machine": measure.machine(), "ceilings": limits, "quick": True, "results": rows}
    return json.loads(json.dumps(data))  # as it is read again


def test_every_kind_and_dtype_is_tried():
    assert {(load.kind, load.dtype) for load in WORKLOADS} == {(load.kind, load.dtype) for load in LOADS}


def test_the_table_of_workloads():
    names = [load.name for load in WORKLOADS]
    assert len(set(names)) == len(names)
    assert all(load.groups for load in WORKLOADS)
    assert all(any(group.name in load.groups for load in WORKLOADS) for group in GROUPS)
    for load in WORKLOADS:
        assert min(load.case.output_shape) > 0
        assert "-3x3-" not in load.name or load.case.kernel[0] == 3


def test_rows(data):
    """Every pass of every kind, right, in both layouts, with times and ratios that are numbers."""
    assert [(row["workload"], row["pass"]) for row in data["results"]] == [
        (load.name, which) for load in LOADS for which in load.passes
    ]
    for row in data["results"]:
        assert not row["wrong"], row
        assert set(row["times"]) == set(row["errors"]) == set(report.CONTESTANTS)
        assert all(0 < low <= middle <= high for low, middle, high in row["times"].values())
        assert all(0 < low <= middle <= high for low, middle, high in row["ratios"].values())
        assert row["bytes"] > 0 and (row["flops"] > 0) == (row["kind"] == "conv2d")
        assert 0 < measure.fraction(row, data["ceilings"]) < math.inf
        if row["kind"] == "conv2d":
            assert set("/".join(row["algorithm"].values()).split("/")) <= set(cnnops.ops.algorithms())
    assert not report.failures(data["results"])


@pytest.mark.parametrize(
    "load", [LOADS[0], Workload("max_pool2d", POOL), Workload("relu", PLAIN)], ids=lambda load: load.kind
)
def test_wrong_numbers_are_failures(load, monkeypatch):
    right = getattr(cnnops.functional, load.kind)

    def wrong(*args, **kwargs):
        return right(*args, **kwargs).square()

    monkeypatch.setattr(cnnops.functional, load.kind, wrong)
    rows = list(measure.measure(load, list(PASSES), TINY))
    assert {row["pass"] for row in rows if "ours contiguous" in row["wrong"]} >= {"forward", "step"}
    assert not any("torch contiguous" in row["wrong"] for row in rows)
    assert f"{load.name} forward: ours contiguous is wrong by" in report.failures(rows)[0]


def test_a_wrong_operator_ends_the_command(monkeypatch, capsys):
    monkeypatch.setattr(cli, "WORKLOADS", [LOADS[0]])
    monkeypatch.setattr(measure, "ceilings", lambda: {"flops": {"float32": 1.0}, "copy": {1: 1.0}})
    monkeypatch.setattr(cnnops.functional, "conv2d", lambda *args, **kwargs: torch.full(CONV.output_shape, torch.nan))
    with pytest.raises(SystemExit, match="forward: ours contiguous is wrong by inf"):
        cli.main(["--quick", "--pass", "forward"])
    assert "WRONG: ours channels_last" in capsys.readouterr().out


@pytest.mark.parametrize(
    "got", [torch.ones(2, 3), torch.full((3, 2), torch.nan), [torch.ones(3, 2), torch.ones(3, 2)]], ids=str
)
def test_other_shapes_and_nan_are_infinitely_wrong(got):
    assert measure.error(got, torch.ones(3, 2).double()) == math.inf


def test_contestants_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "sample", lambda call, number: order.append(call()) or 1.0)
    samples = measure.race({name: lambda name=name: name for name in "abc"}, measure.Effort(0, 3, 3))
    assert "".join(order[-9:]) == "abcbcacab"
    assert samples == {name: [1.0] * 3 for name in "abc"}


def test_layouts_of_one_channel():
    """Where both layouts are the same memory, strides still tell torch which one is meant."""
    strides = {name: measure.in_layout(torch.ones(4, 1, 5, 5), f).stride() for name, f in measure.LAYOUTS.items()}
    assert strides == {"contiguous": (25, 25, 5, 1), "channels_last": (25, 1, 5, 1)}


def test_documents(data, tmp_path):
    """The page names the machine and the versions, and has every group; the README's block is replaced."""
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    report.write_docs(data, tmp_path)
    page, readme = (tmp_path / "docs" / "performance.md").read_text(), (tmp_path / "README.md").read_text()
    for text in [torch.__version__, data["machine"]["processor"], data["machine"]["commit"], "memory"]:
        assert text in page and text in readme
    for row in data["results"]:
        assert all(f"## {group}: " in page for group in row["groups"])
        assert f"| {row['workload']} | {row['pass']} |" in page
    assert readme.startswith("before\n<!-- bench -->\n|") and readme.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in readme
    assert (tmp_path / "docs" / "performance.png").stat().st_size > 1000
    report.write_docs(data, tmp_path)
    assert (tmp_path / "README.md").read_text() == readme
    report.with_block((ROOT / "README.md").read_text(), "bench", "")  # it has one
    report.write_docs(data, tmp_path, others=[{**data, "avx2": True}])
    assert (tmp_path / "docs" / "performance.md").read_text().count("## The groups with AVX2 alone") == 1


def test_another_machines_page_leaves_the_first_alone(data, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    report.write_docs(data, tmp_path, name="performance_avx2")  # needs no README either
    assert {path.name for path in tmp_path.rglob("*.*")} == {"performance_avx2.md", "performance_avx2.png"}
    page = (tmp_path / "docs" / "performance_avx2.md").read_text()
    assert "](performance_avx2.png)" in page and "On a GPU" not in page


def test_a_readme_without_a_block_is_an_error(data):
    with pytest.raises(ValueError, match="no block"):
        report.readme("nothing", data)


def test_ceilings():
    limits = measure.ceilings(measure.Effort(0, 2, 2))
    assert limits["flops"].keys() == {"float32", "float64", "bfloat16"}
    assert all(rate > 0 for rate in [*limits["flops"].values(), *limits["copy"].values()])


def test_the_command(tmp_path):
    """A whole run, of the smallest workload there is, saved."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "cnnops", "bench"]
    options = ["--quick", "--case", "two-layer-1-n16", "--pass", "forward", "--threads", "1", "--keep-memory"]
    avx2 = "avx2" in cnnops.settings.instruction_sets
    options += ["--avx2"] * avx2
    run = subprocess.run([*command, *options, "--save", tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [row["workload"] for row in saved["results"]] == ["two-layer-1-n16"]
    assert saved["machine"]["memory"].startswith("kept") and saved["machine"]["threads"] == "1"
    assert ("avx2 (in use)" in saved["machine"]["instruction sets"]) == saved["avx2"] == avx2
    assert (tmp_path / "bench.png").exists()
    assert "two-layer-1-n16" in run.stdout and "GFLOP/s" in run.stdout


def test_selection(capsys):
    cli.main(["--list", "--group", "grouped", "--n", "1", "--dtype", "float32"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("resnext" in line for line in lines)
    with pytest.raises(SystemExit, match="no workload"):
        cli.main(["--case", "no such thing"])


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_peers_compute_the_same(library, monkeypatch):
    if library not in peers.installed():
        pytest.skip(f"{library} is not installed (the extra [peers])")
    monkeypatch.setattr(peers, "_compiled", lambda load, leaves: lambda: None)  # slow, and torch's own affair
    for load in LOADS:
        load = replace(load, case=replace(load.case, n=1))
        leaves, gy = operators.operands(load)
        calls = peers.forward(load, leaves)
        if library in calls:
            expected = operators.calls(load, [t.double() for t in leaves], gy.double(), ours=False)["forward"]()
            assert measure.error(calls[library](), expected) < 1e-5, load
