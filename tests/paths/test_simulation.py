"""The integrator and Paths: exact steps, exact log-ratios, seeds, resuming."""

import itertools
import math

import pytest
import torch
from cases import F64, SmallControl, nonlinear, randn, random_lq
from hypothesis import given, settings
from hypothesis import strategies as st

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.randomness import SeededNoise

Z_FOUR = 4.0  # four standard errors: two-sided false alarm 6e-5 a comparison


def within(samples, value, z=Z_FOUR):
    mean, error = float(samples.mean()), float(samples.std()) / math.sqrt(len(samples))
    assert abs(mean - value) < z * error, f"{mean} ± {error} against {value}"


def test_an_euler_path_is_the_recursion_written_by_hand():
    problem, u = nonlinear(), SmallControl(2, 3)
    paths = sc.simulate(problem, 5, control=u, time_steps=[0.0, 0.1, 0.4, 1.0], seed=1)
    x, cost, ratio = problem.draw_start(5, 1), 0.0, 0.0
    for k, (t, h) in enumerate(((0.0, 0.1), (0.1, 0.3), (0.4, 0.6))):
        t = torch.tensor(t, dtype=F64)
        sigma, xi = problem.reference.diffusion(x, t), paths.noises[k]
        control = u(x, t.expand(5)).detach()
        cost = cost + h * t * x[:, 0] ** 2
        ratio = ratio + math.sqrt(h) * (control * xi).sum(1) + h * (control**2).sum(1) / 2
        drift = problem.reference.drift(x, t)
        x = x + h * drift + (sigma @ (h * control + math.sqrt(h) * xi)[..., None])[..., 0]
        assert torch.allclose(paths.states[k + 1], x, atol=1e-13)
    assert torch.allclose(paths.running_cost, cost, atol=1e-13)
    assert torch.allclose(paths.log_ratio(), ratio, atol=1e-13)
    assert torch.allclose(paths.controls[1], u(paths.states[1], paths.times[1].expand(5)), atol=1e-13)


def log_density(problem, paths, control):
    """Sum of log N(x_{k+1}; mean, h sigma sigma') computed from the states alone (square invertible sigma)."""
    total = 0.0
    for k in range(len(paths.times) - 1):
        x, t, h = paths.states[k], paths.times[k], paths.times[k + 1] - paths.times[k]
        sigma = problem.reference.diffusion(x, t)[0]
        mean = x + h * problem.reference.drift(x, t)
        if control is not None:
            mean = mean + h * control(x, t.expand(len(x))) @ sigma.mT
        law = torch.distributions.MultivariateNormal(mean, h * sigma @ sigma.mT)
        total = total + law.log_prob(paths.states[k + 1])
    return total


def test_log_ratio_is_the_ratio_of_transition_densities_for_any_control_on_any_paths():
    problem = random_lq(2, seed=3)
    v, u = SmallControl(2, 2, seed=1), SmallControl(2, 2, seed=5)
    with torch.no_grad():
        for driver in (None, v):
            paths = sc.simulate(problem, 6, control=driver, time_steps=7, seed=2)
            base = log_density(problem, paths, None)
            assert torch.allclose(paths.log_ratio(u), log_density(problem, paths, u) - base, atol=1e-10)
            own = torch.zeros(6, dtype=F64) if driver is None else log_density(problem, paths, v) - base
            assert torch.allclose(paths.log_ratio(), own, atol=1e-10)
            assert torch.allclose(paths.log_ratio(u, per_step=True).sum(0), paths.log_ratio(u))


@pytest.mark.parametrize("scheme", ["euler", "exact"])
def test_girsanov_weights_have_mean_one_and_the_kl_of_the_closed_form(scheme):
    """E_{Q0}[dP^u/dQ0] = 1 at a coarse grid, and KL = sum h |u|^2 / 2 for a constant control."""
    problem = random_lq(2, m=3, seed=5, running=False)
    u = torch.tensor([0.5, -0.3, 0.4], dtype=F64)
    control = lambda x, t: u.expand(len(x), 3)  # noqa: E731
    reference = sc.simulate(problem, 100_000, time_steps=5, scheme=scheme, seed=3, keep="all")
    within(reference.log_ratio(control).exp(), 1.0)
    driven = sc.simulate(problem, 100_000, control=control, time_steps=5, scheme=scheme, seed=4)
    if scheme == "euler":
        assert float(driven.kl().mean()) == pytest.approx(float(u @ u) / 2, rel=1e-12)
    within(driven.log_ratio(), float(driven.kl().mean()))
    within((-driven.log_ratio()).exp(), 1.0)


@pytest.mark.parametrize("scheme", ["euler", "exact"])
def test_z_is_unbiased_at_a_coarse_grid_for_a_wrong_control(scheme):
    problem = random_lq(2, seed=7)
    exact = sc.exact_solution(problem, time_steps=5, scheme=scheme)
    paths = sc.simulate(problem, 200_000, control=SmallControl(2, 2), time_steps=5, scheme=scheme, seed=1, keep="end")
    within(log_weights(problem, paths).exp(), float(exact.log_z.exp()))


def test_exact_transitions_give_the_closed_form_marginals():
    problem = random_lq(3, seed=2, start="fixed")
    paths = sc.simulate(problem, 100_000, time_steps=[0.0, 0.37, 1.0], scheme="exact", seed=1)
    for k, t in enumerate((0.0, 0.37, 1.0)):
        law = problem.reference.marginal(t, problem.initial)
        x = paths.states[k]
        error = (x.mean(0) - law.mean).abs() / (law.variance / len(x)).sqrt()
        assert error.max() < Z_FOUR
        cov = law.covariance_matrix
        spread = ((cov**2 + torch.outer(law.variance, law.variance)) / len(x)).sqrt()
        assert ((torch.cov(x.mT) - cov).abs() / spread).max() < Z_FOUR


def test_euler_marginals_are_those_of_the_discrete_recursion():
    problem = random_lq(2, m=3, seed=2, start="fixed")
    steps = 10
    mean, cov = problem.initial.mean, problem.initial.covariance_matrix
    A, a, root = (torch.from_numpy(c) for c in problem.reference.coefficients(0.0))
    for _ in range(steps):
        M = torch.eye(2, dtype=F64) + A / steps
        mean, cov = M @ mean + a / steps, M @ cov @ M.mT + root @ root.mT / steps
    x = sc.simulate(problem, 100_000, time_steps=steps, seed=4, keep="end").end
    assert ((x.mean(0) - mean).abs() / (cov.diagonal() / len(x)).sqrt()).max() < Z_FOUR
    spread = ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / len(x)).sqrt()
    assert ((torch.cov(x.mT) - cov).abs() / spread).max() < Z_FOUR


def test_the_learned_start_reproduces_the_start_exactly():
    for m in (1, 2, 4):  # noise of the learned start and of the process have different sizes
        problem = random_lq(2, m=m, seed=2, start="controlled")
        chain = problem.chain(20)
        paths = sc.simulate(problem, 100_000, time_steps=20, seed=4)
        x = paths.states[chain.start]
        cov = problem.initial.covariance_matrix
        assert paths.times[0] == -1 and paths.times[chain.start] == 0
        assert torch.equal(paths.states[0], problem.initial.mean.expand_as(x))
        assert ((x.mean(0) - problem.initial.mean).abs() / (cov.diagonal() / len(x)).sqrt()).max() < Z_FOUR
        spread = ((cov**2 + torch.outer(cov.diagonal(), cov.diagonal())) / len(x)).sqrt()
        assert ((torch.cov(x.mT) - cov).abs() / spread).max() < Z_FOUR


def test_the_learned_start_of_a_mixture_converges_to_the_mixture():
    gm = sc.GaussianMixture(torch.tensor([0.3, 0.7]), torch.tensor([[-2.0, 0.0], [1.0, 1.0]]), torch.tensor([0.3, 0.2]))
    problem = sc.ControlProblem(sc.generative_sde(gm, sc.VP(1.0, 1.0)), start="controlled")
    law = problem.initial
    assert isinstance(law, sc.GaussianMixture)
    errors = []
    for steps in (40, 160):
        chain = problem.chain(steps)
        x = sc.simulate(problem, 20_000, time_steps=steps, seed=4).states[chain.start]
        errors.append(sc.metrics.sliced_wasserstein(x, law.sample((20_000,)), directions=20))
    assert errors[1] < 0.035 and errors[1] < errors[0]


# ------------------------------------------------------------------------------------------------ seeds and noise


@given(batch=st.integers(1, 200), more=st.integers(1, 200), steps=st.integers(1, 90), seed=st.integers(0, 2**62))
@settings(max_examples=25, deadline=None)
def test_noise_of_a_path_does_not_depend_on_the_batch(batch, more, steps, seed):
    make = lambda n: SeededNoise(seed, n, steps, (3,), dtype=torch.float32, device="cpu")  # noqa: E731
    small, large = make(batch).all(), make(batch + more).all()
    assert small.shape == (steps, batch, 3)
    assert torch.equal(small, large[:, :batch])
    assert torch.equal(make(batch)[steps - 1], small[-1])  # in any order


def test_the_same_seed_gives_the_same_path_whatever_is_kept():
    problem, u = nonlinear(torch.float32), SmallControl(2, 3, dtype=torch.float32)
    whole = sc.simulate(problem, 130, control=u, time_steps=70, seed=9)
    for keep in ("states", "end"):
        other = sc.simulate(problem, 130, control=u, time_steps=70, seed=9, keep=keep)
        assert torch.equal(other.end, whole.end)
        assert torch.equal(other.noises, whole.noises) and torch.equal(other.states, whole.states)
        assert torch.allclose(other.log_ratio(), whole.log_ratio(), atol=1e-5)
        assert torch.allclose(other.kl(), whole.kl(), atol=1e-5)
    assert not torch.equal(sc.simulate(problem, 130, control=u, time_steps=70, seed=10).end, whole.end)


def test_a_path_resumes_from_a_stored_state():
    problem, u = nonlinear(), SmallControl(2, 3)
    whole = sc.simulate(problem, 10, control=u, time_steps=20, seed=9)
    rest = sc.simulate(problem, 10, control=u, time_steps=20, seed=9, state=whole.states[7], step=7)
    assert torch.equal(rest.states, whole.states[7:])
    assert torch.equal(rest.times, whole.times[7:])


def test_supplied_noise_and_antithetic_pairs():
    problem = random_lq(2, seed=1)
    first = sc.simulate(problem, 8, time_steps=6, seed=1, antithetic=True)
    assert torch.equal(first.noises[:, ::2], -first.noises[:, 1::2])
    u = SmallControl(2, 2)
    common = sc.simulate(problem, 8, control=u, time_steps=6, noise=first.noises)
    assert torch.equal(common.noises, first.noises)


def test_seed_none_follows_torch_manual_seed():
    problem = random_lq(2, seed=1)
    torch.manual_seed(5)
    a, b = sc.simulate(problem, 4, time_steps=3).end, sc.simulate(problem, 4, time_steps=3).end
    torch.manual_seed(5)
    assert torch.equal(sc.simulate(problem, 4, time_steps=3).end, a) and not torch.equal(a, b)


@given(steps=st.integers(1, 3000), horizon=st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_a_uniform_grid_has_exactly_its_number_of_steps(steps, horizon):
    grid = sc.BrownianMotion(1, horizon=horizon).default_grid(steps)
    assert len(grid) == steps + 1 and grid[0] == 0 and grid[-1] == horizon
    assert all(b > a for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize("shape", [(1,), (3, 4), (1, 8, 8)])
@pytest.mark.parametrize("sigma", ["number", "event"])
def test_states_of_any_rank(shape, sigma):
    scale = 0.5 if sigma == "number" else torch.rand(shape, dtype=F64) + 0.1
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -x, scale, shape=shape),
        initial=sc.Gaussian(torch.zeros(shape, dtype=F64), 1.0),
        reward=lambda x: -(x**2).flatten(1).sum(1),
    )
    paths = sc.simulate(problem, 7, control=lambda x, t: 0.1 * x, time_steps=4, seed=1)
    assert paths.states.shape == (5, 7, *shape) and paths.log_ratio().shape == (7,)
    assert paths.log_ratio(per_step=True).shape == (4, 7)
    total = (paths.shifts * (paths.noises + paths.shifts / 2)).flatten(2).sum(2).sum(0)
    assert torch.allclose(paths.log_ratio(), total)  # a sum over the event, not a mean


def test_conditions_reach_drift_control_and_reward():
    labels = torch.tensor([[0.0], [1.0], [2.0]])
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t, y: y - x, 0.5, dim=1),
        initial=sc.Dirac(torch.zeros(1)),
        reward=lambda x, y: -((x - y) ** 2).sum(1),
        condition=labels,
    )
    paths = sc.simulate(problem, 300, control=lambda x, t, y: y, time_steps=30, seed=0)
    assert paths.condition.shape == (300, 1) and set(paths.condition.flatten().tolist()) == {0.0, 1.0, 2.0}
    for y in (0.0, 2.0):
        assert abs(float(paths.end[paths.condition[:, 0] == y].mean()) - 1.5 * 0.64 * y) < 0.25
    fixed = sc.simulate(problem, 20, time_steps=3, condition=torch.full((20, 1), 2.0))
    assert (fixed.condition == 2).all()


def test_control_of_minimum_norm_where_noises_outnumber_states():
    problem = random_lq(2, m=3, seed=5)
    chain = problem.chain(4, "exact")
    x, u = randn(6, 2, seed=2), randn(6, 3, seed=1)
    c = chain.shift_at(0, x, u)
    least = chain.control(0, c)
    assert torch.allclose(chain.shift_at(0, x, least), c, atol=1e-12)
    assert (least.norm(dim=1) <= u.norm(dim=1) + 1e-12).all()
