"""How far a step of the optimiser moves the path law: measured on a few paths of the batch, bounded, and in the first
steps the measure by which a learning rate is found."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..chains.base import Chain
from ..chains.shifts import shifts_along
from ..errors import NonFiniteError
from ..methods.base import Visited, spread
from ..processes.modules import evaluating, modules_in

_FOURTH = 4  # of the paths at hand
_AT = 12  # steps' worth of all paths at hand in a long chain: fewer paths then, these at least
_FEWEST = 4
_SHORTER = 0.9  # than the quadratic law says: it is measured again, and should fit then
_SMALLEST = 1e-8  # part of a step: where even that is too far, its length is not what is wrong
_STEPS = 50  # in which the rate is found
_REST = 8  # steps from one look to the next, where none comes near the bound
_MARGIN = 4.0  # by how much a step may be farther than its length says
_FADE = 0.7  # of the largest KL per length between two looks
_FALL = 2.0  # the most by which it changes from one step to the next
_SLOWEST = 1e-3  # of the control's own rate


class PathLaw:
    """``KL(P^new || P^old) = E sum_k KL(p^new || p^old)(x_k)`` between a control before and after a step.

    At a sixteenth of the batch's states or fewer: all steps of a fourth of the paths at hand (others each time; of a
    long chain fewer), with two calls of the control at each. Paths are much alike; of steps one may have nearly all of
    the KL, such as a sampler's last, whose noise is small. The first fifty steps of the optimiser are looked at; later
    every eighth, and each that may come near the bound: by the largest KL per squared length in the parameters that was
    seen of late, it would move the law by a quarter of that.

    Args:
        most: the bound, in nats, or in parts of ``KL(P^u || Q0)`` where that is more than a nat: far from the reference
            a step may be larger, and near the optimum's own scale it is what the control's own KL says.
        find: whether a rate is looked for at which a step moves the law by ``aim`` nats.
    """

    aim = 0.1

    def __init__(self, chain: Chain, control: Any, most: float, find: bool) -> None:
        self.chain, self.control, self.most, self.find = chain, control, most, find
        self.most_times = getattr(control, "most_times", 1.0)
        self.rate = 1.0  # factor on the control's own learning rate
        self.looks = self.rested = 0  # steps looked at; and not, since the last look
        self.per_length = 0.0  # KL of a step by the square of its length
        self.moved = math.nan  # by the last step

    def due(self, length: float) -> bool:
        """Whether a step of this squared length in the parameters is looked at."""
        self.rested += 1
        near = not _MARGIN * self.per_length * length <= self.most
        return self.looks < _STEPS or self.rested >= _REST or near

    def saw(self, kl: float, length: float) -> None:
        """How far a step of this squared length would have moved the law."""
        if length > 0:
            kl = kl if math.isfinite(kl) else 1e3 * self.most
            self.per_length = max(_FADE * self.per_length, kl / length)

    def state(self) -> list[Any]:
        return [self.rate, self.looks, self.rested, self.per_length]

    def restore(self, state: Sequence[Any]) -> None:
        self.rate, self.looks = state[:2]
        if len(state) > 2:  # checkpoints of earlier versions looked at every step
            self.rested, self.per_length = state[2:]

    @torch.no_grad()
    def look(self, at: Any) -> "Look":
        """The control as it is, at the states of ``at``: anything with ``states`` ``(>= K, batch, *event)`` of all
        steps, and their ``condition``."""
        visited = at if isinstance(at, Visited) else Visited.of(at.states, at.condition)
        self.looks, self.rested = self.looks + 1, 0
        steps, paths = self.chain.steps, visited.states.shape[1] * ranks.parts()
        few = min(paths, max(_FEWEST, -(-paths // max(_FOURTH, steps // _AT))))
        rows = spread(paths, few, self.looks)
        condition = None if visited.condition is None else visited.condition[rows]
        return Look(self, visited.states[:steps, rows], condition)

    def learn(self, kl: float, factor: float) -> None:
        """Find the rate from the KL of a whole step, which goes with its square."""
        if not self.find or self.looks > _STEPS or not kl > 0:
            return
        wanted = math.sqrt(self.aim / kl) * factor if math.isfinite(kl) else 0.0
        # a step's KL differs from batch to batch, and falls as the gradient's noise is averaged: half of the way
        change = min(_FALL, max(1 / _FALL, wanted**0.5))
        self.rate = min(self.most_times, max(_SLOWEST, self.rate * change))


class Look:
    """The shifts before a step, and the KL of what the control has become."""

    def __init__(self, law: PathLaw, states: Tensor, condition: Any) -> None:
        self.law, self.states, self.condition = law, states, condition
        self.before = self._shifts()
        self.own = self._kl(self.before, None)

    def _shifts(self) -> Tensor:
        law = self.law
        with law.chain.reference.evaluating(), evaluating(modules_in(law.control)):
            return shifts_along(law.chain, law.control, self.states, self.condition)

    def _kl(self, shifts: Tensor, other: Tensor | None) -> float:
        chain = self.law.chain
        each = chain.kl(shifts, self.states, range(chain.steps), self.condition, other).sum(0)
        return float(ranks.mean(each.mean()))

    @torch.no_grad()
    def bound(self, parameters: list[Tensor], before: list[Tensor]) -> float:
        """Shorten the step from ``before`` to ``parameters`` until the path law moves by no more than it may.

        Returns:
            The KL of the whole step.

        Raises:
            NonFiniteError: no part of it is small enough; the parameters are those before it.
        """
        law, part = self.law, 1.0
        whole = law.moved = self._kl(self._shifts(), self.before)
        most = law.most * max(1.0, self.own)
        while True:
            if law.moved <= most:
                return whole
            if part < _SMALLEST:
                break
            shorter = math.sqrt(most / law.moved) if math.isfinite(law.moved) else 0.1
            shorter = _SHORTER * max(0.01, shorter)
            part *= shorter
            for p, old in zip(parameters, before):
                p.lerp_(old, 1 - shorter)
            law.moved = self._kl(self._shifts(), self.before)
        last = law.moved
        for p, old in zip(parameters, before):
            p.copy_(old)
        law.moved = 0.0
        first, then = _said(whole, "a step of the optimiser"), _said(last, f"{part:.1g} of it")
        raise NonFiniteError(
            f"no step is small enough: {first}, {then}, and max_kl_step allows {most:.3g}. Is the learning rate far "
            "too large, does the control jump in its parameters, or is its dtype too coarse for them?",
            what="step",
        )


def _said(kl: float, step: str) -> str:
    if math.isfinite(kl):
        return f"{step} moves the path law by {kl:.3g} nats"
    return f"after {step} the control is not finite"
