"""Chains that stop in a region: a path ends at its first state inside, with its costs and its log-ratio."""

import math

import pytest
import torch
from cases import F64, randn

import sdecontrol as sc
from sdecontrol.chains.stopped import OVERSHOOT

close = lambda a, b, tol=1e-12: torch.testing.assert_close(a, b, rtol=tol, atol=tol)  # noqa: E731
K, N = 12, 256


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def swirl(x, t):
    return torch.stack((x[:, 1].sin() - t, -x[:, 0]), 1)


def ball(x):
    return 1.3 - x.norm(dim=1)  # outside of a circle


def push(x, t):
    return 0.5 * x.cos() + t[:, None]


def around(x):
    return x.square().sum(-1)


def effort(x, t):
    return 0.3 * x.square().sum(1) * (1 + t)


def plane(stop=ball, **options):
    sde = sc.SDE(swirl, torch.tensor([[1.0, 0.2], [0.0, 0.7]]), dim=2)
    given = {"reward": around, "running_cost": effort, "alpha": 0.8, **options}
    return sc.ControlProblem(sde, sc.Dirac(torch.tensor([0.2, -0.1])), stop=stop, **given)


def simulator(stop=ball):
    chain = sc.discrete_dynamics(lambda x, w, k: x + 0.1 * x.sin() + 0.25 * w, K, dim=2, noises=2)
    return sc.ControlProblem(chain, sc.Dirac(torch.zeros(2)), around, lambda x, t: effort(x, 0 * t), stop=stop)


def sphere(stop=lambda x: x[:, 2] < 0):
    reference = sc.ManifoldSDE(sc.Sphere(2), initial=sc.Dirac(torch.tensor([0.0, 0.6, 0.8])))
    return sc.ControlProblem(reference, reward=lambda x: x[:, 0], running_cost=effort, stop=stop)


def by_hand(problem, steps, control, noises):
    """Every path one step at a time, and what it has collected when it stops: ends, kappa, costs, log-ratios."""
    inner = plane(stop=None) if problem.reference.constant_diffusion is not None else None
    ends, kappas, costs, ratios = [], [], [], []
    h, root = 1 / steps, (1 / steps) ** 0.5
    sigma = torch.tensor([[1.0, 0.2], [0.0, 0.7]])
    assert inner is not None
    for i in range(noises.shape[1]):
        x, cost, ratio, kappa = torch.tensor([[0.2, -0.1]]), 0.0, 0.0, steps
        for k in range(steps):
            if float(ball(x)) <= 0:
                kappa = min(kappa, k)
                break
            t = torch.tensor(k * h)
            c = root * push(x, t[None])
            cost = cost + h * float(effort(x, t))
            ratio = ratio + float((c * noises[k, i]).sum() + 0.5 * (c * c).sum())
            x = x + h * swirl(x, t) + root * (noises[k, i] + c / 1) @ sigma.T
        ends.append(x[0])
        kappas.append(kappa)
        costs.append(cost)
        ratios.append(ratio)
    return torch.stack(ends), torch.tensor(kappas), torch.tensor(costs), torch.tensor(ratios)


def test_a_path_ends_at_its_first_state_inside_with_costs_and_log_ratio():
    problem = plane()
    noises = randn(K, 40, 2, seed=1)
    paths = sc.simulate(problem, 40, control=push, time_steps=K, noise=noises)
    ends, kappas, costs, ratios = by_hand(problem, K, push, noises)
    assert 5 < int((kappas < K).sum()) < 40
    close(paths.end, ends)
    close(paths.running_cost, costs)
    close(paths.log_ratio(), ratios)
    close(paths.log_weights(), (around(ends) - costs) / 0.8 - ratios)
    assert torch.equal(paths.stopping_steps, kappas)
    close(paths.stopping_times, kappas.double() / K)
    assert torch.equal(paths.stopped, ball(ends) <= 0)


@pytest.mark.parametrize("make", [plane, simulator, sphere])
def test_what_is_kept_changes_nothing(make):
    problem = make()
    steps = K if make is not simulator else None
    whole = sc.simulate(problem, N, control=None, time_steps=steps, seed=2)
    assert 0.1 < float(whole.stopped.double().mean()) < 0.97
    for keep, chunk in (("states", None), ("end", None), ("end", 64)):
        other = sc.simulate(problem, N, time_steps=steps, seed=2, keep=keep, chunk=chunk)
        assert torch.equal(other.end, whole.end) and torch.equal(other.stopping_steps, whole.stopping_steps)
        assert torch.equal(other.running_cost, whole.running_cost)
    rows = torch.arange(3, 50, 7)
    assert torch.equal(whole.rows(rows).stopping_steps, whole.stopping_steps[rows])


@pytest.mark.parametrize("make", [plane, simulator, sphere])
def test_states_stand_still_and_take_no_shift(make):
    problem = make()
    control = (lambda x, t: 0.4 * x.cos()) if make is not simulator else (lambda x, t: 0.4 * x.sin())
    paths = sc.simulate(problem, N, control=control, time_steps=K if make is not simulator else None, seed=3)
    after = torch.arange(paths.steps)[:, None] >= paths.stopping_steps
    assert after.any()
    assert torch.equal(paths.states[1:][after], paths.states[:-1][after])
    assert not paths.shifts[after].any() and paths.shifts[~after].any()
    assert not paths.kl(per_step=True)[after].any() and not paths.log_ratio(per_step=True)[after].any()
    under = paths.under(lambda x, t: 1 + 0 * x[:, : problem.control_shape[0]])
    assert not under.log_ratio[after].any() and under.log_ratio[~after].any()


def test_a_quadratic_cost_ends_too():
    """Its sum over all states is made in one call."""
    cost = sc.QuadraticCost(torch.eye(2))
    a, b = (plane(running_cost=f) for f in (cost, lambda x, t: cost(x, t)))
    first, second = (sc.simulate(p, N, time_steps=K, seed=1).running_cost for p in (a, b))
    close(first, second)
    assert float((first - sc.simulate(plane(None, running_cost=cost), N, time_steps=K, seed=1).running_cost).min()) < 0


def test_tokens_stop():
    rates = torch.tensor([[-2.0, 1.0, 1.0], [1.0, -2.0, 1.0], [1.0, 1.0, -2.0]])
    problem = sc.ControlProblem(
        sc.JumpProcess(rates, initial=0), reward=lambda x: x[:, 0].double(), stop=lambda x: x[:, 0] == 2
    )
    control = lambda x, t: torch.tensor([0.3, -0.2, 0.1]).expand(len(x), 1, 3)  # noqa: E731
    paths = sc.simulate(problem, N, control=control, time_steps=K, seed=0)
    after = torch.arange(K)[:, None] >= paths.stopping_steps
    assert after.any() and (paths.states[1:][after] == 2).all()
    assert not paths.log_ratio(per_step=True)[after].any() and not paths.kl(per_step=True)[after].any()


def test_a_level_function_and_its_booleans_stop_alike():
    a = sc.simulate(plane(ball), N, control=push, time_steps=K, seed=5)
    b = sc.simulate(plane(lambda x: ball(x) <= 0), N, control=push, time_steps=K, seed=5)
    assert torch.equal(a.states, b.states)


def test_the_correction_enlarges_by_the_mean_overshoot():
    """``phi <= 0.5826 sqrt(h) |sigma^T grad phi|``, whatever the size of phi."""
    sigma = torch.tensor([[1.0, 0.2], [0.0, 0.7]])
    for scale in (1.0, 7.0):
        problem = plane(sc.Region(lambda x, s=scale: s * ball(x), boundary_correction=True))
        x = 1.2 * randn(4000, 2, seed=3)
        normal = x / x.norm(dim=1, keepdim=True)
        reach = OVERSHOOT * (1 / K) ** 0.5 * (normal @ sigma).norm(dim=1)
        found = problem.chain(K).inside(x)
        assert torch.equal(found, ball(x) <= reach)
        assert int(found.sum()) > int((ball(x) <= 0).sum()) + 100
    zeta = sum((-1) ** (n + 1) * n**-0.5 for n in range(1, 200001)) - 0.5 * 200000**-0.5 * (-1) ** 200001
    assert abs(OVERSHOOT + zeta / (1 - 2**0.5) / math.sqrt(2 * math.pi)) < 2e-3  # zeta(1/2) by Dirichlet's eta


def test_whose_paths_have_no_region_says_so():
    with pytest.raises(ValueError, match="never stops"):
        sc.simulate(plane(None), 64, time_steps=K, seed=0).stopping_steps  # noqa: B018


@pytest.mark.parametrize(
    "stop, message",
    [
        (3.0, "stop must be a function"),
        (lambda x: x, r"stop must return shape \(64,\)"),
        (lambda x: (x[:, 0] > 1).int(), "stop returned dtype torch.int32"),
        (lambda x: 1.0, "stop must return a torch tensor"),
        (lambda x: torch.ones(len(x)), "a level function that is constant"),
        (lambda x: x[:, 0] / 0 * 0, "nan at some states"),
        (lambda x: torch.rand(len(x)), "two values for the same states"),
        (lambda x: x[:, 0] - 5, "contains the start.*wrong sign"),
        (lambda x: x[:, 0] < 5, "contains the start"),
        (lambda x: x @ torch.ones(3), "stop"),
        (sc.Region(lambda x: x[:, 0] > 3, boundary_correction=True), "needs a level function"),
        (sc.Region(lambda x: (x[:, 0] < 1).double() - 0.5, boundary_correction=True), "gradient of the level function"),
        (sc.Region(lambda x: 3 - x.sign().sum(1), boundary_correction=True), "is 0 at all states tried"),
    ],
)
def test_bad_regions_are_named(stop, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        plane(stop)


def test_the_correction_says_what_it_needs():
    region = sc.Region(ball, boundary_correction=True)
    with pytest.raises(ValueError, match="needs equal steps"):
        plane(region).chain([0.0, 0.1, 1.0])
    louder = sc.SDE(swirl, lambda x, t: 1 + t + 0 * x, dim=2)
    with pytest.raises(ValueError, match="does not change with time"):
        sc.ControlProblem(louder, sc.Dirac(torch.zeros(2)), around, stop=region).chain(K)
    with pytest.raises(ValueError, match="scale of Gaussian steps"):
        simulator(region).chain()
    near = sc.Region(lambda x: ball(x) - 0.95, boundary_correction=True)
    with pytest.raises(ValueError, match="start lies within the enlarged region"):
        plane(near).chain(K)
    plane(near).chain(400)


def test_what_does_not_stop_refuses_by_name():
    with pytest.raises(ValueError, match=r"stop: scheme='srk' does not stop"):
        sc.simulate(plane(), 64, time_steps=K, scheme="srk")
    law = sc.GaussianMixture(torch.ones(1), torch.zeros(1, 2), 0.5)
    with pytest.raises(ValueError, match="not with a pre-trained model"):
        sc.ControlProblem(sc.generative_sde(law, sc.VP()), reward=around, stop=ball)
    with pytest.raises(ValueError, match="learned start"):
        sc.ControlProblem(
            sc.SDE(swirl, 1.0, dim=2),
            sc.Gaussian(torch.zeros(2), torch.eye(2)),
            around,
            start="controlled",
            stop=ball,
        )
