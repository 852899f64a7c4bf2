"""``SDE``: a process ``dX = b(X, t) dt + sigma(X, t) dW`` given by plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..precision import at_least_single, call
from ..tensors import as_float, check_not_random, check_output, check_tensor, is_matrix_scale, probing
from .reference import Reference

#: ``(k, x, condition) -> (drift, diffusion)`` at the k-th of a list of times.
StepFunction = Callable[[int, Tensor, Any], tuple[Tensor, Tensor]]

MEMORYLESS = 0.01  #: largest correlation of start and end that counts as memoryless
_PROBE = 5  # rows of a probe batch; made different from every dimension it could be confused with


class SDE(Reference):
    """``dX = drift(X, t) dt + diffusion(X, t) dW`` on ``0 <= t <= horizon``.

    Args:
        drift: ``(x, t) -> (batch, *event)`` with x ``(batch, *event)`` and t a 0-d tensor; ``(x, t, y)`` where the
            problem has a condition y.
        diffusion: a number or 0-d tensor, standard deviations of the event's shape, a ``(d, m)`` matrix (vector
            events), or a function ``(x, t)`` returning a number or 0-d tensor, ``(batch, *event)`` (diagonal) or
            ``(batch, d, m)``.
        dim: size d of a vector state; or give ``shape``.
        horizon: the end time T > 0.
        shape: the event's shape, for states of any rank.

    Attributes:
        event_shape, control_shape: shapes of one state and of one control (``(m,)`` for a matrix diffusion).
    """

    _shared_matrix = False  # whether the diffusion function gives one matrix for all rows, which its first probe says
    _term = "drift"  # the method that calls the user's function of state and time

    def __init__(
        self,
        drift: Callable[..., Tensor],
        diffusion: Any,
        dim: int | None = None,
        horizon: float = 1.0,
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        if (dim is None) == (shape is None):
            raise TypeError("give exactly one of dim (vector states) and shape (states of any rank).")
        if dim is not None and not isinstance(dim, Integral):
            raise TypeError(f"dim must be an int, the size of a vector state, got {dim!r}; shape=(...) is for images.")
        self.event_shape = torch.Size((int(dim),) if dim is not None else tuple(int(n) for n in shape or ()))
        if len(self.event_shape) == 0 or min(self.event_shape) < 1:
            raise ValueError(
                f"the event's shape must have at least one dimension, all >= 1; got {tuple(self.event_shape)}."
            )
        if not callable(drift):
            raise TypeError(f"drift must be callable (x, t) -> (batch, *event), got {type(drift).__name__}.")
        self.horizon = as_float("horizon", horizon, positive=True)
        self._drift = drift
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        if callable(diffusion):
            self.additive = False
            self._diffusion_function = diffusion
            self.control_shape = self.event_shape  # settled by the first probe
        else:
            constant = self._check_constant(diffusion)
            self.constant_diffusion = constant
            self.control_shape = constant.shape[-1:] if is_matrix_scale(constant, self.event_ndim) else self.event_shape

    @classmethod
    def from_torchsde(cls, sde: Any, dim: int, horizon: float = 1.0) -> SDE:
        """An SDE from an object with torchsde's protocol: methods ``f(t, y)`` and ``g(t, y)`` (or ``f_and_g``),
        attributes ``noise_type`` and ``sde_type``.

        Args:
            sde: the object; an nn.Module keeps its parameters, which are never trained.
            dim: size d of the state.
            horizon: the end time T > 0.

        Raises:
            TypeError: it lacks the protocol. ValueError: an unknown noise type, or a Stratonovich equation.
        """
        from .foreign import torchsde_functions

        return cls(*torchsde_functions(sde), dim=dim, horizon=horizon)

    @property
    def event_ndim(self) -> int:
        return len(self.event_shape)

    def _check_constant(self, sigma: Any) -> Tensor:
        hint = (
            "diffusion: a number, standard deviations of the event's shape, a (d, m) matrix, or a function of (x, t)."
        )
        if not isinstance(sigma, Tensor):
            if not isinstance(sigma, (int, float)):
                what = type(sigma).__name__
                raise TypeError(f"diffusion must be a number, a tensor (torch.tensor(...)) or a function, got {what}.")
            sigma = torch.tensor(as_float("diffusion", sigma))
        sigma = at_least_single(check_tensor("diffusion", sigma, hint=hint))
        if not bool((sigma != 0).any()):
            raise ValueError("diffusion is 0: without noise there is no control problem (no likelihood ratios).")
        if sigma.ndim:
            self.dtype, self.device = sigma.dtype, sigma.device
        if sigma.ndim == 0 or sigma.shape == self.event_shape:
            return sigma
        if self.event_ndim == 1 and sigma.ndim == 2 and sigma.shape[0] == self.event_shape[0]:
            return sigma.unsqueeze(0)
        raise ValueError(
            f"diffusion has shape {tuple(sigma.shape)}, which does not fit a state of shape "
            f"{tuple(self.event_shape)}. {hint}"
        )

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        """Call drift and diffusion once on random states and check what they return.

        Raises:
            TypeError, ValueError: naming the function, what it returned and what it should.
        """
        rows = _PROBE
        while rows in self.event_shape or (condition is None and rows == self.control_shape[0]):
            rows += 1
        x = self.probe_states(rows, dtype, device)
        y = None if condition is None else condition[torch.arange(rows, device=condition.device) % len(condition)]
        t = torch.zeros((), dtype=dtype, device=device) + 0.5 * self.horizon
        with torch.no_grad():
            more, alone = (", y", "x, t") if y is not None else ("", "")
            with probing(self._term, f"{self._term}(x, t{more}), x {tuple(x.shape)}, t 0-d", alone, (x, t, y)):
                value, again = (getattr(self, self._term)(x, t, y) for _ in range(2))
            check_output(self._term, value, x.shape, x, "Its first dimension is the batch.")
            check_not_random(self._term, value, again)
            if self._diffusion_function is not None:
                self._probe_diffusion(x, t)

    def _probe_diffusion(self, x: Tensor, t: Tensor) -> None:
        with probing("diffusion", f"diffusion(x, t), x {tuple(x.shape)}, t 0-d", arguments=(x, t)):
            raw, again = (call(self._diffusion_function, x, t) for _ in range(2))
        if not isinstance(raw, (Tensor, int, float)):
            raise TypeError(f"diffusion must return a number or a tensor, got {type(raw).__name__}.")
        value = torch.as_tensor(raw, dtype=x.dtype, device=x.device) if not isinstance(raw, Tensor) else raw
        if value.ndim:
            check_output("diffusion", value, value.shape, x)
        check_not_random("diffusion", value, torch.as_tensor(again, dtype=value.dtype, device=value.device))
        d = self.event_shape
        elementwise = value.ndim == 0 or value.shape == x.shape or value.shape == d
        self._shared_matrix = not elementwise and self.event_ndim == 1 and value.ndim == 2 and value.shape[0] == d[0]
        if self._shared_matrix or (self.event_ndim == 1 and value.ndim == 3 and value.shape[:2] == x.shape):
            self.control_shape = value.shape[-1:]
        elif not elementwise:
            raise ValueError(
                f"diffusion must return a number or 0-d tensor, {tuple(x.shape)} (diagonal)"
                + (f" or ({x.shape[0]}, {d[0]}, m)" if self.event_ndim == 1 else "")
                + f" for x of shape {tuple(x.shape)}; got {tuple(value.shape)}."
            )

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """``b(x, t)``, ``(batch, *event)``."""
        return call(self._drift, x, t) if condition is None else call(self._drift, x, t, condition)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """``sigma(x, t)``: elementwise (0-d, event or batch of events) or a matrix ``(1 | batch, d, m)``."""
        if self.constant_diffusion is not None:
            return self.constant_diffusion
        value = call(self._diffusion_function, x, t)
        if not isinstance(value, Tensor):
            return torch.as_tensor(value, dtype=x.dtype, device=x.device)
        return value.unsqueeze(0) if self._shared_matrix else value

    def differentiated(self, t: float) -> dict[str, Callable[..., Tensor]]:
        def diffusion(x: Tensor, y: Any = None) -> Tensor:
            value = self.diffusion(x, x.new_tensor(t))
            value = value if value.ndim > self.event_ndim else value.unsqueeze(0)
            return value.expand(len(x), *value.shape[1:])

        found: dict[str, Callable[..., Tensor]] = {}
        if self._drift is not None:
            found[self._term] = lambda x, y=None: getattr(self, self._term)(x, x.new_tensor(t), y)
        if self._diffusion_function is not None:
            found["diffusion"] = diffusion
        return found

    def on_grid(self, times: Tensor) -> StepFunction:
        """Drift and diffusion at each of ``times``, with whatever depends on time alone computed once."""
        clock = list(times)
        return lambda k, x, y: (self.drift(x, clock[k], y), self.diffusion(x, clock[k]))

    def diffusion_on_grid(self, times: Tensor) -> Callable[[int, Tensor], Tensor]:
        """``(k, x) -> sigma`` at each of ``times``."""
        clock = list(times)
        return lambda k, x: self.diffusion(x, clock[k])


def check_memoryless(memory: float | None) -> None:
    """Raise unless the end of a process has forgotten its start (correlation <= 0.01).

    Raises:
        ValueError: saying what is left, what it would bias, and the ways out.
    """
    if memory is None or memory > MEMORYLESS:
        left = "not known" if memory is None else f"{memory:.3g}"
        raise ValueError(
            f"start='memoryless' needs a reference whose end has forgotten its start (correlation <= {MEMORYLESS}); "
            f"here the correlation is {left}, so tilting the end without tilting the start would be biased. "
            "Use start='controlled' (learns the start), a schedule with more noise, or start='fixed' with its bias."
        )
