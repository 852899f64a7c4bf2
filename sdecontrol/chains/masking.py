"""The bridge of masked diffusion: given the end its positions are masked independently, as noising masks them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..shapes import NoisePaths, PerStep, StatePaths, States
from ..tensors import event_sum
from .masked import MaskedDiffusionChain
from .noising import at_steps


class MaskingBridge:
    """What draws the middle of a path anew given its end. Of a model whose conditionals are those of one joint law this
    is the chain's own law in random order, and O(h) from it where several positions are unmasked in a step."""

    def __init__(self, chain: MaskedDiffusionChain) -> None:
        self._chain = chain
        opens = torch.tensor([1.0, *[1 - q for q in chain.unmasked]], dtype=torch.float64)
        #: probability that a position is masked at step k
        self._masked = opens.cumprod(0)[:-1]

    def between(self, start: States, end: States, noise: Tensor, steps: Sequence[int] | None = None) -> StatePaths:
        """States of all steps ``(K, batch, *shape)``, or of these, given start and end; of ``noise`` ``(1, batch,
        *shape)``, standard normal, its order says which positions are unmasked when."""
        chain = self._chain
        open_ = start == chain.mask
        u = torch.special.ndtr(noise[0])
        wide = (-1, 1, *(1,) * chain.event_ndim)
        if chain.independent:
            masked = u < at_steps(self._masked, steps).to(u).reshape(wide)  # falling in k: a path
        else:  # by rank among the positions that are open: the smallest last
            rank = u.masked_fill(~open_, 2.0).flatten(1).argsort(1).argsort(1).unflatten(1, u.shape[1:])
            left = open_.flatten(1).sum(1).reshape(-1, *(1,) * chain.event_ndim)
            masked = rank < left - at_steps(torch.arange(chain.steps, device=u.device), steps).reshape(wide)
        return torch.where(masked & open_, chain.mask, end)

    def misfit(
        self,
        c: NoisePaths,
        states: StatePaths,
        end: States,
        condition: Any = None,
        steps: Sequence[int] | None = None,
    ) -> PerStep:
        """``-E[log p^u/p0 (x_{k+1} | x_k) | x_k, x_K]`` of shifts c ``(K, batch, *shape, V+1)`` at states of all steps,
        or of these: the cross-entropy of the masked tokens, by the probability that they are unmasked now."""
        chain = self._chain
        masked = states == chain.mask
        gained = c.gather(-1, end.expand(len(states), *end.shape).unsqueeze(-1)).squeeze(-1)
        if chain.independent:
            rate = at_steps(c.new_tensor(chain.unmasked), steps).reshape(-1, 1)
        else:
            rate = 1 / masked.flatten(2).sum(2).clamp(min=1).to(c)
        return -rate * event_sum(torch.where(masked, gained, 0.0), chain.event_ndim)


def probabilities_of(ends: Tensor, weights: Tensor, tokens: int) -> Tensor:
    """Weighted frequencies of tokens at each position: of ends ``(batch, n, *shape)`` and normalised weights ``(batch,
    n)``, ``(batch, *shape, tokens)``."""
    flat = ends.flatten(2)
    found = weights.new_zeros(len(ends), flat.shape[2], tokens)
    found.scatter_add_(2, flat.mT, weights.unsqueeze(1).expand(-1, flat.shape[2], -1))
    return found.unflatten(1, ends.shape[2:])
