"""Pre-trained models as references: one protocol, for SDEs and for samplers with steps of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..precision import call
from ..tensors import check_not_random, check_output, probing
from .reference import Reference

#: ``model(x, s)`` or ``model(x, s, y)``, s ``(batch,)``.
Model = Callable[..., Tensor]
#: ``(x, t, y) -> u``, t of shape () or (batch,).
ControlFunction = Callable[[Tensor, Tensor, Any], Tensor]


def call_model(model: Model, x: Tensor, clock: Tensor, condition: Any) -> Tensor:
    """``model(x, clock)`` with the clock expanded to ``(batch,)``; ``(x, clock, condition)`` where there is one."""
    clock = clock.expand(x.shape[0])
    return call(model, x, clock) if condition is None else call(model, x, clock, condition)


class Pretrained(Reference):
    """A reference that is a pre-trained model, called ``model(x, s)`` (or ``model(x, s, y)``) on a clock s of its own.

    Tuned copies of the model, controls as models, guidance and values of the denoised state know no more of it than
    this; t is the process's time, 0-d, and k a step of its chain::

        model_time(t, x) -> s                      what the model calls t, 0-d
        predict(model, x, t, y)                    a model's prediction on that clock
        denoised(x, t, y, on_clock) -> x0^         what the pre-trained model expects the data to be; on_clock: with the
                                                   noise's size at the time that the model's clock says, as Tweedie's
                                                   value has always been rounded
        denoiser_on_grid(times, on_clock) -> (k, x, y) -> x0^  the same at the k-th time: within a step the model is
                                                   called once
        decode(x, y)                               from the last state to data
        check_prediction(name, value, x, hint)     raise where a model's output has not the form of a prediction
        control_towards(model, x, t, y, strength)  the control u that moves the process to that of another model;
                                                   strength times it
        shifts_towards(model, chain, strength)     (k, x, y) -> c, the shift of step k that does, with what depends on
                                                   time alone computed once; chain: of the process itself, from time 0;
                                                   beside=False: up to what the other model does not enter, without a
                                                   call of the pre-trained one where that is not needed
        controlled(s) -> (batch,) bools            at which of the model's times (batch,) the process is under way
        prediction_change(control, x, s, y)        what is to be added to the prediction there for the process to be the
                                                   controlled one

    Attributes:
        clip: what it clips its data to, or None.
        decodes: ``decode`` calls the model: a tuned one would escape the KL there.
        called: how the model is called, for error messages.
    """

    pretrained = True
    clip: Any = None
    called: tuple[str, str] = ("s", "s (batch,)")
    model: Model

    def predict(self, model: Model, x: Tensor, t: Tensor | float, condition: Any = None) -> Tensor:
        return call_model(model, x, self.model_time(float(t), x), condition)

    def check_prediction(self, name: str, value: Any, x: Tensor, hint: str = "") -> Tensor:
        """What a model returned at states x, which must have the form of a prediction.

        Raises:
            TypeError, ValueError: it has not.
        """
        return check_output(name, value, x.shape, x, hint)

    def differentiated(self, t: float) -> dict[str, Callable[..., Tensor]]:
        if self.mixture is not None:
            return {}
        return {"model": lambda x, y=None: self.predict(self.model, x, t, y)}

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        """Call the model once on random states and check what it returns.

        Raises:
            TypeError, ValueError: how it is called, what it returned and what it should.
        """
        x = self.probe_states(3, dtype, device)
        y = None if condition is None else condition[torch.arange(3, device=condition.device) % len(condition)]
        name, kind = self.called
        called = f"model(x, {name}), x (batch, *shape), {kind}" if y is None else f"model(x, {name}, y)"
        with torch.no_grad():
            with probing("model", f"{called}, x {tuple(x.shape)}", "" if y is None else f"x, {name}", (x, y)):
                value, again = (self.predict(self.model, x, 0.5 * self.horizon, y) for _ in range(2))
            self.check_prediction("model", value, x, f"It is called as {called}.")
            check_not_random("model", value, again)
