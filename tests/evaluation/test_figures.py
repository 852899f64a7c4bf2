"""The figures the project is held to: solutions near the floor, fine-tuned mixtures, and the face of the README."""

import math

import pytest
import torch
from cases import F64, random_lq

import sdecontrol as sc
from sdecontrol.processes.laws import draw


def test_the_face_control_problem():
    sde = sc.LinearSDE(A=-torch.eye(2), sigma=torch.eye(2), offset=None, horizon=1.0)
    problem = sc.ControlProblem(
        sde,
        initial=sc.Dirac(torch.zeros(2)),
        reward=sc.Quadratic(G=torch.eye(2), g=torch.ones(2)),
        running_cost=sc.QuadraticCost(F=0.1 * torch.eye(2)),
        alpha=0.5,
    )
    solution = sc.solve(problem, sc.RewardBackprop(), time_steps=50, iterations=60, batch_size=128, seed=0)
    x = torch.randn(7, 2)
    for t in (0.3, torch.tensor(0.3), torch.full((7,), 0.3)):
        assert solution.control(x, t).shape == (7, 2)
    assert solution.sample(1000, seed=1).shape == (1000, 2)
    x, log_w = solution.weighted_sample(1000)
    assert x.shape == (1000, 2) and log_w.shape == (1000,)
    ev = solution.evaluate(4096, seed=2)
    for name in ("reward", "running_cost", "kl", "objective", "elbo", "log_z", "ess", "gap"):
        assert math.isfinite(getattr(ev, name).value) and math.isfinite(getattr(ev, name).stderr)
    assert ev.reliable is True and 0 < ev.ess.value <= 1
    for exact in (
        sc.exact_solution(problem),
        sc.exact_solution(problem, time_steps=50),
        sc.exact_solution(problem, like=solution),
    ):
        assert exact.value(x, 0.3).shape == (1000,) and exact.log_z.ndim == 0
        assert exact.marginal(0.5).sample((3,)).shape == (3, 2)
        assert exact.bridge(0.2, 0.6, x).mean.shape == (1000, 2)
        assert exact.sample(5, seed=1).shape == (5, 2) and exact.control(x, 0.1).shape == (1000, 2)
        error = sc.control_error(solution, exact, n=512)
        assert error.absolute.value > 0 and error.relative.value < 0.5
    assert sc.exact_solution(problem, time_steps=50).kernel(x, 3).mean.shape == (1000, 2)
    paths = sc.simulate(problem, 1000, control=solution.control, time_steps=50, seed=3)
    assert paths.states.shape == (51, 1000, 2) and paths.noises.shape == paths.shifts.shape == (50, 1000, 2)
    assert paths.running_cost.shape == (1000,) and paths.log_ratio().shape == (1000,)
    assert paths.log_ratio(per_step=True).shape == (50, 1000)

    def drift(x, t):
        return -(x**3) + x

    sde = sc.SDE(drift, diffusion=torch.tensor(0.5), dim=1, horizon=1.0)
    other = sc.ControlProblem(sde, initial=sc.Dirac(torch.zeros(1)), reward=lambda x: x[:, 0])
    assert sc.solve(other, "reward-backprop", iterations=2, time_steps=5).sample(4).shape == (4, 1)


def near_the_floor(d, seed, start, time_steps=50, **options):
    problem = random_lq(d, seed=seed, start=start)
    solution = sc.solve(problem, sc.RewardBackprop(), time_steps=time_steps, seed=seed, **options)
    exact = sc.exact_solution(problem, like=solution)
    ev = solution.evaluate(16_384, seed=1)
    assert ev.exact
    assert ev.gap.value < 2 * float(exact.floor), f"gap {ev.gap}, floor {float(exact.floor):.4f}"
    assert ev.gap.value > float(exact.floor) - 4 * ev.gap.stderr  # nothing is below the floor


@pytest.mark.slow
@pytest.mark.parametrize("start", ["dirac", "controlled", "fixed"])
@pytest.mark.parametrize("seed", [11, 23])
@pytest.mark.parametrize("d", [2, 5])
def test_reward_backprop_reaches_twice_the_floor_on_random_linear_quadratic_problems(d, seed, start):
    near_the_floor(d, seed, start, iterations=400)


@pytest.mark.slow
def test_reward_backprop_reaches_twice_the_floor():
    near_the_floor(2, 31, "dirac", time_steps=20, iterations=150, batch_size=128)


# ------------------------------------------------------------------------------------------------ mixtures

MIXTURE = sc.GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), torch.tensor([0.25, 0.4])
)
TILT = sc.Quadratic(torch.eye(2), torch.tensor([0.0, 1.0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "start, schedule", [("memoryless", sc.VP()), ("controlled", sc.VP()), ("controlled", sc.VP(1.0, 1.0))]
)
def test_a_fine_tuned_mixture_has_the_exact_tilt_as_its_terminal_law(start, schedule):
    """Weighted samples against the exact tilt within the sampling error; unweighted ones within what the gap allows."""
    problem = sc.ControlProblem(sc.generative_sde(MIXTURE, schedule), reward=TILT, start=start)
    solution = sc.solve(problem, sc.RewardBackprop(), time_steps=100, iterations=300, seed=0)
    exact = sc.exact_solution(problem)
    ev = solution.evaluate(8192, seed=1)
    assert ev.reliable and ev.ess.value > 0.85
    assert (
        abs(ev.log_z.value - float(exact.log_z)) < 4 * ev.log_z.stderr + 0.03
    )  # the Euler chain's own log Z is O(h) away
    want = exact.marginal(1.0)
    x = solution.sample(8192, seed=5)
    error = (x.mean(0) - want.mean).abs()
    # KL(P^u || Q_fine) = gap bounds the total variation by sqrt(gap/2), and so the error of a mean
    allowed = 4 * (want.variance / 8192).sqrt() + 2 * want.variance.sqrt() * math.sqrt(max(ev.gap.value, 0) / 2)
    assert (error < allowed).all()
    truth = exact.sample(8192, seed=6)
    floor = sc.metrics.sliced_wasserstein(truth, exact.sample(8192, seed=7))
    assert sc.metrics.sliced_wasserstein(x, truth) < 4 * floor + 0.02


def test_the_bias_of_a_fixed_start_is_its_closed_form():
    """A single Gaussian under a short schedule: p0_T exp(r/alpha) E[exp(-v(X_0, 0)/alpha) | X_T] (docs/mathematics.md
    section 1)."""
    data = sc.GaussianMixture(torch.ones(1, dtype=F64), torch.tensor([[1.0, -0.5]], dtype=F64), 0.6)
    reward = sc.Quadratic(torch.eye(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64))
    laws = {}
    for start in ("fixed", "controlled"):
        problem = sc.ControlProblem(sc.generative_sde(data, sc.VP(1.0, 1.0)), reward=reward, start=start)
        laws[start] = sc.exact_solution(problem).marginal(1.0)
    tilt_var = 1 / (1 / 0.6 + 1)
    tilt_mean = tilt_var * (torch.tensor([1.0, -0.5], dtype=F64) / 0.6 + torch.tensor([0.0, 1.0], dtype=F64))
    assert torch.allclose(laws["controlled"].mean, tilt_mean, atol=1e-8)
    assert torch.allclose(laws["controlled"].variance, torch.full((2,), tilt_var, dtype=F64), atol=1e-8)
    # the closed form: X_0 | X_T is N(mu x, std^2) noising, v(., 0)/alpha quadratic with coefficients from the tilt
    mu, var = math.exp(-0.5), 1 - math.exp(-1)
    m0, s0 = mu * torch.tensor([1.0, -0.5], dtype=F64), mu**2 * 0.6 + var  # nu
    ms, ss = mu * tilt_mean, mu**2 * tilt_var + var  # nu* = nu exp(v/alpha)/Z
    # E[nu(X_0)/nu*(X_0) | X_T = x], X_0 ~ N(mu x, var): exponent -a/2 y^2 + b y with
    a, b = 1 / s0 - 1 / ss, m0 / s0 - ms / ss
    # times N(y; mu x, var): integrates to exp( (mu^2 x^2 (-a) + 2 mu x b + ...)/(2 (1 + a var)) )
    precision = 1 / tilt_var + mu**2 * a / (1 + a * var)
    mean = (tilt_mean / tilt_var + mu * b / (1 + a * var)) / precision
    assert torch.allclose(laws["fixed"].mean, mean, atol=1e-8)
    assert torch.allclose(laws["fixed"].variance, torch.full((2,), 1 / precision, dtype=F64), atol=1e-8)
    assert (laws["fixed"].mean - laws["controlled"].mean).abs().max() > 0.05  # a bias worth reporting


@pytest.mark.slow
def test_training_with_a_fixed_start_ends_at_the_biased_law_and_reports_the_start_gap():
    data = sc.GaussianMixture(torch.ones(1), torch.tensor([[1.0, -0.5]]), 0.6)
    problem = sc.ControlProblem(
        sc.generative_sde(data, sc.VP(1.0, 1.0)),
        reward=sc.Quadratic(torch.eye(2), torch.tensor([0.0, 1.0])),
        start="fixed",
    )
    solution = sc.solve(problem, "reward-backprop", time_steps=100, iterations=300, seed=0)
    chain, target = sc.exact_solution(problem, like=solution), sc.exact_solution(problem).marginal(1.0)
    x = solution.sample(16_384, seed=1)
    z = (x.mean(0) - chain.marginal(1.0).mean).abs() / (target.variance / len(x)).sqrt()
    assert z.max() < 6
    tilted = sc.exact_solution(sc.ControlProblem(problem.reference, reward=problem.reward_function, start="controlled"))
    bias = (x.mean(0) - tilted.marginal(1.0).mean).abs() / (target.variance / len(x)).sqrt()
    assert bias.max() > 8  # far from the tilt, as it must be
    ev = solution.evaluate(4096, seed=2)
    assert (
        ev.start_gap.value == pytest.approx(float(chain.log_z - chain.start_log_z), abs=1e-5)
        and ev.start_gap.value > 0.01
    )


def test_seeded_draws_from_exact_mixtures():
    assert torch.equal(draw(MIXTURE, 10, 3), draw(MIXTURE, 10, 3))
