"""The default network of ``fit_score``: the best linear prediction, corrected by a residual network, in the data's
basis."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..processes.schedules import Schedule
from .fitting import TIME_WIDTH, ResidualNetwork

_LARGEST_BASIS = 2048  # beyond it, coordinates instead of principal components


class ScoreNetwork(ResidualNetwork):
    """A model ``(x, clock) -> prediction`` under a schedule, in any parametrisation.

    Were the data ``N(mean, Q diag(lam) Q')``, then in the basis Q, with ``y = Q'(x - mu mean)`` and
    ``v = mu^2 lam + std^2``, the best predictions would be ``x0 = mean + mu lam y / v`` and ``eps = std y / v``. The
    network reads ``y / sqrt(v)`` (unit variance at every noise level), and its output f, scaled by the standard
    deviation that is left, corrects both: ``x0 - std sqrt(lam / v) f`` and ``eps + mu sqrt(lam / v) f``. Every other
    parametrisation is a combination of the two, without cancellation at either end. Untrained (f = 0) the model samples
    that Gaussian.
    """

    mean: Tensor
    basis: Tensor
    lam: Tensor

    def __init__(self, shape: Sequence[int], schedule: Schedule, prediction: str) -> None:
        size = math.prod(shape)
        super().__init__(size)
        self.shape, self.schedule, self.prediction = tuple(shape), schedule, prediction
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size) if size <= _LARGEST_BASIS else torch.zeros(0, 0))
        self.register_buffer("lam", torch.ones(size))

    @torch.no_grad()
    def fit_statistics(self, data: Tensor) -> None:
        """Take mean, principal components and variances along them from data ``(n, *shape)`` (buffers, not trained)."""
        x = data.flatten(1).double()
        self.mean.copy_(x.mean(0))
        if self.basis.numel():
            spread = torch.cov(x.mT, correction=min(1, len(x) - 1))  # of one datum: 0
            variances, basis = torch.linalg.eigh(spread.reshape(x.shape[1], x.shape[1]))
            self.basis.copy_(basis)
        else:
            variances = x.var(0, correction=min(1, len(x) - 1))
        self.lam.copy_(variances.clamp_min(1e-5 * float(variances.max()) + 1e-12))

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        """The prediction, shaped as x ``(batch, *shape)``; clock ``(batch,)`` is the schedule's model time."""
        return self._predict(x, clock)

    def _predict(self, x: Tensor, clock: Tensor, more: Tensor | None = None) -> Tensor:
        """``more``: features ``(batch, TIME_WIDTH)`` beside those of time."""
        if clock.ndim and clock.stride(0) == 0:
            clock = clock[:1]  # the whole batch is at one time: its features once
        s = self.schedule.noising_time(clock.reshape(-1, 1)).clamp(1e-5, self.schedule.noise_end)
        mu, std = self.schedule.mu(s), self.schedule.std(s)
        v = mu**2 * self.lam + std**2
        x = x.flatten(1)
        y = x - mu * self.mean
        y = y @ self.basis if self.basis.numel() else y
        left = self.correction(
            y * v.rsqrt(), torch.atan2(std, mu * self.lam.mean().sqrt()), more
        )  # the angle of signal and noise
        left = left * (self.lam / v).sqrt()
        x0, eps = mu * self.lam / v * y - std * left, std / v * y + mu * left
        on_x0, on_eps = self._parts(s, mu, std)
        out = x0 * on_x0 + eps * on_eps if isinstance(on_x0, Tensor) else eps * on_eps
        out = out @ self.basis.mT if self.basis.numel() else out
        if isinstance(on_x0, Tensor):
            out = out + on_x0 * self.mean
        return out.reshape(-1, *self.shape)

    def _parts(self, s: Tensor, mu: Tensor, std: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(a, b)`` with ``prediction = a x0 + b eps``; None for zero."""
        if self.prediction == "noise":
            return None, torch.ones_like(mu)
        if self.prediction == "sample":
            return torch.ones_like(mu), torch.zeros_like(mu)
        if self.prediction == "score":
            return None, -1 / std
        if self.prediction == "v":
            return -std, mu
        slope, rate = self.schedule.log_mu_slope(s), self.schedule.forward_variance_rate(s)
        return -slope * mu, -(rate / (2 * std) + slope * std)  # velocity: -(mu' x0 + std' eps)


class ConditionalScoreNetwork(ScoreNetwork):
    """A :class:`ScoreNetwork` ``(x, clock, y) -> prediction``: a condition scales and shifts the blocks, as time does.

    Args:
        classes: number of labels y ``(batch,)``, integers; the label ``classes``, or no y at all, is the unconditional
            model (where it was trained: ``unconditional``).
        features: how many numbers the blocks see: ``classes + 1``, or those of y ``(batch, ...)`` where ``classes`` is
            0.
    """

    def __init__(
        self,
        shape: Sequence[int],
        schedule: Schedule,
        prediction: str,
        classes: int,
        features: int,
        unconditional: bool,
    ) -> None:
        super().__init__(shape, schedule, prediction)
        self.classes, self.unconditional = classes, unconditional
        self.condition = nn.Linear(features, TIME_WIDTH)

    def forward(self, x: Tensor, clock: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`ScoreNetwork.forward`; without y the unconditional prediction.

        Raises:
            ValueError: without y, where no unconditional model was trained.
        """
        if y is None:
            if not self.unconditional:
                raise ValueError(
                    "y is missing: a model trained with drop=0 has no unconditional part; call model(x, s, y)."
                )
            y = torch.full((len(x),), self.classes, device=x.device)
        if self.classes:
            features = F.one_hot(y.long().reshape(-1), self.classes + 1).to(x.dtype)
        else:
            features = y.to(x.dtype).reshape(len(y), -1)
        return self._predict(x, clock, self.condition(features))
