"""The page of the grids suite, from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    """The mean over all models and schedules that have the grid, at 50 steps."""
    lines = [
        "| grid | scheme | sliced W1 / floor | modes, TV | variance, absolute | cells |",
        "|---|---|---:|---:|---:|---:|",
    ]
    common = ("uniform", "power-1.5", "log-sigma", "default")
    for grid in common:
        for scheme in ("euler", "exponential"):
            here = [c for c in cells if (c["grid"], c["scheme"]) == (grid, scheme)]
            if not here:
                continue
            rows = [(c["rows"][0], next(r for r in c["rows"] if r["steps"] == 50)) for c in here]
            w1 = sum(r["sliced_w1"] / f["sliced_w1"] for f, r in rows) / len(rows)
            tv, cov = (sum(abs(r[m]) for _, r in rows) / len(rows) for m in ("total_variation", "covariance_error"))
            lines.append(f"| {_NAMES[grid]} | {scheme} | {w1:.2f} | {tv:.3f} | {cov:.3f} | {len(rows)} |")
    return [*lines, ""]


def write_page(cells: list[Cell]) -> str:
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
    ]
    for schedule in ("VP", "FlowMatching", "CosineVP", "VE"):
        for model in ("two-modes-2d", "inverse-problem-8d", "ten-modes-20d", "digits"):
            here = [c for c in cells if (c["schedule"], c["model"]) == (schedule, model)]
            if here:
                parts += [f"## {schedule}, {model.replace('-', ' ')}", "", *_table(here)]
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    return str(PAGE.name)
