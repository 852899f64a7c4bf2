"""Masked diffusion on relaxed tokens: steps that have a gradient, by the Gumbel-softmax relaxation.

A token is a vector of V+1 probabilities, a one-hot one where it is known. Gumbel-max picks the token v of the largest
``log p_v + gumbel(xi_v)``; the softmax of these numbers over a temperature tau in its place is smooth, and tends to it
as tau -> 0 (Jang et al. 1611.01144, Maddison et al. 1611.00712). Model and control are asked at relaxed tokens. Which
positions are unmasked is drawn by itself and stays hard, since no control of tokens enters it: a softmax over the
tokens and the mask together (Wang et al. 2410.13643, DRAKES) has slopes there that the law has not, and on a chain of
two tokens its gradient is off by several times its size.

Its gradient is that of another objective, the relaxed one; with straight-through tokens (values of Gumbel-max, slopes
of the softmax; Bengio et al. 1308.3432) the objective is the chain's own, and the gradient is that of none. Both are
biased as gradients of the chain's objective: less at a lower temperature, with a variance of order 1/tau.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shapes import ControlPaths, Controls, DrawPaths, NoisePaths, Noises, PerStep, Samples, StatePaths, States
from ..tensors import event_sum
from .base import Chain
from .categorical import gumbel
from .masked import MaskedDiffusionChain


class RelaxedMasking(Chain):
    """The chain of a masked diffusion with states ``(batch, *shape, V+1)`` of probabilities, the mask's the last.

    The law of the nearest tokens is that of the chain, up to what model and control make of relaxed ones. It has a KL
    and no likelihoods.

    Args:
        tokens: the chain. temperature: tau > 0. straight_through: states are one-hot, their slopes those of the
            softmax.
    """

    gaussian = of_noise = False

    def __init__(self, tokens: MaskedDiffusionChain, temperature: float, straight_through: bool) -> None:
        self.tokens, self.reference = tokens, tokens
        self.temperature, self.straight_through = temperature, straight_through
        self.set_times(tokens.clock, tokens.times.dtype, tokens.times.device)
        self.event_shape = self.noise_shape = tokens.noise_shape
        self.control_shape, self._mask = tokens.control_shape, tokens.mask

    def relaxed(self, x: Tensor) -> States:
        """Tokens as one-hot probabilities."""
        return F.one_hot(x, self.tokens.values).to(self.times)

    def nearest(self, z: Tensor) -> Tensor:
        """The most likely tokens of relaxed ones."""
        return z.argmax(-1)

    def decode(self, x: States, condition: Any = None) -> Samples:
        """Probabilities of the V tokens: at the end nothing is masked."""
        return x[..., : self._mask]

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        letters = self.tokens.prediction_at(k, x, condition).log_softmax(-1)
        if c is not None:
            letters = letters + self.tokens.checked(c, k)[..., : self._mask]
        here = self._unmasked(k, x[..., self._mask], xi).unsqueeze(-1)
        chosen = F.pad(self._chosen(letters + gumbel(xi[..., : self._mask])), (0, 1))
        return x * (1 - here) + chosen * here

    def _unmasked(self, k: int, masked: Tensor, xi: Noises) -> Tensor:
        """1 at the positions that are unmasked in this step, else 0, as in the chain of tokens."""
        return self.tokens.opened(k, masked > 0, xi).to(masked) * masked

    def _chosen(self, scores: Tensor) -> Tensor:
        soft = (scores / self.temperature).softmax(-1)
        if not self.straight_through:
            return soft
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(soft) + (soft - soft.detach())

    # ---------------------------------------------------------------- what a control costs

    def shift_at(self, k: int, x: States, u: Controls, condition: Any = None) -> Noises:
        return self.tokens.shift_at(k, x, u, condition)

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        return torch.stack([self.shift_at(k, x, here, condition) for k, x, here in zip(steps, states, u)])

    def together(self, k: int, x: States, first: Noises, second: Noises, condition: Any = None) -> Noises:
        return self.tokens.together(k, x, first, second, condition)

    def control(self, k: int, c: Noises) -> Controls:
        return self.tokens.control(k, c)

    def kl(
        self,
        c: NoisePaths,
        states: StatePaths | Sequence[States] | None,
        steps: Iterable[int],
        condition: Any = None,
        other: NoisePaths | None = None,
    ) -> PerStep:
        """That of the tokens, each position's by the weight of its mask."""
        assert states is not None and other is None
        return torch.stack([self._kl(k, x, here, condition) for k, x, here in zip(steps, states, c)])

    def _kl(self, k: int, x: States, c: Noises, condition: Any) -> Tensor:
        c, masked = c[..., : self._mask], x[..., self._mask]
        p = (self.tokens.prediction_at(k, x, condition).log_softmax(-1) + c).exp()
        if self.tokens.independent:
            rate: Any = self.tokens.unmasked[k]
        else:
            rate = 1 / masked.flatten(1).sum(1).clamp(min=1).reshape(-1, *(1,) * (masked.ndim - 1))
        return event_sum(rate * masked * (p * c).sum(-1), masked.ndim - 1)

    def draws(
        self, noises: NoisePaths, shifts: NoisePaths, states: StatePaths | None, before: StatePaths | None = None
    ) -> DrawPaths:
        assert states is not None
        return states

    def log_ratio(self, c: NoisePaths, draws: DrawPaths) -> PerStep:
        """Nothing: relaxed tokens have no density. (Paths without a control ask for sums of it.)"""
        return c.new_zeros(c.shape[:2])

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        return [("logits", self.tokens.prediction_at(k, x, condition))]
