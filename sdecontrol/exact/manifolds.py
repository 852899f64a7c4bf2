"""The exact solution of problems on S^2 and on tori of one or two angles: psi as a series in eigenfunctions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..memory import Remembered
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac
from ..processes.manifolds import ManifoldSDE, Sphere, UniformLaw
from ..shapes import Controls, PerPath, Scalar, States
from .base import ExactSolution
from .probing import Functions
from .series import Series, SphereSeries, TorusSeries

_DEGREES = (47, 95, 191)  # of series on the sphere
_COUNTS = {1: (128, 512, 2048), 2: (48, 96, 160)}  # of modes for each angle
_RESOLVED = 1e-13  # tail of a series whose values are known to rounding
_WORST = 1e-3  # largest error of psi, relative, on optimal paths
_TIMES = 32  # of the quadrature of sigma^2 where it depends on time
_ROUNDING = 64  # by how much more than eps the sums of a series are off


class SeriesLaw(Distribution):
    """A law on a manifold by its density, up to a factor, with respect to the manifold's volume.

    Args:
        density: of states ``(rows, n)`` in float64. like: a tensor of the dtype and on the device of draws.
    """

    def __init__(self, series: Series, density: Callable[[np.ndarray], np.ndarray], like: Tensor) -> None:
        self._series, self._density, self.like = series, density, like
        self._values = np.clip(density(series.nodes), 0.0, None)
        self._total = float(self._values @ series.weights)
        super().__init__(event_shape=series.manifold.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of the numbers (of angles: of unit vectors ``cos, sin``, as an angle), ``(*event)``."""
        p = self._values * self._series.weights / self._total
        nodes = self._series.nodes
        if not self._series.manifold.angles:
            return torch.from_numpy(p @ nodes).to(self.like)
        return torch.from_numpy(np.arctan2(p @ np.sin(nodes), p @ np.cos(nodes))).to(self.like)

    def log_prob(self, value: Tensor) -> Tensor:
        flat = value.detach().to("cpu", torch.float64).reshape(-1, *self.event_shape)
        with np.errstate(divide="ignore"):
            found = np.log(np.clip(self._density(flat.numpy()), 0.0, None) / self._total)
        return torch.from_numpy(found).reshape(value.shape[:-1]).to(self.like)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """By rejection in the cells of the grid."""
        n, series, parts = math.prod(sample_shape), self._series, []
        bound = 1.25 * series.neighbourhood(self._values) + 1e-6 * self._values.max()
        edges = torch.from_numpy(np.cumsum(bound * series.weights))
        while sum(map(len, parts)) < n:
            u = torch.rand((2 * n + 64, 4), dtype=torch.float64)
            index = torch.searchsorted(edges, u[:, 0] * edges[-1]).clamp(max=len(edges) - 1).numpy()
            x = series.draw_near(index, u[:, 1:3].numpy())
            parts.append(x[u[:, 3].numpy() * bound[index] < self._density(x)])
        return torch.from_numpy(np.concatenate(parts)[:n]).to(self.like).reshape(*sample_shape, *self.event_shape)

    def __repr__(self) -> str:
        return f"SeriesLaw({self._series.manifold})"


class ManifoldSolution(ExactSolution):
    """Exact solution on the sphere S^2 without drift, or on a torus of one or two angles: ``psi = exp(v/alpha)`` is a
    series in spherical harmonics or Fourier modes, any reward expanded by quadrature.

    In continuous time (no drift, no running cost) every coefficient decays with its eigenvalue,
    ``exp(-l(l+1) sigma^2 (T-t)/2)``. A geodesic step multiplies it by a number as well, ``E P_l(cos(sqrt(h) sigma
    rho))`` with rho Rayleigh (Funk-Hecke); on the torus it is a wrapped Gaussian, around ``x + h b(x)`` where there is
    a drift. So ``value``, ``log_z``, ``marginal`` and ``sample`` of a chain are those of the soft-optimal chain p*
    itself, to rounding. ``control`` of a chain is the mean of the noise under p*, ``E_{p*}[P xi | x_k]/sqrt(h)``: the
    best mean shift in KL(p* || p^u), of which the best in KL(p^u || p*) is O(h) off. On a torus without drift it is
    that of continuous time. ``elbo``, ``kernel`` and ``bridge`` are not known.

    Where psi is below 1e-14 of its maximum a series in double precision does not resolve it; ``error`` says what that
    is on optimal paths.

    Attributes:
        error: the mean relative error of psi on optimal paths, estimated from the tail of its series and rounding.

    Raises:
        NoExactSolution: naming what is not known, or not resolved.
    """

    def __init__(self, problem: ControlProblem, settings: dict[str, Any], chain: Chain | None = None) -> None:
        super().__init__(problem, settings, chain)
        self._reference: ManifoldSDE = problem.reference
        self._check()
        self.kind = str(self._reference.manifold).lower()
        self._functions = Functions(problem, problem.chain(1) if chain is None else chain)
        self._series, end, self._noise = self._expand()
        self._series_of = [end] if chain is None else self._backwards(end)
        self._laws: list[np.ndarray] = []
        self.error = self._error()
        if not self.error <= _WORST:
            raise NoExactSolution(
                f"alpha: exp(v/alpha) is not resolved by a series on this {self.kind} (relative error on optimal paths "
                f"{self.error:.1g}). Use a larger alpha, a smoother reward, or functions that compute in float64."
            )

    def _check(self) -> None:
        manifold, still = self._reference.manifold, self._reference.still
        if manifold.dim != 2 if isinstance(manifold, Sphere) else manifold.dim > 2:
            raise NoExactSolution(
                "reference: on manifolds exact solutions are known for Sphere(2), Torus(1) and Torus(2), not "
                f"{manifold}. Estimate with particles (sc.SMC)."
            )
        if isinstance(manifold, Sphere) and not still:
            raise NoExactSolution("reference: no exact solution is known on a sphere with a drift; leave drift out.")
        if self.chain is None and not (still and self.problem.running_cost_function is None):
            what = "running_cost" if still else "reference"
            raise NoExactSolution(
                f"{what}: in continuous time exact solutions on manifolds have neither drift nor running cost; ask for "
                "that of the chain, exact_solution(problem, time_steps=K)."
            )

    # ---------------------------------------------------------------- psi

    def _expand(self) -> tuple[Series, np.ndarray, float]:
        """A series that resolves ``exp(r/alpha)``, its coefficients, and how far off its values are; 1 the largest."""
        manifold, noise = self._reference.manifold, math.inf
        sphere = isinstance(manifold, Sphere)
        for size in _DEGREES if sphere else _COUNTS[manifold.dim]:
            series: Series = SphereSeries(size) if sphere else TorusSeries(manifold, size)
            tilt = self._functions.reward(torch.from_numpy(series.nodes)).numpy()
            self._scale = float(tilt.max())
            end = series.analyse(np.exp(tilt - self._scale))
            rounding = _ROUNDING * self._functions.eps
            noise = max(series.tail(end), rounding)
            if noise <= max(_RESOLVED, rounding):
                break
        return series, end, noise

    def _moved(self, k: int) -> np.ndarray:
        """``x + h b`` of step k at the nodes."""
        return self._move(torch.from_numpy(self._series.nodes), k)

    def _move(self, x: Tensor, k: int) -> np.ndarray:
        assert self.chain is not None
        drift = self._functions.drift(x, self.chain.clock[k])
        return self._reference.manifold.onto(x + self.chain.step_sizes[k] * drift).numpy()

    def _cost(self, k: int, x: np.ndarray | None = None) -> np.ndarray:
        """``h f/alpha`` of step k at the nodes, or at states."""
        assert self.chain is not None
        x = self._series.nodes if x is None else x
        return self.chain.step_sizes[k] * self._functions.cost(torch.from_numpy(x), self.chain.clock[k]).numpy()

    def _backwards(self, end: np.ndarray) -> list[np.ndarray]:
        """The coefficients of ``psi_k exp(-scale)`` at all states of the chain."""
        chain: Any = self.chain
        made = Remembered(self._series.step, 2)  # steps of a grid are mostly equal
        self._steps = [made(spread) for spread in chain.spreads]
        found, costly = [end], self.problem.running_cost_function is not None
        for k in reversed(range(chain.steps)):
            after = self._steps[k].mean * found[-1]
            if not self._reference.still:
                after = self._series.analyse(self._series.values(after, self._moved(k)))
            if costly:
                after = self._series.analyse(self._series.on_nodes(after) * np.exp(-self._cost(k)))
            if costly or not self._reference.still:
                self._noise = max(self._noise, self._series.tail(after))
            found.append(after)
        return found[::-1]

    def _decayed(self, s: float, t: float) -> np.ndarray:
        """By what Brownian motion from time s to t multiplies coefficients."""
        nodes, weights = np.polynomial.legendre.leggauss(_TIMES)
        times = 0.5 * (s + t) + 0.5 * (t - s) * nodes
        squares = np.array([self._reference.level(time) ** 2 for time in times])
        return self._series.heat(0.5 * (t - s) * float(weights @ squares))

    def _coefficients(self, time: float) -> np.ndarray:
        """Of psi at a time of the process, or at the chain's state there."""
        if self.chain is not None:
            return self._series_of[self._state(time)]
        return self._series_of[0] * self._decayed(time, self.problem.horizon)

    def _psi(self, x: np.ndarray, time: float) -> np.ndarray:
        """``psi exp(-scale)``; at the end by the reward itself."""
        if time == self._marks[-1]:
            return np.exp(self._functions.reward(torch.from_numpy(x)).numpy() - self._scale)
        return np.clip(self._series.values(self._coefficients(time), x), self._noise, None)

    def _value_at(self, x: States, time: float) -> PerPath:
        if time == self._marks[-1]:
            return self.problem.alpha * self._functions.reward(x)
        return self.problem.alpha * torch.from_numpy(np.log(self._psi(x.numpy(), time)) + self._scale)

    def _control_at(self, x: States, time: float) -> Controls:
        at = x.numpy()
        if self.chain is None:
            of_value = of_slope = self._coefficients(time)
            level = self._reference.level(time)
        else:
            k = self._step_at(time)
            of_value, of_slope = (factors * self._series_of[k + 1] for factors in self._steps[k])
            at = at if self._reference.still else self._move(x, k)
            level = 1 / math.sqrt(self.chain.step_sizes[k])
        value, slope = self._series.values(of_value, at), self._series.gradients(of_slope, at)
        return torch.from_numpy(level * slope / np.clip(value, self._noise, None)[:, None])

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        times = [self._snap(t) for t in chain.clock[:-1]]

        def shift(k: int, x: States, condition: Any) -> Tensor:
            return chain.shift_at(
                k, x, self._control_at(x.detach().to("cpu", torch.float64), times[k]).to(x), condition
            )

        return shift

    # ---------------------------------------------------------------- what depends on the start

    def _start(self) -> tuple[np.ndarray, np.ndarray]:
        """States and probabilities of the start.

        Raises:
            NoExactSolution: a start that is neither a point nor uniform.
        """
        law = self.problem.origin
        if isinstance(law, Dirac):
            return law.point.detach().to("cpu", torch.float64).numpy()[None], np.ones(1)
        if not isinstance(law, UniformLaw):
            raise NoExactSolution(
                "what depends on the start (log_z, marginal(t), sample(n), ...) is not known for a "
                f"{type(law).__name__} start; use Dirac or manifold.uniform(). (value and control are exact.)"
            )
        return self._series.nodes, self._series.weights / self._series.weights.sum()

    def _error(self) -> float:
        try:
            x, p = self._start()
        except NoExactSolution:
            x, p = self._series.nodes, self._series.weights / self._series.weights.sum()
        return self._noise * float(p @ (1 / self._psi(x, 0.0)))

    @property
    def log_z(self) -> Scalar:
        x, p = self._start()
        return self._out(torch.tensor(math.log(float(p @ self._psi(x, 0.0))) + self._scale, dtype=torch.float64))

    @property
    def start_log_z(self) -> Scalar:
        x, p = self._start()
        return self._out(torch.tensor(float(p @ np.log(self._psi(x, 0.0))) + self._scale, dtype=torch.float64))

    @property
    def elbo(self) -> Scalar:
        if self.chain is None:
            return self.start_log_z
        raise NoExactSolution(
            "elbo, floor: the ELBO of a mean-shift control on a manifold is not known in closed form; "
            "exact.evaluate() estimates it."
        )

    @cached_property
    def _first(self) -> tuple[np.ndarray, np.ndarray]:
        """Masses of the start over psi: a state and its mass, or all nodes."""
        x, p = self._start()
        return x, p / self._psi(x, 0.0)

    def _density(self, x: np.ndarray, mass: np.ndarray) -> np.ndarray:
        """The coefficients of masses at states: of all nodes, unless they have moved, or of a few points."""
        nodes = self._series.nodes
        if x is nodes:
            return self._series.analyse(mass / self._series.weights)
        return self._series.measure(x, mass)

    def _forward(self, k: int) -> np.ndarray:
        """The coefficients of the density of the reference's paths at step k >= 1, costs included, that makes the
        optimum's with ``psi_k``."""
        costly, still = self.problem.running_cost_function is not None, self._reference.still
        for j in range(len(self._laws), k):
            if j and not costly and still:
                density = self._laws[-1]
            else:
                x, mass = self._first
                if j:
                    x, mass = self._series.nodes, self._series.on_nodes(self._laws[-1]) * self._series.weights
                mass = mass * np.exp(-self._cost(j, x)) if costly else mass
                density = self._density(x if still else self._move(torch.from_numpy(x), j), mass)
            self._laws.append(self._steps[j].mean * density)
        return self._laws[k - 1]

    def marginal(self, t: float) -> Any:
        """The law of X_t under the optimum: the initial law at time 0, else a :class:`SeriesLaw`.

        Raises:
            NoExactSolution: it is narrower than the series resolves.
        """
        time = self._snap(float(t))
        if time == 0.0 or (self.chain is not None and self._state(time) == 0):
            self._start()
            return self.problem.initial
        if self.chain is not None:
            k = self._state(time)
            phi, time = self._forward(k), self._marks[k]
        else:
            phi = self._density(*self._first) * self._decayed(0.0, time)
        values = self._series.on_nodes(phi)
        if not values.min() > -1e-6 * values.max():
            raise NoExactSolution(
                f"marginal(t): the law at t = {time:.3g} is narrower than a series resolves; ask for a later time."
            )
        like = torch.zeros((), dtype=self.problem.dtype, device=self.problem.device)
        return SeriesLaw(self._series, lambda x: self._series.values(phi, x) * self._psi(x, time), like)

    def bridge(self, s: float, t: float, x_t: Tensor) -> Any:
        raise NoExactSolution("bridge(s, t, x_t): bridges on manifolds are not computed.")

    def _kernel_at(self, x: Tensor, k: int) -> Any:
        raise NoExactSolution("kernel(x, k): kernels on manifolds are not computed; value and control are exact.")

    def _in(self, name: str, x: Tensor, ranks: tuple[int, ...] = (1, 2)) -> Tensor:
        found = super()._in(name, x, ranks)
        self._reference.check_states(name, found)
        return self._reference.onto(found)
