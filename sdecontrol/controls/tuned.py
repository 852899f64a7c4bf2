"""Another model's prediction in the place of the pre-trained one's as a control, a tuned copy of it above all; and any
control as a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..memory import recall
from ..processes.adapters import tunable_copy
from ..processes.pretrained import call_model
from ..shapes import Controls, NoisePaths, StatePaths, States
from .base import Control, at_each_time
from .saved import CONTROLS


class ModelControl(Control):
    """The control that moves every step's law to that of another model's prediction; nothing before time 0.

    ``c = (mean of the other - mean of the reference)/scale``; for an SDE
    ``u = gain(t) (its prediction - pre-trained prediction)``.
    """

    #: how many times the shift, where it is not the shift itself
    strength: float | None = None

    def __init__(self, reference: Any) -> None:
        super().__init__(reference.event_shape, reference.control_shape, 0.0, reference.horizon)
        self.reference = reference

    def predicted(self, x: Tensor, s: Tensor, y: Any = None) -> Tensor:
        """The other model's prediction, on the reference's clock."""
        raise NotImplementedError

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        if t.ndim == 1:
            return at_each_time(self.at, x, t, y)
        if float(t) < 0:
            return x.new_zeros((x.shape[0], *self.control_shape))
        strength = 1.0 if self.strength is None else self.strength
        return self.reference.control_towards(self.predicted, x, t, y, strength)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        return self._from_time_0(chain, self.reference.shifts_towards(self.predicted, chain.main, self.strength))

    def slopes_along(self, chain: Chain, states: StatePaths, y: Any = None, first: int = 0) -> NoisePaths:
        """Without the pre-trained prediction."""
        moved = self.reference.shifts_towards(self.predicted, chain.main, self.strength, beside=False)
        function = self._from_time_0(chain, moved)
        return torch.stack([function(first + k, x, y) for k, x in enumerate(states)])

    def drawing_on(self, chain: Chain) -> ShiftFunction | None:
        """One call a step: its prediction stands in the pre-trained one's place, and nothing is shifted."""
        if self.strength is not None or chain.start:
            return None

        def shift(k: int, x: States, y: Any) -> Tensor:
            recall(self.reference, k, x, lambda: self.reference.predict(self.predicted, x, chain.clock[k], y))
            return chain.times.new_zeros(len(x), *chain.noise_shape)

        return shift

    def _from_time_0(self, chain: Chain, towards: ShiftFunction) -> ShiftFunction:
        start = chain.start
        if not start:
            return towards
        nothing = lambda x: chain.times.new_zeros(len(x), *chain.noise_shape)  # noqa: E731
        return lambda k, x, y: towards(k - start, x, y) if k >= start else nothing(x)


@CONTROLS.register("tuned", lambda saved, context: TunedControl(context.problem.reference))
class TunedControl(ModelControl):
    """The control that a tuned copy of the pre-trained model makes: at the start of training the two agree and u =
    0."""

    learning_rate = 3e-4
    most_times = 4.0

    def __init__(self, reference: Any, model: nn.Module | None = None) -> None:
        super().__init__(reference)
        self.model: nn.Module = tunable_copy(reference.model) if model is None else model
        self.model.eval()

    def train(self, mode: bool = True) -> TunedControl:
        self.training = mode
        self.model.eval()  # dropout or batch statistics would make the control random: likelihoods need one function
        return self

    def predicted(self, x: Tensor, s: Tensor, y: Any = None) -> Tensor:
        return call_model(self.model, x, s, y)


class ControlledModel(nn.Module):
    """A pre-trained model plus a control, in the model's own parametrisation and on its own clock.

    Any sampler written for the model can use it in the model's place. At the noiseless last level of a discrete chain
    it gives the pre-trained prediction, since a tuned one would escape the KL.
    """

    def __init__(self, reference: Any, control: Control) -> None:
        super().__init__()
        self.reference = reference
        self.base = reference.model
        self.control = control

    def train(self, mode: bool = True) -> ControlledModel:
        self.training = mode  # the pre-trained model is the user's, and keeps its mode
        return self

    def forward(self, x: Tensor, s: Tensor, y: Any = None) -> Tensor:
        with self.reference.evaluating():
            return self._predicted(x, s, y)

    def _predicted(self, x: Tensor, s: Tensor, y: Any) -> Tensor:
        reference = self.reference
        s = torch.as_tensor(s, device=x.device).expand(x.shape[0])
        out = call_model(self.base, x, s, y)
        rows = reference.controlled(s).nonzero().flatten()
        if not len(rows):
            return out
        x, s, y = x[rows], s[rows], None if y is None else y[rows]
        if isinstance(self.control, TunedControl):
            change = self.control.predicted(x, s, y) - out[rows]
        else:
            change = reference.prediction_change(self.control.at, x, s, y)
        return out.index_add(0, rows, change)


def as_model(reference: Any, control: Control) -> nn.Module:
    """The tuned model of a control: the tuned copy itself, or the pre-trained model plus the control."""
    if isinstance(control, TunedControl) and not reference.decodes:
        return control.model
    return ControlledModel(reference, control)
