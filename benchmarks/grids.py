"""How near the untuned chain's own law is to the model's: grids of times, schemes and schedules of generative
references, on mixtures of known law and on digits.

The tilt is exact for the chain, so whatever its own law lacks is tilted with it. A cell is (model, schedule, scheme,
grid), a JSON file under ``benchmarks/results/grids/`` with a row per number of steps; a cell that exists is not run
again.
"""

from __future__ import annotations

import json
import math
import time
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

import sdecontrol as sc

from .cells import store, versions
from .digits_problem import digits_problem
from .grids_page import write_page

__all__ = ["grids"]

RESULTS = Path(__file__).parent / "results" / "grids"
SHARES = RESULTS / "shares"
STEPS = (20, 50, 100)
VERSION, SAMPLES, SEED = 1, 8192, 11
_MANY = 65_536  # paths that shares of modes are counted on
SCHEDULES: dict[str, Any] = {"VP": sc.VP(), "CosineVP": sc.CosineVP(), "VE": sc.VE(), "FlowMatching": sc.FlowMatching()}
SCHEMES = ("euler", "exponential")
#: the ratio of noise to data at which the grids in log sigma and EDM's end, before the last step
_LOWEST = {"log-sigma": 0.02, "edm": 0.005}
GRIDS = ("uniform", "power-1.5", "power-2", "power-3", "cosine", "log-sigma", "edm", "default")
_MOSTLY = ("uniform", "power-1.5", "log-sigma", "default")  # under the other schedules, and on digits
_BEFORE_AND_NOW = (("euler", "uniform"), ("exponential", "default"))  # what a number of steps alone stood for, and does
_FINE = 400  # steps that stand for the model's own law, where no closed form does


@cache
def mixtures() -> dict[str, sc.GaussianMixture]:
    """Unequal weights; modes narrow against their distances, in 2, 8 and 20 dimensions."""
    generator = torch.Generator().manual_seed(3)
    means, weights = 0.8 * torch.randn(10, 20, generator=generator), torch.rand(10, generator=generator) ** 2
    widths = 0.1 * torch.rand(10, generator=generator) + 0.01
    two = torch.eye(2) * torch.tensor([0.01, 0.04])[:, None, None]
    inverse: Any = sc.library.mixture_inverse_problem(1, 0).reference
    return {
        "two-modes-2d": sc.GaussianMixture(torch.tensor([0.8, 0.2]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), two),
        "inverse-problem-8d": inverse.mixture,
        "ten-modes-20d": sc.GaussianMixture(
            weights / weights.sum(), means, torch.eye(20).repeat(10, 1, 1) * widths[:, None, None]
        ),
    }


def grid_of(name: str, sde: Any, steps: int) -> list[float]:
    """A grid of process times by name."""
    if name == "default":
        return sde.default_grid(steps)
    if name == "uniform" or name.startswith("power"):
        power = 1.0 if name == "uniform" else float(name.removeprefix("power-"))
        return [1 - (1 - k / steps) ** power for k in range(steps)] + [1.0]
    end = sde.schedule.noise_end
    s = end * torch.cat((torch.logspace(-7, -2, 20_001), torch.linspace(0.01, 1, 40_001)[1:])).double()
    sigma = sde.schedule.std(s) / sde.schedule.mu(s)
    level = {"cosine": sigma.atan(), "log-sigma": sigma.log(), "edm": sigma ** (1 / 7)}[name]
    lowest = torch.tensor(_LOWEST.get(name, 0.0), dtype=torch.float64)
    low = {"cosine": lowest.atan(), "log-sigma": lowest.log(), "edm": lowest ** (1 / 7)}[name].clamp(min=level[0])
    cut = bool(low > level[0])  # then one more step leads to the data
    wanted = np.linspace(float(level[-1]), float(low), steps + (not cut))
    times = 1 - np.interp(wanted, level.numpy(), s.numpy()) / end
    return [0.0, *times[1 : None if cut else -1].tolist(), 1.0]


def _of_mixture(x: Tensor, exact: Tensor, mixture: sc.GaussianMixture) -> dict[str, float]:
    """Of samples against draws of the law: sliced W1, shares of modes, and moments in units of the law's own."""
    modes = [mixture.responsibilities(z).argmax(1) for z in (x, exact)]
    count = len(mixture.means)
    shares = [torch.bincount(m, minlength=count).double() / len(m) for m in modes]
    within = []  # second moment about the own mode's mean, in that mode's metric
    for i in (i for i in range(count) if shares[0][i] * len(x) > 50):
        root = torch.linalg.cholesky(mixture.covariances[i])
        away = torch.linalg.solve_triangular(root, (x[modes[0] == i] - mixture.means[i]).mT, upper=False)
        within.append((float(shares[0][i]), float(away.square().sum(0).median() / x.shape[1])))
    one = torch.randn(20_000, x.shape[1], generator=torch.Generator().manual_seed(0)).square().sum(1).median()
    total = sum(w for w, _ in within)
    return {
        "sliced_w1": sc.metrics.sliced_wasserstein(x, exact, directions=100),
        "total_variation": float((shares[0] - shares[1]).abs().sum() / 2),
        "mean_error": float(((x.mean(0) - mixture.mean) / mixture.variance.sqrt()).square().mean().sqrt()),
        "covariance_error": sum(w * v for w, v in within) / total * x.shape[1] / float(one) - 1,
    }


def _of_digits(x: Tensor, exact: Tensor, classifier: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        logits = [classifier(z) for z in (x, exact)]
    shares = [torch.bincount(v.argmax(1), minlength=10).double() / len(v) for v in logits]
    return {
        "sliced_w1": sc.metrics.sliced_wasserstein(x, exact, directions=100),
        "logits_w1": sc.metrics.sliced_wasserstein(*logits, directions=100),
        "total_variation": float((shares[0] - shares[1]).abs().sum() / 2),
        "covariance_error": float(x.var(0).sum() / exact.var(0).sum()) - 1,
    }


@cache
def _digits_law(seed: int) -> Tensor:
    problem = digits_problem("class", 1.0)
    grid = problem.reference.default_grid(_FINE)
    return sc.simulate(problem, SAMPLES // 2, time_steps=grid, scheme="exponential", seed=seed, keep="end").samples


def _measured(model: str, schedule: str, scheme: str, grid: str) -> list[dict[str, Any]]:
    if model == "digits":
        problem: Any = digits_problem("class", 1.0)
        exact, again = _digits_law(1001), _digits_law(2001)
        measured = partial(_of_digits, classifier=problem.reward_function.classifier)
    else:
        mixture = mixtures()[model]
        problem = sc.ControlProblem(sc.generative_sde(mixture, SCHEDULES[schedule]), start="fixed")
        exact, again = (mixture._draw_block(SAMPLES, torch.Generator().manual_seed(s)) for s in (5, 6))
        measured = partial(_of_mixture, mixture=mixture)
    rows: list[dict[str, Any]] = [{"steps": None, **measured(again, exact)}]  # the floor: other draws of the law itself
    for steps in STEPS:
        began = time.process_time()
        times = grid_of(grid, problem.reference, steps)
        paths = sc.simulate(problem, len(exact), time_steps=times, scheme=scheme, seed=SEED, keep="end")
        spent = time.process_time() - began
        rows.append({"steps": steps, "cpu_seconds": spent, **measured(paths.samples, exact)})
    return rows


def _shares(model: str, schedule: str, scheme: str, grid: str) -> dict[str, float]:
    """How far the modes' shares are from their weights, at the default number of steps: total variation; and what it
    is of as many draws of the law itself, in the mean."""
    mixture = mixtures()[model]
    problem = sc.ControlProblem(sc.generative_sde(mixture, SCHEDULES[schedule]), start="fixed")
    times = grid_of(grid, problem.reference, STEPS[-1])
    x = sc.simulate(problem, _MANY, time_steps=times, scheme=scheme, seed=SEED, keep="end").samples
    modes = torch.cat([mixture.responsibilities(part).argmax(1) for part in x.split(SAMPLES)])
    counts = torch.bincount(modes, minlength=len(mixture.weights)).double()
    again = torch.from_numpy(np.random.default_rng(0).multinomial(_MANY, _normalised(mixture.weights), 500)).double()
    exact = torch.from_numpy(_normalised(mixture.weights))
    away = (torch.cat((counts[None], again)) / _MANY - exact).abs().sum(1) / 2
    return {"total_variation": float(away[0]), "of_draws": float(away[1:].mean())}


def _normalised(weights: Tensor) -> np.ndarray:
    return (weights.double() / weights.double().sum()).numpy()


def _cells() -> list[tuple[str, str, str, str]]:
    """Every model under VP first, on the grids that all have."""
    cells = [(m, "VP", scheme, g) for m, scheme, g in product((*mixtures(), "digits"), SCHEMES, _MOSTLY)]
    others = [s for s in SCHEDULES if s != "VP"]
    cells += [(m, s, scheme, g) for s, m, scheme, g in product(others, mixtures(), SCHEMES, _MOSTLY)]
    rest = [g for g in GRIDS if g not in _MOSTLY]
    return cells + [(m, "VP", scheme, g) for m, scheme, g in product(mixtures(), SCHEMES, rest)]


def grids(
    only: Annotated[str, typer.Option(help="Models whose cells are run; default: all.")] = "",
    page: Annotated[bool, typer.Option(help="Write the page from the cells there are, and run nothing.")] = False,
) -> None:
    """The law of untuned chains: grids, schemes and schedules (300 CPU-seconds).

    Example: python -m benchmarks grids --page
    """
    for model, schedule, scheme, grid in _cells():
        path = RESULTS / f"{model}--{schedule}--{scheme}--{grid}.json"
        if page or path.exists() or (only and model not in only.split(",")):
            continue
        rows = _measured(model, schedule, scheme, grid)
        name = {"model": model, "schedule": schedule, "scheme": scheme, "grid": grid}
        store(path, {"version": VERSION, **name, "samples": SAMPLES, "rows": rows, "versions": versions()}, indent=None)
        told = [f"K {r['steps']}: TV {r['total_variation']:.3f}" for r in rows[1:]]
        typer.echo(f"{model} {schedule} {scheme} {grid}: " + ", ".join(told))
    for model, schedule, (scheme, grid) in product(mixtures(), SCHEDULES, _BEFORE_AND_NOW):
        path = SHARES / f"{model}--{schedule}--{scheme}--{grid}.json"
        if page or path.exists() or (only and model not in only.split(",")):
            continue
        name = {"model": model, "schedule": schedule, "scheme": scheme, "grid": grid}
        found = _shares(model, schedule, scheme, grid)
        store(path, {"version": VERSION, **name, "samples": _MANY, **found, "versions": versions()}, indent=None)
        typer.echo(f"{model} {schedule} {scheme} {grid}: {found}")
    found, shares = ([json.loads(path.read_text()) for path in sorted(at.glob("*.json"))] for at in (RESULTS, SHARES))
    typer.echo(f"{len(found) + len(shares)} cells; {write_page(found, shares)}")
    assert all(math.isfinite(v) for c in found for r in c["rows"] for v in r.values() if isinstance(v, float))
