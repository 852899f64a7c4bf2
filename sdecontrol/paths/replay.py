"""A replay buffer of stored paths, all of it registered buffers, so that a resumed run goes on with the same paths."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from .paths import Paths, Record, Target, Totals


class ReplayBuffer(nn.Module):
    """The last ``size`` paths, of ``size (K+1) (event + 2 noise)`` numbers, as they were recorded.

    Args:
        condition: one row of the problem's conditions, or None.
        costs: whether there is a running cost.
    """

    def __init__(self, chain: Chain, size: int, condition: Any, costs: bool) -> None:
        super().__init__()
        self.chain, self.size = chain, size
        K, like, noise = chain.steps, chain.times, (size, *chain.noise_shape)
        self.record = ["states", "noises", "shifts"]  # what is stored of paths' records
        state = torch.zeros(K + 1, size, *chain.event_shape, dtype=chain.state_dtype or like.dtype, device=like.device)
        self.register_buffer("states", state)
        self.register_buffer("noises", like.new_zeros(K, *noise))
        self.register_buffer("shifts", like.new_zeros(K, *noise))
        if costs:
            self.record.append("costs")
            self.register_buffer("costs", like.new_zeros(chain.main.steps, size))
        if chain.reverse is not None:
            for name in ("back_draws", "back_shifts"):
                self.record.append(name)
                self.register_buffer(name, like.new_zeros(K, *noise))
        if chain.memo_shape is not None:
            self.record.append("memos")
            self.register_buffer("memos", like.new_zeros(K, size, *chain.memo_shape))
        for name in ("reward", "running_cost", "log_reverse"):
            self.register_buffer(name, like.new_zeros(size))
        self.conditional = condition is not None
        if self.conditional:
            self.register_buffer("condition", condition[:1].repeat(size, *(1 for _ in condition.shape[1:])))
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, paths: Paths) -> None:
        """Store paths that know their target, over the oldest; of a batch that is split, all of them everywhere."""
        where = (torch.arange(len(paths) * ranks.parts(), device=self.chain.times.device) + int(self.count)) % self.size
        rows = {"reward": paths.reward, "running_cost": paths.running_cost, "log_reverse": paths.totals.log_reverse}
        if self.conditional:
            rows["condition"] = paths.condition
        for name, values in rows.items():
            if values is not None:
                getattr(self, name).index_copy_(0, where, ranks.whole(values))
        for name in self.record:
            getattr(self, name).index_copy_(1, where, ranks.whole(paths.recorded(name), 1))
        self.count += len(where)

    def draw(self, n: int, generator: torch.Generator, target: Target, group_size: int = 1) -> Paths:
        """``n`` of the stored paths, uniformly, without repetition (n is at most what was stored); ``group_size``
        consecutive ones stay together. Of a batch that is split, the own rows."""
        stored = min(int(self.count), self.size) // group_size
        index = torch.randperm(stored, generator=generator)[: n // group_size].to(self.chain.times.device)
        if group_size > 1:
            index = (index.unsqueeze(1) * group_size + torch.arange(group_size, device=index.device)).flatten()
        index = ranks.own(index)
        record = Record(**{name: getattr(self, name)[:, index] for name in self.record})
        reverse = None if self.chain.reverse is None else self.log_reverse[index]  # type: ignore[index]
        totals = Totals(self.running_cost[index], reverse)  # type: ignore[index]
        y = self.condition[index] if self.conditional else None  # type: ignore[index]
        paths = Paths(self.chain, 0, self.chain.steps, record.states[-1], y, totals, record)
        return paths.towards(target, self.reward[index])  # type: ignore[index]
