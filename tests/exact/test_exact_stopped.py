"""Exact solutions of chains that stop, and of rewards that are -inf, against closed forms and other quadrature."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import F64
from scipy.integrate import quad
from scipy.special import ndtr

import sdecontrol as sc
from sdecontrol.evaluation.estimates import log_mean_weight, mean_estimate

close = lambda a, b, tol=1e-9: torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)  # noqa: E731
INF = math.inf


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def still(x, t):
    return torch.zeros_like(x)


def pull(x, t):
    return -x


def line(start=0.0, drift=still, sigma=1.0, horizon=1.0, **options):
    law = start if not isinstance(start, float) else sc.Dirac(torch.tensor([start]))
    return sc.ControlProblem(sc.SDE(drift, torch.tensor(sigma), dim=1, horizon=horizon), law, **options)


def above(a):
    return lambda x: torch.where(x[:, 0] > a, 0.0, -INF)


def strip(x):
    return torch.minimum(x[:, 0], 1 - x[:, 0])  # outside of (0, 1)


# ---------------------------------------------------------------- figures of docs/mathematics.md


@pytest.mark.parametrize("correction, want", [(False, 0.2089), (True, 0.2307)])
def test_one_barrier(correction, want):
    """P(max of a Brownian motion on [0, 1] > 1.2) is 2 (1 - Phi(1.2)) = .2301 in continuous time."""
    assert abs(2 * (1 - ndtr(1.2)) - 0.2301) < 5e-5
    stop = sc.Region(lambda x: 1.2 - x[:, 0], boundary_correction=correction)
    chain = line(stop=stop, reward=above(1.0)).chain(100)
    # an event of the enlarged region, whose edge is 1.2 - 0.0583
    problem = line(stop=stop, reward=lambda x: torch.where(chain.inside(x), 0.0, -INF))
    assert abs(float(sc.exact_solution(problem, 100).log_z.exp()) - want) < 5e-5


@pytest.mark.parametrize("correction, want", [(False, 0.3209), (True, 0.29999)])
def test_a_committor(correction, want):
    """From 0.3 a Brownian motion reaches 1 before 0 with probability 0.3; the horizon leaves out 2e-7 of that."""
    problem = line(0.3, horizon=3.0, stop=sc.Region(strip, boundary_correction=correction), reward=above(0.5))
    solution = sc.exact_solution(problem, 300)
    assert abs(float(solution.log_z.exp()) - want) < 1e-4 if not correction else 2e-5
    if correction:  # u* = sigma grad log q = 1/x
        x = torch.linspace(0.2, 0.7, 6)[:, None]
        torch.testing.assert_close(solution.control(x, 0.0), 1 / x, rtol=0.03, atol=0.0)
        assert solution.elbo == -INF and solution.floor == INF


def test_a_mean_first_passage_time():
    """``E tau = x (1 - x)`` out of (0, 1), as the slope of ``-log E exp(-s tau)`` at 0."""
    s = 1e-4
    stop = sc.Region(strip, boundary_correction=True)
    problem = line(0.3, horizon=3.0, stop=stop, running_cost=lambda x, t: s + 0 * x[:, 0])
    solution = sc.exact_solution(problem, 300)
    assert abs(float(-solution.log_z) / s - 0.21) < 0.003
    paths = sc.simulate(problem, 4096, time_steps=300, seed=0, keep="states")
    mean = mean_estimate(paths.stopping_times)
    assert abs(mean.value - float(-solution.log_z) / s) < 4 * mean.stderr + 1e-3


def test_a_rare_event_of_a_linear_chain():
    h, K, a = 0.01, 100, 3.7
    variance = h * sum((1 - h) ** (2 * i) for i in range(K))
    solution = sc.exact_solution(line(drift=pull, reward=above(a)), K)
    close(solution.log_z, math.log(0.5 * math.erfc(a / math.sqrt(2 * variance))), 1e-8)
    # far from the event the best shift is that of the Gaussian bridge to it
    assert float(solution.control(torch.zeros(1, 1), 0.0)) > 1.5


# ---------------------------------------------------------------- against quadrature of its own


def nested(problem, h, edge, reward, cost, K=2):
    """``psi_0`` of a chain that stops above ``edge`` in K steps, by scipy."""
    root = h**0.5

    def density(z):
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    def psi(k, x):
        if x >= edge or k == K:
            return math.exp(reward(x))
        mean, scale = x + h * math.sin(x), root * (0.6 + 0.2 * math.cos(x))
        f = lambda y: density((y - mean) / scale) / scale * psi(k + 1, y)  # noqa: E731
        low, high = mean - 9 * scale, mean + 9 * scale
        cuts = [low, *([edge] if low < edge < high else []), high]
        options = {"epsabs": 1e-12, "epsrel": 1e-11, "limit": 200}
        return math.exp(-h * cost(x)) * sum(quad(f, a, b, **options)[0] for a, b in pairwise(cuts))

    return lambda x: math.log(psi(0, x))


def curved(**options):
    drift = lambda x, t: x.sin()  # noqa: E731
    sde = sc.SDE(drift, lambda x, t: 0.6 + 0.2 * x.cos(), dim=1, horizon=0.5)
    given = {"stop": lambda x: 0.7 - x[:, 0], "reward": lambda x: x[:, 0].sin(), **options}
    given.setdefault("running_cost", lambda x, t: 0.4 * x[:, 0] ** 2)
    return sc.ControlProblem(sde, given.pop("initial", sc.Dirac(torch.tensor([0.2]))), **given)


def test_values_of_a_nonlinear_chain():
    solution = sc.exact_solution(curved(), 2)
    want = nested(None, 0.25, 0.7, math.sin, lambda x: 0.4 * x * x)
    points = [-0.6, 0.2, 0.69, 0.75]
    close(solution.value(torch.tensor(points)[:, None], 0.0), torch.tensor([want(x) for x in points]), 1e-8)
    close(solution.log_z, want(0.2), 1e-8)


def test_the_best_shift_of_one_step():
    """Of the last step, by scipy's search."""
    from scipy.optimize import minimize_scalar

    problem = curved(running_cost=None)
    solution = sc.exact_solution(problem, 2)
    h = 0.25
    for x in (-0.3, 0.4, 0.65):
        mean, scale = x + h * math.sin(x), h**0.5 * (0.6 + 0.2 * math.cos(x))

        def loss(c, mean=mean, scale=scale):
            f = lambda z: math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * math.sin(mean + scale * (c + z))  # noqa: E731
            return -(quad(f, -10, 10, epsabs=1e-13)[0] - 0.5 * c * c)

        best = minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-10}).x
        close(solution.control(torch.tensor([[x]]), 0.25)[0, 0], torch.tensor(best / h**0.5), 1e-5)
    assert float(solution.control(torch.tensor([[0.8]]), 0.25)) == 0  # it has stopped


@pytest.mark.parametrize("random", [False, True])
def test_simulated_with_the_control_the_weights_agree(random):
    initial = sc.Gaussian(torch.tensor([0.1]), torch.tensor([[0.04]])) if random else sc.Dirac(torch.tensor([0.1]))
    problem = curved(initial=initial, reward=lambda x: 2 * (x[:, 0] > 0.7).double(), alpha=0.7)
    solution = sc.exact_solution(problem, 8)
    paths = sc.simulate(problem, 20000, control=solution.control, seed=1)
    log_w = paths.log_weights()
    lower, level = mean_estimate(log_w), log_mean_weight(log_w)
    assert lower.stderr < 0.01
    assert abs(lower.value - float(solution.elbo)) < 4 * lower.stderr
    assert abs(level.value - float(solution.log_z)) < 4 * level.stderr
    assert float(solution.elbo) < float(solution.start_log_z) <= float(solution.log_z)
    assert (float(solution.log_z) - float(solution.start_log_z) > 1e-3) == random
    worse = sc.simulate(problem, 20000, control=lambda x, t: 1.1 * solution.control(x, t) + 0.1, time_steps=8, seed=1)
    assert mean_estimate(worse.log_weights()).value < float(solution.elbo) - 1e-3


def test_a_scheme_of_several_noises():
    sde = sc.LinearSDE(torch.tensor([[-0.5]]), torch.tensor([[0.6, 0.8]]))
    one = sc.LinearSDE(torch.tensor([[-0.5]]), torch.tensor([[1.0]]))
    a, b = (
        sc.exact_solution(
            sc.ControlProblem(s, sc.Dirac(torch.zeros(1)), lambda x: x[:, 0], stop=lambda x: 0.8 - x[:, 0]), 10
        )
        for s in (sde, one)
    )
    x = torch.tensor([[-0.3], [0.5]])
    close(a.value(x, 0.3), b.value(x, 0.3))
    close(a.control(x, 0.3), b.control(x, 0.3) @ torch.tensor([[0.6, 0.8]]))


# ---------------------------------------------------------------- finite state spaces


def ruin(down=1.0, up=2.0, n=6, **options):
    rates = torch.diag(torch.full((n - 1,), up), 1) + torch.diag(torch.full((n - 1,), down), -1)
    rates = rates - torch.diag(rates.sum(1))
    ends = lambda x: (x[:, 0] == 0) | (x[:, 0] == n - 1)  # noqa: E731
    return sc.ControlProblem(sc.JumpProcess(rates, horizon=80.0), sc.Dirac(torch.tensor([2])), stop=ends, **options)


def test_the_gamblers_ruin():
    problem = ruin(reward=lambda x: torch.where(x[:, 0] == 5, 0.0, -40.0))
    want = (1 - 0.5**2) / (1 - 0.5**5)
    close(sc.exact_solution(problem).log_z.exp(), want, 1e-10)
    s = 1e-3  # E exp(-s tau), from the linear equations for it
    Q = np.diag(np.full(3, 1.0), -1) + np.diag(np.full(3, 2.0), 1) - 3 * np.eye(4)
    left = np.linalg.solve(s * np.eye(4) - Q, np.array([1.0, 0, 0, 2.0]))
    timed = ruin(running_cost=lambda x, t: s + 0 * x[:, 0].double())
    close(sc.exact_solution(timed).log_z, math.log(left[1]), 1e-9)


def test_a_finite_chain_that_stops_takes_the_tilt_that_is_exact():
    problem = ruin(reward=lambda x: 2.0 * (x[:, 0] == 0).double(), running_cost=lambda x, t: 0.1 + 0 * x[:, 0].double())
    solution = sc.exact_solution(problem, 400)
    log_w = sc.simulate(problem, 64, control=solution.control, seed=0).log_weights()
    close(log_w, torch.full((64,), float(solution.log_z)), 1e-9)  # the tilt is the optimum: weights do not vary
    late = solution.marginal(80.0)
    assert float(late.probs[[0, 5]].sum()) > 1 - 1e-9


# ---------------------------------------------------------------- what is not known


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda p: sc.exact_solution(p), "pass time_steps"),
        (lambda p: sc.exact_solution(p, 2, grids=False), "stop: no closed form"),
        (lambda p: sc.exact_solution(p, 2).marginal(0.25), "laws of a chain that stops"),
        (lambda p: sc.exact_solution(p, 2).kernel(torch.zeros(1), 0), "kernels of a chain that stops"),
        (lambda p: sc.exact_solution(p, 2).bridge(0.0, 0.25, torch.zeros(1)), "bridges of a chain that stops"),
        (lambda p: sc.exact_solution(line(drift=lambda x, t: 1 + 0 * x, sigma=1e-3, stop=p.stop), 5), "so narrow"),
    ],
)
def test_what_is_not_known_is_said(ask, message):
    with pytest.raises(sc.NoExactSolution, match=message):
        ask(curved(running_cost=None))


def test_a_reward_of_minus_infinity_everywhere_is_said():
    with pytest.raises(sc.NoExactSolution, match="wherever"):
        sc.exact_solution(line(reward=lambda x: torch.full_like(x[:, 0], -INF)), 4)
