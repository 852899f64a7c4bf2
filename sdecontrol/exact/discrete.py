"""The exact solution of a linear-quadratic chain: the soft Bellman recursion, and the best mean-shift control."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chains.base import AffineStep, Chain
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..processes.laws import Gaussian
from ..processes.linear import Transition
from .quadratic import Form, LinearQuadraticSolution, Terms, compose, soft_average

_RANK = 1e-7  # C comes from roots of covariances, which have half the digits


def soft_step(form: Form, step: AffineStep, where: str) -> tuple[Form, Transition]:
    """``v_k/alpha`` before running costs from ``v_{k+1}/alpha``, and the soft-optimal kernel (docs/mathematics.md
    section 2)."""
    M, m, L, _ = step
    average = soft_average(form, L, where)
    kernel = Transition(average.matrix @ M, average.matrix @ m + average.shift, average.root @ average.root.mT)
    return average.form.through(M, m), kernel


def shift_step(form: Form, step: AffineStep, where: str) -> tuple[Form, tuple[Tensor, Tensor]]:
    """The same for mean-shift kernels: ``max_u E[v(y + L(Cu + xi))]/alpha - |Cu|^2/2`` at ``y = Mx + m``, and
    ``u* = gain x + offset``.

    The maximum over ``c = Q z``, Q an orthonormal basis of the range of C, has the quadratic part of the soft average
    over ``L Q``; its constant has ``-tr(L'PL)/2`` in place of ``-log det/2``, the covariance being kept.
    """
    M, m, L, C = step
    U, S, Vh = torch.linalg.svd(C, full_matrices=False)
    rank = int((_RANK * S[0] < S).sum())
    average = soft_average(form, L @ U[:, :rank], where)
    constant = form.c + 0.5 * (average.root.mT @ form.q).square().sum() - 0.5 * (form.P * (L @ L.mT)).sum()
    to_u = (Vh[:rank].mT / S[:rank]) @ average.gain  # z = gain (q - P y), and u = C^+ Q z has the minimum norm
    feedback = -to_u @ form.P @ M, to_u @ (form.q - form.P @ m)
    return average.form._replace(c=constant).through(M, m), feedback


class ChainSolution(LinearQuadraticSolution):
    """Exact solution of a discretised linear-quadratic problem (to rounding, at every step size).

    ``value``, ``log_z``, ``kernel``, ``marginal``, ``bridge`` and ``sample`` are those of the soft-optimal chain p*,
    whose kernels have their own covariance; ``control`` and ``elbo`` are the best mean-shift chain's. A time is matched
    to the grid within 1e-9 of the horizon, else it means the step that contains it (its left end's state).
    """

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any], terms: Terms) -> None:
        super().__init__(problem, settings, chain)
        self._forms, self._kernels = _backwards(chain, terms, soft_step)
        self._shift_forms, self._feedbacks = _backwards(chain, terms, shift_step)

    def _form(self, time: float) -> Form:
        return self._forms[self._state(time)]

    def _feedback(self, time: float) -> tuple[Tensor, Tensor]:
        return self._feedbacks[self._step_at(time)]

    @functools.cached_property
    def _marginals(self) -> list[tuple[Tensor, Tensor]]:
        mean, _, cov = self._first_state()
        laws = [(mean, cov)]
        for kernel in self._kernels:
            laws.append(kernel.moved(*laws[-1]))
        return laws

    def _moments(self, time: float) -> tuple[Tensor, Tensor]:
        return self._marginals[self._state(time)]

    def _transition(self, s: float, t: float) -> Transition:
        first, last = self._state(s), self._state(t)
        if first == last:
            raise ValueError(f"bridge(s, t, x_t): s={s:g} and t={t:g} lie in the same step of the chain.")
        return functools.reduce(compose, self._kernels[first:last])

    def _kernel_at(self, x: Tensor, k: int) -> Gaussian:
        M, b, Q = self._kernels[k]
        return self._gaussian(x @ M.mT + b, Q)

    @property
    def elbo(self) -> Tensor:
        return self._out(self._over_start(self._shift_forms[0]))

    @property
    def floor(self) -> Tensor:
        return self._out(self._over_start(self._forms[0]) - self._over_start(self._shift_forms[0]))


def _backwards(
    chain: Chain, terms: Terms, rule: Callable[[Form, AffineStep, str], tuple[Form, Any]]
) -> tuple[list[Form], list[Any]]:
    """A recursion from the last step to the first: the forms ``v_0 .. v_K`` over alpha, and what the rule gives by
    step.

    Raises:
        NoExactSolution: a chain that is not known to be affine, or an infinite expectation.
    """
    steps = chain.affine_steps()
    if steps is None:
        raise NoExactSolution(f"no exact solution is known for a {type(chain.main).__name__}.")
    forms, found = [terms.reward], []
    for k in reversed(range(chain.steps)):
        t = chain.clock[k]
        form, extra = rule(forms[-1], steps[k], f"at step {k} of {chain.steps} (t = {t:.4g})")
        if terms.F is not None and t >= 0:  # nothing is to pay in the learned start
            form = form._replace(P=form.P + chain.step_sizes[k] * terms.F(t))
        forms.append(form)
        found.append(extra)
    return forms[::-1], found[::-1]
