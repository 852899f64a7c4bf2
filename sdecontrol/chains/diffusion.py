"""Samplers of discrete diffusion models and of flows with noise, as chains: DDPM's, DDIM's with eta > 0, and their
kin."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_name
from ..processes.laws import Gaussian
from ..processes.pretrained import Model
from ..shapes import Noises, Samples, Scale, States
from ..tensors import as_float, check_tensor
from .pretrained import PretrainedChain

PREDICTIONS = ("noise", "sample", "v")
SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class SamplerSteps:
    """A sampler's steps in numbers: ``x_{k+1} = x0_part x0^ + eps_part eps^ + scale xi``, with x0^ and eps^ what a
    model at level k says that ``x_k = mu x0 + std eps`` is made of.

    Attributes:
        levels: what the model calls the states. Where there are K + 1, the last step, to clean states, has no noise.
        mu, std: at each level. x0_part, eps_part: of the step from each level.
        scale: of the K steps with noise.
    """

    levels: list[float]
    mu: list[float]
    std: list[float]
    x0_part: list[float]
    eps_part: list[float]
    scale: list[float]

    @property
    def decodes(self) -> bool:
        return len(self.levels) > len(self.scale)

    @classmethod
    def implicit(
        cls,
        levels: Sequence[float],
        begins: Sequence[tuple[float, float]],
        ends: Sequence[tuple[float, float]],
        eta: float,
    ) -> "SamplerSteps":
        """Those of denoising diffusion implicit models (Song et al. 2010.02502, equations 12 and 16): a step keeps the
        noising's marginals, and its noise is eta times that of the noising's posterior.

        Args:
            levels: what the model calls the states.
            begins, ends: (mu, std) where each step begins, one for each level, and of what it leads to.
        """
        parts = []
        for (mu, std), (mu_end, std_end) in zip(begins, ends):
            variance = (std_end / std) ** 2 * (std**2 - (mu / mu_end * std_end) ** 2)
            scale = eta * math.sqrt(max(variance, 0.0))
            parts.append((mu_end, math.sqrt(max(std_end**2 - scale**2, 0.0)), scale))
        x0_part, eps_part, scale = ([part[i] for part in parts] for i in range(3))
        mu, std = [b[0] for b in begins], [b[1] for b in begins]
        return cls(list(levels), mu, std, x0_part, eps_part, scale)

    @property
    def reverses(self) -> bool:
        """Whether every step with noise is the noising's posterior given x0^: implicit with eta = 1."""
        if not self.decodes:
            return False
        sizes, noisy = list(zip(self.mu, self.std)), len(self.scale)
        posterior = SamplerSteps.implicit(self.levels, sizes, [*sizes[1:], (1.0, 0.0)], 1.0)
        numbers = ((s.x0_part[:noisy], s.eps_part[:noisy], s.scale[:noisy]) for s in (self, posterior))
        return all(
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for own, true in zip(*numbers) for a, b in zip(own, true)
        )

    def noisy(self, count: int) -> "SamplerSteps":
        """With noise in the first steps alone."""
        return replace(self, scale=self.scale[:count])


@dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding (Saharia et al. 2205.11487): x0^ is clipped to [-s, s] and divided by s, s a quantile of its
    entries' sizes, between 1 and ``largest``."""

    ratio: float = 0.995
    largest: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        s = torch.quantile(x0.flatten(1).abs(), self.ratio, dim=1).clamp(
            1.0, self.largest
        )  # as torch has it, the largest where that is below 1
        s = s.reshape(-1, *(1,) * (x0.ndim - 1))
        return x0.clamp(-s, s) / s


class DiffusionChain(PretrainedChain):
    """The sampler of a discrete diffusion model, or of a flow with noise. Made by :func:`diffusion_chain` and
    :func:`sdecontrol.from_diffusers`.

    Attributes:
        steps_of: its numbers.
        parts: of each step, from its mean ``x0_part x0^ + x_part x``; where eps^ is the model's own, from
            ``x0_part x0^ + eps_part eps^``.
        limit: what x0^ goes through: a bound for its size, a :class:`Thresholding`, or None. ``of_limited``: a step's
            eps^ is made of the limited x0^; else it is the model's own.
    """

    def __init__(
        self,
        model: Model,
        steps: SamplerSteps,
        prediction: str,
        shape: Sequence[int],
        like: Tensor,
        limit: float | Thresholding | None = None,
        of_limited: bool = True,
        facts: dict[str, Any] | None = None,
    ) -> None:
        levels = steps.levels if steps.decodes else [*steps.levels, steps.levels[-1]]
        super().__init__(model, shape, levels, like)
        self.decodes = steps.decodes
        self.prediction, self.steps_of, self.limit = prediction, steps, limit
        self.clip = limit
        self.of_limited = of_limited or limit is None
        self._facts = facts or {}
        self.parts = [
            (a - e * m / s, e / s) if self.of_limited else (a, e)
            for a, e, m, s in zip(steps.x0_part, steps.eps_part, steps.mu, steps.std)
        ]
        self._scales = torch.tensor(steps.scale, dtype=torch.float64).to(self.times)
        self.own_initial = Gaussian(self.times.new_zeros(self.event_shape), 1.0)
        self.memory, self.reversal = self._memory(), steps.reverses
        clean = [] if steps.decodes else [(1.0, 0.0)]
        mu, std = torch.tensor([*zip(steps.mu, steps.std), *clean], dtype=torch.float64).unbind(1)
        self.noising_levels = mu, std

    def _memory(self) -> float:
        """Correlation of start and end for standard Gaussian data, where ``x0^ = mu x / (mu^2 + std^2)``."""
        steps, total, variance = self.steps_of, 1.0, 1.0
        for mu, std, x0_part, eps_part, scale in zip(steps.mu, steps.std, steps.x0_part, steps.eps_part, steps.scale):
            slope = (x0_part * mu + eps_part * std) / (mu**2 + std**2)
            total, variance = total * slope, slope**2 * variance + scale**2
        return abs(total) / math.sqrt(variance)

    # ---------------------------------------------------------------- predictions

    def _raw_x0(self, k: int, x: States, prediction: States) -> States:
        mu, std = self.steps_of.mu[k], self.steps_of.std[k]
        if self.prediction == "sample":
            return prediction
        if self.prediction == "noise":
            return (x - std * prediction) / mu
        if self.prediction == "v":
            return mu * x - std * prediction
        return x - std * prediction  # flow: eps - x0, where mu = 1 - std

    def _predicting(self, k: int, x: States, x0: States) -> States:
        """The prediction that says x0^ (before any limit)."""
        mu, std = self.steps_of.mu[k], self.steps_of.std[k]
        if self.prediction == "sample":
            return x0
        if self.prediction == "noise":
            return (x - mu * x0) / std
        return ((mu if self.prediction == "v" else 1.0) * x - x0) / std

    def _limited(self, x0: States) -> States:
        if self.limit is None:
            return x0
        return self.limit(x0) if isinstance(self.limit, Thresholding) else x0.clamp(-self.limit, self.limit)

    def to_x0(self, k: int, x: States, prediction: States) -> States:
        return self._limited(self._raw_x0(k, x, prediction))

    # ---------------------------------------------------------------- steps

    def decode(self, x: States, condition: Any = None) -> Samples:
        if not self.decodes or (self.steps_of.x0_part[-1], self.steps_of.eps_part[-1]) == (1.0, 0.0):
            return super().decode(x, condition)
        k = self.steps
        return self.data_of(self.mean_of(k, x, self.prediction_at(k, x, condition)), condition)

    def mean_of(self, k: int, x: States, prediction: States) -> States:
        """The mean of step k where the model predicts this."""
        first, second = self.parts[k]
        x0 = self._raw_x0(k, x, prediction)
        beside = x if self.of_limited else self._eps(k, x, x0)
        return torch.add(second * beside, self._limited(x0), alpha=first)

    def _eps(self, k: int, x: States, x0: States) -> States:
        return (x - self.steps_of.mu[k] * x0) / self.steps_of.std[k]

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        return self.mean_of(k, x, self.prediction_at(k, x, condition)), self._scales[k]

    def shift_towards(self, k: int, x: States, prediction: States, condition: Any = None) -> Noises:
        scale, own = self.steps_of.scale[k], self.prediction_at(k, x, condition)
        if self.of_limited:
            return (self.to_x0(k, x, prediction) - self.to_x0(k, x, own)) * (self.parts[k][0] / scale)
        return (self.mean_of(k, x, prediction) - self.mean_of(k, x, own)) / scale

    def change_at(self, k: int, x: States, c: Noises, condition: Any = None) -> States:
        """Where x0^ is limited, up to what no prediction reaches: an x0^ beyond the limit is the limit."""
        steps, part = self.steps_of, self.parts[k][0]
        if self.limit is None:
            mu, std = steps.mu[k], steps.std[k]
            gain = {"sample": 1.0, "noise": -std / mu if mu else math.inf, "v": -std, "flow": -std}[self.prediction]
            return c * (steps.scale[k] / (part * gain))
        own = self.prediction_at(k, x, condition)
        if self.of_limited:
            x0 = self.to_x0(k, x, own) + c * (steps.scale[k] / part)
        else:
            x0 = self._reaching(k, x, self.mean_of(k, x, own) + c * steps.scale[k])
        return self._predicting(k, x, x0) - own

    def _reaching(self, k: int, x: States, mean: States) -> States:
        """The raw x0^ whose step has this mean, where eps^ is not limited. (Beyond the limit the mean falls with x0^:
        what is above all within it is reached far below.)"""
        mu, std = self.steps_of.mu[k], self.steps_of.std[k]
        x0_part, eps_part = self.parts[k]
        within = (mean - eps_part / std * x) / (x0_part - eps_part * mu / std)
        if isinstance(self.limit, Thresholding) or not eps_part or not mu:
            return within
        limit = self.limit if self.limit is not None else math.inf
        beyond = (x - std / eps_part * (mean + within.sign() * x0_part * limit)) / mu
        return within.where(within.abs() <= limit, beyond)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "DiffusionChain",
            "event_shape": list(self.event_shape),
            "prediction": self.prediction,
            "levels": self.levels,
            **self._facts,
            "clip": asdict(self.limit) if isinstance(self.limit, Thresholding) else self.limit,
        }


def _check_eta(sampler: str, eta: float) -> float:
    eta = as_float("eta", eta)
    if sampler == "ddpm" and eta != 1.0:
        raise ValueError(f"sampler='ddpm' is DDIM with eta=1; got eta={eta}. Use sampler='ddim' for another eta.")
    if eta <= 0:
        raise ValueError("eta must be > 0: a deterministic sampler has no likelihood ratios to control.")
    return eta


def _levels(count: int, steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
    if timesteps is None:
        if not isinstance(steps, int) or not 2 <= steps <= count:
            raise ValueError(f"steps must be an int from 2 to {count} (the number of levels), got {steps!r}.")
        return torch.linspace(count - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    levels = torch.as_tensor(timesteps)
    if levels.is_floating_point() or levels.is_complex() or levels.ndim != 1 or len(levels) < 2:
        raise TypeError("timesteps must be at least two integers, the noisiest first, such as [800, 600, 400, 200, 0].")
    found = levels.tolist()
    if found[0] >= count or found[-1] < 0 or any(b >= a for a, b in pairwise(found)):
        raise ValueError(f"timesteps must fall strictly within 0 .. {count - 1} (the levels of alphas_cumprod).")
    if steps is not None and steps != len(found):
        raise ValueError(f"steps={steps}, and timesteps are {len(found)}: leave out steps.")
    return found


def diffusion_chain(
    model: nn.Module,
    alphas_cumprod: Tensor,
    prediction: str = "noise",
    shape: Sequence[int] = (),
    sampler: str = "ddim",
    eta: float = 1.0,
    steps: int | None = None,
    clip: float | None = None,
    timesteps: Sequence[int] | None = None,
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
        steps: number of model calls, 50 if not given, spread evenly over the N levels: ``steps - 1`` noisy steps, and
            the last, noiseless one, which is ``decode``.
        clip: clip the predicted x0 to [-clip, clip], as many samplers do. The chain stays Gaussian.
        timesteps: the levels themselves, in place of ``steps``: integers within 0 .. N-1 that fall.

    A scheduler of diffusers says all of it itself: :func:`sdecontrol.from_diffusers`.
    """
    abar = check_tensor("alphas_cumprod", alphas_cumprod, shape=("N",)).detach().double().cpu()
    if bool((abar <= 0).any()) or bool((abar >= 1).any()) or bool((abar[1:] >= abar[:-1]).any()):
        raise ValueError("alphas_cumprod must decrease strictly within (0, 1): step 0 the least noisy.")
    check_name("prediction", prediction, PREDICTIONS)
    check_name("sampler", sampler, SAMPLERS)
    eta = _check_eta(sampler, eta)
    if not callable(model):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    if isinstance(shape, int):
        shape = (shape,)
    if len(tuple(shape)) == 0:
        raise TypeError("shape is needed: the shape of one state, e.g. shape=(1, 8, 8).")
    levels = _levels(len(abar), 50 if steps is None and timesteps is None else steps, timesteps)
    for a, b in pairwise(levels):
        variance = (1 - abar[b]) / (1 - abar[a]) * (1 - abar[a] / abar[b])
        if 1 - abar[b] - eta**2 * variance < -1e-12:
            raise ValueError(
                f"eta={eta} is too large: the step from level {a} to {b} would need more noise than there is."
            )
    sizes = [(math.sqrt(a), math.sqrt(1 - a)) for a in abar[levels].tolist()]
    parts = SamplerSteps.implicit(levels, sizes, [*sizes[1:], (1.0, 0.0)], eta).noisy(len(levels) - 1)
    limit = None if clip is None else as_float("clip", clip, positive=True)
    return DiffusionChain(model, parts, prediction, shape, alphas_cumprod, limit, facts={"eta": eta})
