"""``SemilinearSDE``: a linear SDE plus a nonlinearity, for exponential schemes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tensors import check_output, probing
from .linear import Coefficient, LinearSDE
from .sde import SDE, positional_count


class SemilinearSDE(SDE):
    """``dX = (A X + offset + n(X, t)) dt + sigma dW`` with a known linear part.

    Any scheme takes it; ``scheme="exponential"`` integrates the linear part and the noise exactly, so that a stiff A (a
    discretised heat equation, a fast spring) does not bound the step.

    Args:
        A: ``(d, d)``, or a function of time ``t -> (d, d)``.
        nonlinearity: ``n(x, t) -> (batch, d)`` with t a 0-d tensor; ``(x, t, y)`` where the problem has a condition.
        sigma: ``(d, m)``, a number or 0-d tensor (times the identity), or a function of time returning one of these.
        offset: ``(d,)``, a function of time, or None for zero.
        horizon: the end time T > 0.

    Attributes:
        linear_part: ``dX = (A X + offset) dt + sigma dW``.
        driven_part: ``dX = A X dt + I dW``, whose response to a held control is that of a held nonlinearity.
    """

    def __init__(
        self,
        A: Coefficient,
        nonlinearity: Callable[..., Tensor],
        sigma: Any,
        offset: Coefficient | None = None,
        horizon: float = 1.0,
    ) -> None:
        self.linear_part = LinearSDE(A, sigma, offset, horizon)
        if not callable(nonlinearity):
            raise TypeError(
                f"nonlinearity must be callable (x, t) -> (batch, d), got {type(nonlinearity).__name__}; "
                "for a linear process use LinearSDE."
            )
        self.driven_part = LinearSDE(A, 1.0, None, horizon)
        linear = self.linear_part
        self.event_shape, self.control_shape = linear.event_shape, linear.control_shape
        self.dtype, self.device, self.horizon = linear.dtype, linear.device, linear.horizon
        self._constant, self._diffusion_function = linear._constant, linear._diffusion_function
        self.additive = linear._constant is not None
        self._drift = nonlinearity  # where ControlProblem looks for the user's modules
        self.drift_takes_condition = positional_count(nonlinearity) >= 3

    def nonlinearity(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """``n(x, t)``, ``(batch, d)``."""
        return self._drift(x, t, condition) if self.drift_takes_condition else self._drift(x, t)

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return self.linear_part.drift(x, t) + self.nonlinearity(x, t, condition)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear_part.diffusion(x, t)

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        rows = 5 if self.event_shape[0] != 5 else 6
        x = torch.zeros((rows, *self.event_shape), dtype=dtype, device=device) + 0.5
        y = None if condition is None else condition[torch.arange(rows, device=condition.device) % len(condition)]
        t = torch.zeros((), dtype=dtype, device=device) + 0.5 * self.horizon
        with torch.no_grad():
            with probing("nonlinearity", f"nonlinearity(x, t), x {tuple(x.shape)}, t 0-d"):
                value = self.nonlinearity(x, t, y)
            check_output("nonlinearity", value, x.shape, x, "Its first dimension is the batch.")
