"""The exact solution of a chain on grids: the dynamic programmes of each coordinate (of a pair, ``plane_chain.py``), of
its soft values and of the best mean-shift chain.

Like the HJB equation (``grid_process.py``) for ``w = v/alpha``.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..shapes import Controls, States
from .grids import Grid, GridLaw, Table, differences, local_weights
from .on_grids import COUNTS, OnGrids
from .plane_chain import PlaneGrid, plane_steps
from .probing import MOMENTS, watched

if TYPE_CHECKING:
    from scipy import sparse

_REACH = 9.0  # standard deviations that an average over the noise takes in; widened with refinement


class ChainStep(NamedTuple):
    """A step at the grid's points: mean and scale of the noise ``(N,)``, and ``h f/alpha`` ``(N,)``."""

    mean: np.ndarray
    scale: np.ndarray
    cost: np.ndarray


class ChainGrid(NamedTuple):
    """Of each state of a one-dimensional chain, on its grid: soft value, value of the best mean-shift chain, and, for
    each step, ``slope`` with ``c = scale * slope`` (``E V'_{k+1}`` at the shifted kernel)."""

    grid: Grid
    soft: np.ndarray  # (K+1, N)
    shifted: np.ndarray  # (K+1, N)
    slopes: np.ndarray  # (K, N)
    steps: list[ChainStep]

    @property
    def stride(self) -> int:
        """Laws live on every so-many-th point: sums over a Gaussian need no finer grid than two fifths of its
        deviation."""
        narrowest = min(float(step.scale.min()) for step in self.steps)
        return max(1, min(int(0.4 * narrowest / self.grid.spacings[0]), (self.grid.counts[0] - 1) // 512))

    @property
    def law_points(self) -> tuple[np.ndarray, float]:
        """The points of laws ``(N,)``, and their spacing."""
        return self.grid.points[:: self.stride, 0], float(self.grid.spacings[0]) * self.stride

    def optimal_kernel(self, k: int, x: np.ndarray) -> np.ndarray:
        """The density of ``p*(. | x)`` of step k at the points of laws, ``(len(x), N)``: ``exp(w_{k+1}) p0``
        normalised.

        Raises:
            NoExactSolution: the step's noise is narrower than the grid's cells.
        """
        y, dx = self.law_points
        look = self.grid.table(np.stack([self.steps[k].mean, self.steps[k].scale]))
        mean, scale = (v.numpy() for v in look(torch.from_numpy(np.ascontiguousarray(x))[:, None]))
        if scale.min() < dx:
            raise NoExactSolution(
                f"the laws of the chain are not known: the noise of step {k} (standard deviation {scale.min():.3g}) is "
                f"narrower than the grid's cells ({dx:.3g}). Use fewer time steps; value and control are exact."
            )
        log = self.soft[k + 1, :: self.stride] - 0.5 * ((y - mean[:, None]) / scale[:, None]) ** 2
        density = np.exp(log - log.max(1, keepdims=True))
        return density / (density.sum(1, keepdims=True) * dx)


class _Interpolation:
    """From values on a grid to values at other points, inside and beyond its ends.

    Beyond an end values go on along a parabola through three points a 24th of the grid apart (neighbouring points would
    amplify rounding from step to step); where that opens upwards, along a line: ``exp`` of it would outweigh
    everything.
    """

    def __init__(self, grid: Grid) -> None:
        self.extra, self.gap = grid.counts[0] // 2, max(1, grid.counts[0] // 24)
        self.dx = float(grid.spacings[0])
        self.lo, self.count = float(grid.lows[0]) - self.extra * self.dx, grid.counts[0] + 2 * self.extra
        self._first, self._second = differences(self.count)

    def pad(self, values: np.ndarray) -> np.ndarray:
        """``(N,)`` to the values on the longer grid."""
        t = np.arange(1, self.extra + 1) / self.gap
        ends = []
        for w in (values, values[::-1]):
            bend = min(w[0] - 2 * w[self.gap] + w[2 * self.gap], 0.0)
            ends.append(w[0] + t * (w[0] - w[self.gap]) + 0.5 * t * (t + 1) * bend)
        return np.concatenate([ends[0][::-1], values, ends[1]])

    def table(self, values: np.ndarray) -> Table:
        """A function ``(N,)`` and its first two derivatives."""
        w = self.pad(values)
        channels = np.stack([w, self._first @ w / self.dx, self._second @ w / self.dx**2])
        return Table(channels, np.array([self.lo]), np.array([self.dx]))

    def matrix(self, points: np.ndarray) -> "sparse.csr_matrix":
        """``(points.size, number of padded values)``."""
        from scipy import sparse

        index, weights = local_weights(torch.from_numpy(points.ravel()), self.lo, self.dx, self.count)
        start = np.arange(0, index.numel() + 1, index.shape[1])
        return sparse.csr_matrix((weights.flatten().numpy(), index.flatten().numpy(), start), (len(index), self.count))


def chain_recursion(grid: Grid, steps: list[ChainStep], end: np.ndarray, refinement: int) -> ChainGrid:
    """Both dynamic programmes of a one-dimensional chain, from the last step to the first (docs/mathematics.md sections
    2, 3)::

        w_k(x) = -h f/alpha + log E exp w_{k+1}(mean + scale xi)
        V_k(x) = -h f/alpha + max_c { E V_{k+1}(mean + scale (c + xi)) - c^2/2 }.

    Averages over xi by the trapezoidal rule, which converges faster than any power of its spacing; the maximum over c
    by Newton's method on ``c = scale E V'_{k+1}``, after a scan where several maxima are possible.
    """
    spacing, reach = 1.0 / (2 + refinement), _REACH + refinement
    xi = np.arange(-reach, reach + 0.5 * spacing, spacing)
    weights = np.exp(-0.5 * xi**2)
    weights /= weights.sum()
    log_weights = np.log(weights)
    interpolation = _Interpolation(grid)
    x = grid.points[:, 0]
    soft, shifted = [end], [end]
    slopes: list[np.ndarray] = []
    last: ChainStep | None = None
    nodes: Any = None
    average: Any = None
    for step in reversed(steps):
        if last is None or not _same(step.scale, last.scale):
            average = _averages(interpolation, x, step.scale, xi, weights)
        if last is None or not (_same(step.scale, last.scale) and _same(step.mean, last.mean)):
            nodes = interpolation.matrix(step.mean[:, None] + step.scale[:, None] * xi)
            last = step
        values = (nodes @ interpolation.pad(soft[-1])).reshape(len(x), -1) + log_weights
        top = values.max(1)
        soft.append(top + np.log(np.exp(values - top[:, None]).sum(1)) - step.cost)
        slope, best = _best_shift(step, average(shifted[-1]))
        slopes.append(slope)
        shifted.append(best - step.cost)
    return ChainGrid(grid, np.array(soft[::-1]), np.array(shifted[::-1]), np.array(slopes[::-1]), steps)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal but for the rounding of equal steps of time."""
    return bool(np.abs(a - b).max() <= 1e-13 * np.abs(a).max())


Averaged = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _averages(
    interpolation: _Interpolation, x: np.ndarray, scale: np.ndarray, xi: np.ndarray, weights: np.ndarray
) -> Callable[[np.ndarray], Averaged]:
    """``V -> (z -> E V(z + scale xi) and its first two derivatives)``, z one point for each point of the grid."""
    from scipy import sparse

    if np.ptp(scale) == 0:  # one smoothing for all points: average on the grid first, interpolate then
        points = x[:, None] + scale[0] * xi
        spread = sparse.kron(sparse.identity(len(x)), sparse.csr_matrix(weights[None]), format="csr")
        smooth = sparse.csr_matrix(spread @ interpolation.matrix(points))

        def shared(V: np.ndarray) -> Averaged:
            table = interpolation.table(smooth @ interpolation.pad(V))
            return lambda z: tuple(table(torch.from_numpy(z)[:, None]).numpy())  # type: ignore[return-value]

        return shared

    def own(V: np.ndarray) -> Averaged:
        table = interpolation.table(V)

        spread = (scale[:, None] * xi)[..., None]
        return lambda z: tuple(table(torch.from_numpy(z[:, None, None] + spread)).numpy() @ weights)  # type: ignore[return-value]

    return own


def _best_shift(step: ChainStep, averaged: Averaged) -> tuple[np.ndarray, np.ndarray]:
    """``(slope, value)``: the best ``z = mean + scale^2 slope`` of ``E V(z + scale xi) - (z - mean)^2/(2 scale^2)``."""
    variance = step.scale**2
    value = lambda slope: averaged(step.mean + variance * slope)[0] - 0.5 * variance * slope**2  # noqa: E731
    start = averaged(step.mean)
    slope = start[1]
    if (variance * start[2]).max() > 0.5:  # then the objective need not be concave in c
        candidates = [s / np.sqrt(variance) for s in np.linspace(-6.0, 6.0, 49)]
        slope = np.stack(candidates)[np.stack([value(c) for c in candidates]).argmax(0), np.arange(len(variance))]
    limit = 20.0 / step.scale
    for _ in range(30):
        _, first, second = averaged(step.mean + variance * slope)
        # where the objective is convex there, Newton's step would climb to a minimum: take the fixed-point step
        change = (first - slope) / np.maximum(1.0 - variance * second, 0.5)
        slope = (slope + change).clip(-limit, limit)
        if np.abs(step.scale * change).max() < 1e-13:
            break
    return slope, value(slope)


class GridChainSolution(OnGrids):
    """Exact solution of the chain of a problem that falls apart into coordinates (error of u* about 1e-8) and pairs of
    them (about 1e-4).

    ``value``, ``log_z``, ``kernel``, ``marginal`` and ``sample`` are those of the soft-optimal chain p*; ``control``,
    ``elbo`` and ``floor`` those of the best mean-shift chain. With pairs they are those of the mean shifts that are
    nearest to p* step by step (:class:`.plane_chain.PlaneGrid`), and laws are not computed. A time is matched to the
    grid of times within 1e-9 of the horizon, else it means the step that contains it. :class:`GridLaw` is what laws
    are.
    """

    chain: Chain
    #: more than in continuous time, since more digits are promised; of pairs it is seen whether they are wide enough
    _margin = {1: 3.5, 2: 1.5}  # noqa: RUF012
    _good = {1: 1e-8, 2: 1e-4}  # noqa: RUF012
    _counts = {1: COUNTS[1], 2: (65, 97, 161)}  # noqa: RUF012
    _still = {2: 1e-4}  # noqa: RUF012
    _bias = 1e-6

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> None:
        for k in range(chain.steps):
            gain = chain.gain(k)
            if isinstance(gain, Tensor) and int(torch.linalg.matrix_rank(gain.double())) < gain.shape[0]:
                raise NoExactSolution(
                    "time_steps: the controls of this scheme do not reach all of its noise, and the best mean-shift "
                    "chain is then not known on grids; use scheme='euler'."
                )
        self._times = [chain.clock[k] for k in watched(chain.steps, MOMENTS)]
        super().__init__(problem, settings, chain, chain.double())

    def _drift(self, x: Tensor, time: float) -> Tensor:
        return self._functions.step(x, self._step_at(time))[0]

    def _noise(self, x: Tensor, time: float) -> Tensor:
        return self._functions.step(x, self._step_at(time))[1]

    def _solve(self, member: tuple[int, ...], x: Tensor, end: np.ndarray, grid: Grid, refinement: int) -> Any:
        if len(member) == 2:
            local = [(h, self._local(x, member, t)) for t, h in zip(self.chain.clock, self.chain.step_sizes)]
            parts = [(mean.numpy(), rows.numpy(), (h * cost).numpy()) for h, (mean, rows, cost) in local]
            return PlaneGrid(grid, plane_steps(parts), end)
        steps = []
        for t, h in zip(self.chain.clock, self.chain.step_sizes):
            mean, rows, cost = self._local(x, member, t)
            steps.append(ChainStep(mean[:, 0].numpy(), rows.norm(dim=(1, 2)).numpy(), (h * cost).numpy()))
        return chain_recursion(grid, steps, end, refinement)

    def _value_table(self, one: ChainGrid, time: float) -> Table:
        return one.grid.table(one.soft[self._state(time)])

    def _slope_table(self, one: ChainGrid, time: float) -> Table:
        return one.grid.table(one.slopes[self._step_at(time)])

    def _control_at(self, x: States, time: float) -> Controls:
        return self._sketch.control(self._step_at(time), super()._control_at(x, time))

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        if chain is not self.chain:
            return super()._shift_function(chain)
        shift_at = super()._control_at
        return lambda k, x, condition: shift_at(x.to("cpu", torch.float64), chain.clock[k]).to(x)

    @property
    def elbo(self) -> Tensor:
        return self._over_start([one.grid.table(one.shifted[0]) for one in self._solved], False)

    @property
    def floor(self) -> Tensor:
        return self._over_start([one.grid.table(one.soft[0] - one.shifted[0]) for one in self._solved], False)

    # ---------------------------------------------------------------- laws

    def _lines(self) -> None:
        if any(block.dim > 1 for block in self.blocks):
            raise NoExactSolution(
                "the laws of a chain of two coupled coordinates are not computed; simulate with control."
            )

    def _kernel_at(self, x: Tensor, k: int) -> GridLaw:
        self._lines()

        def density(i: int, one: ChainGrid) -> Tensor:
            made = torch.from_numpy(one.optimal_kernel(k, x[..., i].reshape(-1).numpy()))
            return made.reshape(*x.shape[:-1], -1)

        return self._law(density)

    def _law(self, density: Callable[[int, ChainGrid], Tensor]) -> GridLaw:
        ones = sorted((i, one) for block, one in zip(self.blocks, self._solved) for (i,) in block.members)
        points = [one.law_points for _, one in ones]
        lows, spacings = [float(x[0]) for x, _ in points], [dx for _, dx in points]
        return GridLaw(lows, spacings, [density(*each) for each in ones], self._out(torch.zeros(())))

    @cached_property
    def _marginals(self) -> dict[int, list[Tensor]]:
        """Of each coordinate: the densities of ``x_1 .. x_K`` under p*."""
        mean, cov = self._first_moments()
        out: dict[int, list[Tensor]] = {}
        for block, one in zip(self.blocks, self._solved):
            x, dx = one.law_points
            random = np.array([bool(cov[i, i]) for (i,) in block.members])
            now = np.stack(
                [
                    np.exp(-0.5 * (x - float(mean[i])) ** 2 / float(cov[i, i]))
                    if cov[i, i]
                    else one.optimal_kernel(0, mean[[i]].numpy())[0]
                    for (i,) in block.members
                ]
            )
            laws = []
            for k in range(len(one.steps)):
                if k or random.any():
                    moved = now @ one.optimal_kernel(k, x) * dx
                    now = moved if k else np.where(random[:, None], moved, now)
                now = now / (now.sum(1, keepdims=True) * dx)
                laws.append(torch.from_numpy(now))
            for row, (i,) in enumerate(block.members):
                out[i] = [law[row] for law in laws]
        return out

    def marginal(self, t: float) -> Any:
        k = self._state(self._snap(float(t)))
        if k == 0:
            return self.problem.origin
        self._lines()
        return self._law(lambda i, one: self._marginals[i][k - 1])
