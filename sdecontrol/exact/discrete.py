"""The exact solution of a linear-quadratic chain: the soft Bellman recursion, and the best mean-shift control."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.gaussian import EulerChain, TransitionChain
from ..chains.segments import LearnedStart
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..processes.laws import Gaussian
from ..processes.linear import LinearSDE, Transition
from ..tensors import symmetric
from .quadratic import Form, LinearQuadraticSolution, compose, quadratic_terms, soft_average

__all__ = ["ChainSolution", "Step", "steps_of"]

_RANK = 1e-7  # C comes from roots of covariances, which have half the digits


class Step(NamedTuple):
    """``x' = M x + m + L (C u + xi)`` from time ``time``; ``h`` weighs the running cost (0 in the stretch before 0)."""

    time: float
    h: float
    M: Tensor
    m: Tensor
    L: Tensor
    C: Tensor


def steps_of(chain: Chain, linear: LinearSDE) -> list[Step]:
    """The steps of a chain of a linear reference, in float64.

    Raises:
        NoExactSolution: a start or a chain that is not linear.
    """
    if chain.start:
        return [step for segment in chain.segments for step in steps_of(segment, linear)]
    d = linear.event_shape[0]
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    grid = list(zip(chain.clock, chain.step_sizes))
    if isinstance(chain, LearnedStart):
        if not isinstance(chain.law, Gaussian):
            raise NoExactSolution(
                f"a controlled {type(chain.law).__name__} start has no exact solution with a linear "
                "reference; use a Gaussian start."
            )
        root = chain.law.scale_root.detach().to("cpu", torch.float64)
        root = root if root.ndim == 2 else torch.diag(root)
        return [Step(t, 0.0, eye, zero, h**0.5 * root, h**0.5 * eye) for t, h in grid]
    if isinstance(chain, TransitionChain):
        return [Step(t, h, M, m, L, C) for (t, h), (M, m, L, C) in zip(grid, chain.matrices64)]
    if not isinstance(chain, EulerChain):
        raise NoExactSolution(f"no exact solution is known for a {type(chain).__name__}.")
    steps = []
    for t, h in grid:
        A, a, sigma = (torch.from_numpy(c) for c in linear.coefficients(t))
        noise = torch.eye(sigma.shape[1], dtype=torch.float64)
        steps.append(Step(t, h, eye + h * A, h * a, h**0.5 * sigma, h**0.5 * noise))
    return steps


def soft_step(form: Form, step: Step, where: str) -> tuple[Form, Transition]:
    """``v_k/alpha`` before running costs from ``v_{k+1}/alpha``, and the soft-optimal kernel (docs/mathematics.md section 2)."""
    average = soft_average(form, step.L, where)
    kernel = Transition(average.keep @ step.M, average.keep @ step.m + average.pull, average.root @ average.root.mT)
    return average.form.through(step.M, step.m), kernel


def shift_step(form: Form, step: Step, where: str) -> tuple[Form, tuple[Tensor, Tensor]]:
    """The same for mean-shift kernels: ``max_u E[v(y + L(Cu + xi))]/alpha - |Cu|^2/2`` at ``y = Mx + m``, and ``u* = gain x + offset``.

    The maximum over ``c = Q z``, Q an orthonormal basis of the range of C, has the quadratic part of the soft average
    over ``L Q``; its constant has ``-tr(L'PL)/2`` in place of ``-log det/2``, the covariance being kept.
    """
    U, S, Vh = torch.linalg.svd(step.C, full_matrices=False)
    rank = int((_RANK * S[0] < S).sum())
    LQ = step.L @ U[:, :rank]
    average = soft_average(form, LQ, where)
    constant = form.c + 0.5 * (average.root.mT @ form.q).square().sum() - 0.5 * (form.P * (step.L @ step.L.mT)).sum()
    to_u = (Vh[:rank].mT / S[:rank]) @ average.push  # z = push (q - P y), and u = C^+ Q z has the minimum norm
    gain, offset = -to_u @ form.P @ step.M, to_u @ (form.q - form.P @ step.m)
    return average.form._replace(c=constant).through(step.M, step.m), (gain, offset)


class ChainSolution(LinearQuadraticSolution):
    """Exact solution of a discretised linear-quadratic problem (to rounding, at every step size).

    ``value``, ``log_z``, ``kernel``, ``marginal``, ``bridge`` and ``sample`` are those of the soft-optimal chain p*, whose
    kernels have their own covariance; ``control`` and ``elbo`` are the best mean-shift chain's. A time is matched to the
    grid within 1e-9 of the horizon, else it means the step that contains it (its left end's state).
    """

    kind = "linear-quadratic"

    def __init__(self, problem: ControlProblem, linear: LinearSDE, chain: Chain, settings: dict[str, Any]) -> None:
        super().__init__(problem, settings, chain)
        self.chain: Chain = chain
        terms = quadratic_terms(problem)
        steps = steps_of(chain, linear)
        self._forms, self._kernels = _backwards(steps, terms.reward, terms.F, soft_step)
        self._shift_forms, self._feedbacks = _backwards(steps, terms.reward, terms.F, shift_step)

    def _state(self, time: float) -> int:
        """Index of the state at a (snapped) time: on the grid, or the left end of the step that contains it."""
        return max(bisect.bisect_right(self.chain.clock, time) - 1, 0)

    def _form(self, time: float) -> Form:
        return self._forms[self._state(time)]

    def _feedback(self, time: float) -> tuple[Tensor, Tensor]:
        return self._feedbacks[min(self._state(time), self.chain.steps - 1)]

    @cached_property
    def _marginals(self) -> list[tuple[Tensor, Tensor]]:
        mean, root = self._first_state()
        cov = root @ root.mT
        laws = [(mean, cov)]
        for M, b, Q in self._kernels:
            mean, cov = M @ mean + b, symmetric(M @ cov @ M.mT + Q)
            laws.append((mean, cov))
        return laws

    def _moments(self, time: float) -> tuple[Tensor, Tensor]:
        return self._marginals[self._state(time)]

    def _transition(self, s: float, t: float) -> Transition:
        first, last = self._state(s), self._state(t)
        if first == last:
            raise ValueError(f"bridge(s, t, x_t): s={s:g} and t={t:g} lie in the same step of the chain.")
        whole = self._kernels[first]
        for kernel in self._kernels[first + 1 : last]:
            whole = compose(whole, kernel)
        return whole

    def kernel(self, x: Tensor, k: int) -> Gaussian:
        if not 0 <= k < self.chain.steps:
            raise ValueError(f"k must be a step from 0 to {self.chain.steps - 1}, got {k}.")
        M, b, Q = self._kernels[k]
        return self._gaussian(self._in("x", x) @ M.mT + b, Q)

    @property
    def elbo(self) -> Tensor:
        return self._out(self._over_start(self._shift_forms[0]))

    @property
    def floor(self) -> Tensor:
        return self._out(self._over_start(self._forms[0]) - self._over_start(self._shift_forms[0]))


def _backwards(
    steps: list[Step],
    reward: Form,
    F: Callable[[float], Tensor] | None,
    rule: Callable[[Form, Step, str], tuple[Form, Any]],
) -> tuple[list[Form], list[Any]]:
    """A recursion from the last step to the first: the forms ``v_0 .. v_K`` over alpha, and what the rule gives by step."""
    forms, found = [reward], []
    for k in reversed(range(len(steps))):
        step = steps[k]
        form, extra = rule(forms[-1], step, f"at step {k} of {len(steps)} (t = {step.time:.4g})")
        if F is not None and step.h:
            form = form._replace(P=form.P + step.h * F(step.time))
        forms.append(form)
        found.append(extra)
    return forms[::-1], found[::-1]
