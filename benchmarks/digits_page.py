"""The page and the figures of the digits suite, from its cells."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .digits_problem import ALPHAS, LABEL, REWARDS, STEPS

__all__ = ["collapsed", "write_figures", "write_page"]

ROOT = Path(__file__).parents[1]
PAGE, NOTES = ROOT / "docs" / "tables" / "digits.md", ROOT / "docs" / "tables" / "digits_notes.md"
FIGURE, STRIPS = (ROOT / "docs" / "tables" / "images" / name for name in ("digits.png", "digits_samples.png"))
_TILT = "exact tilt"
#: shares of the exact tilt's below which a method's is called collapsed
_CLASSES, _NEIGHBOUR = 0.6, 0.75
_MARKERS = "osD^vP*X<>hp"


def _groups(cells: list[dict[str, Any]], order: list[str]) -> dict[tuple[str, float], dict[str, dict[str, Any]]]:
    """(reward, alpha) -> method -> its first seed's cell, in the order of the card."""
    found: dict[tuple[str, float], dict[str, dict[str, Any]]] = {}
    for reward, alphas in ALPHAS.items():
        for alpha in alphas:
            here = {c["method"]: c for c in cells if c["reward_name"] == reward and c.get("alpha") == alpha}
            if rows := {m: here[m] for m in order if m in here}:
                found[reward, alpha] = rows
    return found


def collapsed(cell: dict[str, Any], tilt: dict[str, Any]) -> bool:
    """Fewer effective classes or nearer neighbours than the exact tilt's by more than the shares above."""
    classes = math.exp(cell["class_entropy"] - tilt["class_entropy"])
    return classes < _CLASSES or cell["nearest_other"]["value"] < _NEIGHBOUR * tilt["nearest_other"]["value"]


def _pm(number: dict[str, float] | None) -> str:
    if number is None or number["value"] is None:
        return "–"
    value, error = number["value"], number.get("stderr")
    if not error or not math.isfinite(error):
        return f"{value:.3g}"
    digits = max(0, min(3, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _count(value: float) -> str:
    return f"{value:.0f}" if value < 1e4 else f"{value / 1000:.0f}k" if value < 1e6 else f"{value / 1e6:.2g}M"


def _row(cell: dict[str, Any], tilt: dict[str, Any]) -> str:
    classes = f"{math.exp(cell['class_entropy']):.1f}"
    near = cell["nearest_other"]["value"] / tilt["nearest_other"]["value"]
    data = cell["nearest_training"]["value"] / tilt["nearest_training"]["value"]
    flag = " **collapsed**" if collapsed(cell, tilt) else ""
    bound = "≤ " if cell.get("kl_is_a_bound") else ""
    if cell["method"] == _TILT:
        work = f"ESS {cell['effective']:.0f} | | "
    else:
        training, sampling = cell["training"], cell["sampling_per_1000"]
        seconds = f"{training['seconds']:.0f}" if cell["iterations"] else "–"
        calls = _count(training["reward_calls"]) if cell["iterations"] else "–"
        work = f"{seconds} | {calls} | {sampling['seconds']:.1f}, {_count(sampling['reward_calls'])}"
    return (
        f"| {cell['method']}{flag} | {_pm(cell['reward'])} | {bound}{_pm(cell['kl'])} | {_pm(cell['objective'])} | "
        f"{_pm(cell['gap'])} | {classes} | {near:.2f} | {data:.2f} | {cell['sliced_wasserstein']:.3f} | {work} |"
    )


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| method | reward | KL | objective | gap | classes | diversity | to data | sliced W1 | CPU-s of training | "
        "reward calls | 1000 samples: CPU-s, reward calls |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    tilt = rows.get(_TILT)
    if tilt is None:
        return []
    done = [c for c in rows.values() if "failed" not in c and c is not tilt]
    lines += [_row(c, tilt) for c in [tilt, *sorted(done, key=lambda c: c["gap"]["value"])]]
    lines += [f"| {c['method']} | {c['failed']} |" + " |" * 10 for c in rows.values() if "failed" in c]
    return lines


def write_page(cells: list[dict[str, Any]], order: list[str]) -> str:
    """Write ``docs/tables/digits.md`` and return it."""
    groups = _groups(cells, order)
    fronts = {c["reward_name"]: c for c in cells if "frontier" in c}
    budgets = sorted({c["budget_cpu_seconds"] for c in cells if c.get("budget_cpu_seconds")})
    parts = [
        "# Digits",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks digits` from the cells in `benchmarks/results/digits/` "
        "(`--page`: only the page). A noise-prediction network trained on scikit-learn's digits (the demo's, 8×8 "
        f"pixels in [-1, 1]) is tilted to three rewards; {STEPS} steps, finer towards the data; one seed; one thread. "
        f"Methods that train have {' or '.join(f'{b:g}' for b in budgets)} CPU-seconds each, batches of 128 and "
        "otherwise the defaults of `solve`: the control is a tuned copy of the network.",
        "",
        f"The exact law is that of the chain's own samples ({next(iter(fronts.values()))['n'] if fronts else 0} of "
        "them) with weights `exp(r/alpha)`: reward, KL and log Z with standard errors by the delta method, drawn only "
        "where at least 200 of them are effective and the weights' tail index is below 0.7. No sample law of the same "
        "KL has a larger reward than the frontier.",
        "",
        "Columns: **objective** `E r - alpha KL` of the paths; **gap** to the importance-sampled log Z, in nats; "
        "**classes** effective number of classes among the samples, the exponential of their entropy by the "
        "classifier; **diversity** mean distance of a sample to the nearest of 127 others, relative to the same of "
        "the exact tilt; **to data** mean distance to the nearest training image, relative to the same; **collapsed** "
        f"where classes fall below {_CLASSES:g} or diversity below {_NEIGHBOUR:g} of the exact tilt's; **sliced W1** "
        "to the exact tilt, in whose own row it is the sampling floor. For particles that are chosen in proportion to "
        "weights (SMC, softmax) KL and gap are upper bounds, from `E log Z^`.",
        "",
        "![reward against KL](images/digits.png)",
        "",
        "![samples](images/digits_samples.png)",
    ]
    for (reward, alpha), rows in groups.items():
        table = _table(rows)
        if not table:
            continue
        parts += ["", f"## {reward}, alpha = {alpha:g}", "", f"Reward: {REWARDS[reward]}.", "", *table]
    if NOTES.exists():
        parts += ["", NOTES.read_text().strip()]
    text = "\n".join(parts) + "\n"
    PAGE.write_text(text)
    return text


# ---------------------------------------------------------------------------------------- figures


def write_figures(cells: list[dict[str, Any]], order: list[str]) -> None:
    """Reward against KL, one panel per reward; and a strip of samples per method at each reward's first alpha."""
    import matplotlib

    matplotlib.use("Agg")
    fronts = {c["reward_name"]: c for c in cells if "frontier" in c}
    if fronts:
        _frontiers(cells, order, fronts)
        _strips(_groups(cells, order))


def _frontiers(cells: list[dict[str, Any]], order: list[str], fronts: dict[str, dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    methods = [m for m in order if m != _TILT]
    colours = plt.get_cmap("tab20")
    style = {m: (colours(i % 20), _MARKERS[i % len(_MARKERS)]) for i, m in enumerate(methods)}
    names = [r for r in ALPHAS if r in fronts]
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 5.6), squeeze=False, layout="constrained")
    shown: set[str] = set()
    for axis, reward in zip(axes[0], names):
        front = fronts[reward]["frontier"]
        kl, mean = [p["kl"]["value"] for p in front], [p["reward"]["value"] for p in front]
        error = [2 * p["reward"]["stderr"] for p in front]
        axis.plot(kl, mean, color="0.2", lw=1.4, zorder=1)
        axis.fill_between(
            kl, [m - e for m, e in zip(mean, error)], [m + e for m, e in zip(mean, error)], color="0.2", alpha=0.2
        )
        most = 1.5 * max(kl)
        _tilts(axis, cells, reward)
        outside = []
        for method in methods:
            beyond: list[tuple[float, float]] = []
            found = [c for c in cells if c["reward_name"] == reward and c.get("method") == method and "failed" not in c]
            colour, marker = style[method]
            for c in found:
                x, y = c["kl"]["value"], c["reward"]["value"]
                if x > most:
                    beyond.append((c["alpha"], x))
                    continue
                shown.add(method)
                first = c["alpha"] == ALPHAS[reward][0]
                axis.errorbar(
                    x,
                    y,
                    xerr=c["kl"]["stderr"],
                    yerr=c["reward"]["stderr"],
                    fmt=marker,
                    color=colour,
                    ms=8 if first else 5,
                    mfc="none" if c["kl_is_a_bound"] else colour,
                    mew=1.4,
                    elinewidth=0.8,
                    zorder=3,
                )
            if beyond:
                alphas, kls = (", ".join(v) for v in zip(*((f"{a:g}", f"{k:.0f}") for a, k in sorted(beyond))))
                outside.append(f"{method}: {kls} (α = {alphas})")
        if outside:
            text = "KL beyond the panel:\n" + "\n".join(outside)
            axis.text(0.98, 0.02, text, transform=axis.transAxes, ha="right", fontsize=7, color="0.35")
        title = {"class": f"class {LABEL}: log p({LABEL} | x)", "ink": "ink", "zip": "compressibility (black box)"}[
            reward
        ]
        axis.set(title=title, xlabel="KL to the pre-trained model [nats]", xlim=(-0.03 * most, most))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("reward")
    handles = [
        plt.Line2D([], [], color="0.2", lw=1.4, label="exact frontier ± 2 standard errors"),
        plt.Line2D([], [], color="k", marker="+", ms=11, ls="", label="exact tilt at alpha"),
        *(plt.Line2D([], [], color=style[m][0], marker=style[m][1], ls="", label=m) for m in methods if m in shown),
        plt.Line2D([], [], color="0.5", marker="o", mfc="none", ls="", label="open: KL is an upper bound"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


def _tilts(axis: Any, cells: list[dict[str, Any]], reward: str) -> None:
    """A cross for the exact tilt at each alpha."""
    for alpha in ALPHAS[reward]:
        for tilt in (c for c in cells if (c["reward_name"], c.get("method"), c.get("alpha")) == (reward, _TILT, alpha)):
            place = (tilt["kl"]["value"], tilt["reward"]["value"])
            axis.plot(*place, "+", color="k", ms=13, mew=1.6, zorder=2)
            axis.annotate(f"α = {alpha:g}", place, (-6, 8), textcoords="offset points", fontsize=8, ha="right")


def _strips(groups: dict[tuple[str, float], dict[str, dict[str, Any]]]) -> None:
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
