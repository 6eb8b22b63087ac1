"""How fast, beside torch: ``python -m cnnops bench``.

workloads.py    what is measured, in which groups, and each group's goal
operators.py    a workload's passes as callables, ours and torch's
measure.py      the clock, the check against float64, the machine's ceilings
peers.py        the same layers in torch.compile, ONNX Runtime, OpenVINO and ncnn
report.py       tables, the picture, docs/performance.md and the README's block
cli.py          the command

overhead.py, reproducibility.py and rungs.py are commands of their own: ``python -m benchmarks.rungs``. On a GPU:
``python -m benchmarks.gpu_check``, whose stages are in gpu/.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # cases.py, the table of shapes
