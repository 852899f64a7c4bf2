"""Weak and strong orders of every scheme, measured on coupled paths.

Errors at the end of a path, ``E|X_h - X_{h/2}|`` (strong) and ``|E X_h^2 - E X_{h/2}^2|`` (weak), with both paths
driven by the same Brownian motion; an error of order p makes both fall as h^p. The finest level is also compared with
the moment that is known, since a scheme could converge to the wrong process at any order. For geometric Brownian motion
a step multiplies the state by a random number, so that weak errors are powers of its moments: by quadrature over the
step's noise, against the closed form, with no sampling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import sdecontrol as sc
from sdecontrol.paths.brownian import coarsen
from sdecontrol.randomness import Place, SeededNoise, derive_seed

RESULTS = Path(__file__).parent / "results" / "orders"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "orders.png"
F64 = torch.float64
CHUNK = 1 << 14


@dataclass(frozen=True)
class Case:
    """A scalar process on [0, horizon].

    Attributes:
        make: ``horizon -> problem``.
        moment: ``E X_1^2``, nan where it is not known.
    """

    make: Callable[[float], sc.ControlProblem]
    moment: float


def _problem(sde: sc.SDE, x0: float) -> sc.ControlProblem:
    return sc.ControlProblem(sde, initial=sc.Dirac(torch.tensor([x0], dtype=F64)))


def geometric() -> Case:
    """``dX = X/2 dt + 3/5 X dW``, X_0 = 1."""
    a, s = 0.5, 0.6
    return Case(
        lambda horizon: _problem(sc.SDE(lambda x, t: a * x, lambda x, t: s * x, dim=1, horizon=horizon), 1.0),
        math.exp(2 * a + s**2),
    )


def arctangent() -> Case:
    """``X = arctan V`` of an Ornstein-Uhlenbeck process ``dV = -V dt + s dW``, s = 1/2 (Kloeden & Platen 1992, section
    4.4): ``dX = -(sin(2X)/2 + s^2 sin X cos^3 X) dt + s cos^2 X dW``."""
    x0, s = 0.6, 0.5
    mean, deviation = math.tan(x0) * math.exp(-1.0), s * math.sqrt((1 - math.exp(-2.0)) / 2)
    nodes = torch.linspace(-12.0, 12.0, 20_001, dtype=F64)
    weights = torch.exp(-(nodes**2) / 2) / math.sqrt(2 * math.pi)
    moment = torch.trapezoid(weights * torch.atan(mean + deviation * nodes) ** 2, nodes)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -(0.5 * torch.sin(2 * x) + s**2 * torch.sin(x) * torch.cos(x) ** 3)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return s * torch.cos(x) ** 2

    make = lambda horizon: _problem(sc.SDE(drift, diffusion, dim=1, horizon=horizon), x0)  # noqa: E731
    return Case(make, float(moment))


def ornstein_uhlenbeck() -> Case:
    """``dX = -X dt + dW``, X_0 = 1."""
    one = torch.eye(1, dtype=F64)
    return Case(
        lambda horizon: _problem(sc.OrnsteinUhlenbeck(1, 1.0, one, horizon=horizon), 1.0),
        math.exp(-2.0) + (1 - math.exp(-2.0)) / 2,
    )


def semilinear() -> Case:
    """``dX = (-X + 1 + sin X) dt + dW``, X_0 = 0."""
    one = torch.eye(1, dtype=F64)
    make = lambda horizon: _problem(sc.SemilinearSDE(-one, lambda x, t: torch.sin(x), one, one[0], horizon), 0.0)  # noqa: E731
    return Case(make, float("nan"))


CASES = {
    "geometric": geometric,
    "arctangent": arctangent,
    "ornstein-uhlenbeck": ornstein_uhlenbeck,
    "semilinear": semilinear,
}

#: (scheme, case) -> (strong, weak) order in theory: torchsde's statements for multiplicative noise; with additive noise
#: Euler and Milstein are strong 1, and Heun and the additive "srk" (SRA1, Roessler 2010) weak 2. "exact" has no error
#: at all.
THEORY: dict[tuple[str, str], tuple[float, float]] = {
    ("euler", "geometric"): (0.5, 1.0),
    ("milstein", "geometric"): (1.0, 1.0),
    ("srk", "geometric"): (1.5, 1.5),
    ("heun", "geometric"): (1.0, 1.0),
    ("midpoint", "geometric"): (1.0, 1.0),
    ("euler-heun", "geometric"): (1.0, 1.0),
    ("euler", "arctangent"): (0.5, 1.0),
    ("milstein", "arctangent"): (1.0, 1.0),
    ("srk", "arctangent"): (1.5, 1.5),
    ("heun", "arctangent"): (1.0, 1.0),
    ("euler", "semilinear"): (1.0, 1.0),
    ("exponential", "semilinear"): (1.0, 1.0),
    ("heun", "semilinear"): (1.0, 2.0),
    ("srk", "semilinear"): (1.5, 2.0),
}


def _coarsen_linear(problem: sc.ControlProblem, scheme: str, steps: int, noise: Tensor) -> Tensor:
    """Coarse noise of a scalar chain with exact linear transitions, two steps to one: ``L xi`` of the coarse step is
    the sum of the two fine ones, each carried to the end by the linear flow."""
    fine, coarse = problem.chain(steps, scheme), problem.chain(steps // 2, scheme)
    zero = torch.zeros(1, 1, dtype=F64)
    inner = getattr(fine, "_linear", fine)
    phi = inner.kernel(0, zero + 1)[0] - inner.kernel(0, zero)[0]
    small, large = fine.kernel(0, zero)[1], coarse.kernel(0, zero)[1]
    pairs = noise.unflatten(0, (-1, 2)) * small.reshape(())
    return (phi.reshape(()) * pairs[:, 0] + pairs[:, 1]) / large.reshape(())


def _levels(problem: sc.ControlProblem, scheme: str, finest: int, count: int, n: int, seed: int) -> list[Tensor]:
    """Ends ``(n,)`` on grids of finest, finest/2, ... steps, of the same Brownian paths."""
    make = lambda s: SeededNoise(s, n, finest, (1,), dtype=F64, device="cpu").all()  # noqa: E731
    xi, areas, ends, steps = make(seed), make(derive_seed(seed, Place.OUTSIDE, 1)), [], finest
    for _ in range(count):
        noise: Any = (xi, areas) if scheme == "srk" else xi
        paths = sc.simulate(problem, n, time_steps=steps, scheme=scheme, noise=noise, keep="end")
        ends.append(paths.end.flatten())
        if scheme == "exponential":
            xi = _coarsen_linear(problem, scheme, steps, xi)
        else:
            _, xi, areas = coarsen(problem.chain(steps).clock, xi, areas)
        steps //= 2
    return ends


def _strong(case: Case, scheme: str, finest: int, levels: int, seed: int) -> tuple[list[float], list[float]]:
    ends = _levels(case.make(1.0), scheme, finest, levels, 1 << 12, seed)
    return [2.0 ** (j + 1) / finest for j in range(levels - 1)], [
        float((coarse - fine).abs().mean()) for fine, coarse in pairwise(ends)
    ]


def _weak(case: Case, scheme: str, paths: int, finest: int, levels: int, seed: int) -> dict[str, Any]:
    """By sampling; all levels on the same noise."""
    problem, done = case.make(1.0), 0
    sums, final = torch.zeros(levels - 1, 2, dtype=F64), torch.zeros(2, dtype=F64)
    while done < paths:
        values = [
            x**2 for x in _levels(problem, scheme, finest, levels, CHUNK, derive_seed(seed, Place.OUTSIDE, 2, done))
        ]
        for j, (fine, coarse) in enumerate(pairwise(values)):
            sums[j] += torch.stack(((coarse - fine).sum(), ((coarse - fine) ** 2).sum()))
        final += torch.stack((values[0].sum(), (values[0] ** 2).sum()))
        done += CHUNK
    mean = sums[:, 0] / done
    value = float(final[0]) / done
    return {
        "weak_h": [2.0 ** (j + 1) / finest for j in range(levels - 1)],
        "weak": mean.abs().tolist(),
        "weak_stderr": ((sums[:, 1] / done - mean**2) / done).sqrt().tolist(),
        "moment": value,
        "moment_stderr": math.sqrt(max(float(final[1]) / done - value**2, 0.0) / done),
    }


def _weak_by_quadrature(case: Case, scheme: str, coarsest: int = 1 << 10, levels: int = 4) -> dict[str, Any]:
    """``E X_1^2 = (E R^2)^K``, R the random factor of one step, over 30 x 30 Gauss-Hermite nodes of its two noises."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    xi, eta = (torch.from_numpy(v).reshape(1, -1, 1) for v in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    steps, errors = [coarsest << j for j in range(levels)][::-1], []
    value = math.nan
    for k in steps:
        noise: Any = (xi, eta) if scheme == "srk" else xi
        factor = sc.simulate(case.make(1.0 / k), len(weight), time_steps=1, scheme=scheme, noise=noise).end[:, 0]
        moment = math.exp(k * math.log(float((weight * factor**2).sum())))
        errors.append(abs(moment - case.moment))
        value = moment if k == steps[0] else value
    zeros = [0.0] * levels
    return {
        "weak_h": [1 / k for k in steps],
        "weak": errors,
        "weak_stderr": zeros,
        "moment": value,
        "moment_stderr": 0.0,
    }


def slope(h: list[float], errors: list[float]) -> float:
    """Least-squares slope of log error by log h."""
    x, y = torch.tensor(h, dtype=F64).log(), torch.tensor(errors, dtype=F64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def measure(scheme: str, case: str, paths: int = 1 << 18, seed: int = 0) -> dict[str, Any]:
    """Errors and orders of one scheme on one case: strong on grids of up to 1024 steps, weak on grids of up to 256
    (2^13 by quadrature).

    Returns:
        steps h, differences between successive levels (the weak ones with standard errors), the fitted orders, theory,
        and the second moment on the finest grid beside the exact one.
    """
    made = CASES[case]()
    h, strong = _strong(made, scheme, 1024, 5, seed)
    if case == "geometric":
        weak = _weak_by_quadrature(made, scheme)
    else:
        weak = _weak(made, scheme, paths, 256, 4, seed)
    return {
        "scheme": scheme,
        "case": case,
        "paths": paths,
        "strong_h": h,
        "strong": strong,
        **weak,
        "strong_order": slope(h, strong),
        "weak_order": slope(weak["weak_h"], weak["weak"]),
        "theory": dict(zip(("strong", "weak"), THEORY[scheme, case])),
        "exact_moment": None if math.isnan(made.moment) else made.moment,
    }


def exact_scheme_error(steps: int = 7) -> float:
    """Largest error of mean and variance of "exact" at every grid time, by the recursion of its kernels: rounding."""
    problem = ornstein_uhlenbeck().make(1.0)
    chain = problem.chain(steps, "exact")
    mean, variance, worst = torch.ones(1, 1, dtype=F64), torch.zeros((), dtype=F64), 0.0
    for k in range(steps):
        at, scale = chain.kernel(k, mean)
        phi = chain.kernel(k, mean + 1)[0] - at
        mean, variance = at, (phi**2 * variance + scale**2).reshape(())
        t = chain.clock[k + 1]
        known = (math.exp(-t), (1 - math.exp(-2 * t)) / 2)
        worst = max(worst, abs(float(mean) - known[0]), abs(float(variance) - known[1]))
    return worst


def figure(results: list[dict[str, Any]], path: Path = FIGURE) -> None:
    """Errors against the step, strong on the left and weak on the right, a line per scheme and case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    cases = list(dict.fromkeys(r["case"] for r in results))
    schemes = list(dict.fromkeys(r["scheme"] for r in results))
    fig, axes = plt.subplots(2, len(cases), figsize=(3.4 * len(cases), 6.4), squeeze=False)
    for column, case in enumerate(cases):
        for row, kind in enumerate(("strong", "weak")):
            ax = axes[row][column]
            for r in (r for r in results if r["case"] == case):
                label = f"{r['scheme']}: {r[kind + '_order']:.2f} ({r['theory'][kind]:g})"
                color = f"C{schemes.index(r['scheme'])}"
                bars = [2 * e for e in r["weak_stderr"]] if kind == "weak" else None
                ax.errorbar(
                    r[kind + "_h"], r[kind], yerr=bars, fmt="o-", color=color, label=label, ms=4, lw=1.2, capsize=2
                )
            ax.set(xscale="log", yscale="log", title=case if row == 0 else "")
            ax.set_xticks(sorted({h for r in results if r["case"] == case for h in r[kind + "_h"]}))
            ax.xaxis.set_major_formatter(lambda h, _: f"1/{1 / h:.0f}")
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("step h" if row else "")
            ax.set_ylabel(f"{kind} error" if column == 0 else "")
            ax.legend(fontsize=7, title="order (theory)", title_fontsize=7)
            ax.grid(alpha=0.3, which="both", lw=0.4)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def orders(
    paths: Annotated[int, typer.Option(help="Paths per scheme and case (weak orders).")] = 1 << 18,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    plot: Annotated[bool, typer.Option(help="Draw docs/images/orders.png.")] = True,
) -> None:
    """Weak and strong orders of every scheme on coupled paths, against theory.

    Example: python -m benchmarks orders --paths 4096 --no-plot
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = []
    for scheme, case in THEORY:
        r = measure(scheme, case, paths=paths, seed=seed)
        results.append(r)
        off = max(abs(r[f"{k}_order"] - r["theory"][k]) for k in ("strong", "weak"))
        typer.echo(
            f"{scheme:12s} {case:20s} strong {r['strong_order']:.3f} ({r['theory']['strong']:g})  "
            f"weak {r['weak_order']:.3f} ({r['theory']['weak']:g}){'' if off <= 0.1 else '   off by more than 0.1'}"
        )
    worst = exact_scheme_error()
    typer.echo(f"exact        ornstein-uhlenbeck   no error: {worst:.1e}")
    (RESULTS / "orders.json").write_text(
        json.dumps(
            {
                "seed": seed,
                "paths": paths,
                "versions": {"sdecontrol": sc.__version__, "torch": torch.__version__},
                "command": "python -m benchmarks orders",
                "orders": results,
                "exact_scheme_error": worst,
            },
            indent=1,
        )
        + "\n"
    )
    if plot:
        figure(results)
