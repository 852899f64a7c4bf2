"""A fine-tuned copy of a pre-trained model as a control, and any control as a model in the model's own parametrisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.pretrained import DiffusionChain
from ..chains.shifts import ShiftFunction
from ..processes.generative import GenerativeSDE, call_model
from ..tensors import batch_like
from .base import Control
from .saved import CONTROLS, Context, Saved

__all__ = ["ControlledModel", "TunedControl", "has_trainable_model"]

Reference = GenerativeSDE | DiffusionChain


def has_trainable_model(reference: Any) -> bool:
    """Whether the reference is a pre-trained model with trainable parameters."""
    model = getattr(reference, "model", None)
    return isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())


@CONTROLS.register("tuned")
class TunedControl(Control):
    """The control that a tuned copy of the pre-trained model makes: ``c = (mean of the tuned - mean of the reference)/scale``.

    For an SDE ``u = gain(t) (tuned prediction - pre-trained prediction)``; at the start of training the two agree and u = 0.
    """

    learning_rate = 3e-4

    def __init__(self, reference: Reference, model: nn.Module | None = None) -> None:
        super().__init__(reference.event_shape, reference.control_shape, 0.0, reference.horizon)
        self._reference = [reference]  # in a list: the pre-trained model is the user's, not a part of this module
        original = reference.model
        assert isinstance(original, nn.Module)
        self.model = copy.deepcopy(original) if model is None else model
        self.model.eval()

    @property
    def reference(self) -> Reference:
        return self._reference[0]

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> TunedControl:
        return cls(context.problem.reference)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> TunedControl:
        self.training = mode
        self.model.eval()  # dropout or batch statistics would make the control random: likelihoods need one function
        return self

    def at(self, x: Tensor, t: Tensor, y: Any = None) -> Tensor:
        if t.ndim == 1:
            times = torch.unique(t)
            if len(times) > 1:
                rows = [(t == time).nonzero().flatten() for time in times]
                out = torch.cat([self.at(x[r], time, None if y is None else y[r]) for r, time in zip(rows, times)])
                return out[torch.argsort(torch.cat(rows))]
            t = times[0]
        reference = self.reference
        if isinstance(reference, DiffusionChain):
            k = reference.step_at(float(t))
            c = reference.shift_towards(k, x, reference.predict(self.model, k, x, y), y)
            return reference.control(k, c)
        change = reference.predict(self.model, x, t, y) - reference.predict(reference.model, x, t, y)
        return change * float(reference.gains(t.reshape(1))[0])

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        reference, model = self.reference, self.model
        if isinstance(reference, DiffusionChain):
            return lambda k, x, y: reference.shift_towards(k, x, reference.predict(model, k, x, y), y)
        gains = reference.gains(chain.times[:-1]).tolist()
        gains = [gain * chain.gain(k) for k, gain in enumerate(gains)]  # type: ignore[operator]
        table = reference._table(chain.times[:-1])
        clocks = torch.tensor(table["clock"], dtype=chain.times.dtype, device=chain.times.device)

        def shift(k: int, x: Tensor, y: Any) -> Tensor:
            before = reference.prediction_at(k, x, clocks[k], y)
            return (call_model(model, x, clocks[k], y) - before) * gains[k]

        return shift


class ControlledModel(nn.Module):
    """A pre-trained model plus a control, in the model's own parametrisation and on its own clock.

    Any sampler written for the model can use it in the model's place. At the noiseless last level of a discrete chain it
    gives the pre-trained prediction, since a tuned one would escape the KL.
    """

    def __init__(self, reference: Reference, control: Control) -> None:
        super().__init__()
        self._reference = [reference]
        self.base = reference.model
        self.control = control

    def forward(self, x: Tensor, s: Tensor, y: Any = None) -> Tensor:
        reference = self._reference[0]
        s = torch.as_tensor(s, device=x.device).expand(x.shape[0])
        base = call_model(self.base, x, s, y)
        if isinstance(reference, DiffusionChain):
            return base + self._discrete_change(reference, x, s, y)
        noising = reference.schedule.noising_time(s.double())
        t = reference.process_time(noising).clamp(0.0, 1.0)
        inside = noising <= reference.schedule.noise_end * (1 + 1e-6)  # beyond, the process has not begun
        u = self.control.at(x, t.to(x.dtype), y)
        gains = reference.gains(t).to(x)
        return base + u * batch_like(torch.where(inside.to(x.device), 1 / gains, 0.0), x)

    def _discrete_change(self, reference: DiffusionChain, x: Tensor, s: Tensor, y: Any) -> Tensor:
        change = torch.zeros_like(x)
        if isinstance(self.control, TunedControl):
            rows = (s > reference.levels[-1]).nonzero().flatten()
            if len(rows):
                picked = None if y is None else y[rows]
                tuned = call_model(self.control.model, x[rows], s[rows], picked) - call_model(
                    self.base, x[rows], s[rows], picked
                )
                change = change.index_copy(0, rows, tuned)
            return change
        levels = torch.tensor(reference.levels[:-1], device=x.device)
        nearest = (s.reshape(-1, 1) - levels).abs().argmin(1)
        for k in nearest.unique().tolist():
            rows = ((nearest == k) & (s > reference.levels[-1])).nonzero().flatten()
            if len(rows):
                u = self.control.at(x[rows], reference.times[k], None if y is None else y[rows])
                change = change.index_copy(0, rows, reference.prediction_change(k, reference.shift(k, u)))
        return change


def as_model(reference: Reference, control: Control) -> nn.Module:
    """The tuned model of a control: the tuned copy itself, or the pre-trained model plus the control."""
    if isinstance(control, TunedControl) and isinstance(reference, GenerativeSDE):
        return control.model
    return ControlledModel(reference, control)
