"""``python -m benchmarks mutants``: draws, runs, and writes the page."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cells import store, versions
from .draw import Mutant, draw
from .operators import Change, changes
from .page import seen_by, write_page
from .runs import tried
from .share import executed_share
from .traces import ROOT, Traces, as_it_was, planted_tree

__all__ = ["mutants"]

RESULTS = Path(__file__).parents[1] / "results" / "mutants"
CACHE = ROOT / "output" / "mutants"
Cell = dict[str, Any]


def mutants(
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    number: Annotated[int, typer.Option(help="Of mutants, in all rooms together.")] = 100,
    commit: Annotated[str, typer.Option(help="Whose mutants are drawn, where none of this seed are yet.")] = "HEAD",
    only: Annotated[str, typer.Option(help="Mutants whose name contains this.")] = "",
    most: Annotated[float, typer.Option(help="CPU-seconds of tests that are tried on each, as they were traced.")] = 60,
    again: Annotated[bool, typer.Option("--again", help="Run those that no test has seen again.")] = False,
    checks: Annotated[bool, typer.Option("--checks", help="Theory checks, where no test has seen anything.")] = False,
    tests: Annotated[
        list[str] | None,
        typer.Option(help="These where nothing was seen; then at the present commit."),
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Only: what of the package the theory suite runs.")] = False,
    cache: Annotated[Path, typer.Option(help="Where copies and traces of a commit are kept.")] = CACHE,
    page: Annotated[bool, typer.Option("--page", help="Only write the page from what is there.")] = False,
) -> None:
    """Bugs planted at random: does a test, or a check of the theory, see them?

    Example: python -m benchmarks mutants --only chains
    """
    if share:
        _measure_share(cache, _short(commit))
    for room in () if page or share else _drawn(seed, number, commit, cache):
        for cell in room["mutants"]:
            if only in cell["name"] and _try(cell, room["commit"], cache, most, again, checks, tests or ()):
                store(_file(room), {**room, "versions": versions()})
                print(f"{cell['name']:<20} {cell['file']}:{cell['line']:<5} {seen_by(cell)}", flush=True)
    print(write_page(RESULTS))


def _try(cell: Cell, commit: str, cache: Path, most: float, again: bool, checks: bool, tests: Sequence[str]) -> bool:
    """Run what is asked for and not known yet; says whether anything ran."""
    folder = cache / commit
    tree = planted_tree(folder, commit)
    mutant = _mutant(cell, as_it_was(tree, commit, cell["file"]))
    ran = False
    if mutant is None:
        raise RuntimeError(f"{cell['name']} is not in {commit}: draw again, in an empty folder of results")
    if "tests" not in cell or (again and not seen_by(cell)):
        cell["tests"] = tried(tree, mutant, _traced(folder, "tests", tree), most)
        ran = True
    if checks and "checks" not in cell and cell["tests"]["outcome"] in ("survived", "not executed"):
        cell["checks"] = tried(tree, mutant, _traced(folder, "checks", tree), most)
        ran = True
    for at in dict.fromkeys((commit, _short("HEAD"))) if tests else ():  # were they there when it was drawn?
        if seen_by(cell):
            break
        tree = planted_tree(cache / at, at)
        now = _mutant(cell, as_it_was(tree, at, cell["file"]))
        if now is None:
            print(f"{cell['name']}: its line is not as it was at {at}")
            break
        found = {**tried(tree, now, Traces(cache / at, "tests"), most, tests), "commit": at, "asked": list(tests)}
        if at != commit:
            cell["later"] = found
        elif found["outcome"] != "survived" or cell["tests"]["outcome"] == "not executed":
            cell["tests"] = {**cell["tests"], **found}
        ran = True
    return ran


def _traced(folder: Path, what: str, tree: Path) -> Traces:
    traces = Traces(folder, what)
    if not traces.there:
        traces.trace(tree)
    return traces


def _drawn(seed: int, number: int, commit: str, cache: Path) -> list[Cell]:
    """The rooms with their mutants, of a seed: those that are known, or new ones."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"*-{seed}.json"))]
    if found:
        return found
    at = _short(commit)
    tree = planted_tree(cache / at, at)
    by_room: dict[str, list[Cell]] = {}
    for mutant in draw(tree / "sdecontrol", number, seed):
        by_room.setdefault(mutant.room, []).append(_described(mutant, (tree / mutant.file).read_bytes()))
    rooms = [{"room": r, "seed": seed, "number": number, "commit": at, "mutants": m} for r, m in by_room.items()]
    for room in rooms:
        store(_file(room), room)
    return rooms


def _described(mutant: Mutant, source: bytes) -> Cell:
    before, after = mutant.lines(source)
    change = mutant.change
    return {
        "name": mutant.name,
        "kind": change.kind,
        "file": mutant.file,
        "line": change.line,
        "function": change.function,
        "before": before,
        "after": after,
    }


def _mutant(cell: Cell, source: bytes) -> Mutant | None:
    """The mutant of a cell in a source, which may be another than the one that it was drawn from: of those with the
    same text, the one nearest to its line; None where there is none."""
    room = cell["name"].split("-")[0]
    known = [Mutant(cell["name"], room, cell["file"], change) for change in changes(source) if _fits(change, cell)]
    same = [m for m in known if m.lines(source) == (cell["before"], cell["after"])]
    return min(same, key=lambda m: abs(m.change.line - cell["line"]), default=None)


def _fits(change: Change, cell: Cell) -> bool:
    return change.kind == cell["kind"] and change.function == cell["function"]


def _measure_share(cache: Path, commit: str) -> None:
    tree = planted_tree(cache / commit, commit)
    found = executed_share(tree, _traced(cache / commit, "checks", tree))
    store(RESULTS / "theory_share.json", {"commit": commit, "rooms": found, "versions": versions()})


def _file(room: Cell) -> Path:
    return RESULTS / f"{room['room']}-{room['seed']}.json"


def _short(commit: str) -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", commit], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
