"""The exact solution of a chain of two coordinates that stops in a region, or whose reward is -inf somewhere.

As on a line (:mod:`.stopped`), averages over a step are sums over nodes in the place of the step's end. The nodes are
the middles of the cells of a grid, finer than a step's noise: for what is smooth there the sum is exact to rounding. A
cell through which an edge goes (of the region, of the set where the reward is a number) has a node for each of its
parts, at the part's centre with the part's area, so that errors are of second order in the cells.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import NoExactSolution
from ..memory import Remembered
from ..processes.laws import draw
from ..randomness import Place, generator_for
from .grids import Grid
from .stopping import StoppedSolution

FINENESS = (1.6, 2.4)  # cells in a standard deviation of the narrowest step, of the two grids that are compared
_REACH = 6.0  # standard deviations of a step that are summed over
_FAR, _FEW = 3.0, 0.01  # largest shift, in standard deviations, but of so few states of optimal paths
_TILTED = 1.0  # largest shift that weights are tilted by
_PARTS = (8, 32)  # points a side by which a cell's parts are found: of every cell, and of those with an edge
_MOST = 60_000  # cells
_JUMP = 1e-3  # of a reward, relative to its range
_STABLE = 1e-5  # change of log Z at which the range is wide enough
_WIDEST = 8  # times that it is widened by a quarter on both sides
_PATHS = 512  # optimal ones, on which shifts are looked at
_BLOCK = 1 << 22  # weights that are computed at once


class Nodes(NamedTuple):
    """Nodes ``y (N, 2)`` with their areas; whether each is inside the region; and ``r/alpha``, averaged as ``exp`` over
    its part of a cell."""

    y: np.ndarray
    area: np.ndarray
    inside: np.ndarray
    reward: np.ndarray


class Sums:
    """Averages over Gaussian steps from ``n`` states: sparse weights of nodes ``(n, N)``, normalised. A step's mean
    beyond the range is held at its edge."""

    def __init__(self, nodes: Nodes, grid: Grid, mean: np.ndarray, root: np.ndarray) -> None:
        from scipy import sparse
        from scipy.spatial import KDTree

        half = 0.5 * grid.spacings
        if np.isnan(mean).any():
            raise NoExactSolution("drift: it is not a number at some states where the cells of the plane need it.")
        self.mean, self.root = mean.clip(grid.lows - half, grid.highs + half), root
        self.nodes, self.grid = nodes, grid
        inverse = np.linalg.inv(root)
        one = np.abs(root - root[:1]).max() <= 1e-12 * np.abs(root).max()  # noise that does not depend on the state
        widest = 1.0 if one else float(np.linalg.norm(root, 2, axis=(1, 2)).max())
        map_ = inverse[0] if one else np.eye(2)
        tree = KDTree(nodes.y @ map_.T)
        parts = []
        self.size = max(1, int(_BLOCK * self._share(grid, root)))
        for low in range(0, len(mean), self.size):
            rows = slice(low, low + self.size)
            near = KDTree(self.mean[rows] @ map_.T).sparse_distance_matrix(tree, _REACH * widest, output_type="ndarray")
            i, j, z = near["i"], near["j"], near["v"]
            if not one:
                z = np.linalg.norm(np.einsum("nij,nj->ni", inverse[rows][i], nodes.y[j] - self.mean[rows][i]), axis=1)
            shape = (len(self.mean[rows]), len(nodes.y))
            parts.append(sparse.csr_matrix((np.exp(-0.5 * z * z) * nodes.area[j], (i, j)), shape))
        self.weights: Any = sparse.vstack(parts, format="csr")
        total = np.asarray(self.weights.sum(1)).ravel()
        self.weights = sparse.diags_array(1 / total).tocsr() @ self.weights

    @staticmethod
    def _share(grid: Grid, root: np.ndarray) -> float:
        """One over the nodes that a row has, roughly."""
        widest = float(np.linalg.norm(root, 2, axis=(1, 2)).max())
        return float(np.prod(grid.spacings)) / (math.pi * (_REACH * widest) ** 2 + float(np.prod(grid.spacings)))

    def log_average(self, values: np.ndarray) -> np.ndarray:
        """``log sum_j w_ij exp(values_j)``, ``(n,)``; -inf where nothing is left."""
        return self.tilted(values)[0]

    def tilted(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, and ``E[xi]`` under the steps tilted by ``exp(values)``, ``(n, 2)``; 0 where nothing is left."""
        top = values.max()
        if top == -np.inf:
            return np.full(len(self.mean), -np.inf), np.zeros((len(self.mean), 2))
        mass = np.exp(values - top)
        found = self.weights @ np.column_stack((mass, mass[:, None] * self.nodes.y))
        left = found[:, 0] > 0
        level, shift = np.full(len(self.mean), -np.inf), np.zeros((len(self.mean), 2))
        level[left] = top + np.log(found[left, 0])
        apart = found[left, 1:] / found[left, :1] - self.mean[left]
        shift[left] = np.linalg.solve(self.root[left], apart[..., None])[..., 0]
        return level, shift

    def shifted_mean(self, values: np.ndarray, c: np.ndarray) -> np.ndarray:
        """``E V(m + S (c + xi))`` of numbers, ``(n,)``, by weights that are tilted towards the shifts ``c (n, 2)``."""
        if np.abs(c).max() > _TILTED:  # what lies that far has no weights here
            moved = self.mean + np.einsum("nij,nj->ni", self.root, c)
            return Sums(self.nodes, self.grid, moved, self.root).weights @ values
        slope, found = np.linalg.solve(self.root, c[..., None])[..., 0], []
        start, column, weight, y = self.weights.indptr, self.weights.indices, self.weights.data, self.nodes.y
        for low in range(0, len(c), self.size):
            high = min(low + self.size, len(c))
            part, lengths = slice(start[low], start[high]), np.diff(start[low : high + 1])
            row, j = np.repeat(np.arange(low, high), lengths), column[part]
            tilted = weight[part] * np.exp((slope[row] * (y[j] - self.mean[row])).sum(1))
            sums = np.stack([np.add.reduceat(v, start[low:high] - start[low]) for v in (tilted * values[j], tilted)])
            found.append(sums[0] / sums[1])
        return np.concatenate(found)


def _square(rows: Tensor) -> np.ndarray:
    """The symmetric roots ``(n, 2, 2)`` of the covariances of steps with noises ``(n, 2, m)``."""
    size, axes = torch.linalg.eigh(rows @ rows.mT)
    return ((axes * size.sqrt().unsqueeze(1)) @ axes.mT).numpy()


class StoppedPlaneSolution(StoppedSolution):
    """Exact solution of a chain of two coordinates with a region to stop in, or with a reward that is -inf somewhere.

    ``control`` is the mean shift of the soft-optimal kernel, of all shifts the one whose kernel is nearest to that, and
    ``elbo`` what it reaches where the reward is a number, a little less than the best shift would. All is
    solved on two grids of 1.6 and 2.4 cells a standard deviation.

    Attributes:
        error: by how much log Z differs between the two grids; the finer one's own is about as large.
    """

    kind = "cells of the plane"

    def _solve(self) -> None:
        self._shifts_of = Remembered(self._table, self._wide.steps)
        low, high, narrow = self._range()
        spacings = narrow / FINENESS[0]
        self._check(spacings, (high - low) / spacings)
        counts = np.maximum(8, np.ceil((high - low) / spacings)).astype(int)
        low, before = 0.5 * (low + high - counts * spacings), math.nan
        for tried in range(_WIDEST):
            now = self._solve_on(low, spacings, counts, tried > 0)
            if abs(now - before) <= _STABLE * (1 + abs(now)):
                break
            more, before = np.ceil(0.25 * counts).astype(int), now  # whole cells, so that edges cut them as before
            low, counts = low - more * spacings, counts + 2 * more
        else:
            raise self._lost()
        finer = FINENESS[1] / FINENESS[0]
        counts = np.ceil(counts * finer).astype(int)
        self.error = abs(self._solve_on(low, spacings / finer, counts, False) - now)
        self._check_reach()

    def _solve_on(self, low: np.ndarray, spacings: np.ndarray, counts: np.ndarray, tried: bool) -> float:
        if tried and math.prod(counts.tolist()) > _MOST:
            raise self._lost()
        self._check(spacings, counts)
        self._grid = Grid(low + 0.5 * spacings, low + (counts - 0.5) * spacings, counts.tolist())
        self._nodes = self._lay(self._grid)
        self._soft = self._backwards()
        return self._start_value(soft=True)

    def _check_reach(self) -> None:
        """Raise where optimal paths move farther in a step than its sums reach."""
        shifts = [torch.zeros(0, dtype=torch.float64)]
        x = draw(self.problem.origin, _PATHS, 1).to("cpu", torch.float64)
        generator = generator_for("cpu", 0, Place.PLANE_WALK)
        for k in range(self._wide.steps):
            mean, rows, _ = self._step(x, k)
            c, inside = self._shift(x, k), torch.from_numpy(self._inside(x))
            shifts.append(c[~inside].norm(dim=1))
            xi = torch.randn(c.shape, generator=generator, dtype=torch.float64)
            x = torch.where(inside.unsqueeze(1), x, mean + (rows @ (c + xi).unsqueeze(2)).squeeze(2))
        sizes = torch.cat(shifts)
        far = float((sizes > _FAR).double().mean()) if len(sizes) else 0.0
        if far > _FEW or not math.isfinite(self._start_value(soft=True)):
            raise NoExactSolution(
                f"optimal paths move by more than {_FAR:g} standard deviations of a step ({far:.0%} of their steps), "
                f"or farther than its sums reach ({_REACH:g}): use more time steps, or estimate (sc.TemperedSMC)."
            )

    @staticmethod
    def _check(spacings: np.ndarray, counts: np.ndarray) -> None:
        if not float(counts[0]) * float(counts[1]) <= _MOST:
            span = counts * spacings
            raise NoExactSolution(
                f"a range of {span[0]:.2g} by {span[1]:.2g} with steps whose noise asks for cells of {spacings[0]:.2g} "
                f"by {spacings[1]:.2g}: that is more than {_MOST} cells. Use fewer time steps, or estimate (sc.SMC)."
            )

    # ---------------------------------------------------------------- nodes

    def _parts_of(self, middles: np.ndarray, spacings: np.ndarray, side: int) -> tuple[np.ndarray, ...]:
        """Of cells, points ``(n, side^2, 2)``, the kind of each (inside, and whether its reward is a number) and its
        reward."""
        one = (np.arange(side) + 0.5) / side - 0.5
        inner = np.stack(np.meshgrid(one, one, indexing="ij"), -1).reshape(-1, 2) * spacings
        points = middles[:, None] + inner
        x = torch.from_numpy(points.reshape(-1, 2))
        shape = points.shape[:2]
        reward = self._reward(x).reshape(shape)
        return points, self._inside(x).reshape(shape) + 2 * np.isfinite(reward), reward

    def _lay(self, grid: Grid) -> Nodes:
        coarse, fine = _PARTS
        found, whole = [], grid.points
        reward = self._reward(torch.from_numpy(whole))
        number = reward[np.isfinite(reward)]
        self._span = float(np.ptp(number)) if len(number) else 0.0
        for low in range(0, len(whole), 1 << 14):
            middles = whole[low : low + (1 << 14)]
            points, kinds, reward = self._parts_of(middles, grid.spacings, coarse)
            cut = (kinds != kinds[:, :1]).any(1)
            found.append(self._whole(middles[~cut], kinds[~cut, 0], reward[~cut], grid))
            for some in np.array_split(middles[cut], max(1, int(cut.sum()) // 512)):
                points, kinds, reward = self._parts_of(some, grid.spacings, fine)
                found += [self._part(points, kinds == kind, kind, reward, grid) for kind in range(4)]
        return Nodes(*(np.concatenate(v) for v in zip(*found)))

    @staticmethod
    def _mean_reward(reward: np.ndarray, there: np.ndarray) -> np.ndarray:
        """``log mean exp`` over a part of each cell."""
        reward = np.where(there, reward, -np.inf)
        top = reward.max(1)
        safe = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            return safe + np.log(np.exp(reward - safe[:, None]).sum(1) / there.sum(1))

    def _whole(self, middles: np.ndarray, kinds: np.ndarray, reward: np.ndarray, grid: Grid) -> Nodes:
        """Cells without an edge; where the reward jumps in one, between numbers, its average stands for it."""
        area = np.full(len(middles), float(np.prod(grid.spacings)))
        middle = self._reward(torch.from_numpy(middles)) if len(middles) else area
        side = math.isqrt(reward.shape[1])
        number = np.where(np.isfinite(reward), reward, 0.0).reshape(-1, side, side)
        range_ = np.ptp(number, axis=(1, 2))
        step = np.maximum(*(np.abs(np.diff(number, axis=axis)).max((1, 2)) for axis in (1, 2)))
        jumps = (step > 0.5 * range_) & (range_ > _JUMP * self._span)
        return Nodes(
            middles, area, kinds % 2 == 1, np.where(jumps, self._mean_reward(reward, reward == reward), middle)
        )

    def _part(self, points: np.ndarray, there: np.ndarray, kind: int, reward: np.ndarray, grid: Grid) -> Nodes:
        some = there.any(1)
        points, there, reward = points[some], there[some], reward[some]
        count = there.sum(1)
        middle = (points * there[..., None]).sum(1) / np.maximum(count, 1)[:, None]
        area = float(np.prod(grid.spacings)) * count / there.shape[1]
        return Nodes(middle, area, np.full(len(middle), kind % 2 == 1), self._mean_reward(reward, there))

    # ---------------------------------------------------------------- the recursion

    def _places(self) -> None:
        """Where averages are computed: at the middles of all cells, and at the other nodes outside of the region."""
        grid, nodes = self._grid, self._nodes
        at = np.rint((nodes.y - grid.lows) / grid.spacings).astype(int)
        middle = np.abs(grid.lows + at * grid.spacings - nodes.y).max(1) <= 1e-9 * grid.spacings.max()
        place = at[:, 0] * grid.counts[1] + at[:, 1]
        own = ~middle & ~nodes.inside
        place[own] = len(grid.points) + np.arange(int(own.sum()))
        self._x = torch.from_numpy(np.concatenate((grid.points, nodes.y[own])))
        self._free, self._place = np.flatnonzero(~nodes.inside), place

    def _sums(self, k: int) -> tuple[Sums, np.ndarray]:
        """Step k from the places, and its costs there."""
        if self._held is None or not self._homogeneous:
            self._held = self._from(self._x, k)
        return self._held

    def _at_nodes(self, values: np.ndarray) -> np.ndarray:
        """From values at the places to those at the nodes, ``r/alpha`` in the region."""
        now = self._nodes.reward.copy()
        now[self._free] = values[self._place[self._free]]
        return now

    def _backwards(self) -> np.ndarray:
        """``w_k = v_k/alpha`` at the nodes, ``(K+1, N)``."""
        self._held: tuple[Sums, np.ndarray] | None = None
        self._places()
        values = [self._nodes.reward]
        for k in reversed(range(self._wide.steps)):
            sums, cost = self._sums(k)
            values.append(self._at_nodes(sums.log_average(values[-1]) - cost))
        return np.stack(values[::-1])

    def _table(self, k: int) -> Any:
        """The mean shifts of step k as a function of the plane, along the axes of its covariance's root."""
        shift = self._sums(k)[0].tilted(self._soft[k + 1])[1]
        return self._grid.table(shift[: len(self._grid.points)].T)

    @property
    def _numbers(self) -> bool:
        return bool(np.isfinite(self._nodes.reward).all())

    @cached_property
    def _shifted(self) -> list[np.ndarray]:
        """Values of the mean-shift chain at the nodes, ``(K+1, N)``."""
        values = [self._nodes.reward]
        for k in reversed(range(self._wide.steps)):
            values.append(self._at_nodes(self._moved(*self._sums(k), k, values[-1])))
        return values[::-1]

    def _moved(self, sums: Sums, cost: np.ndarray, k: int, values: np.ndarray) -> np.ndarray:
        """``-h f/alpha - |c|^2/2 + E V(m + S (c + xi))`` of states outside of the region."""
        c = sums.tilted(self._soft[k + 1])[1]
        return sums.shifted_mean(values, c) - 0.5 * (c * c).sum(1) - cost

    def _from(self, x: Tensor, k: int) -> tuple[Sums, np.ndarray]:
        """Step k from any states, and its costs there."""
        mean, rows, cost = self._step(x, k)
        return Sums(self._nodes, self._grid, mean.numpy(), _square(rows)), cost

    # ---------------------------------------------------------------- anywhere

    def _values(self, x: Tensor, k: int) -> np.ndarray:
        reward, inside = self._reward(x), self._inside(x)
        if k == self._wide.steps:
            return reward
        sums, cost = self._from(x, k)
        return np.where(inside, reward, sums.log_average(self._soft[k + 1]) - cost)

    def _shift(self, x: Tensor, k: int) -> Tensor:
        rows = self._step(x, k).rows
        c = torch.linalg.solve(torch.from_numpy(_square(rows)), self._shifts_of(k)(x).mT.unsqueeze(2))
        outside = torch.from_numpy(~self._inside(x)).unsqueeze(1)
        return (rows.mT @ c).squeeze(2) * outside

    def _start_average(self, soft: bool) -> float:
        return self._averaged(self._soft[0], soft)

    def _averaged(self, values: np.ndarray, soft: bool) -> float:
        mean, cov = self._first_moments()
        root = _square(torch.linalg.cholesky(cov).unsqueeze(0))
        law = Sums(self._nodes, self._grid, mean.numpy().reshape(1, 2), root)
        return float(law.log_average(values)[0] if soft else (law.weights @ values)[0])

    def _reached(self) -> float:
        if self._point is None:
            return self._averaged(self._shifted[0], soft=False)
        if self._inside(self._point)[0]:
            return float(self._reward(self._point)[0])
        return float(self._moved(*self._from(self._point, 0), 0, self._shifted[1])[0])
