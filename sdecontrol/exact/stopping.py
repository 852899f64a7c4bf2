"""What exact solutions of chains that stop in a region, or whose reward is -inf somewhere, have in common: values and
shifts at points by sums over nodes (:mod:`.stopped` on a line, :mod:`.stopped_plane` on a plane)."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac, draw
from ..randomness import Place, generator_for
from ..shapes import Controls, PerPath, Scalar, States
from .base import ExactSolution
from .probing import Functions

_PATHS = 512  # that say where the process goes
_LEAST = 1e-9  # of a step's noise


class Step(NamedTuple):
    """A step from given states: mean ``(n, d)``, scale ``(n, d, m)``, ``h f/alpha`` ``(n,)``."""

    mean: Tensor
    rows: Tensor
    cost: np.ndarray


class StoppedSolution(ExactSolution):
    """Exact solution of a chain with a region to stop in, or with a reward that is -inf somewhere.

    ``value``, ``log_z`` and ``start_log_z`` are those of the soft-optimal chain. Where the reward is -inf at states
    that the chain can end in, every Gaussian shift has an objective of -inf: ``elbo`` is -inf, and ``control`` the mean
    shift of the soft-optimal kernel, O(h) from ``sigma grad log psi``. Laws are not computed.
    """

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> None:
        super().__init__(problem, settings, chain)
        self._wide = chain.double()
        self._functions = Functions(problem, getattr(self._wide, "inner", self._wide))
        self._solve()

    # ---------------------------------------------------------------- of each kind of nodes

    def _solve(self) -> None:
        """Nodes, and ``w = v/alpha`` there of all states of the chain."""
        raise NotImplementedError

    def _values(self, x: Tensor, k: int) -> np.ndarray:
        """``w_k`` at any states ``(n, d)``."""
        raise NotImplementedError

    def _shift(self, x: Tensor, k: int) -> Tensor:
        """The shift of the noises of step k at any states, ``(n, m)``; 0 inside the region."""
        raise NotImplementedError

    def _start_average(self, soft: bool) -> float:
        """``log E exp w_0(X_0)``, or else ``E w_0(X_0)``, over the start."""
        raise NotImplementedError

    def _reached(self) -> float:
        """The objective of the shifts, where the reward is a number."""
        raise NotImplementedError

    @property
    def _numbers(self) -> bool:
        """Whether rewards are numbers wherever the chain may end."""
        raise NotImplementedError

    # ---------------------------------------------------------------- what the problem says

    def _inside(self, x: Tensor) -> np.ndarray:
        with torch.no_grad(), self.problem.evaluating():
            found = self._wide.inside(x.to(self.problem.device))
        return np.zeros(len(x), dtype=bool) if found is None else found.cpu().numpy()

    def _reward(self, x: Tensor) -> np.ndarray:
        return self._functions.reward(x).numpy()

    def _step(self, x: Tensor, k: int) -> Step:
        """Step k of the chain from states x, were it not stopped."""
        h, t = self._wide.step_sizes[k], self._wide.clock[k]
        mean, scale = self._functions.step(x, k)
        rows = self._functions.rows(scale, list(range(x.shape[1])), len(x))
        return Step(mean, rows, h * self._functions.cost(x, t).numpy())

    @cached_property
    def _homogeneous(self) -> bool:
        """Whether all steps are alike, by what they do from a few states."""
        x = torch.linspace(-1.7, 1.9, 7, dtype=torch.float64).unsqueeze(1)
        x = x.expand(-1, self.problem.event_shape.numel()) * torch.linspace(1.0, 0.7, self.problem.event_shape.numel())
        first, *others = (self._step(x, k) for k in range(self._wide.steps))
        return all(np.allclose(a, b, rtol=1e-12, atol=0.0) for other in others for a, b in zip(first, other))

    def _range(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the reference's paths go, and the least standard deviation of a step there of each coordinate given the
        others, ``(d,)``."""
        x = draw(self.problem.origin, _PATHS, 0).to("cpu", torch.float64)
        generator = generator_for("cpu", 0, Place.STOPPED_WALK)
        low, high, narrow = x.amin(0), x.amax(0), torch.full((x.shape[1],), math.inf, dtype=x.dtype)
        for k in range(self._wide.steps):
            mean, rows, _ = self._step(x, k)
            if rows.shape[2] < x.shape[1] or not float(torch.linalg.svdvals(rows)[:, -1].min()) > _LEAST:
                raise NoExactSolution(
                    "diffusion: at some states a step has no noise in some direction, and where a chain stops the "
                    "solution needs noise in all of them; estimate (sc.SMC, sc.TemperedSMC)."
                )
            precision = torch.linalg.inv(rows @ rows.mT).diagonal(dim1=1, dim2=2)
            narrow = torch.minimum(narrow, precision.rsqrt().amin(0))
            xi = torch.randn(len(x), rows.shape[2], generator=generator, dtype=torch.float64)
            x = mean + (rows @ xi.unsqueeze(2)).squeeze(2)
            x = x[torch.isfinite(x).all(1)]
            if len(x) < _PATHS // 2:
                raise NoExactSolution("drift: most paths run to infinity, so there are no nodes to solve on.")
            low, high = torch.minimum(low, x.amin(0)), torch.maximum(high, x.amax(0))
        return low.numpy(), high.numpy(), narrow.numpy()

    @staticmethod
    def _lost() -> NoExactSolution:
        return NoExactSolution(
            "optimal paths leave every range that was tried: the reward drives them to infinity, or is -inf wherever "
            "they can go."
        )

    # ---------------------------------------------------------------- the interface

    def _value_at(self, x: States, time: float) -> PerPath:
        return self.problem.alpha * torch.from_numpy(self._values(x, self._state(time)))

    def _control_at(self, x: States, time: float) -> Controls:
        k = self._step_at(time)
        return self._wide.control(k, self._shift(x, k))

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        if chain is not self.chain:
            times = [self._snap(t) for t in chain.clock[:-1]]
            return lambda k, x, condition: chain.shift_at(
                k, x, self._control_at(x.to("cpu", torch.float64), times[k]).to(x)
            )
        return lambda k, x, condition: self._shift(x.to("cpu", torch.float64), k).to(x)

    @cached_property
    def _point(self) -> Tensor | None:
        """The start ``(1, d)``, where it is a point."""
        law = self.problem.origin
        return law.mean.double().cpu().reshape(1, -1) if isinstance(law, Dirac) else None

    def _start_value(self, soft: bool) -> float:
        return self._start_average(soft) if self._point is None else float(self._values(self._point, 0)[0])

    @property
    def log_z(self) -> Scalar:
        return self._out(torch.tensor(self._start_value(soft=True), dtype=torch.float64))

    @property
    def start_log_z(self) -> Scalar:
        return self._out(torch.tensor(self._start_value(soft=False), dtype=torch.float64))

    @property
    def elbo(self) -> Scalar:
        return self._out(torch.tensor(self._reached() if self._numbers else -math.inf, dtype=torch.float64))

    def marginal(self, t: float) -> Any:
        raise NoExactSolution("marginal(t), sample(n): the laws of a chain that stops are not computed; simulate.")

    def bridge(self, s: float, t: float, x_t: Tensor) -> Any:
        raise NoExactSolution("bridge(s, t, x_t): bridges of a chain that stops are not Gaussian, and not computed.")

    def _kernel_at(self, x: Tensor, k: int) -> Any:
        raise NoExactSolution("kernel(x, k): the kernels of a chain that stops are not computed; value is exact.")
