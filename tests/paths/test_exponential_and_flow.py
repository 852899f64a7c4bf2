"""The exponential scheme, the probability flow and its likelihoods."""

import math

import pytest
import torch
from cases import F64, SmallControl, randn, random_lq, spd

import sdecontrol as sc


def semilinear(stiff=1.0, n=None, start=0.5, **more):
    A = torch.tensor([[-stiff, 0.5], [0.0, -2.0]], dtype=F64)
    sigma = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.4, 0.1]], dtype=F64)
    n = (lambda x, t: torch.sin(x) * (1 + t)) if n is None else n
    sde = sc.SemilinearSDE(A, n, sigma, torch.tensor([0.3, -0.2], dtype=F64))
    return sc.ControlProblem(sde, initial=sc.Dirac(torch.full((2,), start, dtype=F64)), **more)


@pytest.mark.parametrize("autonomous", [True, False])
def test_without_a_nonlinearity_the_exponential_scheme_is_the_exact_one(autonomous):
    matrix = 0.5 * randn(2, 2, seed=1)
    A = matrix if autonomous else lambda t: matrix * (1 + t).to(F64)
    parts = (torch.eye(2, 3, dtype=F64) + 0.3 * randn(2, 3, seed=2), randn(2, seed=3))
    nothing = sc.SemilinearSDE(A, lambda x, t: torch.zeros_like(x), *parts)
    initial, u = sc.Dirac(torch.ones(2, dtype=F64)), SmallControl(2, 3)
    a, b = (
        sc.simulate(sc.ControlProblem(sde, initial=initial), 9, control=u, time_steps=6, scheme=scheme, seed=1)
        for sde, scheme in ((nothing, "exponential"), (sc.LinearSDE(A, *parts), "exact"))
    )
    assert torch.allclose(a.states, b.states, atol=1e-12) and torch.allclose(a.log_ratio(), b.log_ratio(), atol=1e-12)


def test_a_constant_nonlinearity_is_an_offset():
    c = torch.tensor([0.7, -0.4], dtype=F64)
    problem = semilinear(n=lambda x, t: c.expand_as(x))
    part, t = problem.reference.linear_part, torch.zeros((), dtype=F64)
    A, offset = part.A_at(t), part.offset_at(t, c)
    linear = sc.LinearSDE(A, part.sigma_at(t, c), offset + c)
    other = sc.ControlProblem(linear, initial=problem.initial)
    a = sc.simulate(problem, 9, time_steps=3, scheme="exponential", seed=1)
    assert torch.allclose(a.states, sc.simulate(other, 9, time_steps=3, scheme="exact", seed=1).states, atol=1e-12)


def test_a_stiff_linear_part_does_not_bound_the_step():
    problem = semilinear(stiff=2000.0)
    assert sc.simulate(problem, 50, time_steps=20, scheme="exponential", seed=0).end.abs().max() < 5
    assert sc.simulate(problem, 50, time_steps=20, scheme="euler", seed=0).end.abs().max() > 1e10


def test_its_weights_are_those_of_an_exact_chain():
    """E_{Q0}[dP^u/dQ0] = 1 and E_{P^u}[dQ0/dP^u] = 1 at a coarse grid, for a control that depends on the state."""
    problem, u = semilinear(), SmallControl(2, 3)
    options = {"time_steps": 4, "scheme": "exponential", "keep": "all"}
    with torch.no_grad():
        for w in (
            sc.simulate(problem, 100_000, seed=1, **options).log_ratio(u).exp(),
            (-sc.simulate(problem, 100_000, control=u, seed=2, **options).log_ratio()).exp(),
        ):
            assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / math.sqrt(len(w))


def test_methods_run_on_it():
    problem = semilinear(reward=sc.Linear(torch.ones(2, dtype=F64)), alpha=0.5)
    solution = sc.solve(
        problem, "reward-backprop", time_steps=5, scheme="exponential", iterations=30, batch_size=64, seed=0
    )
    assert solution.evaluate(4096, seed=1).objective.value > float(
        problem.reward(sc.simulate(problem, 4096, time_steps=5, scheme="exponential", seed=1).end).mean()
    )


MIXTURE = sc.GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64),
    torch.tensor([[-2.0, 0.0], [1.0, 1.0]], dtype=F64),
    torch.stack((0.3 * spd(2, 1), 0.2 * spd(2, 2))),
)


def test_the_exponential_scheme_of_a_model_has_weak_order_one():
    """A single Gaussian: mean and variance of its chain by recursion, against the exact law. The mean has no error."""
    one = sc.GaussianMixture(torch.ones(1, dtype=F64), torch.tensor([[0.7]], dtype=F64), 0.25)
    problem = sc.ControlProblem(sc.generative_sde(one, sc.VP()), start="fixed")
    errors = []
    for steps in (80, 160, 320):
        chain = problem.chain(steps, "exponential")
        x = torch.tensor([[0.0], [1.0]], dtype=F64)
        mean, variance = problem.initial.mean[0], problem.initial.variance[0]
        for k in range(steps):
            at, scale = chain.kernel(k, x)
            slope = at[1, 0] - at[0, 0]
            mean, variance = at[0, 0] + slope * mean, slope**2 * variance + scale**2
        assert abs(float(mean) - 0.7) < 1e-6  # what is left is that models are not called at noising time 0
        errors.append(abs(float(variance) - 0.25))
    assert abs(math.log2(errors[1] / errors[2]) - 1) < 0.1 and errors[2] < 0.005


@pytest.mark.parametrize(
    "schedule", [sc.VP(), sc.CosineVP(), sc.FlowMatching(), sc.VE()], ids=lambda s: type(s).__name__
)
def test_a_tuned_models_weights_on_the_exponential_chain(schedule):
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).double()

    class Predict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, s):
            return 0.1 * self.net(x) * s[:, None]

    problem = sc.ControlProblem(
        sc.generative_sde(Predict(), schedule, shape=(2,)), reward=lambda x: -(x**2).sum(1), start="fixed"
    )
    options = {"time_steps": 10, "scheme": "exponential"}
    solution = sc.solve(problem, "reward-backprop", iterations=5, batch_size=64, seed=0, **options)
    paths = sc.simulate(problem, 200, control=solution.control, seed=1)
    assert torch.isfinite(paths.log_ratio()).all() and paths.kl().mean() > 0
    assert torch.allclose(paths.log_ratio(solution.control), paths.log_ratio(), atol=1e-10)


def test_no_linear_part_no_exponential_scheme():
    problem = sc.ControlProblem(sc.SDE(lambda x, t: -x, 0.5, dim=1), initial=sc.Dirac(torch.zeros(1)))
    with pytest.raises(ValueError, match="SemilinearSDE"):
        sc.simulate(problem, 2, scheme="exponential")
    with pytest.raises(ValueError, match="nonlinearity must return"):
        semilinear(n=lambda x, t: x[:, :1])
    with pytest.raises(TypeError, match="nonlinearity must be callable"):
        sc.SemilinearSDE(torch.eye(2), None, 1.0)


# ------------------------------------------------------------------------------------------------ probability flow


@pytest.mark.parametrize("schedule", [sc.VP(), sc.CosineVP(), sc.VE()], ids=lambda s: type(s).__name__)
def test_log_likelihood_of_a_mixture_is_its_density(schedule):
    x, sde = MIXTURE.sample((20,)), sc.generative_sde(MIXTURE, schedule)
    result = sc.log_likelihood(sde, x)
    assert (result.value - sde.marginal(1.0).log_prob(x)).abs().max() < 1e-4  # VE ends at a small noise
    assert result.stderr.abs().max() == 0 and result.latent.shape == x.shape


@pytest.mark.slow
def test_hutchinsons_divergence_is_unbiased_with_its_standard_error():
    x = MIXTURE.sample((20,))
    sde = sc.generative_sde(MIXTURE, sc.VP())
    result = sc.log_likelihood(sde, x, divergence="hutchinson", probes=30, seed=1)
    few = [sc.log_likelihood(sde, x[:2], divergence="hutchinson", probes=4, seed=1).value for _ in range(2)]
    assert torch.equal(*few)
    z = (result.value - MIXTURE.log_prob(x)) / result.stderr.clamp(min=1e-5)
    assert z.abs().max() < 4.5 and 0 < result.stderr.max() < 1
    assert float((z**2).mean()) < 2


def test_the_flow_has_the_models_marginals_and_its_two_integrators_agree():
    problem = sc.ControlProblem(sc.generative_sde(MIXTURE, sc.VP()), running_cost=lambda x, t: x[:, 0] ** 2)
    fixed = sc.simulate(problem, 4000, time_steps=200, scheme="probability-flow", seed=1)
    adaptive = sc.simulate(problem, 4000, time_steps=200, scheme="probability-flow", seed=1, tolerance=1e-6, keep="end")
    assert (fixed.end - adaptive.end).abs().max() < 1e-3
    assert sc.metrics.sliced_wasserstein(fixed.end, MIXTURE.sample((4000,)), directions=50) < 0.1
    for k in (50, 150):
        law = problem.reference.marginal(float(fixed.times[k]))
        assert sc.metrics.sliced_wasserstein(fixed.states[k], law.sample((4000,)), directions=50) < 0.1
    assert torch.isfinite(fixed.running_cost).all() and (fixed.running_cost - adaptive.running_cost).abs().max() < 1e-2
    with pytest.raises(sc.NoLikelihood):
        fixed.log_ratio()
    with pytest.raises(ValueError, match=r"control.*solution\.model"):
        sc.simulate(problem, 2, control=lambda x, t: x, scheme="probability-flow")


def test_the_flow_of_a_tuned_model_and_its_likelihoods():
    problem = sc.ControlProblem(sc.generative_sde(MIXTURE, sc.VP()), reward=sc.Linear(torch.ones(2, dtype=F64)))
    solution = sc.solve(problem, "reward-backprop", time_steps=10, iterations=3, batch_size=64, seed=0)
    tuned = sc.ControlProblem(sc.generative_sde(solution.model, sc.VP(), shape=(2,)), initial=problem.initial)
    x = sc.simulate(tuned, 5, time_steps=20, scheme="probability-flow", seed=0).samples
    result = sc.log_likelihood(tuned, x.detach(), tolerance=1e-4)
    assert torch.isfinite(result.value).all()
    moved = sc.log_likelihood(tuned, x.detach(), divergence="hutchinson", probes=30, seed=0, tolerance=1e-4)
    assert ((moved.value - result.value) / moved.stderr.clamp(min=1e-3)).abs().max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_tolerance_below_what_the_dtype_resolves_is_refused(dtype):
    law = sc.GaussianMixture(torch.ones(1, dtype=dtype), torch.ones(1, 2, dtype=dtype), 0.5)
    problem = sc.ControlProblem(sc.generative_sde(law, sc.VP()))
    x, eps = torch.ones(3, 2, dtype=dtype), torch.finfo(dtype).eps
    exact = law.log_prob(x)
    if dtype == torch.float32:  # what is allowed ends, and is right
        assert torch.allclose(sc.log_likelihood(problem, x, tolerance=9 * eps).value, exact, atol=1e-3)
    for small in (1e-2 * eps, 1e-14 * eps):
        with pytest.raises(ValueError, match=rf"below what {dtype} resolves"):
            sc.log_likelihood(problem, x, tolerance=small)
        for scheme in ("probability-flow", "srk"):
            with pytest.raises(ValueError, match=rf"below what {dtype} resolves"):
                sc.simulate(problem, 4, scheme=scheme, tolerance=small, seed=0)


@pytest.mark.slow
def test_a_flow_too_stiff_for_its_tolerance_ends_with_an_error():
    class Stiff(torch.nn.Module):
        def forward(self, x, s):
            return 1e3 * torch.sin(1e3 * x)

    problem = sc.ControlProblem(sc.generative_sde(Stiff(), sc.VP(), shape=(1,)), start="fixed")
    with pytest.raises(sc.NonFiniteError, match=r"cannot be integrated to tolerance=1e-06 .*max_num_steps"):
        sc.log_likelihood(problem, torch.ones(1, 1), tolerance=1e-6)


@pytest.mark.wrong_shapes
def test_float32_and_wrong_arguments():
    law = sc.GaussianMixture(torch.ones(1), torch.zeros(1, 3), 1.0)
    x = law.sample((4,))
    result = sc.log_likelihood(sc.generative_sde(law, sc.VP()), x)
    assert result.value.dtype == torch.float32 and (result.value - law.log_prob(x)).abs().max() < 1e-2
    with pytest.raises(TypeError, match="generative_sde"):
        sc.log_likelihood(random_lq(2, seed=1), randn(3, 2, seed=0))
    with pytest.raises(ValueError, match="divergence"):
        sc.log_likelihood(sc.generative_sde(law, sc.VP()), x, divergence="hutchison")
    with pytest.raises(ValueError, match="x must have shape"):
        sc.log_likelihood(sc.generative_sde(law, sc.VP()), x[:, :2])
    with pytest.raises(ValueError, match="probes"):
        sc.log_likelihood(sc.generative_sde(law, sc.VP()), x, probes=1)
