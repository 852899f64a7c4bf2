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
        f"A diffusion model of handwritten digits, tilted towards the digit {result.label}",
        color=_INK,
        fontsize=13,
        fontweight="bold",
    )
    shares = (*(r.share for r in result.samplers), result.tilt.share)
    images = (*(r.samples for r in result.samplers), result.tilted)
    titles = ("before", "guided", "one network", "exact answer")
    for axes, title, share, x in zip(top.subplots(1, 4), titles, shares, images):
        axes.imshow(_mosaic(x), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, color=_INK, fontsize=11)
        axes.set_xlabel(f"{share.value:.0%} classified as {result.label}", color=_INK, fontsize=9.5)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
    left, right = bottom.subplots(1, 2)
    _rewards(left, result)
    _curve(right, result)
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


def _rewards(axes: Any, result: DemoResult) -> None:
    """Reward against KL of the four; between the untuned model and the tilt, all that objectives forbid."""
    tilt = result.tilt
    points = [(s.evaluation.kl, s.evaluation.reward) for s in result.samplers] + [(tilt.kl, tilt.reward)]
    names = ("before", "guided", "one network", "exact answer")
    # reward - KL <= log Z whatever the sampler
    end = 1.15 * max(kl.value for kl, _ in points)
    axes.plot([0, end], [tilt.log_z.value, tilt.log_z.value + end], color=_INK, lw=1, ls="--")
    axes.annotate(
        "reward - KL = log Z", (0.02 * end, tilt.log_z.value), (4, -12), textcoords="offset points", fontsize=9
    )
    for (kl, reward), name, marker, colour in zip(points, names, "os^*", ("#8a949c", _ACCENT, "#c8553d", _INK)):
        axes.errorbar(
            kl.value,
            reward.value,
            xerr=2 * _known(kl.stderr),
            yerr=2 * _known(reward.stderr),
            fmt=marker,
            ms=11 if marker == "*" else 7,
            color=colour,
            label=name,
        )
    axes.set_xlabel("KL to the pre-trained model, nats", color=_INK)
    axes.set_ylabel("reward", color=_INK)
    axes.legend(frameon=False, loc="lower right", fontsize=9.5)
    _plain(axes, "what is gained, and what it costs")


def _known(error: float | None) -> float:
    return error if error is not None and np.isfinite(error) else 0.0


def _curve(axes: Any, result: DemoResult) -> None:
    """What the one network still differs by from the guidance while it learns."""
    value = np.array([m["loss"] for m in result.history])
    window = max(1, len(value) // 50)
    smooth = np.convolve(value, np.ones(window) / window, "valid")
    axes.plot(np.arange(1, len(value) + 1), value, color=_SOFT, linewidth=0.8)
    axes.plot(np.arange(window, len(value) + 1), smooth, color=_ACCENT, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlim(1, max(2, len(value)))
    axes.set_xlabel("iteration", color=_INK)
    axes.set_ylabel("nats", color=_INK)
    guided, network = (s.evaluation for s in (result.guided, result.network))
    _plain(axes, f"distillation; gaps: guided {guided.gap.value:.2f}, one network {network.gap.value:.2f} nats")


def _plain(axes: Any, title: str) -> None:
    axes.grid(axis="y", color="#e4e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, color=_INK, fontsize=10.5, loc="left")
