"""Outcomes kept in a file as they come, so that a run that was ended goes on where it was.

One line of JSON a check, each with the run that it is of: seed, thorough or not, controls, versions, and a digest of
the sources. A file holds one run; what passed in it is not run again.
"""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import sdecontrol

from .registry import Setting
from .report import check_as_dict, outcome_of
from .runner import Outcome

__all__ = ["Record", "run_of"]


@cache
def _digest() -> str:
    """Of the sources of the package and of the suite, whichever folder they are in."""
    found = hashlib.sha256()
    for folder in (Path(sdecontrol.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            found.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def run_of(setting: Setting, controls: bool) -> dict[str, Any]:
    """What makes two runs the same: how the checks run, and what they are of."""
    return {
        "seed": setting.seed,
        "thorough": setting.thorough,
        "controls": controls,
        "sdecontrol": sdecontrol.__version__,
        "sources": _digest(),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
    }


class Record:
    """The outcomes in a file. ``known``: those that passed, by name.

    Args:
        path: the file; made where it is not there. Lines of checks that failed are taken out, as is one that was cut
            off while it was written.
        run: what :func:`run_of` says of this run.

    Raises:
        ValueError: the file is of another run.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path, self._run = path, run
        self.known: dict[str, Outcome] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                kept = json.loads(line)
            except ValueError:
                continue  # the run was ended in the middle of it
            self._must_be_of_this_run(kept.pop("run"))
            if kept["passed"]:
                self.known[kept["name"]] = outcome_of(kept)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text("".join(map(self._line, self.known.values())), encoding="utf-8")
        part.replace(path)

    def _must_be_of_this_run(self, run: dict[str, Any]) -> None:
        other = [f"{k} {run.get(k)!r}, not {v!r}" for k, v in self._run.items() if run.get(k) != v]
        if other:
            raise ValueError(f"{self._path} is of another run ({'; '.join(other)}): give another file, or delete it.")

    def _line(self, outcome: Outcome) -> str:
        return json.dumps({**check_as_dict(outcome), "run": self._run}) + "\n"

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome, whether it passed or not."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._line(outcome))
