"""What particles say of the assumptions under which they were made: are states resolved, and is the target where it was
looked for?

A log Z can come out with a small error and be wrong: where the spacing of floating-point numbers at the states is not
small beside their spread (a time of 2.4e6 days known to 0.002), the density that is sampled is another one; and where
the reference's end does not cover the target, particles stay where the reference was.
"""

from typing import Any

import torch
from torch import Tensor

_SPACING = 0.02  # of a standard deviation: the log density of a typical state is then wrong by as much
_NARROWER, _OFF = 2.0, 4.0  # of the reference's scale, which is meant to be wider than the target
_WIDER = 100.0
_TAIL = 8.0  # half-widths of the central 68 per cent at which tails are cut off, as the pilot run does


def resolution_problems(problem: Any, x: Tensor, log_w: Tensor | None = None) -> list[str]:
    """What does not hold at weighted states, in words, the worst coordinate of each kind by name; none: an empty list.

    Args:
        problem: whose dtype the states have, and whose ``centre`` and ``scale`` they are compared with, where it is a
            Gibbs problem.
        x: states ``(n, *event)`` of numbers. log_w: their log weights ``(n,)``; None: equal ones.
    """
    if not x.is_floating_point():
        return []
    states = x.detach().flatten(1).double()
    weights = None if log_w is None else log_w.detach().double().flatten().softmax(0)
    mean, spread = _moments(states, weights)
    found, eps = [], torch.finfo(x.dtype).eps
    spacing = eps * mean.abs()
    if bool((coarse := spacing > _SPACING * spread).any()):
        i = int((spacing / spread.clamp(min=1e-300)).where(coarse, -1.0).argmax())
        found.append(
            f"x[{i}] is near {float(mean[i]):.10g} with standard deviation {float(spread[i]):.2g}, where {x.dtype} "
            f"numbers are {float(spacing[i]):.1g} apart: use dtype=torch.float64, or subtract an offset"
        )
    if problem.density is not None and (misplaced := _misplaced(problem, mean, spread)) is not None:
        found.append(misplaced)
    return found


def covers(problem: Any, x: Tensor, log_w: Tensor) -> bool:
    """Whether a Gibbs problem's reference covers weighted states of its target, and is not far wider than they are."""
    return _misplaced(problem, *_moments(x.detach().double(), log_w.detach().double().softmax(0))) is None


def _misplaced(problem: Any, mean: Tensor, spread: Tensor) -> str | None:
    centre = problem.centre.detach().double().flatten()
    scale = problem.scale.detach().double().expand(centre.shape)
    off, wider = (mean - centre).abs() / scale, spread / scale
    size = torch.maximum(off / _OFF, wider / _NARROWER)
    if float(size.max()) > 1:
        i = int(size.argmax())
        return (
            f"x[{i}] has mean {float(mean[i]):.3g} and standard deviation {float(spread[i]):.2g}, outside of the "
            f"reference, {float(centre[i]):.3g} +- {float(scale[i]):.2g}: pass centre= and scale= that cover it"
        )
    if float(wider.min()) < 1 / _WIDER:
        i = int(wider.argmin())
        return (
            f"x[{i}] has standard deviation {float(spread[i]):.2g}, {1 / max(float(wider[i]), 1e-300):.0f} times less "
            f"than the reference's scale {float(scale[i]):.2g}: pass scale=, one for each coordinate"
        )
    return None


def _moments(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each coordinate, tails cut off."""
    if weights is not None:
        rows = torch.searchsorted(weights.cumsum(0), (torch.arange(len(x), device=x.device) + 0.5) / len(x))
        x = x[rows.clamp(max=len(x) - 1)]
    levels = torch.tensor([0.02, 0.16, 0.5, 0.84, 0.98], dtype=x.dtype, device=x.device)
    lowest, low, middle, high, highest = torch.quantile(x[:: len(x) // 100_000 + 1], levels, dim=0)
    reach = torch.maximum(0.5 * _TAIL * (high - low), highest - lowest)
    x = torch.minimum(torch.maximum(x, middle - reach), middle + reach)
    return x.mean(0), x.std(0)
