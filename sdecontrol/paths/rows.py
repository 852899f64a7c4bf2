"""Rows that do not know of one another: a chunk at a time, and split between processes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ranks
from ..randomness import BLOCK


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
