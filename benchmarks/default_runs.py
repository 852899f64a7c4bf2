"""Runs with all defaults, no number of iterations given: where they end, after how long, and what more would gain.

The problem: the posterior of a Gaussian mixture in six dimensions given two noisy observations, as the fine-tuning of a
diffusion model with the mixture's exact score, 100 steps. Everything is known: the posterior, and log Z.

Each finished cell is a JSON file under ``benchmarks/results/default_runs/``; a cell that exists is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc
from sdecontrol.comparison.costs import measuring
from sdecontrol.evaluation.solution import Solution
from sdecontrol.exact.mixtures import MixtureSolution
from sdecontrol.methods.base import suggested
from sdecontrol.randomness import Place, derive_seed, published_generator

from .cells import store, versions

RESULTS = Path(__file__).parent / "results" / "default_runs"
OPTIMUM = RESULTS / "exact-value.json"
PAGE = Path(__file__).parents[1] / "docs" / "tables" / "default_runs.md"
METHODS: dict[str, Callable[[], sc.Method]] = {
    "default": lambda: suggested(posterior(), time_steps=STEPS)[0].method,
    "reward-backprop": sc.RewardBackprop,
    "adjoint-matching": sc.AdjointMatching,
    "soft-ppo": sc.SoftPPO,
}
STEPS = 100
DIM, COMPONENTS, OBSERVED, SPREAD, WIDTH, NOISE = 6, 4, 2, 2.5, 0.5, 0.5
_SETS, _EACH, _PATHS, _CURVE = 8, 1000, 4096, 20
Cell = dict[str, Any]
_NOTES = (
    "Particle matching ends where new particles say that the last iterations gained less than 0.1 nats for a step of "
    "work. Without that rule it made its 1000 iterations: 184 CPU-seconds, W1 1.16, gap 0.057 ± 0.005 (seed 0, commit "
    "b286680). Here its mixture, fitted to particles before the first iteration (19 CPU-seconds), is all there is to "
    "have: what the network beside it gains in a hundred iterations is 0 within 0.004 nats.",
    "Where there is much to gain it goes on: a pendulum by its torque, whose gap falls from 35 nats to 1.5, takes all "
    "1000 iterations with the rule and without it.",
    "Commit e8a1248 is the rule's working state, which became b003909: the same method and loop.",
)


def posterior() -> sc.ControlProblem:
    """Prior: four components of equal weight, means 2.5 randn(6), variance 0.5. Observed, with noise of 0.5: two
    directions, randn(6)/6^0.5 each, of a state near the first mean."""
    generator = published_generator(100)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    means, A = SPREAD * normal(COMPONENTS, DIM), normal(OBSERVED, DIM) / DIM**0.5
    y = A @ (means[0] + 0.7 * normal(DIM)) + NOISE * normal(OBSERVED)
    precision = 1 / NOISE**2
    prior = sc.GaussianMixture(torch.ones(COMPONENTS), means, WIDTH)
    reward = sc.Quadratic(G=precision * A.mT @ A, g=precision * A.mT @ y, c=-0.5 * precision * float(y @ y))
    return sc.ControlProblem(sc.generative_sde(prior, schedule=sc.VP()), reward=reward, alpha=1.0)


def _measured(solution: Solution, exact: MixtureSolution, seed: int) -> Cell:
    """Sliced Wasserstein distance to the posterior, in that of two sets of exact samples, means over eight sets of a
    thousand; and the gap to the exact log Z of continuous time."""
    truth = [exact.sample(_EACH, seed=derive_seed(seed, Place.OUTSIDE, 1, i)) for i in range(_SETS)]
    found = solution.sample(_SETS * _EACH, seed=derive_seed(seed, Place.OUTSIDE, 2)).split(_EACH)
    distance, floor = (
        sum(sc.metrics.sliced_wasserstein(a, b, seed=seed) for a, b in zip(sets, truth)) / _SETS
        for sets in (found, truth[1:] + truth[:1])
    )
    evaluation = solution.evaluate(_PATHS, seed=derive_seed(seed, Place.OUTSIDE, 3))
    gap = float(exact.log_z) - evaluation.elbo.value
    return {"w1_by_floor": distance / floor, "floor": floor, "gap": gap, "gap_stderr": evaluation.elbo.stderr}


def optimum_cell() -> Cell:
    """What the gradient of the exact value in continuous time has on the same steps."""
    exact = sc.exact_solution(problem := posterior())
    assert isinstance(exact, MixtureSolution)
    guided = sc.solve(problem, sc.ValueGuidance(exact.value), time_steps=STEPS, seed=0, progress=False)
    return {"method": "exact value", **_measured(guided, exact, 0), "versions": versions()}


def run_cell(label: str, seed: int, longer: float | None) -> Cell:
    """One default run; or one with so many times the iterations that it took."""
    problem, settings = posterior(), {"time_steps": STEPS, "seed": seed, "progress": False}
    exact, method = sc.exact_solution(problem), METHODS[label]()
    assert isinstance(exact, MixtureSolution)
    if longer is not None:
        default = json.loads((RESULTS / f"{label}--{seed}.json").read_text())
        settings["iterations"] = round(longer * default["iterations"])
    with measuring(problem.device) as training:
        solution = sc.solve(problem, method, **settings)
    curve = [m["elbo"] for m in solution.history if "elbo" in m]  # none while the target is hotter, or of particles
    blocks = [curve[i : i + _CURVE] for i in range(0, len(curve), _CURVE)]
    return {
        "method": label,
        "name": method.name,
        "seed": seed,
        "longer": longer,
        "iterations": len(solution.history),
        "cpu_seconds": training.seconds,
        "curve": [sum(b) / len(b) for b in blocks],
        **_measured(solution, exact, seed),
        "log_z": float(exact.log_z),
        "versions": versions(),
    }


def _page(cells: list[Cell], optimum: Cell) -> str:
    lines = [
        "# Default runs",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks default-runs` from the cells in "
        "`benchmarks/results/default_runs/` (`--page`: only the page). `solve(problem, method, time_steps=100)`, no "
        "number of iterations given: where the run ends by itself; *default* is the method that `solve` takes where "
        "none is named. The posterior of a mixture of four Gaussians in six dimensions given two observations, as "
        "fine-tuning with the exact score; its two modes have a third and two thirds of the mass. **W1**: sliced "
        "Wasserstein distance of a thousand samples to the posterior, in units of that of two sets of exact samples "
        "(means over eight sets). **Gap**: to the exact log Z of continuous time. The gradient of the exact value has "
        f"W1 {optimum['w1_by_floor']:.2f} and a gap of {_gap(optimum)} on these steps. A run of *so many times* the "
        "iterations has their number given. CPU-seconds of one thread on a machine with other work on it.",
        "",
        "| method | seed | run | iterations | CPU-s | W1 | gap | commit |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for c in cells:
        method = c["method"] if c["method"] == c["name"] else f"{c['method']}: {c['name']}"
        run = "default" if c["longer"] is None else f"{c['longer']:g} times as long"
        lines.append(
            f"| {method} | {c['seed']} | {run} | {c['iterations']} | {c['cpu_seconds']:.0f} | "
            f"{c['w1_by_floor']:.2f} | {_gap(c)} | {c['versions'].get('commit')} |"
        )
    lines += ["", f"## Lower bound of log Z along the runs, means of {_CURVE} iterations", ""]
    for c in (c for c in cells if c["curve"]):
        run = "" if c["longer"] is None else f", {c['longer']:g} times as long"
        lines.append(f"* {c['method']}, seed {c['seed']}{run}: " + ", ".join(f"{v:.2f}" for v in c["curve"]))
    lines += ["", "## What ends them", "", *(f"* {note}" for note in _NOTES)]
    text = "\n".join(lines).rstrip() + "\n"
    PAGE.write_text(text)
    return text


def _gap(cell: Cell) -> str:
    return f"{cell['gap']:.3f} ± {cell['gap_stderr']:.3f}"


def default_runs(
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the runs; 0, 1, 2 if not given.")] = None,
    longer: Annotated[float | None, typer.Option(help="So many times the iterations of the default run, too.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/tables/default_runs.md.")] = False,
) -> None:
    """Where runs without a number of iterations end, and what a longer one gains.

    Example: python -m benchmarks default-runs --method reward-backprop --seed 0
    """
    torch.set_num_threads(1)
    if not OPTIMUM.exists():
        store(OPTIMUM, optimum_cell())
    for label in [] if page else method or METHODS:
        if label not in METHODS:
            raise typer.BadParameter(f"{label!r}; known are {', '.join(METHODS)}.", param_hint="--method")
        for number in seed or range(3):
            for times in [None] if longer is None else [None, longer]:
                path = RESULTS / f"{label}--{number}{'' if times is None else f'--{times:g}'}.json"
                if path.exists():
                    continue
                cell = run_cell(label, number, times)
                store(path, cell)
                print(path.stem, {k: cell[k] for k in ("iterations", "cpu_seconds", "w1_by_floor", "gap")}, flush=True)
    cells = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*--*.json"))]
    print(_page(cells, json.loads(OPTIMUM.read_text())))
