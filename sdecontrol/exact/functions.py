"""What grid solutions know of a problem: its functions, and the steps of its chain, at any states, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..problems.problem import ControlProblem
from ..tensors import is_matrix_scale

__all__ = ["Functions"]


class Functions:
    """The problem's functions, and the steps of a chain, in float64 where they take it, at states ``(rows, d)``."""

    def __init__(self, problem: ControlProblem, chain: Chain) -> None:
        self.problem, self.chain = problem, chain
        self.d = problem.event_shape[0]
        self.eps = float(torch.finfo(torch.float64).eps)
        self._takes_float64: dict[str, bool] = {}

    def _call(self, name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        dtype = torch.float64 if self._takes_float64.get(name, True) else self.problem.dtype
        with torch.no_grad(), self.problem.evaluating():
            try:
                value = function(x.to(device=self.problem.device, dtype=dtype))
            except (RuntimeError, TypeError):
                if dtype == self.problem.dtype or name in self._takes_float64:
                    raise
                self._takes_float64[name] = False  # a module of single precision: its rounding is that of the problem
                self.eps = max(self.eps, float(torch.finfo(self.problem.dtype).eps))
                value = function(x.to(device=self.problem.device, dtype=self.problem.dtype))
        self._takes_float64.setdefault(name, True)
        return value.detach().to("cpu", torch.float64)

    def _time(self, t: float, x: Tensor) -> Tensor:
        return torch.tensor(t, dtype=x.dtype, device=x.device)

    def reward(self, x: Tensor) -> Tensor:
        """``r/alpha``, ``(rows,)``."""
        return self._call("reward", self.problem.reward, x) / self.problem.alpha

    def cost(self, x: Tensor, t: float) -> Tensor:
        """``f/alpha``, ``(rows,)``; 0 in the stretch before time 0."""
        if t < 0 or self.problem.running_cost_function is None:
            return torch.zeros(len(x), dtype=torch.float64)
        cost = self._call("running_cost", lambda y: self.problem.running_cost(y, self._time(t, y)), x)
        return cost / self.problem.alpha

    def drift(self, x: Tensor, t: float) -> Tensor:
        return self._call("drift", lambda y: self.problem.reference.drift(y, self._time(t, y)), x)

    def diffusion(self, x: Tensor, t: float) -> Tensor:
        """sigma as the process has it."""
        reference: Any = self.problem.reference
        return self._call("diffusion", lambda y: reference.diffusion(y, self._time(t, y)), x)

    def step(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Mean ``(rows, d)`` of step k, and its scale as the chain has it."""
        both: list[Tensor] = []

        def kernel(y: Tensor) -> Tensor:
            mean, scale = self.chain.kernel(k, y)
            both.append(scale.detach().to("cpu", torch.float64))
            return mean

        mean = self._call("drift", kernel, x)
        return mean, both[-1]

    def rows(self, scale: Tensor, index: list[int], count: int) -> Tensor:
        """The rows of a scale that belong to a block, as matrices ``(count, n, m)`` (an elementwise one: m = n)."""
        if is_matrix_scale(scale, 1):
            return scale[:, index].expand(count, -1, -1)
        return torch.diag_embed(scale.expand(count, self.d)[:, index])
