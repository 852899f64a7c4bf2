"""Uniform grids of one or two dimensions, and functions and laws on them. All in float64 on the CPU."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

if TYPE_CHECKING:
    from scipy import sparse

_POINTS = 6  # of local interpolation: an error of order 6 in the spacing
_FIRST = np.array([-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60])  # central differences of order 6
_SECOND = np.array([1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90])
_LAGRANGE = np.linalg.inv(np.vander(np.arange(_POINTS) - 0.5 * (_POINTS - 1), increasing=True))


def _locate(values: Tensor, lo: float, dx: float, count: int) -> tuple[Tensor, Tensor]:
    """Of each value, held at the ends of the axis: the first of the 6 points next to it, and its place from their
    middle."""
    position = ((values - lo) / dx).clamp(0, count - 1)
    first = (position.floor() - (_POINTS // 2 - 1)).clamp(0, count - _POINTS)
    return first.long(), position - first - 0.5 * (_POINTS - 1)


def local_weights(values: Tensor, lo: float, dx: float, count: int) -> tuple[Tensor, Tensor]:
    """Indices and weights ``(..., 6)`` of local interpolation at ``values``, held at the ends of the axis."""
    first, inner = _locate(values, lo, dx, count)
    square = inner * inner
    powers = torch.stack(
        [torch.ones_like(inner), inner, square, inner * square, square * square, square * square * inner], -1
    )
    return first.unsqueeze(-1) + torch.arange(_POINTS), powers @ torch.from_numpy(_LAGRANGE)


class Table:
    """Functions on a grid, ``values (channels, *counts)``, evaluated at any points by local polynomials of degree 5.

    Outside of the grid the value at its nearest point is taken.
    """

    def __init__(self, values: Any, lows: np.ndarray, spacings: np.ndarray) -> None:
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self.lows, self.spacings = lows.tolist(), spacings.tolist()
        if self.values.ndim == 2:  # one polynomial for each cell
            self._pieces = self.values.unfold(1, _POINTS, 1) @ torch.from_numpy(_LAGRANGE).mT

    def __call__(self, points: Tensor) -> Tensor:
        """Points ``(..., n)`` to ``(channels, ...)``."""
        axes = [(points[..., a], *axis) for a, axis in enumerate(zip(self.lows, self.spacings, self.values.shape[1:]))]
        if len(axes) == 1:
            first, inner = _locate(*axes[0])
            *lower, total = self._pieces[:, first].unbind(-1)
            for coefficient in reversed(lower):
                total = torch.addcmul(coefficient, total, inner)
            return total
        (rows, along), (columns, across) = (local_weights(*axis) for axis in axes)
        near = self.values[:, rows.unsqueeze(-1), columns.unsqueeze(-2)]
        return torch.einsum("c...ij,...i,...j->c...", near, along, across)


class Grid:
    """A uniform grid of one or two dimensions.

    Beyond its ends values are continued by parabolas (the third derivative is zero there), which is exact for
    linear-quadratic problems; the ends are placed where optimal paths do not come.

    Args:
        counts: points of each axis; a number: of all of them.
    """

    def __init__(self, lows: np.ndarray, highs: np.ndarray, counts: int | Sequence[int]) -> None:
        self.lows, self.highs = np.asarray(lows, float), np.asarray(highs, float)
        self.dim = len(self.lows)
        self.counts = (counts,) * self.dim if isinstance(counts, int) else tuple(counts)
        self.spacings = (self.highs - self.lows) / (np.array(self.counts) - 1)
        self.axes = [np.linspace(*axis) for axis in zip(self.lows, self.highs, self.counts)]
        self.points = np.stack(np.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, self.dim)

    @cached_property
    def _matrices(self) -> "tuple[list[Any], dict[tuple[int, int], Any], Any]":
        """First derivatives, second ones by pairs of axes, and all in one."""
        from scipy import sparse

        parts = [differences(count) for count in self.counts]
        eyes = [sparse.identity(count, format="csr") for count in self.counts]

        def whole(axis: int, matrix: Any) -> Any:
            if self.dim == 1:
                return sparse.csr_matrix(matrix)
            return sparse.csr_matrix(sparse.kron(matrix, eyes[1]) if axis == 0 else sparse.kron(eyes[0], matrix))

        D = [whole(a, parts[a][0] / self.spacings[a]) for a in range(self.dim)]
        H = {(a, a): whole(a, parts[a][1] / self.spacings[a] ** 2) for a in range(self.dim)}
        if self.dim == 2:
            H[0, 1] = sparse.csr_matrix(D[0] @ D[1])
        return D, H, sparse.csr_matrix(sparse.vstack([*D, *H.values()]))

    @property
    def D(self) -> list[Any]:
        """Matrices of the first derivatives."""
        return self._matrices[0]

    @property
    def H(self) -> dict[tuple[int, int], Any]:
        """Matrices of the second derivatives, by pairs of axes."""
        return self._matrices[1]

    def derivatives(self, w: np.ndarray) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray]]:
        """Gradient ``(n, N)``, and second derivatives by pairs of axes."""
        _, H, together = self._matrices
        parts = (together @ w).reshape(-1, len(w))
        return parts[: self.dim], dict(zip(H, parts[self.dim :]))

    def table(self, channels: np.ndarray) -> Table:
        return Table(channels.reshape(-1, *self.counts), self.lows, self.spacings)


def differences(count: int) -> "tuple[sparse.csr_matrix, ...]":
    """First and second central differences for spacing 1, with three points beyond each end on the parabola through the
    last three."""
    from scipy import sparse

    padded = sparse.eye(count + 6, count, k=-3).tolil()
    for j in (1, 2, 3):
        parabola = [(j + 1) * (j + 2) / 2, -j * (j + 2), j * (j + 1) / 2]
        padded[3 - j, :3] = parabola
        padded[count + 2 + j, -3:] = parabola[::-1]
    rows = padded.tocsr()
    made = tuple(sparse.csr_matrix(sum(c * rows[k : k + count] for k, c in enumerate(s))) for s in (_FIRST, _SECOND))
    for matrix in made:
        matrix.eliminate_zeros()
    return made


class GridLaw(Distribution):
    """Independent coordinates, each with a density on a uniform grid: what marginals and kernels of grid solutions are.

    The density between grid points is linear in ``sample`` and interpolated to order 6 in ``log_prob``; mean and
    variance are sums over the grid.

    Args:
        lows, spacings, densities: of each coordinate; densities ``(*batch, N)``, N of each coordinate's own.
        axes: ``(d, d)``, the directions of these coordinates as columns; None where they are the state's own.
    """

    def __init__(
        self,
        lows: list[float],
        spacings: list[float],
        densities: list[Tensor],
        like: Tensor,
        axes: Tensor | None = None,
    ) -> None:
        self._lows, self._spacings, self._densities, self._like = lows, spacings, densities, like
        self._axes = torch.eye(len(lows), dtype=torch.float64) if axes is None else axes
        super().__init__(densities[0].shape[:-1], torch.Size((len(lows),)), validate_args=False)

    def along(self, axes: Tensor, like: Tensor) -> "GridLaw":
        """The law of states whose coordinates along these axes have this one."""
        return GridLaw(self._lows, self._spacings, self._densities, like, axes @ self._axes)

    def _sums(self, power: int, centre: Tensor | None = None) -> Tensor:
        out = []
        for i, (low, dx, density) in enumerate(zip(self._lows, self._spacings, self._densities)):
            x = low + dx * torch.arange(density.shape[-1], dtype=torch.float64)
            x = x if centre is None else x - centre[..., i, None]
            out.append((x**power * density).sum(-1) * dx)
        return torch.stack(out, -1)

    @property
    def mean(self) -> Tensor:
        return (self._sums(1) @ self._axes.mT).to(self._like)

    @property
    def variance(self) -> Tensor:
        return (self._sums(2, self._sums(1)) @ self._axes.mT.square()).to(self._like)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density ``(...)``; -inf outside of the grid."""
        total: Any = 0.0
        x = value.detach().to("cpu", torch.float64) @ self._axes
        for i, (low, dx, density) in enumerate(zip(self._lows, self._spacings, self._densities)):
            count = density.shape[-1]
            index, weights = local_weights(x[..., i], low, dx, count)
            logs = density.clamp(min=1e-300).log()
            shape = torch.broadcast_shapes(logs.shape[:-1], index.shape[:-1])
            near = logs.expand(*shape, count).gather(-1, index.expand(*shape, _POINTS))
            inside = (x[..., i] >= low) & (x[..., i] <= low + dx * (count - 1))
            total = total + torch.where(inside, (near * weights).sum(-1), -torch.inf)
        return total.to(self._like)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        u, out = torch.rand(self._extended_shape(torch.Size(sample_shape)), dtype=torch.float64), []
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
        return (torch.stack(out, -1) @ self._axes.mT).to(self._like)

    def __repr__(self) -> str:
        return f"GridLaw(batch {tuple(self.batch_shape)}, d={self.event_shape[0]})"
