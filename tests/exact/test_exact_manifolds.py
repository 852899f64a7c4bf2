"""Exact solutions on manifolds: against Bellman's recursion on the chain itself, closed forms, and weighted paths."""

import math

import numpy as np
import pytest
import torch
from cases import F64, but_slow, randn
from scipy.special import dawsn

import sdecontrol as sc
from sdecontrol.exact.manifolds import SeriesLaw
from sdecontrol.exact.series import SphereSeries, TorusSeries
from sdecontrol.processes.manifolds import UniformLaw

K, ALPHA, SIGMA, HORIZON = 4, 0.6, 0.9, 1.2
POINT = torch.tensor([0.0, 0.6, -0.8], dtype=F64)
AXES = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=F64)


def modes(x):
    """A mixture of two von Mises-Fisher densities, as a reward for alpha = 0.6."""
    return ALPHA * torch.logsumexp(3 * x @ AXES.to(x).mT + torch.tensor([0.0, 0.5]).to(x), 1)


def wave(x):
    return (x - 1).cos().sum(1) + 0.4 * (2 * x[:, 0] + x[:, -1]).sin()


def effort(x, t):
    return (0.4 + t) * x[:, 0].cos().square()


def drift(x, t):
    return 0.8 * (1 + t) * x.flip(1).sin() + 0.3


def sphere(initial=None, cost=None, sigma=SIGMA, dtype=F64):
    initial = sc.Dirac(POINT.to(dtype)) if initial is None else initial
    return sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), None, sigma, HORIZON), initial, modes, cost, ALPHA)


def torus(d, b=None, cost=None, initial=None, sigma=SIGMA):
    initial = sc.Dirac(torch.tensor([2.9, -1.0][:d], dtype=F64)) if initial is None else initial
    return sc.ControlProblem(sc.ManifoldSDE(sc.Torus(d), b, sigma, HORIZON), initial, wave, cost, ALPHA)


CASES = {
    "sphere": sphere,
    "sphere, a cost": lambda: sphere(cost=effort),
    "sphere, noise of time": lambda: sphere(sigma=lambda t: 0.4 + 0.8 * t),
    "sphere, a uniform start": lambda: sphere(sc.Sphere(2).uniform(F64)),
    "circle": lambda: torus(1),
    "circle, drift and cost": lambda: torus(1, drift, effort),
    "torus": lambda: torus(2),
    "torus, drift and cost": lambda: torus(2, drift, effort),
    "torus, a uniform start": lambda: torus(2, drift, effort, sc.Torus(2).uniform(F64)),
}


def noises(problem):
    """Nodes and weights of an average over the noise that acts at every state: in polar coordinates of the tangent
    plane at one state, or on a grid."""
    if problem.reference.angles:
        z, step = np.arange(-8, 8.01, 0.25), 0.25
        grid = np.stack(np.meshgrid(*[z] * problem.event_shape[0], indexing="ij"), -1).reshape(
            -1, problem.event_shape[0]
        )
        density = np.exp(-0.5 * (grid**2).sum(1)) * (step / math.sqrt(2 * math.pi)) ** grid.shape[1]
        return lambda x: torch.from_numpy(grid), torch.from_numpy(density)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    rho, phi = 4.5 * (nodes + 1), 2 * math.pi * np.arange(48) / 48
    density = torch.from_numpy(np.repeat(4.5 * weights * rho * np.exp(-(rho**2) / 2), 48) / 48)
    flat = torch.from_numpy(np.stack([np.outer(rho, np.cos(phi)).ravel(), np.outer(rho, np.sin(phi)).ravel()], 1))

    def at(x):
        E = torch.linalg.qr(torch.cat((x.unsqueeze(1), randn(3, 2, seed=5)), 1)).Q[:, 1:]
        return flat @ E.mT + 0.3 * x  # a normal part that moves nothing

    return at, density


@pytest.mark.parametrize("name", but_slow(CASES, "sphere, a cost"))
def test_values_and_controls_are_bellmans_on_the_chain_itself(name):
    """``exp(v_k/alpha) = e^{-h f/alpha} E exp(v_{k+1}(x')/alpha)`` and ``c_k = E_{p*} P xi``, x' by ``chain.step``."""
    problem = CASES[name]()
    exact, chain = sc.exact_solution(problem, time_steps=K), problem.chain(K)
    assert exact.error < 1e-8
    at, density = noises(problem)
    manifold = problem.reference.manifold
    for k in (0, 2, K - 1):
        t, after = chain.clock[k], chain.clock[k + 1]
        for x in manifold.draw((3,), torch.Generator().manual_seed(k), dtype=F64):
            xi = at(x)
            to = chain.step(k, x.expand(len(xi), -1), xi)
            weight = density * (exact.value(to, after) / ALPHA).exp()
            h, f = chain.step_sizes[k], problem.running_cost_or_none
            cost = 0.0 if f is None else h * float(problem.running_cost(x[None], chain.times[k])) / ALPHA
            assert abs(float(exact.value(x[None], t)) / ALPHA - (math.log(float(weight.sum())) - cost)) < 1e-9
            shift = manifold.tangent(x, (weight / weight.sum()) @ xi)
            assert torch.allclose(exact.control(x[None], t)[0], shift / math.sqrt(h), atol=1e-8)


def test_a_reward_whose_exponential_is_of_degree_one_has_closed_forms():
    """``psi = 2 + q(t) <n, x>``, q the decay of degree one: of Brownian motion, of the chain (Dawson's integral), and
    with noise that depends on time."""
    n = torch.tensor([0.6, 0.0, 0.8], dtype=F64)
    x = sc.Sphere(2).draw((50,), torch.Generator().manual_seed(0), dtype=F64)
    for sigma, left in (
        (SIGMA, lambda t: SIGMA**2 * (HORIZON - t)),
        (lambda t: t + 1, lambda t: ((HORIZON + 1) ** 3 - (t + 1) ** 3) / 3),
    ):
        reference = sc.ManifoldSDE(sc.Sphere(2), None, sigma, HORIZON)
        problem = sc.ControlProblem(reference, sc.Dirac(POINT), lambda x: ALPHA * (2 + x @ n).log(), alpha=ALPHA)
        exact = sc.exact_solution(problem)
        for t in (0.0, 0.5, HORIZON):
            q = math.exp(-left(t))
            psi = 2 + q * x @ n
            assert torch.allclose(exact.value(x, t), ALPHA * psi.log(), atol=1e-12)
            want = problem.reference.level(t) * q * sc.Sphere(2).tangent(x, n.expand_as(x)) / psi[:, None]
            assert torch.allclose(exact.control(x, t), want, atol=1e-11)
        assert abs(float(exact.log_z) - math.log(2 + math.exp(-left(0.0)) * float(POINT @ n))) < 1e-12
        assert exact.floor == 0
    problem = sc.ControlProblem(
        sc.ManifoldSDE(sc.Sphere(2), None, SIGMA, HORIZON),
        sc.Dirac(POINT),
        lambda x: ALPHA * (2 + x @ n).log(),
        alpha=ALPHA,
    )
    spread = SIGMA * math.sqrt(HORIZON / K)
    m = 1 - math.sqrt(2) * spread * dawsn(spread / math.sqrt(2))
    chain = sc.exact_solution(problem, time_steps=K)
    assert torch.allclose(chain.value(x, HORIZON / 2), ALPHA * (2 + m**2 * x @ n).log(), atol=1e-12)


def test_a_reward_of_few_fourier_modes_has_closed_forms():
    reference = sc.ManifoldSDE(sc.Torus(2), None, SIGMA, HORIZON)

    def density(x, s=0.0):
        slow, fast = math.exp(-s / 2), math.exp(-5 * s / 2)
        return 3 + slow * x[:, 0].cos() + fast * (2 * x[:, 1] - x[:, 0]).sin()

    problem = sc.ControlProblem(reference, sc.Dirac(torch.zeros(2, dtype=F64)), lambda x: density(x).log())
    x = sc.Torus(2).draw((40,), torch.Generator().manual_seed(0), dtype=F64).requires_grad_(True)
    for exact in (sc.exact_solution(problem), sc.exact_solution(problem, time_steps=K)):
        for t in (0.0, HORIZON / 2, 0.75 * HORIZON):
            log_psi = density(x, SIGMA**2 * (HORIZON - t)).log()
            slope = torch.autograd.grad(log_psi.sum(), x)[0]
            assert torch.allclose(exact.value(x.detach(), t), log_psi.detach(), atol=1e-12)
            assert torch.allclose(exact.control(x.detach(), t), SIGMA * slope, atol=1e-11)


@pytest.mark.parametrize("make", [sphere, lambda: torus(1)])
def test_chains_tend_to_continuous_time_at_first_order(make):
    """On the torus they agree at every step size."""
    problem = make()
    x = problem.reference.manifold.draw((20,), torch.Generator().manual_seed(1), dtype=F64)
    errors = []
    for steps in (8, 16, 32):
        chain, exact = sc.exact_solution(problem, time_steps=steps), sc.exact_solution(problem)
        errors.append(
            [
                float((a - b).abs().max())
                for a, b in ((chain.value(x, 0.0), exact.value(x, 0.0)), (chain.control(x, 0.6), exact.control(x, 0.6)))
            ]
        )
    if problem.reference.angles:
        assert np.max(errors) < 1e-10
    else:
        ratios = np.array(errors[:-1]) / np.array(errors[1:])
        assert (abs(ratios - 2) < 0.25).all() and errors[-1][0] > 1e-4


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "sphere, a cost" else ()) for n in CASES]
)
def test_log_z_and_laws_are_those_of_weighted_paths(name):
    """Under the exact control: the mean weight of each start is ``psi(x_0)``, and weighted moments are those of
    ``marginal`` on the way and of ``sample`` at the end (4.5 standard errors)."""
    problem, n = CASES[name](), 1 << 11
    exact = sc.exact_solution(problem, time_steps=K)
    paths = sc.simulate(problem, n, exact.control, time_steps=K, seed=1)
    ratio = (paths.log_weights() - exact.value(paths.states[0], 0.0) / ALPHA).exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / n**0.5 < 0.1
    if problem.random_start:
        assert isinstance(exact.initial, UniformLaw) and float(exact.log_z) > float(exact.start_log_z) + 1e-3
    else:
        assert float(exact.log_z) == float(exact.start_log_z)
        assert abs(float(exact.log_z) - float(exact.value(paths.states[0][:1], 0.0)) / ALPHA) < 1e-12

    def seen(x):
        return torch.cat((x.cos(), x.sin(), (2 * x).cos()), 1)

    for k in (2, K):
        law = exact.marginal(problem.chain(K).clock[k])
        assert isinstance(law, SeriesLaw)
        torch.manual_seed(5)
        ours = seen(law.sample((n,)) if k < K else exact.sample(n, seed=2))
        theirs = seen(paths.states[k])
        w = (ratio / ratio.mean())[:, None]
        mean = (w * theirs).mean(0)
        error = ((w * (theirs - mean)).var(0) + ours.var(0)).sqrt() / n**0.5
        assert bool(((ours.mean(0) - mean).abs() < 4.5 * error).all())
        nodes = SphereSeries(30) if not problem.reference.angles else TorusSeries(problem.reference.manifold, 80)
        density = law.log_prob(torch.from_numpy(nodes.nodes)).exp().numpy()
        assert abs(density @ nodes.weights - 1) < 1e-6


@pytest.mark.parametrize("make", [sphere, lambda: sphere(sc.Sphere(2).uniform(F64)), lambda: torus(2)])
def test_laws_in_continuous_time_have_theorem_one_and_are_the_limit_of_chains(make):
    """From a point the end has the density ``p_T exp(r/alpha)/Z``."""
    problem = make()
    exact, chain = sc.exact_solution(problem), sc.exact_solution(problem, time_steps=64)
    x = problem.reference.manifold.draw((30,), torch.Generator().manual_seed(2), dtype=F64)
    for t in (HORIZON / 2, HORIZON):
        gap = exact.marginal(t).log_prob(x) - chain.marginal(t).log_prob(x)
        assert float(gap.abs().max()) < (1e-8 if problem.reference.angles else 0.03)
    if not problem.random_start:
        flat = sc.ControlProblem(problem.reference, problem.initial, None, alpha=ALPHA)
        reference = sc.exact_solution(flat).marginal(HORIZON).log_prob(x)
        want = reference + problem.reward(x) / ALPHA - exact.log_z
        assert torch.allclose(exact.marginal(HORIZON).log_prob(x), want, atol=1e-9)


def rough(x):
    return (x[:, 0] > 0.3).to(x.dtype)


BAD = {
    "another sphere": (
        lambda: sc.exact_solution(
            sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(3)), sc.Sphere(3).uniform(), lambda x: x[:, 0])
        ),
        r"Sphere\(2\), Torus\(1\) and Torus\(2\)",
    ),
    "another torus": (
        lambda: sc.exact_solution(sc.ControlProblem(sc.ManifoldSDE(sc.Torus(3)), sc.Torus(3).uniform(), wave)),
        r"Sphere\(2\), Torus\(1\) and Torus\(2\)",
    ),
    "a drift on the sphere": (
        lambda: sc.exact_solution(
            sc.ControlProblem(
                sc.ManifoldSDE(sc.Sphere(2), lambda x, t: x.roll(1, 1) - (x * x.roll(1, 1)).sum(1, True) * x),
                sc.Dirac(POINT),
                modes,
            ),
            time_steps=3,
        ),
        "on a sphere with a drift",
    ),
    "a cost in continuous time": (lambda: sc.exact_solution(sphere(cost=effort)), "running_cost.*time_steps=K"),
    "a drift in continuous time": (lambda: sc.exact_solution(torus(1, drift)), "reference.*time_steps=K"),
    "a temperature too low": (
        lambda: sc.exact_solution(
            sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), sigma=0.1), sc.Dirac(POINT), modes, alpha=0.01)
        ),
        "alpha: exp.v/alpha. is not resolved",
    ),
    "a jump": (
        lambda: sc.exact_solution(sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2)), sc.Dirac(POINT), rough)),
        "smoother reward",
    ),
    "elbo": (lambda: sc.exact_solution(sphere(), time_steps=3).floor, "elbo, floor"),
    "kernel": (lambda: sc.exact_solution(sphere(), time_steps=3).kernel(POINT, 0), "kernels on manifolds"),
    "bridge": (lambda: sc.exact_solution(sphere()).bridge(0.1, 0.2, POINT), "bridges on manifolds"),
    "an early law": (lambda: sc.exact_solution(sphere()).marginal(1e-4), "narrower than a series"),
    "a state": (lambda: sc.exact_solution(sphere()).value(2 * POINT[None], 0.0), "x is off the sphere"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_named(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, sc.NoExactSolution), match=message):
        call()


def test_problems_in_single_precision_and_what_is_found_without_grids():
    found, want = sc.exact_solution(sphere(dtype=torch.float32)), sc.exact_solution(sphere())
    assert found.log_z.dtype == torch.float32 and abs(float(found.log_z) - float(want.log_z)) < 1e-6
    assert "closed form" in str(sc.recommend(sphere(), time_steps=4))
    with pytest.raises(sc.NoExactSolution, match="step by step"):
        sc.exact_solution(sphere(cost=effort), time_steps=3, grids=False)
    error = sc.control_error(Exactly(sphere(), 4), sc.exact_solution(sphere(), time_steps=4), n=64)
    assert error.absolute.value < 1e-24


class Exactly:
    """A solution whose control is the exact one."""

    def __init__(self, problem, steps):
        self.problem, self.chain = problem, problem.chain(steps)
        self.control = sc.exact_solution(problem, time_steps=steps).control
