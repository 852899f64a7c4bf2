"""How tempered particles choose their ladder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdecontrol.particles.ascent import Ascent
from sdecontrol.particles.tempering import StateTarget
from sdecontrol.processes.laws import GaussianMixture

F64 = torch.float64


def half(x: Tensor) -> Tensor:
    """A standard normal law where x > 0, and nothing elsewhere."""
    value = -0.5 * x.square().sum(1)
    return torch.where(x[:, 0] > 0, value, torch.full_like(value, -math.inf))


def test_particles_without_density_do_not_hide_that_moves_are_enough() -> None:
    """Three quarters of the particles have density, too many for the first level to resample: with the others counted
    their correlation is no number, and a level takes all the moves there may be."""
    law = GaussianMixture(
        torch.ones(1, dtype=F64), torch.full((1, 1), 0.674, dtype=F64), torch.ones(1, 1, 1, dtype=F64)
    )
    target = StateTarget(half, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), True, law)
    ascent = Ascent(target, 1000, 0)
    ascent.level()
    assert ascent.levels[0].resampled == 0.0 and 0.6 < ascent.levels[0].ess < 1
    assert ascent.levels[0].moves < 24


def pole(x: Tensor) -> Tensor:
    """``|x|^(-0.9)`` between -1 and 1: its log density has a long tail upwards."""
    level = -0.9 * x[:, 0].abs().clamp(min=1e-30).log()
    return torch.where(x[:, 0].abs() < 1, level, torch.full_like(level, -math.inf))


def test_a_few_particles_in_a_long_tail_do_not_keep_a_level_at_moves() -> None:
    """By ranks the moves of the second level are enough; by numbers they end at their largest number."""
    for seed in range(3):
        ascent = Ascent(StateTarget(pole, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), 2000, seed)
        ascent.level()
        ascent.level()
        assert ascent.levels[1].moves < 24
