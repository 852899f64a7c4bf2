"""Chunks of paths, for runs that do not fit in memory: noise and starts of path i never depend on the chunk it is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..randomness import BLOCK, SeededNoise, SuppliedNoise
from .integrator import RunningCost, integrate
from .paths import Paths

__all__ = ["check_chunk", "integrate_in_chunks"]


def check_chunk(chunk: Any, keep: str) -> int:
    """A multiple of 64, and nothing but the ends kept.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1 or chunk % BLOCK:
        raise ValueError(f"chunk must be a multiple of {BLOCK} paths (noise is drawn in such blocks), got {chunk!r}.")
    if keep != "end":
        raise ValueError(f"chunk is for paths that do not fit in memory: pass keep='end' with it, not {keep!r}.")
    return chunk


def integrate_in_chunks(
    chain: Chain,
    x: Tensor,
    noise: SeededNoise | SuppliedNoise,
    shift: ShiftFunction | None,
    chunk: int,
    *,
    condition: Any = None,
    running_cost: RunningCost | None = None,
    first: int = 0,
    replay: Callable[[], Paths] | None = None,
) -> Paths:
    """As ``integrate(..., keep="end")``, ``chunk`` paths at a time; the last chunk is padded to a multiple of 64 with
    copies of its last row, so that matrix products see the row counts that give the same bits."""
    parts: list[Paths] = []
    for low in range(0, x.shape[0], chunk):
        high = min(low + chunk, x.shape[0])
        padded = isinstance(noise, SeededNoise)
        rows = torch.arange(low, low + -(-(high - low) // BLOCK) * BLOCK if padded else high, device=x.device)
        rows = rows.clamp(max=high - 1)
        options: dict[str, Any] = {
            "condition": None if condition is None else condition[rows],
            "running_cost": running_cost,
            "first": first,
        }
        source = noise.rows(low, low + len(rows))
        part = integrate(chain, x[rows], source, shift, keep="end", **options)
        parts.append(_cut(part, high - low))
    sums = [part._sums for part in parts if part._sums is not None]
    return Paths(
        chain,
        first=first,
        last=chain.steps,
        end=torch.cat([part.end for part in parts]),
        running_cost=torch.cat([part.running_cost for part in parts]),
        condition=condition,
        states=None,
        noises=None,
        shifts=None,
        sums=(torch.cat([s[0] for s in sums]), torch.cat([s[1] for s in sums])),
        replay=replay,
    )


def _cut(paths: Paths, rows: int) -> Paths:
    """Without the padding."""
    assert paths._sums is not None
    paths.end, paths.running_cost = paths.end[:rows], paths.running_cost[:rows]
    paths._sums = (paths._sums[0][:rows], paths._sums[1][:rows])
    return paths
