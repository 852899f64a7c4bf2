"""A learned start: the segment before time 0 that makes a random start part of the chain, and one chain after
another."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.laws import Gaussian, GaussianMixture
from ..shapes import ControlPaths, Controls, NoisePaths, Noises, Samples, Scale, StatePaths, States
from .base import AffineStep, Chain


class LearnedStart(Chain):
    """The learned start, on [-1, 0): it turns a random start into part of the chain.

    From the mean of the start's law a Brownian motion of covariance S reaches N(mean, S) at time 0 (the idea of
    ELEGANT, Uehara et al. 2402.15194). For a Gaussian mixture the same Brownian motion, conditioned to end in the
    mixture, is the Foellmer process; its drift is the closed form ``(E[X_0 | X_s = x] - x) / -s``.
    """

    def __init__(self, law: Gaussian | GaussianMixture, steps: int, dtype: torch.dtype, device: torch.device) -> None:
        self.reference: Any = law
        self.set_times([-1.0 + k / steps for k in range(steps)] + [0.0], dtype, device)
        self.event_shape = law.event_shape
        self.noise_shape = self.control_shape = law.event_shape
        self.mixture = law if isinstance(law, GaussianMixture) else None
        spread = Gaussian(law.mean, law.covariance_matrix) if isinstance(law, GaussianMixture) else law
        self.point = law.mean.to(device=device, dtype=dtype)
        self.covariance = spread.covariance_matrix if not spread.is_diagonal else spread.variance
        root = spread.scale_root.to(device=device, dtype=dtype)
        self._matrix = not spread.is_diagonal
        self._scales = [(root.unsqueeze(0) if self._matrix else root) * math.sqrt(h) for h in self.step_sizes]
        self._bridges = [self._between(t + 1.0) for t in self.clock[:-1]] if self.mixture is not None else None

    def _between(self, past: float) -> GaussianMixture:
        """The law of the Foellmer process a time ``past`` after its start (its marginal: a mixture again)."""
        assert self.mixture is not None
        mean, spread = self.mixture.mean, self.mixture.covariance_matrix
        means = mean + past * (self.mixture.means - mean)
        tiny = 1e-12 * spread.diagonal().max() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        return GaussianMixture(
            self.mixture.weights, means, past**2 * self.mixture.covariances + past * (1 - past) * spread + tiny
        )

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        if self._bridges is None:
            return x, self._scales[k]
        past = self.clock[k] + 1.0
        if past == 0.0:  # everything starts in the mean, and the end's mean is the mean
            return x, self._scales[k]
        drift = self._bridges[k].score(x) @ self.covariance + (x - self.point) / past
        return torch.add(x, drift, alpha=self.step_sizes[k]), self._scales[k]

    def mean_matrix(self, k: int) -> Tensor | None:
        if self.mixture is not None or len(self.event_shape) != 1:
            return None
        return torch.eye(self.event_shape[0], dtype=self.times.dtype, device=self.times.device)

    def affine_steps(self) -> list[AffineStep] | None:
        if self.mixture is not None or len(self.event_shape) != 1:
            return None
        root = self.reference.scale_root.detach().to("cpu", torch.float64)
        root = root if self._matrix else torch.diag(root)
        eye, zero = torch.eye(len(root), dtype=torch.float64), torch.zeros(len(root), dtype=torch.float64)
        return [AffineStep(eye, zero, h**0.5 * root, h**0.5 * eye) for h in self.step_sizes]

    def double(self) -> Chain:
        return LearnedStart(self.reference, self.steps, torch.float64, self.times.device)


class SegmentedChain(Chain):
    """One chain after another; shapes of noise and control are padded to the larger of the two.

    Padding is exact: the padded entries of a shift are zero, those of the noise move nothing.
    """

    def __init__(self, first: Chain, second: Chain) -> None:
        self.first, self.second, self.reference = first, second, second.reference
        self.event_shape, self.control_shape = second.event_shape, second.control_shape
        # images have as many noises as states in both; only vectors may have more or fewer
        self.noise_shape = max(first.noise_shape, second.noise_shape, key=torch.Size.numel)
        if not second.of_noise:
            raise ValueError(
                f"a learned start needs steps whose noise a control shifts, and those of a {type(second).__name__} are "
                "none."
            )
        self.scheme, self.gaussian = second.scheme, second.gaussian
        self.set_times(first.clock[:-1] + second.clock, second.times.dtype, second.times.device)

    @property
    def segments(self) -> tuple[Chain, ...]:
        return (self.first, self.second)

    def part(self, k: int) -> tuple[Chain, int]:
        """The segment that step k belongs to, and the step's number there."""
        return (self.first, k) if k < self.first.steps else (self.second, k - self.first.steps)

    def padded(self, segment: Chain, c: Tensor) -> Tensor:
        """Shifts of a segment as ones of the whole: what is added moves nothing."""
        missing = self.noise_shape.numel() - segment.noise_shape.numel()
        return torch.nn.functional.pad(c, (0, missing)) if missing else c

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        chain, j = self.part(k)
        if chain.gaussian:
            return super().step(k, x, xi, c, condition)
        own = [part if part is None else part[..., : chain.noise_shape[-1]] for part in (xi, c)]
        return chain.step(j, x, own[0], own[1], condition)  # type: ignore[arg-type]

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        chain, j = self.part(k)
        return chain.step_parts(j, x, condition)

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        chain, j = self.part(k)
        mean, scale = chain.kernel(j, x, condition)
        if chain.noise_shape != self.noise_shape and scale.ndim < 3:
            scale = torch.diag_embed(scale.expand(chain.event_shape) if scale.ndim < 2 else scale)
            scale = scale.unsqueeze(0) if scale.ndim == 2 else scale
        return mean, self.padded(chain, scale)

    def mean_matrix(self, k: int) -> Tensor | None:
        chain, j = self.part(k)
        return chain.mean_matrix(j)

    def affine_steps(self) -> list[AffineStep] | None:
        first, second = (chain.affine_steps() for chain in self.segments)
        return None if first is None or second is None else first + second

    def double(self) -> Chain:
        return SegmentedChain(*(chain.double() for chain in self.segments))

    def gain(self, k: int) -> float | Tensor:
        chain, j = self.part(k)
        return chain.gain(j)

    def shift_at(self, k: int, x: States, u: Controls, condition: Any = None) -> Noises:
        chain, j = self.part(k)
        return self.padded(chain, chain.shift_at(j, x, u, condition))

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        return torch.stack([self.shift_at(k, x, here, condition) for k, x, here in zip(steps, states, u)])

    def control(self, k: int, c: Noises) -> Controls:
        chain, j = self.part(k)
        return chain.control(j, c if chain.noise_shape == self.noise_shape else c[..., : chain.noise_shape[0]])

    def decode(self, x: States, condition: Any = None) -> Samples:
        return self.second.decode(x, condition)
