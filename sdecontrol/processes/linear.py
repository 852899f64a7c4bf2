"""Linear SDEs ``dX = (A X + a) dt + sigma dW``: exact transition laws, marginals and bridges (Doob's h-transform).

Transition laws are computed in float64: by the matrix exponential with doubling where the coefficients are constant, by
an ODE of order 8 where they depend on time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..precision import at_least_single
from ..tensors import as_float, check_tensor, symmetric
from .laws import Dirac, Gaussian, check_alike, factor
from .sde import SDE, StepFunction

Coefficient = Tensor | Callable[[Tensor], Tensor]


class Transition(NamedTuple):
    """``X_t | X_s = x ~ N(matrix x + shift, covariance)``, in float64."""

    matrix: Tensor
    shift: Tensor
    covariance: Tensor

    def moved(self, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of X_t for those of X_s."""
        M = self.matrix
        return M @ mean + self.shift, symmetric(M @ cov @ M.mT + self.covariance)


class LinearSDE(SDE):
    """``dX = (A X + offset) dt + sigma dW``.

    Args:
        A: ``(d, d)``, or a function of time ``t -> (d, d)`` with t a 0-d tensor. Not necessarily symmetric.
        sigma: ``(d, m)``, a number or 0-d tensor (times the identity), or a function of time returning one of these.
        offset: ``(d,)``, a function of time, or None for zero.
        horizon: the end time T > 0.
    """

    def __init__(self, A: Coefficient, sigma: Any, offset: Coefficient | None = None, horizon: float = 1.0) -> None:
        self.horizon = as_float("horizon", horizon, positive=True)
        A, sigma = (at_least_single(c) if isinstance(c, Tensor) else c for c in (A, sigma))
        offset = at_least_single(offset) if isinstance(offset, Tensor) else offset
        self._A, self._sigma, self._offset = A, sigma, offset
        probe = self._at("A", A, 0.0)
        if probe.ndim != 2 or probe.shape[0] != probe.shape[1]:
            raise ValueError(f"A must be a square (d, d) matrix, got shape {tuple(probe.shape)}.")
        d = probe.shape[0]
        if not callable(A):
            check_tensor("A", probe)
        root = self.sigma_at(0.0, like=probe)
        if root.shape[0] != d:
            raise ValueError(
                f"sigma must be a number or a ({d}, m) matrix to go with A {tuple(probe.shape)}, "
                f"got {tuple(root.shape)}."
            )
        if not callable(sigma):
            check_tensor("sigma", root)
            if not bool((root != 0).any()):
                raise ValueError("sigma is 0: without noise there is no control problem (no likelihood ratios).")
        check_alike("sigma", root, "A", probe)
        if offset is not None:
            a = check_tensor(
                "offset", self._at("offset", offset, 0.0), shape=(d,), hint="one entry per state dimension."
            )
            check_alike("offset", a, "A", probe)
        self.event_shape = torch.Size((d,))
        self.control_shape = torch.Size((root.shape[1],))
        self.dtype, self.device = probe.dtype, probe.device
        self.autonomous = not any(callable(c) for c in (A, sigma, offset))
        #: sigma ``(1, d, m)`` where it does not depend on time; a diagonal one saves a matrix product a step
        self.constant_matrix = None if callable(sigma) else root.unsqueeze(0)
        diagonal = None if callable(sigma) else _diagonal_of(root)
        self.constant_diffusion = self.constant_matrix if diagonal is None else diagonal

    def memory_from(self, initial: Any) -> float | None:
        if isinstance(initial, Dirac):
            return 0.0
        if not isinstance(initial, Gaussian):
            return self.memory
        _, cov = moments(initial)
        law = self.transition(0.0, self.horizon)
        end = law.matrix @ cov @ law.matrix.mT + law.covariance
        inverses = [torch.linalg.pinv(factor(c), hermitian=True) for c in (cov, end)]
        return float(torch.linalg.matrix_norm(inverses[0] @ cov @ law.matrix.mT @ inverses[1], 2))

    def _at(self, name: str, c: Any, t: float | Tensor) -> Tensor:
        if isinstance(c, Tensor):
            return c
        if not callable(c):
            also = "a number, " if name == "sigma" else ""
            raise TypeError(f"{name} must be {also}a torch tensor or a function of time, got {type(c).__name__}.")
        value = c(torch.as_tensor(t, dtype=torch.get_default_dtype()) if not isinstance(t, Tensor) else t)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}(t) must return a torch tensor, got {type(value).__name__}.")
        return value

    def A_at(self, t: float | Tensor) -> Tensor:
        """``A(t)``, ``(d, d)``."""
        return self._at("A", self._A, t)

    def offset_at(self, t: float | Tensor, like: Tensor) -> Tensor:
        """The offset at t, ``(d,)``."""
        return like.new_zeros(like.shape[0]) if self._offset is None else self._at("offset", self._offset, t)

    def sigma_at(self, t: float | Tensor, like: Tensor) -> Tensor:
        """``sigma(t)`` as a ``(d, m)`` matrix."""
        s = self._sigma
        if isinstance(s, (int, float)):
            s = torch.as_tensor(float(s), dtype=like.dtype, device=like.device)
        value = self._at("sigma", s, t)
        if value.ndim == 0:
            return value.to(like.dtype) * torch.eye(like.shape[0], dtype=like.dtype, device=like.device)
        if value.ndim != 2:
            raise ValueError(
                f"sigma must be a number or a (d, m) matrix, got shape {tuple(value.shape)}; "
                f"use torch.diag for a diagonal one."
            )
        return value

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return x @ self.A_at(t).mT if self._offset is None else x @ self.A_at(t).mT + self.offset_at(t, x.mT)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.sigma_at(t, self.A_at(t)).unsqueeze(0) if self.constant_matrix is None else self.constant_matrix

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        pass  # checked when it was made

    def on_grid(self, times: Tensor) -> StepFunction:
        A = [self.A_at(t).to(times.dtype) for t in times]
        like = A[0]
        sigma = [self.sigma_at(t, like).unsqueeze(0).to(times.dtype) for t in times]
        diagonal = _diagonal_of(A[0]) if isinstance(self._A, Tensor) and self._offset is None else None
        if diagonal is not None:
            return lambda k, x, y: (x * diagonal, sigma[k])
        if self._offset is None:
            return lambda k, x, y: (x @ A[k].mT, sigma[k])
        a = [self.offset_at(t, like).reshape(1, -1).to(times.dtype) for t in times]
        return lambda k, x, y: (torch.addmm(a[k], x, A[k].mT) if x.ndim == 2 else x @ A[k].mT + a[k], sigma[k])

    def as_linear(self) -> LinearSDE:
        return self

    def coefficients(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``A``, ``offset``, ``sigma`` at t as float64 arrays."""
        time = torch.tensor(t, dtype=torch.float64)
        A = self.A_at(time)
        parts = (A, self.offset_at(time, A), self.sigma_at(time, A))
        return tuple(p.detach().to("cpu", torch.float64).numpy() for p in parts)  # type: ignore[return-value]

    def transition(self, s: float, t: float) -> Transition:
        """The exact transition law from time s to time t >= s, in float64."""
        if t < s:
            raise ValueError(f"transition needs s <= t, got {s} > {t}.")
        d = self.event_shape[0]
        if t == s:
            return Transition(
                torch.eye(d, dtype=torch.float64),
                torch.zeros(d, dtype=torch.float64),
                torch.zeros(d, d, dtype=torch.float64),
            )
        return Transition(*self.transition_and_gain(s, t)[:3])

    def transition_and_gain(self, s: float, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Transition matrix, shift, covariance, and ``int Phi(t, r) sigma(r) dr`` (d, m): the effect of a held
        control."""
        return self._by_exponential(t - s) if self.autonomous else self.by_ode(s, t)

    def by_step(self, clock: list[float], make: Callable[[float, float], Any]) -> list[Any]:
        """``make(s, t)`` for each step of a clock; once for all steps of equal length, where nothing depends on
        time."""
        once = lru_cache(maxsize=None)(make)
        return [once(0.0, round(t - s, 14)) if self.autonomous else once(s, t) for s, t in pairwise(clock)]

    def _by_exponential(self, h: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A, a, root = (torch.from_numpy(c) for c in self.coefficients(0.0))
        d, m = root.shape
        doublings = max(0, math.ceil(math.log2(max(float(torch.linalg.matrix_norm(A, 2)) * h, 1e-300))) + 1)
        h = h / 2**doublings
        # one exponential gives Phi and the integrals of offset and sigma; another (Van Loan 1978) the covariance
        block = torch.zeros(d + 1 + m, d + 1 + m, dtype=torch.float64)
        block[:d, :d], block[:d, d], block[:d, d + 1 :] = A, a, root
        forward = torch.linalg.matrix_exp(h * block)
        phi, inputs = forward[:d, :d], forward[:d, d:]
        loan = torch.zeros(2 * d, 2 * d, dtype=torch.float64)
        loan[:d, :d], loan[:d, d:], loan[d:, d:] = -A, root @ root.mT, A.mT
        e = torch.linalg.matrix_exp(h * loan)
        cov = symmetric(e[d:, d:].mT @ e[:d, d:])
        for _ in range(doublings):
            cov = symmetric(phi @ cov @ phi.mT + cov)
            inputs = phi @ inputs + inputs
            phi = phi @ phi
        return phi, inputs[:, 0], cov, inputs[:, 1:]

    def by_ode(self, s: float, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def terms(r: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            A, a, root = self.coefficients(r)
            return A, np.column_stack([a, root]), root @ root.T

        matrix, effects, cov = integrate_linear(terms, s, t)
        return matrix, effects[:, 0], cov, effects[:, 1:]

    def kernel(self, s: float, t: float, x: Tensor) -> Gaussian:
        """The law of ``X_t`` given ``X_s = x``, x of shape ``(d,)`` or ``(batch, d)``."""
        law = self.transition(s, t)
        mean = x @ law.matrix.to(x).mT + law.shift.to(x)
        return Gaussian(mean, law.covariance.to(x).expand(*x.shape, x.shape[-1]))

    def marginal(self, t: float, initial: Dirac | Gaussian) -> Gaussian:
        """The law of ``X_t`` for a start from ``initial`` at time 0."""
        mean, cov = self.transition(0.0, t).moved(*moments(initial))
        return Gaussian(mean.to(initial.mean), cov.to(initial.mean))

    def bridge(self, t: float, x: Tensor, y: Tensor, s: float = 0.0, u: float | None = None) -> Gaussian:
        """The law of ``X_t`` given ``X_s = x`` and ``X_u = y`` (u defaults to the horizon), s < t < u."""
        u = self.horizon if u is None else u
        if not s <= t <= u or s == u:
            raise ValueError(f"bridge needs s <= t <= u and s < u, got s={s}, t={t}, u={u}.")
        first, second = self.transition(s, t), self.transition(t, u)
        mean = x.double() @ first.matrix.to(x.device).mT + first.shift.to(x.device)
        return condition_gaussian(mean, first.covariance.to(x.device), second, y, like=x)

    def conditioned_drift(self, x: Tensor, t: float, y: Tensor, u: float | None = None) -> Tensor:
        """Drift of the process conditioned on ``X_u = y`` at ``X_t = x`` (Doob's h-transform; tutorial [43], [45])."""
        u = self.horizon if u is None else u
        law = self.transition(t, u)
        A, a, root = (torch.from_numpy(c).to(x.device) for c in self.coefficients(t))
        left = y.double() - x.double() @ law.matrix.to(x.device).mT - law.shift.to(x.device)
        gain = torch.linalg.lstsq(law.covariance.to(x.device), left.reshape(-1, left.shape[-1]).mT).solution.mT
        drift = x.double() @ A.mT + a + gain.reshape(left.shape) @ law.matrix.to(x.device) @ root @ root.mT
        return drift.to(x)


def integrate_linear(
    terms: Callable[[float], tuple[np.ndarray, np.ndarray, np.ndarray]], s: float, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``Phi(t, s)``, ``int Phi(t, r) B(r) dr`` ``(d, n)`` and the covariance at t of ``dX = A X dt + noise`` with a
    source B.

    Args:
        terms: ``r -> A (d, d), B (d, n), Sigma (d, d)``, the noise's covariance in a unit of time.
    """
    from scipy.integrate import solve_ivp

    A, B, _ = terms(s)
    d = len(A)

    def slope(r: float, flat: np.ndarray) -> np.ndarray:
        A, B, noise = terms(r)
        y = flat.reshape(d, -1)
        out = A @ y
        out[:, d : 2 * d] += y[:, d : 2 * d] @ A.T + noise
        out[:, 2 * d :] += B
        return out.ravel()

    start = np.concatenate([np.eye(d), np.zeros((d, d)), np.zeros_like(B)], 1)
    result = solve_ivp(slope, (s, t), start.ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    if not result.success:
        raise RuntimeError(f"the transition law from {s} to {t} could not be integrated: {result.message}")
    end = torch.from_numpy(result.y[:, -1].reshape(d, -1).copy())
    return end[:, :d], end[:, 2 * d :], symmetric(end[:, d : 2 * d])


def _diagonal_of(matrix: Tensor) -> Tensor | None:
    """The diagonal of a diagonal square matrix, else None."""
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    return matrix.diagonal().clone() if square and torch.equal(matrix, torch.diag(matrix.diagonal())) else None


def moments(law: Any) -> tuple[Tensor, Tensor]:
    """Mean and full covariance of a Dirac or Gaussian law, float64 on the CPU."""
    if not isinstance(law, (Dirac, Gaussian)):
        raise TypeError(f"expected a Dirac or Gaussian law, got {type(law).__name__}.")
    return law.mean.detach().double().cpu(), law.covariance_matrix.detach().double().cpu()


def condition_gaussian(mean: Tensor, cov: Tensor, transition: Transition, y: Tensor, like: Tensor) -> Gaussian:
    """The law of X ~ N(mean, cov) given that ``transition`` from it gave y."""
    M, shift, Q = (p.to(mean.device) for p in transition)
    # by least squares: the covariance of y is singular for degenerate noise
    gain = torch.linalg.lstsq(symmetric(M @ cov @ M.mT + Q), M @ cov, driver="gelsd").solution.mT
    new_mean = mean + (y.double() - mean @ M.mT - shift) @ gain.mT
    keep = torch.eye(len(cov), dtype=cov.dtype, device=cov.device) - gain @ M
    new_cov = symmetric(keep @ cov @ keep.mT + gain @ Q @ gain.mT)  # Joseph's form stays positive semi-definite
    return Gaussian(new_mean.to(like), new_cov.to(like).expand(*new_mean.shape, new_mean.shape[-1]))


def BrownianMotion(dim: int, sigma: float | Tensor = 1.0, horizon: float = 1.0) -> LinearSDE:
    """``dX = sigma dW`` in dimension ``dim``; sigma a number or a ``(dim, m)`` matrix."""
    like = sigma if isinstance(sigma, Tensor) else torch.zeros(())
    return LinearSDE(torch.zeros(dim, dim, dtype=like.dtype, device=like.device), sigma, horizon=horizon)


def OrnsteinUhlenbeck(
    dim: int, rate: float = 1.0, sigma: float | Tensor = 1.0, mean: Tensor | None = None, horizon: float = 1.0
) -> LinearSDE:
    """``dX = rate (mean - X) dt + sigma dW``; stationary law ``N(mean, sigma^2 / (2 rate))`` for a scalar sigma."""
    like = sigma if isinstance(sigma, Tensor) else mean if mean is not None else torch.zeros(())
    A = -as_float("rate", rate) * torch.eye(dim, dtype=like.dtype, device=like.device)
    return LinearSDE(A, sigma, offset=None if mean is None else rate * mean, horizon=horizon)
