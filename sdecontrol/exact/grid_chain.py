"""The exact solution of a chain on grids."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from .bellman import ChainGrid, ChainStep, chain_recursion
from .grids import Grid, GridLaw, Table
from .interactions import Block
from .on_grids import MOMENTS, OnGrids, watched

__all__ = ["GridChainSolution"]


class GridChainSolution(OnGrids):
    """Exact solution of the chain of a problem that falls apart into single coordinates (error of u* about 1e-8).

    ``value``, ``log_z``, ``kernel``, ``marginal`` and ``sample`` are those of the soft-optimal chain p*; ``control``, ``elbo`` and
    ``floor`` those of the best mean-shift chain. A time is matched to the grid of times within 1e-9 of the horizon, else it
    means the step that contains it. :class:`GridLaw` is what laws are.
    """

    chain: Chain
    _margin = 3.5  # more than in continuous time, since more digits are promised
    _good = {1: 1e-8}  # noqa: RUF012
    _bias = 1e-6

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> None:
        for k in range(chain.steps):
            gain = chain.gain(k)
            if isinstance(gain, Tensor) and int(torch.linalg.matrix_rank(gain.double())) < gain.shape[0]:
                raise NoExactSolution(
                    "time_steps: the controls of this scheme do not reach all of its noise, and the best mean-shift chain is "
                    "then not known on grids; use scheme='euler'."
                )
        self._times = [chain.clock[k] for k in watched(chain.steps, MOMENTS)]
        super().__init__(problem, settings, chain, chain.double())

    def _group(self, blocks: list[tuple[int, ...]]) -> list[Block]:
        wide = next((b for b in blocks if len(b) > 1), None)
        if wide is not None:
            raise NoExactSolution(
                f"time_steps: coordinates {wide[0]} and {wide[1]} act on each other, and chains are solved in single coordinates "
                "only; leave time_steps and like out for the solution in continuous time."
            )
        return super()._group(blocks)

    def _drift(self, x: Tensor, time: float) -> Tensor:
        return self._functions.step(x, self._step_at(time))[0]

    def _noise(self, x: Tensor, time: float) -> Tensor:
        return self._functions.step(x, self._step_at(time))[1]

    def _solve(self, member: tuple[int, ...], x: Tensor, end: np.ndarray, grid: Grid, refinement: int) -> ChainGrid:
        steps = []
        for t, h in zip(self.chain.clock, self.chain.step_sizes):
            mean, rows, cost = self._local(x, member, t)
            steps.append(ChainStep(mean[:, 0].numpy(), rows.norm(dim=(1, 2)).numpy(), (h * cost).numpy()))
        return chain_recursion(grid, steps, end, refinement)

    def _value_table(self, one: ChainGrid, time: float) -> Table:
        return one.grid.table(one.soft[self._state(time)])

    def _slope_table(self, one: ChainGrid, time: float) -> Table:
        return one.grid.table(one.slopes[self._step_at(time)])

    def _control_at(self, x: Tensor, time: float) -> Tensor:
        return self._sketch.control(self._step_at(time), self._pull(x, time))

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        if chain is not self.chain:
            return super()._shift_function(chain)
        return lambda k, x, condition: self._pull(x.to("cpu", torch.float64), chain.clock[k]).to(x)

    @property
    def elbo(self) -> Tensor:
        return self._over_start([one.grid.table(one.shifted[0]) for one in self._solved], False)

    @property
    def floor(self) -> Tensor:
        return self._over_start([one.grid.table(one.soft[0] - one.shifted[0]) for one in self._solved], False)

    # ---------------------------------------------------------------- laws

    def kernel(self, x: Tensor, k: int) -> Any:  # a GridLaw where the base has Gaussians
        states = self._in("x", x)
        self._check_step(k)
        densities: dict[int, Tensor] = {}
        for block, one in zip(self._blocks, self._solved):
            for (i,) in block.members:
                made = torch.from_numpy(one.optimal_kernel(k, states[..., i].reshape(-1).numpy()))
                densities[i] = made.reshape(*states.shape[:-1], -1)
        return self._law(densities)

    def _law(self, densities: dict[int, Tensor]) -> GridLaw:
        points = {i: one.law_points for block, one in zip(self._blocks, self._solved) for (i,) in block.members}
        order = sorted(densities)
        lows, spacings = [float(points[i][0][0]) for i in order], [points[i][1] for i in order]
        return GridLaw(lows, spacings, [densities[i] for i in order], self._out(torch.zeros(())))

    @cached_property
    def _marginals(self) -> dict[int, list[Tensor]]:
        """Of each coordinate: the densities of ``x_1 .. x_K`` under p*."""
        mean, cov = self._first_moments()
        self._check_start(cov)
        out: dict[int, list[Tensor]] = {}
        for block, one in zip(self._blocks, self._solved):
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
        return self._law({i: laws[k - 1] for i, laws in self._marginals.items()})
