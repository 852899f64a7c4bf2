"""Exact gradients on linear-quadratic Euler chains: Gaussian moments of an affine control, propagated in float64 and
differentiated.

Written from the definitions alone, with nothing of the package's own algebra: the backward recursions are done here
again.
"""

import torch
from cases import F64, randn

import sdecontrol as sc
from sdecontrol.methods.base import Run


class AffineControl(torch.nn.Module):
    """``u_k(x) = gain_k x + offset_k``: a parameter per step, so that it can be any linear-quadratic problem's
    optimum."""

    def __init__(self, gain, offset):
        super().__init__()
        self.gain, self.offset = torch.nn.Parameter(gain.clone()), torch.nn.Parameter(offset.clone())

    def forward(self, x, t):
        k = (t * len(self.gain)).round().long().clamp(max=len(self.gain) - 1)
        return (self.gain[k] @ x.unsqueeze(2)).squeeze(2) + self.offset[k]


class GaussianChain:
    """``x' = M x + m + L (c + xi)`` with ``c = sqrt(h) u``, the same at all steps; reward and cost in units of
    alpha."""

    def __init__(self, problem, K):
        sde, alpha = problem.reference, problem.alpha
        A, a, sigma = (torch.from_numpy(c) for c in sde.coefficients(0.0))
        self.K, self.h = K, sde.horizon / K
        self.root = self.h**0.5
        self.M, self.m, self.L = torch.eye(len(A), dtype=F64) + self.h * A, self.h * a, self.root * sigma
        self.P, self.q = problem.reward_function.G.double() / alpha, problem.reward_function.g.double() / alpha
        cost = problem.running_cost_function
        self.F = torch.zeros_like(self.P) if cost is None else cost.F_at(0.0).double() / alpha
        self.mean, self.cov = problem.initial.mean.double(), problem.initial.covariance_matrix.double()

    def optimum(self):
        """The best mean-shift control, by dynamic programming over ``-v/alpha = x'Px/2 - q'x``:
        ``max_c E v(y + L(c + xi)) - |c|^2/2``."""
        P, q, gains, offsets = self.P, self.q, [], []
        for _ in range(self.K):
            inner = torch.eye(self.L.shape[1], dtype=F64) + self.L.mT @ P @ self.L
            gain = -torch.linalg.solve(inner, self.L.mT @ P @ self.M)
            offset = torch.linalg.solve(inner, self.L.mT @ (q - P @ self.m))
            gains.append(gain / self.root)
            offsets.append(offset / self.root)
            T = torch.linalg.inv(torch.eye(len(P), dtype=F64) + P @ self.L @ self.L.mT)
            P, q = self.M.mT @ T @ P @ self.M + self.h * self.F, self.M.mT @ T @ (q - P @ self.m)
        return AffineControl(torch.stack(gains[::-1]), torch.stack(offsets[::-1]))

    def values(self):
        """``(P_k, q_k)`` of the soft-optimal value, k = 0..K: the same recursion (its constants differ)."""
        P, q = self.P, self.q
        out = [(P, q)]
        for _ in range(self.K):
            T = torch.linalg.inv(torch.eye(len(P), dtype=F64) + P @ self.L @ self.L.mT)
            P, q = self.M.mT @ T @ P @ self.M + self.h * self.F, self.M.mT @ T @ (q - P @ self.m)
            out.append((P, q))
        return out[::-1]

    def policy_values(self, control):
        """``(P_k, q_k, c_k)``, k = 0..K, of the value of a control: ``V_k(x) = E[R_k/alpha - sum |c|^2/2 | x_k = x] =
        -x'Px/2 + q'x + c``."""
        P, q, c = self.P, self.q, torch.zeros((), dtype=F64)
        out = [(P, q, c)]
        for k in reversed(range(self.K)):
            gain, offset = (self.root * p.detach() for p in (control.gain[k], control.offset[k]))
            step, shift = self.M + self.L @ gain, self.m + self.L @ offset
            c = c + q @ shift - 0.5 * shift @ P @ shift - 0.5 * (self.L.mT @ P @ self.L).trace() - 0.5 * offset @ offset
            q = step.mT @ (q - P @ shift) - gain.mT @ offset
            P = step.mT @ P @ step + gain.mT @ gain + self.h * self.F
            out.append((P, q, c))
        return out[::-1]

    @staticmethod
    def square(A, b, mean, cov):
        """``E |A x + b|^2 / 2``."""
        return 0.5 * ((A @ mean + b).square().sum() + (A @ cov @ A.mT).trace())

    def cost(self, control, detached=0):
        """``KL(P^u || Q_fine) - log Z = -J/alpha``; the first ``detached`` steps have no gradient."""
        mean, cov, total = self.mean, self.cov, 0.0
        for k in range(self.K):
            gain, offset = self.root * control.gain[k], self.root * control.offset[k]
            if k < detached:
                gain, offset = gain.detach(), offset.detach()
            total = total + self.square(gain, offset, mean, cov)
            total = total + self.h * 0.5 * (mean @ self.F @ mean + (self.F @ cov).trace())
            step = self.M + self.L @ gain
            mean, cov = step @ mean + self.m + self.L @ offset, step @ cov @ step.mT + self.L @ self.L.mT
        return total + 0.5 * (mean @ self.P @ mean + (self.P @ cov).trace()) - self.q @ mean

    def marginals(self, control):
        """Mean and covariance of ``x_0 .. x_{K-1}`` under a control, without a graph."""
        mean, cov, out = self.mean, self.cov, []
        with torch.no_grad():
            for k in range(self.K):
                out.append((mean, cov))
                step = self.M + self.L @ control.gain[k] * self.root
                mean = step @ mean + self.m + self.L @ control.offset[k] * self.root
                cov = step @ cov @ step.mT + self.L @ self.L.mT
        return out

    def forward_kl(self, control, first=0, start=None):
        """``KL(Q_fine || P^u)`` of the steps from ``first`` on, up to a constant, for a path that is soft-optimal from
        there; ``start``: mean and covariance of ``x_first`` before its own tilt by ``exp(v/alpha)``."""
        values, best = self.values(), self.optimum()
        mean, cov = (self.mean, self.cov) if start is None else start
        P, q = values[first]
        G = torch.linalg.inv(torch.eye(len(P), dtype=F64) + cov @ P)
        mean, cov = G @ (mean + cov @ q), G @ cov
        total = 0.0
        for k in range(first, self.K):
            gain, offset = (
                self.root * (control.gain[k] - best.gain[k]),
                self.root * (control.offset[k] - best.offset[k]),
            )
            total = total + self.square(gain.double(), offset, mean, cov)
            P, _ = values[k + 1]
            step = (self.M + self.L @ best.gain[k] * self.root).detach()
            S = self.L @ self.L.mT
            mean = step @ mean + self.m + (self.L @ best.offset[k] * self.root).detach()
            cov = step @ cov @ step.mT + torch.linalg.inv(torch.eye(len(P), dtype=F64) + S @ P) @ S
        return total


def perturbed(control, size=0.5, seed=7):
    return AffineControl(
        control.gain.detach() + size * randn(*control.gain.shape, seed=seed),
        control.offset.detach() + size * randn(*control.offset.shape, seed=seed + 1),
    )


def gradients(problem, method, control, K, *, repeats=40, batch=16384, seed=11):
    """Gradients ``(repeats, parameters)`` of a method's first step in each of so many independent iterations."""
    chain = problem.chain(K)
    run = Run(problem, chain, batch, 1, seed, control)
    state = method.setup(run)
    parameters = list(state.control.parameters())
    found = []
    run.descend = lambda *_: found.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
    with problem.evaluating():
        for i in range(repeats):
            run.iteration = i
            for p in state.parameters():
                p.grad = None
            before = len(found)
            method.step(state, run)
            del found[before + 1 :]  # of several epochs the first
    return torch.stack(found)


def gradient_of(value, control):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(control.parameters()))])


def agree(have, want, power=0.005):
    """Mean of ``have`` against ``want``: along it within 4 standard errors, themselves below ``power`` of it (so that
    an error of 2 % is seen with certainty); and every entry within 5 (of some thirty; both are wrong for about one seed
    in ten thousand)."""
    n = len(have)
    along = have @ want / want.square().sum()
    error = float(along.std()) / n**0.5
    assert error < power, f"standard error {error:.4f} of the size: no power"
    assert abs(float(along.mean()) - 1) < 4 * error, (
        f"{float(along.mean()):.4f} +- {error:.4f} times the exact gradient"
    )
    z = (have.mean(0) - want) / (have.std(0) / n**0.5 + 1e-12)
    assert float(z.abs().max()) < 5, f"an entry is off by {float(z.abs().max()):.1f} standard errors"


def vanishes(have, scale):
    """Zero in every entry within 5 standard errors, which are in all below half of ``scale``: the gradient's norm at an
    error worth seeing."""
    error = have.std(0) / len(have) ** 0.5
    assert float(error.norm()) < 0.5 * scale, f"{float(error.norm()):.4g} against {scale:.4g}: no power"
    z = have.mean(0) / (error + 1e-12)
    assert float(z.abs().max()) < 5, f"an entry is off by {float(z.abs().max()):.1f} standard errors"


def lq(seed=1, *, running=True, start="dirac"):
    from cases import random_lq

    return random_lq(2, seed=seed, running=running, start=start, alpha=0.7)


__all__ = ["AffineControl", "GaussianChain", "agree", "gradient_of", "gradients", "lq", "perturbed", "sc", "vanishes"]
