"""Annealed Langevin as a chain, with its kernels backwards; and the chain that these are."""

import math
from typing import Any

import torch
from torch import Tensor

from ..processes.annealed import AnnealedLangevin
from ..shapes import Scale, States
from ..tensors import event_sum
from .base import Chain
from .reverse import ReverseLaw
from .shifts import shift_function


class AnnealedChain(Chain):
    """Annealed Langevin, forwards and backwards, with steps of length ``e = relaxations h / T`` in units of the local
    variance v::

        F_k: x' = x  + a_k grad log pi_{t_k}(x)       + s_k (c_k + xi),
        B_k: x  = x' + a_k grad log pi_{t_{k+1}}(x')  + s_k (xi' - b_k),
        scheme "euler":        a = v e/2,             s^2 = v e,
        scheme "exponential":  a = v (1 - e^{-e/2}),  s^2 = v (1 - e^{-e}),

    v taken in the middle of the step. The exponential scheme holds what the score has beside that of a Gaussian of
    variance v: for such a one it is its exact transition, stable however long the step. Weak order 1.
    """

    def __init__(
        self, sde: AnnealedLangevin, clock: list[float], scheme: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.reference, self.scheme = sde, scheme
        self.set_times(clock, dtype, device)
        self.event_shape = self.noise_shape = self.control_shape = sde.event_shape
        self._betas = [sde.beta(t) for t in clock[:-1]] + [1.0]
        self._steps, self._gains = [], []
        for t, h in zip(clock, self.step_sizes):
            v, e = sde.variance(t + 0.5 * h), sde.relaxations * h / sde.horizon
            drift, spread = (0.5 * e, e) if scheme == "euler" else (-math.expm1(-0.5 * e), -math.expm1(-e))
            self._steps.append(((drift * v).to(device, dtype), (spread * v).sqrt().to(device, dtype)))
            # a held control's effect over the scale
            self._gains.append(math.sqrt(h) * (2 * drift / e) / math.sqrt(spread / e))
        self.reverse = _Backwards(self)

    def langevin(self, k: int, at: int, x: States, condition: Any) -> tuple[States, Scale]:
        """Mean and scale of a Langevin step from x as long as step k, towards the density of the ``at``-th time."""
        drift, scale = self._steps[k]
        return x + drift * self.reference.annealed_score(x, self._betas[at], condition), scale

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        return self.langevin(k, k, x, condition)

    def double(self) -> Chain:
        return AnnealedChain(self.reference, self.clock, self.scheme, torch.float64, self.times.device)

    def gain(self, k: int) -> float:
        return self._gains[k]


class _Backwards(ReverseLaw):
    """``B_k`` of :class:`AnnealedChain`."""

    def __init__(self, chain: AnnealedChain) -> None:
        super().__init__([chain.gain(k) for k in range(chain.steps)], 1, chain.reference.controlled_target)
        self.chain = chain

    def kernel(self, k: int, end: States, condition: Any = None) -> tuple[States, Scale]:
        return self.chain.langevin(k, k + 1, end, condition)

    def log_origin(self, x: Tensor) -> Tensor:
        sde = self.chain.reference
        return event_sum(-0.5 * ((x - sde.centre) / sde.scale).square(), 1)


class ReversedChain(Chain):
    """The reverse law of a chain as a chain of its own, from ``x_K`` to ``x_0``: its step j undoes step ``K-1-j``.

    Raises:
        ValueError: a chain without one.
    """

    def __init__(self, chain: Chain, control: Any = None) -> None:
        if chain.reverse is None:
            raise ValueError(f"a {type(chain).__name__} has no reverse law.")
        self._made_from = chain, control
        self.reference, self._law = chain.reference, chain.reverse
        self.event_shape, self.noise_shape = chain.event_shape, chain.noise_shape
        self.control_shape = chain.control_shape
        self.set_times([chain.clock[-1] - t for t in reversed(chain.clock)], chain.times.dtype, chain.times.device)
        self._shift = None if control is None or not self._law.controlled else shift_function(chain, control)

    def __reduce__(self) -> tuple[Any, ...]:  # a shift function is a closure, made again
        return type(self), self._made_from

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        j = self.steps - 1 - k
        mean, scale = self._law.kernel(j, x, condition)
        if self._shift is not None:
            mean = mean - scale * self._law.shift(j, x, self._shift, condition)
        return mean, scale
