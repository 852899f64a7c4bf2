"""Directions that are narrow across the axes: Gaussians and mixtures fitted to particles keep them narrow, and where
coordinates are independent, nothing is read into noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdecontrol.particles.ascent import Ascent
from sdecontrol.particles.mixture_fit import fit_mixture
from sdecontrol.particles.tempering import StateTarget, fit_gaussian, run_tempered
from sdecontrol.processes.laws import GaussianMixture, ProductMixture, draw

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rotated(d: int, condition: float, seed: int = 0) -> Tensor:
    """A root of a covariance of this condition number whose axes are not the coordinates'."""
    axes = torch.linalg.qr(normal(d, d, seed=seed))[0]
    return axes * torch.logspace(-0.5 * math.log10(condition), 0, d, dtype=F64)


def whitened(root: Tensor, factor: Tensor) -> Tensor:
    """Eigenvalues of the fitted covariance relative to the true one: 1 everywhere for a perfect fit."""
    half = torch.linalg.solve(root, factor)
    return torch.linalg.eigvalsh(half @ half.mT)


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_a_gaussian_near_the_last_one_is_as_narrow_as_its_particles(condition: float) -> None:
    """Whatever the condition number, since it is fitted in the last one's coordinates; in those of the states a part of
    the wide directions' variance would go to the narrow ones."""
    d, n = 20, 2000
    root = rotated(d, condition)
    even = torch.full((n,), 1 / n, dtype=F64)
    x = 3.0 + normal(n, d, seed=1) @ root.mT
    near = torch.linalg.cholesky(1.7 * root @ root.mT)
    mean, factor = fit_gaussian(x, even, near)
    assert torch.equal(factor, factor.tril())
    ratio = whitened(root, factor)
    assert float(ratio[0]) > 0.75 and float(ratio[-1]) < 1.3, ratio
    assert float(torch.linalg.solve(root, mean - x.mean(0)).abs().max()) < 1e-9
    if condition > 1e3:
        assert float(whitened(root, fit_gaussian(x, even)[1])[-1]) > 10


def test_correlations_that_are_noise_are_left_out() -> None:
    d, n = 30, 300
    x = normal(n, d) * torch.logspace(-2, 2, d, dtype=F64)
    _, factor = fit_gaussian(x, torch.full((n,), 1 / n, dtype=F64))
    inside = factor / factor.diagonal().unsqueeze(1)
    assert float((inside - torch.eye(d, dtype=F64)).abs().max()) < 0.02
    assert torch.allclose(factor.diagonal(), x.std(0), rtol=0.02)


def test_above_64_dimensions_a_covariance_is_whole_where_correlations_are_more_than_noise() -> None:
    d, n = 80, 1500
    even, x = torch.full((n,), 1 / n, dtype=F64), normal(n, d)
    assert fit_gaussian(x, even)[1].shape == (d,)
    root = rotated(d, 1e4)
    y = x @ root.mT
    _, factor = fit_gaussian(y, even)
    assert factor.shape == (d, d)
    for _ in range(6):  # from level to level
        _, factor = fit_gaussian(y, even, factor)
    ratio = whitened(root, factor)
    assert float(ratio[0]) > 0.4 and float(ratio[-1]) < 4, ratio
    assert fit_gaussian(normal(400, 300), torch.full((400,), 1 / 400, dtype=F64))[1].shape == (300,)


@pytest.mark.slow
def test_levels_with_diagonal_and_whole_covariances_are_climbed_together() -> None:
    """In 70 dimensions, of which correlations grow with the level: E Z^ = Z on the ladder that was chosen."""
    d = 70
    root = rotated(d, 30.0)
    law = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, d, dtype=F64), (root @ root.mT).unsqueeze(0))
    target = StateTarget(law.log_prob, torch.zeros(d, dtype=F64), torch.full((d,), 1.2, dtype=F64))
    ascent = Ascent(target, 256, 0)
    ascent.climb()
    assert {level.factor.ndim for level in ascent.levels} == {1, 2}
    ladder, _ = ascent.result()
    assert ladder.factors.shape == (len(ladder), d, d)
    found = run_tempered(target, ladder, 8, 128, 1).log_z
    assert abs(float(found.exp().mean()) - 1) < 4 * float(found.exp().std()) / 8**0.5 < 1.5


@pytest.mark.parametrize("modes", [1, 2])
def test_a_mixture_of_correlated_samples_is_as_narrow_as_they_are(modes: int) -> None:
    """Draws held out are as likely by it as by the law that they come from, to a part of a nat for each dimension: a
    smaller one where there is one mode, since modes far apart widen the coordinates in which all are fitted."""
    d, n = 12, 3000
    root = rotated(d, 1e6, seed=2)
    far = torch.stack([5.0 * k * torch.ones(d, dtype=F64) for k in range(modes)])
    law = GaussianMixture(torch.ones(modes, dtype=F64), far, (root @ root.mT).expand(modes, d, d))
    x, held = draw(law, n, 0), draw(law, 1000, 1)
    found = fit_mixture(x, seed=0, most=4)
    loss = float((law.log_prob(held) - found.log_prob(held)).mean())
    assert -0.01 < loss < (0.03 if modes == 1 else 0.3) * d, loss
    single = fit_mixture(x.float(), seed=0, most=4)
    assert abs(float((law.log_prob(held).float() - single.log_prob(held.float())).mean()) - loss) < 0.01


def test_independent_coordinates_with_modes_of_their_own_stay_a_product() -> None:
    x = torch.where(normal(3000, 6, seed=3) > 0, 3.0, -3.0).double() + 0.3 * normal(3000, 6, seed=4)
    assert isinstance(fit_mixture(x, seed=0, most=8), ProductMixture)
