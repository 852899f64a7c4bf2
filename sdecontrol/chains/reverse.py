"""Chains whose target is made of backward kernels, ``pi(x_K) prod_k B_k(x_k | x_{k+1})``: annealed Langevin.

With the same scale as the forward kernel, ``B_k: x_k = mean'_k(x_{k+1}) + scale_k (xi' - b_k)``, ``xi' ~ N(0, I)``; the control enters forward with +
and backward with -, ``b_k`` being its shift at ``(x_{k+1}, t_{k+1})`` (Vargas et al. 2307.01050, Controlled Monte Carlo Diffusions; at the last step its time is
``t_{K-1}``, the last at which a chain has a control). In the place of a running cost there is a functional of the path, the logarithm of::

    p0(x_K) prod_k B_k(x_k | x_{k+1}) / ( p0(x_0) prod_k F^0_k(x_{k+1} | x_k) ),

F^0 the forward kernels without control: 0 for a reference that is reversible with respect to p0, as Ornstein-Uhlenbeck is. With the reward
``log rho - log p0`` the total is ``R`` with ``E[exp(R) dQ0/dP^u] = Z`` exactly, for any control and any number of steps, since all kernels are normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory import recall, remembering
from ..tensors import event_sum
from .base import Chain
from .shifts import ShiftFunction, shift_function, shifts_along

__all__ = ["BackwardRun", "backward_shifts_along", "log_reversal", "look_back", "remembered", "reversal_along"]


def remembered(shift: ShiftFunction) -> ShiftFunction:
    """A shift function that remembers its last value: the backward kernel of a step asks for what the next step needs."""
    return lambda k, x, y: recall(shift, k, x, lambda: shift(k, x, y))


def look_back(
    chain: Chain, k: int, x: Tensor, end: Tensor, shift: ShiftFunction | None, condition: Any
) -> tuple[Tensor, Tensor | None]:
    """``(x_k - mean'_k(x_{k+1})) / scale_k``, the draw that would have made the step backwards without a control, and the control's ``b_k`` (None for none)."""
    mean, scale = chain.backward_kernel(k, end, condition)
    draw = (x - mean) / scale
    return draw, None if shift is None or not chain.backward_control else _backward_shift(
        chain, k, end, shift, condition
    )


def _backward_shift(chain: Chain, k: int, end: Tensor, shift: ShiftFunction, condition: Any) -> Tensor:
    """``gain_k u(x_{k+1}, t_{k+1})``."""
    return shift(min(k + 1, chain.steps - 1), end, condition) * _gain_ratio(chain, k)


def _gain_ratio(chain: Chain, k: int) -> float:
    """From the shift of the step that begins where step k ends to one of step k."""
    return float(chain.gain(k)) / float(chain.gain(min(k + 1, chain.steps - 1)))


def log_reversal(chain: Chain, x: Tensor, end: Tensor, draw: Tensor, back: Tensor, b: Tensor | None) -> Tensor:
    """``log p0(x_{k+1}) B_k(x_k | x_{k+1}) / (p0(x_k) F^0_k(x_{k+1} | x_k))``, ``(..., batch)``.

    Args:
        x, end: ``x_k`` and ``x_{k+1}``. draw: ``c_k + xi_k``. back, b: as :func:`look_back` gives them.
    """
    n = len(chain.noise_shape)
    back = back if b is None else back + b
    return event_sum(0.5 * (draw.square() - back.square()), n) + chain.log_origin(end) - chain.log_origin(x)


def backward_shifts_along(
    chain: Chain,
    control: Any,
    states: Tensor,
    condition: Any,
    steps: Sequence[int] | None = None,
    c: Tensor | None = None,
) -> Tensor:
    """``b_k`` of a control at stored states ``(K+1, batch, *event)``, for all steps or the given ones.

    Args:
        c: the control's forward shifts of all steps, where they are known: nearly all ``b_k`` follow from them.
    """
    shift = shift_function(chain, control)
    if steps is not None:
        return torch.stack([_backward_shift(chain, k, states[k + 1], shift, condition) for k in steps])
    c = shifts_along(chain, control, states[:-1], condition) if c is None else c
    after = torch.cat((c[1:], shift(chain.steps - 1, states[-1], condition).unsqueeze(0)))
    ratios = after.new_tensor([_gain_ratio(chain, k) for k in range(chain.steps)])
    return after * ratios.reshape(-1, *(1,) * (after.ndim - 1))


def reversal_along(chain: Chain, control: Any, states: Tensor, draws: Tensor, condition: Any = None) -> Tensor:
    """The whole functional of stored paths, ``(batch,)``, with this control in the backward kernels (None: without)."""
    shift = None if control is None else shift_function(chain, control)
    total = states.new_zeros(states.shape[1])
    with remembering():
        for k in range(chain.steps):
            back, b = look_back(chain, k, states[k], states[k + 1], shift, condition)
            total = total + log_reversal(chain, states[k], states[k + 1], draws[k], back, b)
    return total


class BackwardRun(Chain):
    """The backward kernels of a chain as a chain of their own, from ``x_K`` to ``x_0``: its step j undoes step ``K-1-j``."""

    def __init__(self, chain: Chain, control: Any = None) -> None:
        self.chain, self.reference = chain, chain.reference
        self.event_shape, self.noise_shape, self.control_shape = (
            chain.event_shape,
            chain.noise_shape,
            chain.control_shape,
        )
        self._set_times([chain.clock[-1] - t for t in reversed(chain.clock)], chain.times.dtype, chain.times.device)
        self._shift = None if control is None or not chain.backward_control else shift_function(chain, control)

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        j = self.steps - 1 - k
        mean, scale = self.chain.backward_kernel(j, x, condition)
        if self._shift is not None:
            mean = mean - scale * _backward_shift(self.chain, j, x, self._shift, condition)
        return mean, scale
