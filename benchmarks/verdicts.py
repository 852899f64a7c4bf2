"""The verdicts of ``evaluate`` on pairs of a problem and an answer whose log Z is known.

A verdict that confirms a wrong number is the worst fault; one that never confirms is no verdict. Each pair is solved
and evaluated once; its cell is a JSON file under ``benchmarks/results/verdicts/``.
"""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .cells import store, versions
from .verdict_pairs import PAIRS, Pair

__all__ = ["verdicts"]

RESULTS = Path(__file__).parent / "results" / "verdicts"
_PAGE = Path(__file__).parents[1] / "docs" / "tables" / "verdicts.md"
_WRONG, _RIGHT = 4.0, 3.0  # standard errors
_ROUNDING = 1e-4  # of log Z: single precision, and of the optima on grids


def run_pair(pair: Pair, seed: int) -> dict[str, Any]:
    torch.manual_seed(0)
    solution, truth = pair.make()
    began = time.process_time()
    found = solution.evaluate(4096, seed=seed)
    spent = time.process_time() - began
    return {
        "name": pair.name,
        "family": pair.family,
        "lacks": pair.lacks,
        "log_z": {"value": found.log_z.value, "stderr": found.log_z.stderr, "true": truth},
        "verdict": found.verdict,
        "why": found.reliability,
        "ess": found.ess.value,
        "cpu_seconds": spent,
    }


def off_by(cell: dict[str, Any]) -> float:
    """Standard errors between log Z and the truth."""
    found = cell["log_z"]
    return abs(found["value"] - found["true"]) / math.hypot(found["stderr"], _ROUNDING)


def verdicts(
    only: Annotated[str, typer.Option(help="Pairs whose name contains this.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    seed: Annotated[int, typer.Option(help="Of the evaluations.")] = 0,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    page: Annotated[bool, typer.Option("--page", help="Only write the page from what is there.")] = False,
) -> None:
    """Verdicts on answers whose truth is known: how many are confirmed and wrong, how many right ones confirmed.

    Example: python -m benchmarks verdicts --only spike
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for pair in () if page else PAIRS:
        path = results / f"{re.sub('[^a-z0-9.]+', '-', pair.name.lower())}.json"
        if only not in pair.name or (path.exists() and not again):
            continue
        try:
            cell = run_pair(pair, seed)
        except (RuntimeError, ValueError, TypeError) as error:  # a refusal is an answer too
            cell = {"name": pair.name, "family": pair.family, "lacks": pair.lacks, "failed": str(error)}
        command = f"OMP_NUM_THREADS=1 python -m benchmarks verdicts --only '{pair.name}' --seed {seed}"
        store(path, {**cell, "seed": seed, "versions": versions(), "command": command})
        print(f"{pair.name:<60} {_said(cell)}", flush=True)
    cells = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    _PAGE.write_text(_page(cells))


def _said(cell: dict[str, Any]) -> str:
    if "failed" in cell:
        return f"refused: {cell['failed']}"
    found = cell["log_z"]
    return f"{found['value'] - found['true']:+.4f} ± {found['stderr']:.4f}  {cell['verdict']}: {cell['why']}"


def counts(cells: list[dict[str, Any]]) -> dict[str, int]:
    """What the bars are about."""
    ran = [c for c in cells if "failed" not in c]
    right = [c for c in ran if off_by(c) <= _RIGHT]
    return {
        "pairs": len(cells),
        "refused": len(cells) - len(ran),
        "confirmed": sum(c["verdict"] == "confirmed" for c in ran),
        "confirmed and wrong": sum(c["verdict"] == "confirmed" and off_by(c) > _WRONG for c in ran),
        "right": len(right),
        "right and confirmed": sum(c["verdict"] == "confirmed" for c in right),
        "wrong": sum(off_by(c) > _WRONG for c in ran),
        "wrong and called unreliable": sum(off_by(c) > _WRONG and c["verdict"] == "unreliable" for c in ran),
    }


def _page(cells: list[dict[str, Any]]) -> str:
    found = counts(cells)
    ran = [c for c in cells if "failed" not in c]
    share = found["right and confirmed"] / max(1, found["right"])
    out = [
        "# Verdicts",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks verdicts` from the cells in `benchmarks/results/verdicts/` "
        "(`--page`: only the page).",
        "",
        f"{found['pairs']} pairs of a problem and an answer whose log Z is known, evaluated once with 4096 paths or "
        "particles and the default second look. About half of the answers were made to miss something; most of these "
        "are exact answers to a part of the question, so that their own weights look perfect. *Wrong* is an error of "
        f"log Z of more than {_WRONG:g} of its standard errors, *right* one of at most {_RIGHT:g}.",
        "",
        "| figure | measured | bar |",
        "|---|---:|---:|",
        f"| confirmed and wrong | {found['confirmed and wrong']} of {found['confirmed']} confirmed | ≤ 1 of 100 |",
        f"| of the right ones, confirmed | {found['right and confirmed']} of {found['right']} ({share:.0%}) | ≥ 80 % |",
        f"| of the wrong ones, called unreliable | {found['wrong and called unreliable']} of {found['wrong']} | |",
    ]
    out += [
        "",
        "What stays confirmed and wrong is of two kinds. A spike of width 0.02 in five dimensions is a needle: no "
        "chain, particle or search comes within its basin, so that every look sees the same density without it, and "
        "nothing that looks at values alone could tell. And a search from far out takes more evaluations than chains "
        "that mix at once have spent; it is not run then, since a second look costs at most what the first did.",
    ]
    for family in dict.fromkeys(p.family for p in PAIRS):
        out += [
            "",
            f"## {family.capitalize()}",
            "",
            "| pair | lacks | log Z − true | verdict | why |",
            "|---|---|---:|---|---|",
        ]
        for cell in (c for c in ran if c["family"] == family):
            z = cell["log_z"]
            mark = "**" if cell["verdict"] == "confirmed" and off_by(cell) > _WRONG else ""
            out.append(
                f"| {cell['name']} | {cell['lacks']} | {z['value'] - z['true']:+.3f} ± {z['stderr']:.3f} | "
                f"{mark}{cell['verdict']}{mark} | {cell['why']} |"
            )
    failed = [c for c in cells if "failed" in c]
    if failed:
        out += ["", "## Refused", "", *(f"* {c['name']}: {c['failed']}" for c in failed)]
    return "\n".join(out) + "\n"
