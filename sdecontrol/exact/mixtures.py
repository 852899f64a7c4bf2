"""The exact fine-tuning of a Gaussian-mixture model in continuous time.

The reference is the time reversal of a noising process from the mixture, so its optimum is the time reversal of the
*same* noising process from the tilted mixture (Theorems 1-3): every p*_t is a mixture, ``v`` a log-ratio of mixtures,
and the control ``g`` times a difference of scores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..memory import Remembered
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac, Gaussian, GaussianMixture, factor
from ..shapes import Controls, PerPath, Scalar, States
from .base import ExactSolution
from .quadratic import Form, quadratic_terms, soft_average

_PAST = 1e-12  # stands for time -1 of the learned start, where all paths are in one point and laws have no density


class _Pair(NamedTuple):
    """At one time: the optimum's and the reference's law of ``X_t - centre``, and the root of the noise there."""

    optimum: GaussianMixture
    reference: GaussianMixture
    centre: Tensor
    root: Tensor

    def log_ratio(self, x: Tensor) -> Tensor:
        y = x - self.centre
        return self.optimum.log_prob(y) - self.reference.log_prob(y)

    def control(self, x: Tensor) -> Tensor:
        """``root grad log(p*/p0)``."""
        y = x - self.centre
        return (self.optimum.score(y) - self.reference.score(y)) @ self.root

    def to(self, like: Tensor) -> _Pair:
        return _Pair(self.optimum.to(like), self.reference.to(like), self.centre.to(like), self.root.to(like))


def _mixture(log_weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
    """A mixture from log weights: a strong tilt may leave a component a weight that underflows."""
    values, vectors = torch.linalg.eigh(covariances)
    return GaussianMixture._from_parts(log_weights.log_softmax(0), means, values, vectors)


def tilted_mixture(mixture: GaussianMixture, tilt: Form) -> tuple[GaussianMixture, Tensor]:
    """The mixture times ``exp(tilt)``, normalised, and the log of the normalising constant.

    Component i becomes precision ``S_i^-1 + P``, weight ``w_i Z_i``.

    Raises:
        NoExactSolution: the integral of a component is infinite.
    """
    roots = factor(mixture.covariances)
    parts = [soft_average(tilt, root, f"in component {i} of the mixture") for i, root in enumerate(roots)]
    logs = torch.stack([w + part.form.at(m) for w, m, part in zip(mixture.log_weights, mixture.means, parts)])
    means = torch.stack([part.matrix @ m + part.shift for m, part in zip(mixture.means, parts)])
    return _mixture(logs, means, torch.stack([part.root @ part.root.mT for part in parts])), logs.logsumexp(0)


def same_law(law: Any, own: Any) -> bool:
    """Whether a start is the reference's own (an equal one counts)."""
    if law is own or type(law) is not type(own):
        return law is own
    names = (
        ("means", "log_weights", "covariances") if isinstance(own, GaussianMixture) else ("mean", "covariance_matrix")
    )
    pairs = [(getattr(law, name), getattr(own, name)) for name in names]
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)


class MixtureSolution(ExactSolution):
    """Exact solution for ``generative_sde(GaussianMixture(...), schedule)`` with a linear or quadratic reward.

    ``v(x, t) = alpha (log p*_t - log p0_t + log Z)``, ``u* = g(t) (score of p*_t - score of p0_t)``.

    For start="controlled" everything is exact. For start="memoryless" the laws are exact up to the memory that was
    accepted (a correlation of at most 0.01): ``initial`` and ``marginal`` are those of the tilted start, which the
    fixed start equals to that order; value and control are exact. For start="fixed" only value, control and log_z are
    known.
    """

    kind = "Gaussian mixture"

    def __init__(self, problem: ControlProblem) -> None:
        super().__init__(problem, {})
        reference: Any = problem.reference
        if not reference.reversal:
            raise NoExactSolution(
                "noise_level: a mixture reference has an exact solution as the reversal of its noising "
                "process only; use noise_level='reverse' or 'memoryless'."
            )
        if problem.running_cost_function is not None:
            raise NoExactSolution(
                "running_cost: no exact solution is known for a mixture reference with a running cost."
            )
        terms = quadratic_terms(problem)
        if terms is None:
            raise NoExactSolution(
                f"no exact solution is known for the reward {type(problem.reward_function).__name__}: it must be "
                "Quadratic, Linear or None."
            )
        self._own_start = same_law(problem.initial, reference.own_initial)
        if not self._own_start and problem.start != "fixed":
            raise NoExactSolution(
                f"initial: the exact solution of a mixture needs the reference's own start (leave initial "
                f"out), got another {type(problem.initial).__name__}."
            )
        self._reference = reference
        data = reference.mixture.to(torch.zeros((), dtype=torch.float64))
        self._p0 = data.noised(*self._levels(problem.horizon))
        self._tilted, self._log_z = tilted_mixture(self._p0, terms.reward)
        self._pair = Remembered(self._make_pair, 4096)

    # ---------------------------------------------------------------- laws of the noising process

    def _levels(self, time: float) -> tuple[float, float]:
        """``mu`` and ``std`` of the schedule at process time t in [0, T]."""
        s = torch.tensor(self._reference.noising_time(time), dtype=torch.float64)
        return float(self._reference.schedule.mu(s)), float(self._reference.schedule.std(s))

    def _noising(self, t: float, s: float) -> tuple[float, float]:
        """``(ratio, variance)`` of ``X_s | X_t = x ~ N(ratio x, variance)``, 0 <= s <= t: noisier given cleaner."""
        (mu_t, std_t), (mu_s, std_s) = self._levels(t), self._levels(s)
        ratio = mu_s / mu_t
        return ratio, max(std_s**2 - (ratio * std_t) ** 2, 0.0)

    def _make_pair(self, time: float) -> _Pair:
        ratio, variance = self._noising(self.problem.horizon, max(time, 0.0))
        start, optimum = (law.noised(ratio, math.sqrt(variance)) for law in (self._p0, self._tilted))
        if time >= 0:
            level = self._reference.diffusion(start.means, torch.tensor(time, dtype=torch.float64)).double().cpu()
            return _Pair(
                optimum, start, torch.zeros_like(start.mean), level * torch.eye(*start.event_shape, dtype=torch.float64)
            )
        centre, spread, past = start.mean, start.covariance_matrix, max(1.0 + time, _PAST)
        # X_t - centre at t = past - 1 is past (X_0 - centre) + sqrt(past (1 - past)) S^(1/2) eps
        target, begun = (
            _mixture(
                law.log_weights, past * (law.means - centre), past**2 * law.covariances + past * (1 - past) * spread
            )
            for law in (optimum, start)
        )
        return _Pair(target, begun, centre, factor(spread))

    # ---------------------------------------------------------------- the interface

    def _value_at(self, x: States, time: float) -> PerPath:
        return self.problem.alpha * (self._pair(time).log_ratio(x) + self._log_z)

    def _control_at(self, x: States, time: float) -> Controls:
        return self._pair(time).control(x)

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        pairs = [self._pair(self._snap(t)).to(chain.times) for t in chain.clock[:-1]]
        return lambda k, x, condition: chain.shift_at(k, x, pairs[k].control(x))

    def _need_tilted_start(self, what: str) -> None:
        if self.problem.start == "fixed":
            raise NoExactSolution(
                f"{what} under a fixed start that is not memoryless has no closed form for a mixture; use "
                "start='controlled', or value and control, which do not depend on the start."
            )

    @property
    def log_z(self) -> Scalar:
        if not self._own_start:
            raise NoExactSolution("log_z: not known for an initial law that is not the reference's own.")
        return self._out(self._log_z)

    @property
    def start_log_z(self) -> Scalar:
        self._need_tilted_start("start_log_z")
        return self.log_z

    @property
    def initial(self) -> Any:
        return self.marginal(0.0)

    def marginal(self, t: float) -> GaussianMixture | Dirac:
        self._need_tilted_start("marginal(t)")
        time = self._snap(float(t))
        law, _, centre, _ = self._pair(time)
        if time == -1.0:
            return Dirac(self._out(centre))
        shifted = GaussianMixture._from_parts(law.log_weights, law.means + centre, law.variances, law._vectors)
        return shifted.to(self._out(centre))

    def bridge(self, s: float, t: float, x_t: Tensor) -> Gaussian:
        self._need_tilted_start("bridge(s, t, x_t)")
        s, t = self._ordered(s, t)
        x = self._in("x_t", x_t)
        eye = torch.eye(x.shape[-1], dtype=torch.float64)
        ratio, variance = self._noising(max(t, 0.0), max(s, 0.0))
        mean, cov = ratio * x, variance * eye
        if s < 0:  # the Brownian bridge from the point at -1 to X_0 (or X_t, t < 0)
            pair, past = self._pair(s), (1.0 + s) / (1.0 + min(t, 0.0))
            mean = pair.centre + past * (mean - pair.centre)
            cov = past**2 * cov + (1.0 + s) * (1.0 - past) * pair.root @ pair.root
        return self._gaussian(mean, cov)
