"""A learned start of tokens: a step before time 0 that draws X_0 from a finite law, and the chain that follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..processes.finite import FiniteLaw, probabilities
from ..shapes import Controls, Noises, Samples, States
from .base import Chain
from .categorical import CategoricalKernels

if TYPE_CHECKING:
    from scipy import sparse


def tilts_starts(reference: Any) -> bool:
    """Whether a control of this process of tokens has a number for each state that a start may be."""
    return reference.control_shape == (1, reference.values)


class FiniteStart(CategoricalKernels):
    """One step on [-1, 0), from anywhere to a draw of the start's law: of one categorical variable, so that its best
    tilt is the optimal start ``nu exp(v_0/alpha)/Z`` itself, and no floor is left.

    Args:
        law: of states of one token, of which there are ``values``.
    """

    def __init__(self, law: Any, values: int, dtype: torch.dtype, device: torch.device) -> None:
        self.reference: Any = law
        self.set_times([-1.0, 0.0], dtype, device)
        self.values, self.event_shape = values, torch.Size((1,))
        self.noise_shape = self.control_shape = torch.Size((1, values))
        probs = probabilities(FiniteLaw(torch.ones(values)).space, law)
        self._row = torch.from_numpy(probs).log().to(self.times)

    def log_probs(self, k: int, x: States, condition: Any = None) -> Noises:
        return self._row.expand(len(x), 1, -1)

    def double(self) -> Chain:
        return FiniteStart(self.reference, self.values, torch.float64, self.times.device)


class StartedTokens(CategoricalKernels):
    """A :class:`FiniteStart` and the chain of a process on the same states (:func:`tilts_starts`)."""

    def __init__(self, first: FiniteStart, second: Any) -> None:
        self.first, self.second, self.reference = first, second, second.reference
        self.values, self.event_shape = second.values, second.event_shape
        self.noise_shape, self.control_shape = second.noise_shape, second.control_shape
        self.scheme = second.scheme
        self.set_times(first.clock[:-1] + second.clock, second.times.dtype, second.times.device)

    @property
    def segments(self) -> tuple[Chain, ...]:
        return (self.first, self.second)

    def part(self, k: int) -> tuple[Any, int]:
        """The segment that step k belongs to, and the step's number there."""
        return (self.first, k) if k < self.first.steps else (self.second, k - self.first.steps)

    def log_probs(self, k: int, x: States, condition: Any = None) -> Noises:
        chain, j = self.part(k)
        return chain.log_probs(j, x, condition)

    def letters(self, k: int, x: States, condition: Any = None) -> Controls:
        chain, j = self.part(k)
        return chain.letters(j, x, condition)

    def transition(self, k: int) -> sparse.csr_array:
        chain, j = self.part(k)
        return chain.transition(j)

    def decode(self, x: States, condition: Any = None) -> Samples:
        return self.second.decode(x, condition)

    def double(self) -> Chain:
        return StartedTokens(*(chain.double() for chain in self.segments))  # type: ignore[arg-type]
