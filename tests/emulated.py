"""Builds the emulated CUDA kernels (cuda_on_cpu/README.md) and runs them, in a process of their own.

A kernel's mistake ends that process: so sanitizers need nothing of Python, and pytest goes on with the next call.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-DCNNOPS_EMULATE", "-Itests/cuda_on_cpu", "-Icsrc"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"],
    "thread": ["-fsanitize=thread", "-DCNNOPS_EMULATE_TSAN", "-g1"],
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0:atexit_sleep_ms=0",
}

TYPES = "float32 float64 bfloat16 float16 uint8 int8 int16 int32 int64".split()  # in the order of ForNumbers
UNBOUNDED = 2**31 - 1


def has_compiler():
    return shutil.which(CXX[0]) is not None


@cache
def has_sanitizer(sanitizer):
    """Whether a program with it can be built, and runs here."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*CXX, *SANITIZERS[sanitizer], "-x", "c++", "-", "-o", f"{folder}/empty"]
        built = subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0
        return built and subprocess.run([f"{folder}/empty"], capture_output=True).returncode == 0


def build(sanitizer=""):
    """The runner's path. Built once for given sources."""
    here = ROOT / "tests/cuda_on_cpu"
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), *sorted(here.glob("*.cu")), *sorted(here.glob("*.cpp"))]
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *here.glob("*.h")]
    flags = FLAGS + SANITIZERS[sanitizer]
    content = b"".join(path.read_bytes() for path in sorted(sources + headers)) + repr((CXX, flags)).encode()
    folder = ROOT / "build" / "cuda_on_cpu" / hashlib.sha256(content).hexdigest()[:16]
    runner = folder / "runner"

    def compile(source, to):
        own = ["-fno-sanitize=thread"] if source.name == "emulation.cpp" else []
        subprocess.run([*CXX, *flags, *own, "-x", "c++", "-c", source, "-o", to], cwd=ROOT, check=True)

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of pytest want it as well
        if not runner.exists():
            objects = [folder / f"{source.name}.o" for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile, sources, objects))
            fresh = folder / "fresh"
            subprocess.run([*CXX, *flags, *objects, "-o", fresh], cwd=ROOT, check=True)
            for path in objects:
                path.unlink()
            fresh.rename(runner)
    return runner


class Emulation:
    """Calls kernels by name. Operands are bytes, or None."""

    def __init__(self, sanitizer=""):
        self.sanitizer, self.runner, self.process = sanitizer, build(sanitizer), None
        self.copies_seen = False  # whether the last call used cp.async

    def start(self):
        self.errors = tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([self.runner], env={**os.environ, **SANITIZER_OPTIONS}, **pipes)

    def stop(self):
        if self.process:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.errors.close()
            self.process = None

    def call(self, name, type, integers, inputs=(), output_sizes=(), *, reals=(), offsets=(), in_place=False, order=0,
             copies=0, grid_limit=UNBOUNDED, index_limit=UNBOUNDED, architecture=75, poison=0xFF):  # fmt: skip
        """The outputs' bytes; or raises RuntimeError with what the kernel's launcher refused, or what it did wrong.
        `offsets`: by how many bytes each operand, inputs first, misses an aligned address."""
        sizes = [-1 if operand is None else len(operand) for operand in inputs]
        words = [name, TYPES.index(type), order, copies, grid_limit, index_limit, architecture, poison, int(in_place)]
        for numbers in (integers, reals, sizes, output_sizes, offsets):
            words += [len(numbers), *(repr(number) if isinstance(number, float) else int(number) for number in numbers)]
        answer = self.ask(" ".join(map(str, words)) + "\n", inputs)
        if answer.startswith("error "):
            raise RuntimeError(answer.removeprefix("error "))
        self.copies_seen = answer == "ok 1"
        return [self.read(size) for size in (sizes[:1] if in_place else output_sizes)]

    def ask(self, line, inputs=()):
        if not self.process:
            self.start()
        try:
            self.process.stdin.write(b"".join([line.encode(), *(operand for operand in inputs if operand)]))
            self.process.stdin.flush()
        except BrokenPipeError:
            self.raise_error()
        return self.process.stdout.readline().decode().removesuffix("\n") or self.raise_error()

    def read(self, size):
        data = self.process.stdout.read(size)
        return data if len(data) == size else self.raise_error()

    def raise_error(self):
        """What the process said before it ended."""
        self.process.wait()
        self.errors.seek(0)
        said, status = self.errors.read().decode(errors="replace"), self.process.returncode
        try:
            self.stop()
        except BrokenPipeError:  # of what it did not want to read any more
            self.process = None
        raise RuntimeError(said or f"the emulation ended with status {status}")

    def algorithms(self):
        """The names of the convolution's algorithms, in the order of the table."""
        return self.ask("algorithms" + " 0" * 13 + "\n").split()

    def workspace(self, algorithm, which, integers):
        """Elements of scratch that an algorithm wants for a pass."""
        numbers = [*integers, which]
        head = f"workspace {algorithm} {'0 ' * 7}{len(numbers)} "
        return int(self.ask(head + " ".join(map(str, numbers)) + " 0 0 0 0\n"))
