"""What the documents show: their examples run, their links lead somewhere, their tables can be written anew."""

import re
import sys
from pathlib import Path

import pytest
import torch
from circumstances import CONVOLUTIONS, OTHERS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cnnops  # noqa: E402
from benchmarks import reproducibility, rungs  # noqa: E402
from benchmarks.measure import LAYOUTS, Effort  # noqa: E402
from benchmarks.report import with_block  # noqa: E402

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    text = document.read_text()
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall("^#+ (.*)", text, re.M)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub("```.*?```", "", text, flags=re.DOTALL)):
        path, _, heading = link.partition("#")
        if not link.startswith("http"):
            assert (document.parent / path).exists(), link
            assert path or heading in headings, link


def test_examples_of_reproducibility(capsys):
    examples = re.findall("```python\n(.*?)```", (ROOT / "docs" / "reproducibility.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, {})
    name, *fingerprints = capsys.readouterr().out.splitlines()[0].split()
    assert name == "cnnops.nn" and len(fingerprints) == 3 and len(set(fingerprints)) == 1


def test_counts_of_reproducibility():
    """Ours changes no bits; a library that does is found out, kind by kind."""

    class Changing:
        relu = staticmethod(lambda x: x + torch.get_num_threads() * 1e-3)

    drawn = reproducibility.trials(CONVOLUTIONS, 2) + reproducibility.trials(OTHERS, 2)
    calls, ours = reproducibility.count(drawn, cnnops.functional)
    assert calls["conv2d", "grad_bias"] == calls["relu", "forward"] == 2 and not ours
    relu = [trial for trial in drawn if trial.operator == "relu"]
    found = reproducibility.count(relu, Changing)[1]
    assert found["relu", "forward", "threads"] == found["relu", "forward", "any"] == 2
    assert not found["relu", "forward", "run"]
    text = reproducibility.table(calls, {"torch": found, "ours": ours})
    page = with_block((ROOT / "docs" / "reproducibility.md").read_text(), "counts", text)
    assert "| relu | forward | 2 | 2 | 0 | 0 | 2 | 0 | 0 | 0 | 0 |" in page


def test_tables_of_rungs(monkeypatch):
    about, case = next(iter(rungs.LAYERS.items()))
    assert list(rungs.calls(case, "contiguous"))[0] == "reference"
    monkeypatch.setattr(rungs, "EFFORT", Effort(0, 2, 2))
    monkeypatch.setattr(rungs, "LAYERS", {about: case, rungs.VECTORS: case})
    found = rungs.climb()
    found[about, "contiguous"] |= {"reference": [2, 4], "im2col": [30, 50]}
    blocks = {"rungs": rungs.algorithms(found), "vectors": rungs.instruction_sets(), "pooling": rungs.pooling()}
    blocks |= {rung: rungs.gains(found, rung) for rung in rungs.GAINS}
    text = (ROOT / "docs" / "kernels.md").read_text()
    for name, block in blocks.items():
        assert block in with_block(text, name, block)
    assert all(f"| {layout} |" in blocks["rungs"] for layout in LAYOUTS) and "–" in blocks["rungs"]
    assert f"{about}: 15 / 12" in blocks["im2col"]
