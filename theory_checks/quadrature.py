"""Expectations over paths without sampling: the library's simulator run on Gauss-Hermite nodes in place of random
noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import sdecontrol as sc
from sdecontrol.paths.paths import Paths

__all__ = ["Node", "NoiseNodes"]

Node = Callable[[torch.Tensor], torch.Tensor]


class NoiseNodes:
    """A tensor grid of ``nodes`` Gauss-Hermite nodes for K steps of one-dimensional noise, and for a random start.

    ``simulate`` gives one path per node; ``mean`` weighs path functions: the exact expectation for polynomials of
    degree below ``2 nodes``, and to rounding for smooth functions.
    """

    def __init__(self, K: int, nodes: int = 24, start: tuple[float, float] | None = None) -> None:
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        weights = weights / weights.sum()
        axes = K + (start is not None)
        grid = np.stack(np.meshgrid(*[points] * axes, indexing="ij")).reshape(axes, -1)
        self.weights = torch.as_tensor(np.prod(np.stack(np.meshgrid(*[weights] * axes, indexing="ij")), axis=0).ravel())
        self.noise = torch.as_tensor(grid[:K])[..., None].contiguous()
        self.state = None
        if start is not None:
            self.state = torch.as_tensor(start[0] + np.sqrt(start[1]) * grid[K])[:, None].contiguous()

    def simulate(self, problem: sc.ControlProblem, control=None, **options) -> Paths:
        state = self.state if "state" not in options else options.pop("state")
        count = self.noise.shape[1]
        if state is not None and state.shape[0] == 1:
            state = state.expand(count, 1)
        return sc.simulate(problem, count, control=control, noise=self.noise, state=state, **options)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Expectation over the nodes of ``(paths,)`` or ``(paths, ...)``."""
        return torch.tensordot(self.weights.to(values.dtype), values, dims=1)
