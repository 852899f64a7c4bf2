"""The figure of a control: its paths beside the reference's, the control along them, what it costs, and the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..paths.paths import Paths

#: ``value(x, t, n, condition)``, estimated from n paths from each state.
Value = Callable[[Tensor, float, int, Any], Tensor]

_INK, _ACCENT, _SOFT, _GREY, _WARM = "#1d2733", "#0b6e99", "#9fc3d4", "#8a94a0", "#c2410c"
_SHOWN = 24  # paths drawn as lines
_COORDINATES = 3
_BAND = (0.1, 0.9)
_TIMES = 9  # at which values are estimated
_INNER = 128  # paths of an estimate of a value
_VALUED = 8  # paths along which they are


def path_figure(own: Paths, free: Paths, value: Value, title: str = "") -> tuple[Any, Any]:
    """A control in panels, ``(figure, axes)``; nothing is shown or written.

    Above: up to three coordinates of the state, those whose ends the control moves most in units of the reference's
    spread; its own paths, their median and the band of 80 % of them, and the reference's band in grey. Below, left: as
    many of the control. Middle: what has been spent until t, in the reward's units: ``alpha KL`` and the running cost;
    and the reward at the end. Right: the value along a few paths.

    Args:
        own, free: paths of the control, which know their problem, and of the reference. value: estimated.
    """
    shown = _most_moved(own, free)
    figure: Any = Figure(figsize=(4.3 * max(3, len(shown)), 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1)
    tops = np.atleast_1d(above.subplots(1, len(shown)))
    for axes, i in zip(tops, shown):
        _coordinate(axes, own, free, i)
    tops[0].legend(frameon=False, fontsize=9)
    left, middle, right = below.subplots(1, 3)
    _control(left, own)
    _spent(middle, own)
    _value(right, own, value)
    for axes in (*tops, left, middle, right):
        axes.set_xlabel("t")
        axes.tick_params(labelsize=9, colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, color=_INK, fontsize=13, fontweight="bold")
    return figure, (*tops, left, middle, right)


def _most_moved(own: Paths, free: Paths) -> list[int]:
    """Coordinates by how far the control moves the mean or the spread of their ends."""
    ends = [p.states[-1].flatten(1).double() for p in (own, free)]
    spread = ends[1].std(0)
    moved = (ends[0].mean(0) - ends[1].mean(0)).square() + (ends[0].std(0) - spread).square()
    moved = moved / spread.square().clamp(min=1e-12)
    return sorted(moved.topk(min(_COORDINATES, len(moved))).indices.tolist())


def _quantiles(values: Tensor) -> Tensor:
    """Low, median, high of ``(steps, n)`` over n."""
    levels = torch.tensor([_BAND[0], 0.5, _BAND[1]], dtype=torch.float64)
    return torch.quantile(values.detach().double().cpu(), levels, dim=1)


def _band(axes: Any, times: Any, values: Tensor, colour: str, label: str | None, line: bool = True) -> None:
    low, middle, high = _quantiles(values)
    axes.fill_between(times, low, high, color=colour, alpha=0.22, lw=0)
    axes.plot(times, middle, color=colour, lw=2 if line else 1, ls="-" if line else "--", label=label)


def _coordinate(axes: Any, own: Paths, free: Paths, i: int) -> None:
    times = np.asarray(own.chain.clock)
    mine = own.states.flatten(2)[:, :, i]
    _band(axes, times, free.states.flatten(2)[:, :, i], _GREY, "reference", line=False)
    axes.plot(times, mine[:, :_SHOWN].detach().cpu().numpy(), color=_SOFT, lw=0.6)
    _band(axes, times, mine, _ACCENT, "controlled")
    axes.set_title(f"state, coordinate {i + 1}", color=_INK, fontsize=11)


def _control(axes: Any, own: Paths) -> None:
    u = own.controls.flatten(2)
    most = u.detach().square().mean((0, 1)).topk(min(_COORDINATES, u.shape[2])).indices.sort().values.tolist()
    for i, colour in zip(most, (_ACCENT, _WARM, _GREY)):
        _band(axes, np.asarray(own.chain.clock[own.chain.start : -1]), u[:, :, i], colour, f"u{i + 1}")
    axes.set_title("control", color=_INK, fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _spent(axes: Any, own: Paths) -> None:
    spent = {"alpha KL": own.alpha * own.kl(per_step=True), "running cost": -own.alpha * own.log_target()}
    for (name, values), colour in zip(spent.items(), (_ACCENT, _WARM)):
        sums = values.detach().double().cpu().mean(1).cumsum(0).tolist()
        if any(sums):
            axes.plot(own.chain.clock, [0.0, *sums], color=colour, lw=2, label=name)
    reward = float(own.reward.double().mean())
    axes.axhline(reward, color=_INK, lw=1.2, ls=":", label=f"reward at the end, {reward:.3g}")
    axes.set_title("spent until t, means", color=_INK, fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _value(axes: Any, own: Paths, value: Value) -> None:
    chain, few = own.chain, slice(0, _VALUED)
    steps = sorted({round(k) for k in np.linspace(chain.start, chain.steps - 1, _TIMES)})
    y = None if own.condition is None else own.condition[few]
    values = [value(own.states[k][few], chain.clock[k], _INNER, y) for k in steps]
    v = torch.stack([*values, own.reward[few]]).detach().double().cpu()
    times = [chain.clock[k] for k in (*steps, chain.steps)]
    axes.plot(times, v.numpy(), color=_SOFT, lw=0.8)
    axes.plot(times, v.mean(1), color=_ACCENT, lw=2, marker=".")
    axes.set_title(f"estimated value along {v.shape[1]} paths", color=_INK, fontsize=11)
