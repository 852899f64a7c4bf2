"""Processes that stop in a region: their paths, values, hitting probabilities and times, and the correction of the
boundary."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr

import sdecontrol as sc
from sdecontrol.chains.stopped import OVERSHOOT

from ..cases import tensor
from ..registry import Measurement, Setting, check, compare, order, within

Lines = Iterator[Measurement]
PATHS = "sdecontrol.paths.paths.Paths"


def still(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def push(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cos(2 * x) - t[:, None]


@check(
    "stopped-paths",
    "MATH 13: first exit",
    implements=[
        f"{PATHS}.log_ratio",
        f"{PATHS}.kl",
        f"{PATHS}.running_cost",
        f"{PATHS}.stopping_steps",
        "sdecontrol.Region",
    ],
    controls=["region off by 5 %", "log-ratio of a step more", "cost of a step more", "noise off by 1 %"],
)
def stopped_paths(setting: Setting, defect: str) -> Lines:
    """A path ends at its first state in the region: its log-ratio is the sum over k < kappa of differences of Gaussian
    log-densities, its cost that of these steps, and its state stands still; of the control that drew it and of another
    one, for noise that depends on the state."""
    rng, K, T = setting.rng(131), 9, 0.9
    h = T / K
    edge, louder = 1.05 if defect.startswith("region") else 1.0, 1.01 if defect.startswith("noise") else 1.0
    sde = sc.SDE(lambda x, t: torch.sin(x) + t, lambda x, t: louder * (0.9 + 0.2 * torch.sin(x)), dim=1, horizon=T)
    problem = sc.ControlProblem(
        sde, sc.Dirac(tensor([0.3])), running_cost=lambda x, t: x[:, 0] ** 2 + t, stop=lambda x: edge - x[:, 0].abs()
    )
    noise = tensor(rng.normal(size=(K, 200, 1)))
    paths = sc.simulate(problem, 200, control=push, time_steps=K, noise=noise)
    x = paths.states[..., 0].numpy()
    kappa = np.where((np.abs(x) >= 1).any(0), (np.abs(x) >= 1).argmax(0), K)
    runs = np.arange(K)[:, None] < kappa
    t = h * np.arange(K)[:, None]
    mean, scale = x[:-1] + h * (np.sin(x[:-1]) + t), math.sqrt(h) * (0.9 + 0.2 * np.sin(x[:-1]))
    drawn = (x[1:] - mean) / scale
    more = np.arange(K)[:, None] <= kappa
    yield compare("kappa", paths.stopping_steps, kappa, 0.0)
    yield within("states after kappa", float(np.abs((x[1:] - x[:-1]) * ~runs).max()), 0.0)
    for name, control in (("own", push), ("another's", lambda x, t: 0.5 * x + 0.2)):
        u = np.stack([control(tensor(x[k][:, None]), tensor(np.full(200, h * k)))[:, 0] for k in range(K)])
        c = math.sqrt(h) * u
        ratio = 0.5 * (drawn**2 - (drawn - c) ** 2)
        got = paths.log_ratio(None if name == "own" else control)
        yield compare(f"{name} log-ratio", got, (ratio * (more if "ratio" in defect else runs)).sum(0))
        if name == "own":
            yield compare("KL", paths.kl(), (0.5 * c**2 * runs).sum(0))
    cost = h * (x[:-1] ** 2 + t)
    yield compare("running cost", paths.running_cost, (cost * (more if "cost" in defect else runs)).sum(0))


@check(
    "stopped-values",
    "MATH 13: psi of a chain that stops",
    implements=["sdecontrol.exact_solution", "sdecontrol.exact_solution.value", "sdecontrol.exact_solution.log_z"],
    controls=["region off by 1 %", "cost of the stopped state", "reward of the end alone"],
)
def stopped_values(setting: Setting, defect: str) -> Lines:
    """psi_k = exp(r/alpha) in the region, e^{-h f/alpha} E psi_{k+1} outside: the library's panels against a recursion
    on other nodes (the integral over the region in closed form, r being constant there)."""
    K, h, alpha, prize = 4, 0.2, 0.8, 1.1
    edge = 0.707 if defect.startswith("region") else 0.7

    def outside(x: torch.Tensor) -> torch.Tensor:
        return -0.4 * x[:, 0] ** 2

    def reward(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, 0] >= edge, 0.0 if defect.startswith("reward") else prize, outside(x))

    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -x, torch.tensor(0.8, dtype=torch.float64), dim=1, horizon=K * h),
        sc.Dirac(tensor([0.1])),
        reward,
        lambda x, t: 0.5 * torch.cos(x[:, 0]),
        alpha=alpha,
        stop=lambda x: edge - x[:, 0],
    )
    points, weights = np.polynomial.legendre.leggauss(400)
    low, a, s = -6.0, 0.7, 0.8 * math.sqrt(h)
    y, w = low + 0.5 * (a - low) * (points + 1), 0.5 * (a - low) * weights
    kernel = lambda x: np.exp(-0.5 * ((y - (1 - h) * x[:, None]) / s) ** 2) / (s * math.sqrt(2 * math.pi)) * w  # noqa: E731
    inside = math.exp(prize / alpha)

    def before(x: np.ndarray, psi: np.ndarray) -> np.ndarray:
        hit = inside * (1 - ndtr((a - (1 - h) * x) / s))
        return np.exp(-h * 0.5 * np.cos(x) / alpha) * (kernel(x) @ psi + hit)

    psi, x = np.exp(-0.4 * y**2 / alpha), np.array([-0.8, 0.1, 0.5, 0.69])
    for _ in range(K - 1):
        psi = before(y, psi)
    solution = sc.exact_solution(problem, K)
    stopped = inside * (math.exp(-h * 0.5 * math.cos(0.75) / alpha) if defect.startswith("cost") else 1.0)
    want = alpha * np.log(np.append(before(x, psi), stopped))
    yield compare("v(x, 0)", solution.value(tensor(np.append(x, 0.75)[:, None]), 0.0), want)
    yield compare("log Z", solution.log_z, np.log(before(np.array([0.1]), psi))[0])


@check(
    "hitting-probabilities",
    "MATH 13: the committor; Broadie, Glasserman and Kou",
    kind="continuous",
    implements=["sdecontrol.Region", "sdecontrol.exact_solution.log_z", "sdecontrol.exact_solution.control"],
    controls=["no correction", "twice the correction", "region off by 5 %"],
)
def hitting(setting: Setting, defect: str) -> Lines:
    """A chain sees a boundary 0.5826 sqrt(h) |sigma| farther away; enlarged by that it has the hitting probability of
    continuous time, 2 (1 - Phi(a)), up to O(h) here (without it O(sqrt(h))); the committor of (0, 1) is x, and
    u* = sigma grad log q = 1/x."""
    a = 1.2 * (1.05 if defect.startswith("region") else 1.0)
    corrected = not defect.startswith("no")
    sizes, errors = [], []
    for K in (50, 100, 200, 400):
        extra = OVERSHOOT * K**-0.5 if defect.startswith("twice") else 0.0
        stop = sc.Region(lambda x, e=extra: a - e - x[:, 0], boundary_correction=corrected)
        sde = sc.SDE(still, torch.tensor(1.0, dtype=torch.float64), dim=1)
        chain: Any = sc.ControlProblem(sde, sc.Dirac(tensor([0.0])), stop=stop).chain(K)
        event = lambda x, c=chain: torch.where(c.inside(x), 0 * x[:, 0], -torch.inf)  # noqa: E731
        found = sc.exact_solution(sc.ControlProblem(sde, sc.Dirac(tensor([0.0])), event, stop=stop), K)
        sizes.append(1 / K)
        errors.append(abs(float(found.log_z.exp()) - 2 * (1 - ndtr(1.2))))
    yield within("P(hit), K = 400", errors[-1], 3e-4)
    yield order("P(hit)", sizes, errors, 1.0, 0.2)
    stop = sc.Region(lambda x: torch.minimum(x[:, 0], 1 - x[:, 0]), boundary_correction=corrected)
    sde = sc.SDE(still, torch.tensor(1.0, dtype=torch.float64), dim=1, horizon=2.0)
    up = lambda x: torch.where(x[:, 0] > 0.5, 0 * x[:, 0], -torch.inf)  # noqa: E731
    found = sc.exact_solution(sc.ControlProblem(sde, sc.Dirac(tensor([0.3])), up, stop=stop), 200)
    x = np.array([0.3, 0.5, 0.7])
    yield compare("q(x)", found.value(tensor(x[:, None]), 0.0).exp(), x, 2e-3)
    yield compare("u*(x)", found.control(tensor(x[:, None]), 0.0)[:, 0], 1 / x, 2e-2)


@check(
    "passage-times",
    "MATH 13: hitting on a finite space",
    implements=["sdecontrol.JumpProcess", "sdecontrol.exact_solution.log_z", "sdecontrol.exact_solution.control"],
    controls=["cost off by 5 %", "no stopping", "one end alone"],
)
def passage(setting: Setting, defect: str) -> Lines:
    """On a finite space E exp(-s tau) solves (s - Q) psi = 0 outside of the region, psi = 1 in it, and the probability
    to be ruined (s - Q) q = 0 with its own values; the chain's exact tilt has weights that do not vary."""
    rng, n, s = setting.rng(133), 6, 0.3
    rates = rng.uniform(0.5, 2.0, size=(n, n)) * (np.abs(np.subtract.outer(np.arange(n), np.arange(n))) == 1)
    Q = rates - np.diag(rates.sum(1))
    ends = [0] if defect.startswith("one") else [0, n - 1]
    region = None if defect.startswith("no") else lambda x: (x == tensor(ends).long()).any(1)
    price = s * (1.05 if defect.startswith("cost") else 1.0)
    process = sc.JumpProcess(tensor(Q), horizon=60.0)
    outer, inner = [0, n - 1], list(range(1, n - 1))
    for what, reward, stopped in (
        ("E exp(-s tau)", lambda x: 0.0 * x[:, 0].double(), np.ones(2)),
        ("E exp(2 1_0 - s tau)", lambda x: 2.0 * (x[:, 0] == 0).double(), np.exp([2.0, 0.0])),
    ):
        problem = sc.ControlProblem(
            process, sc.Dirac(torch.tensor([2])), reward, lambda x, t: price + 0.0 * x[:, 0].double(), stop=region
        )
        psi = np.linalg.solve(s * np.eye(n - 2) - Q[np.ix_(inner, inner)], Q[np.ix_(inner, outer)] @ stopped)
        yield compare(what, sc.exact_solution(problem).log_z.exp(), psi[1], 1e-7)
    chain = sc.exact_solution(problem, 30)
    log_w = sc.simulate(problem, 64, control=chain.control, seed=setting.seed).log_weights()
    yield compare("log w of the tilt", log_w, np.full(64, float(chain.log_z)))


@check(
    "shifts-of-stopped-chains",
    "MATH 13: first exit; MATH 2: the floor",
    implements=["sdecontrol.exact_solution.control", "sdecontrol.exact_solution.elbo"],
    controls=["region off by 5 %", "alpha off by 5 %", "reward of the end alone"],
)
def stopped_shifts(setting: Setting, defect: str) -> Lines:
    """The best mean shift of a chain that stops maximises E V_{k+1}(m + s (c + xi)) - c^2/2 at each state, V the reward
    in the region: of two steps by nodes of its own and a search over c, with the reward's parts in closed form; what it
    reaches is the ELBO, and no more than log Z."""
    h, sigma, alpha, prize, edge = 0.25, 0.8, 0.7 * (1.05 if defect.startswith("alpha") else 1.0), 1.1, 0.7
    a = 1.05 * edge if defect.startswith("region") else edge
    gain = 0.0 if defect.startswith("reward") else prize
    reward = lambda x: torch.where(x[:, 0] >= a, gain, -0.4 * x[:, 0] ** 2)  # noqa: E731
    sde = sc.SDE(lambda x, t: -x, torch.tensor(sigma, dtype=torch.float64), dim=1, horizon=2 * h)
    problem = sc.ControlProblem(sde, sc.Dirac(tensor([0.1])), reward, alpha=alpha, stop=lambda x: a - x[:, 0])
    exact, s = sc.exact_solution(problem, 2), sigma * math.sqrt(h)
    shifts = np.linspace(-3.0, 4.0, 1401)

    def best(level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The largest of ``level - c^2/2 (rows, shifts)`` and where it is, by a parabola through the three nearest."""
        score = level - 0.5 * shifts**2
        i, rows, step = score.argmax(1), np.arange(len(score)), shifts[1] - shifts[0]
        lo, mid, hi = (score[rows, i + j] for j in (-1, 0, 1))
        move = 0.5 * (lo - hi) / (lo - 2 * mid + hi)
        return mid - 0.25 * (lo - hi) * move, shifts[i] + step * move

    def last(x: np.ndarray) -> np.ndarray:
        """E r/alpha after the last step, ``(rows, shifts)``."""
        m = (1 - h) * x[:, None] + s * shifts
        z = (edge - m) / s
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        outside = (m**2 + s**2) * ndtr(z) - s * (m + edge) * density
        return (prize * ndtr(-z) - 0.4 * outside) / 0.7

    points, weights = np.polynomial.legendre.leggauss(600)
    y, w = -6.0 + 0.5 * (edge + 6.0) * (points + 1), 0.5 * (edge + 6.0) * weights
    after = best(last(y))[0]
    x = np.array([0.1, -0.5, 0.6])
    m = (1 - h) * x[:, None] + s * shifts
    kernel = np.exp(-0.5 * ((y - m[..., None]) / s) ** 2) / (s * math.sqrt(2 * math.pi)) * w
    top, c = best(kernel @ after + prize / 0.7 * ndtr(-(edge - m) / s))
    yield compare("ELBO", float(exact.elbo), float(top[0]), 1e-6)
    yield within("ELBO above log Z", float(exact.elbo - exact.log_z), 0.0)
    yield compare("u(x, 0)", exact.control(tensor(x[:, None]), 0.0)[:, 0], c / math.sqrt(h), 1e-4)
    late = best(last(x))[1]
    yield compare("u(x, h)", exact.control(tensor(x[:, None]), h)[:, 0], late / math.sqrt(h), 1e-4)
