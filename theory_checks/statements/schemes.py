"""Solvers of higher order on given noise, the Stratonovich form of an Ito equation, stored paths, and steps whose
graphs are too large to be kept: against closed forms of linear equations and dense linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.blocks import LEAST
from sdecontrol.controls.given import given_control
from sdecontrol.paths.brownian import coarsen
from sdecontrol.paths.equations import ControlledSDE, noise_kind
from sdecontrol.paths.lean_adjoint import StepJacobians, lean_targets, lean_targets_again, running_cost_gradients
from sdecontrol.paths.replay import ReplayBuffer
from sdecontrol.paths.solvers import SOLVERS

from ..cases import spoil, tensor
from ..registry import Measurement, Setting, check, compare, order, within
from .particles import point_case

Lines = Iterator[Measurement]
RATES, SPREADS = np.array([0.5, -0.3]), np.array([[0.6, 0.2], [0.3, 0.5]])


def _diffusions(size: float) -> dict[str, tuple[Callable[..., torch.Tensor], int]]:
    """Noises of geometric Brownian motions: own ones, one for both, two for both."""
    S = tensor(size * SPREADS)
    return {
        "diagonal": (lambda x, t: S.diagonal() * x, 2),
        "scalar": (lambda x, t: S[:, :1] * x.unsqueeze(2), 1),
        "general": (lambda x, t: S * x.unsqueeze(2), 2),
    }


@check(
    "strong-orders-of-solvers",
    "MATH 2: the chain; Rossler 1003.0344",
    kind="continuous",
    implements=[
        "sdecontrol.simulate",
        "sdecontrol.paths.brownian.coarsen",
        "sdecontrol.paths.equations.noise_kind",
        "sdecontrol.paths.equations.ControlledSDE",
    ],
    controls=["noise off by 1 %", "Ito read as Stratonovich", "drift off by 1 %"],
)
def strong_orders(setting: Setting, defect: str) -> Lines:
    """On coarser and coarser grids of the same Brownian paths each of torchsde's schemes comes, with strong order 1 (of
    Roessler's 1.5), to geometric Brownian motion's closed form x exp((mu - |s|^2/2) T + s W_T): with a noise for each
    coordinate, one for both, and two for both."""
    rng, n, finest = setting.rng(211), 300, 256
    noise, areas = (tensor(rng.normal(size=(finest, n, 2))) for _ in range(2))
    clock = [k / finest for k in range(finest + 1)]
    rates = RATES * (1.01 if defect.startswith("drift") else 1.0)
    W = (noise.sum(0) / math.sqrt(finest)).numpy()
    drift = lambda x, t: tensor(rates) * x  # noqa: E731
    for kind, (diffusion, m) in _diffusions(1.01 if defect.startswith("noise") else 1.0).items():
        rows = {"diagonal": np.diag(np.diag(SPREADS)), "scalar": SPREADS[:, :1], "general": SPREADS}[kind]
        half = 0.0 if defect.startswith("Ito") else 0.5
        want = np.exp(RATES - half * (rows**2).sum(1) + W[:, :m] @ rows.T)
        problem = sc.ControlProblem(sc.SDE(drift, diffusion, dim=2), sc.Dirac(torch.ones(2, dtype=torch.float64)))
        found = noise_kind(problem.reference, problem.draw_start(3, 0), tensor(0.5))  # type: ignore[arg-type]
        yield within(f"noise is not {kind}", float(found.name != kind), 0.0)
        for scheme, solver in sorted(SOLVERS.items()):
            if kind not in solver.kinds or (scheme == "reversible-heun" and kind != "diagonal"):
                continue
            errors, sizes = [], (16, 64, 256)
            for K in sizes:
                grid, xi, eta = coarsen(clock, noise[..., :m], areas[..., :m], every=finest // K)
                given = (xi, eta) if solver.area else xi
                end = sc.simulate(problem, n, time_steps=grid, scheme=scheme, noise=given).end.numpy()
                errors.append(float(np.abs(end - want).mean()))
            yield within(f"x(T), {scheme}, {kind} noise, K = 256", errors[-1], 0.006)
            if scheme != "reversible-heun":  # its order is that of 1/2 with such noise
                claimed = 1.5 if solver.area else 1.0
                yield order(f"x(T), {scheme}, {kind} noise", [1 / K for K in sizes], errors, claimed, 0.25)


@check(
    "stratonovich-form",
    "MATH 1: Ito and Stratonovich",
    implements=["sdecontrol.paths.equations.ControlledSDE"],
    controls=["correction left out", "correction of the transposed Jacobian", "control left out"],
)
def stratonovich(setting: Setting, defect: str) -> Lines:
    """The Stratonovich drift of an Ito equation is b + sigma u - (1/2) sum_j (d sigma_j/dx) sigma_j over the columns of
    sigma: of a noise for each coordinate, of entries that depend on other coordinates, of one noise for both and of
    two, by derivatives by hand."""
    x = tensor(setting.rng(212).normal(size=(4, 2)))
    a, b = x[:, 0], x[:, 1]
    one = torch.ones_like(a)
    wrong = defect.startswith("correction of")
    kinds: dict[str, tuple[Any, Any]] = {
        # sigma, and sum_j (d sigma_j/dx) sigma_j
        "diagonal": (
            lambda y, t: torch.sin(y) * (1 + t),
            2.25 * torch.stack((a.sin() * a.cos(), b.sin() * b.cos()), 1),
        ),
        "of others": (
            lambda y, t: torch.stack((y[:, 0] * y[:, 1], 0.3 + y[:, 0] ** 2), 1),
            torch.stack((b * a * b, 0 * a), 1),
        ),
        "one for both": (
            lambda y, t: torch.stack((y[:, 1] ** 2, 0.2 * y[:, 0]), 1).unsqueeze(2),
            torch.stack((0.2 * a * 0.2, 2 * b * b**2), 1) if wrong else torch.stack((2 * b * 0.2 * a, 0.2 * b**2), 1),
        ),
        "two for both": (
            lambda y, t: torch.stack((torch.stack((y[:, 1], 1 + 0 * y[:, 0]), 1), y * 0.5), 1),
            torch.stack((0.5 * a, 0.25 * b), 1) + torch.stack((0 * one, 0.5 * b), 1),
        ),
    }
    push = lambda y, t: 0.4 * torch.cos(y)  # noqa: E731
    t = tensor(0.5)
    for name, (diffusion, correction) in kinds.items():
        sde = sc.SDE(lambda y, t: -y * (1 + t), diffusion, dim=2)
        sde.probe(torch.float64, torch.device("cpu"))
        sigma = diffusion(x, t)
        m = 1 if name == "one for both" else 2
        control = (lambda y, t: 0.4 * torch.cos(y[:, :1])) if m == 1 else push
        u = control(x, t.expand(4))
        pushed = (sigma @ u.unsqueeze(2)).squeeze(2) if sigma.ndim == 3 else sigma * u
        want = -1.5 * x + (0.0 if defect.startswith("control") else pushed)
        if not defect.startswith("correction left"):
            want = want - 0.5 * correction
        equation = ControlledSDE(sde, noise_kind(sde, x, t), control, stratonovich=True)
        yield compare(f"drift, noise {name}", equation.f(t, x), want)
        yield compare(f"diffusion, noise {name}", equation.g(t, x).reshape(sigma.shape), sigma)


@check(
    "stored-paths",
    "MATH 3: any paths",
    implements=["sdecontrol.paths.replay.ReplayBuffer", "sdecontrol.paths.paths.Paths.log_weights"],
    controls=["the oldest kept", "alpha off by 5 %", "rows of another group"],
)
def stored(setting: Setting, defect: str) -> Lines:
    """A buffer holds the last paths that it was given, over the oldest, and what is drawn from it, alone or in groups
    that stay together, are these paths: their log weights are those of Gaussian densities, under the control that drew
    them and under another; with running costs, conditions, and backward kernels."""
    case = point_case()
    problem = case.problem()
    given = spoil(case, defect).problem()
    grid, n = list(case.grid), 8
    push, other = (lambda x, t: 0.3 * torch.cos(x + t[:, None])), (lambda x, t: 0.2 * x)
    batches = [sc.simulate(problem, n, push, time_steps=grid, seed=setting.seed + i).towards(given) for i in range(3)]
    buffer = ReplayBuffer(batches[0].chain, 2 * n, None, True)
    for paths in batches[: 2 if defect.startswith("the oldest") else 3]:
        buffer.add(paths)
    ends, want, another = [], [], []
    for paths in batches[1:]:
        x, h = paths.states.numpy(), case.h
        ratio, more, spent = (np.zeros(n) for _ in range(3))
        for k, t in enumerate(grid[:-1]):
            y, s = tensor(x[k]), torch.full((n,), t, dtype=torch.float64)
            root = np.sqrt(h[k]) * case.sigma_at(t)
            z = np.linalg.solve(root, (x[k + 1] - x[k] - h[k] * case.drift(t, x[k])).T).T
            for total, u in ((ratio, push), (more, other)):
                c = math.sqrt(h[k]) * u(y, s).numpy()
                total += (c * z).sum(1) - 0.5 * (c**2).sum(1)
            spent += h[k] * case.cost(t, x[k])
        reward = x[-1] @ case.g - 0.5 * np.einsum("ni,ij,nj->n", x[-1], case.G, x[-1])
        ends.append(x[-1])
        want.append((reward - spent) / case.alpha - ratio)
        another.append(more)
    ends, want, another = (np.concatenate(v) for v in (ends, want, another))
    for group in (1, 4):
        drawn = buffer.draw(2 * n, torch.Generator().manual_seed(3), given, group_size=group)
        apart = np.abs(drawn.end.numpy()[:, None] - ends[None]).max(2)
        rows = apart.argmin(1)
        yield within(f"distance from the stored ends, groups of {group}", float(apart.min(1).max()), 0.0)
        yield within("how many are missing", float(2 * n - len(set(rows.tolist()))), 0.0)
        if defect.startswith("rows"):
            rows = np.roll(rows, 1)
        together = rows.reshape(-1, group)
        yield within("groups that are torn", float((np.diff(together, axis=1) != 1).sum()), 0.0)
        yield compare(f"log weights, groups of {group}", drawn.log_weights(), want[rows])
        yield compare(f"log-ratio of another control, groups of {group}", drawn.log_ratio(other), another[rows])
    yield from _stored_of_densities(setting)


def _stored_of_densities(setting: Setting) -> Lines:
    """Backward kernels are stored too: the mean weight of annealed Langevin is the integral after it as before it."""
    law = torch.distributions.Normal(tensor([0.6, -0.4]), tensor([0.3, 0.5]).sqrt())
    density = lambda x: law.log_prob(x).sum(1) + 0.9  # noqa: E731
    problem = sc.gibbs_problem(density, 2, reference="annealed", scale=1.5, centre=0.2, dtype=torch.float64)
    push = lambda x, t: 0.2 - 0.1 * x  # noqa: E731
    paths = sc.simulate(problem, 64, push, time_steps=5, seed=setting.seed).towards(problem)
    buffer = ReplayBuffer(paths.chain, 64, None, False)
    buffer.add(paths)
    drawn = buffer.draw(64, torch.Generator().manual_seed(1), problem)
    rows = np.abs(drawn.end.numpy()[:, None] - paths.end.numpy()[None]).max(2).argmin(1)
    yield compare("log weights with backward kernels", drawn.log_weights(), paths.log_weights()[rows])


class _Wide(nn.Module):
    """``(x, t) -> A x + offset`` by way of many numbers, so that the graph of a step is large."""

    def __init__(self, A: np.ndarray, offset: np.ndarray, width: int) -> None:
        super().__init__()
        self.offset = tensor(offset)
        first = np.random.default_rng(0).normal(size=(width, A.shape[1]))
        self.first, self.second = nn.Linear(*first.T.shape, bias=False), nn.Linear(width, len(A), bias=False)
        self.first.weight.data = tensor(first)
        self.second.weight.data = tensor(A @ np.linalg.pinv(first))

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return self.second(self.first(x)) + self.offset


@check(
    "large-steps-again",
    "MATH 3: the lean adjoint",
    implements=[
        "sdecontrol.paths.lean_adjoint.lean_targets",
        "sdecontrol.paths.lean_adjoint.lean_targets_again",
        "sdecontrol.paths.lean_adjoint.StepJacobians",
    ],
    controls=["drift transposed", "costs left out", "alpha off by 5 %"],
)
def large_steps(setting: Setting, defect: str) -> Lines:
    """Where a step's graph is too large to be kept it is made again on the way back: the lean adjoint of a linear drift
    through 20 000 numbers is the product of the matrices I + h A' with the slope at the end, less the costs' slopes in
    between; with the control's part of the zero-variance adjoint, too."""
    case = point_case()
    A = case.A.T if defect.startswith("drift") else case.A
    sde = sc.SDE(_Wide(A, case.offset, 20_000), tensor(case.sigma), dim=2, horizon=case.grid[-1])
    cost = None if defect.startswith("costs") else sc.QuadraticCost(tensor(case.F))
    problem = sc.ControlProblem(sde, sc.Dirac(tensor(case.mean)), sc.Linear(tensor(case.g)), cost, alpha=case.alpha)
    alpha = case.alpha * (1.05 if defect.startswith("alpha") else 1.0)
    U = np.array([[0.3, -0.2], [0.1, 0.4]])
    push = lambda x, t: x @ tensor(U).T  # noqa: E731
    n = 2 * LEAST
    paths = sc.simulate(problem, n, push, time_steps=list(case.grid), seed=setting.seed)
    slope = tensor(case.g).expand(n, 2) / alpha
    costs = running_cost_gradients(paths, problem.running_cost_or_none)
    jacobians = StepJacobians(paths)
    yield within("the steps were kept", float(not jacobians.again), 0.0)
    control = given_control(problem, push)
    for name, of_noise, got in (
        ("plain", 0.0, lean_targets(jacobians, slope, costs=costs, alpha=alpha)),
        ("zero variance", 1.0, lean_targets_again(jacobians, control, slope, costs=costs, alpha=alpha)),
    ):
        a, found = np.tile(case.g / case.alpha, (n, 1)), []
        for k in reversed(range(case.K)):
            h, x = case.h[k], paths.states[k].numpy()
            a = a - of_noise * math.sqrt(h) * paths.noises[k].numpy() @ U
            found.append(math.sqrt(h) * a @ case.sigma)
            a = a + h * a @ case.A - h * x @ case.F_at(0.0) / case.alpha
        yield compare(f"targets, {name}", got.detach(), np.stack(found[::-1]), 1e-8)
