"""The figure of a comparison: reward against KL."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation.estimates import Estimate
from .frontier import FrontierPoint

_MARKERS = "osD^vP*X<>hp"
_MOST = 1.6  # times the largest KL of a method: as far as the frontier is drawn


def reward_against_kl(
    rows: dict[str, dict[str, Estimate]], frontier: Sequence[FrontierPoint], alpha: float, running_cost: bool
) -> tuple[Any, Any]:
    """``(figure, axes)`` of the estimates of each label, and the frontier around ``alpha``; see
    :meth:`Comparison.figure`."""
    figure = Figure(figsize=(7, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    solved = {label: found for label, found in rows.items() if "reward" in found}
    kls = [found["kl"].value for found in solved.values() if "kl" in found]
    own = min(frontier, key=lambda p: abs(math.log(p.alpha / alpha)), default=None)
    right = _MOST * max([*kls, own.kl if own is not None else 0.0], default=1.0)
    if own is not None:
        shown = [p for p in frontier if p.kl <= right]
        axes.plot(
            [p.kl for p in shown], [p.reward for p in shown], color="0.35", lw=1.2, label="exact frontier", zorder=1
        )
        axes.plot(own.kl, own.reward, marker="+", ms=13, color="0.1", ls="", label=f"exact, alpha = {own.alpha:g}")
    for i, (label, found) in enumerate(solved.items()):
        reward, cost = found["reward"], found.get("running_cost", Estimate(0.0, 0.0))
        y, dy = reward.value - cost.value, math.hypot(reward.stderr, cost.stderr)
        colour = f"C{i % 10}"
        if "kl" not in found:
            axes.axhline(y, color=colour, ls="--", lw=1, label=f"{label} (KL not known)")
            continue
        kl = found["kl"]
        errors = [e if math.isfinite(e) else 0.0 for e in (kl.stderr, dy)]
        marker = _MARKERS[i % len(_MARKERS)]
        axes.errorbar(
            kl.value, y, xerr=errors[0], yerr=errors[1], fmt=marker, color=colour, ms=6, label=label, zorder=2
        )
    axes.set_xlabel("KL to the reference [nats]")
    axes.set_ylabel("reward less running cost" if running_cost else "reward")
    axes.set_xlim(left=min(0.0, *kls, 0.0) if kls else 0.0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    return figure, axes
