"""Distances between sets of samples (POT), and the error of a control against an exact one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problems.simulate import simulate_chain
from ..randomness import fresh_seed
from ..simulation.shifts import shift_function
from ..tensors import event_sum
from .estimates import Estimate, mean_estimate

__all__ = ["ControlError", "control_error", "sinkhorn", "sliced_wasserstein", "wasserstein"]


@dataclass(frozen=True)
class ControlError:
    """``absolute = T^-1 int E |u - u*|^2 dt`` along optimal paths, and ``relative`` to the mean of ``|u*|^2`` there."""

    absolute: Estimate
    relative: Estimate

    def __str__(self) -> str:
        return f"E|u - u*|^2 = {self.absolute}, relative {self.relative}"


def control_error(solution: Any, exact: Any, n: int = 4096, seed: int | None = 0) -> ControlError:
    """Mean squared error of a solution's control, on paths of the exact control (Euler paths of the solution's grid).

    Args:
        solution: a :class:`Solution`; only the process after time 0 enters (not the stretch of a controlled start).
        exact: an exact solution: in continuous time, or of the chain (``exact_solution(problem, like=solution)``).
    """
    problem, chain = solution.problem, solution.chain
    paths = simulate_chain(problem, chain, n, exact.control, seed=fresh_seed(seed))
    ours, theirs = shift_function(chain, solution.control), shift_function(chain, exact.control)
    error = difference = None
    square: Tensor | None = None
    with torch.no_grad(), problem.evaluating():
        for k in range(chain.start, chain.steps):
            x = paths.states[k]
            u, star = (chain.control(k, f(k, x, paths.condition)) for f in (ours, theirs))
            ndim = u.ndim - 1
            difference = event_sum((u - star) ** 2, ndim).double() * chain.step_sizes[k]
            size = event_sum(star**2, ndim).double() * chain.step_sizes[k]
            error, square = (
                (difference, size) if error is None or square is None else (error + difference, square + size)
            )
    chain.forget()
    assert error is not None and square is not None
    horizon = chain.clock[-1]
    absolute, norm = mean_estimate(error / horizon), float(square.mean()) / horizon
    if norm == 0:
        return ControlError(absolute, Estimate(float("nan"), float("nan")))
    ratio = absolute.value / norm
    spread = ((error / horizon) - ratio * square / horizon).std() / norm  # delta method for a ratio of means
    return ControlError(absolute, Estimate(ratio, float(spread) / math.sqrt(n)))


def _arrays(a: Tensor, b: Tensor, weights_a: Tensor | None, weights_b: Tensor | None) -> tuple[Any, ...]:
    parts: list[Any] = [x.detach().flatten(1).double().cpu().numpy() for x in (a, b)]
    for log_w in (weights_a, weights_b):
        parts.append(None if log_w is None else torch.softmax(log_w.detach().double().cpu(), 0).numpy())
    return tuple(parts)


def wasserstein(
    a: Tensor, b: Tensor, log_weights_a: Tensor | None = None, log_weights_b: Tensor | None = None
) -> float:
    """Exact 2-Wasserstein distance between samples ``(n, ...)`` and ``(m, ...)``, optionally weighted."""
    import ot

    x, y, w, v = _arrays(a, b, log_weights_a, log_weights_b)
    w, v = ot.unif(len(x)) if w is None else w, ot.unif(len(y)) if v is None else v
    cost: Any = ot.emd2(w, v, ot.dist(x, y), numItermax=10_000_000)
    return math.sqrt(max(float(cost), 0.0))


def sinkhorn(a: Tensor, b: Tensor, regularisation: float = 0.1) -> float:
    """Debiased entropic transport cost (squared Euclidean) between samples."""
    import ot

    x, y, _, _ = _arrays(a, b, None, None)
    value: Any = ot.bregman.empirical_sinkhorn_divergence(x, y, regularisation)
    return float(value)


def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    order: int = 1,
    directions: int = 500,
    seed: int = 0,
    log_weights_a: Tensor | None = None,
    log_weights_b: Tensor | None = None,
) -> float:
    """Sliced Wasserstein distance of the given order, over random directions."""
    import ot

    x, y, w, v = _arrays(a, b, log_weights_a, log_weights_b)
    value: Any = ot.sliced_wasserstein_distance(x, y, w, v, n_projections=directions, p=order, seed=seed)
    return float(value)
