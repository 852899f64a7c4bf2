"""How a log density ratio's slope is fitted on paths of its own guidance: a regression on rows, states of these paths.

The guidance is ``c = A grad f``, and a value may be known well where its gradient is not. On paths of the guidance
itself the objective's derivative in c is ``E[(Y - f) xi]``, Y the log weight of what is still to come, and the KL is
``|c|^2/2``: so with ``d = c . xi`` (a difference of f along ``A^T xi``, no second derivative) the control that is
better to first order is the minimiser of ``E (Y - f - (d - d_old))^2``: for the coefficients of the last layer least
squares of Y on stochastic integrals of the features, a natural gradient step (Amari 1998). No gradient of the reward is
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..controls.guidance import ValueControl
from ..controls.ratio_value import RatioValue
from ..paths.paths import Paths
from .base import Run
from .ratio_fit import drawn, to_come

_RIDGES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
DECAYS = (1.0, 0.95, 0.85)  # of later steps' part in Y - f: less noise for some bias
_PAST = 0.6  # part of former rounds in the next one
_MOST = 1.0  # nats by which one least-squares step may move the paths


@dataclass
class Moments:
    """Per path, summed over steps, in float64: of the features' d second moments ``(P, P)``, and those with ``Y - f``
    for each of ``DECAYS``, ``(decays, P)``."""

    second: Tensor
    first: Tensor

    def absolute(self, at: Tensor) -> Moments:
        """The same of coefficients of which ``at`` is the origin of steps."""
        return Moments(self.second, self.first + self.second @ at)

    def plus(self, share: float, other: Moments) -> Moments:
        return Moments(self.second + share * other.second, self.first + share * other.first)

    def gain(self, step: Tensor) -> float:
        """What a step of the coefficients gains in the objective, in nats, to first order in the paths."""
        return float(self.first[0] @ step - 0.5 * step @ self.second @ step)

    def steps(self, ridge: float) -> Tensor:
        """The steps of ridge regression (relative to each coefficient's own moment), ``(decays, P)``, none longer than
        ``_MOST``."""
        scale = self.second.diagonal().clamp(min=1e-12).sqrt()
        matrix = self.second / scale / scale.unsqueeze(1)
        matrix.diagonal().add_(ridge)
        steps = torch.linalg.solve(matrix, (self.first / scale).mT).mT / scale
        longest = (2 * _MOST / ((steps @ self.second) * steps).sum(1).clamp(min=1e-300)).sqrt()
        return steps * longest.clamp(max=1.0).unsqueeze(1)


@dataclass
class Slopes:
    """What paths of the guidance say of its slope: moments of a quarter of them and of the rest; ``Y`` and f at all
    states, ``(K, paths)``; the paths without their steps."""

    held: Moments
    known: Moments
    to_come: Tensor
    f: Tensor
    paths: list[Paths]

    @property
    def whole(self) -> Moments:
        return Moments(0.25 * self.held.second, 0.25 * self.held.first).plus(0.75, self.known)


@torch.no_grad()
def observed(run: Run, control: ValueControl, n: int, number: int = 0) -> Slopes:
    """Paths of the guidance, the run's so-and-so-many-th ones, and what is seen on both sides of them."""
    value: Any = control.value
    see, displace, chain = value.seeing(run.chain), control.displacement(run.chain), run.chain
    s, size = value.relative(chain.times), 1e-2 if run.problem.dtype == torch.float32 else 1e-4
    hats = value.hats(s[:-1]).double()
    halves: list[list[Moments]] = [[], []]
    parts: list[tuple[Tensor, Tensor]] = []
    kept: list[Paths] = []
    for chunk, paths in drawn(run, control, n, number):
        y, x = paths.condition, paths.states
        gains, ratios = to_come(paths)
        total = torch.cat((gains - ratios, paths.reward.unsqueeze(0) / paths.alpha)) - value.level
        f, slopes = total.clone(), []  # at the end they are the same
        for k in range(chain.steps):
            move = size * displace(k, x[k], paths.noises[k], y)
            one, other = (value.features(see(k, x[k] + sign * move, y), s[k : k + 1]) for sign in (1.0, -1.0))
            f[k] = value.read((one + other) / 2, value.hats(s[k : k + 1]))
            slopes.append((one - other) / (2 * size))
        residuals = torch.stack([_decayed(total, f, decay) for decay in DECAYS])
        halves[bool(chunk % 4)].append(_moments(torch.stack(slopes), residuals, hats))
        parts.append((total[:-1], f[:-1]))
        kept.append(paths.without_steps())
    held, known = (
        Moments(sum(m.second for m in half) / len(half), sum(m.first for m in half) / len(half))  # type: ignore[arg-type]
        for half in halves
    )
    later, f = (torch.cat(part, 1) for part in zip(*parts))
    return Slopes(held, known, later, f, kept)


def _moments(d: Tensor, residuals: Tensor, hats: Tensor) -> Moments:
    """Of features' d ``(K, batch, J)``, residuals ``(decays, K, batch)`` and hat functions ``(K, knots)``."""
    knots, width = hats.shape[1], d.shape[2]
    each = (d.mT @ d / d.shape[1]).double()
    second = torch.einsum("kb,kc,kij->bicj", hats, hats, each).reshape(knots * width, -1)
    first = torch.einsum("kb,akj->abj", hats, torch.einsum("akn,knj->akj", residuals, d).double())
    return Moments(second, first.flatten(1) / d.shape[1])


def _decayed(total: Tensor, f: Tensor, decay: float) -> Tensor:
    """``Y - f`` ``(K, batch)`` less each step's mean, from both at all K + 1 times; the part of later steps decays
    (generalised advantages: Schulman et al. 2016, which are less noisy the better f is, and exact at decay 1)."""
    out = (total[:-1] - total[1:]) + (f[1:] - f[:-1])
    for k in range(len(out) - 2, -1, -1):
        out[k] += decay * out[k + 1]
    return out - out.mean(1, keepdim=True)


@torch.no_grad()
def fit_slopes(
    value: RatioValue, slopes: Slopes, past: Moments | None = None, least: float = 0.0
) -> tuple[float, Moments]:
    """Move the coefficients of the last layer by least squares, with the decay and the ridge of which held-out paths
    gain most; then the constants, so that f stays a value.

    Args:
        past: what former rounds have given: they count ``_PAST`` as much with each round, since their paths are of
            another control.
        least: nats that the step must gain.

    Returns:
        What the held-out paths gain in the objective, in nats, to first order (0: nothing is moved), and the moments of
        all rounds so far, of coefficients in place of their changes.
    """
    at = value.slopes.double().flatten()
    whole, known = slopes.whole.absolute(at), slopes.known.absolute(at)
    if past is not None:
        whole, known = whole.plus(_PAST, past), known.plus(_PAST, past)
    best, chosen = least, None
    relative = known.absolute(-at)
    for ridge in _RIDGES:
        for decay, step in enumerate(relative.steps(ridge)):
            if (found := slopes.held.gain(step)) > best:
                best, chosen = found, (ridge, decay)
    if chosen is None:
        return 0.0, whole
    calibrate(value, slopes)
    step = whole.absolute(-at).steps(chosen[0])[chosen[1]]
    value.slopes.add_(step.reshape(value.slopes.shape).to(value.slopes))
    return best, whole


@torch.no_grad()
def calibrate(value: RatioValue, slopes: Slopes) -> None:
    """The constant a(t) by logistic regression (Newton's method): slopes say nothing of it, and twists want a value."""
    hats = value.hats(value.relative(slopes.paths[0].times[:-1])).double()
    weight = (slopes.to_come - slopes.f).clamp(max=30.0).double().exp()
    move = hats.new_zeros(hats.shape[1])
    for _ in range(20):
        p = (hats @ move).sigmoid().unsqueeze(1)
        slope = hats.mT @ (p - weight * (1 - p)).mean(1)
        curvature = (hats * ((1 + weight) * p * (1 - p)).mean(1, keepdim=True)).mT @ hats
        step = torch.linalg.solve(curvature + 1e-6 * torch.eye(len(move)).to(curvature), slope)
        move -= step * min(1.0, 1.0 / max(float(step.abs().max()), 1e-12))
    value.constant.add_(move.to(value.constant))
