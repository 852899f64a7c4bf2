"""Values on grids of one or two dimensions: the HJB equation in continuous time, dynamic programming for a chain.

Everything is written for ``w = v/alpha``, not for ``psi = exp(w)``: w stays of moderate size and smooth where psi runs over
hundreds of orders of magnitude. All in float64 on the CPU. How fine a grid must be is found by the caller, who halves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.distributions import Distribution

from ..errors import NoExactSolution

__all__ = ["ChainGrid", "Coefficients", "ContinuousGrid", "Grid", "GridLaw", "Table", "chain_recursion"]

_POINTS = 6  # of local interpolation: an error of order 6 in the spacing
_REACH = 9.0  # standard deviations that an average over the noise takes in; widened with refinement
_TOLERANCE = 1e-8  # relative and absolute tolerance of the equation in time
_LEVELS = 193  # times at which a plane's values are kept, denser towards the horizon
_MOST_CALLS = 30_000  # of the equation's right-hand side: a minute for a plane of the finest grid
_FIRST = np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60])  # central differences of order 6
_SECOND = np.array([1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90])
_LAGRANGE = np.linalg.inv(np.vander(np.arange(_POINTS) - 0.5 * (_POINTS - 1), increasing=True))


class Coefficients(NamedTuple):
    """At grid points ``(N, n)``: drift ``(N, n)``, root of the noise ``(N, n, m)``, running cost over alpha ``(N,)``."""

    drift: np.ndarray
    root: np.ndarray
    cost: np.ndarray


def _weights(values: Any, lo: float, dx: float, count: int) -> tuple[Tensor, Tensor]:
    """First index ``(...)`` and weights ``(..., 6)`` of local interpolation at ``values``, held at the ends of the axis."""
    position = ((torch.as_tensor(values, dtype=torch.float64) - lo) / dx).clamp(0, count - 1)
    first = (position.floor() - (_POINTS // 2 - 1)).clamp(0, count - _POINTS)
    inner = position - first - 0.5 * (_POINTS - 1)
    square = inner * inner
    powers = torch.stack(
        [torch.ones_like(inner), inner, square, inner * square, square * square, square * square * inner], -1
    )
    return first.long(), powers @ torch.from_numpy(_LAGRANGE).to(powers.device)


class Table:
    """Functions on a grid, ``values (channels, *counts)``, evaluated at any points by local polynomials of degree 5.

    Outside of the grid the value at its nearest point is taken.
    """

    def __init__(self, values: Any, lows: np.ndarray, spacings: np.ndarray) -> None:
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self.lows, self.spacings = lows, spacings
        if self.values.ndim == 2:  # one polynomial for each cell
            self._pieces = self.values.unfold(1, _POINTS, 1) @ torch.from_numpy(_LAGRANGE).mT

    def __call__(self, points: Tensor) -> Tensor:
        """Points ``(..., n)`` to ``(channels, ...)``."""
        return self._line(points[..., 0]) if self.values.ndim == 2 else self._plane(points)

    def _line(self, x: Tensor) -> Tensor:
        count = self.values.shape[1]
        position = ((x - float(self.lows[0])) / float(self.spacings[0])).clamp(0, count - 1)
        first = (position.floor() - (_POINTS // 2 - 1)).clamp(0, count - _POINTS)
        inner = position - first - 0.5 * (_POINTS - 1)
        *lower, total = self._pieces[:, first.long()].unbind(-1)
        for coefficient in reversed(lower):
            total = torch.addcmul(coefficient, total, inner)
        return total

    def _plane(self, points: Tensor) -> Tensor:
        offsets = torch.arange(_POINTS)
        count = self.values.shape[2]
        (first, along), (second, across) = (
            _weights(points[..., a], float(self.lows[a]), float(self.spacings[a]), self.values.shape[1 + a])
            for a in (0, 1)
        )
        rows, columns = first.unsqueeze(-1) + offsets, second.unsqueeze(-1) + offsets
        near = self.values.flatten(1)[:, rows.unsqueeze(-1) * count + columns.unsqueeze(-2)]
        return torch.einsum("c...ij,...i,...j->c...", near, along, across)


class Grid:
    """A uniform grid of one or two dimensions.

    Beyond its ends values are continued by parabolas (the third derivative is zero there), which is exact for
    linear-quadratic problems; the ends are placed where optimal paths do not come.
    """

    def __init__(self, lows: np.ndarray, highs: np.ndarray, count: int) -> None:
        self.lows, self.highs, self.count = np.asarray(lows, float), np.asarray(highs, float), count
        self.dim = len(self.lows)
        self.spacings = (self.highs - self.lows) / (count - 1)
        self.axes = [np.linspace(low, high, count) for low, high in zip(self.lows, self.highs)]
        self.points = np.stack(np.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, self.dim)
        eye = sparse.identity(count, format="csr")
        first, second = (_differences(c, count) for c in (_FIRST, _SECOND))

        def whole(axis: int, matrix: Any) -> Any:
            if self.dim == 1:
                return sparse.csr_matrix(matrix)
            return sparse.csr_matrix(sparse.kron(matrix, eye) if axis == 0 else sparse.kron(eye, matrix))

        self.D = [whole(a, first / self.spacings[a]) for a in range(self.dim)]
        self.H = {(a, a): whole(a, second / self.spacings[a] ** 2) for a in range(self.dim)}
        if self.dim == 2:
            self.H[0, 1] = sparse.csr_matrix(self.D[0] @ self.D[1])
        self._all = sparse.csr_matrix(sparse.vstack([*self.D, *self.H.values()]))

    def gradient(self, w: np.ndarray) -> np.ndarray:
        """``(n, N)``."""
        return np.stack([D @ w for D in self.D])

    def derivatives(self, w: np.ndarray) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray]]:
        """Gradient ``(n, N)``, and second derivatives by pairs of axes."""
        parts = (self._all @ w).reshape(-1, len(w))
        return parts[: self.dim], dict(zip(self.H, parts[self.dim :]))

    def table(self, channels: np.ndarray) -> Table:
        return Table(channels.reshape(-1, *(self.count,) * self.dim), self.lows, self.spacings)


def _differences(stencil: np.ndarray, count: int) -> sparse.csr_matrix:
    """A central difference for spacing 1, with three points beyond each end on the parabola through the last three."""
    padded = np.zeros((count + 6, count))
    padded[3:-3] = np.eye(count)
    for j in (1, 2, 3):
        parabola = [(j + 1) * (j + 2) / 2, -j * (j + 2), j * (j + 1) / 2]
        padded[3 - j, :3] = parabola
        padded[count + 2 + j, -1:-4:-1] = parabola
    return sparse.csr_matrix(sum(c * padded[k : k + count] for k, c in enumerate(stencil)))


# ---------------------------------------------------------------- continuous time


class ContinuousGrid:
    """``w = v/alpha`` of a process on a grid, from the HJB equation backwards from the horizon::

        -dw/dt = b.grad w + (tr(Sigma hess w) + grad w' Sigma grad w)/2 - f/alpha,   w(., T) = r/alpha,

    central differences of order 6, and in time scipy's Radau with its dense output; in two dimensions its explicit RK45, with cubic Hermite interpolation between
    193 stored times.

    Args:
        coefficients: ``t -> Coefficients`` at the grid's points.
        span: first and last time; end: ``r/alpha`` at the grid's points.
        autonomous: the coefficients are the same at all times.

    Raises:
        NoExactSolution: the equation cannot be integrated (E exp(R/alpha) is infinite, or the grid is too narrow).
    """

    def __init__(
        self,
        grid: Grid,
        coefficients: Callable[[float], Coefficients],
        end: np.ndarray,
        span: tuple[float, float],
        autonomous: bool,
        tolerance: float = _TOLERANCE,
    ) -> None:
        from scipy.integrate import solve_ivp
        from scipy.interpolate import CubicHermiteSpline

        self.grid, self._span = grid, span
        pairs = list(grid.H)

        def parts(t: float) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray], np.ndarray]:
            at = coefficients(t)
            square = np.einsum("nim,njm->ijn", at.root, at.root)
            return at.drift.T, {(a, b): square[a, b] * (0.5 if a == b else 1.0) for a, b in pairs}, at.cost

        fixed = parts(span[0]) if autonomous else None

        def slope(s: float, w: np.ndarray) -> np.ndarray:
            drift, half, cost = fixed or parts(span[1] - s)
            g, second = grid.derivatives(w)
            return (drift * g).sum(0) + sum(half[a, b] * (second[a, b] + g[a] * g[b]) for a, b in pairs) - cost

        def jacobian(s: float, w: np.ndarray) -> Any:
            drift, half, _ = fixed or parts(span[1] - s)
            g, speed = grid.gradient(w), drift.copy()
            for a, b in pairs:
                speed[a] += half[a, b] * g[b]
                speed[b] += half[a, b] * g[a]
            total = sum(sparse.diags(half[pair]) @ grid.H[pair] for pair in pairs)
            return sparse.csc_matrix(total + sum(sparse.diags(speed[a]) @ grid.D[a] for a in range(grid.dim)))

        length = span[1] - span[0]
        calls = 0

        def counted(s: float, w: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            if calls > _MOST_CALLS:
                raise RuntimeError("too many steps")
            return slope(s, w)

        options: dict[str, Any] = {"method": "Radau", "jac": jacobian, "dense_output": True}
        if grid.dim == 2:  # factorising the matrix of a plane costs more than the many steps of an explicit method
            options = {"method": "RK45", "t_eval": length * np.linspace(0.0, 1.0, _LEVELS) ** 1.5}
        with np.errstate(all="ignore"):
            try:
                found = solve_ivp(counted, (0.0, length), end, rtol=tolerance, atol=tolerance, **options)
                good = found.status == 0 and bool(np.isfinite(found.y[:, -1]).all())
            except (ValueError, RuntimeError):  # a non-finite state, a singular matrix inside scipy, or too many steps
                good, found = False, None
        if not good:
            raise NoExactSolution(
                "the HJB equation could not be integrated back to time 0 on a grid: E exp(R/alpha) is infinite (reward or "
                "-running cost too convex), or reward or drift are too steep or the noise too small for the grid "
                f"({self._ends()}). Use a larger alpha, a less convex reward or a shorter horizon."
            )
        self._dense: Any = found.sol  # type: ignore[union-attr]
        if grid.dim == 2:
            values: Any = found.y.T  # type: ignore[union-attr]
            self._dense = CubicHermiteSpline(found.t, values, [slope(s, w) for s, w in zip(found.t, values)])  # type: ignore[union-attr]

    def _ends(self) -> str:
        return ", ".join(f"[{low:.3g}, {high:.3g}]" for low, high in zip(self.grid.lows, self.grid.highs))

    def at(self, time: float) -> np.ndarray:
        """w at the grid's points."""
        return self._dense(min(max(self._span[1] - time, 0.0), self._span[1] - self._span[0]))

    def tables(self, time: float) -> np.ndarray:
        """w and its gradient, ``(1 + n, N)``."""
        w = self.at(time)
        return np.concatenate([w[None], self.grid.gradient(w)])


# ---------------------------------------------------------------- chains, in one dimension


class ChainStep(NamedTuple):
    """A step at the grid's points: mean and scale of the noise ``(N,)``, and ``h f/alpha`` ``(N,)``."""

    mean: np.ndarray
    scale: np.ndarray
    cost: np.ndarray


class ChainGrid(NamedTuple):
    """Of each state of a one-dimensional chain, on its grid: soft value, value of the best mean-shift chain, and, for each
    step, ``slope`` with ``c = scale * slope`` (``E V'_{k+1}`` at the shifted kernel)."""

    grid: Grid
    soft: np.ndarray  # (K+1, N)
    shifted: np.ndarray  # (K+1, N)
    slopes: np.ndarray  # (K, N)
    steps: list[ChainStep]

    @property
    def stride(self) -> int:
        """Laws live on every so-many-th point: sums over a Gaussian need no finer grid than two fifths of its deviation."""
        narrowest = min(float(step.scale.min()) for step in self.steps)
        return max(1, min(int(0.4 * narrowest / self.grid.spacings[0]), (self.grid.count - 1) // 512))

    def optimal_kernel(self, k: int, x: np.ndarray) -> np.ndarray:
        """The density of ``p*(. | x)`` of step k at the points of laws, ``(len(x), N)``: ``exp(w_{k+1}) p0`` normalised.

        Raises:
            NoExactSolution: the step's noise is narrower than the grid's cells.
        """
        stride = self.stride
        y, dx = self.grid.points[::stride, 0], self.grid.spacings[0] * stride
        look = Table(np.stack([self.steps[k].mean, self.steps[k].scale]), self.grid.lows, self.grid.spacings)
        mean, scale = (v.numpy() for v in look(torch.from_numpy(np.ascontiguousarray(x))[:, None]))
        if scale.min() < dx:
            raise NoExactSolution(
                f"the laws of the chain are not known: the noise of step {k} (standard deviation {scale.min():.3g}) is "
                f"narrower than the grid's cells ({dx:.3g}). Use fewer time steps; value and control are exact."
            )
        log = self.soft[k + 1, ::stride] - 0.5 * ((y - mean[:, None]) / scale[:, None]) ** 2
        density = np.exp(log - log.max(1, keepdims=True))
        return density / (density.sum(1, keepdims=True) * dx)


class _Interpolation:
    """From values on a grid to values at other points, inside and beyond its ends.

    Beyond an end values go on along a parabola through three points a 24th of the grid apart (neighbouring points would
    amplify rounding from step to step); where that opens upwards, along a line: ``exp`` of it would outweigh everything.
    """

    def __init__(self, grid: Grid) -> None:
        self.extra, self.gap = grid.count // 2, max(1, grid.count // 24)
        self.dx = float(grid.spacings[0])
        self.lo, self.count = float(grid.lows[0]) - self.extra * self.dx, grid.count + 2 * self.extra
        self._first, self._second = (_differences(c, self.count) for c in (_FIRST, _SECOND))

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

    def matrix(self, points: np.ndarray) -> sparse.csr_matrix:
        """``(points.size, number of padded values)``."""
        first, weights = _weights(points.ravel(), self.lo, self.dx, self.count)
        index = (first.unsqueeze(-1) + torch.arange(_POINTS)).flatten().numpy()
        start = np.arange(0, len(index) + 1, _POINTS)
        return sparse.csr_matrix((weights.flatten().numpy(), index, start), (len(start) - 1, self.count))


def chain_recursion(
    grid: Grid, steps: Callable[[int], ChainStep], count: int, end: np.ndarray, refinement: int
) -> ChainGrid:
    """Both dynamic programmes of a one-dimensional chain, from the last step to the first (docs/mathematics.md sections 2, 3)::

        w_k(x) = -h f/alpha + log E exp w_{k+1}(mean + scale xi)
        V_k(x) = -h f/alpha + max_c { E V_{k+1}(mean + scale (c + xi)) - c^2/2 }.

    Averages over xi by the trapezoidal rule, which converges faster than any power of its spacing; the maximum over c by
    Newton's method on ``c = scale E V'_{k+1}``, after a scan where several maxima are possible.
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
    kept: list[ChainStep] = []
    last: ChainStep | None = None
    nodes: Any = None
    average: Any = None
    for k in reversed(range(count)):
        step = steps(k)
        if last is None or not _same(step.scale, last.scale):
            average = _averages(interpolation, x, step.scale, xi, weights)
        if last is None or not (_same(step.scale, last.scale) and _same(step.mean, last.mean)):
            nodes = interpolation.matrix(step.mean[:, None] + step.scale[:, None] * xi)
            last = step
        values = (nodes @ interpolation.pad(soft[-1])).reshape(len(x), -1) + log_weights
        top = values.max(1)
        soft.append(top + np.log(np.exp(values - top[:, None]).sum(1)) - step.cost)
        slope, best = _best_shift(step, average(shifted[-1]), grid, k)
        slopes.append(slope)
        shifted.append(best - step.cost)
        kept.append(step)
    return ChainGrid(grid, np.array(soft[::-1]), np.array(shifted[::-1]), np.array(slopes[::-1]), kept[::-1])


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal but for the rounding of equal steps of time."""
    return bool(np.abs(a - b).max() <= 1e-13 * np.abs(a).max())


Averaged = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _averages(
    interpolation: _Interpolation, x: np.ndarray, scale: np.ndarray, xi: np.ndarray, weights: np.ndarray
) -> Callable[[np.ndarray], Averaged]:
    """``V -> (z -> E V(z + scale xi) and its first two derivatives)``, z one point for each point of the grid."""
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

        def at(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            points = torch.from_numpy(z[:, None] + scale[:, None] * xi)
            return tuple(table(points[..., None]).numpy() @ weights)  # type: ignore[return-value]

        return at

    return own


def _best_shift(step: ChainStep, averaged: Averaged, grid: Grid, k: int) -> tuple[np.ndarray, np.ndarray]:
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


# ---------------------------------------------------------------- laws on grids


class GridLaw(Distribution):
    """Independent coordinates, each with a density on a uniform grid: what marginals and kernels of grid solutions are.

    The density between grid points is linear in ``sample`` and interpolated to order 6 in ``log_prob``; mean and variance
    are sums over the grid.

    Args:
        lows, spacings, densities: of each coordinate; densities ``(*batch, N)``, N of each coordinate's own.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, lows: list[float], spacings: list[float], densities: list[Tensor], like: Tensor) -> None:
        self._lows, self._spacings, self._densities, self._like = lows, spacings, densities, like
        super().__init__(densities[0].shape[:-1], torch.Size((len(lows),)), validate_args=False)

    def _sums(self, power: int, centre: Tensor | None = None) -> Tensor:
        out = []
        for i, (low, dx, density) in enumerate(zip(self._lows, self._spacings, self._densities)):
            x = low + dx * torch.arange(density.shape[-1], dtype=torch.float64)
            x = x if centre is None else x - centre[..., i, None]
            out.append((x**power * density).sum(-1) * dx)
        return torch.stack(out, -1)

    @property
    def mean(self) -> Tensor:
        return self._sums(1).to(self._like)

    @property
    def variance(self) -> Tensor:
        return self._sums(2, self._sums(1)).to(self._like)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density ``(...)``; -inf outside of the grid."""
        total: Any = 0.0
        x = value.detach().to("cpu", torch.float64)
        for i, (low, dx, density) in enumerate(zip(self._lows, self._spacings, self._densities)):
            count = density.shape[-1]
            first, weights = _weights(x[..., i], low, dx, count)
            index = first.unsqueeze(-1) + torch.arange(_POINTS)
            logs = density.clamp(min=1e-300).log()
            shape = torch.broadcast_shapes(logs.shape[:-1], index.shape[:-1])
            near = logs.expand(*shape, count).gather(-1, index.expand(*shape, _POINTS))
            inside = (x[..., i] >= low) & (x[..., i] <= low + dx * (count - 1))
            total = total + torch.where(inside, (near * weights).sum(-1), -torch.inf)
        return total.to(self._like)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return self._from_uniform(torch.rand(shape, dtype=torch.float64)).to(self._like)

    def _from_uniform(self, u: Tensor) -> Tensor:
        out = []
        for i, (low, dx, density) in enumerate(zip(self._lows, self._spacings, self._densities)):
            mass = 0.5 * (density[..., 1:] + density[..., :-1])
            edges = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
            flat = edges.reshape(-1, edges.shape[-1])
            rows = u[..., i].reshape(-1, flat.shape[0]).mT.contiguous()
            level = rows * flat[:, -1:]
            cell = (torch.searchsorted(flat, level, right=True) - 1).clamp(0, density.shape[-1] - 2)
            a = density.reshape(flat.shape[0], -1).gather(1, cell)
            slope = density.reshape(flat.shape[0], -1).gather(1, cell + 1) - a
            rest = (level - flat.gather(1, cell)).clamp(min=0)
            # the root of a s + slope s^2/2 = rest in [0, 1], in the form that does not cancel
            inner = 2 * rest / (a + (a * a + 2 * slope * rest).clamp(min=0).sqrt()).clamp(min=1e-300)
            x = low + dx * (cell + inner.clamp(0, 1))
            out.append(x.mT.reshape(u.shape[:-1]))
        return torch.stack(out, -1)

    def __repr__(self) -> str:
        return f"GridLaw(batch {tuple(self.batch_shape)}, d={self.event_shape[0]})"
