"""``python -m cnnops info``: versions, what was built, what this machine can do, the tables of algorithms."""

import argparse
import platform

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
    table = Table(title=f"conv2d on {device}: auto takes the first that accepts", title_justify="left")
    table.add_column("algorithm")
    table.add_column("how, and what for")
    for name, summary in _C.algorithms(device):
        table.add_row(name, summary)
    return table


def info() -> None:
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, value in facts().items():
        grid.add_row(name, value)
    console.print(grid)
    for device in ["cpu", "cuda"] if _C.build_info()["cuda"] else ["cpu"]:
        console.print(algorithm_table(device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cnnops", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    info()


if __name__ == "__main__":
    main()
