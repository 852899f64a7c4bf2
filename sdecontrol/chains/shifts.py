"""From controls ``u(x, t)`` to shifts ``c_k``: the one place where u is converted.

A control is any callable ``(x, t) -> (batch, *control_shape)`` with t of shape ``(batch,)`` (``(x, t, y)`` where there
is a condition). The library's own controls may offer two faster ways, which this module prefers:
``on_chain(chain) -> (k, x, y) -> c`` with all work on times done once, and
``along(chain, states, y) -> (K, batch, ...)``, all stored states in one call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..counting import counted_control
from ..precision import call
from ..shapes import Controls, NoisePaths, Noises, PerPath, StatePaths, States
from ..tensors import check_output
from .base import Chain

#: ``(k, x, condition) -> c_k``.
ShiftFunction = Callable[[int, States, Any], Noises]


def _call(control: Callable[..., Controls], x: States, t: PerPath, condition: Any) -> Controls:
    return call(control, x, t) if condition is None else call(control, x, t, condition)


def shift_function(chain: Chain, control: Any, tables: Sequence[Any] | None = None) -> ShiftFunction:
    """The shift of a control at step k and state x; ``tables`` where the library's own controls have made theirs
    already."""
    if hasattr(control, "on_chain"):
        shift = control.on_chain(chain) if tables is None else control.on_chain(chain, tables)
        return counted_control(control, shift, lambda k, x, condition: len(x))
    times, start = chain.times, chain.start
    nothing = chain.times.new_zeros(()).expand(1, *chain.noise_shape)
    rows: tuple[Tensor, ...] = ()
    want = torch.Size()

    def shift(k: int, x: States, condition: Any) -> Noises:
        nonlocal rows, want
        if not want or want[0] != x.shape[0]:
            want = torch.Size((x.shape[0], *chain.control_shape))
            rows = times.unsqueeze(1).expand(-1, x.shape[0]).unbind(0)
        if k < start:  # a control of the process says nothing of the learned start
            return nothing.expand(x.shape[0], *chain.noise_shape)
        u = _call(control, x, rows[k], condition)
        if type(u) is not Tensor or u.shape != want or u.dtype is not times.dtype or u.device != x.device:
            check_output("control", u, want, times, "A control is called as control(x, t), t (batch,).")
        return chain.shift_at(k, x, u, condition)

    return shift


def shifts_along(chain: Chain, control: Any, states: StatePaths, condition: Any = None, first: int = 0) -> NoisePaths:
    """Shifts of a control at the stored states of steps ``first, first+1, ...``."""
    count = states.shape[0]
    if hasattr(control, "along"):
        along = counted_control(control, control.along, lambda *_: states.shape[0] * states.shape[1])
        return along(chain, states, condition, first)
    if hasattr(control, "on_chain") or chain.start:
        function = shift_function(chain, control)
        return torch.stack([function(first + k, states[k], condition) for k in range(count)])
    batch = states.shape[1]
    t = chain.times[first : first + count].repeat_interleave(batch)
    y = None if condition is None else condition.repeat(count, *(1 for _ in condition.shape[1:]))
    u = _call(control, states.flatten(0, 1), t, y)
    check_output("control", u, (count * batch, *chain.control_shape), t, "A control is called as control(x, t).")
    return chain.shifts_at(range(first, first + count), states, u.unflatten(0, (count, batch)), condition)
