"""What work costs, counted where it is done: rows at which the reward, its gradient and controls are asked for.

Inside ``with counting(calls):`` the few doors through which everything goes add to ``calls``: the problem's reward,
annealed Langevin's score, the shifts of controls (``chains/shifts.py``), and a control that is called itself. The
counter belongs to the context (``contextvars``), so threads count for themselves, and no object or class is changed. No
number depends on it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Calls:
    """In rows: a call on 256 states is 256.

    Attributes:
        reward_calls: of the reward.
        gradient_calls: whose gradient of the reward was taken.
        network_calls: at which the control was evaluated (again, where a backward pass recomputes it); what a guidance
            simulates inside an evaluation is not counted here. 0 for the reference.
    """

    reward_calls: int = 0
    gradient_calls: int = 0
    network_calls: int = 0


_calls: ContextVar[Calls | None] = ContextVar("calls", default=None)
_inside: ContextVar[bool] = ContextVar("inside", default=False)  # an evaluation, whose parts are not counted again


@contextlib.contextmanager
def counting(calls: Calls) -> Iterator[None]:
    """What is called inside, in this thread, adds to ``calls``, and to no other counter."""
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)


def count_reward(value: Any, rows: int, with_gradient: bool = False) -> None:
    """A call of the reward, ``value`` its result; its gradient where that is taken, or at once, where the call is of
    the gradient."""
    calls = _calls.get()
    if calls is None:
        return

    def gradient(_: Any = None) -> None:
        calls.gradient_calls += rows

    calls.reward_calls += rows
    if with_gradient:
        gradient()
    elif isinstance(value, Tensor) and value.requires_grad:
        value.register_hook(gradient)  # of whoever counts now: backward passes may run in another thread


def counted_control(control: Any, evaluate: Callable[..., Tensor], rows: Callable[..., int]) -> Callable[..., Tensor]:
    """``evaluate``, which evaluates a control, counting ``rows(*arguments)``; itself where nothing counts, or the
    control is no cost."""
    calls = _calls.get()
    if calls is None or not getattr(control, "counted", False):
        return evaluate

    def counted(*arguments: Any, **named: Any) -> Tensor:
        if _inside.get():
            return evaluate(*arguments, **named)
        calls.network_calls += rows(*arguments, **named)
        token = _inside.set(True)
        try:
            return evaluate(*arguments, **named)
        finally:
            _inside.reset(token)

    return counted
