"""The exact frontier of reward against KL: the tilted laws at all temperatures."""

import copy
from typing import Any, NamedTuple

import torch

from ..errors import NoExactSolution
from ..exact import exact_solution
from ..exact.base import ExactSolution
from ..problems.problem import DEFAULT_TIME_STEPS, ControlProblem


class FrontierPoint(NamedTuple):
    """The exact tilted law at one temperature: its KL to the reference, and its total reward
    ``E[r - running cost]``."""

    alpha: float
    kl: float
    reward: float


def exact_frontier(
    problem: ControlProblem,
    time_steps: Any = None,
    scheme: str | None = None,
    *,
    factor: float = 10.0,
    points: int = 25,
) -> list[FrontierPoint]:
    """KL and reward of the exact tilted laws at temperatures from ``alpha / factor`` to ``alpha factor``, for problems
    with a closed form.

    With ``beta = 1/alpha``: ``E[R] = d log Z / d beta`` and ``KL = beta E[R] - log Z``; no law of the same KL has a
    larger reward. For a fixed random start ``E log Z(X_0)`` takes log Z's place. The derivative is a central difference
    in float64, of relative error ~1e-8.

    Returns:
        By falling temperature; empty where no closed form is known. Temperatures at which the tilted law does not exist
        are left out.
    """
    out, step, middle = [], 1e-4, (points - 1) / 2
    for i in range(points):
        alpha = problem.alpha * factor ** ((middle - i) / middle)
        try:
            low, here, high = (_start_log_z(problem, alpha / s, time_steps, scheme) for s in (1 - step, 1.0, 1 + step))
        except NoExactSolution:
            continue
        reward = (high - low) * alpha / (2 * step)
        out.append(FrontierPoint(alpha, reward / alpha - here, reward))
    return out


def _start_log_z(problem: ControlProblem, alpha: float, time_steps: Any, scheme: str | None) -> float:
    tempered = copy.copy(problem)
    tempered.alpha = alpha
    tempered.dtype = torch.float64  # closed forms are computed in float64 anyway, and rounded last
    return float(nearest_exact(tempered, time_steps, scheme, grids=False)[0].start_log_z)


def nearest_exact(
    problem: ControlProblem, time_steps: Any, scheme: str | None, grids: bool = True
) -> tuple[ExactSolution, str]:
    """The exact solution of the chain that methods solve, else that in continuous time, and which it is.

    Raises:
        NoExactSolution: neither is known.
    """
    if not problem.reference.continuous:  # a chain of its own
        return exact_solution(problem, grids=grids), "of the chain"
    try:
        steps = DEFAULT_TIME_STEPS if time_steps is None else time_steps
        return exact_solution(problem, time_steps=steps, scheme=scheme, grids=grids), "of the chain"
    except NoExactSolution:
        return exact_solution(problem, grids=grids), "in continuous time"
