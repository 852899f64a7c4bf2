"""Continuous time: the theorems against Riccati solutions, and how fast Euler chains come near them.

With constant coefficients the laws at finitely many times are again one dense Gaussian (exact transitions by
quadrature), so that continuous-time statements are checked to the accuracy of the Riccati integration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

import sdecontrol as sc

from ..cases import LinearCase, affine_map, linear_cases, spoil, tensor
from ..gaussian import log_density
from ..registry import Measurement, Setting, check, compare, order, within
from .chain import _quadratic

EXACT = "sdecontrol.exact_solution"
Lines = Iterator[Measurement]
HALVINGS = (16, 32, 64, 128)


def _continuous(case: LinearCase):
    return sc.exact_solution(case.problem())


@check(
    "theorem-1-continuous",
    "Theorem 1, Remark 4",
    kind="continuous",
    implements=[f"{EXACT}.marginal", f"{EXACT}.log_z"],
    controls=["start left fixed", "alpha off by 5 %", "noise off by 1 %", "drift off by 1 %", "drift transposed"],
)
def theorem_1(setting: Setting, defect: str) -> Lines:
    """In continuous time too the law of X_T under the optimum is p_r, with log Z = log E[exp(r(X_T)/alpha)]."""
    for case in linear_cases(setting, scheme="exact"):
        p_r, log_z = case.reference().of(-1).tilted(case.G / case.alpha, case.g / case.alpha)
        exact = _continuous(spoil(case, defect))
        law = exact.marginal(case.grid[-1])
        yield compare(f"mean of X_T, d={case.d}", law.mean, p_r.mean)
        yield compare(f"covariance of X_T, d={case.d}", law.covariance_matrix, p_r.cov)
        yield compare(f"log Z, d={case.d}", exact.log_z, log_z)


@check(
    "theorem-2-continuous",
    "Theorem 2, Lemma 2",
    kind="continuous",
    implements=[f"{EXACT}.value", f"{EXACT}.marginal"],
    controls=["start left fixed", "alpha off by 5 %", "noise off by 1 %", "alpha missing in the value"],
)
def theorem_2(setting: Setting, defect: str) -> Lines:
    """p*_t = exp(v(., t)/alpha) p0_t / C with C = Z for all t, and v(x, t) = alpha log E[exp(r(X_T)/alpha) | X_t =
    x]."""
    for case in linear_cases(setting, scheme="exact"):
        exact, reference = _continuous(spoil(case, defect)), case.reference()
        _, log_z = case.optimum()
        alpha = 1.0 if defect.startswith("alpha missing") else case.alpha
        for k, t in enumerate(case.grid):
            x = case.points(setting.rng(41))
            value, law = exact.value(tensor(x), t).numpy(), exact.marginal(t)
            log_ratio = log_density(x, law.mean.numpy(), law.covariance_matrix.numpy()) - reference.of(k).log_prob(x)
            yield compare(f"log C at t={t:.2f}, d={case.d}", value / alpha - log_ratio, np.full(len(x), log_z))
            if k < case.K:
                yield compare(f"v at t={t:.2f}, d={case.d}", value, case.value(k, x))


@check(
    "theorem-3-continuous",
    "Theorem 3, [36]",
    kind="continuous",
    implements=[f"{EXACT}.bridge"],
    controls=["start left fixed", "noise off by 1 %", "drift off by 1 %", "offset left out"],
)
def theorem_3(setting: Setting, defect: str) -> Lines:
    """The optimum's backward conditionals are the reference's, for adjacent and distant times."""
    for case in linear_cases(setting, scheme="exact"):
        exact, reference = _continuous(spoil(case, defect)), case.reference()
        for j, k in ((0, 1), (1, 2), (0, case.K), (1, case.K)):
            M, b, Q = reference.regression([j], [k])
            s, t = case.grid[j], case.grid[k]
            got_M, got_b = affine_map(lambda x, s=s, t=t: exact.bridge(s, t, x).mean, case.d)
            cov = exact.bridge(s, t, torch.zeros(case.d, dtype=torch.float64)).covariance_matrix
            for name, got, want in (("slope", got_M, M), ("offset", got_b, b), ("covariance", cov, Q)):
                yield compare(f"{name} of X_{j} | X_{k}, d={case.d}", got, want)


@check(
    "optimal-control",
    "[27], Remark 5; Lemma 2 of 2402.15194",
    kind="continuous",
    implements=[f"{EXACT}.control", f"{EXACT}.value"],
    controls=["alpha off by 5 %", "noise off by 1 %", "sigma left out", "sign of g flipped"],
)
def optimal_control(setting: Setting, defect: str) -> Lines:
    """u*(x, t) = sigma^T grad v(x, t)/alpha: the library's control against the gradient of the dense value, for
    constant drift, and of its own value where drift varies and a running cost is paid."""
    for case in (*linear_cases(setting, scheme="exact"), *linear_cases(setting, cost=True)):
        exact, true = _continuous(spoil(case, defect)), _continuous(case)
        x, k = case.points(setting.rng(42)), case.K - 1
        t = case.grid[k]
        value = (
            (lambda y, k=k: case.value(k, y))
            if case.scheme == "exact"
            else (lambda y, t=t, true=true: true.value(tensor(y), t).numpy())
        )
        P, q, _ = _quadratic(lambda y: value(y) / case.alpha, case.d)
        sigma = np.eye(case.d, case.m) if defect == "sigma left out" else case.sigma_at(t)
        yield compare(f"u* at t={t:.2f}, d={case.d}, {case.scheme}", exact.control(tensor(x), t), (q - x @ P) @ sigma)


@check(
    "hjb-equation",
    "MATH 1: HJB",
    kind="continuous",
    implements=[f"{EXACT}.value"],
    controls=[
        "alpha off by 5 %",
        "running cost left out",
        "noise off by 1 %",
        "drift transposed",
        "sign of the running cost flipped",
    ],
)
def hjb(setting: Setting, defect: str) -> Lines:
    """d_t v + b.grad v + tr(sigma sigma^T hess v)/2 + |sigma^T grad v|^2/(2 alpha) - f = 0, time-dependent drift and
    running cost included; the time derivative by differences of fourth order, hence the tolerance."""
    for case in linear_cases(setting, cost=True):
        exact = _continuous(spoil(case, defect))
        sign = -1.0 if defect.startswith("sign of the running") else 1.0
        for t in (0.2, 0.6):
            x, e = case.points(setting.rng(43)), 2e-3
            v = lambda time, y=x: exact.value(tensor(y), time).numpy()  # noqa: E731
            rate = (8 * (v(t + e) - v(t - e)) - (v(t + 2 * e) - v(t - 2 * e))) / (12 * e)
            P, q, _ = _quadratic(lambda y, v=v, t=t: v(t, y), case.d)
            slope, drift = q - x @ P, case.drift(t, x)
            noise = case.sigma_at(t) @ case.sigma_at(t).T
            residual = (
                rate
                + (drift * slope).sum(-1)
                - 0.5 * np.trace(noise @ P)
                + 0.5 * np.einsum("ni,ij,nj->n", slope, noise, slope) / case.alpha
                - sign * case.cost(t, x)
            )
            yield within(
                f"residual at t={t:g}, d={case.d}", float(np.abs(residual).max() / max(1.0, np.abs(rate).max())), 1e-6
            )


@check(
    "girsanov-continuous",
    "MATH 1: Girsanov, [18]",
    kind="continuous",
    implements=[f"{EXACT}.control", f"{EXACT}.marginal", f"{EXACT}.log_z"],
    controls=[
        "alpha off by 5 %",
        "KL of the start dropped",
        "factor 1/2 of the KL dropped",
        "sign of g flipped",
        "running cost left out",
    ],
)
def girsanov(setting: Setting, defect: str) -> Lines:
    """At the optimum the bound is tight: log Z = E[R]/alpha - KL(nu* || nu) - E int |u*|^2/2 dt, the expectations from
    the library's marginals and control by quadrature in time."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    for case in linear_cases(setting, cost=True):
        exact = _continuous(spoil(case, defect))
        T, half = case.grid[-1], 1.0 if defect.startswith("factor") else 0.5
        total = 0.0
        for t, w in zip((nodes + 1) * T / 2, weights * T / 2):
            law = exact.marginal(t)
            m, C = law.mean.numpy(), law.covariance_matrix.numpy()
            U, c = affine_map(lambda x, t=t: exact.control(x, t), case.d)
            total -= w * half * (np.trace(U.T @ U @ C) + (U @ m + c) @ (U @ m + c))
            total -= w * 0.5 * (np.trace(case.F_at(t) @ C) + m @ case.F_at(t) @ m) / case.alpha
        end, start = exact.marginal(T), exact.marginal(0.0)
        m, C = end.mean.numpy(), end.covariance_matrix.numpy()
        total += (case.g @ m - 0.5 * (np.trace(case.G @ C) + m @ case.G @ m)) / case.alpha
        m, C = start.mean.numpy() - case.mean, start.covariance_matrix.numpy()
        ratio = np.linalg.solve(case.cov, C)
        kl = 0.5 * (np.trace(ratio) - case.d + m @ np.linalg.solve(case.cov, m) - np.linalg.slogdet(ratio)[1])
        total -= 0.0 if defect.startswith("KL of the start") else kl
        yield compare(f"log Z, d={case.d}", exact.log_z, total)


def _refined(case: LinearCase, K: int) -> LinearCase:
    return replace(case, grid=(*(case.grid[-1] * k / K for k in range(K)), case.grid[-1]))


def _at_zero(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The polynomial through values ``(n, ...)`` at n sizes, at size 0."""
    weights = [np.prod([b / (b - a) for j, b in enumerate(sizes) if j != i]) for i, a in enumerate(sizes)]
    return np.tensordot(weights, values, 1)


def _chain_errors(case: LinearCase, truth: LinearCase, exact) -> list[np.ndarray]:
    """Errors of one chain: log Z, mean of X_T, u at 0, v at 0, slope of X_0 | X_T."""
    chain, T = sc.exact_solution(case.problem(), time_steps=case.K), truth.grid[-1]
    x = tensor(np.ones((1, truth.d)))
    quantities = [
        lambda s: s.log_z.reshape(1),
        lambda s: s.marginal(T).mean,
        lambda s: s.control(x, 0.0),
        lambda s: s.value(x, 0.0),
        lambda s: s.bridge(0.0, T, x[0]).mean,
    ]
    return [(f(chain) - f(exact)).flatten().numpy() for f in quantities]


@check(
    "theorems-as-h-to-0",
    "Theorems 1-3, Remark 4",
    kind="continuous",
    implements=[EXACT],
    controls=["noise off by 1 %", "alpha off by 5 %", "drift off by 1 %", "running cost left out", "offset left out"],
)
def convergence(setting: Setting, defect: str) -> Lines:
    """The chain's log Z, end law, control, value and bridges converge to those of continuous time as h, h^2, ...: once
    powers h to h^4 are taken from the errors at five step sizes, none is left at h = 0. A root of h would leave a tenth
    of the largest."""
    steps = (*HALVINGS, 2 * HALVINGS[-1])
    names = ("log Z", "mean of X_T", "u*(., 0)", "v(., 0)", "bridge X_0 | X_T")
    for case in linear_cases(setting, cost=True, dims=(1, 2)):
        exact = _continuous(case)
        errors = zip(*(_chain_errors(_refined(spoil(case, defect), K), case, exact) for K in steps))
        for name, signed in zip(names, map(np.stack, errors)):
            left = np.abs(_at_zero(1 / np.array(steps), signed)).max() / np.abs(signed).max()
            yield compare(f"{name}, d={case.d}: the error at h = 0 by the largest", left, 0.0, 1e-4)


@check(
    "floor-of-euler-chains",
    "MATH 2: the floor",
    kind="continuous",
    implements=[f"{EXACT}.floor", f"{EXACT}.elbo"],
    controls=["noise off by 1 %", "predicted from P in place of Sigma P", "alpha off by 5 %"],
)
def floor(setting: Setting, defect: str) -> Lines:
    """A controlled Euler chain keeps the reference's covariance and so stays KL(P^u || Q_fine) = (h/4) int
    tr((Sigma P_t)^2) dt + O(h^2) above the optimum, v = -alpha x'P_t x/2 + ...: order 1, and the constant as predicted
    (the remainder of the ratio is O(h), so two grids are extrapolated)."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    for case in linear_cases(setting, cost=True, dims=(1, 2, 3), linear_reward=False):
        case = replace(case, cov=0 * case.cov, start="fixed")
        exact, T = _continuous(case), case.grid[-1]
        total = 0.0
        for t, w in zip((nodes + 1) * T / 2, weights * T / 2):
            P, _, _ = _quadratic(lambda y, t=t: exact.value(tensor(y), t).numpy() / case.alpha, case.d)
            noise = np.eye(case.d) if defect.startswith("predicted") else case.sigma_at(t) @ case.sigma_at(t).T
            total += w * np.trace(noise @ P @ noise @ P) / 4
        chains = [sc.exact_solution(_refined(spoil(case, defect), K).problem(), time_steps=K) for K in HALVINGS]
        floors = np.array([float(c.floor) for c in chains])
        yield order(f"floor, d={case.d}", 1 / np.array(HALVINGS), floors)
        ratios = floors * np.array(HALVINGS) / (T * total)
        yield compare(f"floor / prediction, d={case.d}", 2 * ratios[-1] - ratios[-2], 1.0, 2e-3)
        yield compare(
            f"elbo = log Z - floor, d={case.d}", float(chains[0].elbo), float(chains[0].start_log_z - chains[0].floor)
        )
