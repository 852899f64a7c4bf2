"""The dynamic programmes of a chain of two coupled coordinates on a grid of the plane, whatever directions its noise
has, one alone among them."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import NoExactSolution
from .grids import Grid, Table, differences, local_weights

_NODES = 16  # of Gauss and Hermite, for each noise
_EDGE = 0.25  # of the grid, beside it on each side


class PlaneStep(NamedTuple):
    """A step at the grid's points: mean ``(N, 2)``, the scale of the noise ``(2, m)``, ``h f/alpha`` ``(N,)``."""

    mean: np.ndarray
    scale: np.ndarray
    cost: np.ndarray


class PlaneGrid:
    """Soft values of a chain on a plane, its control and what that reaches, from the last step to the first::

        w_k(x) = -h f/alpha + log E exp w_{k+1}(m + S xi)
        c_k(x) = S' grad_m log E exp w_{k+1}(m + S xi)
        V_k(x) = -h f/alpha - |c_k|^2/2 + E V_{k+1}(m + S (c_k + xi)).

    ``c_k`` is the mean of the noise under the soft-optimal kernel, and so of all shifts the one whose kernel is nearest
    to that. As steps grow short it is u*. The best shift of ``V`` (docs/mathematics.md, section 3) is nearly as good
    near two equally good ways, between which it chooses at once and this one as late as the noise; but it jumps there,
    and so does the slope of its value, which grids of the plane do not hold.

    Attributes:
        soft: ``w`` of all states ``(K+1, N)``; shifted: likewise ``V``; slopes: ``(K, 2, N)`` with ``c = S' slope``.
    """

    def __init__(self, grid: Grid, steps: list[PlaneStep], end: np.ndarray) -> None:
        self.grid, self.steps, self._plane, self._end = grid, steps, _Plane(grid), end
        soft, slopes = [end], []
        for step in reversed(steps):
            average = self._plane.average(self._plane.pad(soft[-1]), step.scale, True)
            value, one, two = self._plane.table(average, True)(torch.from_numpy(step.mean)).numpy()
            soft.append(value - step.cost)
            slopes.append(np.stack([one, two]))
        self.soft, self.slopes = np.array(soft[::-1]), np.array(slopes[::-1])

    @cached_property
    def shifted(self) -> np.ndarray:
        found = [self._end]
        for step, slope in zip(reversed(self.steps), self.slopes[::-1]):
            c = slope.T @ step.scale
            average = self._plane.table(self._plane.average(self._plane.pad(found[-1]), step.scale, False), False)
            value = average(torch.from_numpy(step.mean + c @ step.scale.T))[0].numpy()
            found.append(value - 0.5 * (c * c).sum(1) - step.cost)
        return np.array(found[::-1])


class _Plane:
    """A grid with a margin, on which functions of the plane are moved, averaged and interpolated."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.extra = grid, tuple(int(_EDGE * count) for count in grid.counts)
        self.counts = tuple(count + 2 * extra for count, extra in zip(grid.counts, self.extra))
        self.lows, self.spacings = grid.lows - np.array(self.extra) * grid.spacings, grid.spacings
        self._first = [differences(count)[0] for count in self.counts]
        self._moves: dict[tuple[int, float], Any] = {}

    def pad(self, values: np.ndarray) -> np.ndarray:
        """``(N,)`` to the wider grid, held at the ends: where nothing smooths a coordinate, what is continued otherwise
        grows from step to step."""
        return np.pad(values.reshape(self.grid.counts), [(extra, extra) for extra in self.extra], mode="edge")

    def _move(self, axis: int, by: float) -> Any:
        """The matrix that takes values at the points to those ``by`` farther along an axis."""
        from scipy import sparse

        if (axis, by) not in self._moves:
            lo, dx, count = float(self.lows[axis]), float(self.spacings[axis]), self.counts[axis]
            index, weights = local_weights(torch.from_numpy(lo + dx * np.arange(count) + by), lo, dx, count)
            start = np.arange(0, index.numel() + 1, index.shape[1])
            parts = (weights.flatten().numpy(), index.flatten().numpy(), start)
            self._moves[axis, by] = sparse.csr_matrix(parts, (count, count))
        return self._moves[axis, by]

    def _moved(self, w: np.ndarray, by: np.ndarray) -> np.ndarray:
        w = self._move(0, float(by[0])) @ w if by[0] else w
        return (self._move(1, float(by[1])) @ w.T).T if by[1] else w

    def average(self, w: np.ndarray, scale: np.ndarray, soft: bool) -> np.ndarray:
        """``log E exp w(y + scale xi)``, or ``E w(y + scale xi)``, one noise after another."""
        points, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        weights = weights / weights.sum()
        for column in scale.T:
            parts = np.stack([self._moved(w, column * z) for z in points])
            if soft:
                top = parts.max(0)
                w = top + np.log(np.tensordot(weights, np.exp(parts - top), 1))
            else:
                w = np.tensordot(weights, parts, 1)
        return w

    def table(self, w: np.ndarray, gradient: bool) -> Table:
        """A function, with its gradient if asked."""
        channels = [w]
        if gradient:
            channels += [self._first[0] @ w / self.spacings[0], (self._first[1] @ w.T).T / self.spacings[1]]
        return Table(np.stack(channels), self.lows, self.spacings)


def plane_steps(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[PlaneStep]:
    """Steps from mean ``(N, 2)``, rows of the noise ``(N, 2, m)`` and costs ``(N,)``.

    Raises:
        NoExactSolution: the noise depends on the state.
    """
    steps = []
    for mean, rows, cost in parts:
        if np.abs(rows - rows[:1]).max() > 1e-12 * np.abs(rows).max():
            raise NoExactSolution(
                "diffusion: two coordinates that act on each other are solved on a chain where the noise does not "
                "depend on the state, and here it does; leave time_steps and like out for continuous time."
            )
        steps.append(PlaneStep(mean, rows[0][:, np.abs(rows[0]).any(0)], cost))
    return steps
