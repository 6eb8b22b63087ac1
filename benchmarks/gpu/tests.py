"""Every test of the suite that runs on a device: `pytest -m gpu`, the most telling files first.

On a CPU, where there are none, the slice that tests/test_device.py takes there.
"""

import importlib.util
import os
import time

from benchmarks.gpu import stage

FIRST = [
    "device",
    "conv2d",
    "conv2d_surface",
    "pool2d",
    "activation",
    "conv_block",
    "accuracy",
    "errors",
    "nn",
    "notes",
]
SAID, FAILURES = 1500, 60  # characters of a failure's report, and reports that are kept


class Findings:
    """A plugin that counts as it goes. With xdist it hears of the tests of all processes."""

    def __init__(self, stage_: stage.Stage):
        self.stage, self.files, self.failures, self.written = stage_, {}, [], 0.0

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and not report.failed and not report.skipped:
            return
        counts = self.files.setdefault(report.nodeid.split("::")[0], {})
        counts[report.outcome] = counts.get(report.outcome, 0) + 1
        if report.failed and len(self.failures) < FAILURES:
            self.failures.append({"test": report.nodeid, "said": report.longreprtext[-SAID:]})
        if time.monotonic() - self.written > 1:
            self.write()

    def pytest_sessionfinish(self):
        self.write()

    def write(self):
        self.written = time.monotonic()
        totals = {}
        for counts in self.files.values():
            for outcome, number in counts.items():
                totals[outcome] = totals.get(outcome, 0) + number
        self.stage.add(tests=totals, files=self.files, failures=self.failures)


def selection(options) -> list[str]:
    """pytest's arguments."""
    folder = stage.ROOT / "tests"
    cases = ["-k", " or ".join(options.case)] if any(options.case) else []
    if options.device == "cpu":
        return [str(folder / "test_device.py"), *cases]
    first = [folder / f"test_{name}.py" for name in FIRST]
    rest = [path for path in sorted(folder.glob("test_*.py")) if path not in first and "test_cuda_" not in path.name]
    workers = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    return ["-m", "gpu", *workers, "--maxfail", "200", *cases, *map(str, first), *map(str, rest)]


def run(stage_: stage.Stage, options) -> None:
    if missing := [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]:
        return stage_.skip(f"not installed: {', '.join(missing)}")
    import pytest

    os.chdir(stage.ROOT)
    quiet = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    code = pytest.main([*quiet, *selection(options)], plugins=[Findings(stage_)])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return stage_.skip("no test is like that")
    stage_.add(pytest=int(code), status="done" if code == 0 else "failed")


if __name__ == "__main__":
    stage.main("tests", run, __doc__)
