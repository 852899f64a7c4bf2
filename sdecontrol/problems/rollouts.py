"""Rollouts: paths simulated without a graph, and the log-ratios of a control along them, which path losses are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.reverse import backward_shifts_along, log_reversal
from ..chains.shifts import ShiftFunction, shift_function, shifts_along
from ..paths.integrator import NoiseSource, RunningCost, check_likelihood, explain_nonfinite, integrate
from ..tensors import event_sum
from .problem import ControlProblem

__all__ = ["Rollout", "leave_one_out", "roll_out"]


@dataclass(frozen=True)
class Rollout:
    """Paths without a graph, with the total reward's parts.

    On a chain with backward kernels (``chains/reverse.py``) the target depends on the control. Its part, ``log dB^u/dB^0``, is taken off the log-ratio here, so
    that total and costs are functions of the path alone and ``log_ratios - total/alpha`` is the negative log weight, of any control.

    Attributes:
        chain: of K steps.
        states: ``(K+1, batch, *event)``.
        draws: ``(K, batch, *noise)``, ``c_k + xi_k``: the noise that would have made the path under the reference. Log-ratios of
            any control depend on the path through it alone.
        shifts: ``(K, batch, *noise)``, the ``c_k`` that drew the paths.
        reward: ``(batch,)``; costs: ``(K, batch)``, running costs ``h_k f_k``, before time 0 zero; less the functional of backward kernels without control.
        backward_draws, backward_shifts: as of :class:`Paths`, where there are backward kernels.
    """

    chain: Chain
    states: Tensor
    draws: Tensor
    shifts: Tensor
    reward: Tensor
    costs: Tensor
    condition: Any = None
    backward_draws: Tensor | None = None
    backward_shifts: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """``R``, ``(batch,)``."""
        return self.reward - self.costs.sum(0)

    def log_ratios(self) -> Tensor:
        """``log dP/dQ0 [- log dB/dB^0]`` of each step, ``(K, batch)``, for the law P that drew the paths."""
        ratios = event_sum(self.shifts * (self.draws - 0.5 * self.shifts), len(self.chain.noise_shape))
        return self._less_backward(ratios, self.backward_shifts)

    def kls(self, forward: bool = False) -> Tensor:
        """``|c_k|^2/2 [- log dB/dB^0]``, ``(K, batch)``; ``forward``: without the latter."""
        kls = event_sum(0.5 * self.shifts**2, len(self.chain.noise_shape))
        return kls if forward else self._less_backward(kls, self.backward_shifts)

    def _less_backward(self, values: Tensor, b: Tensor | None, steps: Sequence[int] | None = None) -> Tensor:
        """``values - log B^u/B^0``, the latter being ``-b.z - |b|^2/2`` for the backward draw z."""
        if b is None or self.backward_draws is None:
            return values
        back = self.backward_draws if steps is None else self.backward_draws[list(steps)]
        return values + event_sum(b * (back + 0.5 * b), len(self.chain.noise_shape))

    def log_ratios_of(
        self, control: Any, steps: Sequence[int] | None = None, forward: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``log dP^u/dQ0 [- log dB^u/dB^0]`` and ``|c_k|^2/2 [- log dB^u/dB^0]`` of a control at these states, with their graph: both ``(steps, batch)``.

        All steps in one call of the control; or the given ones. ``forward``: the first as ``log dP^u/dQ0`` alone, whose gradient is the score of the law of the paths.
        """
        chain, n = self.chain, len(self.chain.noise_shape)
        if steps is None:
            c, draws = shifts_along(chain, control, self.states[:-1], self.condition), self.draws
        else:
            shift = shift_function(chain, control)
            c = torch.stack([shift(k, self.states[k], self.condition) for k in steps])
            draws = self.draws[list(steps)]
        b = None
        if chain.backward_control:
            b = backward_shifts_along(chain, control, self.states, self.condition, steps, c if steps is None else None)
        ratios, kls = event_sum(c * (draws - 0.5 * c), n), event_sum(0.5 * c**2, n)
        return ratios if forward else self._less_backward(ratios, b, steps), self._less_backward(kls, b, steps)

    def rows(self, index: Tensor) -> Rollout:
        """Some of the paths."""
        y = None if self.condition is None else self.condition[index]
        return Rollout(
            self.chain,
            self.states[:, index],
            self.draws[:, index],
            self.shifts[:, index],
            self.reward[index],
            self.costs[:, index],
            y,
            None if self.backward_draws is None else self.backward_draws[:, index],
            None if self.backward_shifts is None else self.backward_shifts[:, index],
        )


@torch.no_grad()
def roll_out(
    problem: ControlProblem,
    chain: Chain,
    control: Any,
    x0: Tensor,
    noise: NoiseSource,
    condition: Any = None,
    until: int | None = None,
) -> Rollout:
    """Simulate paths and their total reward.

    Args:
        control: None for the reference.
        until: follow the control for so many steps only, then the reference; None: to the end.
    """
    cost, shift = problem.running_cost_or_none, None if control is None else shift_function(chain, control)
    found: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor, y: Any) -> Tensor:
        assert cost is not None
        found.append(cost(x, t, y))
        return found[-1]

    along = getattr(cost, "along", None)  # all steps in one call
    recorder: RunningCost | None = None if cost is None or along is not None else recorded
    follow = shift if shift is None or until is None else _followed(chain, shift, until)
    paths = integrate(chain, x0, noise, follow, condition=condition, running_cost=recorder)
    check_likelihood(paths.kl(), chain)
    costs = x0.new_zeros(chain.steps, x0.shape[0])
    if cost is not None:
        start = chain.start
        values = torch.stack(found) if along is None else along(paths.states[start:-1], chain.times[start:-1])
        costs[start:] = values * x0.new_tensor(chain.step_sizes[start:]).unsqueeze(1)
        if not bool(torch.isfinite(costs).all()):
            raise explain_nonfinite(paths, follow, cost)
    reward = problem.reward(paths.samples, condition).detach()
    draws, back, b = paths.shifts + paths.noises, None, None
    if chain.backward:
        back, b = paths.backward_draws, paths.backward_shifts
        costs = costs - log_reversal(chain, paths.states[:-1], paths.states[1:], draws, back, None)
    return Rollout(chain, paths.states, draws, paths.shifts, reward, costs, condition, back, b)


def _followed(chain: Chain, shift: ShiftFunction, until: int) -> ShiftFunction:
    def follow(k: int, x: Tensor, y: Any) -> Tensor:
        return shift(k, x, y) if k < until else x.new_zeros(x.shape[0], *chain.noise_shape)

    return follow


def leave_one_out(values: Tensor, group_size: int | None = None) -> Tensor:
    """``values`` ``(..., batch)`` less the mean of the others of their group (consecutive; None: of all): a baseline that does
    not depend on the path itself, so that score-function gradients stay unbiased."""
    size = values.shape[-1] if group_size is None else group_size
    v = values.unflatten(-1, (-1, size))
    return ((v - v.mean(-1, keepdim=True)) * (size / (size - 1))).flatten(-2)
