"""Pre-trained models as chains of their own: what samplers that come with a model share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import recall, remembering
from ..precision import at_least_single
from ..processes.adapters import as_reference
from ..processes.pretrained import ControlFunction, Model, Pretrained
from ..shapes import Controls, Noises, PerPath, Samples, Scalar, States
from .base import Chain


class PretrainedChain(Pretrained, Chain):
    """Base of the samplers that come with a model: chains of their own, ``t = k/K``, ``h = 1/K``. A last, noiseless
    step is ``decode``: it carries no likelihood and always uses the pre-trained model. (Where ``decodes`` is False
    there is none, and the last level is not asked for.)

    A kind says what follows, and nothing else in the package asks which one it is (``describe()`` too, for saved
    files)::

        kernel(k, x, y)                     of the pre-trained model
        to_x0(k, x, prediction)             x0^ at level k from a prediction of the model's own kind, clipped where
                                            the model is
        shift_towards(k, x, prediction, y)  the shift that moves step k's law to that of another prediction
        change_at(k, x, c, y)               the change of the prediction at level k whose shift is c

    Args:
        model: ``model(x, n)``, or ``model(x, n, y)``; n ``(batch,)`` as in ``levels``.
        shape: of one state.
        levels: what the model calls the K + 1 states, the last for ``decode``: integers, or floats.
        like: whose dtype and device the chain has where the model has no parameters.
    """

    continuous = False
    decodes = True
    called = ("n", "n (batch,) integers")

    def __init__(self, model: Model, shape: Sequence[int], levels: Sequence[float], like: Tensor) -> None:
        self.model, self.levels, self.reference = as_reference(model), list(levels), self
        self.event_shape = self.noise_shape = self.control_shape = torch.Size(int(n) for n in shape)
        like = next(model.parameters(), like) if isinstance(model, nn.Module) else like
        self.dtype, self.device, self.horizon = at_least_single(like.dtype), like.device, 1.0
        steps = len(self.levels) - 1
        self.set_times([k / steps for k in range(steps + 1)], self.dtype, like.device)

    def to_x0(self, k: int, x: States, prediction: States) -> States:
        raise NotImplementedError

    def shift_towards(self, k: int, x: States, prediction: States, condition: Any = None) -> Noises:
        raise NotImplementedError

    def change_at(self, k: int, x: States, c: Noises, condition: Any = None) -> States:
        raise NotImplementedError

    def _level(self, t: float) -> int:
        """The level nearest to time t, that of ``decode`` among them."""
        return min(round(t * self.steps), self.steps)

    def model_time(self, t: float, x: States) -> Tensor:
        level = self.levels[self._level(t)]
        return torch.tensor(level, dtype=x.dtype if isinstance(level, float) else torch.long, device=x.device)

    def prediction_at(self, k: int, x: States, condition: Any = None) -> States:
        """The pre-trained prediction at level k: once a step, though kernel and control both ask for it."""
        return recall(self, k, x, lambda: self.predict(self.model, x, self.clock[k], condition))

    def denoised(self, x: States, t: Tensor | float, condition: Any = None, on_clock: bool = False) -> States:
        return self.to_x0(self._level(float(t)), x, self.predict(self.model, x, t, condition))

    def denoiser_on_grid(self, times: Tensor, on_clock: bool = False) -> Callable[[int, States, Any], States]:
        """``(k, x, y) -> x0^`` at level k, of the prediction that the step makes itself."""
        return lambda k, x, y: self.to_x0(k, x, self.prediction_at(k, x, y))

    def decode(self, x: States, condition: Any = None) -> Samples:
        return self.data_of(self.denoised(x, 1.0, condition) if self.decodes else x, condition)

    def control_towards(
        self, model: Model, x: States, t: Scalar, condition: Any = None, strength: float = 1.0
    ) -> Controls:
        k = self.step_at(float(t))
        return self.control(k, self.shifts_towards(model, self, strength)(k, x, condition))

    def shifts_towards(
        self, model: Model, chain: Any, strength: float | None = None, beside: bool = True
    ) -> Callable[[int, States, Any], Noises]:
        def shift(k: int, x: States, y: Any) -> Noises:
            prediction = self.predict(model, x, self.clock[k], y)
            if beside:
                c = self.shift_towards(k, x, prediction, y)
            else:  # from a prediction of 0, which costs no call
                with remembering():
                    x = x.view_as(x)  # nobody else asks at this very x
                    recall(self, k, x, lambda: torch.zeros_like(prediction))
                    c = self.shift_towards(k, x, prediction, y)
            return c if strength is None else strength * c

        return shift

    def controlled(self, clock: Tensor) -> Tensor:
        return clock != self.levels[-1] if self.decodes else torch.ones_like(clock, dtype=torch.bool)

    def prediction_change(self, control: ControlFunction, x: States, clock: PerPath, condition: Any = None) -> States:
        change = torch.zeros_like(x)
        nearest = (clock.reshape(-1, 1) - torch.tensor(self.levels[:-1], device=x.device)).abs().argmin(1)
        for k in nearest.unique().tolist():
            rows = (nearest == k).nonzero().flatten()
            y = None if condition is None else condition[rows]
            u = control(x[rows], self.times[k], y)
            change = change.index_copy(0, rows, self.change_at(k, x[rows], self.shift_at(k, x[rows], u), y))
        return change

    def drift(self, x: States, t: Scalar, condition: Any = None) -> States:
        """``(mean_k(x) - x) / h`` of the step that contains t (for probes and figures)."""
        k = self.step_at(float(t))
        return (self.kernel(k, x, condition)[0] - x) / self.step_sizes[k]
