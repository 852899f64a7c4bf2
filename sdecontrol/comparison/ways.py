"""Whether a target has several ways, by a short run of particles: what a control learns from its own paths alone may
take one of them and never see the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..chains.base import Chain
from ..errors import NonFiniteError
from ..exact.quadratic import quadratic_terms
from ..particles.ascent import LadderError, adapt
from ..particles.tempering import NoiseTarget
from ..paths.weights import effective_number
from ..problems.problem import ControlProblem
from ..problems.simulate import simulate_chain
from ..randomness import Place, derive_seed

_PATHS = 1024  # of the reference
_REACHED = 0.05  # effective part of them from which the target is near the reference
_PARTICLES, _EVALUATIONS = 512, 150_000
_TIMES = 8  # at which states are looked at
_FEW, _DIRECTIONS = 8, 3  # coordinates that are looked at each; else so many directions of largest variance
_LEAST = 0.05  # of the target, on either side of a valley
_DEPTH = 0.4  # of the lower of its two peaks: what a valley is below
_GRID, _WIDTH = 128, 0.45  # points of a density estimate, and its kernel's width in units of spread n^(-1/5)


@torch.no_grad()
def smaller_way(problem: ControlProblem, chain: Chain) -> float | None:
    """The part of the target that takes the smaller of two ways which the reference's paths do not part into
    themselves, by particles tempered from the reference; None where there are none, or particles are not asked: the
    reference's paths reach the target, it is known to have one way, or particles do not come to it.

    Two ways: at some time, along some coordinate, the density of the target's states has a valley less than 0.4 times
    as high as either side's peak, with a twentieth of the target on either side, and that of the reference has none
    along that coordinate, at any time.
    """
    if not _asked(problem, chain):
        return None
    seed = derive_seed(0, Place.WAYS)  # the advice on a problem is the same at every call
    try:
        with problem.evaluating():
            own = simulate_chain(problem, chain, _PATHS, seed=seed)
            if float(effective_number(own.log_weights())) > _REACHED * _PATHS:
                return None
            target = NoiseTarget(problem, chain)
            target.smooth = False
            place = derive_seed(0, Place.WAYS_PARTICLES)
            _, found = adapt(target, _PARTICLES, place, most_evaluations=_EVALUATIONS)
            paths = target.paths(found.z[0], found.origin[0])
    except (LadderError, NonFiniteError):
        return None
    weights = found.log_weights[0].softmax(0).double()
    times = sorted({round(chain.steps * (i + 1) / _TIMES) for i in range(_TIMES)})
    even = torch.ones(_PATHS, dtype=torch.float64, device=weights.device) / _PATHS
    shares = []
    for mine, its in _seen(paths.states[times].double(), own.states[times].double()):
        if all(valley(values, even) is None for values in its):
            shares += [share for values in mine if (share := valley(values, weights)) is not None]
    return max(shares, default=None)


def _asked(problem: ControlProblem, chain: Chain) -> bool:
    """Whether ways may be missed: a pre-trained model's, a density's and a rare event's first choices look for modes by
    themselves. Nor is a reward without a gradient asked up to 150 000 times before anything is learned: a call of it
    may be dear."""
    reference = problem.reference
    return (
        chain.gaussian
        and problem.has_gradient
        and len(chain.event_shape) == 1
        and not (problem.density is not None or reference.pretrained or reference.tangential or problem.vanishes)
        and problem.condition is None
        and problem.stop is None
        and not reference.reverse_target
        and (reference.as_linear() is None or quadratic_terms(problem) is None)
    )


def _seen(target: Tensor, reference: Tensor) -> list[tuple[Tensor, Tensor]]:
    """States ``(T, n, d)`` of both along each coordinate, or along the directions in which the target varies most at
    its times, ``(T, n)`` each."""
    if target.shape[2] > _FEW:
        apart = (target - target.mean(1, keepdim=True)).flatten(0, 1)
        axes = torch.linalg.svd(apart, full_matrices=False).Vh[:_DIRECTIONS].mT
        target, reference = target @ axes, reference @ axes
    return list(zip(target.unbind(2), reference.unbind(2)))


def valley(values: Tensor, weights: Tensor) -> float | None:
    """The smaller part of weighted numbers ``(n,)`` on one side of the deepest valley of their density; None without
    one."""
    mean = weights @ values
    spread = float((weights @ (values - mean).square()).sqrt())
    if not spread > 1e-6 * (1 + float(mean.abs())):
        return None
    size = float(1 / weights.square().sum())
    width = _WIDTH * spread * size**-0.2
    points = torch.linspace(float(values.min()), float(values.max()), _GRID, dtype=values.dtype, device=values.device)
    kernels = (-0.5 * ((points.unsqueeze(1) - values) / width).square()).exp()
    density = kernels @ weights
    left, right = density.cummax(0).values, density.flip(0).cummax(0).values.flip(0)
    depth = density / torch.minimum(left, right)
    below = (values.unsqueeze(0) <= points.unsqueeze(1)).double() @ weights
    depth = depth.where(torch.minimum(below, 1 - below) >= _LEAST, torch.inf)
    deepest = int(depth.argmin())
    if not (math.isfinite(float(depth[deepest])) and float(depth[deepest]) < _DEPTH):
        return None
    return float(min(below[deepest], 1 - below[deepest]))
