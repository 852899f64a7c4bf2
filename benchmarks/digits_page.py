"""The page and the figures of the digits suite, from its cells."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .digits_problem import ALPHAS, CORE, LABEL, REWARDS, STEPS

__all__ = ["collapsed", "number_text", "write_figures", "write_page"]

ROOT = Path(__file__).parents[1]
PAGE, NOTES = ROOT / "docs" / "tables" / "digits.md", ROOT / "docs" / "tables" / "digits_notes.md"
FIGURE, STRIPS = (ROOT / "docs" / "tables" / "images" / name for name in ("digits.png", "digits_samples.png"))
_TILT = "exact tilt"
#: shares of the exact tilt's below which a method's is called collapsed
_CLASSES, _NEIGHBOUR = 0.6, 0.75
_MARKERS = "osD^vP*X<>hp"
#: CPU-seconds of the table, of its column for samplers that are one network, and of cells of an earlier table
_BUDGET, _LONGER, _EARLIER = 120.0, 240.0, 40.0
#: nats that BENCHMARKS asks of one default, and the same of one network
_BARS = {
    ("class", 1.0): (0.40, 0.18),
    ("class", 2.0): (0.12, 0.12),
    ("ink", 1.2): (0.12, 0.10),
    ("ink", 2.0): (0.04, 0.03),
    ("zip", 2.0): (0.20, 0.07),
    ("zip", 1.5): (0.45, 0.25),
}
Cell = dict[str, Any]


def _over_seeds(cells: list[Cell]) -> Cell:
    """The first seed's cell with the means of all; standard errors over seeds where there are several."""
    first = dict(cells[0], seeds=len(cells))
    for key in ("reward", "kl", "objective", "gap"):
        if len(cells) > 1 and all(c.get(key) for c in cells):
            values = [c[key]["value"] for c in cells]
            first[key] = {"value": mean(values), "stderr": stdev(values) / math.sqrt(len(values))}
    return first


def _groups(cells: list[Cell], order: list[str], budget: float) -> dict[tuple[str, float], dict[str, Cell]]:
    """(reward, alpha) -> method -> its cells of that budget (or without one), over seeds, in the order of the card."""
    found: dict[tuple[str, float], dict[str, Cell]] = {}
    for reward, alphas in ALPHAS.items():
        for alpha in alphas:
            rows: dict[str, Cell] = {}
            for method in order:
                here = [
                    c for c in cells if (c["reward_name"], c.get("method"), c.get("alpha")) == (reward, method, alpha)
                ]
                here = [c for c in here if c.get("budget_cpu_seconds", 0.0) in (0.0, budget)]
                good = [c for c in here if "failed" not in c]
                if here:
                    rows[method] = _over_seeds(good) if good else here[0]
            if rows:
                found[reward, alpha] = rows
    return found


def collapsed(cell: Cell, tilt: Cell) -> bool:
    """Fewer effective classes or nearer neighbours than the exact tilt's by more than the shares above."""
    classes = math.exp(cell["class_entropy"] - tilt["class_entropy"])
    return classes < _CLASSES or cell["nearest_other"]["value"] < _NEIGHBOUR * tilt["nearest_other"]["value"]


def number_text(number: dict[str, float] | None) -> str:
    """A value with its standard error."""
    if number is None or number["value"] is None:
        return "–"
    value, error = number["value"], number.get("stderr")
    if not error or not math.isfinite(error):
        return f"{value:.3g}"
    digits = max(0, min(3, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value < 1e4 else f"{value / 1000:.0f}k" if value < 1e6 else f"{value / 1e6:.2g}M"


def _row(cell: Cell, longer: Cell | None, tilt: Cell) -> str:
    classes = f"{math.exp(cell['class_entropy']):.1f}"
    near = cell["nearest_other"]["value"] / tilt["nearest_other"]["value"]
    data = cell["nearest_training"]["value"] / tilt["nearest_training"]["value"]
    flag = " **collapsed**" if collapsed(cell, tilt) else ""
    bound = "≤ " if cell.get("kl_is_a_bound") else ""
    if cell["method"] == _TILT:
        work = f"ESS {cell['effective']:.0f} | |  | "
    else:
        training, cost = cell["training"], cell.get("sampling_over_untuned")
        seconds = f"{training['seconds']:.0f}" if training["seconds"] > 5 else "–"
        calls = _count(training["reward_calls"]) if training["seconds"] > 5 else "–"
        work = f"{seconds} | {calls} | {'–' if cost is None else f'{cost:.1f}'} | {cell['seeds']}"
    more = "" if longer is None or "failed" in longer else number_text(longer["gap"])
    return (
        f"| {cell['method']}{flag} | {number_text(cell['gap'])} | {more} | {number_text(cell['reward'])} | "
        f"{bound}{number_text(cell['kl'])} | "
        f"{classes} | {near:.2f} | {data:.2f} | {cell['sliced_wasserstein']:.3f} | {work} |"
    )


def _table(rows: dict[str, Cell], longer: dict[str, Cell]) -> list[str]:
    lines = [
        f"| method | gap | at {_LONGER:g} CPU-s | reward | KL | classes | diversity | to data | sliced W1 | CPU-s of "
        "fits and training | reward calls | sampling / untuned | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    tilt = rows.get(_TILT)
    if tilt is None:
        return []
    done = [c for c in rows.values() if "failed" not in c and c is not tilt]
    ranked = sorted(done, key=lambda c: c["gap"]["value"])
    trained = {m: c for m, c in longer.items() if c.get("budget_cpu_seconds")}
    lines += [_row(c, trained.get(c["method"]), tilt) for c in [tilt, *ranked]]
    refused = [c["method"] for c in rows.values() if "failed" in c]
    return lines + (["", f"Refused: {', '.join(refused)}."] if refused else [])


def _gap(cell: Cell | None) -> str:
    return "–" if cell is None or "gap" not in cell else number_text(cell["gap"])


def _gaps(cells: list[Cell], order: list[str], floors: dict[tuple[str, float], Cell]) -> list[str]:
    """All gaps of the core on one table, with the floor of mean shifts and the bars."""
    core = [(r, a) for r, alphas in ALPHAS.items() for a in alphas[:CORE]]
    by_budget = {b: _groups(cells, order, b) for b in (_BUDGET, _LONGER, _EARLIER)}
    head = " | ".join(f"{r}, {a:g}" for r, a in core)
    lines = [f"| gap in nats | {head} |", "|---|" + "---|" * len(core)]
    for budget, groups in by_budget.items():
        for method in order:
            found = [groups.get(p, {}).get(method) for p in core]
            shown = [c for c in found if c is not None and "gap" in c]
            untrained = budget == _BUDGET or any(c["budget_cpu_seconds"] for c in shown if c["method"] != _TILT)
            if method == _TILT or not shown or not untrained:
                continue
            after = f", {budget:g} CPU-s" if any(c["budget_cpu_seconds"] for c in shown) else ""
            lines.append(f"| {method}{after} | " + " | ".join(map(_gap, found)) + " |")
    bars = [_BARS.get(p, (math.nan, math.nan)) for p in core]
    lines.append("| *asked for; wished for* | " + " | ".join(f"{a:g}; {b:g}" for a, b in bars) + " |")
    lines.append("| *floor of mean shifts* | " + " | ".join(_gap(floors.get(p)) for p in core) + " |")
    return lines


def write_page(cells: list[Cell], order: list[str]) -> str:
    """Write ``docs/tables/digits.md`` and return it."""
    floors = {(c["reward_name"], c["alpha"]): c for c in cells if c.get("floor")}
    cells = [c for c in cells if not c.get("floor")]
    groups, longer = _groups(cells, order, _BUDGET), _groups(cells, order, _LONGER)
    fronts = {c["reward_name"]: c for c in cells if "frontier" in c}
    count = next(iter(fronts.values()))["n"] if fronts else 0
    parts = [*_head(count, floors.get(("gaussian", 1.0))), "", "## Gaps", "", *_gaps(cells, order, floors)]
    parts += ["", "![reward against KL](images/digits.png)", "", "![samples](images/digits_samples.png)"]
    for (reward, alpha), rows in groups.items():
        table = _table(rows, longer.get((reward, alpha), {}))
        if table and alpha in ALPHAS[reward][:CORE]:
            parts += ["", f"## {reward}, alpha = {alpha:g}", "", f"Reward: {REWARDS[reward]}.", "", *table]
    if NOTES.exists():
        parts += ["", NOTES.read_text().strip()]
    text = "\n".join(parts) + "\n"
    PAGE.write_text(text)
    return text


def _head(count: int, check: Cell | None) -> list[str]:
    validated = ""
    if check is not None:
        estimate, closed = number_text(check["gap"]), check["closed_form"]
        validated = f" On a linear-quadratic chain the estimate is {estimate}, the closed form {closed:.3f}."
    return [
        "# Digits",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks digits` from the cells in `benchmarks/results/digits/` "
        "(`--page`: only the page). A noise-prediction network trained on scikit-learn's digits (the demo's, 8×8 "
        f"pixels in [-1, 1]) is tilted to three rewards; {STEPS} steps, finer towards the data; one thread. Methods "
        f"that train have {_BUDGET:g} CPU-seconds in all, data and fits included, batches of 128 and otherwise the "
        f"defaults of `solve`; rows of {_EARLIER:g} CPU-seconds are of an earlier table. Every cell names its commit.",
        "",
        f"The exact law is that of the chain's own samples ({count} of "
        "them) with weights `exp(r/alpha)`: reward, KL and log Z with standard errors by the delta method, drawn only "
        "where at least 200 of them are effective and the weights' tail index is below 0.7. No sample law of the same "
        "KL has a larger reward than the frontier.",
        "",
        "Columns: **gap** of the paths' ELBO to the importance-sampled log Z, in nats (over several seeds mean and its "
        "standard error); **classes** effective number of classes among the samples, the exponential of their entropy "
        "by the classifier; **diversity** mean distance of a sample to the nearest of 127 others, relative to the same "
        "of the exact tilt; **to data** mean distance to the nearest training image, relative to the same; "
        f"**collapsed** where classes fall below {_CLASSES:g} or diversity below {_NEIGHBOUR:g} of the exact tilt's; "
        "**sliced W1** to the exact tilt, in whose own row it is the sampling floor; **sampling / untuned** "
        "CPU-seconds of a sample over those of a sample of the untuned model. For particles that are chosen in "
        "proportion to weights (SMC, softmax) KL and gap are upper bounds, from `E log Z^`.",
        "",
        "**Floor of mean shifts**: what no control that shifts the steps' means can gain, since the soft-optimal "
        "kernels are narrower than the model's: `E sum_k min_c KL(N(m + s c, S) || p*_k)` along paths of the exact "
        "tilt, estimated without any fitted value (`python -m benchmarks digits-floor`). " + validated,
    ]


# ---------------------------------------------------------------------------------------- figures


def write_figures(cells: list[Cell], order: list[str]) -> None:
    """Reward against KL, one panel per reward; and a strip of samples per method at each reward's first alpha."""
    import matplotlib

    matplotlib.use("Agg")
    cells = [c for c in cells if not c.get("floor")]
    fronts = {c["reward_name"]: c for c in cells if "frontier" in c}
    if fronts:
        groups = _groups(cells, order, _BUDGET)
        _frontiers(groups, order, fronts)
        _strips(groups)


#: methods that the figure names; all others are grey points
_NAMED = (
    "default",
    "distilled",
    "reward-backprop",
    "soft-ppo",
    "bridge-matching",
    "value-guidance, tweedie",
    "smc, tweedie guided",
    "best-of-16",
)


def _frontiers(groups: dict[tuple[str, float], dict[str, Cell]], order: list[str], fronts: dict[str, Cell]) -> None:
    import matplotlib.pyplot as plt

    named = [m for m in _NAMED if m in order]
    colours = plt.get_cmap("tab10")
    style = {m: (colours(i % 10), _MARKERS[i]) for i, m in enumerate(named)}
    names = [r for r in ALPHAS if r in fronts]
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 5.4), squeeze=False, layout="constrained")
    shown: set[str] = set()
    for axis, reward in zip(axes[0], names):
        front = fronts[reward]["frontier"]
        kl, reached = [p["kl"]["value"] for p in front], [p["reward"]["value"] for p in front]
        error = [2 * p["reward"]["stderr"] for p in front]
        low, high = ([m + sign * e for m, e in zip(reached, error)] for sign in (-1, 1))
        axis.plot(kl, reached, color="0.2", lw=1.4, zorder=1)
        axis.fill_between(kl, low, high, color="0.2", alpha=0.2)
        most = 1.25 * max(kl)
        for (of, alpha), rows in groups.items():
            if of == reward and alpha in ALPHAS[reward][:CORE]:
                shown |= _points(axis, rows, alpha, style, most, alpha == ALPHAS[reward][0])
        what = {"class": f"class {LABEL}: log p({LABEL} | x)", "ink": "ink", "zip": "compressibility (black box)"}
        axis.set(title=what[reward], xlabel="KL to the pre-trained model [nats]", xlim=(-0.03 * most, most))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("reward")
    line = plt.Line2D
    handles = [
        line([], [], color="0.2", lw=1.4, label="exact frontier ± 2 standard errors"),
        line([], [], color="k", marker="+", ms=11, ls="", label="exact tilt at alpha"),
        *(line([], [], color=style[m][0], marker=style[m][1], ls="", label=m) for m in named if m in shown),
        line([], [], color="0.75", marker="o", ms=4, ls="", label="other methods"),
        line([], [], color="0.5", marker="o", mfc="none", ls="", label="open: KL is an upper bound; small: 2nd alpha"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


def _points(
    axis: Any, rows: dict[str, Cell], alpha: float, style: dict[str, tuple[Any, str]], most: float, first: bool
) -> set[str]:
    """A point per method within the panel, and a cross for the exact tilt; returns who is there."""
    shown = set()
    for method, c in rows.items():
        if "failed" in c or c["kl"]["value"] > most:
            continue
        x, y = c["kl"]["value"], c["reward"]["value"]
        if method == _TILT:
            axis.plot(x, y, "+", color="k", ms=13, mew=1.6, zorder=2)
            axis.annotate(f"α = {alpha:g}", (x, y), (-6, 8), textcoords="offset points", fontsize=8, ha="right")
            continue
        shown.add(method)
        colour, marker = style.get(method, ("0.75", "o"))
        fill = "none" if c["kl_is_a_bound"] else colour
        size = (8 if first else 5) if method in style else 3.5
        bars = {"xerr": c["kl"]["stderr"], "yerr": c["reward"]["stderr"], "elinewidth": 0.8}
        axis.errorbar(x, y, **bars, fmt=marker, color=colour, ms=size, mfc=fill, mew=1.4, zorder=3)
    return shown


def _strips(groups: dict[tuple[str, float], dict[str, Cell]]) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    columns = [
        (f"{reward}, alpha = {alpha:g}", {m: c["images"] for m, c in rows.items() if "images" in c})
        for (reward, alpha), rows in groups.items()
        if alpha == ALPHAS[reward][0]
    ]
    height = max((len(rows) for _, rows in columns), default=0)
    if not height:
        return
    figure, axes = plt.subplots(
        1, len(columns), figsize=(5.4 * len(columns), 0.36 * height + 0.5), squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[0], columns):
        strip = [
            np.concatenate([np.pad(np.array(i).reshape(8, 8) / 100, 1, constant_values=-1) for i in images[:10]], 1)
            for images in rows.values()
        ]
        axis.imshow(np.concatenate(strip, 0), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title, fontsize=9)
        axis.set_yticks([10 * i + 4.5 for i in range(len(strip))], list(rows), fontsize=7)
        axis.set_xticks([])
    STRIPS.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(STRIPS, dpi=100)
    plt.close(figure)
