"""``python -m cnnops info``: versions, what was built, what this machine can do, the tables of algorithms;
``python -m cnnops bench``: how fast, beside torch (in the repository only)."""

import argparse
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import cnnops
from cnnops import _C


def facts() -> dict[str, str]:
    """What a bug report should say."""
    build = _C.build_info()
    capability = torch.backends.cpu.get_cpu_capability()
    cuda = f"compiled by nvcc {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "not built"
    gpus = [
        f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    ]
    return {
        "cnnops": f"{cnnops.__version__}, compiled by {build['compiler']}",
        "torch": f"{torch.__version__}, threads {torch.get_num_threads()}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor": f"{capability} in torch's words",
        "instruction sets": ", ".join(
            f"{name} (in use)" if name == cnnops.settings.instruction_set else name
            for name in cnnops.settings.instruction_sets
        ),
        "cuda kernels": cuda,
        "gpus": "; ".join(gpus) or "none",
    }


def algorithm_table(device: str) -> Table:
    chosen = "auto, as accurate," if cnnops.settings.accurate else "auto"
    table = Table(title=f"conv2d on {device}: {chosen} takes the first that accepts", title_justify="left")
    table.add_column("algorithm")
    table.add_column("accurate")
    table.add_column("how, and what for")
    for name, summary, accurate in _C.algorithms(device):
        table.add_row(name, "yes" if accurate else "no", summary)
    return table


def info() -> None:
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, value in facts().items():
        grid.add_row(name, value)
    console.print(grid)
    for device in ["cpu", "cuda"] if _C.build_info()["cuda"] else ["cpu"]:
        console.print(algorithm_table(device))


def bench(arguments: list[str]) -> None:
    root = Path(cnnops.__file__).parent.parent
    if not (root / "benchmarks").exists():
        sys.exit("the benchmarks are in the repository: install it with pip install -e . and run them there")
    sys.path[:0] = [str(root), str(root / "tests")]
    from benchmarks import cli

    cli.main(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cnnops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, and what this machine can do")
    commands.add_parser("bench", help="how fast, beside torch; has options: bench --help", add_help=False)
    chosen, rest = parser.parse_known_args()
    if chosen.command == "bench":
        bench(rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        info()


if __name__ == "__main__":
    main()
