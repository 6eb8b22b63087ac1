"""Whose bits stay the same: ``python -m benchmarks.reproducibility [--write-docs]``.

The random calls of tests/circumstances.py, from a fixed seed, by torch.nn.functional and by ours; for each operator and
pass, how many of the calls gave other bits in other circumstances. --write-docs puts the table into
docs/reproducibility.md.
"""

import argparse
import random
import warnings
from collections import Counter
from itertools import chain

import torch
from circumstances import CONVOLUTIONS, OTHERS, changes, restridings
from helpers import same_bits

import cnnops
from benchmarks import ROOT
from benchmarks.measure import where
from benchmarks.report import markdown, with_block

KINDS = ["batch size", "place", "threads", "address", "strides", "run"]
LIBRARIES = {"torch": torch.nn.functional, "ours": cnnops.functional}


def trials(generators: dict, calls: int, seed: int = 0) -> list:
    """So many of each operator; every other one in channels_last."""
    drawn = []
    for name, generator in generators.items():
        pick = random.Random(f"{name} {seed}").choice
        for i in range(calls):
            trial = generator(pick)
            trial.memory_format = torch.channels_last if i % 2 else torch.contiguous_format
            drawn.append(trial)
    return drawn


def changed(subject) -> set[str]:
    """The kinds of changes that showed in the bits."""
    return {
        kind
        for kind, _, expected, got in chain(changes(subject), restridings(subject))
        if not all(same_bits(a, b) for a, b in zip(expected, got, strict=True))
    }


def count(drawn: list, library) -> tuple[Counter, Counter]:
    """(operator, pass) -> calls; (operator, pass, kind or "any") -> calls whose bits changed."""
    calls, found = Counter(), Counter()
    for trial in drawn:
        for which in trial.passes:
            calls[trial.operator, which] += 1
            kinds = changed(trial.subject(which, library))
            found.update((trial.operator, which, kind) for kind in [*kinds, *["any"] * bool(kinds)])
    return calls, found


def table(calls: Counter, found: dict[str, Counter]) -> str:
    """A row for every pass in which bits changed, one for all the others, and one for all."""
    theirs, ours = found["torch"], found["ours"]
    changing = [key for key in calls if theirs[(*key, "any")] or ours[(*key, "any")]]
    others = [key for key in calls if key not in changing]

    def row(title: list[str], keys: list) -> list[str]:
        counts = {kind: sum(theirs[(*key, kind)] for key in keys) for kind in ["any", *KINDS]}
        if keys and all(which in ("grad_weight", "grad_bias") for _, which in keys):
            counts |= {kind: "" for kind in KINDS[:2]}
        all_calls, of_ours = sum(calls[key] for key in keys), sum(ours[(*key, "any")] for key in keys)
        return [*title, *map(str, [all_calls, *counts.values(), of_ours])]

    rows = [row(list(key), [key]) for key in changing]
    rows.append(row([", ".join(dict.fromkeys(operator for operator, _ in others)), "the other passes"], others))
    rows.append(row(["**all**", ""], list(calls)))
    return markdown(["operator", "pass", "calls", "torch: any", *KINDS, "cnnops: any"], rows, left=2)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproducibility", description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="of each convolution; a third of it of the others")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    drawn = trials(CONVOLUTIONS, options.calls) + trials(OTHERS, -(-options.calls // 3))
    found = {}
    for name, library in LIBRARIES.items():
        calls, found[name] = count(drawn, library)
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    strict = sum(n for (*_, kind), n in count(drawn, torch.nn.functional)[1].items() if kind == "any")
    text = table(calls, found) + (
        f"\n\nWith `torch.use_deterministic_algorithms(True)`: torch {strict} of {calls.total()}.\n\n{where()}\n"
    )
    print(text)
    if options.write_docs:
        page = ROOT / "docs" / "reproducibility.md"
        page.write_text(with_block(page.read_text(), "counts", text))


if __name__ == "__main__":
    main()
