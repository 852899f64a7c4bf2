"""Adaptive importance sampling, for densities whose every value is dear: mixtures of Gaussians are fitted to all values
ever asked for, and the last draws come from a mixture that no longer changes.

0. *Exploration*, where neither a scale nor priors say where to begin: draws of ``N(centre, s^2)``, s = 1, 2, 4, ..., as
   long as a wider one meets a log density within some nats of the highest, in a tenth of the evaluations at most.
1. *Search.* A batch of draws comes from the law so far. All draws of all batches together are weighed as draws of the
   mixture of all their laws, ``q = sum_b n_b q_b / n`` (deterministic mixture weights: Owen & Zhou 2000; Cornuet et al.
   0907.1254), tempered: ``(rho/q)^beta`` with the largest beta at which enough of them are effective. A mixture fitted
   to that, widened, is the next law. So it walks towards the density, grows while that is far, and no draw is far
   outside of what has been seen.
2. *Refinement.* With beta = 1 the same goes on until the law's own weights are even enough, or two fifths of the
   evaluations are spent.
3. *Estimate.* What is left is drawn from the last law, with a quarter from the same at 4 and 16 times its variances,
   which bounds the weights in its tails. These draws know nothing of one another, so that ``E Z^ = Z``, and its error
   is that of independent draws. All earlier ones have only chosen the law.

Everything is a function of the seed and of the values, so that a run whose values are known goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..paths.weights import effective_fraction
from ..processes.laws import GaussianMixture, draw
from ..randomness import Place, derive_seed
from .noncentred import MappedLaw, fit_law
from .tempering import fit_gaussian

SYSTEMS = 16  # into which the last draws are dealt
_PART = 0.25  # of a batch, that is effective at a level of the search
_PIECES = 100  # a batch of the search is this part of all evaluations ...
_BATCH, _BATCH_MOST = 8, 512  # ... but so many for each dimension, and at most so many
_EXPLORED, _WITHIN = 0.1, (20.0, 2.0)  # part of all evaluations; nats, and nats for each dimension
_SEARCHED, _REFINED = 0.9, 0.5  # parts of all evaluations at which search and refinement end
_LEAST_REFINED = 0.35
_JUDGED = 20  # a batch of the refinement is this part of all evaluations, so that its weights say something
_EVEN, _GAIN, _MOST_STALE = 0.7, 1.1, 3  # effective fraction that is good enough; growth that was worth a batch
_PER_COMPONENT = 4  # effective draws for each number of a component's mean and axes
_WIDER = 1.2  # variances of a fit as a law
TURN, _WIDE = 12, {4.0: (0, 6), 16.0: (3,)}  # of so many draws in turn, which ones are of wider variances
_FINAL_PIECES = 20


class Law(Protocol):
    """What draws come from: of torch's or this package's distributions."""

    def log_prob(self, value: Tensor) -> Tensor: ...


@dataclass
class Values:
    """The log density, asked for once at each draw.

    Attributes:
        ask: ``(n, d) -> (n,)``. known: ``(total,)`` values, of which the first ``count`` are there.
        rows: asked for at a time, between which a run may be interrupted.
    """

    ask: Callable[[Tensor], Tensor]
    known: Tensor
    count: Tensor
    rows: int
    used: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        first, last = self.used, self.used + len(x)
        while int(self.count) < last:
            low = int(self.count)
            high = min(last, low + self.rows)
            self.known[low:high] = self.ask(x[low - first : high - first])
            self.count.fill_(high)
        self.used = last
        return self.known[first:last]


@dataclass
class AdaptiveSampler:
    """The run, a batch at a time.

    Args:
        start: the first law, and how to draw from it: ``(n, seed) -> (n, d)``.
        explore: whether the first law is a guess, which wider ones follow; of :func:`start_law`.
        values: the log density's. total: evaluations in all.
        components: of a mixture at most.

    Attributes:
        x: ``(n, d)`` all draws of search and refinement. level: ``(n,)`` log of ``n q`` there.
        law: the last one. beta: of the search. even: effective fraction of the last law's own weights.
        final: draws of the estimate ``(m, d)``.
    """

    start: tuple[Law, Callable[[int, int], Tensor]]
    values: Values
    total: int
    seed: int
    components: int
    explore: bool = False
    x: Tensor = field(init=False)
    level: Tensor = field(init=False)
    beta: float = 0.0
    even: float = 0.0
    batch: int = 0
    stage: str = "search"
    laws: list[tuple[Law, int]] = field(default_factory=list)
    pending: Tensor | None = None

    def __post_init__(self) -> None:
        self.law: Any = self.start[0]
        draws = self.start[1]
        self._draw = draws
        dim = draws(1, 0).shape[1]
        self.size = min(_BATCH_MOST, max(_BATCH * (dim + 1), self.total // _PIECES))
        self.x = self.values.known.new_zeros(0, dim)
        self.level, self.final = self.x[:, 0], self.x
        self._best, self._stale, self._ready = 0.0, 0, False
        if self.explore:
            self.stage = "explore"

    @property
    def log_rho(self) -> Tensor:
        """``(n,)`` at :attr:`x`."""
        return self.values.known[: len(self.x)]

    @property
    def done(self) -> bool:
        return self.values.used >= self.total

    def step(self) -> None:
        """One batch."""
        left = self.total - self.values.used
        if self.stage == "estimate":
            self._estimate(min(left, max(SYSTEMS, -(-self.total // _FINAL_PIECES))))
            return
        n = min(left, self.size if self.stage == "search" else max(self.size, self.total // _JUDGED))
        law = self.law
        seed = derive_seed(self.seed, Place.IMPORTANCE_BATCH, self.batch)
        self.pending = self._with_wide(n, seed, 0) if self.stage == "refine" else self._draw(n, seed)
        own = self.values(self.pending)
        self._take(self.pending)
        self.pending = None
        self.batch += 1
        if self.stage == "refine":
            self._judge(own, law, self.x[-n:])
        if self.stage == "explore" and self._wider(own):
            return
        if not self.done and self.stage != "estimate":
            self._next(n)

    def _wider(self, own: Tensor) -> bool:
        """Whether exploration goes on, with twice the first law's scale; where no density was met at 64 times that,
        with a half."""
        best, dim = self.log_rho.max(), self.x.shape[1]
        near = float(own.max()) > float(best) - _WITHIN[0] - _WITHIN[1] * dim
        if self.values.used < _EXPLORED * self.total or best == -math.inf:
            if best == -math.inf and self.batch >= 7:
                factor = 0.25 if self.batch > 7 else 2.0**-14  # of variances: the first time from 64 to a half
                self._use(self.law.widened(factor))
                return True
            if near or best == -math.inf:
                self._use(self.law.widened(4.0))
                return True
        self.stage = "search"
        return False

    def _with_wide(self, n: int, seed: int, first: int) -> Tensor:
        """Draws of the law, and by their number, from ``first`` on, in turn of the same widened."""
        rows = torch.arange(first, first + n) % TURN
        found = self._draw(n, seed)
        for factor, places in _WIDE.items():
            wide = _drawn(self.law.widened(factor), n, derive_seed(seed, Place.IMPORTANCE_WIDE, int(factor)))
            chosen = torch.isin(rows, torch.tensor(places)).to(found.device)
            found = torch.where(chosen.unsqueeze(1), wide, found)
        return found

    @staticmethod
    def _parts(law: Any, n: int) -> list[tuple[Law, int]]:
        """The laws of so many draws of :meth:`_with_wide`, from the first on, and how many are of each."""
        whole, rest = divmod(n, TURN)
        counts = {f: whole * len(at) + sum(place < rest for place in at) for f, at in _WIDE.items()}
        parts = [(law, n - sum(counts.values())), *((law.widened(f), k) for f, k in counts.items())]
        return [part for part in parts if part[1]]

    def _with_wide_density(self, law: Any, x: Tensor) -> Tensor:
        """The log density of the mixture of :meth:`_parts` that these draws came from."""
        return torch.stack([math.log(k / len(x)) + q.log_prob(x) for q, k in self._parts(law, len(x))]).logsumexp(0)

    def _take(self, x: Tensor) -> None:
        """Add draws of the present law to all others."""
        parts = self._parts(self.law, len(x)) if self.stage == "refine" else [(self.law, len(x))]
        for law, n in parts:
            if len(self.x):
                self.level = torch.logaddexp(self.level, math.log(n) + law.log_prob(self.x))
        self.laws += parts
        new = torch.stack([math.log(k) + q.log_prob(x) for q, k in self.laws]).logsumexp(0)
        self.x, self.level = torch.cat((self.x, x)), torch.cat((self.level, new))

    def tempered(self, wanted: float) -> Tensor:
        """Log weights of all draws at the largest beta at which so many are effective; sets :attr:`beta`."""
        ratio = self.log_rho - self.level
        best = ratio.max()

        def at(beta: float) -> Tensor:
            return torch.where(ratio > -math.inf, beta * (ratio - best), -math.inf)

        def effective(beta: float) -> float:
            return float(effective_fraction(at(beta).softmax(0))) * len(ratio)

        low, high = 0.0, 1.0
        if effective(1.0) < wanted:
            for _ in range(50):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if effective(middle) >= wanted else (low, middle)
            self.beta = low
        else:
            self.beta = 1.0
        return at(self.beta)

    def _next(self, n: int) -> None:
        """The next law."""
        dim = self.x.shape[1]
        log_w = self.tempered(min(_PART * n, 0.5 * float((self.log_rho > -math.inf).sum())))
        if not bool(log_w.isfinite().any()):
            return  # no density yet: another batch of the same
        effective = float(effective_fraction(log_w.softmax(0))) * len(log_w)
        shape = 0.5 * (dim + 3) if dim <= 64 else 2.0  # numbers of a component, in units of its dimension
        most = max(1, min(self.components, int(effective / (_PER_COMPONENT * shape))))
        law = self._fitted(log_w, most)
        if self.stage == "search" and self.beta < 1.0:
            # tempering leaves a Gaussian so much narrower than its draws; half of that is given back
            narrower = 1 - math.sqrt(1 - _PART ** (2 / dim))
            law = law.widened(narrower**-0.5)
        else:
            self.stage = "refine" if self.stage == "search" else self.stage
            law = law.widened(_WIDER)
        self._use(law)
        if self._ready or self.values.used >= (_SEARCHED if self.stage == "search" else _REFINED) * self.total:
            self.stage = "estimate"

    def _fitted(self, log_w: Tensor, most: int) -> Any:
        try:
            seed = derive_seed(self.seed, Place.IMPORTANCE_FIT, self.batch)
            return fit_law(self.x, log_w, seed=seed, most=most)
        except ValueError:  # too few draws with density
            mean, factor = fit_gaussian(self.x, log_w.softmax(0))
            cov = factor @ factor.mT if factor.ndim == 2 else torch.diag(factor.square())
            return GaussianMixture(mean.new_ones(1), mean.unsqueeze(0), cov.unsqueeze(0))

    def _use(self, law: Any) -> None:
        self.law = law
        self._draw = lambda n, seed: _drawn(law, n, seed)

    def _judge(self, own: Tensor, law: Any, x: Tensor) -> None:
        """The law's own weights at its last batch: when they are even enough, or have grown no evener, the estimate
        begins."""
        log_w = own - self._with_wide_density(law, x)
        self.even = float(effective_fraction(log_w.softmax(0))) if bool((own > -math.inf).any()) else 0.0
        self._stale = 0 if self.even > _GAIN * self._best else self._stale + 1
        self._best = max(self._best, self.even)
        enough = self.even >= _EVEN or self._stale >= _MOST_STALE
        self._ready = enough and self.values.used >= _LEAST_REFINED * self.total

    def _estimate(self, n: int) -> None:
        seed = derive_seed(self.seed, Place.IMPORTANCE_FINAL, self.batch)
        self.pending = self._with_wide(n, seed, len(self.final))
        self.values(self.pending)
        self.final = torch.cat((self.final, self.pending))
        self.pending = None
        self.batch += 1

    # ---------------------------------------------------------------- what there is

    def weighted(self) -> tuple[Tensor, Tensor, bool]:
        """Draws ``(m, d)`` and log weights ``(m,)`` whose mean exponential is Z: those of the estimate, or where there
        are none (too few to be dealt into systems), all others; and whether they are of the estimate. Of a batch that
        was interrupted what has been asked for counts."""
        asked = self.pending[: int(self.values.count) - self.values.used] if self.pending is not None else self.x[:0]
        final = torch.cat((self.final, asked)) if self.stage == "estimate" else self.final
        first = len(self.x)
        final = final[: len(final) // (TURN * SYSTEMS) * TURN * SYSTEMS]  # whole turns for each system
        if len(final):
            q = self._with_wide_density(self.law, final)
            return final, self.values.known[first : first + len(final)] - q, True
        if self.stage != "estimate" and len(asked):
            self._take(asked)
        return self.x, self.log_rho - self.level + math.log(max(1, len(self.x))), False


def _drawn(law: Any, n: int, seed: int) -> Tensor:
    return law.draw(n, seed) if isinstance(law, MappedLaw) else draw(law, n, seed)


def start_law(centre: Tensor, scale: Tensor) -> tuple[Law, Callable[[int, int], Tensor]]:
    """``N(centre, scale^2)`` to begin with."""
    cov = torch.diag(scale.expand(centre.shape).square())
    law = GaussianMixture(centre.new_ones(1), centre.unsqueeze(0), cov.unsqueeze(0))
    return law, lambda n, seed: draw(law, n, seed)
