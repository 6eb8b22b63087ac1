"""The kernels on small shapes under compute-sanitizer: memory that is not theirs, and races in shared memory.

torch gives every tensor memory of its own here (no caching), or most accesses beyond a tensor would stay unseen. Only
our kernels are instrumented.
"""

import os
import re
import shutil
import subprocess
import sys

from benchmarks.gpu import stage

TOOLS = ["memcheck", "racecheck"]
CASES = "asymmetric or tiles-2x16x9x9x32 or tiles-1x9x19x23x33 or test_relu or test_prelu or unpool or adaptive"
OPTIONS = ["--error-exitcode", "9", "--kernel-name", "kns=cnnops", "--report-api-errors", "no"]


def run(stage_: stage.Stage, options) -> None:
    if options.device == "cpu":
        return stage_.skip("a CPU has no CUDA kernels; `make sanitize` checks them in emulation")
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not program:
        return stage_.skip("compute-sanitizer is not installed")
    tests = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "gpu"]
    tests += ["-k", f"({CASES}) and not bits", "tests/test_device.py"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    wrong = False
    for tool, share in zip(TOOLS, [2, 1], strict=True):
        seconds = stage_.left() / share
        command = [program, "--tool", tool, *OPTIONS, *tests]
        row = {"tool": tool, "cases": CASES}
        try:
            done = subprocess.run(
                command, cwd=stage.ROOT, env=environment, timeout=seconds, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
            row |= {"exit": done.returncode, "summary": found[-1:], "said": done.stdout[-3000:]}
            wrong |= done.returncode != 0
        except subprocess.TimeoutExpired as late:
            said = (late.stdout or b"").decode(errors="replace")
            row |= {"exit": None, "summary": [f"not done after {seconds:.0f} s"], "said": said[-3000:]}
            stage_.add(why=f"{tool} was not done in its time")
        stage_.row(row)
    if wrong:
        stage_.add(status="failed", why="compute-sanitizer found something, or could not run: see its rows")


if __name__ == "__main__":
    stage.main("sanitizer", run, __doc__)
