"""Controls that are given, not trained: the reference's own, a solution's, or any function of yours."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..problems.problem import ControlProblem
from ..processes.modules import copied
from ..shapes import Controls, States
from .base import Control, UserControl
from .saved import CONTROLS


@CONTROLS.register("zero", lambda saved, context: given_control(context.problem, None))
class ZeroControl(Control):
    """The reference: ``u = 0``."""

    counted = False

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        return t.new_zeros((x.shape[0], *self.control_shape))  # x may be tokens

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        return lambda k, x, y: chain.times.new_zeros((x.shape[0], *chain.noise_shape))


@CONTROLS.register("given", lambda saved, context: given_control(context.problem, context.own_control(), "control"))
class GivenControl(UserControl):
    """A function ``(x, t) -> (batch, *control_shape)``, or an exact solution's control, as it is. Saved files do not
    hold it: it is given again to ``load``."""


def given_control(problem: ControlProblem, given: Any, name: str = "proposal") -> Control:
    """``given`` as a control that is not trained: None for the reference; a control, a solution or an exact solution
    (its control), or a function ``(x, t) -> u``. Modules are copied and frozen.

    Raises:
        TypeError: none of these. ValueError: a control of other shapes.
    """
    shapes = problem.event_shape, problem.control_shape
    if given is None:
        control: Control = ZeroControl(*shapes, 0.0, problem.horizon)
        control.belongs_to(problem)
        return control
    if not isinstance(given, nn.Module) and callable(getattr(given, "control", None)):
        given = given.control
    if isinstance(given, Control):
        if (given.event_shape, given.control_shape) != shapes:
            raise ValueError(
                f"{name} maps {tuple(given.event_shape)} to {tuple(given.control_shape)}; this problem needs "
                f"{tuple(shapes[0])} to {tuple(shapes[1])}."
            )
        control = copied(given)
    elif callable(given):
        module = copied(given) if isinstance(given, nn.Module) else given
        control = GivenControl(module, *shapes, problem.horizon)  # type: ignore[arg-type]
    else:
        raise TypeError(
            f"{name} must be None (the reference), a control (x, t) -> u, or a solution; got {type(given).__name__}."
        )
    control.belongs_to(problem)
    for p in control.parameters():
        p.requires_grad_(False)
    return control.eval()
