"""The exact solution on grids in continuous time."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from .grids import Grid, Table
from .hjb import Coefficients, ContinuousGrid
from .interactions import PROBES
from .on_grids import MOMENTS, OnGrids

__all__ = ["GridSolution"]

_STEPS = 200  # of the paths that say where the process goes


class GridSolution(OnGrids):
    """Exact solution in continuous time of a problem that falls apart into blocks of one or two coordinates.

    ``u* = sigma' grad w``, w on a grid for each distinct block (:class:`ContinuousGrid`); equal coordinates share one. The
    grids are refined until ``error``, the estimated error of u* on optimal paths, is below 1e-6 (blocks of two: 1e-4, or
    what 97 x 97 points give). ``marginal``, ``bridge`` and ``sample`` are not known: simulate with ``control``.
    """

    _margin = 2.5
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

    @cached_property
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
        def coefficients(t: float) -> Coefficients:
            return Coefficients(*(part.numpy() for part in self._local(x, member, t)))

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
        return piece.grid.table(piece.grid.gradient(piece.at(time)))

    def _control_at(self, x: Tensor, time: float) -> Tensor:
        return self._pull(x, time)

    def marginal(self, t: float) -> Any:
        if self._snap(float(t)) == 0.0 and self._root is None:
            return self.problem.initial
        raise NoExactSolution(
            "marginal(t), sample(n): the laws are not computed on grids in continuous time; simulate with control, or ask "
            "for the laws of a chain, exact_solution(problem, time_steps=K)."
        )
