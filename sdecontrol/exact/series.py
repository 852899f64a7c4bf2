"""Functions on the sphere S^2 and on tori as series in the eigenfunctions of Brownian motion: spherical harmonics and
Fourier modes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..processes.manifolds import Manifold, Sphere

_NEGLIGIBLE = 1e-17  # of the largest coefficient
_ROWS = 512  # states at a time: their polynomials of one degree stay in a processor's cache


class Eigenfunctions(NamedTuple):
    """What a step of noise s does to each coefficient of a function f.

    Attributes:
        mean: those of ``E f(exp_x(s P xi))``. slope: of a function whose gradient is ``E[P xi f(exp_x(s P xi))]``.
    """

    mean: np.ndarray
    slope: np.ndarray


class Series:
    """A quadrature grid on a manifold, and series on it. Coefficients are complex arrays; functions are real.

    Attributes:
        nodes: ``(N, n)`` states. weights: ``(N,)``, whose sum is the manifold's volume.
        eigenvalues: of minus the Laplace-Beltrami operator, of each coefficient.
    """

    nodes: np.ndarray
    weights: np.ndarray
    eigenvalues: np.ndarray
    manifold: Manifold

    def analyse(self, values: np.ndarray) -> np.ndarray:
        """The coefficients of values at the nodes."""
        raise NotImplementedError

    def on_nodes(self, coefficients: np.ndarray) -> np.ndarray:
        """The values of a series at the nodes."""
        raise NotImplementedError

    def measure(self, points: np.ndarray, masses: np.ndarray) -> np.ndarray:
        """The coefficients of a sum of point masses, as a density."""
        raise NotImplementedError

    def step(self, spread: float) -> Eigenfunctions:
        """Of a step of the geodesic random walk."""
        raise NotImplementedError

    def tail(self, coefficients: np.ndarray) -> float:
        """How large the values are that the last eighth of the degrees makes, at most."""
        raise NotImplementedError

    def _block(self, coefficients: np.ndarray, x: np.ndarray, slopes: bool) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def neighbourhood(self, values: np.ndarray) -> np.ndarray:
        """The largest value at each node and those around it."""
        raise NotImplementedError

    def draw_near(self, nodes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Points that are uniform in the cells of nodes ``(rows,)``, whose volumes are the weights; from uniform
        numbers ``(rows, 2)``."""
        raise NotImplementedError

    def values(self, coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The values of a series at states ``(rows, n)``, ``(rows,)``."""
        parts = [self._block(coefficients, x[i : i + _ROWS], False)[0] for i in range(0, len(x), _ROWS)]
        return np.concatenate(parts or [np.zeros(0)])

    def gradients(self, coefficients: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Its gradients there, tangent vectors ``(rows, n)``."""
        parts = [self._block(coefficients, x[i : i + _ROWS], True)[1] for i in range(0, len(x), _ROWS)]
        return np.concatenate(parts or [x])

    def heat(self, time: float) -> np.ndarray:
        """By what Brownian motion multiplies the coefficients of a function in so much time."""
        return np.exp(-0.5 * time * self.eigenvalues)


def _seen(coefficients: np.ndarray, degrees: np.ndarray) -> int:
    """The largest degree whose coefficients are not negligible."""
    size = np.abs(coefficients)
    known = degrees[size > _NEGLIGIBLE * max(float(size.max()), 1e-300)]
    return int(known.max()) if known.size else 0


class SphereSeries(Series):
    """Spherical harmonics on S^2 up to a degree: coefficients ``a (L+1, L+1)``, of degree l and order m >= 0 in
    ``f = sum_l Re(a_l0 Y_l0 + 2 sum_{m>0} a_lm Y_lm)``, Y orthonormal.

    ``Y_lm = q_lm(z) (x + i y)^m`` with polynomials q, so that nothing is singular at the poles.
    """

    def __init__(self, degree: int) -> None:
        self.manifold, self.degree = Sphere(2), degree
        self.heights, self._weights = np.polynomial.legendre.leggauss(degree + 1)
        self.turns = 2 * (degree + 1)
        angles = 2 * math.pi * np.arange(self.turns) / self.turns
        self._sines = np.sqrt(1 - self.heights**2)
        z = np.repeat(self.heights, self.turns)
        s = np.repeat(self._sines, self.turns)
        phi = np.tile(angles, degree + 1)
        self.nodes = np.stack([s * np.cos(phi), s * np.sin(phi), z], 1)
        self.weights = np.repeat(self._weights, self.turns) * (2 * math.pi / self.turns)
        self._degrees = np.repeat(np.arange(degree + 1)[:, None], degree + 1, 1)
        self.eigenvalues = (self._degrees * (self._degrees + 1)).astype(float)
        l, m = np.meshgrid(np.arange(degree + 1), np.arange(degree + 1), indexing="ij")
        with np.errstate(divide="ignore", invalid="ignore"):
            up = np.sqrt((4.0 * l**2 - 1) / (l**2 - m**2))
            down = np.sqrt(((l - 1.0) ** 2 - m**2) / (4.0 * (l - 1) ** 2 - 1))
        self._up, self._down = np.where(m < l, up, 0.0), np.where(m < l - 1, down, 0.0)
        orders = np.arange(1, degree + 1)
        self._sectoral = np.cumprod(np.concatenate([[1 / math.sqrt(4 * math.pi)], np.sqrt(1 + 0.5 / orders)]))

    def _polynomials(
        self, z: np.ndarray, degree: int, slopes: bool = False
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """``l, q_l, q_l'`` of one degree after another, the orders 0 to l in the first dimension: ``(l + 1, rows)``;
        derivatives only where they are asked for."""
        before, last, slope_before, slope_last = np.zeros((4, degree + 1, len(z)))
        for l in range(degree + 1):
            up, down = self._up[l, :l, None], self._down[l, :l, None]
            if slopes:  # of q_l = up (z q_{l-1} - down q_{l-2}), in the place of that of q_{l-2}
                slope_before[:l] = up * (last[:l] + z * slope_last[:l] - down * slope_before[:l])
                slope_before, slope_last = slope_last, slope_before
            before[:l] *= -down
            before[:l] += z * last[:l]
            before[:l] *= up
            before[l] = self._sectoral[l]
            before, last = last, before
            yield l, last[: l + 1], slope_last[: l + 1]

    @cached_property
    def _powers(self) -> np.ndarray:
        """``sin^m`` at the nodes' heights, ``(L + 1, L + 1)``."""
        return self._sines ** np.arange(self.degree + 1)[:, None]

    def analyse(self, values: np.ndarray) -> np.ndarray:
        waves = np.fft.rfft(values.reshape(-1, self.turns), axis=1).T[: self.degree + 1] * (2 * math.pi / self.turns)
        waves = waves * self._powers * self._weights
        found = np.zeros((self.degree + 1, self.degree + 1), complex)
        for l, q, _ in self._polynomials(self.heights, self.degree):
            found[l, : l + 1] = (q * waves[: l + 1]).sum(1)
        return found

    def on_nodes(self, coefficients: np.ndarray) -> np.ndarray:
        waves = np.zeros((self.degree + 2, self.degree + 1), complex)
        for l, q, _ in self._polynomials(self.heights, self.degree):
            waves[: l + 1] += coefficients[l, : l + 1, None] * q
        waves[:-1] *= self._powers
        return np.fft.irfft(waves.T, self.turns, axis=1).ravel() * self.turns

    def measure(self, points: np.ndarray, masses: np.ndarray) -> np.ndarray:
        powers = self._powers_of(points, self.degree).conj() * masses
        found = np.zeros((self.degree + 1, self.degree + 1), complex)
        for l, q, _ in self._polynomials(points[:, 2], self.degree):
            found[l, : l + 1] = (q * powers[: l + 1]).sum(1)
        return found

    @staticmethod
    def _powers_of(x: np.ndarray, degree: int) -> np.ndarray:
        """``(x + i y)^m``, ``(degree + 1, rows)``."""
        w = np.repeat((x[:, 0] + 1j * x[:, 1])[None], degree + 1, 0)
        w[0] = 1.0
        return np.cumprod(w, 0)

    def _block(self, coefficients: np.ndarray, x: np.ndarray, slopes: bool) -> tuple[np.ndarray, np.ndarray]:
        degree = _seen(coefficients, self._degrees)
        a, m = coefficients[: degree + 1, : degree + 1], np.arange(degree + 1)
        a = a * np.where(m > 0, 2.0, 1.0)
        # real and imaginary parts apart: q is real
        sums = np.zeros((4, degree + 1, len(x)))
        for l, q, slope in self._polynomials(x[:, 2], degree, slopes):
            real, imaginary = np.real(a[l, : l + 1, None]), np.imag(a[l, : l + 1, None])
            sums[0, : l + 1] += real * q
            sums[1, : l + 1] += imaginary * q
            if slopes:
                sums[2, : l + 1] += real * slope
                sums[3, : l + 1] += imaginary * slope
        by_order, powers = sums[0] + 1j * sums[1], self._powers_of(x, degree)
        value = (by_order * powers).sum(0).real
        if not slopes:
            return value, x
        turned = (m[1:, None] * by_order[1:] * powers[:-1]).sum(0)
        upward = ((sums[2] + 1j * sums[3]) * powers).sum(0).real
        gradient = np.stack([turned.real, -turned.imag, upward], 1)
        return value, gradient - (gradient * x).sum(1, keepdims=True) * x

    def step(self, spread: float) -> Eigenfunctions:
        """``E P_l(cos(s rho))`` and ``E[rho sin(s rho) P_l'(cos(s rho))]/(l(l+1))``, rho Rayleigh (Funk-Hecke, and the
        addition theorem for the component along the gradient)."""
        nodes, weights = np.polynomial.legendre.leggauss(max(200, int(4 * spread * self.degree) + 100))
        rho = 6.5 * (nodes + 1)
        density = 6.5 * weights * rho * np.exp(-0.5 * rho**2)
        cos, sin = np.cos(spread * rho), np.sin(spread * rho)
        # P_l and sin P_l', whose recursions need no division by sin
        p, slopes = [np.ones_like(cos), cos], [np.zeros_like(cos), sin]
        for l in range(2, self.degree + 1):
            p.append(((2 * l - 1) * cos * p[-1] - (l - 1) * p[-2]) / l)
            slopes.append(slopes[-2] + (2 * l - 1) * sin * p[l - 1])
        l = np.arange(self.degree + 1)
        mean = np.array(p[: self.degree + 1]) @ density
        slope = np.array(slopes[: self.degree + 1]) @ (density * rho) / np.maximum(l * (l + 1), 1)
        return Eigenfunctions(mean[:, None], slope[:, None])

    def tail(self, coefficients: np.ndarray) -> float:
        last = self._degrees > 0.875 * self.degree
        return float((np.abs(coefficients) * np.sqrt((2 * self._degrees + 1) / math.pi))[last].sum())

    def neighbourhood(self, values: np.ndarray) -> np.ndarray:
        v = values.reshape(-1, self.turns)
        v = np.maximum(v, np.maximum(np.roll(v, 1, 1), np.roll(v, -1, 1)))
        padded = np.pad(v, ((1, 1), (0, 0)))
        # beyond a pole lies the other side of its circle
        padded[0], padded[-1] = np.roll(v[0], self.turns // 2), np.roll(v[-1], self.turns // 2)
        return np.maximum(v, np.maximum(padded[:-2], padded[2:])).ravel()

    def draw_near(self, nodes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        row, column = np.divmod(nodes, self.turns)
        edges = np.concatenate([[-1.0], -1 + np.cumsum(self._weights)])  # nodes lie between them
        z = np.clip(edges[row] + uniform[:, 0] * self._weights[row], -1.0, 1.0)
        phi = 2 * math.pi * (column + uniform[:, 1] - 0.5) / self.turns
        s = np.sqrt(1 - z**2)
        return np.stack([s * np.cos(phi), s * np.sin(phi), z], 1)


class TorusSeries(Series):
    """Fourier modes of one or two angles: coefficients ``(count,) * d``, numpy's order, without the highest mode."""

    def __init__(self, manifold: Manifold, count: int) -> None:
        self.manifold, self.count, d = manifold, count, manifold.dim
        angles = 2 * math.pi * np.arange(count) / count
        angles = angles - 2 * math.pi * np.round(angles / (2 * math.pi))
        self.nodes = np.stack(np.meshgrid(*[angles] * d, indexing="ij"), -1).reshape(-1, d)
        self.weights = np.full(len(self.nodes), manifold.volume / len(self.nodes))
        self.orders = np.fft.fftfreq(count, 1 / count)
        grid = np.stack(np.meshgrid(*[self.orders] * d, indexing="ij"))
        self.eigenvalues, self._degrees = (grid**2).sum(0), np.abs(grid).max(0)
        self._kept = self._degrees < count // 2

    def analyse(self, values: np.ndarray) -> np.ndarray:
        return np.fft.fftn(values.reshape(self._kept.shape)) / values.size * self._kept

    def on_nodes(self, coefficients: np.ndarray) -> np.ndarray:
        return np.fft.ifftn(coefficients).real.ravel() * coefficients.size

    def measure(self, points: np.ndarray, masses: np.ndarray) -> np.ndarray:
        waves = [np.exp(-1j * self.orders * x[:, None]) for x in points.T]
        waves[0] = waves[0] * masses[:, None]
        found = waves[0].sum(0) if len(waves) == 1 else waves[0].T @ waves[1]
        return found / self.manifold.volume * self._kept

    def _block(self, coefficients: np.ndarray, x: np.ndarray, slopes: bool) -> tuple[np.ndarray, np.ndarray]:
        some = np.abs(self.orders) <= _seen(coefficients, self._degrees)
        orders, a = self.orders[some], coefficients[np.ix_(*[some] * x.shape[1])]
        first, *rest = [np.exp(1j * orders * one[:, None]) for one in x.T]
        if not rest:
            return (first @ a).real, ((first @ (1j * orders * a)).real)[:, None]
        left, (second,) = first @ a, rest
        value = (left * second).sum(1).real
        by_first = ((first @ (1j * orders[:, None] * a)) * second).sum(1).real
        return value, np.stack([by_first, (left * (1j * orders) * second).sum(1).real], 1)

    def step(self, spread: float) -> Eigenfunctions:
        """Of a wrapped Gaussian; ``E[xi f(x + s xi)] = s grad E f(x + s xi)``."""
        mean = self.heat(spread**2)
        return Eigenfunctions(mean, spread * mean)

    def tail(self, coefficients: np.ndarray) -> float:
        return float(np.abs(coefficients)[self._degrees > 0.875 * (self.count // 2)].sum())

    def neighbourhood(self, values: np.ndarray) -> np.ndarray:
        v = values.reshape(self._kept.shape)
        for axis in range(v.ndim):
            v = np.maximum(v, np.maximum(np.roll(v, 1, axis), np.roll(v, -1, axis)))
        return v.ravel()

    def draw_near(self, nodes: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        x = self.nodes[nodes] + (uniform[:, : self.manifold.dim] - 0.5) * (2 * math.pi / self.count)
        return x - 2 * math.pi * np.round(x / (2 * math.pi))
