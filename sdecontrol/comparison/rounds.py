"""What ``auto`` remembers: particles of its rounds and what they cost, and within a number of evaluations the ladders
that its estimate may take, and the estimate."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Run
from ..particles.adaptive_importance import SYSTEMS
from ..particles.ascent import Ascent
from ..particles.mixture_fit import fit_mixture
from ..particles.noncentred import MappedLaw, fit_law
from ..particles.tempering import FULL_WHERE_CORRELATED, Ladder, Population, StateTarget
from ..problems.pilot import search
from ..processes.laws import GaussianMixture, ProductMixture
from ..randomness import Place, derive_seed

MOST_LEVELS = 128  # of a ladder within a number of evaluations
_SAME, _SIGMAS = 0.02, 3.0  # nats and standard errors within which two rounds agree on log Z
_GAIN = 0.8  # of the cost, below which a round was worth it
_LOST = 0.1  # nats of log Z below the population that is kept, at which a round does not take its place
_SEARCH_PART = 0.08  # of all evaluations, for the search ...
_CHAIN = {True: 403, False: 1002}  # ... of which a chain takes so many, with and without a gradient
_CHAINS, _LEAST_CHAINS = 128, 16  # of its first part
_HELD = 1 << 25  # numbers of all draws of the estimate at most
GAUSSIAN, MIXTURE, IMPORTANCE = 0, 1, 2  # what the estimate begins with, and by which way it goes


@dataclass
class Allowance:
    """How much of a run's evaluations, or of its time, has been spent.

    Attributes:
        evaluations: in all, a value with its gradient as two; None: no such number. before: spent when it began.
        run: whose budget of time counts, where it has one.
    """

    evaluations: int | None
    before: int
    run: Run

    def __deepcopy__(self, memo: Any) -> "Allowance":
        return self

    @property
    def limited(self) -> bool:
        return self.evaluations is not None or self.run.elapsed is not None

    def worth(self, used: int) -> float:
        """Evaluations in all, those of the time as it goes so far; inf where it is not known."""
        found = math.inf if self.evaluations is None else float(self.evaluations)
        if self.run.elapsed is not None:
            found = min(found, (used - self.before) / max(self.run.elapsed(), 1e-9))
        return found

    def may(self, used: int, part: float) -> bool:
        """Whether ``used`` evaluations are within this part of all, and the time is."""
        within = self.evaluations is None or used <= part * self.evaluations
        return within and (self.run.elapsed is None or self.run.elapsed() < part)


def _plain(factors: Tensor) -> Tensor:
    """Diagonals ``(J, dim)`` of matrices that are no more than these."""
    if factors.ndim == 2:
        return factors
    diagonal = factors.diagonal(dim1=1, dim2=2)
    return diagonal if torch.equal(factors, torch.diag_embed(diagonal)) else factors


@dataclass(frozen=True)
class Found:
    """What a round has found: particles ``(n, dim)`` in the coordinates of the reference, the log density of each, and
    the first particle that each descends from."""

    z: Tensor
    level: Tensor
    roots: Tensor
    population: Population
    ladder: Ladder

    @classmethod
    def by(cls, ascent: Ascent, target: StateTarget, centre: Tensor, scale: Tensor) -> "Found":
        ladder, population = ascent.result()
        z = (target.states(population.z[0]) - centre) / scale
        return cls(z, target.log_density_at(population.z[0], population.phi[0]), ascent.now.roots, population, ladder)


class Rounds(nn.Module):
    """Two populations of particles (of the last round, and of the one before it that found most; at first, of the
    search), what rounds cost, and the draws of the estimate.

    Args:
        size: particles of a round at most. chains: of the search at most. allowance: where it is limited there is an
            estimate.
    """

    z: Tensor
    log_weights: Tensor
    log_z: Tensor
    cost: Tensor
    seen: Tensor
    spent: Tensor
    unchanged: Tensor
    rounds: Tensor
    level: Tensor
    roots: Tensor
    ready: Tensor
    work: Tensor
    lengths: Tensor
    rungs: Tensor
    centres: Tensor
    factors: Tensor
    way: Tensor
    each: Tensor
    systems_wanted: Tensor
    drawn: Tensor
    x: Tensor
    log_rho: Tensor
    log_w: Tensor
    estimated: Tensor
    sought: Tensor

    def __init__(self, run: Run, size: int, chains: int, allowance: Allowance) -> None:
        super().__init__()
        problem = run.problem
        dim, self.allowance = problem.event_shape[0], allowance
        numbers: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
        counts: dict[str, Any] = {"dtype": torch.long, "device": problem.device}
        like: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
        buffers = {
            "z": torch.zeros(2, size, dim, **like),
            "log_weights": torch.zeros(2, size, **numbers),
            "log_z": torch.full((2,), -math.inf, **numbers),
            # of the first round, of the last one, and of the best before it: evaluations that bring the error of log Z
            # to one nat
            "cost": torch.full((3,), math.inf, **numbers),
            # log Z of the first round and of the one before the last (-inf at first); standard errors of the last and
            # of the first
            "seen": torch.full((4,), math.nan, **numbers),
            "spent": torch.zeros((), **counts),  # evaluations, a value with its gradient as two
            "unchanged": torch.zeros((), **counts),  # rounds without a change
            "rounds": torch.zeros((), **counts),
            "level": torch.zeros(size, **numbers),  # log densities of the last round's particles
            "roots": torch.zeros(size, **counts),  # the first particles that they descend from
        }
        if allowance.limited:
            each = min(size, max(64, _HELD // (SYSTEMS * dim)))
            square = (dim,) if dim > FULL_WHERE_CORRELATED else (dim, dim)
            buffers |= {
                "ready": torch.zeros((), **counts),  # whether there are no more rounds
                "work": torch.zeros((), **numbers),  # evaluations of phi for a particle of the last round
                "lengths": torch.zeros(2, **counts),  # of the first round's ladder and of the last one's
                "rungs": torch.zeros(2, 4, MOST_LEVELS, **numbers),  # their levels, angles, leapfrog steps and moves
                "centres": torch.zeros(MOST_LEVELS, dim, **like),
                "factors": torch.zeros(MOST_LEVELS, *square, **like),
                "way": torch.full((), -1, **counts),  # of the estimate; not known yet
                "each": torch.zeros((), **counts),  # particles of its systems
                "systems_wanted": torch.full((), SYSTEMS, **counts),
                "drawn": torch.zeros((), **counts),  # its systems so far
                "x": torch.zeros(SYSTEMS, each, dim, **like),
                "log_rho": torch.zeros(SYSTEMS, each, **numbers),
                "log_w": torch.full((SYSTEMS, each), -math.inf, **numbers),
                "estimated": torch.zeros((), **counts),  # evaluations of the estimate
                "sought": torch.zeros((), **counts),  # of the search
            }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._law: MappedLaw | None = None
        self.partial: Found | None = None  # of a first round that was interrupted
        self._search(run, chains)

    def _search(self, run: Run, chains: int) -> None:
        """Where short chains end; within an allowance few of them at first, by which it is seen how many there may
        be."""
        problem, allowance, done = run.problem, self.allowance, 0
        ends: list[Tensor] = []
        each = _CHAIN[problem.has_gradient]
        while done < chains:
            count = chains - done
            if allowance.limited:
                blind = not done and allowance.evaluations is None
                worth = 0.0 if blind else min(allowance.worth(self.used), 1e12)
                room = (int(_SEARCH_PART * worth) - int(self.spent)) // each
                count = min(count, max(room, _CHAINS if blind else 0 if done else _LEAST_CHAINS))
            if count <= 0:
                break
            before, seed = problem.density.evaluations, derive_seed(run.seed, Place.AUTO_SEARCH, done)
            ends.append(search(problem.density, problem.centre, problem.scale, count, seed))
            self.spent += problem.density.evaluations - before
            done += count
        if allowance.limited:
            self.sought += self.spent
        found = (torch.cat(ends) - problem.centre) / problem.scale
        self.z[1, : len(found)] = found
        self.log_weights[1] = -math.inf
        self.log_weights[1, : len(found)] = -math.log(max(1, len(found)))

    @property
    def used(self) -> int:
        """Evaluations so far, those before the run among them."""
        return self.allowance.before + int(self.spent)

    def law(self, run: Run, most: int) -> MappedLaw | None:
        """The mixture fitted to both populations, of non-centred coordinates where these say more of the particles;
        None before the first round."""
        if self._law is None and bool(self.log_z[0] > -math.inf):
            seed = derive_seed(run.seed, Place.AUTO_FIT, int(self.rounds))
            z, log_w = self.z.flatten(0, 1), self.log_weights.flatten()
            self._law = fit_law(z, log_w, seed=seed, most=most, settled=math.inf)
        return self._law

    def mixture(self, run: Run, most: int) -> GaussianMixture | ProductMixture | None:
        """That of the coordinates themselves."""
        law = self.law(run, most)
        if law is None or not law.maps.maps:
            return None if law is None else law.law
        seed = derive_seed(run.seed, Place.AUTO_PLAIN_FIT, int(self.rounds))
        return fit_mixture(self.z.flatten(0, 1), self.log_weights.flatten(), seed=seed, most=most)

    def add(self, ended: Found) -> float:
        """Keep a round's particles; the variance of its log Z^ times its particles."""
        z, found, ladder = ended.z, ended.population, ended.ladder
        self.level[: len(z)], self.roots[: len(z)] = ended.level, ended.roots
        first = not bool(torch.isfinite(self.cost[0]))
        # the first round has none before it: the ends of the search stay for the first mixture
        if not first and bool(self.log_z[0] >= self.log_z[1] - _LOST):
            for kept in (self.z, self.log_weights, self.log_z):
                kept[1] = kept[0]
        self.log_weights[0], self.level[len(z) :] = -math.inf, -math.inf
        self.z[0, : len(z)], self.log_weights[0, : len(z)] = z, found.log_weights[0]
        # what is left of the weights at each resampling, and at the end
        last = torch.arange(len(ladder), device=z.device) == len(ladder) - 1
        variance = float(((1 / found.ess - 1) * ((found.resampled > 0) | last)).sum())
        self.cost[2] = torch.minimum(self.cost[1], self.cost[2])
        self.cost[1] = variance * found.evaluations / len(z)
        self.seen[1], self.seen[2] = self.log_z[0], math.sqrt(variance / len(z))
        self.log_z[0] = found.log_z[0]
        if first:
            self.cost[0], self.seen[0], self.seen[3] = self.cost[1], found.log_z[0], self.seen[2]
        self.rounds += 1
        self._law = None
        same = abs(float(self.log_z[0] - self.seen[1])) < max(_SAME, _SIGMAS * float(self.seen[2]))
        settled = same and float(self.cost[1]) > _GAIN * float(self.cost[2])
        self.unchanged.fill_(int(self.unchanged) + 1 if settled else 0)
        if self.allowance.limited:
            self._keep(ladder, found.evaluations / len(z), first)
        return variance

    # ---------------------------------------------------------------- within a number of evaluations

    def _keep(self, ladder: Ladder, work: float, first: bool) -> None:
        """The ladder for the estimate: the first one with its Gaussians, of later ones the last."""
        n, row = len(ladder), 0 if first else 1
        self.work.fill_(work)
        self.lengths[row] = n
        columns = (ladder.betas, ladder.angles, ladder.leapfrog_steps, ladder.moves)
        for column, values in zip(self.rungs[row], columns):
            column[:n] = values
        if first:
            self.centres[:n] = ladder.centres
            whole = self.factors.ndim > ladder.factors.ndim
            self.factors[:n] = torch.diag_embed(ladder.factors) if whole else ladder.factors

    def ladder(self) -> Ladder:
        """Of the estimate, by :attr:`way`."""
        way = int(self.way)
        if way == IMPORTANCE:
            one = self.rungs.new_ones(1)
            nothing = torch.zeros(1, dtype=torch.long)
            return Ladder(one, self.centres[:1], self.factors[:1], one, nothing + 1, nothing)
        n = int(self.lengths[way])
        betas, angles, steps, moves = self.rungs[way, :, :n]
        return Ladder(betas, self.centres[:n], _plain(self.factors[:n]), angles, steps.long().cpu(), moves.long().cpu())

    def add_estimate(self, x: Tensor, log_rho: Tensor, found: Population) -> None:
        """Keep systems of the estimate, ``x`` ``(M, N, dim)``."""
        first, (m, n) = int(self.drawn), found.log_weights.shape
        rows = slice(first, first + m)
        self.x[rows, :n], self.log_rho[rows, :n] = x, log_rho
        self.log_w[rows, :n] = found.log_weights + found.log_z.unsqueeze(1) + math.log(n)
        self.drawn += m

    def systems(self, problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What there is: states ``(M, N, dim)`` of the estimate's systems, or of the particles of the last round, or of
        one that was interrupted; with their log densities and log weights ``(M, N)``."""
        if self.has_estimate:
            count, n = int(self.drawn), int(self.each)
            return self.x[:count, :n], self.log_rho[:count, :n], self.log_w[:count, :n]
        return self._families(problem)

    @property
    def has_estimate(self) -> bool:
        """Whether there are systems of the estimate, with enough particles for a law."""
        if not self.allowance.limited:
            return False
        weights = self.log_w[: int(self.drawn), : int(self.each)]
        return int((weights > -math.inf).sum()) >= SYSTEMS

    @property
    def found(self) -> bool:
        """Whether there are particles of a round, enough of them for a law."""
        if bool(self.log_z[0] > -math.inf):
            return True
        return self.partial is not None and int((self.partial.population.log_weights[0] > -math.inf).sum()) >= SYSTEMS

    def _families(self, problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Particles of one system, dealt by the first ones that they descend from into 16 systems (fewer where most of
        the families have died out), so that these differ as the system's own Z^ does (Chan & Lai 2013)."""
        if self.partial is not None and not self.log_z[0] > -math.inf:
            part = self.partial
            z, level, roots = part.z, part.level, part.roots
            log_w, log_z = part.population.log_weights[0], part.population.log_z[0]
        else:
            z, level, roots = self.z[0], self.level, self.roots
            log_w, log_z = self.log_weights[0], self.log_z[0]
        alive = log_w > -math.inf
        z, level, roots, log_w = z[alive], level[alive], roots[alive], log_w[alive] + log_z
        systems = next((m for m in (SYSTEMS, 8, 4, 2) if len((roots % m).unique()) == m), 1)
        group = roots % systems  # as it was before any died out
        counts = torch.bincount(group, minlength=systems)
        n = int(counts.max())
        x = z.new_zeros(systems, n, z.shape[1])
        log_rho, weights = (log_w.new_full((systems, n), -math.inf) for _ in range(2))
        for m in range(systems):
            rows, k = group == m, int(counts[m])
            x[m, :k], x[m, k:] = z[rows], z[rows][0]
            log_rho[m, :k], log_rho[m, k:] = level[rows], level[rows][0]
            weights[m, :k] = log_w[rows] + math.log(systems * n)
        return problem.centre + problem.scale * x, log_rho, weights
