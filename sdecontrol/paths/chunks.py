"""Chunks of paths, for runs that do not fit in memory, and the parts of several processes: noise and starts of path i
never depend on the chunk it is in."""

from dataclasses import replace
from typing import Any

import torch

from .. import ranks
from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..randomness import BLOCK, SeededNoise, SuppliedNoise
from ..shapes import States
from .integrator import RunningCost, integrate
from .paths import Paths, Totals
from .rows import chunks_of, padded_rows


def check_chunk(chunk: Any, keep: str, name: str = "chunk") -> int:
    """A multiple of 64, and nothing but the ends kept.

    Args:
        name: of the argument, for what is raised.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1 or chunk % BLOCK:
        raise ValueError(f"{name} must be a multiple of {BLOCK} paths (noise is drawn in such blocks), got {chunk!r}.")
    if keep != "end":
        raise ValueError(f"{name} is for paths that do not fit in memory: pass keep='end' with it, not {keep!r}.")
    return chunk


def integrate_in_chunks(
    chain: Chain,
    x: States,
    noise: SeededNoise | SuppliedNoise,
    shift: ShiftFunction | None,
    chunk: int | None,
    *,
    condition: Any = None,
    running_cost: RunningCost | None = None,
    steps: range | None = None,
) -> Paths:
    """As ``integrate(..., keep="end")``, ``chunk`` paths at a time (None: all); the last chunk is padded to a multiple
    of 64 with copies of its last row, so that matrix products see the row counts that give the same bits. Of several
    processes each runs a part of the paths, and all get all of them."""
    how: dict[str, Any] = {"running_cost": running_cost, "steps": steps}
    shares = ranks.shares(len(x), BLOCK)
    if shares is None:
        return _in_chunks(chain, x, noise, shift, chunk, condition, how)
    mine = shares[ranks.rank()]
    some, y = slice(mine.start, mine.stop), condition
    with ranks.together(), ranks.alone():
        source = noise.rows(mine.start, mine.stop)
        part = _in_chunks(chain, x[some], source, shift, chunk, None if y is None else y[some], how)
    counts = [len(share) for share in shares]
    seed = f" and seed {noise.seed}" if isinstance(noise, SeededNoise) else ""
    return replace(
        part,
        end=ranks.gathered(part.end, counts, f"paths of {chain.steps} steps{seed}"),
        condition=condition,
        totals=part.totals.map(lambda v: ranks.gathered(v, counts, "sums of paths")),
        shared=True,
    )


def _in_chunks(
    chain: Chain,
    x: States,
    noise: SeededNoise | SuppliedNoise,
    shift: ShiftFunction | None,
    chunk: int | None,
    condition: Any,
    how: dict[str, Any],
) -> Paths:
    if chunk is None:
        return integrate(chain, x, noise, shift, condition=condition, keep="end", **how)
    parts: list[Paths] = []
    for chunk_rows in chunks_of(x.shape[0], chunk):
        low, count = chunk_rows.start, len(chunk_rows)
        if isinstance(noise, SeededNoise):
            rows = padded_rows(chunk_rows, x.device)
        else:
            rows = torch.arange(low, low + count, device=x.device)
        y, source = None if condition is None else condition[rows], noise.rows(low, low + len(rows))
        parts.append(integrate(chain, x[rows], source, shift, condition=y, keep="end", **how).rows(slice(count)))
    end = torch.cat([part.end for part in parts])
    totals = Totals.joined([part.totals for part in parts])
    return replace(parts[0], end=end, condition=condition, totals=totals, chunk=chunk)
