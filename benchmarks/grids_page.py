"""The page of the grids suite, from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributions import Normal, kl_divergence

import sdecontrol as sc

__all__ = ["write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "tables" / "grids.md"
Cell = dict[str, Any]
_NAMES = {
    "uniform": "uniform in t",
    "power-1.5": "1 - (1 - k/K)^1.5",
    "power-2": "1 - (1 - k/K)^2",
    "power-3": "1 - (1 - k/K)^3",
    "cosine": "uniform in atan(sigma)",
    "log-sigma": "uniform in log sigma, to 0.02",
    "edm": "uniform in sigma^(1/7), to 0.005",
    "default": "**cube root of log(1 + sigma²)**",
}
_SCHEDULES = ("VP", "FlowMatching", "CosineVP", "VE")
_MODELS = ("two-modes-2d", "inverse-problem-8d", "ten-modes-20d", "digits")
_COMMON = ("uniform", "power-1.5", "log-sigma", "default")
_MEASURES = (("sliced_w1", "sliced W1 / floor"), ("total_variation", "modes, TV"), ("covariance_error", "variance"))


def _number(cell: Cell, row: dict[str, Any], measure: str) -> str:
    if measure == "sliced_w1":
        return f"{row[measure] / cell['rows'][0][measure]:.2f}"
    return f"{row[measure]:+.2f}" if measure == "covariance_error" else f"{row[measure]:.3f}"


def _table(cells: list[Cell]) -> list[str]:
    """One model and schedule: a line per grid and scheme, the steps 20 / 50 / 100 in a cell."""
    lines = ["| grid | scheme | " + " | ".join(f"{name}, 20 / 50 / 100" for _, name in _MEASURES) + " |"]
    lines.append("|---|---|" + "---:|" * len(_MEASURES))
    for grid, name in _NAMES.items():
        for scheme in ("euler", "exponential"):
            for cell in (c for c in cells if (c["grid"], c["scheme"]) == (grid, scheme)):
                told = (" / ".join(_number(cell, row, m) for row in cell["rows"][1:]) for m, _ in _MEASURES)
                lines.append(f"| {name} | {scheme} | " + " | ".join(told) + " |")
    floor = cells[0]["rows"][0]
    lines += ["", f"Floor (other draws of the law itself): TV {floor['total_variation']:.3f}.", ""]
    return lines


def _overall(cells: list[Cell]) -> list[str]:
    """The mean over the models and schedules that have all of the common grids, at 50 steps."""
    lines = ["| grid | scheme | sliced W1 / floor | modes, TV | variance, absolute |", "|---|---|---:|---:|---:|"]
    made = {(c["model"], c["schedule"], c["grid"], c["scheme"]): c["rows"] for c in cells}
    ways = [(grid, scheme) for grid in _COMMON for scheme in ("euler", "exponential")]
    whole = [at for at in dict.fromkeys(key[:2] for key in made) if all((*at, *way) in made for way in ways)]
    for grid, scheme in ways:
        found = [made[*at, grid, scheme] for at in whole]
        rows = [(f[0], next(r for r in f if r["steps"] == 50)) for f in found]
        w1 = sum(r["sliced_w1"] / f["sliced_w1"] for f, r in rows) / len(rows)
        tv, cov = (sum(abs(r[m]) for _, r in rows) / len(rows) for m in ("total_variation", "covariance_error"))
        lines.append(f"| {_NAMES[grid]} | {scheme} | {w1:.2f} | {tv:.3f} | {cov:.3f} |")
    names = ", ".join(f"{model.replace('-', ' ')} under {schedule}" for model, schedule in whole)
    return [*lines, "", f"Over {names}.", ""]


def _of_shares(cells: list[Cell]) -> list[str]:
    """Before and now, of a number of steps alone."""
    schedules = [s for s in _SCHEDULES if any(c["schedule"] == s for c in cells)]
    models = [m for m in _MODELS if any(c["model"] == m for c in cells)]
    lines = [f"| mixture | {' | '.join(schedules)} | of draws |", "|---|" + "---:|" * (len(schedules) + 1)]
    for model in models:
        row = []
        for schedule in schedules:
            here = {c["scheme"]: c for c in cells if (c["model"], c["schedule"]) == (model, schedule)}
            told = (f"{here[s]['total_variation']:.4f}" if s in here else "–" for s in ("euler", "exponential"))
            row.append(" / ".join(told))
        floor = next(c["of_draws"] for c in cells if c["model"] == model)
        lines.append(f"| {model.replace('-', ' ')} | {' | '.join(row)} | {floor:.4f} |")
    return [*lines, ""]


def _floors() -> list[str]:
    """In closed form, on Gaussian models and quadratic rewards: what no mean-shift control removes, and the bias."""
    lines = [
        "| data, reward | schedule | floor, equal Euler | floor, default | bias, equal Euler | bias, default |",
        "|---|---|---:|---:|---:|---:|",
    ]
    f64, steps = torch.float64, 50
    for variance, slope in ((0.3, 2.0), (0.02, 20.0), (1.0, 10.0)):
        for name in _SCHEDULES:
            one = torch.ones(1, dtype=f64)
            model = sc.GaussianMixture(one, 0.7 * one[:, None], variance * one[:, None, None])
            sde = sc.generative_sde(model, getattr(sc, name)())
            reward = sc.Quadratic(G=slope * one[:, None], g=one)
            problem = sc.ControlProblem(sde, reward=reward, start="controlled")
            row = []
            for scheme, grid in (("euler", [k / steps for k in range(steps + 1)]), ("exponential", steps)):
                exact = sc.exact_solution(problem, time_steps=grid, scheme=scheme)
                wanted = 1 / (1 / variance + slope)
                end, truth = exact.marginal(1.0), Normal((0.7 / variance + one) * wanted, wanted**0.5)
                bias = kl_divergence(Normal(end.mean, end.variance.sqrt()), truth)
                row.append((float(exact.floor), float(bias)))
            told = [f"{v:.1e}" for v in (*(r[0] for r in row), *(r[1] for r in row))]
            lines.append(f"| variance {variance:g}, curvature {slope:g} | {name} | {' | '.join(told)} |")
    return [*lines, ""]


def write_page(cells: list[Cell], shares: list[Cell]) -> str:
    """Write the page; returns where."""
    parts = [
        "# Grids and schemes of generative references",
        "",
        "The tilt is exact for the chain: what the untuned chain's own law lacks of the model's is tilted with it. So "
        "a number of steps stands for the times, and no scheme for the scheme, that bring the untuned chain nearest to "
        "the model's law: noise levels `sigma = std/mu` at equal steps in the cube root of `log(1 + sigma²)`, whatever "
        "the schedule, and the exponential scheme, which holds the noise prediction over a step and integrates all "
        "else. `python -m benchmarks grids` writes this page.",
        "",
        "Mixtures stand in the model's place, so that the law is known: *two modes* of standard deviations 0.1 and 0.2 "
        "and weights 0.8 and 0.2 in d = 2; the 25 unequal modes of the *inverse problem* in d = 8, 8 standard "
        "deviations apart; *ten modes* in d = 20. Digits are held against the chain of 400 steps of the default. "
        "*sliced W1 / floor*: to 8192 draws of the law (digits 4096), over that of other draws; *modes, TV*: total "
        "variation of the modes' (on digits the classes') shares; *variance*: relative error of the variance within "
        "modes (digits: of all pixels). All chains end at noising time 1e-5, without a last step that removes the "
        'noise left there; `noise_level="memoryless"` is the same noise as "reverse".',
        "",
        "## In the mean, 50 steps",
        "",
        *_overall(cells),
        "## Shares of modes at the default of 100 steps",
        "",
        "Total variation between the modes' shares of 65536 paths and their weights, of what a number of steps alone "
        "stood for before (equal Euler steps) / and stands for now; *of draws*: that of as many draws of the law.",
        "",
        *_of_shares(shares),
        "## The floor of mean-shift controls, and the bias",
        "",
        "A control shifts the means of the steps: its path law keeps a distance to the tilt of the chain, "
        "`exact.floor`, of first order in the steps. Beside it, as the *bias*, the KL of the chain's tilt to the "
        "model's at the end, of second order. One-dimensional Gaussian models, closed form, 50 steps; nats for "
        "each coordinate. Which of the two is larger depends on the data: on wide data and strong rewards the "
        "floor, by orders of magnitude, on narrow data they are of one size. Under VP the default has both lower "
        "than equal Euler steps; under CosineVP and FlowMatching, whose equal steps in time are equal steps in "
        "`atan(sigma)` or nearly, the floor is mostly higher, by a factor of 1.5 at most. There equal Euler steps "
        "are as good on data of unit width (*two modes* and *ten modes*, below), but on data as wide as the "
        "inverse problem's they put a fifth and a tenth of all samples of 50 steps into a wrong mode, where the "
        "default is at the sampling floor. A model does not say how wide its data are: so the default is one for "
        "all schedules, and for a strong reward on a flow model of standardised data "
        '`time_steps=[k / 50 for k in range(51)]` with `scheme="euler"` is worth a trial.',
        "",
        *_floors(),
        "## The digits' table",
        "",
        "The chain of the [digits' table](digits.md), Euler at 50 steps of `1 - (1 - k/K)^1.5`, is at the sampling "
        "floor of its model, and so is the default (last table of VP, below): it stays as it is.",
        "",
    ]
    for schedule in _SCHEDULES:
        for model in _MODELS:
            here = [c for c in cells if (c["schedule"], c["model"]) == (schedule, model)]
            if here:
                parts += [f"## {schedule}, {model.replace('-', ' ')}", "", *_table(here)]
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    return str(PAGE.name)
