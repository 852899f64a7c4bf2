"""The chain of a process on a manifold: geodesic Euler steps, whose law is that of a Gaussian in the tangent space."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.manifolds import ManifoldSDE
from ..shapes import ControlPaths, Controls, NoisePaths, Noises, StatePaths, States
from .base import Chain


class ManifoldChain(Chain):
    """``x' = exp_x(h b(x, t_k) + sqrt(h) sigma (P xi + c))``, ``c = sqrt(h) P u``, P the tangent projection at x.

    Noise is drawn in the space that the manifold is embedded in, where a sphere of even dimension has no frame that
    varies smoothly with x; its normal part moves nothing. Shifts are tangent, so that ``<c, xi>`` and ``|c|^2`` count
    tangent parts alone, and log-ratios and KLs, functions of noises and shifts as of every Gaussian step, are those of
    the Gaussian on the tangent space. The law of a step does not depend on the embedding's frame.
    """

    scheme = "euler"
    gaussian = False
    reference: ManifoldSDE

    def __init__(self, sde: ManifoldSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self.set_times(clock, dtype, device)
        self.event_shape = self.noise_shape = self.control_shape = sde.event_shape
        #: ``sqrt(h) sigma`` of every step
        self.spreads = [math.sqrt(h) * sde.level(t) for h, t in zip(self.step_sizes, clock)]

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        v = self.spreads[k] * (xi if c is None else xi + c)
        if not self.reference.still:
            v = torch.add(v, self.reference.drift(x, self.times[k], condition), alpha=self.step_sizes[k])
        manifold = self.reference.manifold
        return manifold.exp(x, manifold.tangent(x, v))

    def tangent(self, x: Tensor, c: Tensor) -> Tensor:
        return self.reference.tangent(x, c)

    def shift_at(self, k: int, x: States, u: Controls, condition: Any = None) -> Noises:
        return self.tangent(x, super().shift_at(k, x, u, condition))

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        return self.tangent(states, super().shifts_at(steps, states, u, condition))

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        drift = self.reference.drift(x, self.times[k], condition)
        return [("drift", drift), ("step", self.step(k, x, torch.zeros_like(x), None, condition))]
