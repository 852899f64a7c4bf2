"""Independent answers for tests of exact solutions: the whole path as one Gaussian vector, and quadrature.

Nothing here uses a recursion: a linear chain's path is ``X = a + N xi`` with xi all its noises (the start's included),
the total reward one quadratic form of X, and every law a conditional of one big Gaussian.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from cases import F64, randn, spd

import sdecontrol as sc
from sdecontrol.processes.laws import factor


def linear_quadratic(d=3, m=3, seed=0, *, start="controlled", running=True, varying=False, alpha=0.7):
    """Non-symmetric A, offset, non-square sigma; ``varying``: A, sigma and F depend on time."""
    A, sigma = 0.6 * randn(d, d, seed=seed) - 0.5 * torch.eye(d, dtype=F64), 0.7 * randn(d, m, seed=seed + 1)
    offset, F, B = 0.5 * randn(d, seed=seed + 2), 0.6 * spd(d, seed + 3), 0.5 * randn(d, d, seed=seed + 4)
    if varying:
        sde = sc.LinearSDE(
            lambda t: A + B * torch.sin(3 * t.double()), lambda t: sigma * (1 + 0.5 * t.double()), offset, horizon=1.3
        )
        cost = sc.QuadraticCost(lambda t: F * (1 + t.double()))
    else:
        sde, cost = sc.LinearSDE(A, sigma, offset, horizon=1.3), sc.QuadraticCost(F)
    point = randn(d, seed=seed + 5)
    initial = sc.Dirac(point) if start == "dirac" else sc.Gaussian(point, spd(d, seed + 6))
    return sc.ControlProblem(
        sde,
        initial,
        sc.Quadratic(spd(d, seed + 7), randn(d, seed=seed + 8)),
        cost if running else None,
        alpha=alpha,
        start="fixed" if start == "dirac" else start,
    )


class Step(NamedTuple):
    """``x' = M x + m + L (C u + xi)``, running-cost weight ``h F / alpha`` at its left end."""

    M: torch.Tensor
    m: torch.Tensor
    L: torch.Tensor
    C: torch.Tensor
    cost: torch.Tensor


def steps_of(problem, time_steps, scheme):
    """The chain's steps from the definition of the SDE (the exact scheme: from its transition laws and quadrature)."""
    sde, d = problem.reference, problem.event_shape[0]
    grid = (
        torch.linspace(0, sde.horizon, time_steps + 1, dtype=F64)
        if isinstance(time_steps, int)
        else torch.tensor(time_steps)
    )
    eye, steps = torch.eye(d, dtype=F64), []
    if problem.start == "controlled":
        n = max(5, (len(grid) - 1) // 4)
        root = factor(problem.initial.covariance_matrix)
        steps = [Step(eye, 0 * eye[0], root / n**0.5, eye / n**0.5, 0 * eye)] * n
    for s, t in zip(grid.tolist(), grid[1:].tolist()):
        h, (A, a, sigma) = t - s, (torch.from_numpy(c) for c in sde.coefficients(s))
        F = problem.running_cost_function
        cost = 0 * eye if F is None else h * F.F_at(torch.tensor(s, dtype=F64)) / problem.alpha
        if scheme == "euler":
            noise = torch.eye(sigma.shape[1], dtype=F64)
            steps.append(Step(eye + h * A, h * a, h**0.5 * sigma, h**0.5 * noise, cost))
        else:
            M, m, root, C = exact_step(sde, s, t)
            steps.append(Step(M, m, root, C, cost))
    return steps


@lru_cache(maxsize=200)
def exact_step(sde, s, t, nodes=24):
    """Transition matrix and shift, root of the covariance, and C with ``root C = int_s^t Phi(t, r) sigma(r) dr``
    (Gauss-Legendre)."""
    law = sde.transition(s, t)
    root = factor(law.covariance)
    held = torch.zeros(law.matrix.shape[0], sde.control_shape[0], dtype=F64)
    for x, w in zip(*np.polynomial.legendre.leggauss(nodes)):
        r = s + (t - s) * (1 + float(x)) / 2
        held += 0.5 * (t - s) * float(w) * sde.transition(r, t).matrix @ torch.from_numpy(sde.coefficients(r)[2])
    return law.matrix, law.shift, root, torch.linalg.pinv(root, rtol=1e-7) @ held


class DensePath:
    """The path of a chain as one Gaussian vector ``X = a + N xi``, tilted by ``exp(R/alpha)``."""

    def __init__(self, problem, time_steps, scheme="euler", feedback=None):
        """``feedback``: (gain, offset) of each step's u; the path is then the controlled one, ``shift`` its stacked
        c."""
        steps = steps_of(problem, time_steps, scheme)
        d, K = problem.event_shape[0], len(steps)
        fixed = problem.start != "controlled"
        first = factor(problem.initial.covariance_matrix) if fixed else torch.zeros(d, d, dtype=F64)
        widths = [d] + [s.L.shape[1] for s in steps]
        a, N = [problem.initial.mean], [torch.zeros(d, sum(widths), dtype=F64)]
        N[0][:, :d] = first
        shifts, at = [], d
        self.H = torch.zeros((K + 1) * d, (K + 1) * d, dtype=F64)
        for k, step in enumerate(steps):
            mean, noise = step.M @ a[-1] + step.m, step.M @ N[-1]
            if feedback is not None:
                gain, offset = feedback[k]
                c = (step.C @ (gain @ a[-1] + offset), step.C @ gain @ N[-1])
                mean, noise = mean + step.L @ c[0], noise + step.L @ c[1]
                shifts.append(c)
            noise[:, at : at + widths[k + 1]] += step.L
            at += widths[k + 1]
            a.append(mean)
            N.append(noise)
            self.H[k * d : (k + 1) * d, k * d : (k + 1) * d] = step.cost
        self.d, self.K, self.a, self.N, self.shifts = d, K, torch.cat(a), torch.cat(N), shifts
        self.H[K * d :, K * d :] = problem.reward_function.G / problem.alpha
        self.h = torch.zeros_like(self.a)
        self.h[K * d :] = problem.reward_function.g / problem.alpha
        B = torch.eye(self.N.shape[1], dtype=F64) + self.N.mT @ self.H @ self.N
        slope = self.N.mT @ (self.h - self.H @ self.a)
        at_a = self.h @ self.a - 0.5 * self.a @ self.H @ self.a
        self.log_z = at_a + 0.5 * slope @ torch.linalg.solve(B, slope) - 0.5 * torch.linalg.slogdet(B).logabsdet
        self.mean = self.a + self.N @ torch.linalg.solve(B, slope)
        self.cov = self.N @ torch.linalg.solve(B, self.N.mT)
        if problem.start == "fixed" and bool(first.any()):  # the start keeps nu: the tilted law given X_0, over nu
            gain = torch.linalg.solve(self.cov[:d, :d], self.cov[:d]).mT
            self.mean = self.mean + gain @ (problem.initial.mean - self.mean[:d])
            self.cov = self.cov - gain @ self.cov[:d] + gain @ problem.initial.covariance_matrix @ gain.mT

    def _rows(self, k):
        return slice(k * self.d, (k + 1) * self.d)

    def marginal(self, k):
        return self.mean[self._rows(k)], self.cov[self._rows(k), self._rows(k)]

    def reference_marginal(self, k):
        N = self.N[self._rows(k)]
        return self.a[self._rows(k)], N @ N.mT

    def conditional(self, i, j, x):
        """Mean and covariance of x_i given ``x_j = x`` under the tilted law."""
        i, j = self._rows(i), self._rows(j)
        gain = self.cov[i, j] @ torch.linalg.pinv(self.cov[j, j], hermitian=True, rtol=1e-12)
        return self.mean[i] + (x - self.mean[j]) @ gain.mT, self.cov[i, i] - gain @ self.cov[j, i]

    def elbo(self):
        """``E[R/alpha] - E sum |c|^2/2`` of the controlled path (not tilted)."""
        reward = self.h @ self.a - 0.5 * self.a @ self.H @ self.a - 0.5 * (self.H * (self.N @ self.N.mT)).sum()
        return reward - 0.5 * sum(c @ c + (n**2).sum() for c, n in self.shifts)


def feedback_of(exact):
    """``(gain, offset)`` of every step of an exact chain solution, read off its control."""
    d = exact.problem.event_shape[0]
    x = torch.cat((torch.zeros(1, d, dtype=F64), torch.eye(d, dtype=F64)))
    us = [exact.control(x, t) for t in exact.chain.clock[:-1]]
    return [((u[1:] - u[0]).mT, u[0]) for u in us]


def gaussian_tilt(mean, cov, P, q):
    """``N(mean, cov) exp(-x'Px/2 + q'x)`` by precisions: its mean, covariance and log normalising constant."""
    precision = torch.linalg.inv(cov)
    new = torch.linalg.inv(precision + P)
    b = precision @ mean + q
    log_z = 0.5 * b @ new @ b - 0.5 * mean @ precision @ mean + 0.5 * (torch.logdet(new) - torch.logdet(cov))
    return new @ b, new, log_z


def mixture_2d(components=2):
    means = torch.tensor([[1.0, -0.5], [-0.8, 0.9], [0.2, 1.5]], dtype=F64)[:components]
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=F64)[:components]
    return sc.GaussianMixture(weights, means, torch.stack([0.3 * spd(2, seed) for seed in range(components)]))


SCHEDULES = {
    "vp": sc.VP(0.1, 6.0),
    "cosine": sc.CosineVP(),
    "ve": sc.VE(0.05, 4.0),
    "flow": sc.FlowMatching(start=0.05),
}


def mixture_problem(schedule="vp", start="controlled", components=2, reward="quadratic", alpha=0.6):
    g = torch.tensor([0.7, -0.4], dtype=F64)
    chosen = sc.Linear(g) if reward == "linear" else sc.Quadratic(torch.tensor([[0.8, 0.3], [0.3, -0.1]], dtype=F64), g)
    return sc.ControlProblem(
        sc.generative_sde(mixture_2d(components), SCHEDULES[schedule]), reward=chosen, alpha=alpha, start=start
    )
