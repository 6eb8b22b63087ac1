"""How fast, beside torch: ``python -m cnnops bench``.

workloads.py    what is measured, in which groups, and each group's goal
operators.py    a workload's passes as callables, ours and torch's
measure.py      the clock, the check against float64, the machine's ceilings
peers.py        the same layers in torch.compile, ONNX Runtime, OpenVINO and ncnn
report.py       tables, the picture, docs/performance.md and the README's block
cli.py          the command
"""
