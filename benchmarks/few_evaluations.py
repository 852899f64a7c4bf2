"""Densities whose evaluations are dear: log Z and moments by adaptive importance sampling, within a few thousand; and
what a number of evaluations bounds.

Each run is a JSON file under ``benchmarks/results/few_evaluations/``; one that exists is not run again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import sdecontrol as sc

from .cells import store, versions

RESULTS = Path(__file__).parent / "results" / "few_evaluations"
PAGE = Path(__file__).parents[1] / "docs" / "tables" / "few_evaluations.md"
_SAMPLES = 200_000
_SCHOOLS = [28.0, 8, -3, 7, -1, 1, 18, 12], [15.0, 10, 16, 11, 9, 11, 10, 18]

#: mean and standard deviation of each coordinate
Moments = tuple[Tensor, Tensor] | None


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


def scales(mean: list[float], sd: list[float]) -> tuple[Callable[[Tensor], Tensor], Moments]:
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(sd, dtype=torch.float64)
    law = torch.distributions.Normal(m, s)
    return lambda x: law.log_prob(x).sum(1), (m, s)


def eight_schools(x: Tensor) -> Tensor:
    """Centred: theta_j ~ N(mu, tau^2), mu ~ N(0, 25), tau ~ half-Cauchy(5), in (mu, log tau, theta_1, ..., theta_8)."""
    y, se = (torch.tensor(v, dtype=x.dtype) for v in _SCHOOLS)
    mu, log_tau, theta = x[:, :1], x[:, 1:2], x[:, 2:]
    square = (mu / 5).square() + ((theta - mu) / log_tau.exp()).square().sum(1, keepdim=True)
    prior = math.log(2 / (25 * math.pi)) - torch.log1p((log_tau.exp() / 5).square()) - 7 * log_tau - 0.5 * square
    misfit = 0.5 * ((theta - y) / se).square().sum(1) + se.log().sum()
    return prior.squeeze(1) - misfit - 8.5 * math.log(2 * math.pi)


def schools_truth(centred: bool = True) -> tuple[float, Moments]:
    """By quadrature over mu and log tau; given these, theta is Gaussian, and so is ``(theta - mu)/tau``."""
    mu, log_tau = np.meshgrid(np.linspace(-40, 50, 901), np.linspace(-14, 8, 1101), indexing="ij")
    tau = np.exp(log_tau)
    level = -0.5 * (mu / 5) ** 2 + log_tau - np.log1p((tau / 5) ** 2) + math.log(2 / (25 * math.pi))
    level -= 4.5 * math.log(2 * math.pi)
    given = []
    for y, se in zip(*_SCHOOLS):
        level -= 0.5 * ((y - mu) ** 2 / (tau**2 + se**2) + np.log(tau**2 + se**2))
        variance = 1 / (1 / tau**2 + 1 / se**2)
        mean = variance * (mu / tau**2 + y / se**2)
        given.append((mean, variance) if centred else ((mean - mu) / tau, variance / tau**2))
    w = np.exp(level - level.max())
    log_z, w = math.log(w.sum() * 0.1 * 0.02) + level.max(), w / w.sum()
    parts = [(mu, 0.0), (log_tau, 0.0), *given]
    means = [float((w * m).sum()) for m, _ in parts]
    sds = [math.sqrt(float((w * (v + (m - mean) ** 2)).sum())) for (m, v), mean in zip(parts, means)]
    return log_z, (torch.tensor(means, dtype=torch.float64), torch.tensor(sds, dtype=torch.float64))


def _of(function: Any, dim: int, evaluations: int, log_z: float = 0.0, moments: Moments = None, **how: Any) -> Any:
    return function, {"dim": dim, **how}, evaluations, log_z, moments


def _lotka_volterra() -> Any:
    function, how, evaluations, log_z = lotka_volterra()
    return _of(function, evaluations=evaluations, log_z=log_z, **how)


def _gaussian(mean: list[float], sd: list[float], evaluations: int) -> Any:
    function, moments = scales(mean, sd)
    return _of(function, len(mean), evaluations, moments=moments)


def _schools() -> Any:
    log_z, moments = schools_truth()
    return _of(eight_schools, 10, 100_000, log_z, moments)


CASES: dict[str, Callable[[], Any]] = {
    "lotka-volterra": _lotka_volterra,
    "two scales": lambda: _gaussian([0.5, 2000.0], [1e-3, 1e3], 15_000),
    "three scales": lambda: _gaussian([0.5, 0.0, 2000.0], [1e-3, 1.0, 1e3], 15_000),
    "gmm9": lambda: _of(sc.library.named_target("gmm9"), 2, 5000),
    "normal, d = 10": lambda: _gaussian([100.0] * 10, [1.0] * 10, 15_000),
    "normal, d = 20": lambda: _gaussian([1.0] * 20, [0.3] * 20, 20_000),
    "eight schools, centred": _schools,
}

#: what a number of evaluations is asked of
BOUNDED: dict[str, Callable[[], Any]] = {
    "ring": lambda: _of(lambda x: -0.5 * ((x.norm(dim=1) - 3) / 0.2).square(), 2, 0),
    "normal, d = 10": lambda: _gaussian([100.0] * 10, [1.0] * 10, 0),
    "many-well-32": lambda: _of(sc.library.named_target("many-well-32"), 32, 0, 164.695675),
}
ASKED = (2000, 20_000, 200_000, 2_000_000, 20_000_000)


def run(case: Callable[[], Any], seed: int, evaluations: int | None = None) -> dict[str, Any]:
    """One density, with the evaluations of the case, or with so many asked of ``auto``."""
    function, how, own, log_z, moments = case()
    method: Any = sc.AdaptiveImportance(own) if evaluations is None else sc.Auto(evaluations=evaluations)
    began, problem = time.process_time(), sc.gibbs_problem(function, **how)
    try:
        solution = sc.solve(problem, method, seed=seed, progress=False)
    except ValueError as error:
        return {"failed": str(error)}
    spent = time.process_time() - began
    found = solution.evaluate(seed=0)
    cell: dict[str, Any] = {
        "asked": method.evaluations,
        "used": problem.density.evaluations,
        "log_z": {"value": found.log_z.value, "stderr": found.log_z.stderr, "true": log_z},
        "verdict": found.verdict,
        "why": found.reliability,
        "ess": found.ess.value,
        "cpu_seconds": spent,
        "method": solution.method,
    }
    if moments is not None:
        mean, sd = moments
        x, log_w = solution.weighted_sample(_SAMPLES, seed=1)
        w, x = log_w.double().softmax(0), x.double()
        at = w @ x
        cell["mean_off"] = float(((at - mean) / sd).abs().max())
        cell["sd_ratio"] = [float(v) for v in ((w @ (x - at).square()).sqrt() / sd).aminmax()]
    return cell


def few_evaluations(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    only: Annotated[str, typer.Option(help="Densities whose name contains this.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    page: Annotated[bool, typer.Option("--page", help="Only write the page from what is there.")] = False,
) -> None:
    """Each density with ``sc.AdaptiveImportance``, and what is used where ``auto`` is asked for a number.

    Example: python -m benchmarks few-evaluations --only lotka
    """
    torch.set_num_threads(1)
    wanted: list[tuple[str, str, Callable[[], Any], int, int | None]] = [
        ("case", name, case, seed, None) for name, case in CASES.items() for seed in range(seeds)
    ]
    wanted += [("bound", name, case, 0, asked) for asked in ASKED for name, case in BOUNDED.items()]
    for kind, name, case, seed, asked in () if page else wanted:
        label = re.sub("[^a-z0-9]+", "-", f"{name} {asked or ''} {seed}").strip("-")
        path = RESULTS / f"{kind}-{label}.json"
        if only not in name or (path.exists() and not again):
            continue
        command = f"OMP_NUM_THREADS=1 python -m benchmarks few-evaluations --only '{name}'"
        facts = {"kind": kind, "name": name, "seed": seed, "number": asked, "command": command, "versions": versions()}
        store(path, {**facts, **run(case, seed, asked)})
        print(f"{kind} {name} {asked or ''} {seed}: done", flush=True)
    PAGE.write_text(_page([json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]))


def _error(cell: dict[str, Any]) -> str:
    z = cell["log_z"]
    return f"{z['value'] - z['true']:+.4f} ± {z['stderr']:.4f}"


def _page(cells: list[dict[str, Any]]) -> str:
    out = [
        "# Few evaluations",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks few-evaluations` from the cells in "
        "`benchmarks/results/few_evaluations/` (`--page`: only the page; finished cells are not run again).",
        "",
        "`sc.AdaptiveImportance`, defaults. *lotka-volterra*: the posterior of four rates whose every value is the "
        "solution of an ordinary differential equation, one point at a time, no gradient. *scales*: standard "
        "deviations of 1e-3, 1 and 1e3 around 0.5, 0 and 2000. *eight schools, centred*: the funnel of a hierarchical "
        "model. *mean off*: largest error of a mean in standard deviations; *sd*: least and largest ratio of a "
        "standard deviation to the true one. Errors of log Z are over all independent groups of draws; in cells of "
        "*lotka-volterra* and *eight schools*, measured before they were, over 16 systems.",
        "",
        "| density | evaluations | log Z − true, seeds 0, 1, ... | verdict | effective | mean off | sd | CPU-s |",
        "|---|---:|---|---|---|---|---|---:|",
    ]
    for name in CASES:
        group = [c for c in cells if c["kind"] == "case" and c["name"] == name and "failed" not in c]
        if not group:
            out.append(f"| {name} | | not run yet | | | | | |")
            continue
        joined = [", ".join(f(c) for c in group) for f in (_error, lambda c: c["verdict"], lambda c: f"{c['ess']:.2f}")]
        known = all("mean_off" in c for c in group)
        off = ", ".join(f"{c['mean_off']:.3f}" for c in group) if known else ""
        sd = ", ".join("{:.3f}–{:.3f}".format(*c["sd_ratio"]) for c in group) if known else ""
        spent = sum(c["cpu_seconds"] for c in group) / len(group)
        out.append(f"| {name} | {group[0]['asked']} | {' | '.join(joined)} | {off} | {sd} | {spent:.0f} |")
    out += [
        "",
        "## What a number bounds",
        "",
        "`sc.Auto(evaluations=n)`, seed 0: evaluations used in all, what is asked of the solution among them, a value "
        "with its gradient as two. log Z of the ring has no truth here.",
        "",
        "| density | asked | used | by | log Z − true | verdict | CPU-s |",
        "|---|---:|---:|---|---|---|---:|",
    ]
    for cell in sorted((c for c in cells if c["kind"] == "bound"), key=lambda c: (c["name"], c["number"])):
        if "failed" in cell:
            out.append(f"| {cell['name']} | {cell['number']} | | | {cell['failed']} | | |")
            continue
        z = "" if cell["name"] == "ring" else _error(cell)
        out.append(
            f"| {cell['name']} | {cell['number']} | {cell['used']} | {cell['method']} | {z} | {cell['verdict']} | "
            f"{cell['cpu_seconds']:.0f} |"
        )
    return "\n".join(out) + "\n"
