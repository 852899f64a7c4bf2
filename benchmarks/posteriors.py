"""Posteriors beside nested sampling: error of log Z against the error stated, moments in standard deviations,
evaluations and CPU-seconds.

All are densities on R^d with a box that holds them; peers that need a prior sample the box, or a normal prior that is
in the density. Each finished cell is a JSON file under ``benchmarks/results/posteriors/``; one that exists is not run
again.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import norm
from torch import Tensor

import sdecontrol as sc

from .cells import store, versions
from .few_evaluations import eight_schools, lotka_volterra, schools_truth

RESULTS = Path(__file__).parent / "results" / "posteriors"
PAGE = Path(__file__).parents[1] / "docs" / "tables" / "posteriors.md"
METHODS = ("sdecontrol", "dynesty")
_SAMPLES, _LIVE = 100_000, 500
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Posterior:
    """A density with what is known of it.

    Attributes:
        log_density: ``(n, d) -> (n,)`` of torch's tensors; where ``alone``, ``(d,)`` of numpy's to a number.
        low, high: of the box, a number or ``(d,)``. evaluations: that ``sc.Auto`` is asked for.
        prior: mean and standard deviation of a normal law that is in the density, which peers then begin with.
        log_z: over R^d. moments: means and standard deviations ``(d,)``, where they are known.
    """

    log_density: Callable[[Any], Any]
    dim: int
    low: Any
    high: Any
    evaluations: int
    log_z: float
    moments: Any = None
    alone: bool = False
    prior: Any = None


def schools_centred() -> Posterior:
    log_z, moments = schools_truth()
    low, high = [-40.0, -9.0, *[-60.0] * 8], [50.0, 5.0, *[80.0] * 8]
    return Posterior(eight_schools, 10, low, high, 100_000, log_z, moments)


def schools_noncentred() -> Posterior:
    """theta = mu + tau eta: the moments of mu and log tau are those of the centred form."""

    def log_density(x: Tensor) -> Tensor:
        mu, log_tau = x[:, :1], x[:, 1:2]
        return eight_schools(torch.cat((x[:, :2], mu + log_tau.exp() * x[:, 2:]), 1)) + 8 * x[:, 1]

    low, high = [-40.0, -9.0, *[-6.0] * 8], [50.0, 5.0, *[6.0] * 8]
    return Posterior(log_density, 10, low, high, 100_000, schools_truth()[0])


def regression() -> Posterior:
    """Six coefficients with priors N(0, 4), 40 observations of variance 1, columns correlated by 0.95."""
    rng = np.random.default_rng(1)
    common = rng.standard_normal((40, 1))
    design = math.sqrt(0.95) * common + math.sqrt(0.05) * rng.standard_normal((40, 6))
    y = design @ np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.5]) + rng.standard_normal(40)
    precision = design.T @ design + np.eye(6) / 4
    mean, cov = np.linalg.solve(precision, design.T @ y), np.linalg.inv(precision)
    marginal = np.eye(40) + 4 * design @ design.T
    log_z = -0.5 * (y @ np.linalg.solve(marginal, y) + np.linalg.slogdet(marginal)[1] + 40 * _LOG_2PI)
    X, Y = torch.tensor(design), torch.tensor(y)

    def log_density(x: Tensor) -> Tensor:
        misfit = (Y.to(x) - x @ X.to(x).T).square().sum(1) + x.square().sum(1) / 4
        return -0.5 * misfit - 23 * _LOG_2PI - 6 * math.log(2.0)

    moments = torch.tensor(mean), torch.tensor(np.sqrt(np.diag(cov)))
    return Posterior(log_density, 6, -12.0, 12.0, 30_000, float(log_z), moments, prior=(0.0, 2.0))


def rates() -> Posterior:
    function, how, evaluations, log_z = lotka_volterra()
    centre = np.log([0.5, 0.03, 0.8, 0.03])
    return Posterior(function, how["dim"], centre - 3, centre + 3, evaluations, log_z, alone=True, prior=(centre, 0.5))


def shells() -> Posterior:
    """Two of radius 2 and width 0.1, 7 apart (Feroz & Hobson 0704.3704)."""

    def log_density(x: Tensor) -> Tensor:
        centre = torch.tensor([3.5, 0.0], dtype=x.dtype)
        both = [-0.5 * (((x - c).norm(dim=1) - 2) / 0.1).square() for c in (centre, -centre)]
        return torch.logaddexp(*both) - 0.5 * _LOG_2PI - math.log(0.1)

    return Posterior(log_density, 2, -6.0, 6.0, 30_000, math.log(8 * math.pi))  # 2 pi r of each, to 1e-80


def rosenbrock() -> Posterior:
    return Posterior(
        lambda x: -(1 - x[:, 0]).square() - 100 * (x[:, 1] - x[:, 0].square()).square(),
        2,
        [-5.0, -2.0],
        [7.0, 50.0],
        30_000,
        math.log(math.pi / 10),
        (torch.tensor([1.0, 1.5]), torch.tensor([math.sqrt(0.5), math.sqrt(2 + 0.5 + 0.005)])),
    )


def log_gamma() -> Posterior:
    """Two modes in each of the first two of six coordinates, skew or normal (Beaujean & Caldwell 1304.7808)."""

    def skew(x: Tensor, at: float) -> Tensor:
        return (x - at) - (x - at).clamp(max=80.0).exp()

    def normal(x: Tensor, at: float) -> Tensor:
        return -0.5 * (x - at).square() - 0.5 * _LOG_2PI

    def log_density(x: Tensor) -> Tensor:
        first = torch.logaddexp(skew(x[:, 0], 10.0), skew(x[:, 0], -10.0)) - math.log(2)
        second = torch.logaddexp(normal(x[:, 1], 10.0), normal(x[:, 1], -10.0)) - math.log(2)
        return first + second + sum(skew(x[:, i], 10.0) + normal(x[:, i + 1], 10.0) for i in (2, 4))

    return Posterior(log_density, 6, -30.0, 30.0, 100_000, 0.0)


def phi4() -> Posterior:
    target = sc.library.named_target("phi4-8")
    log_z = target.log_z if target.log_z is not None else math.nan
    return Posterior(target, target.dim, -6.0, 6.0, 2_000_000, log_z)


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "eight schools, centred": schools_centred,
    "eight schools, non-centred": schools_noncentred,
    "correlated regression": regression,
    "lotka-volterra": rates,
    "shells": shells,
    "rosenbrock": rosenbrock,
    "log-gamma": log_gamma,
    "phi^4": phi4,
}

Answer = tuple[float, float, int, Tensor, Tensor, str]  # log Z, its error, evaluations, draws, weights, verdict


def _ours(case: Posterior, seed: int) -> Answer:
    problem = sc.gibbs_problem(case.log_density, case.dim, vectorised=not case.alone, seed=seed)
    solution = sc.solve(problem, sc.Auto(evaluations=case.evaluations), seed=seed, progress=False)
    found = solution.evaluate(seed=seed)
    x, log_w = solution.weighted_sample(_SAMPLES, seed=seed)
    used = problem.density.evaluations
    return found.log_z.value, found.log_z.stderr, used, x, log_w.double().softmax(0), found.verdict


def _dynesty(case: Posterior, seed: int) -> Answer:
    """Static nested sampling with its defaults and 500 live points, one point at a time."""
    dynesty: Any = importlib.import_module("dynesty")
    low, high = (np.broadcast_to(np.asarray(v, dtype=float), (case.dim,)) for v in (case.low, case.high))

    mean, sd = (0.0, 1.0) if case.prior is None else case.prior

    def transform(u: np.ndarray) -> np.ndarray:
        return low + (high - low) * u if case.prior is None else mean + sd * norm.ppf(u)

    def log_likelihood(x: np.ndarray) -> float:
        found = case.log_density(x) if case.alone else float(case.log_density(torch.from_numpy(x).unsqueeze(0))[0])
        found -= 0.0 if case.prior is None else float(norm.logpdf(x, mean, sd).sum())
        return found if found > -1e300 else -1e300

    sampler = dynesty.NestedSampler(
        log_likelihood, transform, case.dim, nlive=_LIVE, rstate=np.random.default_rng(seed)
    )
    sampler.run_nested(print_progress=False)
    found = sampler.results
    volume = float(np.log(high - low).sum()) if case.prior is None else 0.0
    weights = torch.tensor(found.importance_weights())
    return (
        *(float(found.logz[-1]) + volume, float(found.logzerr[-1]), int(np.sum(found.ncall))),
        *(torch.tensor(found.samples), weights / weights.sum(), ""),
    )


def run(case: Posterior, method: str, seed: int) -> dict[str, Any]:
    began = time.process_time()
    log_z, error, used, x, w, verdict = (_ours if method == "sdecontrol" else _dynesty)(case, seed)
    cell: dict[str, Any] = {
        "log_z": {"value": log_z, "stderr": error, "true": case.log_z},
        "evaluations": used,
        "verdict": verdict,
        "cpu_seconds": time.process_time() - began,
    }
    if case.moments is not None:
        mean, sd = (v.double() for v in case.moments)
        at = w @ x.double()
        spread = (w @ (x.double() - at).square()).sqrt()
        cell["mean_off"] = float(((at - mean) / sd).abs().max())
        cell["sd_ratio"] = [float(v) for v in (spread / sd).aminmax()]
    return cell


def posteriors(
    only: Annotated[str, typer.Option(help="Posteriors whose name contains this.")] = "",
    method: Annotated[str, typer.Option(help="sdecontrol or dynesty; empty: both.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Of sdecontrol; of dynesty one.")] = 3,
    page: Annotated[bool, typer.Option("--page", help="Only write the page from what is there.")] = False,
) -> None:
    """Eight posteriors with ``sc.Auto(evaluations=n)`` and with nested sampling (``pip install 'sdecontrol[bench]'``).

    Example:  OMP_NUM_THREADS=1 python -m benchmarks posteriors --only shells
    """
    torch.set_num_threads(1)
    wanted = [(n, m, s) for n in POSTERIORS for m in METHODS for s in range(seeds if m == "sdecontrol" else 1)]
    for name, how, seed in () if page else wanted:
        path = RESULTS / f"{name.replace('^', '').replace(', ', '-').replace(' ', '-')}-{how}-{seed}.json"
        if only not in name or method not in ("", how) or path.exists():
            continue
        command = f"OMP_NUM_THREADS=1 python -m benchmarks posteriors --only '{name}' --method {how}"
        facts = {"name": name, "method": how, "seed": seed, "command": command, "versions": versions()}
        store(path, {**facts, **run(POSTERIORS[name](), how, seed)})
        print(f"{name}, {how}, seed {seed}: done", flush=True)
    PAGE.write_text(_page([json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]))


def _page(cells: list[dict[str, Any]]) -> str:
    out = [
        "# Posteriors beside nested sampling",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks posteriors` from the cells in "
        "`benchmarks/results/posteriors/` (`--page`: only the page; finished cells are not run again). Cells that are "
        "empty have not been run yet.",
        "",
        "*sdecontrol*: `sc.Auto(evaluations=n)`, seeds 0, 1, 2. *dynesty*: static nested sampling with its defaults "
        "and 500 live points, one seed; its prior is the normal one of regression and rates, else a box that holds the "
        "density. *evaluations*: calls of the log density in rows, a value with its gradient as two. *mean off*: "
        "largest error of a mean in standard deviations; *sd*: least and largest ratio of a standard deviation to the "
        "true one; empty where these have no closed form here.",
        "",
        "| posterior | method | log Z − true | evaluations | mean off | sd | CPU-s |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = (_error, _evaluations, _off, _ratio, _seconds)
    for name in POSTERIORS:
        for how in METHODS:
            group = [c for c in cells if c["name"] == name and c["method"] == how]
            told = (", ".join(filter(None, map(column, group))) for column in columns)
            out.append(f"| {name} | {how} | {' | '.join(told)} |")
    return "\n".join(out) + "\n"


def _error(cell: dict[str, Any]) -> str:
    z = cell["log_z"]
    return f"{z['value'] - z['true']:+.3f} ± {z['stderr']:.3f}"


def _evaluations(cell: dict[str, Any]) -> str:
    return str(cell["evaluations"])


def _off(cell: dict[str, Any]) -> str:
    return f"{cell['mean_off']:.3f}" if "mean_off" in cell else ""


def _ratio(cell: dict[str, Any]) -> str:
    return "–".join(f"{v:.2f}" for v in cell.get("sd_ratio", []))


def _seconds(cell: dict[str, Any]) -> str:
    return f"{cell['cpu_seconds']:.0f}"
