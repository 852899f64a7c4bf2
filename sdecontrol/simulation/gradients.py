"""Gradients of a path cost through the simulation: full graph, checkpointed, discrete adjoint, truncated.

The cost is ``mean over paths of [ terminal(x_K) + sum_k ( h_k f(x_k)/alpha + |c_k|^2/2 ) ]``. The first three modes give the
same gradient to rounding:

* ``full``: ordinary backpropagation; memory grows with the number of steps.
* ``checkpoint``: segments of about sqrt(K) steps are recomputed on the way back.
* ``adjoint``: the exact adjoint of the chain. The forward pass runs without a graph and stores the states; the backward
  pass takes one step's vector-Jacobian product at a time, with the noise drawn again from its seed. Memory: one step's
  graph, plus the states.
* an integer K: through the last K steps only (DRaFT-K, Clark et al. 2309.17400): a biased gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    if mode == "checkpoint":
        return _checkpointed(setting, x0)
    if mode == "adjoint":
        return _adjoint(setting, x0)
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


def _checkpointed(setting: _Setting, x0: Tensor) -> PathCost:
    steps = setting.chain.steps
    size = max(1, math.isqrt(steps))
    shift = setting.shift()

    def segment(x: Tensor, running: Tensor, kl: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        for k in range(first, min(first + size, steps)):
            x, f, one = setting.step(shift, k, x)
            running, kl = running + f, kl + one
        setting.chain.forget()
        return x, running, kl

    x = x0
    running = kl = x0.new_zeros(x0.shape[0])
    for first in range(0, steps, size):
        x, running, kl = checkpoint(  # type: ignore[misc]
            segment, x, running, kl, first, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
    terminal = setting.terminal(x)
    _descend(setting, terminal, running, kl)
    return PathCost(terminal.detach(), running.detach(), kl.detach(), x.detach())


def _adjoint(setting: _Setting, x0: Tensor) -> PathCost:
    chain, batch = setting.chain, x0.shape[0]
    control = setting.control
    tables = tuple(control.tables(chain)) if hasattr(control, "tables") else ()
    leaves = [table.detach().requires_grad_(table.requires_grad) for table in tables]
    shift = setting.shift(leaves)
    with torch.no_grad():
        paths = integrate(
            chain,
            x0,
            setting.noise,
            shift,
            condition=setting.condition,
            running_cost=setting.running_cost,
            keep="states",
        )
    states, kl = paths._states, paths.kl()
    assert states is not None
    end = states[-1].requires_grad_(True)
    terminal = setting.terminal(end)
    scale = setting.weight / batch
    adjoint = torch.autograd.grad(terminal.sum() * scale, end)[0]
    inputs = [*(leaf for leaf in leaves if leaf.requires_grad), *setting.parameters]
    for k in reversed(range(chain.steps)):
        x = states.pop(-2).detach().requires_grad_(True)
        with torch.enable_grad():
            step_shift = setting.shift(leaves) if leaves else shift
            nxt, running, one = setting.step(step_shift, k, x)
            cost = (running / setting.alpha + one).sum() * scale
        torch.autograd.backward([nxt, cost], [adjoint, torch.ones_like(cost)], inputs=[x, *inputs])
        adjoint = x.grad if x.grad is not None else torch.zeros_like(x)
        chain.forget()
    pairs = [(table, leaf.grad) for table, leaf in zip(tables, leaves) if leaf.grad is not None]
    if pairs:
        torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs], inputs=list(setting.parameters))
    return PathCost(terminal.detach(), paths.running_cost, kl, paths.end.detach())
