"""The floor of mean-shift controls of the digits problems, as cells of the digits table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc
from sdecontrol.evaluation.estimates import Estimate

from . import digits_problem as digit
from .cells import store, versions
from .mean_shift_floor import mean_shift_floor

RESULTS = Path(__file__).parent / "results" / "digits"


def gaussian_check() -> dict[str, Any]:
    """The estimate on a linear-quadratic chain of 12 steps, d = 4, beside its closed form."""
    torch.manual_seed(0)
    root = torch.randn(4, 4)
    mixture = sc.GaussianMixture(
        torch.ones(1), torch.randn(1, 4), (root @ root.T / 4 + 0.3 * torch.eye(4)).unsqueeze(0)
    )
    sde = sc.generative_sde(mixture, sc.VP(), prediction="noise", shape=(4,))
    problem = sc.ControlProblem(sde, reward=sc.Quadratic(2 * torch.eye(4)), alpha=1.0)
    times = [1 - (1 - k / 12) ** 1.5 for k in range(13)]
    exact, chain = sc.exact_solution(problem, time_steps=times), problem.chain(times)
    closed = 0.0
    for k in range(chain.steps):
        x = torch.zeros(1, 4)
        ratio = exact.kernel(x, k).covariance_matrix.reshape(4, 4).double() / float(chain.kernel(k, x)[1]) ** 2
        closed += 0.5 * float(ratio.inverse().trace() - 4 + ratio.logdet())
    found = mean_shift_floor(problem, times, states=64, directions=32, inner=64, every=1)
    return {"floor": True, "reward_name": "gaussian", "alpha": 1.0, "closed_form": closed, "gap": _number(found.total)}


def _number(e: Estimate) -> dict[str, float]:
    return {"value": e.value, "stderr": e.stderr}


def digits_floor(
    reward: Annotated[list[str] | None, typer.Option(help="class, ink or zip; all if not given.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Temperatures; the core's if not given.")] = None,
    states: Annotated[int, typer.Option(min=2, help="Of optimal paths, at each step that is looked at.")] = 16,
    directions: Annotated[int, typer.Option(min=2, help="Pairs of noises at each state.")] = 16,
    inner: Annotated[int, typer.Option(min=2, help="Paths from each next state, three times; an even number.")] = 16,
    every: Annotated[int, typer.Option(min=1, help="One step of so many is looked at.")] = 5,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
) -> None:
    """The floor of mean-shift controls on the digits' 50 steps, in nats; then `digits --page`.

    Example: python -m benchmarks digits-floor --reward ink
    """
    torch.set_num_threads(1)
    check = RESULTS / "gaussian--floor--1.json"
    if again or not check.exists():
        store(check, gaussian_check() | {"versions": versions()}, indent=None)
    sizes = {"states": states, "directions": directions, "inner": inner, "every": every}
    for name in reward or list(digit.ALPHAS):
        for a in alpha or digit.ALPHAS[name][: digit.CORE]:
            path = RESULTS / f"{name}--floor--{a:g}.json"
            if path.exists() and not again:
                continue
            began = time.process_time()
            found = mean_shift_floor(digit.digits_problem(name, a), digit.TIME_STEPS, **sizes, seed=5)
            numbers = {"gap": found.total, "half_variance": found.half_variance, "odd": found.odd}
            cell: dict[str, Any] = {"reward_name": name, "alpha": a, "floor": True, **sizes}
            cell |= {key: _number(e) for key, e in numbers.items()}
            cell["by_step"] = [{"step": k, **_number(e)} for k, e in zip(found.steps, found.by_step)]
            cell |= {"cpu_seconds": time.process_time() - began, "versions": versions()}
            store(path, cell, indent=None)
            print(f"{name}, alpha = {a:g}: {found.total}, odd parts {found.odd}", flush=True)
