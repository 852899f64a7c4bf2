"""The exact solution of a linear-quadratic chain: the soft Bellman recursion, and the best mean-shift control."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chains.base import Chain
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..processes.laws import Gaussian
from ..processes.linear import Transition
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


def steps_of(chain: Chain) -> list[Step]:
    """The steps of a chain of a linear reference, in float64.

    Raises:
        NoExactSolution: a chain that is not known to be affine.
    """
    affine = chain.affine_steps()
    if affine is None:
        raise NoExactSolution(f"no exact solution is known for a {type(chain.main).__name__}.")
    return [Step(t, h if t >= 0 else 0.0, *step) for t, h, step in zip(chain.clock, chain.step_sizes, affine)]


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

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> None:
        super().__init__(problem, settings, chain)
        terms, steps = quadratic_terms(problem), steps_of(chain)
        self._forms, self._kernels = _backwards(steps, terms.reward, terms.F, soft_step)
        self._shift_forms, self._feedbacks = _backwards(steps, terms.reward, terms.F, shift_step)

    def _form(self, time: float) -> Form:
        return self._forms[self._state(time)]

    def _feedback(self, time: float) -> tuple[Tensor, Tensor]:
        return self._feedbacks[self._step_at(time)]

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
        self._check_step(k)
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
