"""Annealed Langevin as a chain, with its kernels backwards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..processes.annealed import AnnealedLangevin
from ..tensors import event_sum
from .base import Chain

__all__ = ["AnnealedChain"]


class AnnealedChain(Chain):
    """Annealed Langevin, forwards and backwards, with steps of length ``e = relaxations h / T`` in units of the local variance v::

        F_k: x' = x  + a_k grad log pi_{t_k}(x)       + s_k (c_k + xi),      scheme "euler":        a = v e/2,             s^2 = v e,
        B_k: x  = x' + a_k grad log pi_{t_{k+1}}(x')  + s_k (xi' - b_k),     scheme "exponential":  a = v (1 - e^{-e/2}),  s^2 = v (1 - e^{-e}),

    v taken in the middle of the step. The exponential scheme holds what the score has beside that of a Gaussian of variance v: for such a one it is its exact transition,
    stable however long the step. Weak order 1.
    """

    backward = True

    def __init__(
        self, sde: AnnealedLangevin, clock: list[float], scheme: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.reference, self.scheme = sde, scheme
        self._set_times(clock, dtype, device)
        self.event_shape = self.noise_shape = self.control_shape = sde.event_shape
        self.backward_control = sde.backward_control
        self._betas = [sde.beta(t) for t in clock[:-1]] + [1.0]
        self._steps, self._gains = [], []
        for t, h in zip(clock, self.step_sizes):
            v, e = sde.variance(t + 0.5 * h), sde.relaxations * h / sde.horizon
            pull, spread = (0.5 * e, e) if scheme == "euler" else (-math.expm1(-0.5 * e), -math.expm1(-e))
            self._steps.append(((pull * v).to(device, dtype), (spread * v).sqrt().to(device, dtype)))
            self._gains.append(
                math.sqrt(h) * (2 * pull / e) / math.sqrt(spread / e)
            )  # a held control's effect over the scale

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        pull, scale = self._steps[k]
        return x + pull * self.reference.annealed_score(x, self._betas[k], condition), scale

    def backward_kernel(self, k: int, end: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        pull, scale = self._steps[k]
        return end + pull * self.reference.annealed_score(end, self._betas[k + 1], condition), scale

    def log_origin(self, x: Tensor) -> Tensor:
        return event_sum(-0.5 * ((x - self.reference.centre) / self.reference.scale).square(), 1)

    def double(self) -> Chain:
        return AnnealedChain(self.reference, self.clock, self.scheme, torch.float64, self.times.device)

    def gain(self, k: int) -> float:
        return self._gains[k]
