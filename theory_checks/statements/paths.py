"""Likelihoods and weights of simulated paths, exactly: path by path, or as expectations by quadrature over the
noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.paths.paths import Paths

from ..cases import START_STEPS, AffineControl, LinearCase, affine_map, linear_cases, spoil, tensor
from ..gaussian import gaussian_kl, log_density
from ..quadrature import NoiseNodes
from ..registry import Measurement, Setting, check, compare

Lines = Iterator[Measurement]
PATHS = "sdecontrol.paths.paths.Paths"


def _random_control(case: LinearCase, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return 0.7 * rng.normal(size=(case.K, case.m, case.d)), rng.normal(size=(case.K, case.m))


def _simulate(case: LinearCase, control, seed: int, n: int = 70, **options) -> Paths:
    return sc.simulate(
        case.problem(), n, control=control, time_steps=list(case.grid), scheme=case.scheme, seed=seed, **options
    )


def _density_ratio(case: LinearCase, states: np.ndarray, control: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """``log dP^u/dQ0`` of paths ``(K+1, n, d)`` by the kernels' Gaussian densities, step by step ``(K, n)``."""
    rows = []
    for k, ((M, b, C), (A, a, _)) in enumerate(zip(case.steps(control), case.steps())):
        x, y, cov = states[k], states[k + 1], C @ C.T
        rows.append(log_density(y, x @ M.T + b, cov) - log_density(y, x @ A.T + a, cov))
    return np.stack(rows)


@check(
    "path-log-ratio",
    "MATH 2: log-ratios, [21], [22]",
    implements=[f"{PATHS}.log_ratio", "sdecontrol.simulate"],
    controls=[
        "noise off by 1 %",
        "drift off by 1 %",
        "last step left out",
        "half square dropped",
        "sign of the ratio flipped",
    ],
)
def path_log_ratio(setting: Setting, defect: str) -> Lines:
    """log dP^u/dQ0 of a simulated path is the difference of its Gaussian log-densities, to rounding and at every step
    size: in total, step by step, for what keeps only ends, and for another control on the same paths; with Euler steps
    and with exact transitions."""
    cases = (
        *linear_cases(setting, extra_noise=False, start="fixed"),
        *linear_cases(setting, extra_noise=False, start="fixed", scheme="exact"),
    )
    for i, case in enumerate(cases):
        parts, other = (_random_control(case, setting.rng(50 + j)) for j in range(2))
        control, second = AffineControl(*parts, case.grid), AffineControl(*other, case.grid)
        paths = _simulate(spoil(case, defect), control, i)
        want = _density_ratio(case, paths.states.numpy(), parts)
        steps = paths.log_ratio(per_step=True).numpy()
        if defect == "half square dropped":
            steps = steps - paths.kl(per_step=True).numpy()
        steps = -steps if defect.startswith("sign") else steps[:-1] if defect.startswith("last") else steps
        label = f"d={case.d}, {case.scheme}"
        yield compare(f"log ratio, {label}", steps.sum(0), want.sum(0))
        if defect:
            continue
        yield compare(f"log ratio by step, {label}", steps, want)
        yield compare(f"log_ratio(), {label}", paths.log_ratio(), want.sum(0))
        yield compare(
            f"log_ratio of the drawing control, given by name, {label}", paths.log_ratio(control), want.sum(0)
        )
        yield compare(
            f"log_ratio of another control, {label}",
            paths.log_ratio(second),
            _density_ratio(case, paths.states.numpy(), other).sum(0),
        )
        ends = _simulate(case, control, i, keep="end")
        yield compare(f"log_ratio of ends, {label}", ends.log_ratio(), want.sum(0))
        yield compare(f"KL terms of ends, {label}", ends.kl(), paths.kl(per_step=True).sum(0))


@check(
    "path-equation",
    "MATH 2: the chain",
    implements=["sdecontrol.simulate", f"{PATHS}.shifts", f"{PATHS}.kl", f"{PATHS}.running_cost"],
    controls=[
        "noise off by 1 %",
        "drift off by 1 %",
        "drift transposed",
        "running cost left out",
        "control off by 1 %",
    ],
)
def path_equation(setting: Setting, defect: str) -> Lines:
    """x_{k+1} = x_k + h (b + sigma u) + sqrt(h) sigma xi_k, KL terms h |u|^2/2 [22], log-ratio sqrt(h) u.xi + h |u|^2/2
    (of v: sqrt(h) v.xi + h v.u - h |v|^2/2) and cost sum h f, recomputed from the stored noise; more noises than states
    too."""
    for i, case in enumerate(linear_cases(setting, cost=True, start="fixed")):
        (U, w), (V, y) = (_random_control(case, setting.rng(53 + j)) for j in range(2))
        paths = _simulate(spoil(case, defect), AffineControl(U, w, case.grid), i)
        states, noises, label = paths.states.numpy(), paths.noises.numpy(), f"d={case.d}, m={case.m}"
        size = 1.01 if defect == "control off by 1 %" else 1.0
        x, kl, ratio, other, cost = states[0], 0.0, 0.0, 0.0, 0.0
        for k, (t, h) in enumerate(zip(case.grid, case.h)):
            u, v, xi = size * (x @ U[k].T + w[k]), x @ V[k].T + y[k], noises[k]
            cost = cost + h * case.cost(t, x)
            kl = kl + 0.5 * h * (u * u).sum(-1)
            ratio = ratio + np.sqrt(h) * (u * xi).sum(-1) + 0.5 * h * (u * u).sum(-1)
            other = other + np.sqrt(h) * (v * xi).sum(-1) + h * (u * v).sum(-1) - 0.5 * h * (v * v).sum(-1)
            x = x + h * case.drift(t, x) + (h * u + np.sqrt(h) * xi) @ case.sigma_at(t).T
            yield compare(f"x_{k + 1}, {label}", states[k + 1], x)
        yield compare(f"KL of paths, {label}", paths.kl(), kl)
        yield compare(f"log ratio, {label}", paths.log_ratio(), ratio)
        yield compare(f"log ratio of another control, {label}", paths.log_ratio(AffineControl(V, y, case.grid)), other)
        yield compare(f"running cost, {label}", paths.running_cost, cost)
        reward = -0.5 * np.einsum("ni,ij,nj->n", x, case.G, x) + x @ case.g
        yield compare(f"log weights, {label}", log_weights(case.problem(), paths), (reward - cost) / case.alpha - ratio)


@check(
    "path-law-of-the-start",
    "MATH 1: Girsanov with the start",
    implements=[f"{PATHS}.log_ratio", "sdecontrol.exact_solution.control"],
    controls=["KL of the start dropped", "noise off by 1 %", "covariance of the start off by 1 %", "alpha off by 5 %"],
)
def start_ratio(setting: Setting, defect: str) -> Lines:
    """With a controlled start the log-ratio contains the start's: on the learned start x' = x + h S^(1/2) u + sqrt(h)
    S^(1/2) xi the steps' Gaussian densities give it, added to that of the process, for the best mean-shift control of
    start and process."""
    for i, case in enumerate(linear_cases(setting, extra_noise=False)):
        if defect.startswith("covariance"):
            given = replace(case, cov=1.01 * case.cov)
        else:
            given = spoil(case, defect)
        exact, h = case.chain().exact, 1 / START_STEPS
        paths = sc.simulate(given.problem(), 50, control=given.chain().exact.control, seed=i)
        states = paths.states.numpy()
        cov = h * case.cov
        values, vectors = np.linalg.eigh(case.cov)
        effect, total = h * (vectors * np.sqrt(values)) @ vectors.T, 0.0
        for k in range(START_STEPS):
            U, w = affine_map(lambda x, k=k: exact.control(x, -1 + k * h), case.d)
            x, y = states[k], states[k + 1]
            total = total + log_density(y, x + (x @ U.T + w) @ effect.T, cov) - log_density(y, x, cov)
        if defect.startswith("KL of the start"):
            total = 0.0
        total = total + _density_ratio(case, states[START_STEPS:], case.chain().control()).sum(0)
        yield compare(f"log ratio with the start's, d={case.d}", paths.log_ratio(), total)


@check(
    "path-equation-of-the-start",
    "MATH 1: the initial law",
    implements=["sdecontrol.simulate", f"{PATHS}.log_ratio", f"{PATHS}.controls"],
    controls=["covariance of the start off by 1 %", "noise off by 1 %", "KL of the start dropped"],
)
def start_equation(setting: Setting, defect: str) -> Lines:
    """The learned start steps as x' = x + S^(1/2) (h u + sqrt(h) xi) with the first d of the noises, where the process
    has more; both add to log-ratio and KL, and neither running cost nor ``controls`` counts the learned start."""
    for i, case in enumerate(linear_cases(setting, cost=True)):
        given = replace(case, cov=1.01 * case.cov) if defect.startswith("covariance") else spoil(case, defect)
        control, h = case.chain().exact.control, 1 / START_STEPS
        paths = sc.simulate(given.problem(), 20, control=control, time_steps=list(case.grid), seed=i)
        values, vectors = np.linalg.eigh(case.cov)
        root, noises = (vectors * np.sqrt(values)) @ vectors.T, paths.noises.numpy()
        x, kl, ratio, cost, d = np.tile(case.mean, (20, 1)), 0.0, 0.0, 0.0, case.d
        for k in range(START_STEPS + case.K):
            early, j = k < START_STEPS, k - START_STEPS
            t, step = (-1 + k * h, h) if early else (case.grid[j], case.h[j])
            u, xi = control(tensor(x), t).numpy(), noises[k, :, : d if early else None]
            if not (early and defect.startswith("KL")):
                kl = kl + 0.5 * step * (u * u).sum(-1)
                ratio = ratio + np.sqrt(step) * (u * xi).sum(-1) + 0.5 * step * (u * u).sum(-1)
            push = step * u + np.sqrt(step) * xi
            cost = cost + (0.0 if early else step * case.cost(t, x))
            x = x + push @ root.T if early else x + step * case.drift(t, x) + push @ case.sigma_at(t).T
        label = f"d={d}, m={case.m}"
        yield compare(f"end, {label}", paths.end, x)
        yield compare(f"KL terms, {label}", paths.kl(), kl)
        yield compare(f"log ratio, {label}", paths.log_ratio(), ratio)
        yield compare(f"running cost, {label}", paths.running_cost, cost)
        yield compare(f"steps with a control, {label}", paths.controls.shape[0], case.K)


def _one_dimensional(setting: Setting) -> Iterator[LinearCase]:
    for case in linear_cases(setting, cost=True, start="fixed", extra_noise=False, dims=(1,)):
        h = case.grid[-1] / 3
        yield replace(case, grid=(*(0.9 * h * k for k in range(3)), case.grid[-1]))


def curved(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A control that no chain of Gaussians represents."""
    return torch.sin(1.3 * x) + 0.5 * t[:, None] * x


@check(
    "weights-are-unbiased",
    "MATH 2: log w; [24]",
    implements=["sdecontrol.evaluation.evaluate.log_weights", f"{PATHS}.log_ratio"],
    controls=[
        "alpha off by 5 %",
        "noise off by 1 %",
        "half square dropped",
        "running cost left out",
        "last step left out",
        "sign of the ratio flipped",
    ],
)
def weights(setting: Setting, defect: str) -> Lines:
    """E_{P^u}[w] = Z, E_{P^u}[w phi] = E_Q0[e^{R/alpha} phi], E_{P^u}[dQ0/dP^u] = 1 and E_Q0[dP^u/dQ0] = 1 at every
    step size and for every control, a nonlinear one here: by quadrature over the noise of the library's simulator, no
    sampling."""
    for case in _one_dimensional(setting):
        nodes = NoiseNodes(case.K, 40, start=None)
        x0 = tensor(case.mean[None])
        point = replace(case, cov=0 * case.cov, start="fixed")
        grid = {"time_steps": list(case.grid)}
        paths = nodes.simulate(spoil(point, defect).problem(), curved, state=x0, **grid)
        ratio = paths.log_ratio()
        ratio = ratio - paths.kl() if defect.startswith("half") else -ratio if defect.startswith("sign") else ratio
        if defect.startswith("last"):
            ratio = paths.log_ratio(per_step=True)[:-1].sum(0)
        problem = spoil(point, defect).problem()
        log_w = log_weights(problem, paths) + paths.log_ratio() - ratio
        log_z = case.value(0, case.mean[None])[0] / case.alpha
        best = case.reference(0, case.mean).tilted(*case.total_reward())[0]
        yield compare("log E[w]", nodes.mean(log_w.exp()).log(), log_z)
        yield compare("E[w x_K]/Z", nodes.mean(log_w.exp() * paths.end[:, 0]) / np.exp(log_z), best.of(-1).mean[0])
        yield compare("E[dQ0/dP]", nodes.mean((-ratio).exp()), 1.0)
        reference = nodes.simulate(problem, None, state=x0, **grid)
        yield compare("E_Q0[dP/dQ0]", nodes.mean(reference.log_ratio(curved).exp()), 1.0)


@check(
    "objective-of-paths",
    "[18], [22]",
    implements=[f"{PATHS}.kl", f"{PATHS}.log_ratio", "sdecontrol.simulate"],
    controls=[
        "alpha off by 5 %",
        "noise off by 1 %",
        "last step left out",
        "running cost left out",
        "sign of the KL flipped",
    ],
)
def objective(setting: Setting, defect: str) -> Lines:
    """J/alpha = E[R]/alpha - E[sum h |u|^2/2] = log Z - KL(P^u || Q_fine), the left side from the library's simulated
    paths by exact quadrature, the right side from dense laws, for a random affine control; E[log-ratio] = E[KL
    terms]."""
    for case in _one_dimensional(setting):
        parts = _random_control(case, setting.rng(56))
        nodes, point = NoiseNodes(case.K, 6), replace(case, cov=0 * case.cov)
        paths = nodes.simulate(
            spoil(point, defect).problem(),
            AffineControl(*parts, case.grid),
            state=tensor(case.mean[None]),
            time_steps=list(case.grid),
        )
        after = tuple(range(1, case.K + 1))
        law = case.reference(0, case.mean, parts).of(*after)
        best = case.reference(0, case.mean).tilted(*case.total_reward())[0].of(*after)
        kl = paths.kl(per_step=True)[: -1 if defect.startswith("last") else None].sum(0)
        kl = -kl if defect.startswith("sign") else kl
        problem = spoil(point, defect).problem()
        total = (problem.reward(paths.end) - paths.running_cost) / problem.alpha - kl
        log_z = case.value(0, case.mean[None])[0] / case.alpha
        yield compare("J/alpha", nodes.mean(total), log_z - gaussian_kl(law, best))
        yield compare("E log ratio = E KL", nodes.mean(paths.log_ratio()), nodes.mean(kl))


@check(
    "nonlinear-reference",
    "MATH 2",
    implements=["sdecontrol.SDE", "sdecontrol.simulate", f"{PATHS}.log_ratio"],
    controls=["noise off by 1 %", "alpha off by 5 %", "running cost left out", "drift off by 1 %"],
)
def nonlinear(setting: Setting, defect: str) -> Lines:
    """None of this needs linear drifts: for dX = (X - X^3) dt + sigma(X) dW with a noise that depends on the state,
    E_{P^u}[w] is the soft Bellman recursion's Z, here by nested quadrature in plain numpy."""
    K, T, alpha = 3, 0.6, 0.8
    h, scale = T / K, 1.01 if defect.startswith("noise") else 1.0
    points, masses = np.polynomial.hermite_e.hermegauss(48)
    masses = masses / masses.sum()

    def value(k: int, x: np.ndarray) -> np.ndarray:  # exp(v_k/alpha)
        if k == K:
            return np.exp(np.cos(2 * x) / alpha)
        mean, sigma = x + h * (x - x**3), np.sqrt(h) * (0.7 + 0.2 * np.sin(x))
        cost = 0.3 * x**2 * (1 + k * h)
        return np.exp(-h * cost / alpha) * (value(k + 1, mean[..., None] + sigma[..., None] * points) @ masses)

    push = 1.01 if defect.startswith("drift") else 1.0
    sde = sc.SDE(lambda x, t: push * (x - x**3), lambda x, t: scale * (0.7 + 0.2 * torch.sin(x)), dim=1, horizon=T)
    cost = None if defect.startswith("running") else lambda x, t: (0.3 * x**2 * (1 + t))[:, 0]
    problem = sc.ControlProblem(
        sde,
        sc.Dirac(tensor([0.4])),
        lambda x: torch.cos(2 * x[:, 0]),
        cost,
        alpha=alpha * (1.05 if defect.startswith("alpha") else 1.0),
    )
    nodes = NoiseNodes(K, 40)
    for name, control in (
        ("the reference", None),
        ("a nonlinear control", lambda x, t: 0.4 * torch.tanh(x) - 0.3 * t[:, None]),
    ):
        paths = nodes.simulate(problem, control, state=tensor([[0.4]]), time_steps=K)
        log_w = log_weights(problem, paths)
        yield compare(f"log E[w] under {name}", nodes.mean(log_w.exp()).log(), np.log(value(0, np.array(0.4))))
