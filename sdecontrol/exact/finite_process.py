"""The exact solution of a jump process in continuous time: a linear equation between all states."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..processes.jump import JumpProcess
from ..processes.rates import Matrix, exponential_action, less_diagonal, time_ordered
from ..shapes import Controls, States
from .finite import FiniteSolution

_PIECES = 16  # of the time span, at whose ends psi and phi are held
_TIMES = 9  # at which a running cost is compared with itself
_SPAN = 690.0  # nats that double precision holds


class FiniteProcessSolution(FiniteSolution):
    """Exact solution of a jump process in continuous time: ``d_t psi + Q psi - (f/alpha) psi = 0``,
    ``psi(., T) = exp(r/alpha)``, ``v = alpha log psi``.

    ``control`` are the tilts ``u*(x, y) = (v(y) - v(x))/alpha`` of the rates. Laws are ``p*_t = phi_t psi_t`` with
    ``phi`` the forward equation's solution from ``nu/psi_0`` (from ``nu`` where the start is controlled). Constant
    rates and costs: by exponentials, to rounding; else by a time-ordered exponential, to about 1e-11 (in single
    precision 1e-6). A running cost that is the same at nine times is taken as constant.

    Raises:
        NoExactSolution: psi spans more than double precision does.
    """

    chain: None

    def __init__(self, problem: ControlProblem) -> None:
        process: JumpProcess = problem.reference
        super().__init__(problem, process.space, {})
        self._process, self._end = process, self._rewards()
        self._scale = float(self._end.max())
        self._check(np.exp(self._end - self._scale), float(np.ptp(self._end)))
        times = np.linspace(0.0, problem.horizon, _TIMES).tolist()
        costs = [self._costs(t) for t in times]
        same = costs[0] is None or all(np.array_equal(costs[0], c) for c in costs[1:])  # type: ignore[arg-type]
        self._fixed = self._generator(0.0) if same and process.autonomous else None

    @staticmethod
    def _check(psi: np.ndarray, span: float = 0.0) -> None:
        if span > _SPAN or not (psi > 0).all():
            raise NoExactSolution(
                "alpha: exp(v/alpha) spans more than double precision does in continuous time. Use a larger alpha, or "
                "the chain's solution (time_steps=), which is computed in logarithms."
            )

    def _generator(self, time: float) -> Matrix:
        """``Q - diag(f/alpha)``."""
        costs = self._costs(time)
        rates = self._process.rates_at(time)
        if self._stopped is not None:  # no jumps from there
            rates = rates * (~self._stopped)[:, None]
        return rates if costs is None else less_diagonal(rates, costs)

    def _flow(self, s: float, t: float, y: np.ndarray, forward: bool = False) -> np.ndarray:
        """``U(s, t) y``, or ``U' y``."""
        if s == t:
            return y
        if self._fixed is None:
            single = self._process.dtype != torch.float64
            return time_ordered(self._generator, s, t, y, forward=forward, single=single)
        matrix: Any = self._fixed
        return exponential_action(matrix.T if forward else matrix, t - s, y)

    @functools.cached_property
    def _ends(self) -> list[float]:
        return [self.problem.horizon * j / _PIECES for j in range(_PIECES)] + [self.problem.horizon]

    @functools.cached_property
    def _psi(self) -> list[tuple[np.ndarray, float]]:
        """At the ends of the pieces, with the logarithm of a factor."""
        found, scale, ends = [(np.exp(self._end - self._scale), self._scale)], self._scale, self._ends
        for s, t in zip(ends[-2::-1], ends[:0:-1]):
            y = self._flow(s, t, found[-1][0])
            self._check(y)
            scale += float(np.log(y.max()))
            found.append((y / y.max(), scale))
        return found[::-1]

    @functools.cached_property
    def _phi(self) -> list[np.ndarray]:
        y, found = self._start, []
        if self.problem.start != "controlled":
            y = y / self._psi[0][0]
        found.append(y / y.max())
        for s, t in zip(self._ends[:-1], self._ends[1:]):
            y = self._flow(s, t, found[-1], forward=True)
            found.append(y / y.max())
        return found

    def _piece(self, time: float) -> int:
        """The last end of a piece that is not after ``time``."""
        return min(int(np.searchsorted(self._ends, time, side="right")) - 1, _PIECES)

    def _scaled_psi(self, time: float) -> tuple[np.ndarray, float]:
        j = self._piece(time)
        if self._ends[j] == time:
            return self._psi[j]
        y, scale = self._psi[j + 1]
        return self._flow(time, self._ends[j + 1], y), scale

    def _log_psi(self, time: float) -> np.ndarray:
        if time == self.problem.horizon:
            return self._end
        if time < 0:  # before a learned start
            return np.full(self.space.size, float(self.log_z))
        y, scale = self._scaled_psi(time)
        return np.log(y) + scale

    def _probs(self, time: float) -> np.ndarray:
        if time == 0.0 and self.problem.start != "controlled":
            return self._start
        if time < 0:
            raise NoExactSolution("t: a controlled start of tokens has laws from time 0 on; before, there is no state.")
        j = self._piece(time)
        law = self._scaled_psi(time)[0] * self._flow(self._ends[j], time, self._phi[j], forward=True)
        return law / law.sum()

    def _reaches(self, s: float, t: float, end: np.ndarray) -> np.ndarray:
        before, after = self._scaled_psi(s)[0], self._scaled_psi(t)[0]
        return self._flow(s, t, end * after[:, None]) / before[:, None]

    def _control_at(self, x: States, time: float) -> Controls:
        if time < 0:  # the tilt of the start
            return torch.from_numpy(self._log_psi(0.0) - float(self.log_z)).expand(len(x), 1, -1)
        w, moves = torch.from_numpy(self._log_psi(time)), self._process.moves
        here = w[x[:, 0]].reshape(-1, 1, 1)
        if moves is None:
            return w.expand(len(x), 1, -1) - here
        to = moves.cpu()[x[:, 0]].unsqueeze(1)
        return torch.where(to < 0, 0.0, w[to.clamp(min=0)] - here)
