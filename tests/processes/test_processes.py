"""Transition laws, bridges, schedules, parametrisations and mixtures against independent formulas."""

import math

import pytest
import torch
from cases import F64, randn, spd

import sdecontrol as sc
from sdecontrol.processes.generative import noise_coefficients
from sdecontrol.processes.laws import draw

SCHEDULES = [sc.VP(), sc.VP(1.0, 1.0), sc.CosineVP(), sc.VE(), sc.FlowMatching()]


def fine_euler(sde, s, t, steps=20_000):
    """Transition matrix, shift and covariance by a very fine deterministic recursion (midpoint rule)."""
    d = sde.event_shape[0]
    M, b, Q = torch.eye(d, dtype=F64), torch.zeros(d, dtype=F64), torch.zeros(d, d, dtype=F64)
    h = (t - s) / steps
    for k in range(steps):
        A, a, root = (torch.from_numpy(c) for c in sde.coefficients(s + (k + 0.5) * h))
        step = torch.eye(d, dtype=F64) + h * A + h * h / 2 * A @ A
        M, b = step @ M, step @ b + h * a + h * h / 2 * A @ a
        half = torch.eye(d, dtype=F64) + h / 2 * A
        Q = step @ Q @ step.mT + h * half @ root @ root.mT @ half.mT
    return M, b, Q


@pytest.mark.parametrize("time_dependent", [False, True])
def test_transition_law_of_a_linear_sde(time_dependent):
    A0, sigma0, a0 = randn(3, 3, seed=1), randn(3, 2, seed=2), randn(3, seed=3)
    if time_dependent:
        sde = sc.LinearSDE(
            lambda t: A0 * (1 + t.to(F64)), lambda t: sigma0 * torch.cos(t.to(F64)), lambda t: a0 * t.to(F64)
        )
    else:
        sde = sc.LinearSDE(A0, sigma0, a0)
    want = fine_euler(sde, 0.2, 0.9)
    for have, expected in zip(sde.transition(0.2, 0.9), want):
        assert (have - expected).abs().max() < 1e-7


def test_transition_laws_compose():
    sde = sc.LinearSDE(randn(3, 3, seed=1), randn(3, 2, seed=2), randn(3, seed=3))
    (M1, b1, Q1), (M2, b2, Q2), (M, b, Q) = sde.transition(0, 0.3), sde.transition(0.3, 0.8), sde.transition(0, 0.8)
    assert torch.allclose(M2 @ M1, M, atol=1e-12)
    assert torch.allclose(M2 @ b1 + b2, b, atol=1e-12)
    assert torch.allclose(M2 @ Q1 @ M2.mT + Q2, Q, atol=1e-12)


def test_brownian_bridge_is_the_textbook_one():
    sde = sc.BrownianMotion(2, sigma=torch.tensor(0.7, dtype=F64))
    x, y = randn(2, seed=1), randn(2, seed=2)
    law = sde.bridge(0.3, x, y)
    assert torch.allclose(law.mean, x + 0.3 * (y - x), atol=1e-12)
    assert torch.allclose(law.covariance_matrix, 0.49 * 0.3 * 0.7 * torch.eye(2, dtype=F64), atol=1e-12)
    drift = sde.conditioned_drift(x[None], 0.3, y[None])
    assert torch.allclose(drift, (y - x)[None] / 0.7, atol=1e-12)  # (b - z)/(T - t), tutorial [45]


def test_bridge_of_a_linear_sde_is_the_conditional_of_the_joint_gaussian():
    sde = sc.LinearSDE(randn(3, 3, seed=1), randn(3, 4, seed=2), randn(3, seed=3))
    s, t, u = 0.1, 0.4, 0.9
    x, y = randn(3, seed=4), randn(3, seed=5)
    (M1, b1, Q1), (M2, b2, Q2) = sde.transition(s, t), sde.transition(t, u)
    mean_t, mean_u = M1 @ x + b1, M2 @ (M1 @ x + b1) + b2
    cov_uu, cov_tu = M2 @ Q1 @ M2.mT + Q2, Q1 @ M2.mT
    gain = cov_tu @ torch.linalg.inv(cov_uu)
    law = sde.bridge(t, x, y, s=s, u=u)
    assert torch.allclose(law.mean, mean_t + gain @ (y - mean_u), atol=1e-10)
    assert torch.allclose(law.covariance_matrix, Q1 - gain @ cov_tu.mT, atol=1e-10)


def test_stationary_ornstein_uhlenbeck_stays_stationary():
    sde = sc.OrnsteinUhlenbeck(2, rate=1.7, sigma=torch.tensor(0.9, dtype=F64), mean=randn(2, seed=1))
    law = sc.Gaussian(randn(2, seed=1), 0.81 / 3.4)
    out = sde.marginal(0.6, law)
    assert torch.allclose(out.mean, law.mean, atol=1e-12)
    assert torch.allclose(out.covariance_matrix, law.covariance_matrix, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedule_slopes_are_derivatives(schedule):
    s = torch.linspace(0.05, 0.95, 7, dtype=F64).requires_grad_(True)
    mu, std = schedule.mu(s), schedule.std(s)
    dmu, dstd = (torch.autograd.grad(v.sum(), s, retain_graph=True)[0] if v.requires_grad else 0 * s for v in (mu, std))
    slope = schedule.log_mu_slope(s)
    assert torch.allclose(slope, dmu / mu, atol=1e-10)
    assert torch.allclose(schedule.forward_variance_rate(s), 2 * std * (dstd - slope * std), rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("prediction", ["noise", "sample", "score", "v", "velocity"])
def test_every_prediction_gives_the_same_noise(schedule, prediction):
    """x = mu x0 + std eps, and the velocity is dx/dt = -(mu' x0 + std' eps) towards the data."""
    s = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    x0, eps = randn(3, seed=1), randn(3, seed=2)
    leaf = s.clone().requires_grad_(True)
    mu, std = schedule.mu(leaf), schedule.std(leaf)
    x = mu * x0 + std * eps
    velocity = -torch.autograd.grad(x.sum(), leaf)[0]
    mu, std, x = mu.detach(), std.detach(), x.detach()
    made = {"noise": eps, "sample": x0, "score": -eps / std, "v": mu * eps - std * x0, "velocity": velocity}[prediction]
    a, b = noise_coefficients(prediction, mu, std, schedule.log_mu_slope(s), schedule.forward_variance_rate(s))
    assert torch.allclose(a * x + b * made, eps, atol=1e-9)


def test_vp_variance_is_one_minus_exp_minus_t():
    """docs/mathematics.md section 9: tutorial [3] prints exp(-t/2)."""
    s = torch.tensor(0.6, dtype=F64)
    assert float(sc.VP(1.0, 1.0).std(s)) ** 2 == pytest.approx(1 - math.exp(-0.6), abs=1e-12)


@pytest.mark.parametrize("shape", ["number", "per component", "diagonal", "full"])
def test_mixture_score_is_the_gradient_of_its_density(shape):
    cov = {
        "number": 0.5,
        "per component": torch.tensor([0.3, 0.7, 1.1], dtype=F64),
        "diagonal": torch.rand(3, 2, dtype=F64) + 0.3,
        "full": torch.stack([spd(2, seed) for seed in (1, 2, 3)]),
    }[shape]
    gm = sc.GaussianMixture(torch.tensor([1.0, 2.0, 3.0], dtype=F64), randn(3, 2, seed=4), cov).noised(0.8, 0.4)
    x = randn(5, 2, seed=5).requires_grad_(True)
    log_p = gm.log_prob(x)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(gm.weights), torch.distributions.MultivariateNormal(gm.means, gm.covariances)
    )
    assert torch.allclose(log_p, reference.log_prob(x), atol=1e-12)
    assert torch.allclose(torch.autograd.grad(log_p.sum(), x)[0], gm.score(x), atol=1e-12)


def test_mixture_moments_match_its_samples():
    gm = sc.GaussianMixture(
        torch.tensor([0.2, 0.8]), torch.tensor([[-2.0, 0.0], [1.0, 1.0]]), torch.stack([spd(2, 1), spd(2, 2)]).float()
    )
    x = draw(gm, 100_000, 3).double()
    error = (x.mean(0) - gm.mean.double()).abs() / (gm.variance.double() / len(x)).sqrt()
    assert error.max() < 5
    assert (torch.cov(x.mT) - gm.covariance_matrix.double()).abs().max() < 0.05


@pytest.mark.parametrize("level", ["reverse", 0.7, lambda t: 0.5 + t])
def test_a_single_gaussian_model_keeps_its_marginals_at_every_noise_level(level):
    """The marginals of generation are those of the noising, for every noise level (docs/mathematics.md section 5)."""
    gm = sc.GaussianMixture(torch.ones(1, dtype=F64), randn(1, 2, seed=1), spd(2, 2)[None])
    sde = sc.generative_sde(gm, sc.VP(0.5, 3.0), noise_level=level)
    linear = sde.as_linear()
    for t in (0.3, 1.0):
        law, want = linear.marginal(t, sde.own_initial), sde.marginal(t)
        assert torch.allclose(law.mean, want.mean, atol=1e-6)
        assert torch.allclose(law.covariance_matrix, want.covariance_matrix, atol=1e-6)


@pytest.mark.parametrize("prediction", ["noise", "sample", "score", "v", "velocity"])
def test_the_drift_does_not_depend_on_the_parametrisation(prediction):
    gm = sc.GaussianMixture(torch.ones(2, dtype=F64), randn(2, 2, seed=1), 0.5)
    schedule = sc.FlowMatching(0.02)
    exact = sc.generative_sde(gm, schedule)

    class Model(torch.nn.Module):
        def forward(self, x, clock):
            assert clock.shape == (x.shape[0],)
            s = schedule.noising_time(clock[:1])
            mu, std = schedule.mu(s), schedule.std(s)
            eps = -std * gm.noised(float(mu), float(std)).score(x)
            x0 = (x - std * eps) / mu
            return {"noise": eps, "sample": x0, "score": -eps / std, "v": mu * eps - std * x0, "velocity": x0 - eps}[
                prediction
            ]

    model = Model()
    model.register_parameter("dummy", torch.nn.Parameter(torch.zeros(1, dtype=F64)))
    sde = sc.generative_sde(model, schedule, prediction=prediction, shape=(2,))
    x = randn(4, 2, seed=3)
    for t in (0.0, 0.5, 0.97):
        t = torch.tensor(t, dtype=F64)
        assert torch.allclose(sde.drift(x, t), exact.drift(x, t), rtol=1e-8, atol=1e-8)


def test_ddpm_steps_have_the_posterior_mean_and_variance():
    """docs/mathematics.md section 5: a step from abar to abar+, given x0^."""
    abar = torch.linspace(0.98, 0.05, 20, dtype=F64)

    class Sample(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(0.5, dtype=F64))

        def forward(self, x, n):
            assert not n.is_floating_point() and n.shape == (x.shape[0],)
            return self.w * x

    chain = sc.diffusion_chain(Sample(), abar, prediction="sample", shape=(3,), sampler="ddpm", steps=20)
    x = randn(4, 3, seed=1)
    for k in range(chain.steps):
        a, b = abar[19 - k], abar[18 - k]
        mean, scale = chain.kernel(k, x)
        want = b.sqrt() * (1 - a / b) / (1 - a) * 0.5 * x + (a / b).sqrt() * (1 - b) / (1 - a) * x
        assert torch.allclose(mean, want, atol=1e-12)
        assert float(scale) ** 2 == pytest.approx(float((1 - b) / (1 - a) * (1 - a / b)), rel=1e-12)


def test_seeded_draws_do_not_depend_on_their_number():
    laws = [
        sc.Gaussian(torch.zeros(2), 1.0),
        sc.GaussianMixture(torch.ones(2), torch.randn(2, 2), 1.0),
        torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
        torch.arange(10.0)[:, None],
    ]
    for law in laws:
        assert torch.equal(draw(law, 300, 5)[:70], draw(law, 70, 5))
        assert not torch.equal(draw(law, 70, 5), draw(law, 70, 6))


def test_memory_of_the_schedules():
    gm = sc.GaussianMixture(torch.ones(2), torch.randn(2, 2), 1.0)
    assert sc.generative_sde(gm, sc.VP()).memory == pytest.approx(0.0066, abs=2e-4)
    assert sc.generative_sde(gm, sc.VP(1.0, 1.0)).memory == pytest.approx(math.exp(-0.5), rel=1e-6)
    assert sc.generative_sde(gm, sc.FlowMatching(0.01)).memory == pytest.approx(0.01, rel=0.02)


def test_the_kernel_of_a_linear_sde_is_its_transition_from_each_state():
    """Of ``dX = -a X dt + s dW``: mean ``e^{-ah} x``, variance ``s^2 (1 - e^{-2ah})/(2a)``; a batch, and one state."""
    a, size, h = 1.3, 0.7, 0.4
    sde = sc.LinearSDE(-a * torch.eye(2, dtype=F64), size * torch.eye(2, dtype=F64))
    variance = size**2 * -math.expm1(-2 * a * h) / (2 * a)
    for x in (randn(3, 2, seed=1), randn(2, seed=2)):
        law = sde.kernel(0.1, 0.1 + h, x)
        assert torch.allclose(law.mean, math.exp(-a * h) * x, rtol=1e-12)
        assert torch.allclose(
            law.scale_root @ law.scale_root, (variance * torch.eye(2, dtype=F64)).expand(*x.shape, 2), rtol=1e-12
        )
