"""The page and the figure of the Gaussian-mixture inverse problem, from its cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_figure", "write_page"]

ROOT = Path(__file__).parents[1]
PAGE, FIGURE = ROOT / "docs" / "tables" / "mixture.md", ROOT / "docs" / "tables" / "images" / "mixture.png"
OBSERVATIONS = (1, 2, 4)
DIVERGED = 0.01  # share of samples beyond the prior's reach from which on a cell counts as diverged
_SKEWED = 3.0  # mean over median from which on the median is printed first

Cell = dict[str, Any]

#: measured with other code for the same problems (d = 8, 8 seeds, mean; the last: 2 seeds): sliced W1 for dy = 1, 2, 4
PEERS = {
    "exact value": "0.29 / 0.08 / 0.07",
    "Tweedie guidance taken literally (3 of 24 diverged)": "4.8 / 2.9 / 0.43",
    "diffusion posterior sampling": "4.3 / 1.1 / 0.66",
    "twisted sampler, 32 particles": "1.6 / 0.59 / 1.15",
    "plain lean adjoint matching, generic network, 60 CPU-s": "16 and 3.9 / 6.5 and 1.5 / 0.23 and 0.13",
}


def diverged(cell: Cell) -> bool:
    """Whether it is not finite, or some of its samples are where neither the prior nor the posterior is."""
    return "failed" in cell or cell["escaped"] > DIVERGED


def _budgets(cells: Sequence[Cell], rows: Sequence[str]) -> list[tuple[str, float | None]]:
    """The lines of a table: rows in their order, once per budget."""
    found = {(c["row"], c["budget_cpu_seconds"]) for c in cells}
    return [
        (row, budget)
        for row in rows
        for budget in sorted((b for r, b in found if r == row), key=lambda b: -1.0 if b is None else b)
    ]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.0e}"


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds; where the mean is that of a few outliers, the median and the mean."""
    if not values:
        return "–"
    mean, median = statistics.fmean(values), statistics.median(values)
    if len(values) == 1:
        return _number(mean)
    if abs(mean) > _SKEWED * abs(median):
        return f"median {_number(median)} (mean {_number(mean)})"
    return f"{_number(mean)} ± {statistics.stdev(values) / math.sqrt(len(values)):.1g}"


def _name(row: str, budget: float | None) -> str:
    return row if budget is None else f"{row} ({budget:g} CPU-s)"


def _of(cells: Sequence[Cell], row: str, budget: float | None, observations: int) -> list[Cell]:
    return [
        c for c in cells if c["row"] == row and c["budget_cpu_seconds"] == budget and c["observations"] == observations
    ]


def _distances(cells: Sequence[Cell], rows: Sequence[str]) -> list[str]:
    lines = ["| row | dy = 1 | dy = 2 | dy = 4 | diverged |", "|---|---:|---:|---:|---:|"]
    for row, budget in _budgets(cells, rows):
        parts, bad, all_cells = [], 0, 0
        for observations in OBSERVATIONS:
            group = _of(cells, row, budget, observations)
            values = [c["sliced_w1"] for c in group if not diverged(c)]
            count = "" if len(values) in (0, 20) else f" ({len(values)})"
            parts.append(over_seeds(values) + count)
            bad, all_cells = bad + sum(map(diverged, group)), all_cells + len(group)
        lines.append(f"| {_name(row, budget)} | {' | '.join(parts)} | {f'{bad} of {all_cells}' if bad else '0'} |")
    return lines


def _median(group: Sequence[Cell], read: Callable[[Cell], Any]) -> str:
    values = []
    for cell in group:
        try:
            value = read(cell)
        except (KeyError, TypeError):
            continue
        if value is not None and math.isfinite(value):
            values.append(float(value))
    return _number(statistics.median(values)) if values else "–"


_DETAILS: dict[str, Callable[[Cell], Any]] = {
    "modes, TV": lambda c: c["modes_tv"],
    "within modes": lambda c: c["within_w1"],
    "reward": lambda c: c["evaluation"]["reward"]["value"],
    "KL": lambda c: c["evaluation"]["kl"]["value"],
    "gap": lambda c: c["gap"]["value"],
    "ESS": lambda c: c["evaluation"]["ess"]["value"],
}
_COSTS: dict[str, Callable[[Cell], Any]] = {
    "iterations": lambda c: c["iterations"],
    "reward calls": lambda c: c["training"]["reward_calls"],
    "gradient calls": lambda c: c["training"]["gradient_calls"],
    "network calls": lambda c: c["training"]["network_calls"],
    "CPU-s": lambda c: c["training"]["seconds"],
    "reward calls per sample": lambda c: c["sampling"]["reward_calls"] / c["samples"],
    "network calls per sample": lambda c: c["sampling"]["network_calls"] / c["samples"],
    "CPU-s of 1000 samples": lambda c: 1000 * c["sampling"]["seconds"] / c["samples"],
}


def _medians(
    cells: Sequence[Cell], rows: Sequence[str], columns: dict[str, Callable[[Cell], Any]], split: bool
) -> list[str]:
    """Medians over seeds; where ``split``, for every number of observations, else over all."""
    lines = [f"| row | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row, budget in _budgets(cells, rows):
        groups = [_of(cells, row, budget, n) for n in OBSERVATIONS]
        groups = [[c for c in g if "failed" not in c] for g in groups]
        parts = [
            " / ".join(_median(g, read) for g in groups) if split else _median([c for g in groups for c in g], read)
            for read in columns.values()
        ]
        lines.append(f"| {_name(row, budget)} | {' | '.join(parts)} |")
    return lines


#: the twisted sampler that an amortised one is to equal, and the amortised ones that are held against it
_TWISTED, _FLOOR = "SMC, 32 each, Tweedie twist", "exact samples"
_AMORTISED = ("particle-matching, exponential", "particle-matching")


def _bar(cells: Sequence[Cell]) -> list[str]:
    """The bar: twice the floor, and the twisted sampler, on the very seeds of the amortised rows."""
    lines = []
    for row, budget in _budgets(cells, _AMORTISED):
        for observations in OBSERVATIONS:
            ours = {c["seed"]: c for c in _of(cells, row, budget, observations) if not diverged(c)}
            values = [[c["sliced_w1"] for c in ours.values()]]
            for other in ("exact value", _FLOOR, _TWISTED):
                values.append(
                    [
                        c["sliced_w1"]
                        for c in _of(cells, other, None, observations)
                        if c["seed"] in ours and not diverged(c)
                    ]
                )
            if all(values):
                mean, best, floor, twisted = (statistics.fmean(v) for v in values)
                lines.append(
                    f"| {_name(row, budget)}, dy = {observations} ({len(ours)}) | {_number(mean)} | {mean / floor:.2f} "
                    f"| {best / floor:.2f} | {_number(floor)} | {_number(twisted)} |"
                )
    if not lines:
        return []
    return [
        "**The bar**: an amortised sampler within twice the floor and no worse than a twisted sampler of 32 particles. "
        "Means over the seeds of the amortised row, which all columns share; both sets of 1000 samples are random, so "
        "that ratios of three seeds are rough.",
        "",
        "| amortised row (seeds) | sliced W1 | / floor | exact value / floor | floor | 32 particles |",
        "|---|---:|---:|---:|---:|---:|",
        *lines,
        "",
        "Particle matching begins with a mixture of Gaussians fitted to tempered particles, whose control is known "
        "in closed form; here the posterior *is* such a mixture, and the network "
        "that corrects it is dropped wherever it does not lower the loss: in all cells at 60 CPU-s, and in two of "
        "the first three at 600. With Euler steps it is exact for a chain whose own prior "
        "has modes of other shares than the model's (total variation about 0.03 at 100 steps, and 0.02 to 0.07 for "
        "three posteriors, from 65536 weighted paths of the reference each); "
        '*exponential* is `scheme="exponential"`, where that is 0.01 and 0.015 to 0.025. Guidance by '
        "the exact value of continuous time does not correct for it, and in that is nearer to the posterior than the "
        "Euler chain's own optimum.",
        "",
    ]


def write_page(cells: list[Cell], rows: Sequence[str]) -> str:
    """Write ``docs/tables/mixture.md`` and return it; empty where there are no cells."""
    if not cells:
        return ""
    parts = [
        "# The Gaussian-mixture inverse problem",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks mixture` from the cells in `benchmarks/results/mixture/`; "
        "one thread, 100 steps, default settings and the default control network throughout.",
        "",
        "A pre-trained diffusion model whose data are 25 Gaussians on a grid (d = 8, distance 8 in every coordinate) "
        "is tuned to, or guided towards, the posterior given `dy` noisy linear observations: reward `log p(y | x)`, "
        "alpha = 1 (`sc.library.mixture_inverse_problem(dy, seed)`). Everything is closed form, so all distances are "
        "to the truth. Twenty problems for each dy; rows that train have fewer, as the number in brackets says.",
        "",
        "## Distance to the exact posterior",
        "",
        "Sliced Wasserstein distance (order 1, 500 directions) between 1000 samples and 1000 exact ones, mean ± "
        "standard error over seeds. `exact samples` is the floor that 1000 samples set; `exact value` is guidance by "
        "the exact value function, the best that any control of 100 Euler steps can be expected to do; `reference` "
        "does nothing. Diverged: not finite, or more than 1 % of the samples have a coordinate beyond 30 (the "
        "outermost modes are at 16); those cells are not in the means but in the last column.",
        "",
        *_distances(cells, rows),
        "",
        "*SMC, 32 each*: every sample from a particle system of its own, as the published twisted samplers draw "
        "them; the others of SMC take all samples from as few systems as "
        "hold them, so that samples share ancestors. *Tweedie twist*: particles of the reference, weighted by the "
        "reward of the denoised state; *Tweedie guidance and twist*: "
        "particles that it guides, too. *classifier guidance*: a classifier of noisy states, trained on noised draws "
        'of the prior with the label "accepted", of probability '
        "`p(y | x) / max p(y | .)`; a classifier of clean states in the denoised state is Tweedie guidance, to "
        "rounding. *path integral*: 250 samples only, whose own floor is "
        "about twice that of 1000.",
        "",
        *_bar(cells),
        "Measured with other code on the same problem (other seeds of it):",
        "",
        "| | dy = 1 / 2 / 4 |",
        "|---|---:|",
        *(f"| {name} | {value} |" for name, value in PEERS.items()),
        "",
    ]
    if FIGURE.exists():
        parts += [
            "![Sliced W1 to the exact posterior, one point per problem](images/mixture.png)",
            "",
            "One point per problem, a cross for each that diverged; the line is the median of the floor.",
            "",
        ]
    parts += [
        "## What is wrong with the samples",
        "",
        "Medians over seeds, for dy = 1 / 2 / 4. *modes, TV*: total variation between the shares of the posterior's "
        "modes among the samples and the exact shares. *within modes*: sliced W1 of the samples' residuals from the "
        "mean of their own mode to the exact residuals (all modes have the same covariance). *gap*: exact log Z (of "
        "continuous time) less the ELBO, in nats; for particles less `E log Z^`. KL is that of the path laws; "
        "particles have none.",
        "",
        *_medians(cells, rows, _DETAILS, True),
        "",
        "## What it costs",
        "",
        "Medians over all cells of a row. Calls are rows; CPU-seconds of one process. Particles and guidance pay per "
        "sample, trained controls before.",
        "",
        *_medians(cells, rows, _COSTS, False),
    ]
    reasons = _reasons(cells, rows)
    if reasons:
        parts += ["", "## Why cells failed", "", *reasons]
    text = "\n".join(parts) + "\n"
    PAGE.write_text(text)
    return text


def _reasons(cells: Sequence[Cell], rows: Sequence[str]) -> list[str]:
    lines = []
    for row, budget in _budgets(cells, rows):
        failed = [c for c in cells if c["row"] == row and c["budget_cpu_seconds"] == budget and "failed" in c]
        if failed:
            which = ", ".join(f"dy {c['observations']} seed {c['seed']}" for c in failed)
            lines.append(f"* {_name(row, budget)}: {which}: {failed[0]['failed'][:160]}")
    return lines


def write_figure(cells: list[Cell], rows: Sequence[str]) -> None:
    """One panel per number of observations: sliced W1 of every cell, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = _budgets(cells, rows)
    if not shown:
        return
    figure, axes = plt.subplots(
        1, len(OBSERVATIONS), figsize=(12, 1.2 + 0.24 * len(shown)), sharey=True, sharex=True, layout="constrained"
    )
    for axis, observations in zip(axes, OBSERVATIONS):
        for height, (row, budget) in enumerate(shown):
            group = _of(cells, row, budget, observations)
            good = [c["sliced_w1"] for c in group if not diverged(c)]
            colour = "C1" if budget is not None else "C0"
            axis.scatter(good, [height] * len(good), s=9, color=colour, alpha=0.5, linewidths=0)
            if good:
                axis.scatter([statistics.median(good)], [height], marker="|", s=90, color="black", linewidths=1.2)
            bad = sum(map(diverged, group))
            axis.scatter([60.0] * bad, [height] * bad, marker="x", s=14, color="C3", linewidths=0.8)
        floor = [c["sliced_w1"] for c in _of(cells, "exact samples", None, observations)]
        if floor:
            axis.axvline(statistics.median(floor), color="0.7", linewidth=0.8, zorder=0)
        axis.set(xscale="log", title=f"dy = {observations}", xlabel="sliced W1 to the exact posterior")
    axes[0].set_yticks(range(len(shown)), [_name(*line) for line in shown], fontsize=8)
    axes[0].invert_yaxis()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)
