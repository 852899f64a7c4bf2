"""Rounds of a fit of a log density ratio on paths of its own guidance, each measured on fresh paths, the last one too.

These are the paths of the next round, so that measuring costs one draw in all. A round that has made the guidance worse
by more than chance is halved once, then taken back, and is the last. Paths are functions of the seed and of how often
some were drawn, so that a run resumes from its parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..controls.guidance import ValueControl
from ..paths.paths import Paths
from ..processes.modules import copied
from .base import ControlState

ROUND = 3  # a round has so many times fewer paths than the first fit
LITTLE = 0.005  # nats that a round must promise, or gain
_CHANCE = 2.0  # standard errors by which a round may seem worse


class Seen(Protocol):
    """What paths of the guidance say of it."""

    paths: list[Paths]


_S = TypeVar("_S", bound=Seen)


class RatioRounds(ControlState, Generic[_S]):
    """The guidance, and what it was before the last round; the best round's objective so far (mean and error, in nats);
    the part of the reward that it is for, ``alpha/temperature``; how often paths were drawn; whether rounds still gain.

    Attributes:
        look: what the so-and-so-many-th fresh paths of the guidance say of it. seen: the last of these, of the guidance
            as it is; drawn again after a resume.
    """

    beta: Tensor
    score: Tensor
    draws: Tensor
    ended: Tensor

    def __init__(self, control: ValueControl) -> None:
        super().__init__(control)
        self.kept = copied(control.get_submodule("value"))
        self.beta = nn.Buffer(torch.zeros((), dtype=torch.float64))
        self.score = nn.Buffer(torch.tensor([-math.inf, 0.0], dtype=torch.float64))
        self.draws = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.ended = nn.Buffer(torch.zeros((), dtype=torch.bool))
        self.seen: _S | None = None

    def fresh(self) -> int:
        """The number of the next draw of paths."""
        number = int(self.draws)
        self.draws += 1
        return number

    def first(self, look: Callable[[int], _S]) -> _S:
        """Measure the guidance that the first fit gives."""
        self.seen = look(self.fresh())
        self.score.copy_(torch.tensor(objective(self.seen)))
        return self.seen

    def begin(self, look: Callable[[int], _S]) -> _S:
        """Keep the value as it is before a round, for which these paths are."""
        self.kept.load_state_dict(self.control.get_submodule("value").state_dict())
        return self.seen or look(int(self.draws) - 1)

    @torch.no_grad()
    def settle(self, before: _S, look: Callable[[int], _S], part: float) -> float:
        """After a round from ``before``: what part of it is kept. ``part`` 0: nothing was moved."""
        self.seen = before
        while part:
            seen = look(self.fresh())
            if not _worse(objective(seen), self.score.tolist()):
                self.seen = seen
                break
            part = 0.5 if part == 1 else 0.0
            kept = self.kept.state_dict()
            for name, now in self.control.get_submodule("value").state_dict().items():
                if now.is_floating_point():
                    now.lerp_(kept[name], 0.5 if part else 1.0)
        mean, error = objective(self.seen)
        if mean > float(self.score[0]):
            self.score.copy_(torch.tensor([mean, error]))
        self.ended.fill_(part == 0)
        return part


def objective(seen: Seen) -> tuple[float, float]:
    """Mean and standard error of the guidance's log weights: its objective, in nats, with less noise the better it
    is."""
    log_w = torch.cat([p.log_weights() for p in seen.paths]).double()
    return float(log_w.mean()), float(log_w.std()) / math.sqrt(len(log_w))


def _worse(new: Sequence[float], best: Sequence[float]) -> bool:
    """Whether an objective (mean and error) is below another one by more than chance."""
    return new[0] < best[0] - _CHANCE * math.hypot(new[1], best[1])
