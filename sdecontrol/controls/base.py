"""``Control``: the base of the library's own controls.

A control is called by users as ``control(x, t)``, and by the package step by step on a chain (``on_chain``) or at all
stored states at once (``along``). What depends on time and parameters alone is computed once per chain: ``tables``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction, shift_function, shifts_along
from ..counting import counted_control
from ..errors import NotDifferentiable
from ..memory import remembering
from ..precision import at_least_single, call, full_precision
from ..problems.problem import ControlProblem
from ..processes.modules import modules_in
from ..shapes import Controls, NoisePaths, Noises, StatePaths, States
from ..tensors import check_output, probing
from .linear_part import LinearPart, PartOfSegment
from .saved import CONTROLS, Context, Saved


def at_each_time(at: Callable[[Tensor, Tensor, Any], Tensor], x: Tensor, t: Tensor, y: Any) -> Tensor:
    """A function of a 0-d time for times ``(batch,)``: one call for each time among them."""
    times, where = torch.unique(t, return_inverse=True)
    if len(times) < 2:
        return at(x, times[0] if len(times) else t.new_zeros(()), y)
    rows = [(where == j).nonzero().flatten() for j in range(len(times))]
    parts = [at(x[r], time, None if y is None else y[r]) for r, time in zip(rows, times)]
    return torch.cat(parts)[torch.argsort(torch.cat(rows))]


class Control(nn.Module):
    """A control ``u(x, t)``, called with x ``(batch, *event)`` and t a float or a tensor of shape () or (batch,).

    Attributes:
        settings: "time_steps" and "scheme" it was solved with (``simulate`` uses them by default).
        learning_rate: a sensible step of Adam for its parameters.
        most_times: how many times that a run may find to be its rate: 1 where it is measured for such networks, more
            where it is a guess.
        counted: whether its evaluations are a cost (``counting.py``).
        differentiable: whether ``u`` has a gradient in its parameters; without one they are trained by a method of its
            own.
        within: the user's modules in evaluation mode, where a control of a solution is called.
        state_dtype: of the states, where they are tokens. check_states: the reference's check of states by name.
            tangent: what of its output acts at x, where that is not all of it.

    A class of yours is given again to ``load``, unless it registers the kind that files name, by a decorator, and says
    how it is made again; its parameters come from the file::

        @sc.Control.register("my-kind")
        class Mine(sc.Control):
            configuration = property(lambda self: {"width": self.width})   # plain numbers, strings and lists

            @classmethod
            def from_saved(cls, saved, context):
                return cls(context.problem, width=saved["width"])
    """

    learning_rate = 5e-3
    most_times = 1.0
    counted: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    register = staticmethod(CONTROLS.register)

    def __init__(self, event_shape: torch.Size, control_shape: torch.Size, first_time: float, last_time: float) -> None:
        super().__init__()
        self.event_shape, self.control_shape = torch.Size(event_shape), torch.Size(control_shape)
        self.first_time, self.last_time = first_time, last_time
        self.settings: dict[str, Any] = {}
        self.within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.state_dtype: torch.dtype | None = None
        self.check_states: Callable[[str, Tensor], None] | None = None
        self.tangent: Callable[[Tensor, Tensor], Tensor] | None = None

    def belongs_to(self, problem: ControlProblem) -> None:
        """Know the states of a problem."""
        reference = problem.reference
        self.state_dtype, self.check_states = reference.state_dtype, reference.check_states
        self.tangent = reference.tangent if reference.tangential else None

    # ------------------------------------------------------------ for users

    @full_precision()
    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        with self.within():
            return counted_control(self, super().__call__, _rows)(*arguments, **named)

    def forward(self, x: States, t: Any, y: Any = None) -> Controls:
        """``u(x, t)``.

        Raises:
            ValueError, TypeError: wrong shape or dtype of x, or t outside of the horizon.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch tensor (batch, *event), got {type(x).__name__}.")
        x = x.clone() if x.is_inference() else x  # which would take no part in gradients by x
        if x.shape[1:] != self.event_shape or x.ndim == 0:
            raise ValueError(
                f"x must have shape (batch, {', '.join(map(str, self.event_shape))}), got {tuple(x.shape)}."
            )
        like = next(iter(self.parameters()), None)
        if not x.is_floating_point() and self.state_dtype is None:
            raise TypeError(f"x has dtype {x.dtype}, and states are numbers; use x.float() or x.double().")
        own = at_least_single(torch.get_default_dtype() if like is None else like.dtype)
        if like is not None and x.is_floating_point() and own != x.dtype:
            raise TypeError(f"x has dtype {x.dtype}, the control {own}; use x.to({own}).")
        if x.is_floating_point() and self.state_dtype is not None:
            raise TypeError(f"x has dtype {x.dtype}, and states are tokens of dtype {self.state_dtype}.")
        if self.check_states is not None:
            self.check_states("x", x)
        kind = x.dtype if x.is_floating_point() else own
        t = torch.as_tensor(t, dtype=kind, device=x.device)
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != x.shape[0]):
            raise ValueError(f"t must be a float or a tensor of shape () or ({x.shape[0]},), got {tuple(t.shape)}.")
        slack = 1e-5 * (self.last_time - self.first_time)
        if bool((t < self.first_time - slack).any()) or bool((t > self.last_time + slack).any()):
            raise ValueError(
                f"t must be within [{self.first_time:g}, {self.last_time:g}], got {float(t.min()):g} to "
                f"{float(t.max()):g}."
            )
        u = self.at(x, t, y)
        return u if self.tangent is None else self.tangent(x, u)

    # ------------------------------------------------------------ for the package

    @property
    def configuration(self) -> dict[str, Any]:
        """What a saved file says of it beside its kind, for ``from_saved``."""
        return {}

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        """``u(x, t)`` without checks; t of shape () or (batch,)."""
        raise NotImplementedError

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        """What depends on the chain's times and the parameters alone (with its graph): tensors with one row per step,
        or with a single row for all steps."""
        return ()

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        """``(k, x, y) -> c_k`` on a chain; ``tables`` as :meth:`tables` gives them, or as sequences of their rows."""
        times = chain.times
        return lambda k, x, y: chain.shift_at(k, x, self.at(x, times[k], y))

    def along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        """Shifts at stored states of steps ``first, first+1, ...``."""
        function = self.on_chain(chain)
        with remembering():  # a model that the control sees is asked by the chain, too
            return torch.stack([function(first + k, x, y) for k, x in enumerate(states)])

    def drawing_on(self, chain: Chain) -> ShiftFunction | None:
        """What moves the steps of a run of the chain as the control does, by shifts of which likelihoods are not asked,
        where that costs less; else None."""
        return None

    def slopes_along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        """As :meth:`along`, less anything that the parameters do not enter, where that costs less: for gradients in the
        parameters alone."""
        return self.along(chain, states, y, first)

    def linear_parts(self) -> list[LinearPart]:
        """The parameters in which the control is linear, for steps of least squares; none if it is linear in none."""
        return []


def _rows(x: Any, *_: Any, **__: Any) -> int:
    return len(x) if isinstance(x, Tensor) and x.ndim else 0


@CONTROLS.register("user", lambda saved, to: as_control(to.problem, to.chain, to.own_control()))
class UserControl(Control):
    """A user's own nn.Module ``(x, t) -> (batch, *control_shape)``, t of shape ``(batch,)``, as a control."""

    learning_rate = 1e-3
    most_times = 4.0

    def __init__(self, module: nn.Module, event_shape: torch.Size, control_shape: torch.Size, horizon: float) -> None:
        super().__init__(event_shape, control_shape, 0.0, horizon)
        self.module = module
        self.train(False)

    def train(self, mode: bool = True) -> UserControl:
        self.training = mode
        for module in modules_in(self.module):
            module.eval()  # dropout or batch statistics would make the control random: likelihoods need one function
        return self

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        t = t.expand(x.shape[0])
        return call(self.module, x, t) if y is None else call(self.module, x, t, y)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        return shift_function(chain, self.module)

    def along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        return shifts_along(chain, self.module, states, y, first)


def check_shapes(problem: ControlProblem, control: Control) -> None:
    """Raise where a control is of states or noises of another shape than a problem's."""
    if control.event_shape != problem.event_shape or control.control_shape != problem.control_shape:
        raise ValueError(
            f"control maps {tuple(control.event_shape)} to {tuple(control.control_shape)}; this problem "
            f"needs {tuple(problem.event_shape)} to {tuple(problem.control_shape)}."
        )


def as_control(problem: ControlProblem, chain: Chain, control: Any) -> Control:
    """A user's module as a control to be trained.

    Raises:
        TypeError, ValueError: no module, nothing to train in it, or a wrong output size, shape or dtype.
        NotDifferentiable: its output has no graph to its parameters.
    """
    if isinstance(control, Control):
        check_shapes(problem, control)
        return control
    if not isinstance(control, nn.Module):
        raise TypeError(
            "control must be an nn.Module (x, t) -> u to be trained (plain functions have no parameters; "
            f"use them with simulate), got {type(control).__name__}."
        )
    x = problem.reference.probe_states(3, problem.dtype, problem.device, seed=3)
    t = chain.times[0].expand(3)
    y = problem.draw_condition(3, 0)
    called = f"control(x, t{'' if y is None else ', y'}), x {tuple(x.shape)}, t (3,)"
    with torch.no_grad(), probing("control", called, "" if y is None else "x, t", (x, y)):
        u = call(control, x, t) if y is None else call(control, x, t, y)
    check_output("control", u, (3, *problem.control_shape), t, "A control is called as control(x, t), t (batch,).")
    parameters = [p for p in control.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("control has no trainable parameters.")
    with torch.enable_grad():
        u = call(control, x, t) if y is None else call(control, x, t, y)
        reached = u.requires_grad and torch.autograd.grad(u.sum(), parameters, allow_unused=True)
    if not reached or all(g is None for g in reached):
        raise NotDifferentiable(
            "control has trainable parameters, but returned a tensor without a graph to them (.detach(), numpy or "
            "no_grad inside?): no method could train it."
        )
    return UserControl(control, problem.event_shape, problem.control_shape, problem.horizon)


@CONTROLS.register("started")
class StartedControl(Control):
    """A control of the learned start, on [-1, 0), and one of the process after it."""

    def __init__(self, start: Control, main: Control) -> None:
        super().__init__(main.event_shape, main.control_shape, -1.0, main.last_time)
        self.start, self.main = start, main
        self.learning_rate, self.most_times = main.learning_rate, main.most_times

    @property
    def configuration(self) -> dict[str, Any]:
        return {"start": CONTROLS.describe(self.start), "main": CONTROLS.describe(self.main)}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> StartedControl:
        main = dataclasses.replace(context, chain=context.chain.main)
        return cls(CONTROLS.make(saved["start"], context), CONTROLS.make(saved["main"], main))

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        before = t < 0
        if bool(before.all()):
            return self.start.at(x, t, y)
        if not bool(before.any()):
            return self.main.at(x, t, y)
        if self.start.control_shape != self.main.control_shape:
            raise ValueError(
                "t mixes times before and after 0, where the controls have different shapes; ask separately."
            )
        a = self.start.at(x, t.clamp(max=0.0), y)
        b = self.main.at(x, t.clamp(min=0.0), y)
        return torch.where(before.reshape(-1, *(1,) * (x.ndim - 1)), a, b)

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return (*self.start.tables(chain.segments[0]), *self.main.tables(chain.main))

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        if not chain.start:  # the process alone
            return self.main.on_chain(chain, tables)
        first, second = chain.segments
        tables = self.tables(chain) if tables is None else tables
        cut = len(tables) - len(self.main.tables(second)) if tables else 0
        before = self.start.on_chain(first, tables[:cut])
        after = self.main.on_chain(second, tables[cut:])

        def shift(k: int, x: States, y: Any) -> Noises:
            return _padded(chain, before(k, x, y) if k < first.steps else after(k - first.steps, x, y))

        return shift

    def along(
        self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0, slopes: bool = False
    ) -> NoisePaths:
        if not chain.start:
            return (self.main.slopes_along if slopes else self.main.along)(chain, states, y, first)
        before, after = chain.segments
        cut = max(0, before.steps - first)
        parts = []
        for part, half, control, at in (
            (states[:cut], before, self.start, first),
            (states[cut:], after, self.main, max(0, first - before.steps)),
        ):
            if len(part):
                along = control.slopes_along if slopes else control.along
                parts.append(_padded(chain, along(half, part, y, at)))
        return torch.cat(parts)

    def slopes_along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        return self.along(chain, states, y, first, slopes=True)

    def drawing_on(self, chain: Chain) -> ShiftFunction | None:
        if (after := self.main.drawing_on(chain.main)) is None or not chain.start:
            return after
        first, before = chain.start, self.start.on_chain(chain.segments[0])
        return lambda k, x, y: _padded(chain, before(k, x, y) if k < first else after(k - first, x, y))

    def linear_parts(self) -> list[LinearPart]:
        return [
            *(PartOfSegment(part, 0) for part in self.start.linear_parts()),
            *(PartOfSegment(part, 1) for part in self.main.linear_parts()),
        ]


def _padded(chain: Chain, c: Tensor) -> Tensor:
    """Shifts of a segment with zeros for the noises that only the other one has."""
    missing = chain.noise_shape[-1] - c.shape[-1]
    return torch.nn.functional.pad(c, (0, missing)) if missing else c
