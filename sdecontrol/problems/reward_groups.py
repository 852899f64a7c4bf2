"""Rewards by name: of several each, and those at each prompt."""

from typing import Any

from torch import Tensor

from ..shapes import PerPath
from .problem import ControlProblem
from .prompts import Prompts
from .rewards import WeightedRewards


def reward_groups(
    problem: ControlProblem, reward: PerPath, parts: Tensor | None, condition: Any, most: int | None = None
) -> dict[str, Tensor]:
    """Of several rewards "reward/NAME" -> each without its weight ``(batch,)``, and "prompt/TEXT" -> the rewards at
    each of the texts, of which some may not be among the conditions. Empty where the problem has one reward and no
    :class:`Prompts`.

    Args:
        parts: as ``ControlProblem.rewards`` gives them. most: prompts; where there are more, they are left out.
    """
    found: dict[str, Tensor] = {}
    if parts is not None and isinstance(problem.reward_function, WeightedRewards):
        found |= {f"reward/{name}": parts[:, i] for i, name in enumerate(problem.reward_function.names)}
    prompts = problem.condition
    if isinstance(prompts, Prompts) and condition is not None and (most is None or prompts.count <= most):
        which = prompts.indices(condition)
        found |= {f"prompt/{prompts.texts[i]}": reward[which == i] for i in range(prompts.count)}
    return found
