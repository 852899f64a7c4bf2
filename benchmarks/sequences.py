"""Design of sequences: every method on known rewards, rewards learned from few data, and rounds of measurements.

On 8-mers everything is held against the exact optimum, by enumeration. Each finished cell is a JSON file under
``benchmarks/results/sequences/``; a cell that exists is not run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .cells import store, versions
from .sequences_known import FIXED, TRAINED, known_cell
from .sequences_page import write_page
from .sequences_unknown import COVERAGES, STRATEGIES, offline_cell, online_cell

__all__ = ["sequences"]

RESULTS = Path(__file__).parent / "results" / "sequences"
SUITES = ("known", "offline", "online")


def _short(part: Any) -> str:
    return str(part).replace(",", "").replace(" ", "-")


def sequences(
    suite: Annotated[str, typer.Option(help="known, offline or online")] = "known",
    task: Annotated[str, typer.Option(help="of the suite known")] = "dna-8mer",
    method: Annotated[str, typer.Option(help="a row of known or online; empty: all")] = "",
    seconds: Annotated[float, typer.Option(help="CPU-seconds of training, in known")] = 60.0,
    seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    seeds: Annotated[int, typer.Option(help="how many")] = 1,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/tables/sequences.md.")] = False,
) -> None:
    """Design of sequences: known rewards, rewards learned from few data, rounds of measurements.

    Example: python -m benchmarks sequences --suite offline --seeds 3
    """
    if page:
        typer.echo(write_page([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]))
        return
    if suite not in SUITES:
        raise typer.BadParameter(f"suites are {', '.join(SUITES)}")
    torch.set_num_threads(1)
    rows = {"known": [*FIXED, *TRAINED], "offline": list(COVERAGES), "online": list(STRATEGIES)}[suite]
    for name in [method] if method else rows:
        for index in range(seed, seed + seeds):
            described: dict[str, Any] = {"suite": suite, "task": task, "row": name, "seed": index}
            if suite == "known":
                described["seconds"] = seconds if name in TRAINED else 0
            path = RESULTS / f"{'--'.join(_short(part) for part in described.values())}.json"
            if not path.exists():
                if suite == "known":
                    cell = known_cell(task, name, seconds, index)
                else:
                    cell = offline_cell(name, index) if suite == "offline" else online_cell(name, index)
                store(path, {**described, **cell, "versions": versions()}, indent=None if suite == "offline" else 1)
            typer.echo(f"{path.stem}: {json.dumps(json.loads(path.read_text()))[:400]}")
