"""The exact solution of a process in continuous time on grids: the Hamilton-Jacobi-Bellman equation of each block.

It is written for ``w = v/alpha``, not for ``psi = exp(w)``: w stays of moderate size and smooth where psi runs over
hundreds of orders of magnitude.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from .grids import Grid, Table
from .on_grids import OnGrids
from .probing import MOMENTS, PROBES

_STEPS = 200  # of the paths that say where the process goes
_TOLERANCE = 1e-8  # relative and absolute tolerance of the equation in time
_LEVELS = 193  # times at which a plane's values are kept, denser towards the horizon
_MOST_CALLS = 30_000  # of the equation's right-hand side: a minute for a plane of the finest grid


def _why(grid: Grid, root: Tensor, cost: Tensor, end: np.ndarray) -> str:
    """What may be at fault, and what to do."""
    noisy = torch.linalg.eigvalsh(root @ root.mT)
    if float(noisy[:, 0].max()) <= 1e-12 * float(noisy[:, -1].max()):
        return (
            "the noise does not act in all directions of these coordinates, and central differences do not hold where "
            "nothing smooths the value. Give the others a little noise, or estimate log Z with particles (sc.SMC, "
            "sc.TemperedSMC)"
        )
    steep = "reward or drift are too steep or the noise too small for it. Use a larger alpha or a shorter horizon"
    inner = np.ones(grid.counts, dtype=bool)
    inner[(slice(1, -1),) * grid.dim] = False
    edge = inner.ravel()  # where what has no bound is largest
    bounded = all(float(v[edge].max()) < float(v[~edge].max()) or np.ptp(v) == 0 for v in (end, -cost.numpy()))
    if bounded:
        return steep
    return f"E exp(R/alpha) is infinite (reward or -running cost too convex), or {steep}, or a less convex reward"


class ContinuousGrid:
    """``w = v/alpha`` of a process on a grid, from the HJB equation backwards from the horizon::

        -dw/dt = b.grad w + (tr(Sigma hess w) + grad w' Sigma grad w)/2 - f/alpha,   w(., T) = r/alpha,

    central differences of order 6, and in time scipy's Radau with its dense output; in two dimensions its explicit
    RK45, with cubic Hermite interpolation between 193 stored times.

    Args:
        coefficients: ``t ->`` drift ``(N, n)``, root of the noise ``(N, n, m)`` and running cost over alpha ``(N,)`` at
            the grid's points.
        span: first and last time; end: ``r/alpha`` at the grid's points.
        autonomous: the coefficients are the same at all times.

    Raises:
        NoExactSolution: the equation cannot be integrated (E exp(R/alpha) is infinite, or the grid is too narrow).
    """

    def __init__(
        self,
        grid: Grid,
        coefficients: Callable[[float], tuple[Tensor, Tensor, Tensor]],
        end: np.ndarray,
        span: tuple[float, float],
        autonomous: bool,
    ) -> None:
        from scipy import sparse
        from scipy.integrate import solve_ivp
        from scipy.interpolate import CubicHermiteSpline

        self.grid, self._span = grid, span
        pairs = list(grid.H)

        def parts(t: float) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray], np.ndarray]:
            drift, root, cost = (part.numpy() for part in coefficients(t))
            square = np.einsum("nim,njm->ijn", root, root)
            return drift.T, {(a, b): square[a, b] * (0.5 if a == b else 1.0) for a, b in pairs}, cost

        fixed = parts(span[0]) if autonomous else None

        def slope(s: float, w: np.ndarray) -> np.ndarray:
            drift, half, cost = fixed or parts(span[1] - s)
            g, second = grid.derivatives(w)
            return (drift * g).sum(0) + sum(half[a, b] * (second[a, b] + g[a] * g[b]) for a, b in pairs) - cost

        def jacobian(s: float, w: np.ndarray) -> Any:
            drift, half, _ = fixed or parts(span[1] - s)
            g, speed = grid.derivatives(w)[0], drift.copy()
            for a, b in pairs:
                speed[a] += half[a, b] * g[b]
                speed[b] += half[a, b] * g[a]
            total = sum(sparse.diags(half[pair]) @ grid.H[pair] for pair in pairs)
            return sparse.csc_matrix(total + sum(sparse.diags(speed[a]) @ grid.D[a] for a in range(grid.dim)))

        length = span[1] - span[0]
        calls = itertools.count()

        def counted(s: float, w: np.ndarray) -> np.ndarray:
            if next(calls) >= _MOST_CALLS:
                raise RuntimeError("too many steps")
            return slope(s, w)

        options: dict[str, Any] = {"method": "Radau", "jac": jacobian, "dense_output": True}
        if grid.dim == 2:  # factorising the matrix of a plane costs more than the many steps of an explicit method
            options = {"method": "RK45", "t_eval": length * np.linspace(0.0, 1.0, _LEVELS) ** 1.5}
        found: Any = None
        # errors: a non-finite state, a singular matrix inside scipy, or too many steps
        with np.errstate(all="ignore"), contextlib.suppress(ValueError, RuntimeError):
            found = solve_ivp(counted, (0.0, length), end, rtol=_TOLERANCE, atol=_TOLERANCE, **options)
        if found is None or found.status != 0 or not np.isfinite(found.y[:, -1]).all():
            ends = ", ".join(f"[{low:.3g}, {high:.3g}]" for low, high in zip(grid.lows, grid.highs))
            raise NoExactSolution(
                f"the HJB equation could not be integrated back to time 0 on a grid ({ends}): "
                f"{_why(grid, *coefficients(span[0])[1:], end)}."
            )
        self._dense = found.sol
        if grid.dim == 2:
            values = found.y.T
            self._dense = CubicHermiteSpline(found.t, values, [slope(s, w) for s, w in zip(found.t, values)])

    def at(self, time: float) -> np.ndarray:
        """w at the grid's points."""
        return self._dense(min(max(self._span[1] - time, 0.0), self._span[1] - self._span[0]))


class GridSolution(OnGrids):
    """Exact solution in continuous time of a problem that falls apart into blocks of one or two coordinates.

    ``u* = sigma' grad w``, w on a grid for each distinct block (:class:`ContinuousGrid`); equal coordinates share one.
    The grids are refined until ``error``, the estimated error of u* on optimal paths, is below 1e-6 (blocks of two:
    1e-4, or what 97 x 97 points give). ``marginal``, ``bridge`` and ``sample`` are not known: simulate with
    ``control``.
    """

    _margin = {1: 2.5, 2: 2.5}  # noqa: RUF012
    _good = {1: 1e-6, 2: 1e-4}  # noqa: RUF012
    _bias = 0.1  # the sketch is a chain, so its J is biased

    def __init__(self, problem: ControlProblem) -> None:
        self._times = (0.5 * problem.horizon * (1 - np.cos(np.linspace(0, np.pi, MOMENTS)))).tolist()
        self._root: Tensor | None = None  # of the noise before time 0
        if problem.start == "controlled":
            root = self._controlled_law(problem).scale_root.detach().to("cpu", torch.float64)
            self._root = root[None] if root.ndim == 2 else root
            self._times.append(-1.0)
        super().__init__(problem, {}, None, problem.chain(_STEPS, "euler").double())

    @functools.cached_property
    def _autonomous(self) -> bool:
        """Whether the problem's functions are the same at all times."""
        f, x = self._functions, self._probes[:PROBES]
        at = [[function(x, t) for function in (f.drift, f.diffusion, f.cost)] for t in self._times if t >= 0]
        return all(torch.equal(a, b) for parts in at[1:] for a, b in zip(parts, at[0]))

    def _drift(self, x: Tensor, time: float) -> Tensor:
        return self._functions.drift(x, time) if time >= 0 else torch.zeros_like(x)

    def _noise(self, x: Tensor, time: float) -> Tensor:
        return self._functions.diffusion(x, time) if self._root is None or time >= 0 else self._root

    def _solve(self, member: tuple[int, ...], x: Tensor, end: np.ndarray, grid: Grid, refinement: int) -> Any:
        coefficients = functools.partial(self._local, x, member)
        main = ContinuousGrid(grid, coefficients, end, (0.0, self.problem.horizon), self._autonomous)
        if self._root is None:
            return [(0.0, main)]
        return [(-1.0, ContinuousGrid(grid, coefficients, main.at(0.0), (-1.0, 0.0), True)), (0.0, main)]

    @staticmethod
    def _piece(one: list[tuple[float, ContinuousGrid]], time: float) -> ContinuousGrid:
        return [piece for first, piece in one if first <= time][-1]

    def _value_table(self, one: Any, time: float) -> Table:
        piece = self._piece(one, time)
        return piece.grid.table(piece.at(time))

    def _slope_table(self, one: Any, time: float) -> Table:
        piece = self._piece(one, time)
        return piece.grid.table(piece.grid.derivatives(piece.at(time))[0])

    def marginal(self, t: float) -> Any:
        if self._snap(float(t)) == 0.0 and self._root is None:
            return self.problem.initial
        raise NoExactSolution(
            "marginal(t), sample(n): the laws are not computed on grids in continuous time; simulate with control, or "
            "ask for the laws of a chain, exact_solution(problem, time_steps=K)."
        )
