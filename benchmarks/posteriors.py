"""Posteriors beside nested sampling: error of log Z against the error stated, moments in standard deviations,
evaluations and CPU-seconds.

All are densities on R^d with a box that holds them; peers that need a prior sample the box, or a normal prior that is
in the density. Each finished cell is a JSON file under ``benchmarks/results/posteriors/``; one that exists is not run
again.
"""

from __future__ import annotations

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
from torch import Tensor

import sdecontrol as sc

from .cells import store, versions
from .few_evaluations import eight_schools, lotka_volterra, schools_truth
from .peers import LIMIT, PEERS, Likelihood, NotEnded

RESULTS = Path(__file__).parent / "results" / "posteriors"
PAGE = Path(__file__).parents[1] / "docs" / "tables" / "posteriors.md"
NOTES = PAGE.with_name("posteriors_notes.md")
OURS = "sdecontrol"
METHODS = (OURS, *PEERS)
_SAMPLES = 100_000
_LOG_2PI = math.log(2 * math.pi)
#: of phi^4, ± 0.014: the mean of ``smc`` and ``auto``, 16 systems of 8192 particles each, in the table of densities
PHI4_LOG_Z = 15.984


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
    return Posterior(log_density, 10, low, high, 100_000, schools_truth()[0], schools_truth(centred=False)[1])


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

    square = 4 + 3 * 0.1**2  # mean of r^2, whose law has the density r N(r; 2, 0.1^2)
    moments = torch.zeros(2), torch.tensor([math.sqrt(3.5**2 + square / 2), math.sqrt(square / 2)])
    return Posterior(log_density, 2, -6.0, 6.0, 30_000, math.log(8 * math.pi), moments)  # 2 pi r of each, to 1e-80


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

    mean, sd = 10 - float(np.euler_gamma), math.pi / math.sqrt(6)
    means = torch.tensor([-float(np.euler_gamma), 0.0, mean, 10.0, mean, 10.0])
    sds = torch.tensor([math.hypot(10.0, sd), math.sqrt(101.0), sd, 1.0, sd, 1.0])
    return Posterior(log_density, 6, -30.0, 30.0, 100_000, 0.0, (means, sds))


def phi4() -> Posterior:
    """log Z is not known exactly."""
    target = sc.library.named_target("phi4-8")
    return Posterior(target, target.dim, -6.0, 6.0, 2_000_000, PHI4_LOG_Z)


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


def _peer(case: Posterior, method: str, seed: int, limit: float) -> Answer:
    likelihood = Likelihood(case.log_density, case.dim, case.low, case.high, case.prior, case.alone, limit)
    log_z, error, x, weights = PEERS[method](likelihood, seed)
    return log_z + likelihood.log_volume, error, likelihood.asked, x, weights / weights.sum(), ""


def run(case: Posterior, method: str, seed: int, limit: float = LIMIT) -> dict[str, Any]:
    began = time.process_time()
    try:
        log_z, error, used, x, w, verdict = _ours(case, seed) if method == OURS else _peer(case, method, seed, limit)
    except NotEnded as failure:
        return {"failed": str(failure), "cpu_seconds": time.process_time() - began}
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
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}; empty: all.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Of sdecontrol; of the others one.")] = 3,
    limit: Annotated[float, typer.Option(min=1, help="CPU-seconds that a run of another sampler may take.")] = LIMIT,
    page: Annotated[bool, typer.Option("--page", help="Only write the page from what is there.")] = False,
) -> None:
    """Eight posteriors with ``sc.Auto(evaluations=n)`` and with other samplers that give an evidence (the extra
    bench).

    Example: python -m benchmarks posteriors --only shells
    """
    torch.set_num_threads(1)
    wanted = [(n, m, s) for n in POSTERIORS for m in METHODS for s in range(seeds if m == OURS else 1)]
    for name, how, seed in () if page else wanted:
        path = RESULTS / f"{name.replace('^', '').replace(', ', '-').replace(' ', '-')}-{how}-{seed}.json"
        if only not in name or method not in ("", how) or path.exists():
            continue
        command = f"OMP_NUM_THREADS=1 python -m benchmarks posteriors --only '{name}' --method {how}"
        command += "" if how == OURS else f" --limit {limit:g}"
        facts = {"name": name, "method": how, "seed": seed, "command": command, "versions": versions(how)}
        store(path, {**facts, **run(POSTERIORS[name](), how, seed, limit)})
        print(f"{name}, {how}, seed {seed}: done", flush=True)
    PAGE.write_text(_page(_cells()))


def _cells() -> list[dict[str, Any]]:
    """Those there are; of phi^4 some are older than the log Z that they are held against."""
    cells = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    for cell in cells:
        if math.isnan(cell.get("log_z", {}).get("true", 0.0)):
            cell["log_z"]["true"] = PHI4_LOG_Z
    return cells


def _page(cells: list[dict[str, Any]]) -> str:
    out = [
        "# Posteriors beside other samplers",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks posteriors` from the cells in "
        "`benchmarks/results/posteriors/` (`--page`: only the page; finished cells are not run again). Cells that are "
        "empty have not been run yet.",
        "",
        "*sdecontrol*: `sc.Auto(evaluations=n)`, seeds 0, 1, 2; it is told neither prior nor box. *dynesty*: static "
        "nested sampling, 500 live points; *nautilus* and *pocomc* with their defaults; one seed each. Their prior is "
        "the normal one of regression and rates, else a box that holds the density. *evaluations*: calls of the log "
        "density in rows, a value with its gradient as two. *for 0.1*: evaluations that would bring the error to 0.1 "
        "nats, by `evaluations (error / 0.1)^2` with the larger of the stated error and the root mean square of what "
        "log Z is off. *mean off*: largest error of a mean in standard deviations; *sd*: least and largest ratio of a "
        "standard deviation to the true one; empty where these are not known here. log Z of phi^4 is known to 0.014.",
        "",
        "| posterior | method | log Z − true | evaluations | for 0.1 | mean off | sd | CPU-s |",
        "|---|---|---|---|---:|---|---|---|",
    ]
    columns = (_off, _ratio, _seconds)
    for name in POSTERIORS:
        for how in METHODS:
            group = _of(cells, name, how)
            ended = [c for c in group if "failed" not in c]
            errors = ", ".join([*map(_error, ended), *(c["failed"] for c in group if "failed" in c)])
            used = ", ".join(str(c["evaluations"]) for c in ended)
            rest = (", ".join(filter(None, map(column, ended))) for column in columns)
            out.append(f"| {name} | {how} | {errors} | {used} | {_told(_worth(ended))} | {' | '.join(rest)} |")
    out += ["", *_summary(cells), "", NOTES.read_text().strip()]
    return "\n".join(out) + "\n"


def _of(cells: list[dict[str, Any]], name: str, how: str) -> list[dict[str, Any]]:
    return [c for c in cells if c["name"] == name and c["method"] == how]


def _worth(ended: list[dict[str, Any]]) -> float:
    """Evaluations for an error of 0.1 nats; nan where there is no answer."""
    if not ended:
        return math.nan
    off = [c["log_z"]["value"] - c["log_z"]["true"] for c in ended]
    stated = [c["log_z"]["stderr"] for c in ended]
    square = max(float(np.mean(np.square(off))), float(np.mean(np.square(stated))))
    return float(np.mean([c["evaluations"] for c in ended])) * square / 0.01


def _told(worth: float) -> str:
    return "" if math.isnan(worth) else f"{worth:.0f}"


def _summary(cells: list[dict[str, Any]]) -> list[str]:
    """How many errors are within three of those stated, and who needs fewest evaluations."""
    out = []
    for how in METHODS:
        ended = [c["log_z"] for c in cells if c["method"] == how and "failed" not in c]
        far = sum(abs(z["value"] - z["true"]) > 3 * z["stderr"] for z in ended)
        if ended:
            out.append(f"* *{how}*: {far} of {len(ended)} log Z are off by more than three of the errors stated.")
    won = []
    for name in POSTERIORS:
        worth = {how: _worth([c for c in _of(cells, name, how) if "failed" not in c]) for how in METHODS}
        others = {how: v for how, v in worth.items() if how != OURS and not math.isnan(v)}
        if others and not math.isnan(worth[OURS]):
            best = min(others, key=lambda how: others[how])
            won.append((name, worth[OURS] / others[best], best))
    few = sum(ratio <= 1 for _, ratio, _ in won)
    told = "; ".join(f"{name} {ratio:.2g} ({best})" for name, ratio, best in won)
    if won:
        whose = "Evaluations for 0.1 nats over those of the best of the others"
        out.append(f"* {whose}: {told}. At most 1 on {few} of {len(won)}.")
    return out


def _error(cell: dict[str, Any]) -> str:
    z = cell["log_z"]
    return f"{z['value'] - z['true']:+.3f} ± {z['stderr']:.3f}"


def _off(cell: dict[str, Any]) -> str:
    return f"{cell['mean_off']:.3f}" if "mean_off" in cell else ""


def _ratio(cell: dict[str, Any]) -> str:
    return "–".join(f"{v:.2f}" for v in cell.get("sd_ratio", []))


def _seconds(cell: dict[str, Any]) -> str:
    return f"{cell['cpu_seconds']:.0f}"
