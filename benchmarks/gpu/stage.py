"""What the stages share: options, the time that they have, and a JSON of what was found so far."""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Stage:
    """One stage's time and findings. What happens ends in `status`: done, cut, skipped, failed."""

    def __init__(self, name: str, options):
        self.started, self.seconds = time.monotonic(), options.seconds
        self.path = options.save / f"{name}.json"
        self.data = {"stage": name, "device": options.device, "status": "cut"}
        self.save()

    def left(self) -> float:
        """Seconds, less some for whoever has to end the process."""
        return 0.95 * self.seconds - (time.monotonic() - self.started)

    def add(self, **found) -> None:
        self.data |= found
        self.save()

    def row(self, row: dict) -> None:
        self.data.setdefault("rows", []).append(row)
        if time.monotonic() - self.saved > 0.5:
            self.save()

    def skip(self, why: str) -> None:
        self.add(status="skipped", why=why)

    def save(self) -> None:
        write(self.path, self.data)
        self.saved = time.monotonic()


def run_command(command: list[str], seconds: float, **settings) -> tuple[int | None, str]:
    """Its exit status, or nothing if it was stopped with all that it started, and what it said."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **settings
        )
        code = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)


def read(folder: Path, name: str) -> dict:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that every stage has, and the command that runs them all."""
    add = parser.add_argument
    add("--save", type=Path, required=True, metavar="DIR", help="where the JSONs go")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the check itself")
    add("--case", nargs="+", default=[""], metavar="TEXT", help="only layers, models and tests with one of these")


def main(name: str, run: Callable[[Stage, argparse.Namespace], None], about: str) -> None:
    """A stage as a command. `run` returns when it is done; whatever keeps it from that, the JSON has what was found."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}", description=about.splitlines()[0])
    add_options(parser)
    parser.add_argument("--seconds", type=float, required=True, help="the stage's time")
    options = parser.parse_args()
    stage = Stage(name, options)
    try:
        run(stage, options)
    finally:
        stage.save()
    if stage.data["status"] == "cut" and "why" not in stage.data:
        stage.add(status="done")
