"""A replay buffer of stored paths, all of it registered buffers, so that a resumed run goes on with the same paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..problems.rollouts import Rollout
from ..randomness import generator_for

__all__ = ["ReplayBuffer"]


class ReplayBuffer(nn.Module):
    """The last ``size`` paths, of ``size (K+1) (event + noise)`` numbers.

    Args:
        condition: one row of the problem's conditions, or None.
    """

    def __init__(self, chain: Chain, size: int, condition: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.chain, self.size = chain, size
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        K = chain.steps
        self.register_buffer("states", torch.zeros(K + 1, size, *chain.event_shape, **options))
        self.register_buffer("draws", torch.zeros(K, size, *chain.noise_shape, **options))
        self.register_buffer("shifts", torch.zeros(K, size, *chain.noise_shape, **options))
        self.register_buffer("reward", torch.zeros(size, **options))
        self.register_buffer("costs", torch.zeros(K, size, **options))
        if chain.backward:
            self.register_buffer("backward_draws", torch.zeros(K, size, *chain.noise_shape, **options))
            self.register_buffer("backward_shifts", torch.zeros(K, size, *chain.noise_shape, **options))
        self.conditional = condition is not None
        if self.conditional:
            self.register_buffer("condition", condition[:1].repeat(size, *(1 for _ in condition.shape[1:])))
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def _parts(self, rollout: Rollout) -> list[tuple[Tensor, Tensor, int]]:
        """Buffer, paths, and the dimension that counts paths."""
        pairs = [(self.states, rollout.states, 1), (self.draws, rollout.draws, 1), (self.shifts, rollout.shifts, 1)]
        pairs += [(self.reward, rollout.reward, 0), (self.costs, rollout.costs, 1)]
        if self.chain.backward:
            pairs += [
                (getattr(self, name), getattr(rollout, name), 1) for name in ("backward_draws", "backward_shifts")
            ]
        return pairs + ([(self.condition, rollout.condition, 0)] if self.conditional else [])  # type: ignore[list-item]

    @torch.no_grad()
    def add(self, rollout: Rollout) -> None:
        """Store paths, over the oldest."""
        n = len(rollout.reward)
        where = (torch.arange(n, device=self.reward.device) + int(self.count)) % self.size  # type: ignore[union-attr]
        for buffer, values, dim in self._parts(rollout):
            buffer.index_copy_(dim, where, values)
        self.count += n

    def draw(self, n: int, seed: int) -> Rollout:
        """``n`` of the stored paths, uniformly, without repetition (n is at most what was stored)."""
        stored = min(int(self.count), self.size)
        index = torch.randperm(stored, generator=generator_for("cpu", seed))[:n].to(self.reward.device)  # type: ignore[arg-type]
        whole = Rollout(
            self.chain,
            self.states,  # type: ignore[arg-type]
            self.draws,  # type: ignore[arg-type]
            self.shifts,  # type: ignore[arg-type]
            self.reward,  # type: ignore[arg-type]
            self.costs,  # type: ignore[arg-type]
            self.condition if self.conditional else None,
            *((self.backward_draws, self.backward_shifts) if self.chain.backward else ()),  # type: ignore[arg-type]
        )
        return whole.rows(index)
