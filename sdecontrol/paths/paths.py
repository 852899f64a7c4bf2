"""``Paths``: what the integrator returns, and the functions of it that every algorithm is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import shifts_along
from ..tensors import event_sum

__all__ = ["Paths"]


class Paths:
    """Simulated paths of a chain, with exact likelihood ratios against the reference.

    Attributes:
        times: ``(K+1,)``; with a controlled start they begin at -1.
        states: ``(K+1, batch, *event)``.
        noises: ``(K, batch, *noise)``, the ``xi_k``.
        shifts: ``(K, batch, *noise)``, the ``c_k`` of the control that drew the paths.
        running_cost: ``(batch,)``, ``sum_k h_k f(x_k, t_k)``.
            On a chain with backward kernels: less the functional of the path that they make (``backward.py``).
        backward_draws, backward_shifts: there, ``(K, batch, *noise)``: ``(x_k - mean'_k(x_{k+1}))/scale_k`` of the kernels without control, and ``b_k``.
        condition: what the paths were conditioned on, or None.
        end: ``(batch, *event)``, the last states (before ``decode``).
        chain: the chain that was simulated.

    What was not kept (``keep="states" | "end"``) is drawn again from its seed when asked for.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        first: int,
        last: int,
        end: Tensor,
        running_cost: Tensor,
        condition: Any,
        states: list[Tensor] | None,
        noises: list[Tensor] | None,
        shifts: list[Tensor] | None,
        sums: tuple[Tensor, Tensor] | None,
        replay: Callable[[], Paths] | None,
        backward_draws: list[Tensor] | None = None,
        backward_shifts: list[Tensor] | None = None,
    ) -> None:
        self._backward_draws, self._backward_shifts = backward_draws, backward_shifts
        self.chain, self.first, self.last, self.end = chain, first, last, end
        self.running_cost, self.condition = running_cost, condition
        self._states, self._noises, self._shifts = states, noises, shifts
        self._sums, self._replay = sums, replay
        self._whole: Paths | None = None
        self._stacks: dict[str, Tensor] = {}

    @classmethod
    def of_states(cls, chain: Chain, states: Tensor) -> Paths:
        """Paths of which only the states ``(K+1, batch, *event)`` are known: drawn from bridges, say, step by step."""
        cost = states.new_zeros(states.shape[1])
        return cls(
            chain,
            first=0,
            last=chain.steps,
            end=states[-1],
            running_cost=cost,
            condition=None,
            states=list(states),
            noises=None,
            shifts=None,
            sums=None,
            replay=None,
        )

    def __repr__(self) -> str:
        kept = "all" if self._noises is not None else "states" if self._states is not None else "end"
        return (
            f"Paths({self.last - self.first} steps, batch={self.end.shape[0]}, "
            f"event={tuple(self.chain.event_shape)}, kept={kept!r})"
        )

    def _stacked(self, name: str) -> Tensor:
        if name not in self._stacks:
            parts = getattr(self, "_" + name)
            if parts is None:
                if self._replay is None:
                    raise RuntimeError(f"these paths did not keep their {name}; simulate with keep='all'.")
                if self._whole is None:
                    self._whole = self._replay()
                return self._whole._stacked(name)
            self._stacks[name] = torch.stack(parts)
        return self._stacks[name]

    @property
    def times(self) -> Tensor:
        return self.chain.times[self.first : self.last + 1]

    @property
    def states(self) -> Tensor:
        return self._stacked("states")

    @property
    def noises(self) -> Tensor:
        return self._stacked("noises")

    @property
    def shifts(self) -> Tensor:
        return self._stacked("shifts")

    @property
    def backward_draws(self) -> Tensor:
        return self._stacked("backward_draws")

    @property
    def backward_shifts(self) -> Tensor:
        return self._stacked("backward_shifts")

    @property
    def samples(self) -> Tensor:
        """The decoded ends, ``(batch, ...)``: what rewards and metrics see."""
        return self.chain.decode(self.end, self.condition)

    @property
    def controls(self) -> Tensor:
        """``u`` at every step, ``(K, batch, *control_shape)``; with a controlled start, after time 0 only."""
        start = max(self.chain.start, self.first)
        return torch.stack([self.chain.control(k, self.shifts[k - self.first]) for k in range(start, self.last)])

    def log_ratio(self, control: Any = None, per_step: bool = False) -> Tensor:
        """``log dP^u/dQ0`` on these paths, ``(batch,)``, or step by step ``(K, batch)``.

        Exact at every step size: ``sum_k c_k.xi_k + |c_k|^2/2`` for the control that drew them, and
        ``sum_k c^u_k.(c_k + xi_k) - |c^u_k|^2/2`` for another control u at the same states.

        Args:
            control: None for the control that drew the paths; else any control ``(x, t) -> u``.
        """
        n = len(self.chain.noise_shape)
        if control is None:
            if self._shifts is None and self._noises is None and self._sums is not None and not per_step:
                return self._sums[0] + self._sums[1]
            c, xi = self.shifts, self.noises
            steps = event_sum(c * (xi + 0.5 * c), n)
        else:
            c = shifts_along(self.chain, control, self.states[:-1], self.condition, self.first)
            steps = event_sum(c * (self.noises + self.shifts - 0.5 * c), n)
        return steps if per_step else steps.sum(0)

    def kl(self, per_step: bool = False) -> Tensor:
        """``sum_k |c_k|^2/2`` of each path, ``(batch,)`` or ``(K, batch)``: its mean is ``KL(P^u || Q0)``, with less
        variance than the mean of :meth:`log_ratio`."""
        if self._shifts is None and self._sums is not None and not per_step:
            return self._sums[1]
        if (known := self._stacks.get("kl")) is not None and not per_step:
            return known
        steps = event_sum(0.5 * self.shifts**2, len(self.chain.noise_shape))
        if per_step:
            return steps
        whole = steps.sum(0)
        if not whole.requires_grad:
            self._stacks["kl"] = whole
        return whole
