"""Values and ``log Z`` that are learned along with a control."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from ..problems.problem import ControlProblem
from .guidance import NetworkValue, value_network
from .token_network import TokenValue


def learned_value(problem: ControlProblem, chain: Chain, seed: int) -> NetworkValue | TokenValue:
    """A network for ``v/alpha`` to be trained by the control's optimiser: in units of one nat, whatever the spread of
    the reward, since that is the scale to which a value must be known (larger steps make one-step consistency
    unstable)."""
    network = value_network(problem, chain, seed)
    network.scale[1] = 1.0
    return network


class LearnedLogZ(nn.Module):
    """``log Z`` (``v_0(x_0)/alpha`` where it depends on the start), as the constant that a squared loss
    ``(Y + log Z)^2`` asks for.

    The number is a running mean of -Y: the loss's minimiser over it, with no step size. What depends on the start is a
    network, trained with the control. On paths of the current control it settles at the ELBO, below the chain's log Z
    by the floor of mean-shift controls: take log Z from ``solution.evaluate``.

    Args:
        varies: whether it is a function of the start and the condition.
    """

    def __init__(self, problem: ControlProblem, chain: Chain, varies: bool, seed: int) -> None:
        super().__init__()
        self.network = learned_value(problem, chain, seed) if varies else None
        self._first = chain.times[:1]
        self._forgets_start = chain.reverse is not None  # which leads to the start
        self.level = nn.Buffer(torch.zeros((), dtype=problem.dtype, device=problem.device))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.long))

    def forward(self, x0: Tensor, condition: Any = None) -> Tensor:
        """``(batch,)``, with the network's graph."""
        x0 = torch.zeros_like(x0) if self._forgets_start else x0
        level = self.level.clone().expand(x0.shape[0])
        return level if self.network is None else level + self.network.along(x0.unsqueeze(0), self._first, condition)[0]

    @torch.no_grad()
    def follow(self, residual: Tensor) -> None:
        """Move the number by what ``Y + log Z`` was on a batch."""
        self.count += 1
        self.level -= ranks.mean(residual.mean()) * max(1 / int(self.count), 0.1)
