"""Annealed Langevin: a diffusion that follows densities from a Gaussian to an unnormalised density."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..counting import count_reward
from ..memory import recall
from ..tensors import as_float, check_tensor
from .sde import SDE, StepFunction

#: ``score(x, y) -> (batch, d)``, of the log density, y a condition or None.
Score = Callable[[Tensor, Any], Tensor]


class AnnealedLangevin(SDE):
    """Langevin dynamics along the geometric path from ``p0 = N(centre, scale^2)`` to ``rho``::

        dX = sigma^2/2 grad log pi_t dt + sigma dW,   log pi_t = (1 - beta) log p0 + beta log rho,   X_0 ~ p0,
        beta(t) = (r^{2t/T} - 1)/(r^2 - 1),           sigma(t)^2 = relaxations/T scale^2 r^{-2t/T}.

    Why this schedule. For a Gaussian rho of standard deviation ``scale/r`` the precision of ``pi_t`` grows
    geometrically from that of p0 to that of rho: every step then changes it by the same factor, and ``sigma^2`` is the
    variance of ``pi_t`` times the number of relaxation times in a unit of time, so that steps are as long, in units of
    what they move in, at the beginning as at the end. For ``r = 1`` beta is linear.

    The score of rho is softly bounded (``|scale score|`` at ten times its usual size, by a factor
    ``(1 + (|.|/bound)^4)^{-1/4}``, which is 1 - 3e-5 at the usual size): steps stay bounded where rho is steep. It is
    the same function of the state in all kernels.

    Args:
        score: of rho, ``(x, y) -> (batch, d)``, finite.
        centre: ``(d,)``. scale: 0-d or ``(d,)``, > 0, of the same dtype and on the same device.
        roughness: r >= 1, the usual size of an entry of rho's score in units of 1/scale.
        horizon: the end time, a mere unit.
        relaxations: relaxation times of ``pi_t`` from 0 to the end.
        backward_control: whether a control enters the backward kernels of its chain too.
    """

    default_scheme = "exponential"
    kind = "annealed"
    reverse_target = True

    def __init__(
        self,
        score: Score,
        centre: Tensor,
        scale: Tensor,
        roughness: float,
        horizon: float = 1.0,
        relaxations: float = 10.0,
        backward_control: bool = True,
    ) -> None:
        self.controlled_target = backward_control
        self.centre = check_tensor("centre", centre, shape=("d",))
        self.scale = check_tensor("scale", scale)
        self.roughness = max(1.0, as_float("roughness", roughness, positive=True))
        self.relaxations = as_float("relaxations", relaxations, positive=True)
        self.unbounded_score, self.score_bound = score, 10.0 * self.roughness * centre.numel() ** 0.5
        super().__init__(self._drift_at, self.diffusion, dim=centre.numel(), horizon=horizon)
        self.dtype, self.device = centre.dtype, centre.device

    def beta(self, t: float) -> float:
        """Share of ``log rho`` in ``log pi_t``: 0 at the start, 1 at the end."""
        rate = 2 * math.log(self.roughness)
        s = t / self.horizon
        return s if rate < 1e-6 else math.expm1(rate * s) / math.expm1(rate)

    def variance(self, t: float) -> Tensor:
        """Of ``pi_t`` where rho is as rough as it is said to be: ``scale^2 r^{-2t/T}``."""
        return self.scale.square() * self.roughness ** (-2 * t / self.horizon)

    def score(self, x: Tensor, condition: Any = None) -> Tensor:
        """Of rho, bounded, ``(batch, d)``; remembered for the last x, since backward and forward kernels (and a
        control's Langevin term) ask at the same states."""

        def bounded() -> Tensor:
            value = self.unbounded_score(x, condition)
            count_reward(value, len(x), with_gradient=True)
            square = (self.scale * value).square().sum(-1, keepdim=True) / self.score_bound**2
            return value / torch.hypot(square, torch.ones_like(square)).sqrt()

        return recall(self, torch.is_grad_enabled(), x, bounded)

    def annealed_score(self, x: Tensor, beta: float, condition: Any = None) -> Tensor:
        """``(1 - beta) grad log p0 + beta grad log rho``, the latter bounded."""
        towards = (self.centre - x) * ((1 - beta) / self.scale.square())
        return towards if beta == 0 else torch.add(towards, self.score(x, condition), alpha=beta)

    def _drift_at(self, x: Tensor, t: Any, condition: Any = None) -> Tensor:
        t = float(t)
        value = self.annealed_score(x, self.beta(t), condition)
        return value * (0.5 * self.relaxations / self.horizon * self.variance(t))

    def diffusion(self, x: Tensor, t: Any) -> Tensor:
        """Standard deviations, 0-d or ``(d,)``: it is diagonal."""
        return (self.relaxations / self.horizon * self.variance(float(t))).sqrt().to(x.dtype)

    def on_grid(self, times: Tensor) -> StepFunction:
        clock = times.tolist()
        return lambda k, x, y: (self.drift(x, clock[k], y), self.diffusion(x, clock[k]))  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "process": "annealed",
            "relaxations": self.relaxations,
            "backward_control": self.controlled_target,
        }
