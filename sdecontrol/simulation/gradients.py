"""Gradients of a path cost through the simulation: full graph, checkpointed, discrete adjoint, truncated.

The cost is ``mean over paths of [ terminal(x_K) + sum_k ( h_k f(x_k)/alpha + |c_k|^2/2 ) ]``. The first three modes give the
same gradient to rounding:

* ``full``: ordinary backpropagation; memory grows with the number of steps.
* ``adjoint``: the exact adjoint of the chain. The forward pass runs without a graph and stores the states; the backward
  pass takes one step's vector-Jacobian product at a time, with the noise drawn again from its seed. Memory: one step's
  graph, plus the states.
* ``checkpoint``: the same with segments of sqrt(K) steps: memory of sqrt(K) states and one segment's graph.
* an integer K: through the last K steps only (DRaFT-K, Clark et al. 2309.17400): a biased gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tensors import event_sum
from .chains import Chain
from .integrator import NoiseSource, RunningCost, integrate, one_step
from .shifts import ShiftFunction, shift_function

__all__ = ["GRADIENT_MODES", "PathCost", "backpropagate"]

GRADIENT_MODES = ("full", "checkpoint", "adjoint")


@dataclass(frozen=True)
class PathCost:
    """Detached parts of the cost of each path, all ``(batch,)``, and the last states."""

    terminal: Tensor
    running_cost: Tensor
    kl: Tensor
    end: Tensor


@dataclass(frozen=True)
class _Setting:
    chain: Chain
    noise: NoiseSource
    control: Any
    terminal: Callable[[Tensor], Tensor]
    running_cost: RunningCost | None
    alpha: float
    condition: Any
    parameters: Sequence[Tensor]
    weight: float

    def shift(self, tables: Sequence[Tensor] | None = None) -> ShiftFunction:
        if hasattr(self.control, "tables"):
            return self.control.on_chain(self.chain, tables)
        return shift_function(self.chain, self.control)

    def step(self, shift: ShiftFunction, k: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Next state, running cost and KL of step k."""
        chain = self.chain
        nxt, c = one_step(chain, k, x, self.noise[k], shift, self.condition)
        assert c is not None
        kl = event_sum(0.5 * c * c, len(chain.noise_shape))
        if self.running_cost is None or chain.clock[k] < 0:
            return nxt, torch.zeros_like(kl), kl
        return nxt, self.running_cost(x, chain.times[k], self.condition) * chain.step_sizes[k], kl


def backpropagate(
    chain: Chain,
    control: Any,
    x0: Tensor,
    noise: NoiseSource,
    terminal: Callable[[Tensor], Tensor],
    *,
    parameters: Sequence[Tensor],
    mode: str | int = "full",
    running_cost: RunningCost | None = None,
    alpha: float = 1.0,
    condition: Any = None,
    weight: float = 1.0,
) -> PathCost:
    """Add ``weight`` times the gradient of the mean path cost to ``parameters``' ``.grad``, and to nothing else's.

    Args:
        terminal: ``x_K -> (batch,)``, differentiable.
        mode: "full", "checkpoint", "adjoint", or a number of last steps.
    """
    setting = _Setting(chain, noise, control, terminal, running_cost, alpha, condition, list(parameters), weight)
    if mode in ("checkpoint", "adjoint"):
        return _by_segments(setting, x0, math.isqrt(chain.steps) if mode == "checkpoint" else 1)
    return _full(setting, x0, chain.steps if mode == "full" else min(int(mode), chain.steps))


def _descend(setting: _Setting, terminal: Tensor, running: Tensor, kl: Tensor) -> None:
    loss = setting.weight * (terminal + running / setting.alpha + kl).mean()
    torch.autograd.backward(loss, inputs=list(setting.parameters))


def _full(setting: _Setting, x0: Tensor, last_steps: int) -> PathCost:
    chain, cut = setting.chain, setting.chain.steps - last_steps
    x, early_cost, early_kl = x0, torch.zeros_like(x0.flatten(1)[:, 0]), torch.zeros_like(x0.flatten(1)[:, 0])
    options: dict[str, Any] = {"condition": setting.condition, "running_cost": setting.running_cost}
    if cut:
        with torch.no_grad():
            early = integrate(chain, x0, setting.noise, setting.shift(), keep="end", last=cut, **options)
        x, early_cost, early_kl = early.end, early.running_cost, early.kl()
    paths = integrate(chain, x, setting.noise, setting.shift(), keep="all", first=cut, **options)
    terminal, kl = setting.terminal(paths.end), paths.kl()
    _descend(setting, terminal, paths.running_cost, kl)
    return PathCost(
        terminal.detach(), (early_cost + paths.running_cost).detach(), (early_kl + kl).detach(), paths.end.detach()
    )


def _by_segments(setting: _Setting, x0: Tensor, size: int) -> PathCost:
    """Forward without a graph, storing the state at the start of each segment of ``size`` steps; backward one segment at a
    time, recomputed with its graph: the adjoint ``a = d cost / d x`` is carried from segment to segment."""
    chain, control = setting.chain, setting.control
    tables = tuple(control.tables(chain)) if hasattr(control, "tables") else ()
    # what depends on time alone is computed once: its gradient is collected in leaves and passed on at the end
    leaves = [table.detach().requires_grad_(table.requires_grad) for table in tables]
    starts, (running, kl) = [x0], (x0.new_zeros(x0.shape[0]), x0.new_zeros(x0.shape[0]))
    with torch.no_grad():
        shift = setting.shift(leaves)
        for first in range(0, chain.steps, size):
            part = integrate(
                chain, starts[-1], setting.noise, shift, condition=setting.condition,
                running_cost=setting.running_cost, keep="end", first=first, last=min(first + size, chain.steps),
            )  # fmt: skip
            starts.append(part.end)
            running, kl = running + part.running_cost, kl + part.kl()
    end = starts.pop().requires_grad_(True)
    terminal = setting.terminal(end)
    scale = setting.weight / x0.shape[0]
    adjoint = torch.autograd.grad(terminal.sum() * scale, end)[0]
    inputs = [*(leaf for leaf in leaves if leaf.requires_grad), *setting.parameters]
    for first in reversed(range(0, chain.steps, size)):
        start = x = starts.pop().detach().requires_grad_(True)
        shift, cost = setting.shift(leaves), x0.new_zeros(())
        for k in range(first, min(first + size, chain.steps)):
            x, f, one = setting.step(shift, k, x)
            cost = cost + (f / setting.alpha + one).sum() * scale
        torch.autograd.backward([x, cost], [adjoint, torch.ones_like(cost)], inputs=[start, *inputs])
        adjoint = start.grad if start.grad is not None else torch.zeros_like(start)
        chain.forget()
    pairs = [(table, leaf.grad) for table, leaf in zip(tables, leaves) if leaf.grad is not None]
    if pairs:
        torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs], inputs=list(setting.parameters))
    return PathCost(terminal.detach(), running, kl, end.detach())
