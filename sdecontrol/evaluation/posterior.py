"""A solution of a density in the forms that other programs read: an ArviZ object, a data frame, a corner plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import check_name
from ..particles.smc import resample
from ..problems.parameters import Parameters
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..tensors import check_count
from .evaluate import Evaluation

_INK, _ACCENT, _TRUE = "#1d2733", "#0b6e99", "#c2410c"
_BINS, _LEVELS = 36, (0.39, 0.68, 0.95)  # shares of the samples inside contours
_MOST_SHOWN = 12


@dataclass(frozen=True)
class Posterior:
    """Draws of a density, in its user's parameters.

    Attributes:
        parameters: of the density. drawn: coordinates ``(chains, draws, dim)``, all of the same weight.
        weighted: coordinates ``(n, dim)`` with their log weights ``log_w``, ``(n,)``, towards the density; the mean of
            their exponentials is Z.
    """

    parameters: Parameters
    drawn: Tensor
    weighted: Tensor
    log_w: Tensor

    @property
    def columns(self) -> Tensor:
        """The numbers of the parameters at the draws, ``(draws, size)``, in the order of ``parameters.labels``."""
        return self.parameters.flat(self.drawn.flatten(0, 1)).detach().double().cpu()

    def variables(self, x: Tensor) -> dict[str, np.ndarray]:
        """Values of the parameters at coordinates ``(chains, draws, dim)``: arrays ``(chains, draws, *shape)`` by
        name."""
        parameters, shape = self.parameters, x.shape[:2]
        if parameters.named:
            found = parameters(x.flatten(0, 1))
            return {name: v.unflatten(0, shape).detach().double().cpu().numpy() for name, v in found.items()}
        flat = parameters.flat(x.flatten(0, 1)).unflatten(0, shape).detach().double().cpu().numpy()
        if parameters.labels == tuple(f"x[{i}]" for i in range(parameters.size)):
            return {"x": flat}
        return {name: flat[..., i] for i, name in enumerate(parameters.labels)}


def posterior_of(solution: Any, n: int, seed: int) -> Posterior:
    """n draws (of each chain as many as are needed).

    Raises:
        ValueError: the problem is no density, or one with conditions.
    """
    problem: Any = solution.problem
    if problem.density is None:
        raise ValueError("only solutions of gibbs_problem have a posterior; use sample and weighted_sample here.")
    if problem.condition is not None:
        raise ValueError("condition: there are many densities here; sample(n, condition=y) draws from one of them.")
    check_count("n", n)
    place = derive_seed(seed, Place.POSTERIOR_WEIGHTED)
    chains = getattr(solution, "coordinates_by_chain", None)
    if chains is not None:  # draws of Markov chains have no weights
        drawn = chains(n, place)
        flat = drawn.flatten(0, 1)
        return Posterior(problem.parameters, drawn, flat, torch.zeros(len(flat), dtype=torch.float64))
    x, log_w = solution.weighted_sample(n, place, raw=True)
    generator = generator_for(log_w.device, seed, Place.POSTERIOR_DRAWN)
    index = resample(log_w.double().unsqueeze(0), n, "systematic", generator)[0]
    index = index[torch.randperm(n, generator=generator, device=index.device)]
    return Posterior(problem.parameters, x[index].unsqueeze(0), x, log_w.double())


def to_dataframe(solution: Any, n: int, seed: int | None) -> Any:
    """See :meth:`Solution.to_dataframe`."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_dataframe needs pandas: pip install pandas (it comes with 'sdecontrol[arviz]')."
        ) from error
    found = posterior_of(solution, n, fresh_seed(seed))
    return pandas.DataFrame(found.columns.numpy(), columns=list(found.parameters.labels))


def to_arviz(solution: Any, n: int, seed: int | None, evaluation: Evaluation | None) -> Any:
    """See :meth:`Solution.to_arviz`."""
    try:
        import arviz_base
    except ImportError as error:
        raise ImportError("to_arviz needs arviz-base: pip install 'sdecontrol[arviz]'.") from error
    seed = fresh_seed(seed)
    known: Evaluation = (
        solution.evaluate(max(n, 64), seed=derive_seed(seed, Place.POSTERIOR_EVALUATION))
        if evaluation is None
        else evaluation
    )
    found = posterior_of(solution, n, seed)
    groups = {
        "posterior": found.variables(found.drawn),
        "weighted_posterior": found.variables(found.weighted.unsqueeze(0)),
        "weighted_sample_stats": {"log_weight": found.log_w.cpu().numpy()[None]},
    }
    attributes = _attributes(solution, known)
    return arviz_base.from_dict(groups, attrs={"posterior": attributes, "/": attributes})


def _attributes(solution: Any, evaluation: Evaluation) -> dict[str, Any]:
    """What is known of the draws beside them, as plain numbers and words."""
    from .. import __version__

    problem: Any = solution.problem
    return {
        "inference_library": "sdecontrol",
        "inference_library_version": __version__,
        "method": solution.method,
        "seed": -1 if solution.seed is None else solution.seed,
        "log_z": evaluation.log_z.value,
        "log_z_stderr": evaluation.log_z.stderr,
        "effective_fraction": evaluation.ess.value,
        "pareto_k": evaluation.pareto_k,
        "verdict": evaluation.verdict,
        "reliability": evaluation.reliability,
        "evaluations": problem.density.evaluations,  # all of them, whatever they were for
        "iterations": solution.iterations,
    }


# ---------------------------------------------------------------- figure


def plot_corner(
    solution: Any, n: int, seed: int | None, names: Sequence[str] | None, truth: Sequence[float] | None
) -> tuple[Any, Any]:
    """See :meth:`Solution.plot_corner`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = posterior_of(solution, n, fresh_seed(seed))
    labels, columns = list(found.parameters.labels), found.columns.numpy()
    if names is None:
        chosen = list(range(min(len(labels), _MOST_SHOWN)))
    else:
        for name in names:
            check_name("parameter", name, labels)
        chosen = [labels.index(name) for name in names]
    if truth is not None and len(truth) != len(chosen):
        raise ValueError(f"truth has {len(truth)} numbers, but {len(chosen)} parameters are shown.")
    size = len(chosen)
    figure: Any = Figure(figsize=(1.2 + 1.75 * size, 1.1 + 1.65 * size), dpi=120)
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(size, size, squeeze=False))
    figure.subplots_adjust(wspace=0.06, hspace=0.06, left=0.14, bottom=0.14, right=0.97, top=0.93)
    ends = [_ends(columns[:, i]) for i in chosen]
    for row, i in enumerate(chosen):
        for column, j in enumerate(chosen):
            panel = axes[row, column]
            if column > row:
                panel.set_visible(False)
                continue
            if row == column:
                _marginal(panel, columns[:, i], ends[row], labels[i])
            else:
                _pair(panel, columns[:, j], columns[:, i], ends[column], ends[row])
            if truth is not None:
                panel.axvline(truth[column], color=_TRUE, lw=1.0)
                if row != column:
                    panel.axhline(truth[row], color=_TRUE, lw=1.0)
            _dress(panel, labels[j] if row == size - 1 else "", labels[i] if column == 0 < row else "")
            if row < size - 1:
                panel.set_xticklabels([])
            if column > 0 or row == 0:
                panel.set_yticklabels([])
    return figure, axes


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = (float(v) for v in np.quantile(values, (0.002, 0.998)))
    margin = 0.06 * (high - low) or 0.5 * max(abs(low), 1.0)
    return low - margin, high + margin


def _dress(panel: Any, below: str, beside: str) -> None:
    panel.tick_params(labelsize=7, colors=_INK)
    panel.tick_params(axis="x", labelrotation=45)
    panel.locator_params(nbins=4)
    panel.set_xlabel(below, color=_INK, fontsize=9)
    panel.set_ylabel(beside, color=_INK, fontsize=9)


def _marginal(panel: Any, values: np.ndarray, ends: tuple[float, float], label: str) -> None:
    panel.hist(values, _BINS, range=ends, density=True, color=_ACCENT, alpha=0.35, histtype="stepfilled")
    low, middle, high = np.quantile(values, (0.16, 0.5, 0.84))
    for value, style in ((low, ":"), (middle, "-"), (high, ":")):
        panel.axvline(value, color=_INK, lw=0.9, ls=style)
    digits = max(0, 2 - math.floor(math.log10(max(high - low, 1e-12))))
    text = (
        f"{label} = {middle:.{min(digits, 8)}f} +{high - middle:.{min(digits, 8)}f} -{middle - low:.{min(digits, 8)}f}"
    )
    panel.set_title(text, fontsize=7.5, color=_INK)
    panel.set(xlim=ends, yticks=[])


def _pair(
    panel: Any, across: np.ndarray, up: np.ndarray, ends: tuple[float, float], heights: tuple[float, float]
) -> None:
    """Dots, and contours that hold given shares of the samples."""
    panel.plot(across, up, ",", color=_ACCENT, alpha=0.35)
    counts, xs, ys = np.histogram2d(across, up, bins=_BINS, range=[ends, heights])
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 1.2) ** 2)
    for axis in (0, 1):  # smoothed, so that contours are lines
        counts = np.apply_along_axis(lambda v: np.convolve(v, kernel / kernel.sum(), mode="same"), axis, counts)
    order = np.sort(counts.ravel())[::-1]
    inside = np.cumsum(order) / order.sum()
    levels = sorted({float(order[np.searchsorted(inside, level)]) for level in _LEVELS})
    middles = (0.5 * (xs[1:] + xs[:-1]), 0.5 * (ys[1:] + ys[:-1]))
    if len(levels) == len(_LEVELS) and levels[0] > 0:
        panel.contour(*middles, counts.T, levels=levels, colors=_INK, linewidths=0.8)
    panel.set(xlim=ends, ylim=heights)
