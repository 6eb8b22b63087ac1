"""The kernels on small shapes under compute-sanitizer: memory that is not theirs, and races in shared memory.

torch gives every tensor memory of its own here (no caching), or most accesses beyond a tensor would stay unseen. Only
our kernels are instrumented.
"""

import os
import re
import shutil
import sys

from benchmarks.gpu import stage

TOOLS = ["memcheck", "racecheck"]
CASES = "asymmetric or tiles-2x16x9x9x32 or tiles-1x9x19x23x33 or test_relu or test_prelu or adaptive"
# What stands in the output of a run that did not come to its summary.
FINDINGS = r"Invalid __|hazard|Race reported"
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
    late, wrong, command = [], [], [program, *OPTIONS]
    for tool, share in zip(TOOLS, [2, 1], strict=True):
        code, said = stage.run_command([*command, "--tool", tool, *tests], stage_.left() / share, env=environment)
        summaries = re.findall(r"SUMMARY: (.*)", said)
        stage_.row({"tool": tool, "exit": code, "summary": summaries[-1:], "said": said[-3000:]})
        if code or code is None and re.search(FINDINGS, said):
            wrong.append(tool)
        elif code is None:
            late.append(tool)
    if wrong:
        stage_.add(status="failed", why=f"{' and '.join(wrong)} found something, or could not run: see its rows")
    elif late:
        stage_.add(why=f"{' and '.join(late)} found nothing in the time, but was not done")


if __name__ == "__main__":
    stage.main("sanitizer", run, __doc__)
