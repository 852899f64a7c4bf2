"""The slope of a reward at the ends of paths."""

import torch
from torch import Tensor

from ..paths.paths import Paths
from .problem import ControlProblem


def reward_slope(problem: ControlProblem, paths: Paths) -> tuple[Tensor, Tensor]:
    """Rewards ``(batch,)`` and ``grad r(x_K)/alpha`` ``(batch, *event)``, through ``decode``. The paths then know their
    problem and rewards."""
    with torch.enable_grad():
        end = paths.end.detach().requires_grad_(True)
        reward, parts = problem.rewards(paths.chain.decode(end, paths.condition), paths.condition)
        slope = torch.autograd.grad(reward.sum(), end)[0]
    paths.towards(problem, reward.detach(), parts)
    return paths.reward, slope / problem.alpha
