"""From rows of results to lines on the screen, a picture, docs/performance.md and the README's block."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import BOUND, LAYOUTS, fraction, ours
from benchmarks.workloads import GROUPS, PASSES, Group

CONTESTANTS = [f"{side} {layout}" for side in ("ours", "torch") for layout in LAYOUTS]
HEADER = (
    f"{'times in ms, ± half the distance of the quartiles':49} {'pass':11} {'ours':>12} {'ours cl':>12} {'torch':>12} "
    f"{'torch cl':>12} {'rate':>12} {'ceiling':>7}  ratio (quartiles)    error  algorithm"
)


def better_layout(row: dict) -> str:
    return min(LAYOUTS, key=lambda layout: row["times"][f"ours {layout}"][1])


def rate(row: dict) -> str:
    amount, unit = (row["flops"], "GFLOP/s") if row["flops"] else (row["bytes"], "GB/s")
    return f"{amount / ours(row) / 1e9:.0f} {unit}"


def milliseconds(times: list[float]) -> str:
    low, middle, high = times
    digits = f"{middle * 1e3:.3g}" if middle < 1 else f"{middle * 1e3:.0f}"
    return f"{digits} ±{(high - low) / 2 / middle:.0%}"


def algorithm(row: dict) -> str:
    """The one that ran in our better layout."""
    layout = better_layout(row)
    return " ".join(text for text in (row["algorithm"][layout], "channels_last" * (layout == "channels_last")) if text)


def _error(row: dict) -> float:
    return max(row["errors"][f"ours {layout}"] for layout in LAYOUTS)


def peers_of(row: dict) -> list[str]:
    return [name for name in row["times"] if name.split()[0] not in ("ours", "torch")]


def line(row: dict, limits: dict) -> str:
    low, middle, high = row["ratios"]["best"]
    text = f"{row['workload']:49} {row['pass']:11} "
    text += " ".join(f"{milliseconds(row['times'][name]):>12}" for name in CONTESTANTS)
    text += f" {rate(row):>12} {fraction(row, limits):7.0%}  {middle:5.2f} ({low:.2f} to {high:.2f})"
    text += f"  {_error(row):.0e}  {algorithm(row)}"
    for name in peers_of(row):
        text += f"; {name} {milliseconds(row['times'][name])}"
    return text + "".join(f"\n  WRONG: {name}, relative error {row['errors'][name]:.1e}" for name in row["wrong"])


def failures(rows: list[dict]) -> list[str]:
    """What of ours was wrong."""
    return [
        f"{row['workload']} {row['pass']}: {name} is wrong by {row['errors'][name]:.1e} (at most {_bound(row):.0e})"
        for row in rows
        for name in row["wrong"]
        if name.startswith("ours")
    ]


def _bound(row):
    return next(bound for dtype, bound in BOUND.items() if str(dtype).endswith("." + row["dtype"]))


# --- groups ---


def summary(rows: list[dict]) -> list[dict]:
    """For every group, pass and comparison: the goal, the geometric mean, the least, how many reach it."""
    found = []
    for group in GROUPS:
        mine = [row for row in rows if group.name in row["groups"]]
        for which in PASSES:
            of_pass = [row for row in mine if row["pass"] == which]
            for comparison, goals in ("best", group.goal), ("contiguous", group.contiguous):
                if of_pass and (comparison == "best" or which in goals):
                    ratios = [row["ratios"][comparison][1] for row in of_pass]
                    goal = goals.get(which)
                    found.append(
                        {
                            "group": group,
                            "pass": which,
                            "comparison": comparison,
                            "goal": goal,
                            "mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
                            "least": min(ratios),
                            "reached": sum(ratio >= goal for ratio in ratios) if goal else None,
                            "of": len(ratios),
                        }
                    )
    return found


def cells(entry: dict) -> list[str]:
    which = entry["pass"] + ", contiguous" * (entry["comparison"] == "contiguous")
    goal = entry["goal"]
    return [
        entry["group"].about,
        which,
        f"{goal:g}" if goal else "",
        f"{entry['mean']:.2f}",
        f"{entry['least']:.2f}",
        f"{entry['reached']} of {entry['of']}" if goal else f"({entry['of']})",
    ]


SUMMARY = ["group", "pass", "goal", "mean", "least", "at goal"]


# --- pages ---


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rules, *rows])


def machine(data: dict) -> str:
    m = data["machine"]
    ran = dict.fromkeys(name for row in data["results"] for name in peers_of(row) if name in m)
    versions = ", ".join([f"torch {m['torch'].split(',')[0]}", *(f"{name} {m[name]}" for name in ran)])
    said = [m["processor"], f"threads: {m['threads']}", f"memory {m['memory']}", versions, f"cnnops {m['commit']}"]
    return "; ".join([*said, m["date"], *["a quick look, not a measurement"] * data["quick"]])


MAIN_PAGE = "performance"
NO_GPU = "Not measured yet: `make gpu-check` measures, `python -m benchmarks.gpu_check --write-docs DIR` writes here.\n"


def page(
    data: dict, whole_models: str = "", others: Sequence[dict] = (), before: str = "", name: str = MAIN_PAGE
) -> str:
    """A page named so; of `others` the groups alone. What docs/performance.md said `before` of a GPU stays."""
    limits, rows = data["ceilings"], data["results"]
    arithmetic = ", ".join(f"{dtype} {speed:.0f}" for dtype, speed in limits["flops"].items())
    copies = ", ".join(f"{int(size) / 2**20:.0f} MB {speed:.0f}" for size, speed in limits["copy"].items())
    sections = [_section(group, [row for row in rows if group.name in row["groups"]], limits) for group in GROUPS]
    gpu = f"## On a GPU\n\n{block_of(before, 'gpu', NO_GPU)}\n" if name == MAIN_PAGE else ""
    return f"""# Performance

Written from measurements by `python -m cnnops bench --write-docs JSON`; `make bench` repeats them. Not to be edited.

{machine(data)}. The machine's load before the run was {data["machine"]["load before"]}.

Ceilings, measured in the same process: the fastest matrix product, GFLOP/s: {arithmetic}; copies of so many bytes in
all, GB/s: {copies}.

**How it is measured.** Random data, warm, in one process; contestants take turns in rounds, every sample lasts a
millisecond or more, and every result is compared with float64 first (*error*: relative L2, the larger of both layouts).
Times are milliseconds, the median ± half the distance of the quartiles. *ratio* is torch's time over ours, each in its
better layout, taken within rounds: the median and its quartiles; above 1 we are faster. *rate* and *ceiling* are of our
better layout; *ceiling* is the least time that arithmetic or memory would need over the time taken, which algorithms
with fewer operations than the formula can exceed. *forward* is without gradients; *step* is forward and all gradients
through autograd.

{markdown(SUMMARY, [cells(entry) for entry in summary(rows)], left=2)}

*mean* is the geometric mean of the group's ratios, *least* the least of them.

![Ratios by group]({name}.png)

{whole_models}
{chr(10).join(_conditions(other) for other in others)}
{chr(10).join(section for section in sections if section)}
{gpu}"""


def _conditions(data: dict) -> str:
    """The groups under other conditions."""
    rows = [cells(entry) for entry in summary(data["results"])]
    conditions = "AVX2 alone, on both sides" if data.get("avx2") else f"memory {data['machine']['memory']}"
    return f"## The groups with {conditions}\n\n{machine(data)}.\n\n{markdown(SUMMARY, rows, left=2)}\n"


def _section(group: Group, rows: list[dict], limits: dict) -> str:
    if not rows:
        return ""
    peers = list(dict.fromkeys(name for row in rows for name in peers_of(row)))
    header = ["", "pass", *CONTESTANTS, *peers, "algorithm", "rate", "ceiling", "ratio", "error"]
    table = []
    for row in sorted(rows, key=lambda row: PASSES.index(row["pass"])):
        low, middle, high = row["ratios"]["best"]
        times = [milliseconds(row["times"][name]) if name in row["times"] else "" for name in CONTESTANTS + peers]
        table.append(
            [
                row["workload"],
                row["pass"],
                *times,
                algorithm(row),
                rate(row),
                f"{fraction(row, limits):.0%}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{_error(row):.0e}",
            ]
        )
    return f"## {group.name}: {group.about}\n\n{markdown(header, table, left=2)}\n"


def with_block(text: str, name: str, block: str) -> str:
    """`text` with another block between <!-- name --> and <!-- /name -->."""
    pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no block between <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda found: found[1] + block + found[2], text)


def block_of(text: str, name: str, otherwise: str) -> str:
    """What `text` has between <!-- name --> and <!-- /name -->, these included."""
    found = re.search(f"<!-- {name} -->\n.*?<!-- /{name} -->", text, re.DOTALL)
    return found[0] if found else f"<!-- {name} -->\n{otherwise}<!-- /{name} -->"


def readme(text: str, data: dict) -> str:
    """The README with its block anew: every group's geometric mean, by pass."""
    found = [entry for entry in summary(data["results"]) if entry["comparison"] == "best"]
    shown = ["forward", "grad_input", "grad_weight", "step"]
    rows = []
    for group in dict.fromkeys(entry["group"].about for entry in found):
        means = {entry["pass"]: f"{entry['mean']:.2f}" for entry in found if entry["group"].about == group}
        means["grad_input"] = means.get("grad_input", means.get("backward", ""))
        rows.append([group, *(means.get(which, "") for which in shown)])
    table = markdown(["torch's time / ours", "forward", "gradient of the input", "of the weight", "step"], rows)
    block = f"{table}\n\nGeometric means; {machine(data)}. All of it: [docs/performance.md](docs/performance.md).\n"
    return with_block(text, "bench", block)


def write_docs(
    data: dict, root: Path, whole_models: str = "", others: Sequence[dict] = (), name: str = MAIN_PAGE
) -> None:
    """docs/{name}.md with its picture; the README's table is the main page's."""
    path = root / "docs" / f"{name}.md"
    path.write_text(page(data, whole_models, others, path.read_text() if path.exists() else "", name))
    picture(data, path.with_suffix(".png"))
    if name == MAIN_PAGE:
        (root / "README.md").write_text(readme((root / "README.md").read_text(), data))


def picture(data: dict, path: Path) -> None:
    """A dot for every workload, a bar at the group's goal."""
    from matplotlib.figure import Figure

    groups = [group for group in GROUPS if any(group.name in row["groups"] for row in data["results"])]
    colours = dict(zip(PASSES, ["C0", "C1", "C2", "C1", "C3"], strict=True))
    labels = {"forward": "forward", "grad_input": "gradient of the input", "grad_weight": "gradient of the weight"}
    labels["step"] = "training step"
    figure = Figure(figsize=(8, 1.2 + 0.55 * len(groups)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="torch's time / ours, better layouts (bar: goal)")
    for at, group in enumerate(groups):
        for row in data["results"]:
            if group.name in row["groups"]:
                place = at + _offset(row["pass"])
                axes.plot(row["ratios"]["best"][1], place, "o", ms=4, alpha=0.6, color=colours[row["pass"]])
        for which, goal in group.goal.items():
            axes.plot(goal, at + _offset(which), "|", ms=9, mew=2, color="black")
    for which, label in labels.items():
        axes.plot([], [], "o", color=colours[which], label=label)
    axes.axvline(1, color="grey", lw=0.8)
    axes.set_yticks(range(len(groups)), [group.about for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _offset(which: str) -> float:
    return {"forward": -0.27, "grad_input": -0.09, "backward": -0.09, "grad_weight": 0.09, "step": 0.27}[which]
