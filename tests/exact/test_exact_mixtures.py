"""Exact fine-tuning of Gaussian-mixture models, against quadrature, the HJB equation and the linear-quadratic route."""

import math

import pytest
import torch
from cases import F64, randn, slow_but
from dense_gaussian import SCHEDULES, mixture_2d, mixture_problem

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.exact.mixtures import MixtureSolution
from sdecontrol.exact.riccati import RiccatiSolution

close = lambda a, b, tol=1e-10: torch.testing.assert_close(a, b, rtol=tol, atol=tol)  # noqa: E731


def plane(n=401, width=9.0):
    """A fine grid of the plane ``(n^2, 2)`` and its cell's area; for smooth decaying integrands the sum is exact to
    rounding."""
    axis = torch.linspace(-width, width, n, dtype=F64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("reward", ["linear", "quadratic"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_z_and_terminal_law_by_quadrature(schedule, reward):
    problem = mixture_problem(schedule, reward=reward, components=3)
    exact = sc.exact_solution(problem)
    x, area = plane()
    p0 = problem.reference.marginal(problem.horizon)
    log_density = p0.log_prob(x) + problem.reward(x) / problem.alpha
    close(exact.log_z, log_density.logsumexp(0) + math.log(area))
    close(exact.marginal(problem.horizon).log_prob(x[::97]), log_density[::97] - exact.log_z, 1e-9)
    assert exact.elbo == exact.start_log_z == exact.log_z and exact.floor == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_marginals_are_the_references_times_exp_value(schedule):
    """``p*_t = p0_t exp(v/alpha)/Z`` with one Z (Theorem 2), each p*_t integrating to one; on the learned start too."""
    problem = mixture_problem(schedule)
    exact = sc.exact_solution(problem)
    x, area = plane(301, 30.0 if schedule == "ve" else 9.0)
    for t in (0.0, 0.3, 0.8, 1.0):
        tilted = problem.reference.marginal(t).log_prob(x) + exact.value(x, t) / problem.alpha - exact.log_z
        assert float(tilted.logsumexp(0)) + math.log(area) == pytest.approx(0, abs=1e-9)
        close(exact.marginal(t).log_prob(x[::97]), tilted[::97], 1e-8)
    for t in (-0.9, -0.4):
        close(float(exact.marginal(t).log_prob(x).exp().sum() * area), 1.0, 1e-8)
    assert isinstance(exact.marginal(-1.0), sc.Dirac)
    close(exact.value(exact.marginal(-1.0).mean[None], -1.0)[0], problem.alpha * exact.log_z, 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_value_solves_the_hjb_equation_and_the_control_is_its_gradient(schedule):
    problem = mixture_problem(schedule)
    exact, x = sc.exact_solution(problem), randn(4, 2, seed=0)
    for t in (0.15, 0.5, 0.9):
        drift = problem.reference.drift(x, torch.tensor(t, dtype=F64))
        g = problem.reference.diffusion(x, torch.tensor(t, dtype=F64))
        residual, gradient = hjb_terms(exact, x, t, drift, g * torch.eye(2, dtype=F64))
        assert residual.abs().max() < 1e-6
        close(exact.control(x, t), g * gradient / problem.alpha, 1e-9)


def test_value_on_the_learned_start_solves_the_hjb_equation_of_the_foellmer_process():
    problem = mixture_problem("vp")
    exact, x, nu = sc.exact_solution(problem), randn(4, 2, seed=0), problem.initial
    root = sc.Gaussian(nu.mean, nu.covariance_matrix).scale_root
    chain = problem.chain(400)
    for k in (20, 50, 80):
        t = chain.clock[k]
        mean, _ = chain.kernel(k, x)
        residual, gradient = hjb_terms(exact, x, t, (mean - x) / chain.step_sizes[k], root)
        assert residual.abs().max() < 1e-6
        close(exact.control(x, t), gradient @ root / problem.alpha, 1e-9)
    start = nu.mean[None]  # the limit at -1, where the laws have no density
    close(exact.control(start, -1.0), exact.control(start, -1 + 1e-6), 1e-4)


def hjb_terms(exact, x, t, drift, sigma):
    """``v_t + b.grad v + tr(Sigma hess v)/2 + |sigma' grad v|^2/(2 alpha)``, by autograd in x and differences in t."""
    value = lambda y: exact.value(y[None], t)[0]  # noqa: E731
    gradient = torch.stack([torch.func.grad(value)(y) for y in x])
    hessian = torch.stack([torch.func.hessian(value)(y) for y in x])
    e = 1e-3
    v = [exact.value(x, t + j * e) for j in (-2, -1, 1, 2)]
    v_t = (v[0] - 8 * v[1] + 8 * v[2] - v[3]) / (12 * e)
    residual = (
        v_t
        + (drift * gradient).sum(-1)
        + 0.5 * (hessian * (sigma @ sigma.mT)).sum((-2, -1))
        + ((gradient @ sigma) ** 2).sum(-1) / (2 * exact.problem.alpha)
    )
    return residual, gradient


@pytest.mark.parametrize("schedule", slow_but(SCHEDULES, "vp"))
def test_one_component_agrees_with_the_riccati_route(schedule):
    """The same problem through two routes that share only the algebra of one Gaussian."""
    problem = mixture_problem(schedule, components=1)
    linear, mixture = sc.exact_solution(problem), MixtureSolution(problem)
    assert isinstance(linear, RiccatiSolution)
    x = randn(5, 2, seed=1)
    tol = 1e-8  # the reference's coefficients stop at noising time 1e-5
    close(linear.log_z, mixture.log_z, tol)
    for t in (-0.8, -0.3, 0.0, 0.4, 0.95):
        close(linear.value(x, t), mixture.value(x, t), tol)
        close(linear.control(x, t), mixture.control(x, t), tol)
        close(linear.marginal(t).mean, mixture.marginal(t).mean, tol)
        close(linear.marginal(t).covariance_matrix, mixture.marginal(t).covariance_matrix, tol)
    for s, t in ((-0.7, -0.2), (-0.5, 0.6), (0.0, 0.5), (0.2, 0.9)):
        close(linear.bridge(s, t, x).mean, mixture.bridge(s, t, x).mean, tol)
        close(linear.bridge(s, t, x).covariance_matrix, mixture.bridge(s, t, x).covariance_matrix, tol)


def test_bridges_carry_a_later_marginal_to_an_earlier_one():
    """Integrating the bridge over p*_t gives p*_s, across time 0 too: means and second moments by quadrature."""
    exact = sc.exact_solution(mixture_problem("vp"))
    x, area = plane(201)
    for s, t in ((-0.6, -0.2), (-0.6, 0.5), (0.1, 0.7)):
        weights = exact.marginal(t).log_prob(x).exp() * area
        law, want = exact.bridge(s, t, x), exact.marginal(s)
        close(weights @ law.mean, want.mean, 1e-8)
        second = law.covariance_matrix[0] + (law.mean * weights[:, None]).mT @ law.mean
        close(second, want.covariance_matrix + torch.outer(want.mean, want.mean), 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("start, schedule", [("controlled", sc.VP(0.1, 6.0)), (None, sc.VP(0.1, 20.0))])
def test_the_simulated_optimum_ends_in_the_tilted_mixture(start, schedule):
    problem = sc.ControlProblem(
        sc.generative_sde(mixture_2d(), schedule),
        reward=sc.Linear(torch.tensor([0.7, -0.4], dtype=F64)),
        alpha=0.6,
        start=start,
    )
    exact = sc.exact_solution(problem)
    paths = sc.simulate(problem, 4096, control=exact.control, time_steps=150, seed=0)
    log_w = log_weights(problem, paths)
    assert (
        abs(float(log_w.mean() - exact.log_z)) < 0.02 and float(log_w.std()) < 0.2
    )  # the discretisation is what is left
    law = exact.marginal(problem.horizon)
    assert ((paths.end.mean(0) - law.mean).abs() < 0.03 + 4 * (law.variance / 4096).sqrt()).all()
    x = exact.sample(20_000, seed=1)
    assert ((x.mean(0) - law.mean).abs() / (law.variance / 20_000).sqrt()).max() < 4.5
    assert abs(exact.evaluate(1024, seed=0).gap.value) < 0.05


def test_what_depends_on_a_fixed_start_is_refused():
    exact = sc.exact_solution(mixture_problem("vp", start="fixed"))
    controlled = sc.exact_solution(mixture_problem("vp"))
    x = randn(3, 2, seed=0)
    close(exact.value(x, 0.4), controlled.value(x, 0.4))
    close(exact.control(x, 0.4), controlled.control(x, 0.4))
    close(exact.log_z, controlled.log_z)
    questions = [
        lambda: exact.marginal(1.0),
        lambda: exact.sample(3),
        lambda: exact.bridge(0.1, 0.5, x),
        lambda: exact.initial,
        lambda: exact.start_log_z,
        lambda: exact.elbo,
    ]
    for question in questions:
        with pytest.raises(sc.NoExactSolution, match="fixed start"):
            question()
    assert exact.evaluate(256, seed=0).n == 256


def test_mixtures_without_a_closed_form_name_what_is_missing():
    mixture, g = mixture_2d(), torch.ones(2, dtype=F64)
    sde = sc.generative_sde(mixture, SCHEDULES["vp"])
    normal = sc.Gaussian(torch.zeros(2, dtype=F64), 1.0)
    bad = {
        "noise_level": sc.ControlProblem(
            sc.generative_sde(mixture, SCHEDULES["vp"], noise_level=1.0), reward=sc.Linear(g)
        ),
        "running_cost": sc.ControlProblem(
            sde, reward=sc.Linear(g), running_cost=sc.QuadraticCost(torch.eye(2, dtype=F64))
        ),
        "initial": sc.ControlProblem(sde, normal, reward=sc.Linear(g), start="controlled"),
        "in component": sc.ControlProblem(sde, reward=sc.Quadratic(-50 * torch.eye(2, dtype=F64))),
        "reward": sc.ControlProblem(sde, reward=lambda x: x.sum(-1)),
    }
    for match, problem in bad.items():
        with pytest.raises(sc.NoExactSolution, match=match):
            sc.exact_solution(problem)
    good = sc.ControlProblem(
        sde, sde.marginal(0.0), reward=sc.Linear(g), start="controlled"
    )  # an equal start is the own start
    exact = sc.exact_solution(good)
    with pytest.raises(sc.NoExactSolution, match="one step of a chain"):
        exact.kernel(torch.zeros(1, 2, dtype=F64), 0)
    single = sc.ControlProblem(
        sc.generative_sde(mixture_2d(1), SCHEDULES["vp"], noise_level=1.0),
        normal,
        reward=sc.Linear(g),
        start="controlled",
    )
    assert isinstance(
        sc.exact_solution(single), RiccatiSolution
    )  # one component is linear: any noise, any Gaussian start


def test_a_strong_tilt_that_empties_a_component_is_no_problem():
    problem = sc.ControlProblem(
        sc.generative_sde(mixture_2d(), SCHEDULES["vp"]),
        reward=sc.Linear(torch.tensor([900.0, 0.0], dtype=F64)),
        start="controlled",
    )
    exact = sc.exact_solution(problem)
    x = exact.sample(100, seed=0)
    assert torch.isfinite(exact.control(x, 0.5)).all() and torch.isfinite(exact.value(x, -0.5)).all()


# ---------------------------------------------------------------- chains and models of one coordinate at a time


def tuned_1d(model, **options):
    sde = sc.generative_sde(model, sc.VP(), shape=(1,), **options)
    reward = sc.Quadratic(torch.tensor([[0.3]], dtype=F64), torch.ones(1, dtype=F64))
    start = sc.Gaussian(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    return sc.ControlProblem(sde, start, reward=reward, alpha=0.7)


TWO = sc.GaussianMixture(
    torch.tensor([0.6, 0.4], dtype=F64), torch.tensor([[-1.5], [1.5]], dtype=F64), torch.tensor(0.1, dtype=F64)
)


class Score(torch.nn.Module):
    """The mixture's own score, as somebody's model of which nothing is known."""

    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(torch.tensor([-1.5, 1.5], dtype=F64))

    def forward(self, x, s):
        vp = sc.VP()
        mu, var = vp.mu(s).unsqueeze(1), vp.std(s).unsqueeze(1) ** 2
        d = x - mu * self.means
        v = 0.1 * mu**2 + var
        logits = torch.tensor([0.6, 0.4], dtype=x.dtype).log() - 0.5 * d**2 / v
        return -(logits.softmax(1) * d / v).sum(1, keepdim=True)


@pytest.mark.slow
def test_a_model_of_one_coordinate_is_solved_on_a_grid_and_agrees_with_the_mixture():
    grid = sc.exact_solution(tuned_1d(Score(), prediction="score"))
    problem = tuned_1d(TWO)
    closed = sc.exact_solution(sc.ControlProblem(problem.reference, reward=problem.reward_function, alpha=0.7))
    x = torch.linspace(-2, 2, 9, dtype=F64).unsqueeze(1)
    for t in (0.1, 0.5, 0.9):
        assert torch.allclose(grid.value(x, t), closed.value(x, t), atol=1e-4)


@pytest.mark.parametrize("scheme", slow_but(["euler", "exponential"], "exponential"))
def test_the_chain_of_a_tuned_mixture_is_solved_by_dynamic_programming(scheme):
    """Its log Z is the mean weight of the chain's paths, under its own control (few paths are enough); that of
    another chain is not."""
    problem = tuned_1d(TWO)
    chain = sc.exact_solution(problem, 10, scheme=scheme)
    paths = sc.simulate(problem, 2**17, control=chain.control, time_steps=10, scheme=scheme, seed=1, keep="end")
    weights = paths.towards(problem).log_weights().exp()
    error = float(weights.std() / weights.mean()) / 2**8.5
    found = float(weights.mean().log())
    assert error < 4e-3 and abs(float(chain.log_z) - found) < 4 * error
    if scheme == "euler":
        assert abs(float(sc.exact_solution(problem, 20, scheme=scheme).log_z) - found) > 8 * error


def test_a_model_that_does_not_compute_in_float64_is_named():
    class Single(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x, s):
            return self.layer(x)

    problem = sc.ControlProblem(
        sc.generative_sde(Single(), sc.VP(), shape=(1,)), reward=sc.Linear(torch.ones(1)), alpha=1.0
    )
    with pytest.raises(sc.NoExactSolution, match=r"computes in float64.*model\.double\(\)"):
        sc.exact_solution(problem)


def test_laws_of_a_chain_whose_mixture_start_is_learned():
    """The first state is a point, so the laws of the chain are known: the end's mean and variance by weighted paths."""
    mixture = sc.GaussianMixture(
        *(torch.tensor(v, dtype=torch.float64) for v in ([0.6, 0.4], [[-1.5], [1.0]], [0.2, 0.4]))
    )
    reward = lambda x: torch.sin(2 * x).sum(-1)  # noqa: E731
    problem = sc.ControlProblem(
        sc.generative_sde(mixture, schedule=sc.VP(0.5, 2.0)), reward=reward, alpha=0.7, start="controlled"
    )
    exact = sc.exact_solution(problem, 8)
    paths = sc.simulate(problem, 20_000, control=exact.control, time_steps=8, seed=0)
    weights = log_weights(problem, paths).softmax(0)
    law, x = exact.marginal(1.0), paths.end[:, 0]
    for want, value in ((law.mean[0], x), (law.variance[0], (x - law.mean[0]) ** 2)):
        error = float((weights**2 * (value - want) ** 2).sum()) ** 0.5
        assert abs(float((weights * value).sum() - want)) < 4 * error
