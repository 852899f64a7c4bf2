"""What every training method needs to come to the optimum, on a linear-quadratic chain and on two of tuned mixtures.

The error is ``E int |u - u*|^2 / E int |u*|^2`` on paths of u*, the best mean-shift control of the *chain*, which is
known for all: in closed form, and by dynamic programming on a grid. Each finished cell is a JSON file under
``benchmarks/results/optimum/``; a cell that exists is not run again.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc

from .cells import store, versions

__all__ = ["optimum"]

RESULTS = Path(__file__).parent / "results" / "optimum"
_PAGE = Path(__file__).parents[1] / "docs" / "tables" / "optimum.md"
BUDGETS = (10.0, 60.0, 300.0)
_GRADIENT, _OTHER = 5e-3, 2e-2  # the bars
_STEPS = {"linear-quadratic": 20, "overlapping-mixture": 50, "mixture": 50}

METHODS: dict[str, sc.Method] = {
    "adjoint-matching": sc.AdjointMatching(),
    "adjoint-matching, plain": sc.AdjointMatching(zero_variance=False),
    "adjoint-matching, no bound": sc.AdjointMatching(huber=None),
    "adjoint-matching, plain, no bound": sc.AdjointMatching(zero_variance=False, huber=None),
    "socm": sc.SOCM(),
    "reward-backprop": sc.RewardBackprop(),
    "soft-ppo": sc.SoftPPO(),
    "log-variance": sc.LogVariance(),
    "cross-entropy": sc.CrossEntropy(),
    "cross-entropy, trust region 1": sc.CrossEntropy(trust_region=1.0),
    "path-consistency, all": sc.PathConsistency(),
    "path-consistency, n=10": sc.PathConsistency(n=10),
    "path-consistency, n=1": sc.PathConsistency(n=1),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reinforce": sc.Reinforce(),
    "bridge-matching": sc.BridgeMatching(),
    "particle-matching": sc.ParticleMatching(),
    "value guidance, Monte Carlo": sc.ValueGuidance("monte-carlo"),
    "value guidance, soft Q": sc.ValueGuidance("soft-q"),
}


def problem_of(name: str) -> sc.ControlProblem:
    """Four coupled coordinates with a running cost; or two modes in one dimension, which overlap or not, of which the
    reward prefers one."""
    generator = torch.Generator().manual_seed(5)
    if name == "linear-quadratic":
        A = torch.randn(4, 4, generator=generator) / 2 - torch.eye(4)
        return sc.ControlProblem(
            sc.LinearSDE(A, 0.8 * torch.eye(4)),
            sc.Dirac(torch.tensor([1.0, -1.0, 0.5, 0.0])),
            reward=sc.Quadratic(torch.eye(4), torch.randn(4, generator=generator)),
            running_cost=sc.QuadraticCost(0.5 * torch.eye(4)),
            alpha=0.8,
        )
    place, variance = (1.0, 0.5) if name == "overlapping-mixture" else (1.5, 0.1)
    law = sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-place], [place]]), variance)
    start = sc.Gaussian(torch.zeros(1), torch.ones(1))
    reward = sc.Quadratic(0.3 * torch.eye(1), torch.ones(1))
    return sc.ControlProblem(sc.generative_sde(law, sc.VP(), shape=(1,)), start, reward=reward, alpha=0.7)


def _bar(method: sc.Method) -> float:
    return _GRADIENT if method.needs_gradient else _OTHER


def _iterations(problem: sc.ControlProblem, method: sc.Method, budget: float, settings: dict[str, Any]) -> int:
    """How many iterations the budget pays for: with their number given, a schedule ends with the budget."""

    def spent(iterations: int) -> float:
        began = time.process_time()
        sc.solve(problem, method, iterations=iterations, **{**settings, "seed": 9})
        return time.process_time() - began

    spent(2)
    first = spent(10)
    if isinstance(method, sc.ParticleMatching):  # particles are run at the first iteration, and once in so many
        each = max(1e-3, (spent(10 + method.refresh) - first) / method.refresh)
        return max(20, int((budget - first) / each))
    return max(20, int(budget / (first / 10)))


def run_cell(name: str, label: str) -> dict[str, Any]:
    """Train with growing budgets until the bar is reached."""
    problem, method = problem_of(name), METHODS[label]
    settings: dict[str, Any] = {"time_steps": _STEPS[name], "seed": 0, "progress": False}
    exact = sc.exact_solution(problem, _STEPS[name])
    runs = []
    for budget in BUDGETS:
        iterations = _iterations(problem, method, budget, settings)
        began = time.process_time()
        solution = sc.solve(problem, method, iterations=iterations, **settings)
        spent = time.process_time() - began
        found = sc.control_error(solution, exact, n=8192, seed=1).relative
        gap = solution.evaluate(16384, seed=2).elbo
        runs.append(
            {
                "budget": budget,
                "cpu_seconds": spent,
                "iterations": iterations,
                "error": {"value": found.value, "stderr": found.stderr},
                "below_the_optimum": {"value": float(exact.elbo) - gap.value, "stderr": gap.stderr},
            }
        )
        if found.value <= _bar(method):
            break
    return {"runs": runs}


def optimum(
    problem: Annotated[
        list[str] | None, typer.Option(help="linear-quadratic, overlapping-mixture or mixture; all if not given.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/tables/optimum.md from what is there.")] = False,
) -> None:
    """The optimum: what every training method needs to reach it, on three chains whose optimum is exact.

    Example: python -m benchmarks optimum --problem mixture --method socm
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of few effective samples: the error says it
    for name, given, known in (("problem", problem, list(_STEPS)), ("method", method, list(METHODS))):
        for value in given or []:
            if value not in known:
                raise typer.BadParameter(f"{value!r}; known are {', '.join(known)}.", param_hint=f"--{name}")
    for label in [] if page else method or METHODS:
        for name in problem or _STEPS:
            path = results / f"{name}--{label.replace(', ', '-').replace(' ', '-').replace('=', '').lower()}.json"
            if path.exists() and not again:
                continue
            try:
                cell = run_cell(name, label)
            except (RuntimeError, ValueError, TypeError) as error:  # a method that diverges or refuses is a result
                cell = {"failed": str(error)}
            command = f"OMP_NUM_THREADS=1 python -m benchmarks optimum --problem {name} --method '{label}'"
            store(
                path, {"problem": name, "method": label, "seed": 0, **cell, "versions": versions(), "command": command}
            )
            print(f"{name:<18} {label:<30} {_last(cell)}", flush=True)
    cells = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    _PAGE.write_text(_page(cells))


def _last(cell: dict[str, Any]) -> str:
    if "failed" in cell:
        return cell["failed"]
    run = cell["runs"][-1]
    return f"{run['error']['value']:.2g} after {run['cpu_seconds']:.0f} CPU-s"


def _row(cell: dict[str, Any]) -> str:
    method = METHODS[cell["method"]]
    if "failed" in cell:
        return f"| {cell['method']} |{' |' * (len(BUDGETS) + 2)} {cell['failed'].split('. ')[0].rstrip('.')}. |"
    errors = [f"{run['error']['value']:.2g} ± {run['error']['stderr']:.1g}" for run in cell["runs"]]
    errors += ["–"] * (len(BUDGETS) - len(errors))
    last = cell["runs"][-1]
    reached = "yes" if last["error"]["value"] <= _bar(method) else "no"
    below = last["below_the_optimum"]
    return (
        f"| {cell['method']} | {' | '.join(errors)} | {last['iterations']} | {below['value']:.4f} ± "
        f"{below['stderr']:.4f} | {_bar(method):g}: {reached} |"
    )


def _page(cells: list[dict[str, Any]]) -> str:
    titles = {
        "linear-quadratic": "A linear-quadratic chain: 4 coupled coordinates, running cost, 20 steps",
        "overlapping-mixture": "A tuned mixture: two overlapping modes in one dimension (at -1 and 1, variance 0.5), "
        "quadratic reward, 50 Euler steps",
        "mixture": "Modes far apart: at -1.5 and 1.5, variance 0.1, the rest the same",
    }
    out = [
        "# To the optimum",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks optimum` from the cells in `benchmarks/results/optimum/` "
        "(`--page`: only the page).",
        "",
        "Every training method on three chains whose best mean-shift control u* is exact: in closed form, and by "
        "dynamic programming on a grid. The error is `E int |u - u*|^2 / E int |u*|^2` on paths of u*, default "
        "settings and network, one seed, one thread; a budget is tried when the one before has not reached the bar: "
        "0.005 for methods with gradients, 0.02 for others. *below*: nats that the ELBO is below that of u*. Methods "
        "whose fixed point is not u* are O(h) from it: forward-KL ones (cross-entropy, weighted maximum likelihood, "
        "bridge and particle matching, SOCM's weights) stop at the mean shift of the soft-optimal chain, guidance by "
        "values at the control of continuous time.",
    ]
    heads = " | ".join(f"{budget:g} CPU-s" for budget in BUDGETS)
    for name, title in titles.items():
        order = list(METHODS)
        rows = sorted((c for c in cells if c["problem"] == name), key=lambda c: order.index(c["method"]))
        if rows:
            out += ["", f"## {title}", "", f"| method | {heads} | iterations | below, nats | bar: reached |"]
            out += ["|---|" + "---:|" * (len(BUDGETS) + 3), *(_row(c) for c in rows)]
    return "\n".join(out) + "\n" + _PAGE.with_stem("optimum_notes").read_text()
