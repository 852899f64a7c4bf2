"""Chains of other kinds than Euler's, and ways of simulating that are none: a step's law, weights and costs against
formulas of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from scipy.integrate import quad_vec, simpson, solve_ivp

import sdecontrol as sc
from sdecontrol.paths.solvers import SOLVERS

from ..cases import tensor
from ..registry import Measurement, Setting, check, compare, order, within
from ..statistics import z_test
from .mixtures import mixture_cases, vp_levels
from .mixtures import spoil as spoil_mixture

Lines = Iterator[Measurement]
PATHS = "sdecontrol.paths.paths.Paths"


def _kink(x: Any, w: Any, k: int) -> Any:
    """A simulator that is neither smooth nor invertible in its noise."""
    return 0.7 * x + 0.3 * (w[:, :1] * w[:, 1:]) + 0.4 * abs(w[:, :1]) + 0.1 * k


@check(
    "noise-driven-chains",
    "MATH 12: noise-driven chains",
    implements=["sdecontrol.discrete_dynamics", f"{PATHS}.log_ratio", f"{PATHS}.kl", f"{PATHS}.log_weights"],
    controls=["alpha off by 5 %", "half squares dropped", "cost of the last step dropped"],
)
def noise_driven(setting: Setting, defect: str) -> Lines:
    """For any map F the log-ratio of a path is sum c.xi + |c|^2/2 of its noises and the KL |c|^2/2, with stage costs
    summed; and E_{P^u}[w] is the same Z under every control, by nodes of the noise; written in torch and in numpy."""
    K, alpha = 2, 0.8
    used = alpha * (1.05 if defect.startswith("alpha") else 1.0)
    reward = lambda x: -0.5 * (x[:, 0] - 1) ** 2  # noqa: E731
    cost = lambda x, t: 0.3 * x[:, 0] ** 2 * (1 + t)  # noqa: E731
    control = lambda x, t: torch.cat((0.4 - 0.2 * x, 0.1 * x + 0.2 * t[:, None]), 1)  # noqa: E731
    rng = setting.rng(151)
    noise = tensor(rng.normal(size=(K, 50, 2)))
    for numpy in (False, True):
        chain = sc.discrete_dynamics(_kink, K, noises=2, numpy=numpy)
        problem = sc.ControlProblem(chain, sc.Dirac(tensor([0.3])), reward, cost, alpha=used)
        paths = sc.simulate(problem, 50, control, noise=noise)
        x, ratio, kl, spent = np.full((50, 1), 0.3), np.zeros(50), np.zeros(50), np.zeros(50)
        for k in range(K):
            c = np.concatenate((0.4 - 0.2 * x, 0.1 * x + 0.2 * k), 1)
            xi = noise[k].numpy()
            kl += 0.5 * (c**2).sum(1)
            ratio += (c * xi).sum(1) + (0.0 if defect.startswith("half") else 0.5) * (c**2).sum(1)
            if not (defect.startswith("cost") and k == K - 1):
                spent += 0.3 * x[:, 0] ** 2 * (1 + k)
            x = _kink(x, c + xi, k)
        name = "numpy" if numpy else "torch"
        yield compare(f"end, {name}", paths.end, x)
        yield compare(f"log-ratio, {name}", paths.log_ratio(), ratio)
        yield compare(f"KL, {name}", paths.kl(), kl)
        want = (-0.5 * (x[:, 0] - 1) ** 2 - spent) / alpha - ratio
        yield compare(f"log weight, {name}", paths.log_weights(), want)
    if defect:
        return
    sizes = []
    for u in (None, lambda x, t: torch.cat((0.3 - 0.1 * x, 0 * x), 1)):
        smooth = sc.discrete_dynamics(lambda x, w, k: 0.7 * x + 0.3 * w[:, :1] + 0.2 * w[:, 1:] ** 2, 1, noises=2)
        problem = sc.ControlProblem(smooth, sc.Dirac(tensor([0.3])), reward, alpha=used)
        points, masses = np.polynomial.hermite_e.hermegauss(40)
        grid = tensor(np.stack(np.meshgrid(points, points), -1).reshape(1, -1, 2))
        weights = tensor(np.outer(masses, masses).ravel() / masses.sum() ** 2)
        paths = sc.simulate(problem, grid.shape[1], u, noise=grid)
        sizes.append(float(weights @ paths.log_weights().exp()))
    yield compare("Z of two controls", sizes[1], sizes[0], 1e-8)


def _flow_of(rate: Callable[[float], np.ndarray], t: float, s: float) -> np.ndarray:
    """The matrix of ``y' = A(r) y`` from time s to t."""
    slope = lambda r, y: (rate(r) @ y.reshape(2, 2)).ravel()  # noqa: E731
    return solve_ivp(slope, (s, t), np.eye(2).ravel(), rtol=1e-11, atol=1e-13).y[:, -1].reshape(2, 2)


@check(
    "exponential-steps",
    "MATH 8: linear parts",
    implements=["sdecontrol.SemilinearSDE", "sdecontrol.chains.exponential.ExponentialChain.kernel"],
    controls=["linear part frozen at the step's start", "nonlinearity of the end of the step", "noise off by 1 %"],
)
def exponential(setting: Setting, defect: str) -> Lines:
    """A step of the exponential scheme integrates the linear part and its noise exactly, and holds the nonlinearity and
    the control: x' = Phi x + int Phi (n(x_k, t_k) + a(s) + sigma u) ds and the covariance int Phi sigma sigma' Phi' ds,
    Phi by a solver of its own; with A and a that depend on time, on an uneven grid."""
    rng = setting.rng(152)
    A0, A1 = np.array([[-1.0, 0.6], [-0.4, -2.0]]), np.array([[0.3, 0.0], [0.5, -0.8]])
    sigma = np.array([[0.5, 0.1], [0.0, 0.4]]) * (1.01 if defect.startswith("noise") else 1.0)
    A = lambda t: A0 + t * A1  # noqa: E731
    a = lambda t: np.array([0.3, -0.2]) * (1 + t)  # noqa: E731
    n = lambda x, t: torch.sin(x.flip(1)) + t  # noqa: E731
    grid = (0.0, 0.3, 0.4, 1.0)
    for varying in (False, True):
        at = (lambda t: tensor(A(float(t)))) if varying else tensor(A0)
        push = (lambda t: tensor(a(float(t)))) if varying else tensor(a(0.0))
        if varying and defect.startswith("linear"):
            at = tensor(A(0.4))
        sde = sc.SemilinearSDE(at, n, tensor(sigma), push)
        problem = sc.ControlProblem(sde, sc.Dirac(tensor([0.5, -0.3])))
        u, x = np.array([0.4, -0.7]), tensor(rng.normal(size=(3, 2)))
        for k in (0, 2):
            s, t = grid[k], grid[k + 1]
            rate = (lambda r: A(r)) if varying else (lambda r: A0)
            shove = (lambda r: a(r)) if varying else (lambda r: a(0.0))
            true = np.array([[0.5, 0.1], [0.0, 0.4]])

            carried = partial(_flow_of, rate, t)
            options: dict[str, Any] = {"epsabs": 1e-11, "epsrel": 1e-10}
            effect = quad_vec(carried, s, t, **options)[0]
            offset = quad_vec(lambda r: carried(r) @ shove(r), s, t, **options)[0]
            cov = quad_vec(lambda r: carried(r) @ true @ true.T @ carried(r).T, s, t, **options)[0]
            held = np.sin(x.numpy()[:, ::-1]) + (t if defect.startswith("nonlin") else s)
            mean = x.numpy() @ carried(s).T + held @ effect.T + offset
            chain = problem.chain(list(grid), "exponential")
            got, scale = chain.kernel(k, x)
            label = f"step {k}{', of time' if varying else ''}"
            yield compare(f"mean, {label}", got, mean, 1e-7)
            root = scale if scale.ndim == 2 else scale[0]
            yield compare(f"covariance, {label}", root @ root.mT, cov, 1e-7)
            c = chain.shift_at(k, x, tensor(u).expand(3, 2))
            yield compare(f"effect of a control, {label}", c @ root.mT, np.tile(effect @ true @ u, (3, 1)), 1e-7)


@check(
    "annealed-weights",
    "MATH 6: annealed Langevin",
    kind="statistical",
    implements=["sdecontrol.gibbs_problem", f"{PATHS}.log_weights"],
    tests=3,
    controls=["density off by a tenth of a nat", "backward kernels of the step's start", "start's density dropped"],
)
def annealed(setting: Setting, defect: str) -> Lines:
    """The weight of a path of annealed Langevin is rho(x_K)/p0(x_0) times the ratio of its backward kernels, steps of
    Langevin towards the later density, to its forward ones, with the control's part in both: written out from Gaussian
    densities on every path; and its mean is the integral of rho, for two controls and for none."""
    shift, K, width = 0.1 if defect.startswith("density") else 0.0, 6, 1.5
    mean, var, log_z = np.array([0.6, -0.4]), np.array([0.3, 0.5]), 0.9
    law = torch.distributions.Normal(tensor(mean), tensor(var).sqrt())
    density = lambda x: law.log_prob(x).sum(1) + log_z + shift  # noqa: E731
    push = lambda x, t: 0.3 * torch.sin(x.flip(1) + t[:, None]) + 0.2  # noqa: E731
    problem = sc.gibbs_problem(density, 2, reference="annealed", scale=width, centre=0.2, dtype=torch.float64)
    chain, reference = problem.chain(K), cast(Any, problem.reference)
    for name, control in (("none", None), ("a control", push), ("another", lambda x, t: 0.2 - 0.1 * x)):
        n = setting.count(4000, 40_000)
        paths = sc.simulate(problem, n, control, time_steps=K, seed=setting.seed + 1)
        log_w = paths.log_weights()
        yield z_test(f"E[w]/Z, {name}", (log_w - log_z).exp(), 1.0)
        x, total = paths.states.numpy(), np.zeros(n)
        score = lambda y, b: (1 - b) * (0.2 - y) / width**2 + b * reference.score(tensor(y)).numpy()  # noqa: E731
        for k in range(K):
            t, after = chain.clock[k], chain.clock[k + 1]
            v = width**2 * reference.roughness ** (-(t + after))
            e = reference.relaxations * (after - t)
            drift, s2 = v * -math.expm1(-0.5 * e), v * -math.expm1(-e)
            here, later = (reference.beta(q) for q in (t, t if defect.startswith("backward") else after))
            c = np.zeros_like(x[k])
            if control is not None:
                gain = math.sqrt(after - t) * (2 * -math.expm1(-0.5 * e) / e) / math.sqrt(-math.expm1(-e) / e)
                c = gain * control(paths.states[k], torch.full((n,), t).double()).numpy()
                last = chain.clock[min(k + 1, K - 1)]  # a chain has no control at its end
                back = gain * control(paths.states[k + 1], torch.full((n,), last).double()).numpy()
            forward = (x[k + 1] - x[k] - drift * score(x[k], here)) / math.sqrt(s2) - c
            backward = (x[k] - x[k + 1] - drift * score(x[k + 1], later)) / math.sqrt(s2)
            if control is not None:
                backward = backward + back
            total += 0.5 * (forward**2 - backward**2).sum(1)
        total += density(paths.end).numpy() - shift
        if not defect.startswith("start"):
            total += (0.5 * ((x[0] - 0.2) / width) ** 2 + np.log(width) + 0.5 * np.log(2 * np.pi)).sum(1)
        yield compare(f"log weights, {name}", log_w, total, 1e-8)


@check(
    "flow-likelihood",
    "MATH 5: the probability flow",
    implements=["sdecontrol.log_likelihood", "sdecontrol.simulate", f"{PATHS}.running_cost"],
    controls=["data off by 1 %", "score off by 1 %", "cost of another flow"],
)
def flow(setting: Setting, defect: str) -> Lines:
    """The probability flow of a mixture model has the model's marginals: the density that ``log_likelihood`` integrates
    along it is the mixture's own, exactly or within the standard errors of random directions. From data N(0, v I) its
    paths are x_0 s(t)/s(0), s^2 the noised variance, and a running cost along it is that integral."""
    for case in mixture_cases(setting, dims=(1,) if defect else (1, 2)):
        sde: Any = spoil_mixture(case, defect).sde()
        if defect.startswith("score"):
            mixture = sc.GaussianMixture(tensor(case.weights), tensor(case.means), 1.03 * tensor(case.covs))
            sde = sc.generative_sde(mixture, schedule=sc.VP(*case.beta))
        x = setting.rng(153).normal(size=(2, case.d))
        want = case.log_reference(1.0, x)
        found = sc.log_likelihood(sde, tensor(x), tolerance=1e-7)
        yield compare(f"log density, d={case.d}", found.value, want, 1e-5)
        if case.d == 2:
            found = sc.log_likelihood(sde, tensor(x), divergence="hutchinson", probes=64, tolerance=1e-5, seed=0)
            z = np.abs((found.value - tensor(want)).numpy()) / np.maximum(found.stderr.numpy(), 1e-4)
            yield within("log density by random directions, in standard errors", float(z.max()), 5.0)
    v, K = 0.3, 200
    used = 1.02 * v if defect.startswith("cost") else v
    model = sc.generative_sde(sc.GaussianMixture(tensor([1.0]), tensor([[0.0]]), used), schedule=sc.VP(0.8, 3.0))
    problem = sc.ControlProblem(model, running_cost=lambda x, t: (1 + t) * x[:, 0] ** 2)
    paths = sc.simulate(problem, 3, time_steps=K, scheme="probability-flow", seed=setting.seed)
    t = paths.times.double().numpy()
    levels = np.array([vp_levels(0.8, 3.0, 1 - s) for s in t])
    size = np.sqrt(levels[:, 0] ** 2 * v + levels[:, 1] ** 2)
    x0 = paths.states[0, :, 0].numpy()
    yield compare("paths of the flow", paths.states[..., 0], size[:, None] / size[0] * x0, 1e-5)
    spent = simpson((1 + t) * (size / size[0]) ** 2, x=t) * x0**2
    yield compare("running cost along the flow", paths.running_cost, spent, 1e-4)


@check(
    "solvers-without-likelihoods",
    "MATH 1: costs are integrals",
    kind="continuous",
    implements=["sdecontrol.simulate", "sdecontrol.paths.solvers.solve_on_grid", f"{PATHS}.running_cost"],
    controls=["drift off by 1 %", "cost off by 1 %"],
)
def solvers(setting: Setting, defect: str) -> Lines:
    """Without noise each of torchsde's schemes is a method for x' = b + sigma u of its own order, on uneven grids too,
    and running costs are integrals along it: x(T) and int x^2 dt of x' = -x + u in closed form."""
    rate = 1.01 if defect.startswith("drift") else 1.0
    price = 1.01 if defect.startswith("cost") else 1.0
    sde = sc.SDE(lambda x, t: -rate * x, torch.tensor(0.5, dtype=torch.float64), dim=1)
    problem = sc.ControlProblem(sde, sc.Dirac(tensor([1.0])), running_cost=lambda x, t: price * x[:, 0] ** 2)
    u = 0.6  # x' = -x + 0.3
    end = 0.3 + 0.7 * math.exp(-1)
    spent = 0.09 + 2 * 0.3 * 0.7 * (1 - math.exp(-1)) + 0.49 * 0.5 * (1 - math.exp(-2))
    for scheme in sorted(SOLVERS):
        orders = {"milstein": 1, "euler-heun": 1, "srk": 2}.get(scheme, 2)
        errors, sizes = [], []
        for K in (20, 40, 80):
            grid = [(k / K) ** 1.2 for k in range(K + 1)]
            noise = torch.zeros(K, 1, 1, dtype=torch.float64)
            push = lambda x, t: torch.full_like(x, u)  # noqa: E731
            still = (noise, noise) if SOLVERS[scheme].area else noise
            paths = sc.simulate(problem, 1, push, time_steps=grid, scheme=scheme, noise=still)
            errors.append(abs(float(paths.end) - end))
            sizes.append(1 / K)
            cost = float(paths.running_cost)
        yield order(f"x(T), {scheme}", sizes, errors, orders, 0.25)
        yield within(f"x(T), {scheme}, K = 80", errors[-1], 1e-2 if orders == 1 else 1e-4)
        yield within(f"int x^2 dt, {scheme}, K = 80", abs(cost - spent), 5e-3 if orders == 1 else 1e-4)
    quiet = sc.SDE(lambda x, t: -rate * x, torch.tensor(1e-9, dtype=torch.float64), dim=1)
    still = sc.ControlProblem(quiet, sc.Dirac(tensor([1.0])), running_cost=lambda x, t: price * x[:, 0] ** 2)
    for scheme in ("srk", "heun"):
        paths = sc.simulate(still, 2, lambda x, t: 0.0 * x, time_steps=20, scheme=scheme, tolerance=1e-7, seed=0)
        yield compare(f"x(T), adaptive {scheme}", paths.end[:, 0], np.full(2, math.exp(-1)), 1e-4)
        yield compare(f"int x^2 dt, adaptive {scheme}", paths.running_cost, np.full(2, 0.5 * (1 - math.exp(-2))), 1e-3)


@check(
    "ways-of-simulating",
    "MATH 2: log w",
    implements=[
        "sdecontrol.simulate",
        f"{PATHS}.log_ratio",
        f"{PATHS}.log_weights",
        f"{PATHS}.kl",
        f"{PATHS}.running_cost",
    ],
    controls=["another seed", "alpha off by 5 %", "cost left out"],
)
def ways(setting: Setting, defect: str) -> Lines:
    """Paths whose ends alone are kept, simulated in chunks, gone on with from their middle, or read through a part of
    them, are the paths of one plain run: ends, log-ratios of the own control and of another, KLs, costs and weights,
    which are those of Gaussian densities; and antithetic pairs of a linear process mirror each other in its mean."""
    sde = sc.SDE(lambda x, t: torch.sin(x) - x.flip(1) * t, lambda x, t: 0.5 + 0.2 * torch.cos(x), dim=2)
    cost = None if defect.startswith("cost") else (lambda x, t: x.square().sum(1) * (1 + t))
    push, other = (lambda x, t: 0.4 * torch.cos(x) - t[:, None]), (lambda x, t: 0.2 * x)
    alpha = 0.8 * (1.05 if defect.startswith("alpha") else 1.0)
    problem = sc.ControlProblem(sde, sc.Dirac(tensor([0.2, -0.4])), lambda x: x.sin().sum(1), cost, alpha=alpha)
    grid, n = [0.0, 0.3, 0.4, 1.0], 150
    plain = sc.simulate(problem, n, push, time_steps=grid, seed=setting.seed)
    x, h = plain.states.numpy(), np.diff(grid)
    ratio, kl, spent, another = (np.zeros(n) for _ in range(4))
    for k in range(3):
        y, t = tensor(x[k]), torch.full((n,), grid[k], dtype=torch.float64)
        scale = math.sqrt(h[k]) * (0.5 + 0.2 * np.cos(x[k]))
        z = (x[k + 1] - x[k] - h[k] * (np.sin(x[k]) - x[k][:, ::-1] * grid[k])) / scale
        c, d = (math.sqrt(h[k]) * u(y, t).numpy() for u in (push, other))
        ratio += (c * z).sum(1) - 0.5 * (c**2).sum(1)
        another += (d * z).sum(1) - 0.5 * (d**2).sum(1)
        kl += 0.5 * (c**2).sum(1)
        spent += h[k] * (x[k] ** 2).sum(1) * (1 + grid[k])
    weights = (np.sin(x[-1]).sum(1) - spent) / 0.8 - ratio
    seed = setting.seed + int(defect.startswith("another"))
    options: dict[str, Any] = {"time_steps": grid, "seed": seed}
    some = slice(10, 90, 3)
    for name, paths, rows in (
        ("plain", plain, slice(None)),
        ("ends alone", sc.simulate(problem, n, push, keep="end", **options), slice(None)),
        ("chunks of 64", sc.simulate(problem, n, push, keep="end", chunk=64, **options), slice(None)),
        ("some rows", plain.rows(some), some),
    ):
        yield compare(f"ends, {name}", paths.end, x[-1][rows], 1e-9)
        yield compare(f"log-ratio, {name}", paths.log_ratio(), ratio[rows], 1e-9)
        yield compare(f"log-ratio of another control, {name}", paths.log_ratio(other), another[rows], 1e-9)
        yield compare(f"KL, {name}", paths.kl(), kl[rows], 1e-9)
        yield compare(f"cost, {name}", paths.running_cost, spent[rows], 1e-9)
        yield compare(f"log weight, {name}", paths.log_weights(), weights[rows], 1e-9)
    linear = sc.ControlProblem(sc.LinearSDE(-torch.eye(2, dtype=torch.float64), 0.7), sc.Dirac(tensor([1.0, -2.0])))
    ends = sc.simulate(linear, 40, time_steps=grid, antithetic=True, seed=1).end
    middle = np.prod(1 - h) * np.array([1.0, -2.0])
    yield compare("antithetic pairs", ends.unflatten(0, (-1, 2)).mean(1), np.tile(middle, (20, 1)), 1e-9)
