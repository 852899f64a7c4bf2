"""How tempered particles choose their ladder: one system of them on its way from what it begins with to the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..paths.weights import effective_fraction
from ..precision import full_precision
from ..randomness import Place, derive_seed, generator_for
from .smc import resample
from .tempering import (
    ACCEPT,
    COARSEST,
    RESAMPLE,
    ROUGHEST,
    Kernel,
    Ladder,
    Points,
    Population,
    TemperedTarget,
    fit_gaussian,
    increment,
    leapfrog_steps_for,
    start_points,
)

MOST_LEVELS, _MOST_MOVES = 500, 24
_CORRELATION = 0.3  # of phi before and after the moves of a level, at which they are enough


class LadderError(RuntimeError):
    """No ladder to the target within the levels or evaluations that it may take."""


class Level(NamedTuple):
    """A level as it was chosen: rows of a :class:`Ladder`, and the effective fraction before its moves."""

    beta: float
    centre: Tensor
    factor: Tensor
    angle: float
    leapfrog_steps: int
    moves: int
    ess: float
    resampled: float


class Standing(NamedTuple):
    """Particles weighted for a level ``beta`` (``log_w`` is normalised), from which first ones they descend, and log
    Z^ of that level."""

    points: Points
    roots: Tensor
    log_w: Tensor
    beta: float
    log_z: float


class Ascent:
    """One system of particles on its way, which chooses levels and kernels as it goes.

    It may be left at any time: :meth:`result` is then what there is, by the weights of the level that it is at towards
    the target.

    Args:
        target, particles, seed, fraction, most_moves: of :func:`adapt`. last_moves: at the target at least.

    Attributes:
        now: where it stands. work: evaluations of phi so far. levels: those that are behind it.
    """

    def __init__(
        self,
        target: TemperedTarget,
        particles: int,
        seed: int,
        *,
        fraction: float = 0.7,
        most_moves: int = _MOST_MOVES,
        last_moves: int = 1,
    ) -> None:
        self.target, self.particles = target, particles
        self.fraction, self.most_moves, self.last_moves = fraction, most_moves, last_moves
        self.generator = generator_for(target.device, seed, Place.LADDER)
        p = start_points(target, particles, derive_seed(seed, Place.LADDER_POINTS))
        even = torch.full((particles,), -math.log(particles), dtype=torch.float64, device=p.z.device)
        self.now = Standing(p, torch.arange(particles, device=p.z.device), even, 0.0, 0.0)
        self.angle, self.work = 1.0 if target.smooth else 0.5, particles
        self.levels: list[Level] = []

    @property
    def nearest(self) -> Tensor | None:
        """The last level's factor."""
        return self.levels[-1].factor if self.levels else None

    def next_move(self) -> int:
        """Evaluations of phi that the next move takes."""
        steps = leapfrog_steps_for(self.angle, self.target.smooth)
        return self.particles * (steps + (self.target.law is not None))

    def level(self, may: Callable[[int], bool] = lambda work: True) -> None:
        """Go one level up: weigh, resample and move.

        Args:
            may: whether there may be so many evaluations more; moves end where not.
        """
        target, p = self.target, self.now.points
        beta = _next_beta(self.now.beta, p.phi, self.now.log_w, self.fraction)
        log_w = self.now.log_w + increment(beta - self.now.beta, p.phi)
        level = torch.logsumexp(log_w, 0)
        log_w, roots = log_w - level, self.now.roots
        centre, factor = fit_gaussian(p.z, log_w.exp(), self.nearest)
        ess = float(effective_fraction(log_w.exp()))
        if resampled := ess < RESAMPLE:
            chosen = resample(log_w.unsqueeze(0), self.particles, "systematic", self.generator)[0]
            p, roots = p.rows(chosen), roots[chosen]
            log_w = torch.full_like(log_w, -math.log(self.particles))
        self.now = Standing(p, roots, log_w, beta, self.now.log_z + float(level))
        began, moves = p.phi, 0
        leapfrog_steps = leapfrog_steps_for(self.angle, target.smooth)
        while moves < self.most_moves and may(self.next_move()):
            kernel = Kernel(beta, centre, factor, leapfrog_steps)
            p, accept = kernel.move(target, p, self.angle, self.generator)
            rate = float(accept.double().mean())
            self.work += self.particles * leapfrog_steps
            self.angle = min(COARSEST, max(ROUGHEST, self.angle * math.exp(rate - ACCEPT[target.smooth])))
            moves, leapfrog_steps = moves + 1, leapfrog_steps_for(self.angle, target.smooth)
            if target.law is not None:
                p = kernel.independence_move(target, p, self.generator)
                self.work += self.particles
            self.now = self.now._replace(points=p)
            enough = self.last_moves if beta == 1 else 1
            if moves >= enough and _correlation(began, p.phi, log_w.exp()) < _CORRELATION:
                break
        self.levels.append(Level(beta, centre, factor, self.angle, leapfrog_steps, moves, ess, float(resampled)))

    def climb(self, may: Callable[[int], bool] | None = None, most_levels: int = MOST_LEVELS) -> None:
        """To the target: with ``may``, through the levels that this allows, ``most_levels`` at most, and from there at
        once.

        Raises:
            LadderError: no end of levels, without ``may``.
        """
        while self.now.beta < 1:
            if may is not None and not (len(self.levels) < most_levels - 1 and may(self.next_move())):
                return self._jump()
            self.check()
            self.level(may or (lambda work: True))
        return None

    def check(self) -> None:
        """Raise where the ladder has too many levels."""
        if len(self.levels) == MOST_LEVELS:
            raise LadderError(
                f"tempering has reached beta = {self.now.beta:.3g} after {len(self.levels)} levels: the reference is "
                "too far from the target. Give a centre and a scale that cover it."
            )

    def _jump(self) -> None:
        """The target as the next level, without moves."""
        p, log_w = self.now.points, self.now.log_w + increment(1 - self.now.beta, self.now.points.phi)
        level, (centre, factor) = torch.logsumexp(log_w, 0), fit_gaussian(p.z, self.now.log_w.exp(), self.nearest)
        log_w = log_w - level
        self.now = Standing(p, self.now.roots, log_w, 1.0, self.now.log_z + float(level))
        ess = float(effective_fraction(log_w.exp()))
        self.levels.append(Level(1.0, centre, factor, self.angle, 1, 0, ess, 0.0))

    def result(self) -> tuple[Ladder, Population]:
        """The ladder, and the particles at the target."""
        if self.now.beta < 1 or not self.levels or self.levels[-1].beta < 1:  # or in the midst of the last level
            self._jump()
        p, roots, log_w, _, log_z = self.now
        columns = list(zip(*self.levels))
        as_double = lambda c: torch.tensor(c, dtype=torch.float64, device=p.z.device)  # noqa: E731
        betas, angles, fractions, resamplings = (as_double(columns[i]) for i in (0, 3, 6, 7))
        ladder = Ladder(
            betas,
            torch.stack(columns[1]),
            _alike(columns[2]),
            angles,
            torch.tensor(columns[4]),
            torch.tensor(columns[5]),
        )
        population = Population(
            z=p.z.unsqueeze(0),
            phi=p.phi.unsqueeze(0),
            origin=p.origin.unsqueeze(0),
            log_weights=log_w.unsqueeze(0),
            log_z=log_w.new_tensor([log_z]),
            ess=fractions,
            resampled=resamplings,
            evaluations=self.work,
            variance=ancestral_variance(roots, log_w.exp()),
        )
        return ladder, population


def _alike(factors: tuple[Tensor, ...]) -> Tensor:
    """Those of all levels, diagonal where all are."""
    if len({factor.ndim for factor in factors}) > 1:
        factors = tuple(torch.diag(factor) if factor.ndim == 1 else factor for factor in factors)
    return torch.stack(factors)


@full_precision()
def adapt(
    target: TemperedTarget,
    particles: int,
    seed: int,
    *,
    fraction: float = 0.7,
    most_moves: int = _MOST_MOVES,
    most_evaluations: int | None = None,
) -> tuple[Ladder, Population]:
    """Choose levels and kernels on one system of particles.

    Args:
        fraction: effective fraction that the incremental weights of a level keep.
        most_moves: at a level; fewer where phi is forgotten sooner.
        most_evaluations: that all of it may take; None: as many as it takes.

    Returns:
        The ladder, and the particles themselves: their Z^ has a bias of order 1/particles, since they chose the ladder.

    A :func:`run_tempered` with the same seed shares no draw with it.

    Raises:
        NonFiniteError: a log density that is -inf at all particles, nan or +inf. LadderError: no end of levels, or of
            evaluations.
    """
    ascent = Ascent(target, particles, seed, fraction=fraction, most_moves=most_moves)
    while ascent.now.beta < 1:
        ascent.check()
        if most_evaluations is not None and ascent.work + particles > most_evaluations:
            raise LadderError(f"{most_evaluations} evaluations are spent at beta = {ascent.now.beta:.3g}.")
        ascent.level()
    return ascent.result()


def _next_beta(beta: float, phi: Tensor, log_w: Tensor, fraction: float) -> float:
    """The largest next beta at which the incremental weights keep this (conditional) effective fraction."""

    def kept(new: float) -> float:
        step = increment(new - beta, phi)
        one, two = torch.logsumexp(log_w + step, 0), torch.logsumexp(log_w + 2 * step, 0)
        return float((2 * one - two).exp())

    if kept(1.0) >= fraction:
        return 1.0
    low, high = beta, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) >= fraction else (low, middle)
    return max(low, beta + 1e-12)


def ancestral_variance(roots: Tensor, weights: Tensor) -> float:
    """The relative variance of Z^ of one system, from which of N first particles its particles descend: the sum of
    squares of the families' shares, less that of equal ones (Chan & Lai 2013; Lee & Whiteley 2018, without its factor
    that tends to 1). What moves do not forget is in it, since families differ.

    Args:
        roots: ``(N,)`` the first ancestor of each. weights: ``(N,)``, normalised.
    """
    shares = weights.new_zeros(len(roots)).index_add_(0, roots, weights)
    return max(0.0, float(shares.square().sum()) - 1 / len(roots))


def _correlation(before: Tensor, after: Tensor, weights: Tensor) -> float:
    a, b = before.double(), after.double()
    a, b = a - (weights * a).sum(), b - (weights * b).sum()
    return float((weights * a * b).sum() / ((weights * a * a).sum() * (weights * b * b).sum()).sqrt().clamp(min=1e-300))
