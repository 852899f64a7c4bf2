"""Quadratic forms and their soft averages over Gaussian noise: the algebra under every linear-quadratic solution.

A value is ``v(x)/alpha = -x'Px/2 + q'x + c``. One function, :func:`soft_average`, is the Gaussian integral of
docs/mathematics.md section 2, written with a factor of the noise so that degenerate noise needs no case of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic, QuadraticCost
from ..processes.laws import Gaussian, factor
from ..processes.linear import Transition, condition_gaussian
from ..shapes import Controls, PerPath, Scalar, States
from ..tensors import symmetric
from .base import ExactSolution


class Form(NamedTuple):
    """``x -> -x'Px/2 + q'x + c``; P ``(d, d)`` symmetric, q ``(d,)``, c 0-d, all float64."""

    P: Tensor
    q: Tensor
    c: Tensor

    def at(self, x: Tensor) -> Tensor:
        """Its value at x ``(..., d)``."""
        return ((self.q - 0.5 * x @ self.P) * x).sum(-1) + self.c

    def through(self, matrix: Tensor, shift: Tensor) -> Form:
        """The form ``x -> form(matrix x + shift)``."""
        return Form(symmetric(matrix.mT @ self.P @ matrix), matrix.mT @ (self.q - self.P @ shift), self.at(shift))


class SoftAverage(NamedTuple):
    """``y -> log E[exp(form(y + L xi))]`` and the law ``N(matrix y + shift, root root')`` of ``y + L xi`` so tilted."""

    form: Form
    matrix: Tensor
    shift: Tensor
    root: Tensor
    gain: Tensor  # B^-1 L', (n, d): the tilted noise has the mean gain (q - P y)


def soft_average(form: Form, L: Tensor, where: str) -> SoftAverage:
    """Average ``exp(form)`` over ``L xi``, ``xi ~ N(0, I)``; L ``(d, n)``.

    With ``B = I + L'PL`` and ``T = L B^-1 L'``: ``P~ = (I - TP)'P(I - TP) + |B^-1 L'P|^2`` (Joseph's form of
    ``P - PTP``, which cancels badly for a large P), ``q~ = (I - TP)'q``, ``c~ = c + q'Tq/2 - log det B/2``.

    Raises:
        NoExactSolution: the expectation is infinite (B is not positive definite); ``where`` says at which step.
    """
    P, q, c = form
    d, n = L.shape
    B = torch.eye(n, dtype=L.dtype) + symmetric(L.mT @ P @ L)
    R, info = torch.linalg.cholesky_ex(B)
    if bool(info != 0):
        raise NoExactSolution(
            f"E exp(v/alpha) is infinite {where}: the reward (or -running cost) is too convex for the "
            "noise there. Use a larger alpha, a less convex reward or a shorter horizon."
        )
    root = torch.linalg.solve_triangular(R, L.mT, upper=False).mT
    gain = torch.cholesky_solve(L.mT, R)
    inner = gain @ P
    matrix = torch.eye(d, dtype=L.dtype) - L @ inner
    averaged = Form(
        symmetric(matrix.mT @ P @ matrix + inner.mT @ inner),
        matrix.mT @ q,
        c + 0.5 * (root.mT @ q).square().sum() - R.diagonal().log().sum(),
    )
    return SoftAverage(averaged, matrix, root @ (root.mT @ q), root, gain)


def compose(first: Transition, second: Transition) -> Transition:
    """The transition of one Gaussian kernel after another."""
    return Transition(second.matrix @ first.matrix, *second.moved(first.shift, first.covariance))


class Terms(NamedTuple):
    """Reward and running cost over alpha: ``r/alpha`` as a form, and ``F(t)/alpha`` (None without a running cost)."""

    reward: Form
    F: Callable[[float], Tensor] | None


def quadratic_terms(problem: ControlProblem) -> Terms | None:
    """The quadratic structure of a problem's reward and running cost, in float64 on the CPU; None where one of them has
    none."""
    reward, cost, alpha = problem.reward_function, problem.running_cost_function, problem.alpha
    if not isinstance(reward, (Quadratic, Linear, type(None))) or not isinstance(cost, (QuadraticCost, type(None))):
        return None
    d = problem.event_shape[0]
    P, q = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    c = torch.zeros((), dtype=torch.float64)
    if reward is not None:
        q = reward.g.detach().to("cpu", torch.float64) / alpha
    if isinstance(reward, Quadratic):
        P, c = reward.G.detach().to("cpu", torch.float64) / alpha, c + reward.c / alpha
    F = None if cost is None else lambda t: cost.F_at(t).detach().to("cpu", torch.float64) / alpha
    return Terms(Form(P, q, c), F)


class LinearQuadraticSolution(ExactSolution):
    """What the chain and the continuous-time solution share: quadratic values, affine feedback, Gaussian laws."""

    kind = "linear-quadratic"

    def __init__(self, problem: ControlProblem, settings: dict[str, Any], chain: Chain | None = None) -> None:
        super().__init__(problem, settings, chain)
        if problem.start == "controlled":
            self._controlled_law(problem)

    def _form(self, time: float) -> Form:
        """``v(., time)/alpha``."""
        raise NotImplementedError

    def _feedback(self, time: float) -> tuple[Tensor, Tensor]:
        """``(gain, offset)`` of ``u*(x, time) = gain x + offset``."""
        raise NotImplementedError

    def _moments(self, time: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of X_time under the optimum."""
        raise NotImplementedError

    def _transition(self, s: float, t: float) -> Transition:
        """The law of X_t given X_s under the optimum."""
        raise NotImplementedError

    @property
    def log_z(self) -> Scalar:
        """0-d.

        Raises:
            NoExactSolution: ``E_nu[Z(X_0)]`` is infinite, or not known for this kind of start.
        """
        mean, root, _ = self._first_state()
        return self._out(soft_average(self._form(self._marks[0]), root, "over the start").form.at(mean))

    @property
    def start_log_z(self) -> Scalar:
        return self._out(self._over_start(self._form(self._marks[0])))

    def _over_start(self, form: Form) -> Tensor:
        """``E[form(X)]`` for the first state."""
        mean, _, cov = self._first_state()
        return form.at(mean) - 0.5 * (form.P * cov).sum()

    def _first_state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, root of the covariance, and covariance of the first state: the point before a controlled start, or
        nu."""
        mean, cov = self._first_moments()
        root = factor(cov)
        return mean, root, root @ root.mT

    def _value_at(self, x: States, time: float) -> PerPath:
        return self.problem.alpha * self._form(time).at(x)

    def _control_at(self, x: States, time: float) -> Controls:
        gain, offset = self._feedback(time)
        return x @ gain.mT + offset

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        gains, offsets = [], []
        for k in range(chain.steps):
            gain, offset = self._feedback(self._snap(chain.clock[k]))
            units = torch.eye(len(offset), dtype=chain.times.dtype, device=chain.times.device)
            # (m, noise): shifts are linear in u, and the same at all states
            anywhere = units.new_zeros(len(units), *chain.event_shape)
            effect = chain.shift_at(k, anywhere, units).to("cpu", torch.float64)
            gains.append((gain.mT @ effect).to(chain.times))
            offsets.append((offset @ effect).to(chain.times))
        return lambda k, x, condition: torch.addmm(offsets[k], x, gains[k])

    def marginal(self, t: float) -> Gaussian:
        return self._gaussian(*self._moments(self._snap(float(t))))

    def bridge(self, s: float, t: float, x_t: Tensor) -> Gaussian:
        s, t = self._ordered(s, t)
        x = self._in("x_t", x_t)
        return condition_gaussian(*self._moments(s), self._transition(s, t), x, like=self._out(x))
