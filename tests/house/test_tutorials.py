"""The tutorials run in small, and their pages are those of their sources."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tutorials import FOLDER, cells, names, run
from sdecontrol.methods import base


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_tutorial_runs_in_small_and_draws(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "METHODS", dict(base.METHODS))  # what a tutorial registers is gone afterwards
    done = list(run(name, small=True))
    assert any(cell.figure is not None for cell in done)
    assert any(cell.printed for cell in done)


@pytest.mark.parametrize("name", names())
def test_the_page_of_a_tutorial_is_that_of_its_source(name: str) -> None:
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    sources = cells(name)
    assert sources[0].source.startswith("# ") and "small" in sources[1].metadata
    place = 0
    for cell in sources:  # in this order, each from its first character to its last
        text = cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```\n"
        found = page.find(text, place)
        assert found >= 0, f"run: python -m benchmarks tutorials {name}\n{text}"
        place = found + len(text)
    figures = re.findall(r"\]\((images/\w+\.png)\)", page)
    assert figures and all((FOLDER / figure).is_file() for figure in figures)
