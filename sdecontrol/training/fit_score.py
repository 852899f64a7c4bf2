"""``fit_score``: a diffusion or flow model from data, by denoising score matching."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, unknown_name
from ..processes.generative import PREDICTIONS, noise_coefficients
from ..processes.schedules import Schedule
from ..randomness import derive_seed, fresh_seed, generator_for, global_rng
from ..tensors import as_float, batch_like, check_output, check_tensor
from .progress import ProgressBar
from .score_network import ScoreNetwork

__all__ = ["fit_score"]

_FIRST_TIME = 1e-3  # noising times are drawn from here on: below, every prediction of noise is singular
_FLOOR = 0.05
_WARMUP = 200
_AVERAGE = 0.999


def fit_score(
    data: Tensor,
    schedule: Schedule,
    prediction: str = "noise",
    model: nn.Module | None = None,
    *,
    iterations: int = 8000,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Train a model on data by denoising score matching (Vincent 2011; Ho et al. 2006.11239), ready for ``generative_sde``.

    The loss is the squared error of the prediction, ``w(s) |model(mu x0 + std eps, s) - target|^2``. The weight makes it the
    same for every parametrisation: the squared error of the noise, divided by the part of the noise's variance that cannot be
    known from x (plus 0.05), which lifts the noisy end, where little is left to learn but decides between modes.

    Args:
        data: ``(n, *event)``.
        schedule: ``sc.VP()``, ``sc.CosineVP()``, ``sc.VE()``, ``sc.FlowMatching()``.
        prediction: what the model predicts: "noise", "sample", "score", "v" or "velocity".
        model: your own nn.Module ``model(x, s) -> (batch, *event)`` on its own clock, s ``(batch,)`` (a copy of it is trained);
            None: a residual network on top of the best linear prediction, in the data's principal components.
        iterations, batch_size, learning_rate: of Adam, with a warm-up, a cosine decay and averaged weights.
        seed: the same seed gives the same weights; None draws one from torch's global generator, which is otherwise
            left alone.
        progress: show a progress bar; None: if the terminal can.

    Returns:
        The trained model, in evaluation mode.
    """
    _check(data, schedule, prediction, iterations, batch_size)
    rate = as_float("learning_rate", learning_rate, positive=True)
    seed = fresh_seed(seed)
    with global_rng(derive_seed(seed, 1), data.device):  # initial weights, and dropout in a user's model
        network = _network(data, schedule, prediction, model)
        variance = float(data.flatten(1).double().var(0).mean()) if len(data) > 1 else 1.0
        descent = _Descent(network, rate, iterations)
        generator = generator_for(data.device, derive_seed(seed, 2))
        strata = torch.arange(batch_size, device=data.device, dtype=torch.float64) / batch_size
        with ProgressBar(iterations, "fit-score", progress, measure="loss") as bar:
            for i in range(iterations):
                x0 = data[torch.randint(len(data), (batch_size,), generator=generator, device=data.device)]
                u = torch.rand((), generator=generator, device=data.device, dtype=torch.float64)
                s = _FIRST_TIME + (schedule.noise_end - _FIRST_TIME) * ((strata + u) % 1.0)
                eps = torch.randn(x0.shape, generator=generator, dtype=data.dtype, device=data.device)
                loss = _loss(network, schedule, prediction, x0, s, eps, variance)
                descent.step(loss, i)
                bar.update(i + 1, iterations, {"loss": float(loss.detach())})
        descent.use_average()
    return network.eval()


def _check(data: Any, schedule: Any, prediction: str, iterations: Any, batch_size: Any) -> None:
    check_tensor("data", data, hint="data: (n, *event).")
    if data.ndim < 2 or len(data) < 1:
        raise ValueError(
            f"data must have shape (n, *event), got {tuple(data.shape)}; use data.unsqueeze(-1) for numbers."
        )
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a noise schedule such as sc.VP(), got {type(schedule).__name__}.")
    if prediction not in PREDICTIONS:
        raise unknown_name("prediction", prediction, PREDICTIONS)
    for name, value in (("iterations", iterations), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}.")


def _network(data: Tensor, schedule: Schedule, prediction: str, model: nn.Module | None) -> nn.Module:
    if model is None:
        network = ScoreNetwork(data.shape[1:], schedule, prediction).to(data)
        network.fit_statistics(data)
        return network
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (x, s) -> (batch, *event) or None, got {type(model).__name__}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no trainable parameters.")
    x = data[torch.arange(3) % len(data)]
    with torch.no_grad():
        s = torch.full((3,), 0.5, dtype=data.dtype, device=data.device)
        check_output("model", copy.deepcopy(model).eval()(x, s), x.shape, x, "It is called as model(x, s), s (batch,).")
    return copy.deepcopy(model).train()


def _loss(
    network: nn.Module, schedule: Schedule, prediction: str, x0: Tensor, s: Tensor, eps: Tensor, variance: float
) -> Tensor:
    """The weighted squared error at noising times s ``(batch,)`` (float64); coefficients are computed in float64."""
    mu, std = schedule.mu(s), schedule.std(s)
    a, b = noise_coefficients(prediction, mu, std, schedule.log_mu_slope(s), schedule.forward_variance_rate(s))
    signal = mu**2 * variance
    weight = b**2 / (signal / (signal + std**2) + _FLOOR)
    mu, std, a, b, weight = (batch_like(c.to(x0.dtype), x0) for c in (mu, std, a, b, weight))
    x = mu * x0 + std * eps
    target = (eps - a * x) / b
    error = network(x, schedule.model_time(s).to(x0.dtype)) - target
    return (weight * error**2).mean()


class _Descent:
    """Adam with a warm-up and a cosine decay, clipped gradients, and an average of the weights."""

    def __init__(self, network: nn.Module, rate: float, iterations: int) -> None:
        self.parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=(0.9, 0.99), fused=fused)
        self.rate, self.iterations = rate, iterations

    def step(self, loss: Tensor, i: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss is not finite at iteration {i}: the model's prediction is {float(loss.detach())}; "
                "try a smaller learning_rate.",
                what="loss",
                step=i,
            )
        warm = min(1.0, (i + 1) / max(1.0, min(_WARMUP, 0.1 * self.iterations)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * 0.5 * (1 + math.cos(math.pi * i / self.iterations))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - min(_AVERAGE, (i + 1) / (i + 10)))

    @torch.no_grad()
    def use_average(self) -> None:
        for p, mean in zip(self.parameters, self.average):
            p.copy_(mean)
