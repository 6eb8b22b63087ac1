"""From the stages' JSONs to a table, the goals, and the GPU's section of docs/performance.md."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import stage

STAGES = ["build", "facts", "tests", "sanitizer", "timings", "training"]
ROWS = ["", "precision", "pass", "floor", "ours", "best of torch", "ratio", "of floor", "algorithm"]
GROUPS = ["group", "precision", "pass", "ratio", "least", "of floor", "layers"]
GOALS = ["goal on an H200", "asked", "mean", "least", "of"]


def load(folder: Path) -> dict:
    return {name: stage.read(folder, name) for name in STAGES}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# --- rows ---


def best(times: dict, side: str) -> tuple[str, float]:
    """The fastest of a side's contestants, and its median."""
    return min(((who, t[1]) for who, t in times.items() if who.startswith(side)), key=lambda one: one[1])


def entries(data: dict) -> list[dict]:
    """What was timed on both sides, with floor, ratio and fraction: times in seconds."""
    facts, found = data["facts"], []
    for row in data["timings"].get("rows", []):
        if not all(any(who.startswith(side) for who in row["times"]) for side in ("ours", "torch")):
            continue
        (ours_in, ours), (rival, theirs) = best(row["times"], "ours"), best(row["times"], "torch")
        entry = {**row, "ours": ours, "theirs": theirs, "rival": rival, "ratio": theirs / ours}
        entry["by"] = row["algorithm"].get(ours_in.removeprefix("ours "), "")
        if "bytes_per_second" in facts and row["precision"] in facts.get("operations_per_second", {}):
            arithmetic = row["flops"] / facts["operations_per_second"][row["precision"]]
            memory = row["bytes"] / facts["bytes_per_second"]
            entry |= {"floor": max(arithmetic, memory), "computes": arithmetic > memory}
            entry["fraction"] = entry["floor"] / ours
        found.append(entry)
    return found


def step_entries(data: dict) -> list[dict]:
    """Steps and blocks, each with a ratio of torch's time to our best."""
    found = []
    for row in data["training"].get("rows", []):
        if "times" in row:
            (_, ours), (_, theirs) = best(row["times"], ("ours", "fused")), best(row["times"], "torch")
            found.append({**row, "ours": ours, "theirs": theirs, "ratio": theirs / ours})
    return found


# --- goals ---


@dataclass(frozen=True)
class Goal:
    """A bound for the geometric mean of a value over the rows that it is about."""

    about: str
    least: float
    has: Callable[[dict], bool]
    value: str = "ratio"


def _memory(row) -> bool:
    return row["kind"] != "conv2d" and row["workload"].split("-n")[0].endswith("-memory") and row["precision"] != "tf32"


def _conv(row, *precisions) -> bool:
    return row["kind"] == "conv2d" and row["precision"] in precisions


def _pooling(row) -> bool:
    return row["kind"] in ("max_pool2d", "avg_pool2d")


def _bound(row, computes: bool) -> bool:
    return _conv(row, "tf32", "bfloat16") and row.get("computes") == computes


GOALS_OF_LAYERS = [
    Goal("pooling, of copy bandwidth", 0.8, lambda r: _memory(r) and _pooling(r), "fraction"),
    Goal("ReLU, of copy bandwidth", 0.8, lambda r: _memory(r) and r["kind"] == "relu", "fraction"),
    Goal("pooling backward, to torch", 1.5, lambda r: _pooling(r) and r["pass"] == "backward"),
    Goal("depthwise, to torch", 2.0, lambda r: r["kind"] == "conv2d" and "depthwise" in r["groups"]),
    Goal("float32 convolution, to cuDNN without TF32", 1.0, lambda r: _conv(r, "float32")),
    Goal("TF32 and bfloat16, bound by arithmetic, to cuDNN", 0.6, lambda r: _bound(r, True)),
    Goal("TF32 and bfloat16, bound by memory, to cuDNN", 1.0, lambda r: _bound(r, False)),
]


def _block(row, mode) -> bool:
    return row["kind"] == "block" and row["pooled"] and row["mode"] == mode


def _step(row, mode) -> bool:
    return row["kind"] == "step" and row["mode"] == mode


GOALS_OF_STEPS = [
    Goal("convolution, ReLU and pooling as one, to torch's three", 1.5, lambda r: _block(r, "eager")),
    Goal("the same, captured", 1.5, lambda r: _block(r, "captured")),
    Goal("MNIST training step, captured, to torch's", 1.5, lambda r: _step(r, "captured")),
    Goal("MNIST training step, eager, to torch's", 1.5, lambda r: _step(r, "eager")),
]


def goals(data: dict) -> list[list[str]]:
    lines = []
    for rows, about in (entries(data), GOALS_OF_LAYERS), (step_entries(data), GOALS_OF_STEPS):
        for goal in about:
            values = [row[goal.value] for row in rows if goal.has(row) and goal.value in row]
            if not values:
                lines.append([goal.about, f"{goal.least:g}", "not measured", "", "0"])
                continue
            mean = geometric_mean(values)
            text = f"{mean:.2f}" + " (missed)" * (mean < goal.least)
            lines.append([goal.about, f"{goal.least:g}", text, f"{min(values):.2f}", str(len(values))])
    return lines


# --- tables ---


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def table(data: dict) -> list[list[str]]:
    lines = []
    for e in entries(data):
        wrong = [who for who in e["wrong"] if who.startswith("ours")]
        lines.append(
            [
                e["workload"] + " WRONG" * bool(wrong),
                e["precision"],
                e["pass"],
                microseconds(e["floor"]) if "floor" in e else "",
                microseconds(e["ours"]),
                f"{microseconds(e['theirs'])} ({e['rival'].removeprefix('torch ')})",
                f"{e['ratio']:.2f}",
                f"{e['fraction']:.0%}" if "fraction" in e else "",
                e["by"],
            ]
        )
    for e in step_entries(data):
        name = " ".join([e["name"], e.get("layout", ""), e["mode"]]).replace("  ", " ")
        times = [microseconds(e["ours"]), microseconds(e["theirs"])]
        lines.append([name, e["precision"], e.get("pass", "step"), "", *times, f"{e['ratio']:.2f}", "", ""])
    return lines


def by_group(data: dict) -> list[list[str]]:
    groups = {}
    for e in entries(data):
        for group in e["groups"]:
            groups.setdefault((group, e["precision"], e["pass"]), []).append(e)
    lines = []
    for key, rows in sorted(groups.items()):
        ratios, fractions = [e["ratio"] for e in rows], [e["fraction"] for e in rows if "fraction" in e]
        floor = f"{geometric_mean(fractions):.0%}" if fractions else ""
        lines.append([*key, f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", floor, str(len(rows))])
    return lines


def about(data: dict) -> str:
    f = data["facts"]
    if "name" not in f:
        return "The device's facts are missing."
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in f.get("operations_per_second", {}).items())
    said = [f["name"], f"driver {f['driver']}", f"torch {f['torch']}", f"CUDA {f['cuda']}", f"cuDNN {f['cudnn']}"]
    if "multiprocessors" in f:
        said += [f"{f['multiprocessors']} multiprocessors", f"at most {f['clock MHz']} MHz", f"L2 {f['L2'] >> 20} MiB"]
    said += [f"cnnops {f['commit']}", f["date"]]
    copies = f"{f['bytes_per_second'] / 1e12:.3g} TB/s" if "bytes_per_second" in f else "not measured"
    return f"{'; '.join(said)}. Copies: {copies}; products of matrices, TFLOP/s: {rates or 'not measured'}."


def stages(data: dict) -> list[list[str]]:
    lines = []
    for name, found in data.items():
        details = [found.get("why", "")]
        if name == "tests" and "tests" in found:
            details.append(", ".join(f"{number} {outcome}" for outcome, number in found["tests"].items()))
        if name == "sanitizer":
            details += [f"{row['tool']}: {' '.join(row['summary'])}" for row in found.get("rows", [])]
        if name == "build" and "wall_seconds" in found:
            details.append(f"{found['wall_seconds']:.0f} s")
        if name == "build" and "bytes" in found:
            details.append(f"{found['bytes'] / 2**20:.1f} MiB")
        spent = f"{found['spent']:.0f} s" if "spent" in found else ""
        lines.append([name, found.get("status", "not run"), spent, "; ".join(text for text in details if text)])
    return lines


def failures(data: dict) -> list[str]:
    """What of ours was wrong, and which stages failed."""
    found = [f"{name}: {d.get('why', 'failed')}" for name, d in data.items() if d.get("status") == "failed"]
    for name in "timings", "training":
        for row in data[name].get("rows", []):
            label = " ".join(str(row[key]) for key in ("workload", "name", "precision", "pass", "mode") if key in row)
            found += [f"{label}: {who} is wrong" for who in row.get("wrong", []) if who.startswith("ours")]
            found += [f"{label}: {row['refused']}"] if "refused" in row else []
            refusals = row.get("refusals", {}).items()
            found += [f"{label}: {who}: {why}" for who, why in refusals if who.startswith("ours")]
    return found


def show(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=170)
    for header, lines, title in [
        (ROWS, table(data), "microseconds"),
        (GROUPS, by_group(data), "torch's best time over ours, geometric means"),
        (GOALS, goals(data), "goals"),
        (["stage", "status", "spent", ""], stages(data), "stages"),
    ]:
        shown = Table(*header, title=title)
        for line in lines:
            shown.add_row(*map(Text, line))
        console.print(shown)
    console.print(about(data), soft_wrap=True)
    for line in failures(data):
        console.print(line, style="red", markup=False, soft_wrap=True)


def section(data: dict) -> str:
    """What stands between <!-- gpu --> and <!-- /gpu -->."""
    from benchmarks.report import markdown

    ran = markdown(["stage", "status", "spent", ""], stages(data), left=4)
    return f"""{about(data)}

Microseconds: CUDA events around replays of a CUDA graph, with as many copies of the operands as the L2 cannot hold.
*best of torch* is the fastest of both layouts, with cuDNN's heuristics and in benchmark mode; *floor* the longer of the
times that the bytes take at the speed of a copy and the operations at that of a product of matrices. Every result was
compared with float64 first.

{markdown(GOALS, goals(data))}

{markdown(GROUPS, by_group(data), left=3)}

{markdown(ROWS, table(data), left=3)}

{ran}
"""


def write_docs(folder: Path, root: Path = stage.ROOT) -> None:
    from benchmarks.report import with_block

    data = load(folder)
    if not any(data.values()):
        raise SystemExit(f"{folder} has no results of gpu_check: nothing is written")
    path = root / "docs" / "performance.md"
    path.write_text(with_block(path.read_text(), "gpu", section(data)))
