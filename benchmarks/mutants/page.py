"""The page of the mutants, from their cells and what was written about those that survived."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .operators import KINDS
from .share import ROOMS

__all__ = ["seen_by", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "tables" / "mutants.md"
NOTES = PAGE.with_name("mutants_notes.md")
Cell = dict[str, Any]
_SEEN = ("killed", "hung")


def seen_by(cell: Cell) -> str:
    """What saw a mutant: a test or a check, or the test that was added later; "" where nothing did."""
    runs = [cell.get(what, {}) for what in ("tests", "checks", "later")]
    return next((r["by"] for r in runs if r.get("outcome") in _SEEN), "")


def seen_when_drawn(cell: Cell) -> bool:
    """Was it seen by tests and checks that were there when it was drawn?"""
    return any(cell.get(what, {}).get("outcome") in _SEEN for what in ("tests", "checks"))


def judged() -> dict[str, tuple[str, str]]:
    """What the notes say of a mutant: "equivalent" or "missed", and why."""
    lines = re.findall(r"^\* `([a-z]+-\d+-\d+)` (equivalent|missed): (.*)$", NOTES.read_text(), re.MULTILINE)
    return {name: (verdict, why) for name, verdict, why in lines}


def _counts(cells: Sequence[Cell], verdicts: dict[str, tuple[str, str]]) -> list[int]:
    first = sum(seen_when_drawn(c) for c in cells)
    later = sum(bool(seen_by(c)) for c in cells) - first
    left = [c for c in cells if not seen_by(c)]
    equivalent = sum(verdicts.get(c["name"], ("", ""))[0] == "equivalent" for c in left)
    return [len(cells), first, later, equivalent, len(left) - equivalent]


def _room_table(rooms: Sequence[Cell], verdicts: dict[str, tuple[str, str]]) -> list[str]:
    lines = [
        "| room | mutants | seen when drawn | seen by tests added since | equivalent | still missed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = [(f"`{r['room']}`", _counts(r["mutants"], verdicts)) for r in rooms if r["mutants"]]
    rows.append(("all", [sum(column) for column in zip(*(n for _, n in rows))]))
    return lines + [f"| {name} | {' | '.join(str(n) for n in numbers)} |" for name, numbers in rows]


def _code(text: str) -> str:
    shown = text.replace("|", "\\|")
    return f"`` {shown} ``" if "`" in text else f"`{shown}`"


def _survivors(cells: Sequence[Cell], verdicts: dict[str, tuple[str, str]]) -> list[str]:
    out = []
    for cell in cells:
        if seen_when_drawn(cell):
            continue
        verdict, why = verdicts.get(cell["name"], ("not judged yet", ""))
        now = f" Seen since by `{seen_by(cell)}`." if seen_by(cell) else ""
        out += [
            f"**{cell['name']}**, {cell['kind']}, `{cell['file']}` line {cell['line']} (`{cell['function']}`): "
            f"{_code(cell['before'])} became {_code(cell['after'])}. "
            f"{_tried(cell)}{now} *{verdict.capitalize()}.* {why}",
            "",
        ]
    return out


def _tried(cell: Cell) -> str:
    """How many of the tests and checks that execute a mutant were run on it."""
    parts = []
    for what, one in (("tests", "test"), ("checks", "check")):
        ran = cell.get(what, {})
        if ran.get("outcome") == "not executed":
            parts.append(f"no {one} executes it")
        elif ran:
            parts.append(f"{ran['tried']} of {ran['executing']} {what} that execute it were run")
    return (", ".join(parts) or "not run yet").capitalize() + "."


def _share_table(found: Cell) -> list[str]:
    lines = ["| room | statements | executed by a check | share |", "|---|---:|---:|---:|"]
    rows = {}
    for room, files in found["rooms"].items():
        rows[room] = [sum(f[k] for f in files.values()) for k in ("statements", "executed")]
    named = [rows[r] for r in ROOMS]
    total = [sum(column) for column in zip(*named)]
    order = [*((f"`{r}`", rows[r]) for r in ROOMS), ("these nine", total)]
    order += [(f"`{r}`", n) for r, n in rows.items() if r not in ROOMS]
    return lines + [f"| {name} | {n} | {ran} | {ran / n:.0%} |" for name, (n, ran) in order]


def _idle(found: Cell) -> str:
    files = [f"`{room}/{name}`" for room in ROOMS for name, f in found["rooms"][room].items() if not f["executed"]]
    return f"Files of these rooms that no check runs: {', '.join(files) or 'none'}."


def write_page(results: Path) -> str:
    """Write the page from a folder of cells; returns its name."""
    verdicts = judged()
    rooms = [json.loads(p.read_text()) for p in sorted(results.glob("*-*.json"))]
    parts = [
        "# Mutants",
        "",
        "A test that cannot fail is none. Here bugs are planted at random, one at a time, in a copy of the package, "
        "and the default tests that execute the line are run on it. `OMP_NUM_THREADS=1 python -m benchmarks mutants` "
        "draws them, runs what is not known yet, and writes this page from the cells in `benchmarks/results/mutants/`; "
        "with `--checks` it runs the theory's checks, too, where no test saw anything.",
        "",
        "A mutant is one change of the text of one expression or statement. Rooms have mutants as they have lines, at "
        "least three; within a room every kind of change is drawn as often:",
        "",
        *(f"* {kind}: {what}" for kind, what in KINDS.items()),
        "",
        "Left out are annotations, decorators, texts and what makes them (errors, warnings, `__repr__`, prints), and "
        "files that draw figures or progress. Which tests execute a line is traced once for a commit. Of those the "
        "quickest of every test file come first, until one fails or the time that a mutant has is spent; a run that "
        "does not end counts as seen. What was seen is thus a lower bound: a test that was not tried may see more. "
        "*Equivalent* is a mutant that leaves what the package promises as it was, *missed* one that does not and that "
        "nothing saw when it was drawn; both are argued below.",
        "",
    ]
    for seed in sorted({r["seed"] for r in rooms}):
        of_seed = [r for r in rooms if r["seed"] == seed]
        cells = [c for r in of_seed for c in r["mutants"] if "tests" in c]
        known = [{**r, "mutants": [c for c in r["mutants"] if "tests" in c]} for r in of_seed]
        parts += [f"## Seed {seed}, drawn at {of_seed[0]['commit']}", "", *_room_table(known, verdicts), ""]
        looked = sum("checks" in c for c in cells)
        parts += [f"Checks of the theory were run on {looked or 'none'} of those that no test saw.", ""]
        parts += [f"### What was not seen (seed {seed})", "", *_survivors(cells, verdicts)]
    share = results / "theory_share.json"
    if share.exists():
        found = json.loads(share.read_text())
        parts += ["## What the theory suite runs", "", _SHARE.format(commit=found["commit"]), ""]
        parts += [*_share_table(found), "", _idle(found), ""]
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    return PAGE.name


_SHARE = (
    "Statements in bodies of functions, and those of them that some check of `sdecontrol verify` executes, its "
    "negative controls left out; what an import runs is not counted. Measured by coverage.py at {commit}: "
    "`python -m benchmarks mutants --share`."
)
