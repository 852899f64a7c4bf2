"""Random problems with known answers, and the library's answers to them in plain numbers.

A :class:`LinearCase` is a linear-Gaussian control problem written down in numpy. ``case.reference()`` is the law of its
whole path by dense linear algebra; ``case.chain()`` asks the library for the same things through its public interface.
``spoil(case, defect)`` is the case that a negative control hands to the library in the true one's stead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad_vec
from scipy.linalg import block_diag, expm

import sdecontrol as sc

from .gaussian import Affine, Joint, path_law
from .registry import Setting

__all__ = ["SPOILED", "AffineControl", "ChainAnswers", "LinearCase", "affine_map", "linear_cases", "spoil", "tensor"]

START_STEPS = 5  #: steps of a learned start, for chains of at most 23 steps


def tensor(x: Any) -> torch.Tensor:
    return torch.as_tensor(np.array(x, dtype=np.float64))


def affine_map(f: Callable[[torch.Tensor], torch.Tensor], d: int) -> tuple[np.ndarray, np.ndarray]:
    """``(M, b)`` of an affine function ``x -> M x + b``, from its values at 0 and the unit vectors."""
    values = f(torch.cat((torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)))).detach().numpy()
    return (values[1:] - values[0]).T, values[0]


class AffineControl:
    """``u(x, t_k) = U_k x + w_k`` on a grid: a plain user's control."""

    def __init__(self, gains: np.ndarray, offsets: np.ndarray, grid: tuple[float, ...]) -> None:
        self.gains, self.offsets = tensor(gains), tensor(offsets)
        self.grid = tensor(grid)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        k = (self.grid[:-1][None] <= t[:, None] + 1e-9).sum(1) - 1
        return torch.einsum("bij,bj->bi", self.gains[k], x) + self.offsets[k]


@dataclass(frozen=True)
class LinearCase:
    """``dX = ((A + t S) X + (1 + c t) a) dt + (1 + c t) sigma dW``, ``X_0 ~ N(mean, cov)``, ``r = -x'Gx/2 + g'x``,
    ``f = (1 + 0.7 t) x'Fx/2``."""

    A: np.ndarray
    slope: np.ndarray
    offset: np.ndarray
    sigma: np.ndarray
    mean: np.ndarray
    cov: np.ndarray
    G: np.ndarray
    g: np.ndarray
    F: np.ndarray | None
    alpha: float
    grid: tuple[float, ...]
    start: str = "controlled"
    scheme: str = "euler"
    growth: float = 0.0

    @property
    def d(self) -> int:
        return len(self.A)

    @property
    def m(self) -> int:
        return self.sigma.shape[1]

    @property
    def K(self) -> int:
        return len(self.grid) - 1

    @property
    def h(self) -> np.ndarray:
        return np.diff(self.grid)

    def drift(self, t: float, x: np.ndarray) -> np.ndarray:
        """``b(x, t)`` for x ``(n, d)``."""
        return x @ (self.A + t * self.slope).T + (1 + self.growth * t) * self.offset

    def sigma_at(self, t: float) -> np.ndarray:
        return (1 + self.growth * t) * self.sigma

    def F_at(self, t: float) -> np.ndarray:
        """``F(t)``; zero without a running cost."""
        return np.zeros_like(self.A) if self.F is None else (1 + 0.7 * t) * self.F

    def cost(self, t: float, x: np.ndarray) -> np.ndarray:
        """``f(x, t)`` for x ``(n, d)``."""
        return 0.5 * np.einsum("ni,ij,nj->n", x, self.F_at(t), x)

    # -------------------------------------------------------------- for the library

    def sde(self) -> sc.LinearSDE:
        A: Any = tensor(self.A)
        if self.slope.any():
            A = lambda t: tensor(self.A) + t.double() * tensor(self.slope)  # noqa: E731
        if not self.growth:
            return sc.LinearSDE(A, tensor(self.sigma), tensor(self.offset), horizon=self.grid[-1])
        grown = lambda v: lambda t: (1 + self.growth * t.double()) * tensor(v)  # noqa: E731
        return sc.LinearSDE(A, grown(self.sigma), grown(self.offset), horizon=self.grid[-1])

    def problem(self) -> sc.ControlProblem:
        point = not self.cov.any()
        initial = sc.Dirac(tensor(self.mean)) if point else sc.Gaussian(tensor(self.mean), tensor(self.cov))
        reward = sc.Quadratic(tensor(self.G), tensor(self.g)) if self.G.any() else sc.Linear(tensor(self.g))
        cost = None if self.F is None else sc.QuadraticCost(lambda t: tensor(self.F_at(float(t))))
        return sc.ControlProblem(self.sde(), initial, reward, cost, alpha=self.alpha, start=self.start)

    def chain(self) -> ChainAnswers:
        return ChainAnswers(self)

    # -------------------------------------------------------------- by dense linear algebra

    def steps(self, control: tuple[np.ndarray, np.ndarray] | None = None) -> list[Affine]:
        """The chain's kernels, with an affine control ``u_k = U_k x + w_k`` where one is given."""
        found = []
        for k, (t, h) in enumerate(zip(self.grid, self.h)):
            if self.scheme == "exact":
                M, b, C, effect = self._transitions[k]
            else:
                M, b = np.eye(self.d) + h * (self.A + t * self.slope), h * self.drift(t, np.zeros((1, self.d)))[0]
                C, effect = np.sqrt(h) * self.sigma_at(t), h * self.sigma_at(t)
            if control is not None:
                M, b = M + effect @ control[0][k], b + effect @ control[1][k]
            found.append((M, b, C))
        return found

    @cached_property
    def _transitions(self) -> list[tuple[np.ndarray, ...]]:
        return [self._transition(h) for h in self.h]

    def _transition(self, h: float) -> tuple[np.ndarray, ...]:
        """Exact transitions by quadrature: ``e^{hA}``, the shift, a root of the covariance, the effect of a held
        control."""
        flow = lambda s: expm(s * self.A)  # noqa: E731
        cov = quad_vec(lambda s: flow(s) @ self.sigma @ self.sigma.T @ flow(s).T, 0.0, h, epsabs=1e-14, epsrel=1e-13)[0]
        integral = quad_vec(flow, 0.0, h, epsabs=1e-14, epsrel=1e-13)[0]
        values, vectors = np.linalg.eigh(cov)
        return flow(h), integral @ self.offset, vectors * np.sqrt(values), integral @ self.sigma

    def reference(self, k: int = 0, x: np.ndarray | None = None, control: Any = None) -> Joint:
        """The law of ``(x_k, ..., x_K)``: from the start's law, or from the point x."""
        mean, cov = (self.mean, self.cov) if x is None else (x, np.zeros((self.d, self.d)))
        return path_law(mean, cov, self.steps(control)[k:])

    def total_reward(self, k: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """``(P, q)`` of ``R/alpha`` as a quadratic form of ``(x_k, ..., x_K)``."""
        zero = np.zeros((self.d, self.d))
        costs = [zero if self.F is None else h * self.F_at(t) for t, h in zip(self.grid[k:], self.h[k:])]
        q = np.concatenate([np.zeros(self.d * (self.K - k)), self.g])
        return np.asarray(block_diag(*costs, self.G)) / self.alpha, q / self.alpha

    def optimum(self) -> tuple[Joint, float]:
        """The law ``Q_fine`` of the whole path, ``dQ_fine/dQ0 = exp(R/alpha)/Z``, and log Z."""
        return self.reference().tilted(*self.total_reward())

    def value(self, k: int, x: np.ndarray) -> np.ndarray:
        """``alpha log E_{Q0}[exp(R_k/alpha) | x_k = x]`` for x ``(n, d)``: one dense Gaussian per point."""
        return self.alpha * np.array([self.reference(k, row).tilted(*self.total_reward(k))[1] for row in x])

    def points(self, rng: np.random.Generator, n: int = 4) -> np.ndarray:
        return rng.normal(size=(n, self.d))


class ChainAnswers:
    """What the library says of a case's chain, in numpy. Step k is the k-th after time 0."""

    def __init__(self, case: LinearCase) -> None:
        self.case, self.problem = case, case.problem()
        self.exact = sc.exact_solution(self.problem, time_steps=list(case.grid), scheme=case.scheme)

    @property
    def before(self) -> int:
        """Steps before time 0."""
        return START_STEPS if self.problem.start == "controlled" else 0

    def kernel(self, k: int) -> Affine:
        """The soft-optimal kernel of step k (negative: of the learned start) as
        ``(M, b, root of the covariance)``."""
        law = self.exact.kernel(torch.zeros(1, self.case.d, dtype=torch.float64), k + self.before)
        M, b = affine_map(lambda x: self.exact.kernel(x, k + self.before).mean, self.case.d)
        values, vectors = np.linalg.eigh(law.covariance_matrix[0].numpy())
        return M, b, vectors * np.sqrt(np.maximum(values, 0.0))

    def induced(self, kernels: int | None = None) -> Joint:
        """The path law that the soft-optimal kernels induce from the optimal start (the first ``kernels`` of them)."""
        initial = self.exact.initial
        count = self.case.K if kernels is None else kernels
        return path_law(initial.mean.numpy(), initial.covariance_matrix.numpy(), [self.kernel(k) for k in range(count)])

    def value(self, k: int, x: np.ndarray) -> np.ndarray:
        return self.exact.value(tensor(x), self.case.grid[k]).numpy()

    def marginal(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        law = self.exact.marginal(self.case.grid[k])
        return law.mean.numpy(), law.covariance_matrix.numpy()

    def bridge(self, j: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(M, b, Q)`` of ``x_j | x_k``."""
        s, t, d = self.case.grid[j], self.case.grid[k], self.case.d
        M, b = affine_map(lambda x: self.exact.bridge(s, t, x).mean, d)
        return M, b, self.exact.bridge(s, t, torch.zeros(d, dtype=torch.float64)).covariance_matrix.numpy()

    def control(self) -> tuple[np.ndarray, np.ndarray]:
        """The best mean-shift control as ``(U, w)``, stacked over the steps after time 0."""
        parts = [affine_map(lambda x, t=t: self.exact.control(x, t), self.case.d) for t in self.case.grid[:-1]]
        return np.stack([U for U, _ in parts]), np.stack([w for _, w in parts])


def _random_case(
    rng: np.random.Generator, d: int, m: int, K: int, *, cost: bool, varying: bool, start: str
) -> LinearCase:
    def symmetric(low: float, high: float) -> np.ndarray:
        basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
        return (basis * rng.uniform(low, high, size=d)) @ basis.T

    horizon = rng.uniform(0.7, 1.3)
    inner = np.sort(rng.uniform(0.3, 0.7, size=K)).cumsum()
    return LinearCase(
        A=rng.normal(size=(d, d)) * 0.6 - 0.4 * np.eye(d),
        slope=rng.normal(size=(d, d)) * (0.5 if varying else 0.0),
        offset=rng.normal(size=d),
        sigma=rng.normal(size=(d, m)) * 0.5 + 0.6 * np.eye(d, m),
        mean=rng.normal(size=d),
        cov=symmetric(0.3, 1.2),
        G=symmetric(-0.1, 1.2),
        g=rng.normal(size=d) + np.sign(rng.normal(size=d)),
        F=symmetric(0.1, 0.8) if cost else None,
        growth=0.4 if varying else 0.0,
        alpha=rng.uniform(0.5, 1.5),
        grid=(0.0, *(horizon * inner[:-1] / inner[-1]), horizon),
        start=start,
    )


def linear_cases(
    setting: Setting,
    *,
    cost: bool = False,
    start: str = "controlled",
    scheme: str = "euler",
    linear_reward: bool = True,
    extra_noise: bool = True,
    dims: tuple[int, ...] = (1, 2, 3, 4),
) -> Iterator[LinearCase]:
    """Random cases, one or more of each dimension: non-symmetric and time-dependent drift, more noises than states,
    uneven grids, quadratic rewards with convex directions, and one linear reward."""
    rng = setting.rng(17 + cost)
    for repeat in range(setting.count(1, 5)):
        for d in dims:
            while True:
                case = _random_case(
                    rng,
                    d,
                    d + (d % 2) * extra_noise,
                    K=3 + d % 3,
                    cost=cost,
                    varying=scheme == "euler" and d != 2,
                    start=start,
                )
                if linear_reward and d == 3 and repeat % 2 == 0:
                    case = replace(case, G=np.zeros((d, d)))
                case = replace(case, scheme=scheme)
                law, (P, _) = case.reference(), case.total_reward()
                if np.linalg.eigvals(np.eye(len(law.mean)) + law.cov @ P).real.min() > 0.3:
                    break
            yield case


SPOILED: dict[str, Callable[[LinearCase], LinearCase]] = {
    "alpha off by 5 %": lambda c: replace(c, alpha=1.05 * c.alpha),
    "sign of g flipped": lambda c: replace(c, g=-c.g),
    "noise off by 1 %": lambda c: replace(c, sigma=1.01 * c.sigma),
    "drift off by 1 %": lambda c: replace(c, A=1.01 * c.A, slope=1.01 * c.slope, offset=1.01 * c.offset),
    "start left fixed": lambda c: replace(c, start="fixed"),
    "running cost left out": lambda c: replace(c, F=None),
    "drift transposed": lambda c: replace(c, A=c.A.T, slope=c.slope.T),
    "offset left out": lambda c: replace(c, offset=0.0 * c.offset),
}


def spoil(case: LinearCase, defect: str) -> LinearCase:
    """The case that is handed to the library: the true one, unless ``defect`` is one of :data:`SPOILED`."""
    return SPOILED[defect](case) if defect in SPOILED else case
