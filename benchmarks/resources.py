"""What CUDA kernels take of a GPU, as the compiler says: ``python -m benchmarks.resources [FOLDER] [--write-docs]``.

FOLDER is where setup.py compiled the kernels, by default build/kernels; no GPU is needed. Prints registers
by kernel and architecture, the most of any instantiation, and fails if one of them spills registers, has a stack frame
(an array in memory that should have been in registers) or more static shared memory than every architecture has.
--write-docs puts the table into docs/kernels_cuda.md.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report import markdown, with_block

STATIC_SHARED_MEMORY = 48 * 1024
ENTRY = re.compile(
    r"entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)a?'.*?Function properties for (?P=name)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>.*?)$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Kernel:
    """One instantiation, compiled for one architecture."""

    source: str
    name: str  # as C++ writes it, without arguments
    architecture: int
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int

    @property
    def family(self):
        return self.name.split("<")[0]

    def complaints(self):
        where = f"{self.source}: {self.name} on sm_{self.architecture}"
        if self.stores or self.loads:
            yield f"{where} spills registers: {self.stores} bytes stored, {self.loads} loaded"
        if self.stack:
            yield f"{where} has a stack frame of {self.stack} bytes"
        if self.shared > STATIC_SHARED_MEMORY:
            yield f"{where} has {self.shared} bytes of static shared memory, over {STATIC_SHARED_MEMORY}"


def read(source: str, report: str) -> list[Kernel]:
    """The kernels of one file, from what nvcc --resource-usage said of it."""
    entries = list(ENTRY.finditer(report))
    if len(entries) != report.count("entry function"):
        raise ValueError(
            f"{source}: {len(entries)} of {report.count('entry function')} kernels' resources are readable"
        )
    mangled = "\n".join(entry["name"] for entry in entries)
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = []
    for entry, name in zip(entries, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        numbers = (int(entry[key]) for key in ("architecture", "registers", "stack", "stores", "loads"))
        kernels.append(Kernel(source, short(name), *numbers, int(shared[1]) if shared else 0))
    return kernels


def short(name: str) -> str:
    """kernel<arguments> of `void cnnops::cuda::(anonymous namespace)::kernel<arguments>(parameters)`."""
    name = name.replace("(anonymous namespace)::", "").replace("cnnops::", "").replace("cuda::", "")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def collect(folder: Path) -> list[Kernel]:
    """Of all sources; each has to be there."""
    kernels = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        report = folder / f"{source.stem}.cuda.o.resources"
        if not report.exists():
            raise FileNotFoundError(f"{folder} has no {report.name}: build with CNNOPS_CUDA=1 first")
        kernels += read(source.name, report.read_text())
    if not kernels:
        raise ValueError(f"the reports in {folder} name no kernel")
    return kernels


def table(kernels: list[Kernel]) -> str:
    architectures = sorted({kernel.architecture for kernel in kernels})
    families = {}
    for kernel in kernels:
        families.setdefault((kernel.source, kernel.family), []).append(kernel)
    rows = []
    for (source, family), members in sorted(families.items()):
        most = {a: max((k.registers for k in members if k.architecture == a), default=0) for a in architectures}
        count = len({kernel.name for kernel in members})
        rows.append([source, f"`{family}`", str(count), *(str(most[a]) for a in architectures)])
    return markdown(["source", "kernel", "instantiations", *(f"sm_{a}" for a in architectures)], rows, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "kernels")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    try:
        kernels = collect(options.folder)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    print(table(kernels))
    if complaints := [sentence for kernel in kernels for sentence in kernel.complaints()]:
        sys.exit("\n".join(complaints))
    if options.write_docs:
        page = ROOT / "docs" / "kernels_cuda.md"
        page.write_text(with_block(page.read_text(), "resources", table(kernels) + "\n"))


if __name__ == "__main__":
    main()
