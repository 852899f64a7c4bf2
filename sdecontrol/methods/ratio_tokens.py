"""Guidance of tokens by a log density ratio: logistic regression on paths of the reference, then rounds on its own.

As of numbers (:mod:`.ratio_guidance`), but what guides is the value of each neighbour and not a slope, so that every
round is the same regression: on paths of the guidance as it is, whose weights ``w exp(-f)`` are the nearer to 1 the
better it guides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..controls.guidance import ValueControl
from ..controls.token_network import TokenValue
from ..paths.paths import Paths
from ..processes.modules import copied
from .base import ControlState, Run, path_metrics
from .ratio_fit import Rows, drawn, logistic, steps_stored, to_come, weighted_exponent

#: of each regression
STEPS = 600
_RATE = 5e-3
_ROUND = 3  # a round on its own paths has so many times fewer of them
_ROWS = 16  # steps of a path that are stored
_LITTLE = 0.005  # nats that a round must gain for another one


class TokenRatioState(ControlState):
    """The guidance; the best value so far and its objective (mean and error, in nats); the part of the reward that it
    is for, ``alpha/temperature``; whether rounds still gain."""

    beta: Tensor
    score: Tensor
    ended: Tensor

    def __init__(self, control: ValueControl) -> None:
        super().__init__(control)
        control.value.requires_grad_(False)  # but while it is fitted
        self.kept = copied(control.value)
        self.beta = nn.Buffer(torch.zeros((), dtype=torch.float64))
        self.score = nn.Buffer(torch.tensor([-math.inf, 0.0], dtype=torch.float64))
        self.ended = nn.Buffer(torch.zeros((), dtype=torch.bool))

    @property
    def value(self) -> TokenValue:
        value = self.control.value
        assert isinstance(value, TokenValue)
        return value


def token_ratio_step(state: TokenRatioState, run: Run, num_paths: int) -> dict[str, float]:
    """A regression: at the lowest temperature that the paths' weights allow, then at the problem's own; unless the last
    one has made the guidance worse: then that is taken back."""
    with run.problem.evaluating():
        past, alpha = float(state.beta), run.problem.alpha
        control, n = (state.control, max(256, num_paths // _ROUND)) if past else (None, num_paths)
        rows, whole, paths = _rows(run, control, n)
        shown = path_metrics(paths)
        if past >= 1 and not _better(state, paths):
            return {**shown, "loss": math.nan, "temperature": alpha}
        beta = weighted_exponent(run, whole, n, past)
        value = state.value
        value.scale[0] = (beta * whole[0] - whole[1]).double().logsumexp(0) - math.log(whole.shape[1])
        loss = logistic(run, value, _ratio(value), float(value.scale[0]), rows, beta, (STEPS, _RATE))[1]
        state.beta.fill_(beta)
    return {**shown, "loss": loss, "temperature": alpha / max(beta, 1e-12)}


def _better(state: TokenRatioState, paths: list[Paths]) -> bool:
    """Whether the guidance, by its own paths, is no worse than the best before, to which it goes back else; and whether
    rounds still gain."""
    objective = torch.cat([(p.reward - p.cost) / p.alpha - p.kl() for p in paths]).double()
    mean, error = float(objective.mean()), float(objective.std()) / math.sqrt(len(objective))
    best, its_error = state.score.tolist()
    if mean < best - 3 * math.hypot(error, its_error):
        state.value.load_state_dict(state.kept.state_dict())
        state.ended.fill_(True)
        return False
    state.ended.fill_(mean - best < _LITTLE)
    if mean > best:
        state.kept.load_state_dict(state.value.state_dict())
        state.score.copy_(torch.tensor([mean, error]))
    return True


def _rows(run: Run, control: Any, n: int) -> tuple[Rows, Tensor, list[Paths]]:
    """Rows of paths of a control (None: the reference), gains and ratios of whole paths ``(2, paths)``, and the paths
    without their steps."""
    parts: list[tuple[Tensor, ...]] = []
    kept: list[Paths] = []
    for chunk, paths in drawn(run, control, n, run.iteration):
        k = steps_stored(run, paths, chunk, run.problem.event_shape.numel(), n, _ROWS)
        index = torch.arange(len(k), device=k.device).unsqueeze(1)
        gains, ratios = to_come(paths)
        whole = torch.stack((gains[0], ratios[0]), 1)
        parts.append((paths.states[k, index], run.chain.times[k], gains[k, index], ratios[k, index], whole))
        kept.append(paths.without_steps())
    seen, times, gains, ratios, whole = (torch.cat(part) for part in zip(*parts))
    return Rows(seen, times, gains, ratios), whole.mT, kept


def _ratio(value: TokenValue) -> Any:
    """``(tokens, t) -> f`` at a time of each row: the value less its level."""
    return lambda x, t: value.along(x.unsqueeze(1), t)[:, 0] - value.scale[0]
