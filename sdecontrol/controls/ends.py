"""What a reference says of its state given its end, ``z_t = a_t z_T + sqrt(l_t) eps``, and of its end given the state.

Two kinds of reference have such a bridge to their end, whatever their start: those of Gibbs problems on a falling
clock, and generative references that have forgotten their start, where it is the noising process. z is the state in
coordinates of the end: standardised, flattened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.gaussian import TransitionChain
from ..problems.gibbs import GibbsProblem
from ..problems.problem import ControlProblem
from ..processes.generative import GenerativeSDE
from ..processes.time_changed import TimeChanged


class Ends(Protocol):
    """See the module's head. Where a law stands in the place of the reference's end,
    ``u = rate (score of its marginal - the reference's score)``."""

    def standardised(self, x: Tensor) -> Tensor:
        """States ``(n, *event)`` as z ``(n, d)``."""
        ...

    def states(self, z: Tensor) -> Tensor:
        """The inverse."""
        ...

    def between(self, t: float) -> tuple[float, float]:
        """``a_t, l_t``."""
        ...

    def rate(self, t: float) -> float:
        """Of a difference of scores in z, for the control."""
        ...

    def end_rate(self, t: float) -> float:
        """Of a difference of expected ends in z, for the control: ``rate a_t/l_t``."""
        ...

    def score(self, x: Tensor, t: float) -> Tensor:
        """``grad_z log`` density of the reference at time t, ``(n, d)``."""
        ...

    def expected(self, x: Tensor, t: float) -> Tensor:
        """``E[z_T | x_t = x]`` of the reference, ``(n, d)``."""
        ...

    def on_grid(self, chain: Chain) -> Callable[[int, Tensor, Tensor], Tensor] | None:
        """``(k, x, E) -> c_k``, the shift of step k that an ``E[z_T | x_k]`` ``(n, d)`` makes; None: not on this
        chain."""
        ...

    def __deepcopy__(self, memo: Any) -> Ends:
        return self  # of a reference, which is a definition: a copied control has the same one


class TimeChangedEnds(Ends):
    """Of the references "ou" and "brownian" of a Gibbs problem; ``x = centre + scale z``. On a chain of exact
    transitions the shift is exact."""

    def __init__(self, reference: TimeChanged) -> None:
        self.reference, self.stationary = reference, reference.kind == "ou"

    def standardised(self, x: Tensor) -> Tensor:
        return (x - self.reference.centre) / self.reference.scale

    def states(self, z: Tensor) -> Tensor:
        return self.reference.centre + self.reference.scale * z

    def _left(self, t: float) -> float:
        return min(max(float(self.reference.left(t)), 0.0), self.reference.total)

    def _onwards(self, left: float) -> tuple[float, float]:
        """Decay and variance of the end given the state."""
        return (math.exp(-0.5 * left), -math.expm1(-left)) if self.stationary else (1.0, left)

    def between(self, t: float) -> tuple[float, float]:
        left = self._left(t)
        return self._onwards(left) if self.stationary else (1 - left, left * (1 - left))

    def rate(self, t: float) -> float:
        return math.sqrt(float(self.reference.speed(t)))

    def end_rate(self, t: float) -> float:
        decay, variance = self._onwards(self._left(t))
        return self.rate(t) * decay / variance

    def score(self, x: Tensor, t: float) -> Tensor:
        z = self.standardised(x)
        return -z if self.stationary else -z / (1 - self._left(t))

    def expected(self, x: Tensor, t: float) -> Tensor:
        return self._onwards(self._left(t))[0] * self.standardised(x)

    def on_grid(self, chain: Chain) -> Callable[[int, Tensor, Tensor], Tensor] | None:
        if not isinstance(chain, TransitionChain) or chain.reference is not self.reference:
            return None
        left = [self._left(t) for t in chain.clock]
        rows = []
        for before, after in pairwise(left):
            (first, variance), (last, rest) = self._onwards(before), self._onwards(after)
            step = -math.expm1(after - before) if self.stationary else variance - rest
            rows.append((math.sqrt(step) * last / variance, first))

        def shift(k: int, x: Tensor, expected: Tensor) -> Tensor:
            gain, decay = rows[k]
            return gain * (expected - decay * self.standardised(x))

        return shift


class NoisingEnds(Ends):
    """Of a memoryless generative reference: the noising process from x_T, ``a = mu_t``. Where x_T is not quite free of
    noise itself (``std_0`` of :class:`VE`), ``l = std_t^2 - a^2 std_0^2``.

    A law of continuous time, O(h) from a chain's, as the shift is (:class:`sdecontrol.chains.bridges.NoisingBridge`).
    """

    def __init__(self, reference: GenerativeSDE) -> None:
        self.reference = reference
        self._first = float(reference.schedule.std(torch.zeros((), dtype=torch.float64)))

    def standardised(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def states(self, z: Tensor) -> Tensor:
        return z.unflatten(1, self.reference.event_shape)

    def between(self, t: float) -> tuple[float, float]:
        c = self.reference.at(t)
        return c.mu, max(c.std**2 - (c.mu * self._first) ** 2, 0.0)

    def rate(self, t: float) -> float:
        return self.reference.at(t).level

    def end_rate(self, t: float) -> float:
        a, variance = self.between(t)
        return self.rate(t) * a / variance

    def _score(self, x: Tensor, denoised: Tensor, t: float) -> Tensor:
        c = self.reference.at(t)
        return (c.mu * denoised - x).flatten(1) / c.std**2

    def score(self, x: Tensor, t: float) -> Tensor:
        return self._score(x, self.reference.denoised(x, torch.tensor(t, dtype=x.dtype, device=x.device)), t)

    def expected(self, x: Tensor, t: float) -> Tensor:
        a, variance = self.between(t)
        return (self.standardised(x) + variance * self.score(x, t)) / a

    def on_grid(self, chain: Chain) -> Callable[[int, Tensor, Tensor], Tensor] | None:
        if chain.start or chain.reference is not self.reference:
            return None
        denoise, times = self.reference.denoiser_on_grid(chain.times), chain.times[:-1].tolist()
        gains = [float(chain.gain(k)) * self.rate(t) for k, t in enumerate(times)]
        between = [self.between(t) for t in times]

        def shift(k: int, x: Tensor, expected: Tensor) -> Tensor:
            a, variance = between[k]
            score = (a * expected - self.standardised(x)) / variance
            return self.states(gains[k] * (score - self._score(x, denoise(k, x, None), times[k])))

        return shift


def ends_of(problem: ControlProblem) -> Ends:
    """What the problem's reference says of its end.

    Raises:
        TypeError: a reference without such a bridge, or a problem with conditions.
    """
    reference = problem.reference
    if problem.condition is None:
        if isinstance(problem, GibbsProblem) and isinstance(reference, TimeChanged):
            return TimeChangedEnds(reference)
        if reference.schedule is not None and reference.reversal and problem.start == "memoryless":
            return NoisingEnds(reference)
    raise TypeError(
        "a mixture's control needs a gibbs_problem with reference='ou' or 'brownian', or a memoryless generative_sde "
        "with noise_level='reverse'; and no condition."
    )
