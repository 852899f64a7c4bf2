"""Distances of configurations of particles that symmetries leave at 0."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import sdecontrol as sc


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(x: Tensor, space: int, seed: int) -> Tensor:
    """Each configuration turned, reflected, shifted and renumbered."""
    out = []
    for i, row in enumerate(x.unflatten(1, (-1, space))):
        turn = torch.linalg.qr(normal(space, space, seed=seed + i))[0]
        turn[0] *= (-1) ** i
        order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed + i))
        out.append((row @ turn.mT + normal(space, seed=seed - i))[order].flatten())
    return torch.stack(out)


@pytest.mark.parametrize("particles, space", [(4, 2), (4, 3), (3, 1), (13, 3), (7, 2)])
def test_copies_are_at_distance_0_and_distances_do_not_change(particles: int, space: int) -> None:
    x, y = normal(5, particles * space, seed=1), normal(4, particles * space, seed=2)
    own = sc.metrics.symmetric_distances(x, moved(x, space, 30), space)
    assert float(own.diagonal().max()) < 1e-6
    found = sc.metrics.symmetric_distances(x, y, space)
    assert found.shape == (5, 4) and float(found.min()) > 0.1
    if particles <= 5:
        assert torch.allclose(found, sc.metrics.symmetric_distances(moved(x, space, 50), y, space))
    shapes = [v.unflatten(1, (-1, space)) for v in (x, y)]
    one, two = ((v - v.mean(1, keepdim=True)).flatten(1) for v in shapes)
    assert bool((found <= torch.cdist(one, two) + 1e-9).all())


def test_in_the_plane_it_is_the_least_over_a_grid_of_angles() -> None:
    """Of all renumberings, reflections and 3600 angles."""
    x, y = (v - v.mean(0) for v in normal(2, 3, 2, seed=3))
    least = math.inf
    for order in itertools.permutations(range(3)):
        for sign in (1.0, -1.0):
            angle = torch.arange(3600, dtype=torch.float64) * (2 * math.pi / 3600)
            turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).unflatten(1, (2, 2))
            z = (y[list(order)] * torch.tensor([1.0, sign], dtype=torch.float64)) @ turn.mT
            least = min(least, float((x - z).square().sum((1, 2)).min()))
    found = float(sc.metrics.symmetric_distances(x.flatten()[None], y.flatten()[None], 2))
    assert found == pytest.approx(math.sqrt(least), abs=1e-4)


def test_more_than_five_particles_are_nearly_as_near_as_the_best_renumbering() -> None:
    """Six on a line, where the best is sorted, in one of two directions."""
    x, y = normal(6, 6, seed=4), normal(5, 6, seed=5)
    sorted_x, sorted_y = ((v - v.mean(1, keepdim=True)).sort(1).values for v in (x, y))
    both = torch.stack([torch.cdist(sorted_x, v) for v in (sorted_y, -sorted_y.flip(1))])
    assert torch.allclose(sc.metrics.symmetric_distances(x, y, 1), both.amin(0))


def test_wasserstein_of_two_shapes() -> None:
    """Rods of length 1 and 3 in the plane: weights carry a quarter of one over to the other, by sqrt(2)."""
    rod = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    turned = torch.tensor([[5.0, 5.0, 5.0, 6.0], [3.0, 0.0, 0.0, 0.0]])
    assert sc.metrics.symmetric_wasserstein(rod, turned, 2) < 1e-6
    weights = torch.tensor([0.75, 0.25]).log()
    found = sc.metrics.symmetric_wasserstein(rod, turned, 2, None, weights)
    assert found == pytest.approx(math.sqrt(0.25 * 2.0))
    with pytest.raises(ValueError, match=r"configurations \(n, particles \* 3\)"):
        sc.metrics.symmetric_distances(rod, turned, 3)
