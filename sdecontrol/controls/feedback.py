"""Shifts that are affine in the state, step by step: what a control may begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction


@dataclass(frozen=True)
class AffineFeedback:
    """``c_k(x) = gains_k x + offsets_k`` on one chain, vector states.

    Attributes:
        gains: ``(K, noise, d)``; offsets: ``(K, noise)``; float64 on the CPU.
    """

    gains: Tensor
    offsets: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        raise TypeError("a feedback on a chain is asked for by on_chain, step by step.")

    def on_chain(self, chain: Chain) -> ShiftFunction:
        gains, offsets = self.gains.mT.contiguous().to(chain.times), self.offsets.to(chain.times)

        def shift(k: int, x: Tensor, y: Any) -> Tensor:
            return torch.addmm(offsets[k], x, gains[k])

        return shift

    def controls(self, chain: Chain) -> tuple[Tensor, Tensor]:
        """The same in terms of u: ``(K, m, d)`` and ``(K, m)``."""
        found = []
        for k in range(chain.steps):
            columns = torch.cat((self.gains[k], self.offsets[k].unsqueeze(1)), 1)
            gain = chain.gain(k)
            inverse = torch.linalg.pinv(gain).to(columns) if isinstance(gain, Tensor) else None
            found.append(columns / gain if inverse is None else inverse @ columns)
        whole = torch.stack(found)
        return whole[..., :-1], whole[..., -1]
