"""Everything that there is to know about a GPU, in one command and ten minutes: ``python -m benchmarks.gpu_check``.

    build       the extension with CUDA, unless it is there
    facts       the device, its versions, its measured ceilings
    tests       every test that runs on a device, on it
    sanitizer   some of them under compute-sanitizer
    timings     every layer of the benchmark, beside torch
    training    fused blocks and the MNIST training step, eager and captured

Each stage is a process with its share of the time (what one leaves over, the next ones get) and a JSON of what it found
so far: one that crashes or is cut leaves that, and the next goes on. `--device cpu` tries the check itself, where there
is no GPU; what cannot be there says so.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.gpu import stage, summary

SECONDS = 560  # of ten minutes
LEAST = 20  # of a stage, while there are as many
# Shares of the time.
WEIGHTS = {"build": 140, "facts": 20, "tests": 110, "sanitizer": 80, "timings": 150, "training": 60}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--write-docs", type=Path, metavar="DIR", help="only write docs/performance.md, from its JSONs")
    parser.add_argument("--show", type=Path, metavar="DIR", help="only show the tables, from its JSONs")
    parser.add_argument("--stage", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all stages together (default: {SECONDS})")
    stage.add_options(parser)
    return parser


def run_stage(name: str, command: list[str], seconds: float, folder: Path) -> dict:
    """Its JSON, and how it ended. A process that is not done in time is stopped, with all that it started."""
    started, path = time.monotonic(), folder / f"{name}.json"
    path.unlink(missing_ok=True)  # an earlier run's
    code, said = stage.run_command(command, seconds)
    data = stage.read(folder, name) or {"stage": name, "status": "failed", "why": "it found nothing"}
    data |= {"spent": time.monotonic() - started, "limit": seconds}
    if code is None:
        data |= {"status": "cut", "why": f"stopped after {seconds:.0f} s"}
    elif code:
        why = data.get("why") or (said.strip().splitlines() or [f"ended with {code}"])[-1]
        data |= {"status": "failed", "why": why}
    if data["status"] in ("cut", "failed"):
        data.setdefault("said", said[-3000:])
    stage.write(path, data)
    return data


def run(options) -> dict:
    end = time.monotonic() + options.seconds
    rest = ["--save", str(options.save.resolve()), "--device", options.device, "--case", *options.case]
    for at, name in enumerate(options.stage):
        weights = [WEIGHTS[other] for other in options.stage[at:]]
        left = end - time.monotonic()
        seconds = min(left, max(LEAST, left * weights[0] / sum(weights)))
        if seconds <= 0:
            stage.write(options.save / f"{name}.json", {"stage": name, "status": "skipped", "why": "no time was left"})
            continue
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--seconds", str(seconds), *rest]
        data = run_stage(name, command, seconds, options.save)
        print(f"{name}: {data['status']} after {data['spent']:.0f} s. {data.get('why', '')}", flush=True)
        if name == "build" and options.device == "cuda" and not data.get("cuda"):
            break  # nothing else could run
    return summary.load(options.save)


def main() -> None:
    if {"--write-docs", "--show"} & set(sys.argv):
        sys.argv += ["--save", "."]  # which is for measuring
    options = parser().parse_args()
    if options.write_docs:
        return summary.write_docs(options.write_docs)
    if options.show:
        return summary.show(summary.load(options.show))
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU here; --device cpu tries the check itself")
    data = run(options)
    summary.show(data)
    if wrong := summary.failures(data):
        sys.exit(f"{len(wrong)} failures, above in red")


if __name__ == "__main__":
    main()
