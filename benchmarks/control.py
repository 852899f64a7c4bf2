"""The control card: error of the control against the exact ones, and the ELBO gap, for a given amount of CPU time.

Each finished cell (problem, method, setting, seed) is a JSON file under ``benchmarks/results/control/``; a cell that exists
is not run again.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc
from sdecontrol.library.problems import problem_card
from sdecontrol.methods.base import find_method

RESULTS = Path(__file__).parent / "results" / "control"


def run_cell(name: str, method: str, iterations: int, time_steps: int | None, seed: int) -> dict[str, Any]:
    """Solve once; CPU-seconds of the process, and how far from the optima."""
    card = problem_card(name)
    problem = card.make()
    steps = card.time_steps if time_steps is None else time_steps
    began = time.process_time()
    solution = sc.solve(problem, method, time_steps=steps, iterations=iterations, batch_size=card.batch_size, seed=seed)
    seconds = time.process_time() - began
    evaluation = solution.evaluate(4096, seed=seed + 1)
    errors: dict[str, Any] = {}
    for column, chain in (("discretised", solution), ("continuous", None)):
        try:
            error = sc.control_error(solution, sc.exact_solution(problem, like=chain), n=4096)
        except sc.NoExactSolution:
            continue
        errors[column] = {"absolute": asdict(error.absolute), "relative": asdict(error.relative)}
    return {
        "problem": name,
        "version": card.version,
        "definition": card.definition,
        "method": method,
        "settings": asdict(find_method(method)),
        "iterations": iterations,
        "time_steps": steps,
        "batch_size": card.batch_size,
        "seed": seed,
        "cpu_seconds": seconds,
        "control_error": errors,
        "gap": asdict(evaluation.gap),
        "gap_is_exact": evaluation.exact,
        "elbo": asdict(evaluation.elbo),
        "ess": asdict(evaluation.ess),
        "threads": torch.get_num_threads(),
        "versions": {"sdecontrol": sc.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }


def control(
    problem: Annotated[str, typer.Option(help="A named problem.")] = "ou-quadratic-easy",
    method: Annotated[str, typer.Option(help="A method's name.")] = "reward-backprop",
    iterations: Annotated[int, typer.Option(min=1)] = 500,
    time_steps: Annotated[int | None, typer.Option(min=1, show_default="the card's")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
) -> None:
    """The control card: CPU-seconds, control errors and ELBO gap, per seed.

    Example:  OMP_NUM_THREADS=1 python -m benchmarks control --problem ou-quadratic-easy --iterations 500
    """
    cells = []
    for seed in range(seeds):
        steps = time_steps if time_steps is not None else problem_card(problem).time_steps
        path = results / f"{problem}-{method}-{iterations}x{steps}-{seed}.json"
        if path.exists() and not again:
            cells.append(json.loads(path.read_text()))
            continue
        cells.append(run_cell(problem, method, iterations, time_steps, seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cells[-1], indent=1) + "\n")
    print(table(cells))


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as a Markdown table."""
    lines = [
        "| problem | method | iterations | seed | CPU-s | error, discretised | error, continuous | ELBO gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        errors = [
            str(sc.Estimate(**c["control_error"][column]["absolute"])) if column in c["control_error"] else "-"
            for column in ("discretised", "continuous")
        ]
        gap = f"{sc.Estimate(**c['gap'])}{'' if c['gap_is_exact'] else ' (estimated)'}"
        lines.append(
            f"| {c['problem']} | {c['method']} | {c['iterations']} | {c['seed']} | {c['cpu_seconds']:.1f} | "
            f"{errors[0]} | {errors[1]} | {gap} |"
        )
    return "\n".join(lines)
