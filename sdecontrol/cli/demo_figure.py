"""The figure of ``sdecontrol demo``: samples before, after and exactly tilted, and the training curve."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .demo_run import DemoResult

_ROWS, _COLUMNS = 6, 8
_INK, _ACCENT, _SOFT = "#1d2733", "#0b6e99", "#9fc3d4"


def draw_figure(result: DemoResult, path: Path) -> None:
    """Write the figure to ``path``."""
    figure = Figure(figsize=(10, 6.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.25, 1], hspace=0.03)
    top, bottom = parts
    top.suptitle(
        f"A diffusion model of handwritten digits, tuned towards the digit {result.label}",
        color=_INK,
        fontsize=13,
        fontweight="bold",
    )
    shares = (*result.shares, result.tilt.share)
    titles = ("before tuning", "after tuning", "exact answer (importance sampling)")
    for axes, title, share, x in zip(top.subplots(1, 3), titles, shares, result.samples):
        axes.imshow(_mosaic(x), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, color=_INK, fontsize=11)
        axes.set_xlabel(f"{share.value:.0%} classified as {result.label}", color=_INK, fontsize=9.5)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    _curve(bottom.subplots(1, 1), result)
    figure.savefig(path, facecolor="white")


def _mosaic(x: Tensor) -> np.ndarray:
    """``(n, 1, 8, 8)`` as one picture, a white line between images."""
    images = x[: _ROWS * _COLUMNS, 0].clamp(-1, 1).detach().cpu().numpy()
    side = images.shape[-1] + 1
    canvas = np.full((_ROWS * side + 1, _COLUMNS * side + 1), -1.0)
    for i, image in enumerate(images):
        r, c = divmod(i, _COLUMNS)
        canvas[r * side + 1 : (r + 1) * side, c * side + 1 : (c + 1) * side] = image
    return canvas


def _curve(axes: Any, result: DemoResult) -> None:
    """The objective per iteration with its error, up to the estimated log Z that bounds it."""
    value = np.array([m["objective"] for m in result.history])
    error = np.array([m["objective_stderr"] for m in result.history])
    steps = np.arange(1, len(value) + 1)
    axes.fill_between(
        steps, value - 2 * error, value + 2 * error, color=_SOFT, alpha=0.5, linewidth=0, label="± 2 standard errors"
    )
    axes.plot(steps, value, color=_ACCENT, linewidth=1.4, label="objective, E reward - KL")
    log_z = result.tilt.log_z
    axes.axhline(
        log_z.value,
        color=_INK,
        linewidth=1.1,
        linestyle="--",
        label=f"log Z = {log_z.value:.2f} (estimated), the largest possible",
    )
    low = float(np.quantile(value, 0.02))
    axes.set_ylim(
        min(low, value[0]) if value[0] > 3 * log_z.value else low - 0.3, log_z.value + 0.12 * (log_z.value - low) + 0.1
    )
    axes.set_xlim(1, max(2, len(value)))
    axes.set_xlabel("iteration", color=_INK)
    axes.set_ylabel("nats", color=_INK)
    axes.grid(axis="y", color="#e4e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=9.5)
    axes.set_title(
        f"training curve: gap left {result.after.gap.value:.2f} nats, effective sample size "
        f"{result.after.ess.value:.0%}",
        color=_INK,
        fontsize=11,
        loc="left",
    )
