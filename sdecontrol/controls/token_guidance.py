"""Guidance of tokens by a value: the tilt of a token is the value of the state that has it.

``u(x, y) = v_{k+1}(y)/alpha`` for each neighbour y of x, one position set to one token (docs/mathematics.md, section
10). Where one position moves in a step this is the soft-optimal kernel, exactly; where several do, O(h) from the best
product. All neighbours are asked for, so a step costs ``open positions x V`` values of each state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..problems.problem import ControlProblem
from ..shapes import Controls, States
from .base import at_each_time
from .guidance import ValueControl
from .log_value import LogValue
from .saved import CONTROLS, VALUES

_ROWS = 8192  # neighbours valued at once


@CONTROLS.register(
    "token-value", lambda saved, to: TokenValueControl(VALUES.make(saved["value"], to), to.problem, to.chain)
)
class TokenValueControl(ValueControl):
    """See the module's head; nothing is differentiated."""

    def __init__(self, value: LogValue, problem: ControlProblem, chain: Chain) -> None:
        super().__init__(value, problem, chain)
        self._problem = problem
        self.belongs_to(problem)

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        if t.ndim:
            return at_each_time(self.at, x, t, y)
        k = self._chain.step_at(float(t))
        return self._tilt(k, x, self._values(self._chain, k), y)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        return lambda k, x, y: chain.shift_at(k, x, self._tilt(k, x, self._values(chain, k), y), y)

    def _values(self, chain: Any, k: int) -> Callable[[Tensor, Any], Tensor]:
        """``(x, y) -> v/alpha`` by which the neighbours of step k are valued; at the end that is the reward, of states
        that a path can end with."""
        step, problem, value = chain.valued_at(k), self._problem, self.value.on_chain(chain)
        if step < chain.steps or self.value.own_end:
            return lambda x, y: value(step, x, y)

        def at_the_end(x: Tensor, y: Any) -> Tensor:
            masked = chain.open(x).flatten(1).any(1) & chain.reference.keeps_tokens
            if bool(masked.any()):  # on no path
                return value(step, x, y)
            return problem.reward(chain.decode(x, y), y) / problem.alpha

        return at_the_end

    @torch.no_grad()
    def _tilt(self, k: int, x: States, value: Callable[[Tensor, Any], Tensor], y: Any) -> Controls:
        """The values of all neighbours ``(batch, *shape, V)``, less the first of each position; 0 where nothing can
        change."""
        chain: Any = self._chain
        V, flat = self.control_shape[-1], x.flatten(1)
        u = torch.zeros(*flat.shape, V, dtype=chain.times.dtype, device=x.device)
        rows, places = chain.open(x).flatten(1).nonzero(as_tuple=True)
        tokens = chain.following(x)[..., :V].flatten(1, -2)
        size = max(1, _ROWS // V)
        for low in range(0, len(rows), size):
            row, place = rows[low : low + size], places[low : low + size]
            changed = flat[row].repeat_interleave(V, 0)
            changed.scatter_(1, place.repeat_interleave(V).unsqueeze(1), tokens[row, place].clamp(min=0).reshape(-1, 1))
            y_part = None if y is None else y[row.repeat_interleave(V)]
            found = value(changed.unflatten(1, x.shape[1:]), y_part).unflatten(0, (-1, V))
            u[row, place] = found - found[:, :1]
        return u.unflatten(1, x.shape[1:])


def guided_by(value: LogValue, problem: ControlProblem, chain: Chain) -> ValueControl:
    """The control by a value: of numbers by its gradient, of tokens by its differences."""
    kind = ValueControl if problem.reference.state_dtype is None else TokenValueControl
    return kind(value, problem, chain)
