"""The report of what CUDA kernels take of a GPU (benchmarks/resources.py): what it reads, and what it refuses."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import resources  # noqa: E402
from benchmarks.report import with_block  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")

# As nvcc 13.2 says it.
NAME = "_ZN6cnnops4cuda52_GLOBAL__N__eb63a9e6_13_activation_cu_843c0d68_1587610map_kernelILi4EfEEvlPKT0_S5_PS3_"
ENTRY = """ptxas info    : Compiling entry function '{name}' for '{architecture}'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}
ptxas info    : Compile time = 12.672 ms
"""


def entry(name=NAME, architecture="sm_90", stack=0, stores=0, loads=0, registers=24, shared=""):
    return ENTRY.format(**locals())


def complaints(report):
    return [sentence for kernel in resources.read("activation.cu", report) for sentence in kernel.complaints()]


@pytest.fixture
def folder(tmp_path):
    """A build in which all is well."""
    for source in ROOT.glob("csrc/cuda/*.cu"):
        (tmp_path / f"{source.stem}.cuda.o.resources").write_text("ptxas info    : 0 bytes gmem\n" + entry())
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["resources", *map(str, arguments)])
    return resources.main()


def test_reading():
    report = entry(registers=32, shared=", 1024 bytes smem, 400 bytes cmem[0]") + entry(architecture="sm_120")
    first, second = resources.read("activation.cu", report)
    assert first.name == "map_kernel<4, float>" and first.family == "map_kernel"
    assert (first.architecture, first.registers, first.shared) == (90, 32, 1024)
    assert (second.architecture, second.registers, second.shared) == (120, 24, 0)
    assert complaints(report) == []
    assert "| activation.cu | `map_kernel` | 1 | 32 | 24 |" in resources.table([first, second])


def test_what_spills_is_refused():
    where = "activation.cu: map_kernel<4, float> on sm_90"
    assert complaints(entry() + entry(stack=8, stores=8, loads=12)) == [
        f"{where} spills registers: 8 bytes stored, 12 loaded",
        f"{where} has a stack frame of 8 bytes",
    ]
    assert complaints(entry(loads=4)) == [f"{where} spills registers: 0 bytes stored, 4 loaded"]
    assert complaints(entry(shared=", 49153 bytes smem")) == [
        f"{where} has 49153 bytes of static shared memory, over 49152"
    ]


def test_the_command(folder, monkeypatch, capsys):
    run(monkeypatch, folder)
    assert "| activation.cu | `map_kernel` | 1 | 24 |" in capsys.readouterr().out
    (folder / "pool2d.cuda.o.resources").write_text(entry() + entry(stores=8, loads=8))
    with pytest.raises(SystemExit, match="^pool2d.cu: map_kernel<4, float> on sm_90 spills registers"):
        run(monkeypatch, folder)


def test_the_document_has_a_place_for_the_table(folder):
    table = resources.table(resources.collect(folder))
    page = (ROOT / "docs" / "kernels_cuda.md").read_text()
    assert table in with_block(page, "resources", table + "\n")


def test_reports_that_are_missing_or_unreadable_are_no_success(folder, monkeypatch, tmp_path):
    (folder / "pool2d.cuda.o.resources").write_text(entry().replace("registers", "REGs"))
    with pytest.raises(SystemExit, match="pool2d.cu: 0 of 1 kernels' resources are readable"):
        run(monkeypatch, folder)
    (folder / "pool2d.cuda.o.resources").unlink()
    with pytest.raises(SystemExit, match="has no pool2d.cuda.o.resources: build with CNNOPS_CUDA=1 first"):
        run(monkeypatch, folder)
    for report in folder.glob("*.resources"):
        report.write_text("")
    (folder / "pool2d.cuda.o.resources").write_text("")
    with pytest.raises(SystemExit, match="name no kernel"):
        run(monkeypatch, folder)
