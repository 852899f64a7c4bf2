"""Pre-trained models as chains of their own; and discrete diffusion models: DDPM ancestral steps and DDIM with eta >
0."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_name
from ..memory import recall, remembering
from ..precision import at_least_single
from ..processes.laws import Gaussian
from ..processes.pretrained import ControlFunction, Model, Pretrained
from ..shapes import Controls, Noises, PerPath, Samples, Scalar, Scale, States
from ..tensors import as_float, check_tensor
from .base import Chain

PREDICTIONS = ("noise", "sample", "v")
SAMPLERS = ("ddpm", "ddim")


class PretrainedChain(Pretrained, Chain):
    """Base of the samplers that come with a model: chains of their own, ``t = k/K``, ``h = 1/K``, whose last, noiseless
    step is ``decode``: it carries no likelihood and always uses the pre-trained model.

    A kind says what follows, and nothing else in the package asks which one it is (``describe()`` too, for saved
    files)::

        kernel(k, x, y)                     of the pre-trained model
        to_x0(k, x, prediction)             x0^ at level k from a prediction of the model's own kind, clipped where
                                            the model is
        shift_towards(k, x, prediction, y)  the shift that moves step k's law to that of another prediction
        change_at(k, x, c)                  the change of the prediction at level k whose shift is c (without clipping)

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
        self.model, self.levels, self.reference = model, list(levels), self
        self.event_shape = self.noise_shape = self.control_shape = torch.Size(int(n) for n in shape)
        like = next(model.parameters(), like) if isinstance(model, nn.Module) else like
        self.dtype, self.device, self.horizon = at_least_single(like.dtype), like.device, 1.0
        steps = len(self.levels) - 1
        self.set_times([k / steps for k in range(steps + 1)], self.dtype, like.device)

    def to_x0(self, k: int, x: States, prediction: States) -> States:
        raise NotImplementedError

    def shift_towards(self, k: int, x: States, prediction: States, condition: Any = None) -> Noises:
        raise NotImplementedError

    def change_at(self, k: int, x: States, c: Noises) -> States:
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
        return self.denoised(x, 1.0, condition)

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
        return clock != self.levels[-1]

    def prediction_change(self, control: ControlFunction, x: States, clock: PerPath, condition: Any = None) -> States:
        change = torch.zeros_like(x)
        nearest = (clock.reshape(-1, 1) - torch.tensor(self.levels[:-1], device=x.device)).abs().argmin(1)
        for k in nearest.unique().tolist():
            rows = (nearest == k).nonzero().flatten()
            u = control(x[rows], self.times[k], None if condition is None else condition[rows])
            change = change.index_copy(0, rows, self.change_at(k, x[rows], self.shift_at(k, x[rows], u)))
        return change

    def drift(self, x: States, t: Scalar, condition: Any = None) -> States:
        """``(mean_k(x) - x) / h`` of the step that contains t (for probes and figures)."""
        k = self.step_at(float(t))
        return (self.kernel(k, x, condition)[0] - x) / self.step_sizes[k]


class DiffusionChain(PretrainedChain):
    """The sampler of a discrete diffusion model. Made by :func:`diffusion_chain`."""

    def __init__(
        self,
        model: Model,
        alphas_cumprod: Tensor,
        prediction: str,
        shape: Sequence[int],
        levels: list[int],
        eta: float,
        clip: float | None,
        like: Tensor,
    ) -> None:
        super().__init__(model, shape, levels, like)
        self.prediction, self.eta, self.clip = prediction, eta, clip
        self.alphas_cumprod = alphas_cumprod
        abar = [float(alphas_cumprod[n]) for n in levels]
        self._mu, self._std = [math.sqrt(a) for a in abar], [math.sqrt(1 - a) for a in abar]
        self._coefficients = [self._step_coefficients(a, b) for a, b in pairwise(abar)]
        self._scales = torch.tensor([c[2] for c in self._coefficients], dtype=torch.float64).to(self.times)
        self.own_initial = Gaussian(self.times.new_zeros(self.event_shape), 1.0)
        self.memory = self._memory(abar)

    def _step_coefficients(self, a: float, b: float) -> tuple[float, float, float]:
        """Mean of a step from abar = a to abar = b as ``x0_part x0^ + x_part x``, and its scale."""
        variance = (1 - b) / (1 - a) * (1 - a / b)
        scale = self.eta * math.sqrt(variance)
        eps = math.sqrt(max(1 - b - scale**2, 0.0))  # eps^ = (x - sqrt(a) x0^)/sqrt(1 - a)
        return math.sqrt(b) - eps * math.sqrt(a / (1 - a)), eps / math.sqrt(1 - a), scale

    def _memory(self, abar: list[float]) -> float:
        """Correlation of start and end for standard Gaussian data, where x0^ = sqrt(abar) x."""
        total = 1.0
        variance = 1.0
        for (x0_part, x_part, scale), a in zip(self._coefficients, abar):
            slope = x0_part * math.sqrt(a) + x_part
            total, variance = total * slope, slope**2 * variance + scale**2
        return abs(total) / math.sqrt(variance)

    def to_x0(self, k: int, x: States, prediction: States) -> States:
        mu, std = self._mu[k], self._std[k]
        if self.prediction == "sample":
            x0 = prediction
        elif self.prediction == "noise":
            x0 = (x - std * prediction) / mu
        else:
            x0 = mu * x - std * prediction
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        x0_part, x_part, _ = self._coefficients[k]
        x0 = self.to_x0(k, x, self.prediction_at(k, x, condition))
        return torch.add(x_part * x, x0, alpha=x0_part), self._scales[k]

    def shift_towards(self, k: int, x: States, prediction: States, condition: Any = None) -> Noises:
        x0_part, _, scale = self._coefficients[k]
        ours, theirs = self.to_x0(k, x, prediction), self.to_x0(k, x, self.prediction_at(k, x, condition))
        return (ours - theirs) * (x0_part / scale)

    def change_at(self, k: int, x: States, c: Noises) -> States:
        x0_part, _, scale = self._coefficients[k]
        gain = {"sample": 1.0, "noise": -self._std[k] / self._mu[k], "v": -self._std[k]}[self.prediction]
        return c * (scale / (x0_part * gain))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "DiffusionChain",
            "event_shape": list(self.event_shape),
            "prediction": self.prediction,
            "levels": self.levels,
            "eta": self.eta,
            "clip": self.clip,
        }


def diffusion_chain(
    model: nn.Module,
    alphas_cumprod: Tensor,
    prediction: str = "noise",
    shape: Sequence[int] = (),
    sampler: str = "ddim",
    eta: float = 1.0,
    steps: int = 50,
    clip: float | None = None,
) -> DiffusionChain:
    """A discrete diffusion model with its own ancestral sampler, as a chain of Gaussian kernels.

    Args:
        model: ``model(x, n) -> (batch, *shape)`` with integer steps n ``(batch,)``, 0 the least noisy;
            ``model(x, n, y)`` for a conditional one.
        alphas_cumprod: ``(N,)``, decreasing in (0, 1): ``x_n = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps``.
        prediction: "noise", "sample" or "v".
        shape: shape of one state.
        sampler: "ddpm" (posterior variance: DDIM with eta = 1) or "ddim".
        eta: > 0; the noise of DDIM. Without noise (eta = 0) there is no likelihood and no control.
        steps: number of model calls, spread evenly over the N levels: ``steps - 1`` noisy steps, and the last,
            noiseless one, which is ``decode``.
        clip: clip the predicted x0 to [-clip, clip], as many samplers do. The chain stays Gaussian.
    """
    abar = check_tensor("alphas_cumprod", alphas_cumprod, shape=("N",)).detach().double().cpu()
    if bool((abar <= 0).any()) or bool((abar >= 1).any()) or bool((abar[1:] >= abar[:-1]).any()):
        raise ValueError("alphas_cumprod must decrease strictly within (0, 1): step 0 the least noisy.")
    check_name("prediction", prediction, PREDICTIONS)
    check_name("sampler", sampler, SAMPLERS)
    eta = as_float("eta", eta)
    if sampler == "ddpm" and eta != 1.0:
        raise ValueError(f"sampler='ddpm' is DDIM with eta=1; got eta={eta}. Use sampler='ddim' for another eta.")
    if eta <= 0:
        raise ValueError("eta must be > 0: a deterministic sampler has no likelihood ratios to control.")
    if not isinstance(steps, int) or not 2 <= steps <= len(abar):
        raise ValueError(f"steps must be an int from 2 to {len(abar)} (the number of levels), got {steps!r}.")
    if not callable(model):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    if isinstance(shape, int):
        shape = (shape,)
    if len(tuple(shape)) == 0:
        raise TypeError("shape is needed: the shape of one state, e.g. shape=(1, 8, 8).")
    levels = torch.linspace(len(abar) - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    for a, b in pairwise(levels):
        variance = (1 - abar[b]) / (1 - abar[a]) * (1 - abar[a] / abar[b])
        if 1 - abar[b] - eta**2 * variance < -1e-12:
            raise ValueError(
                f"eta={eta} is too large: the step from level {a} to {b} would need more noise than there is."
            )
    clip = None if clip is None else as_float("clip", clip, positive=True)
    return DiffusionChain(model, abar, prediction, shape, levels, eta, clip, like=alphas_cumprod)
