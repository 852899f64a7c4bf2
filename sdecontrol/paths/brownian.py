"""Brownian increments on a grid, in torchsde's protocol, and the same paths on coarser grids."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..shapes import NoisePaths
from .integrator import NoiseSource


class GridBrownian:
    """The increments of W over the steps of a grid, in torchsde's protocol; found by a step's times, so stateless.

    ``W = sqrt(h) xi`` and ``U = int (W_s - W_t) ds = h (W/2 + sqrt(h/12) eta)``: given W, U is independent noise around
    ``h W/2`` (the bridge's integral), so (W, U) has its exact joint law.

    Args:
        clock: the grid's K+1 times.
        noise: ``noise[offset + k]`` is xi of step k, ``(batch, *noise)``; the first ``width`` of its entries are used.
        area: the same for eta, or None.
        pad: append so many zeros to W (for states that have no noise).
    """

    def __init__(
        self,
        clock: Sequence[float],
        noise: NoiseSource,
        batch: int,
        width: int,
        like: Tensor,
        *,
        area: NoiseSource | None = None,
        offset: int = 0,
        pad: int = 0,
    ) -> None:
        self._clock, self._noise, self._area, self._offset, self._width = list(clock), noise, area, offset, width
        self._steps = {t: k for k, t in enumerate(self._clock[:-1])}
        self._shape, self._pad, self._like = (batch, width + pad), pad, like

    def __call__(
        self, ta: Tensor | float, tb: Tensor | float | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        k = self._steps.get(float(ta))
        if k is None or tb is None or float(tb) != self._clock[k + 1] or return_A:
            raise RuntimeError(f"increments are known over the steps of the grid only, not from {ta} to {tb}.")
        h = self._clock[k + 1] - self._clock[k]
        W = self._one(self._noise, k) * math.sqrt(h)
        if not return_U:
            return W
        assert self._area is not None
        return W, 0.5 * h * W + self._one(self._area, k) * (h * math.sqrt(h / 12))

    def _one(self, source: NoiseSource, k: int) -> Tensor:
        xi = source[self._offset + k].flatten(1)[:, : self._width]
        return torch.nn.functional.pad(xi, (0, self._pad)) if self._pad else xi

    def __repr__(self) -> str:
        return f"GridBrownian({len(self._steps)} steps, shape={self._shape})"

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def levy_area_approximation(self) -> str:
        return "none" if self._area is None else "space-time"


def coarsen(
    clock: Sequence[float], noise: NoisePaths, areas: NoisePaths | None = None, every: int = 2
) -> tuple[Any, ...]:
    """The same Brownian paths on a coarser grid: increments summed over ``every`` steps.

    Args:
        clock: ``(K+1,)`` times of the fine grid, K a multiple of ``every``.
        noise: standard normal numbers of its steps.
        areas: those of the space-time integrals ("srk"), or None.

    Returns:
        The coarse clock, noise ``(K/every, ...)`` and areas (or None), standard normal numbers again.
    """
    times = torch.as_tensor(clock, dtype=torch.float64)
    if (len(times) - 1) % every or noise.shape[0] != len(times) - 1:
        raise ValueError(f"coarsen needs one noise a step and a multiple of {every} steps, got {tuple(noise.shape)}.")
    h = (times[1:] - times[:-1]).to(noise).reshape(-1, every, *(1,) * (noise.ndim - 1))
    W = noise.unflatten(0, (-1, every)) * h.sqrt()
    H = h.sum(1)
    total = W.sum(1)
    coarse = (times[::every].tolist(), total / H.sqrt())
    if areas is None:
        return (*coarse, None)
    own = h * (0.5 * W + areas.unflatten(0, (-1, every)) * (h / 12).sqrt())
    U = (own + h * (W.cumsum(1) - W)).sum(1)  # int (W_s - W_a) ds over [a, c]: each step starts where W then is
    return (*coarse, (U - 0.5 * H * total) / (H * (H / 12).sqrt()))
