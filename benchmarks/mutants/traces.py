"""Which tests, and which checks of the theory suite, execute a line of the package: traced once for a commit."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .draw import Mutant
from .operators import Change

__all__ = ["PLUGINS", "Traces", "as_it_was", "planted_tree", "surroundings"]

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).parent / "plugins"
_OWN_ROOM = 0.25  # tests of the mutant's own room come as if they took so much of their time


def planted_tree(folder: Path, commit: str) -> Path:
    """A copy of the repository at a commit, in which mutants may be planted."""
    tree = folder / "tree"
    if not tree.exists():
        part = folder / "tree.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", str(part)], input=packed, check=True)
        part.rename(tree)
    return tree


def as_it_was(tree: Path, commit: str, file: str) -> bytes:
    """A file of the copy, without what a run that was killed has left planted in it."""
    found = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=ROOT, capture_output=True, check=True).stdout
    if (tree / file).read_bytes() != found:
        (tree / file).write_bytes(found)
    return found


def surroundings(tree: Path, **more: str) -> dict[str, str]:
    """The environment of a process that is to import the copy's package, and in it these plugins."""
    paths = os.pathsep.join((str(tree), str(PLUGINS)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}


@dataclass(frozen=True)
class Traces:
    """What was traced of one commit: ``folder/tests``, ``folder/checks``."""

    folder: Path
    what: str

    @property
    def there(self) -> bool:
        return (self.folder / self.what / "tests.jsonl").exists()

    def trace(self, tree: Path) -> None:
        """Run the default tests, or the theory suite, under coverage: some quarter of an hour of one core."""
        runs = {
            "tests": ["-m", "pytest", "-p", "traced_tests", "-p", "no:cacheprovider"],
            "checks": [str(PLUGINS / "traced_checks.py")],
        }
        into = self.folder / self.what
        shutil.rmtree(into, ignore_errors=True)
        subprocess.run([sys.executable, *runs[self.what]], cwd=tree, env=surroundings(tree, TRACED=str(into)))

    @cached_property
    def known(self) -> dict[str, dict[str, Any]]:
        """Of each test or check that passes: its seconds, and the fixtures that it shares."""
        lines = (self.folder / self.what / "tests.jsonl").read_text().splitlines()
        return {facts["name"]: facts for facts in map(json.loads, lines) if facts["outcome"] == "passed"}

    @cached_property
    def _data(self) -> Any:
        from coverage import CoverageData

        data = CoverageData(str(self.folder / self.what / "lines"))
        data.read()
        return data

    def lines(self, file: str) -> dict[int, set[str]]:
        """Executed lines of a file, and by what; "" is what imports it."""
        measured = next((f for f in self._data.measured_files() if f.endswith(f"/{file}")), None)
        return {} if measured is None else {k: set(v) for k, v in self._data.contexts_by_lineno(measured).items()}

    def executing(self, mutant: Mutant, source: bytes) -> list[str]:
        """Tests that execute a mutant, in the order in which they are to be tried: the quickest of every test file
        first, then what takes longer there, so that they are of many files; those of the mutant's room before."""
        by_line = self.lines(mutant.file)
        contexts = {c for row in _rows(mutant.change, source, by_line) for c in by_line.get(row, ())} - {""}
        names = [n for n, facts in self.known.items() if n in contexts or contexts & set(facts.get("fixtures", ()))]
        spent: dict[str, float] = {}
        order = {}
        for name in sorted(names, key=lambda n: self.known[n]["seconds"]):
            file = name.split("::")[0]
            spent[file] = spent.get(file, 0.0) + self.known[name]["seconds"]
            order[name] = spent[file] * (_OWN_ROOM if f"tests/{mutant.room}/" in file else 1.0)
        return sorted(names, key=lambda n: order[n])


def _rows(change: Change, source: bytes, by_line: dict[int, set[str]]) -> list[int]:
    """The lines whose execution executes a change: its own; where the import runs it, those that may see it."""
    if change.scope == "body":
        own = [change.line] if by_line.get(change.line) else []
        return own or list(range(change.first, change.last + 1))
    text = source.decode().splitlines()
    if change.scope == "module":  # lines that name what it is part of
        assigned = re.match(r"\s*([A-Za-z_]\w*)", text[change.first - 1])
        named = re.compile(rf"\b{assigned[1]}\b") if assigned else None
        rows = [i for i, line in enumerate(text, 1) if named and named.search(line) and by_line.get(i, set()) - {""}]
        return rows or list(by_line)
    node: Any = ast.parse(source)
    for name in change.function.split("."):
        inside = [n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n is not node]
        node = next(n for n in inside if n.name == name and n.lineno <= change.line <= (n.end_lineno or 0))
    first = node.body[0].lineno if isinstance(node, ast.FunctionDef) else node.lineno
    return list(range(first, (node.end_lineno or first) + 1))
