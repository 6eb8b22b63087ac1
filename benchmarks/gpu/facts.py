"""The device, its versions, and what it reaches at best: copies of memory, products of matrices."""

import subprocess
from contextlib import contextmanager

import torch

from benchmarks import measure
from benchmarks.gpu import stage
from benchmarks.gpu.clock import clock

# A copy beyond every cache, and matrices that fill the GPU (a CPU only tries the check: without instructions for it,
# torch multiplies bfloat16 at 1 GFLOP/s).
SIZES = {"cuda": (2**32, 8192), "cpu": (2**25, 128)}
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@contextmanager
def precision(name: str):
    """Whether torch's switches allow TF32, for products and for convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def versions(device: str) -> dict:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found |= {key: measure.machine()[key] for key in ("commit", "date")}
    if device == "cpu":
        return {"name": "this processor", "driver": "none", **found}
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": p.total_memory,
        "L2": p.L2_cache_size,
        "driver": _nvidia_smi("driver_version"),
        "clock MHz": _nvidia_smi("clocks.max.sm"),
        **found,
    }


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def copy_rate(timer, size: int) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(size // 2, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return size / _best(timer, lambda: target.copy_(source))


def product_rate(timer, size: int, name: str) -> float:
    """Operations per second of a product of random square matrices."""
    a, b = (torch.randn(size, size, device=timer.device).to(PRECISIONS[name]) for _ in range(2))
    out = torch.empty_like(a)
    with precision(name):
        return 2 * size**3 / _best(timer, lambda: torch.mm(a, b, out=out))


def _best(timer, call) -> float:
    sampler = timer.sampler([call])
    return min(sampler() for _ in range(5))


def run(stage_: stage.Stage, options) -> None:
    stage_.add(**versions(options.device))
    timer = clock(options.device)
    copied, side = SIZES[options.device]
    stage_.add(bytes_per_second=copy_rate(timer, copied), operations_per_second={})
    for name in PRECISIONS:
        rates = stage_.data["operations_per_second"]
        stage_.add(operations_per_second={**rates, name: product_rate(timer, side, name)})


if __name__ == "__main__":
    stage.main("facts", run, __doc__)
