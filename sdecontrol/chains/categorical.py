"""Categorical kernels: states are tokens, and given ``x_k`` the positions of ``x_{k+1}`` are independent, each with
probabilities of its own.

A control tilts the log-probabilities, ``p^u ~ p0 exp(u)``; its part of a step is ``c = u - log sum p0 exp(u)``, the
normalised log-ratio ``log p^u - log p0`` of every value at every position. Draws are by Gumbel-max from standard normal
noise, so that a step is a function of its noise, as everywhere. For a single position the soft-optimal kernel is of
this form, and no floor remains; a product of positions has one (docs/mathematics.md, section 10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..memory import recall
from ..precision import at_least_single
from ..processes.finite import StateSpace, check_tokens, probe_tokens
from ..processes.laws import Dirac
from ..processes.reference import Reference
from ..shapes import (
    ControlPaths,
    Controls,
    DrawPaths,
    NoisePaths,
    Noises,
    PerStep,
    Scalar,
    StatePaths,
    States,
    TokensOrRelaxed,
)
from ..tensors import check_count, check_output, event_sum, probing
from .base import Chain
from .transitions import product_transition

if TYPE_CHECKING:
    from scipy import sparse


def gumbel(xi: Tensor) -> Tensor:
    """Standard Gumbel numbers of standard normal ones, monotonically: ``-log(-log Phi(xi))``."""
    return -(-torch.special.log_ndtr(xi)).log()


class CategoricalKernels(Chain):
    """What chains with categorical kernels share; one of them writes ``log_probs`` alone.

    Attributes:
        values: number of tokens, 0 .. values-1, that a position can have.
        independent: whether positions are independent given the state; else ``log_probs`` are the margins of what is
            drawn.
    """

    gaussian = of_noise = False
    independent: bool = True
    state_dtype = torch.int64
    values: int

    def log_probs(self, k: int, x: States, condition: Any = None) -> Noises:
        """``log p0(x_{k+1} = v | x_k)`` of every position, ``(batch, *event, values)``; -inf where v cannot follow."""
        raise NotImplementedError

    # ---------------------------------------------------------------- what a control tilts, for guidance

    def letters(self, k: int, x: States, condition: Any = None) -> Controls:
        """The log-probabilities that a control tilts, ``(batch, *control_shape)``."""
        return self.log_probs(k, x, condition)

    def open(self, x: States) -> Tensor:
        """The positions that may change, ``(batch, *shape)``."""
        return torch.ones_like(x, dtype=torch.bool)

    def valued_at(self, k: int) -> int:
        """The step as whose states the neighbours of step k's are valued: those that it leads to."""
        return k + 1

    def memo(self, k: int, x: States, condition: Any = None) -> Tensor | None:
        return self.log_probs(k, x, condition)

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        logits = self.log_probs(k, x, condition)
        return ((logits if c is None else logits + self.checked(c, k)) + gumbel(xi)).argmax(-1)

    def checked(self, c: Noises, k: int) -> Noises:
        """A control's shift, which no state would show not to be a number: some token is always the largest.

        Raises:
            NonFiniteError: with the step.
        """
        if bool((bad := c.isnan()).any()):
            rows = int(bad.flatten(1).any(1).sum())
            raise NonFiniteError(
                f"control is not a number at step {k} of {self.steps} (t = {self.clock[k]:.4g}), in {rows} rows. Check "
                "the control there (a smaller learning rate, if it was being trained).",
                what="control",
                step=k,
                rows=rows,
            )
        return c

    def draws(
        self, noises: NoisePaths, shifts: NoisePaths, states: StatePaths | None, before: StatePaths | None = None
    ) -> DrawPaths:
        assert states is not None
        return states

    def log_ratio(self, c: NoisePaths, draws: DrawPaths) -> PerStep:
        return event_sum(c.gather(-1, draws.unsqueeze(-1)).squeeze(-1), self.event_ndim)

    def kl(
        self,
        c: NoisePaths,
        states: StatePaths | Sequence[States] | None,
        steps: Iterable[int],
        condition: Any = None,
        other: NoisePaths | None = None,
    ) -> PerStep:
        assert states is not None
        logits = torch.stack([self.log_probs(k, x, condition) for k, x in zip(steps, states)])
        tilted = (logits + c).exp()
        gained = c if other is None else c - other
        return event_sum((tilted * gained.where(tilted > 0, 0.0)).sum(-1), self.event_ndim)

    def surprisal(self, draws: DrawPaths) -> PerStep:
        return self.times.new_zeros(draws.shape[: draws.ndim - self.event_ndim])

    def shift_at(self, k: int, x: States, u: Controls, condition: Any = None) -> Noises:
        return u - (self.log_probs(k, x, condition) + u).logsumexp(-1, keepdim=True)

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        return torch.stack([self.shift_at(k, x, here, condition) for k, x, here in zip(steps, states, u)])

    def together(self, k: int, x: TokensOrRelaxed, first: Noises, second: Noises, condition: Any = None) -> Noises:
        return self.shift_at(k, x, self.control(k, first + second), condition)

    def control(self, k: int, c: Noises) -> Controls:
        return c

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        return [("log_probs", self.log_probs(k, x, condition).exp())]

    # ---------------------------------------------------------------- where all states can be listed

    @property
    def space(self) -> StateSpace:
        """All states that there are: every position with every value."""
        return StateSpace(self.values, self.event_shape)

    def following(self, x: States) -> Tensor:
        """The token that each value is, where a position takes it at the next step, ``(batch, *event, values)``."""
        return torch.arange(self.values, device=x.device).expand(*x.shape, -1)

    def transition(self, k: int) -> sparse.csr_array:
        """The kernel of step k between all states, ``(n, n)`` in float64, rows and columns as :attr:`space` has
        them."""
        return product_transition(self.space, lambda x: self.log_probs(k, x.to(self.times.device)))


class CategoricalChain(Reference, CategoricalKernels):
    """A chain on tokens ``0 .. values-1`` at every position of ``start``, in steps of time ``1/K``.

    Args:
        log_probs: ``(k, x) -> (batch, *shape, values)``, ``(k, x, y)`` with a condition: ``log p0(x_{k+1} = v | x_k)``
            of every position, normalised over the last dimension, -inf where a value cannot follow; x
            ``(batch, *shape)`` int64, k an int.
        steps: K. values: number of tokens. start: ``(*shape)`` int64, where all paths begin.
        dtype: of the probabilities, and of all else that is no token.
    """

    continuous = gaussian = of_noise = differentiable = False
    state_dtype = torch.int64

    def __init__(
        self,
        log_probs: Callable[..., Tensor],
        steps: int,
        values: int,
        start: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("steps", steps)
        check_count("values", values, least=2)
        if not isinstance(start, Tensor) or start.dtype != torch.int64 or start.ndim == 0:
            raise TypeError("start must be an int64 tensor (*shape): the tokens at which all paths begin.")
        self.function, self.values, self.reference, self.horizon = log_probs, values, self, 1.0
        self.dtype, self.device = at_least_single(dtype or torch.get_default_dtype()), start.device
        self.event_shape, self.own_initial = start.shape, Dirac(start)
        self.noise_shape = self.control_shape = torch.Size((*start.shape, values))
        self.memo_shape: torch.Size | None = self.noise_shape
        self.set_times([k / steps for k in range(steps + 1)], self.dtype, self.device)

    def log_probs(self, k: int, x: States, condition: Any = None) -> Noises:
        """``log p0(. | x_k)``, ``(batch, *shape, values)``: once a step, though control, step and KL ask for it."""
        rest = () if condition is None else (condition,)
        return recall(self, k, x, lambda: self.function(k, x, *rest))

    # ---------------------------------------------------------------- what a problem asks of a reference

    def check_states(self, name: str, x: States) -> None:
        """Raise unless these are tokens.

        Raises:
            TypeError: of another dtype. ValueError: out of range.
        """
        check_tokens(name, x, self.values)

    def probe_states(self, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> States:
        return probe_tokens(self.values, rows, self.event_shape, device, seed)

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        """Call the log-probabilities once and check what they are.

        Raises:
            TypeError, ValueError: of another shape or dtype, or not normalised.
        """
        x = self.own_initial.sample((5,))
        y = None if condition is None else condition[torch.arange(5, device=condition.device) % len(condition)]
        called = f"log_probs(k, x{'' if y is None else ', y'}), x {tuple(x.shape)}"
        with torch.no_grad(), probing("log_probs", called, arguments=(x, y)):
            value = self.log_probs(0, x, y)
        check_output(
            "log_probs", value, (5, *self.noise_shape), self.times, "One number for every value of every position."
        )
        if not bool(((value.logsumexp(-1)).abs() < 1e-4).all()):
            raise ValueError("log_probs must be normalised over its last dimension: use .log_softmax(-1).")

    def numbers(self, x: States, t: Scalar, condition: Any = None) -> dict[str, Tensor]:
        return {"log_probs": self.log_probs(self.step_at(float(t)), x, condition).exp()}

    def describe(self) -> dict[str, Any]:
        shape = list(self.event_shape)
        return {"kind": "CategoricalChain", "event_shape": shape, "values": self.values, "steps": self.steps}
