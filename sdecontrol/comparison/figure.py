"""The figure of a comparison: reward against KL."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .compare import Comparison

__all__ = ["reward_against_kl"]

_MARKERS = "osD^vP*X<>hp"
_MOST = 1.6  # times the largest KL of a method: as far as the frontier is drawn


def reward_against_kl(comparison: Comparison) -> tuple[Any, Any]:
    """``(figure, axes)``; see :meth:`Comparison.figure`."""
    figure = Figure(figsize=(7, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    solved = [row for row in comparison.rows if "reward" in row.estimates]
    kls = [row.estimates["kl"].value for row in solved if "kl" in row.estimates]
    own = min(comparison.frontier, key=lambda p: abs(math.log(p.alpha / comparison.problem.alpha)), default=None)
    right = _MOST * max([*kls, own.kl if own is not None else 0.0], default=1.0)
    if own is not None:
        shown = [p for p in comparison.frontier if p.kl <= right]
        axes.plot(
            [p.kl for p in shown], [p.reward for p in shown], color="0.35", lw=1.2, label="exact frontier", zorder=1
        )
        axes.plot(own.kl, own.reward, marker="+", ms=13, color="0.1", ls="", label=f"exact, alpha = {own.alpha:g}")
    for i, row in enumerate(solved):
        reward, cost = row.estimates["reward"], row.estimates.get("running_cost")
        y = reward.value - (cost.value if cost is not None else 0.0)
        dy = math.hypot(reward.stderr, cost.stderr) if cost is not None else reward.stderr
        colour = f"C{i % 10}"
        if "kl" not in row.estimates:
            axes.axhline(y, color=colour, ls="--", lw=1, label=f"{row.label} (KL not known)")
            continue
        kl = row.estimates["kl"]
        errors = [e if math.isfinite(e) else 0.0 for e in (kl.stderr, dy)]
        marker = _MARKERS[i % len(_MARKERS)]
        axes.errorbar(
            kl.value, y, xerr=errors[0], yerr=errors[1], fmt=marker, color=colour, ms=6, label=row.label, zorder=2
        )
    axes.set_xlabel("KL to the reference [nats]")
    axes.set_ylabel("reward" if comparison.problem.running_cost_function is None else "reward less running cost")
    axes.set_xlim(left=min(0.0, *kls, 0.0) if kls else 0.0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure, axes
