"""Builds cnnops._C, the extension with all kernels.

Kernels include no torch header, so they are compiled on their own, with flags of their own: every CPU source once per
instruction set, every CUDA source once for all GPU architectures. ninja does that, a few files at a time and only what
changed; torch's own build tool then compiles csrc/torch and links everything.

    CNNOPS_CUDA=0 | 1       build without CUDA | insist on it (default: with CUDA if a compiler is found)
    TORCH_CUDA_ARCH_LIST    GPU architectures, e.g. "8.0;9.0+PTX" (default: 7.5;8.0;9.0+PTX;12.0+PTX)
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from ninja import ninja_syntax
from setuptools import Command, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"

# Widest last. A name here is a namespace in csrc/cpu and a value of CNNOPS_ISA.
INSTRUCTION_SETS = {"base": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mprefer-vector-width=512"
COMPILED_ONCE = [CPU / "instruction_sets.cpp"]

# No contraction: a multiply-add is fused where simd.h says so, and nowhere else.
KERNEL_FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra"
NVCC_FLAGS = "-std=c++20 -O3 --resource-usage -Xcompiler -fPIC,-fvisibility=hidden"
# Machine code runs on later GPUs of the same major number; between 9.0 and 12.0, and after 12, portable code has to do.
ARCHITECTURES = "7.5;8.0;9.0+PTX;12.0+PTX"


def wheel_folders() -> list[Path]:
    """Where the registry's CUDA wheels put their files: beside torch, and wherever else packages are found."""
    places = [Path(torch.__file__).parent.parent, *map(Path, sys.path)]
    return [place / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}" for place in places]


def find_nvcc() -> Path | None:
    """A compiler of torch's CUDA version: CUDA_HOME's, the registry's wheel, or the one on the PATH."""
    if CUDA_WANTED == "0" or torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    candidates = [folder / "bin" / "nvcc" for folder in wheel_folders()]
    if "CUDA_HOME" in os.environ:
        candidates.insert(0, Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    for nvcc in candidates:
        if nvcc.is_file() and nvcc_version(nvcc).split(".")[0] == major:
            return nvcc
    return None


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "0.0"


def packing(nvcc: Path) -> str:
    """The same kernel for several architectures is much alike: packed well, it is a quarter as large as by default."""
    return "-compress-mode=size" if int(nvcc_version(nvcc).split(".")[0]) >= 13 else ""


def cuda_include(nvcc: Path) -> list[str]:
    """Where nvcc itself finds CUDA's headers: torch's C++ sources want them too."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    includes = re.search(r"^#\$ INCLUDES=(.*)$", dry_run, re.MULTILINE)
    return re.findall(r'-I"?([^"\s]+)', includes[1]) if includes else []


def cuda_runtime(nvcc: Path) -> list[str]:
    """Linker flags for the CUDA runtime that torch itself loads, or else the compiler's."""
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    for folder in wheel_folders():
        if (folder / "lib" / name).is_file():
            return [str(folder / "lib" / name)]
    return [f"-L{nvcc.parent.parent / 'lib64'}", "-lcudart"]


def architecture_flags(architectures: str) -> str:
    """nvcc's flags for "8.0;9.0+PTX": machine code for each, and portable code that later GPUs can translate."""
    flags = []
    for architecture in re.split(r"[;\s]+", architectures.strip()):
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class Build(BuildExtension):
    """Compiles the kernels first, then what includes torch; records the torch it was built for."""

    def finalize_options(self):
        super().finalize_options()
        # Folders that stay, also for editable installs, so that only what changed is compiled again. Kernels know
        # nothing of torch and Python: theirs is one for all.
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        self.build_temp = str(ROOT / "build" / f"{python}-torch{torch.__version__}-{'cuda' if NVCC else 'cpu'}")

    def build_extension(self, ext):
        ext.extra_objects = self.build_kernels(ROOT / "build" / "kernels")
        super().build_extension(ext)

    def run(self):
        if CUDA_WANTED == "1" and not NVCC:
            remedy = (
                "pip install '" + "' '".join(compiler_wheels()) + "'"
                if torch.version.cuda
                else "install a CUDA build of torch"
            )
            raise SystemExit(f"CNNOPS_CUDA=1, but torch {torch.__version__} finds no compiler of its CUDA: {remedy}")
        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib)
        (folder / "cnnops" / "_build.py").write_text(
            f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
        )
        print(f"cnnops: built for torch {torch.__version__}; CPU: {', '.join(INSTRUCTION_SETS)}; CUDA: {CUDA_BUILT}")

    def build_kernels(self, folder: Path) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        with open(folder / "build.ninja", "w") as file:
            n = ninja_syntax.Writer(file)
            compiler = os.environ.get("CXX", "g++")
            tail = "-MD -MF $out.d $flags -c $in -o $out"
            n.rule("cxx", f"{compiler} {KERNEL_FLAGS} {tail}", depfile="$out.d", deps="gcc")
            # What a kernel takes of a GPU goes to a file of its own, for benchmarks/resources.py; the rest is shown.
            report = "$out.resources"
            chatter = "^ptxas info|bytes stack frame"
            compile = f"{NVCC} {NVCC_FLAGS} {packing(NVCC)} {tail}" if NVCC else "false"
            shown = f"{compile} > {report} 2>&1; status=$$?; grep -vE '{chatter}' {report}; exit $$status"
            n.rule("nvcc", shown, depfile="$out.d", deps="gcc")

            def build(rule, source, name, flags):
                objects.append(str(folder / f"{name}.o"))
                n.build(objects[-1], rule, str(source), variables={"flags": flags})

            for source in sorted(CPU.glob("*.cpp")):
                if source in COMPILED_ONCE:
                    build("cxx", source, source.stem, "")
                    continue
                for name, flags in INSTRUCTION_SETS.items():
                    build("cxx", source, f"{source.stem}.{name}", f"{flags} -DCNNOPS_ISA={name}")
            if NVCC:
                for source in sorted(CUDA.glob("*.cu")):
                    build("nvcc", source, f"{source.stem}.cuda", architecture_flags(CUDA_ARCHS))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        return objects


def compiler_wheels() -> list[str]:
    """The registry's compiler; its back end by name, since not every release asks for the one that fits."""
    return [f"cuda-toolkit[nvcc,crt]=={torch.version.cuda}.*", f"nvidia-nvvm=={torch.version.cuda}.*"]


class InstallNvcc(Command):
    """Installs the registry's CUDA compiler where kernels for a GPU are wanted and no compiler is there."""

    user_options = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        wanted = CUDA_WANTED == "1" or (CUDA_WANTED != "0" and torch.cuda.is_available())
        if wanted and not NVCC and torch.version.cuda:
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", *compiler_wheels()], check=True)


CUDA_WANTED = os.environ.get("CNNOPS_CUDA")
NVCC = find_nvcc()
CUDA_ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
CUDA_BUILT = f"nvcc {nvcc_version(NVCC)} for {CUDA_ARCHS}" if NVCC else "no"

# torch spreads the CPU's work with OpenMP through a header: without -fopenmp it would run on one thread.
torch_flags = ["-O2", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall"]
link_flags = ["-fopenmp"]
include_dirs = []
if NVCC:
    torch_flags += [f'-DCNNOPS_CUDA="{nvcc_version(NVCC)}"', f'-DCNNOPS_CUDA_ARCHS="{CUDA_ARCHS}"']
    include_dirs = cuda_include(NVCC)
    link_flags += ["-lc10_cuda", *cuda_runtime(NVCC)]

if __name__ == "__main__":
    setup(
        ext_modules=[
            CppExtension(
                "cnnops._C",
                sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "torch").glob("*.cpp")),
                include_dirs=include_dirs,
                extra_compile_args=torch_flags,
                extra_link_args=link_flags,
            )
        ],
        cmdclass={"build_ext": Build, "install_nvcc": InstallNvcc},
    )
