"""Chunks of paths, for runs that do not fit in memory: noise and starts of path i never depend on the chunk it is
in."""

from dataclasses import replace
from typing import Any

import torch

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..randomness import BLOCK, SeededNoise, SuppliedNoise
from ..shapes import States
from .integrator import RunningCost, integrate
from .paths import Paths, Totals


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
    x: States,
    noise: SeededNoise | SuppliedNoise,
    shift: ShiftFunction | None,
    chunk: int,
    *,
    condition: Any = None,
    running_cost: RunningCost | None = None,
    steps: range | None = None,
) -> Paths:
    """As ``integrate(..., keep="end")``, ``chunk`` paths at a time; the last chunk is padded to a multiple of 64 with
    copies of its last row, so that matrix products see the row counts that give the same bits."""
    parts: list[Paths] = []
    for low in range(0, x.shape[0], chunk):
        high = min(low + chunk, x.shape[0])
        padded = isinstance(noise, SeededNoise)
        rows = torch.arange(low, low + -(-(high - low) // BLOCK) * BLOCK if padded else high, device=x.device)
        rows = rows.clamp(max=high - 1)
        y, source = None if condition is None else condition[rows], noise.rows(low, low + len(rows))
        part = integrate(chain, x[rows], source, shift, condition=y, running_cost=running_cost, keep="end", steps=steps)
        parts.append(part.rows(slice(high - low)))
    end = torch.cat([part.end for part in parts])
    totals = Totals.joined([part.totals for part in parts])
    return replace(parts[0], end=end, condition=condition, totals=totals, chunk=chunk)
