"""Systems of particles that interact through their distances, without their centre of mass.

A density that is invariant under translation has no integral over all positions, so it lives on the subspace of
positions whose mean is 0. States are the coordinates of that subspace in an orthonormal basis (the rows of Helmert's
matrix), ``(n - 1) * space`` numbers; the map is an isometry, so that log densities, distances between configurations
and Wasserstein distances are those of the positions.
"""

import math

import torch
from torch import Tensor

from .target_base import Target, register_target

_LEAST_SQUARE = 1e-12  # of a distance: below, its gradient is 0 instead of undefined
_CORE = 0.6


class ParticleSystem(Target):
    """``n`` particles in ``space`` dimensions with a log density of their distances, on the subspace of mean 0.

    Attributes:
        particles, space: their number and the dimension of their space. dim: ``(particles - 1) * space``.
    """

    def __init__(self, particles: int, space: int) -> None:
        self.particles, self.space, self.dim = particles, space, (particles - 1) * space
        rows = torch.zeros(particles - 1, particles, dtype=torch.float64)
        for k in range(1, particles):  # orthonormal, and orthogonal to (1, ..., 1)
            rows[k - 1, :k], rows[k - 1, k] = 1.0, -k
            rows[k - 1] /= math.sqrt(k * (k + 1))
        self._basis = rows
        self._pairs = torch.triu_indices(particles, particles, 1)

    def positions(self, x: Tensor) -> Tensor:
        """Positions ``(batch, particles, space)`` with mean 0 of states ``(batch, dim)``."""
        return self._basis.to(x).mT @ x.unflatten(1, (self.particles - 1, self.space))

    def coordinates(self, positions: Tensor) -> Tensor:
        """States ``(batch, dim)`` of positions ``(batch, particles, space)``; their centre of mass is dropped."""
        return (self._basis.to(positions) @ positions).flatten(1)

    def distances(self, x: Tensor) -> Tensor:
        """All distances between two particles, ``(batch, pairs)``: invariant under rotations, reflections and (sorted)
        permutations."""
        p = self.positions(x)
        i, j = self._pairs.to(x.device)
        return (p[:, i] - p[:, j]).square().sum(2).clamp(min=_LEAST_SQUARE).sqrt()

    def distance_histogram(self, x: Tensor, bins: int = 100, upper: float | None = None) -> tuple[Tensor, Tensor]:
        """Density ``(bins,)`` of the distances of all states, and the edges ``(bins + 1,)``; upper: the last edge
        (default: the largest)."""
        values = self.distances(x).detach().double().cpu().flatten()
        upper = float(values.max()) if upper is None else upper
        counts, edges = torch.histogram(values, bins, range=(0.0, upper))
        return counts / (values.numel() * (upper / bins)), edges


class DoubleWellSystem(ParticleSystem):
    """Energy ``sum over pairs of 0.9 (r - 4)^4 - 4 (r - 4)^2``."""

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        square = (self.distances(x) - 4).square()
        return -(square * (0.9 * square - 4)).sum(1)


@register_target("dw-4", version=1)
def _dw4() -> Target:
    """4 particles in the plane, d = 6: energy sum over pairs of 0.9 (r - 4)^4 - 4 (r - 4)^2, on the subspace of centre
    of mass 0 with an orthonormal basis; log Z is not known exactly."""
    return DoubleWellSystem(4, 2)


class LennardJones(ParticleSystem):
    """Energy ``sum over pairs of r^-12 - 2 r^-6 + sum_i |x_i - mean|^2 / 2``.

    Below r = 0.6, where a pair has the energy 416, its energy goes on as the parabola that continues it with two
    derivatives: 35 000 at r = 0, so that values and gradients are finite in float32 everywhere.
    """

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        r = self.distances(x)
        inverse = r.clamp(min=_CORE).pow(-6)
        outside = inverse * (inverse - 2)
        depth = (r - _CORE).clamp(max=0.0)
        a = _CORE**-6
        slope, bend = -12 * a * (a - 1) / _CORE, a * (156 * a - 84) / _CORE**2
        pairs = outside + depth * (slope + 0.5 * bend * depth)
        return -pairs.sum(1) - 0.5 * x.square().sum(1)  # an isometry: sum_i |x_i - mean|^2 is |x|^2


@register_target("lj-13", version=1)
def _lj13() -> Target:
    """13 particles in space, d = 36: energy sum over pairs of r^-12 - 2 r^-6, plus sum_i |x_i - mean|^2 / 2, on the
    subspace of centre of mass 0 with an orthonormal basis; below r = 0.6 a pair's energy (416 there) goes on as the
    parabola with the same value, slope and curvature; log Z is not known exactly."""
    return LennardJones(13, 3)
