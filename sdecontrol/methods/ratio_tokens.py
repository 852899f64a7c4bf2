"""Guidance of tokens by a log density ratio: logistic regression on paths of the reference, then rounds on its own.

As of numbers (:mod:`.ratio_guidance`), but what guides is the value of each neighbour and not a slope, so that every
round is the same regression: on paths of the guidance as it is, whose weights ``w exp(-f)`` are the nearer to 1 the
better it guides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..controls.guidance import ValueControl
from ..controls.token_network import TokenValue
from ..paths.paths import Paths
from .base import Run, path_metrics
from .ratio_fit import Rows, drawn, logistic, steps_stored, to_come, weighted_exponent
from .ratio_rounds import LITTLE, ROUND, RatioRounds

#: of each regression
STEPS = 600
_RATE = 5e-3


@dataclass
class Drawn:
    """Rows of paths, gains and ratios of whole paths ``(2, paths)``, and the paths without their steps."""

    rows: Rows
    whole: Tensor
    paths: list[Paths]


class TokenRatioState(RatioRounds[Drawn]):
    """The state of rounds."""

    def __init__(self, control: ValueControl) -> None:
        control.value.requires_grad_(False)  # but while it is fitted
        super().__init__(control)

    @property
    def value(self) -> TokenValue:
        value = self.control.value
        assert isinstance(value, TokenValue)
        return value


def token_ratio_step(state: TokenRatioState, run: Run, num_paths: int) -> dict[str, float]:
    """A regression: at the lowest temperature that the paths' weights allow, then at the problem's own. Its metrics are
    of the guidance that it leaves, by paths drawn afterwards; on a ladder of temperatures, of the paths that were
    fitted to."""
    past, alpha, few = float(state.beta), run.problem.alpha, max(256, num_paths // ROUND)

    def look(number: int) -> Drawn:
        return _rows(run, state.control, few, number)

    with run.problem.evaluating():
        if past == 1:
            before, best = state.begin(look), float(state.score[0])
            loss = regress_ratio(state, run, before, 1.0)
            kept = {"kept": state.settle(before, look, 1.0)}
            if float(state.score[0]) - best < LITTLE:
                state.ended.fill_(True)
        else:
            control, n = (state.control, few) if past else (None, num_paths)
            found = _rows(run, control, n, state.fresh())
            beta = weighted_exponent(run, found.whole, n, past)
            loss, kept = regress_ratio(state, run, found, beta), {}
            state.beta.fill_(beta)
            if beta < 1:
                return {**path_metrics(found.paths), "loss": loss, "temperature": alpha / max(beta, 1e-12)}
            state.first(look)
    assert state.seen is not None
    return {**path_metrics(state.seen.paths), "loss": loss, "temperature": alpha, **kept}


def regress_ratio(state: TokenRatioState, run: Run, found: Drawn, beta: float) -> float:
    value, whole = state.value, found.whole
    value.scale[0] = (beta * whole[0] - whole[1]).double().logsumexp(0) - math.log(whole.shape[1])
    return logistic(run, value, _ratio(value), float(value.scale[0]), found.rows, beta, (STEPS, _RATE))[1]


def _rows(run: Run, control: Any, n: int, number: int) -> Drawn:
    """Of paths of a control (None: the reference), the ``number``-th ones of a run."""
    parts: list[tuple[Tensor, ...]] = []
    kept: list[Paths] = []
    for chunk, paths in drawn(run, control, n, number):
        k = steps_stored(run, paths, (number, chunk), run.problem.event_shape.numel(), n)
        index = torch.arange(len(k), device=k.device).unsqueeze(1)
        gains, ratios = to_come(paths)
        whole = torch.stack((gains[0], ratios[0]), 1)
        parts.append((paths.states[k, index], run.chain.times[k], gains[k, index], ratios[k, index], whole))
        kept.append(paths.without_steps())
    seen, times, gains, ratios, whole = (torch.cat(part) for part in zip(*parts))
    return Drawn(Rows(seen, times, gains, ratios), whole.mT, kept)


def _ratio(value: TokenValue) -> Any:
    """``(tokens, t) -> f`` at a time of each row: the value less its level."""
    return lambda x, t: value.along(x.unsqueeze(1), t)[:, 0] - value.scale[0]
