"""The figure of a sampler: its samples, marginals beside exact ones, and its bounds of log Z."""

import math
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .certificates import Certificate
from .estimates import Estimate
from .evaluate import Evaluation
from .solution import Solution

_INK, _ACCENT, _SOFT, _EXACT, _WARM = "#1d2733", "#0b6e99", "#9fc3d4", "#c2410c", "#d97706"
_DOTS, _BEHIND = 3000, 20_000  # samples drawn as dots, and exact ones counted behind them
_COMPARED = 400  # samples whose dependence is measured
_MARGINALS = 3
_DEPENDENT = 0.3  # distance correlation of ranks from which two coordinates count as dependent (0.1 by chance)
_DEPTHS = (0.5, 1.5, 3.0, 5.0, 8.0, 12.0)  # nats below the highest density: the contours


def sample_figure(
    solution: Solution,
    samples: Tensor,
    *,
    exact: Tensor | None = None,
    exact_name: str = "exact samples",
    log_z: float | None = None,
    evaluation: Evaluation | None = None,
    certificate: Certificate | None = None,
    title: str = "",
) -> tuple[Any, Any]:
    """A solution of a Gibbs problem in three panels; ``(figure, axes)``, nothing is shown or written.

    Left: samples in two coordinates, over contours of the density where it has just two, else over the exact samples,
    where there are any. Middle: marginals of up to three coordinates. Right: the estimates of log Z, by round or
    iteration where the method has any.

    Args:
        samples: ``(n, dim)``, all of the same weight. exact: ``(m, dim)`` to hold them against, called ``exact_name``.
        log_z: the exact one. evaluation, certificate: of the solution; their bounds are drawn.
        title: of the figure.
    """
    x = samples.detach().double().cpu()
    truth = None if exact is None else exact.detach().double().cpu()
    figure: Any = Figure(figsize=(13, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.04, w_pad=0.08)
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.05, 0.95, 1.15])
    told = x if truth is None else truth
    pair, why = telling_coordinates(told)
    plane = left.subplots()
    _plane(plane, solution, x, truth, exact_name, pair, why)
    order = dict.fromkeys([*pair, *_unlike_gaussian(told).argsort(descending=True).tolist()])
    shown = sorted(list(order)[:_MARGINALS])
    margins = np.atleast_1d(middle.subplots(len(shown), 1))
    for axes, i in zip(margins, shown):
        _marginal(axes, i, x, truth, exact_name, first=i == shown[0])
    bounds = right.subplots()
    _bounds(bounds, solution, log_z, evaluation, certificate)
    for axes in (plane, *margins, bounds):
        axes.tick_params(labelsize=9, colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, color=_INK, fontsize=13, fontweight="bold")
    return figure, (plane, margins, bounds)


# ---------------------------------------------------------------- coordinates


def _unlike_gaussian(x: Tensor) -> Tensor:
    """1-Wasserstein distance of each standardised coordinate from N(0, 1), ``(d,)``."""
    z = (x - x.mean(0)) / x.std(0).clamp(min=1e-300)
    levels = (torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z)
    return (z.sort(0).values - torch.special.ndtri(levels).unsqueeze(1)).abs().mean(0)


def _dependence(x: Tensor) -> Tensor:
    """Distance correlations of the coordinates' ranks (Szekely, Rizzo & Bakirov 2007), ``(d, d)`` with 0 on the
    diagonal."""
    ranks = x.argsort(0).argsort(0).float().mT  # (d, n)
    apart = (ranks.unsqueeze(2) - ranks.unsqueeze(1)).abs()
    centred = apart - apart.mean(1, keepdim=True) - apart.mean(2, keepdim=True) + apart.mean((1, 2), keepdim=True)
    flat = centred.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    return (flat @ flat.mT).clamp(min=0).sqrt().fill_diagonal_(0.0)


def telling_coordinates(x: Tensor) -> tuple[tuple[int, int], str]:
    """The two coordinates of ``(n, d)`` samples that say most of their law, and why: the most dependent ones where any
    two are clearly dependent, else those least like a Gaussian. A single coordinate is returned twice."""
    if x.shape[1] <= 2:
        return (0, x.shape[1] - 1), ""
    odd = _unlike_gaussian(x)
    candidates = odd.topk(min(64, len(odd))).indices  # of many coordinates, the least Gaussian
    some = x[torch.linspace(0, len(x) - 1, min(_COMPARED, len(x))).long()]
    related = _dependence(some[:, candidates])
    if float(related.max()) > _DEPENDENT:
        i, j = (int(candidates[int(k)]) for k in divmod(int(related.argmax()), len(candidates)))
        return (min(i, j), max(i, j)), f"the most dependent of {x.shape[1]} coordinates"
    i, j = sorted(odd.topk(2).indices.tolist())
    return (i, j), f"the least Gaussian of {x.shape[1]} coordinates"


def _range(values: list[Tensor], cut: float) -> tuple[float, float]:
    """From the smallest to the largest of quantiles, with a margin."""
    ends = [torch.quantile(v, torch.tensor([cut, 1 - cut], dtype=v.dtype)) for v in values]
    low, high = min(float(e[0]) for e in ends), max(float(e[1]) for e in ends)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


# ---------------------------------------------------------------- panels


def _plane(
    axes: Any, solution: Solution, x: Tensor, truth: Tensor | None, name: str, pair: tuple[int, int], why: str
) -> None:
    both = [x] if truth is None else [x, truth]
    i, j = pair
    if i == j:
        axes.plot(range(len(x[:_DOTS])), x[:_DOTS, 0].numpy(), ".", ms=2, color=_ACCENT)
        axes.set(xlabel="sample", ylabel="x1")
        return
    cut = 0.0005 if x.shape[1] == 2 else 0.005
    (low, high), (bottom, top) = (_range([v[:, k] for v in both], cut) for k in (i, j))
    if x.shape[1] == 2:
        _contours(axes, solution, (low, high), (bottom, top))
    elif truth is not None:
        counts, across, up = np.histogram2d(
            *(truth[:_BEHIND, k].numpy() for k in (i, j)), bins=48, range=[[low, high], [bottom, top]]
        )
        counts = np.where(counts > 0, np.sqrt(counts), np.nan).T
        axes.pcolormesh(
            across,
            up,
            counts,
            cmap="Oranges",
            vmin=-0.3 * np.nanmax(counts),
            vmax=1.8 * np.nanmax(counts),
            rasterized=True,
        )
        axes.plot([], [], "s", ms=8, color="#fdae6b", label=name)
    dots = x[:_DOTS]
    axes.plot(
        dots[:, i].numpy(),
        dots[:, j].numpy(),
        ".",
        ms=2.2 if len(dots) > 1500 else 3.5,
        color=_ACCENT,
        alpha=0.55,
        mew=0,
        label="samples",
        zorder=3,
    )
    axes.set(xlim=(low, high), ylim=(bottom, top))
    axes.set_xlabel(f"x{i + 1}", color=_INK)
    axes.set_ylabel(f"x{j + 1}", color=_INK)
    axes.set_title(f"{len(dots)} samples" + (f"; {why}" if why else " over the density"), fontsize=10.5, color=_INK)
    if x.shape[1] > 2:
        legend = axes.legend(
            fontsize=8.5, loc="best", framealpha=0.85, edgecolor="none", handletextpad=0.3, borderpad=0.3
        )
        legend.get_lines()[-1].set(markersize=8, alpha=1)


def _contours(axes: Any, solution: Solution, across: tuple[float, float], up: tuple[float, float]) -> None:
    """Contours of the density itself, of two coordinates."""
    problem: Any = solution.problem
    a, b = (torch.linspace(*ends, 181, dtype=problem.dtype) for ends in (across, up))
    grid = torch.cartesian_prod(a, b).to(problem.device)
    with torch.no_grad(), problem.evaluating():
        value = torch.cat([problem.density(rows) for rows in grid.split(8192)]).double().cpu()
    value = (value - value[value.isfinite()].max()).nan_to_num(-1e30, neginf=-1e30).reshape(len(a), len(b)).mT
    levels = [-depth for depth in reversed(_DEPTHS)]
    image = value.numpy()
    axes.contourf(a.numpy(), b.numpy(), image, levels=[*levels, 1e-9], cmap="Oranges", vmin=-14, vmax=14)
    axes.contour(
        a.numpy(), b.numpy(), image, levels=levels, colors=_EXACT, linewidths=0.5, linestyles="solid", alpha=0.6
    )


def _marginal(axes: Any, i: int, x: Tensor, truth: Tensor | None, name: str, first: bool) -> None:
    both = [x[:, i]] if truth is None else [x[:, i], truth[:, i]]
    low, high = _range(both, 0.01)
    bins = np.linspace(low, high, int(min(80, max(20, len(x) ** 0.5))) + 1)
    width = bins[1] - bins[0]

    def density(values: Tensor) -> np.ndarray:  # of all samples, those beyond the ends of the axis among them
        return np.histogram(values.numpy(), bins)[0] / (len(values) * width)

    axes.stairs(density(x[:, i]), bins, fill=True, color=_SOFT, label="samples")
    if truth is not None:
        axes.stairs(density(truth[:, i]), bins, color=_EXACT, lw=1.3, label=name)
    axes.set(xlim=(low, high), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.set_ylabel(f"x{i + 1}", rotation=0, ha="right", va="center", color=_INK)
    if first:
        axes.set_title("marginals", fontsize=10.5, color=_INK, loc="left")
        axes.legend(
            fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0.1
        )


def _bounds(
    axes: Any, solution: Solution, log_z: float | None, evaluation: Evaluation | None, certificate: Certificate | None
) -> None:
    found = [] if certificate is None else [("EUBO", certificate.eubo, _WARM)]
    if evaluation is not None:
        found += [("log Z", evaluation.log_z, _INK), ("ELBO", evaluation.elbo, _ACCENT)]
    found = [bound for bound in found if math.isfinite(bound[1].value)]
    rounds = [row for row in solution.history if "levels" in row and "log_z" in row]
    axes.set_title("log Z, with standard errors", fontsize=10.5, color=_INK)
    if rounds:
        _rounds(axes, rounds, evaluation, log_z)
    elif solution.history:
        _iterations(axes, solution, found, log_z)
    else:
        _points(axes, found)
    if log_z is not None:
        axes.axhline(log_z, color=_EXACT, lw=1.2, ls="--", zorder=1, label=f"exact log Z = {log_z:.7g}")
    axes.set_ylabel("nats", color=_INK)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", color="#e4e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8.5, framealpha=0.85, edgecolor="none", loc="best")


def _rounds(axes: Any, rounds: list[dict[str, float]], evaluation: Evaluation | None, log_z: float | None) -> None:
    """log Z of each round, and the last word; rounds far off are triangles at the edge, with their number."""
    values = np.array([row["log_z"] for row in rounds])
    errors = np.array([row.get("log_z_stderr", row["objective_stderr"]) for row in rounds])
    steps = np.arange(1, len(rounds) + 1)
    last = evaluation.log_z if evaluation is not None else Estimate(float(values[-1]), float(errors[-1]))
    middle = last.value if log_z is None else log_z
    own = last.stderr if math.isfinite(last.stderr) else 0.0
    reach = 1.25 * max(
        float(np.quantile(np.abs(values - middle) + errors, 0.5, method="lower")),
        abs(last.value - middle) + 2 * own,
        1e-3,
    )
    inside = np.abs(values - middle) <= 3 * reach
    reach = max([reach, *(1.2 * (np.abs(values - middle) + errors)[inside])])
    axes.errorbar(
        steps[inside], values[inside], yerr=errors[inside], fmt="o", ms=5, color=_ACCENT, capsize=3, label="rounds"
    )
    for k in np.flatnonzero(~inside):
        up = values[k] > middle
        edge = middle + (0.9 if up else -0.9) * reach
        axes.plot(steps[k], edge, "^" if up else "v", color=_ACCENT, ms=7)
        text = str(Estimate(float(values[k]), float(errors[k])))
        place = {"xytext": (0, -9 if up else 9), "va": "top" if up else "bottom", "ha": "center", "rotation": 90}
        axes.annotate(text, (steps[k], edge), textcoords="offset points", fontsize=8.5, color=_INK, **place)
    if evaluation is not None:
        axes.errorbar(
            len(rounds) + 1, last.value, yerr=own, fmt="D", ms=6, color=_INK, capsize=3, label=f"final: {last}"
        )
    axes.set_ylim(middle - reach, middle + reach)
    ticks = steps[:: max(1, math.ceil(len(steps) / 8))].tolist()
    axes.set_xticks([*ticks, len(rounds) + 1], [*map(str, ticks), "final"])
    axes.set_xlim(0.5, len(rounds) + 1.5)
    axes.set_xlabel("round", color=_INK)


def _iterations(axes: Any, solution: Solution, found: list[tuple[str, Estimate, str]], log_z: float | None) -> None:
    """The ELBO of each iteration, its running mean, and the final bounds as lines."""
    value = np.array([row.get("objective", math.nan) for row in solution.history]) / solution.problem.alpha
    keep = np.isfinite(value)
    steps, value = np.arange(1, len(value) + 1)[keep], value[keep]
    finals = [e.value for name, e, _ in found if name != "EUBO"] + ([] if log_z is None else [log_z])
    if len(value):
        window = max(1, len(value) // 40)
        smooth = np.convolve(value, np.ones(window) / window, mode="valid")
        axes.plot(steps, value, color=_SOFT, lw=0.8)
        axes.plot(steps[window - 1 :], smooth, color=_ACCENT, lw=1.5, label="ELBO while training")
        axes.set_xlim(1, max(2, steps[-1]))
    for name, e, colour in found:
        axes.axhline(e.value, color=colour, lw=1.2, ls="-." if name == "EUBO" else ":", label=f"{name} = {e}")
    seen = [float(np.quantile(value, q)) for q in (0.2, 0.98)] if len(value) else []
    low, high = min([*seen, *finals], default=0.0), max([*seen, *finals], default=1.0)
    span = max(high - low, 1e-3)
    high = max([high, *(e.value for name, e, _ in found if name == "EUBO" and e.value - high < 2 * span)])
    axes.set_ylim(low - 0.35 * span, high + 0.2 * span)
    axes.set_xlabel("iteration", color=_INK)
    axes.set_title("bounds of log Z", fontsize=10.5, color=_INK)


def _points(axes: Any, found: list[tuple[str, Estimate, str]]) -> None:
    """Estimates side by side, of a method that trains nothing."""
    for k, (name, e, colour) in enumerate(reversed(found)):
        error = e.stderr if math.isfinite(e.stderr) else 0.0
        axes.errorbar(k, e.value, yerr=error, fmt="o", ms=6, color=colour, capsize=4, label=f"{name} = {e}")
    axes.set_xticks(range(len(found)), [name for name, _, _ in reversed(found)])
    axes.set_xlim(-0.7, max(1, len(found)) - 0.3)
    axes.margins(y=0.25)
