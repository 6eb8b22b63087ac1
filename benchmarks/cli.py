"""``python -m cnnops bench``: our operators beside torch's."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure, models, peers, report
from benchmarks.workloads import GROUPS, PASSES, WORKLOADS, Workload

ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    groups, libraries = [group.name for group in GROUPS], ", ".join(peers.LIBRARIES)
    parser = argparse.ArgumentParser(prog="python -m cnnops bench", description=__doc__)
    parser.epilog = f"groups: {', '.join(groups)}; passes: {', '.join(PASSES)}"
    add = parser.add_argument
    add("--group", nargs="+", choices=groups, metavar="GROUP")
    add("--case", nargs="+", metavar="TEXT", help="workloads with one of these in their name")
    add("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="passes", metavar="PASS")
    add("--dtype", nargs="+", choices=["float32", "float64", "bfloat16"], metavar="DTYPE")
    add("--n", nargs="+", type=int, help="batch sizes")
    add("--list", action="store_true", help="only list the workloads")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--peers", action="store_true", help=f"forward also by torch.compile, and {libraries} where installed")
    add("--quick", action="store_true", help="few rounds: a look, not a measurement")
    add("--seconds", type=float, default=measure.Effort.seconds, help="of rounds, per workload and pass")
    add("--keep-memory", action="store_true", help="let glibc keep freed memory: no page faults in the times")
    add("--avx2", action="store_true", help="nobody uses AVX-512, neither ours, nor oneDNN, nor torch's own kernels")
    add("--save", type=Path, metavar="DIR", help="write bench.json, after every row, and bench.png")
    text = "only write docs/performance.md and the README's table; of further JSONs the table of groups alone"
    add("--write-docs", type=Path, nargs="+", metavar="JSON", help=text)
    add("--page", default=report.MAIN_PAGE, metavar="NAME", help="write docs/NAME.md instead, of another machine")
    return parser


def selected(options) -> list[Workload]:
    return [
        load
        for load in WORKLOADS
        if (not options.group or set(load.groups) & set(options.group))
        and (not options.case or any(text in load.name for text in options.case))
        and (not options.dtype or load.dtype_name in options.dtype)
        and (not options.n or load.case.n in options.n)
        and set(load.passes) & set(options.passes)
    ]


def run(loads: list[Workload], options, console: Console) -> dict:
    effort = measure.QUICK if options.quick else measure.Effort(options.seconds)
    about = {"machine": measure.machine(), "quick": options.quick, "avx2": options.avx2}
    data = {**about, "ceilings": measure.ceilings(), "results": []}
    console.print(report.machine(data), soft_wrap=True)
    if float(load := data["machine"]["load before"]) > 0.5:
        console.print(f"The machine was busy (load {load}): do not trust what follows.", style="red")
    limits = data["ceilings"]
    arithmetic = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in limits["flops"].items())
    copies = ", ".join(f"{size / 2**20:.0f} MB {rate:.0f} GB/s" for size, rate in limits["copy"].items())
    console.print(f"ceilings: matrix products {arithmetic}; copies of {copies}\n\n{report.HEADER}", soft_wrap=True)
    for load in loads:
        for row in measure.measure(load, options.passes, effort, options.peers):
            data["results"].append(row)
            console.print(report.line(row, limits), markup=False, highlight=False, soft_wrap=True)
            if options.save:
                save(data, options.save)
    return data


def save(data: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "bench.json.partial"
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(folder / "bench.json")


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    if options.write_docs:
        beside = options.write_docs[0].parent / "models.json"  # of python -m benchmarks.models
        section = models.page(json.loads(beside.read_text())) if beside.exists() else ""
        first, *others = [json.loads(path.read_text()) for path in options.write_docs]
        report.write_docs(first, ROOT, section, others, options.page)
        return
    loads = selected(options)
    if not loads:
        sys.exit("no workload is like that; --list shows what there is")
    if options.list:
        print(*(f"{load.name:48} {' '.join(load.groups)}" for load in loads), sep="\n")
        return
    wanted = (measure.KEEP_MEMORY if options.keep_memory else {}) | (measure.AVX2 if options.avx2 else {})
    if not wanted.items() <= os.environ.items():  # what is read when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "cnnops", "bench", *arguments], {**os.environ, **wanted})
    torch.set_num_threads(options.threads)
    console = Console()
    data = run(loads, options, console)
    table = Table(*report.SUMMARY, title="torch's time over ours: geometric mean and least of a group")
    for entry in report.summary(data["results"]):
        table.add_row(entry["group"].name, *report.cells(entry)[1:])
    console.print(table)
    if options.save:
        report.picture(data, options.save / "bench.png")
    if wrong := report.failures(data["results"]):
        sys.exit("\n".join(wrong))
