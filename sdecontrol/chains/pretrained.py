"""Discrete diffusion models as chains of their own: DDPM ancestral steps and DDIM with eta > 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_name
from ..memory import recall
from ..processes.generative import call_model
from ..processes.laws import Gaussian
from ..randomness import generator_for
from ..tensors import as_float, check_output, check_tensor, probing
from .base import Chain

__all__ = ["DiffusionChain", "diffusion_chain"]

PREDICTIONS = ("noise", "sample", "v")
SAMPLERS = ("ddpm", "ddim")


class DiffusionChain(Chain):
    """The sampler of a discrete diffusion model. Made by :func:`diffusion_chain`.

    ``t = k/K``, ``h = 1/K``. Its last, noiseless step (the prediction of x0 from the least noisy level) is ``decode``:
    it carries no likelihood and always uses the pre-trained model.
    """

    generative = True
    reverse_target = controlled_target = False
    mixture = None

    def __init__(
        self,
        model: Callable[..., Tensor],
        alphas_cumprod: Tensor,
        prediction: str,
        shape: Sequence[int],
        levels: list[int],
        eta: float,
        clip: float | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.prediction, self.levels, self.eta, self.clip = model, prediction, levels, eta, clip
        self.reference = self
        self.event_shape = self.noise_shape = self.control_shape = torch.Size(int(n) for n in shape)
        steps = len(levels) - 1
        self._set_times([k / steps for k in range(steps + 1)], dtype, device)
        self.dtype, self.device, self.horizon = dtype, device, 1.0
        self.alphas_cumprod = alphas_cumprod
        abar = [float(alphas_cumprod[n]) for n in levels]
        self._mu, self._std = [math.sqrt(a) for a in abar], [math.sqrt(1 - a) for a in abar]
        self._coefficients = [self._step_coefficients(a, b) for a, b in pairwise(abar)]
        self._scales = torch.tensor([c[2] for c in self._coefficients], dtype=torch.float64).to(
            device=device, dtype=dtype
        )
        self.own_initial = Gaussian(torch.zeros(self.event_shape, dtype=dtype, device=device), 1.0)
        self.memory = self._memory(abar)
        self.drift_takes_condition = True

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

    def to_x0(self, k: int, x: Tensor, prediction: Tensor) -> Tensor:
        """x0^ at level k from a prediction of the model's own kind, clipped where the model is."""
        mu, std = self._mu[k], self._std[k]
        if self.prediction == "sample":
            x0 = prediction
        elif self.prediction == "noise":
            x0 = (x - std * prediction) / mu
        else:
            x0 = mu * x - std * prediction
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)

    def prediction_gain(self, k: int) -> float:
        """``d x0^ / d prediction`` at level k (without clipping)."""
        return {"sample": 1.0, "noise": -self._std[k] / self._mu[k], "v": -self._std[k]}[self.prediction]

    def predict(self, model: Callable[..., Tensor], k: int, x: Tensor, condition: Any = None) -> Tensor:
        """A model's prediction at level k: it is called with its own integer step ``(batch,)``."""
        return call_model(model, x, torch.tensor(self.levels[k], device=x.device), condition)

    def _reference_prediction(self, k: int, x: Tensor, condition: Any) -> Tensor:
        return recall(self, k, x, lambda: self.predict(self.model, k, x, condition))

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        x0_part, x_part, _ = self._coefficients[k]
        x0 = self.to_x0(k, x, self._reference_prediction(k, x, condition))
        return torch.add(x_part * x, x0, alpha=x0_part), self._scales[k]

    def shift_towards(self, k: int, x: Tensor, tuned: Tensor, condition: Any = None) -> Tensor:
        """The shift that moves step k's mean to that of a tuned prediction: ``(mean_tuned - mean_ref) / scale``."""
        x0_part, _, scale = self._coefficients[k]
        ours, theirs = self.to_x0(k, x, tuned), self.to_x0(k, x, self._reference_prediction(k, x, condition))
        return (ours - theirs) * (x0_part / scale)

    def prediction_change(self, k: int, c: Tensor) -> Tensor:
        """The change of the prediction at level k whose shift is c (without clipping)."""
        x0_part, _, scale = self._coefficients[k]
        return c * (scale / (x0_part * self.prediction_gain(k)))

    def decode(self, x: Tensor, condition: Any = None) -> Tensor:
        last = self.steps
        return self.to_x0(last, x, self.predict(self.model, last, x, condition))

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """``(mean_k(x) - x) / h`` of the step that contains t (for probes and figures)."""
        k = self.step_at(float(t))
        return (self.kernel(k, x, condition)[0] - x) / self.step_sizes[k]

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        x = torch.randn((3, *self.event_shape), generator=generator_for("cpu", 0), dtype=torch.float64)
        x = x.to(device=device, dtype=dtype)
        y = None if condition is None else condition[torch.arange(3, device=condition.device) % len(condition)]
        with torch.no_grad():
            called = "model(x, n), x (batch, *shape), n (batch,) integers" if y is None else "model(x, n, y)"
            with probing("model", f"{called}, x {tuple(x.shape)}"):
                value = self.predict(self.model, 0, x, y)
            check_output("model", value, x.shape, x, f"It is called as {called}.")

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
        model: ``model(x, n) -> (batch, *shape)`` with integer steps n ``(batch,)``, 0 the least noisy; ``model(x, n, y)``
            for a conditional one.
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
    parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    dtype = parameter.dtype if parameter is not None else alphas_cumprod.dtype
    device = parameter.device if parameter is not None else alphas_cumprod.device
    return DiffusionChain(
        model,
        abar,
        prediction,
        shape,
        levels,
        eta,
        None if clip is None else as_float("clip", clip, positive=True),
        dtype,
        device,
    )
