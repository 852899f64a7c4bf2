"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


#: and the others, which take as long each, with the slow tests
FIRST = ("control_problem",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in FIRST else pytest.mark.slow) for p in EXAMPLES]
)
def test_example(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path), "--quick"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "log Z" in done.stdout
