"""Finite state spaces: all states of a process on tokens, in order, and laws on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..randomness import Place, generator_for
from ..tensors import check_tensor

LARGEST = 10_000_000  #: states that are listed at most
_ROWS = 1 << 16  # states that a law is asked for at once


def check_tokens(name: str, x: Tensor, values: int) -> None:
    """Raise unless these are tokens, 0 .. values-1.

    Raises:
        TypeError: of another dtype. ValueError: out of range.
    """
    if x.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 tokens, got {x.dtype}; use {name}.long() if they are whole numbers.")
    if x.numel() and (int(x.min()) < 0 or int(x.max()) >= values):
        raise ValueError(f"{name} has tokens from {int(x.min())} to {int(x.max())}; they are 0 to {values - 1}.")


def probe_tokens(values: int, rows: int, shape: Sequence[int], device: torch.device, seed: int) -> Tensor:
    """Tokens ``(rows, *shape)`` to try functions with."""
    generator = generator_for("cpu", seed, Place.PROBE_TOKENS)
    return torch.randint(values, (rows, *shape), generator=generator).to(device)


class StateSpace:
    """The states of ``*shape`` tokens, each of ``0 .. values-1``, in order: the last position runs fastest.

    Attributes:
        size: number of states, ``values ** positions``.
    """

    def __init__(self, values: int, shape: Sequence[int]) -> None:
        self.values, self.shape = values, torch.Size(shape)
        self.positions = self.shape.numel()
        self.size = values**self.positions

    def states(self, index: Tensor) -> Tensor:
        """Those of an index ``(...)``: ``(..., *shape)`` int64."""
        weights = self.weights.to(index.device)
        return ((index.unsqueeze(-1) // weights) % self.values).reshape(*index.shape, *self.shape)

    @property
    def weights(self) -> Tensor:
        """``index(x) = sum weights x``, ``(positions,)``."""
        return self.values ** torch.arange(self.positions - 1, -1, -1)

    def index(self, x: Tensor) -> Tensor:
        """The index of states ``(..., *shape)``: ``(...)`` int64."""
        flat = x.flatten(x.ndim - len(self.shape))
        return (flat * self.weights.to(x.device)).sum(-1)

    def check(self, name: str, x: Any, batch: bool | None = None) -> Tensor:
        """x as int64 tokens of this space, with a batch dimension in front, without one, or (None) either.

        Raises:
            TypeError, ValueError: another dtype or shape, or a token out of range.
        """
        text = ", ".join(map(str, self.shape))
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be int64 tokens (batch, {text}), got {type(x).__name__}.")
        check_tokens(name, x, self.values)
        more = x.ndim - len(self.shape)
        if more not in ((0, 1) if batch is None else (int(batch),)) or x.shape[more:] != self.shape:
            raise ValueError(f"{name} must have shape (batch, {text}), got {tuple(x.shape)}.")
        return x


class FiniteLaw(Distribution):
    """A law on a finite state space.

    Args:
        probs: ``(..., n)``, >= 0, one for each state of the space, in its order; normalised here. Leading dimensions
            are a batch of laws.
        space: of n states; None: the states 0 .. n-1, of shape ``(1,)``, of a :class:`JumpProcess`.
    """

    def __init__(self, probs: Tensor, space: StateSpace | None = None) -> None:
        probs = check_tensor("FiniteLaw(probs)", probs, hint="one probability for each state.")
        self.space = space or StateSpace(probs.shape[-1], (1,))
        if not probs.ndim or probs.shape[-1] != self.space.size:
            raise ValueError(f"FiniteLaw(probs) must have shape (..., {self.space.size}), got {tuple(probs.shape)}.")
        if not bool((probs >= 0).all()) or not bool((probs.sum(-1) > 0).all()):
            raise ValueError("FiniteLaw(probs) must be >= 0, and not all 0.")
        self.probs = probs / probs.sum(-1, keepdim=True)
        super().__init__(probs.shape[:-1], self.space.shape, validate_args=False)

    def __repr__(self) -> str:
        return f"FiniteLaw({self.space.size} states, batch {tuple(self.batch_shape)}, event {tuple(self.event_shape)})"

    @property
    def mean(self) -> Tensor:
        """Of the tokens as numbers, ``(..., *shape)``."""
        states = self.space.states(torch.arange(self.space.size, device=self.probs.device))
        return (self.probs @ states.flatten(1).to(self.probs)).reshape(*self.batch_shape, *self.event_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        edges = self.probs.double().cumsum(-1).expand(*shape, -1) if self.batch_shape else self.probs.double().cumsum(0)
        u = torch.rand((*shape, 1), dtype=torch.float64, device=edges.device) * edges[..., -1:]
        # right=True: a state of probability 0 is not drawn by a number on its edge
        index = torch.searchsorted(edges.contiguous(), u.squeeze(-1) if edges.ndim == 1 else u.contiguous(), right=True)
        last = (self.probs > 0).long().cumsum(-1).argmax(-1)  # of those with probability
        index = index.reshape(shape)
        return self.space.states(torch.minimum(index, last.expand(shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of states ``(..., *shape)``, broadcast against the batch of laws."""
        index = self.space.index(self.space.check("value", value.reshape(-1, *self.event_shape), True))
        index = index.reshape(value.shape[: value.ndim - len(self.event_shape)])
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        found = self.probs.expand(*shape, -1).gather(-1, index.expand(shape).unsqueeze(-1))
        return found.squeeze(-1).log()


def probabilities(space: StateSpace, law: Distribution) -> np.ndarray:
    """Of all states under any law of tokens, ``(n,)`` float64.

    Raises:
        ValueError: they do not sum to one.
    """
    if isinstance(law, FiniteLaw) and law.probs.ndim == 1:
        probs = law.probs.double().cpu().numpy()
        return probs / probs.sum()
    with torch.no_grad():
        index = torch.arange(space.size, device=law.sample().device)
        parts = [law.log_prob(space.states(rows)) for rows in index.split(_ROWS)]
    probs = torch.cat([part.double().cpu().reshape(len(part), -1).sum(1) for part in parts]).exp().numpy()
    if abs(probs.sum() - 1) > 1e-4:
        raise ValueError(
            f"initial: the probabilities of all states sum to {probs.sum():.4g} under this {type(law).__name__}."
        )
    return probs / probs.sum()
