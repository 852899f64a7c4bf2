"""Particles of rare events, in the space of a path's noises: ladders of noise scales, or of events.

Where a reward is -inf at every path that the reference draws, a temperature changes nothing. Two ladders do:

* **noise scales** (nothing else need be known): laws ``N(z; 0, s_j^2 I) 1{phi(z) > -inf}``, ``s_0 > s_1 > ... > 1``. At
  the first scale, the smallest power of sqrt(2) at which enough of the paths have a reward that is a number, they are
  drawn outright (scaled-sigma sampling, Sun et al. 2015, IEEE TCAD 34); from one to the next they are weighted by
  ``N(z; 0, s'^2 I)/N(z; 0, s^2 I)``;
* **levels** of a function L of the path's end: laws ``N(z; 0, I) 1{L <= q_j}`` with ``q_0 > q_1 > ...``, at last those
  with ``phi > -inf`` (subset simulation, Au & Beck 2001; multilevel splitting, Cerou et al. 2012).

Then come temperatures: ``N(z; 0, I) 1{phi > -inf} exp(b_j phi)``, ``b_j`` from 0 to 1.

Particles are resampled and moved by preconditioned Crank-Nicolson steps ``z' = z cos(a) + s xi sin(a)`` (Cotter et al.
1202.0709), accepted by what the law has beyond its Gaussian. :func:`adapt_events` chooses the ladder on particles of
its own, :func:`run_events` climbs it with new ones: then ``E Z^ = Z`` for any number of particles, a system that has
lost all of them counting as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..paths.rows import by_chunks
from ..paths.weights import effective_fraction
from ..precision import full_precision
from ..randomness import Place, derive_seed, generator_for
from ..tensors import check_output
from .ascent import LadderError, adapt, ancestral_variance
from .smc import resample
from .tempering import Ladder, NoiseTarget, Population

_ENOUGH = 0.1  # of the paths of the first scale, that count
_WIDEST = 12  # powers of sqrt(2) that are tried: 64 times the noise
_KEPT = 0.5  # of the particles, from level to level: an effective fraction, or those beyond a quantile
_RESAMPLE = 0.6  # effective fraction below which a system is resampled
_ACCEPT = 0.3  # wanted acceptance of moves
_CORRELATION = 0.2  # of what the next level asks, before and after the moves of one
_MOST_MOVES, _MOST_LEVELS = 20, 400
_ROWS = 16384  # particles moved at once


@dataclass(frozen=True)
class EventLadder:
    """Levels and their moves.

    Attributes:
        scales: ``(J,)`` of the noise at each level; all 1 where levels are events.
        thresholds: ``(J,)`` of the level function; inf where it plays no part.
        exponents: ``(J,)`` of ``exp(phi)``, 0 where it only has to be above 0; -1 where it plays no part.
        angles: ``(J,)`` of a move; moves: ``(J,)``.
    """

    scales: Tensor
    thresholds: Tensor
    exponents: Tensor
    angles: Tensor
    moves: Tensor

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def work(self) -> int:
        """Evaluations that one particle costs."""
        return 1 + int(self.moves.sum())


class Level(NamedTuple):
    """The law of a level: ``N(z; 0, scale^2 I)``, times ``1{L <= threshold}``, times ``1{phi > -inf} exp(exponent
    phi)`` but for an exponent of -1."""

    scale: float
    threshold: float
    exponent: float

    def beyond(self, phi: Tensor, levels: Tensor) -> Tensor:
        """The logarithm of what it has beyond its Gaussian."""
        if self.exponent < 0:
            return torch.where(levels <= self.threshold, torch.zeros_like(phi), -math.inf)
        counts = (phi > -math.inf) & (levels <= self.threshold)
        return torch.where(counts, self.exponent * torch.where(counts, phi, 0.0), -math.inf)


#: noises, origins, phi, and the level function's values
class _Points(NamedTuple):
    z: Tensor
    origin: Tensor
    phi: Tensor
    levels: Tensor

    def rows(self, index: Tensor) -> _Points:
        return _Points(*(part[index] for part in self))


def _points(target: NoiseTarget, level: Callable[[Tensor], Tensor] | None, z: Tensor, origin: Tensor) -> _Points:
    def of(z: Tensor, origin: Tensor) -> list[Tensor]:
        paths = target.paths(z, origin, "end")
        phi = paths.log_weights().double()
        if level is None:
            return [phi, torch.full_like(phi, -math.inf)]
        with torch.no_grad():
            ends = paths.samples
            found = check_output("level", level(ends), (len(z),), z, "One number per row.")
        return [phi, found.double()]

    phi, levels = by_chunks(of, target.batch_size, z, origin)
    if bool(levels.isnan().any()):
        raise NonFiniteError("level is nan at some ends of paths; it must be a number everywhere.", what="level")
    return _Points(z, origin, phi, levels)


def _start(target: NoiseTarget, level: Callable[[Tensor], Tensor] | None, n: int, scale: float, seed: int) -> _Points:
    generator = generator_for(target.device, seed, Place.EVENT_POINTS)
    z = scale * torch.randn((n, target.dim), generator=generator, dtype=target.dtype, device=target.device)
    return _points(target, level, z, target.draw_origin(n, derive_seed(seed, Place.EVENT_START)))


def _first(target: NoiseTarget, level: Callable[[Tensor], Tensor] | None, n: int, power: int, seed: int) -> _Points:
    """Particles of ``sqrt(2)^power`` times the noise, by which a ladder begins."""
    return _start(target, level, n, 2 ** (power / 2), derive_seed(seed, Place.EVENT_SCALE, power))


def _increment(before: Level | None, after: Level, p: _Points) -> Tensor:
    """The logarithm of one law over the one before, at the particles; those beyond either have -inf."""
    new = after.beyond(p.phi, p.levels)
    if before is None:
        return new
    old = before.beyond(p.phi, p.levels)
    change = torch.where(new > -math.inf, new - old.clamp(min=-1e300), -math.inf)
    if before.scale != after.scale:
        square = p.z.double().square().sum(1)
        narrower = 1 / after.scale**2 - 1 / before.scale**2
        change = change + p.z.shape[1] * math.log(before.scale / after.scale) - 0.5 * narrower * square
    return change


def _move(
    target: NoiseTarget,
    level: Callable[[Tensor], Tensor] | None,
    law: Level,
    p: _Points,
    angle: float,
    generator: torch.Generator,
) -> tuple[_Points, float]:
    """The particles after a move, and the part that moved."""
    xi = torch.randn(p.z.shape, generator=generator, dtype=p.z.dtype, device=p.z.device)
    uniform = torch.rand(len(p.z), generator=generator, dtype=torch.float64, device=p.z.device)
    new = _points(target, level, math.cos(angle) * p.z + math.sin(angle) * law.scale * xi, p.origin)
    gain = law.beyond(new.phi, new.levels) - law.beyond(p.phi, p.levels).clamp(min=-1e300)
    accept = uniform.log() < gain
    pick = lambda a, b: torch.where(accept.reshape(-1, *(1,) * (a.ndim - 1)), a, b)  # noqa: E731
    return _Points(*(pick(a, b) for a, b in zip(new, p))), float(accept.double().mean())


@torch.no_grad()
@full_precision()
def is_rare(target: NoiseTarget, particles: int, seed: int) -> bool:
    """Whether so few of the paths have a reward that is a number that temperatures do not find the way."""
    p = _first(target, None, particles, 0, seed)
    return _share(p.phi) < _ENOUGH


def _share(phi: Tensor) -> float:
    """Of the particles, how many count."""
    return float((phi > -math.inf).double().mean())


class _Climb:
    """One system of particles on its way, choosing the ladder as it goes."""

    def __init__(
        self, target: NoiseTarget, level: Callable[[Tensor], Tensor] | None, particles: int, seed: int
    ) -> None:
        self.target, self.level, self.n = target, level, particles
        self.seed, self.generator = seed, generator_for(target.device, seed, Place.EVENT_LADDER)
        self.work, self.log_z, self.angle = 0, 0.0, 0.5
        self.found: list[tuple[float, ...]] = []
        self.facts: list[tuple[float, float]] = []

    def begin(self) -> Level | None:
        """The first particles: of the noise itself where levels are events, else of the smallest scale at which enough
        of them count."""
        self.p = _first(self.target, self.level, self.n, 0, self.seed)
        self.work += self.n
        self.scale = 1.0
        if self.level is None:
            self._widen()
        self.roots = torch.arange(self.n, device=self.p.z.device)
        self.log_w = torch.full((self.n,), -math.log(self.n), dtype=torch.float64, device=self.p.z.device)
        return None

    def _widen(self) -> None:
        for power in range(1, _WIDEST + 1):
            if _share(self.p.phi) >= _ENOUGH:
                return
            try:
                self.p = _first(self.target, None, self.n, power, self.seed)
            except NonFiniteError:  # the process does not bear so much noise
                break
            self.scale, self.work = 2 ** (power / 2), self.work + self.n
        if _share(self.p.phi) * self.n < 4:
            raise LadderError(
                f"the reward is -inf at all but a few paths, even with {self.scale:.3g} times the noise, so that "
                "nothing shows where it is a number. Say it by a level function: TemperedSMC(level=phi), phi(x) the "
                "smaller the nearer; or write the reward without -inf."
            )

    def next_law(self, before: Level | None) -> Level:
        """The farthest law that keeps enough of the particles."""
        event = Level(1.0, math.inf, 0.0)
        if before is None and self.level is None:
            return Level(self.scale, math.inf, 0.0)
        if before is None or before.exponent < 0:
            return event if self._kept(before, event) >= 0.5 * _KEPT else self._next_event(before)
        if before.scale > 1:
            return self._farthest(before, lambda part: Level(before.scale ** (1 - part), math.inf, 0.0))
        rest = 1 - before.exponent
        return self._farthest(before, lambda part: Level(1.0, math.inf, 1 - rest * (1 - part)))

    def _farthest(self, before: Level, at: Callable[[float], Level]) -> Level:
        low, high = 0.0, 1.0
        if self._kept(before, at(1.0)) >= _KEPT:
            return at(1.0)
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self._kept(before, at(middle)) >= _KEPT else (low, middle)
        return at(low)

    def _kept(self, before: Level | None, after: Level) -> float:
        """The (conditional) effective fraction of the incremental weights."""
        step = _increment(before, after, self.p)
        one, two = torch.logsumexp(self.log_w + step, 0), torch.logsumexp(self.log_w + 2 * step, 0)
        return float((2 * one - two).exp()) if float(one) > -math.inf else 0.0

    def _next_event(self, before: Level | None) -> Level:
        order = self.p.levels.argsort()
        share = self.log_w.exp()[order].cumsum(0)
        found = float(self.p.levels[order[int((share < _KEPT).sum().clamp(max=self.n - 1))]])
        if before is not None and found >= before.threshold:
            smaller = self.p.levels[self.p.levels < before.threshold]
            if not len(smaller):
                raise LadderError(
                    f"level is {before.threshold:.4g} at all particles of a level, none of which counts: below that it "
                    "does not tell the nearer from the farther. It must fall up to the states whose reward is a number."
                )
            found = float(smaller.max())
        return Level(1.0, found, -1.0)

    def take(self, before: Level | None, law: Level) -> None:
        """Weight the particles for a law, resample and move them."""
        self.log_w = self.log_w + _increment(before, law, self.p)
        total = torch.logsumexp(self.log_w, 0)
        self.log_z, self.log_w = self.log_z + float(total), self.log_w - total
        ess = float(effective_fraction(self.log_w.exp()))
        if resampled := ess < _RESAMPLE:
            rows = resample(self.log_w.unsqueeze(0), self.n, "systematic", self.generator)[0]
            self.p, self.roots = self.p.rows(rows), self.roots[rows]
            self.log_w = torch.full_like(self.log_w, -math.log(self.n))
        began, moves = self._asked(law), 0
        while moves < _MOST_MOVES:
            self.p, rate = _move(self.target, self.level, law, self.p, self.angle, self.generator)
            self.angle = min(0.5 * math.pi, max(1e-3, self.angle * math.exp(rate - _ACCEPT)))
            moves, self.work = moves + 1, self.work + self.n
            if abs(float(torch.corrcoef(torch.stack((began, self._asked(law))))[0, 1].nan_to_num(0.0))) < _CORRELATION:
                break
        self.found.append((law.scale, law.threshold, law.exponent, self.angle, moves))
        self.facts.append((ess, float(resampled)))

    def _asked(self, law: Level) -> Tensor:
        """What the next level asks of the particles."""
        if law.exponent < 0:
            return self.p.levels
        return self.p.z.double().square().sum(1) if law.scale > 1 else self.p.phi


@torch.no_grad()
@full_precision()
def adapt_events(
    target: NoiseTarget,
    particles: int,
    seed: int,
    level: Callable[[Tensor], Tensor] | None = None,
) -> tuple[EventLadder, Population]:
    """Choose a ladder on one system of particles.

    Args:
        level: of the (decoded) ends of paths, ``(n,)``, the smaller the nearer to where the reward is a number; None:
            noise scales.

    Returns:
        The ladder, and the particles; their Z^ has a bias of order 1/particles, since they chose it.

    Raises:
        LadderError: nothing shows the way.
    """
    climb = _Climb(target, level, particles, seed)
    law = climb.begin()
    while law is None or law.exponent < 1 or law.scale > 1:
        if len(climb.found) == _MOST_LEVELS:
            raise LadderError(f"after {_MOST_LEVELS} levels the event is not reached.")
        new = climb.next_law(law)
        climb.take(law, new)
        law = new
    columns = [torch.tensor(column, dtype=torch.float64, device=target.device) for column in zip(*climb.found)]
    ladder = EventLadder(*columns[:4], moves=columns[4].long())
    ess, resampled = (torch.tensor(v, dtype=torch.float64, device=target.device) for v in zip(*climb.facts))
    log_z = torch.tensor([climb.log_z], dtype=torch.float64, device=target.device)
    p, log_w = climb.p, climb.log_w
    z, phi, origin = (v.unsqueeze(0) for v in (p.z, p.phi, p.origin))
    variance = ancestral_variance(climb.roots, log_w.exp())
    return ladder, Population(z, phi, origin, log_w.unsqueeze(0), log_z, ess, resampled, climb.work, variance)


@full_precision()
def climb(
    target: NoiseTarget, particles: int, seed: int, level: Callable[[Tensor], Tensor] | None = None
) -> tuple[Ladder | EventLadder, Population]:
    """:func:`adapt_events` with a level function, or where hardly any path has a reward that is a number; else
    temperatures (:func:`~.ascent.adapt`)."""
    if level is not None or (target.problem.vanishes and is_rare(target, particles, seed)):
        return adapt_events(target, particles, seed, level)
    return adapt(target, particles, seed)


@torch.no_grad()
@full_precision()
def run_events(
    target: NoiseTarget,
    ladder: EventLadder,
    systems: int,
    particles: int,
    seed: int,
    level: Callable[[Tensor], Tensor] | None = None,
) -> Population:
    """Run independent systems of particles up a given ladder: ``E exp(log_z) = Z`` for each; -inf where a system has
    lost all of its particles."""
    M, N = systems, particles
    size = max(1, _ROWS // N)
    if size < M:
        groups = [(low, min(size, M - low)) for low in range(0, M, size)]
        parts = [
            run_events(target, ladder, count, N, derive_seed(seed, Place.EVENT_GROUP, low), level)
            for low, count in groups
        ]
        names = ("z", "phi", "origin", "log_weights", "log_z")
        joined: dict[str, Any] = {name: torch.cat([getattr(q, name) for q in parts]) for name in names}
        share = torch.tensor([count / M for _, count in groups], dtype=torch.float64, device=target.device)
        means: dict[str, Any] = {
            name: share @ torch.stack([getattr(q, name) for q in parts]) for name in ("ess", "resampled")
        }
        return Population(**joined, **means, evaluations=sum(q.evaluations for q in parts))
    generator = generator_for(target.device, seed, Place.EVENTS)
    laws = [Level(*map(float, row)) for row in zip(ladder.scales, ladder.thresholds, ladder.exponents)]
    p = _start(target, level, M * N, laws[0].scale, seed)
    log_w = p.phi.new_full((M, N), -math.log(N))
    log_z, own = log_w.new_zeros(M), torch.arange(M * N, device=p.z.device).reshape(M, N)
    before, facts = None, []
    for j, law in enumerate(laws):
        log_w = log_w + _increment(before, law, p).reshape(M, N)
        total = log_w.logsumexp(1)
        lost = (total == -math.inf).unsqueeze(1)
        log_w = torch.where(lost, -math.log(N), log_w - total.unsqueeze(1))
        log_z, before = log_z + total, law
        ess = torch.where(lost[:, 0], 0.0, effective_fraction(log_w.exp(), 1))
        poor = (ess < _RESAMPLE).unsqueeze(1) & ~lost
        if bool(poor.any()):
            chosen = own[:, :1] + resample(log_w, N, "systematic", generator)
            p = p.rows(torch.where(poor, chosen, own).flatten())
            log_w = torch.where(poor, -math.log(N), log_w)
        for _ in range(int(ladder.moves[j])):
            p, _ = _move(target, level, law, p, float(ladder.angles[j]), generator)
        facts.append((float(ess.mean()), float(poor.double().mean())))
    ess, resampled = (torch.tensor(v, dtype=torch.float64, device=target.device) for v in zip(*facts))
    z, phi, origin = (v.unflatten(0, (M, N)) for v in (p.z, p.phi, p.origin))
    return Population(z, phi, origin, log_w, log_z, ess, resampled, M * N * ladder.work)
