"""The exact solution of a linear-quadratic problem in continuous time: Riccati equations and the closed loop's laws."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NoExactSolution
from ..memory import Remembered
from ..problems.problem import ControlProblem
from ..processes.laws import factor
from ..processes.linear import LinearSDE, Transition, integrate_linear, moments
from ..tensors import symmetric
from .quadratic import Form, LinearQuadraticSolution, Terms, compose, soft_average

_PIECES = 64  # the dense interpolant is of lower order than the steps, so they are kept short
_BLOW_UP = 1e8


def solve_riccati(linear: LinearSDE, terms: Terms) -> Any:
    """``t -> (P, q, c)`` flattened, by integrating back from the horizon.

    ``P' = -A'P - PA + P Sigma P - F/alpha``, ``q' = -A'q + P a + P Sigma q``,
    ``c' = -a.q + tr(Sigma P)/2 - q'Sigma q/2``.

    Raises:
        NoExactSolution: P blows up before time 0, naming the time.
    """
    from scipy.integrate import solve_ivp

    d = linear.event_shape[0]
    end = np.concatenate([terms.reward.P.numpy().ravel(), terms.reward.q.numpy(), [0.0]])
    limit = _BLOW_UP * (1.0 + np.abs(end).max())

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        A, a, sigma = linear.coefficients(t)
        P, q = y[: d * d].reshape(d, d), y[d * d : -1]
        noise = sigma @ sigma.T
        drift_part = A.T @ P
        dP = -drift_part - drift_part.T + P @ noise @ P
        if terms.F is not None:
            dP -= terms.F(t).numpy()
        dq = -A.T @ q + P @ (a + noise @ q)
        dc = -a @ q + 0.5 * (noise * P).sum() - 0.5 * q @ noise @ q
        return np.concatenate([0.5 * (dP + dP.T).ravel(), dq, [dc]])

    def blow_up(t: float, y: np.ndarray) -> float:  # only towards minus infinity: P Sigma P bounds it from above
        return float(np.linalg.eigvalsh(y[: d * d].reshape(d, d))[0]) + limit

    blow_up.terminal = True  # type: ignore[attr-defined]
    result = solve_ivp(
        slope,
        (linear.horizon, 0.0),
        end,
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
        dense_output=True,
        max_step=linear.horizon / _PIECES,
        events=blow_up,
    )
    if result.status != 0 or not np.isfinite(result.y).all():
        raise NoExactSolution(
            f"the Riccati equation blows up at t = {result.t[-1]:.6g}: the reward (or -running cost) is "
            "too convex, and E exp(R/alpha) is infinite from any earlier time. Use a larger alpha, a less "
            "convex reward or a shorter horizon."
        )
    return result.sol


class RiccatiSolution(LinearQuadraticSolution):
    """Exact solution of a linear-quadratic problem in continuous time (relative error about 1e-11).

    ``u* = sigma'(q - P x)``. The learned start is a Brownian motion of covariance S, for which the same soft average as
    over one step is exact: ``v(., t)/alpha`` averaged over ``sqrt(-t) S^(1/2) xi``.
    """

    def __init__(self, problem: ControlProblem, linear: LinearSDE, terms: Terms) -> None:
        super().__init__(problem, {})
        self._linear = linear
        self._dense = solve_riccati(linear, terms)
        self._flow = Remembered(self._integrate, 4096)
        if problem.start == "controlled":
            self._form(-1.0)  # infinite expectations are found now, not later

    @cached_property
    def _start_root(self) -> Tensor:
        """The noise before a controlled start."""
        return factor(moments(self.problem.initial)[1])

    def _form(self, time: float) -> Form:
        if time < 0:
            return soft_average(self._form(0.0), (-time) ** 0.5 * self._start_root, "over the controlled start").form
        d = self._linear.event_shape[0]
        y = torch.from_numpy(self._dense(time))
        return Form(symmetric(y[: d * d].reshape(d, d)), y[d * d : -1], y[-1])

    def _feedback(self, time: float) -> tuple[Tensor, Tensor]:
        form = self._form(time)
        sigma = self._start_root if time < 0 else torch.from_numpy(self._linear.coefficients(time)[2])
        return -sigma.mT @ form.P, sigma.mT @ form.q

    def _moments(self, time: float) -> tuple[Tensor, Tensor]:
        mean, _, cov = self._first_state()
        return self._transition(self._marks[0], time).moved(mean, cov)

    def _transition(self, s: float, t: float) -> Transition:
        if s < 0 < t:
            return compose(self._start(s, 0.0), self._flow(0.0, t))
        return self._start(s, t) if s < 0 else self._flow(s, t)

    def _start(self, s: float, t: float) -> Transition:
        """The law of X_t given X_s under the optimum, s <= t <= 0."""
        average = soft_average(self._form(t), (t - s) ** 0.5 * self._start_root, "over the controlled start")
        return Transition(average.matrix, average.shift, average.root @ average.root.mT)

    def _integrate(self, s: float, t: float) -> Transition:
        """The closed loop ``dX = (A X + a + Sigma (q - P X)) dt + sigma dW`` from s to t, 0 <= s <= t."""
        d = self._linear.event_shape[0]

        def terms(r: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            A, a, sigma = self._linear.coefficients(r)
            dense = self._dense(r)
            noise = sigma @ sigma.T
            return A - noise @ dense[: d * d].reshape(d, d), (a + noise @ dense[d * d : -1])[:, None], noise

        matrix, effects, cov = integrate_linear(terms, s, t)
        return Transition(matrix, effects[:, 0], cov)
