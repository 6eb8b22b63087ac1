"""The extension with CUDA, for this device alone, unless it is there already."""

import os
import subprocess
import sys
import time

from benchmarks.gpu import stage


def built() -> dict:
    """What the extension that Python finds was built for; asked in a process of its own, since it may not load."""
    asked = "from cnnops import _C; print(_C.build_info()['cuda']); print(_C.__file__)"
    run = subprocess.run([sys.executable, "-c", asked], cwd=stage.ROOT, capture_output=True, text=True)
    if run.returncode:
        return {"cuda": "", "file": None, "said": run.stderr[-500:]}
    cuda, file = run.stdout.splitlines()[-2:]
    return {"cuda": cuda if cuda != "None" else "", "file": file}


def fresh(file: str) -> bool:
    """Whether it is younger than every source."""
    sources = [stage.ROOT / "setup.py", *(path for path in stage.ROOT.glob("csrc/**/*") if path.is_file())]
    return os.stat(file).st_mtime >= max(path.stat().st_mtime for path in sources)


def run(stage_: stage.Stage, options) -> None:
    there = built()
    if there["file"]:
        stage_.add(bytes=os.stat(there["file"]).st_size, cuda=there["cuda"])
    if options.device == "cpu":
        return stage_.skip("a CPU needs no CUDA; the extension is what `make build` made")
    if there["cuda"] and fresh(there["file"]):
        return stage_.skip(f"the extension is there already, built by nvcc {there['cuda']}")
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {"CNNOPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability, **os.environ}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    started = time.monotonic()
    made = subprocess.run(command, cwd=stage.ROOT, env=environment, capture_output=True, text=True)
    said = (made.stdout + made.stderr)[-3000:]
    stage_.add(wall_seconds=time.monotonic() - started, architectures=environment["TORCH_CUDA_ARCH_LIST"])
    there = built()
    if made.returncode or not there["cuda"]:
        return stage_.add(status="failed", why="the build failed", said=said + there.get("said", ""))
    stage_.add(bytes=os.stat(there["file"]).st_size, cuda=there["cuda"])


if __name__ == "__main__":
    stage.main("build", run, __doc__)
