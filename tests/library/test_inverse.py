"""The Gaussian-mixture inverse problem: its exact solution against the Gaussian algebra of its own definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import sdecontrol as sc
from sdecontrol.library.inverse import mixture_observation

CASES = [(1, 0, 8), (2, 1, 8), (4, 2, 8), (4, 3, 80)]


@pytest.fixture(autouse=True)
def double_precision() -> None:
    torch.set_default_dtype(torch.float64)


def evidence(observations: int, seed: int, dim: int) -> Tensor:
    """``log (w_i N(y; A mu_i, A A' + noise^2 I))`` of every component i, ``(25,)``."""
    prior, A, noise, y, _ = mixture_observation(observations, seed, dim)
    spread = A @ A.mT + noise**2 * torch.eye(observations)
    return prior.log_weights + MultivariateNormal(prior.means @ A.mT, spread).log_prob(y)


@pytest.mark.parametrize(("observations", "seed", "dim"), CASES)
def test_reward_is_the_log_likelihood(observations: int, seed: int, dim: int) -> None:
    _, A, noise, y, x = mixture_observation(observations, seed, dim)
    states = x + torch.randn(64, dim)
    direct = MultivariateNormal(states @ A.mT, noise**2 * torch.eye(observations)).log_prob(y)
    torch.testing.assert_close(sc.library.mixture_inverse_problem(observations, seed, dim).reward(states), direct)


@pytest.mark.parametrize(("observations", "seed", "dim"), CASES)
def test_log_z_is_log_p_of_y(observations: int, seed: int, dim: int) -> None:
    exact = sc.exact_solution(sc.library.mixture_inverse_problem(observations, seed, dim))
    torch.testing.assert_close(exact.log_z, evidence(observations, seed, dim).logsumexp(0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("observations", "seed", "dim"), CASES)
def test_tilted_end_is_the_posterior(observations: int, seed: int, dim: int) -> None:
    prior, A, noise, y, _ = mixture_observation(observations, seed, dim)
    gain = A.mT @ torch.linalg.inv(A @ A.mT + noise**2 * torch.eye(observations))
    posterior = sc.exact_solution(sc.library.mixture_inverse_problem(observations, seed, dim)).marginal(1.0)
    weights = evidence(observations, seed, dim).softmax(0)
    torch.testing.assert_close(posterior.weights, weights, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(posterior.means, prior.means + (y - prior.means @ A.mT) @ gain.mT, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(posterior.covariances[7], torch.eye(dim) - gain @ A, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [0.3, 0.8, 0.97])
def test_value_is_the_log_likelihood_of_the_noised_state(t: float) -> None:
    """``v(x, t) = log p(y | x_t) = log sum_i p(i | x_t) N(y; A E[x | x_t, i], A Cov[x | x_t, i] A' + noise^2 I)``."""
    prior, A, noise, y, _ = mixture_observation(2, 5)
    schedule, s = sc.VP(), torch.tensor(1 - t)
    mu, std = schedule.mu(s), schedule.std(s)
    x = mu * prior.sample((32,)) + std * torch.randn(32, 8)
    shrink = mu / (mu**2 + std**2)
    means = prior.means + shrink * (x.unsqueeze(1) - mu * prior.means)  # (32, 25, 8), of x given x_t and the component
    spread = (1 - shrink * mu) * A @ A.mT + noise**2 * torch.eye(2)
    shares = prior.noised(mu, std).responsibilities(x).log()
    direct = (shares + MultivariateNormal(means @ A.mT, spread).log_prob(y)).logsumexp(1)
    exact = sc.exact_solution(sc.library.mixture_inverse_problem(2, 5))
    torch.testing.assert_close(exact.value(x, t), direct, rtol=1e-6, atol=1e-6)


def test_definition_by_its_numbers() -> None:
    """Version 1 stays version 1: means, singular values, noise and log Z of seed 0."""
    prior, A, noise, _, _ = mixture_observation(2, 0)
    assert torch.equal(prior.means[1], torch.tensor([-16.0, -8.0] * 4))
    assert prior.means.shape == (25, 8) and torch.equal(prior.covariances, torch.eye(8).expand(25, 8, 8))
    singular = torch.linalg.svdvals(A)
    assert 0 < noise < float(singular[0]) < 1
    assert [round(v, 4) for v in (*singular.tolist(), noise)] == [0.7412, 0.0045, 0.4326]
    exact = sc.exact_solution(sc.library.mixture_inverse_problem(2, 0))
    assert float(exact.log_z) == pytest.approx(-3.902698, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_every_time_and_global_generator_untouched(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    state = torch.get_rng_state()
    problem, again = sc.library.mixture_inverse_problem(4, 7), sc.library.mixture_inverse_problem(4, 7)
    assert torch.equal(state, torch.get_rng_state())
    assert problem.fingerprint() == again.fingerprint() != sc.library.mixture_inverse_problem(4, 8).fingerprint()
    assert problem.dtype == dtype and problem.alpha == 1 and problem.start == "memoryless"


def test_log_z_of_a_rounded_problem_is_near() -> None:
    """In float32 G and g are rounded, and the exact solution is that of the rounded problem."""
    torch.set_default_dtype(torch.float32)
    exact = sc.exact_solution(sc.library.mixture_inverse_problem(2, 1))
    assert math.isclose(float(exact.log_z), float(evidence(2, 1, 8).logsumexp(0)), abs_tol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 0), "observations"), ((1, -1), "seed"), ((1, 0, 7), "even"), ((9, 0, 8), "observations"), ((1.0, 0), "obs")],
)
def test_bad_arguments(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sc.library.mixture_inverse_problem(*arguments)
