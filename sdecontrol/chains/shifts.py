"""From controls ``u(x, t)`` to shifts ``c_k``: the one place where u is converted.

A control is any callable ``(x, t) -> (batch, *control_shape)`` with t of shape ``(batch,)`` (``(x, t, y)`` where there
is a condition). The library's own controls may offer two faster ways, which this module prefers:
``on_chain(chain) -> (k, x, y) -> c`` with all work on times done once, and
``along(chain, states, y) -> (K, batch, ...)``, all stored states in one call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..counting import counted_control
from ..precision import call
from ..processes.modules import evaluating
from ..shapes import Controls, NoisePaths, Noises, PerPath, StatePaths, States
from ..tensors import check_output
from .base import Chain
from .blocks import Block, blocks_for, in_blocks

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


class AllRows:
    """A shift function that knows its rows by their place, and is asked for all of them."""

    all_rows = True

    def __init__(self, shift: ShiftFunction) -> None:
        self._function = shift

    def __call__(self, k: int, x: States, condition: Any) -> Noises:
        return self._function(k, x, condition)


class ShiftsBeside:
    """A shift function that moves nothing and keeps what a control would do at the states of the reference's paths,
    within their steps: of a model that both ask for there is one call a step."""

    all_rows = True

    def __init__(self, chain: Chain, control: Any) -> None:
        self._shift, self._nothing = shift_function(chain, control), chain.times.new_zeros(1, *chain.noise_shape)
        self.found: list[Noises] = []

    def __call__(self, k: int, x: States, condition: Any) -> Noises:
        self.found.append(self._shift(k, x, condition))
        return self._nothing.expand(x.shape[0], *self._nothing.shape[1:])


def shifts_along(
    chain: Chain,
    control: Any,
    states: StatePaths,
    condition: Any = None,
    first: int = 0,
    *,
    steps: Sequence[int] | None = None,
    known: NoisePaths | None = None,
) -> NoisePaths:
    """Shifts of a control at the stored states of steps ``first, first+1, ...``, or of the steps that are listed; where
    their graph would be large, with one that is made again block by block (:mod:`.blocks`).

    Args:
        known: the shifts, where this control, as it is, has drawn the states: then that costs no second evaluation.
    """
    evaluate = _by_block(chain, control, states, condition, first, steps, slopes=known is not None)
    large = hasattr(control, "on_chain") and isinstance(control, nn.Module) and not states.requires_grad
    blocks = blocks_for(control, states, evaluate, again=known is None) if large else []
    if len(blocks) < 2:
        return _along(chain, control, states, condition, first, steps)
    return in_blocks(evaluate, blocks, [p for p in control.parameters() if p.requires_grad], known)


def gradient_blocks(
    chain: Chain, control: Any, states: StatePaths, condition: Any = None, steps: Sequence[int] | None = None
) -> list[Block]:
    """The blocks in which a loss that is a sum over steps and paths may be evaluated and differentiated, one after
    another; a single one where the graph is small."""
    return blocks_for(control, states, _by_block(chain, control, states, condition, 0, steps))


def _by_block(
    chain: Chain,
    control: Any,
    states: StatePaths,
    condition: Any,
    first: int,
    steps: Sequence[int] | None,
    slopes: bool = False,
) -> Callable[[Block], NoisePaths]:
    """``slopes``: for gradients in the control's parameters alone."""

    def evaluate(block: Block) -> NoisePaths:
        chosen = None if steps is None else steps[block.steps]
        y = None if condition is None else condition[block.rows]
        with chain.reference.evaluating(), evaluating([control]):  # in a backward pass, too
            return _along(chain, control, block.of(states), y, first + block.steps.start, chosen, slopes)

    return evaluate


def _along(
    chain: Chain,
    control: Any,
    states: StatePaths,
    condition: Any,
    first: int,
    steps: Sequence[int] | None,
    slopes: bool = False,
) -> NoisePaths:
    """All in one call of the control; steps that do not follow one another one by one."""
    count = states.shape[0]
    if steps is not None and list(steps) == list(range(steps[0], steps[0] + count)):
        steps, first = None, steps[0]
    if steps is not None:
        function = shift_function(chain, control)
        return torch.stack([function(k, x, condition) for k, x in zip(steps, states)])
    if hasattr(control, "along"):
        function = getattr(control, "slopes_along", control.along) if slopes else control.along
        along = counted_control(control, function, lambda *_: states.shape[0] * states.shape[1])
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
