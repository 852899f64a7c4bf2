"""Densities whose evaluations are dear: log Z and moments by adaptive importance sampling, within a few thousand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import sdecontrol as sc


def lotka_volterra() -> tuple[Callable[[np.ndarray], float], dict[str, Any], int, float]:
    """Log posterior of four log rates from 20 noisy counts of two species, one point at a time, about 1 ms each. log Z
    by importance sampling."""
    from scipy.integrate import odeint

    rng = np.random.default_rng(0)
    times, first, true, noise = np.linspace(0, 20, 21), [10.0, 5.0], np.log([0.55, 0.028, 0.80, 0.024]), 0.25

    def rates(z: Any, t: float, a: float, b: float, c: float, d: float) -> list[float]:
        x, y = z
        return [a * x - b * x * y, -c * y + d * x * y]

    def path(theta: np.ndarray) -> np.ndarray:
        return odeint(rates, first, times, args=tuple(np.exp(theta)))[1:]

    data = np.log(path(true)) + noise * rng.standard_normal((20, 2))
    centre, width = np.log([0.5, 0.03, 0.8, 0.03]), 0.5

    def log_density(theta: np.ndarray) -> float:
        if not np.all(np.abs(theta - centre) < 6):
            return -math.inf
        prior = (-0.5 * ((theta - centre) / width) ** 2 - math.log(width * math.sqrt(2 * math.pi))).sum()
        found = path(theta)
        if not np.all(np.isfinite(found)) or np.any(found <= 0):
            return -math.inf
        misfit = ((data - np.log(found)) / noise) ** 2
        return float(prior - 0.5 * misfit.sum() - 40 * math.log(noise * math.sqrt(2 * math.pi)))

    return log_density, {"dim": 4, "vectorised": False}, 15_000, -3.156


def scales(mean: list[float], sd: list[float]) -> Callable[[Tensor], Tensor]:
    law = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(sd, dtype=torch.float64))
    return lambda x: law.log_prob(x).sum(1)


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any], int, float]]] = {
    "lotka-volterra": lotka_volterra,
    "two scales": lambda: (scales([0.5, 2000.0], [1e-3, 1e3]), {"dim": 2}, 15_000, 0.0),
    "three scales": lambda: (scales([0.5, 0.0, 2000.0], [1e-3, 1.0, 1e3]), {"dim": 3}, 15_000, 0.0),
    "gmm9": lambda: (sc.library.named_target("gmm9"), {"dim": 2}, 5000, 0.0),
    "normal, d = 10": lambda: (scales([100.0] * 10, [1.0] * 10), {"dim": 10}, 15_000, 0.0),
    "normal, d = 20": lambda: (scales([1.0] * 20, [0.3] * 20), {"dim": 20}, 20_000, 0.0),
}


def few_evaluations(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    only: Annotated[str | None, typer.Option(help="One density.")] = None,
) -> None:
    """Each density with ``sc.AdaptiveImportance``, as a table in Markdown."""
    print(
        "| density | evaluations | log Z - true, seeds 0, 1, ... | verdict | effective | CPU-s |\n"
        "|---|---:|---|---|---|---:|"
    )
    for name, make in CASES.items():
        if only not in (None, name):
            continue
        function, how, evaluations, truth = make()
        told, verdicts, parts, began = [], [], [], time.process_time()
        for seed in range(seeds):
            problem = sc.gibbs_problem(function, **how)
            found = sc.solve(problem, sc.AdaptiveImportance(evaluations), seed=seed, progress=False).evaluate(seed=0)
            told.append(f"{found.log_z.value - truth:+.4f} ± {found.log_z.stderr:.4f}")
            verdicts.append(found.verdict)
            parts.append(f"{found.ess.value:.2f}")
        spent = (time.process_time() - began) / seeds
        print(
            f"| {name} | {evaluations} | {', '.join(told)} | {', '.join(verdicts)} | {', '.join(parts)} | {spent:.0f} |"
        )
