"""``SemilinearSDE``: a linear SDE plus a nonlinearity, for exponential schemes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .linear import Coefficient, LinearSDE
from .sde import SDE


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

    _term = "nonlinearity"

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
        self.constant_diffusion = linear.constant_matrix
        self.additive = linear.constant_matrix is not None
        self._drift = nonlinearity  # where ControlProblem looks for the user's modules

    def nonlinearity(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """``n(x, t)``, ``(batch, d)``."""
        return super().drift(x, t, condition)

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return self.linear_part.drift(x, t) + self.nonlinearity(x, t, condition)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear_part.diffusion(x, t)
