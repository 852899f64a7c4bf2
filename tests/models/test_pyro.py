"""Pyro's models as densities."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import sdecontrol as sc

Y, SE = torch.tensor([28.0, 8.0, -3.0]), torch.tensor([15.0, 10.0, 16.0])


def schools(y: Any, se: torch.Tensor = SE) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, se), obs=y)


def stepwise(y: Any) -> None:
    """What no vmap takes: a branch on a value."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    shift = 1.0 if float(mu) > 0 else 0.0
    pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)


def test_the_density_is_the_models() -> None:
    problem = sc.from_pyro(schools, Y, se=SE)
    assert problem.parameters.labels == ("mu", "tau", "theta[0]", "theta[1]", "theta[2]") and problem.has_gradient
    assert problem.density.user.vectorised and sum(problem.spent.values()) < 100  # nothing was run
    x = torch.randn(6, 5, dtype=torch.float64)
    mu, tau, theta = x[:, 0], x[:, 1].exp(), x[:, 2:]
    wanted = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + x[:, 1]
    wanted = wanted + dist.Normal(mu[:, None], tau[:, None]).log_prob(theta).sum(1)
    wanted = wanted + dist.Normal(theta, SE).log_prob(Y).sum(1)
    torch.testing.assert_close(problem.density.value(x), wanted, rtol=1e-6, atol=1e-6)


def test_a_model_that_takes_one_point_only() -> None:
    problem = sc.from_pyro(stepwise, torch.tensor(2.0), options={"scale": 6.0})
    assert not problem.density.user.vectorised
    x = torch.tensor([[1.0], [-1.0]])
    wanted = dist.Normal(0.0, 5.0).log_prob(x[:, 0]) + dist.Normal(torch.tensor([2.0, -1.0]), 1.0).log_prob(
        torch.tensor(2.0)
    )
    torch.testing.assert_close(problem.density.value(x.double()).float(), wanted)


@pytest.mark.slow
def test_evidence_of_a_conjugate_model() -> None:
    def model(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([0.5, 1.5, 2.0])
    solution = sc.solve(sc.from_pyro(model, y), sc.TemperedSMC(num_particles=1024), seed=0)
    wanted = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 4 * torch.ones(3, 3)).log_prob(y)
    found = solution.evaluate(4096, seed=1).log_z
    assert abs(found.value - float(wanted)) < 4 * found.stderr < 0.1
    variance = 1 / (3 + 1 / 4)
    draws = solution.sample(4096, seed=2)["mu"]
    assert abs(float(draws.mean()) - variance * float(y.sum())) < 0.06
    assert abs(float(draws.std()) - math.sqrt(variance)) < 0.04


def test_discrete_and_missing_variables_are_named() -> None:
    with pytest.raises(ValueError, match="latent variable 'k' is discrete"):
        sc.from_pyro(lambda: pyro.sample("k", dist.Categorical(torch.ones(3))))
    with pytest.raises(ValueError, match="no latent variable"):
        sc.from_pyro(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)))
