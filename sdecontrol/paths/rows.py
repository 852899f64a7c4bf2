"""Rows that do not know of one another: a chunk at a time, some of them alone, and split between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..randomness import BLOCK

_MOST = 0.75  # of the rows: beyond, all are taken


@dataclass(frozen=True)
class Some:
    """Some rows of a batch of ``size``: ``index``, each as often as it takes for a multiple of 64 of them."""

    index: Tensor
    size: int

    @classmethod
    def where(cls, chosen: Tensor | None) -> Some | None:
        """The rows ``(batch,)`` that are chosen; None where all of them cost no more."""
        if chosen is None:
            return None
        index = chosen.nonzero().flatten()
        if not len(index):
            return cls(index, len(chosen))
        rows = padded_rows(range(len(index)), index.device)  # matrix products see counts that give the same bits
        return None if len(rows) >= len(chosen) else cls(index[rows], len(chosen))

    def of(self, values: Any) -> Any:
        """These rows of ``(batch, ...)``, or of None."""
        return None if values is None else values[self.index]

    def put(self, values: Tensor, into: Tensor) -> Tensor:
        """Values of these rows among those of all."""
        return into.index_copy(0, self.index, values)

    def among_zeros(self, values: Tensor) -> Tensor:
        return self.put(values, values.new_zeros(self.size, *values.shape[1:]))


@dataclass(frozen=True)
class SomeOfEach:
    """Some rows of each of K steps, as many of each: ``index (K, m)``, ``real (K, m)`` those that are no filling."""

    index: Tensor
    real: Tensor
    size: int

    @classmethod
    def where(cls, chosen: Tensor | None) -> SomeOfEach | None:
        """The rows ``(K, batch)`` that are chosen; None where all of them cost no more."""
        if chosen is None:
            return None
        counts = chosen.sum(1, keepdim=True)
        most, size = max(1, int(counts.max())), chosen.shape[1]
        if most > _MOST * size:
            return None
        index = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        return cls(index, torch.arange(most, device=index.device) < counts, size)

    def of(self, stored: Tensor) -> Tensor:
        """These rows of ``(K, batch, ...)``."""
        return stored[torch.arange(len(self.index), device=stored.device).unsqueeze(1), self.index]

    def among_zeros(self, values: Tensor) -> Tensor:
        """Values ``(K, m, ...)`` of these rows among zeros for the others, ``(K, batch, ...)``."""
        wide = (*self.index.shape, *(1,) * (values.ndim - 2))
        kept = torch.where(self.real.reshape(wide), values, 0.0)
        zeros = values.new_zeros(len(values), self.size, *values.shape[2:])
        return zeros.scatter_add(1, self.index.reshape(wide).expand_as(kept), kept)


def chunks_of(count: int, size: int) -> list[range]:
    """``count`` rows, ``size`` at a time."""
    return [range(low, min(low + size, count)) for low in range(0, count, size)]


def padded_rows(chunk: range, device: torch.device) -> Tensor:
    """The rows of a chunk, and copies of the last of them up to a multiple of 64."""
    count = -(-len(chunk) // BLOCK) * BLOCK
    return torch.arange(chunk.start, chunk.start + count, device=device).clamp(max=chunk.stop - 1)


def by_chunks(function: Callable[..., Sequence[Tensor]], size: int | None, *rows: Tensor | None) -> tuple[Tensor, ...]:
    """What a function gives of rows that do not know of one another, ``size`` of them at a time (None: all at once).

    Args:
        rows: its arguments, of the same length each; or None.
    """
    count = next(len(v) for v in rows if v is not None)
    device = next(v.device for v in rows if v is not None)
    if size is None or size >= count:
        return tuple(function(*rows))
    found = []
    for chunk in chunks_of(count, size):
        some = padded_rows(chunk, device)
        found.append([v[: len(chunk)] for v in function(*(None if v is None else v[some] for v in rows))])
    return tuple(map(torch.cat, zip(*found)))


def between_ranks(
    function: Callable[..., Sequence[Tensor]], size: int | None, *rows: Tensor | None
) -> tuple[Tensor, ...]:
    """:func:`by_chunks` of rows that all processes have: each asks for a part of them, and gets the whole, without a
    graph."""
    count = next(len(v) for v in rows if v is not None)
    if (shares := ranks.shares(count, BLOCK)) is None:
        return by_chunks(function, size, *rows)
    mine = shares[ranks.rank()]
    some = slice(mine.start, mine.stop)
    with ranks.together(), ranks.alone():
        found = by_chunks(function, size, *(None if v is None else v[some] for v in rows))
    counts = [len(share) for share in shares]
    return tuple(ranks.gathered(v, counts) for v in found)
