"""Problems that several tests share. Random ones are functions of a seed."""

import pytest
import torch

import sdecontrol as sc

F64 = torch.float64


def slow_but(cases, *quick):
    """Cases of a parametrised test: those that are named run by default, the others are slow tests."""
    assert set(quick) <= set(cases), quick
    values = ((case, case if isinstance(case, tuple) else (case,)) for case in cases)
    return [pytest.param(*value, marks=() if case in quick else pytest.mark.slow) for case, value in values]


def but_slow(cases, *slow):
    """The same, where those are named that are slow."""
    return slow_but(cases, *(case for case in cases if case not in slow))


def randn(*shape, seed, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spd(d, seed, low=0.3):
    a = randn(d, d, seed=seed)
    return a @ a.mT / d + low * torch.eye(d, dtype=F64)


def random_lq(d=2, m=None, seed=0, *, start="dirac", running=True, alpha=0.7, dtype=F64, offset=True):
    """A linear-quadratic problem with a non-symmetric drift; start "dirac", or a Gaussian that is "fixed" or
    "controlled"."""
    m = d if m is None else m
    sde = sc.LinearSDE(
        A=(0.5 * randn(d, d, seed=seed) - 0.3 * torch.eye(d, dtype=F64)).to(dtype),
        sigma=(torch.eye(d, m, dtype=F64) + 0.3 * randn(d, m, seed=seed + 1)).to(dtype),
        offset=0.5 * randn(d, seed=seed + 2, dtype=dtype) if offset else None,
    )
    point = randn(d, seed=seed + 3, dtype=dtype)
    initial = sc.Dirac(point) if start == "dirac" else sc.Gaussian(point, spd(d, seed + 4).to(dtype))
    return sc.ControlProblem(
        sde,
        initial=initial,
        reward=sc.Quadratic(spd(d, seed + 5).to(dtype), randn(d, seed=seed + 6, dtype=dtype)),
        running_cost=sc.QuadraticCost(0.4 * spd(d, seed + 7).to(dtype)) if running else None,
        alpha=alpha,
        start=None if start == "dirac" else start,
    )


def linear(d=2, alpha=0.7, **options):
    """No curvature anywhere: the optimal kernels keep the reference's covariance, so mean shifts reach the optimum."""
    sde = sc.LinearSDE(A=0.5 * randn(d, d, seed=1) - torch.eye(d, dtype=F64), sigma=torch.eye(d, dtype=F64))
    return sc.ControlProblem(
        sde, initial=sc.Dirac(randn(d, seed=2)), reward=sc.Linear(randn(d, seed=3)), alpha=alpha, **options
    )


def mixture(reward=None, d=1, dtype=F64, alpha=1.0, components=2, start=None):
    means = torch.tensor([[-2.0], [1.5]], dtype=dtype)[:components].expand(components, d)
    weights = torch.tensor([0.4, 0.6], dtype=dtype)[:components]
    covs = torch.stack([0.3 * torch.eye(d, dtype=dtype)] * components)
    law = sc.GaussianMixture(weights / weights.sum(), means, covs)
    reward = sc.Linear(torch.ones(d, dtype=dtype)) if reward is None else reward
    return sc.ControlProblem(sc.generative_sde(law, schedule=sc.VP()), reward=reward, alpha=alpha, start=start)


def nonlinear(dtype=F64, alpha=0.8):
    """A one-well nonlinear SDE in 2-D with state-dependent matrix noise and a time-dependent cost."""

    def drift(x, t):
        return torch.stack((x[:, 1], -(x[:, 0] ** 3) + x[:, 0] - x[:, 1] * t), dim=1)

    def diffusion(x, t):
        off = 0.2 * torch.sin(x[:, 0])
        one = torch.ones_like(off)
        return torch.stack((torch.stack((one, off, 0 * one), 1), torch.stack((0 * one, one, 0.5 * one), 1)), 1)

    return sc.ControlProblem(
        sc.SDE(drift, diffusion, dim=2),
        initial=sc.Dirac(torch.tensor([0.3, -0.2], dtype=dtype)),
        reward=lambda x: torch.cos(x[:, 0]) - 0.1 * x[:, 1] ** 2,
        running_cost=lambda x, t: t * x[:, 0] ** 2,
        alpha=alpha,
    )


class SmallControl(torch.nn.Module):
    """A user's control, nothing of the library's: ``(x, t) -> (batch, m)``."""

    def __init__(self, d, m, seed=0, dtype=F64):
        super().__init__()
        self.first = torch.nn.Parameter(0.5 * randn(d + 1, 8, seed=seed, dtype=dtype))
        self.last = torch.nn.Parameter(0.5 * randn(8, m, seed=seed + 1, dtype=dtype))

    def forward(self, x, t):
        return torch.tanh(torch.cat((x, t[:, None]), 1) @ self.first) @ self.last


class Counted:
    """A density that counts the rows it is called on."""

    def __init__(self, density):
        self.density, self.rows = density, 0

    def __call__(self, x):
        self.rows += len(x)
        return self.density(x)
