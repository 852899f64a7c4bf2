"""Geodesic chains: Brownian motion against series, log-ratios against Gaussians in the tangent space, gradients against
derivatives of whole paths."""

import math

import numpy as np
import pytest
import torch
from cases import F64, randn
from scipy.special import dawsn, eval_legendre
from torch.distributions import MultivariateNormal

import sdecontrol as sc
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.paths.lean_adjoint import StepJacobians, lean_targets, running_cost_gradients
from sdecontrol.randomness import SuppliedNoise

K, SIGMA, HORIZON = 5, 0.8, 1.5
SPHERE, TORUS = sc.Sphere(2), sc.Torus(2)
X0 = torch.tensor([0.6, 0.0, 0.8], dtype=F64)


def swirl(x, t):
    """About the axis, and towards the pole."""
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=x.dtype)
    return (1 + t) * torch.linalg.cross(pole.expand_as(x), x) + 0.5 * SPHERE.tangent(x, pole)


def push(x, t):
    return torch.stack((x[:, 1].sin(), 0.5 - x[:, 0].cos()), 1)


def lift(x):
    return 1.5 * x[:, 2] + x[:, 0] * x[:, 1]


def wave(x):
    return (x[:, 0] - 1).cos() + 0.5 * (2 * x[:, 1] + x[:, 0]).sin()


def effort(x, t):
    return 0.3 * (1 + t) * x[:, 0].sin()


def on_sphere(drift=None, cost=None, **options):
    return sc.ControlProblem(sc.ManifoldSDE(SPHERE, drift, SIGMA, HORIZON), sc.Dirac(X0), lift, cost, **options)


def on_torus(drift=None, cost=None, **options):
    start = sc.Dirac(torch.tensor([0.5, -2.0], dtype=F64))
    return sc.ControlProblem(sc.ManifoldSDE(TORUS, drift, SIGMA, HORIZON), start, wave, cost, **options)


def guide(x, t):
    """A control that leaves the tangent space."""
    return torch.stack([(1 + t) * x[:, 1].cos(), 0.5 - x[:, 0], x.sum(1)][: x.shape[1]], 1)


def factor(degree, spread):
    """``E P_l(cos(s rho))``, rho Rayleigh: by what a geodesic step of noise s multiplies a harmonic of degree l."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    rho = 6 * (nodes + 1)
    return float((6 * weights * eval_legendre(degree, np.cos(spread * rho)) * rho * np.exp(-(rho**2) / 2)).sum())


def test_the_factor_of_degree_one_is_dawsons_integral():
    """MATH: ``m_1 = 1 - sqrt(2h) D(sqrt(h/2))``; and factors are those of Brownian motion to second order in h."""
    assert abs(factor(1, 0.4) - (1 - math.sqrt(2) * 0.4 * dawsn(0.4 / math.sqrt(2)))) < 1e-13
    for degree in (1, 2, 5):
        rate = degree * (degree + 1) / 2
        errors = [factor(degree, (h / rate) ** 0.5) - math.exp(-h) for h in (0.02, 0.01, 0.005)]
        assert abs(errors[0] / errors[1] - 4) < 0.1 and abs(errors[1] / errors[2] - 4) < 0.05


@pytest.mark.parametrize("controlled", [False, True])
def test_brownian_motion_on_the_sphere_has_its_series(controlled):
    """``E P_l(<x0, x_k>) = m_l^k`` of the chain itself, at large steps; under a control with importance weights
    (4.5 standard errors)."""
    problem = on_sphere()
    paths = sc.simulate(problem, 1 << 15, guide if controlled else None, time_steps=K, seed=3)
    weights = (-paths.log_ratio()).exp()
    spread = math.sqrt(HORIZON / K) * SIGMA
    for degree in (1, 2, 3, 5):
        for k in (1, 3, K):
            w = weights if k == K else (-paths.log_ratio(per_step=True)[:k].sum(0)).exp()
            value = w * torch.from_numpy(eval_legendre(degree, (paths.states[k] @ X0).numpy()))
            assert abs(float(value.mean()) - factor(degree, spread) ** k) < 4.5 * float(value.std()) / 2**7.5


def test_brownian_motion_with_constant_drift_on_the_torus_is_a_wrapped_gaussian():
    """``E exp(i n (x - x0 - b t)) = exp(-|n|^2 s^2/2)``, exact at every step size (4.5 standard errors)."""
    b = torch.tensor([0.7, -3.0], dtype=F64)
    problem = on_torus(lambda x, t: b.to(x).expand_as(x))
    for steps in (1, 4):
        x = sc.simulate(problem, 1 << 14, time_steps=steps, seed=1).end
        assert float(x.abs().max()) <= math.pi
        for n in ([1, 0], [0, 1], [1, -1], [2, 1]):
            n = torch.tensor(n, dtype=F64)
            angle = (x - problem.initial.point - b * HORIZON) @ n
            want = math.exp(-0.5 * float(n @ n) * SIGMA**2 * HORIZON)
            assert abs(float(angle.cos().mean()) - want) < 4.5 * float(angle.cos().std()) / 2**7
            assert abs(float(angle.sin().mean())) < 4.5 * float(angle.sin().std()) / 2**7


def frame(x):
    """An orthonormal basis of the tangent space at each x, ``(batch, 3, 2)``."""
    return torch.linalg.qr(torch.cat((x.unsqueeze(2), randn(3, 2, seed=5).expand(len(x), 3, 2)), 2)).Q[..., 1:]


def test_log_ratios_and_kls_are_those_of_gaussians_in_the_tangent_space():
    problem = on_sphere(swirl)
    paths = sc.simulate(problem, 64, guide, time_steps=K, seed=2)
    h, chain = HORIZON / K, paths.chain
    for k in range(K):
        x, t = paths.states[k], chain.times[k]
        E = frame(x)
        inward = lambda v: (E.mT @ v.unsqueeze(2)).squeeze(2)  # noqa: B023, E731
        mean0 = inward(h * swirl(x, t))
        mean = mean0 + h * SIGMA * inward(guide(x, t.expand(64)))
        v = mean + math.sqrt(h) * SIGMA * inward(paths.noises[k])
        cov = h * SIGMA**2 * torch.eye(2, dtype=F64)
        law, law0 = MultivariateNormal(mean, cov), MultivariateNormal(mean0, cov)
        found = paths.log_ratio(per_step=True)[k]
        assert torch.allclose(found, law.log_prob(v) - law0.log_prob(v), atol=1e-12)
        kl = torch.distributions.kl_divergence(law, law0)
        assert torch.allclose(paths.kl(per_step=True)[k], kl, atol=1e-12)
        velocity = (E @ v.unsqueeze(2)).squeeze(2)
        assert torch.allclose(paths.states[k + 1], SPHERE.exp(x, velocity), atol=1e-12)


def test_the_normal_part_of_a_control_moves_nothing_and_costs_nothing():
    problem = on_sphere(swirl)
    tangent = lambda x, t: SPHERE.tangent(x, guide(x, t))  # noqa: E731
    a, b = (sc.simulate(problem, 64, u, time_steps=K, seed=4) for u in (guide, tangent))
    assert torch.allclose(a.states, b.states, atol=1e-13) and torch.allclose(a.log_ratio(), b.log_ratio(), atol=1e-13)
    assert float((a.shifts * a.states[:-1]).sum(2).abs().max()) < 1e-14
    along = a.log_ratio(guide)  # at stored states, all at once
    assert torch.allclose(along, b.log_ratio(), atol=1e-13)
    ends = sc.simulate(problem, 64, guide, time_steps=K, seed=4, keep="end")
    assert torch.equal(ends.end, a.end) and torch.allclose(ends.log_weights(), a.log_weights(), atol=1e-13)


def test_steps_do_not_depend_on_the_frame_of_the_embedding():
    """A rotation of states and noises rotates the path."""
    chain = on_sphere().chain(K)
    R = torch.linalg.qr(randn(3, 3, seed=1)).Q
    x, xi, c = SPHERE.onto(randn(9, 3, seed=2)), randn(9, 3, seed=3), randn(9, 3, seed=4)
    assert torch.allclose(chain.step(1, x, xi, c) @ R.mT, chain.step(1, x @ R.mT, xi @ R.mT, c @ R.mT), atol=1e-14)


def test_sigma_of_time_is_that_of_the_steps_left_end():
    problem = sc.ControlProblem(sc.ManifoldSDE(SPHERE, sigma=lambda t: 0.3 + t), sc.Dirac(X0), lift)
    chain = problem.chain(4)
    assert np.allclose(chain.spreads, [0.5 * (0.3 + t) for t in (0, 0.25, 0.5, 0.75)])
    x, xi = X0.expand(3, 3), randn(3, 3, seed=0)
    want = SPHERE.exp(x, SPHERE.tangent(x, 0.5 * 0.55 * xi))
    assert torch.allclose(chain.step(1, x, xi), want, atol=1e-14)
    assert float(problem.reference.diffusion(x, torch.tensor(0.5))) == pytest.approx(0.8)


CASES = {
    "sphere": lambda: on_sphere(swirl, effort, alpha=0.6),
    "torus": lambda: on_torus(push, effort, alpha=0.6),
}


class Guide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(v, dtype=F64)) for v in (0.7, -0.4))

    def forward(self, x, t):
        return self.a * guide(x, t) + self.b * x.roll(1, 1).cos()


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_the_exponential_map_are_those_of_finite_differences(name):
    """Of the mean path cost by two parameters of a control, in all modes."""
    problem, control = CASES[name](), Guide()
    chain, d = problem.chain(K), problem.event_shape[0]
    x0, noise = problem.draw_start(32, 0), randn(K, 32, d, seed=7)
    objective = Objective(lambda x: -problem.reward(x) / problem.alpha, problem.running_cost_or_none, problem.alpha)

    def cost():
        paths = sc.simulate(problem, 32, control, time_steps=K, noise=noise)
        return float((paths.kl() - (paths.reward - paths.cost) / problem.alpha).mean())

    want = []
    for p in control.parameters():
        with torch.no_grad():
            p += 1e-5
            above = cost()
            p -= 2e-5
            want.append((above - cost()) / 2e-5)
            p += 1e-5
    for mode in ("full", "adjoint", "checkpoint"):
        control.zero_grad()
        backpropagate(
            chain, control, x0, SuppliedNoise(noise), objective, parameters=list(control.parameters()), mode=mode
        )
        assert np.allclose([float(p.grad) for p in control.parameters()], want, rtol=1e-7, atol=1e-8), mode


@pytest.mark.parametrize("name", CASES)
def test_lean_targets_are_derivatives_of_the_path_at_fixed_shifts(name):
    """``d (r - sum h f)/alpha / d c_k`` of each path, whose later shifts stay as they are: the stationarity that makes
    the chain's best shift the fixed point, tangent on the sphere."""
    problem = CASES[name]()
    paths = sc.simulate(problem, 16, guide, time_steps=K, seed=5)
    chain, alpha = paths.chain, problem.alpha
    shifts = paths.shifts.clone().requires_grad_(True)
    x, total = paths.states[0], 0.0
    for k in range(K):
        total = total - chain.step_sizes[k] * effort(x, chain.times[k]) / alpha
        x = chain.step(k, x, paths.noises[k], shifts[k])
    total = total + problem.reward(x) / alpha
    want = torch.autograd.grad(total.sum(), shifts)[0]
    end = paths.end.clone().requires_grad_(True)
    slope = torch.autograd.grad(problem.reward(end).sum(), end)[0] / alpha
    costs = running_cost_gradients(paths, problem.running_cost_or_none)
    found = lean_targets(StepJacobians(paths), slope, costs=costs, alpha=alpha)
    assert torch.allclose(found, want, atol=1e-12) and float(want.abs().max()) > 0.1
    if name == "sphere":
        assert float((found * paths.states[:-1]).sum(2).abs().max()) < 1e-12
