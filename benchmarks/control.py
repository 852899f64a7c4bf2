"""The control card: error of the control against CPU-seconds, for all methods on the named control problems.

Each finished cell (problem, method, seed) is a JSON file under ``benchmarks/results/control/``; a cell that exists is
not run again, so that a table is filled over several sessions. Every cell runs in a process of its own: its CPU time is
that process's (less what the measurements take), and so is its peak memory.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc
from sdecontrol.evaluation.solution import Solution
from sdecontrol.library.problems import problem_card

from .cells import store, versions
from .control_page import write_figure, write_page

RESULTS = Path(__file__).parent / "results" / "control"

#: problem -> CPU-seconds of a cell
PROBLEMS = {"ou-quadratic-easy": 30.0, "ou-quadratic-hard": 60.0, "ou-linear": 30.0, "double-well": 300.0}
#: in the order in which cells are filled
METHODS: dict[str, sc.Method] = {
    "adjoint-matching": sc.AdjointMatching(),
    "socm": sc.SOCM(),
    "log-variance": sc.LogVariance(),
    "reward-backprop": sc.RewardBackprop(),
    "socm, learned full M": sc.SOCM(matrices="full"),
    "adjoint-matching, plain": sc.AdjointMatching(zero_variance=False),
    "adjoint-matching, reciprocal": sc.AdjointMatching(reciprocal=True),
    "cross-entropy": sc.CrossEntropy(trust_region=1.0),
    "reinforce": sc.Reinforce(),
    "soft-ppo": sc.SoftPPO(),
}
_FIRST, _GROWTH = 0.5, 1.3  # CPU-seconds of the first point of a curve, and the factor between points


class _Curve:
    """Errors of the averaged control while it is trained, at CPU times that grow geometrically; measuring is not
    counted."""

    def __init__(self, began: float, exact: dict[str, Any]) -> None:
        self.began, self.exact, self.next, self.measuring = began, exact, _FIRST, 0.0
        self.points: list[dict[str, float]] = []
        self.iterations = 0

    @property
    def seconds(self) -> float:
        return time.process_time() - self.began - self.measuring

    def on_step_end(self, state: Any) -> None:
        self.iterations = state.iteration
        if self.seconds >= self.next:
            self.measure(state.solution())

    def measure(self, solution: Solution, n: int = 512) -> None:
        spent, start = self.seconds, time.process_time()
        errors = {name: sc.control_error(solution, exact, n=n).absolute.value for name, exact in self.exact.items()}
        self.points.append({"cpu_seconds": spent, "iterations": self.iterations, **errors})
        self.measuring += time.process_time() - start
        while self.next <= spent:
            self.next *= _GROWTH


def _exact_solutions(problem: sc.ControlProblem, steps: int) -> dict[str, Any]:
    return {
        "discretised": sc.exact_solution(problem, time_steps=steps),
        "continuous": sc.exact_solution(problem),
    }


def _iterations(problem: sc.ControlProblem, method: sc.Method, settings: dict[str, Any], budget: float) -> int:
    """How many iterations the budget pays for, from ten of them."""
    sc.solve(problem, method, iterations=2, seed=9, progress=False, **settings)
    began = time.process_time()
    sc.solve(problem, method, iterations=10, seed=9, progress=False, **settings)
    return max(20, int(budget / ((time.process_time() - began) / 10)))


def run_cell(name: str, label: str, seed: int, budget: float, iterations: int | None) -> dict[str, Any]:
    """Solve once with a learning-rate schedule that ends with the budget; errors on the way and at the end."""
    torch.set_num_threads(1)
    card, method = problem_card(name), METHODS[label]
    problem = card.make()
    settings: dict[str, Any] = {"time_steps": card.time_steps, "batch_size": card.batch_size}
    iterations = _iterations(problem, method, settings, budget) if iterations is None else iterations
    exact = _exact_solutions(problem, card.time_steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    curve = _Curve(time.process_time(), exact)
    solution = sc.solve(
        problem, method, iterations=iterations, seed=seed, callbacks=[curve], progress=False, **settings
    )
    seconds = curve.seconds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    curve.measure(solution)
    errors = {name: sc.control_error(solution, e, n=4096) for name, e in exact.items()}
    evaluation = solution.evaluate(4096, seed=seed + 1)
    size = errors["discretised"].absolute.value / errors["discretised"].relative.value
    return {
        "problem": name,
        "version": card.version,
        "definition": card.definition,
        "method": label,
        "settings": {"name": method.name, **{k: repr(v) for k, v in asdict(method).items()}},
        "iterations": iterations,
        "time_steps": card.time_steps,
        "batch_size": card.batch_size,
        "seed": seed,
        "budget_cpu_seconds": budget,
        "cpu_seconds": seconds,
        "cpu_seconds_per_iteration": seconds / iterations,
        "peak_mb": memory,
        "peak_mb_before": before,
        "mean_square_of_the_optimum": size,
        "seconds_to": {str(part): _seconds_to(curve.points, part * size) for part in (0.1, 0.01, 0.001)},
        "control_error": {
            n: {"absolute": asdict(e.absolute), "relative": asdict(e.relative)} for n, e in errors.items()
        },
        "gap": asdict(evaluation.gap),
        "gap_is_exact": evaluation.exact,
        "elbo": asdict(evaluation.elbo),
        "ess": asdict(evaluation.ess),
        "curve": curve.points,
        "versions": versions(),
        "command": f"python -m benchmarks control --problem {name} --method '{label}' --cpu-seconds {budget:g}",
    }


def _seconds_to(points: list[dict[str, float]], level: float) -> float | None:
    """CPU-seconds to the first point from which on the error stays below ``level``; None: never."""
    late = [i for i, p in enumerate(points) if not p["discretised"] <= level]
    first = late[-1] + 1 if late else 0
    return points[first]["cpu_seconds"] if first < len(points) else None


def _cell_path(results: Path, problem: str, label: str, seed: int) -> Path:
    return results / f"{problem}--{label.replace(', ', '-').replace(' ', '-').lower()}--{seed}.json"


def _store(path: Path, arguments: tuple[Any, ...]) -> None:
    try:
        cell: dict[str, Any] = run_cell(*arguments)
    except (RuntimeError, ValueError) as error:  # a method that diverges or refuses is a result
        cell = {"problem": arguments[0], "method": arguments[1], "seed": arguments[2], "failed": str(error)}
    store(path, cell)


def control(
    problem: Annotated[list[str] | None, typer.Option(help="Named problems; all of the card if not given.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    cpu_seconds: Annotated[float | None, typer.Option(min=1, show_default="30 to 300, by problem")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, show_default="what the CPU-seconds pay for")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 3,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Only write docs/tables/control.md and its figure from what is there.")
    ] = False,
) -> None:
    """The control card: error of the control against CPU-seconds, per method, problem and seed.

    Example: python -m benchmarks control --problem ou-linear --method socm
    """
    labels, names = method or list(METHODS), problem or list(PROBLEMS)
    for label in labels:
        if label not in METHODS:
            raise typer.BadParameter(f"{label!r}; known are {', '.join(METHODS)}.", param_hint="--method")
    cells = [] if page else [(n, m, s) for m in labels for n in names for s in range(seeds)]
    for name, label, seed in cells:
        path = _cell_path(results, name, label, seed)
        if path.exists() and not again:
            continue
        budget = cpu_seconds if cpu_seconds is not None else PROBLEMS.get(name, 60.0)
        worker = multiprocessing.get_context("spawn").Process(
            target=_store, args=(path, (name, label, seed, budget, iterations))
        )
        worker.start()
        worker.join()
        if worker.exitcode:
            sys.exit(f"{name}, {label}, seed {seed}: the process ended with {worker.exitcode}.")
        cell = json.loads(path.read_text())
        error = cell.get("control_error", {}).get("discretised", {}).get("absolute", {}).get("value", math.nan)
        print(f"{name:<20} {label:<30} seed {seed}: error {error:.3g}", flush=True)
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*--*--*.json"))]
    write_figure(found, list(METHODS))
    print(write_page(found, list(METHODS)))
