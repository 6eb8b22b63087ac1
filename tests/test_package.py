"""The package as a thing that is built, imported and asked about itself."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import or_refusal

import cnnops
from cnnops import functional as F

ROOT = Path(__file__).parent.parent


def python(*arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )


# --- what it says about itself ---


def test_info():
    """Versions, what was built, the processor's abilities and the algorithm tables."""
    run = python("-m", "cnnops", "info")
    assert run.returncode == 0, run.stderr
    wanted = [cnnops.__version__, torch.__version__, cnnops.settings.instruction_set, "CUDA"]
    missing = [text for text in wanted + cnnops.ops.algorithms() if text.lower() not in run.stdout.lower()]
    assert not missing, run.stdout


def test_signatures():
    """Names and order of torch.nn.functional, whose own are partly not inspectable; algorithm only as a keyword."""
    wanted = {
        F.conv2d: "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, "
        "padding_mode='zeros', algorithm='auto'",
        F.max_pool2d: "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False",
        F.avg_pool2d: "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, "
        "divisor_override=None",
        F.conv_transpose2d: "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, "
        "algorithm='auto'",
        F.max_unpool2d: "input, indices, kernel_size, stride=None, padding=0, output_size=None",
        F.adaptive_avg_pool2d: "input, output_size",
        F.adaptive_max_pool2d: "input, output_size, return_indices=False",
        F.lp_pool2d: "input, norm_type, kernel_size, stride=None, ceil_mode=False",
        F.relu: "input, inplace=False",
        F.relu6: "input, inplace=False",
        F.hardtanh: "input, min_val=-1.0, max_val=1.0, inplace=False",
        F.leaky_relu: "input, negative_slope=0.01, inplace=False",
        F.prelu: "input, weight",
    }
    for function, text in wanted.items():
        assert bare_signature(function) == text, function


def bare_signature(function):
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return str(bare)[1:-1]


def test_public_things_have_docstrings():
    for module in cnnops, cnnops.ops, F, cnnops.nn:
        assert module.__doc__, module
    public = [thing for module in (F, cnnops.nn, cnnops.ops, sys.modules["cnnops.convert"]) for thing in own(module)]
    assert len(public) > 30
    assert not [thing for thing in public if not (thing.__doc__ or "").strip()]


def own(module):
    """The public functions and classes that were written in this module."""
    things = [thing for name, thing in vars(module).items() if not name.startswith("_")]
    return [thing for thing in things if callable(thing) and getattr(thing, "__module__", "") == module.__name__]


# --- settings ---


def test_every_instruction_set_computes_the_same(instruction_set):
    """To rounding: each is a compilation of the same source."""
    assert cnnops.settings.instruction_set == instruction_set
    torch.manual_seed(0)
    x, w = torch.randn(2, 16, 20, 21), torch.randn(24, 16, 3, 3)
    for algorithm in cnnops.ops.algorithms():
        with or_refusal(algorithm):
            y = F.conv2d(x, w, algorithm=algorithm)
            expected = torch.nn.functional.conv2d(x.double(), w.double())
            assert ((y - expected).norm() / expected.norm()).item() < 1e-6


def test_the_instruction_set_can_come_from_the_environment():
    show = "import cnnops; print(cnnops.settings.instruction_set)"
    assert python("-c", show, CNNOPS_ISA="base").stdout.strip() == "base"
    run = python("-c", "import torch, cnnops; cnnops.functional.relu(torch.ones(3))", CNNOPS_ISA="sse17")
    assert run.returncode and "sse17" in run.stderr


def test_base_is_always_there():
    assert "base" in cnnops.settings.instruction_sets


# --- what is built for a GPU ---

# Of all that CUDA 13 compiles for.
GPUS = "7.5 8.0 8.6 8.7 8.8 8.9 9.0 10.0 10.3 11.0 12.0 12.1".split()


@pytest.fixture(scope="module")
def building():
    pytest.importorskip("ninja")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def code_for(gpu, flags):
    """What a GPU would run: machine code for a GPU of the same major number that is not newer, or portable code."""
    (major, minor), found = map(int, gpu.split(".")), None
    for kind, number in re.findall(r"code=(sm|compute)_(\d+)", flags):
        theirs = int(number[:-1]), int(number[-1])
        if theirs <= (major, minor) and (kind == "compute" or theirs[0] == major):
            found = max(found or (), (kind == "sm", *theirs))
    return found


@pytest.mark.parametrize("gpu", [*GPUS, "13.0", "15.5"])
def test_every_gpu_finds_code(building, gpu):
    """Those that nobody has seen yet, too."""
    assert code_for(gpu, building["architecture_flags"](building["ARCHITECTURES"]))


def test_architecture_lists(building):
    flags = building["architecture_flags"]
    assert flags("8.0") == "-gencode=arch=compute_80,code=sm_80"
    assert flags(" 7.5; 9.0+PTX") == flags("7.5 9.0+PTX")
    assert flags("7.5 9.0+PTX").split() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert code_for("8.9", flags("8.0")) == (True, 8, 0)
    assert code_for("9.0", flags("8.0")) is None and code_for("9.0", flags("8.0+PTX")) == (False, 8, 0)
    assert code_for("7.5", flags("8.0+PTX")) is None


# --- importing ---

ANOTHER_TORCH = """
import torch
torch.__version__ = type(torch.__version__)("1.0.0")
import cnnops
"""


def test_built_against_another_torch():
    """One sentence with both versions and the command that mends it, before anything undefined can happen."""
    run = python("-c", ANOTHER_TORCH)
    assert run.returncode
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), run.stderr
    assert cnnops._build.TORCH_VERSION in last and "1.0.0" in last
    assert re.search(r"pip install|make", last), last


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_importing_needs_no_gpu_and_starts_nothing():
    """Import initialises no CUDA, changes no thread count and draws no random number."""
    run = python(
        "-c",
        "import torch; a = torch.get_rng_state(), torch.get_num_threads(); import cnnops;"
        "assert torch.equal(a[0], torch.get_rng_state()) and a[1] == torch.get_num_threads();"
        "assert not torch.cuda.is_initialized()",
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and a build without CUDA")
def test_a_cuda_tensor_on_a_cpu_build():
    try:
        cnnops.ops.algorithms("cuda")
    except RuntimeError:
        with pytest.raises(RuntimeError, match="(?i)without CUDA|CPU-only|CPU only"):
            F.relu(torch.ones(3, device="cuda"))
    else:
        pytest.skip("this build has CUDA")


# --- laws that the source itself shows ---


def sources(*folders):
    return [p for folder in folders for p in (ROOT / "csrc" / folder).rglob("*") if p.suffix in (".h", ".cpp", ".cu")]


def test_only_csrc_torch_includes_torch():
    """Law 1."""
    include = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python\.h)')
    files = [p for p in sources("") if "torch" not in p.relative_to(ROOT / "csrc").parts]
    assert len(files) > 5
    assert [str(p) for p in files if include.search(p.read_text())] == []


def test_kernels_allocate_nothing_and_start_no_thread():
    """Laws 1 and 3: no heap, no threads, no atomics on floating-point numbers in a kernel."""
    forbidden = re.compile(r"\b(malloc|calloc|realloc|new|std::vector|std::thread|pthread_\w+|omp_\w+|parallel_for|"
                           r"atomicAdd)\b|#\s*pragma\s+omp\s+parallel")  # fmt: skip
    found = []
    for path in sources("cpu", "cuda"):
        code = re.sub(r"//.*", "", path.read_text())
        found += [f"{path.name}: {match.group()}" for match in forbidden.finditer(code)]
    assert not found


def test_no_symbol_of_an_instruction_set_can_be_shared():
    """A weak symbol compiled for AVX-512 may be the copy that the linker keeps for every processor, so what is weak has
    to have the instruction set in its name."""
    objects = [(p, m.group(1)) for p in (ROOT / "build").rglob("*.o") if (m := re.search(r"\.(avx\w+)\.o$", p.name))]
    if not objects:
        pytest.skip("no objects under build/")
    weak = re.compile(r"[0-9a-f]+ [WVu] (?!DW\.ref)")
    for path, name in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        shared = [line for line in symbols if weak.match(line) and f"::{name}::" not in line]
        assert not shared, f"{path.name}: {shared[:5]}"


def test_the_extension_has_no_duplicate_openmp():
    """A second OpenMP runtime in one process deadlocks or runs slowly: ours must be torch's."""
    assert runtimes("import torch, cnnops") == runtimes("import torch")


def runtimes(imports):
    maps = python("-c", f"{imports}; print(open('/proc/self/maps').read())").stdout
    return set(re.findall(r"lib[gi]omp\S*", maps))
