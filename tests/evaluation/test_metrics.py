"""Metrics of samples: closed forms, no bias where there should be none, and what mode coverage counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sdecontrol as sc

DOUBLE = torch.float64


def normal(n: int, seed: int, mean: float = 0.0, d: int = 2) -> Tensor:
    return mean + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gaussian_mmd(distance: float, width: float, d: int) -> float:
    """Squared MMD of N(0, I) and N(m, I), |m| = distance, kernel exp(-|x - y|^2/(2 w^2)):
    ``2 (w^2/(w^2+2))^(d/2) (1 - exp(-|m|^2/(2 (w^2+2))))``."""
    return 2 * (width**2 / (width**2 + 2)) ** (d / 2) * (1 - math.exp(-(distance**2) / (2 * (width**2 + 2))))


@pytest.mark.parametrize("mean, width", [(0.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_mmd_of_gaussians_is_unbiased(mean: float, width: float) -> None:
    """Mean over 200 pairs of small samples, within 4 standard errors; the V-statistic's bias (0.04) would be more."""
    values = torch.tensor([sc.metrics.mmd(normal(30, 2 * s), normal(40, 2 * s + 1, mean), width) for s in range(200)])
    truth = gaussian_mmd(mean * 2**0.5, width, 2)
    error = float(values.std()) / 200**0.5
    assert abs(float(values.mean()) - truth) < 4 * error < 0.025


@pytest.mark.wrong_shapes
def test_mmd_of_many_samples_and_of_weighted_ones() -> None:
    a, b = normal(1500, 0), normal(1200, 1, 1.0)
    assert sc.metrics.mmd(a, b, 1.0) == pytest.approx(gaussian_mmd(2**0.5, 1.0, 2), abs=0.03)
    assert sc.metrics.mmd(a, b) > 0.05 > abs(sc.metrics.mmd(a, normal(1200, 2)))
    tilt = (a - 0.5).sum(1)  # weights from N(0, I) to N(1, I)
    assert abs(sc.metrics.mmd(a, b, 1.0, tilt)) < 0.03
    flat = torch.zeros(1500)
    assert sc.metrics.mmd(a, b, 1.0, flat) == pytest.approx(sc.metrics.mmd(a, b, 1.0), rel=1e-9)
    with pytest.raises(ValueError, match="samples of one size"):
        sc.metrics.mmd(a, b[:, :1])
    with pytest.raises(ValueError, match="at least two samples"):
        sc.metrics.mmd(a, b[:1])
    with pytest.raises(ValueError, match="bandwidth must be > 0"):
        sc.metrics.mmd(a, b, 0.0)


@pytest.mark.wrong_shapes
def test_energy_wasserstein_of_gaussians() -> None:
    """Energies of N(0, s^2 I) under -|x|^2/2 are s^2 times those of N(0, I): the distance is |s^2 - 1| d/2, whatever
    the rotation."""
    log_density = lambda x: -0.5 * x.square().sum(1)  # noqa: E731
    a, b = normal(20_000, 0, d=4), 1.5 * normal(20_000, 1, d=4)
    assert sc.metrics.energy_wasserstein(a, b, log_density) == pytest.approx(1.25 * 2, rel=0.03)
    assert sc.metrics.energy_wasserstein(a, a.flip(1), log_density) < 1e-12
    one, many = torch.zeros(1, 1), torch.tensor([[1.0], [2.0]])
    assert sc.metrics.energy_wasserstein(one, many, lambda x: x[:, 0], order=2) == pytest.approx(math.sqrt(2.5))
    ratio = -0.5 * b.square().sum(1) * (1 - 1 / 1.5**2)
    assert sc.metrics.energy_wasserstein(a, b, log_density, None, ratio) < 0.1  # reweighted to the law of a
    with pytest.raises(ValueError, match="not finite in 1 of the 3 samples b"):
        sc.metrics.energy_wasserstein(a.abs(), torch.tensor([[1.0], [0.0], [2.0]]), lambda x: x[:, 0].log())


def test_mode_coverage_counts_by_the_nearest_mode() -> None:
    modes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.tensor([[0.1, 0.2], [1.0, 0.0], [9.0, 1.0], [5.1, 0.0]])
    found = sc.metrics.mode_coverage(x, modes)
    assert found.shares.tolist() == [0.5, 0.5, 0.0] and found.hit == 2 and found.missed == [2] and found.far == 0
    near = sc.metrics.mode_coverage(x, modes, radius=1.5)
    assert (
        near.shares.tolist() == [0.5, 0.25, 0.0] and near.far == 0.25 and str(near) == "2/3 modes, 25.0% far from all"
    )
    weighted = sc.metrics.mode_coverage(x, modes, log_weights=torch.tensor([0.0, 0.0, math.log(8.0), -math.inf]))
    torch.testing.assert_close(weighted.shares, torch.tensor([0.2, 0.8, 0.0], dtype=DOUBLE))


def test_a_mode_is_hit_by_a_tenth_of_its_weight() -> None:
    modes = torch.tensor([[0.0], [1.0]])
    x = torch.zeros(1000, 1)
    for rows, weights, hit in ((49, None, 1), (50, None, 2), (9, [0.9, 0.1], 1), (10, [0.9, 0.1], 2)):
        y = x.clone()
        y[:rows] = 1.0
        found = sc.metrics.mode_coverage(y, modes, weights=None if weights is None else torch.tensor(weights))
        assert found.hit == hit and found.missed == [1] * (2 - hit)
    assert sc.metrics.mode_coverage(x, modes, least=0.0).hit == 1  # a mode without any sample is never hit


@pytest.mark.wrong_shapes
def test_mode_coverage_of_a_collapsed_sampler() -> None:
    target = sc.library.named_target("gmm9")
    assert target.modes is not None
    x = target.sample(2000, seed=0)
    assert sc.metrics.mode_coverage(x, target.modes, radius=4 * 0.3**0.5 * 2**0.5).hit == 9
    one = x[(x - target.modes[4]).norm(dim=1) < 2]
    assert sc.metrics.mode_coverage(one, target.modes).hit == 1
    with pytest.raises(ValueError, match="samples and modes must have one size"):
        sc.metrics.mode_coverage(x[:, :1], target.modes)
    with pytest.raises(ValueError, match=r"weights must be \(9,\) positive"):
        sc.metrics.mode_coverage(x, target.modes, weights=torch.ones(3))
    with pytest.raises(ValueError, match="radius must be > 0"):
        sc.metrics.mode_coverage(x, target.modes, radius=-1.0)
