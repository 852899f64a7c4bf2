"""Exact solutions on finite state spaces: the values of all states, by products with transition matrices.

A solution is written for any chain that lists its states (``space``), has the matrix of each step (``transition``) and
kernels that are categorical in each position (``chains/categorical.py``): it knows no class of them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.categorical import CategoricalKernels
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..memory import Remembered
from ..precision import at_least_single
from ..problems.problem import ControlProblem
from ..processes.finite import LARGEST, FiniteLaw, StateSpace, probabilities
from ..processes.laws import Dirac
from ..shapes import Controls, PerPath, Scalar, States
from .base import ExactSolution
from .products import best_products, best_tokens, tokens_of

if TYPE_CHECKING:
    from scipy import sparse

_HELD = 1 << 25  # entries of transition matrices that are kept
_ROWS = 1 << 16  # states that a reward or a cost is called with at once
_BLOCK = 1 << 22  # numbers of a table that is made at once


def log_action(matrix: sparse.csr_array, w: np.ndarray) -> np.ndarray:
    """``log(P exp(w))`` for P >= 0 without an empty row, whatever the size of w; -inf where all that follows is."""
    with np.errstate(divide="ignore"):
        terms = w[matrix.indices] + np.log(matrix.data)
    starts = matrix.indptr[:-1]
    top = np.maximum.reduceat(terms, starts)
    level = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return level + np.log(np.add.reduceat(np.exp(terms - np.repeat(level, np.diff(matrix.indptr))), starts))


def _kept(matrix: Any, stopped: np.ndarray) -> sparse.csr_array:
    """The transitions of which none leaves the ``stopped`` states."""
    from scipy import sparse

    found = sparse.diags_array((~stopped).astype(float)) @ sparse.csr_array(matrix)
    found = sparse.csr_array(found + sparse.diags_array(stopped.astype(float)))
    found.eliminate_zeros()
    return found


class FiniteSolution(ExactSolution):
    """What the chain's and the process's solutions share. ``v/alpha`` is an array over all states, in the order of
    ``space``; laws are :class:`FiniteLaw`. A controlled start has the law ``nu exp(v_0/alpha)/Z``.

    Attributes:
        space: all states.
    """

    kind = "finite"

    def __init__(
        self, problem: ControlProblem, space: StateSpace, settings: dict[str, Any], chain: Chain | None = None
    ) -> None:
        if space.size > LARGEST:
            raise NoExactSolution(
                f"reference: the space has {space.values}^{space.positions} states, and at most {LARGEST:.0e} are "
                "listed. Use fewer positions or tokens, or estimate with particles (sc.SMC, sc.TemperedSMC)."
            )
        super().__init__(problem, settings, chain)
        self.space = space
        self._start, self._first = self._first_law(), 0.0 if chain is None else chain.clock[0]
        self._stopped = self._where_stopped()

    # ---------------------------------------------------------------- what each of the two provides

    def _log_psi(self, time: float) -> np.ndarray:
        """``v(., time)/alpha``, ``(n,)``."""
        raise NotImplementedError

    def _probs(self, time: float) -> np.ndarray:
        """The law of X_time under the optimum, ``(n,)``."""
        raise NotImplementedError

    def _reaches(self, s: float, t: float, end: np.ndarray) -> np.ndarray:
        """``P*(X_t = y | X_s = .)`` for some y, ``(n, c)``, from their indicators."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the problem's functions at all states

    def _states(self, some: np.ndarray | None = None) -> list[Tensor]:
        """All states or some, on the problem's device, so many at a time."""
        index = torch.arange(self.space.size) if some is None else torch.from_numpy(some)
        return [self.space.states(rows) for rows in index.to(self.problem.device).split(_ROWS)]

    def _where_stopped(self) -> np.ndarray | None:
        """Which states the process stops in, ``(n,)``; None: it never stops."""
        region = self.problem.stop
        if region is None:
            return None
        if self.space.positions > 1:
            raise NoExactSolution(
                "stop: finite chains of several positions that stop are not solved; estimate (sc.SMC)."
            )
        with torch.no_grad(), self.problem.evaluating():
            return torch.cat([region.contains(x, 1) for x in self._states()]).cpu().numpy()

    def _asked(self) -> ControlProblem:
        """The problem in the dtype that its functions return, where more digits are wanted of its solution."""
        own = at_least_single(self.problem.reference.dtype or torch.get_default_dtype())
        if self.problem.dtype == own:
            return self.problem
        asked = copy.copy(self.problem)
        asked.dtype = own
        return asked

    def _rewards(self, ends: np.ndarray | None = None) -> np.ndarray:
        """``r/alpha``, ``(n,)``: -inf where no path ends, if the states are given where they do."""
        problem = self._asked()
        with torch.no_grad(), problem.evaluating():
            parts = [problem.reward(problem.reference.decode(x)) for x in self._states(ends)]
        rewards = torch.cat(parts).double().cpu().numpy() / problem.alpha
        if ends is None:
            return rewards
        found = np.full(self.space.size, -np.inf)
        found[ends] = rewards
        return found

    def _costs(self, time: float) -> np.ndarray | None:
        """``f(., time)/alpha``, ``(n,)``; None without a running cost."""
        problem = self._asked()
        if problem.running_cost_function is None:
            return None
        t = torch.tensor(time, dtype=problem.dtype, device=problem.device)
        with torch.no_grad(), problem.evaluating():
            parts = [problem.running_cost(x, t) for x in self._states()]
        costs = torch.cat(parts).double().cpu().numpy() / problem.alpha
        if not np.isfinite(costs).all():
            raise NoExactSolution(f"running_cost is not finite at {int((~np.isfinite(costs)).sum())} states.")
        return costs if self._stopped is None else np.where(self._stopped, 0.0, costs)

    def _first_law(self) -> np.ndarray:
        """Probabilities of the first state, ``(n,)``: in continuous time of X_0 under the reference, tilted or not."""
        law, space = self.problem.origin if self.chain is not None else self.problem.initial, self.space
        if isinstance(law, Dirac):
            return np.eye(1, space.size, int(space.index(law.point.cpu())))[0]
        try:
            return probabilities(space, law)
        except ValueError as error:
            raise NoExactSolution(str(error)) from error

    # ---------------------------------------------------------------- the interface

    @property
    def log_z(self) -> Scalar:
        known = self._start > 0
        terms = self._log_psi(self._first)[known] + np.log(self._start[known])
        return self._out(torch.from_numpy(terms).logsumexp(0))

    @property
    def start_log_z(self) -> Scalar:
        if self.problem.start == "controlled":
            return self.log_z
        known = self._start > 0
        return self._out(
            torch.tensor(float(self._start[known] @ self._log_psi(self._first)[known]), dtype=torch.float64)
        )

    def _value_at(self, x: States, time: float) -> PerPath:
        return self.problem.alpha * torch.from_numpy(self._log_psi(time))[self.space.index(x)]

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        def shift(k: int, x: States, condition: Any) -> Tensor:
            u = self._control_at(x.cpu(), self._snap(chain.clock[k]))
            return chain.shift_at(k, x, u.to(chain.times), condition)

        return shift

    def marginal(self, t: float) -> FiniteLaw:
        return self._as_law(self._probs(self._snap(float(t))))

    def bridge(self, s: float, t: float, x_t: Tensor) -> FiniteLaw:  # type: ignore[override]
        """The law of X_s given ``X_t = x_t`` under the optimum, s < t; x_t ``(*event)`` or ``(batch, *event)``."""
        s, t = self._ordered(s, t)
        index = self.space.index(self._in("x_t", x_t))
        rows = index.reshape(-1).numpy()
        end = np.zeros((self.space.size, len(rows)))
        end[rows, np.arange(len(rows))] = 1.0
        probs = self._probs(s)[:, None] * self._reaches(s, t, end)
        if not (probs.sum(0) > 0).all():
            raise ValueError(f"x_t has a state that X_t, t = {t:g}, never is in: nothing follows from it.")
        return self._as_law(probs.T.reshape(*index.shape, -1))

    def _as_law(self, probs: np.ndarray) -> FiniteLaw:
        return FiniteLaw(self._out(torch.from_numpy(np.ascontiguousarray(probs))), self.space)

    def _in(self, name: str, x: Tensor, ranks: tuple[int, ...] = (1, 2)) -> Tensor:
        return self.space.check(name, x, True if ranks == (2,) else None).cpu()

    def __repr__(self) -> str:
        where = f"{self.chain.steps} steps" if self.chain is not None else "continuous time"
        return f"ExactSolution({self.kind}, {where}, {self.space.size} states, log_z={float(self.log_z):.6g})"


class FiniteChainSolution(FiniteSolution):
    """Exact solution of a chain on a finite space (to rounding): ``exp(v_k/alpha) = e^{-h f/alpha} P_k
    exp(v_{k+1}/alpha)``.

    ``value``, ``log_z``, ``kernel``, ``marginal``, ``bridge`` and ``sample`` are those of the soft-optimal chain p*.
    Where a state is one token, p* is a tilt of the kernel, which ``control`` is (as normalised log-ratios): the floor
    is 0. Where several positions move in one step, independently given the state, ``control`` and ``elbo`` are those of
    the best such product, found by coordinate ascent from the marginals of p* at each state
    (:mod:`sdecontrol.exact.products`): like every maximum of an objective that need not be concave, a local one. Of
    masked diffusion it is the best tilt of tokens, whose times of unmasking stay the reference's. Rewards are asked of
    the states where paths can end. A time is matched to the grid within 1e-9 of the horizon, else it means the step
    that contains it.
    """

    chain: Any

    def __init__(self, problem: ControlProblem, chain: CategoricalKernels, settings: dict[str, Any]) -> None:
        super().__init__(problem, chain.space, settings, chain)
        self._matrix = Remembered(self._transition, 2)
        last = self._matrix(chain.steps - 1)
        self._end = self._rewards(self._ends(last))
        if last.nnz * chain.steps <= _HELD:
            self._matrix = Remembered(self._transition, chain.steps)
        self._costs_by_step = [self._costs(t) if t >= 0 else None for t in chain.clock[:-1]]
        self._values = self._backwards()
        self._laws: list[np.ndarray] = []
        self._product_values: list[np.ndarray] = []

    def _transition(self, k: int) -> sparse.csr_array:
        with torch.no_grad(), self.problem.evaluating():
            try:
                matrix = self.chain.transition(k)
            except OverflowError as error:
                raise NoExactSolution(f"reference: {error}") from error
        return matrix if self._stopped is None else _kept(matrix, self._stopped)

    def _ends(self, last: sparse.csr_array) -> np.ndarray:
        """The states at which rewards are asked for: those that the last step leads to; of masked diffusion those
        without a mask."""
        found = np.unique(last.indices)
        if not self.problem.reference.keeps_tokens:
            return found
        masked = self.chain.open(self.space.states(torch.from_numpy(found))).flatten(1).any(1)
        return found[~masked.numpy()]

    def _charged(self, k: int, w: np.ndarray) -> np.ndarray:
        """``w - h f/alpha``."""
        costs = self._costs_by_step[k]
        return w if costs is None else w - self.chain.step_sizes[k] * costs

    def _backwards(self) -> list[np.ndarray]:
        values = [self._end]
        for k in reversed(range(self.chain.steps)):
            values.append(self._charged(k, log_action(self._matrix(k), values[-1])))
        return values[::-1]

    def _optimal(self, k: int, rows: np.ndarray | None = None) -> sparse.csr_array:
        """The kernel of p* at step k, from some states or all."""
        matrix = self._matrix(k) if rows is None else self._matrix(k)[rows]
        made = matrix.copy()
        after, counts = self._values[k + 1], np.diff(matrix.indptr)
        mean = log_action(matrix, after)  # -inf at states that lead to no end, which are on no path
        gained = after[matrix.indices] - np.repeat(np.where(np.isfinite(mean), mean, 0.0), counts)
        made.data = matrix.data * np.exp(gained)
        return made

    def _log_psi(self, time: float) -> np.ndarray:
        return self._values[self._state(time)]

    def _probs(self, time: float) -> np.ndarray:
        if not self._laws:
            laws = [self._start]
            for k in range(self.chain.steps):
                laws.append(self._optimal(k).T @ laws[-1])
            self._laws = laws
        return self._laws[self._state(time)]

    def _reaches(self, s: float, t: float, end: np.ndarray) -> np.ndarray:
        first, last = self._state(s), self._state(t)
        if first == last:
            raise ValueError(f"bridge(s, t, x_t): s={s:g} and t={t:g} lie in the same step of the chain.")
        for k in reversed(range(first, last)):
            end = self._optimal(k) @ end
        return end

    def _kernel_at(self, x: Tensor, k: int) -> FiniteLaw:
        index = self.space.index(x)
        rows = self._optimal(k, index.reshape(-1).numpy())
        return self._as_law(rows.toarray().reshape(*index.shape, -1))

    # ---------------------------------------------------------------- the control

    def _control_at(self, x: States, time: float) -> Controls:
        k = self._step_at(time)
        if self._single:
            after, index = torch.from_numpy(self._values[k + 1]), self.space.index(x).numpy()
            to = self.chain.following(x.to(self.problem.device)).cpu()
            mean = torch.from_numpy(log_action(self._matrix(k)[index], self._values[k + 1]))
            return torch.where(to < 0, 0.0, after[to.clamp(min=0)] - mean.reshape(-1, 1, 1))
        found = torch.from_numpy(self._best(k, self.space.index(x).numpy(), self._product(k + 1))[0])
        return self.chain.control(k, found.reshape(len(x), *self.space.shape, -1))

    @property
    def _single(self) -> bool:
        """Whether a step is one categorical variable of which every probability is tilted."""
        return self.space.positions == 1 and self.chain.control_shape == self.chain.noise_shape

    def _best(self, k: int, rows: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best control's log-ratios ``(rows, positions, values)`` and its value before the step's cost."""
        matrix, tokens = self._matrix(k)[rows], tokens_of(self.space)
        after = np.where(np.isfinite(after), after, 0.0)  # of states that lead to no end
        if not self.chain.independent:
            return best_tokens(matrix, rows, tokens, after)
        return best_products(matrix, tokens, after, self.chain.control_shape[-1])

    def _product(self, k: int) -> np.ndarray:
        """``v_k/alpha`` of the chain under its best control."""
        if not self._product_values:
            values, size = [self._end], max(1, _BLOCK // (self.space.positions * self.space.values))
            blocks = np.array_split(np.arange(self.space.size), -(-self.space.size // size))
            for j in reversed(range(self.chain.steps)):
                found = [self._best(j, rows, values[-1])[1] for rows in blocks]
                values.append(self._charged(j, np.concatenate(found)))
            self._product_values = values[::-1]
        return self._product_values[k]

    @property
    def elbo(self) -> Scalar:
        if self._single:
            return self.start_log_z
        known = self._start > 0
        return self._out(torch.tensor(float(self._start[known] @ self._product(0)[known]), dtype=torch.float64))
