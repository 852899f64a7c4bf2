"""Exact solutions on grids and as series: against dense Gaussian laws, and on the sphere and the torus against closed
forms of Brownian motion and of its chain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import dawsn

import sdecontrol as sc
from sdecontrol.exact.grid_chain import GridChainSolution
from sdecontrol.exact.grid_process import GridSolution

from ..cases import LinearCase, spoil, tensor
from ..registry import Measurement, Setting, check, compare, within
from ..statistics import z_test
from .estimators import one_dimensional

EXACT = "sdecontrol.exact_solution"
Lines = Iterator[Measurement]


def plain(case: LinearCase) -> sc.ControlProblem:
    """The problem of a case in one dimension with nothing of it declared: drift, noise, reward and cost are plain
    functions."""
    A, slope, offset, sigma = (float(v.ravel()[0]) for v in (case.A, case.slope, case.offset, case.sigma))
    G, g = float(case.G[0, 0]), float(case.g[0])

    def drift(x: torch.Tensor, t: Any) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=x.dtype)
        return (A + t * slope) * x + (1 + case.growth * t) * offset

    cost = None if case.F is None else lambda x, t: 0.5 * (1 + 0.7 * t) * float(case.F[0, 0]) * x[:, 0] ** 2  # type: ignore[index]
    size = lambda x, t: (1 + case.growth * torch.as_tensor(t, dtype=x.dtype)) * sigma * torch.ones_like(x)  # noqa: E731
    sde = sc.SDE(drift, size, dim=1, horizon=case.grid[-1])
    point = not case.cov.any()
    initial = sc.Dirac(tensor(case.mean)) if point else sc.Gaussian(tensor(case.mean), tensor(case.cov))
    reward = lambda x: -0.5 * G * x[:, 0] ** 2 + g * x[:, 0]  # noqa: E731
    return sc.ControlProblem(sde, initial, reward, cost, alpha=case.alpha, start=None if point else case.start)


@check(
    "grids-of-chains",
    "MATH 8: one or two dimensions, any r",
    implements=[f"{EXACT}.{name}" for name in ("value", "control", "kernel", "marginal", "log_z", "elbo", "floor")],
    controls=["alpha off by 5 %", "noise off by 1 %", "drift off by 1 %", "running cost left out", "step read late"],
)
def grids_of_chains(setting: Setting, defect: str) -> Lines:
    """Where nothing is declared, the recursion on a grid has the values, kernels, marginals, best shifts, log Z and
    ELBO of the dense Gaussian law of a linear-quadratic chain, with noise and drift that depend on time and a running
    cost."""
    for case in one_dimensional(setting):
        problem = plain(spoil(case, defect))
        chain = problem.chain(list(case.grid), "euler")
        grid: Any = sc.exact_solution(problem, list(case.grid))
        yield within("it is no grid", float(not isinstance(grid, GridChainSolution)), 0.0)
        best, log_z = case.optimum()
        U, w = case.chain().control()
        x = np.linspace(-0.6, 0.6, 3)[:, None] + case.mean
        late = int(defect.startswith("step"))
        for k in range(case.K - late):
            v = grid.value(tensor(x), case.grid[k + late])
            yield compare(f"v_{k}", v, case.value(k, x), 1e-8)
            yield compare(f"u_{k}", grid.control(tensor(x), case.grid[k]), x @ U[k].T + w[k], 1e-8)
            yield compare(
                f"c_{k}",
                grid.control.on_chain(chain)(k, tensor(x), None)[:, 0] / case.h[k] ** 0.5,
                (x @ U[k].T + w[k])[:, 0],
                1e-8,
            )
        kernel, (M, b, root) = grid.kernel(tensor(x), 1), case.chain().kernel(1)
        yield compare("mean of p*(x_2 | x_1)", kernel.mean, x @ M.T + b, 1e-8)
        yield compare("variance of p*(x_2 | x_1)", kernel.variance[:, 0], np.full(3, root[0, 0] ** 2), 1e-8)
        for k in (1, case.K):
            law = grid.marginal(case.grid[k])
            yield compare(f"mean at step {k}", law.mean, best.of(k).mean, 1e-8)
            yield compare(f"variance at step {k}", law.variance, np.diag(best.of(k).cov), 1e-8)
            at = best.of(k).mean + 0.3
            yield compare(
                f"log density at step {k}", law.log_prob(tensor(at[None])), best.of(k).log_prob(at[None]), 1e-7
            )
        yield compare("log Z", float(grid.log_z), log_z, 1e-8)
        yield compare("ELBO", float(grid.elbo), float(case.chain().exact.elbo), 1e-8)
        yield compare("floor", float(grid.floor), log_z - float(case.chain().exact.elbo), 1e-8)
        if defect:
            continue
        draws = grid.sample(4000, seed=setting.seed)[:, 0].double().numpy()
        spread = math.sqrt(best.of(-1).cov[0, 0])
        yield within(
            "mean of draws, in standard errors", abs(draws.mean() - best.of(-1).mean[0]) / spread * 4000**0.5, 6.0
        )


@check(
    "grids-of-processes",
    "MATH 8: one or two dimensions, any r",
    kind="continuous",
    implements=[f"{EXACT}.value", f"{EXACT}.control", f"{EXACT}.log_z"],
    controls=["alpha off by 5 %", "noise off by 1 %", "drift off by 1 %"],
)
def grids_of_processes(setting: Setting, defect: str) -> Lines:
    """The linear equation of psi on a grid, of a problem in one dimension with nothing declared and of a pair of
    coordinates that act on each other, has the values of the Riccati equations (and their u*), which dense laws
    check."""
    case = next(iter(one_dimensional(setting)))
    want, grid = sc.exact_solution(case.problem()), sc.exact_solution(plain(spoil(case, defect)))
    yield within("it is no grid", float(not isinstance(grid, GridSolution)), 0.0)
    x = np.linspace(-0.6, 0.6, 3)[:, None] + case.mean
    yield compare("log Z", float(grid.log_z), float(want.log_z), 1e-6)
    for t in (0.0, 0.5 * case.grid[-1]):
        yield compare(f"v(x, {t:.2g})", grid.value(tensor(x), t), want.value(tensor(x), t), 1e-6)
        yield compare(f"u*(x, {t:.2g})", grid.control(tensor(x), t), want.control(tensor(x), t), 1e-5)
    A = np.array([[-0.5, 0.6], [-0.4, -0.2]]) * (1.01 if defect.startswith("drift") else 1.0)
    s = 0.7 * (1.01 if defect.startswith("noise") else 1.0)
    alpha = 1.3 * (1.05 if defect.startswith("alpha") else 1.0)
    reward = lambda x: x[:, 0] - 0.3 * x[:, 0] * x[:, 1] - 0.2 * x[:, 1] ** 2  # noqa: E731
    pair = sc.ControlProblem(
        sc.SDE(lambda x, t: x @ tensor(A).mT, torch.tensor(s, dtype=torch.float64), dim=2),
        sc.Dirac(tensor([0.3, -0.1])),
        reward,
        alpha=alpha,
    )
    sde = sc.LinearSDE(tensor([[-0.5, 0.6], [-0.4, -0.2]]), torch.tensor(0.7, dtype=torch.float64))
    quadratic = sc.Quadratic(tensor([[0.0, 0.3], [0.3, 0.4]]), tensor([1.0, 0.0]))
    want = sc.exact_solution(sc.ControlProblem(sde, sc.Dirac(tensor([0.3, -0.1])), quadratic, alpha=1.3))
    grid = sc.exact_solution(pair)
    x = np.array([[0.3, -0.1], [0.8, 0.4]])
    yield compare("log Z of a pair", float(grid.log_z), float(want.log_z), 1e-5)
    yield compare("v(x, 0.3) of a pair", grid.value(tensor(x), 0.3), want.value(tensor(x), 0.3), 1e-5)
    yield compare("u*(x, 0.3) of a pair", grid.control(tensor(x), 0.3), want.control(tensor(x), 0.3), 1e-4)


def _first_factor(spread: float) -> float:
    """``E[<x, x'>]`` of a step of Brownian motion on S^2 by the exponential map, of this standard deviation."""
    return 1 - math.sqrt(2) * spread * float(dawsn(spread / math.sqrt(2)))


@check(
    "brownian-motion-on-manifolds",
    "MATH 12: manifolds",
    kind="statistical",
    implements=["sdecontrol.ManifoldSDE", "sdecontrol.Sphere", "sdecontrol.Torus", "sdecontrol.simulate"],
    tests=6,
    controls=["noise off by 2 %", "a step left out", "weights without their half squares"],
)
def brownian(setting: Setting, defect: str) -> Lines:
    """Paths of the chain of Brownian motion on S^2 have E<x_0, x_K> = m_1^K, m_1 = 1 - sqrt(2h) D(sqrt(h/2)) (D
    Dawson's integral); on the circle E cos(x_K - x_0) = e^{-T/2}; and with a control, whose normal parts cost nothing,
    the paths' weights give the same numbers."""
    n, K, sigma, T = setting.count(60_000, 600_000), 4, 0.9, 1.2
    size = 1.02 if defect.startswith("noise") else 1.0
    steps = K - 1 if defect.startswith("a step") else K
    point, up = tensor([0.0, 0.6, -0.8]), tensor([0.3, -0.2, 1.0])
    problem = sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), None, size * sigma, T), sc.Dirac(point))
    want = _first_factor(sigma * math.sqrt(T / K)) ** steps
    circle = sc.ControlProblem(sc.ManifoldSDE(sc.Torus(1), None, size * sigma, T), sc.Dirac(tensor([2.9])))
    decay = math.exp(-0.5 * sigma**2 * T * steps / K)
    for name, made, control, seen, value in (
        ("sphere", problem, lambda x, t: up - 0.4 * x.roll(1, 1), lambda x: x @ point, want),
        ("circle", circle, lambda x, t: 0.5 * torch.sin(x) + 0.3, lambda x: torch.cos(x[:, 0] - 2.9), decay),
    ):
        paths = sc.simulate(made, n, time_steps=K, seed=setting.seed)
        yield z_test(f"{name}, reference", seen(paths.end), value)
        paths = sc.simulate(made, n, control, time_steps=K, seed=setting.seed + 1)
        ratio = paths.log_ratio() - (paths.kl() if defect.startswith("weights") else 0.0)
        yield z_test(f"{name}, weighted paths of a control", (-ratio).exp() * seen(paths.end), value)
        yield z_test(f"{name}, E_P[dQ0/dP]", (-ratio).exp(), 1.0)


@check(
    "theorem-1-manifolds",
    "Theorem 1, Theorem 2, Lemma 2, MATH 12",
    implements=[f"{EXACT}.value", f"{EXACT}.control", f"{EXACT}.marginal", f"{EXACT}.log_z", "sdecontrol.ManifoldSDE"],
    controls=["noise off by 1 %", "alpha off by 5 %", "chain taken for the process", "reward off by 1 %"],
)
def theorem_1_manifolds(setting: Setting, defect: str) -> Lines:
    """Where exp(r/alpha) has few harmonics psi is known: 2 + q <n, x> on S^2, q its decay in continuous time or on the
    chain, and Fourier modes on the torus; then v = alpha log psi, u* = sigma grad log psi, log Z = log psi(x_0), and
    the law of the end is the reference's times exp(r/alpha)/Z, at every time times psi."""
    sigma, T, K, alpha = 0.9, 1.2, 4, 0.6
    noise, used = (
        sigma * (1.01 if defect.startswith("noise") else 1.0),
        alpha * (1.05 if defect.startswith("al") else 1.0),
    )
    n, point = tensor([0.6, 0.0, 0.8]), tensor([0.0, 0.6, -0.8])
    tilt = n * (1.01 if defect.startswith("reward") else 1.0)
    sphere = sc.Sphere(2)
    x = sphere.draw((20,), torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = sc.ManifoldSDE(sphere, None, noise, T)
    reward = lambda y: alpha * (2 + y @ tilt).log()  # noqa: E731
    problem = sc.ControlProblem(reference, sc.Dirac(point), reward, alpha=used)
    factor = _first_factor(sigma * math.sqrt(T / K))
    for name, exact, decays in (
        ("process", sc.exact_solution(problem), {t: math.exp(-(sigma**2) * (T - t)) for t in (0.0, 0.6, T)}),
        ("chain", sc.exact_solution(problem, K), {T * k / K: factor ** (K - k) for k in (0, 2, K)}),
    ):
        for t, q in decays.items():
            if defect.startswith("chain") and name == "chain":
                q = math.exp(-(sigma**2) * (T - t))
            psi = 2 + q * x @ n
            yield compare(f"v(x, {t:g}), {name}", exact.value(x, t), alpha * psi.log(), 1e-9)
            if t < T and name == "process":
                want = sigma * q * sphere.tangent(x, n.expand_as(x)) / psi[:, None]
                yield compare(f"u*(x, {t:g})", exact.control(x, t), want, 1e-9)
        q = decays[0.0]
        yield compare(f"log Z, {name}", float(exact.log_z), math.log(2 + q * float(point @ n)), 1e-9)
        flat = sc.ControlProblem(sc.ManifoldSDE(sphere, None, sigma, T), sc.Dirac(point), None, alpha=alpha)
        plain_ = sc.exact_solution(flat) if name == "process" else sc.exact_solution(flat, K)
        want = plain_.marginal(T).log_prob(x) + (2 + x @ n).log() - math.log(2 + q * float(point @ n))
        yield compare(f"density of the end, {name}", exact.marginal(T).log_prob(x), want, 1e-8)
    yield from _torus(noise, used, alpha, sigma, 1.01 if defect.startswith("reward") else 1.0)


def _torus(noise: float, used: float, alpha: float, sigma: float, size: float) -> Lines:
    T, K = 1.2, 4
    x = sc.Torus(2).draw((20,), torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

    def psi(y: torch.Tensor, s: float, size: float = 1.0) -> torch.Tensor:
        slow, fast = math.exp(-s / 2), math.exp(-5 * s / 2)
        return 3 + size * (slow * y[:, 0].cos() + fast * (2 * y[:, 1] - y[:, 0]).sin())

    reference = sc.ManifoldSDE(sc.Torus(2), None, noise, T)
    problem = sc.ControlProblem(
        reference, sc.Dirac(torch.zeros(2).double()), lambda y: alpha * psi(y, 0.0, size).log(), alpha=used
    )
    for name, exact in (("process", sc.exact_solution(problem)), ("chain", sc.exact_solution(problem, K))):
        for t in (0.0, 0.6):
            log_psi = psi(x, sigma**2 * (T - t)).log()
            slope = torch.autograd.grad(log_psi.sum(), x)[0]
            yield compare(f"v(x, {t:g}), torus, {name}", exact.value(x.detach(), t), alpha * log_psi, 1e-9)
            yield compare(f"u*(x, {t:g}), torus, {name}", exact.control(x.detach(), t), sigma * slope, 1e-8)


@check(
    "bellman-on-manifolds",
    "[19], [20], MATH 12",
    implements=[f"{EXACT}.value", f"{EXACT}.control", "sdecontrol.ManifoldSDE"],
    controls=["running cost off by 5 %", "drift off by 1 %", "alpha off by 5 %"],
)
def bellman(setting: Setting, defect: str) -> Lines:
    """exp(v_k/alpha) = e^{-h f/alpha} E exp(v_{k+1}(x')/alpha) and the best shift is E_{p*} xi, x' by the chain's own
    step over nodes of its noise: on the circle, with a drift and a running cost that depend on time."""
    T, K, alpha, sigma = 1.2, 4, 0.6, 0.9
    push = 1.01 if defect.startswith("drift") else 1.0
    price = 1.05 if defect.startswith("running") else 1.0
    used = alpha * (1.05 if defect.startswith("alpha") else 1.0)

    def problem(push: float, price: float, alpha: float) -> sc.ControlProblem:
        drift = lambda x, t: push * (0.8 * (1 + t) * x.sin() + 0.3)  # noqa: E731
        cost = lambda x, t: price * (0.4 + t) * x[:, 0].cos().square()  # noqa: E731
        reward = lambda x: (x[:, 0] - 1).cos() + 0.4 * (2 * x[:, 0]).sin()  # noqa: E731
        reference = sc.ManifoldSDE(sc.Torus(1), drift, sigma, T)
        return sc.ControlProblem(reference, sc.Dirac(tensor([2.9])), reward, cost, alpha=alpha)

    true, exact = problem(1.0, 1.0, alpha), sc.exact_solution(problem(push, price, used), K)
    chain = true.chain(K)
    z = np.arange(-8, 8.01, 0.25)[:, None]
    weights = tensor(0.25 * np.exp(-0.5 * z[:, 0] ** 2) / math.sqrt(2 * math.pi))
    for k in (0, 2, K - 1):
        t, after, h = chain.clock[k], chain.clock[k + 1], chain.step_sizes[k]
        for x in tensor([[-2.0], [0.4], [3.0]]):
            to = chain.step(k, x.expand(len(z), -1), tensor(z))
            psi = weights * (exact.value(to, after) / alpha).exp()
            cost = h * float(true.running_cost(x[None], chain.times[k])) / alpha
            yield compare(f"v_{k}", float(exact.value(x[None], t)) / alpha, math.log(float(psi.sum())) - cost, 1e-8)
            shift = (psi / psi.sum()) @ tensor(z)
            yield compare(f"u_{k}", exact.control(x[None], t)[0], shift / math.sqrt(h), 1e-7)


@check(
    "grids-of-pairs",
    "MATH 8: one or two dimensions, any r",
    implements=[f"{EXACT}.value", f"{EXACT}.control", f"{EXACT}.log_z", f"{EXACT}.elbo"],
    controls=["alpha off by 5 %", "noise off by 1 %", "drift off by 1 %"],
)
def grids_of_pairs(setting: Setting, defect: str) -> Lines:
    """Of a chain of two coordinates that act on each other, with nothing declared, the recursion in the plane has the
    values, best shifts, log Z and ELBO of the linear-quadratic chain: with noise in one direction alone, too, which
    reaches the other coordinate by the drift."""
    A = np.array([[0.0, 1.0], [-2.0, -0.3]])
    size = 1.01 if defect.startswith("noise") else 1.0
    rate = 1.01 if defect.startswith("drift") else 1.0
    alpha = 1.05 if defect.startswith("alpha") else 1.0
    G, g = np.array([[1.5, 0.4], [0.4, 0.6]]), np.array([1.0, -0.5])
    point, K = sc.Dirac(tensor([0.4, -0.3])), 8
    x = np.array([[0.4, -0.3], [0.1, 0.5], [-0.2, 0.2]])
    for name, sigma in (("one direction", np.array([[0.0], [0.8]])), ("two", np.array([[0.5, 0.0], [0.3, 0.8]]))):
        if defect and name == "two":
            continue
        linear = sc.ControlProblem(sc.LinearSDE(tensor(A), tensor(sigma)), point, sc.Quadratic(tensor(G), tensor(g)))
        drift = lambda y, t: rate * y @ tensor(A).T  # noqa: E731
        reward = lambda y: -0.5 * ((y @ tensor(G)) * y).sum(1) + y @ tensor(g)  # noqa: E731
        plain_ = sc.ControlProblem(sc.SDE(drift, tensor(size * sigma), dim=2), point, reward, alpha=alpha)
        want, grid = sc.exact_solution(linear, K), sc.exact_solution(plain_, K)
        yield within("it is no grid", float(not isinstance(grid, GridChainSolution)), 0.0)
        yield compare(f"log Z, noise in {name}", float(grid.log_z), float(want.log_z), 1e-5)
        yield compare(f"ELBO, noise in {name}", float(grid.elbo), float(want.elbo), 1e-5)
        for t in (0.0, 0.5):
            yield compare(f"v(x, {t}), noise in {name}", grid.value(tensor(x), t), want.value(tensor(x), t), 1e-4)
            u, best = grid.control(tensor(x), t), want.control(tensor(x), t)
            yield compare(f"u(x, {t}), noise in {name}", u, best, 1e-3)


@check(
    "laws-on-manifolds",
    "Theorem 1, MATH 12",
    kind="statistical",
    implements=[f"{EXACT}.marginal", f"{EXACT}.sample", "sdecontrol.exact.manifolds.SeriesLaw"],
    tests=5,
    controls=["noise off by 20 %", "reward off by 10 %"],
)
def laws_on_manifolds(setting: Setting, defect: str) -> Lines:
    """Draws of the optimum's end on the sphere and on the circle have the moments of the reference's law times psi: of
    Brownian motion the harmonics of degree l decay as exp(-l (l + 1) s/2), Fourier modes as exp(-k^2 s/2); and a law
    knows its mean."""
    n, T, alpha = setting.count(20_000, 200_000), 1.2, 0.6
    noise = 0.9 * (1.2 if defect.startswith("noise") else 1.0)
    size = 1.1 if defect.startswith("reward") else 1.0
    s, way, point = 0.81 * T, np.array([0.6, 0.0, 0.8]), np.array([0.0, 0.6, -0.8])
    reward = lambda y: alpha * (2 + size * y @ tensor(way)).log()  # noqa: E731
    sphere = sc.ControlProblem(
        sc.ManifoldSDE(sc.Sphere(2), None, noise, T), sc.Dirac(tensor(point)), reward, alpha=alpha
    )
    law = sc.exact_solution(sphere).marginal(T)
    one, two = math.exp(-s), math.exp(-3 * s)
    moment = np.eye(3) / 3 + two * (np.outer(point, point) - np.eye(3) / 3)
    mean = (2 * one * point + moment @ way) / (2 + one * float(way @ point))
    yield within("mean of the law on the sphere", float(np.abs(law.mean.numpy() - mean).max()), 1e-8)
    torch.manual_seed(setting.seed)
    x = law.sample((n,))
    for i in range(3):
        yield z_test(f"E x_{i + 1} on the sphere", x[:, i], float(mean[i]))
    tilt = lambda y: alpha * (3 + size * y[:, 0].cos()).log()  # noqa: E731
    circle = sc.ControlProblem(sc.ManifoldSDE(sc.Torus(1), None, noise, T), sc.Dirac(tensor([0.0])), tilt, alpha=alpha)
    exact = sc.exact_solution(circle)
    cosine = (3 * math.exp(-s / 2) + 0.5 * (1 + math.exp(-2 * s))) / (3 + math.exp(-s / 2))
    y = exact.sample(n, seed=setting.seed)
    yield z_test("E cos x on the circle", y[:, 0].cos(), cosine)
    yield z_test("E sin x on the circle", y[:, 0].sin(), 0.0)
