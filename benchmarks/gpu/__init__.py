"""The stages of the GPU check, ``python -m benchmarks.gpu_check``, each a command of its own.

stage.py        what they share: options, the time they have, their JSON
facts.py        the device, its versions, its measured ceilings
build.py        the extension with CUDA
tests.py        the tests of the suite that run on a device
sanitizer.py    some of them under compute-sanitizer
timings.py      every layer of the benchmark, beside torch
training.py     fused blocks and the MNIST training step, eager and captured
clock.py        CUDA events around replays of graphs; on a CPU, the benchmark's clock
summary.py      the table, the goals, and the section of docs/performance.md

Every stage is a process, so that one that crashes, or runs out of time, costs the others nothing.
"""
