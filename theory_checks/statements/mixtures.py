"""Sections 4 and 8 on pre-trained models whose data are a Gaussian mixture: everything in closed form.

The independent side is the finite-dimensional law of the noising process, component by component one dense Gaussian of
(data, noisier, ..., noise, learned start), tilted at its data end. An Euler chain of such a model has no closed form,
so that these statements are in continuous time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import sdecontrol as sc

from ..cases import tensor
from ..gaussian import Affine, Joint, log_density, path_law
from ..registry import Measurement, Setting, check, compare

EXACT = "sdecontrol.exact_solution"
Lines = Iterator[Measurement]

Levels = tuple[float, float]


def logsumexp(x: np.ndarray, axis: int | None = None, keepdims: bool = False) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=axis, keepdims=keepdims)) + (top if keepdims else top.squeeze(axis))


def vp_levels(beta_min: float, beta_max: float, s: float) -> Levels:
    """``mu, std`` of VP at noising time s, from integrating ``dx = -beta/2 x ds + sqrt(beta) dw``."""
    spent = beta_min * s + 0.5 * (beta_max - beta_min) * s * s
    return np.exp(-0.5 * spent), np.sqrt(1 - np.exp(-spent))


@dataclass(frozen=True)
class MixtureCase:
    """Data ``sum_i w_i N(m_i, C_i)`` under VP noise, a quadratic or linear reward."""

    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray
    G: np.ndarray
    g: np.ndarray
    alpha: float
    beta: tuple[float, float] = (0.8, 3.0)
    start: str = "controlled"

    @property
    def d(self) -> int:
        return len(self.g)

    def sde(self) -> Any:
        mixture = sc.GaussianMixture(tensor(self.weights), tensor(self.means), tensor(self.covs))
        return sc.generative_sde(mixture, schedule=sc.VP(*self.beta))

    @cached_property
    def exact(self):
        reward = sc.Quadratic(tensor(self.G), tensor(self.g)) if self.G.any() else sc.Linear(tensor(self.g))
        return sc.exact_solution(sc.ControlProblem(self.sde(), reward=reward, alpha=self.alpha, start=self.start))

    # ------------------------------------------------------------ dense laws

    def joints(self, times: tuple[float, ...]) -> list[Joint]:
        """Per component, the law of ``(X_1, X_{times[0]}, X_{times[1]}, ...)`` for falling process times."""
        steps: list[Affine] = []
        eye, now, where = np.eye(self.d), 1.0, [0]
        for t in times:
            steps += self._noisier(now, max(t, 0.0), eye)
            if t < 0:
                steps += self._earlier(t, min(now, 0.0), eye)
            elif not steps:
                steps.append((eye, np.zeros(self.d), 0 * eye))
            where.append(len(steps))
            now = t
        return [path_law(m, C, steps).of(*where) for m, C in zip(self.means, self.covs)]

    def _noisier(self, now: float, t: float, eye: np.ndarray) -> list[Affine]:
        if now <= t:
            return []
        (mu, std), (new_mu, new_std) = vp_levels(*self.beta, 1 - now), vp_levels(*self.beta, 1 - t)
        ratio = new_mu / mu
        return [(ratio * eye, np.zeros(self.d), np.sqrt(new_std**2 - (ratio * std) ** 2) * eye)]

    def _earlier(self, t: float, now: float, eye: np.ndarray) -> list[Affine]:
        """The Brownian bridge from (-1, mean of X_0) to X_now, at t < now <= 0."""
        start = [j.of(1) for j in self.joints((0.0,))]
        mean = self.weights @ np.stack([j.mean for j in start])
        spreads = np.stack([j.cov + np.outer(j.mean - mean, j.mean - mean) for j in start])
        spread = np.einsum("i,ijk->jk", self.weights, spreads)
        past = (1 + t) / (1 + now)
        values, vectors = np.linalg.eigh(spread)
        root = vectors * np.sqrt(values)
        return [(past * eye, (1 - past) * mean, np.sqrt((1 + t) * (1 - past)) * root)]

    def optimum(self, times: tuple[float, ...]) -> tuple[np.ndarray, list[Joint], float]:
        """The same law times ``exp(r(X_1)/alpha)/Z``: log weights, components, log Z."""
        joints = self.joints(times)
        n = joints[0].blocks
        P, q = np.zeros((n * self.d, n * self.d)), np.zeros(n * self.d)
        P[: self.d, : self.d], q[: self.d] = self.G / self.alpha, self.g / self.alpha
        parts = [joint.tilted(P, q) for joint in joints]
        logs = np.log(self.weights) + np.array([z for _, z in parts])
        return logs - logsumexp(logs), [law for law, _ in parts], float(logsumexp(logs))

    def log_reference(self, t: float, x: np.ndarray) -> np.ndarray:
        return mixture_log_density(x, np.log(self.weights), [j.of(1) for j in self.joints((t,))])

    def log_optimum(self, t: float, x: np.ndarray) -> np.ndarray:
        logs, parts, _ = self.optimum((t,))
        return mixture_log_density(x, logs, [p.of(1) for p in parts])

    def value(self, t: float, x: np.ndarray) -> np.ndarray:
        """``alpha log E[exp(r(X_1)/alpha) | X_t = x]`` point by point: posterior of the components, then the tilt of
        each."""
        joints, values = self.joints((t,)), []
        for row in x:
            logs = np.log(self.weights) + np.array([j.of(1).log_prob(row) for j in joints])
            tilts = []
            for joint in joints:
                M, b, Q = joint.regression([0], [1])
                tilts.append(Joint(M @ row + b, Q, self.d).tilted(self.G / self.alpha, self.g / self.alpha)[1])
            values.append(self.alpha * (logsumexp(logs + np.array(tilts)) - logsumexp(logs)))
        return np.array(values)

    def posterior_mean(self, t: float, x: np.ndarray) -> np.ndarray:
        """``E[X_1 | X_t = x]``, ``(n, d)``, by conditioning (not by Tweedie's formula)."""
        joints = self.joints((t,))
        logs = np.log(self.weights) + np.stack([j.of(1).log_prob(x) for j in joints], -1)
        shares = np.exp(logs - logsumexp(logs, axis=-1, keepdims=True))
        means = np.stack([x @ M.T + b for M, b, _ in (j.regression([0], [1]) for j in joints)], -1)
        return (shares[:, None] * means).sum(-1)

    def reward(self, x: np.ndarray) -> np.ndarray:
        return -0.5 * np.einsum("ni,ij,nj->n", x, self.G, x) + x @ self.g


def mixture_log_density(x: np.ndarray, log_weights: np.ndarray, parts: list[Joint]) -> np.ndarray:
    return logsumexp(log_weights + np.stack([log_density(x, p.mean, p.cov) for p in parts], -1), axis=-1)


def mixture_cases(setting: Setting, dims: tuple[int, ...] = (1, 2, 3)) -> Iterator[MixtureCase]:
    """Random mixtures of 2 or 3 components with full covariances; quadratic rewards, one linear."""
    rng = setting.rng(31)
    for _ in range(setting.count(1, 4)):
        for d in dims:
            n = 2 + d % 2
            roots = rng.normal(size=(n, d, d)) * 0.3
            curved = np.eye(d) * 0.4 + 0.2 * np.ones((d, d))
            yield MixtureCase(
                weights=rng.dirichlet(3 * np.ones(n)),
                means=1.5 * rng.normal(size=(n, d)),
                covs=roots @ roots.transpose(0, 2, 1) + 0.15 * np.eye(d),
                G=0 * curved if d == 2 else curved,
                g=rng.normal(size=d) + 0.5,
                alpha=rng.uniform(0.6, 1.4),
            )


SPOILED = {
    "alpha off by 5 %": lambda c: replace(c, alpha=1.05 * c.alpha),
    "sign of g flipped": lambda c: replace(c, g=-c.g),
    "noise off by 1 %": lambda c: replace(c, beta=(c.beta[0] * 1.02, c.beta[1] * 1.02)),
    "data off by 1 %": lambda c: replace(c, means=1.01 * c.means),
}


def spoil(case: MixtureCase, defect: str) -> MixtureCase:
    return SPOILED[defect](case) if defect in SPOILED else case


TIMES = (1.0, 0.7, 0.35, 0.0)
EARLY = (-0.3, -0.8)


@check(
    "theorem-1-mixture",
    "Theorem 1",
    implements=[f"{EXACT}.marginal", f"{EXACT}.log_z", "sdecontrol.generative_sde"],
    controls=["alpha off by 5 %", "sign of g flipped", "data off by 1 %", "components' weights kept"],
)
def theorem_1(setting: Setting, defect: str) -> Lines:
    """For a mixture, p_r is the mixture with tilted components and weights w_i Z_i: the library's ``marginal(T)`` has
    this density at random points, and its ``log_z`` is the log of sum_i w_i Z_i."""
    for case in mixture_cases(setting):
        x = 1.5 * setting.rng(32).normal(size=(6, case.d))
        logs, parts, log_z = case.optimum((1.0,))
        if defect == "components' weights kept":
            logs = np.log(case.weights)
        exact = spoil(case, defect).exact
        yield compare(
            f"log p_r, d={case.d}",
            exact.marginal(1.0).log_prob(tensor(x)),
            mixture_log_density(x, logs, [p.of(1) for p in parts]),
        )
        yield compare(f"log Z, d={case.d}", exact.log_z, log_z)


@check(
    "theorem-2-mixture",
    "Theorem 2, Lemma 2",
    implements=[f"{EXACT}.value", f"{EXACT}.marginal"],
    controls=["alpha off by 5 %", "noise off by 1 %", "Tweedie's value", "data off by 1 %"],
)
def theorem_2(setting: Setting, defect: str) -> Lines:
    """p*_t = exp(v_t/alpha) p_pre_t / C with C = Z at all t, the learned start included; v_t is the conditional
    expectation of Lemma 2 and p*_t the marginal of the dense tilted law."""
    for case in mixture_cases(setting):
        exact = spoil(case, defect).exact
        for t in (*TIMES, *EARLY):
            x = 1.2 * setting.rng(33).normal(size=(5, case.d))
            value = exact.value(tensor(x), t)
            if defect == "Tweedie's value":
                value = tensor(case.reward(case.posterior_mean(t, x)))
            log_optimum = exact.marginal(t).log_prob(tensor(x))
            yield compare(f"v_t at t={t:g}, d={case.d}", value, case.value(t, x))
            yield compare(f"log p*_t at t={t:g}, d={case.d}", log_optimum, case.log_optimum(t, x))
            log_c = value.numpy() / case.alpha + case.log_reference(t, x) - log_optimum.numpy()
            yield compare(f"log C at t={t:g}, d={case.d}", log_c, np.full(len(x), case.optimum((1.0,))[2]))


@check(
    "theorem-3-mixture",
    "Theorem 3",
    implements=[f"{EXACT}.bridge"],
    controls=["noise off by 1 %", "data off by 1 %", "s and t exchanged"],
)
def theorem_3(setting: Setting, defect: str) -> Lines:
    """The backward conditionals of the optimum are the noising process's own, the same for every component: the
    library's ``bridge`` against the regression of X_s on X_t in the dense tilted law."""
    for case in mixture_cases(setting):
        exact = spoil(case, defect).exact
        for s, t in ((0.35, 0.7), (0.0, 1.0), (0.0, 0.35), (-0.4, 0.5), (-0.8, -0.3)):
            x = setting.rng(34).normal(size=(2, case.d))
            _, parts, _ = case.optimum((t, s))
            law = exact.bridge(s, t, tensor(x))
            for part in parts:
                M, b, Q = part.regression([1], [2]) if defect.startswith("s and t") else part.regression([2], [1])
                yield compare(f"mean of X_{s:g} | X_{t:g}, d={case.d}", law.mean, x @ M.T + b)
                yield compare(f"covariance of X_{s:g} | X_{t:g}, d={case.d}", law.covariance_matrix[0], Q)


@check(
    "optimal-control-mixture",
    "[27], Remark 5; Lemma 2 of 2402.15194",
    implements=[f"{EXACT}.control", "sdecontrol.generative_sde"],
    controls=["alpha off by 5 %", "noise off by 1 %", "Tweedie's value", "sign of g flipped"],
)
def control(setting: Setting, defect: str) -> Lines:
    """u*(x, t) = g(t) grad v(x, t)/alpha with g^2 = beta: the library's control against the numerical gradient of the
    dense value; in the learned start S^(1/2) grad v/alpha."""
    for case in mixture_cases(setting):
        exact = spoil(case, defect).exact
        x = setting.rng(35).normal(size=(3, case.d))
        spread = case.sde().marginal(0.0).covariance_matrix.numpy()
        values, vectors = np.linalg.eigh(spread)
        for t in (0.9, 0.35, 0.0, -0.5):
            if defect == "Tweedie's value":
                f = lambda y, t=t: case.reward(case.posterior_mean(t, y))  # noqa: E731
            else:
                f = lambda y, t=t: case.value(t, y)  # noqa: E731
            beta = case.beta[0] + (case.beta[1] - case.beta[0]) * (1 - t)
            root = np.sqrt(beta) * np.eye(case.d) if t >= 0 else (vectors * np.sqrt(values)) @ vectors.T
            yield compare(f"u* at t={t:g}, d={case.d}", exact.control(tensor(x), t), gradient(f, x) @ root / case.alpha)


def gradient(f, x: np.ndarray, step: float = 0.02) -> np.ndarray:
    """Numerical gradient ``(n, d)`` of ``f: (n, d) -> (n,)``: central differences, three times extrapolated."""
    out = np.zeros_like(x)
    for i in range(x.shape[1]):
        e = np.zeros(x.shape[1])
        e[i] = 1.0
        levels = [(f(x + h * e) - f(x - h * e)) / (2 * h) for h in (step, step / 2, step / 4, step / 8)]
        for p in (4, 16, 64):
            levels = [(p * b - a) / (p - 1) for a, b in pairwise(levels)]
        out[:, i] = levels[0]
    return out


@check(
    "eq-37-classifier",
    "Section 8.1, [37]",
    implements=["sdecontrol.LogProb"],
    controls=["alpha off by 5 %", "another label"],
)
def classifier(setting: Setting, defect: str) -> Lines:
    """Classifier guidance is value guidance with r = log p(y|x), alpha = 1: for a classifier of two Gaussian classes,
    ``LogProb`` is the log posterior, and p(y|x) p(x) summed over y gives back p(x)."""
    rng = setting.rng(36)
    for d in (1, 2, 3):
        means, prior = rng.normal(size=(2, d)), np.array([0.3, 0.7])
        x = rng.normal(size=(7, d))
        joint = np.stack([np.log(p) + log_density(x, m, np.eye(d)) for p, m in zip(prior, means)], -1)

        def logits(y: torch.Tensor, means: np.ndarray = means) -> torch.Tensor:
            return y @ tensor(means).mT - 0.5 * tensor(means).square().sum(-1) + tensor(prior).log()

        label = 0 if defect == "another label" else 1
        scale = 1.05 if defect.startswith("alpha") else 1.0
        got = sc.LogProb(logits, label)(tensor(x)) / scale
        yield compare(f"log p(y|x), d={d}", got, joint[:, 1] - logsumexp(joint, axis=-1))
        labels = torch.ones(len(x))
        yield compare(
            f"log p(y|x) by condition, d={d}",
            sc.LogProb(logits, None)(tensor(x), labels * label) / scale,
            joint[:, 1] - logsumexp(joint, axis=-1),
        )
