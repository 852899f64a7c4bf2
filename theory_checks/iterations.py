"""One iteration of the library's methods on a linear-quadratic chain, over nodes of the noise that stand for all of it.

What a method averages over a batch is, along paths of an affine control, a polynomial in the noises. So a batch that
holds every combination of a few equally weighted nodes has the expectation itself: :data:`SIGNS` is exact to third
order in each noise, :data:`EIGHT` to fifth. Its gradient can then be compared with one of dense Gaussian laws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import sdecontrol as sc
from sdecontrol.methods.base import Batch, Run

from .cases import LinearCase, tensor

__all__ = ["EIGHT", "SIGNS", "AffineModule", "OnNodes", "combinations", "iteration", "run_on"]

SIGNS = (-1.0, 1.0)
#: squares with sum 4 and sum of squares 12, all different, so that no median of the nodes is 0
_SQUARES = (0.1, 0.3, 1.8 - (3.24 - 0.53) ** 0.5, 1.8 + (3.24 - 0.53) ** 0.5)
EIGHT = tuple(sign * square**0.5 for square in _SQUARES for sign in (-1.0, 1.0))


class AffineModule(nn.Module):
    """``u(x, t) = U_k x + w_k``: as general as the optimum of a linear-quadratic chain, and a user's control."""

    def __init__(self, case: LinearCase, U: Any = None, w: Any = None) -> None:
        super().__init__()
        zero = torch.zeros(case.K, case.m, case.d, dtype=torch.float64)
        self.U = nn.Parameter(zero if U is None else tensor(U))
        self.w = nn.Parameter(zero[:, :, 0].clone() if w is None else tensor(w))
        self.grid: torch.Tensor
        self.register_buffer("grid", tensor(case.grid))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        k = (self.grid[:-1][None] <= t[:, None] + 1e-9).sum(1) - 1
        return torch.einsum("bij,bj->bi", self.U[k], x) + self.w[k]


def combinations(nodes: tuple[float, ...], steps: int, m: int) -> torch.Tensor:
    """All combinations of the nodes as noise ``(steps, count, m)``, in no order: methods look at their first rows."""
    axes = torch.meshgrid(*[tensor(nodes)] * (steps * m), indexing="ij")
    noise = torch.stack([a.flatten() for a in axes]).reshape(steps, m, -1).transpose(1, 2)
    return noise[:, torch.from_numpy(np.random.default_rng(0).permutation(noise.shape[1]))].contiguous()


class OnNodes(Run):
    """A run whose every batch has these noises, from the problem's point."""

    noise: torch.Tensor

    def batch(self, part: int = 0, group_size: int = 1) -> Batch:
        x0 = self.problem.draw_start(self.batch_size, 0)
        return Batch(x0, self.noise, None, 0)  # type: ignore[arg-type]


def run_on(case: LinearCase, control: nn.Module | None, noise: torch.Tensor, seed: int = 0) -> OnNodes:
    problem: sc.ControlProblem = case.problem()
    chain = problem.chain(list(case.grid), case.scheme)
    run = OnNodes(problem, chain, noise.shape[1], 1, seed, control)
    run.noise = noise
    return run


def iteration(
    case: LinearCase, method: Any, U: np.ndarray, w: np.ndarray, noise: torch.Tensor, seed: int = 0
) -> tuple[dict[str, float], np.ndarray]:
    """One iteration from the control ``U_k x + w_k``: its metrics, and the gradient in U and w."""
    module = AffineModule(case, U, w)
    run = run_on(case, module, noise, seed)
    state = method.setup(run)
    metrics = method.step(state, run)
    trained = dict(state.control.named_parameters())
    parts = [next(p for n, p in trained.items() if n.endswith(name)).grad for name in ("U", "w")]
    return metrics, torch.cat([p.flatten() for p in parts]).numpy()  # type: ignore[union-attr]
